//! The databases beside that of the readings: samples, labels and datasets in `<data>/learning.db`, and who may do
//! what in `<data>/trust.db`.
//!
//! SQLite lets one connection write at a time: a person who labels must never make ingest wait, nor a training
//! somebody who logs in. Each of `samples`, `labels`, `datasets` and so on has its own SQL.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use sqlx::{
    ConnectOptions, Connection, Sqlite, SqliteConnection, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::sync::MutexGuard;

use crate::store::Writing;

/// Connections that only read: labelling and training are few people's work.
const READERS: u32 = 3;
/// As long as a request waits.
const BUSY: Duration = Duration::from_secs(10);
/// The write-ahead log is cut back to this after a burst, in bytes.
const WAL_LIMIT: &str = "67108864";

/// What can go wrong with such a database.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be opened.
    #[error("cannot open the database {path}: {error}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        error: sqlx::Error,
    },
    /// It cannot be brought up to date.
    #[error("cannot bring the database {path} up to date: {error}")]
    Migrate {
        /// The file.
        path: PathBuf,
        /// Which step, and why.
        error: sqlx::migrate::MigrateError,
    },
    /// A statement failed.
    #[error("{operation}: {error}")]
    Sql {
        /// What was being done.
        operation: &'static str,
        /// What SQLite says.
        error: sqlx::Error,
    },
    /// What is stored cannot be understood.
    #[error("{operation}: {detail}")]
    Content {
        /// What was being done.
        operation: &'static str,
        /// What is wrong with it.
        detail: String,
    },
}

impl RecordError {
    /// For `map_err`: names what was being done.
    pub(crate) fn sql(operation: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |error| Self::Sql { operation, error }
    }
}

/// The open database.
#[derive(Debug)]
pub struct Records {
    writer: Writing,
    readers: SqlitePool,
}

/// The right to write, for one short transaction.
pub(crate) struct Writer<'a>(MutexGuard<'a, SqliteConnection>);

impl Writer<'_> {
    pub(crate) async fn begin(&mut self) -> Result<Transaction<'_, Sqlite>, RecordError> {
        let begin = RecordError::sql("begin a transaction");
        self.0.begin_with("BEGIN IMMEDIATE").await.map_err(begin)
    }

    /// For what cannot be in a transaction.
    pub(crate) fn connection(&mut self) -> &mut SqliteConnection {
        &mut self.0
    }
}

/// Ends a transaction; what it wrote is on the disk then.
pub(crate) async fn commit(tx: Transaction<'_, Sqlite>) -> Result<(), RecordError> {
    tx.commit()
        .await
        .map_err(RecordError::sql("commit a transaction"))
}

impl Records {
    /// Opens or makes `<data>/learning.db`.
    ///
    /// # Errors
    /// If the file cannot be opened or brought up to date.
    pub async fn open(data: &Path) -> Result<Self, RecordError> {
        Self::at(
            data.join("learning.db"),
            sqlx::migrate!("migrations/learning"),
        )
        .await
    }

    /// Opens or makes `<data>/trust.db`.
    ///
    /// # Errors
    /// If the file cannot be opened or brought up to date.
    pub async fn trust(data: &Path) -> Result<Self, RecordError> {
        Self::at(data.join("trust.db"), sqlx::migrate!("migrations/trust")).await
    }

    async fn at(path: PathBuf, steps: sqlx::migrate::Migrator) -> Result<Self, RecordError> {
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(false)
            .busy_timeout(BUSY)
            .pragma("journal_size_limit", WAL_LIMIT)
            // What is deleted is overwritten: an erased sample is in no page that is free now.
            .pragma("secure_delete", "on")
            .pragma("cache_size", "-8192")
            .pragma("temp_store", "memory")
            .disable_statement_logging();
        let open = |error| RecordError::Open {
            path: path.clone(),
            error,
        };
        let writer = Writing::open(&options).await.map_err(open)?;
        steps
            .run(&mut *writer.lock().await)
            .await
            .map_err(|error| RecordError::Migrate {
                path: path.clone(),
                error,
            })?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(BUSY)
            .connect_lazy_with(options.create_if_missing(false).pragma("query_only", "on"));
        Ok(Self { writer, readers })
    }

    /// Waits for the right to write.
    pub(crate) async fn writer(&self) -> Writer<'_> {
        Writer(self.writer.lock().await)
    }

    /// The connections that read.
    pub(crate) fn readers(&self) -> &SqlitePool {
        &self.readers
    }

    /// Closes the connections, which writes the log back into the database.
    pub(crate) async fn close(&self) {
        self.readers.close().await;
        let mut writer = self.writer.lock().await;
        if let Err(error) = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
            .execute(&mut *writer)
            .await
        {
            tracing::debug!(%error, "the log of a database stays for the next start");
        }
    }
}

/// Floats as they are stored: 32 bits each, the low byte first.
#[must_use]
pub(crate) fn floats_to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The reverse of [`floats_to_bytes`]; bytes that are no whole float are left out.
#[must_use]
pub(crate) fn floats_of_bytes(bytes: &[u8]) -> Vec<f32> {
    let (floats, _) = bytes.as_chunks::<4>();
    floats.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

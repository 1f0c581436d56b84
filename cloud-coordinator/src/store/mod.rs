//! The database. All SQL is in this module.
//!
//! One connection writes, behind a lock that is held for one short transaction at a time; a few others only
//! read. What is committed is on the disk: WAL with `synchronous = FULL`.

mod read;
mod retention;
mod sightings;
mod write;
mod writing;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_core::RangeSet;
use sqlx::{
    ConnectOptions, Connection, Row, SqlitePool,
    sqlite::{
        SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions,
        SqliteSynchronous,
    },
};

pub(crate) use read::{GapFilter, GapRow, Order, ReadingFilter, ReadingRow};
pub(crate) use retention::{Limits, keep_bounded};
pub(crate) use sightings::{Same, SightingFilter, SightingRow};
pub(crate) use write::{Batch, DeviceRow, NewGap, NewReading};
pub(crate) use writing::Writing;

/// Connections for the API: as many queries at once as there are cores to answer them on a small machine.
const READERS: u32 = 4;
/// A query that runs longer than the request that asked for it has no reader any more.
const BUSY: Duration = Duration::from_secs(10);
/// The write-ahead log is cut back to this after a burst, in bytes.
const WAL_LIMIT: &str = "67108864";

/// What can go wrong with the database.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("cannot open the database {path}: {error}")]
    Open { path: PathBuf, error: sqlx::Error },
    #[error("cannot bring the database {path} up to date: {error}")]
    Migrate {
        path: PathBuf,
        error: sqlx::migrate::MigrateError,
    },
    #[error("{operation}: {error}")]
    Sql {
        operation: &'static str,
        error: sqlx::Error,
    },
    #[error("{operation}: {error}")]
    Json {
        operation: &'static str,
        error: serde_json::Error,
    },
}

impl StoreError {
    /// For `map_err`: names what was being done.
    fn sql(operation: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |error| Self::Sql { operation, error }
    }
}

/// The coordinator's database.
#[derive(Debug)]
pub(crate) struct Store {
    writer: Writing,
    readers: SqlitePool,
}

impl Store {
    /// Opens or makes `<data>/coordinator.db`.
    pub(crate) async fn open(data: &Path) -> Result<Self, StoreError> {
        let path = data.join("coordinator.db");
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .auto_vacuum(SqliteAutoVacuum::Incremental)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(false)
            .busy_timeout(BUSY)
            .pragma("journal_size_limit", WAL_LIMIT)
            .pragma("cache_size", "-16384")
            .pragma("temp_store", "memory")
            .disable_statement_logging();
        let open = |error| StoreError::Open {
            path: path.clone(),
            error,
        };
        let writer = Writing::open(&options).await.map_err(open)?;
        sqlx::migrate!()
            .run(&mut *writer.lock().await)
            .await
            .map_err(|error| StoreError::Migrate {
                path: path.clone(),
                error,
            })?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(BUSY)
            .connect_lazy_with(
                options
                    .create_if_missing(false)
                    .pragma("cache_size", "-4096")
                    .pragma("query_only", "on"),
            );
        Ok(Self { writer, readers })
    }

    /// Writes nothing, but finds out whether it could.
    pub(crate) async fn writable(&self) -> Result<(), StoreError> {
        let mut writer = self.writer.lock().await;
        let failed = || StoreError::sql("try to write to the database");
        let tx = writer
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(failed())?;
        tx.rollback().await.map_err(failed())
    }

    /// Every known device.
    pub(crate) async fn devices(&self) -> Result<Vec<DeviceRow>, StoreError> {
        sqlx::query_as(
            "SELECT id, site, device, first_seen_ms, last_seen_ms, status, info, model, state,
             stored, missing, right_count, wrong_count FROM devices ORDER BY id",
        )
        .fetch_all(&self.readers)
        .await
        .map_err(StoreError::sql("read the devices"))
    }

    /// The highest id that a reading has ever had, 0 if there was none. Ids are cursors: one is never given out again,
    /// even where retention has taken the reading away.
    pub(crate) async fn last_reading(&self) -> Result<i64, StoreError> {
        sqlx::query("SELECT last FROM numbered WHERE what = 'reading'")
            .fetch_one(&self.readers)
            .await
            .and_then(|row| row.try_get(0))
            .map_err(StoreError::sql("read the last id of the readings"))
    }

    /// What is stored of one outbox; `None` if nothing is known of it.
    pub(crate) async fn progress(
        &self,
        device: i64,
        epoch: u64,
    ) -> Result<Option<RangeSet>, StoreError> {
        let text: Option<String> =
            sqlx::query_scalar("SELECT stored FROM progress WHERE device = ? AND epoch = ?")
                .bind(device)
                .bind(epoch.cast_signed())
                .fetch_optional(&self.readers)
                .await
                .map_err(StoreError::sql("read the progress of a device"))?;
        text.map(|text| parse_ranges(&text)).transpose()
    }

    /// How many outboxes a device has had.
    pub(crate) async fn outboxes(&self, device: i64) -> Result<i64, StoreError> {
        sqlx::query_scalar("SELECT count(*) FROM progress WHERE device = ?")
            .bind(device)
            .fetch_one(&self.readers)
            .await
            .map_err(StoreError::sql("count the outboxes of a device"))
    }

    /// The newest outbox of each device that was heard of since `since_ms`: device, epoch, what is stored.
    pub(crate) async fn recent_progress(
        &self,
        since_ms: i64,
    ) -> Result<Vec<(i64, u64, RangeSet)>, StoreError> {
        let rows: Vec<(i64, i64, String, i64)> = sqlx::query_as(
            "SELECT device, epoch, stored, max(updated_ms) FROM progress
             WHERE updated_ms >= ? GROUP BY device",
        )
        .bind(since_ms)
        .fetch_all(&self.readers)
        .await
        .map_err(StoreError::sql("read the progress of recent devices"))?;
        rows.into_iter()
            .map(|(device, epoch, text, _)| {
                Ok((device, epoch.cast_unsigned(), parse_ranges(&text)?))
            })
            .collect()
    }

    /// Closes the connections, which writes the log back into the database.
    pub(crate) async fn close(&self) {
        self.readers.close().await;
        let mut writer = self.writer.lock().await;
        // The connection itself is closed when it is dropped.
        if let Err(error) = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
            .execute(&mut *writer)
            .await
        {
            tracing::debug!(%error, "the log of the database stays for the next start");
        }
    }
}

fn parse_ranges(text: &str) -> Result<RangeSet, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Json {
        operation: "read the progress of a device",
        error,
    })
}

/// A setting that SQLite reports, for the tests.
#[cfg(test)]
async fn pragma(store: &Store, name: &'static str) -> i64 {
    let mut writer = store.writer.lock().await;
    sqlx::query_scalar(name)
        .fetch_one(&mut *writer)
        .await
        .unwrap()
}

#[cfg(test)]
mod tests;

//! The one connection of a database that writes.

use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::sync::{Mutex, MutexGuard};

/// A connection that writes, for one short transaction at a time.
#[derive(Debug)]
pub(crate) struct Writing {
    options: SqliteConnectOptions,
    connection: Mutex<SqliteConnection>,
}

impl Writing {
    /// Opens it.
    pub(crate) async fn open(options: &SqliteConnectOptions) -> Result<Self, sqlx::Error> {
        let connection = SqliteConnection::connect_with(options).await?;
        Ok(Self {
            options: options.clone().create_if_missing(false),
            connection: Mutex::new(connection),
        })
    }

    /// Waits for the right to write.
    ///
    /// Where the disk is full SQLite takes a transaction back by itself, and the library, whose own `ROLLBACK` then fails, believes
    /// for ever that it goes on. Such a connection is made anew; until that succeeds, what is tried with it fails.
    pub(crate) async fn lock(&self) -> MutexGuard<'_, SqliteConnection> {
        let mut connection = self.connection.lock().await;
        // One that was dropped may be on its way back; an answer comes after that.
        if connection.is_in_transaction() && connection.ping().await.is_ok() {
            tracing::debug!("a transaction had been left open");
        }
        if connection.is_in_transaction() {
            match SqliteConnection::connect_with(&self.options).await {
                Ok(fresh) => *connection = fresh,
                Err(error) => tracing::debug!(%error, "the database cannot be opened anew"),
            }
        }
        connection
    }
}

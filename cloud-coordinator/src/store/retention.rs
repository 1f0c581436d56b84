//! Giving back what is too old or too much, in small steps between the commits of ingest.

use std::{sync::Arc, time::Duration};

use sqlx::Row;
use tokio_util::sync::CancellationToken;

use super::{Store, StoreError};
use crate::{clock, metrics::Metrics};

/// How long readings are kept, and how much space they may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Milliseconds since a reading came in.
    pub(crate) max_age_ms: i64,
    /// Bytes of the database without its free pages.
    pub(crate) max_bytes: u64,
}

/// Rows of one step: some ten milliseconds on a slow disk, during which ingest waits.
const STEP: i64 = 2_000;
/// Windows of [`STEP`] rows that are looked at beyond the last expired row: readings that came in while the
/// clock was wrong must not hide the expired ones behind them.
const LOOK_AHEAD: i64 = 5;
/// Pages given back in one step.
const VACUUM_PAGES: i64 = 2_000;
/// Between two looks.
const EVERY: Duration = Duration::from_secs(60);
/// Between two steps, so that ingest gets the lock.
const PAUSE: Duration = Duration::from_millis(20);
/// A long removal is told this often, in readings.
const TELL_EVERY: u64 = 1_000_000;

/// Looks every minute until `stop`, and removes what is beyond the limits.
pub(crate) async fn keep_bounded(
    store: Arc<Store>,
    limits: Limits,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    loop {
        let removing = remove(&store, limits, clock::now_ms(), &metrics);
        let removed = tokio::select! {
            () = stop.cancelled() => return,
            removed = removing => removed,
        };
        match removed {
            Ok(0) => {}
            Ok(readings) => tracing::info!(readings, "retention removed readings"),
            Err(error) => tracing::warn!(%error, "retention failed, it is tried again in a minute"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

/// Removes everything that is beyond the limits at `now_ms`; says how many readings that were.
pub(super) async fn remove(
    store: &Store,
    limits: Limits,
    now_ms: i64,
    metrics: &Metrics,
) -> Result<u64, StoreError> {
    let mut removed = 0;
    let mut told = 0;
    let mut note = |rows: u64| {
        removed += rows;
        metrics.retention_removed.inc_by(rows);
        if removed / TELL_EVERY > told {
            told = removed / TELL_EVERY;
            tracing::info!(readings = removed, "retention is removing readings");
        }
    };
    let oldest_ms = now_ms.saturating_sub(limits.max_age_ms);
    let mut window = 0;
    while window < LOOK_AHEAD {
        match store.remove_expired(oldest_ms, window).await? {
            Some(0) => window += 1,
            Some(rows) => note(rows),
            None => break,
        }
        tokio::time::sleep(PAUSE).await;
    }
    store.remove_expired_gaps(oldest_ms).await?;
    store.remove_expired_sightings(oldest_ms).await?;
    while store.size().await?.used > limits.max_bytes {
        let rows = store.remove_oldest().await?;
        if rows == 0 {
            break;
        }
        note(rows);
        tokio::time::sleep(PAUSE).await;
    }
    // Some free pages are welcome: the next readings go there.
    while store.size().await?.is_wasteful() {
        store.give_back().await?;
        tokio::time::sleep(PAUSE).await;
    }
    Ok(removed)
}

/// How large the database is, in bytes.
#[derive(Clone, Copy, Debug)]
struct Size {
    used: u64,
    free: u64,
}

impl Size {
    /// More than a quarter of it, and more than a handful of pages, hold nothing.
    fn is_wasteful(self) -> bool {
        const SMALL: u64 = 1 << 20;
        self.free > SMALL && self.free > self.used / 3
    }
}

impl Store {
    async fn size(&self) -> Result<Size, StoreError> {
        let row = sqlx::query(
            "SELECT page_count, freelist_count, page_size
             FROM pragma_page_count(), pragma_freelist_count(), pragma_page_size()",
        )
        .fetch_one(&self.readers)
        .await
        .map_err(StoreError::sql("ask for the size of the database"))?;
        let number = |column: &str| {
            let number: i64 = row
                .try_get(column)
                .map_err(StoreError::sql("ask for the size of the database"))?;
            Ok::<u64, StoreError>(number.unsigned_abs())
        };
        let (pages, free, size) = (
            number("page_count")?,
            number("freelist_count")?,
            number("page_size")?,
        );
        Ok(Size {
            used: pages.saturating_sub(free) * size,
            free: free * size,
        })
    }

    /// Removes expired readings from the `window`-th oldest [`STEP`] rows; `None` if there is no such window.
    async fn remove_expired(&self, oldest_ms: i64, window: i64) -> Result<Option<u64>, StoreError> {
        let ids: Option<(i64, i64)> = sqlx::query_as(
            "SELECT min(id), max(id) FROM
             (SELECT id FROM readings ORDER BY id LIMIT ? OFFSET ?) HAVING count(*) > 0",
        )
        .bind(STEP)
        .bind(window * STEP)
        .fetch_optional(&self.readers)
        .await
        .map_err(StoreError::sql("look for expired readings"))?;
        let Some((first, last)) = ids else {
            return Ok(None);
        };
        let mut writer = self.writer.lock().await;
        let done = sqlx::query("DELETE FROM readings WHERE id BETWEEN ? AND ? AND received_ms < ?")
            .bind(first)
            .bind(last)
            .bind(oldest_ms)
            .execute(&mut *writer)
            .await
            .map_err(StoreError::sql("remove expired readings"))?;
        Ok(Some(done.rows_affected()))
    }

    async fn remove_expired_gaps(&self, oldest_ms: i64) -> Result<(), StoreError> {
        let mut writer = self.writer.lock().await;
        sqlx::query("DELETE FROM gaps WHERE received_ms < ?")
            .bind(oldest_ms)
            .execute(&mut *writer)
            .await
            .map_err(StoreError::sql("remove expired gaps"))?;
        Ok(())
    }

    async fn remove_oldest(&self) -> Result<u64, StoreError> {
        let mut writer = self.writer.lock().await;
        let done = sqlx::query(
            "DELETE FROM readings WHERE id IN (SELECT id FROM readings ORDER BY id LIMIT ?)",
        )
        .bind(STEP)
        .execute(&mut *writer)
        .await
        .map_err(StoreError::sql("remove the oldest readings"))?;
        Ok(done.rows_affected())
    }

    async fn give_back(&self) -> Result<(), StoreError> {
        let mut writer = self.writer.lock().await;
        sqlx::query(sqlx::AssertSqlSafe(format!(
            "PRAGMA incremental_vacuum({VACUUM_PAGES})"
        )))
        .execute(&mut *writer)
        .await
        .map_err(StoreError::sql("give space back"))?;
        Ok(())
    }
}

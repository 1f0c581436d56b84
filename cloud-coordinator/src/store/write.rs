//! One commit.

use mesh_core::{GapReason, RangeSet, Reading};
use sqlx::{
    AssertSqlSafe, Connection, Sqlite, SqliteConnection, query::Query, sqlite::SqliteArguments,
};

use super::{Store, StoreError};

/// Rows of one statement: each size is one prepared statement that is kept. The largest stays far below
/// SQLite's 32,766 parameters and keeps the cost of a statement small beside that of its rows.
const ROWS: [usize; 4] = [1024, 128, 16, 1];

/// A reading with a place to go.
#[derive(Clone, Debug)]
pub(crate) struct NewReading {
    pub(crate) id: i64,
    pub(crate) device: i64,
    pub(crate) received_ms: i64,
    pub(crate) replayed: bool,
    pub(crate) reading: Reading,
}

/// Readings that are missing, none of them stored.
#[derive(Clone, Debug)]
pub(crate) struct NewGap {
    pub(crate) device: i64,
    pub(crate) epoch: u64,
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) reason: GapReason,
    pub(crate) received_ms: i64,
}

/// A device as the database keeps it.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(crate) struct DeviceRow {
    pub(crate) id: i64,
    pub(crate) site: String,
    pub(crate) device: String,
    pub(crate) first_seen_ms: i64,
    pub(crate) last_seen_ms: i64,
    pub(crate) status: Option<String>,
    pub(crate) info: Option<String>,
    pub(crate) model: Option<String>,
    pub(crate) state: Option<String>,
    pub(crate) stored: i64,
    pub(crate) missing: i64,
    pub(crate) right_count: i64,
    pub(crate) wrong_count: i64,
}

/// Everything that one transaction writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch<'a> {
    pub(crate) devices: &'a [DeviceRow],
    pub(crate) readings: &'a [NewReading],
    pub(crate) gaps: &'a [NewGap],
    /// Device and epoch → what is now stored of that outbox.
    pub(crate) progress: &'a [(&'a (i64, u64), &'a RangeSet)],
    pub(crate) now_ms: i64,
}

impl Batch<'_> {
    /// Is there nothing to write?
    pub(crate) fn is_empty(&self) -> bool {
        self.devices.is_empty()
            && self.readings.is_empty()
            && self.gaps.is_empty()
            && self.progress.is_empty()
    }
}

type Bound<'q> = Query<'q, Sqlite, SqliteArguments>;

/// A statement that writes many rows: what stands before and after the values, and how many columns.
struct Insert {
    before: &'static str,
    columns: usize,
    after: &'static str,
}

const DEVICES: Insert = Insert {
    before: "INSERT INTO devices (id, site, device, first_seen_ms, last_seen_ms, status, info, model, \
             state, stored, missing, right_count, wrong_count) VALUES ",
    columns: 13,
    after: " ON CONFLICT (id) DO UPDATE SET last_seen_ms = excluded.last_seen_ms, \
            status = excluded.status, info = excluded.info, model = excluded.model, \
            state = excluded.state, stored = excluded.stored, missing = excluded.missing, \
            right_count = excluded.right_count, wrong_count = excluded.wrong_count",
};
const READINGS: Insert = Insert {
    before: "INSERT INTO readings (id, device, epoch, seq, ts, received_ms, source, frame, label, score, \
             margin, model, latency_ms, answered_by, file, truth, replayed) VALUES ",
    columns: 17,
    // The second guard, behind the progress: a reading is in the table once.
    after: " ON CONFLICT (device, epoch, seq) DO NOTHING",
};
const PROGRESS: Insert = Insert {
    before: "INSERT INTO progress (device, epoch, stored, updated_ms) VALUES ",
    columns: 4,
    after: " ON CONFLICT (device, epoch) DO UPDATE SET stored = excluded.stored, \
            updated_ms = excluded.updated_ms",
};

impl Insert {
    fn sql(&self, rows: usize) -> String {
        let row = format!("({})", vec!["?"; self.columns].join(","));
        format!(
            "{}{}{}",
            self.before,
            vec![row.as_str(); rows].join(","),
            self.after
        )
    }

    async fn all<'q, T>(
        &self,
        connection: &mut SqliteConnection,
        mut rest: &'q [T],
        bind: impl Fn(Bound<'q>, &'q T) -> Bound<'q>,
    ) -> Result<(), sqlx::Error> {
        for rows in ROWS {
            if rest.len() < rows {
                continue;
            }
            let sql = self.sql(rows);
            while let Some((chunk, more)) = rest.split_at_checked(rows) {
                let query = sqlx::query(AssertSqlSafe(sql.clone()));
                let query = chunk.iter().fold(query, &bind);
                query.execute(&mut *connection).await?;
                rest = more;
            }
        }
        Ok(())
    }
}

impl Store {
    /// Writes a batch in one transaction. When this returns `Ok`, it would survive a power cut.
    pub(crate) async fn commit(&self, batch: &Batch<'_>) -> Result<(), StoreError> {
        let progress = batch
            .progress
            .iter()
            .map(|(key, stored)| Ok((key, serde_json::to_string(stored)?)))
            .collect::<Result<Vec<_>, serde_json::Error>>()
            .map_err(|error| StoreError::Json {
                operation: "write the progress of a device",
                error,
            })?;
        let mut writer = self.writer.lock().await;
        let begin = StoreError::sql("begin a transaction");
        let mut tx = writer.begin_with("BEGIN IMMEDIATE").await.map_err(begin)?;
        DEVICES
            .all(&mut tx, batch.devices, |query, d| {
                query
                    .bind(d.id)
                    .bind(&d.site)
                    .bind(&d.device)
                    .bind(d.first_seen_ms)
                    .bind(d.last_seen_ms)
                    .bind(&d.status)
                    .bind(&d.info)
                    .bind(&d.model)
                    .bind(&d.state)
                    .bind(d.stored)
                    .bind(d.missing)
                    .bind(d.right_count)
                    .bind(d.wrong_count)
            })
            .await
            .map_err(StoreError::sql("write devices"))?;
        READINGS
            .all(&mut tx, batch.readings, |query, r| {
                let reading = &r.reading;
                query
                    .bind(r.id)
                    .bind(r.device)
                    .bind(reading.epoch.cast_signed())
                    .bind(reading.seq.cast_signed())
                    .bind(reading.ts)
                    .bind(r.received_ms)
                    .bind(reading.source.as_str())
                    .bind(reading.frame.cast_signed())
                    .bind(&reading.label)
                    .bind(f64::from(reading.score))
                    .bind(f64::from(reading.margin))
                    .bind(&reading.model)
                    .bind(f64::from(reading.latency_ms))
                    .bind(reading.by.as_ref().map(mesh_core::Name::as_str))
                    .bind(&reading.file)
                    .bind(&reading.truth)
                    .bind(r.replayed)
            })
            .await
            .map_err(StoreError::sql("write readings"))?;
        if let Some(last) = batch.readings.iter().map(|r| r.id).max() {
            sqlx::query("UPDATE numbered SET last = ? WHERE what = 'reading' AND last < ?")
                .bind(last)
                .bind(last)
                .execute(&mut *tx)
                .await
                .map_err(StoreError::sql("note the last id of the readings"))?;
        }
        for gap in batch.gaps {
            write_gap(&mut tx, gap)
                .await
                .map_err(StoreError::sql("write a gap"))?;
        }
        PROGRESS
            .all(&mut tx, &progress, |query, ((device, epoch), stored)| {
                query
                    .bind(device)
                    .bind(epoch.cast_signed())
                    .bind(stored)
                    .bind(batch.now_ms)
            })
            .await
            .map_err(StoreError::sql("write the progress of devices"))?;
        tx.commit()
            .await
            .map_err(StoreError::sql("commit a transaction"))
    }
}

/// Adds a gap; one of the same reason that it continues becomes one row with it, which is a new one to those who follow.
async fn write_gap(connection: &mut SqliteConnection, gap: &NewGap) -> Result<(), sqlx::Error> {
    let (mut from, mut to) = (gap.from.cast_signed(), gap.to.cast_signed());
    let beside: Vec<(i64, i64, i64)> = sqlx::query_as(
        "SELECT id, from_seq, to_seq FROM gaps WHERE device = ? AND epoch = ? AND reason = ?
         AND from_seq <= ? AND to_seq >= ?",
    )
    .bind(gap.device)
    .bind(gap.epoch.cast_signed())
    .bind(gap.reason.as_str())
    .bind(to.saturating_add(1))
    .bind(from.saturating_sub(1))
    .fetch_all(&mut *connection)
    .await?;
    for (id, a, b) in beside {
        from = from.min(a);
        to = to.max(b);
        sqlx::query("DELETE FROM gaps WHERE id = ?")
            .bind(id)
            .execute(&mut *connection)
            .await?;
    }
    let id: i64 =
        sqlx::query_scalar("UPDATE numbered SET last = last + 1 WHERE what = 'gap' RETURNING last")
            .fetch_one(&mut *connection)
            .await?;
    sqlx::query(
        "INSERT INTO gaps (id, device, epoch, from_seq, to_seq, reason, received_ms)
         VALUES (?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(id)
    .bind(gap.device)
    .bind(gap.epoch.cast_signed())
    .bind(from)
    .bind(to)
    .bind(gap.reason.as_str())
    .bind(gap.received_ms)
    .execute(&mut *connection)
    .await?;
    Ok(())
}

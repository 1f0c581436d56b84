//! Readings of several cameras that are about the same thing.

use serde::Serialize;
use sqlx::{Connection, QueryBuilder, Sqlite, SqliteConnection};

use super::{Order, Store, StoreError};

/// Readings that are looked at in one transaction: some ten milliseconds, during which ingest waits.
const STEP: i64 = 500;
/// Something that is seen for longer than this is said again, as something new.
const LONGEST_MS: i64 = 10 * 60_000;
/// Told in one go.
const SAID: i64 = 100;

/// What makes readings a sighting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Same<'a> {
    pub(crate) labels: &'a [String],
    pub(crate) min_score: f64,
    /// Readings this far apart at most, in milliseconds, are about the same thing.
    pub(crate) window_ms: i64,
}

/// A sighting.
#[derive(Clone, Debug, PartialEq, Serialize, sqlx::FromRow, utoipa::ToSchema)]
#[schema(as = Sighting)]
pub(crate) struct SightingRow {
    /// The same for all who saw it.
    pub(crate) id: String,
    /// The site.
    pub(crate) site: String,
    /// What was seen.
    pub(crate) label: String,
    /// When it was first seen, milliseconds since 1970 by the devices' clocks.
    pub(crate) from_ms: i64,
    /// When it was last seen.
    pub(crate) to_ms: i64,
    /// When the coordinator first heard of it, milliseconds since 1970.
    pub(crate) opened_ms: i64,
    /// Who saw it, the first one first.
    #[sqlx(skip)]
    pub(crate) witnesses: Vec<WitnessRow>,
}

/// A source that saw it.
#[derive(Clone, Debug, PartialEq, Serialize, sqlx::FromRow, utoipa::ToSchema)]
#[schema(as = Witness)]
pub(crate) struct WitnessRow {
    /// The device.
    pub(crate) device: String,
    /// Its camera.
    pub(crate) source: String,
    /// When it first saw it, milliseconds since 1970.
    pub(crate) ts: i64,
    /// How sure it was at best.
    pub(crate) score: f64,
    /// How many of its readings say so.
    pub(crate) readings: i64,
    /// The first of them.
    pub(crate) epoch: i64,
    /// The first of them.
    pub(crate) seq: i64,
}

/// Which sightings.
#[derive(Clone, Debug, Default)]
pub(crate) struct SightingFilter {
    pub(crate) site: Option<String>,
    pub(crate) label: Option<String>,
    /// First seen at or after this.
    pub(crate) since: Option<i64>,
    /// The cursor: when the last one of the page before was first heard of, and its id.
    pub(crate) after: Option<(i64, String)>,
    pub(crate) order: Order,
    pub(crate) limit: i64,
}

#[derive(sqlx::FromRow)]
struct Seen {
    id: i64,
    site: String,
    device: String,
    source: String,
    epoch: i64,
    seq: i64,
    ts: i64,
    label: String,
    score: f64,
}

/// A name for what begins with this reading: the same whenever it is made.
fn name(seen: &Seen) -> String {
    let identity = format!(
        "{}/{}/{}/{}/{}",
        seen.site, seen.device, seen.epoch, seen.seq, seen.label
    );
    let [a, b, c, d, e, f, g, h, ..] = models::digest_of(identity.as_bytes()).0;
    format!("{:016x}", u64::from_be_bytes([a, b, c, d, e, f, g, h]))
}

impl Store {
    /// Looks at the next stored readings; true if there may be more. The first time it begins with what comes from now on.
    pub(crate) async fn sight(&self, same: Same<'_>, now_ms: i64) -> Result<bool, StoreError> {
        let failed = || StoreError::sql("look for what several cameras have seen");
        let last = self.last_reading().await?;
        let cursor: Option<i64> = sqlx::query_scalar("SELECT reading FROM sighted")
            .fetch_optional(&self.readers)
            .await
            .map_err(failed())?;
        let from = cursor.unwrap_or(last);
        if cursor == Some(last) {
            return Ok(false);
        }
        let to = last.min(from + STEP);
        let seen = self.seen(same, from, to).await.map_err(failed())?;
        let mut writer = self.writer.lock().await;
        let mut tx = writer.begin().await.map_err(failed())?;
        for seen in &seen {
            witness(&mut tx, seen, same.window_ms, now_ms)
                .await
                .map_err(failed())?;
        }
        sqlx::query(
            "INSERT INTO sighted (one, reading) VALUES (1, ?)
             ON CONFLICT (one) DO UPDATE SET reading = excluded.reading",
        )
        .bind(to)
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        tx.commit().await.map_err(failed())?;
        Ok(to < last)
    }

    async fn seen(&self, same: Same<'_>, from: i64, to: i64) -> Result<Vec<Seen>, sqlx::Error> {
        let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(
            "SELECT r.id, d.site, d.device, r.source, r.epoch, r.seq, r.ts, r.label, r.score
             FROM readings r JOIN devices d ON d.id = r.device WHERE r.id > ",
        );
        query.push_bind(from).push(" AND r.id <= ").push_bind(to);
        query.push(" AND r.score >= ").push_bind(same.min_score);
        query.push(" AND r.label IN (");
        let mut labels = query.separated(", ");
        for label in same.labels {
            labels.push_bind(label.clone());
        }
        query.push(") ORDER BY r.id");
        query.build_query_as().fetch_all(&self.readers).await
    }

    /// What subscribers have not been told, and was first heard of before `before_ms`: all who saw it had the time to say so.
    pub(crate) async fn to_say(&self, before_ms: i64) -> Result<Vec<SightingRow>, StoreError> {
        let failed = || StoreError::sql("read what was seen");
        let rows = sqlx::query_as(
            "SELECT id, site, label, from_ms, to_ms, opened_ms FROM sightings
             WHERE said = 0 AND opened_ms <= ? ORDER BY opened_ms LIMIT ?",
        )
        .bind(before_ms)
        .bind(SAID)
        .fetch_all(&self.readers)
        .await
        .map_err(failed())?;
        self.with_witnesses(rows).await
    }

    /// Subscribers have been told.
    pub(crate) async fn said(&self, id: &str) -> Result<(), StoreError> {
        let mut writer = self.writer.lock().await;
        sqlx::query("UPDATE sightings SET said = 1 WHERE id = ?")
            .bind(id)
            .execute(&mut *writer)
            .await
            .map(|_| ())
            .map_err(StoreError::sql("note that a sighting was said"))
    }

    /// A page of sightings, in the order in which they were first heard of.
    pub(crate) async fn sightings(
        &self,
        filter: SightingFilter,
    ) -> Result<Vec<SightingRow>, StoreError> {
        let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(
            "SELECT id, site, label, from_ms, to_ms, opened_ms FROM sightings WHERE 1 = 1",
        );
        if let Some(site) = filter.site {
            query.push(" AND site = ").push_bind(site);
        }
        if let Some(label) = filter.label {
            query.push(" AND label = ").push_bind(label);
        }
        if let Some(since) = filter.since {
            query.push(" AND from_ms >= ").push_bind(since);
        }
        let is_rising = filter.order == Order::Asc;
        if let Some((ms, id)) = filter.after {
            query.push(if is_rising {
                " AND (opened_ms, id) > ("
            } else {
                " AND (opened_ms, id) < ("
            });
            query.push_bind(ms).push(", ").push_bind(id).push(")");
        }
        query.push(if is_rising {
            " ORDER BY opened_ms, id LIMIT "
        } else {
            " ORDER BY opened_ms DESC, id DESC LIMIT "
        });
        query.push_bind(filter.limit);
        let rows = query.build_query_as().fetch_all(&self.readers).await;
        let rows = rows.map_err(StoreError::sql("read the sightings"))?;
        self.with_witnesses(rows).await
    }

    async fn with_witnesses(
        &self,
        mut rows: Vec<SightingRow>,
    ) -> Result<Vec<SightingRow>, StoreError> {
        for row in &mut rows {
            row.witnesses = sqlx::query_as(
                "SELECT device, source, ts, score, readings, epoch, seq FROM witnesses
                 WHERE sighting = ? ORDER BY ts, device, source",
            )
            .bind(&row.id)
            .fetch_all(&self.readers)
            .await
            .map_err(StoreError::sql("read who saw it"))?;
        }
        Ok(rows)
    }

    /// Forgets what was first heard of before this.
    pub(super) async fn remove_expired_sightings(&self, oldest_ms: i64) -> Result<(), StoreError> {
        let failed = || StoreError::sql("remove old sightings");
        let mut writer = self.writer.lock().await;
        let mut tx = writer.begin().await.map_err(failed())?;
        for step in [
            "DELETE FROM witnesses WHERE sighting IN (SELECT id FROM sightings WHERE opened_ms < ?)",
            "DELETE FROM sightings WHERE opened_ms < ?",
        ] {
            let done = sqlx::query(step).bind(oldest_ms).execute(&mut *tx).await;
            done.map_err(failed())?;
        }
        tx.commit().await.map_err(failed())
    }
}

/// A reading joins the sighting that it belongs to, or is the first of a new one.
async fn witness(
    tx: &mut SqliteConnection,
    seen: &Seen,
    window_ms: i64,
    now_ms: i64,
) -> Result<(), sqlx::Error> {
    let known: Option<String> = sqlx::query_scalar(
        "SELECT id FROM sightings WHERE site = ? AND label = ? AND to_ms >= ? AND from_ms <= ? AND from_ms >= ?
         ORDER BY from_ms LIMIT 1",
    )
    .bind(&seen.site)
    .bind(&seen.label)
    .bind(seen.ts.saturating_sub(window_ms))
    .bind(seen.ts.saturating_add(window_ms))
    .bind(seen.ts.saturating_sub(LONGEST_MS))
    .fetch_optional(&mut *tx)
    .await?;
    let id = match known {
        Some(id) => {
            sqlx::query(
                "UPDATE sightings SET from_ms = min(from_ms, ?), to_ms = max(to_ms, ?) WHERE id = ?",
            )
            .bind(seen.ts)
            .bind(seen.ts)
            .bind(&id)
            .execute(&mut *tx)
            .await?;
            id
        }
        None => {
            let id = name(seen);
            sqlx::query("INSERT OR IGNORE INTO sightings VALUES (?, ?, ?, ?, ?, ?, 0)")
                .bind(&id)
                .bind(&seen.site)
                .bind(&seen.label)
                .bind(seen.ts)
                .bind(seen.ts)
                .bind(now_ms)
                .execute(&mut *tx)
                .await?;
            id
        }
    };
    sqlx::query(
        "INSERT INTO witnesses VALUES (?, ?, ?, ?, ?, 1, ?, ?)
         ON CONFLICT (sighting, device, source) DO UPDATE SET
         ts = min(ts, excluded.ts), score = max(score, excluded.score), readings = readings + 1",
    )
    .bind(&id)
    .bind(&seen.device)
    .bind(&seen.source)
    .bind(seen.ts)
    .bind(seen.score)
    .bind(seen.epoch)
    .bind(seen.seq)
    .execute(&mut *tx)
    .await?;
    tracing::trace!(reading = seen.id, sighting = id, "seen");
    Ok(())
}

//! The SQL of erasures.

use std::collections::BTreeMap;

use mesh_core::{Erase, Gone};
use serde::Serialize;
use sqlx::{FromRow, QueryBuilder, Sqlite};

use super::{Receipt, Which, split};
use crate::{
    quarantine::called,
    records::{RecordError, Records, commit},
};

/// Erasures that are listed.
const LISTED: i64 = 1_000;
/// Devices of which something is awaited that one answer names.
const NAMED: i64 = 1_000;

/// A sample that is to go.
#[derive(Clone, Debug, FromRow)]
pub(super) struct Victim {
    pub(super) id: i64,
    pub(super) site: Option<String>,
    pub(super) device: Option<String>,
    pub(super) epoch: Option<i64>,
    pub(super) seq: Option<i64>,
    sha256: Option<String>,
    announced_sha256: Option<String>,
    pub(super) bytes: i64,
    image: String,
    deleted_ms: Option<i64>,
}

impl Victim {
    /// Everything that its image was known by.
    pub(super) fn digests(&self) -> impl Iterator<Item = &str> {
        self.sha256
            .iter()
            .chain(&self.announced_sha256)
            .map(String::as_str)
    }

    /// Its image took room.
    pub(super) fn counted(&self) -> bool {
        self.deleted_ms.is_none() && matches!(self.image.as_str(), "waiting" | "stored")
    }
}

/// How far an erasure is: its receipt.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Erasure)]
pub(crate) struct ErasureView {
    /// Its number.
    id: i64,
    /// Which samples.
    which: Which,
    /// Why.
    why: String,
    /// Who asked for it.
    author: String,
    /// When, milliseconds since 1970.
    asked_ms: i64,
    /// Since when nothing of it is on this coordinator; nothing while it is at work.
    here_ms: Option<i64>,
    /// Since when it is gone from all devices too; nothing while some have not answered.
    done_ms: Option<i64>,
    /// What was gone, and where.
    receipt: Receipt,
    /// Devices that may still have some of it, `SITE/DEVICE`: they are told as soon as they are there.
    awaited: Vec<String>,
    /// Devices that have said that they have nothing of it any more.
    answered: Vec<String>,
}

fn json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, RecordError> {
    serde_json::from_str(text).map_err(|error| RecordError::Content {
        operation: "read an erasure",
        detail: error.to_string(),
    })
}

fn text<T: Serialize>(value: &T) -> Result<String, RecordError> {
    serde_json::to_string(value).map_err(|error| RecordError::Content {
        operation: "write an erasure",
        detail: error.to_string(),
    })
}

impl Records {
    /// The device that sent a sample, if there is such a sample; also one that was deleted.
    pub(super) async fn device_of(&self, id: i64) -> Result<Option<Option<String>>, RecordError> {
        sqlx::query_scalar("SELECT device FROM samples WHERE id = ?")
            .bind(id)
            .fetch_optional(self.readers())
            .await
            .map_err(RecordError::sql("look for a sample"))
    }

    pub(super) async fn add_erasure(
        &self,
        which: &Which,
        why: &str,
        author: &str,
        now_ms: i64,
    ) -> Result<i64, RecordError> {
        let (request, receipt) = (text(which)?, text(&Receipt::default())?);
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        let id = sqlx::query_scalar(
            "INSERT INTO erasures (request, why, author, asked_ms, receipt) VALUES (?, ?, ?, ?, ?) RETURNING id",
        )
        .bind(request)
        .bind(why)
        .bind(author)
        .bind(now_ms)
        .bind(receipt)
        .fetch_one(&mut *tx)
        .await
        .map_err(RecordError::sql("write an erasure"))?;
        commit(tx).await?;
        Ok(id)
    }

    /// Samples that are still to go: those that were asked for, and those with an image that was erased.
    pub(super) async fn victims(
        &self,
        which: &Which,
        most: i64,
    ) -> Result<Vec<Victim>, RecordError> {
        let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(
            "SELECT s.id, s.site, s.device, s.epoch, s.seq, s.sha256, s.announced_sha256, s.bytes, s.image, \
             s.deleted_ms FROM samples s WHERE s.erased = 0 AND (",
        );
        match which {
            Which::Sample(id) => {
                query.push("s.id = ").push_bind(*id);
            }
            Which::Device {
                name,
                from_ms,
                to_ms,
            } => {
                let (site, device) = split(name).unwrap_or_default();
                query.push("s.device = ").push_bind(device);
                query.push(" AND coalesce(s.site, '') = ").push_bind(site);
                if let Some(from) = from_ms {
                    query.push(" AND s.ts >= ").push_bind(*from);
                }
                if let Some(to) = to_ms {
                    query.push(" AND s.ts <= ").push_bind(*to);
                }
            }
            Which::Person(name) => {
                query.push("s.origin = 'import' AND s.brought_by = ");
                query.push_bind(name.clone());
            }
        }
        query
            .push(
                " OR s.sha256 IN (SELECT sha256 FROM erased_images) \
                 OR s.announced_sha256 IN (SELECT sha256 FROM erased_images)) ORDER BY s.id LIMIT ",
            )
            .push_bind(most);
        query
            .build_query_as()
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read what is to be erased"))
    }

    /// Erases the rows of samples: what stays is their identity and the digests of their images. Counts into the receipt.
    pub(super) async fn erase_rows(
        &self,
        erasure: i64,
        victims: &[Victim],
        now_ms: i64,
    ) -> Result<(), RecordError> {
        const ERASE: &str = "erase a sample";
        let mut receipt = Receipt::default();
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        for victim in victims {
            for sha256 in victim.digests() {
                sqlx::query("INSERT INTO erased_images (sha256, erasure) VALUES (?, ?) ON CONFLICT DO NOTHING")
                    .bind(sha256)
                    .bind(erasure)
                    .execute(&mut *tx)
                    .await
                    .map_err(RecordError::sql(ERASE))?;
                let done = sqlx::query("DELETE FROM features WHERE sha256 = ?")
                    .bind(sha256)
                    .execute(&mut *tx)
                    .await
                    .map_err(RecordError::sql(ERASE))?;
                receipt.embeddings += done.rows_affected();
            }
            for (sql, count) in [
                (
                    "DELETE FROM embeddings WHERE sample = ?",
                    &mut receipt.embeddings,
                ),
                ("DELETE FROM labels WHERE sample = ?", &mut receipt.labels),
            ] {
                let done = sqlx::query(sql)
                    .bind(victim.id)
                    .execute(&mut *tx)
                    .await
                    .map_err(RecordError::sql(ERASE))?;
                *count += done.rows_affected();
            }
            sqlx::query(
                "UPDATE samples SET erased = 1, deleted_ms = coalesce(deleted_ms, ?), source = NULL, reason = NULL, \
                 ts = 0, label = NULL, score = NULL, margin = NULL, entropy = NULL, novelty = NULL, model = NULL, \
                 file = NULL, refused = NULL, brought_by = NULL, holdout_by = NULL, bytes = 0, image = 'none' \
                 WHERE id = ?",
            )
            .bind(now_ms)
            .bind(victim.id)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql(ERASE))?;
            receipt.samples += 1;
            if let (Some(device), Some(epoch), Some(seq)) =
                (&victim.device, victim.epoch, victim.seq)
            {
                let what = Gone::One {
                    epoch: epoch.cast_unsigned(),
                    seq: seq.cast_unsigned(),
                };
                // A device that drops all of it, or all of a time, needs no list.
                sqlx::query(
                    "INSERT INTO erasure_devices (erasure, site, device, what) SELECT ?1, ?2, ?3, ?4 \
                     WHERE NOT EXISTS (SELECT 1 FROM erasure_devices WHERE erasure = ?1 AND device = ?3 \
                     AND site = ?2 AND (what = ?4 OR what NOT LIKE '{\"one\"%'))",
                )
                .bind(erasure)
                .bind(victim.site.as_deref().unwrap_or_default())
                .bind(device)
                .bind(text(&what)?)
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql(ERASE))?;
            }
        }
        let before: String = sqlx::query_scalar("SELECT receipt FROM erasures WHERE id = ?")
            .bind(erasure)
            .fetch_one(&mut *tx)
            .await
            .map_err(RecordError::sql("read an erasure"))?;
        let before: Receipt = json(&before)?;
        receipt.samples += before.samples;
        receipt.images += before.images;
        receipt.uploads += before.uploads;
        receipt.labels += before.labels;
        receipt.embeddings += before.embeddings;
        receipt.models = before.models;
        receipt.datasets = sqlx::query_scalar::<_, i64>(
            "SELECT count(DISTINCT i.dataset) FROM dataset_items i JOIN erased_images e ON e.sha256 = i.sha256 \
             WHERE e.erasure = ?",
        )
        .bind(erasure)
        .fetch_one(&mut *tx)
        .await
        .map_err(RecordError::sql("count datasets"))?
        .unsigned_abs();
        sqlx::query("UPDATE erasures SET receipt = ? WHERE id = ?")
            .bind(text(&receipt)?)
            .bind(erasure)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("write an erasure"))?;
        commit(tx).await
    }

    /// A device may have more than was sent.
    pub(super) async fn await_device(
        &self,
        erasure: i64,
        (site, device): (&str, &str),
        what: Gone,
    ) -> Result<(), RecordError> {
        let (from, to) = match &what {
            Gone::Between { from, to } => (Some(*from), Some(*to)),
            Gone::All | Gone::One { .. } => (None, None),
        };
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query(
            "INSERT INTO erasure_devices (erasure, site, device, what, from_ms, to_ms) SELECT ?1, ?2, ?3, ?4, ?5, ?6 \
             WHERE NOT EXISTS (SELECT 1 FROM erasure_devices WHERE erasure = ?1)",
        )
        .bind(erasure)
        .bind(site)
        .bind(device)
        .bind(text(&what)?)
        .bind(from)
        .bind(to)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("write what a device is to erase"))?;
        commit(tx).await
    }

    /// The digests that an erasure brought.
    pub(super) async fn erased_by(&self, erasure: i64) -> Result<Vec<String>, RecordError> {
        sqlx::query_scalar("SELECT sha256 FROM erased_images WHERE erasure = ?")
            .bind(erasure)
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read what was erased"))
    }

    /// Adds to the receipt what was gone of files, and which models have it still.
    pub(super) async fn count_files(
        &self,
        erasure: i64,
        images: u64,
        uploads: u64,
        models: &[String],
    ) -> Result<(), RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query(
            "UPDATE erasures SET receipt = json_set(receipt, '$.models', json(?), \
             '$.images', receipt ->> 'images' + ?, '$.uploads', receipt ->> 'uploads' + ?) WHERE id = ?",
        )
        .bind(text(&models)?)
        .bind(images.cast_signed())
        .bind(uploads.cast_signed())
        .bind(erasure)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("write an erasure"))?;
        commit(tx).await
    }

    /// Nothing of it is here any more.
    pub(super) async fn gone_here(&self, erasure: i64, now_ms: i64) -> Result<(), RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query("UPDATE erasures SET here_ms = ? WHERE id = ? AND here_ms IS NULL")
            .bind(now_ms)
            .bind(erasure)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("write an erasure"))?;
        commit(tx).await
    }

    /// Erasures that have not come to an end here.
    pub(super) async fn unfinished_erasures(&self) -> Result<Vec<(i64, Which)>, RecordError> {
        let rows: Vec<(i64, String)> =
            sqlx::query_as("SELECT id, request FROM erasures WHERE here_ms IS NULL ORDER BY id")
                .fetch_all(self.readers())
                .await
                .map_err(RecordError::sql("read the erasures"))?;
        rows.iter()
            .map(|(id, request)| Ok((*id, json(request)?)))
            .collect()
    }

    /// What devices have not answered yet, in the order in which they are told.
    pub(super) async fn awaited_of_devices(
        &self,
    ) -> Result<Vec<(String, String, Vec<Erase>)>, RecordError> {
        let rows: Vec<(i64, String, String, String)> = sqlx::query_as(
            "SELECT id, site, device, what FROM erasure_devices WHERE done_ms IS NULL ORDER BY id",
        )
        .fetch_all(self.readers())
        .await
        .map_err(RecordError::sql("read what devices are to erase"))?;
        let mut devices: BTreeMap<(String, String), Vec<Erase>> = BTreeMap::new();
        for (id, site, device, what) in rows {
            let erase = Erase {
                id: id.unsigned_abs(),
                what: json(&what)?,
            };
            devices.entry((site, device)).or_default().push(erase);
        }
        Ok(devices
            .into_iter()
            .map(|((site, device), items)| (site, device, items))
            .collect())
    }

    /// A device has nothing any more of what it was told up to this number.
    pub(super) async fn device_erased(
        &self,
        (site, device): (&str, &str),
        upto: i64,
        now_ms: i64,
    ) -> Result<(), RecordError> {
        if upto == 0 {
            return Ok(());
        }
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query(
            "UPDATE erasure_devices SET done_ms = ? WHERE site = ? AND device = ? AND id <= ? AND done_ms IS NULL",
        )
        .bind(now_ms)
        .bind(site)
        .bind(device)
        .bind(upto)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("write that a device has erased something"))?;
        commit(tx).await
    }

    /// The newest erasures, or one.
    pub(super) async fn erasures(
        &self,
        only: Option<i64>,
    ) -> Result<Vec<ErasureView>, RecordError> {
        type Row = (i64, String, String, String, i64, Option<i64>, String);
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT id, request, why, author, asked_ms, here_ms, receipt FROM erasures \
             WHERE ?1 IS NULL OR id = ?1 ORDER BY id DESC LIMIT ?2",
        )
        .bind(only)
        .bind(LISTED)
        .fetch_all(self.readers())
        .await
        .map_err(RecordError::sql("read the erasures"))?;
        let mut views = Vec::with_capacity(rows.len());
        for (id, request, why, author, asked_ms, here_ms, receipt) in rows {
            let devices: Vec<(String, String, i64, Option<i64>)> = sqlx::query_as(
                "SELECT site, device, sum(done_ms IS NULL), max(done_ms) FROM erasure_devices WHERE erasure = ? \
                 GROUP BY site, device ORDER BY site, device LIMIT ?",
            )
            .bind(id)
            .bind(NAMED)
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read the devices of an erasure"))?;
            let (open, answered): (Vec<_>, Vec<_>) = devices.iter().partition(|d| d.2 > 0);
            let names = |list: &[&(String, String, i64, Option<i64>)]| {
                list.iter().map(|d| called(&d.0, &d.1)).collect::<Vec<_>>()
            };
            let receipt: Receipt = json(&receipt)?;
            let last = answered.iter().filter_map(|d| d.3).max();
            let all = open.is_empty() && receipt.models.is_empty();
            views.push(ErasureView {
                id,
                which: json(&request)?,
                why,
                author,
                asked_ms,
                here_ms,
                done_ms: here_ms
                    .filter(|_| all)
                    .map(|here| here.max(last.unwrap_or(here))),
                receipt,
                awaited: names(&open),
                answered: names(&answered),
            });
        }
        Ok(views)
    }

    /// Was this image erased, or is everything of this device and moment to go?
    pub(crate) async fn is_erased(
        &self,
        (site, device): (&str, &str),
        ts: i64,
        sha256: Option<&str>,
    ) -> Result<bool, RecordError> {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM erased_images WHERE sha256 = ?1) OR EXISTS (SELECT 1 FROM erasure_devices \
             WHERE device = ?2 AND site = ?3 AND ((from_ms <= ?4 AND to_ms >= ?4) \
             OR (what = '\"all\"' AND done_ms IS NULL)))",
        )
        .bind(sha256)
        .bind(device)
        .bind(site)
        .bind(ts)
        .fetch_one(self.readers())
        .await
        .map_err(RecordError::sql("look whether a sample was erased"))
    }

    /// Empties the write-ahead log: what was overwritten in the database still stands in it.
    pub(super) async fn empty_log(&self) -> Result<(), RecordError> {
        const EMPTY: &str = "empty the log of the database";
        let mut writer = self.writer().await;
        for _ in 0..20 {
            let busy: i64 = sqlx::query_scalar("PRAGMA wal_checkpoint(TRUNCATE)")
                .fetch_one(writer.connection())
                .await
                .map_err(RecordError::sql(EMPTY))?;
            if busy == 0 {
                return Ok(());
            }
            // Somebody reads; that takes seconds at most.
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        }
        Err(RecordError::Content {
            operation: EMPTY,
            detail: "somebody has been reading from it for too long".into(),
        })
    }
}

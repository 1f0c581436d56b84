//! The SQL of samples.

use mesh_core::{Name, Sample};
use serde::Serialize;
use sqlx::{QueryBuilder, Sqlite, SqliteConnection};

use crate::records::{RecordError, Records, commit, floats_to_bytes};

/// A sample as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, sqlx::FromRow, utoipa::ToSchema)]
#[schema(as = Sample)]
pub(crate) struct SampleRow {
    /// The place in order of arrival.
    pub(crate) id: i64,
    /// What is to be learnt: the name part of the model.
    pub(crate) task: String,
    /// `device`, or `import` for what a person brought in.
    pub(crate) origin: String,
    /// The site of the device that looked; nothing for what was brought in, and where nobody proved it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) site: Option<String>,
    /// The device that looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) device: Option<String>,
    /// The camera on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<String>,
    /// The life of the device's outbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) epoch: Option<i64>,
    /// The number of the reading in its epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seq: Option<i64>,
    /// Why it was kept: `wrong`, `missed`, `uncertain`, `novel` or `random`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// Captured, milliseconds since 1970 by the device's clock.
    pub(crate) ts: i64,
    /// Taken in, milliseconds since 1970 by the coordinator's clock.
    pub(crate) received_ms: i64,
    /// What the model said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) label: Option<String>,
    /// How sure it was, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) score: Option<f64>,
    /// How far the best class lay before the second, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) margin: Option<f64>,
    /// How unsure the scores are, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) entropy: Option<f64>,
    /// How far it is from what training saw, at least 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) novelty: Option<f64>,
    /// The model, `name@version`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    /// The file that the image came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    /// SHA-256 of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sha256: Option<String>,
    /// Bytes of the image, 0 without one.
    pub(crate) bytes: i64,
    /// `none`, `waiting` (on its way), `stored` or `refused`.
    pub(crate) image: String,
    /// Why the image was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) refused: Option<String>,
    /// Only ever measured with, never trained with.
    pub(crate) holdout: bool,
    /// The current label: `class`, `none` (none of the classes) or `skip`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) labelled: Option<String>,
    /// The class, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) class: Option<String>,
    /// Who said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) author: Option<String>,
}

/// Joins a sample `s` with its current label `l` and its class `c`.
pub(crate) const WITH_LABEL: &str = "FROM samples s \
    LEFT JOIN labels l ON l.id = (SELECT max(x.id) FROM labels x \
        WHERE x.sample = s.id AND x.undone_ms IS NULL) \
    LEFT JOIN classes c ON c.task = s.task AND c.position = l.class ";

const COLUMNS: &str = "SELECT s.id, s.task, s.origin, s.site, s.device, s.source, s.epoch, s.seq, s.reason, s.ts, \
    s.received_ms, s.label, s.score, s.margin, s.entropy, s.novelty, s.model, s.file, s.sha256, s.bytes, \
    s.image, s.refused, s.holdout, l.kind AS labelled, c.name AS class, l.author ";

/// What an upload needs to know. Digest and length are those that were announced.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(crate) struct ImageRow {
    pub(crate) id: i64,
    pub(crate) site: Option<String>,
    pub(crate) sha256: Option<String>,
    pub(crate) bytes: i64,
    pub(crate) image: String,
    pub(crate) refused: Option<String>,
    pub(crate) deleted_ms: Option<i64>,
}

/// What is here of one device, or of what people brought in.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct Total {
    pub(super) site: Option<String>,
    pub(super) device: Option<String>,
    pub(super) samples: i64,
    pub(super) bytes: i64,
}

/// Nobody has said anything about it, ever. Not the newest one: its number must never be another's.
const LOOSE: &str = "deleted_ms IS NULL AND holdout = 0 AND id < (SELECT max(id) FROM samples) \
    AND NOT EXISTS (SELECT 1 FROM labels WHERE sample = samples.id)";

/// A sample that is to go by its age.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct OldRow {
    pub(super) id: i64,
    pub(super) site: Option<String>,
    pub(super) device: Option<String>,
    pub(super) sha256: Option<String>,
    pub(super) bytes: i64,
    pub(super) image: String,
}

/// An image that is awaited.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct AwaitedRow {
    pub(super) id: i64,
    pub(super) site: Option<String>,
    pub(super) device: Option<String>,
    pub(super) bytes: i64,
}

/// Which samples.
#[derive(Clone, Debug, Default)]
pub(crate) struct SampleFilter {
    pub(crate) task: Option<String>,
    pub(crate) reason: Option<String>,
    pub(crate) site: Option<String>,
    pub(crate) device: Option<String>,
    pub(crate) labelled: Option<bool>,
    pub(crate) after: Option<i64>,
    pub(crate) limit: i64,
}

/// Makes sure that a task is there.
pub(crate) async fn note_task(
    connection: &mut SqliteConnection,
    task: &str,
    now_ms: i64,
) -> Result<(), RecordError> {
    sqlx::query("INSERT INTO tasks (name, created_ms) VALUES (?, ?) ON CONFLICT (name) DO NOTHING")
        .bind(task)
        .bind(now_ms)
        .execute(connection)
        .await
        .map_err(RecordError::sql("write a task"))?;
    Ok(())
}

impl Records {
    /// How many samples there are and how many bytes their images have, by whose they are.
    pub(super) async fn sample_totals(&self) -> Result<Vec<Total>, RecordError> {
        sqlx::query_as(
            "SELECT site, device, count(*) AS samples, coalesce(sum(CASE WHEN image IN ('waiting', 'stored') \
             AND deleted_ms IS NULL THEN bytes ELSE 0 END), 0) AS bytes FROM samples GROUP BY site, device",
        )
        .fetch_all(self.readers())
        .await
        .map_err(RecordError::sql("count the samples"))
    }

    /// The images that are still awaited.
    pub(super) async fn awaited(&self) -> Result<Vec<AwaitedRow>, RecordError> {
        sqlx::query_as(
            "SELECT id, site, device, bytes FROM samples WHERE image = 'waiting' AND deleted_ms IS NULL",
        )
        .fetch_all(self.readers())
        .await
        .map_err(RecordError::sql("read the awaited images"))
    }

    /// Samples that nobody has said anything about and that came before this moment, whatever became of their images.
    pub(super) async fn old_samples(
        &self,
        before_ms: i64,
        limit: i64,
    ) -> Result<Vec<OldRow>, RecordError> {
        let sql = format!(
            "SELECT id, site, device, sha256, bytes, image FROM samples \
             WHERE received_ms < ? AND {LOOSE} ORDER BY id LIMIT ?"
        );
        sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(before_ms)
            .bind(limit)
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("look for old samples"))
    }

    /// Forgets a sample as if it had never been announced, if it still is as it was found: its image is awaited, or it is old.
    /// False if it stays.
    pub(super) async fn forget_sample(&self, id: i64, image: &str) -> Result<bool, RecordError> {
        const FORGET: &str = "forget a sample";
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        let sql =
            format!("SELECT EXISTS (SELECT 1 FROM samples WHERE id = ? AND image = ? AND {LOOSE})");
        let goes: bool = sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
            .bind(id)
            .bind(image)
            .fetch_one(&mut *tx)
            .await
            .map_err(RecordError::sql(FORGET))?;
        if goes {
            for sql in [
                "DELETE FROM embeddings WHERE sample = ?",
                "DELETE FROM samples WHERE id = ?",
            ] {
                let done = sqlx::query(sql).bind(id).execute(&mut *tx).await;
                done.map_err(RecordError::sql(FORGET))?;
            }
        }
        commit(tx).await?;
        Ok(goes)
    }

    /// The sample of a reading, also one that was deleted.
    pub(crate) async fn image_of(
        &self,
        device: &str,
        epoch: i64,
        seq: i64,
    ) -> Result<Option<ImageRow>, RecordError> {
        sqlx::query_as(
            "SELECT id, site, coalesce(announced_sha256, sha256) AS sha256, coalesce(announced_bytes, bytes) AS bytes, \
             image, refused, deleted_ms FROM samples WHERE device = ? AND epoch = ? AND seq = ?",
        )
        .bind(device)
        .bind(epoch)
        .bind(seq)
        .fetch_optional(self.readers())
        .await
        .map_err(RecordError::sql("look for a sample"))
    }

    /// Is the image of a sample still awaited, and was this one not erased?
    pub(crate) async fn awaits(&self, id: i64, sha256: &str) -> Result<bool, RecordError> {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM samples WHERE id = ? AND image = 'waiting' AND deleted_ms IS NULL) \
             AND NOT EXISTS (SELECT 1 FROM erased_images WHERE sha256 = ?)",
        )
        .bind(id)
        .bind(sha256)
        .fetch_one(self.readers())
        .await
        .map_err(RecordError::sql("look for an awaited image"))
    }

    /// Bytes of the image of this digest, if some sample has it here.
    pub(crate) async fn stored_bytes(&self, sha256: &str) -> Result<Option<i64>, RecordError> {
        sqlx::query_scalar(
            "SELECT bytes FROM samples WHERE sha256 = ? AND image = 'stored' AND deleted_ms IS NULL LIMIT 1",
        )
        .bind(sha256)
        .fetch_optional(self.readers())
        .await
        .map_err(RecordError::sql("look for an image"))
    }

    /// Somebody's word takes the place of what the device found by itself. A sample by lot stays one.
    pub(crate) async fn mark_sample(&self, id: i64, reason: &str) -> Result<(), RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query(
            "UPDATE samples SET reason = ? WHERE id = ? AND reason IN ('uncertain', 'novel')",
        )
        .bind(reason)
        .bind(id)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("mark a sample"))?;
        commit(tx).await
    }

    /// Writes a new sample; `None` if it was written meanwhile.
    pub(crate) async fn add_sample(
        &self,
        task: &str,
        sample: &Sample,
        site: Option<&Name>,
        image: &str,
        now_ms: i64,
    ) -> Result<Option<i64>, RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        note_task(&mut tx, task, now_ms).await?;
        let id: Option<i64> = sqlx::query_scalar(
            "INSERT INTO samples (task, origin, site, device, source, epoch, seq, reason, ts, received_ms, label, \
             score, margin, entropy, novelty, model, file, sha256, bytes, image, holdout) \
             VALUES (?, 'device', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0) \
             ON CONFLICT (device, epoch, seq) DO NOTHING RETURNING id",
        )
        .bind(task)
        .bind(site.map(Name::as_str))
        .bind(sample.device.as_str())
        .bind(sample.source.as_str())
        .bind(sample.epoch.cast_signed())
        .bind(sample.seq.cast_signed())
        .bind(sample.reason.as_str())
        .bind(sample.ts)
        .bind(now_ms)
        .bind(&sample.label)
        .bind(f64::from(sample.score))
        .bind(f64::from(sample.margin))
        .bind(f64::from(sample.entropy))
        .bind(sample.novelty.map(f64::from))
        .bind(&sample.model)
        .bind(&sample.file)
        .bind(sample.image.as_ref().map(|i| i.sha256.as_str()))
        .bind(sample.image.as_ref().map_or(0, |i| i.bytes.cast_signed()))
        .bind(image)
        .fetch_optional(&mut *tx)
        .await
        .map_err(RecordError::sql("write a sample"))?;
        if let Some(id) = id
            && !sample.embedding.is_empty()
        {
            sqlx::query("INSERT INTO embeddings (sample, model, data) VALUES (?, ?, ?)")
                .bind(id)
                .bind(&sample.model)
                .bind(floats_to_bytes(&sample.embedding))
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql("write an embedding"))?;
        }
        commit(tx).await?;
        Ok(id)
    }

    /// The image of a sample is here; under this digest, which may be another than was announced.
    pub(crate) async fn keep_image(
        &self,
        id: i64,
        sha256: &str,
        bytes: u64,
    ) -> Result<(), RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        // All of the right side is from before.
        sqlx::query(
            "UPDATE samples SET image = 'stored', sha256 = ?1, bytes = ?2, \
             announced_sha256 = CASE WHEN sha256 <> ?1 THEN sha256 END, \
             announced_bytes = CASE WHEN sha256 <> ?1 THEN bytes END \
             WHERE id = ?3 AND image = 'waiting'",
        )
        .bind(sha256)
        .bind(bytes.cast_signed())
        .bind(id)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("write that an image is here"))?;
        commit(tx).await
    }

    /// The image of a sample was refused, and why.
    pub(crate) async fn refuse_image(&self, id: i64, why: &str) -> Result<(), RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query(
            "UPDATE samples SET image = 'refused', refused = ? WHERE id = ? AND image = 'waiting'",
        )
        .bind(why)
        .bind(id)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("write that an image was refused"))?;
        commit(tx).await
    }

    /// One page of samples, the newest first.
    pub(crate) async fn samples(
        &self,
        filter: SampleFilter,
    ) -> Result<Vec<SampleRow>, RecordError> {
        let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(COLUMNS);
        query.push(WITH_LABEL).push("WHERE s.deleted_ms IS NULL");
        for (condition, value) in [
            (" AND s.task = ", filter.task),
            (" AND s.reason = ", filter.reason),
            (" AND s.site = ", filter.site),
            (" AND s.device = ", filter.device),
        ] {
            if let Some(value) = value {
                query.push(condition).push_bind(value);
            }
        }
        if let Some(labelled) = filter.labelled {
            query.push(if labelled {
                " AND l.kind IN ('class', 'none')"
            } else {
                " AND (l.kind IS NULL OR l.kind = 'skip')"
            });
        }
        if let Some(after) = filter.after {
            query.push(" AND s.id < ").push_bind(after);
        }
        query
            .push(" ORDER BY s.id DESC LIMIT ")
            .push_bind(filter.limit);
        query
            .build_query_as()
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read samples"))
    }

    /// One sample, unless it was deleted.
    pub(crate) async fn sample(&self, id: i64) -> Result<Option<SampleRow>, RecordError> {
        let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(COLUMNS);
        query
            .push(WITH_LABEL)
            .push("WHERE s.deleted_ms IS NULL AND s.id = ")
            .push_bind(id);
        query
            .build_query_as()
            .fetch_optional(self.readers())
            .await
            .map_err(RecordError::sql("read a sample"))
    }

    /// Deletes a sample; what stays is that it was here. False if there is none.
    pub(crate) async fn delete_sample(&self, id: i64, now_ms: i64) -> Result<bool, RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        let done = sqlx::query(
            "UPDATE samples SET deleted_ms = ?, label = NULL, file = NULL \
             WHERE id = ? AND deleted_ms IS NULL",
        )
        .bind(now_ms)
        .bind(id)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("delete a sample"))?;
        sqlx::query("DELETE FROM embeddings WHERE sample = ?")
            .bind(id)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("delete an embedding"))?;
        commit(tx).await?;
        Ok(done.rows_affected() > 0)
    }

    /// Forgets what was computed from an image that is gone.
    pub(crate) async fn forget_image(&self, sha256: &str) -> Result<(), RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query("DELETE FROM features WHERE sha256 = ?")
            .bind(sha256)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("delete features"))?;
        commit(tx).await
    }

    /// Puts a sample into the holdout or takes it out; false if there is none.
    pub(crate) async fn set_holdout(
        &self,
        id: i64,
        holdout: bool,
        author: &str,
        now_ms: i64,
    ) -> Result<bool, RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        let done = sqlx::query(
            // What a device still may fill is not put there.
            "UPDATE samples SET holdout = ?, holdout_by = ?, holdout_ms = ? \
             WHERE id = ? AND deleted_ms IS NULL AND image = 'stored'",
        )
        .bind(holdout)
        .bind(author)
        .bind(now_ms)
        .bind(id)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("write the holdout"))?;
        commit(tx).await?;
        Ok(done.rows_affected() > 0)
    }
}

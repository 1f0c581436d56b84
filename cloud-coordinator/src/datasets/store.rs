//! The SQL of datasets and features.

use std::collections::HashMap;

use sqlx::{QueryBuilder, Row, Sqlite, sqlite::SqliteRow};

use super::{Dataset, Item, Labelled, MAX_FEATURE_VALUES, MAX_ITEMS, Report, Summary};
use crate::{
    quarantine::{FREE, NO_SITE},
    records::{RecordError, Records, commit, floats_of_bytes, floats_to_bytes},
    samples::WITH_LABEL,
};

/// Rows that one statement names, and that one transaction writes: some milliseconds.
const ROWS: usize = 500;
/// The most datasets of one answer.
const LISTED: i64 = 1_000;

const COLUMNS: &str = "digest, task, classes, author, created_ms, device_share, train, holdout, report, \
    (SELECT count(*) FROM dataset_items i JOIN erased_images e ON e.sha256 = i.sha256 \
    WHERE i.dataset = datasets.digest) AS erased";

fn content(operation: &'static str) -> impl FnOnce(serde_json::Error) -> RecordError {
    move |error| RecordError::Content {
        operation,
        detail: error.to_string(),
    }
}

fn summary(row: &SqliteRow) -> Result<Summary, RecordError> {
    const READ: &str = "read a dataset";
    let get = || RecordError::sql(READ);
    let classes: String = row.try_get("classes").map_err(get())?;
    let report: String = row.try_get("report").map_err(get())?;
    let report: Report = serde_json::from_str(&report).map_err(content(READ))?;
    Ok(Summary {
        digest: row.try_get("digest").map_err(get())?,
        task: row.try_get("task").map_err(get())?,
        classes: serde_json::from_str(&classes).map_err(content(READ))?,
        author: row.try_get("author").map_err(get())?,
        created_ms: row.try_get("created_ms").map_err(get())?,
        device_share: row.try_get("device_share").map_err(get())?,
        train: row.try_get("train").map_err(get())?,
        holdout: row.try_get("holdout").map_err(get())?,
        report,
        erased: row.try_get("erased").map_err(get())?,
    })
}

impl Records {
    /// The classes of a task, if there is one, and its samples that have a class and an image.
    pub(crate) async fn labelled(
        &self,
        task: &str,
    ) -> Result<(Option<Vec<String>>, Vec<Labelled>), RecordError> {
        type Found = (
            i64,
            String,
            i64,
            bool,
            Option<String>,
            Option<String>,
            Option<Vec<u8>>,
        );
        let known: Option<String> = sqlx::query_scalar("SELECT name FROM tasks WHERE name = ?")
            .bind(task)
            .fetch_optional(self.readers())
            .await
            .map_err(RecordError::sql("look for a task"))?;
        if known.is_none() {
            return Ok((None, Vec::new()));
        }
        let sql = format!(
            "SELECT s.id, s.sha256, l.class, s.holdout, \
             CASE WHEN s.device IS NULL THEN NULL ELSE coalesce(s.site, '{NO_SITE}') || '/' || s.device END, \
             e.model, e.data {WITH_LABEL} \
             LEFT JOIN embeddings e ON e.sample = s.id \
             WHERE s.task = ? AND s.deleted_ms IS NULL AND s.image = 'stored' AND l.kind = 'class' \
             AND (s.holdout = 1 OR {FREE}) \
             ORDER BY s.id LIMIT {}",
            MAX_ITEMS + 1
        );
        let rows: Vec<Found> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(task)
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read what is labelled"))?;
        let labelled = rows
            .into_iter()
            .map(
                |(sample, sha256, class, holdout, device, model, data)| Labelled {
                    sample,
                    sha256,
                    class: u32::try_from(class).unwrap_or(u32::MAX),
                    holdout,
                    device,
                    embedding: model.zip(data.map(|d| floats_of_bytes(&d))),
                },
            )
            .collect();
        // After the samples: every class that they name is in the list then.
        Ok((Some(self.classes(task).await?), labelled))
    }

    /// Writes a dataset; false if it is here already.
    pub(crate) async fn add_dataset(&self, dataset: &Dataset) -> Result<bool, RecordError> {
        const WRITE: &str = "write a dataset";
        let classes = serde_json::to_string(&dataset.classes).map_err(content(WRITE))?;
        let report = serde_json::to_string(&dataset.report).map_err(content(WRITE))?;
        let holdout = dataset.items.iter().filter(|i| i.holdout).count() as i64;
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        let done = sqlx::query(
            "INSERT INTO datasets (digest, task, classes, author, created_ms, device_share, train, \
             holdout, report) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING",
        )
        .bind(&dataset.digest)
        .bind(&dataset.task)
        .bind(classes)
        .bind(&dataset.author)
        .bind(dataset.created_ms)
        .bind(dataset.device_share)
        .bind(dataset.items.len() as i64 - holdout)
        .bind(holdout)
        .bind(report)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql(WRITE))?;
        if done.rows_affected() == 0 {
            return Ok(false);
        }
        for items in dataset.items.chunks(ROWS) {
            let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(
                "INSERT INTO dataset_items (dataset, sha256, sample, class, holdout, device) ",
            );
            query.push_values(items, |mut row, item| {
                row.push_bind(dataset.digest.clone())
                    .push_bind(item.sha256.clone())
                    .push_bind(item.sample)
                    .push_bind(i64::from(item.class))
                    .push_bind(item.holdout)
                    .push_bind(item.device.clone());
            });
            query
                .build()
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql("write the items of a dataset"))?;
        }
        commit(tx).await?;
        Ok(true)
    }

    /// A dataset without its items.
    pub(crate) async fn dataset(&self, digest: &str) -> Result<Option<Summary>, RecordError> {
        let sql = format!("SELECT {COLUMNS} FROM datasets WHERE digest = ?");
        let row = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(digest)
            .fetch_optional(self.readers())
            .await
            .map_err(RecordError::sql("read a dataset"))?;
        row.as_ref().map(summary).transpose()
    }

    /// Was this image erased?
    pub(crate) async fn was_erased(&self, sha256: &str) -> Result<bool, RecordError> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM erased_images WHERE sha256 = ?)")
            .bind(sha256)
            .fetch_one(self.readers())
            .await
            .map_err(RecordError::sql("look whether an image was erased"))
    }

    /// How many datasets of a task there are.
    pub(crate) async fn count_datasets(&self, task: &str) -> Result<u64, RecordError> {
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM datasets WHERE task = ?")
            .bind(task)
            .fetch_one(self.readers())
            .await
            .map_err(RecordError::sql("count the datasets of a task"))?;
        Ok(count.unsigned_abs())
    }

    /// The datasets of a task, the newest first.
    pub(crate) async fn datasets(&self, task: &str) -> Result<Vec<Summary>, RecordError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM datasets WHERE task = ? ORDER BY created_ms DESC, digest LIMIT {LISTED}"
        );
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(task)
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read the datasets of a task"))?;
        rows.iter().map(summary).collect()
    }

    /// The items of a dataset in order of their images.
    pub(crate) async fn dataset_items(&self, digest: &str) -> Result<Vec<Item>, RecordError> {
        let rows: Vec<(i64, String, i64, bool, Option<String>)> = sqlx::query_as(
            "SELECT sample, sha256, class, holdout, device FROM dataset_items WHERE dataset = ? \
             ORDER BY sha256",
        )
        .bind(digest)
        .fetch_all(self.readers())
        .await
        .map_err(RecordError::sql("read the items of a dataset"))?;
        let items = rows
            .into_iter()
            .map(|(sample, sha256, class, holdout, device)| Item {
                sample,
                sha256,
                class: u32::try_from(class).unwrap_or(u32::MAX),
                holdout,
                device,
            });
        Ok(items.collect())
    }

    /// What an engine computed from these images, as far as it is here.
    pub(crate) async fn features(
        &self,
        engine: &str,
        images: &[String],
    ) -> Result<HashMap<String, Vec<f32>>, RecordError> {
        let mut found = HashMap::new();
        for images in images.chunks(ROWS) {
            let mut query: QueryBuilder<Sqlite> =
                QueryBuilder::new("SELECT sha256, data FROM features WHERE engine = ");
            query.push_bind(engine.to_owned()).push(" AND sha256 IN (");
            let mut list = query.separated(", ");
            for image in images {
                list.push_bind(image.clone());
            }
            query.push(")");
            let rows: Vec<(String, Vec<u8>)> = query
                .build_query_as()
                .fetch_all(self.readers())
                .await
                .map_err(RecordError::sql("read features"))?;
            found.extend(
                rows.into_iter()
                    .map(|(image, d)| (image, floats_of_bytes(&d))),
            );
        }
        Ok(found)
    }

    /// Keeps what an engine computed.
    pub(crate) async fn put_features(
        &self,
        engine: &str,
        features: &[(String, Vec<f32>)],
    ) -> Result<(), RecordError> {
        for features in features.chunks(ROWS) {
            let mut writer = self.writer().await;
            let mut tx = writer.begin().await?;
            for (image, values) in features {
                if values.len() > MAX_FEATURE_VALUES {
                    continue;
                }
                sqlx::query(
                    // Somebody may have been computing when it was erased.
                    "INSERT INTO features (engine, sha256, data) SELECT ?1, ?2, ?3 \
                     WHERE NOT EXISTS (SELECT 1 FROM erased_images WHERE sha256 = ?2) \
                     ON CONFLICT (engine, sha256) DO NOTHING",
                )
                .bind(engine)
                .bind(image)
                .bind(floats_to_bytes(values))
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql("write features"))?;
            }
            commit(tx).await?;
        }
        Ok(())
    }
}

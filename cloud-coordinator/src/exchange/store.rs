//! The SQL of imports and exports.

use crate::{
    datasets::MAX_ITEMS,
    records::{RecordError, Records, commit},
    samples::{WITH_LABEL, note_task},
};

/// An image that a person brings in.
#[derive(Clone, Debug)]
pub(super) struct Import<'a> {
    pub(super) task: &'a str,
    pub(super) sha256: &'a str,
    pub(super) bytes: i64,
    pub(super) file: &'a str,
    pub(super) holdout: bool,
    pub(super) author: &'a str,
    pub(super) now_ms: i64,
}

/// A labelled image on its way out.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct ExportRow {
    pub(super) sha256: String,
    pub(super) class: i64,
    pub(super) holdout: bool,
}

impl Records {
    /// Writes an imported image. One that an import has brought to the task before stays the same sample; it
    /// goes into the holdout if this import says so, and never out of it. Says the sample, and whether it is
    /// new.
    pub(super) async fn add_import(&self, import: &Import<'_>) -> Result<(i64, bool), RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        note_task(&mut tx, import.task, import.now_ms).await?;
        let known: Option<i64> = sqlx::query_scalar(
            "SELECT id FROM samples WHERE sha256 = ? AND task = ? AND origin = 'import' \
             AND deleted_ms IS NULL",
        )
        .bind(import.sha256)
        .bind(import.task)
        .fetch_optional(&mut *tx)
        .await
        .map_err(RecordError::sql("look for an imported image"))?;
        let decided_by = import.holdout.then_some(import.author);
        let decided_ms = import.holdout.then_some(import.now_ms);
        if let Some(id) = known {
            if import.holdout {
                sqlx::query(
                    "UPDATE samples SET holdout = 1, holdout_by = ?, holdout_ms = ? \
                     WHERE id = ? AND holdout = 0",
                )
                .bind(decided_by)
                .bind(decided_ms)
                .bind(id)
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql("write the holdout"))?;
            }
            commit(tx).await?;
            return Ok((id, false));
        }
        let id = sqlx::query_scalar(
            "INSERT INTO samples (task, origin, ts, received_ms, file, sha256, bytes, image, holdout, \
             holdout_by, holdout_ms, brought_by) VALUES (?, 'import', ?, ?, ?, ?, ?, 'stored', ?, ?, ?, ?) RETURNING id",
        )
        .bind(import.task)
        .bind(import.now_ms)
        .bind(import.now_ms)
        .bind(import.file)
        .bind(import.sha256)
        .bind(import.bytes)
        .bind(import.holdout)
        .bind(decided_by)
        .bind(decided_ms)
        .bind(import.author)
        .fetch_one(&mut *tx)
        .await
        .map_err(RecordError::sql("write an imported image"))?;
        commit(tx).await?;
        Ok((id, true))
    }

    /// Gives samples that have no label these classes, all of them or none. Says how many had none.
    pub(super) async fn label_imports(
        &self,
        labels: &[(i64, i64)],
        author: &str,
        now_ms: i64,
    ) -> Result<usize, RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        let mut given = 0;
        for (sample, class) in labels {
            let done = sqlx::query(
                "INSERT INTO labels (sample, kind, class, author, created_ms) \
                 SELECT s.id, 'class', ?, ?, ? FROM samples s WHERE s.id = ? AND s.deleted_ms IS NULL \
                 AND NOT EXISTS (SELECT 1 FROM labels l WHERE l.sample = s.id AND l.undone_ms IS NULL)",
            )
            .bind(class)
            .bind(author)
            .bind(now_ms)
            .bind(sample)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("write the label of an import"))?;
            given += usize::try_from(done.rows_affected()).unwrap_or(0);
        }
        commit(tx).await?;
        Ok(given)
    }

    /// The labelled images of a task in order of their digests, each once: what was labelled last counts.
    pub(super) async fn exported(&self, task: &str) -> Result<Vec<ExportRow>, RecordError> {
        let sql = format!(
            "SELECT s.sha256, l.class, s.holdout {WITH_LABEL} WHERE s.task = ? AND s.deleted_ms IS NULL \
             AND s.image = 'stored' AND l.kind = 'class' ORDER BY s.sha256, l.id DESC LIMIT {MAX_ITEMS}"
        );
        let mut rows: Vec<ExportRow> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(task)
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read what is labelled"))?;
        rows.dedup_by(|later, first| later.sha256 == first.sha256);
        Ok(rows)
    }
}

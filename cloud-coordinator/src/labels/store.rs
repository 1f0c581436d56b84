//! The SQL of tasks and labels.

use std::collections::HashMap;

use serde::Serialize;
use sqlx::SqliteConnection;

use super::{Candidate, Known, LabelError, MAX_CANDIDATES, MAX_KNOWN, MAX_TASKS};
use crate::{
    quarantine::FREE,
    records::{RecordError, Records, commit, floats_of_bytes},
    samples::{SampleRow, WITH_LABEL, note_task},
};

/// A task, and how far its labels are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[schema(as = Task)]
pub(crate) struct TaskRow {
    /// The name, that of its models.
    pub(crate) name: String,
    /// Its classes; a place in this list means the same class for ever.
    pub(crate) classes: Vec<String>,
    /// Samples altogether.
    pub(crate) samples: i64,
    /// Samples that have a class.
    pub(crate) labelled: i64,
    /// Samples that are none of the classes.
    pub(crate) none: i64,
    /// Samples that were skipped.
    pub(crate) skipped: i64,
    /// Samples with an image that nobody has said anything about.
    pub(crate) open: i64,
    /// Labelled samples of the holdout.
    pub(crate) holdout: i64,
}

/// A labelled sample, as far as the queue needs it.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(crate) struct KnownRow {
    /// The class's position, -1 for none of them.
    class: i64,
    pub(crate) sha256: Option<String>,
    model: Option<String>,
    data: Option<Vec<u8>>,
}

impl KnownRow {
    /// Does it need an embedding by this model?
    pub(crate) fn lacks(&self, model: &str) -> bool {
        self.model.as_deref() != Some(model)
    }

    /// With its own embedding, or with one of `computed`, which are `model`'s.
    pub(crate) fn known(self, model: &str, computed: &HashMap<String, Vec<f32>>) -> Option<Known> {
        let given = self.sha256.as_ref().and_then(|sha256| computed.get(sha256));
        let embedding = match (given, self.model, self.data) {
            (Some(computed), ..) => (model.to_owned(), computed.clone()),
            (None, Some(model), Some(data)) => (model, floats_of_bytes(&data)),
            (None, ..) => return None,
        };
        Some(Known {
            class: self.class,
            embedding,
        })
    }
}

/// What somebody says about a sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Class(String),
    NoneOfThese,
    Skip,
}

#[derive(sqlx::FromRow)]
struct Counts {
    name: String,
    samples: i64,
    labelled: i64,
    none: i64,
    skipped: i64,
    open: i64,
    holdout: i64,
}

async fn classes_of(
    connection: &mut SqliteConnection,
    task: &str,
) -> Result<Vec<String>, RecordError> {
    sqlx::query_scalar("SELECT name FROM classes WHERE task = ? ORDER BY position")
        .bind(task)
        .fetch_all(connection)
        .await
        .map_err(RecordError::sql("read the classes of a task"))
}

impl Records {
    /// The classes of a task in their order.
    pub(crate) async fn classes(&self, task: &str) -> Result<Vec<String>, RecordError> {
        let connection = self.readers().acquire().await;
        let mut connection = connection.map_err(RecordError::sql("read the classes of a task"))?;
        classes_of(&mut connection, task).await
    }

    /// Gives a task these classes, which begin with those that it has.
    pub(crate) async fn put_task(
        &self,
        task: &str,
        classes: &[String],
        now_ms: i64,
    ) -> Result<(), LabelError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        let others: i64 = sqlx::query_scalar("SELECT count(*) FROM tasks WHERE name <> ?")
            .bind(task)
            .fetch_one(&mut *tx)
            .await
            .map_err(RecordError::sql("count the tasks"))?;
        if others >= MAX_TASKS {
            let why = format!("there are {MAX_TASKS} tasks, which is all that may be");
            return Err(LabelError::Invalid(why));
        }
        note_task(&mut tx, task, now_ms).await?;
        let has = classes_of(&mut tx, task).await?;
        if !classes.starts_with(&has) {
            return Err(LabelError::Classes(format!(
                "classes are only added at the end; the task has {has:?}"
            )));
        }
        for (position, name) in classes.iter().enumerate().skip(has.len()) {
            sqlx::query("INSERT INTO classes (task, position, name) VALUES (?, ?, ?)")
                .bind(task)
                .bind(position as i64)
                .bind(name)
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql("write a class"))?;
        }
        Ok(commit(tx).await?)
    }

    /// Every task in order of name; only this one, if one is named.
    pub(crate) async fn tasks(&self, only: Option<&str>) -> Result<Vec<TaskRow>, RecordError> {
        let sql = format!(
            "SELECT t.name, coalesce(n.samples, 0) AS samples, coalesce(n.labelled, 0) AS labelled, \
             coalesce(n.none, 0) AS none, coalesce(n.skipped, 0) AS skipped, coalesce(n.open, 0) AS open, \
             coalesce(n.holdout, 0) AS holdout FROM tasks t LEFT JOIN (SELECT s.task, \
             count(*) AS samples, sum(CASE WHEN l.kind = 'class' THEN 1 ELSE 0 END) AS labelled, \
             sum(CASE WHEN l.kind = 'none' THEN 1 ELSE 0 END) AS none, \
             sum(CASE WHEN l.kind = 'skip' THEN 1 ELSE 0 END) AS skipped, \
             sum(CASE WHEN l.kind IS NULL AND s.image = 'stored' THEN 1 ELSE 0 END) AS open, \
             sum(CASE WHEN l.kind = 'class' AND s.holdout = 1 THEN 1 ELSE 0 END) AS holdout \
             {WITH_LABEL} WHERE s.deleted_ms IS NULL GROUP BY s.task) n ON n.task = t.name \
             WHERE ? IS NULL OR t.name = ? ORDER BY t.name LIMIT {MAX_TASKS}"
        );
        let counts: Vec<Counts> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(only)
            .bind(only)
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read the tasks"))?;
        let mut tasks = Vec::with_capacity(counts.len());
        for row in counts {
            tasks.push(TaskRow {
                classes: self.classes(&row.name).await?,
                name: row.name,
                samples: row.samples,
                labelled: row.labelled,
                none: row.none,
                skipped: row.skipped,
                open: row.open,
                holdout: row.holdout,
            });
        }
        Ok(tasks)
    }

    /// Adds a label to the history of a sample.
    pub(crate) async fn label(
        &self,
        sample: i64,
        said: &Said,
        author: &str,
        now_ms: i64,
    ) -> Result<(), LabelError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        let task = task_of_sample(&mut tx, sample).await?;
        let (kind, class) = match said {
            Said::NoneOfThese => ("none", None),
            Said::Skip => ("skip", None),
            Said::Class(name) => {
                let classes = classes_of(&mut tx, &task).await?;
                let position = classes.iter().position(|c| c == name).ok_or_else(|| {
                    LabelError::Invalid(format!("class: the task {task} has no class {name:?}"))
                })?;
                ("class", Some(position as i64))
            }
        };
        sqlx::query(
            "INSERT INTO labels (sample, kind, class, author, created_ms) VALUES (?, ?, ?, ?, ?)",
        )
        .bind(sample)
        .bind(kind)
        .bind(class)
        .bind(author)
        .bind(now_ms)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("write a label"))?;
        Ok(commit(tx).await?)
    }

    /// Takes the current label of a sample back: the one before is the current one again.
    pub(crate) async fn undo_label(
        &self,
        sample: i64,
        author: &str,
        now_ms: i64,
    ) -> Result<(), LabelError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        task_of_sample(&mut tx, sample).await?;
        let done = sqlx::query(
            "UPDATE labels SET undone_by = ?, undone_ms = ? WHERE id = \
             (SELECT max(id) FROM labels WHERE sample = ? AND undone_ms IS NULL)",
        )
        .bind(author)
        .bind(now_ms)
        .bind(sample)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("take a label back"))?;
        if done.rows_affected() == 0 {
            return Err(LabelError::NoLabel);
        }
        Ok(commit(tx).await?)
    }

    /// The samples that nobody has said anything about, those that people marked first and then those that
    /// the model was least sure of; at most [`MAX_CANDIDATES`].
    pub(crate) async fn candidates(
        &self,
        task: &str,
        site: Option<&str>,
    ) -> Result<Vec<Candidate>, RecordError> {
        type Row = (
            i64,
            Option<String>,
            Option<f64>,
            Option<f64>,
            Option<String>,
            Option<Vec<u8>>,
        );
        let sql = format!(
            "SELECT s.id, s.reason, s.margin, s.entropy, e.model, e.data {WITH_LABEL} \
             LEFT JOIN embeddings e ON e.sample = s.id \
             WHERE s.task = ?1 AND (?2 IS NULL OR s.site = ?2) AND s.deleted_ms IS NULL \
             AND s.image = 'stored' AND l.kind IS NULL AND {FREE} \
             ORDER BY CASE WHEN s.reason IN ('wrong', 'missed') THEN 0 ELSE 1 END, \
             coalesce(s.margin, 0.5), s.id LIMIT {MAX_CANDIDATES}"
        );
        let rows: Vec<Row> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(task)
            .bind(site)
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read what can be labelled"))?;
        let candidates = rows
            .into_iter()
            .map(|(id, reason, margin, entropy, model, data)| {
                let uncertainty = margin
                    .zip(entropy)
                    .map(|(margin, entropy)| ((1.0 - margin + entropy) / 2.0) as f32);
                Candidate {
                    id,
                    marked: matches!(reason.as_deref(), Some("wrong" | "missed")),
                    uncertainty,
                    embedding: model.zip(data.map(|d| floats_of_bytes(&d))),
                }
            });
        Ok(candidates.collect())
    }

    /// Samples that have a label and are not held out, the newest, at most [`MAX_KNOWN`].
    pub(crate) async fn known(&self, task: &str) -> Result<Vec<KnownRow>, RecordError> {
        let sql = format!(
            "SELECT coalesce(l.class, -1) AS class, s.sha256, e.model, e.data {WITH_LABEL} \
             LEFT JOIN embeddings e ON e.sample = s.id \
             WHERE s.task = ? AND s.deleted_ms IS NULL AND s.holdout = 0 AND l.kind IN ('class', 'none') AND {FREE} \
             ORDER BY l.id DESC LIMIT {MAX_KNOWN}"
        );
        sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(task)
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read what is labelled"))
    }

    /// The ids of all samples, or of those of a site, that nobody has said anything about.
    pub(crate) async fn open_ids(
        &self,
        task: &str,
        site: Option<&str>,
    ) -> Result<Vec<i64>, RecordError> {
        let sql = format!(
            "SELECT s.id {WITH_LABEL} WHERE s.task = ?1 AND (?2 IS NULL OR s.site = ?2) AND s.deleted_ms IS NULL \
             AND s.image = 'stored' AND l.kind IS NULL AND {FREE} ORDER BY s.id"
        );
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
            .bind(task)
            .bind(site)
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read what can be labelled"))
    }

    /// These samples in this order; those that are gone are left out.
    pub(crate) async fn in_order(&self, ids: &[i64]) -> Result<Vec<SampleRow>, RecordError> {
        let mut rows = Vec::with_capacity(ids.len());
        for id in ids {
            rows.extend(self.sample(*id).await?);
        }
        Ok(rows)
    }
}

async fn task_of_sample(
    connection: &mut SqliteConnection,
    sample: i64,
) -> Result<String, LabelError> {
    let found: Option<(String, Option<i64>)> =
        sqlx::query_as("SELECT task, deleted_ms FROM samples WHERE id = ?")
            .bind(sample)
            .fetch_optional(connection)
            .await
            .map_err(RecordError::sql("look for a sample"))?;
    match found {
        None => Err(LabelError::NoSample),
        Some((_, Some(_))) => Err(LabelError::Deleted),
        Some((task, None)) => Ok(task),
    }
}

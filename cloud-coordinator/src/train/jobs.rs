//! The queue of trainings: in the database, worked on one at a time, taken up again after a restart.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::Serialize;
use sqlx::{FromRow, Row, sqlite::SqliteRow};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{request::Request, work::Work};
use crate::{
    clock,
    records::{RecordError, Records, commit},
};

/// Jobs that wait; a person or a policy that asks for more has gone wrong.
const MAX_QUEUED: i64 = 100;
/// A job that was running so often when the coordinator ended is given up: it may be what ends it.
const MAX_ATTEMPTS: i64 = 3;
/// The queue is looked at at least so often, should a wake-up be lost.
const LOOK: Duration = Duration::from_secs(30);

/// Why a job cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JobError {
    #[error("there is no job {0}")]
    Unknown(i64),
    #[error("{MAX_QUEUED} jobs are waiting already")]
    Full,
    #[error("job {0} has ended already")]
    Ended(i64),
    #[error("{0}")]
    Request(String),
    #[error(transparent)]
    Records(#[from] RecordError),
}

/// How far a job is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, utoipa::ToSchema)]
pub(crate) struct Progress {
    /// What it is doing: `features`, `train`, `holdout`, `write`.
    pub(crate) phase: String,
    /// Steps done in this phase.
    pub(crate) step: usize,
    /// Steps in this phase.
    pub(crate) steps: usize,
    /// The objective, where there is one; smaller is better.
    pub(crate) loss: Option<f64>,
    /// Seconds until the phase ends, at the pace so far.
    pub(crate) eta_s: Option<f64>,
}

/// Where a job tells its progress, and finds out that it is to end.
#[derive(Clone, Debug)]
pub(crate) struct Reporter {
    /// Cancelled by a person, by the time limit, or because the coordinator stops.
    pub(crate) stop: CancellationToken,
    /// It ends because it took too long.
    late: Arc<AtomicBool>,
    state: Arc<Mutex<(Progress, Instant)>>,
}

impl Reporter {
    pub(super) fn new(stop: CancellationToken) -> Self {
        Self {
            stop,
            late: Arc::default(),
            state: Arc::new(Mutex::new((Progress::default(), Instant::now()))),
        }
    }

    /// Tells where it is. `Break` means: end now.
    pub(crate) fn tell(
        &self,
        phase: &str,
        step: usize,
        steps: usize,
        loss: Option<f64>,
    ) -> std::ops::ControlFlow<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0.phase != phase {
            state.1 = Instant::now();
        }
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let left = |spent: f64| spent / step as f64 * steps.saturating_sub(step) as f64;
        state.0 = Progress {
            phase: phase.to_owned(),
            step,
            steps,
            loss: loss.filter(|loss| loss.is_finite()),
            eta_s: (step > 0).then(|| left(state.1.elapsed().as_secs_f64())),
        };
        if self.stop.is_cancelled() {
            std::ops::ControlFlow::Break(())
        } else {
            std::ops::ControlFlow::Continue(())
        }
    }

    /// It took too long.
    fn too_late(&self) {
        self.late.store(true, Ordering::Relaxed);
        self.stop.cancel();
    }

    /// Whether it ends because it took too long.
    pub(super) fn is_late(&self) -> bool {
        self.late.load(Ordering::Relaxed)
    }

    fn progress(&self) -> Progress {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0.clone()
    }
}

/// One training, and what became of it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct Job {
    /// Its number.
    pub(crate) id: i64,
    /// The task that it is for.
    pub(crate) task: String,
    /// What was asked.
    pub(crate) request: serde_json::Value,
    /// `queued`, `running`, `done`, `failed` or `cancelled`.
    pub(crate) state: String,
    /// How far it is.
    pub(crate) progress: Option<Progress>,
    /// The model that came out, `name@version`: accepted or refused.
    pub(crate) model: Option<String>,
    /// Why it failed.
    pub(crate) error: Option<String>,
    /// Who asked.
    pub(crate) author: String,
    /// When it was asked for, in milliseconds since the Unix epoch.
    pub(crate) created_ms: i64,
    /// When it was begun.
    pub(crate) started_ms: Option<i64>,
    /// When it ended.
    pub(crate) ended_ms: Option<i64>,
}

impl FromRow<'_, SqliteRow> for Job {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        let request: String = row.try_get("request")?;
        Ok(Self {
            id: row.try_get("id")?,
            task: row.try_get("task")?,
            request: serde_json::from_str(&request)
                .map_err(|error| sqlx::Error::Decode(error.into()))?,
            state: row.try_get("state")?,
            progress: None,
            model: row.try_get("model")?,
            error: row.try_get("error")?,
            author: row.try_get("author")?,
            created_ms: row.try_get("created_ms")?,
            started_ms: row.try_get("started_ms")?,
            ended_ms: row.try_get("ended_ms")?,
        })
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Jobs {
    records: Arc<Records>,
    wake: Notify,
    running: Mutex<Option<(i64, Reporter)>>,
}

const COLUMNS: &str =
    "id, task, request, state, model, error, author, created_ms, started_ms, ended_ms";

impl Jobs {
    /// The queue; jobs that were running when the coordinator ended wait again.
    pub(crate) async fn open(records: Arc<Records>) -> Result<Self, RecordError> {
        const WHAT: &str = "take up interrupted jobs";
        {
            let mut writer = records.writer().await;
            let mut tx = writer.begin().await?;
            sqlx::query(
                "UPDATE jobs SET state = 'failed', ended_ms = ?1,
                 error = 'the coordinator ended ' || attempts || ' times while it ran'
                 WHERE state = 'running' AND attempts >= ?2",
            )
            .bind(clock::now_ms())
            .bind(MAX_ATTEMPTS)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql(WHAT))?;
            sqlx::query("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql(WHAT))?;
            commit(tx).await?;
        }
        Ok(Self {
            records,
            wake: Notify::new(),
            running: Mutex::new(None),
        })
    }

    /// Puts a training in the queue.
    pub(crate) async fn submit(&self, task: &str, request: &Request) -> Result<Job, JobError> {
        const WHAT: &str = "queue a job";
        request.check().map_err(JobError::Request)?;
        let text = serde_json::to_string(request).map_err(|e| JobError::Request(e.to_string()))?;
        let id = {
            let mut writer = self.records.writer().await;
            let mut tx = writer.begin().await?;
            let waiting: i64 =
                sqlx::query_scalar("SELECT count(*) FROM jobs WHERE state = 'queued'")
                    .fetch_one(&mut *tx)
                    .await
                    .map_err(RecordError::sql(WHAT))?;
            if waiting >= MAX_QUEUED {
                return Err(JobError::Full);
            }
            let id: i64 = sqlx::query_scalar(
                "INSERT INTO jobs (task, request, state, attempts, author, created_ms)
                 VALUES (?, ?, 'queued', 0, ?, ?) RETURNING id",
            )
            .bind(task)
            .bind(text)
            .bind(request.author())
            .bind(clock::now_ms())
            .fetch_one(&mut *tx)
            .await
            .map_err(RecordError::sql(WHAT))?;
            commit(tx).await?;
            id
        };
        self.wake.notify_one();
        self.get(id).await
    }

    /// One job.
    pub(crate) async fn get(&self, id: i64) -> Result<Job, JobError> {
        let query = format!("SELECT {COLUMNS} FROM jobs WHERE id = ?");
        let mut job: Job = sqlx::query_as(sqlx::AssertSqlSafe(query))
            .bind(id)
            .fetch_optional(self.records.readers())
            .await
            .map_err(RecordError::sql("read a job"))?
            .ok_or(JobError::Unknown(id))?;
        self.fill(&mut job);
        Ok(job)
    }

    /// Jobs, newest first, before the job `before` if given.
    pub(crate) async fn list(&self, limit: i64, before: Option<i64>) -> Result<Vec<Job>, JobError> {
        let query = format!(
            "SELECT {COLUMNS} FROM jobs WHERE ?1 IS NULL OR id < ?1 ORDER BY id DESC LIMIT ?2"
        );
        let mut jobs: Vec<Job> = sqlx::query_as(sqlx::AssertSqlSafe(query))
            .bind(before)
            .bind(limit)
            .fetch_all(self.records.readers())
            .await
            .map_err(RecordError::sql("list the jobs"))?;
        jobs.iter_mut().for_each(|job| self.fill(job));
        Ok(jobs)
    }

    fn fill(&self, job: &mut Job) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        job.progress = running
            .as_ref()
            .filter(|(id, _)| *id == job.id && job.state == "running")
            .map(|(_, reporter)| reporter.progress());
    }

    /// Ends a job: at once where it waits, at its next step where it runs.
    pub(crate) async fn cancel(&self, id: i64) -> Result<Job, JobError> {
        const WHAT: &str = "cancel a job";
        let job = self.get(id).await?;
        {
            let mut writer = self.records.writer().await;
            let mut tx = writer.begin().await?;
            let done = sqlx::query(
                "UPDATE jobs SET state = 'cancelled', ended_ms = ? WHERE id = ? AND state IN ('queued', 'running')",
            )
            .bind(clock::now_ms())
            .bind(id)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql(WHAT))?;
            if done.rows_affected() == 0 {
                return Err(JobError::Ended(job.id));
            }
            commit(tx).await?;
        }
        let running = self
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some((_, reporter)) = running.filter(|(running, _)| *running == id) {
            reporter.stop.cancel();
        }
        self.get(id).await
    }

    /// The next job, marked as running.
    async fn next(&self) -> Result<Option<(i64, String, Request)>, JobError> {
        const WHAT: &str = "take the next job";
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let row: Option<(i64, String, String)> = sqlx::query_as(
            "UPDATE jobs SET state = 'running', attempts = attempts + 1, started_ms = ?
             WHERE id = (SELECT min(id) FROM jobs WHERE state = 'queued')
             RETURNING id, task, request",
        )
        .bind(clock::now_ms())
        .fetch_optional(&mut *tx)
        .await
        .map_err(RecordError::sql(WHAT))?;
        commit(tx).await?;
        let Some((id, task, request)) = row else {
            return Ok(None);
        };
        let request =
            serde_json::from_str(&request).map_err(|e| JobError::Request(e.to_string()))?;
        Ok(Some((id, task, request)))
    }

    async fn end(&self, id: i64, outcome: &Result<String, String>) -> Result<(), JobError> {
        let (state, model, error) = match outcome {
            Ok(model) => ("done", Some(model), None),
            Err(error) => ("failed", None, Some(error)),
        };
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        // What a person has cancelled stays so.
        sqlx::query(
            "UPDATE jobs SET state = ?, model = ?, error = ?, ended_ms = ? WHERE id = ? AND state = 'running'",
        )
        .bind(state)
        .bind(model)
        .bind(error)
        .bind(clock::now_ms())
        .bind(id)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("end a job"))?;
        Ok(commit(tx).await?)
    }

    /// Works on one job after the other until `stop`.
    pub(crate) async fn run(self: Arc<Self>, work: Arc<Work>, stop: CancellationToken) {
        loop {
            let next = match self.next().await {
                Ok(next) => next,
                Err(error) => {
                    tracing::warn!(%error, "the queue of trainings cannot be read");
                    None
                }
            };
            let Some((id, task, request)) = next else {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = timeout(LOOK, self.wake.notified()) => continue,
                }
            };
            let reporter = Reporter::new(stop.child_token());
            let running = (id, reporter.clone());
            *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(running);
            tracing::info!(job = id, task, "training begins");
            let limit = work.time_limit();
            let outcome = {
                let done = work.run(id, &task, &request, &reporter);
                tokio::pin!(done);
                tokio::select! {
                    outcome = &mut done => outcome.map_err(|error| error.to_string()),
                    () = tokio::time::sleep(limit) => {
                        reporter.too_late();
                        let _ = done.await;
                        Err(format!("it took longer than the allowed {} s", limit.as_secs()))
                    }
                }
            };
            *self.running.lock().unwrap_or_else(PoisonError::into_inner) = None;
            if stop.is_cancelled() && outcome.is_err() {
                // It waits again at the next start.
                return;
            }
            match &outcome {
                Ok(model) => tracing::info!(job = id, task, model, "training ended"),
                Err(error) => tracing::warn!(job = id, task, error, "training failed"),
            }
            if let Err(error) = self.end(id, &outcome).await {
                tracing::warn!(job = id, %error, "the end of a training cannot be recorded");
            }
        }
    }
}

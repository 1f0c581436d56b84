//! When a training starts without anybody asking for it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde::Deserialize;
use sqlx::FromRow;
use tokio_util::sync::CancellationToken;

use super::{Jobs, Request, request::Trainer};
use crate::{
    clock,
    quarantine::FREE,
    records::{RecordError, Records},
    registry::Registry,
};

/// How often it is looked whether a training is due: a person who labels notices no more.
const LOOK: Duration = Duration::from_secs(5);
const HOUR_MS: i64 = 3_600_000;

/// `[training.start]`: what starts a training. Without it only people do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StartPolicy {
    /// So many new labels of a task since its last training; 0 is never.
    pub labels: u32,
    /// The same while a device that runs a model of the task sees drift; 0 is never.
    pub drift_labels: u32,
    /// So many hours since the last training of a task, if there is a new label; 0 is never.
    pub every_h: u32,
    /// How it is trained.
    pub trainer: Trainer,
    /// Each class counts the same, however many images it has.
    pub balanced: bool,
}

impl StartPolicy {
    /// Can it ever start one?
    const fn is_on(&self) -> bool {
        self.labels > 0 || self.drift_labels > 0 || self.every_h > 0
    }

    /// Is a training due? Says why.
    fn due(&self, task: &Standing, drifting: bool, now_ms: i64) -> Option<String> {
        if task.busy > 0 || task.labels == 0 {
            return None;
        }
        let enough = |least: u32| least > 0 && task.labels >= i64::from(least);
        let waited = now_ms.saturating_sub(task.last_ms) / HOUR_MS;
        if enough(self.labels) {
            Some(format!("{} new labels", task.labels))
        } else if drifting && enough(self.drift_labels) {
            Some(format!("{} new labels and drift", task.labels))
        } else if self.every_h > 0 && waited >= i64::from(self.every_h) {
            Some(format!("{} hours since the last", self.every_h))
        } else {
            None
        }
    }
}

/// How a task stands.
#[derive(Clone, Debug, FromRow)]
struct Standing {
    task: String,
    /// When it was last trained, or when its first label came.
    last_ms: i64,
    /// Trainings that wait or run.
    busy: i64,
    /// Samples to train with that got their label since.
    labels: i64,
}

async fn standings(records: &Records) -> Result<Vec<Standing>, RecordError> {
    let sql = format!(
        "WITH last AS (
             SELECT t.name AS task, coalesce(max(j.created_ms), 0) AS at,
                 coalesce(sum(CASE WHEN j.state IN ('queued', 'running') THEN 1 ELSE 0 END), 0) AS busy
             FROM tasks t LEFT JOIN jobs j ON j.task = t.name GROUP BY t.name)
         SELECT last.task, last.busy, count(DISTINCT l.sample) AS labels,
             CASE WHEN last.at > 0 THEN last.at ELSE min(l.created_ms) END AS last_ms
         FROM last JOIN labels l ON l.created_ms > last.at AND l.kind = 'class' AND l.undone_ms IS NULL
         JOIN samples s ON s.id = l.sample AND s.task = last.task AND s.holdout = 0 AND s.deleted_ms IS NULL
         WHERE {FREE} GROUP BY last.task, last.busy, last.at"
    );
    sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .fetch_all(records.readers())
        .await
        .map_err(RecordError::sql("see which tasks have new labels"))
}

/// Puts trainings in the queue as `policy` says, until `stop`.
pub(crate) async fn by_itself(
    policy: StartPolicy,
    records: Arc<Records>,
    registry: Arc<Registry>,
    jobs: Arc<Jobs>,
    stop: CancellationToken,
) {
    if !policy.is_on() {
        return;
    }
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        let standings = match standings(&records).await {
            Ok(standings) => standings,
            Err(error) => {
                tracing::warn!(%error, "cannot tell whether a training is due");
                continue;
            }
        };
        let drifting: BTreeSet<String> = registry.drifting_tasks();
        for standing in standings {
            let task = &standing.task;
            let Some(why) = policy.due(&standing, drifting.contains(task), clock::now_ms()) else {
                continue;
            };
            let request = Request::by_itself(&policy, &why);
            match jobs.submit(task, &request).await {
                Ok(job) => tracing::info!(job = job.id, task, why, "a training starts by itself"),
                Err(error) => tracing::warn!(task, %error, "a training that is due does not start"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(labels: i64, last_ms: i64, busy: i64) -> Standing {
        let task = "t".into();
        Standing {
            task,
            last_ms,
            busy,
            labels,
        }
    }

    #[test]
    fn starts_when_it_is_due_and_only_then() {
        let policy = StartPolicy {
            labels: 100,
            drift_labels: 20,
            every_h: 24,
            ..StartPolicy::default()
        };
        let day = 24 * HOUR_MS;
        let due = |labels, drifting, now, busy| {
            policy
                .due(&standing(labels, 0, busy), drifting, now)
                .is_some()
        };
        assert!(!due(0, true, 10 * day, 0), "nothing new");
        assert!(!due(99, false, day - 1, 0) && due(100, false, 0, 0));
        assert!(!due(19, true, 0, 0) && due(20, true, 0, 0) && !due(20, false, 0, 0));
        assert!(due(1, false, day, 0));
        assert!(!due(1_000, true, 10 * day, 1), "one is on its way");
        assert!(!StartPolicy::default().is_on());
        let never = StartPolicy::default().due(&standing(9_999, 0, 0), true, 10 * day);
        assert_eq!(never, None);
    }
}

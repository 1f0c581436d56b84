//! Devices whose samples are not learnt from: set by what [`learn::suspect`] finds before a training, or by a person, and
//! lifted by a person only.
//!
//! Samples of such a device are taken in as before. They go into no training set, they are not asked about, and they
//! teach the queue nothing. What a person has put into the holdout stays there.

use std::{collections::HashMap, sync::Arc};

use learn::suspect::Finding;
use serde::Serialize;
use sqlx::FromRow;

use crate::{
    clock,
    records::{RecordError, Records, commit},
    trust::{
        Trust,
        audit::{Entry, Outcome},
    },
};

/// The condition that a sample `s` is of no such device.
pub(crate) const FREE: &str = "NOT EXISTS (SELECT 1 FROM quarantines q WHERE q.device = s.device \
    AND q.site = coalesce(s.site, '') AND q.lifted_ms IS NULL)";
/// How a site is written where none was proved.
pub(crate) const NO_SITE: &str = "_";
/// The most rows of one answer.
const LISTED: i64 = 1_000;
/// Characters of a reason that a person gives.
const MAX_WHY: usize = 500;

/// Why it cannot be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QuarantineError {
    #[error(transparent)]
    Records(#[from] RecordError),
    #[error("{0} is not in quarantine")]
    Free(String),
    #[error("why: say it in 1 to {MAX_WHY} characters")]
    Why,
}

/// A quarantine, over or not.
#[derive(Clone, Debug, PartialEq, Serialize, FromRow, utoipa::ToSchema)]
#[schema(as = Quarantine)]
pub(crate) struct QuarantineRow {
    /// Its site; `_` where no site was proved.
    pub(crate) site: String,
    /// The device.
    pub(crate) device: String,
    /// Why, for people.
    pub(crate) why: String,
    /// What was found, as JSON; nothing where a person decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) evidence: Option<String>,
    /// In whose samples it was found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) task: Option<String>,
    /// Who decided.
    pub(crate) author: String,
    /// When, milliseconds since 1970.
    pub(crate) at_ms: i64,
    /// Who lifted it; nothing while it lasts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lifted_by: Option<String>,
    /// When, milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lifted_ms: Option<i64>,
}

/// A device as it is called in datasets.
pub(crate) fn called(site: &str, device: &str) -> String {
    format!("{}/{device}", if site.is_empty() { NO_SITE } else { site })
}

/// A site as it is stored.
fn stored(site: &str) -> &str {
    if site == NO_SITE { "" } else { site }
}

/// The quarantines.
#[derive(Clone, Debug)]
pub(crate) struct Quarantine {
    records: Arc<Records>,
    trust: Trust,
}

impl Quarantine {
    /// On this database; what is decided without a person goes into the log of `trust`.
    pub(crate) fn new(records: Arc<Records>, trust: Trust) -> Self {
        Self { records, trust }
    }

    /// Those that last first, then the newest; at most 1,000.
    pub(crate) async fn list(
        &self,
        site: Option<&str>,
    ) -> Result<Vec<QuarantineRow>, QuarantineError> {
        let rows = sqlx::query_as(
            "SELECT CASE WHEN site = '' THEN '_' ELSE site END AS site, device, why, evidence, task, author, \
             at_ms, lifted_by, lifted_ms FROM quarantines WHERE ?1 IS NULL OR site = ?1 \
             ORDER BY lifted_ms IS NOT NULL, id DESC LIMIT ?2",
        )
        .bind(site.map(stored))
        .bind(LISTED)
        .fetch_all(self.records.readers())
        .await
        .map_err(RecordError::sql("read who is in quarantine"))?;
        Ok(rows)
    }

    /// A person sets a device apart. One that is already stays as it is.
    pub(crate) async fn set(
        &self,
        site: &str,
        device: &str,
        why: &str,
        by: &str,
    ) -> Result<(), QuarantineError> {
        let why = why.trim();
        let length = why.chars().count();
        if !(1..=MAX_WHY).contains(&length) || why.chars().any(char::is_control) {
            return Err(QuarantineError::Why);
        }
        self.write((stored(site), device), why, None, None, by)
            .await?;
        Ok(())
    }

    /// Sets a device apart because of what was found. False if it is already.
    pub(crate) async fn found(
        &self,
        device: &str,
        task: &str,
        finding: &Finding,
    ) -> Result<bool, QuarantineError> {
        let (site, name) = device.split_once('/').unwrap_or(("", device));
        let why = finding.text();
        let evidence = serde_json::to_string(finding).ok();
        let whom = (stored(site), name);
        let new = self
            .write(whom, &why, evidence.as_deref(), Some(task), "by itself")
            .await?;
        if new {
            tracing::warn!(device, task, why, "a device is in quarantine");
            let entry = Entry {
                who: "coordinator",
                action: "quarantine",
                object: device,
                outcome: Outcome::Done,
                detail: &why,
            };
            self.trust.note(entry).await;
        }
        Ok(new)
    }

    async fn write(
        &self,
        (site, device): (&str, &str),
        why: &str,
        evidence: Option<&str>,
        task: Option<&str>,
        by: &str,
    ) -> Result<bool, RecordError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let done = sqlx::query(
            "INSERT INTO quarantines (site, device, why, evidence, task, author, at_ms) \
             SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 WHERE NOT EXISTS (SELECT 1 FROM quarantines \
             WHERE site = ?1 AND device = ?2 AND lifted_ms IS NULL)",
        )
        .bind(site)
        .bind(device)
        .bind(why)
        .bind(evidence)
        .bind(task)
        .bind(by)
        .bind(clock::now_ms())
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("write a quarantine"))?;
        commit(tx).await?;
        Ok(done.rows_affected() > 0)
    }

    /// A person lets a device's samples count again, and vouches for those that are here.
    pub(crate) async fn lift(
        &self,
        site: &str,
        device: &str,
        by: &str,
    ) -> Result<(), QuarantineError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let done = sqlx::query(
            "UPDATE quarantines SET lifted_by = ?1, lifted_ms = ?2, \
             upto = (SELECT coalesce(max(id), 0) FROM samples) \
             WHERE site = ?3 AND device = ?4 AND lifted_ms IS NULL",
        )
        .bind(by)
        .bind(clock::now_ms())
        .bind(stored(site))
        .bind(device)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("lift a quarantine"))?;
        commit(tx).await?;
        if done.rows_affected() == 0 {
            return Err(QuarantineError::Free(called(stored(site), device)));
        }
        Ok(())
    }

    /// The devices that are in quarantine now.
    pub(crate) async fn now(&self) -> Result<Vec<String>, QuarantineError> {
        let rows: Vec<(String, String)> =
            sqlx::query_as("SELECT site, device FROM quarantines WHERE lifted_ms IS NULL")
                .fetch_all(self.records.readers())
                .await
                .map_err(RecordError::sql("read who is in quarantine"))?;
        Ok(rows
            .iter()
            .map(|(site, device)| called(site, device))
            .collect())
    }

    /// Up to which sample a person vouches for a device.
    pub(crate) async fn vouched(&self) -> Result<HashMap<String, i64>, QuarantineError> {
        let rows: Vec<(String, String, i64)> = sqlx::query_as(
            "SELECT site, device, max(upto) FROM quarantines WHERE lifted_ms IS NOT NULL GROUP BY site, device",
        )
        .fetch_all(self.records.readers())
        .await
        .map_err(RecordError::sql("read whom people vouch for"))?;
        Ok(rows
            .into_iter()
            .map(|(site, device, upto)| (called(&site, &device), upto))
            .collect())
    }
}

//! The SQL of releases, rollouts and wishes.

use std::collections::HashMap;

use super::ReleaseRow;
use crate::{
    clock,
    records::{RecordError, Records, commit},
};

/// A rollout as it is kept.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct RolloutRow {
    pub(super) id: i64,
    pub(super) settings: String,
    pub(super) state: String,
    pub(super) ended: bool,
    pub(super) created_ms: i64,
}

/// What a device was last told.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct WishRow {
    pub(super) device: i64,
    pub(super) message: String,
    pub(super) pinned: bool,
}

/// Settings as they are kept.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct SettingsRow {
    pub(super) version: i64,
    pub(super) digest: String,
    pub(super) document: String,
    pub(super) trial_s: i64,
    pub(super) author: String,
    pub(super) created_ms: i64,
}

/// What steps have changed, beside the rollouts that go on.
#[derive(Clone, Debug, Default)]
pub(super) struct Changes {
    /// Rollouts that have ended.
    pub(super) ended: Vec<RolloutRow>,
    /// The newest wish for each device.
    pub(super) wishes: HashMap<i64, WishRow>,
    /// Rollout, and what happened to it.
    pub(super) events: Vec<(i64, String)>,
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.ended.is_empty() && self.wishes.is_empty() && self.events.is_empty()
    }

    pub(super) fn add(&mut self, later: Self) {
        self.ended.extend(later.ended);
        self.wishes.extend(later.wishes);
        self.events.extend(later.events);
    }
}

impl Records {
    pub(super) async fn add_release(
        &self,
        row: &ReleaseRow,
        document: &[u8],
    ) -> Result<(), RecordError> {
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query(
            "INSERT INTO releases (name, version, digest, document, author, created_ms)
             VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name, version) DO NOTHING",
        )
        .bind(&row.name)
        .bind(&row.version)
        .bind(&row.digest)
        .bind(String::from_utf8_lossy(document).into_owned())
        .bind(&row.author)
        .bind(row.created_ms)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("record a release"))?;
        commit(tx).await
    }

    pub(super) async fn release(
        &self,
        name: &str,
        version: &str,
    ) -> Result<Option<ReleaseRow>, RecordError> {
        sqlx::query_as(
            "SELECT name, version, digest, author, created_ms FROM releases
             WHERE name = ? AND version = ?",
        )
        .bind(name)
        .bind(version)
        .fetch_optional(self.readers())
        .await
        .map_err(RecordError::sql("read a release"))
    }

    /// The published models, newest first.
    pub(crate) async fn releases(
        &self,
        limit: i64,
        skip: i64,
    ) -> Result<Vec<ReleaseRow>, RecordError> {
        sqlx::query_as(
            "SELECT name, version, digest, author, created_ms FROM releases
             ORDER BY created_ms DESC, name, version LIMIT ? OFFSET ?",
        )
        .bind(limit)
        .bind(skip)
        .fetch_all(self.readers())
        .await
        .map_err(RecordError::sql("list the releases"))
    }

    /// `name@version` of a published model whose file has this digest.
    pub(super) async fn published_file(&self, sha256: &str) -> Result<Option<String>, RecordError> {
        sqlx::query_scalar(
            "SELECT m.name || '@' || m.version FROM models m
             JOIN releases r ON r.name = m.name AND r.version = m.version WHERE m.sha256 = ? LIMIT 1",
        )
        .bind(sha256)
        .fetch_optional(self.readers())
        .await
        .map_err(RecordError::sql("find a published file"))
    }

    /// The model of this name whose file this is, published or not.
    pub(super) async fn file_of(
        &self,
        name: &str,
        sha256: &str,
    ) -> Result<Option<String>, RecordError> {
        sqlx::query_scalar(
            "SELECT name || '@' || version FROM models WHERE name = ? AND sha256 = ? LIMIT 1",
        )
        .bind(name)
        .bind(sha256)
        .fetch_optional(self.readers())
        .await
        .map_err(RecordError::sql("find a file"))
    }

    pub(super) async fn rollout_rows(&self) -> Result<Vec<RolloutRow>, RecordError> {
        sqlx::query_as("SELECT id, settings, state, ended, created_ms FROM rollouts ORDER BY id")
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read the rollouts"))
    }

    pub(super) async fn rollout_row(&self, id: i64) -> Result<Option<RolloutRow>, RecordError> {
        sqlx::query_as("SELECT id, settings, state, ended, created_ms FROM rollouts WHERE id = ?")
            .bind(id)
            .fetch_optional(self.readers())
            .await
            .map_err(RecordError::sql("read a rollout"))
    }

    pub(super) async fn wish_rows(&self) -> Result<Vec<WishRow>, RecordError> {
        sqlx::query_as("SELECT device, message, pinned FROM wishes")
            .fetch_all(self.readers())
            .await
            .map_err(RecordError::sql("read what devices are to be"))
    }

    /// The settings that count, oldest first.
    pub(super) async fn settings_rows(&self) -> Result<Vec<SettingsRow>, RecordError> {
        sqlx::query_as(
            "SELECT version, digest, document, trial_s, author, created_ms FROM settings
             WHERE ended_ms IS NULL ORDER BY version",
        )
        .fetch_all(self.readers())
        .await
        .map_err(RecordError::sql("read the settings"))
    }

    /// The highest number that settings have; 0 where there are none.
    pub(super) async fn newest_settings(&self) -> Result<i64, RecordError> {
        sqlx::query_scalar("SELECT COALESCE(MAX(version), 0) FROM settings")
            .fetch_one(self.readers())
            .await
            .map_err(RecordError::sql("read the newest settings"))
    }

    /// Adds some, ends others, or both at once.
    pub(super) async fn change_settings(
        &self,
        add: Option<&SettingsRow>,
        end: Option<i64>,
        author: &str,
    ) -> Result<(), RecordError> {
        const WHAT: &str = "record settings";
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        if let Some(version) = end {
            sqlx::query("UPDATE settings SET ended_by = ?, ended_ms = ? WHERE version = ?")
                .bind(author)
                .bind(clock::now_ms())
                .bind(version)
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql(WHAT))?;
        }
        if let Some(row) = add {
            sqlx::query(
                "INSERT INTO settings (version, digest, document, trial_s, author, created_ms)
                 VALUES (?, ?, ?, ?, ?, ?)",
            )
            .bind(row.version)
            .bind(&row.digest)
            .bind(&row.document)
            .bind(row.trial_s)
            .bind(&row.author)
            .bind(row.created_ms)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql(WHAT))?;
        }
        commit(tx).await
    }

    /// What happened to a rollout: when, and what.
    pub(super) async fn rollout_events(&self, id: i64) -> Result<Vec<(i64, String)>, RecordError> {
        /// The last ones; a rollout has some ten.
        const MOST: i64 = 500;
        sqlx::query_as(
            "SELECT at_ms, what FROM (SELECT id, at_ms, what FROM rollout_events
             WHERE rollout = ? ORDER BY id DESC LIMIT ?) ORDER BY id",
        )
        .bind(id)
        .bind(MOST)
        .fetch_all(self.readers())
        .await
        .map_err(RecordError::sql("read what happened to a rollout"))
    }

    /// Writes down together how `rollouts` stand and what changed.
    pub(super) async fn save_delivery(
        &self,
        rollouts: &[RolloutRow],
        changes: &Changes,
    ) -> Result<(), RecordError> {
        const WHAT: &str = "record a step of the rollouts";
        let mut writer = self.writer().await;
        let mut tx = writer.begin().await?;
        for row in changes.ended.iter().chain(rollouts) {
            sqlx::query(
                "INSERT INTO rollouts (id, settings, state, ended, created_ms) VALUES (?, ?, ?, ?, ?)
                 ON CONFLICT (id) DO UPDATE SET state = excluded.state, ended = excluded.ended",
            )
            .bind(row.id)
            .bind(&row.settings)
            .bind(&row.state)
            .bind(row.ended)
            .bind(row.created_ms)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql(WHAT))?;
        }
        for row in changes.wishes.values() {
            sqlx::query(
                "INSERT INTO wishes (device, message, pinned) VALUES (?, ?, ?)
                 ON CONFLICT (device) DO UPDATE SET message = excluded.message, pinned = excluded.pinned",
            )
            .bind(row.device)
            .bind(&row.message)
            .bind(row.pinned)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql(WHAT))?;
        }
        for (rollout, what) in &changes.events {
            sqlx::query("INSERT INTO rollout_events (rollout, at_ms, what) VALUES (?, ?, ?)")
                .bind(rollout)
                .bind(clock::now_ms())
                .bind(what)
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql(WHAT))?;
        }
        commit(tx).await
    }
}

//! The enrolment tokens that people have made.

use mesh_core::Name;
use serde::Serialize;
use sqlx::{Row, sqlite::SqliteRow};

use super::{
    authority::hex,
    devices::{DeviceError, Devices, MAX_ROWS},
};
use crate::records::{RecordError, commit};

/// Tokens that are kept at a time: people make them one by one.
const MAX_TOKENS: i64 = 10_000;
/// A token that ran out is shown for a month, then forgotten. So is its right to answer a device again that has asked.
const TOKEN_KEPT_MS: i64 = 30 * 86_400_000;
/// An enrolment token as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub(crate) struct TokenRow {
    /// Its number.
    pub(crate) jti: String,
    /// The site of whoever enrols with it.
    pub(crate) site: String,
    /// Only this device.
    pub(crate) device: Option<String>,
    /// How many devices it is for.
    pub(crate) quota: i64,
    /// How many have come.
    pub(crate) used: i64,
    /// A person has to approve each.
    pub(crate) needs_approval: bool,
    /// It was taken back.
    pub(crate) revoked: bool,
    /// When it was made, in milliseconds since 1970.
    pub(crate) made_ms: i64,
    /// Who made it.
    pub(crate) made_by: String,
    /// Until when it holds.
    pub(crate) expires_ms: i64,
}

/// A new token.
#[derive(Clone, Debug)]
pub(crate) struct NewToken<'a> {
    pub(crate) site: &'a Name,
    pub(crate) device: Option<&'a Name>,
    pub(crate) quota: i64,
    pub(crate) needs_approval: bool,
    pub(crate) expires_ms: i64,
    pub(crate) by: &'a str,
}

impl Devices {
    /// Notes a new token; its number.
    pub(crate) async fn new_token(
        &self,
        new: NewToken<'_>,
        now_ms: i64,
    ) -> Result<String, DeviceError> {
        let mut bytes = [0; 16];
        if aws_lc_rs::rand::fill(&mut bytes).is_err() {
            return Err(DeviceError::Invalid(
                "the system gives no random numbers".into(),
            ));
        }
        let jti = hex(&bytes);
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query("DELETE FROM enrolment_tokens WHERE expires_ms < ?")
            .bind(now_ms - TOKEN_KEPT_MS)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("forget old enrolment tokens"))?;
        let count: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM enrolment_tokens")
            .fetch_one(&mut *tx)
            .await
            .map_err(RecordError::sql("count the enrolment tokens"))?;
        if count >= MAX_TOKENS {
            return Err(DeviceError::TooMany(MAX_TOKENS));
        }
        sqlx::query(
            "INSERT INTO enrolment_tokens (jti, site, device, quota, needs_approval, made_ms, made_by, expires_ms) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&jti)
        .bind(new.site.as_str())
        .bind(new.device.map(Name::as_str))
        .bind(new.quota)
        .bind(new.needs_approval)
        .bind(now_ms)
        .bind(new.by)
        .bind(new.expires_ms)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("note an enrolment token"))?;
        commit(tx).await?;
        Ok(jti)
    }

    /// Takes a token back: nobody new enrols with it.
    pub(crate) async fn revoke_token(&self, jti: &str) -> Result<(), DeviceError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let done = sqlx::query("UPDATE enrolment_tokens SET revoked = 1 WHERE jti = ?")
            .bind(jti)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("take back an enrolment token"))?;
        commit(tx).await?;
        match done.rows_affected() {
            0 => Err(DeviceError::Missing("enrolment token")),
            _ => Ok(()),
        }
    }

    /// The newest tokens.
    pub(crate) async fn tokens(&self) -> Result<Vec<TokenRow>, RecordError> {
        let rows = sqlx::query("SELECT * FROM enrolment_tokens ORDER BY made_ms DESC, jti LIMIT ?")
            .bind(MAX_ROWS)
            .fetch_all(self.records.readers())
            .await
            .map_err(RecordError::sql("list the enrolment tokens"))?;
        let row = |row: &SqliteRow| TokenRow {
            jti: row.get("jti"),
            site: row.get("site"),
            device: row.get("device"),
            quota: row.get("quota"),
            used: row.get("used"),
            needs_approval: row.get("needs_approval"),
            revoked: row.get("revoked"),
            made_ms: row.get("made_ms"),
            made_by: row.get("made_by"),
            expires_ms: row.get("expires_ms"),
        };
        Ok(rows.iter().map(row).collect())
    }
}

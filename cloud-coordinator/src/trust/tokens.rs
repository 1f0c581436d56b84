//! API tokens: what a program shows, made by a person for it.

use serde::{Deserialize, Serialize};

use super::{
    Principal, Role, Trust, TrustError, Who, audit, done,
    sessions::{DAY_MS, Grant},
    users::checked_site,
};
use crate::{
    clock,
    records::{RecordError, commit},
};

/// Days of a token unless it says otherwise, and at most.
const TOKEN_DAYS: i64 = 90;
const MOST_DAYS: i64 = 730;
/// Tokens of one user.
const MAX_TOKENS: i64 = 200;
/// Bytes of what a token is for.
const MAX_LABEL: usize = 100;

/// A token, without what is shown.
#[derive(Clone, Debug, Serialize, sqlx::FromRow, utoipa::ToSchema)]
#[schema(as = Token)]
pub(crate) struct GrantRow {
    /// Its number.
    id: String,
    /// Whose it is; `machine` if it was made on the coordinator's machine.
    owner: String,
    /// What it is for.
    label: String,
    /// What it may do at most; never more than its owner may.
    role: Role,
    /// The only site that it may see.
    #[serde(skip_serializing_if = "Option::is_none")]
    site: Option<String>,
    /// When it was made, milliseconds since 1970.
    created_ms: i64,
    /// Until when it counts.
    expires_ms: i64,
    /// When it was used last, to the minute.
    seen_ms: i64,
}

/// A token that somebody wants.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewToken {
    /// What it is for, 1 to 100 bytes.
    label: String,
    /// What it may do; not more than its owner.
    role: Role,
    /// The only site that it may see; its owner's unless given.
    #[serde(default)]
    site: Option<String>,
    /// Days until it runs out, 1 to 730; 90 unless given.
    #[serde(default)]
    days: Option<i64>,
}

impl Trust {
    /// Makes a token for somebody. Says its row, and the token, which is not kept.
    pub(crate) async fn add_token(
        &self,
        by: &str,
        owner: &Who,
        new: &NewToken,
    ) -> Result<(GrantRow, String), TrustError> {
        let Principal::User { name, role, site } = &owner.principal else {
            return Err(TrustError::Forbidden("a device has no tokens".into()));
        };
        if !owner.makes_tokens {
            let why = "a token cannot make tokens: log in, or do it on the coordinator's machine";
            return Err(TrustError::Forbidden(why.into()));
        }
        let label = new.label.trim();
        if label.is_empty() || label.len() > MAX_LABEL || label.chars().any(char::is_control) {
            let why = format!("label: says in 1 to {MAX_LABEL} bytes what the token is for");
            return Err(TrustError::Invalid(why));
        }
        if new.role > *role {
            let why = format!("role: is at most your own, {role}");
            return Err(TrustError::Forbidden(why));
        }
        let asked = checked_site(new.site.as_deref())?;
        let site = match (site, asked) {
            (None, asked) => asked,
            (Some(own), None) => Some(own.as_str()),
            (Some(own), Some(asked)) if own.as_str() == asked => Some(asked),
            (Some(own), Some(_)) => {
                return Err(TrustError::Forbidden(format!("site: is your own, {own}")));
            }
        };
        let days = new.days.unwrap_or(TOKEN_DAYS);
        if !(1..=MOST_DAYS).contains(&days) {
            return Err(TrustError::Invalid(format!(
                "days: is from 1 to {MOST_DAYS}"
            )));
        }
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let user: Option<i64> = sqlx::query_scalar("SELECT id FROM users WHERE name = ?")
            .bind(name)
            .fetch_optional(&mut *tx)
            .await
            .map_err(RecordError::sql("read a user"))?;
        let count: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM grants WHERE owner IS ? AND kind = 'token' AND expires_ms > ?",
        )
        .bind(user)
        .bind(clock::now_ms())
        .fetch_one(&mut *tx)
        .await
        .map_err(RecordError::sql("count tokens"))?;
        if count >= MAX_TOKENS {
            let why = format!("{name} has {count} tokens: revoke one first");
            return Err(TrustError::Conflict(why));
        }
        let token = Grant {
            kind: "token",
            audience: "api",
            owner: user,
            label,
            role: Some(new.role),
            site,
            for_ms: days * DAY_MS,
        };
        let (id, signed) = self.grant(&mut tx, token).await?;
        let detail = format!("{label:?}, {} of {}", new.role, site.unwrap_or("all sites"));
        audit::append(
            &mut tx,
            done(by, "make token", &id, &detail),
            clock::now_ms(),
        )
        .await?;
        commit(tx).await?;
        let row = self.tokens(None).await?.into_iter().find(|t| t.id == id);
        Ok((row.ok_or(TrustError::Missing("token"))?, signed))
    }

    /// The tokens of a user, or everybody's, the newest first.
    pub(crate) async fn tokens(&self, owner: Option<&str>) -> Result<Vec<GrantRow>, TrustError> {
        let rows = sqlx::query_as(
            "SELECT g.jti AS id, coalesce(u.name, 'machine') AS owner, g.label, g.role, g.site, g.created_ms, \
             g.expires_ms, g.seen_ms FROM grants g LEFT JOIN users u ON u.id = g.owner \
             WHERE g.kind = 'token' AND g.expires_ms > ?1 AND (?2 IS NULL OR coalesce(u.name, 'machine') = ?2) \
             ORDER BY g.created_ms DESC, g.jti LIMIT 10000",
        )
        .bind(clock::now_ms())
        .bind(owner)
        .fetch_all(self.records.readers())
        .await
        .map_err(RecordError::sql("read the tokens"))?;
        Ok(rows)
    }

    /// Takes a token back: one's own, or anybody's if no owner is named.
    pub(crate) async fn revoke_token(
        &self,
        by: &str,
        id: &str,
        owner: Option<&str>,
    ) -> Result<(), TrustError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let gone = sqlx::query(
            "DELETE FROM grants WHERE jti = ?1 AND kind = 'token' \
             AND (?2 IS NULL OR owner = (SELECT id FROM users WHERE name = ?2))",
        )
        .bind(id)
        .bind(owner)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("revoke a token"))?;
        if gone.rows_affected() == 0 {
            return Err(TrustError::Missing("token"));
        }
        audit::append(&mut tx, done(by, "revoke token", id, ""), clock::now_ms()).await?;
        commit(tx).await?;
        Ok(())
    }
}

//! What people and programs show instead of a password: sessions and API tokens.
//!
//! Each is a signed token and a row. The signature keeps strangers from asking the database; the row is what counts,
//! so that taking it away ends it at once, and so that a role is what it is now and not what it was.

use mesh_core::Name;
use sqlx::{Sqlite, Transaction};

use super::{Principal, Role, Trust, TrustError, audit, done, token::Claims, users::MACHINE};
use crate::{
    clock,
    records::{RecordError, commit},
};

/// A session ends after this much silence: a working day.
const IDLE_MS: i64 = 12 * 3_600_000;
/// A session ends then in any case.
pub(crate) const SESSION_MS: i64 = 7 * DAY_MS;
pub(super) const DAY_MS: i64 = 86_400_000;
/// The machine's own token counts for so long, whatever restarts there are; a coordinator may run for years.
const MACHINE_MS: i64 = 3_650 * DAY_MS;
/// It is replaced at a start that finds less than this left of it.
const MACHINE_LEFT_MS: i64 = 365 * DAY_MS;
/// When something was seen is written at most this often: a write for each request would be a disk flush for each.
const SEEN_MS: i64 = 60_000;
/// Sessions of one user: a few browsers on a few machines. A new one takes the place of the oldest.
const MAX_SESSIONS: i64 = 20;

/// What kind of thing was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// A browser's cookie.
    Session,
    /// An API token.
    Token,
}

/// Who showed something that counts.
#[derive(Clone, Debug)]
pub(crate) struct Who {
    pub(crate) principal: Principal,
    /// The number of what was shown.
    pub(crate) grant: String,
    /// What the token is for; nothing for a session.
    pub(crate) label: Option<String>,
    /// Whether it may make tokens: people and this machine may, tokens may not.
    pub(crate) makes_tokens: bool,
}

#[derive(sqlx::FromRow)]
struct Found {
    kind: String,
    label: String,
    role: Option<Role>,
    site: Option<String>,
    expires_ms: i64,
    seen_ms: i64,
    owner: Option<i64>,
    name: Option<String>,
    owner_role: Option<Role>,
    owner_site: Option<String>,
    disabled: Option<bool>,
}

impl Found {
    /// Who it is now, if it counts.
    fn who(&self, grant: &str, now_ms: i64) -> Option<Who> {
        if now_ms >= self.expires_ms {
            return None;
        }
        let (name, role, site) = match (self.kind.as_str(), self.owner) {
            ("session", Some(_)) => {
                if now_ms.saturating_sub(self.seen_ms) >= IDLE_MS {
                    return None;
                }
                (
                    self.name.clone()?,
                    self.owner_role?,
                    self.owner_site.clone(),
                )
            }
            ("token", Some(_)) => {
                let site = match (&self.owner_site, &self.site) {
                    (None, site) | (site, None) => site.clone(),
                    (Some(owners), Some(site)) if owners == site => Some(site.clone()),
                    // The owner was moved to another site.
                    _ => return None,
                };
                let role = self.role?.min(self.owner_role?);
                (self.name.clone()?, role, site)
            }
            ("token" | "machine", None) => (MACHINE.to_owned(), self.role?, self.site.clone()),
            _ => return None,
        };
        if self.owner.is_some() && self.disabled != Some(false) {
            return None;
        }
        // A site that cannot be read must not become all sites.
        let site = match site {
            Some(site) => Some(site.parse::<Name>().ok()?),
            None => None,
        };
        Some(Who {
            principal: Principal::User { name, role, site },
            grant: grant.to_owned(),
            label: (self.kind == "token").then(|| self.label.clone()),
            makes_tokens: self.kind != "token",
        })
    }
}

fn number() -> Result<String, TrustError> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| TrustError::Hash("the system gives no random numbers".into()))?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

/// A row of what was signed.
#[derive(Clone, Copy)]
pub(super) struct Grant<'a> {
    pub(super) kind: &'a str,
    pub(super) audience: &'a str,
    pub(super) owner: Option<i64>,
    pub(super) label: &'a str,
    pub(super) role: Option<Role>,
    pub(super) site: Option<&'a str>,
    pub(super) for_ms: i64,
}

impl Trust {
    /// Signs something and writes its row. Says its number, and what is to be shown.
    pub(super) async fn grant(
        &self,
        tx: &mut Transaction<'_, Sqlite>,
        grant: Grant<'_>,
    ) -> Result<(String, String), TrustError> {
        let now = clock::now_ms();
        let (jti, expires_ms) = (number()?, now + grant.for_ms);
        let claims = Claims {
            aud: grant.audience.to_owned(),
            jti: jti.clone(),
            exp: expires_ms / 1_000,
        };
        let signed = self.key.sign(&claims)?;
        sqlx::query("DELETE FROM grants WHERE expires_ms < ?")
            .bind(now)
            .execute(&mut **tx)
            .await
            .map_err(RecordError::sql("remove what has run out"))?;
        sqlx::query(
            "INSERT INTO grants (jti, kind, owner, label, role, site, created_ms, expires_ms, seen_ms) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&jti)
        .bind(grant.kind)
        .bind(grant.owner)
        .bind(grant.label)
        .bind(grant.role)
        .bind(grant.site)
        .bind(now)
        .bind(expires_ms)
        .bind(now)
        .execute(&mut **tx)
        .await
        .map_err(RecordError::sql("write a session or token"))?;
        Ok((jti, signed))
    }

    /// Begins the session of a user; says what the cookie holds.
    pub(super) async fn begin_session(
        &self,
        user: i64,
        name: &str,
        from: &str,
    ) -> Result<String, TrustError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query(
            "DELETE FROM grants WHERE jti IN (SELECT jti FROM grants WHERE owner = ? AND kind = 'session' \
             ORDER BY created_ms DESC LIMIT -1 OFFSET ?)",
        )
        .bind(user)
        .bind(MAX_SESSIONS - 1)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("end the oldest session"))?;
        let session = Grant {
            kind: "session",
            audience: "session",
            owner: Some(user),
            label: "",
            role: None,
            site: None,
            for_ms: SESSION_MS,
        };
        let (_, signed) = self.grant(&mut tx, session).await?;
        let who = format!("user {name}");
        audit::append(&mut tx, done(&who, "log in", name, from), clock::now_ms()).await?;
        commit(tx).await?;
        Ok(signed)
    }

    async fn found(&self, jti: &str) -> Result<Option<Found>, RecordError> {
        sqlx::query_as(
            "SELECT g.kind, g.label, g.role, g.site, g.expires_ms, g.seen_ms, g.owner, u.name, \
             u.role AS owner_role, u.site AS owner_site, u.disabled \
             FROM grants g LEFT JOIN users u ON u.id = g.owner WHERE g.jti = ?",
        )
        .bind(jti)
        .fetch_optional(self.records.readers())
        .await
        .map_err(RecordError::sql("look for a session or token"))
    }

    /// Who shows this; nobody if it does not count.
    pub(crate) async fn who(&self, shown: Shown, token: &str) -> Result<Option<Who>, TrustError> {
        let now = clock::now_ms();
        let (audience, kinds): (_, &[&str]) = match shown {
            Shown::Session => ("session", &["session"]),
            Shown::Token => ("api", &["token", "machine"]),
        };
        let Some(claims) = self.key.read(token, audience, now) else {
            return Ok(None);
        };
        let Some(found) = self.found(&claims.jti).await? else {
            return Ok(None);
        };
        if !kinds.contains(&found.kind.as_str()) {
            return Ok(None);
        }
        let who = found.who(&claims.jti, now);
        if who.is_some() && now - found.seen_ms >= SEEN_MS {
            let mut writer = self.records.writer().await;
            let mut tx = writer.begin().await?;
            sqlx::query("UPDATE grants SET seen_ms = ? WHERE jti = ?")
                .bind(now)
                .bind(&claims.jti)
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql("write when something was seen"))?;
            commit(tx).await?;
        }
        Ok(who)
    }

    /// Whether what was shown counts still. Not being able to look is no reason to cut anybody.
    pub(crate) async fn counts(&self, grant: &str) -> bool {
        match self.found(grant).await {
            Ok(found) => found.is_some_and(|found| found.who(grant, clock::now_ms()).is_some()),
            Err(error) => {
                tracing::warn!(%error, "cannot look whether a session still counts");
                true
            }
        }
    }

    /// Ends a session.
    pub(crate) async fn log_out(&self, by: &str, grant: &str) -> Result<(), TrustError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query("DELETE FROM grants WHERE jti = ? AND kind = 'session'")
            .bind(grant)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("end a session"))?;
        audit::append(&mut tx, done(by, "log out", "", ""), clock::now_ms()).await?;
        commit(tx).await?;
        Ok(())
    }

    /// Whether this is the token that commands on this machine use, and will count for long enough.
    pub(super) async fn is_the_machines(&self, token: &[u8]) -> Result<bool, TrustError> {
        let token = String::from_utf8_lossy(token);
        let now = clock::now_ms();
        let Some(claims) = self.key.read(token.trim(), "api", now) else {
            return Ok(false);
        };
        let found = self.found(&claims.jti).await?;
        Ok(found.is_some_and(|found| {
            found.kind == "machine" && found.expires_ms - now >= MACHINE_LEFT_MS
        }))
    }

    /// The token that commands on this machine use, in the place of the one before.
    pub(super) async fn machine_token(&self) -> Result<String, TrustError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query("DELETE FROM grants WHERE kind = 'machine'")
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("take back the machine's token"))?;
        let machine = Grant {
            kind: "machine",
            audience: "api",
            owner: None,
            label: "commands on this machine",
            role: Some(Role::Admin),
            site: None,
            for_ms: MACHINE_MS,
        };
        let (_, signed) = self.grant(&mut tx, machine).await?;
        commit(tx).await?;
        Ok(signed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(kind: &str) -> Found {
        Found {
            kind: kind.into(),
            label: "l".into(),
            role: Some(Role::Operator),
            site: None,
            expires_ms: SESSION_MS,
            seen_ms: 0,
            owner: Some(1),
            name: Some("ana".into()),
            owner_role: Some(Role::Labeller),
            owner_site: None,
            disabled: Some(false),
        }
    }

    fn is(found: &Found, now: i64) -> Option<(Role, Option<String>)> {
        let Principal::User { role, site, .. } = found.who("g", now)?.principal else {
            return None;
        };
        Some((role, site.map(|site| site.as_str().to_owned())))
    }

    #[test]
    fn what_counts_and_for_how_long() {
        let mut session = found("session");
        assert_eq!(is(&session, IDLE_MS - 1), Some((Role::Labeller, None)));
        assert_eq!(is(&session, IDLE_MS), None);
        session.seen_ms = SESSION_MS - 10;
        assert!(is(&session, SESSION_MS - 1).is_some());
        assert_eq!(is(&session, SESSION_MS), None);
        session.disabled = Some(true);
        assert_eq!(is(&session, SESSION_MS - 1), None);
        // Its user is gone.
        session.disabled = None;
        assert_eq!(is(&session, SESSION_MS - 1), None);
        for kind in ["setup", "other"] {
            assert_eq!(is(&found(kind), 0), None);
        }
    }

    #[test]
    fn a_token_is_never_more_than_its_owner_is_now() {
        let mut token = found("token");
        assert_eq!(is(&token, IDLE_MS * 2), Some((Role::Labeller, None)));
        token.owner_role = Some(Role::Admin);
        assert_eq!(is(&token, 0), Some((Role::Operator, None)));
        for (owners, own, expected) in [
            (None, Some("a"), Some(Some("a"))),
            (Some("a"), None, Some(Some("a"))),
            (Some("a"), Some("a"), Some(Some("a"))),
            (Some("a"), Some("b"), None),
            (None, Some("No Name"), None),
        ] {
            token.owner_site = owners.map(str::to_owned);
            token.site = own.map(str::to_owned);
            let expected = expected.map(|site| (Role::Operator, site.map(str::to_owned)));
            assert_eq!(is(&token, 0), expected, "{owners:?} {own:?}");
        }
        token = found("token");
        token.disabled = Some(true);
        assert_eq!(is(&token, 0), None);
        // Made on the machine: nobody's, and what it says.
        token.owner = None;
        assert_eq!(is(&token, 0), Some((Role::Operator, None)));
    }
}

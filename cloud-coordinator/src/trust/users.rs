//! People: a name, a role, perhaps a site, and a password.

use mesh_core::Name;
use serde::{Deserialize, Serialize};
use sqlx::{Sqlite, Transaction};

use super::{
    Role, Trust, TrustError,
    audit::{self, Entry, Outcome},
    done,
};
use crate::{
    clock,
    records::{RecordError, commit},
};

/// People; whoever has more has a directory, and should use it.
pub(super) const MAX_USERS: i64 = 1_000;
/// The name in the audit log of the token that commands on the same machine use.
pub(super) const MACHINE: &str = "machine";

/// A user, without the password.
#[derive(Clone, Debug, Serialize, sqlx::FromRow, utoipa::ToSchema)]
#[schema(as = User)]
pub(crate) struct UserRow {
    /// The name.
    pub(crate) name: String,
    /// What it may do.
    pub(crate) role: Role,
    /// The only site that it may see; all unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) site: Option<String>,
    /// Cannot log in.
    disabled: bool,
    /// When it was made, milliseconds since 1970.
    created_ms: i64,
}

/// A new user.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewUser {
    /// The name: 1 to 63 of a-z, 0-9, - and _.
    pub(crate) name: String,
    /// At least 10 characters, at most 256 bytes.
    pub(crate) password: String,
    /// What it may do.
    pub(crate) role: Role,
    /// The only site that it may see; all unless given. An admin is for all.
    #[serde(default)]
    pub(crate) site: Option<String>,
}

/// What is to be different about a user.
#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Change {
    /// What it may do.
    role: Option<Role>,
    /// The only site that it may see; an empty text is all sites.
    site: Option<String>,
    /// A new password, which ends all sessions.
    password: Option<String>,
    /// Cannot log in any more, or can again; ends all sessions.
    disabled: Option<bool>,
}

fn checked_name(name: &str) -> Result<(), TrustError> {
    let checked = name.parse::<Name>();
    checked.map_err(|error| TrustError::Invalid(format!("name: {error}")))?;
    if name == MACHINE || name == "_" {
        return Err(TrustError::Invalid(format!("name: {name:?} is taken")));
    }
    Ok(())
}

/// A site, if it is named.
pub(super) fn checked_site(site: Option<&str>) -> Result<Option<&str>, TrustError> {
    let Some(site) = site.filter(|site| !site.is_empty()) else {
        return Ok(None);
    };
    let checked = site.parse::<Name>();
    checked.map_err(|error| TrustError::Invalid(format!("site: {error}")))?;
    Ok(Some(site))
}

fn fitting(role: Role, site: Option<&str>) -> Result<(), TrustError> {
    if role == Role::Admin && site.is_some() {
        let why = "site: an admin says who may do what everywhere, and is for all sites";
        return Err(TrustError::Invalid(why.into()));
    }
    Ok(())
}

/// How many can say who may do what.
async fn admins(tx: &mut Transaction<'_, Sqlite>) -> Result<i64, RecordError> {
    sqlx::query_scalar("SELECT count(*) FROM users WHERE role = 'admin' AND disabled = 0")
        .fetch_one(&mut **tx)
        .await
        .map_err(RecordError::sql("count the admins"))
}

/// Refuses a change that took away the last admin.
async fn still_an_admin(tx: &mut Transaction<'_, Sqlite>, before: i64) -> Result<(), TrustError> {
    if before > 0 && admins(tx).await? == 0 {
        let why = "it is the last admin: nobody could say who may do what";
        return Err(TrustError::Conflict(why.into()));
    }
    Ok(())
}

const COLUMNS: &str = "SELECT name, role, site, disabled, created_ms FROM users ";

impl Trust {
    /// Whether somebody can say who may do what.
    pub(crate) async fn has_admin(&self) -> Result<bool, TrustError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        Ok(admins(&mut tx).await? > 0)
    }

    /// Everybody, in order of name.
    pub(crate) async fn users(&self) -> Result<Vec<UserRow>, TrustError> {
        let sql = format!("{COLUMNS} ORDER BY name LIMIT {MAX_USERS}");
        let rows = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .fetch_all(self.records.readers())
            .await
            .map_err(RecordError::sql("read the users"))?;
        Ok(rows)
    }

    async fn user(&self, name: &str) -> Result<UserRow, TrustError> {
        let sql = format!("{COLUMNS} WHERE name = ?");
        let row = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(name)
            .fetch_optional(self.records.readers())
            .await
            .map_err(RecordError::sql("read a user"))?;
        row.ok_or(TrustError::Missing("user"))
    }

    /// Adds a user.
    pub(crate) async fn add_user(&self, by: &str, new: &NewUser) -> Result<UserRow, TrustError> {
        checked_name(&new.name)?;
        let site = checked_site(new.site.as_deref())?;
        fitting(new.role, site)?;
        let hash = self.passwords.hash(&new.password).await?;
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        insert(&mut tx, &new.name, new.role, site, &hash).await?;
        let detail = match site {
            Some(site) => format!("{} of {site}", new.role),
            None => new.role.to_string(),
        };
        let line = done(by, "add user", &new.name, &detail);
        audit::append(&mut tx, line, clock::now_ms()).await?;
        commit(tx).await?;
        self.user(&new.name).await
    }

    /// Makes the first admin. The link that says so is used up with it.
    pub(super) async fn first_admin(
        &self,
        jti: &str,
        name: &str,
        password: &str,
    ) -> Result<(), TrustError> {
        checked_name(name)?;
        let hash = self.passwords.hash(password).await?;
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let used = sqlx::query("DELETE FROM grants WHERE jti = ? AND kind = 'setup'")
            .bind(jti)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("use the setup link"))?;
        if used.rows_affected() == 0 || admins(&mut tx).await? > 0 {
            let why = "the link was used, or there is an admin already";
            return Err(TrustError::Forbidden(why.into()));
        }
        insert(&mut tx, name, Role::Admin, None, &hash).await?;
        let line = done("setup link", "add user", name, "the first admin");
        audit::append(&mut tx, line, clock::now_ms()).await?;
        commit(tx).await?;
        Ok(())
    }

    /// Changes a user. What ends sessions ends them with it.
    pub(crate) async fn change_user(
        &self,
        by: &str,
        name: &str,
        change: &Change,
    ) -> Result<UserRow, TrustError> {
        self.change(by, name, change, None).await
    }

    /// The same; where a password is taken for the present one, only as long as it is that.
    async fn change(
        &self,
        by: &str,
        name: &str,
        change: &Change,
        present: Option<&str>,
    ) -> Result<UserRow, TrustError> {
        let hash = match &change.password {
            Some(password) => Some(self.passwords.hash(password).await?),
            None => None,
        };
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        // As it is now: what somebody else has changed meanwhile stays.
        let is = user(&mut tx, name).await?;
        let role = change.role.unwrap_or(is.role);
        let site = match &change.site {
            Some(site) => checked_site(Some(site))?,
            None => is.site.as_deref(),
        };
        fitting(role, site)?;
        let disabled = change.disabled.unwrap_or(is.disabled);
        let before = admins(&mut tx).await?;
        let done_to = sqlx::query(
            "UPDATE users SET role = ?, site = ?, disabled = ?, password = coalesce(?, password) \
             WHERE name = ? AND (? IS NULL OR password = ?)",
        )
        .bind(role)
        .bind(site)
        .bind(disabled)
        .bind(&hash)
        .bind(name)
        .bind(present)
        .bind(present)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("change a user"))?;
        if done_to.rows_affected() == 0 {
            // Somebody has set another one since it was checked.
            return Err(TrustError::Wrong);
        }
        still_an_admin(&mut tx, before).await?;
        if hash.is_some() || change.disabled.is_some() {
            end_sessions(&mut tx, name).await?;
        }
        let mut what = vec![format!("{role} of {}", site.unwrap_or("all sites"))];
        what.extend(hash.is_some().then(|| "new password".to_owned()));
        what.extend(disabled.then(|| "disabled".to_owned()));
        let detail = what.join(", ");
        let line = done(by, "change user", name, &detail);
        audit::append(&mut tx, line, clock::now_ms()).await?;
        commit(tx).await?;
        self.user(name).await
    }

    /// Removes a user with all that it could show.
    pub(crate) async fn remove_user(&self, by: &str, name: &str) -> Result<(), TrustError> {
        self.user(name).await?;
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let before = admins(&mut tx).await?;
        for statement in [
            "DELETE FROM grants WHERE owner = (SELECT id FROM users WHERE name = ?)",
            "DELETE FROM users WHERE name = ?",
        ] {
            sqlx::query(statement)
                .bind(name)
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql("remove a user"))?;
        }
        still_an_admin(&mut tx, before).await?;
        audit::append(&mut tx, done(by, "remove user", name, ""), clock::now_ms()).await?;
        commit(tx).await?;
        Ok(())
    }

    /// Who this is by name and password, and from where is only written down. The same answer, after the same time,
    /// to a wrong name, a wrong password and somebody who is disabled.
    pub(crate) async fn log_in(
        &self,
        name: &str,
        password: &str,
        from: &str,
    ) -> Result<String, TrustError> {
        let found: Option<(i64, String, bool)> =
            sqlx::query_as("SELECT id, password, disabled FROM users WHERE name = ?")
                .bind(name)
                .fetch_optional(self.records.readers())
                .await
                .map_err(RecordError::sql("read a user"))?;
        let hash = found.as_ref().map(|(_, hash, _)| hash.clone());
        let right = self.passwords.check(password, hash).await?;
        match found {
            Some((id, _, false)) if right => self.begin_session(id, name, from).await,
            _ => {
                let line = Entry {
                    who: from,
                    action: "log in",
                    object: name,
                    outcome: Outcome::Refused,
                    detail: "",
                };
                self.note(line).await;
                Err(TrustError::Wrong)
            }
        }
    }

    /// A user gives itself another password.
    pub(crate) async fn change_own_password(
        &self,
        name: &str,
        old: &str,
        new: &str,
    ) -> Result<(), TrustError> {
        let hash: Option<String> = sqlx::query_scalar("SELECT password FROM users WHERE name = ?")
            .bind(name)
            .fetch_optional(self.records.readers())
            .await
            .map_err(RecordError::sql("read a user"))?;
        let by = format!("user {name}");
        if !self.passwords.check(old, hash.clone()).await? {
            let line = Entry {
                who: &by,
                action: "change password",
                object: name,
                outcome: Outcome::Refused,
                detail: "the old password is wrong",
            };
            self.note(line).await;
            return Err(TrustError::Wrong);
        }
        let password = Some(new.to_owned());
        let change = Change {
            password,
            ..Change::default()
        };
        let changed = self.change(&by, name, &change, hash.as_deref());
        changed.await.map(drop)
    }
}

async fn user(tx: &mut Transaction<'_, Sqlite>, name: &str) -> Result<UserRow, TrustError> {
    let sql = format!("{COLUMNS} WHERE name = ?");
    let row = sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(name)
        .fetch_optional(&mut **tx)
        .await
        .map_err(RecordError::sql("read a user"))?;
    row.ok_or(TrustError::Missing("user"))
}

async fn insert(
    tx: &mut Transaction<'_, Sqlite>,
    name: &str,
    role: Role,
    site: Option<&str>,
    hash: &str,
) -> Result<(), TrustError> {
    let users: i64 = sqlx::query_scalar("SELECT count(*) FROM users")
        .fetch_one(&mut **tx)
        .await
        .map_err(RecordError::sql("count the users"))?;
    if users >= MAX_USERS {
        return Err(TrustError::Conflict(format!("there are {users} users")));
    }
    let new = sqlx::query(
        "INSERT INTO users (name, role, site, password, created_ms) VALUES (?, ?, ?, ?, ?) \
         ON CONFLICT (name) DO NOTHING",
    )
    .bind(name)
    .bind(role)
    .bind(site)
    .bind(hash)
    .bind(clock::now_ms())
    .execute(&mut **tx)
    .await
    .map_err(RecordError::sql("write a user"))?;
    if new.rows_affected() == 0 {
        return Err(TrustError::Conflict(format!("there is a user {name:?}")));
    }
    Ok(())
}

async fn end_sessions(tx: &mut Transaction<'_, Sqlite>, name: &str) -> Result<(), RecordError> {
    sqlx::query(
        "DELETE FROM grants WHERE kind = 'session' AND owner = (SELECT id FROM users WHERE name = ?)",
    )
    .bind(name)
    .execute(&mut **tx)
    .await
    .map_err(RecordError::sql("end sessions"))?;
    Ok(())
}

#[cfg(test)]
#[path = "users_tests.rs"]
mod tests;

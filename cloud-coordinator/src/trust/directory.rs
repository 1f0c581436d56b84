//! People of a directory: a user for each, who has no password here and may do what the directory's groups say.

use futures_util::future::BoxFuture;

use super::{
    Role, Trust, TrustError,
    audit::{self, Entry, Outcome},
    done,
    users::MAX_USERS,
};
use crate::{
    clock,
    objects::digest,
    records::{RecordError, commit},
};

/// Characters of a name that tell people apart who are called the same.
const MARK: usize = 8;
/// Characters of the rest: a name has 63.
const CALLED: usize = 40;
/// What stands where the hash of a password would: it fits none.
const NO_PASSWORD: &str = "-";

/// Somebody, by a directory's word.
#[derive(Clone, Debug)]
pub(crate) struct Person {
    /// Whose word.
    pub(crate) issuer: String,
    /// Who, for ever the same there.
    pub(crate) subject: String,
    /// What people call that one; may change, and be anything.
    pub(crate) called: String,
    /// What it may do.
    pub(crate) role: Role,
    /// The only site that it may see; all unless given.
    pub(crate) site: Option<String>,
}

impl Person {
    /// A name that nobody else here has: people choose what they are called, so that alone proves nothing.
    fn name(&self) -> String {
        let plain = |c: char| match c.to_ascii_lowercase() {
            c @ ('a'..='z' | '0'..='9' | '-' | '_') => Some(c),
            '.' | ' ' => Some('-'),
            _ => None,
        };
        let before_at = self.called.split('@').next().unwrap_or_default();
        let called: String = before_at.chars().filter_map(plain).take(CALLED).collect();
        let called = called.trim_matches(['-', '_']);
        let called = if called.is_empty() { "person" } else { called };
        let mark = digest(format!("{}\n{}", self.issuer, self.subject).as_bytes());
        format!("{called}-{}", &mark[..MARK])
    }
}

impl Trust {
    /// Lets somebody of a directory in, with what that one may do now. Says what the cookie holds.
    ///
    /// Boxed: the compiler does not see otherwise that a handler with this in it can be sent between threads.
    pub(crate) fn come_in<'a>(
        &'a self,
        person: &'a Person,
        from: &'a str,
    ) -> BoxFuture<'a, Result<String, TrustError>> {
        Box::pin(async move {
            let (id, name, disabled) = self.known_as(person).await?;
            if disabled {
                let why = "the user is disabled here";
                self.not_let_in(&name, from, why).await;
                return Err(TrustError::Wrong);
            }
            self.begin_session(id, &name, from).await
        })
    }

    /// Writes down that somebody of a directory did not come in.
    pub(crate) fn not_let_in<'a>(
        &'a self,
        object: &'a str,
        from: &'a str,
        why: &'a str,
    ) -> BoxFuture<'a, ()> {
        let line = Entry {
            who: from,
            action: "log in",
            object,
            outcome: Outcome::Refused,
            detail: why,
        };
        Box::pin(self.note(line))
    }

    /// The user of this person, made or brought up to date.
    async fn known_as(&self, person: &Person) -> Result<(i64, String, bool), TrustError> {
        const WHAT: &str = "write a user of the directory";
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let found: Option<(i64, String, bool, Role, Option<String>)> = sqlx::query_as(
            "SELECT id, name, disabled, role, site FROM users WHERE issuer = ? AND subject = ?",
        )
        .bind(&person.issuer)
        .bind(&person.subject)
        .fetch_optional(&mut *tx)
        .await
        .map_err(RecordError::sql("read a user"))?;
        let rights = match &person.site {
            Some(site) => format!("{} at {site}", person.role),
            None => person.role.to_string(),
        };
        let now = clock::now_ms();
        let (id, name, disabled, action) = match found {
            Some((id, name, disabled, role, site)) => {
                if (role, &site) == (person.role, &person.site) {
                    return Ok((id, name, disabled));
                }
                sqlx::query("UPDATE users SET role = ?, site = ? WHERE id = ?")
                    .bind(person.role)
                    .bind(&person.site)
                    .bind(id)
                    .execute(&mut *tx)
                    .await
                    .map_err(RecordError::sql(WHAT))?;
                (id, name, disabled, "change user")
            }
            None => {
                let users: i64 = sqlx::query_scalar("SELECT count(*) FROM users")
                    .fetch_one(&mut *tx)
                    .await
                    .map_err(RecordError::sql("count the users"))?;
                if users >= MAX_USERS {
                    let why = format!("there are {MAX_USERS} users already");
                    return Err(TrustError::Conflict(why));
                }
                let name = person.name();
                let id = sqlx::query_scalar(
                    "INSERT INTO users (name, role, site, password, created_ms, issuer, subject) \
                     VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING id",
                )
                .bind(&name)
                .bind(person.role)
                .bind(&person.site)
                .bind(NO_PASSWORD)
                .bind(now)
                .bind(&person.issuer)
                .bind(&person.subject)
                .fetch_one(&mut *tx)
                .await
                .map_err(RecordError::sql(WHAT))?;
                (id, name, false, "add user")
            }
        };
        let line = done("the directory", action, &name, &rights);
        audit::append(&mut tx, line, now).await?;
        commit(tx).await?;
        Ok((id, name, disabled))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_people_are_called_their_names_can_be_used_and_are_their_own() {
        let named = |called: &str, subject: &str| {
            let person = Person {
                issuer: "https://id.example".into(),
                subject: subject.into(),
                called: called.into(),
                role: Role::Viewer,
                site: None,
            };
            let name = person.name();
            assert!(name.parse::<mesh_core::Name>().is_ok(), "{name}");
            name
        };
        assert!(named("Ana.Lopez@example.org", "1").starts_with("ana-lopez-"));
        assert!(named("", "1").starts_with("person-"));
        assert!(named("Ωmega", "1").starts_with("mega-"));
        assert!(named("machine", "1").starts_with("machine-"));
        assert_ne!(named("ana", "1"), named("ana", "2"));
        assert!(named(&"x".repeat(500), "1").len() <= 63);
        assert!(named("<script>", "1").starts_with("script-"));
    }
}

//! Who may listen on the broker without being a device: name, password, and the sites that they may read.

mod turns;

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use aws_lc_rs::hmac;
use mesh_core::Name;
use serde::Serialize;
use sqlx::Row;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::turns::Turns;
use crate::{
    api::limits::{Limits, What},
    records::{RecordError, Records, commit},
};

/// Programs and people that listen; each is read into memory.
const MAX_SUBSCRIBERS: usize = 1_000;
/// Sites that one may be limited to.
const MAX_SITES: usize = 256;
/// A password that a person chose; what is made here has 128 bits.
const PASSWORD: std::ops::RangeInclusive<usize> = 12..=256;
/// A verified password need not be hashed again for this long: everybody comes back at once after a restart.
const REMEMBERED: Duration = Duration::from_secs(60);
/// One that was found right is no guess for this long: it is hashed again, and not counted.
const NO_GUESS: Duration = Duration::from_secs(86_400);
/// Verified passwords that are remembered; more is not more than computing again.
const MAX_REMEMBERED: usize = 4_096;
/// Passwords that are hashed at a time: each takes 19 MiB and some 50 ms of one core, and devices come first.
const HASHED_AT_ONCE: usize = 1;
/// Passwords that wait for that.
const MAX_WAITING: usize = 256;
/// As long as a client waits for its CONNACK.
const PATIENCE: Duration = Duration::from_secs(5);

/// What may be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sites {
    All,
    Some(BTreeSet<Name>),
}

/// Why something about subscribers is not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SubscriberError {
    #[error("{0}")]
    Invalid(String),
    #[error("there is a subscriber of this name; remove it first")]
    Taken,
    #[error("there is no such subscriber")]
    Missing,
    #[error("there are {MAX_SUBSCRIBERS} subscribers")]
    Full,
    #[error("cannot hash a password: {0}")]
    Hash(String),
    #[error(transparent)]
    Records(#[from] RecordError),
}

/// Why a name and a password do not open the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// One of them is wrong.
    Password,
    /// Too many wait to be checked.
    Busy,
    /// Too many were tried from there.
    TooOften,
}

/// A subscriber that was let in.
#[derive(Clone, Debug)]
pub(crate) struct Subscriber {
    pub(crate) name: Name,
    pub(crate) sites: Sites,
    /// Ends every connection of it when it is removed.
    pub(crate) cut: CancellationToken,
}

/// A subscriber as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub(crate) struct SubscriberRow {
    /// Its name.
    pub(crate) name: String,
    /// The sites that it may read; all if not given.
    pub(crate) sites: Option<Vec<String>>,
    /// When it was made, in milliseconds since 1970.
    pub(crate) made_ms: i64,
    /// Who made it.
    pub(crate) made_by: String,
}

#[derive(Clone, Debug)]
struct Entry {
    subscriber: Subscriber,
    password: Arc<str>,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Subscribers {
    records: Arc<Records>,
    by_name: RwLock<HashMap<Name, Entry>>,
    /// When which name and password were found right. The key of the hash is this process's own.
    remembered: Mutex<HashMap<[u8; 32], Instant>>,
    key: hmac::Key,
    turns: Turns,
    limits: Limits,
    /// Checked for a name that is not there, so that the time of an answer tells nothing.
    nobody: Arc<str>,
}

fn sites_of(text: Option<&str>) -> Option<Sites> {
    match text {
        None => Some(Sites::All),
        Some(text) => serde_json::from_str::<BTreeSet<Name>>(text)
            .ok()
            .map(Sites::Some),
    }
}

fn hashed(password: &str) -> Result<String, SubscriberError> {
    Argon2::default()
        .hash_password(password.as_bytes())
        .map(|hash| hash.to_string())
        .map_err(|error| SubscriberError::Hash(error.to_string()))
}

fn matches(password: &[u8], hash: &str) -> bool {
    PasswordHash::new(hash)
        .is_ok_and(|hash| Argon2::default().verify_password(password, &hash).is_ok())
}

impl Subscribers {
    /// Reads who there is.
    pub(crate) async fn open(records: Arc<Records>) -> Result<Self, SubscriberError> {
        let rows = sqlx::query("SELECT name, password, sites FROM subscribers")
            .fetch_all(records.readers())
            .await
            .map_err(RecordError::sql("read the subscribers"))?;
        let mut by_name = HashMap::new();
        for row in rows {
            let name = row.get::<String, _>("name").parse::<Name>();
            let sites = sites_of(row.get::<Option<&str>, _>("sites"));
            let (Ok(name), Some(sites)) = (name, sites) else {
                continue;
            };
            by_name.insert(name.clone(), entry(name, sites, row.get("password")));
        }
        let mut secret = [0; 32];
        let random = |_| SubscriberError::Hash("the system gives no random numbers".into());
        aws_lc_rs::rand::fill(&mut secret).map_err(random)?;
        Ok(Self {
            records,
            by_name: RwLock::new(by_name),
            remembered: Mutex::default(),
            key: hmac::Key::new(hmac::HMAC_SHA256, &secret),
            turns: Turns::new(HASHED_AT_ONCE, MAX_WAITING),
            limits: Limits::new(),
            nobody: hash_off_thread("a name that is not there".into())
                .await?
                .into(),
        })
    }

    fn find(&self, name: &str) -> Option<Entry> {
        let all = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        all.get(name).cloned()
    }

    fn remembered(&self) -> MutexGuard<'_, HashMap<[u8; 32], Instant>> {
        self.remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Does this password open the broker to this name, said from this network?
    ///
    /// What has to be hashed is limited by network, and by name from each network, as logins are. Not by name alone: it would let
    /// anybody shut a listener out. All of them together are hashed one after the other, each network in its turn.
    pub(crate) async fn check(
        &self,
        network: IpAddr,
        name: &str,
        password: &[u8],
    ) -> Result<Subscriber, Wrong> {
        if password.len() > *PASSWORD.end() {
            return Err(Wrong::Password);
        }
        let entry = self.find(name);
        let hash = entry.as_ref().map_or(&self.nobody, |e| &e.password).clone();
        let mut context = hmac::Context::with_key(&self.key);
        // The stored hash has no zero byte in it, and a new password is a new hash.
        for part in [hash.as_bytes(), b"\0", password] {
            context.update(part);
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(context.sign().as_ref());
        if !self.is_fresh(&digest) {
            let turn = self.turns.next(network, PATIENCE).await;
            let turn = turn.ok_or(Wrong::Busy)?;
            // Others with the same password were before: a hundred screens are one hash.
            if !self.is_fresh(&digest) {
                self.may_guess(network, name, &digest)?;
                let password = password.to_vec();
                let check = tokio::task::spawn_blocking(move || {
                    let right = matches(&password, &hash);
                    drop(turn);
                    right
                });
                if !check.await.unwrap_or(false) {
                    return Err(Wrong::Password);
                }
                self.remember(digest, Instant::now());
            }
        }
        entry.map(|e| e.subscriber).ok_or(Wrong::Password)
    }

    /// Was it found right a moment ago?
    fn is_fresh(&self, digest: &[u8; 32]) -> bool {
        let since = self.remembered().get(digest).copied();
        since.is_some_and(|since| since.elapsed() < REMEMBERED)
    }

    /// Counts one more that has to be hashed.
    fn may_guess(&self, network: IpAddr, name: &str, digest: &[u8; 32]) -> Result<(), Wrong> {
        let since = self.remembered().get(digest).copied();
        if since.is_some_and(|since| since.elapsed() < NO_GUESS) {
            return Ok(());
        }
        let counted = self
            .limits
            .check(What::LoginAddress, network)
            .and_then(|()| self.limits.check(What::LoginName, (network, name)));
        counted.map_err(|_| Wrong::TooOften)
    }

    fn remember(&self, digest: [u8; 32], now: Instant) {
        let mut remembered = self.remembered();
        for longest in [NO_GUESS, REMEMBERED] {
            if remembered.len() >= MAX_REMEMBERED {
                remembered.retain(|_, since| now.duration_since(*since) < longest);
            }
        }
        if remembered.len() < MAX_REMEMBERED {
            remembered.insert(digest, now);
        }
    }

    /// Lets somebody listen.
    pub(crate) async fn add(
        &self,
        name: &Name,
        password: String,
        sites: Sites,
        by: &str,
        now_ms: i64,
    ) -> Result<(), SubscriberError> {
        if *name == Name::itself() {
            return Err(SubscriberError::Invalid("name: \"_\" is nobody".into()));
        }
        if !PASSWORD.contains(&password.len()) {
            let (least, most) = (PASSWORD.start(), PASSWORD.end());
            return Err(SubscriberError::Invalid(format!(
                "password: has {least} to {most} characters"
            )));
        }
        let listed = match &sites {
            Sites::All => None,
            Sites::Some(some) if (1..=MAX_SITES).contains(&some.len()) => {
                let names: Vec<&str> = some.iter().map(Name::as_str).collect();
                Some(serde_json::json!(names).to_string())
            }
            Sites::Some(_) => {
                return Err(SubscriberError::Invalid(format!(
                    "sites: are 1 to {MAX_SITES}, or left out for all"
                )));
            }
        };
        let hash = hash_off_thread(password).await?;
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        if self.find(name.as_str()).is_some() {
            return Err(SubscriberError::Taken);
        }
        if self
            .by_name
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
            >= MAX_SUBSCRIBERS
        {
            return Err(SubscriberError::Full);
        }
        sqlx::query(
            "INSERT INTO subscribers (name, password, sites, made_ms, made_by) VALUES (?, ?, ?, ?, ?)",
        )
        .bind(name.as_str())
        .bind(&hash)
        .bind(listed)
        .bind(now_ms)
        .bind(by)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("add a subscriber"))?;
        commit(tx).await?;
        let mut all = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        all.insert(name.clone(), entry(name.clone(), sites, hash));
        Ok(())
    }

    /// Shuts somebody out, and ends its connections.
    pub(crate) async fn remove(&self, name: &Name) -> Result<(), SubscriberError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query("DELETE FROM subscribers WHERE name = ?")
            .bind(name.as_str())
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("remove a subscriber"))?;
        commit(tx).await?;
        let mut all = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        let gone = all.remove(name.as_str()).ok_or(SubscriberError::Missing)?;
        gone.subscriber.cut.cancel();
        Ok(())
    }

    /// Who there is, and what each may read, by name.
    pub(crate) fn all(&self) -> Vec<(Name, Sites)> {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = by_name
            .values()
            .map(|e| (e.subscriber.name.clone(), e.subscriber.sites.clone()))
            .collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// Who there is, by name.
    pub(crate) async fn list(&self) -> Result<Vec<SubscriberRow>, RecordError> {
        let rows =
            sqlx::query("SELECT name, sites, made_ms, made_by FROM subscribers ORDER BY name")
                .fetch_all(self.records.readers())
                .await
                .map_err(RecordError::sql("list the subscribers"))?;
        Ok(rows
            .iter()
            .map(|row| SubscriberRow {
                name: row.get("name"),
                sites: row
                    .get::<Option<&str>, _>("sites")
                    .and_then(|text| serde_json::from_str(text).ok()),
                made_ms: row.get("made_ms"),
                made_by: row.get("made_by"),
            })
            .collect())
    }
}

fn entry(name: Name, sites: Sites, password: String) -> Entry {
    Entry {
        subscriber: Subscriber {
            name,
            sites,
            cut: CancellationToken::new(),
        },
        password: password.into(),
    }
}

/// Hashing takes a core for a while: not one of those that serve.
async fn hash_off_thread(password: String) -> Result<String, SubscriberError> {
    tokio::task::spawn_blocking(move || hashed(&password))
        .await
        .map_err(|error| SubscriberError::Hash(error.to_string()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(n: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, n])
    }

    #[tokio::test]
    async fn who_guesses_is_slowed_down_and_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let records = Arc::new(Records::trust(dir.path()).await.unwrap());
        let all = Subscribers::open(records).await.unwrap();
        let (name, password): (Name, _) = ("panel".parse().unwrap(), "correct horse");
        all.add(&name, password.into(), Sites::All, "me", 1)
            .await
            .unwrap();
        let mut wrong = 0;
        let end = loop {
            let guess = format!("wrong horse {wrong}");
            match all.check(from(66), "panel", guess.as_bytes()).await {
                Err(Wrong::Password) => wrong += 1,
                end => break end.err(),
            }
            assert!(wrong < 20, "guesses are counted");
        };
        assert_eq!(end, Some(Wrong::TooOften));
        let right = password.as_bytes();
        assert!(all.check(from(2), "panel", right).await.is_ok());
        // What was right from elsewhere is no guess, also when it has to be hashed again.
        for since in all.remembered().values_mut() {
            *since = since.checked_sub(REMEMBERED).unwrap();
        }
        assert!(all.check(from(66), "panel", right).await.is_ok());
        // Other names from there have a limit together.
        let mut others = 0;
        while all
            .check(from(66), &format!("n{others}"), right)
            .await
            .err()
            == Some(Wrong::Password)
        {
            others += 1;
            assert!(others < 100, "the network is counted");
        }
    }

    #[tokio::test]
    async fn a_hundred_screens_are_one_hash() {
        let dir = tempfile::tempdir().unwrap();
        let records = Arc::new(Records::trust(dir.path()).await.unwrap());
        let all = Arc::new(Subscribers::open(records).await.unwrap());
        let name: Name = "panel".parse().unwrap();
        all.add(&name, "correct horse".into(), Sites::All, "me", 1)
            .await
            .unwrap();
        let screens: Vec<_> = (0..100)
            .map(|_| {
                let all = all.clone();
                tokio::spawn(
                    async move { all.check(from(2), "panel", b"correct horse").await.is_ok() },
                )
            })
            .collect();
        for screen in screens {
            // The limit of a name from one network is ten.
            assert!(screen.await.unwrap());
        }
    }

    #[tokio::test]
    async fn a_password_opens_until_it_is_removed_and_is_hashed_once_a_minute() {
        let dir = tempfile::tempdir().unwrap();
        let records = Arc::new(Records::trust(dir.path()).await.unwrap());
        let all = Subscribers::open(records.clone()).await.unwrap();
        let (name, site): (Name, Name) = ("panel".parse().unwrap(), "demo".parse().unwrap());
        let sites = Sites::Some([site].into());
        let password = "correct horse";
        assert!(matches!(
            all.add(&name, "short".into(), sites.clone(), "me", 1).await,
            Err(SubscriberError::Invalid(_))
        ));
        all.add(&name, password.into(), sites.clone(), "me", 1)
            .await
            .unwrap();
        assert!(matches!(
            all.add(&name, password.into(), Sites::All, "me", 1).await,
            Err(SubscriberError::Taken)
        ));
        let again = Subscribers::open(records).await.unwrap();
        for s in [&all, &again] {
            let found = s
                .check(from(1), "panel", password.as_bytes())
                .await
                .unwrap();
            assert_eq!(found.sites, sites);
            for (name, word) in [
                ("panel", "wrong horse!"),
                ("nobody", password),
                ("panel", ""),
            ] {
                assert_eq!(
                    s.check(from(1), name, word.as_bytes()).await.err(),
                    Some(Wrong::Password)
                );
            }
        }
        // Remembered: also when nothing can be hashed.
        all.turns.close();
        let found = all
            .check(from(1), "panel", password.as_bytes())
            .await
            .unwrap();
        assert_eq!(
            all.check(from(1), "panel", b"wrong horse!").await.err(),
            Some(Wrong::Busy)
        );
        all.remove(&name).await.unwrap();
        assert!(found.cut.is_cancelled());
        assert!(
            all.check(from(1), "panel", password.as_bytes())
                .await
                .is_err()
        );
        assert!(matches!(
            all.remove(&name).await,
            Err(SubscriberError::Missing)
        ));
        assert!(all.list().await.unwrap().is_empty());
    }
}

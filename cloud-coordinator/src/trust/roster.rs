//! Which devices of a site trust one another: signed here, and carried to them by the broker and by one another.
//!
//! A roster is a JWT (RFC 7519) in ES256 with `typ` `lacewing-roster`, signed by the authority that every device has
//! pinned. It lies retained on the site's topic; devices that cannot reach the broker get it from their neighbours.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jsonwebtoken::{Algorithm, Header};
use mesh_core::{
    Digest, Kind, Name, Topic, VERSION,
    roster::{MAX_MEMBERS, MAX_ROSTER_BYTES, Member, Roster},
};
use sqlx::Row;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::authority::{Authority, AuthorityError};
use crate::{
    clock,
    ingest::Link,
    records::{RecordError, Records, commit},
};

/// What the text of a signed roster says it is: nothing else that the authority signs can be taken for one.
pub(crate) const ROSTER_TYP: &str = "lacewing-roster";
/// A roster holds for so many lives of a certificate: neighbours go on while the coordinator is away for weeks.
const LIVES: u32 = 4;
/// Without a change it is looked whether one has to be signed anew so often.
const LOOK: Duration = Duration::from_secs(10 * 60);
/// Devices often come many at once: they are put on the roster together. The longest roster there is waits so long …
const GATHER: Duration = Duration::from_millis(300);
/// … and this for each KiB of it: each device of the site gets all of it each time, 12 s for the largest.
const GATHER_EACH: Duration = Duration::from_millis(20);
/// The broker is away: said again after this.
const AGAIN: Duration = Duration::from_secs(2);

/// Why there is no roster.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RosterError {
    #[error(transparent)]
    Records(#[from] RecordError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(
        "the site {0} has {1} devices, more than the {MAX_MEMBERS} that can be neighbours: give it several sites, or its \
         devices `mesh.enabled = false`"
    )]
    TooMany(String, usize),
}

/// Makes rosters.
#[derive(Debug)]
pub(crate) struct Rosters {
    records: Arc<Records>,
    authority: Arc<Authority>,
    life: Duration,
    changed: Notify,
    /// What lies on the broker, by site.
    told: Mutex<HashMap<String, u64>>,
}

impl Rosters {
    /// `life` is a certificate's.
    pub(crate) fn new(records: Arc<Records>, authority: Arc<Authority>, life: Duration) -> Self {
        Self {
            records,
            authority,
            life: life.saturating_mul(LIVES),
            changed: Notify::new(),
            told: Mutex::default(),
        }
    }

    /// Somebody came, or was shut out.
    pub(crate) fn changed(&self) {
        self.changed.notify_one();
    }

    /// A broker is there that may have forgotten everything.
    pub(crate) fn tell_again(&self) {
        self.told
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.changed.notify_one();
    }

    /// The sites that have devices, or had some.
    async fn sites(&self) -> Result<Vec<String>, RecordError> {
        sqlx::query_scalar("SELECT DISTINCT site FROM identities ORDER BY site")
            .fetch_all(self.records.readers())
            .await
            .map_err(RecordError::sql("list the sites"))
    }

    /// A site's roster as it has to be now: its version, and the signed text.
    pub(crate) async fn of(&self, site: &Name, now_ms: i64) -> Result<(u64, String), RosterError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let rows = sqlx::query(
            "SELECT device, peer FROM identities \
             WHERE site = ? AND state = 'active' AND peer IS NOT NULL ORDER BY device",
        )
        .bind(site.as_str())
        .fetch_all(&mut *tx)
        .await
        .map_err(RecordError::sql("list the devices of a site"))?;
        if rows.len() > MAX_MEMBERS {
            return Err(RosterError::TooMany(site.to_string(), rows.len()));
        }
        let members: Vec<Member> = rows
            .iter()
            .filter_map(|row| {
                let device = row.get::<String, _>("device").parse().ok()?;
                let peer = row.get::<Vec<u8>, _>("peer").try_into().ok()?;
                Some(Member {
                    device,
                    peer: Digest(peer),
                })
            })
            .collect();
        let digest = digest(&members);
        let before =
            sqlx::query("SELECT version, members, exp, signed FROM rosters WHERE site = ?")
                .bind(site.as_str())
                .fetch_optional(&mut *tx)
                .await
                .map_err(RecordError::sql("look up a roster"))?;
        let life_s = i64::try_from(self.life.as_secs()).unwrap_or(i64::MAX / 2_000);
        let now_s = now_ms.div_euclid(1_000);
        let mut version = 1;
        if let Some(row) = before {
            let last = row.get::<i64, _>("version");
            let is_young = row.get::<i64, _>("exp") - now_s > life_s / 2;
            if is_young && row.get::<Vec<u8>, _>("members") == digest {
                return Ok((last.unsigned_abs(), row.get("signed")));
            }
            version = last + 1;
        }
        let roster = Roster {
            v: VERSION,
            site: site.clone(),
            version: version.unsigned_abs(),
            iat: now_s,
            exp: now_s.saturating_add(life_s).saturating_add(1),
            members,
        };
        let mut header = Header::new(Algorithm::ES256);
        header.typ = Some(ROSTER_TYP.into());
        let signed = self.authority.sign(&header, &roster)?;
        debug_assert!(signed.len() <= MAX_ROSTER_BYTES);
        sqlx::query(
            "INSERT OR REPLACE INTO rosters (site, version, members, exp, signed) VALUES (?, ?, ?, ?, ?)",
        )
        .bind(site.as_str())
        .bind(version)
        .bind(&digest[..])
        .bind(roster.exp)
        .bind(&signed)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql("keep a roster"))?;
        commit(tx).await?;
        Ok((roster.version, signed))
    }

    /// Keeps every site's roster on the broker, until `stop`.
    pub(crate) async fn run(self: Arc<Self>, link: Link, stop: CancellationToken) {
        loop {
            let told = self.tell(&link).await;
            let wait = if told.is_some() { LOOK } else { AGAIN };
            let kib = u32::try_from(told.unwrap_or_default() / 1_024).unwrap_or(u32::MAX);
            let gather = GATHER + GATHER_EACH.saturating_mul(kib);
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.changed.notified() => tokio::time::sleep(gather).await,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Publishes what is new. Gives the bytes of the longest roster, nothing if the broker or the store is away.
    async fn tell(&self, link: &Link) -> Option<usize> {
        let mut longest = 0;
        let sites = match self.sites().await {
            Ok(sites) => sites,
            Err(error) => {
                tracing::warn!(%error, "no roster is signed");
                return None;
            }
        };
        for site in sites {
            let Ok(name) = site.parse::<Name>() else {
                continue;
            };
            let (version, signed) = match self.of(&name, clock::now_ms()).await {
                Ok(roster) => roster,
                Err(error) => {
                    tracing::warn!(site, %error, "the site's roster is not signed anew");
                    continue;
                }
            };
            longest = longest.max(signed.len());
            let told = |told: &mut HashMap<String, u64>| told.get(&site) == Some(&version);
            if told(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner)) {
                continue;
            }
            let topic = Topic::of_site(&name, Kind::Roster);
            if !link.retain(&topic, signed.into_bytes()).await {
                return None;
            }
            tracing::debug!(site, version, "told the site its roster");
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            told.insert(site, version);
        }
        Some(longest)
    }
}

/// Who is on it, in 32 bytes.
fn digest(members: &[Member]) -> [u8; 32] {
    let text: String = members
        .iter()
        .map(|member| format!("{} {}\n", member.device, member.peer))
        .collect();
    super::csr::fingerprint(text.as_bytes())
}

#[cfg(test)]
#[path = "roster_tests.rs"]
mod tests;

//! Enrolment, renewal and revocation against the database, and who of them all may come in now.
//!
//! What is decided is in [`super::enrol`]. Each change is one transaction, and the table in memory follows it before
//! the next change can begin.

use std::{sync::Arc, time::Duration};

use mesh_core::Name;
use serde::Serialize;
use sqlx::{Row, Sqlite, Transaction, sqlite::SqliteRow};

use super::{
    active::Active,
    authority::{Authority, AuthorityError, Issued, hex},
    csr::{Csr, Fingerprint, common_name},
    enrol::{self, Case, Known, Outcome, Refusal, State, Token},
    principal::PeerDevice,
    roster::Rosters,
    serials,
};
use crate::records::{RecordError, Records, commit};

/// Rows of one answer.
pub(crate) const MAX_ROWS: u32 = 1_000;

/// Why something about devices is not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Invalid(String),
    #[error("there is no such {0}")]
    Missing(&'static str),
    #[error("there are {0} enrolment tokens; take some back first")]
    TooMany(i64),
    #[error("show the certificate that is to be renewed, or sign the challenge with its key")]
    Unproven,
    #[error("the device is {0}")]
    State(&'static str),
    #[error(transparent)]
    Records(#[from] RecordError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// A device as it is known by its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub(crate) struct IdentityRow {
    /// Its site.
    pub(crate) site: String,
    /// Its name.
    pub(crate) device: String,
    /// `pending`, `active` or `revoked`
    pub(crate) state: String,
    /// SHA-256 of its public key, in hexadecimal.
    pub(crate) key: String,
    /// The serial number of its last certificate.
    pub(crate) serial: Option<String>,
    /// Until when its last certificate holds, in milliseconds since 1970.
    pub(crate) not_after_ms: Option<i64>,
    /// When it came.
    pub(crate) enrolled_ms: i64,
    /// With which token.
    pub(crate) token: String,
}

/// One who was revoked and would still have a good certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Revoked {
    pub(crate) key: Fingerprint,
    /// As its certificates name it.
    pub(crate) name: String,
    /// Of those certificates.
    pub(crate) serials: Vec<String>,
}

/// What an enrolment came to.
#[derive(Clone, Debug)]
pub(crate) enum Enrolled {
    Issued(Issued),
    /// A person has to say yes.
    Pending,
}

/// Devices, by their keys.
#[derive(Debug)]
pub(crate) struct Devices {
    pub(super) records: Arc<Records>,
    authority: Arc<Authority>,
    pub(crate) active: Arc<Active>,
    /// Of a certificate.
    life: Duration,
    most: usize,
    pub(crate) rosters: Arc<Rosters>,
}

fn named(site: &str, device: &str) -> Option<PeerDevice> {
    Some(PeerDevice {
        site: site.parse().ok()?,
        device: device.parse().ok()?,
    })
}

fn key_of(row: &SqliteRow) -> Option<Fingerprint> {
    row.get::<Vec<u8>, _>("key").try_into().ok()
}

fn identity_of(row: &SqliteRow) -> IdentityRow {
    IdentityRow {
        site: row.get("site"),
        device: row.get("device"),
        state: row.get("state"),
        key: hex(&row.get::<Vec<u8>, _>("key")),
        serial: row
            .get::<Option<&str>, _>("serial")
            .and_then(|text| serials::read(text).next())
            .map(|(serial, _)| serial.to_owned()),
        not_after_ms: row.get("not_after_ms"),
        enrolled_ms: row.get("enrolled_ms"),
        token: row.get("token"),
    }
}

async fn known(
    tx: &mut Transaction<'_, Sqlite>,
    key: &Fingerprint,
) -> Result<Option<Known>, RecordError> {
    let row = sqlx::query("SELECT site, device, state FROM identities WHERE key = ?")
        .bind(&key[..])
        .fetch_optional(&mut **tx)
        .await
        .map_err(RecordError::sql("look up a key"))?;
    Ok(row.map(|row| Known {
        site: row.get("site"),
        device: row.get("device"),
        state: State::of(row.get("state")),
    }))
}

async fn certified(
    tx: &mut Transaction<'_, Sqlite>,
    csr: &Csr,
    issued: &Issued,
    now_ms: i64,
) -> Result<(), DeviceError> {
    let before: Option<String> = sqlx::query_scalar("SELECT serial FROM identities WHERE key = ?")
        .bind(&csr.fingerprint[..])
        .fetch_one(&mut **tx)
        .await
        .map_err(RecordError::sql("look up a device's certificates"))?;
    let before = before.unwrap_or_default();
    let serials = serials::add(&before, &issued.serial, issued.not_after_ms, now_ms);
    let serials = serials.ok_or(Refusal::TooManyCertificates)?;
    sqlx::query("UPDATE identities SET serial = ?, not_after_ms = ?, peer = ? WHERE key = ?")
        .bind(serials)
        .bind(issued.not_after_ms)
        .bind(csr.peer.as_ref().map(|peer| &peer.0[..]))
        .bind(&csr.fingerprint[..])
        .execute(&mut **tx)
        .await
        .map_err(RecordError::sql("note a certificate"))?;
    Ok(())
}

impl Devices {
    /// Reads who may come in.
    pub(crate) async fn open(
        records: Arc<Records>,
        authority: Arc<Authority>,
        life: Duration,
        most: usize,
    ) -> Result<Self, RecordError> {
        let active = Active::default();
        let rows = sqlx::query("SELECT key, site, device FROM identities WHERE state = 'active'")
            .fetch_all(records.readers())
            .await
            .map_err(RecordError::sql("read the identities"))?;
        for row in rows {
            if let (Some(key), Some(device)) =
                (key_of(&row), named(row.get("site"), row.get("device")))
            {
                active.add(key, device);
            }
        }
        Ok(Self {
            rosters: Arc::new(Rosters::new(records.clone(), authority.clone(), life)),
            records,
            authority,
            active: Arc::new(active),
            life,
            most,
        })
    }

    /// Takes in a device that shows a token. One transaction: a token is never used more often than it may be.
    pub(crate) async fn enrol(
        &self,
        jti: &str,
        (site, device): (&Name, &Name),
        csr: &Csr,
        now_ms: i64,
    ) -> Result<Enrolled, DeviceError> {
        csr.names_only(site, device).map_err(Refusal::from)?;
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let token = sqlx::query("SELECT * FROM enrolment_tokens WHERE jti = ?")
            .bind(jti)
            .fetch_optional(&mut *tx)
            .await
            .map_err(RecordError::sql("look up an enrolment token"))?
            .map(|row| Token {
                jti: row.get("jti"),
                site: row.get("site"),
                device: row.get("device"),
                quota: row.get("quota"),
                used: row.get("used"),
                needs_approval: row.get("needs_approval"),
                revoked: row.get("revoked"),
                expires_ms: row.get("expires_ms"),
            });
        let key = known(&mut tx, &csr.fingerprint).await?;
        let taken = sqlx::query(
            "SELECT 1 FROM identities WHERE site = ? AND device = ? AND state <> 'revoked' AND key <> ?",
        )
        .bind(site.as_str())
        .bind(device.as_str())
        .bind(&csr.fingerprint[..])
        .fetch_optional(&mut *tx)
        .await
        .map_err(RecordError::sql("look up a device's name"))?;
        let case = Case {
            site,
            device,
            token: token.as_ref(),
            key: key.as_ref(),
            name_taken: taken.is_some(),
            room: self.active.count() < self.most,
        };
        let outcome = enrol::decide(case, now_ms)?;
        if outcome == Outcome::Wait {
            return Ok(Enrolled::Pending);
        }
        if outcome != Outcome::Again {
            let state = match outcome {
                Outcome::Admit => State::Active,
                _ => State::Pending,
            };
            sqlx::query("UPDATE enrolment_tokens SET used = used + 1 WHERE jti = ?")
                .bind(jti)
                .execute(&mut *tx)
                .await
                .map_err(RecordError::sql("use an enrolment token"))?;
            sqlx::query(
                "INSERT INTO identities (key, site, device, state, enrolled_ms, token) \
                 VALUES (?, ?, ?, ?, ?, ?)",
            )
            .bind(&csr.fingerprint[..])
            .bind(site.as_str())
            .bind(device.as_str())
            .bind(state.as_str())
            .bind(now_ms)
            .bind(jti)
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("take in a device"))?;
        }
        if outcome == Outcome::Ask {
            commit(tx).await?;
            return Ok(Enrolled::Pending);
        }
        let issued = self
            .authority
            .issue(csr, (site, device), self.life, now_ms)?;
        certified(&mut tx, csr, &issued, now_ms).await?;
        commit(tx).await?;
        self.rosters.changed();
        let device = PeerDevice {
            site: site.clone(),
            device: device.clone(),
        };
        self.active.add(csr.fingerprint, device);
        Ok(Enrolled::Issued(issued))
    }

    /// A new certificate for a key that is known, also long after the last one ran out, if it is proven that its device asks
    /// now: a request that somebody has kept gets none.
    pub(crate) async fn renew(
        &self,
        csr: &Csr,
        fresh: impl FnOnce(&PeerDevice) -> bool + Send,
        now_ms: i64,
    ) -> Result<(PeerDevice, Issued), DeviceError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let known = known(&mut tx, &csr.fingerprint).await?;
        enrol::renew(known.as_ref())?;
        let device = known
            .and_then(|known| named(&known.site, &known.device))
            .ok_or(Refusal::UnknownKey)?;
        csr.names_only(&device.site, &device.device)
            .map_err(Refusal::from)?;
        if !fresh(&device) {
            return Err(DeviceError::Unproven);
        }
        let whom = (&device.site, &device.device);
        let issued = self.authority.issue(csr, whom, self.life, now_ms)?;
        certified(&mut tx, csr, &issued, now_ms).await?;
        commit(tx).await?;
        self.rosters.changed();
        Ok((device, issued))
    }

    /// Lets a device in that asked. One that may come in already stays so.
    pub(crate) async fn approve(&self, site: &Name, device: &Name) -> Result<(), DeviceError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let (key, state) = Self::standing(&mut tx, site, device).await?;
        if state == State::Revoked {
            return Err(DeviceError::State("revoked; it has to enrol again"));
        }
        Self::becomes(&mut tx, &key, State::Active).await?;
        commit(tx).await?;
        self.rosters.changed();
        let device = PeerDevice {
            site: site.clone(),
            device: device.clone(),
        };
        self.active.add(key, device);
        Ok(())
    }

    /// Shuts a device out for ever, and ends its connections. One that is shut out already stays so.
    pub(crate) async fn revoke(&self, site: &Name, device: &Name) -> Result<(), DeviceError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        let (key, _) = Self::standing(&mut tx, site, device).await?;
        Self::becomes(&mut tx, &key, State::Revoked).await?;
        commit(tx).await?;
        self.rosters.changed();
        self.active.cut(&key);
        Ok(())
    }

    /// The key that has this name, or had it last.
    async fn standing(
        tx: &mut Transaction<'_, Sqlite>,
        site: &Name,
        device: &Name,
    ) -> Result<(Fingerprint, State), DeviceError> {
        let row = sqlx::query(
            "SELECT key, state FROM identities WHERE site = ? AND device = ? \
             ORDER BY state = 'revoked', enrolled_ms DESC LIMIT 1",
        )
        .bind(site.as_str())
        .bind(device.as_str())
        .fetch_optional(&mut **tx)
        .await
        .map_err(RecordError::sql("look up a device"))?
        .ok_or(DeviceError::Missing("device"))?;
        let key = key_of(&row).ok_or(DeviceError::Missing("device"))?;
        Ok((key, State::of(row.get("state"))))
    }

    async fn becomes(
        tx: &mut Transaction<'_, Sqlite>,
        key: &Fingerprint,
        state: State,
    ) -> Result<(), RecordError> {
        sqlx::query("UPDATE identities SET state = ? WHERE key = ?")
            .bind(state.as_str())
            .bind(&key[..])
            .execute(&mut **tx)
            .await
            .map_err(RecordError::sql("change a device's state"))?;
        Ok(())
    }

    /// One page of the devices, in the order of their names, from after `(site, device)`.
    pub(crate) async fn identities(
        &self,
        site: Option<&str>,
        after: (&str, &str),
        limit: u32,
    ) -> Result<Vec<IdentityRow>, RecordError> {
        // A name's present key, or if there is none, the last one that had it.
        let rows = sqlx::query(
            "SELECT * FROM identities AS i WHERE (?1 IS NULL OR site = ?1) AND (site, device) > (?2, ?3) \
             AND key = (SELECT key FROM identities WHERE site = i.site AND device = i.device \
                        ORDER BY state = 'revoked', enrolled_ms DESC LIMIT 1) \
             ORDER BY site, device LIMIT ?4",
        )
        .bind(site)
        .bind(after.0)
        .bind(after.1)
        .bind(limit.min(MAX_ROWS))
        .fetch_all(self.records.readers())
        .await
        .map_err(RecordError::sql("list the identities"))?;
        Ok(rows.iter().map(identity_of).collect())
    }

    /// Who may come in now, as certificates name them, in that order.
    pub(crate) async fn names(&self) -> Result<Vec<String>, RecordError> {
        let rows = sqlx::query(
            "SELECT site, device FROM identities WHERE state = 'active' ORDER BY site, device",
        )
        .fetch_all(self.records.readers())
        .await
        .map_err(RecordError::sql("list who may come in"))?;
        let all = rows
            .iter()
            .filter_map(|row| named(row.get("site"), row.get("device")));
        Ok(all.map(|d| common_name(&d.site, &d.device)).collect())
    }

    /// Who was revoked and has certificates that have not run out, and what these are.
    pub(crate) async fn revoked(&self, now_ms: i64) -> Result<Vec<Revoked>, RecordError> {
        let rows = sqlx::query(
            "SELECT key, site, device, serial, not_after_ms FROM identities \
             WHERE state = 'revoked' AND serial IS NOT NULL AND not_after_ms > ? ORDER BY key",
        )
        .bind(now_ms)
        .fetch_all(self.records.readers())
        .await
        .map_err(RecordError::sql("list who was revoked"))?;
        let of = |row: &SqliteRow| {
            let device = named(row.get("site"), row.get("device"))?;
            let good = serials::read(row.get("serial")).filter(|(_, until)| *until > now_ms);
            Some(Revoked {
                key: key_of(row)?,
                name: common_name(&device.site, &device.device),
                serials: good.map(|(serial, _)| serial.to_owned()).collect(),
            })
        };
        Ok(rows.iter().filter_map(of).collect())
    }

    /// One device.
    pub(crate) async fn identity(
        &self,
        site: &Name,
        device: &Name,
    ) -> Result<IdentityRow, DeviceError> {
        let row = sqlx::query(
            "SELECT * FROM identities WHERE site = ? AND device = ? \
             ORDER BY state = 'revoked', enrolled_ms DESC LIMIT 1",
        )
        .bind(site.as_str())
        .bind(device.as_str())
        .fetch_optional(self.records.readers())
        .await
        .map_err(RecordError::sql("look up a device"))?;
        row.map(|row| identity_of(&row))
            .ok_or(DeviceError::Missing("device"))
    }
}

#[cfg(test)]
#[path = "devices_tests.rs"]
mod tests;

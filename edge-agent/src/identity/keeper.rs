//! Carries out what [`mesh_core::enrolment`] decides, but for the requests themselves: those are handed out as
//! [`Errand`]s, since they block.

use std::sync::Arc;

use mesh_core::{
    Name,
    enrolment::{Action, Asked, Enrolment, Input, Known, Token as Held, Trouble, Validity},
};
use rustls::pki_types::CertificateDer;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    certificate::Authority,
    disk::{Disk, Key, Stored},
    error::IdentityError,
    exchange::{Answer, Errand, Issued, Outcome},
    time::TrustedTime,
    tls::{self, Material, Tls},
    token::Token,
};
use crate::{
    clock::WallClock,
    config::Config,
    dice,
    mesh::{Credentials, Detour},
};

/// The device's identity, from the disk and the configuration.
pub struct Keeper {
    machine: Enrolment,
    disk: Disk,
    key: Arc<Key>,
    /// The key of the request that is under way.
    asked_with: Arc<Key>,
    site: Name,
    device: Name,
    url: String,
    token: Option<Arc<Token>>,
    stored: Option<Stored>,
    time: Arc<TrustedTime>,
    tell: watch::Sender<Option<Arc<Material>>>,
    doubt: Arc<Notify>,
    detour: Detour,
    /// What the machine wanted when it began.
    first: Vec<Action>,
}

impl Keeper {
    /// Opens the identity that the configuration or the disk speaks of; nothing where neither does. Makes a key if there
    /// is none.
    ///
    /// # Errors
    /// [`IdentityError`] says what keeps the device from being who it is. A key that others can read is refused in any case.
    pub fn open(config: &Config, wall: WallClock) -> Result<Option<Self>, IdentityError> {
        let disk = Disk::open(config)?;
        let key = disk.key()?;
        disk.seal_keys()?;
        let Some(identity) = &config.identity else {
            return Ok(None);
        };
        let key = Arc::new(match key {
            Some(key) => key,
            None => {
                tracing::info!("the device makes its private key");
                disk.make_key()?
            }
        });
        let token = identity.token.clone().map(Arc::new);
        let stored = match disk.stored(&key) {
            Some(stored) => fitting(config, &disk, stored, token.as_deref())?,
            None => None,
        };
        let held = match (&token, &stored) {
            (None, _) => Held::None,
            (Some(token), Some(stored)) if stored.notes.token == Some(token.digest()) => {
                Held::Spent
            }
            (Some(_), _) => Held::Fresh,
        };
        let floor_ms = stored.as_ref().map_or(0, |stored| stored.notes.floor_ms);
        let time = Arc::new(TrustedTime::new(wall, floor_ms));
        let known = Known {
            certificate: stored.as_ref().map(|stored| stored.validity),
            floor_ms,
            token: held,
        };
        let (machine, first) = Enrolment::resume(known, time.now(), dice::throw());
        let material = match &stored {
            Some(stored) => Some(Arc::new(tls::material(stored, &key, &time)?)),
            None => None,
        };
        if material.is_none() && token.is_none() {
            tracing::warn!(
                "the device has neither a certificate nor an enrolment token: set coordinator.token"
            );
        }
        Ok(Some(Self {
            machine,
            disk,
            asked_with: Arc::clone(&key),
            key,
            site: config.site.clone(),
            device: config.device.clone(),
            url: identity.url.clone(),
            token,
            stored,
            time,
            tell: watch::channel(material).0,
            doubt: Arc::default(),
            detour: Detour::default(),
            first,
        }))
    }

    /// The device's side of its connections, from now on.
    #[must_use]
    pub fn tls(&self) -> Tls {
        Tls::new(
            self.tell.subscribe(),
            Arc::clone(&self.doubt),
            self.detour.clone(),
        )
    }

    /// What the device is known by among its neighbours: the same key.
    pub(crate) fn credentials(&self) -> Credentials {
        Credentials {
            key: self.key.private().secret_der().to_vec(),
            time: Arc::clone(&self.time),
        }
    }

    /// The time that certificates are looked at with.
    #[must_use]
    pub fn time(&self) -> &TrustedTime {
        &self.time
    }

    /// The certificate's validity.
    #[must_use]
    pub const fn certificate(&self) -> Option<Validity> {
        self.machine.certificate()
    }

    /// Why there is no new certificate, as far as the last answer goes.
    #[must_use]
    pub const fn trouble(&self) -> Option<&Trouble> {
        self.machine.trouble()
    }

    /// When [`Keeper::tick`] is due.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let due = self.machine.due_ms();
        due.map(|due_ms| self.time.mono().at(due_ms))
    }

    /// Time has passed. Gives a request to carry out, and its answer back.
    #[must_use]
    pub fn tick(&mut self) -> Option<Errand> {
        let first = std::mem::take(&mut self.first);
        let begun = self.carry_out(first);
        begun.or_else(|| self.give(Input::Tick))
    }

    /// Asks what is to be asked now, if anything is. Blocks.
    #[must_use]
    pub fn ask_now(&mut self) -> Option<Answer> {
        self.tick().map(Errand::run)
    }

    /// Somebody does not take the certificate.
    #[must_use]
    pub fn doubted(&mut self) -> Option<Errand> {
        self.give(Input::Doubt)
    }

    /// A request was answered.
    #[must_use]
    pub fn answered(&mut self, answer: Answer) -> Option<Errand> {
        let ticket = answer.ticket;
        let input = match answer.outcome {
            Outcome::Issued(issued) => match self.take(*issued) {
                Ok((validity, now_ms)) => Input::Issued {
                    ticket,
                    validity,
                    now_ms,
                },
                Err(error) => Input::Failed {
                    ticket,
                    why: error.to_string(),
                },
            },
            Outcome::Pending { retry_after_ms } => Input::Pending {
                ticket,
                retry_after_ms,
            },
            Outcome::Refused(why) => Input::Refused { ticket, why },
            Outcome::Failed(why) => Input::Failed { ticket, why },
        };
        self.give(input)
    }

    /// Waits until somebody does not take the certificate.
    pub(super) fn doubts(&self) -> Arc<Notify> {
        Arc::clone(&self.doubt)
    }

    /// Keeps a certificate: first on the disk, then for the next connections.
    fn take(&mut self, issued: Issued) -> Result<(Validity, i64), IdentityError> {
        let Issued {
            stored,
            now_ms,
            chain_pem,
            ca_pem,
        } = issued;
        let material = tls::material(&stored, &self.asked_with, &self.time)?;
        if !Arc::ptr_eq(&self.asked_with, &self.key) {
            tracing::info!("the new key takes the place of the one that was refused");
            self.disk.adopt_next()?;
            self.key = Arc::clone(&self.asked_with);
        }
        self.disk.store(&stored, &chain_pem, &ca_pem)?;
        let validity = stored.validity;
        self.stored = Some(stored);
        // The time comes with it, and connections are made as soon as it is told.
        self.time
            .set(Some((now_ms, self.time.now().mono_ms)), now_ms);
        self.tell.send_replace(Some(Arc::new(material)));
        Ok((validity, now_ms))
    }

    fn give(&mut self, input: Input) -> Option<Errand> {
        let actions = self.machine.step(input, self.time.now());
        self.carry_out(actions)
    }

    fn carry_out(&mut self, actions: Vec<Action>) -> Option<Errand> {
        let mut errand = None;
        for action in actions {
            match action {
                Action::Ask { what, ticket } => {
                    self.asked_with = self.key_for(what);
                    errand = Some(self.errand(what, ticket));
                }
                Action::Floor(floor_ms) => self.note(floor_ms),
                Action::Report => self.report(),
            }
        }
        self.time
            .set(self.machine.anchor(), self.machine.floor_ms());
        errand
    }

    /// The key to ask with: the device's own. Where that was refused and a token lies ready, another one: a key that was
    /// revoked never comes back, and the device does so only by being let in again.
    fn key_for(&self, what: Asked) -> Arc<Key> {
        let refused = matches!(self.machine.trouble(), Some(Trouble::Refused(_)));
        let is_new = !Arc::ptr_eq(&self.asked_with, &self.key);
        match (what, is_new) {
            (Asked::Renew, _) => return Arc::clone(&self.key),
            // It may wait for a person, or have been answered to nobody.
            (Asked::Enrol, true) => return Arc::clone(&self.asked_with),
            (Asked::Enrol, false) if !refused => return Arc::clone(&self.key),
            (Asked::Enrol, false) => {}
        }
        match self.disk.next_key() {
            Ok(key) => {
                tracing::warn!("the device's key is refused: it enrols with a new one");
                Arc::new(key)
            }
            Err(error) => {
                tracing::error!("there is no new key: {error}");
                Arc::clone(&self.key)
            }
        }
    }

    fn errand(&self, what: Asked, ticket: u64) -> Errand {
        let authority = match (what, &self.stored, &self.token) {
            (Asked::Enrol, _, Some(token)) => Authority::Pinned(token.claims().ca),
            (_, Some(stored), _) => Authority::Known(stored.chain.ca.clone()),
            // Nobody: the machine asks for neither without one of them.
            (_, None, _) => Authority::Pinned(mesh_core::Digest([0; 32])),
        };
        let notes = self.stored.as_ref().map(|stored| &stored.notes);
        Errand {
            what,
            ticket,
            url: self.url.clone(),
            site: self.site.clone(),
            device: self.device.clone(),
            token: self.token.clone(),
            authority,
            key: Arc::clone(&self.asked_with),
            certificate: self.to_show(),
            time: Arc::clone(&self.time),
            spent: notes.and_then(|notes| notes.token),
            mqtt: notes.and_then(|notes| notes.mqtt.clone()),
            detour: self.detour.clone(),
        }
    }

    /// The certificate, if it can prove who renews it. Not right after a failure, whatever that was: a certificate that somebody
    /// on the way does not take must not lock the device out.
    fn to_show(&self) -> Option<CertificateDer<'static>> {
        let stored = self.stored.as_ref()?;
        let holds = self.time.now_ms() < stored.validity.not_after_ms;
        let failed = matches!(self.machine.trouble(), Some(Trouble::Failed(_)));
        (holds && !failed).then(|| stored.chain.leaf.clone())
    }

    fn note(&mut self, floor_ms: i64) {
        let Some(stored) = &mut self.stored else {
            return;
        };
        stored.notes.floor_ms = floor_ms;
        if let Err(error) = self.disk.note(stored) {
            tracing::warn!("the time is not written down: {error}");
        }
    }

    /// Writes down why the device is out, for who asks it when it does not run.
    fn note_refusal(&mut self) {
        let refused = match self.machine.trouble() {
            Some(Trouble::Refused(why)) => Some(why.clone()),
            _ => None,
        };
        let Some(stored) = &mut self.stored else {
            return;
        };
        if stored.notes.refused == refused {
            return;
        }
        stored.notes.refused = refused;
        if let Err(error) = self.disk.note(stored) {
            tracing::warn!("the refusal is not written down: {error}");
        }
    }

    fn report(&mut self) {
        self.note_refusal();
        match (self.machine.trouble(), self.machine.certificate()) {
            (None, Some(certificate)) => {
                let until = super::date(certificate.not_after_ms);
                tracing::info!(%until, "the device has its certificate");
            }
            (None, None) => {}
            (Some(Trouble::Pending), _) => {
                tracing::info!("enrolment waits for a person to approve it at the coordinator");
            }
            (Some(Trouble::Refused(why)), certificate) => tracing::error!(
                enrolled = certificate.is_some(),
                "the coordinator gives this device no certificate: {why}. It stays out until it is let in again, with a \
                 new token in coordinator.token"
            ),
            (Some(Trouble::Failed(why)), certificate) => tracing::warn!(
                enrolled = certificate.is_some(),
                "no certificate yet, trying again: {why}"
            ),
        }
    }
}

/// What is on the disk, if it is of this device and of the coordinator that the token names.
fn fitting(
    config: &Config,
    disk: &Disk,
    stored: Stored,
    token: Option<&Token>,
) -> Result<Option<Stored>, IdentityError> {
    let notes = &stored.notes;
    let ca = models::digest_of(&stored.chain.ca);
    let is_elsewhere = token.is_some_and(|token| token.claims().ca != ca);
    if is_elsewhere {
        tracing::info!("the token is for another coordinator: the device enrols there");
        return Ok(None);
    }
    if (&notes.site, &notes.device) == (&config.site, &config.device) {
        return Ok(Some(stored));
    }
    let is_new = token.is_some_and(|token| notes.token != Some(token.digest()));
    if is_new {
        tracing::info!("the token is new and the device has another name: it enrols anew");
        return Ok(None);
    }
    Err(IdentityError::Other {
        path: disk.certificate_path(),
        certificate: format!("{}/{}", notes.site, notes.device),
        device: format!("{}/{}", config.site, config.device),
    })
}

//! Devices and subscribers as the API and the doors use them: what [`super::devices`] and [`super::subscribers`] do,
//! counted and written down.

use std::{fmt::Display, net::IpAddr, path::Path, sync::Arc, time::Duration};

use mesh_core::Name;
use tokio::sync::Notify;

use super::{
    Trust, audit,
    audit::Outcome,
    authority::{Authority, Issued, hex},
    challenge::Challenges,
    csr::Csr,
    devices::{DeviceError, Devices, Enrolled},
    enrol::Refusal,
    enrol_tokens::Signer,
    files,
    refusals::{Refusals, Refused},
    subscribers::{Sites, SubscriberError, Subscribers},
    tls::Shown,
    token_rows::NewToken,
};
use crate::{config::TlsConfig, metrics::Metrics, records::Records};

/// Random bytes of a password that is made here.
const PASSWORD_BYTES: usize = 16;

/// Everything about who may connect.
pub(crate) struct Identity {
    pub(crate) authority: Arc<Authority>,
    pub(crate) devices: Devices,
    pub(crate) subscribers: Subscribers,
    /// The doors' certificate; not there if the coordinator speaks plain text on loopback.
    pub(crate) shown: Option<Shown>,
    pub(crate) records: Arc<Records>,
    /// Told when somebody comes, goes or is revoked.
    pub(crate) changed: Arc<Notify>,
    signer: Signer,
    challenges: Challenges,
    refusals: Arc<Refusals>,
    metrics: Arc<Metrics>,
    names: Vec<String>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").finish_non_exhaustive()
    }
}

/// What a device sends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    pub(crate) token: &'a str,
    pub(crate) site: &'a str,
    pub(crate) device: &'a str,
    pub(crate) csr: &'a str,
}

/// A token that was made.
#[derive(Clone, Debug)]
pub(crate) struct MadeToken {
    pub(crate) token: String,
    pub(crate) jti: String,
}

/// The names of this server: those that are always its, the machine's, and those of the configuration.
fn names(config: &TlsConfig, listen: &[std::net::IpAddr]) -> Vec<String> {
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(String::from).into();
    let own = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
    let host = host_name().filter(|h| !h.is_empty() && h.chars().all(own));
    let addresses = listen.iter().filter(|ip| !ip.is_unspecified());
    let more = addresses.map(ToString::to_string);
    for name in host
        .into_iter()
        .chain(more)
        .chain(config.names.iter().cloned())
    {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The name of this machine.
pub(crate) fn host_name() -> Option<String> {
    let name = rustix::system::uname();
    name.nodename().to_str().ok().map(str::to_owned)
}

impl Identity {
    /// Opens what there is in the data folder, or makes it.
    pub(crate) async fn open(
        data: &Path,
        trust: &Trust,
        config: &TlsConfig,
        listen: &[std::net::IpAddr],
        most_devices: usize,
        metrics: Arc<Metrics>,
    ) -> Result<Self, String> {
        let say = |error: &dyn Display| error.to_string();
        let folder = files::folder(data).map_err(|e| say(&e))?;
        let authority = Arc::new(Authority::open(&folder).map_err(|e| say(&e))?);
        let (records, signer) = (trust.records.clone(), Signer(trust.key.clone()));
        let life = Duration::from_secs(config.device_s);
        let devices = Devices::open(records.clone(), authority.clone(), life, most_devices)
            .await
            .map_err(|e| say(&e))?;
        let subscribers = Subscribers::open(records.clone())
            .await
            .map_err(|e| say(&e))?;
        let names = names(config, listen);
        let shown = if config.enabled {
            let active = devices.active.clone();
            Some(Shown::new(&authority, &names, active).map_err(|e| say(&e))?)
        } else {
            None
        };
        Ok(Self {
            authority,
            devices,
            subscribers,
            shown,
            challenges: Challenges::new(trust.key.clone()),
            refusals: Refusals::new(records.clone()),
            records,
            changed: Arc::default(),
            signer,
            metrics,
            names,
        })
    }

    /// The name under which devices find this coordinator, unless they are told otherwise.
    pub(crate) fn public_name(&self, listen: std::net::IpAddr) -> String {
        // What the configuration names comes last, and is what somebody meant.
        match self.names.last() {
            _ if listen.is_loopback() => listen.to_string(),
            Some(name) => name.clone(),
            None => listen.to_string(),
        }
    }

    /// The same for one whom nobody knows yet.
    async fn note_of<T>(
        &self,
        from: IpAddr,
        action: &'static str,
        object: &str,
        result: &Result<T, DeviceError>,
    ) {
        let Err(DeviceError::Refused(why)) = result else {
            return self.note(&from.to_string(), action, object, result).await;
        };
        self.metrics.enrolment_refused(why.name());
        let text = why.to_string();
        let refused = Refused {
            from,
            action,
            object,
            kind: why.name(),
            why: &text,
        };
        if why.is_of_a_token() {
            self.refusals.alarm(refused);
        }
        self.refusals.note(refused).await;
    }

    /// Writes down what came of it, and counts what was refused.
    async fn note<T>(
        &self,
        who: &str,
        action: &'static str,
        object: &str,
        result: &Result<T, DeviceError>,
    ) {
        let (outcome, detail) = match result {
            Ok(_) => (Outcome::Done, String::new()),
            Err(DeviceError::Refused(why)) => {
                self.metrics.enrolment_refused(why.name());
                (Outcome::Refused, why.to_string())
            }
            Err(error) => (Outcome::Failed, error.to_string()),
        };
        audit(&self.records, who, action, object, outcome, &detail).await;
    }

    /// A device shows a token.
    pub(crate) async fn enrol(
        &self,
        asked: Asked<'_>,
        from: IpAddr,
        now_ms: i64,
    ) -> Result<Enrolled, DeviceError> {
        let done = self.try_enrol(asked, now_ms).await;
        let object: String = format!("device {}/{}", asked.site, asked.device)
            .chars()
            .filter(|c| !c.is_control())
            .take(140)
            .collect();
        let action = match &done {
            Ok(Enrolled::Pending) => "ask to enrol",
            _ => "enrol",
        };
        self.note_of(from, action, &object, &done).await;
        self.changed.notify_one();
        done
    }

    async fn try_enrol(&self, asked: Asked<'_>, now_ms: i64) -> Result<Enrolled, DeviceError> {
        let claims = self.signer.read(asked.token)?;
        let named = |what: &str, name: &str| {
            name.parse::<Name>()
                .map_err(|error| DeviceError::Invalid(format!("{what}: {error}")))
        };
        let (site, device) = (named("site", asked.site)?, named("device", asked.device)?);
        if device == Name::itself() {
            let why = "device: `_` stands for a whole site, and is no device's name";
            return Err(DeviceError::Invalid(why.into()));
        }
        if claims.site != asked.site {
            return Err(Refusal::OtherSite.into());
        }
        let csr = Csr::read(asked.csr).map_err(Refusal::from)?;
        self.devices
            .enrol(&claims.jti, (&site, &device), &csr, now_ms)
            .await
    }

    /// A device that is known asks for its next certificate. It proves that it asks now: by the certificate that its connection
    /// was made with (`shown`), or else by a signature over what it was told to sign.
    pub(crate) async fn renew(
        &self,
        csr: &str,
        shown: Option<&super::PeerDevice>,
        from: IpAddr,
        now_ms: i64,
    ) -> Result<(super::PeerDevice, Issued), DeviceError> {
        let done = match Csr::read(csr) {
            Err(error) => Err(Refusal::from(error).into()),
            Ok(csr) => {
                let challenge = csr.challenge.clone().unwrap_or_default();
                let fresh = |device: &super::PeerDevice| {
                    shown == Some(device) || self.challenges.take(&challenge, now_ms)
                };
                self.devices.renew(&csr, fresh, now_ms).await
            }
        };
        if matches!(done, Err(DeviceError::Unproven)) {
            // Nothing was refused yet.
            return done;
        }
        let object = match &done {
            Ok((peer, _)) => format!("device {}/{}", peer.site, peer.device),
            Err(_) => "device".to_owned(),
        };
        self.note_of(from, "renew", &object, &done).await;
        done
    }

    /// What a device is to sign that renews.
    pub(crate) fn challenge(&self, now_ms: i64) -> Option<String> {
        self.challenges.make(now_ms)
    }

    /// Makes a token.
    pub(crate) async fn new_token(
        &self,
        new: NewToken<'_>,
        url: String,
        now_ms: i64,
    ) -> Result<MadeToken, DeviceError> {
        let object = match new.device {
            Some(device) => format!("device {}/{device}", new.site),
            None => format!("site {}", new.site),
        };
        let (site, by, expires_ms) = (new.site.as_str(), new.by, new.expires_ms);
        let made = self.devices.new_token(new, now_ms).await.and_then(|jti| {
            let ca = self.authority.digest();
            match self.signer.token(&jti, site, expires_ms, ca, url) {
                Ok(token) => Ok(MadeToken { token, jti }),
                Err(error) => Err(DeviceError::Invalid(format!(
                    "the token cannot be signed: {error}"
                ))),
            }
        });
        self.note(by, "make an enrolment token", &object, &made)
            .await;
        made
    }

    /// Takes a token back.
    pub(crate) async fn revoke_token(&self, jti: &str, by: &str) -> Result<(), DeviceError> {
        let done = self.devices.revoke_token(jti).await;
        let object: String = format!("token {jti}").chars().take(80).collect();
        self.note(by, "take back an enrolment token", &object, &done)
            .await;
        done
    }

    /// Lets a device in, or shuts it out.
    pub(crate) async fn judge(
        &self,
        (site, device): (&Name, &Name),
        let_in: bool,
        by: &str,
    ) -> Result<(), DeviceError> {
        let (action, done) = if let_in {
            ("approve", self.devices.approve(site, device).await)
        } else {
            ("revoke", self.devices.revoke(site, device).await)
        };
        self.changed.notify_one();
        self.note(by, action, &format!("device {site}/{device}"), &done)
            .await;
        done
    }

    /// Lets somebody listen; the password, which is kept nowhere.
    pub(crate) async fn add_subscriber(
        &self,
        name: &Name,
        password: Option<String>,
        sites: Sites,
        by: &str,
        now_ms: i64,
    ) -> Result<String, SubscriberError> {
        let password = match password {
            Some(password) => password,
            None => {
                let mut bytes = [0; PASSWORD_BYTES];
                aws_lc_rs::rand::fill(&mut bytes).map_err(|_| {
                    SubscriberError::Hash("the system gives no random numbers".into())
                })?;
                hex(&bytes)
            }
        };
        let subscribers = &self.subscribers;
        let done = subscribers
            .add(name, password.clone(), sites, by, now_ms)
            .await;
        self.note_subscriber(by, "add a subscriber", name, &done)
            .await;
        done.map(|()| password)
    }

    /// Shuts a subscriber out.
    pub(crate) async fn remove_subscriber(
        &self,
        name: &Name,
        by: &str,
    ) -> Result<(), SubscriberError> {
        let done = self.subscribers.remove(name).await;
        self.note_subscriber(by, "remove a subscriber", name, &done)
            .await;
        done
    }

    async fn note_subscriber(
        &self,
        by: &str,
        action: &'static str,
        name: &Name,
        done: &Result<(), SubscriberError>,
    ) {
        self.changed.notify_one();
        let (outcome, detail) = match done {
            Ok(()) => (Outcome::Done, String::new()),
            Err(error) => (Outcome::Failed, error.to_string()),
        };
        let object = format!("subscriber {name}");
        audit(&self.records, by, action, &object, outcome, &detail).await;
    }
}

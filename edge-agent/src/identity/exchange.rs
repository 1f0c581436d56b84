//! One request for a certificate, over HTTPS.

use std::{sync::Arc, time::Duration};

use mesh_core::{Digest, Name, enrolment::Asked};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde::{Deserialize, Serialize};

use super::{
    certificate::{Authority, Chain, Contact},
    disk::{Key, Notes, Stored},
    time::TrustedTime,
    tls,
    token::Token,
};
use crate::{
    http::{self, Patience},
    mesh::Detour,
};

/// A coordinator that cannot be reached in this time is not there.
const CONNECT: Duration = Duration::from_secs(10);
/// Time to a first answer: a certificate is signed in a moment.
const ANSWER: Duration = Duration::from_secs(20);
/// A whole exchange. A renewal may need three of them: with a certificate that is turned away, for a challenge, and with it.
const EXCHANGE: Duration = Duration::from_secs(35);
/// Two certificates and some words.
const MAX_ANSWER: u64 = 64 * 1024;
/// Of a refusal so much is shown.
const MAX_REASON: usize = 300;
/// The longest challenge that is signed: a coordinator's has below two hundred bytes.
const MAX_CHALLENGE: usize = 240;
/// The status that says: the request does not prove that it was made now.
const UNPROVEN: u16 = 401;
/// When to ask again where the coordinator does not say.
const PENDING_S: u64 = 60;

/// Everything that one request needs. It blocks, and may be carried out anywhere.
pub struct Errand {
    pub(super) what: Asked,
    pub(super) ticket: u64,
    pub(super) url: String,
    pub(super) site: Name,
    pub(super) device: Name,
    pub(super) token: Option<Arc<Token>>,
    pub(super) authority: Authority,
    pub(super) key: Arc<Key>,
    /// The certificate to renew, while it can be shown.
    pub(super) certificate: Option<CertificateDer<'static>>,
    pub(super) time: Arc<TrustedTime>,
    /// The token that the present certificate came by, and its broker.
    pub(super) spent: Option<Digest>,
    pub(super) mqtt: Option<String>,
    pub(super) detour: Detour,
}

/// What came of it.
pub struct Answer {
    pub(super) ticket: u64,
    pub(super) outcome: Outcome,
}

pub(super) enum Outcome {
    Issued(Box<Issued>),
    Pending { retry_after_ms: u64 },
    Refused(String),
    Failed(String),
}

/// A certificate that was checked.
pub(super) struct Issued {
    pub(super) stored: Stored,
    pub(super) now_ms: i64,
    pub(super) chain_pem: String,
    pub(super) ca_pem: String,
}

#[derive(Serialize)]
struct Enrol<'a> {
    token: &'a str,
    site: &'a Name,
    device: &'a Name,
    csr: &'a str,
}

#[derive(Serialize)]
struct Renew<'a> {
    csr: &'a str,
}

#[derive(Deserialize)]
struct Granted {
    certificate: String,
    ca: String,
    renew_after_ms: i64,
    now_ms: i64,
    #[serde(default)]
    mqtt: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Waiting {
    retry_after_s: Option<u64>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Problem {
    title: String,
    detail: String,
    /// What the coordinator wants to see signed.
    challenge: Option<String>,
}

/// Why there is no answer.
struct NoAnswer {
    why: String,
    /// One side does not take the other's certificate.
    certificates: bool,
}

impl Errand {
    /// Asks the coordinator.
    #[must_use]
    pub fn run(self) -> Answer {
        let outcome = self.ask().unwrap_or_else(Outcome::Failed);
        Answer {
            ticket: self.ticket,
            outcome,
        }
    }

    fn name(&self) -> String {
        format!("{}/{}", self.site, self.device)
    }

    fn ask(&self) -> Result<Outcome, String> {
        if self.url.is_empty() {
            return Err("nobody says where the coordinator is: set coordinator.url".into());
        }
        let (status, bytes) = match (self.what, &self.token) {
            (Asked::Renew, _) => self.renew()?,
            (Asked::Enrol, Some(token)) => {
                let csr = self.request(None)?;
                let enrol = Enrol {
                    token: token.text(),
                    site: &self.site,
                    device: &self.device,
                    csr: &csr,
                };
                self.send("enrol", &enrol, None).map_err(|no| no.why)?
            }
            (Asked::Enrol, None) => return Err("there is no token".into()),
        };
        match status {
            200 => self.granted(&bytes),
            202 => {
                let waiting: Waiting = serde_json::from_slice(&bytes).unwrap_or_default();
                let seconds = waiting.retry_after_s.unwrap_or(PENDING_S);
                Ok(Outcome::Pending {
                    retry_after_ms: seconds.saturating_mul(1_000),
                })
            }
            // Where, and how often, says nothing about this device.
            404 | 405 | 408 | 425 | 429 => Err(format!("{}: status {status}", self.url)),
            400..=499 => Ok(Outcome::Refused(reason(status, &bytes))),
            _ => Err(format!("{}: status {status}", self.url)),
        }
    }

    /// Shows the certificate that is to be renewed. Where there is none that counts, signs what the coordinator says, which it
    /// has said to nobody else: so no request that somebody kept is of any use.
    fn renew(&self) -> Result<(u16, Vec<u8>), String> {
        let plain = self.request(None)?;
        let ask = |csr: &str, shown| self.send("renew", &Renew { csr }, shown);
        if self.certificate.is_some() {
            match ask(&plain, self.certificate.as_ref()) {
                Ok((UNPROVEN, _)) => {}
                Ok(answer) => return Ok(answer),
                // Of an older one the coordinator may know better than this device's clock.
                Err(no) if no.certificates => {}
                Err(no) => return Err(no.why),
            }
        }
        let (status, bytes) = ask(&plain, None).map_err(|no| no.why)?;
        let problem: Problem = serde_json::from_slice(&bytes).unwrap_or_default();
        match (status, problem.challenge) {
            (UNPROVEN, Some(challenge)) if challenge.len() <= MAX_CHALLENGE => {
                let signed = self.request(Some(&challenge))?;
                ask(&signed, None).map_err(|no| no.why)
            }
            _ => Ok((status, bytes)),
        }
    }

    fn request(&self, challenge: Option<&str>) -> Result<String, String> {
        let request = self.key.request(&self.name(), challenge);
        request.map_err(|error| error.to_string())
    }

    fn send(
        &self,
        route: &str,
        body: &impl Serialize,
        shown: Option<&CertificateDer<'static>>,
    ) -> Result<(u16, Vec<u8>), NoAnswer> {
        let other = |why: String| NoAnswer {
            why,
            certificates: false,
        };
        let body = serde_json::to_vec(body).map_err(|error| other(error.to_string()))?;
        let contact = Contact::new(self.authority.clone());
        let shown = shown.map(|leaf| (leaf.clone(), self.key.private()));
        let config =
            tls::contact(contact, shown, &self.time).map_err(|error| other(error.to_string()))?;
        let patience = Patience {
            connect: CONNECT,
            answer: ANSWER,
            body: ANSWER,
            whole: Some(EXCHANGE),
        };
        let url = format!("{}/api/v1/{route}", self.url);
        let sent = http::agent_with(patience, config, self.detour.clone())
            .post(&url)
            .content_type("application/json")
            .send(&body[..]);
        let mut response = sent.map_err(|error| NoAnswer {
            certificates: tls::is_about_certificates(&error),
            why: format!("{}: {error}", self.url),
        })?;
        let status = response.status().as_u16();
        let bytes = response
            .body_mut()
            .with_config()
            .limit(MAX_ANSWER)
            .read_to_vec()
            .map_err(|error| {
                let url = &self.url;
                other(format!("{url}: status {status}, and no end: {error}"))
            })?;
        Ok((status, bytes))
    }

    fn granted(&self, bytes: &[u8]) -> Result<Outcome, String> {
        let wrong = |why: String| format!("{}: the certificate that it gives: {why}", self.url);
        let granted: Granted = serde_json::from_slice(bytes)
            .map_err(|error| format!("{}: an answer that is none: {error}", self.url))?;
        let ca = CertificateDer::from_pem_slice(granted.ca.as_bytes())
            .map_err(|error| wrong(format!("the authority's is no PEM: {error}")))?;
        let mut chain_pem = granted.certificate;
        let chain = match Chain::parse(chain_pem.as_bytes()) {
            Ok(chain) => chain,
            // Alone: the authority's belongs behind it.
            Err(_) => {
                chain_pem = format!("{}\n{}", chain_pem.trim_end(), granted.ca);
                Chain::parse(chain_pem.as_bytes()).map_err(wrong)?
            }
        };
        let is_known = match &self.authority {
            Authority::Pinned(pin) => models::digest_of(&ca) == *pin,
            Authority::Known(known) => ca == *known,
        };
        if !is_known || chain.ca != ca {
            return Err(wrong("it is by another authority".into()));
        }
        let facts = chain
            .check(&self.name(), &self.key.public(), granted.now_ms)
            .map_err(wrong)?;
        let token = match self.what {
            Asked::Enrol => self.token.as_ref().map(|token| token.digest()),
            Asked::Renew => self.spent,
        };
        let floor_ms = granted.now_ms.max(facts.not_before_ms);
        let notes = Notes::new(
            (&self.site, &self.device),
            &self.url,
            granted.mqtt.or_else(|| self.mqtt.clone()),
            floor_ms,
            token,
        );
        Ok(Outcome::Issued(Box::new(Issued {
            stored: Stored {
                notes,
                validity: facts.validity(Some(granted.renew_after_ms)),
                chain,
            },
            now_ms: granted.now_ms,
            chain_pem,
            ca_pem: granted.ca,
        })))
    }
}

/// Words of the coordinator for people, without anything that could harm a log.
fn reason(status: u16, bytes: &[u8]) -> String {
    let problem: Problem = serde_json::from_slice(bytes).unwrap_or_default();
    let words = match (problem.title.as_str(), problem.detail.as_str()) {
        ("", "") => format!("status {status}"),
        (title, "") => title.to_owned(),
        (_, detail) => detail.to_owned(),
    };
    words
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_REASON)
        .collect()
}

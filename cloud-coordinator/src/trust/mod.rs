//! Who is let in and who may do what: devices by their certificates, subscribers of the broker by their passwords, people
//! by sessions and tokens; and the log of what was done.
//!
//! ```text
//!  person ── token ──> device ── token, signing request ──> enrol (pure) ──> devices (trust.db) ──> authority
//!                        ▲                                                        │                   │
//!                        └──────────────── certificate, 7 days ───────────────────┼───────────────────┘
//!                                                                                 ▼
//!  device ══ TLS with its certificate ══> tls (both doors) ── may this key come in now? ── active
//! ```

pub(crate) mod active;
pub(crate) mod audit;
mod authority;
mod challenge;
pub(crate) mod csr;
pub(crate) mod devices;
mod directory;
mod enrol;
mod enrol_tokens;
pub(crate) mod files;
pub(crate) mod identity;
mod passwords;
mod principal;
mod refusals;
mod roster;
mod serials;
mod sessions;
mod setup;
pub(crate) mod subscribers;
pub(crate) mod tls;
mod token;
pub(crate) mod token_rows;
mod tokens;
mod users;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub(crate) use authority::{Authority, Issued, SKEW, hex};
pub(crate) use csr::common_name;
pub(crate) use directory::Person;
pub(crate) use files::folder;
pub(crate) use identity::Identity;
pub(crate) use principal::{PeerDevice, Principal, Role};
pub(crate) use roster::Rosters;
pub(crate) use sessions::{SESSION_MS, Shown, Who};
pub(crate) use subscribers::Subscribers;
pub(crate) use tokens::{GrantRow, NewToken};
pub(crate) use users::{Change, NewUser, UserRow};

use self::{
    audit::{Entry, Outcome},
    files::FileError,
    passwords::Passwords,
    token::TokenKey,
};
use crate::{
    clock,
    records::{RecordError, Records},
};

/// How the API is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Door {
    /// Over TLS.
    pub(crate) tls: bool,
}

/// Why something about people cannot be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrustError {
    #[error(transparent)]
    Records(#[from] RecordError),
    #[error(transparent)]
    Files(#[from] FileError),
    #[error("a token cannot be signed: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
    #[error("a password cannot be hashed: {0}")]
    Hash(String),
    #[error("the name or the password is wrong")]
    Wrong,
    #[error("{0}")]
    Forbidden(String),
    #[error("{0}")]
    Invalid(String),
    #[error("there is no such {0}")]
    Missing(&'static str),
    #[error("{0}")]
    Conflict(String),
}

/// People and what they show.
#[derive(Clone, Debug)]
pub(crate) struct Trust {
    pub(crate) records: Arc<Records>,
    folder: PathBuf,
    key: Arc<TokenKey>,
    passwords: Arc<Passwords>,
}

impl Trust {
    /// Opens what is in the data folder, and makes what is not there yet.
    ///
    /// # Errors
    /// If it cannot be read, and if a secret can be read by others.
    pub(crate) async fn open(data: &Path) -> Result<Self, TrustError> {
        let folder = files::folder(data)?;
        let key = Arc::new(TokenKey::open(&folder)?);
        let records = Arc::new(Records::trust(data).await?);
        let trust = Self {
            records,
            folder,
            key,
            passwords: Arc::default(),
        };
        let head = audit::head(&trust.records).await?;
        tracing::info!(%head, "the audit log");
        Ok(trust)
    }

    /// Writes down what was done or refused. Who asked is answered all the same if that cannot be written: it was done.
    pub(crate) async fn note(&self, entry: Entry<'_>) {
        note(&self.records, entry).await;
    }
}

async fn note(records: &Records, entry: Entry<'_>) {
    if let Err(error) = audit::note(records, entry, clock::now_ms()).await {
        tracing::error!(%error, who = entry.who, action = entry.action, object = entry.object, "not in the audit log");
    }
}

/// What commands on the coordinator's machine show, if they may read its folder.
///
/// # Errors
/// If it is there and cannot be read, or can be read by others.
pub(crate) fn operator_token(data: &Path) -> Result<Option<String>, FileError> {
    secret(&data.join("trust").join("operator.token"))
}

/// A secret in a file that others cannot read; nothing if there is no such file.
///
/// # Errors
/// If it cannot be read, or can be read by others.
pub(crate) fn secret(path: &Path) -> Result<Option<String>, FileError> {
    let bytes = files::read(path)?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned()))
}

/// A password from a file that only its owner can read.
///
/// # Errors
/// If it is not there, is empty, or can be read by others.
pub(crate) fn secret_of(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let bytes = files::read(path).map_err(|e| e.to_string())?;
    let bytes = bytes.ok_or_else(|| format!("{shown} is not there"))?;
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    if text.is_empty() {
        return Err(format!("{shown} is empty"));
    }
    Ok(text)
}

/// A line about something that was done.
fn done<'a>(who: &'a str, action: &'a str, object: &'a str, detail: &'a str) -> Entry<'a> {
    Entry {
        who,
        action,
        object,
        outcome: Outcome::Done,
        detail,
    }
}

/// Writes down who did what to what, and what came of it: `done`, `refused` or `failed`.
pub(crate) async fn audit(
    records: &Records,
    who: &str,
    action: &str,
    object: &str,
    outcome: Outcome,
    detail: &str,
) {
    let entry = Entry {
        who,
        action,
        object,
        outcome,
        detail,
    };
    note(records, entry).await;
}

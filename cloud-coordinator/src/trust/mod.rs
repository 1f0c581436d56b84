//! Who is let in: devices by their certificates, subscribers of the broker by their passwords.
//!
//! ```text
//!  person ── token ──> device ── token, signing request ──> enrol (pure) ──> devices (trust.db) ──> authority
//!                        ▲                                                        │                   │
//!                        └──────────────── certificate, 7 days ───────────────────┼───────────────────┘
//!                                                                                 ▼
//!  device ══ TLS with its certificate ══> tls (both doors) ── may this key come in now? ── active
//! ```

pub(crate) mod active;
mod authority;
mod csr;
pub(crate) mod devices;
mod enrol;
#[allow(dead_code, reason = "what is removed belongs to people")]
mod files;
pub(crate) mod identity;
#[allow(
    dead_code,
    reason = "people come with their sessions, which are not here"
)]
mod principal;
pub(crate) mod subscribers;
pub(crate) mod tls;
pub(crate) mod token_rows;
mod tokens;

pub(crate) use authority::Issued;
pub(crate) use identity::Identity;
pub(crate) use principal::{PeerDevice, Principal};

use crate::records::Records;

/// Who did what to what, and what came of it: `done`, `refused` or `failed`.
pub(crate) async fn audit(
    _records: &Records,
    who: &str,
    action: &str,
    object: &str,
    outcome: &'static str,
    detail: &str,
) {
    if outcome == "done" {
        tracing::info!(target: "audit", who, action, object, outcome, detail);
    } else {
        tracing::warn!(target: "audit", who, action, object, outcome, detail);
    }
}

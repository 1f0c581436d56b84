//! Who the device is, and how it proves it.
//!
//! ```text
//!  token ──> driver ── keeper ──requests──> exchange ══HTTPS══> coordinator
//!                        │  <──certificate──    (the authority pinned by the token, then the one on the disk)
//!                        ├──> disk
//!                        └──> Tls: what every other connection is made with, from its next one on
//! ```
//!
//! The private key is made here and never leaves the device. All decisions about when to ask for a certificate are those
//! of [`mesh_core::enrolment`]. Nothing waits for an identity but the network: a device that has none yet looks at
//! frames and keeps its readings.

mod certificate;
mod config;
mod disk;
mod driver;
mod error;
mod exchange;
mod keeper;
mod time;
mod tls;
mod token;
mod words;

pub use config::{CoordinatorConfig, IdentityConfig, Secret};
pub(crate) use config::{Named, settle};
pub(crate) use driver::run;
pub use error::IdentityError;
pub use exchange::{Answer, Errand};
pub use keeper::Keeper;
pub use time::TrustedTime;
pub(crate) use tls::{MQTTS_PORT, is_about_certificates};
pub use tls::{Material, Tls};
pub use token::{Claims, MAX_TOKEN_BYTES, Token};
pub(crate) use words::{date, doctor, enrol};

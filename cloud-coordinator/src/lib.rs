//! The coordinator: takes in what devices report, keeps it, and shows it.
//!
//! ```text
//!  devices ──> broker (embedded or external) ──> ingest ──> store (SQLite) ──> api ──> page, subscribers
//!     ▲                                            │
//!     └───────────── acknowledgement <── after the commit
//!
//!  devices come in by certificates that trust gives them (enrol, renew, revoke)
//!
//!  devices, people ──> samples (images in objects) ──> labels ──> datasets ──> training ──> delivery ──> devices
//! ```
//!
//! [`coordinator::Coordinator::start`] wires these together and returns a handle; the program and the
//! tests use the same function.

mod adopt;
mod api;
mod broker;
pub mod cli;
mod clock;
pub mod config;
pub mod coordinator;
mod crowd;
pub mod datasets;
pub mod delivery;
mod directory;
mod erasure;
mod exchange;
#[doc(hidden)]
pub mod fuzzed;
mod ingest;
mod keys;
mod labels;
mod meeting;
mod metrics;
mod notice;
pub mod objects;
mod operate;
mod parts;
mod quarantine;
pub mod records;
mod registry;
mod samples;
mod sightings;
mod store;
mod train;
mod trust;

pub use config::Config;
pub use coordinator::{Coordinator, Handle, StartError};

//! The way of a model to the devices.
//!
//! ```text
//! catalog ─> releases (document, chunks, deltas, signature) ─> rollouts (who, when) ─> desired ══> devices
//!                                                                  ▲                                 │
//!                                                                  └──────────── reported <══════════┘
//! ```

mod releases;
mod rollouts;
pub mod signing;
mod store;
mod wishes;

pub(crate) use releases::{ReleaseError, ReleaseRow, Releases};
pub(crate) use rollouts::{
    Group, Push, RolloutError, RolloutView, Rollouts, Settings, SettingsError, SettingsView,
};

//! What can be set about updates.

use std::path::PathBuf;

use serde::Deserialize;

use crate::samples::coordinator_url;

/// `[update]`: models that come from the coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UpdateConfig {
    /// Follow the coordinator's wishes at all? Without, the device stays with the model that it has.
    pub enabled: bool,
    /// Where models come from: `https://HOST:PORT`. Default: `samples.coordinator`.
    pub coordinator: Option<String>,
    /// The root of trust, a file that came with the device (`root.json`). Without it nothing is ever installed.
    pub root: Option<PathBuf>,
}

impl Default for UpdateConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            coordinator: None,
            root: None,
        }
    }
}

impl UpdateConfig {
    /// Values that cannot be meant: the field, and what it must be.
    #[must_use]
    pub fn mistakes(&self) -> Vec<(&'static str, String)> {
        let wrong = self.coordinator.as_deref().map(coordinator_url);
        wrong
            .and_then(Result::err)
            .map(|why| ("coordinator", why))
            .into_iter()
            .collect()
    }
}

//! What of settings survives a power cut.

use alloc::{collections::BTreeSet, vec::Vec};

use serde::{Deserialize, Serialize};

use super::Settings;
use crate::{Bad, Digest, Failure, MAX_BAD, Name, VERSION};

/// Settings on trial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// Which.
    pub settings: Settings,
    /// The sources that gave pictures before.
    pub sources: BTreeSet<Name>,
}

/// What survives a power cut; small, and always replaced as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Version of the format, [`VERSION`].
    pub v: u8,
    /// The newest wish that was heard; 0 is none.
    pub revision: u64,
    /// The settings that are wished for; nothing is the device's own files alone.
    pub wished: Option<Settings>,
    /// Settings that have proved themselves; nothing is the device's own files alone.
    pub good: Option<Settings>,
    /// Settings on trial, from before the agent starts with them.
    pub begun: Option<Begun>,
    /// Starts with those on trial.
    pub starts: u32,
    /// Settings that are not tried again, the oldest first.
    pub bad: Vec<Bad>,
}

impl Saved {
    /// A device with its own files.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            v: VERSION,
            revision: 0,
            wished: None,
            good: None,
            begun: None,
            starts: 0,
            bad: Vec::new(),
        }
    }

    /// What the next start loads.
    #[must_use]
    pub fn loads(&self) -> Option<&Settings> {
        let begun = self.begun.as_ref().map(|begun| &begun.settings);
        begun.or(self.good.as_ref())
    }

    pub(super) fn why_bad(&self, settings: &Settings) -> Option<&Failure> {
        let bad = self.bad.iter().find(|bad| bad.digest == settings.digest);
        bad.map(|bad| &bad.failure)
    }

    pub(super) fn mark(&mut self, digest: Digest, failure: Failure) {
        self.bad.retain(|bad| bad.digest != digest);
        if self.bad.len() == MAX_BAD {
            self.bad.remove(0);
        }
        self.bad.push(Bad { digest, failure });
    }

    pub(super) fn end_trial(&mut self) {
        self.begun = None;
        self.starts = 0;
    }
}

impl Default for Saved {
    fn default() -> Self {
        Self::new()
    }
}

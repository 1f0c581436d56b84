//! What of an update survives a power cut.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::{Bad, Desired, Digest, Failure, MAX_BAD, Release, VERSION};

/// The durable part of an [`Update`](super::Update), small and always replaced as a whole.
///
/// At every moment `current` is verified, tested and on disk, and so is `last_good`. The new model is in exactly one
/// of three places: nowhere; in `begun`, from before its code runs for the first time; in `begun` and `current`,
/// from before it becomes active. Either step back is one write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// Version of the format, [`VERSION`].
    pub v: u8,
    /// The newest wish.
    pub desired: Option<Desired>,
    /// The model to load at the next start.
    pub current: Option<Release>,
    /// The model to go back to. It stays after `current` is kept, until the next model takes its place.
    pub last_good: Option<Release>,
    /// The model on trial, from the first time that it runs.
    pub begun: Option<Release>,
    /// What speaks against the model on trial, or else `current`: it grows with each life that had no orderly end.
    pub starts: u32,
    /// The agent runs with a model that this counts for, or its life had no orderly end.
    #[serde(default)]
    pub alive: bool,
    /// Models that are not tried again, the oldest first.
    pub bad: Vec<Bad>,
}

impl Saved {
    /// A device that comes with a model, or with none.
    #[must_use]
    pub const fn new(current: Option<Release>) -> Self {
        Self {
            v: VERSION,
            desired: None,
            current,
            last_good: None,
            begun: None,
            starts: 0,
            alive: false,
            bad: Vec::new(),
        }
    }

    /// Is the model on trial the active one?
    #[must_use]
    pub fn is_watching(&self) -> bool {
        self.begun.is_some() && same(self.begun.as_ref(), self.current.as_ref())
    }

    /// The revision of the newest wish; 0 is none.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.desired.as_ref().map_or(0, |desired| desired.revision)
    }

    /// The model that is wished for.
    #[must_use]
    pub fn target(&self) -> Option<&Release> {
        self.desired.as_ref()?.release.as_ref()
    }

    /// The same, unless it is marked as bad.
    #[must_use]
    pub fn wanted(&self) -> Option<&Release> {
        self.target().filter(|target| !self.is_bad(target.digest))
    }

    /// Is it marked as bad?
    #[must_use]
    pub fn is_bad(&self, digest: Digest) -> bool {
        self.bad.iter().any(|bad| bad.digest == digest)
    }

    pub(super) fn mark(&mut self, digest: Digest, failure: Failure) {
        self.bad.retain(|bad| bad.digest != digest);
        if self.bad.len() == MAX_BAD {
            self.bad.remove(0);
        }
        self.bad.push(Bad { digest, failure });
    }

    /// The trial is over without the new model.
    pub(super) fn go_back(&mut self) {
        let is_bad = |current: &Release| self.is_bad(current.digest);
        if self.is_watching() || self.current.as_ref().is_some_and(is_bad) {
            self.current = self.last_good.take();
        }
        self.begun = None;
        self.clear();
    }

    /// Nothing speaks against whoever is the suspect now; this life counts for it.
    pub(super) fn clear(&mut self) {
        self.starts = 0;
        self.alive = self.begun.is_some() || self.last_good.is_some();
    }

    /// Everything that must stay on disk.
    pub(super) fn needed(&self) -> Vec<Release> {
        let mut needed: Vec<Release> = Vec::new();
        for release in [&self.current, &self.last_good, &self.begun]
            .into_iter()
            .flatten()
        {
            if !needed.iter().any(|other| other.digest == release.digest) {
                needed.push(release.clone());
            }
        }
        needed
    }
}

/// Do both name the same model, or none?
pub(super) fn same(a: Option<&Release>, b: Option<&Release>) -> bool {
    a.map(|release| release.digest) == b.map(|release| release.digest)
}

//! What an update says about itself.

use super::{FETCH_MS, HEALTHY_MS, LOAD_MS, Saved, TEST_MS, Update, VERIFY_MS};
use crate::{Phase, Reported, VERSION};

impl Update {
    /// What it is doing.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// What is, or is being, saved.
    #[must_use]
    pub const fn saved(&self) -> &Saved {
        &self.saved
    }

    /// When [`super::Input::Tick`] is due, if nothing happens before.
    #[must_use]
    pub fn due_ms(&self) -> Option<u64> {
        let trial = self.trial();
        let after = match self.phase {
            Phase::Settled => {
                return (self.saved.starts > 0).then(|| self.started_ms.saturating_add(HEALTHY_MS));
            }
            Phase::Waiting => self.wait_ms,
            Phase::Loading | Phase::Activating => LOAD_MS,
            Phase::Fetching => FETCH_MS,
            Phase::Verifying => VERIFY_MS,
            Phase::Testing => TEST_MS,
            Phase::Shadowing => u64::from(trial.shadow_s_max) * 1_000,
            Phase::Watching if self.judge.frames() >= trial.watch_frames => {
                u64::from(trial.watch_s_min) * 1_000
            }
            Phase::Watching => u64::from(trial.watch_s_max) * 1_000,
        };
        Some(self.since_ms.saturating_add(after))
    }

    /// What to tell the coordinator; `ts` is the device's clock in milliseconds since the Unix epoch.
    #[must_use]
    pub fn report(&self, ts: i64) -> Reported {
        Reported {
            v: VERSION,
            ts,
            revision: self.saved.revision(),
            phase: self.phase,
            target: self.saved.target().cloned(),
            loaded: self.loaded.clone(),
            last_good: self.saved.last_good.clone(),
            failure: self.failure.clone(),
            bad: self.saved.bad.clone(),
            progress: libm::roundf(self.progress() * 100.0) / 100.0,
            evidence: match self.phase {
                Phase::Shadowing | Phase::Watching => self.judge.evidence(),
                _ => self.evidence.clone(),
            },
            settings: None,
            erased: None,
        }
    }

    fn progress(&self) -> f32 {
        let trial = self.trial();
        let share = |part: u32, of: u32| part as f32 / of.max(1) as f32;
        match self.phase {
            Phase::Fetching => self.fetched,
            Phase::Shadowing => share(self.judge.compared(), trial.shadow_frames).min(1.0),
            Phase::Watching => share(self.judge.frames(), trial.watch_frames).min(1.0),
            _ => 0.0,
        }
    }

    /// What makes a report worth sending: each change, and each tenth of the way.
    pub(super) fn news(&self) -> impl PartialEq + use<> {
        (
            self.phase,
            self.saved.revision(),
            self.loaded.as_ref().map(|release| release.digest),
            self.failure.as_ref().map(|failure| failure.reason),
            self.saved.bad.len(),
            (self.progress() * 10.0) as u8,
        )
    }
}

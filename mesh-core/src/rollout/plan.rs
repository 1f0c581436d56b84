//! The stages of a rollout.

use alloc::{vec, vec::Vec};

use serde::{Deserialize, Serialize};

/// What happens when a stage takes too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// Somebody has to look at it.
    #[default]
    Pause,
    /// Everybody goes back.
    Abort,
}

/// One stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stage {
    /// Devices that may have the target, in percent, above 0 and at most 100; at least one device.
    pub percent: f32,
    /// Seconds for which enough of them must have kept it.
    pub soak_s: u32,
    /// The share of them that is enough, of those that can be reached, above 0 and at most 1.
    pub keep: f32,
    /// Seconds for them to become enough.
    pub timeout_s: u32,
    /// What happens if they do not.
    pub on_timeout: OnTimeout,
}

impl Default for Stage {
    /// A device's own trial has shown most of what there is to see; five minutes more show what only time does. One
    /// device in ten may be busy, dark or slow without holding up the others. An hour is twice the longest
    /// default trial of a device.
    fn default() -> Self {
        Self {
            percent: 100.0,
            soak_s: 300,
            keep: 0.9,
            timeout_s: 3_600,
            on_timeout: OnTimeout::Pause,
        }
    }
}

impl Stage {
    pub(super) fn soak_ms(&self) -> u64 {
        u64::from(self.soak_s) * 1_000
    }

    pub(super) fn timeout_ms(&self) -> u64 {
        u64::from(self.timeout_s) * 1_000
    }
}

/// How a rollout goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// The stages, each with more devices than the one before.
    pub stages: Vec<Stage>,
    /// It is aborted when the target fails on more than this share of the exposed devices, 0..=1. Among the first
    /// `1 / max_failed` of them, 100 by default, one failure is one too many.
    pub max_failed: f32,
}

impl Default for Plan {
    /// 1, 10, 50 and 100 percent.
    fn default() -> Self {
        let stage = |percent| Stage {
            percent,
            ..Stage::default()
        };
        Self {
            stages: vec![stage(1.0), stage(10.0), stage(50.0), stage(100.0)],
            max_failed: 0.01,
        }
    }
}

/// Why a plan is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No stage, or too many.
    #[error("a plan has 1 to 20 stages")]
    Stages,
    /// A stage that is not larger than the one before.
    #[error("stage {0}: percent grows from stage to stage, from above 0 to at most 100")]
    Percent(usize),
    /// A share that is none.
    #[error("stage {0}: keep is above 0 and at most 1")]
    Keep(usize),
    /// The share of failures is none.
    #[error("max_failed is 0 to 1")]
    MaxFailed,
}

/// More stages than this are a mistake.
const MAX_STAGES: usize = 20;

impl Plan {
    /// Is it one?
    ///
    /// # Errors
    /// [`PlanError`] names the first mistake; stages are counted from 1.
    pub fn check(&self) -> Result<(), PlanError> {
        if !(1..=MAX_STAGES).contains(&self.stages.len()) {
            return Err(PlanError::Stages);
        }
        let mut before = 0.0;
        for (n, stage) in (1..).zip(&self.stages) {
            if !(stage.percent > before && stage.percent <= 100.0) {
                return Err(PlanError::Percent(n));
            }
            if !(stage.keep > 0.0 && stage.keep <= 1.0) {
                return Err(PlanError::Keep(n));
            }
            before = stage.percent;
        }
        if (0.0..=1.0).contains(&self.max_failed) {
            Ok(())
        } else {
            Err(PlanError::MaxFailed)
        }
    }

    pub(super) fn stage(&self, at: usize) -> Option<&Stage> {
        self.stages.get(at)
    }

    pub(super) fn last(&self) -> usize {
        self.stages.len().saturating_sub(1)
    }

    pub(super) fn is_everybody(&self, at: usize) -> bool {
        self.stage(at).is_some_and(|stage| stage.percent >= 100.0)
    }

    /// How many of so many devices may have the target.
    pub(super) fn allowed(&self, at: usize, devices: usize) -> usize {
        let percent = self.stage(at).map_or(0.0, |stage| f64::from(stage.percent));
        ((devices as f64 * percent / 100.0) as usize).clamp(1, devices.max(1))
    }

    /// On how many of so many exposed devices the target may fail.
    pub(super) fn may_fail(&self, exposed: usize) -> usize {
        // A hundredth is a little less than that in binary.
        (exposed.saturating_sub(1) as f64 * f64::from(self.max_failed) + 1e-3) as usize
    }
}

//! What goes into a [`Rollout`](super::Rollout) and what comes out.

use serde::{Deserialize, Serialize};

use crate::{Name, Phase, Reason, Release, Reported};

/// How far a device is with the target. What comes later in this list wins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing is known, or it is on its way, or held up by its circumstances.
    #[default]
    Trying,
    /// It runs the target for good.
    Kept,
    /// The target failed on it, and the target is to blame.
    Failed(Reason),
}

impl Outcome {
    /// What a report says about `target`, which was wished for in `revision`. A report of an earlier wish says nothing.
    #[must_use]
    pub fn of(reported: &Reported, target: &Release, revision: u64) -> Self {
        let digest = target.digest;
        if reported.revision < revision {
            return Self::Trying;
        }
        if let Some(bad) = reported.bad.iter().find(|bad| bad.digest == digest) {
            return Self::Failed(bad.failure.reason);
        }
        let loaded = reported
            .loaded
            .as_ref()
            .is_some_and(|release| release.digest == digest);
        if loaded && reported.phase == Phase::Settled {
            Self::Kept
        } else {
            Self::Trying
        }
    }
}

/// What an operator can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Expose nobody for now.
    Pause,
    /// Go on; the stage's time starts anew.
    Resume,
    /// Set everybody back, also when it was done already.
    Abort,
    /// Go to the next stage without waiting.
    NextStage,
    /// Go to the last stage without waiting.
    LastStage,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A device belongs to the group, or its reachability changed.
    Joined {
        /// Which.
        device: Name,
        /// Does it answer?
        reachable: bool,
        /// What it runs, or is set to, without this rollout. Counts the first time only.
        previous: Option<Release>,
    },
    /// A device does not belong to the group any more, or was pinned by hand.
    Left(Name),
    /// A device said how far it is.
    Report(Name, Outcome),
    /// An operator asks for something.
    Command(Command),
    /// Time has passed.
    Tick,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Wish the device this release: the target, or what it had before.
    Set {
        /// Which.
        device: Name,
        /// What.
        release: Option<Release>,
    },
    /// For the audit: it is in this status and stage from now on.
    Changed {
        /// The status.
        status: Status,
        /// The stage, counted from 0.
        stage: usize,
    },
}

/// Why a rollout stands still.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// An operator said so.
    Operator,
    /// The stage took too long.
    Timeout,
    /// The target failed on too many devices, last on this one.
    Failed {
        /// Which.
        device: Name,
        /// How.
        reason: Reason,
    },
}

/// What a rollout is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Exposing devices, stage by stage.
    Running,
    /// Exposing nobody until somebody says more. Too many failures still abort it.
    Paused(Why),
    /// All stages are passed. From here on each device takes care of itself.
    Done,
    /// Everybody is set back. There is no way out of this but another rollout.
    Aborted(Why),
}

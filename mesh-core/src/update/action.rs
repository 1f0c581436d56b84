//! What goes into an [`Update`](super::Update) and what comes out.

use alloc::{boxed::Box, vec::Vec};

use super::{Health, Said, Saved};
use crate::{Desired, Failure, Release};

/// What has happened since the machine was there last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// Nothing: it begins again within one life of the agent.
    SameLife,
    /// The agent has started anew. If its last life had no orderly end, it has died.
    SameBoot,
    /// The board has, or nobody knows. If the last life had no orderly end, the power went.
    NewBoot,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// The coordinator has spoken.
    Desired(Box<Desired>),
    /// The action with this ticket succeeded or failed. While a model runs this may come again, with what went wrong.
    Done {
        /// The action's ticket.
        ticket: u64,
        /// How it went.
        result: Result<(), Failure>,
    },
    /// How far the fetch with this ticket is, 0..=1.
    Progress {
        /// The action's ticket.
        ticket: u64,
        /// The share that is there.
        share: f32,
    },
    /// A frame went through the model or models that [`Action::Run`] with this ticket named.
    Frame {
        /// The action's ticket.
        ticket: u64,
        /// What the active model said.
        active: Said,
        /// What the one beside it said, if it looked too.
        beside: Option<Said>,
    },
    /// How the device is.
    Health(Health),
    /// The agent stops in good order: this start was no crash.
    Stopping,
    /// Time has passed.
    Tick,
}

/// Something to do. Answers carry the ticket; an answer with an old ticket changes nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Replace what is saved, atomically and durably, before anything that follows is done.
    Save(Box<Saved>),
    /// Bring the release document and its files to disk; what is there already is not brought again. Of fetch, verify and
    /// test only the latest counts: it ends those before it.
    Fetch {
        /// What.
        release: Release,
        /// For the answer.
        ticket: u64,
    },
    /// Check the metadata and every byte.
    Verify {
        /// What.
        release: Release,
        /// Also if it is older than what runs.
        force: bool,
        /// For the answer.
        ticket: u64,
    },
    /// Run the self-test, in a process of its own.
    Test {
        /// What.
        release: Release,
        /// For the answer.
        ticket: u64,
    },
    /// Have exactly these models in memory, swapping between two frames. Holds until the next `Run`. If `beside` cannot be
    /// loaded while it is on trial, that is the failure; while it is the old one, the new one runs alone.
    Run {
        /// The one whose results count; nothing where there is none.
        active: Option<Release>,
        /// The one that looks at a share of the frames for comparison.
        beside: Option<Release>,
        /// That share, 0..=1.
        share: f32,
        /// For the answer.
        ticket: u64,
    },
    /// Only these need to stay on disk. Whatever else is being fetched, verified or tested is ended.
    Retain(Vec<Release>),
    /// Say what is new: [`Update::report`](super::Update::report).
    Report,
}

//! What goes into an [`Adoption`](super::Adoption) and what comes out.

use alloc::{boxed::Box, collections::BTreeSet, vec::Vec};

use super::{Saved, Settings};
use crate::{Digest, Failure, Name};

/// How the agent does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The broker is there, now.
    pub connected: bool,
    /// Sources that have given a picture since the start, have come to their end, or wait for their trigger.
    pub sources: BTreeSet<Name>,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// The coordinator has spoken.
    Wish {
        /// Number of the wish.
        revision: u64,
        /// Nothing is the device's own files alone.
        settings: Option<Settings>,
    },
    /// The action with this ticket succeeded or failed.
    Done {
        /// The action's ticket.
        ticket: u64,
        /// How it went.
        result: Result<(), Failure>,
    },
    /// The agent runs with what was loaded.
    Running,
    /// How it does.
    Seen(Seen),
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
    /// Lay these settings over the device's own files, for this start.
    Load {
        /// Which; without any it cannot fail.
        settings: Option<Settings>,
        /// For the answer.
        ticket: u64,
    },
    /// Bring the document to disk, verified and checked against the device's own files.
    Fetch {
        /// Which.
        settings: Settings,
        /// For the answer.
        ticket: u64,
    },
    /// Stop the agent in good order and start it anew. Nothing follows.
    Restart,
    /// Only these documents need to stay on disk.
    Retain(Vec<Digest>),
    /// Say what is new: [`Adoption::report`](super::Adoption::report).
    Report,
}

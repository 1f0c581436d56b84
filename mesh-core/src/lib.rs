//! The vocabulary of Lacewing, shared by devices and the coordinator.
//!
//! Everything here is data or a pure state machine: inputs and `now` go in, values and actions come
//! out. There is no clock, no I/O and no async, so that each policy can be tested with any history.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod backoff;
pub mod decide;
pub mod delivery;
mod desired;
pub mod drift;
pub mod enrolment;
mod envelope;
mod erase;
mod event;
pub mod meeting;
mod name;
pub mod neighbours;
pub mod offload;
mod ranges;
mod release;
mod reported;
pub mod rollout;
pub mod roster;
mod sample;
pub mod sampling;
pub mod settings;
mod sighting;
pub mod split;
pub mod swarm;
#[cfg(test)]
mod testing;
mod topic;
pub mod update;
pub mod way;

pub use backoff::Backoff;
pub use desired::{Desired, Limits, Trial};
pub use envelope::{Ack, Info, Metrics, ModelInfo, Replay, State, Status, replay_bytes};
pub use erase::{Erase, Gone, MAX_ERASE};
pub use event::{
    Event, EventError, Gap, GapReason, MAX_EVENT_BYTES, Reading, Refused, fit_path, fit_share,
    fit_text,
};
pub use name::{Name, NameError};
pub use ranges::RangeSet;
pub use release::{Digest, DigestError, Release};
pub use reported::{
    Bad, Evidence, Failure, MAX_BAD, MAX_DETAIL, MAX_REASONS, Phase, Reason, Reported,
    SettingsReport,
};
pub use sample::{
    MAX_SAMPLE_BYTES, MAX_SAMPLE_EMBEDDING, MAX_SAMPLE_IMAGE_BYTES, Mark, Sample, SampleImage,
    SampleReason, entropy,
};
pub use settings::Settings;
pub use sighting::{MAX_WITNESSES, Sighting, Witness};
pub use topic::{Kind, ROOT, Topic, TopicError};

/// The version of every message on the wire. A message of another version is refused, never guessed at.
pub const VERSION: u8 = 1;

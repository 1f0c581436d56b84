//! What a device tells its neighbours about itself.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::{Digest, Name, roster::Peer};

/// Of one signed statement, envelope included: presence is small, or it is no presence.
pub const MAX_STATEMENT_BYTES: usize = 4 * 1024;
/// Addresses of one device: two networks, each twice.
const MAX_ADDRESSES: usize = 4;
/// The longest of them: a relayed one names two keys.
const MAX_ADDRESS: usize = 192;
/// Models that one device speaks of: loaded, kept to go back to, and on the way.
const MAX_MODELS: usize = 8;
/// Releases that one device fetches: one at a time, and the next one that takes its place.
const MAX_FETCHING: usize = 2;
/// The longest of their names, with a version.
const MAX_MODEL: usize = 128;
/// Kinds of accelerators in one device.
const MAX_ACCELERATORS: usize = 4;

/// Load moves by this many percent before it is worth a word.
const LOAD_STEP: u8 = 25;
/// Warmth, in degrees.
const WARMTH_STEP: i8 = 10;

/// What a device tells its neighbours about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// Where it can be reached: multiaddresses.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Of all its processors, in percent.
    #[serde(default)]
    pub load: u8,
    /// Of its processor, in °C.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmth: Option<i8>,
    /// Memory that is free, in MiB.
    #[serde(default)]
    pub free_mib: u32,
    /// The models in its memory, `name@version`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loaded: Vec<String>,
    /// The models on its disk, whole, that others may have from it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<Digest>,
    /// The releases that it is fetching, for those that fetch the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fetching: Vec<Digest>,
    /// Does it reach the coordinator by itself?
    #[serde(default)]
    pub uplink: bool,
    /// Does it look at frames of neighbours, if they ask?
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub answers: bool,
    /// What it has to compute faster with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accelerators: Vec<Name>,
}

impl Presence {
    /// Is it within bounds? A device that is not believes it can fill the memory of others.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        self.addresses.len() <= MAX_ADDRESSES
            && self.addresses.iter().all(|text| text.len() <= MAX_ADDRESS)
            && self.load <= 100
            && self.loaded.len() <= MAX_MODELS
            && self.loaded.iter().all(|text| text.len() <= MAX_MODEL)
            && self.holds.len() <= MAX_MODELS
            && self.fetching.len() <= MAX_FETCHING
            && self.accelerators.len() <= MAX_ACCELERATORS
    }

    /// The same, cut to what others take.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        self.addresses.retain(|text| text.len() <= MAX_ADDRESS);
        self.addresses.truncate(MAX_ADDRESSES);
        self.load = self.load.min(100);
        self.loaded.retain(|text| text.len() <= MAX_MODEL);
        self.loaded.truncate(MAX_MODELS);
        self.holds.truncate(MAX_MODELS);
        self.fetching.truncate(MAX_FETCHING);
        self.accelerators.truncate(MAX_ACCELERATORS);
        self
    }

    /// Would a neighbour act otherwise if it knew this instead of `said`? Numbers move all the time and have to move far; and
    /// they only say whom to ask first.
    #[must_use]
    pub fn news_after(&self, said: &Self) -> Option<News> {
        let far = self.load.abs_diff(said.load) >= LOAD_STEP
            || match (self.warmth, said.warmth) {
                (Some(now), Some(then)) => now.abs_diff(then) >= WARMTH_STEP.unsigned_abs(),
                (now, then) => now.is_some() != then.is_some(),
            }
            || self.free_mib / 2 >= said.free_mib.max(1)
            || self.free_mib < said.free_mib / 2;
        let other = self.addresses != said.addresses
            || self.loaded != said.loaded
            || self.holds != said.holds
            || self.fetching != said.fetching
            || self.uplink != said.uplink
            || self.answers != said.answers
            || self.accelerators != said.accelerators;
        if other {
            Some(News::Other)
        } else {
            far.then_some(News::Numbers)
        }
    }
}

/// What has changed about a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// How much it has to do, how warm it is, or how much memory is free: no more.
    Numbers,
    /// What it has, can or reaches.
    Other,
}

/// What somebody says about a device. Signed by whoever says it; carried by anybody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statement {
    /// Whom it is about.
    pub about: Peer,
    /// Its life: the greater one is the later one.
    pub life: u64,
    /// What the device said as its n-th in that life.
    pub seq: u64,
    /// What it says.
    pub said: Said,
}

/// What a [`Statement`] says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// "I am here." Only the device itself can say so.
    Here(Presence),
    /// "It is gone", since what it said as its `seq`-th. The device can answer by saying one more.
    Gone,
}

/// A statement and what proves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// What is said.
    pub statement: Statement,
    /// Who says it, by the signature that the envelope carries.
    pub by: Peer,
    /// The envelope, to be handed on as it is.
    pub envelope: Vec<u8>,
}

/// What travels between two neighbours.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "each is used up at once, none is kept"
)]
pub enum Frame {
    /// "I am alive."
    Beat,
    /// "Are you?" – answered by [`Frame::Beat`].
    Probe,
    /// What all that I know comes to: [`super::Neighbours::sum`]. Who comes to something else sends what he knows.
    Sum(u64),
    /// A statement.
    Tell(Signed),
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    #[test]
    fn news_is_what_somebody_would_act_on() {
        let said = Presence {
            load: 50,
            free_mib: 400,
            warmth: Some(50),
            ..Presence::default()
        };
        let with = |change: fn(&mut Presence)| {
            let mut now = said.clone();
            change(&mut now);
            now.news_after(&said)
        };
        let (numbers, other) = (Some(News::Numbers), Some(News::Other));
        assert_eq!(with(|_| {}), None);
        assert_eq!(with(|p| p.load = 70), None);
        assert_eq!(with(|p| p.load = 75), numbers);
        assert_eq!(with(|p| p.free_mib = 210), None);
        assert_eq!(with(|p| p.free_mib = 190), numbers);
        assert_eq!(with(|p| p.free_mib = 800), numbers);
        assert_eq!(with(|p| p.warmth = Some(59)), None);
        assert_eq!(with(|p| p.warmth = Some(40)), numbers);
        assert_eq!(with(|p| p.warmth = None), numbers);
        assert_eq!(with(|p| p.uplink = true), other);
        assert_eq!(with(|p| p.answers = true), other);
        assert_eq!(with(|p| p.holds = vec![Digest([1; 32])]), other);
        assert_eq!(with(|p| p.fetching = vec![Digest([1; 32])]), other);
    }

    #[test]
    fn what_is_too_large_is_seen_and_cut() {
        let large = Presence {
            addresses: vec![String::from("/ip4/1.2.3.4/tcp/1"); 9],
            load: 200,
            loaded: vec!["a".repeat(MAX_MODEL); 99],
            holds: vec![Digest([1; 32]); 99],
            fetching: vec![Digest([1; 32]); 99],
            accelerators: vec![Name::itself(); 9],
            ..Presence::default()
        };
        assert!(!large.is_bounded());
        let cut = large.bounded();
        assert!(cut.is_bounded());
        let statement = Statement {
            about: Digest([1; 32]),
            life: u64::MAX,
            seq: u64::MAX,
            said: Said::Here(Presence {
                addresses: vec!["a".repeat(MAX_ADDRESS); MAX_ADDRESSES],
                ..cut
            }),
        };
        let bytes = serde_json::to_vec(&statement).unwrap();
        // The envelope adds a key and a signature: below 300 bytes.
        assert!(bytes.len() + 300 < MAX_STATEMENT_BYTES, "{}", bytes.len());
    }
}

//! The same thing, seen by more than one camera of a site.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::{
    EventError, MAX_EVENT_BYTES, Name,
    event::{parse, within},
};

/// Witnesses that a message names; there may be more.
pub const MAX_WITNESSES: usize = 64;

/// Something that happened at a site, once, whoever saw it. Said by the coordinator on the site's `sighting`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sighting {
    /// Version of the message, [`VERSION`](crate::VERSION).
    pub v: u8,
    /// The same for all who saw it; 16 hexadecimal digits.
    pub id: String,
    /// What was seen: the readings' label.
    pub label: String,
    /// When it was first seen, milliseconds since 1970 by the clock of the device that saw it.
    pub from: i64,
    /// When it was last seen, as far as is known when this is said.
    pub to: i64,
    /// Who saw it, the first one first, at most [`MAX_WITNESSES`].
    pub witnesses: Vec<Witness>,
}

/// A source that saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Witness {
    /// The device.
    pub device: Name,
    /// Its camera.
    pub source: Name,
    /// When it first saw it, milliseconds since 1970.
    pub ts: i64,
    /// How sure it was at best, 0 to 1.
    pub score: f32,
    /// How many of its readings say so.
    pub readings: u32,
    /// The identity of the first of them: the life of the device's outbox …
    pub epoch: u64,
    /// … and the number in it.
    pub seq: u64,
}

impl Sighting {
    /// As JSON.
    ///
    /// # Errors
    /// If it is larger than any message may be.
    pub fn encode(&self) -> Result<Vec<u8>, EventError> {
        let bytes = serde_json::to_vec(self)?;
        within(bytes.len(), MAX_EVENT_BYTES)?;
        Ok(bytes)
    }

    /// From JSON.
    ///
    /// # Errors
    /// If it is too large or no sighting.
    pub fn decode(bytes: &[u8]) -> Result<Self, EventError> {
        within(bytes.len(), MAX_EVENT_BYTES)?;
        parse(bytes)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::VERSION;

    #[test]
    fn the_largest_one_is_a_message() {
        let name: Name = "a".repeat(40).parse().unwrap();
        let witness = Witness {
            device: name.clone(),
            source: name,
            ts: i64::MIN / 2_048,
            score: 0.123_456_79,
            readings: u32::MAX,
            epoch: 1 << 53,
            seq: 1 << 53,
        };
        let sighting = Sighting {
            v: VERSION,
            id: "0123456789abcdef".into(),
            label: "l".repeat(128),
            from: 1,
            to: 2,
            witnesses: vec![witness; MAX_WITNESSES],
        };
        let bytes = sighting.encode().unwrap();
        assert_eq!(Sighting::decode(&bytes).unwrap(), sighting);
    }
}

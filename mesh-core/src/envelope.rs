//! The other messages of the contract.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    MAX_EVENT_BYTES, Name, RangeSet, Reading, Refused, VERSION,
    event::{EventError, parse, within},
};

/// The largest batch of a replay in bytes: a QoS 1 message that a slow uplink (100 kbit/s) still sends
/// within a keep-alive.
const MAX_REPLAY_BYTES: usize = 256 * 1024;

/// A batch from the backlog. It never triggers an automation: subscribers that act listen to `result`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Replay {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// The readings, each as it would have been sent live.
    pub readings: Vec<Reading>,
}

impl Replay {
    /// Reads a batch that came on a topic of `device`, and checks each reading of it: one that cannot be used holds up none of
    /// the others.
    ///
    /// # Errors
    /// [`EventError`] if it is no batch at all.
    pub fn decode(
        bytes: &[u8],
        device: &Name,
    ) -> Result<Vec<Result<Reading, Refused>>, EventError> {
        /// The batch with its readings as they came.
        #[derive(Deserialize)]
        struct Raw<'a> {
            v: u8,
            #[serde(borrow)]
            readings: Vec<&'a RawValue>,
        }
        within(bytes.len(), MAX_REPLAY_BYTES)?;
        // At once where all is well, as it nearly always is.
        if let Ok(replay) = parse::<Self>(bytes)
            && replay.v == VERSION
            && replay
                .readings
                .iter()
                .all(|reading| reading.check(device).is_ok())
        {
            return Ok(replay.readings.into_iter().map(Ok).collect());
        }
        let raw: Raw<'_> = parse(bytes)?;
        if raw.v != VERSION {
            return Err(EventError::Version(raw.v));
        }
        let readings = raw.readings.into_iter();
        Ok(readings
            .map(|reading| Reading::take(reading.get().as_bytes(), device))
            .collect())
    }
}

/// Builds a batch from readings that are already encoded, as many as fit; says how many that were.
///
/// The bytes of each reading go in as they are: what lies in the outbox is what travels.
#[must_use]
pub fn replay_bytes(readings: &[&[u8]]) -> (Vec<u8>, usize) {
    const {
        assert!(
            MAX_EVENT_BYTES < MAX_REPLAY_BYTES / 2,
            "one reading always fits"
        )
    };
    let mut bytes = Vec::from(&b"{\"v\":1,\"readings\":["[..]);
    let mut taken = 0;
    for reading in readings {
        if bytes.len() + reading.len() + 3 > MAX_REPLAY_BYTES {
            break;
        }
        if taken > 0 {
            bytes.push(b',');
        }
        bytes.extend_from_slice(reading);
        taken += 1;
    }
    bytes.extend_from_slice(b"]}");
    (bytes, taken)
}

/// What the coordinator has stored of one outbox: everything up to `upto`, and `ranges` beyond it.
///
/// Sent after the database commit, cumulative and retained: one message says all, losing one is harmless.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// The life of the device's outbox.
    pub epoch: u64,
    /// Every reading from 1 to this one is stored or known to be missing; 0 is none.
    pub upto: u64,
    /// What is stored beyond that.
    #[serde(default, skip_serializing_if = "RangeSet::is_empty")]
    pub ranges: RangeSet,
}

/// The most ranges that one acknowledgement carries beyond `upto`: the lowest ones, since they hold up the
/// rest. What is not named is sent again and named then.
const MAX_ACK_RANGES: usize = 64;

impl Ack {
    /// What to say when `stored` is stored.
    #[must_use]
    pub fn of(epoch: u64, stored: &RangeSet) -> Self {
        let mut ranges = RangeSet::new();
        let mut upto = 0;
        for (from, to) in stored.iter().take(MAX_ACK_RANGES + 1) {
            if from <= 1 {
                upto = to;
            } else {
                ranges.insert(from, to);
            }
        }
        Self {
            v: VERSION,
            epoch,
            upto,
            ranges,
        }
    }

    /// All that is stored, as a set.
    #[must_use]
    pub fn stored(&self) -> RangeSet {
        let mut all = self.ranges.clone();
        all.insert(1, self.upto);
        all
    }

    /// The JSON that is sent.
    ///
    /// # Errors
    /// Never in practice: it holds only integers.
    pub fn encode(&self) -> Result<Vec<u8>, EventError> {
        Ok(serde_json::to_vec(self)?)
    }

    /// Reads an acknowledgement.
    ///
    /// # Errors
    /// [`EventError`] says what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, EventError> {
        within(bytes.len(), MAX_EVENT_BYTES)?;
        let ack: Self = parse(bytes)?;
        if ack.v == VERSION {
            Ok(ack)
        } else {
            Err(EventError::Version(ack.v))
        }
    }
}

/// Whether a device is there. On the wire the bare words `online` and `offline`, as home automation
/// expects of an availability topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Connected.
    Online,
    /// Said by the broker in the device's name when it is gone.
    Offline,
}

impl Status {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Offline => "offline",
        }
    }

    /// Reads the word.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        [Self::Online, Self::Offline]
            .into_iter()
            .find(|s| s.as_str().as_bytes() == bytes)
    }
}

/// What a device is. Retained on `info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// The version of the agent.
    pub agent: String,
    /// The board, as its profile names it.
    pub board: String,
    /// The processor's architecture, `aarch64` for example.
    pub arch: String,
    /// The cameras and sensors, separated by commas.
    pub sources: String,
    /// What people sort their devices by, separated by commas.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tags: String,
    /// The life of the device's outbox.
    pub epoch: u64,
    /// Where its neighbours reach it, `ADDRESS:PORT` separated by commas; empty where it has no mesh.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mesh: String,
}

/// The model that is in memory. Retained on `model`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// The bundle's name.
    pub name: String,
    /// The bundle's version.
    pub version: String,
    /// SHA-256 of the loaded model's bytes, in hexadecimal.
    pub sha256: String,
    /// The task: `classify` or `embed`.
    pub task: String,
    /// The labels, separated by commas; empty for an embedding.
    pub labels: String,
}

/// How a device is. Retained on `state`, sent when it changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// When it became so, by the device's clock: milliseconds since the Unix epoch.
    pub ts: i64,
    /// `ok`, `no_model` or `no_source`.
    pub health: String,
    /// What is wrong, in words; empty where nothing is. Pins that do not work are named here only.
    pub detail: String,
}

/// Flat numbers about a device, on `metrics` at QoS 0.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// When it was measured, by the device's clock: milliseconds since the Unix epoch.
    pub ts: i64,
    /// Seconds since the agent started.
    pub uptime_s: u64,
    /// Frames captured since the start.
    pub frames: u64,
    /// Frames that could not be read or decoded.
    pub frames_bad: u64,
    /// Frames that the gate held back.
    pub frames_gated: u64,
    /// Readings made durable since the start.
    pub readings: u64,
    /// Readings that wait for the coordinator's acknowledgement.
    pub backlog: u64,
    /// Bytes that the outbox takes on disk.
    pub outbox_bytes: u64,
    /// Readings that had to be dropped and whose gap the coordinator does not know yet.
    pub gaps_pending: u64,
    /// Connections to the broker that were lost since the start.
    pub reconnects: u64,
    /// Tries to connect to the broker that came to nothing, since the start: nobody there, no answer, or refused.
    #[serde(default)]
    pub connect_failures: u64,
    /// Times that the outbox could not be written, read or freed, since the start. Nothing is lost by it: it is tried again.
    #[serde(default)]
    pub store_errors: u64,
    /// Readings with a text that was cut or a number that was brought into its range, since the start.
    #[serde(default)]
    pub readings_cut: u64,
    /// Messages that could not be used since the start.
    pub refused: u64,
    /// Moving average of the time from frame to result, in milliseconds.
    pub latency_ms: f32,
    /// Resident memory of the agent in bytes; 0 where it cannot be read.
    pub rss_bytes: u64,
    /// Frames kept because somebody said that the result was wrong, since the start.
    #[serde(default)]
    pub samples_wrong: u64,
    /// Frames kept because somebody said that something was missed, since the start.
    #[serde(default)]
    pub samples_missed: u64,
    /// Frames kept because the model was not sure, since the start.
    #[serde(default)]
    pub samples_uncertain: u64,
    /// Frames kept because they look like nothing in training, since the start.
    #[serde(default)]
    pub samples_novel: u64,
    /// Frames kept by lot, since the start.
    #[serde(default)]
    pub samples_random: u64,
    /// Frames kept because a model on trial contradicted the one that runs, since the start.
    #[serde(default)]
    pub samples_disputed: u64,
    /// Frames that should have been kept and were not: too fast, or no room.
    #[serde(default)]
    pub samples_dropped: u64,
    /// Samples that the coordinator has taken since the start.
    #[serde(default)]
    pub samples_sent: u64,
    /// Samples that the coordinator has refused for good since the start.
    #[serde(default)]
    pub samples_refused: u64,
    /// Samples on the device that wait to be sent.
    #[serde(default)]
    pub samples_waiting: u64,
    /// Sources that see something else than they should.
    #[serde(default)]
    pub drifting: u64,
    /// Bytes that came for new models, since the start.
    #[serde(default)]
    pub update_bytes: u64,
    /// Days until the device's certificate expires, below zero once it has. Not there where it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_days: Option<f32>,
}

/// Parses the flat messages, each bounded and of this version.
macro_rules! flat {
    ($($kind:ty),*) => {$(
        impl $kind {
            /// The JSON that is sent.
            ///
            /// # Errors
            /// If a number cannot be written as JSON.
            pub fn encode(&self) -> Result<Vec<u8>, EventError> {
                Ok(serde_json::to_vec(self)?)
            }

            /// Reads the message.
            ///
            /// # Errors
            /// [`EventError`] says what is wrong with it.
            pub fn decode(bytes: &[u8]) -> Result<Self, EventError> {
                within(bytes.len(), MAX_EVENT_BYTES)?;
                let message: Self = parse(bytes)?;
                if message.v == VERSION { Ok(message) } else { Err(EventError::Version(message.v)) }
            }
        }
    )*};
}
flat!(Info, ModelInfo, State, Metrics);

#[cfg(test)]
mod tests {
    use alloc::{format, string::ToString, vec};

    use super::*;

    #[test]
    fn a_batch_takes_what_fits_and_reads_back() {
        let one = |seq: u64| {
            format!(
                r#"{{"v":1,"device":"d1","source":"_","epoch":1,"seq":{seq},"ts":0,"frame":{seq},"label":"{}","score":1.0,"margin":1.0,"model":"m@1","latency_ms":0.0}}"#,
                "x".repeat(200)
            )
            .into_bytes()
        };
        let readings: Vec<_> = (1..=2_000).map(one).collect();
        let views: Vec<&[u8]> = readings.iter().map(Vec::as_slice).collect();
        let (bytes, taken) = replay_bytes(&views);
        assert!(taken > 100 && taken < 2_000 && bytes.len() <= MAX_REPLAY_BYTES);
        let replay = Replay::decode(&bytes, &"d1".parse().unwrap()).unwrap();
        assert!(replay.len() == taken && replay.iter().all(Result::is_ok));
        let foreign = Replay::decode(&bytes, &"d2".parse().unwrap()).unwrap();
        let kept = |r: &Result<Reading, Refused>| r.as_ref().is_err_and(|r| r.gap.is_none());
        assert!(foreign.iter().all(kept), "a gap of somebody else's");
        assert_eq!(replay_bytes(&[]).1, 0);
    }

    /// Whatever is wrong with one reading, those beside it are taken, and it is known which one it was.
    #[test]
    fn one_bad_reading_holds_up_no_other() {
        let one = |seq: u64, score: &str, file: usize| {
            let file = "x".repeat(file);
            format!(
                r#"{{"v":1,"device":"d1","source":"_","epoch":1,"seq":{seq},"ts":0,"frame":{seq},"label":"a","score":{score},"margin":1.0,"model":"m@1","latency_ms":0.0,"file":"{file}"}}"#
            )
            .into_bytes()
        };
        let readings = [
            one(1, "0.5", 9),
            one(2, "1.5", 9),
            one(3, "null", 9),
            one(4, "0.5", 257),
            one(5, "0.5", 256),
        ];
        let views: Vec<&[u8]> = readings.iter().map(Vec::as_slice).collect();
        let (bytes, _) = replay_bytes(&views);
        let replay = Replay::decode(&bytes, &"d1".parse().unwrap()).unwrap();
        let said: Vec<_> = replay
            .into_iter()
            .map(|reading| match reading {
                Ok(reading) => (reading.seq, true),
                Err(refused) => (refused.gap.map_or(0, |gap| gap.from), false),
            })
            .collect();
        assert_eq!(
            said,
            [(1, true), (2, false), (3, false), (4, false), (5, true)]
        );
        for bad in [
            &b"{\"v\":2,\"readings\":[]}"[..],
            b"{\"v\":1,\"readings\":7}",
            b"{\"v\":1,\"readings\":[",
        ] {
            assert!(Replay::decode(bad, &"d1".parse().unwrap()).is_err());
        }
    }

    #[test]
    fn an_acknowledgement_says_what_is_stored() {
        let mut stored = RangeSet::new();
        stored.insert(1, 40);
        stored.insert(50, 60);
        let ack = Ack::of(9, &stored);
        assert_eq!(
            core::str::from_utf8(&ack.encode().unwrap()).unwrap(),
            r#"{"v":1,"epoch":9,"upto":40,"ranges":[[50,60]]}"#
        );
        assert_eq!(
            Ack::decode(&ack.encode().unwrap()).unwrap().stored(),
            stored
        );
        assert_eq!(Ack::of(9, &RangeSet::new()).stored(), RangeSet::new());
        // Without the beginning, nothing is claimed of it.
        let mut late = RangeSet::new();
        late.insert(5, 6);
        assert_eq!(
            (Ack::of(9, &late).upto, Ack::of(9, &late).stored()),
            (0, late)
        );
        // A shattered set is named in part, the lowest first.
        let mut shattered = RangeSet::new();
        (0..500).for_each(|n| shattered.insert(n * 2 + 1, n * 2 + 1));
        let said = Ack::of(9, &shattered).stored();
        assert!(
            said.pieces() <= MAX_ACK_RANGES + 1
                && said.contains(1)
                && said.iter().all(|(a, b)| shattered.covers(a, b))
        );
    }

    #[test]
    fn words_and_versions() {
        assert_eq!(Status::decode(b"online"), Some(Status::Online));
        assert_eq!(Status::decode(b"Online"), None);
        assert!(
            Metrics::decode(b"{\"v\":7}")
                .unwrap_err()
                .to_string()
                .contains("version 7")
        );
        let broken = vec![b'['; 10_000];
        assert!(Info::decode(&broken).is_err());
    }
}

//! A frame worth learning from, and what was said about it.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::{
    EventError, MAX_EVENT_BYTES, Name, VERSION,
    event::{parse, within},
};

/// The largest encoded sample in bytes, without its image: an embedding of 4,096 values and the rest.
pub const MAX_SAMPLE_BYTES: usize = 64 * 1024;
/// The most values of a sample's embedding.
pub const MAX_SAMPLE_EMBEDDING: usize = 4_096;
/// The largest image of a sample in bytes.
pub const MAX_SAMPLE_IMAGE_BYTES: u64 = 8 * 1024 * 1024;

/// One frame that the device kept, with its lineage. The image travels after it, on its own.
///
/// Identity is that of the reading: (`device`, `epoch`, `seq`). Sending it again is always safe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// The device that looked.
    pub device: Name,
    /// The camera on it.
    pub source: Name,
    /// The life of the device's outbox.
    pub epoch: u64,
    /// The number of the reading in its epoch.
    pub seq: u64,
    /// When the frame was captured, by the device's clock: milliseconds since the Unix epoch.
    pub ts: i64,
    /// Why it was kept.
    pub reason: SampleReason,
    /// What the model said, also below its threshold.
    pub label: String,
    /// How sure the model was, 0..=1.
    pub score: f32,
    /// How far the best class lay before the second, 0..=1.
    pub margin: f32,
    /// Shannon entropy of the scores divided by its largest possible value, 0..=1.
    pub entropy: f32,
    /// Distance of the embedding from what training saw, 1 where 99 of 100 training images were nearer;
    /// nothing where the model's bundle does not say what it saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub novelty: Option<f32>,
    /// The model that said it: `name@version`.
    pub model: String,
    /// The model's embedding of the frame; may be empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub embedding: Vec<f32>,
    /// The file that the frame came from, where it came from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The image; nothing where only the embedding is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<SampleImage>,
}

/// The image of a sample: as it will be sent, without any metadata of the camera's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleImage {
    /// SHA-256 of the file in lower-case hex.
    pub sha256: String,
    /// Its length, 1..=[`MAX_SAMPLE_IMAGE_BYTES`].
    pub bytes: u64,
}

/// Why a frame was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SampleReason {
    /// Somebody said that the result was wrong.
    Wrong,
    /// Somebody said that there was something to see.
    Missed,
    /// The model was not sure.
    Uncertain,
    /// It looks like nothing that training saw.
    Novel,
    /// Drawn by lot, whatever the model said: what accuracy and drift can be estimated from.
    Random,
    /// A model on trial said something else than the one that runs.
    Disputed,
}

impl SampleReason {
    /// Every reason, what people said first.
    pub const ALL: [Self; 6] = [
        Self::Wrong,
        Self::Missed,
        Self::Uncertain,
        Self::Novel,
        Self::Random,
        Self::Disputed,
    ];

    /// As it stands in messages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wrong => "wrong",
            Self::Missed => "missed",
            Self::Uncertain => "uncertain",
            Self::Novel => "novel",
            Self::Random => "random",
            Self::Disputed => "disputed",
        }
    }
}

impl Sample {
    /// Reads and checks one.
    ///
    /// # Errors
    /// If it is too large, no sample, of another version, or has a value out of its range.
    pub fn decode(bytes: &[u8]) -> Result<Self, EventError> {
        if bytes.len() > MAX_SAMPLE_BYTES {
            return Err(EventError::TooLarge {
                size: bytes.len(),
                most: MAX_SAMPLE_BYTES,
            });
        }
        let sample: Self = serde_json::from_slice(bytes)?;
        sample.check()?;
        Ok(sample)
    }

    /// Checks every value.
    ///
    /// # Errors
    /// The first that is out of its range.
    pub fn check(&self) -> Result<(), EventError> {
        /// Numbers above are not exact in JSON (RFC 8259, section 6).
        const MOST: u64 = (1 << 53) - 1;
        /// The longest text in bytes.
        const TEXT: usize = 1_000;
        let share = |value: f32| (0.0..=1.0).contains(&value);
        let of_range = |value: u64| (1..=MOST).contains(&value);
        let checks = [
            (
                of_range(self.epoch) && of_range(self.seq),
                "epoch and seq are 1 to 2⁵³ − 1",
            ),
            (self.ts.unsigned_abs() <= MOST, "ts is at most 2⁵³ − 1"),
            (
                share(self.score) && share(self.margin) && share(self.entropy),
                "score, margin and entropy are 0 to 1",
            ),
            (
                self.novelty
                    .is_none_or(|novelty| novelty.is_finite() && novelty >= 0.0),
                "novelty is not negative",
            ),
            (
                self.embedding.len() <= MAX_SAMPLE_EMBEDDING
                    && self.embedding.iter().all(|value| value.is_finite()),
                "the embedding has at most 4,096 values, all finite",
            ),
            (
                self.label.len() <= TEXT
                    && self.model.len() <= TEXT
                    && self.file.as_ref().is_none_or(|file| file.len() <= TEXT),
                "label, model and file have at most 1,000 bytes",
            ),
            (
                self.image.as_ref().is_none_or(|image| {
                    (1..=MAX_SAMPLE_IMAGE_BYTES).contains(&image.bytes)
                        && image.sha256.len() == 64
                        && image
                            .sha256
                            .bytes()
                            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
                }),
                "image has a sha256 of 64 lower-case hex digits and 1 to 8,388,608 bytes",
            ),
            (
                self.image.is_some() || !self.embedding.is_empty(),
                "a sample has an image, an embedding or both",
            ),
        ];
        if self.v != VERSION {
            return Err(EventError::Version(self.v));
        }
        match checks.into_iter().find(|(fine, _)| !fine) {
            Some((_, why)) => Err(EventError::Value(why)),
            None => Ok(()),
        }
    }
}

/// How unsure scores are: Shannon entropy over its largest possible value, 0..=1; 0 for fewer than two.
#[must_use]
pub fn entropy(scores: &[f32]) -> f32 {
    if scores.len() < 2 {
        return 0.0;
    }
    let sum: f32 = scores
        .iter()
        .filter(|score| **score > 0.0)
        .map(|score| -score * libm::logf(*score))
        .sum();
    (sum / libm::logf(scores.len() as f32)).clamp(0.0, 1.0)
}

/// Somebody's word on what a source has just reported. Not retained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// [`SampleReason::Wrong`] or [`SampleReason::Missed`].
    pub mark: SampleReason,
}

impl Mark {
    /// Reads and checks one.
    ///
    /// # Errors
    /// If it is too large, no mark, of another version, or says what only the device can know.
    pub fn decode(bytes: &[u8]) -> Result<Self, EventError> {
        within(bytes.len(), MAX_EVENT_BYTES)?;
        let mark: Self = parse(bytes)?;
        if mark.v != VERSION {
            return Err(EventError::Version(mark.v));
        }
        match mark.mark {
            SampleReason::Wrong | SampleReason::Missed => Ok(mark),
            _ => Err(EventError::Value("mark is wrong or missed")),
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::{string::ToString, vec};

    use super::*;

    fn sample() -> Sample {
        Sample {
            v: VERSION,
            device: "d1".parse().unwrap(),
            source: "cam0".parse().unwrap(),
            epoch: 77,
            seq: 3,
            ts: 1_700_000_000_123,
            reason: SampleReason::Uncertain,
            label: "scratch".into(),
            score: 0.5,
            margin: 0.25,
            entropy: 0.75,
            novelty: Some(1.5),
            model: "steel@1.0.0".into(),
            embedding: vec![0.5, -1.0],
            file: None,
            image: Some(SampleImage {
                sha256: "ab".repeat(32),
                bytes: 1_000,
            }),
        }
    }

    #[test]
    fn as_it_travels() {
        let golden = alloc::format!(
            r#"{{"v":1,"device":"d1","source":"cam0","epoch":77,"seq":3,"ts":1700000000123,"reason":"uncertain","label":"scratch","score":0.5,"margin":0.25,"entropy":0.75,"novelty":1.5,"model":"steel@1.0.0","embedding":[0.5,-1.0],"image":{{"sha256":"{}","bytes":1000}}}}"#,
            "ab".repeat(32)
        );
        assert_eq!(serde_json::to_string(&sample()).unwrap(), golden);
        assert_eq!(Sample::decode(golden.as_bytes()).unwrap(), sample());
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let refuse = |change: fn(&mut Sample), part: &str| {
            let mut sample = sample();
            change(&mut sample);
            let error = sample.check().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        refuse(|s| s.v = 9, "version 9");
        refuse(|s| s.seq = 0, "seq");
        refuse(|s| s.score = f32::NAN, "score");
        refuse(|s| s.entropy = 1.5, "entropy");
        refuse(|s| s.novelty = Some(f32::INFINITY), "novelty");
        refuse(|s| s.embedding = vec![f32::NAN], "embedding");
        refuse(|s| s.embedding = vec![0.0; 4_097], "embedding");
        refuse(|s| s.label = "x".repeat(1_001), "label");
        refuse(|s| s.image.as_mut().unwrap().bytes = 0, "image");
        refuse(
            |s| s.image.as_mut().unwrap().sha256 = "../etc".into(),
            "image",
        );
        refuse(
            |s| {
                s.image = None;
                s.embedding.clear();
            },
            "image",
        );
        assert!(Sample::decode(&vec![b' '; MAX_SAMPLE_BYTES + 1]).is_err());
    }

    #[test]
    fn entropy_is_a_share() {
        assert!(entropy(&[1.0, 0.0, 0.0]) < 1e-6);
        assert!((entropy(&[0.25; 4]) - 1.0).abs() < 1e-6);
        assert!(entropy(&[0.9, 0.1]) < entropy(&[0.6, 0.4]));
        assert!(entropy(&[1.0]).abs() < 1e-6);
    }

    #[test]
    fn marks_say_what_people_can_know() {
        let mark = Mark::decode(br#"{"v":1,"mark":"wrong"}"#).unwrap();
        assert_eq!(mark.mark, SampleReason::Wrong);
        for bad in [
            &br#"{"v":1,"mark":"random"}"#[..],
            br#"{"v":2,"mark":"wrong"}"#,
            b"wrong",
            &[b' '; 100_000],
        ] {
            assert!(Mark::decode(bad).is_err());
        }
    }
}

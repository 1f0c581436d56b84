//! What a device says happened. What lies in the outbox is what travels and what is ingested.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::{Name, VERSION};

/// The largest encoded reading in bytes. A reading is flat scalars; this leaves room for some hundred
/// detections and stays below every broker's default payload limit.
pub const MAX_EVENT_BYTES: usize = 16 * 1024;

/// One reading: what a model said about one frame. Flat, so that any subscriber can use it.
///
/// Identity is (`device`, `epoch`, `seq`): resending is always safe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// The device that looked.
    pub device: Name,
    /// The camera or sensor on it.
    pub source: Name,
    /// The life of the device's outbox: a random number below 2⁵³, drawn when the outbox was made.
    pub epoch: u64,
    /// The number of the reading in its epoch: 1, 2, 3, …
    pub seq: u64,
    /// When the frame was captured, by the device's clock: milliseconds since the Unix epoch.
    pub ts: i64,
    /// The number of the frame at its source.
    pub frame: u64,
    /// The class, or `unknown` where the model is not sure enough.
    pub label: String,
    /// How sure the model is, 0..=1.
    pub score: f32,
    /// How far the best class lies before the second, 0..=1.
    pub margin: f32,
    /// The model that said it: `name@version`.
    pub model: String,
    /// From the frame in memory to its result, in milliseconds, the way to a neighbour and back included.
    pub latency_ms: f32,
    /// The neighbour whose `model` said it, `_` for the coordinator; none where the device has computed it itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<Name>,
    /// The file that the frame came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// What the frame really shows, where the source knows (a labelled folder, the synthetic camera).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truth: Option<String>,
}

/// Readings that had to be dropped, all of one outbox: `from..=to`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// The device that dropped them.
    pub device: Name,
    /// The life of the device's outbox.
    pub epoch: u64,
    /// The first that is missing.
    pub from: u64,
    /// The last that is missing.
    pub to: u64,
    /// Why.
    pub reason: GapReason,
}

/// Why readings were dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GapReason {
    /// The outbox had reached its bound, or the disk was full: the oldest had to go.
    Full,
    /// The store was damaged. `to` is an upper bound: how many of them existed cannot be known.
    Corrupt,
    /// The coordinator could not use it and never will: trying again would mend nothing. Said by the coordinator only.
    Refused,
}

impl GapReason {
    /// As it stands in messages and file names.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Corrupt => "corrupt",
            Self::Refused => "refused",
        }
    }
}

/// Either of the two things that an outbox holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A reading.
    Reading(Reading),
    /// Readings that are missing.
    Gap(Gap),
}

/// A reading that cannot be used, while those beside it can.
#[derive(Debug)]
pub struct Refused {
    /// What is wrong with it.
    pub error: EventError,
    /// The gap that it leaves, where it is refused for good and says which one it is. Without, the device keeps it: a
    /// coordinator of another version or a device under its old name may still be able to use it.
    pub gap: Option<Gap>,
}

/// Why bytes are not a reading or a gap.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// Refused before parsing.
    #[error("{size} bytes, the most is {most}")]
    TooLarge {
        /// What came.
        size: usize,
        /// The bound.
        most: usize,
    },
    /// Not JSON, or not of this shape.
    #[error("not a message of this kind: {0}")]
    Json(#[from] serde_json::Error),
    /// Another version of the contract.
    #[error("version {0} of the message, this speaks {VERSION}")]
    Version(u8),
    /// The message names another device than its topic.
    #[error("the message is from {0}, its topic belongs to {1}")]
    Device(Name, Name),
    /// A number out of its range, or a text too long.
    #[error("{0}")]
    Value(&'static str),
}

/// Numbers that JSON readers everywhere keep exactly (RFC 8259, section 6).
pub(crate) const MAX_JSON_INTEGER: u64 = (1 << 53) - 1;
/// A label, a model or a file name is for people to read.
const MAX_TEXT: usize = 256;
/// Stands for what was cut off.
const CUT: &str = "…";

/// Makes a text of a reading as short as it must be; true if something was cut off.
pub fn fit_text(text: &mut String) -> bool {
    if text.len() <= MAX_TEXT {
        return false;
    }
    let end = text.floor_char_boundary(MAX_TEXT - CUT.len());
    text.truncate(end);
    text.push_str(CUT);
    true
}

/// The same of a path, of which the end says most.
pub fn fit_path(path: &mut String) -> bool {
    if path.len() <= MAX_TEXT {
        return false;
    }
    let start = path.ceil_char_boundary(path.len() - (MAX_TEXT - CUT.len()));
    path.replace_range(..start, CUT);
    true
}

/// Makes a score or a margin lie where it must, 0..=1; what is no number says nothing: 0. True if it was changed.
pub fn fit_share(share: &mut f32) -> bool {
    let fits = (0.0..=1.0).contains(share);
    if !fits {
        // `max` takes the other one where one is no number.
        *share = if share.is_nan() {
            0.0
        } else {
            share.clamp(0.0, 1.0)
        };
    }
    !fits
}

impl Reading {
    /// The compact JSON that is stored and sent. What is encoded can be decoded: it is checked here as it will be there, so that
    /// nothing becomes durable on a device that a coordinator refuses for good.
    ///
    /// # Errors
    /// As [`Reading::check`], or if the result is larger than [`MAX_EVENT_BYTES`].
    pub fn encode(&self) -> Result<Vec<u8>, EventError> {
        self.check(&self.device)?;
        let bytes = serde_json::to_vec(self)?;
        within(bytes.len(), MAX_EVENT_BYTES)?;
        Ok(bytes)
    }

    /// Reads and checks a reading that came on a topic of `device`.
    ///
    /// # Errors
    /// [`EventError`] says what is wrong with it; nothing of it is to be used then.
    pub fn decode(bytes: &[u8], device: &Name) -> Result<Self, EventError> {
        within(bytes.len(), MAX_EVENT_BYTES)?;
        let reading: Self = parse(bytes)?;
        reading.check(device)?;
        Ok(reading)
    }

    /// The same, and what follows where it cannot be used.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn take(bytes: &[u8], device: &Name) -> Result<Self, Refused> {
        Self::decode(bytes, device).map_err(|error| Refused::of(error, bytes, device))
    }

    /// Checks the values of a reading that was parsed as part of something larger.
    ///
    /// # Errors
    /// As [`Reading::decode`].
    pub fn check(&self, device: &Name) -> Result<(), EventError> {
        if self.v != VERSION {
            return Err(EventError::Version(self.v));
        }
        if self.device != *device {
            return Err(EventError::Device(self.device.clone(), device.clone()));
        }
        check_identity(self.epoch, self.seq, self.seq)?;
        let texts = [
            Some(&self.label),
            Some(&self.model),
            self.file.as_ref(),
            self.truth.as_ref(),
        ];
        if texts.into_iter().flatten().any(|t| t.len() > MAX_TEXT) {
            return Err(EventError::Value("a text has at most 256 bytes"));
        }
        if self.label.is_empty() || self.model.is_empty() {
            return Err(EventError::Value("label and model are not empty"));
        }
        if !(0.0..=1.0).contains(&self.score) || !(0.0..=1.0).contains(&self.margin) {
            return Err(EventError::Value("score and margin lie between 0 and 1"));
        }
        if !self.latency_ms.is_finite() || self.latency_ms < 0.0 {
            return Err(EventError::Value("latency_ms is not negative"));
        }
        Ok(())
    }
}

impl Refused {
    /// What follows from an error in the bytes of one reading.
    fn of(error: EventError, bytes: &[u8], device: &Name) -> Self {
        #[derive(Deserialize)]
        struct Identity {
            epoch: u64,
            seq: u64,
        }
        let for_good = match error {
            // Too large to look for anything in it.
            EventError::TooLarge { .. } | EventError::Version(_) | EventError::Device(..) => false,
            EventError::Json(_) | EventError::Value(_) => true,
        };
        let gap = Some(bytes)
            .filter(|_| for_good)
            .and_then(|bytes| serde_json::from_slice(bytes).ok())
            .filter(|Identity { epoch, seq }| check_identity(*epoch, *seq, *seq).is_ok())
            .map(|Identity { epoch, seq }| Gap {
                v: VERSION,
                device: device.clone(),
                epoch,
                from: seq,
                to: seq,
                reason: GapReason::Refused,
            });
        Self { error, gap }
    }
}

impl Gap {
    /// The compact JSON that is sent.
    ///
    /// # Errors
    /// Never in practice: it holds only integers and names.
    pub fn encode(&self) -> Result<Vec<u8>, EventError> {
        Ok(serde_json::to_vec(self)?)
    }

    /// Reads and checks a gap that came on a topic of `device`.
    ///
    /// # Errors
    /// [`EventError`] says what is wrong with it.
    pub fn decode(bytes: &[u8], device: &Name) -> Result<Self, EventError> {
        within(bytes.len(), MAX_EVENT_BYTES)?;
        let gap: Self = parse(bytes)?;
        if gap.v != VERSION {
            return Err(EventError::Version(gap.v));
        }
        if gap.device != *device {
            return Err(EventError::Device(gap.device, device.clone()));
        }
        check_identity(gap.epoch, gap.from, gap.to)?;
        Ok(gap)
    }
}

fn check_identity(epoch: u64, from: u64, to: u64) -> Result<(), EventError> {
    if epoch > MAX_JSON_INTEGER || to > MAX_JSON_INTEGER {
        return Err(EventError::Value("epoch and seq are below 2^53"));
    }
    if from == 0 || from > to {
        return Err(EventError::Value(
            "seq counts from 1, and a gap ends after it starts",
        ));
    }
    Ok(())
}

pub(crate) fn within(size: usize, most: usize) -> Result<(), EventError> {
    if size > most {
        Err(EventError::TooLarge { size, most })
    } else {
        Ok(())
    }
}

/// Parses, and names the version where that is what is wrong: a later version may have another shape.
pub(crate) fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, EventError> {
    #[derive(Deserialize)]
    struct OnlyVersion {
        v: u8,
    }
    serde_json::from_slice(bytes).map_err(|error| {
        match serde_json::from_slice::<OnlyVersion>(bytes) {
            Ok(OnlyVersion { v }) if v != VERSION => EventError::Version(v),
            _ => EventError::Json(error),
        }
    })
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    fn reading() -> Reading {
        Reading {
            v: VERSION,
            device: "d1".parse().unwrap(),
            source: "cam0".parse().unwrap(),
            epoch: 77,
            seq: 3,
            ts: 1_700_000_000_123,
            frame: 12,
            label: "scratch".into(),
            score: 0.875,
            margin: 0.5,
            model: "conveyor@1.0.0".into(),
            latency_ms: 4.5,
            by: None,
            file: None,
            truth: Some("scratch".into()),
        }
    }

    /// What is written here is what other people's programs read: a change is a new version.
    #[test]
    fn the_bytes_of_a_reading_are_the_contract() {
        let golden = r#"{"v":1,"device":"d1","source":"cam0","epoch":77,"seq":3,"ts":1700000000123,"frame":12,"label":"scratch","score":0.875,"margin":0.5,"model":"conveyor@1.0.0","latency_ms":4.5,"truth":"scratch"}"#;
        let bytes = reading().encode().unwrap();
        assert_eq!(core::str::from_utf8(&bytes).unwrap(), golden);
        assert_eq!(
            Reading::decode(&bytes, &"d1".parse().unwrap()).unwrap(),
            reading()
        );
    }

    #[test]
    fn a_reading_says_who_has_computed_it() {
        let by = Reading {
            by: Some("box".parse().unwrap()),
            ..reading()
        };
        let golden = r#"{"v":1,"device":"d1","source":"cam0","epoch":77,"seq":3,"ts":1700000000123,"frame":12,"label":"scratch","score":0.875,"margin":0.5,"model":"conveyor@1.0.0","latency_ms":4.5,"by":"box","truth":"scratch"}"#;
        let bytes = by.encode().unwrap();
        assert_eq!(core::str::from_utf8(&bytes).unwrap(), golden);
        assert_eq!(Reading::decode(&bytes, &"d1".parse().unwrap()).unwrap(), by);
    }

    #[test]
    fn refuses_with_a_reason() {
        let device: Name = "d1".parse().unwrap();
        let refuse = |change: &dyn Fn(&mut Reading), word: &str| {
            let mut bad = reading();
            change(&mut bad);
            let error = Reading::decode(&serde_json::to_vec(&bad).unwrap(), &device)
                .unwrap_err()
                .to_string();
            assert!(error.contains(word), "{error}");
        };
        refuse(&|r| r.v = 2, "version 2");
        refuse(&|r| r.device = "d2".parse().unwrap(), "belongs to d1");
        refuse(&|r| r.seq = 0, "from 1");
        refuse(&|r| r.epoch = 1 << 53, "2^53");
        refuse(&|r| r.score = 1.5, "score");
        refuse(&|r| r.latency_ms = -1.0, "latency");
        refuse(&|r| r.label = "x".repeat(300), "256");
        let mut bad = reading();
        bad.file = Some("x".repeat(300));
        assert!(bad.encode().is_err(), "encoded what nobody decodes");
        let too_large = [b' '; MAX_EVENT_BYTES + 1];
        assert!(matches!(
            Reading::decode(&too_large, &device),
            Err(EventError::TooLarge { .. })
        ));
        assert!(matches!(
            Reading::decode(b"{\"v\":9}", &device),
            Err(EventError::Version(9))
        ));
        assert!(matches!(
            Reading::decode(b"[[[[", &device),
            Err(EventError::Json(_))
        ));
    }

    #[test]
    fn what_does_not_fit_is_made_to_fit_and_stays_readable() {
        let fitted = |text: &str, fit: fn(&mut String) -> bool| {
            let mut text = String::from(text);
            (fit(&mut text), text)
        };
        let fits = "ä".repeat(MAX_TEXT / 2);
        assert_eq!(fitted(&fits, fit_text), (false, fits.clone()));
        assert_eq!(fitted(&fits, fit_path), (false, fits));
        // Two bytes each, so that the bound lies inside a character.
        let (changed, text) = fitted(&alloc::format!("x{}", "ä".repeat(200)), fit_text);
        assert!(
            changed && text.len() <= MAX_TEXT && text.starts_with("xä") && text.ends_with("ä…")
        );
        let path = alloc::format!("{}/strip-17.jpg", "ä".repeat(2_000));
        let (changed, text) = fitted(&path, fit_path);
        assert!(changed && text.len() <= MAX_TEXT && text.len() > MAX_TEXT - 4);
        assert!(text.starts_with("…ä") && text.ends_with("/strip-17.jpg"));
        for (share, fit) in [
            (0.0, 0.0),
            (1.0, 1.0),
            (1.000_001, 1.0),
            (-3.5, 0.0),
            (f32::INFINITY, 1.0),
            (f32::NAN, 0.0),
        ] {
            let mut fitted = share;
            assert_eq!(fit_share(&mut fitted), fitted.to_bits() != share.to_bits());
            assert_eq!(fitted, fit, "{share}");
        }
    }

    #[test]
    fn only_what_is_refused_for_good_leaves_a_gap() {
        let device: Name = "d1".parse().unwrap();
        let gap = |change: &dyn Fn(&mut Reading)| {
            let mut bad = reading();
            change(&mut bad);
            let refused = Reading::take(&serde_json::to_vec(&bad).unwrap(), &device).unwrap_err();
            refused.gap.map(|gap| (gap.epoch, gap.from, gap.to))
        };
        assert_eq!(gap(&|r| r.score = 1.5), Some((77, 3, 3)));
        // JSON has no such number: it is written as `null`, and is no reading any more.
        assert_eq!(gap(&|r| r.margin = f32::NAN), Some((77, 3, 3)));
        assert_eq!(gap(&|r| r.file = Some("x".repeat(300))), Some((77, 3, 3)));
        assert_eq!(gap(&|r| r.seq = 0), None, "no number to speak of");
        assert_eq!(gap(&|r| r.v = 2), None, "the next coordinator can");
        assert_eq!(gap(&|r| r.device = "d2".parse().unwrap()), None);
        assert!(
            Reading::take(b"{\"v\":1}", &device)
                .unwrap_err()
                .gap
                .is_none()
        );
        assert!(Reading::take(&reading().encode().unwrap(), &device).is_ok());
    }
}

//! What is said about drift, on the wire.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use super::{Finding, Numbers, Sign};
use crate::{
    EventError, MAX_EVENT_BYTES, Name, VERSION,
    event::{parse, within},
};

/// How far what a source sees has moved: flat, one value a key, retained on `drift`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drift {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// The device.
    pub device: Name,
    /// The camera on it.
    pub source: Name,
    /// When it was said, by the device's clock: milliseconds since the Unix epoch.
    pub ts: i64,
    /// The model that looked: `name@version`.
    pub model: String,
    /// Frames of the window.
    pub frames: u32,
    /// `ok` or `drift`.
    pub state: String,
    /// What is wrong, in the words of [`Sign`], with commas between them; empty where nothing is.
    pub names: String,
    /// Share of unknown results, 0..=1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unknown: Option<f32>,
    /// Population stability index of the top scores against training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<f32>,
    /// Shift of the mean embedding in training's standard deviations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shift: Option<f32>,
    /// The same in units of what chance shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shift_chance: Option<f32>,
    /// Median novelty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub novelty: Option<f32>,
    /// Mean brightness, 0..=1.
    pub brightness: f32,
    /// Mean contrast, 0..=1.
    pub contrast: f32,
    /// Detail over what is usual for the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<f32>,
    /// Share of frames that equal the one before, 0..=1.
    pub still: f32,
}

impl Drift {
    /// What `finding` says.
    #[must_use]
    pub fn of(device: Name, source: Name, ts: i64, model: String, finding: &Finding) -> Self {
        let Numbers {
            frames,
            unknown,
            scores,
            shift,
            shift_chance,
            novelty,
            brightness,
            contrast,
            detail,
            still,
        } = finding.numbers;
        // Four digits mean something; what is no number is not said.
        let round = |value: f32| libm::roundf(value * 10_000.0) / 10_000.0;
        let say = |value: Option<f32>| value.filter(|v| v.is_finite()).map(round);
        Self {
            v: VERSION,
            device,
            source,
            ts,
            model,
            frames,
            state: if finding.signs.is_empty() {
                "ok"
            } else {
                "drift"
            }
            .into(),
            names: finding.names(),
            unknown: say(unknown),
            scores: say(scores),
            shift: say(shift),
            shift_chance: say(shift_chance),
            novelty: say(novelty),
            brightness: round(brightness),
            contrast: round(contrast),
            detail: say(detail),
            still: round(still),
        }
    }

    /// The signs that it names, unknown words left out.
    pub fn signs(&self) -> impl Iterator<Item = Sign> + '_ {
        self.names
            .split(',')
            .filter_map(|name| Sign::ALL.into_iter().find(|sign| sign.as_str() == name))
    }

    /// The JSON that is sent.
    ///
    /// # Errors
    /// If a number is none.
    pub fn encode(&self) -> Result<Vec<u8>, EventError> {
        Ok(serde_json::to_vec(self)?)
    }

    /// Reads and checks one that came on a topic of `device` and `source`.
    ///
    /// # Errors
    /// [`EventError`] says what is wrong with it.
    pub fn decode(bytes: &[u8], device: &Name, source: &Name) -> Result<Self, EventError> {
        within(bytes.len(), MAX_EVENT_BYTES)?;
        let drift: Self = parse(bytes)?;
        let checks = [
            (
                drift.device == *device && drift.source == *source,
                "device and source are those of the topic",
            ),
            (
                matches!(drift.state.as_str(), "ok" | "drift"),
                "state is ok or drift",
            ),
            (
                drift.names.len() <= 200 && drift.model.len() <= 1_000,
                "names have at most 200 bytes, model at most 1,000",
            ),
            (
                [drift.brightness, drift.contrast, drift.still]
                    .iter()
                    .all(|share| (0.0..=1.0).contains(share)),
                "brightness, contrast and still are 0 to 1",
            ),
        ];
        if drift.v != VERSION {
            return Err(EventError::Version(drift.v));
        }
        match checks.into_iter().find(|(fine, _)| !fine) {
            Some((_, why)) => Err(EventError::Value(why)),
            None => Ok(drift),
        }
    }
}

//! What the coordinator wants a device to be.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::{
    Erase, EventError, MAX_ERASE, MAX_EVENT_BYTES, Release, Settings, VERSION,
    event::{MAX_JSON_INTEGER, parse, within},
};

/// What a device should be. Retained on `desired`; the newest revision wins, whatever came in between.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Desired {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// Grows with every change for this device, below 2⁵³. One that is not above the last is ignored.
    pub revision: u64,
    /// The model; nothing leaves the device on the one that it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<Release>,
    /// What ends its trial.
    #[serde(default)]
    pub limits: Limits,
    /// How long its trial is.
    #[serde(default)]
    pub trial: Trial,
    /// Try it though it is marked as bad here, or older than the one that runs. Counts once: if it fails again it is
    /// marked again.
    #[serde(default)]
    pub force: bool,
    /// The settings; nothing is the device's own files alone. An agent that knows none ignores them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
    /// Samples that it is to have no more, at most [`MAX_ERASE`]; they stand here until the device has answered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub erase: Vec<Erase>,
}

/// Where a trial stops. A share is 0..=1; a share of 1 switches its rule off.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Median of a frame's inference in milliseconds; the 95th percentile may be twice that. Where nothing is said
    /// the old model is the measure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<f32>,
    /// So many times the old model's latency, where there is no `latency_ms`.
    pub latency_times: f32,
    /// Resident memory of the agent with both models loaded, in MiB. Where nothing is said: 256 more than before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// Temperature in °C, if the device was cooler before.
    pub temperature_c: f32,
    /// Share of disagreement on frames where the old model was sure.
    pub disagreement: f32,
    /// How far the mean score may fall below the old model's, 0..=1.
    pub confidence_fall: f32,
    /// Share of one label from which a model has collapsed to it, if the old one saw more.
    pub collapse: f32,
    /// Total variation distance between the two models' labels on the same frames, less what chance shows.
    pub balance: f32,
    /// Share of frames with labels that the old model does not have.
    pub new_labels: f32,
}

impl Default for Limits {
    /// A retrained head differs on a few frames in a hundred, a broken one on most: 0.15 lies well between, and so do
    /// 0.15 of confidence and 0.2 of balance. 2.5 times the latency lets a larger model of the same family pass and
    /// stops the wrong one. Small boards throttle between 80 and 85 °C. A new class that takes more than
    /// half of all frames is more likely a mistake.
    fn default() -> Self {
        Self {
            latency_ms: None,
            latency_times: 2.5,
            memory_mib: None,
            temperature_c: 80.0,
            disagreement: 0.15,
            confidence_fall: 0.15,
            collapse: 0.98,
            balance: 0.2,
            new_labels: 0.5,
        }
    }
}

/// How a model is tried on live frames: first in shadow beside the old one, then active with the old one beside it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Trial {
    /// What the second model may take of the processor, of what the active one takes, 0..=1: the price of the trial. A model that
    /// is as fast looks at this share of the frames, a slower one at fewer.
    pub share: f32,
    /// Frames that both have looked at before the new model becomes active; 0 goes without.
    pub shadow_frames: u32,
    /// After so many seconds with fewer frames the trial is put off.
    pub shadow_s_max: u32,
    /// Frames with the new model active before it is kept.
    pub watch_frames: u32,
    /// It is watched for at least so many seconds …
    pub watch_s_min: u32,
    /// … and after so many it is kept if it gave any result at all, and put off if it gave none and there is another.
    pub watch_s_max: u32,
}

impl Trial {
    /// No trial: it is kept as soon as it has passed its self-test and is in memory. That is the way back, where what runs is
    /// no measure for what is to replace it.
    pub const NONE: Self = Self {
        share: 0.0,
        shadow_frames: 0,
        shadow_s_max: 0,
        watch_frames: 0,
        watch_s_min: 0,
        watch_s_max: 0,
    };
}

impl Default for Trial {
    /// 200 frames tell 5 % of disagreement from 15 beyond doubt. A minute of watching shows heat, and 1,200 frames what fails
    /// after a thousand; after half an hour, a quarter of it in shadow, waiting longer for more frames would hold up the fleet.
    fn default() -> Self {
        Self {
            share: 0.5,
            shadow_frames: 200,
            shadow_s_max: 600,
            watch_frames: 1_200,
            watch_s_min: 60,
            watch_s_max: 1_800,
        }
    }
}

impl Desired {
    /// The JSON that is sent.
    ///
    /// # Errors
    /// If a number is none.
    pub fn encode(&self) -> Result<Vec<u8>, EventError> {
        Ok(serde_json::to_vec(self)?)
    }

    /// Reads and checks one.
    ///
    /// # Errors
    /// [`EventError`] says what is wrong with it; nothing of it is to be used then.
    pub fn decode(bytes: &[u8]) -> Result<Self, EventError> {
        within(bytes.len(), MAX_EVENT_BYTES)?;
        let desired: Self = parse(bytes)?;
        if desired.v != VERSION {
            return Err(EventError::Version(desired.v));
        }
        let Limits {
            latency_ms,
            latency_times,
            memory_mib: _,
            temperature_c,
            disagreement,
            confidence_fall,
            collapse,
            balance,
            new_labels,
        } = desired.limits;
        let shares = [
            disagreement,
            confidence_fall,
            collapse,
            balance,
            new_labels,
            desired.trial.share,
        ];
        let checks = [
            (
                desired.revision <= MAX_JSON_INTEGER,
                "revision is below 2^53",
            ),
            (
                desired.release.as_ref().is_none_or(Release::is_valid),
                "name and version have 1 to 64 characters of a-z, A-Z, 0-9, ., -, _ and +",
            ),
            (
                shares.iter().all(|share| (0.0..=1.0).contains(share)),
                "a share is 0 to 1",
            ),
            (
                latency_ms.is_none_or(|ms| ms > 0.0 && ms.is_finite())
                    && latency_times >= 1.0
                    && temperature_c.is_finite(),
                "latency_ms is above 0, latency_times at least 1, temperature_c a number",
            ),
            (
                desired.trial.watch_s_min <= desired.trial.watch_s_max,
                "watch_s_min is at most watch_s_max",
            ),
            (
                desired.settings.as_ref().is_none_or(Settings::is_valid),
                "the trial of settings takes 15 to 3600 s, their version is below 2^53",
            ),
            (
                desired.erase.len() <= MAX_ERASE,
                "at most 64 things are to be erased at a time",
            ),
        ];
        match checks.into_iter().find(|(fine, _)| !fine) {
            Some((_, why)) => Err(EventError::Value(why)),
            None => Ok(desired),
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::{String, ToString};

    use super::*;

    #[test]
    fn a_short_wish_is_enough_and_a_wrong_one_is_refused() {
        let digest = "ab".repeat(32);
        let wish = |rest: &str| {
            let text = r#"{"v":1,"revision":7,"release":{"name":"steel","version":"2","digest":"DIGEST"}REST}"#;
            Desired::decode(
                text.replace("REST", rest)
                    .replace("DIGEST", &digest)
                    .as_bytes(),
            )
        };
        let desired = wish("").unwrap();
        assert_eq!((desired.revision, desired.force), (7, false));
        assert_eq!(
            (&desired.limits, &desired.trial),
            (&Limits::default(), &Trial::default())
        );
        assert_eq!(
            Desired::decode(&desired.encode().unwrap()).unwrap(),
            desired
        );
        assert_eq!(
            wish(r#","limits":{"balance":0.4}"#).unwrap().limits.balance,
            0.4
        );
        let settings = wish(r#","settings":{"version":3,"digest":"DIGEST"}"#).unwrap();
        assert_eq!(
            settings.settings.map(|s| (s.version, s.trial_s)),
            Some((3, 120))
        );
        for (bad, why) in [
            (r#","limits":{"balance":1.4}"#, "share"),
            (r#","limits":{"latency_ms":0}"#, "latency_ms"),
            (
                r#","trial":{"watch_s_min":9,"watch_s_max":8}"#,
                "watch_s_min",
            ),
            (
                r#","settings":{"version":3,"digest":"DIGEST","trial_s":1}"#,
                "15 to 3600",
            ),
        ] {
            assert!(wish(bad).unwrap_err().to_string().contains(why));
        }
        let escape: String = String::from_utf8(desired.encode().unwrap())
            .unwrap()
            .replace("steel", "../x");
        assert!(Desired::decode(escape.as_bytes()).is_err());
        assert!(
            Desired::decode(br#"{"v":2}"#)
                .unwrap_err()
                .to_string()
                .contains("version 2")
        );
        assert_eq!(
            Desired::decode(br#"{"v":1,"revision":1}"#).unwrap().release,
            None
        );
    }
}

//! What a device says it is, in answer to what it should be.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::{
    Digest, EventError, MAX_EVENT_BYTES, Release, Settings, VERSION,
    event::{MAX_JSON_INTEGER, parse, within},
};

/// The most bad models that a device remembers; the oldest is forgotten first. Releases come weekly at most.
pub const MAX_BAD: usize = 16;
/// The longest detail of a failure in bytes: a sentence for people.
pub const MAX_DETAIL: usize = 160;
/// The same for settings, where several mistakes are named at once.
pub const MAX_REASONS: usize = 1_024;

/// Why a model, or settings, did not come into use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It does not load.
    Load,
    /// It does not give the golden answers.
    SelfTest,
    /// It does not fit the input or the output that its manifest names.
    Shape,
    /// Too slow.
    Latency,
    /// Too much memory.
    Memory,
    /// The device grew too hot.
    Heat,
    /// A result is no number.
    NotFinite,
    /// It contradicts the old model where that was sure.
    Disagreement,
    /// It is much less sure than the old model.
    Confidence,
    /// It sees one class only, where the old model sees more.
    Collapse,
    /// It shifts the balance of the classes on the same frames.
    Balance,
    /// The agent crashed with it again and again.
    Crash,
    /// Its metadata do not verify: signature, threshold, expiry, rollback.
    Metadata,
    /// Its bytes are not those that its digest names.
    Bytes,
    /// It could not be fetched.
    Fetch,
    /// There is no room for it.
    DiskFull,
    /// Something took too long.
    Timeout,
    /// There were too few frames to tell.
    Unproven,
    /// Settings: they have mistakes, or may not be set from afar.
    Refused,
    /// Settings: with them a source gives no pictures that gave some before.
    Blind,
    /// Settings: with them the broker was not reached.
    Unreachable,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 21] = [
        Self::Load,
        Self::SelfTest,
        Self::Shape,
        Self::Latency,
        Self::Memory,
        Self::Heat,
        Self::NotFinite,
        Self::Disagreement,
        Self::Confidence,
        Self::Collapse,
        Self::Balance,
        Self::Crash,
        Self::Metadata,
        Self::Bytes,
        Self::Fetch,
        Self::DiskFull,
        Self::Timeout,
        Self::Unproven,
        Self::Refused,
        Self::Blind,
        Self::Unreachable,
    ];

    /// Is the model to blame? Then it is marked as bad, not tried again, and counts against its rollout.
    ///
    /// Otherwise it never ran, or nothing was learned about it: it is tried again later. Metadata and bytes are among
    /// these, for whoever can garble a download must not be able to have a good model marked as bad.
    #[must_use]
    pub const fn blames_model(self) -> bool {
        !matches!(
            self,
            Self::Metadata
                | Self::Bytes
                | Self::Fetch
                | Self::DiskFull
                | Self::Timeout
                | Self::Unproven
                | Self::Refused
                | Self::Blind
                | Self::Unreachable
        )
    }

    /// The same for settings.
    #[must_use]
    pub const fn blames_settings(self) -> bool {
        matches!(
            self,
            Self::Refused | Self::Blind | Self::Unreachable | Self::Crash
        )
    }

    /// As it stands in messages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::SelfTest => "self_test",
            Self::Shape => "shape",
            Self::Latency => "latency",
            Self::Memory => "memory",
            Self::Heat => "heat",
            Self::NotFinite => "not_finite",
            Self::Disagreement => "disagreement",
            Self::Confidence => "confidence",
            Self::Collapse => "collapse",
            Self::Balance => "balance",
            Self::Crash => "crash",
            Self::Metadata => "metadata",
            Self::Bytes => "bytes",
            Self::Fetch => "fetch",
            Self::DiskFull => "disk_full",
            Self::Timeout => "timeout",
            Self::Unproven => "unproven",
            Self::Refused => "refused",
            Self::Blind => "blind",
            Self::Unreachable => "unreachable",
        }
    }
}

/// A failed attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Why.
    pub reason: Reason,
    /// The same for people, at most [`MAX_DETAIL`] bytes; of settings at most [`MAX_REASONS`].
    pub detail: String,
}

impl Failure {
    /// With as much of `detail` as fits.
    #[must_use]
    pub fn new(reason: Reason, detail: &str) -> Self {
        Self::cut(reason, detail, MAX_DETAIL)
    }

    /// The same with room for [`MAX_REASONS`] bytes.
    #[must_use]
    pub fn with_reasons(reason: Reason, detail: &str) -> Self {
        Self::cut(reason, detail, MAX_REASONS)
    }

    fn cut(reason: Reason, detail: &str, most: usize) -> Self {
        let end = (0..=most)
            .rev()
            .find(|at| detail.is_char_boundary((*at).min(detail.len())));
        let detail = detail
            .get(..end.unwrap_or(0).min(detail.len()))
            .unwrap_or_default();
        Self {
            reason,
            detail: detail.into(),
        }
    }
}

/// A model that is not tried again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bad {
    /// Its digest.
    pub digest: Digest,
    /// What it did.
    #[serde(flatten)]
    pub failure: Failure,
}

/// Where a device is on its way to the desired model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Nothing is under way.
    #[default]
    Settled,
    /// The last attempt failed by circumstance; the next follows.
    Waiting,
    /// A proven model is being loaded: at the start, or on the way back.
    Loading,
    /// Bytes are on their way.
    Fetching,
    /// Metadata and bytes are checked.
    Verifying,
    /// The self-test runs in a process of its own.
    Testing,
    /// The new model looks at the same frames as the old one, and nobody hears it.
    Shadowing,
    /// The new model takes over between two frames.
    Activating,
    /// The new model is active and not yet kept.
    Watching,
}

/// What a trial has shown so far. Flat; what cannot be told is left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Evidence {
    /// Frames that the new model has looked at.
    pub frames: u32,
    /// Frames that both have looked at.
    pub compared: u32,
    /// Of these, frames where the old one was sure and the new one's label is not new to it.
    pub sure: u32,
    /// Of these, frames where they disagree.
    pub disagreed: u32,
    /// Frames whose label the old model does not have.
    pub new_labels: u32,
    /// Median of the new model's inference in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms_median: Option<f32>,
    /// Its 95th percentile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms_p95: Option<f32>,
    /// Median of the old model's inference in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old_ms_median: Option<f32>,
    /// Its 95th percentile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old_ms_p95: Option<f32>,
    /// How far the mean score has fallen below the old model's; negative where it rose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confidence_fall: Option<f32>,
    /// Share of the new model's most frequent label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_share: Option<f32>,
    /// Shift of the class balance beyond chance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance: Option<f32>,
    /// The most resident memory in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// The highest temperature in °C.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature_c: Option<f32>,
}

/// What a device is. Retained on `reported`, sent when it changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reported {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// When it became so, by the device's clock: milliseconds since the Unix epoch.
    pub ts: i64,
    /// The newest wish that it has seen; 0 is none.
    pub revision: u64,
    /// What it is doing.
    pub phase: Phase,
    /// The model that is wished for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Release>,
    /// The model in memory whose results count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loaded: Option<Release>,
    /// The model that it would go back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_good: Option<Release>,
    /// How the last attempt at the target failed, until the next succeeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// Models that it does not try again, the oldest first, at most [`MAX_BAD`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bad: Vec<Bad>,
    /// How far the present phase is, 0..=1.
    pub progress: f32,
    /// What the present trial has shown, or the last one.
    #[serde(default)]
    pub evidence: Evidence,
    /// The same about settings; nothing from a device that takes none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<SettingsReport>,
    /// The highest [`crate::Erase::id`] of the present wish that is done; nothing where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub erased: Option<u64>,
}

/// Where a device is on its way to the settings that it should have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsReport {
    /// `settled`, `waiting`, `fetching`, `activating` (the agent starts anew), `loading` or `watching`.
    pub phase: Phase,
    /// What is wished for; nothing is the device's own files alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Settings>,
    /// What the agent runs with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loaded: Option<Settings>,
    /// How the last attempt at the target failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// Documents that it does not try again, the oldest first, at most [`MAX_BAD`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bad: Vec<Digest>,
}

impl SettingsReport {
    fn is_valid(&self) -> bool {
        let named = [&self.target, &self.loaded];
        let failure = self.failure.as_ref();
        self.bad.len() <= MAX_BAD
            && failure.is_none_or(|failure| failure.detail.len() <= MAX_REASONS)
            && named.into_iter().flatten().all(Settings::is_valid)
    }
}

impl Reported {
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
        let reported: Self = parse(bytes)?;
        if reported.v != VERSION {
            return Err(EventError::Version(reported.v));
        }
        let releases = [&reported.target, &reported.loaded, &reported.last_good];
        let failures = reported
            .bad
            .iter()
            .map(|bad| &bad.failure)
            .chain(&reported.failure);
        let checks = [
            (
                reported.revision <= MAX_JSON_INTEGER,
                "revision is below 2^53",
            ),
            (
                releases.into_iter().flatten().all(Release::is_valid),
                "name and version have 1 to 64 characters of a-z, A-Z, 0-9, ., -, _ and +",
            ),
            (
                reported.bad.len() <= MAX_BAD,
                "at most 16 bad models are named",
            ),
            (
                failures.into_iter().all(|f| f.detail.len() <= MAX_DETAIL),
                "a detail has at most 160 bytes",
            ),
            (
                (0.0..=1.0).contains(&reported.progress),
                "progress is 0 to 1",
            ),
            (
                reported
                    .settings
                    .as_ref()
                    .is_none_or(SettingsReport::is_valid),
                "settings name at most 16 bad ones, details of 1024 bytes, and trials of 15 to 3600 s",
            ),
        ];
        match checks.into_iter().find(|(fine, _)| !fine) {
            Some((_, why)) => Err(EventError::Value(why)),
            None => Ok(reported),
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::{format, string::ToString, vec};

    use super::*;

    #[test]
    fn every_reason_is_the_same_word_everywhere() {
        for reason in Reason::ALL {
            assert_eq!(
                serde_json::to_string(&reason).unwrap(),
                format!("\"{}\"", reason.as_str())
            );
        }
    }

    #[test]
    fn the_largest_report_fits_and_reads_back() {
        let release = Release {
            name: "n".repeat(64),
            version: "v".repeat(64),
            digest: Digest([255; 32]),
        };
        let failure = Failure::new(Reason::Disagreement, &"ä".repeat(500));
        assert_eq!(failure.detail.len(), MAX_DETAIL);
        assert_eq!(Failure::new(Reason::Load, "x").detail, "x");
        let bad = Bad {
            digest: release.digest,
            failure: failure.clone(),
        };
        let settings = Settings {
            version: MAX_JSON_INTEGER,
            digest: release.digest,
            trial_s: 3_600,
        };
        let mut reported = Reported {
            v: VERSION,
            ts: i64::MIN,
            revision: MAX_JSON_INTEGER,
            phase: Phase::Activating,
            target: Some(release.clone()),
            loaded: Some(release.clone()),
            last_good: Some(release),
            failure: Some(failure),
            bad: vec![bad.clone(); MAX_BAD],
            progress: 0.123_456,
            evidence: Evidence {
                balance: Some(0.1),
                ..Evidence::default()
            },
            settings: Some(SettingsReport {
                phase: Phase::Activating,
                target: Some(settings),
                loaded: Some(settings),
                failure: Some(Failure::with_reasons(Reason::Refused, &"ä".repeat(600))),
                bad: vec![settings.digest; MAX_BAD],
            }),
            erased: Some(7),
        };
        let bytes = reported.encode().unwrap();
        assert!(bytes.len() < MAX_EVENT_BYTES / 2, "{}", bytes.len());
        assert_eq!(Reported::decode(&bytes).unwrap(), reported);
        reported.bad.push(bad);
        let error = Reported::decode(&reported.encode().unwrap()).unwrap_err();
        assert!(error.to_string().contains("16"));
    }
}

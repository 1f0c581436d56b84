//! `[offload]`: which frames neighbours are asked about, and what this device answers.

use std::path::PathBuf;

use mesh_core::offload::ask::Asking;
use serde::Deserialize;

/// `[offload]`: frames that go to neighbours, and those of neighbours that this device looks at.
///
/// Nothing of it is on by itself: a picture leaves its device, and a device works for others, only where somebody has said
/// so.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OffloadConfig {
    /// Ask a neighbour that has a bigger model for the same labels about frames that this device is unsure of.
    pub escalate: bool,
    /// Ask the coordinator, too, where no neighbour can be asked.
    pub coordinator: bool,
    /// Hand frames to an idle neighbour that has the same model while this device cannot keep up or is too hot.
    pub spill: bool,
    /// The largest share of the frames that is asked about because of doubt, above 0, at most 1.
    pub share: f32,
    /// The margin below which a result is in doubt, 0 to 1. Default: whatever the share allows, the least sure first.
    pub below: Option<f32>,
    /// The device's own answer counts after this, 20 to 10000 ms.
    pub deadline_ms: u32,
    /// From this temperature on frames are handed on and none are taken, 40 to 120 °C.
    pub hot_c: i8,
    /// Answer neighbours with the model that this device runs.
    pub answer: bool,
    /// Answer them, too, with the model of this bundle.
    pub serve: Option<PathBuf>,
    /// Run the model of `serve` in parts, the first here and the others on neighbours that lend.
    pub split: bool,
    /// Run parts of the model of this bundle for neighbours.
    pub lend: Option<PathBuf>,
    /// MiB of weights that a part may have here, 1 to 4096.
    pub room_mib: u32,
    /// The largest share of this device's time for frames of others, above 0, at most 0.9.
    pub time_share: f32,
}

impl Default for OffloadConfig {
    fn default() -> Self {
        Self {
            escalate: false,
            coordinator: false,
            spill: false,
            share: 0.3,
            below: None,
            // A frame over Wi-Fi and a model of a hundred milliseconds, twice.
            deadline_ms: 500,
            // Small boards slow themselves down from 80 to 85 °C on.
            hot_c: 78,
            answer: false,
            serve: None,
            split: false,
            lend: None,
            room_mib: 64,
            time_share: 0.25,
        }
    }
}

impl OffloadConfig {
    /// Does the device ever ask?
    #[must_use]
    pub const fn asks(&self) -> bool {
        self.escalate || self.spill
    }

    /// Does it answer?
    #[must_use]
    pub const fn answers(&self) -> bool {
        self.answer || self.serve.is_some() || self.lend.is_some()
    }

    /// Bytes of weights that a part may have here.
    pub(super) fn room(&self) -> u64 {
        u64::from(self.room_mib) << 20
    }

    pub(super) const fn asking(&self) -> Asking {
        Asking {
            escalate: self.escalate,
            spill: self.spill,
            share: self.share,
            below: self.below,
            hot: self.hot_c,
        }
    }

    /// What is wrong: field and reason. `mesh`, `coordinator` and `reject`: are there neighbours, is it known where the
    /// coordinator is, is there a reject output?
    pub(crate) fn mistakes(
        &self,
        mesh: bool,
        coordinator: bool,
        reject: bool,
    ) -> Vec<(&'static str, &'static str)> {
        let mut all = Vec::new();
        let mut must = |good: bool, field, what| {
            if !good {
                all.push((field, what));
            }
        };
        let needs_mesh = "needs neighbours: mesh.enabled is off";
        must(
            mesh || self.coordinator || !self.escalate,
            "escalate",
            needs_mesh,
        );
        must(
            self.escalate || !self.coordinator,
            "coordinator",
            "needs escalate: it is asked about frames in doubt only",
        );
        must(
            coordinator || !self.coordinator,
            "coordinator",
            "needs its address: update.coordinator or samples.coordinator",
        );
        must(mesh || !self.spill, "spill", needs_mesh);
        must(
            !(self.spill && reject),
            "spill",
            "cannot go with [reject]: what is rejected is decided on the device, which does not look at these frames",
        );
        must(
            self.share > 0.0 && self.share <= 1.0,
            "share",
            "must be above 0 and at most 1",
        );
        must(
            self.below.is_none_or(|below| (0.0..=1.0).contains(&below)),
            "below",
            "must lie between 0 and 1",
        );
        must(
            (20..=10_000).contains(&self.deadline_ms),
            "deadline_ms",
            "must be 20 to 10000 ms",
        );
        must(
            (40..=120).contains(&self.hot_c),
            "hot_c",
            "must be 40 to 120 °C",
        );
        must(mesh || !self.answer, "answer", needs_mesh);
        must(mesh || self.serve.is_none(), "serve", needs_mesh);
        must(
            !self.split || self.serve.is_some(),
            "split",
            "needs serve: the bundle whose model runs in parts",
        );
        must(mesh || self.lend.is_none(), "lend", needs_mesh);
        must(
            (1..=4_096).contains(&self.room_mib),
            "room_mib",
            "must be 1 to 4096 MiB",
        );
        must(
            self.time_share > 0.0 && self.time_share <= 0.9,
            "time_share",
            "must be above 0 and at most 0.9: the device has frames of its own",
        );
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_sound_and_off_and_mistakes_are_named() {
        let defaults = OffloadConfig::default();
        assert_eq!(defaults.mistakes(false, false, true), []);
        assert!(!defaults.asks() && !defaults.answers());
        let text = "escalate = true\nspill = true\nshare = 0.0\nbelow = 2.0\ndeadline_ms = 1\nhot_c = 5\n\
            answer = true\nserve = 'x'\nlend = 'x'\nroom_mib = 0\ntime_share = nan";
        let config: OffloadConfig = toml::from_str(text).unwrap();
        let fields = |mesh, reject| -> Vec<_> {
            let all = config.mistakes(mesh, false, reject);
            all.into_iter().map(|(field, _)| field).collect()
        };
        let values = [
            "share",
            "below",
            "deadline_ms",
            "hot_c",
            "room_mib",
            "time_share",
        ];
        assert_eq!(fields(true, false), values);
        assert_eq!(fields(true, true)[0], "spill");
        assert_eq!(fields(false, false).len(), values.len() + 5);
        let alone: OffloadConfig = toml::from_str("split = true").unwrap();
        assert_eq!(alone.mistakes(true, false, false)[0].0, "split");
        // Without neighbours there is still the coordinator, if it is known where.
        let far: OffloadConfig = toml::from_str("escalate = true\ncoordinator = true").unwrap();
        assert_eq!(far.mistakes(false, true, true), []);
        assert_eq!(far.mistakes(false, false, true)[0].0, "coordinator");
        let far: OffloadConfig = toml::from_str("coordinator = true").unwrap();
        assert_eq!(far.mistakes(true, true, false)[0].0, "coordinator");
    }
}

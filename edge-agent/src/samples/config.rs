//! What can be set about samples.

use mesh_core::sampling::Policy;
use serde::Deserialize;

/// Less does not hold a day's worth of anything.
const MIN_BYTES: u64 = 1024 * 1024;
/// Larger images than this are no samples: see [`mesh_core::MAX_SAMPLE_IMAGE_BYTES`].
const MAX_SIDE: u32 = 4_096;
/// Smaller ones show nothing.
const MIN_SIDE: u32 = 32;
/// Beyond it nothing is left to see.
const MAX_BLUR: f32 = 100.0;
/// A week: longer is as good as never.
const MAX_APART_S: u32 = 7 * 24 * 3_600;

/// `[samples]`: frames that are kept to learn from.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplesConfig {
    /// Keep any at all?
    pub enabled: bool,
    /// Where they go: `https://HOST:PORT`. Default: the device's coordinator. Without one they stay on the device, within
    /// `max_bytes`.
    pub coordinator: Option<String>,
    /// The most that waiting samples take on disk, in bytes, at least 1 MiB.
    pub max_bytes: u64,
    /// Bytes a day of samples that the device finds by itself, at least 1 MiB. What people mark comes on top.
    pub day_bytes: u64,
    /// KiB a second for sending them; 0 is as fast as it goes.
    pub max_kib_per_s: u32,
    /// The share of all frames that is drawn by lot, 0 to 1.
    pub random: f64,
    /// A top score below this is uncertain, 0 to 1.
    pub min_score: f32,
    /// A margin between the two best classes below this is uncertain, 0 to 1.
    pub min_margin: f32,
    /// An entropy of the scores above this is uncertain, 0 to 1.
    pub max_entropy: f32,
    /// Novel is what lies farther from the training set than this many times its 99th percentile, above 0.
    pub novelty: f32,
    /// Seconds between two uncertain or two novel samples of one source, 0 to 604,800.
    pub apart_s: u32,
    /// What of a frame is kept.
    pub keep: Keep,
    /// The part of the picture that is kept: left, top, width, height as shares of the picture, 0 to 1.
    pub crop: [f32; 4],
    /// How much what is kept is blurred: the sigma of a Gauss filter in its pixels, 0 to 100.
    pub blur: f32,
    /// The longest side of what is kept, in pixels: 32 to 4,096.
    pub max_side: u32,
}

/// What of a frame is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The picture, and the model's embedding of it.
    Image,
    /// The embedding only: no picture leaves the pipeline.
    Embedding,
}

impl Default for SamplesConfig {
    /// About two hundred images a day; five days of them without a connection.
    fn default() -> Self {
        Self {
            enabled: true,
            coordinator: None,
            max_bytes: 100 * 1024 * 1024,
            day_bytes: 20 * 1024 * 1024,
            max_kib_per_s: 256,
            random: 0.002,
            min_score: 0.6,
            min_margin: 0.2,
            max_entropy: 0.6,
            novelty: 1.0,
            apart_s: 10,
            keep: Keep::Image,
            crop: [0.0, 0.0, 1.0, 1.0],
            blur: 0.0,
            max_side: 1_024,
        }
    }
}

impl SamplesConfig {
    /// The part that decides.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            min_score: self.min_score,
            min_margin: self.min_margin,
            max_entropy: self.max_entropy,
            novelty: self.novelty,
            random: self.random,
            day_bytes: self.day_bytes,
            apart_ms: u64::from(self.apart_s) * 1_000,
        }
    }

    /// Values that cannot be meant: the field, and what it must be.
    #[must_use]
    pub fn mistakes(&self) -> Vec<(&'static str, String)> {
        let mut all = Vec::new();
        let mut must = |good: bool, field: &'static str, what: &str| {
            if !good {
                all.push((field, what.to_owned()));
            }
        };
        if let Some(Err(why)) = self.coordinator.as_deref().map(coordinator_url) {
            must(false, "coordinator", &why);
        }
        let enough = "must be at least 1048576 (1 MiB)";
        must(self.max_bytes >= MIN_BYTES, "max_bytes", enough);
        must(self.day_bytes >= MIN_BYTES, "day_bytes", enough);
        let share = "must lie between 0 and 1";
        must((0.0..=1.0).contains(&self.random), "random", share);
        for (field, value) in [
            ("min_score", self.min_score),
            ("min_margin", self.min_margin),
            ("max_entropy", self.max_entropy),
        ] {
            must((0.0..=1.0).contains(&value), field, share);
        }
        must(
            self.novelty.is_finite() && self.novelty > 0.0,
            "novelty",
            "must be a number above 0",
        );
        must(
            self.apart_s <= MAX_APART_S,
            "apart_s",
            "must be 0 to 604800 seconds",
        );
        let [left, top, width, height] = self.crop;
        // A hair of tolerance: 0.1 + 0.9 need not be 1.
        let side =
            |start: f32, length: f32| start >= 0.0 && length > 0.0 && start + length < 1.0001;
        must(
            side(left, width) && side(top, height),
            "crop",
            "must be left, top, width, height as shares of the picture, and lie inside it",
        );
        must(
            (0.0..=MAX_BLUR).contains(&self.blur),
            "blur",
            "must lie between 0 and 100",
        );
        must(
            (MIN_SIDE..=MAX_SIDE).contains(&self.max_side),
            "max_side",
            "must be 32 to 4096 pixels",
        );
        all
    }
}

/// The coordinator's address without a closing slash, encrypted or not.
///
/// # Errors
/// Says what it should look like.
pub(crate) fn coordinator_url(url: &str) -> Result<String, String> {
    let Some(rest) = url.strip_prefix("https://") else {
        return base_url(url);
    };
    let plain = base_url(&format!("http://{rest}"));
    let rest = plain.map_err(|_| format!("must be https://HOST:PORT, not {url:?}"))?;
    Ok(rest.replacen("http://", "https://", 1))
}

/// The same in the clear.
///
/// # Errors
/// Says what it should look like.
pub(crate) fn base_url(url: &str) -> Result<String, String> {
    let wrong = || format!("must be http://HOST:PORT, not {url:?}");
    let rest = url.strip_prefix("http://").ok_or_else(wrong)?;
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let host = match rest.rsplit_once(':') {
        Some((host, port)) => {
            let port: u16 = port.parse().map_err(|_| wrong())?;
            if port == 0 {
                return Err(wrong());
            }
            host
        }
        None => rest,
    };
    if host.is_empty() || host.contains(['/', '@', ' ', '?', '#']) {
        return Err(wrong());
    }
    Ok(format!("http://{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mistake_is_named() {
        assert_eq!(SamplesConfig::default().mistakes(), []);
        let text = "coordinator = 'ftp://x'\nmax_bytes = 1\nday_bytes = 1\nrandom = 2.0\nmin_score = nan\n\
            min_margin = -1.0\nmax_entropy = 7.0\nnovelty = 0.0\napart_s = 700000\ncrop = [0.5, 0.0, 0.6, 1.0]\n\
            blur = -1.0\nmax_side = 1";
        let config: SamplesConfig = toml::from_str(text).unwrap();
        let fields: Vec<_> = config.mistakes().into_iter().map(|(f, _)| f).collect();
        assert_eq!(
            fields,
            [
                "coordinator",
                "max_bytes",
                "day_bytes",
                "random",
                "min_score",
                "min_margin",
                "max_entropy",
                "novelty",
                "apart_s",
                "crop",
                "blur",
                "max_side"
            ]
        );
        assert!(toml::from_str::<SamplesConfig>("keep = 'all'").is_err());
    }

    #[test]
    fn encrypted_addresses() {
        assert_eq!(
            coordinator_url("https://a:8443/").unwrap(),
            "https://a:8443"
        );
        assert_eq!(coordinator_url("http://a:80").unwrap(), "http://a:80");
        for bad in ["https://", "https://a/b", "https://a:0", "ftp://a", "a"] {
            assert!(
                coordinator_url(bad).unwrap_err().contains("HOST:PORT"),
                "{bad}"
            );
        }
    }

    #[test]
    fn addresses() {
        assert_eq!(base_url("http://a:80/").unwrap(), "http://a:80");
        assert_eq!(base_url("http://a").unwrap(), "http://a");
        for bad in [
            "a:80",
            "https://a",
            "http://",
            "http://a:0",
            "http://a/b",
            "http://u@a",
        ] {
            assert!(base_url(bad).is_err(), "{bad}");
        }
    }
}

//! Watches what the sources see: the thin part around [`mesh_core::drift`].

use mesh_core::drift::{Finding, Limits, Looks, Seen, Watch, Window, Yardstick};
use models::{Engine, Input, Layout, Outcome, UNKNOWN};
use serde::Deserialize;

/// A window of more frames takes too much memory.
const MAX_FRAMES: u32 = 10_000;
/// A day: a longer window tells of nothing in time.
const MAX_MINUTES: u32 = 24 * 60;

/// `[drift]`: has what a source sees moved away from what training saw?
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DriftConfig {
    /// Watch at all?
    pub enabled: bool,
    /// Frames of a window, 50 to 10,000.
    pub frames: u32,
    /// Minutes of a window, 1 to 1,440: whatever is over first.
    pub minutes: u32,
    /// Seconds until it is said again while nothing changes, 10 to 86,400.
    pub every_s: u32,
    /// Share of unknown results beyond that of training, 0 to 1.
    pub unknown: f32,
    /// Population stability index of the top scores, above 0.
    pub scores: f32,
    /// Shift of the mean embedding in training's standard deviations, above 0.
    pub embedding: f32,
    /// Median novelty, above 0.
    pub novelty: f32,
    /// Mean brightness below this is dark, 0 to 1.
    pub dark: f32,
    /// Mean brightness above this is too bright, 0 to 1.
    pub bright: f32,
    /// Less than this share of the usual detail is blurred, 0 to 1.
    pub blurred: f32,
    /// A contrast below this is a blocked lens, 0 to 1.
    pub blocked: f32,
    /// Share of equal frames in a row from which on a source is frozen, 0 to 1.
    pub frozen: f32,
}

impl Default for DriftConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            frames: 500,
            minutes: 10,
            every_s: 600,
            unknown: 0.2,
            scores: 0.25,
            embedding: 0.5,
            novelty: 1.0,
            dark: 0.06,
            bright: 0.94,
            blurred: 0.3,
            blocked: 0.02,
            frozen: 0.95,
        }
    }
}

impl DriftConfig {
    /// Values that cannot be meant: the field, and what it must be.
    #[must_use]
    pub fn mistakes(&self) -> Vec<(&'static str, &'static str)> {
        let mut all = Vec::new();
        let mut must = |good: bool, field, what| {
            if !good {
                all.push((field, what));
            }
        };
        must(
            (50..=MAX_FRAMES).contains(&self.frames),
            "frames",
            "must be 50 to 10000",
        );
        must(
            (1..=MAX_MINUTES).contains(&self.minutes),
            "minutes",
            "must be 1 to 1440",
        );
        must(
            (10..=86_400).contains(&self.every_s),
            "every_s",
            "must be 10 to 86400 seconds",
        );
        for (field, value) in [
            ("scores", self.scores),
            ("embedding", self.embedding),
            ("novelty", self.novelty),
        ] {
            must(
                value.is_finite() && value > 0.0,
                field,
                "must be a number above 0",
            );
        }
        for (field, value) in [
            ("unknown", self.unknown),
            ("dark", self.dark),
            ("bright", self.bright),
            ("blurred", self.blurred),
            ("blocked", self.blocked),
            ("frozen", self.frozen),
        ] {
            must(
                (0.0..=1.0).contains(&value),
                field,
                "must lie between 0 and 1",
            );
        }
        all
    }

    fn window(&self) -> Window {
        Window {
            frames: self.frames,
            length_ms: u64::from(self.minutes) * 60_000,
            every_ms: u64::from(self.every_s) * 1_000,
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            unknown: self.unknown,
            scores: self.scores,
            embedding: self.embedding,
            novelty: self.novelty,
            dark: self.dark,
            bright: self.bright,
            blurred: self.blurred,
            blocked: self.blocked,
            frozen: self.frozen,
        }
    }
}

/// Watches one source.
pub(crate) struct Watcher {
    watch: Watch,
    /// The model that it measures by.
    model: String,
    /// Brightness of the frame before, pixel by pixel of the model's input.
    last: Vec<u8>,
    now: Vec<u8>,
}

impl Watcher {
    /// Has seen nothing yet.
    pub(crate) fn new(config: &DriftConfig) -> Self {
        Self {
            watch: Watch::new(config.window(), config.limits(), None),
            model: String::new(),
            last: Vec::new(),
            now: Vec::new(),
        }
    }

    /// Takes a frame in that was looked at; says something if there is something to say.
    pub(crate) fn see(
        &mut self,
        engine: &Engine,
        input: &Input,
        outcome: &Outcome,
        now_ms: u64,
    ) -> Option<Finding> {
        let manifest = engine.manifest();
        let reference = manifest.reference.as_ref();
        if self.model != engine.id() {
            self.model = engine.id().to_owned();
            self.last.clear();
            self.watch.measure_by(reference.map(|r| Yardstick {
                samples: r.samples,
                mean: r.mean.clone(),
                deviation: r.deviation.clone(),
                scores: r.scores.clone(),
                unknown: r.unknown,
            }));
        }
        let spec = &manifest.input;
        let (channels, _, width) = spec.channels_height_width();
        brightness(
            input.values(),
            spec.layout,
            channels,
            &spec.mean,
            &spec.std,
            &mut self.now,
        );
        let looks = looks(&self.now, width, &self.last);
        std::mem::swap(&mut self.now, &mut self.last);
        let novelty = reference
            .filter(|_| !outcome.embedding.is_empty())
            .map(|r| r.novelty(&outcome.embedding));
        let seen = Seen {
            unknown: outcome.label == UNKNOWN,
            score: outcome.score,
            embedding: &outcome.embedding,
            novelty,
            looks,
        };
        self.watch.see(&seen, now_ms)
    }
}

/// The mean of the channels of each pixel, 0..=255: the model's input taken back to what it was made from.
fn brightness(
    values: &[f32],
    layout: Layout,
    channels: usize,
    mean: &[f32],
    std: &[f32],
    gray: &mut Vec<u8>,
) {
    let channels = channels.max(1);
    let pixels = values.len() / channels;
    let scale = 255.0 / channels as f32;
    let sum: f32 = mean.iter().sum::<f32>() * scale;
    let weight = |channel: usize| std.get(channel).copied().unwrap_or(1.0) * scale;
    // Rounds; what is out of range ends at its end.
    let byte = |value: f32| (value + 0.5) as u8;
    gray.clear();
    match layout {
        Layout::Nhwc => gray.extend(values.chunks_exact(channels).map(|pixel| {
            let parts = pixel.iter().enumerate().map(|(c, v)| v * weight(c));
            byte(sum + parts.sum::<f32>())
        })),
        // Planes: the only other layout that there is.
        _ => {
            let planes: Vec<(&[f32], f32)> = values
                .chunks_exact(pixels.max(1))
                .enumerate()
                .map(|(c, plane)| (plane, weight(c)))
                .collect();
            if let [(red, r), (green, g), (blue, b)] = planes.as_slice() {
                let rows = red.iter().zip(*green).zip(*blue);
                gray.extend(rows.map(|((x, y), z)| byte(sum + x * r + y * g + z * b)));
            } else if let [(plane, weight)] = planes.as_slice() {
                gray.extend(plane.iter().map(|v| byte(sum + v * weight)));
            }
        }
    }
}

/// How a picture of gray pixels looks.
fn looks(gray: &[u8], width: usize, last: &[u8]) -> Looks {
    let count = gray.len().max(1) as f64;
    let (mut sum, mut squares) = (0u64, 0u64);
    for &pixel in gray {
        sum += u64::from(pixel);
        squares += u64::from(pixel) * u64::from(pixel);
    }
    let mean = sum as f64 / count;
    let variance = (squares as f64 / count - mean * mean).max(0.0);
    let (mut edges, mut edge_squares, mut inner) = (0i64, 0i64, 0u64);
    let rows: Vec<&[u8]> = gray.chunks_exact(width.max(1)).collect();
    for three in rows.windows(3) {
        let [above, row, below] = three else { continue };
        let middle = row
            .windows(3)
            .zip(above.iter().skip(1))
            .zip(below.iter().skip(1));
        for ((row, above), below) in middle {
            let [left, here, right] = row else { continue };
            let around = [above, below, left, right]
                .iter()
                .map(|p| i64::from(**p))
                .sum::<i64>();
            let edge = around - 4 * i64::from(*here);
            edges += edge;
            edge_squares += edge * edge;
            inner += 1;
        }
    }
    let inner = inner.max(1) as f64;
    let edge_mean = edges as f64 / inner;
    let change = (last.len() == gray.len() && !gray.is_empty()).then(|| {
        let sum: u64 = gray
            .iter()
            .zip(last)
            .map(|(a, b)| u64::from(a.abs_diff(*b)))
            .sum();
        (sum as f64 / count / 255.0) as f32
    });
    Looks {
        brightness: (mean / 255.0) as f32,
        contrast: (variance.sqrt() / 255.0) as f32,
        detail: ((edge_squares as f64 / inner - edge_mean * edge_mean).max(0.0) / (255.0 * 255.0))
            as f32,
        change,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_sound_and_mistakes_are_named() {
        assert_eq!(DriftConfig::default().mistakes(), []);
        let text =
            "frames = 1\nminutes = 0\nevery_s = 1\nscores = 0.0\nembedding = nan\ndark = 2.0";
        let config: DriftConfig = toml::from_str(text).unwrap();
        let fields: Vec<_> = config.mistakes().into_iter().map(|(f, _)| f).collect();
        assert_eq!(
            fields,
            [
                "frames",
                "minutes",
                "every_s",
                "scores",
                "embedding",
                "dark"
            ]
        );
    }

    #[test]
    fn the_input_is_taken_back_to_brightness() {
        let (mean, std) = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]);
        let pixels: Vec<[u8; 3]> = (0..64).map(|n| [n * 4, 255 - n, n]).collect();
        let value = |pixel: &[u8; 3], c: usize| (f32::from(pixel[c]) / 255.0 - mean[c]) / std[c];
        let wide: Vec<f32> = pixels
            .iter()
            .flat_map(|p| (0..3).map(|c| value(p, c)).collect::<Vec<_>>())
            .collect();
        let planes: Vec<f32> = (0..3)
            .flat_map(|c| pixels.iter().map(|p| value(p, c)).collect::<Vec<_>>())
            .collect();
        let expected: Vec<u8> = pixels
            .iter()
            .map(|p| (p.iter().map(|v| f32::from(*v)).sum::<f32>() / 3.0).round() as u8)
            .collect();
        let mut gray = Vec::new();
        for (values, layout) in [(wide, Layout::Nhwc), (planes, Layout::Nchw)] {
            brightness(&values, layout, 3, &mean, &std, &mut gray);
            assert!(gray.iter().zip(&expected).all(|(a, b)| a.abs_diff(*b) <= 1));
            assert_eq!(gray.len(), 64);
        }
    }

    #[test]
    fn looks_tell_dark_from_bright_and_sharp_from_blurred() {
        let sharp: Vec<u8> = (0..32 * 32)
            .map(|n| if (n / 4 + n / 128) % 2 == 0 { 200 } else { 40 })
            .collect();
        let flat = vec![120u8; 32 * 32];
        let a = looks(&sharp, 32, &[]);
        let b = looks(&flat, 32, &sharp);
        assert!(a.detail > 0.1 && b.detail < 1e-9);
        assert!(a.contrast > 0.25 && b.contrast < 1e-6);
        assert_eq!(a.change, None);
        assert!(b.change.unwrap() > 0.2);
        assert_eq!(looks(&flat, 32, &flat).change, Some(0.0));
        assert!((looks(&[255; 64], 8, &[]).brightness - 1.0).abs() < 1e-6);
        // Nothing to see is no reason to panic.
        assert_eq!(looks(&[], 0, &[]), Looks::default());
    }
}

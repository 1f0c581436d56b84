//! The synthetic camera: a drawn conveyor with parts, some of them faulty, and the truth about each.
//!
//! A frame is a pure function of the configuration and its number, so that any frame can be drawn
//! again anywhere. The camera is triggered once per part: every frame shows a new one, or none.

mod part;
mod pixels;

use image::RgbImage;
use serde::Deserialize;

use self::{
    part::Part,
    pixels::{Colour, Random, blur, hash, mix, noise_along},
};

/// What a frame can show. A truth's label is one of these.
pub const LABELS: [&str; 6] = ["ok", "scratch", "hole", "stain", "chip", "empty"];
/// Smallest width and height in pixels: below it a scratch is thinner than a pixel can show.
pub const MIN_SIDE: u32 = 64;
/// Greatest width in pixels: full HD, as large as the cameras that it stands in for.
pub const MAX_WIDTH: u32 = 1920;
/// Greatest height in pixels: full HD.
pub const MAX_HEIGHT: u32 = 1080;
/// Geometry is given in pixels of a picture this high, and scaled to the one asked for.
const DESIGN_HEIGHT: f32 = 240.0;
/// The belt's way between two parts.
const PITCH: f32 = 137.0;
/// Length of the endless belt in pitches: so short that a place on it keeps its precision as `f32`.
const BELT_PITCHES: u64 = 1_024;
/// From the belt's middle to the rail.
const HALF_BELT: f32 = 106.0;

/// What the synthetic camera draws.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct SceneConfig {
    /// Another seed is another day at the line.
    pub seed: u64,
    /// Width in pixels, 64 to 1920.
    pub width: u32,
    /// Height in pixels, 64 to 1080.
    pub height: u32,
    /// Share of the parts that have a fault, 0 to 1.
    pub defect_rate: f32,
    /// Share of the frames without a part, 0 to 1.
    pub empty_rate: f32,
    /// How the scene departs from what it was.
    pub drift: Drift,
}

impl Default for SceneConfig {
    fn default() -> Self {
        let drift = Drift::default();
        Self {
            seed: 1,
            width: 320,
            height: 240,
            defect_rate: 0.25,
            empty_rate: 0.1,
            drift,
        }
    }
}

impl SceneConfig {
    /// Values that cannot be drawn: the field, and what it must be.
    #[must_use]
    pub fn mistakes(&self) -> Vec<(&'static str, String)> {
        let mut all = Vec::new();
        for (field, value, most) in [
            ("width", self.width, MAX_WIDTH),
            ("height", self.height, MAX_HEIGHT),
        ] {
            if !(MIN_SIDE..=most).contains(&value) {
                all.push((field, format!("must lie between {MIN_SIDE} and {most}")));
            }
        }
        for (field, value, least) in [
            ("defect_rate", self.defect_rate, 0),
            ("empty_rate", self.empty_rate, 0),
            ("drift.light", self.drift.light, -1),
            ("drift.blur", self.drift.blur, 0),
            ("drift.background", self.drift.background, 0),
        ] {
            if !(least as f32..=1.0).contains(&value) {
                all.push((field, format!("must lie between {least} and 1")));
            }
        }
        all
    }
}

/// Amounts of change, 0 (none) to 1 (strong), reached from frame `onset` on over `ramp` frames.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Drift {
    /// The lamp ages, darker and warmer; below 0, down to -1, it is brighter and colder.
    pub light: f32,
    /// The lens loses its focus.
    pub blur: f32,
    /// Another belt: lighter, sandy, coarser, with stripes.
    pub background: f32,
    /// First frame that differs.
    pub onset: u64,
    /// Frames until the amounts are reached; 0 is at once.
    pub ramp: u64,
}

impl Drift {
    /// Share of the amounts that applies at a frame, 0 to 1.
    fn share(&self, frame: u64) -> f32 {
        match frame.checked_sub(self.onset) {
            None => 0.0,
            Some(past) if past >= self.ramp => 1.0,
            Some(past) => (past + 1) as f32 / (self.ramp + 1) as f32,
        }
    }
}

/// What a frame shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Truth {
    /// One of [`LABELS`].
    pub label: &'static str,
    /// The frame's number.
    pub frame: u64,
}

/// Draws a frame: an RGB picture of the configured size (clamped to its limits) and the truth about it.
pub fn draw(config: &SceneConfig, frame: u64) -> (RgbImage, Truth) {
    let (width, height) = (
        config.width.clamp(MIN_SIDE, MAX_WIDTH),
        config.height.clamp(MIN_SIDE, MAX_HEIGHT),
    );
    let mut random = Random::new(config.seed, frame);
    let label = if random.unit() < config.empty_rate {
        "empty"
    } else if random.unit() < config.defect_rate {
        ["scratch", "hole", "stain", "chip"][random.below(4)]
    } else {
        "ok"
    };
    let part = (label != "empty").then(|| Part::new(&mut random, label));
    let share = config.drift.share(frame);
    let belt = Belt::new(config, frame, share * config.drift.background);
    let light = share * config.drift.light;
    let exposure = (1.0 - 0.5 * light) * random.between(0.96, 1.04);
    let (warm, cold) = (light.max(0.0), (-light).max(0.0));
    let tint = [1.0 - 0.12 * cold, 1.0 - 0.14 * warm, 1.0 - 0.36 * warm].map(|c| c * exposure);
    let grain = random.next() as u32;
    let scale = DESIGN_HEIGHT / height as f32;
    let left = (0.5 - width as f32 / 2.0) * scale;
    let mut picture = RgbImage::new(width, height);
    let mut colours = vec![[0.0; 3]; width as usize];
    for (row, line) in picture.chunks_exact_mut(3 * width as usize).enumerate() {
        let y = (row as f32 + 0.5 - height as f32 / 2.0) * scale;
        belt.line(left, scale, y, &mut colours);
        for (column, (pixel, colour)) in line.chunks_exact_mut(3).zip(&mut colours).enumerate() {
            let x = left + column as f32 * scale;
            if let Some(part) = &part {
                part.paint(x, y, scale, colour);
            }
            // The lamp stands above the upper left corner.
            let lamp = 1.06 - 0.0008 * (x + y) - 0.000_004 * (x * x + y * y);
            let noise =
                7.0 * ((hash(column as i32, row as i32, grain) & 0xff) as f32 / 255.0 - 0.5);
            for ((byte, value), tint) in pixel.iter_mut().zip(*colour).zip(tint) {
                *byte = (value * lamp * tint * 255.0 + noise + 0.5) as u8;
            }
        }
    }
    let radius = (share * config.drift.blur * 3.5 / scale + 0.5) as usize;
    if radius > 0 {
        blur(&mut picture, radius);
    }
    (picture, Truth { label, frame })
}

/// Rubber belt between two steel rails, moving from frame to frame.
struct Belt {
    base: Colour,
    moved: f32,
    grain: u32,
    other: f32,
}

impl Belt {
    fn new(config: &SceneConfig, frame: u64, other: f32) -> Self {
        let mut random = Random::new(config.seed, u64::MAX);
        let mut base = [0.17, 0.25, 0.24].map(|c| c * random.between(0.85, 1.15));
        mix(&mut base, [0.62, 0.52, 0.36], 0.75 * other);
        let moved = (frame % BELT_PITCHES + BELT_PITCHES / 4) as f32 * PITCH;
        Self {
            base,
            moved,
            grain: random.next() as u32,
            other,
        }
    }

    /// Colours of a row at `y`, of places `step` apart beginning at `left`.
    fn line(&self, left: f32, step: f32, y: f32, colours: &mut [Colour]) {
        let mut noise = [vec![0.0; colours.len()], vec![0.0; colours.len()]];
        let [worn, fine] = &mut noise;
        let beyond = y.abs() - HALF_BELT;
        if beyond > 0.0 {
            noise_along(left * 0.03, step * 0.03, y * 0.9, self.grain, worn);
            let edge = 0.45 + 0.55 * (beyond * 0.5).min(1.0);
            for (colour, worn) in colours.iter_mut().zip(worn) {
                *colour = [0.56, 0.58, 0.6].map(|c| (c + 0.06 * *worn) * edge);
            }
            return;
        }
        let first = left + self.moved;
        noise_along(first * 0.045, step * 0.045, y * 0.045, self.grain, worn);
        noise_along(first * 0.45, step * 0.45, y * 0.45, self.grain ^ 0x55, fine);
        let shadow = 1.0 - 0.35 * ((12.0 + beyond) / 12.0).clamp(0.0, 1.0);
        for (index, colour) in colours.iter_mut().enumerate() {
            let along = first + index as f32 * step;
            let odd = ((along * 0.25) as i64 + (y * 0.25 + 64.0) as i64) & 1 == 1;
            let weave = if odd { 0.03 } else { -0.03 };
            let stripe = if along as i64 % 20 < 6 {
                0.35 * self.other
            } else {
                0.0
            };
            let rough =
                0.28 * (worn[index] - 0.5) + (0.22 + 0.5 * self.other) * (fine[index] - 0.5);
            *colour = self
                .base
                .map(|c| c * (1.0 + rough + weave - stripe) * shadow);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> SceneConfig {
        SceneConfig {
            width: 96,
            height: 72,
            ..SceneConfig::default()
        }
    }

    #[test]
    fn a_frame_is_a_function_of_seed_and_number() {
        let config = small();
        assert_eq!(draw(&config, 7), draw(&config, 7));
        assert_ne!(draw(&config, 7).0, draw(&config, 8).0);
        assert_ne!(
            draw(&config, 7).0,
            draw(&SceneConfig { seed: 2, ..config }, 7).0
        );
    }

    #[test]
    fn labels_come_at_the_rates_asked_for() {
        let config = SceneConfig {
            width: 64,
            height: 64,
            ..SceneConfig::default()
        };
        let count = 2_000;
        let mut seen = std::collections::BTreeMap::new();
        for frame in 0..count {
            *seen.entry(draw(&config, frame).1.label).or_insert(0_u64) += 1;
        }
        let share = |label: &str| seen.get(label).copied().unwrap_or(0) as f32 / count as f32;
        assert!(LABELS.iter().all(|label| share(label) > 0.02), "{seen:?}");
        assert!((share("empty") - 0.1).abs() < 0.02, "{seen:?}");
        assert!((share("ok") - 0.9 * 0.75).abs() < 0.03, "{seen:?}");
        assert_eq!(seen.len(), LABELS.len());
    }

    #[test]
    fn drift_begins_at_its_onset_and_grows() {
        let still = small();
        let away = |drift: Drift, frame| {
            let (then, now) = (
                draw(&still, frame),
                draw(
                    &SceneConfig {
                        drift,
                        ..still.clone()
                    },
                    frame,
                ),
            );
            assert_eq!(then.1, now.1, "drift never changes the truth");
            let pairs = then.0.iter().zip(now.0.iter());
            pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum::<u64>()
        };
        let ramp = Drift {
            onset: 10,
            ramp: 9,
            ..Drift::default()
        };
        for drift in [
            Drift {
                light: 1.0,
                ..ramp.clone()
            },
            Drift {
                light: -1.0,
                ..ramp.clone()
            },
            Drift {
                blur: 1.0,
                ..ramp.clone()
            },
            Drift {
                background: 1.0,
                ..ramp
            },
        ] {
            assert_eq!(away(drift.clone(), 9), 0);
            assert!(
                away(drift.clone(), 12) < away(drift.clone(), 19),
                "{drift:?}"
            );
            assert!(away(drift.clone(), 1_000) > 0, "{drift:?}");
        }
    }

    #[test]
    fn a_fault_changes_what_is_seen() {
        for frame in 0..200 {
            let faulty = SceneConfig {
                defect_rate: 1.0,
                empty_rate: 0.0,
                ..small()
            };
            let (picture, truth) = draw(&faulty, frame);
            let (sound, _) = draw(
                &SceneConfig {
                    defect_rate: 0.0,
                    ..faulty
                },
                frame,
            );
            assert_ne!(truth.label, "ok");
            assert_ne!(picture, sound, "frame {frame}");
        }
    }

    #[test]
    fn any_size_and_every_mistake() {
        for (width, height) in [(0, 0), (64, 64), (1920, 64), (65, 1080), (u32::MAX, 64)] {
            let (picture, _) = draw(
                &SceneConfig {
                    width,
                    height,
                    ..SceneConfig::default()
                },
                u64::MAX,
            );
            assert_eq!(picture.width(), width.clamp(MIN_SIDE, MAX_WIDTH));
        }
        assert!(SceneConfig::default().mistakes().is_empty());
        let drift = Drift {
            light: -2.0,
            blur: f32::NAN,
            background: -0.1,
            ..Drift::default()
        };
        let wrong = SceneConfig {
            seed: 0,
            width: 10,
            height: 2000,
            defect_rate: 1.1,
            empty_rate: -1.0,
            drift,
        };
        assert_eq!(wrong.mistakes().len(), 7);
    }
}

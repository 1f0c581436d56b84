//! Has what a source sees moved away from what training saw, or from what it used to see?
//!
//! Frames are summed up in blocks, five of which make a window; each time a block is full the window is judged.
//! Four signs compare with the model's training set, where its bundle describes it, and five need nothing but the
//! picture. A sign that is up goes down only when its number is clearly better: it does not flap.

mod block;
mod message;

use alloc::{collections::VecDeque, string::String, vec::Vec};

use block::Block;
pub use message::Drift;

/// Blocks of a window.
const BLOCKS: usize = 5;
/// Statistics of fewer frames say nothing.
const MIN_FRAMES: u32 = 50;
/// The same for the picture's health, which needs no statistics.
const MIN_PICTURES: u32 = 10;
/// A sign goes down at this share of its limit (or the limit over it, where low is bad).
const DOWN: f32 = 0.8;
/// A shift counts if it is so many times what chance would show.
const CHANCE: f32 = 3.0;
/// How fast the usual sharpness follows, per block: over a day or so, so that dirt on the lens is not usual soon.
const FOLLOW: f32 = 1.0 / 512.0;
/// A frame that differs less than this from the one before, on average over its pixels and as a share of full
/// scale, shows the same: a tenth of a gray level. Noise of a living camera is more.
pub const STILL: f32 = 0.0004;

/// How many frames make a window, and how often it is spoken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// At most so many frames, at least 5.
    pub frames: u32,
    /// At most so long, in milliseconds.
    pub length_ms: u64,
    /// While nothing changes it is said again after so long, in milliseconds.
    pub every_ms: u64,
}

/// Where each sign goes up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Share of unknown results beyond that of training, 0..=1.
    pub unknown: f32,
    /// Population stability index of the top scores: 0.1 is a small change, 0.25 a large one.
    pub scores: f32,
    /// Shift of the mean embedding, in training's standard deviations.
    pub embedding: f32,
    /// Median novelty: at 1 half of the frames are farther out than 99 of 100 training images.
    pub novelty: f32,
    /// Mean brightness below this is dark, 0..=1.
    pub dark: f32,
    /// Mean brightness above this is too bright, 0..=1.
    pub bright: f32,
    /// Detail below this share of the usual is blurred.
    pub blurred: f32,
    /// Contrast (standard deviation of brightness) below this is a blocked lens, 0..=1.
    pub blocked: f32,
    /// Share of frames that equal the one before from which on a source is frozen, 0..=1.
    pub frozen: f32,
}

/// What training saw, as far as it matters here.
#[derive(Clone, Debug, PartialEq)]
pub struct Yardstick {
    /// How many pictures it was taken from.
    pub samples: u64,
    /// Mean of each value of the embedding.
    pub mean: Vec<f32>,
    /// Standard deviation of each, above 0.
    pub deviation: Vec<f32>,
    /// Share of top scores in each tenth; empty where there are none.
    pub scores: Vec<f32>,
    /// Share of unknown results.
    pub unknown: f32,
}

/// How a picture looks, whatever is on it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Looks {
    /// Mean brightness, 0..=1.
    pub brightness: f32,
    /// Standard deviation of the brightness, 0..=1.
    pub contrast: f32,
    /// Variance of the Laplacian of the brightness: what is sharp has much of it.
    pub detail: f32,
    /// Mean difference to the frame before, 0..=1; nothing for the first.
    pub change: Option<f32>,
}

/// One frame.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// No class was sure enough.
    pub unknown: bool,
    /// The top score, 0..=1.
    pub score: f32,
    /// The embedding; may be empty.
    pub embedding: &'a [f32],
    /// Distance from training in units of its 99th percentile, where that is known.
    pub novelty: Option<f32>,
    /// The picture.
    pub looks: Looks,
}

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sign {
    /// More results than in training are unknown.
    Unknown,
    /// The scores are distributed otherwise than in training.
    Scores,
    /// The embeddings lie elsewhere on average than in training.
    Embedding,
    /// Most frames are unlike anything in training.
    Novelty,
    /// There is no light.
    Dark,
    /// There is too much light.
    Bright,
    /// Much less detail than usual.
    Blurred,
    /// Something covers the lens.
    Blocked,
    /// The same frame again and again.
    Frozen,
}

impl Sign {
    /// Every sign.
    pub const ALL: [Self; 9] = [
        Self::Unknown,
        Self::Scores,
        Self::Embedding,
        Self::Novelty,
        Self::Dark,
        Self::Bright,
        Self::Blurred,
        Self::Blocked,
        Self::Frozen,
    ];

    /// As it stands in messages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Scores => "scores",
            Self::Embedding => "embedding",
            Self::Novelty => "novelty",
            Self::Dark => "dark",
            Self::Bright => "bright",
            Self::Blurred => "blurred",
            Self::Blocked => "blocked",
            Self::Frozen => "frozen",
        }
    }
}

/// The numbers of a window. What cannot be told is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Numbers {
    /// Frames of the window.
    pub frames: u32,
    /// Share of unknown results.
    pub unknown: Option<f32>,
    /// Population stability index of the top scores, less what chance shows.
    pub scores: Option<f32>,
    /// Shift of the mean embedding, in training's standard deviations (root mean square over its values).
    pub shift: Option<f32>,
    /// The same in units of what a window of this size shows by chance.
    pub shift_chance: Option<f32>,
    /// Median novelty.
    pub novelty: Option<f32>,
    /// Mean brightness.
    pub brightness: f32,
    /// Mean contrast.
    pub contrast: f32,
    /// Median detail over the usual one of this source.
    pub detail: Option<f32>,
    /// Share of frames that equal the one before.
    pub still: f32,
}

/// What a window says.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// The signs that are up, in the order of [`Sign::ALL`].
    pub signs: Vec<Sign>,
    /// The numbers.
    pub numbers: Numbers,
    /// Signs went up or down.
    pub changed: bool,
}

impl Finding {
    /// The signs with commas between them.
    #[must_use]
    pub fn names(&self) -> String {
        let names: Vec<&str> = self.signs.iter().map(|sign| sign.as_str()).collect();
        names.join(",")
    }
}

/// Watches one source under one model. Time is an argument: milliseconds of any clock that only goes forward.
#[derive(Clone, Debug)]
pub struct Watch {
    window: Window,
    limits: Limits,
    yardstick: Option<Yardstick>,
    full: VecDeque<Block>,
    block: Block,
    usual_detail: Option<f32>,
    up: [bool; Sign::ALL.len()],
    said_ms: Option<u64>,
}

impl Watch {
    /// Has seen nothing yet.
    #[must_use]
    pub fn new(window: Window, limits: Limits, yardstick: Option<Yardstick>) -> Self {
        Self {
            window,
            limits,
            yardstick,
            full: VecDeque::new(),
            block: Block::default(),
            usual_detail: None,
            up: [false; Sign::ALL.len()],
            said_ms: None,
        }
    }

    /// Starts over with another model; the picture's usual look stays.
    pub fn measure_by(&mut self, yardstick: Option<Yardstick>) {
        *self = Self {
            usual_detail: self.usual_detail,
            ..Self::new(self.window, self.limits, yardstick)
        };
    }

    /// Takes a frame in; says something if there is something to say.
    pub fn see(&mut self, seen: &Seen<'_>, now_ms: u64) -> Option<Finding> {
        self.block.add(seen, now_ms);
        let parts = BLOCKS as u32;
        let full = self.block.frames >= (self.window.frames / parts).max(1)
            || now_ms.saturating_sub(self.block.opened_ms) >= self.window.length_ms / BLOCKS as u64;
        if !full {
            return None;
        }
        self.full.push_back(core::mem::take(&mut self.block));
        let length = self.window.length_ms + self.window.length_ms / BLOCKS as u64;
        while self.full.len() > BLOCKS
            || self
                .full
                .front()
                .is_some_and(|b| now_ms.saturating_sub(b.opened_ms) > length && self.full.len() > 1)
        {
            self.full.pop_front();
        }
        let numbers = self.numbers();
        let changed = self.judge(&numbers);
        self.learn_usual();
        let due = self
            .said_ms
            .is_none_or(|said| now_ms.saturating_sub(said) >= self.window.every_ms);
        if numbers.frames < MIN_PICTURES || !(changed || due) {
            return None;
        }
        self.said_ms = Some(now_ms);
        Some(Finding {
            signs: self.signs(),
            numbers,
            changed,
        })
    }

    /// The signs that are up.
    #[must_use]
    pub fn signs(&self) -> Vec<Sign> {
        let up = Sign::ALL.into_iter().zip(self.up);
        up.filter(|(_, up)| *up).map(|(sign, _)| sign).collect()
    }

    fn numbers(&self) -> Numbers {
        let all = Block::sum(&self.full);
        let enough = all.frames >= MIN_FRAMES;
        let count = all.frames.max(1) as f32;
        let yardstick = self.yardstick.as_ref().filter(|y| enough && y.samples > 0);
        let shift = yardstick.and_then(|y| all.shift(y));
        let by_chance = yardstick.map(|y| libm::sqrtf(1.0 / count + 1.0 / y.samples as f32));
        Numbers {
            frames: all.frames,
            unknown: enough.then_some(all.unknown as f32 / count),
            scores: yardstick.and_then(|y| all.stability(y)),
            shift,
            shift_chance: shift.zip(by_chance).map(|(shift, chance)| shift / chance),
            novelty: (enough && yardstick.is_some())
                .then(|| block::median(&all.novelties))
                .flatten(),
            brightness: all.brightness / count,
            contrast: all.contrast / count,
            detail: block::median(&all.details)
                .zip(self.usual_detail)
                .map(|(now, usual)| now / usual.max(f32::MIN_POSITIVE)),
            still: all.still as f32 / all.pairs.max(1) as f32,
        }
    }

    /// Moves the signs; true if one went up or down.
    fn judge(&mut self, numbers: &Numbers) -> bool {
        let Limits {
            unknown,
            scores,
            embedding,
            novelty,
            dark,
            bright,
            blurred,
            blocked,
            frozen,
        } = self.limits;
        let health = (numbers.frames >= MIN_PICTURES).then_some(());
        let count = numbers.frames.max(1) as f32;
        let more_unknown = self
            .yardstick
            .as_ref()
            .zip(numbers.unknown)
            .map(|(y, share)| {
                // What chance may add is no sign.
                let chance = CHANCE * libm::sqrtf((y.unknown * (1.0 - y.unknown)).max(0.0) / count);
                (share - y.unknown - chance).max(0.0)
            });
        let real_shift = numbers
            .shift
            .zip(numbers.shift_chance)
            .map(|(shift, times)| if times >= CHANCE { shift } else { 0.0 });
        // Brightness towards white: the distance from it, so that a limit near 1 has room to come down.
        let states = [
            (more_unknown, unknown, true),
            (numbers.scores, scores, true),
            (real_shift, embedding, true),
            (numbers.novelty, novelty, true),
            (health.map(|()| numbers.brightness), dark, false),
            (
                health.map(|()| 1.0 - numbers.brightness),
                1.0 - bright,
                false,
            ),
            (numbers.detail, blurred, false),
            (health.map(|()| numbers.contrast), blocked, false),
            (health.map(|()| numbers.still), frozen, true),
        ];
        let mut changed = false;
        for (up, (value, limit, high_is_bad)) in self.up.iter_mut().zip(states) {
            if let Some(value) = value.filter(|value| value.is_finite()) {
                let now = latch(*up, value, limit, high_is_bad);
                changed |= now != *up;
                *up = now;
            }
        }
        changed
    }

    /// Sharpness is usual while nothing is wrong with the picture.
    fn learn_usual(&mut self) {
        let sick = [Sign::Dark, Sign::Bright, Sign::Blurred, Sign::Blocked];
        let too_early = self.full.len() < BLOCKS && self.usual_detail.is_none();
        if too_early || self.signs().iter().any(|sign| sick.contains(sign)) {
            return;
        }
        let all = Block::sum(&self.full);
        let Some(now) = block::median(&all.details) else {
            return;
        };
        self.usual_detail = Some(match self.usual_detail {
            Some(usual) => usual + (now - usual) * FOLLOW,
            None => now,
        });
    }
}

/// Up at the limit, down when clearly on the right side of it.
fn latch(up: bool, value: f32, limit: f32, high_is_bad: bool) -> bool {
    match (high_is_bad, up) {
        (true, false) => value >= limit,
        (true, true) => value >= limit * DOWN,
        (false, false) => value <= limit,
        (false, true) => value <= limit / DOWN,
    }
}

#[cfg(test)]
mod tests;

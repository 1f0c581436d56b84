//! The sums of some frames.

use alloc::{collections::VecDeque, vec::Vec};

use super::{STILL, Seen, Yardstick};

/// Steps of the histogram of top scores.
const BINS: usize = 10;

/// Some frames, as far as they matter for drift.
#[derive(Clone, Debug, Default)]
pub(super) struct Block {
    pub(super) opened_ms: u64,
    pub(super) frames: u32,
    pub(super) unknown: u32,
    bins: [u32; BINS],
    embedding: Vec<f64>,
    /// How many embeddings were summed up.
    embedded: u32,
    pub(super) novelties: Vec<f32>,
    pub(super) brightness: f32,
    pub(super) contrast: f32,
    pub(super) details: Vec<f32>,
    pub(super) still: u32,
    /// Frames that had one before.
    pub(super) pairs: u32,
}

impl Block {
    pub(super) fn add(&mut self, seen: &Seen<'_>, now_ms: u64) {
        if self.frames == 0 {
            self.opened_ms = now_ms;
        }
        self.frames = self.frames.saturating_add(1);
        self.unknown += u32::from(seen.unknown);
        let bin = (seen.score.clamp(0.0, 1.0) * BINS as f32) as usize;
        if let Some(bin) = self.bins.get_mut(bin.min(BINS - 1)) {
            *bin += 1;
        }
        if self.embedding.is_empty() {
            self.embedding.resize(seen.embedding.len(), 0.0);
        }
        let fits = !seen.embedding.is_empty() && seen.embedding.len() == self.embedding.len();
        if fits && seen.embedding.iter().all(|value| value.is_finite()) {
            self.embedded += 1;
            for (sum, value) in self.embedding.iter_mut().zip(seen.embedding) {
                *sum += f64::from(*value);
            }
        }
        self.novelties
            .extend(seen.novelty.filter(|n| n.is_finite()));
        let finite = |value: f32| if value.is_finite() { value } else { 0.0 };
        self.brightness += finite(seen.looks.brightness);
        self.contrast += finite(seen.looks.contrast);
        self.details.push(finite(seen.looks.detail));
        if let Some(change) = seen.looks.change {
            self.pairs += 1;
            self.still += u32::from(change < STILL);
        }
    }

    /// Several as one.
    pub(super) fn sum(blocks: &VecDeque<Self>) -> Self {
        let mut all = Self::default();
        for block in blocks {
            if all.frames == 0 {
                all.opened_ms = block.opened_ms;
            }
            all.frames += block.frames;
            all.unknown += block.unknown;
            for (sum, count) in all.bins.iter_mut().zip(block.bins) {
                *sum += count;
            }
            if all.embedding.is_empty() {
                all.embedding.resize(block.embedding.len(), 0.0);
            }
            if all.embedding.len() == block.embedding.len() {
                all.embedded += block.embedded;
                for (sum, part) in all.embedding.iter_mut().zip(&block.embedding) {
                    *sum += part;
                }
            }
            all.novelties.extend(&block.novelties);
            all.brightness += block.brightness;
            all.contrast += block.contrast;
            all.details.extend(&block.details);
            all.still += block.still;
            all.pairs += block.pairs;
        }
        all
    }

    /// How far the mean embedding lies from training's, in deviations.
    pub(super) fn shift(&self, yardstick: &Yardstick) -> Option<f32> {
        if self.embedded == 0 || self.embedding.len() != yardstick.mean.len() {
            return None;
        }
        let count = f64::from(self.embedded);
        let scaled = self
            .embedding
            .iter()
            .zip(&yardstick.mean)
            .zip(&yardstick.deviation);
        let sum: f64 = scaled
            .map(|((sum, mean), deviation)| {
                let away = (sum / count - f64::from(*mean)) / f64::from(*deviation);
                away * away
            })
            .sum();
        Some(libm::sqrt(sum / self.embedding.len() as f64) as f32)
    }

    /// Population stability index of the top scores: Σ (now − then) · ln(now / then) over the tenths, less what
    /// chance adds for so many frames and training pictures, at least 0. By chance alone it is about χ² with one degree
    /// less than there are tenths, over the frames: its mean and two deviations are taken off.
    pub(super) fn stability(&self, yardstick: &Yardstick) -> Option<f32> {
        if yardstick.scores.len() != BINS || self.frames == 0 {
            return None;
        }
        // A tenth that nobody was in is not impossible, only rare: half a picture.
        let smooth = |count: f32, of: f32| (count + 0.5) / (of + 0.5 * BINS as f32);
        let (now, then) = (self.frames as f32, yardstick.samples as f32);
        let index: f32 = self
            .bins
            .iter()
            .zip(&yardstick.scores)
            .map(|(count, share)| {
                let (now, then) = (smooth(*count as f32, now), smooth(share * then, then));
                (now - then) * libm::logf(now / then)
            })
            .sum();
        let degrees = (BINS - 1) as f32;
        let chance =
            (degrees + 2.0 * libm::sqrtf(2.0 * degrees)) * (1.0 / now + 1.0 / then.max(1.0));
        Some((index - chance).max(0.0))
    }
}

/// The middle value.
pub(super) fn median(values: &[f32]) -> Option<f32> {
    let mut sorted = Vec::from(values);
    let middle = sorted.len() / 2;
    if sorted.is_empty() {
        return None;
    }
    let (_, median, _) = sorted.select_nth_unstable_by(middle, f32::total_cmp);
    Some(*median)
}

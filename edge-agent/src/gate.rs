//! The gate: which frames are worth looking at. Pure.

use models::Picture;
use serde::Deserialize;

/// Every how many frames, and how much must have moved.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GateConfig {
    /// Only every n-th frame, at least 1.
    pub every: u32,
    /// Only frames whose brightness differs from the last one that passed by at least this share of full
    /// scale, on average over a coarse grid: 0 lets everything pass, 0.02 notices a person in the picture.
    pub motion: f32,
}

impl Default for GateConfig {
    fn default() -> Self {
        Self {
            every: 1,
            motion: 0.0,
        }
    }
}

impl GateConfig {
    /// Values that cannot be meant.
    #[must_use]
    pub fn mistakes(&self) -> Vec<(&'static str, &'static str)> {
        let mut all = Vec::new();
        if self.every == 0 {
            all.push(("every", "must be at least 1"));
        }
        if !(0.0..=1.0).contains(&self.motion) {
            all.push(("motion", "must lie between 0 and 1"));
        }
        all
    }
}

/// Cells along each side of the grid on which motion is judged: coarse enough to ignore noise.
const GRID: usize = 16;

/// One source's gate.
#[derive(Debug)]
pub struct Gate {
    config: GateConfig,
    last: Option<[f32; GRID * GRID]>,
}

impl Gate {
    /// Lets the first frame pass.
    #[must_use]
    pub const fn new(config: GateConfig) -> Self {
        Self { config, last: None }
    }

    /// Does this frame pass?
    pub fn pass(&mut self, number: u64, picture: &Picture) -> bool {
        if !number.is_multiple_of(u64::from(self.config.every.max(1))) {
            return false;
        }
        if self.config.motion <= 0.0 {
            return true;
        }
        let grid = grid(picture);
        if let Some(last) = &self.last {
            let moved: f32 = grid
                .iter()
                .zip(last)
                .map(|(a, b)| (a - b).abs())
                .sum::<f32>()
                / grid.len() as f32;
            if moved < self.config.motion {
                return false;
            }
        }
        self.last = Some(grid);
        true
    }
}

/// Mean brightness of each cell, 0..=1, from at least two by two pixels of it where there are as many, and
/// from no more than every fourth otherwise: a grid costs little beside decoding the picture.
fn grid(picture: &Picture) -> [f32; GRID * GRID] {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let step = |side: usize| (side / (2 * GRID)).clamp(1, 4);
    let mut sums = [(0u32, 0u32); GRID * GRID];
    for y in (0..height).step_by(step(height)) {
        let row = picture
            .rgb()
            .get(y * width * 3..(y + 1) * width * 3)
            .unwrap_or_default();
        for (x, pixel) in row.chunks_exact(3).enumerate().step_by(step(width)) {
            let cell = (y * GRID / height) * GRID + x * GRID / width;
            if let Some((sum, count)) = sums.get_mut(cell) {
                *sum += pixel.iter().map(|c| u32::from(*c)).sum::<u32>();
                *count += 3;
            }
        }
    }
    sums.map(|(sum, count)| {
        if count == 0 {
            0.0
        } else {
            sum as f32 / (count as f32 * 255.0)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey(value: u8) -> Picture {
        Picture::from_rgb(64, 48, vec![value; 64 * 48 * 3]).unwrap()
    }

    #[test]
    fn every_nth() {
        let mut gate = Gate::new(GateConfig {
            every: 3,
            motion: 0.0,
        });
        let passed: Vec<_> = (0..7).filter(|n| gate.pass(*n, &grey(0))).collect();
        assert_eq!(passed, [0, 3, 6]);
    }

    #[test]
    fn motion_is_judged_against_the_last_frame_that_passed() {
        let mut gate = Gate::new(GateConfig {
            every: 1,
            motion: 0.05,
        });
        // A slow drift of 4/255 a frame: each step is below the threshold, their sum is not.
        let passed: Vec<_> = (0..9u8)
            .filter(|n| gate.pass(u64::from(*n), &grey(100 + n * 4)))
            .collect();
        assert_eq!(passed, [0, 4, 8]);
    }

    #[test]
    fn tiny_pictures_have_a_grid_too() {
        let mut gate = Gate::new(GateConfig {
            every: 1,
            motion: 0.5,
        });
        let dot = |v| Picture::from_rgb(1, 1, vec![v; 3]).unwrap();
        assert!(gate.pass(0, &dot(0)));
        assert!(!gate.pass(1, &dot(255)), "one cell of 256 moved");
    }
}

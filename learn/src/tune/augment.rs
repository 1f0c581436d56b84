//! Small changes of a picture that do not change what it shows.

use super::{ops::Shape, random::Random};

/// What may happen to a picture, each time it is shown. The same seed gives the same pictures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Augment {
    /// Mirrored left to right every second time.
    pub mirror: bool,
    /// Moved by up to so many pixels in either direction; the border repeats.
    pub shift: usize,
    /// Values times up to `1 ± light`, plus up to `± light`, in units of the network's input.
    pub light: f32,
}

impl Augment {
    /// `from` and `to` are one picture, `[C, H, W]`.
    pub(super) fn apply(&self, random: &mut Random, shape: Shape, from: &[f32], to: &mut [f32]) {
        let mirror = self.mirror && random.below(2) == 1;
        let range = 2 * self.shift + 1;
        let (down, right) = (random.below(range), random.below(range));
        let gain = 1.0 + self.light * random.signed();
        let offset = self.light * random.signed();
        let moved =
            |at: usize, by: usize, len: usize| (at + by).saturating_sub(self.shift).min(len - 1);
        let planes = to
            .chunks_exact_mut(shape.pixels())
            .zip(from.chunks_exact(shape.pixels()));
        for (to, from) in planes {
            for (y, to) in to.chunks_exact_mut(shape.w).enumerate() {
                let from = &from[moved(y, down, shape.h) * shape.w..][..shape.w];
                for (x, to) in to.iter_mut().enumerate() {
                    let x = moved(x, right, shape.w);
                    let x = if mirror { shape.w - 1 - x } else { x };
                    *to = from[x] * gain + offset;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides() {
        let shape = Shape::picture(1, 4, 4);
        let from: Vec<f32> = (0..16u8).map(f32::from).collect();
        let augment = Augment {
            mirror: true,
            shift: 1,
            light: 0.1,
        };
        let run = |seed| {
            let mut to = vec![0.0; 16];
            augment.apply(&mut Random::new(&[seed]), shape, &from, &mut to);
            to
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        let mut to = vec![0.0; 16];
        let nothing = Augment {
            mirror: false,
            shift: 0,
            light: 0.0,
        };
        nothing.apply(&mut Random::new(&[1]), shape, &from, &mut to);
        assert_eq!(to, from);
    }
}

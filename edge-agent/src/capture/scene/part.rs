//! The parts on the belt and their faults. Lengths are in pixels of a picture 240 high.

use super::pixels::{Colour, Random, length, mix, smooth_noise};

/// Half the side of the square around a part's centre that holds it and its shadow.
const REACH: f32 = 88.0;
/// Tries to find a place for a fault on the part; a washer has the least room, about one place in twenty.
const TRIES: u32 = 64;
/// Width of the lit edge of a part.
const BEVEL: f32 = 4.0;

#[derive(Clone, Copy, Debug)]
enum Shape {
    Washer,
    Plate,
    Bracket,
    Nut,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    Scratch {
        from: (f32, f32),
        to: (f32, f32),
        half_width: f32,
    },
    Hole {
        at: (f32, f32),
        radius: f32,
    },
    Stain {
        at: (f32, f32),
        radius: f32,
    },
    Chip {
        at: (f32, f32),
        radius: f32,
    },
}

/// One part where it lies, with its fault.
#[derive(Debug)]
pub(super) struct Part {
    shape: Shape,
    centre: (f32, f32),
    /// Cosine and sine of its turn.
    turn: (f32, f32),
    size: f32,
    metal: Colour,
    grain: u32,
    fault: Fault,
}

impl Part {
    /// Chooses a part and gives it the fault that the label names.
    pub(super) fn new(random: &mut Random, label: &str) -> Self {
        let shape = [Shape::Washer, Shape::Plate, Shape::Bracket, Shape::Nut][random.below(4)];
        let metals = [
            [0.72, 0.74, 0.77],
            [0.78, 0.66, 0.38],
            [0.76, 0.52, 0.4],
            [0.5, 0.58, 0.7],
        ];
        let brightness = random.between(0.9, 1.1);
        let angle = random.between(0.0, std::f32::consts::TAU);
        let mut part = Self {
            shape,
            centre: (random.between(-42.0, 42.0), random.between(-16.0, 16.0)),
            turn: (angle.cos(), angle.sin()),
            size: random.between(0.92, 1.1),
            metal: metals[random.below(4)].map(|c| c * brightness),
            grain: random.next() as u32,
            fault: Fault::None,
        };
        part.fault = part.place(random, label);
        part
    }

    /// Puts the fault where the part has material.
    fn place(&self, random: &mut Random, label: &str) -> Fault {
        let mut within = |depth: f32| {
            let mut best = ((0.0, 0.0), f32::MAX);
            for _ in 0..TRIES {
                let at = (random.between(-62.0, 62.0), random.between(-50.0, 50.0));
                let distance = self.outline(at.0, at.1);
                if distance < best.1 {
                    best = (at, distance);
                }
                if distance < -depth {
                    break;
                }
            }
            best.0
        };
        match label {
            "scratch" => {
                // The longest of several ways between two places on the part.
                let ends: [(f32, f32); 6] = std::array::from_fn(|_| within(3.0));
                let way = |b: &(f32, f32)| length(b.0 - ends[0].0, b.1 - ends[0].1);
                let to = ends
                    .iter()
                    .copied()
                    .max_by(|a, b| way(a).total_cmp(&way(b)));
                let half_width = random.between(1.3, 2.0);
                Fault::Scratch {
                    from: ends[0],
                    to: to.unwrap_or_default(),
                    half_width,
                }
            }
            "hole" => Fault::Hole {
                at: within(12.0),
                radius: random.between(6.5, 9.0),
            },
            "stain" => Fault::Stain {
                at: within(9.0),
                radius: random.between(17.0, 26.0),
            },
            "chip" => {
                let angle = random.between(0.0, std::f32::consts::TAU);
                let (sine, cosine) = angle.sin_cos();
                let edge = (0..80)
                    .rev()
                    .find(|&r| self.outline(cosine * r as f32, sine * r as f32) < 0.0);
                let r = edge.unwrap_or_default() as f32;
                Fault::Chip {
                    at: (cosine * r, sine * r),
                    radius: random.between(11.0, 16.0),
                }
            }
            _ => Fault::None,
        }
    }

    /// Distance to the edge of the faultless part in its own coordinates; negative inside.
    fn outline(&self, x: f32, y: f32) -> f32 {
        let hole = |cx: f32, cy: f32, r: f32| r - length(x - cx, y - cy);
        let slab = |cx: f32, cy: f32, w: f32, h: f32| {
            let (dx, dy) = ((x - cx).abs() - w + 5.0, (y - cy).abs() - h + 5.0);
            length(dx.max(0.0), dy.max(0.0)) + dx.max(dy).min(0.0) - 5.0
        };
        match self.shape {
            Shape::Washer => (length(x, y) - 54.0).max(hole(0.0, 0.0, 20.0)),
            Shape::Plate => slab(0.0, 0.0, 62.0, 40.0)
                .max(hole(-42.0, 0.0, 8.0))
                .max(hole(42.0, 0.0, 8.0)),
            Shape::Bracket => slab(-8.0, 26.0, 54.0, 20.0)
                .min(slab(-42.0, -4.0, 20.0, 50.0))
                .max(hole(26.0, 26.0, 8.0))
                .max(hole(-42.0, -34.0, 8.0)),
            Shape::Nut => {
                let hexagon = x.abs().max(0.5 * x.abs() + 0.866 * y.abs()) - 50.0;
                hexagon.max(hole(0.0, 0.0, 23.0))
            }
        }
    }

    /// The same with chips and holes taken out.
    fn edge(&self, x: f32, y: f32) -> f32 {
        let whole = self.outline(x, y);
        match self.fault {
            Fault::Chip { at, radius } | Fault::Hole { at, radius } => {
                let ragged = 5.0 * (smooth_noise(x * 0.22, y * 0.22, self.grain) - 0.5);
                whole.max(radius + ragged - length(x - at.0, y - at.1))
            }
            _ => whole,
        }
    }

    /// Paints shadow, metal and fault over the belt at a place; `pixel` is a pixel's side.
    pub(super) fn paint(&self, x: f32, y: f32, pixel: f32, colour: &mut Colour) {
        let (x, y) = (x - self.centre.0, y - self.centre.1);
        if x.abs().max(y.abs()) > REACH {
            return;
        }
        let local = |x: f32, y: f32| {
            let (x, y) = (x / self.size, y / self.size);
            (
                x * self.turn.0 + y * self.turn.1,
                y * self.turn.0 - x * self.turn.1,
            )
        };
        let (sx, sy) = local(x - 5.0, y - 6.0);
        let dark = 0.55 * (0.5 - self.edge(sx, sy) / 8.0).clamp(0.0, 1.0);
        mix(colour, [0.02, 0.03, 0.03], dark);
        let (px, py) = local(x, y);
        let distance = self.edge(px, py);
        let cover = (0.5 - distance / pixel).clamp(0.0, 1.0);
        if cover <= 0.0 {
            return;
        }
        let brushed = smooth_noise(px * 0.06, py * 0.9, self.grain ^ 0x77) - 0.5;
        let mut shade = 1.0 + 0.13 * brushed - 0.0012 * (x + y);
        if distance > -BEVEL {
            // The edge slopes: light on the side of the lamp, dark on the other.
            let (ux, uy) = local(x - 1.0, y - 1.0);
            let slope = (self.edge(ux, uy) - distance).clamp(-1.0, 1.0);
            shade += 0.3 * slope * (1.0 + distance / BEVEL).clamp(0.0, 1.0);
        }
        let mut metal = self.metal.map(|c| c * shade);
        self.mark(px, py, &mut metal);
        mix(colour, metal, cover);
    }

    /// Changes the metal's colour where the fault is.
    fn mark(&self, x: f32, y: f32, metal: &mut Colour) {
        match self.fault {
            Fault::None | Fault::Chip { .. } => {}
            Fault::Scratch {
                from,
                to,
                half_width,
            } => {
                let (dx, dy) = (to.0 - from.0, to.1 - from.1);
                let square = (dx * dx + dy * dy).max(1.0);
                let t = (((x - from.0) * dx + (y - from.1) * dy) / square).clamp(0.0, 1.0);
                let side = ((x - from.0) * dy - (y - from.1) * dx) / square.sqrt();
                let away = length(x - from.0 - t * dx, y - from.1 - t * dy);
                let ridge = if side > 0.0 {
                    [0.16, 0.15, 0.15]
                } else {
                    [1.0, 1.0, 0.98]
                };
                mix(metal, ridge, (half_width + 0.5 - away).clamp(0.0, 0.9));
            }
            Fault::Hole { at, radius } => {
                let rim = length(x - at.0, y - at.1) - radius;
                mix(metal, [0.2, 0.12, 0.1], (0.9 - rim / 6.0).clamp(0.0, 0.7));
            }
            Fault::Stain { at, radius } => {
                let ragged = 14.0 * (smooth_noise(x * 0.11, y * 0.11, self.grain ^ 0x99) - 0.5);
                let depth = (radius + ragged - length(x - at.0, y - at.1)) / 6.0;
                mix(metal, [0.3, 0.2, 0.1], (0.72 * depth).clamp(0.0, 0.72));
            }
        }
    }
}

//! What drawing needs: random numbers, smooth noise, blur. The same numbers on every machine.

use image::RgbImage;

/// Red, green, blue, 0 to 1.
pub(super) type Colour = [f32; 3];

/// Moves a colour towards another by a share of the way.
pub(super) fn mix(colour: &mut Colour, other: Colour, share: f32) {
    for (value, other) in colour.iter_mut().zip(other) {
        *value += (other - *value) * share;
    }
}

/// A counter hashed by SplitMix64: the same numbers on every machine.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    /// Another stream of one seed is another series of numbers.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut start = Self(seed);
        Self(start.next() ^ stream.wrapping_mul(0xd134_2543_de82_ef95))
    }

    /// All 64 bits.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 ≤ value < 1, a multiple of 2⁻²⁴.
    pub(super) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / 16_777_216.0
    }

    /// least ≤ value ≤ most.
    pub(super) fn between(&mut self, least: f32, most: f32) -> f32 {
        least + (most - least) * self.unit()
    }

    /// A number less than `count`.
    pub(super) fn below(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }
}

/// A number that looks random, from a place.
pub(super) fn hash(x: i32, y: i32, seed: u32) -> u32 {
    let mut h = (x as u32).wrapping_mul(0x85eb_ca6b) ^ (y as u32).wrapping_mul(0xc2b2_ae35) ^ seed;
    h = (h ^ (h >> 15)).wrapping_mul(0x2c1b_3c6d);
    h = (h ^ (h >> 12)).wrapping_mul(0x297a_2d39);
    h ^ (h >> 15)
}

fn fraction(x: i32, y: i32, seed: u32) -> f32 {
    (hash(x, y, seed) >> 8) as f32 / 16_777_216.0
}

/// Greatest whole number not above `x`, which fits an `i32`; faster than the library's on plain x86-64.
fn floor(x: f32) -> i32 {
    let whole = x as i32;
    whole - i32::from(whole as f32 > x)
}

/// Length of a vector: one exact instruction, unlike `hypot`.
pub(super) fn length(x: f32, y: f32) -> f32 {
    (x * x + y * y).sqrt()
}

fn ease(t: f32) -> f32 {
    t * t * (3.0 - 2.0 * t)
}

/// Noise 0 to 1 that is smooth between the points of a grid of step 1.
pub(super) fn smooth_noise(x: f32, y: f32, seed: u32) -> f32 {
    let (column, row) = (floor(x), floor(y));
    let (s, t) = (ease(x - column as f32), ease(y - row as f32));
    let at = |dx: i32, dy: i32| fraction(column + dx, row + dy, seed);
    let upper = at(0, 0) + (at(1, 0) - at(0, 0)) * s;
    let lower = at(0, 1) + (at(1, 1) - at(0, 1)) * s;
    upper + (lower - upper) * t
}

/// [`smooth_noise`] at `start`, `start + step`, … along a row, into `values`: a hash per grid point, not per value.
pub(super) fn noise_along(start: f32, step: f32, y: f32, seed: u32, values: &mut [f32]) {
    let row = floor(y);
    let t = ease(y - row as f32);
    let column_value = |column: i32| {
        let (upper, lower) = (fraction(column, row, seed), fraction(column, row + 1, seed));
        upper + (lower - upper) * t
    };
    let (mut cell, mut left, mut right) = (i32::MIN, 0.0, 0.0);
    for (index, value) in values.iter_mut().enumerate() {
        let x = start + index as f32 * step;
        let column = floor(x);
        if column != cell {
            (cell, left, right) = (column, column_value(column), column_value(column + 1));
        }
        *value = left + (right - left) * ease(x - column as f32);
    }
}

/// Two running means each way: close to a Gaussian, at a cost that does not grow with the radius.
pub(super) fn blur(picture: &mut RgbImage, radius: usize) {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let mut line = vec![0_u8; width.max(height)];
    for _ in 0..2 {
        for channel in 0..3 {
            for row in 0..height {
                blur_line(
                    picture,
                    row * width * 3 + channel,
                    3,
                    radius,
                    &mut line[..width],
                );
            }
            for column in 0..width {
                blur_line(
                    picture,
                    column * 3 + channel,
                    width * 3,
                    radius,
                    &mut line[..height],
                );
            }
        }
    }
}

/// Running mean along one line of one channel: bytes at first, first + step, …
fn blur_line(bytes: &mut [u8], first: usize, step: usize, radius: usize, line: &mut [u8]) {
    for (index, value) in line.iter_mut().enumerate() {
        *value = bytes[first + index * step];
    }
    let last = line.len() - 1;
    let window = 2 * radius as u32 + 1;
    let mut sum: u32 = u32::from(line[0]) * radius as u32;
    sum += (0..=radius)
        .map(|i| u32::from(line[i.min(last)]))
        .sum::<u32>();
    for index in 0..line.len() {
        bytes[first + index * step] = ((sum + window / 2) / window) as u8;
        sum += u32::from(line[(index + radius + 1).min(last)]);
        sum -= u32::from(line[index.saturating_sub(radius)]);
    }
}

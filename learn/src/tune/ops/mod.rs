//! The operators, forward and backward, on chunks of pictures of layout NHWC.
//!
//! Every function takes the number of pictures `n` that the chunk holds. A backward function that is given
//! `add` adds to the gradient that is there, and replaces it otherwise.

pub(super) mod binary;
pub(super) mod conv;
pub(super) mod depthwise;
pub(super) mod point;
pub(super) mod pool;

use super::kernel::SLACK;

/// Pictures that one thread works on at a time. Part of the result: sums are taken chunk by chunk.
pub(super) const CHUNK: usize = 8;

/// What one picture's value looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Channels, or values if flat.
    pub(super) c: usize,
    /// Rows.
    pub(super) h: usize,
    /// Columns.
    pub(super) w: usize,
    /// `[N, C]` in the file rather than `[N, C, H, W]`; rows and columns are 1.
    pub(super) flat: bool,
}

impl Shape {
    pub(super) const fn flat(c: usize) -> Self {
        Self {
            c,
            h: 1,
            w: 1,
            flat: true,
        }
    }

    pub(super) const fn picture(c: usize, h: usize, w: usize) -> Self {
        Self {
            c,
            h,
            w,
            flat: false,
        }
    }

    pub(super) const fn pixels(self) -> usize {
        self.h * self.w
    }

    pub(super) const fn len(self) -> usize {
        self.c * self.h * self.w
    }
}

/// Buffers of one thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) padded: Vec<f32>,
    pub(super) packed: Vec<f32>,
}

/// Surrounds `n` pictures by `value`: top, left, bottom, right.
pub(super) fn pad(
    n: usize,
    shape: Shape,
    pads: [usize; 4],
    value: f32,
    from: &[f32],
    to: &mut Vec<f32>,
) {
    let [top, left, bottom, right] = pads;
    let line = shape.w * shape.c;
    let width = line + (left + right) * shape.c;
    let picture = (shape.h + top + bottom) * width;
    to.resize(n * picture + SLACK, 0.0);
    for n in 0..n {
        let from = &from[n * shape.len()..][..shape.len()];
        let to = &mut to[n * picture..][..picture];
        to[..top * width].fill(value);
        to[(top + shape.h) * width..].fill(value);
        let rows = to[top * width..].chunks_exact_mut(width);
        for (from, to) in from.chunks_exact(line).zip(rows) {
            to[..left * shape.c].fill(value);
            to[left * shape.c..][..line].copy_from_slice(from);
            to[left * shape.c + line..].fill(value);
        }
    }
}

/// Takes the surroundings away again.
pub(super) fn pad_back(
    n: usize,
    shape: Shape,
    pads: [usize; 4],
    from: &[f32],
    to: &mut [f32],
    add: bool,
) {
    let [top, left, bottom, right] = pads;
    let line = shape.w * shape.c;
    let width = line + (left + right) * shape.c;
    let picture = (shape.h + top + bottom) * width;
    for n in 0..n {
        let rows = from[n * picture + top * width..].chunks(width);
        let to = &mut to[n * shape.len()..][..shape.len()];
        for (from, to) in rows.zip(to.chunks_exact_mut(line)) {
            give(to, &from[left * shape.c..][..line], add);
        }
    }
}

/// `to = from`, or `to += from`.
pub(super) fn give(to: &mut [f32], from: &[f32], add: bool) {
    if add {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from;
        }
    } else {
        to.copy_from_slice(from);
    }
}

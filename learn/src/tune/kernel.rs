//! The two loops that take nearly all of the time: rows times weights, and the weights' gradient.
//!
//! A convolution is not unrolled into a matrix. In a padded picture of layout NHWC the values under one row of
//! the window lie side by side, so that "row of the matrix" is a few slices of the picture itself.
//! The processor's vectors are chosen at run time; sums are taken in an order that depends on the shapes only.

#![expect(
    clippy::needless_range_loop,
    reason = "loops over constants, that the compiler takes apart into registers"
)]

use pulp::{Arch, Simd, WithSimd};

/// Columns of one packed panel of weights: one vector of the widest processors.
pub(super) const PANEL: usize = 16;
/// Values that must be readable behind the end of every source.
pub(super) const SLACK: usize = 32;
/// Source values that the gradient's tile takes at once.
const TILE: usize = 8;
/// Rows whose gradients are packed at once: together with their source they stay in the fastest caches.
const BLOCK: usize = 128;

/// How many panels hold `columns` columns.
pub(super) const fn panels(columns: usize) -> usize {
    columns.div_ceil(PANEL)
}

/// For every row: `dst[to..to + columns] (+)= bias + Σ src[from + run + k] · weights[k]`.
pub(super) struct Rows<'a> {
    /// Everything that is read; [`SLACK`] longer than what `from` and `runs` reach.
    pub(super) src: &'a [f32],
    /// Where each row starts in `src`.
    pub(super) from: &'a [u32],
    /// Where each run starts, from the row's start.
    pub(super) runs: &'a [usize],
    /// Values per run.
    pub(super) run: usize,
    /// `[panel][runs · run][PANEL]`, zero in columns that do not exist.
    pub(super) weights: &'a [f32],
    /// Added once, if any: one per column.
    pub(super) bias: Option<&'a [f32]>,
    /// Where each row goes.
    pub(super) to: &'a [u32],
    /// Everything that is written.
    pub(super) dst: &'a mut [f32],
    /// Added to every `from` and every `to`: the group of a grouped convolution.
    pub(super) shift: (usize, usize),
    /// Columns.
    pub(super) columns: usize,
    /// Adds to what is there instead of replacing it.
    pub(super) add: bool,
}

impl Rows<'_> {
    /// Does it.
    pub(super) fn run(self) {
        Arch::new().dispatch(self);
    }
}

impl WithSimd for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Sums that fit into the registers: 32 of 16 values, 16 of 8, 32 of 4.
        match S::F32_LANES {
            16 => rows::<S, 8, 2, 1>(simd, self),
            8 => rows::<S, 6, 1, 2>(simd, self),
            4 => rows::<S, 6, 1, 4>(simd, self),
            _ => rows_plain(self),
        }
    }
}

#[inline(always)]
fn rows<S: Simd, const M: usize, const P: usize, const V: usize>(simd: S, mut job: Rows<'_>) {
    let count = panels(job.columns);
    let mut panel = 0;
    while panel < count {
        // Panels outside, rows inside: the panels' weights stay in the nearest cache.
        let wide = if panel + P <= count { P } else { 1 };
        let mut row = 0;
        while row < job.from.len() {
            if wide == P {
                tile::<S, M, P, V>(simd, &mut job, panel, row);
            } else {
                tile::<S, M, 1, V>(simd, &mut job, panel, row);
            }
            row += M;
        }
        panel += wide;
    }
}

#[inline(always)]
fn tile<S: Simd, const M: usize, const P: usize, const V: usize>(
    simd: S,
    job: &mut Rows<'_>,
    panel: usize,
    row: usize,
) {
    let depth = job.runs.len() * job.run;
    let last = job.from.len() - 1;
    let mut start = [0; M];
    for (i, start) in start.iter_mut().enumerate() {
        *start = job.from[(row + i).min(last)] as usize + job.shift.0;
    }
    let mut sums = [[[simd.splat_f32s(0.0); V]; P]; M];
    for (number, offset) in job.runs.iter().enumerate() {
        let mut rows: [&[f32]; M] = [&[]; M];
        for i in 0..M {
            rows[i] = &job.src[start[i] + offset..][..job.run];
        }
        let mut weights: [&[[S::f32s; V]]; P] = [&[]; P];
        for p in 0..P {
            let at = ((panel + p) * depth + number * job.run) * PANEL;
            let (vectors, _) = S::as_simd_f32s(&job.weights[at..][..job.run * PANEL]);
            let (vectors, _) = vectors.as_chunks::<V>();
            weights[p] = &vectors[..job.run];
        }
        for k in 0..job.run {
            for i in 0..M {
                let x = simd.splat_f32s(rows[i][k]);
                for p in 0..P {
                    for v in 0..V {
                        sums[i][p][v] = simd.mul_add_f32s(x, weights[p][k][v], sums[i][p][v]);
                    }
                }
            }
        }
    }
    for i in 0..M.min(job.from.len() - row) {
        let to = job.to[row + i] as usize + job.shift.1;
        for p in 0..P {
            for v in 0..V {
                let column = (panel + p) * PANEL + v * S::F32_LANES;
                if column >= job.columns {
                    break;
                }
                let width = (job.columns - column).min(S::F32_LANES);
                let mut sum = sums[i][p][v];
                if let Some(bias) = job.bias {
                    sum = simd.add_f32s(sum, simd.partial_load_f32s(&bias[column..][..width]));
                }
                let dst = &mut job.dst[to + column..][..width];
                if job.add {
                    sum = simd.add_f32s(sum, simd.partial_load_f32s(dst));
                }
                simd.partial_store_f32s(dst, sum);
            }
        }
    }
}

fn rows_plain(job: Rows<'_>) {
    let depth = job.runs.len() * job.run;
    for (from, to) in job.from.iter().zip(job.to) {
        for column in 0..job.columns {
            let panel = &job.weights[column / PANEL * depth * PANEL..];
            let mut sum = 0.0;
            for (number, offset) in job.runs.iter().enumerate() {
                let start = *from as usize + job.shift.0 + offset;
                for (k, x) in job.src[start..][..job.run].iter().enumerate() {
                    sum += x * panel[(number * job.run + k) * PANEL + column % PANEL];
                }
            }
            sum += job.bias.map_or(0.0, |bias| bias[column]);
            let dst = &mut job.dst[*to as usize + job.shift.1 + column];
            *dst = if job.add { *dst + sum } else { sum };
        }
    }
}

/// For every row: `gradient[k] += src[from + run + k] · dst[to..to + columns]`, the other side of [`Rows`].
pub(super) struct Weights<'a> {
    /// As in [`Rows`].
    pub(super) src: &'a [f32],
    /// As in [`Rows`].
    pub(super) from: &'a [u32],
    /// As in [`Rows`].
    pub(super) runs: &'a [usize],
    /// As in [`Rows`].
    pub(super) run: usize,
    /// Where each row's gradients are.
    pub(super) to: &'a [u32],
    /// Gradients of what [`Rows`] wrote.
    pub(super) dst: &'a [f32],
    /// As in [`Rows`].
    pub(super) shift: (usize, usize),
    /// As in [`Rows`].
    pub(super) columns: usize,
    /// Packed as the weights are; added to.
    pub(super) gradient: &'a mut [f32],
    /// One per column, added to, if wanted.
    pub(super) bias: Option<&'a mut [f32]>,
    /// Scratch; grows as needed.
    pub(super) packed: &'a mut Vec<f32>,
}

impl Weights<'_> {
    /// Does it.
    pub(super) fn run(self) {
        Arch::new().dispatch(self);
    }
}

impl WithSimd for Weights<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => weights::<S, 2, 1>(simd, self),
            8 => weights::<S, 1, 2>(simd, self),
            4 => weights::<S, 1, 4>(simd, self),
            _ => weights::<S, 1, PANEL>(simd, self),
        }
    }
}

#[inline(always)]
fn weights<S: Simd, const P: usize, const V: usize>(simd: S, mut job: Weights<'_>) {
    let count = panels(job.columns);
    job.packed.clear();
    job.packed.resize(count * BLOCK * PANEL, 0.0);
    let mut first = 0;
    while first < job.from.len() {
        let rows = BLOCK.min(job.from.len() - first);
        for (row, to) in job.to[first..][..rows].iter().enumerate() {
            let line = &job.dst[*to as usize + job.shift.1..][..job.columns];
            for (panel, part) in line.chunks(PANEL).enumerate() {
                job.packed[(panel * BLOCK + row) * PANEL..][..part.len()].copy_from_slice(part);
            }
            if let Some(bias) = job.bias.as_deref_mut() {
                for (sum, value) in bias.iter_mut().zip(line) {
                    *sum += value;
                }
            }
        }
        let from = &job.from[first..][..rows];
        let mut panel = 0;
        while panel < count {
            let wide = if panel + P <= count { P } else { 1 };
            for (number, offset) in job.runs.iter().enumerate() {
                let mut k = 0;
                while k < job.run {
                    let at = (number * job.run + k, offset + k + job.shift.0);
                    let used = TILE.min(job.run - k);
                    let depth = job.runs.len() * job.run;
                    if wide == P {
                        outer::<S, P, V>(
                            simd,
                            job.src,
                            from,
                            job.packed,
                            panel,
                            at,
                            used,
                            depth,
                            job.gradient,
                        );
                    } else {
                        outer::<S, 1, V>(
                            simd,
                            job.src,
                            from,
                            job.packed,
                            panel,
                            at,
                            used,
                            depth,
                            job.gradient,
                        );
                    }
                    k += TILE;
                }
            }
            panel += wide;
        }
        first += rows;
    }
}

/// Adds one tile of the gradient: `used` rows from `at.0` of the packed weights, over the rows `from`.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "a struct would be built for every tile, in the inmost loop"
)]
fn outer<S: Simd, const P: usize, const V: usize>(
    simd: S,
    src: &[f32],
    from: &[u32],
    packed: &[f32],
    panel: usize,
    at: (usize, usize),
    used: usize,
    depth: usize,
    gradient: &mut [f32],
) {
    let mut lines: [&[[S::f32s; V]]; P] = [&[]; P];
    for p in 0..P {
        let start = (panel + p) * BLOCK * PANEL;
        let (vectors, _) = S::as_simd_f32s(&packed[start..][..from.len() * PANEL]);
        let (vectors, _) = vectors.as_chunks::<V>();
        lines[p] = &vectors[..from.len()];
    }
    let mut sums = [[[simd.splat_f32s(0.0); V]; P]; TILE];
    for (row, from) in from.iter().enumerate() {
        let x = &src[*from as usize + at.1..][..TILE];
        for i in 0..TILE {
            let x = simd.splat_f32s(x[i]);
            for p in 0..P {
                for v in 0..V {
                    sums[i][p][v] = simd.mul_add_f32s(x, lines[p][row][v], sums[i][p][v]);
                }
            }
        }
    }
    for i in 0..used {
        for p in 0..P {
            let to = ((panel + p) * depth + at.0 + i) * PANEL;
            let (to, _) = S::as_mut_simd_f32s(&mut gradient[to..][..PANEL]);
            for v in 0..V {
                to[v] = simd.add_f32s(to[v], sums[i][p][v]);
            }
        }
    }
}

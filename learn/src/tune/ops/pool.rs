//! Pooling.

use pulp::Arch;

use super::{Scratch, Shape, conv::Window, pad, pad_back};

/// The mean over all pixels.
pub(in crate::tune) fn global(n: usize, input: Shape, x: &[f32], y: &mut [f32]) {
    let rate = 1.0 / input.pixels() as f32;
    Arch::new().dispatch(|| {
        let pictures = x[..n * input.len()].chunks_exact(input.len());
        for (x, y) in pictures.zip(y.chunks_exact_mut(input.c)) {
            y.fill(0.0);
            for x in x.chunks_exact(input.c) {
                y.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
            }
            y.iter_mut().for_each(|y| *y *= rate);
        }
    });
}

/// The gradient of [`global`].
pub(in crate::tune) fn global_back(n: usize, input: Shape, dy: &[f32], dx: &mut [f32], add: bool) {
    let rate = 1.0 / input.pixels() as f32;
    Arch::new().dispatch(|| {
        let pictures = dx[..n * input.len()].chunks_exact_mut(input.len());
        for (dx, dy) in pictures.zip(dy.chunks_exact(input.c)) {
            for dx in dx.chunks_exact_mut(input.c) {
                let values = dx.iter_mut().zip(dy);
                if add {
                    values.for_each(|(dx, dy)| *dx += dy * rate);
                } else {
                    values.for_each(|(dx, dy)| *dx = dy * rate);
                }
            }
        }
    });
}

/// What a window gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tune) enum Kind {
    /// The largest; of equals the first, as in PyTorch.
    Max,
    /// The mean of what lies inside the picture.
    AverageInside,
    /// The mean, with the zeros around the picture.
    AverageAll,
}

/// A window that slides over every channel.
#[derive(Debug)]
pub(in crate::tune) struct Pool {
    kind: Kind,
    input: Shape,
    output: Shape,
    window: Window,
}

impl Pool {
    /// `output` must be what `window` gives for `input`.
    pub(in crate::tune) fn new(kind: Kind, input: Shape, output: Shape, window: Window) -> Self {
        Self {
            kind,
            input,
            output,
            window,
        }
    }

    fn surroundings(&self) -> f32 {
        if self.kind == Kind::Max {
            f32::NEG_INFINITY
        } else {
            0.0
        }
    }

    /// Calls `each(picture, row, column, start of the result)`.
    #[inline(always)]
    fn each(&self, n: usize, mut each: impl FnMut(usize, usize, usize, usize)) {
        for n in 0..n {
            for y in 0..self.output.h {
                for x in 0..self.output.w {
                    each(
                        n,
                        y,
                        x,
                        ((n * self.output.h + y) * self.output.w + x) * self.input.c,
                    );
                }
            }
        }
    }

    /// The starts, in the padded input, of the pixels under a window.
    #[inline(always)]
    fn taps(&self, n: usize, y: usize, x: usize) -> impl Iterator<Item = usize> + use<> {
        let [top, left, bottom, right] = self.window.pads;
        let (height, width) = (self.input.h + top + bottom, self.input.w + left + right);
        let ((kh, kw), (sy, sx), depth) = (self.window.kernel, self.window.stride, self.input.c);
        let start = (n * height + y * sy) * width + x * sx;
        (0..kh * kw).map(move |tap| (start + tap / kw * width + tap % kw) * depth)
    }

    /// By what the sum under a window is multiplied.
    fn rate(&self, y: usize, x: usize) -> f32 {
        let (kh, kw) = self.window.kernel;
        if self.kind == Kind::AverageAll {
            return 1.0 / (kh * kw) as f32;
        }
        let inside = |start: usize, size: usize, pad: usize, len: usize| {
            (start + size)
                .min(pad + len)
                .saturating_sub(start.max(pad))
                .max(1)
        };
        let rows = inside(
            y * self.window.stride.0,
            kh,
            self.window.pads[0],
            self.input.h,
        );
        let columns = inside(
            x * self.window.stride.1,
            kw,
            self.window.pads[1],
            self.input.w,
        );
        1.0 / (rows * columns) as f32
    }

    /// Forward for `n` pictures.
    pub(in crate::tune) fn forward(
        &self,
        n: usize,
        x: &[f32],
        y: &mut [f32],
        scratch: &mut Scratch,
    ) {
        pad(
            n,
            self.input,
            self.window.pads,
            self.surroundings(),
            x,
            &mut scratch.padded,
        );
        let (src, depth) = (&scratch.padded, self.input.c);
        Arch::new().dispatch(|| {
            self.each(n, |n, row, column, to| {
                let y = &mut y[to..][..depth];
                y.fill(self.surroundings());
                for tap in self.taps(n, row, column) {
                    let values = y.iter_mut().zip(&src[tap..][..depth]);
                    if self.kind == Kind::Max {
                        values.for_each(|(y, x)| *y = if *x > *y { *x } else { *y });
                    } else {
                        values.for_each(|(y, x)| *y += x);
                    }
                }
                if self.kind != Kind::Max {
                    let rate = self.rate(row, column);
                    y.iter_mut().for_each(|y| *y *= rate);
                }
            });
        });
    }

    /// The gradient of `x`.
    #[expect(
        clippy::too_many_arguments,
        reason = "input, output and their gradients"
    )]
    pub(in crate::tune) fn backward(
        &self,
        n: usize,
        x: &[f32],
        y: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        add: bool,
        scratch: &mut Scratch,
    ) {
        let depth = self.input.c;
        let Scratch {
            padded: src,
            packed: sums,
        } = scratch;
        pad(n, self.input, self.window.pads, self.surroundings(), x, src);
        sums.clear();
        sums.resize(src.len(), 0.0);
        let mut open = vec![0.0f32; depth];
        self.each(n, |n, row, column, to| {
            let dy = &dy[to..][..depth];
            if self.kind == Kind::Max {
                let y = &y[to..][..depth];
                open.copy_from_slice(dy);
                for tap in self.taps(n, row, column) {
                    for c in 0..depth {
                        if src[tap + c] == y[c] {
                            // Given once: to the first of equals.
                            sums[tap + c] += std::mem::take(&mut open[c]);
                        }
                    }
                }
            } else {
                let rate = self.rate(row, column);
                for tap in self.taps(n, row, column) {
                    let values = sums[tap..][..depth].iter_mut().zip(dy);
                    values.for_each(|(sum, dy)| *sum += dy * rate);
                }
            }
        });
        pad_back(n, self.input, self.window.pads, sums, dx, add);
    }
}

//! Depthwise convolution: every channel has a window of its own.

use pulp::Arch;

use super::{Scratch, Shape, conv::Window, pad, pad_back};

/// One window per channel, NHWC.
#[derive(Debug)]
pub(in crate::tune) struct Depthwise {
    input: Shape,
    output: Shape,
    window: Window,
}

impl Depthwise {
    /// `output` must be what `window` gives for `input`; the depths are equal.
    pub(in crate::tune) fn new(input: Shape, output: Shape, window: Window) -> Self {
        Self {
            input,
            output,
            window,
        }
    }

    /// Multiply-accumulates for one picture.
    pub(in crate::tune) fn macs(&self) -> usize {
        self.output.len() * self.taps()
    }

    fn taps(&self) -> usize {
        self.window.kernel.0 * self.window.kernel.1
    }

    /// `[channels, 1, rows, columns]` → `[rows · columns, channels]`.
    pub(in crate::tune) fn pack(&self, weights: &[f32], packed: &mut Vec<f32>) {
        let (taps, depth) = (self.taps(), self.input.c);
        packed.clear();
        packed.extend((0..taps * depth).map(|i| weights[i % depth * taps + i / depth]));
    }

    /// The way back.
    pub(in crate::tune) fn unpack(&self, packed: &[f32], gradient: &mut [f32]) {
        let (taps, depth) = (self.taps(), self.input.c);
        for (i, value) in packed.iter().enumerate() {
            gradient[i % depth * taps + i / depth] = *value;
        }
    }

    /// Calls `each(tap, start in the padded input, start in the output)`.
    #[inline(always)]
    fn each(&self, n: usize, mut each: impl FnMut(usize, usize, usize)) {
        let [top, left, bottom, right] = self.window.pads;
        let (height, width) = (self.input.h + top + bottom, self.input.w + left + right);
        let (depth, (sy, sx)) = (self.input.c, self.window.stride);
        for n in 0..n {
            for y in 0..self.output.h {
                for x in 0..self.output.w {
                    let to = ((n * self.output.h + y) * self.output.w + x) * depth;
                    let from = (n * height + y * sy) * width + x * sx;
                    for tap in 0..self.taps() {
                        let (j, i) = (tap / self.window.kernel.1, tap % self.window.kernel.1);
                        each(tap, (from + j * width + i) * depth, to);
                    }
                }
            }
        }
    }

    /// `y = conv(x) + bias` for `n` pictures.
    pub(in crate::tune) fn forward(
        &self,
        n: usize,
        x: &[f32],
        packed: &[f32],
        bias: Option<&[f32]>,
        y: &mut [f32],
        scratch: &mut Scratch,
    ) {
        pad(n, self.input, self.window.pads, 0.0, x, &mut scratch.padded);
        let (src, depth) = (&scratch.padded, self.input.c);
        Arch::new().dispatch(|| {
            for row in y[..n * self.output.len()].chunks_exact_mut(depth) {
                match bias {
                    Some(bias) => row.copy_from_slice(bias),
                    None => row.fill(0.0),
                }
            }
            self.each(n, |tap, from, to| {
                let weights = &packed[tap * depth..][..depth];
                let values = y[to..][..depth].iter_mut().zip(&src[from..][..depth]);
                for ((sum, x), w) in values.zip(weights) {
                    *sum += x * w;
                }
            });
        });
    }

    /// Adds to the packed gradient of the weights, and to that of the bias.
    pub(in crate::tune) fn backward_weights(
        &self,
        n: usize,
        x: &[f32],
        dy: &[f32],
        gradient: &mut [f32],
        bias: Option<&mut [f32]>,
        scratch: &mut Scratch,
    ) {
        pad(n, self.input, self.window.pads, 0.0, x, &mut scratch.padded);
        let (src, depth) = (&scratch.padded, self.input.c);
        Arch::new().dispatch(|| {
            self.each(n, |tap, from, to| {
                let sums = &mut gradient[tap * depth..][..depth];
                let values = src[from..][..depth].iter().zip(&dy[to..][..depth]);
                for (sum, (x, dy)) in sums.iter_mut().zip(values) {
                    *sum += x * dy;
                }
            });
            if let Some(bias) = bias {
                for row in dy[..n * self.output.len()].chunks_exact(depth) {
                    for (sum, dy) in bias.iter_mut().zip(row) {
                        *sum += dy;
                    }
                }
            }
        });
    }

    /// The gradient of `x`, or adds it to what is there.
    pub(in crate::tune) fn backward_input(
        &self,
        n: usize,
        dy: &[f32],
        packed: &[f32],
        dx: &mut [f32],
        add: bool,
        scratch: &mut Scratch,
    ) {
        let [top, left, bottom, right] = self.window.pads;
        let depth = self.input.c;
        let pixels = (self.input.h + top + bottom) * (self.input.w + left + right);
        let padded = &mut scratch.padded;
        padded.clear();
        padded.resize(n * pixels * depth, 0.0);
        Arch::new().dispatch(|| {
            self.each(n, |tap, from, to| {
                let weights = &packed[tap * depth..][..depth];
                let values = padded[from..][..depth].iter_mut().zip(&dy[to..][..depth]);
                for ((sum, dy), w) in values.zip(weights) {
                    *sum += dy * w;
                }
            });
        });
        pad_back(n, self.input, self.window.pads, padded, dx, add);
    }
}

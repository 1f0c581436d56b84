//! Convolution with groups and strides, and the dense layer as a convolution of one pixel.

use super::{CHUNK, Scratch, Shape, pad};
use crate::tune::kernel::{PANEL, Rows, SLACK, Weights, panels};

/// What a convolution is.
#[derive(Clone, Debug)]
pub(in crate::tune) struct Window {
    /// Rows and columns of the window.
    pub(in crate::tune) kernel: (usize, usize),
    /// Rows and columns from one window to the next; at least 1.
    pub(in crate::tune) stride: (usize, usize),
    /// Zeros at the top, left, bottom and right.
    pub(in crate::tune) pads: [usize; 4],
}

impl Window {
    /// Rows and columns of the result, if the padded picture holds one window at least.
    pub(in crate::tune) fn output(&self, input: Shape) -> Option<(usize, usize)> {
        let [top, left, bottom, right] = self.pads;
        let rows = (input.h + top + bottom).checked_sub(self.kernel.0)? / self.stride.0 + 1;
        let columns = (input.w + left + right).checked_sub(self.kernel.1)? / self.stride.1 + 1;
        Some((rows, columns))
    }
}

/// The pixels of the input that see the same taps of the window, for the gradient of the input.
#[derive(Debug)]
struct Phase {
    /// First tap of either direction.
    first: (usize, usize),
    /// Taps in either direction.
    taps: (usize, usize),
    from: Vec<u32>,
    to: Vec<u32>,
    runs: Vec<usize>,
    run: usize,
}

/// A convolution of NHWC pictures.
#[derive(Debug)]
pub(in crate::tune) struct Conv {
    input: Shape,
    output: Shape,
    window: Window,
    groups: usize,
    /// The weights are `[inputs, outputs]` instead of ONNX's `[outputs, inputs / groups, rows, columns]`.
    inputs_first: bool,
    from: Vec<u32>,
    to: Vec<u32>,
    runs: Vec<usize>,
    run: usize,
    phases: Vec<Phase>,
    /// Zeros around the gradient for `phases`.
    around: [usize; 4],
}

/// Positions are kept in 32 bits; the graph's reader refuses activations that are larger.
fn place(position: usize) -> u32 {
    u32::try_from(position).unwrap_or(u32::MAX)
}

/// Offsets of the slices under a window of `rows × columns` pixels, and the slices' length.
fn slices(
    rows: usize,
    columns: usize,
    width: usize,
    depth: usize,
    groups: usize,
) -> (Vec<usize>, usize) {
    if groups == 1 {
        return (
            (0..rows).map(|y| y * width * depth).collect(),
            columns * depth,
        );
    }
    let pixels = (0..rows).flat_map(|y| (0..columns).map(move |x| (y * width + x) * depth));
    (pixels.collect(), depth / groups)
}

impl Conv {
    /// `output` must be what `window` gives for `input`; `groups` divides both depths.
    pub(in crate::tune) fn new(
        input: Shape,
        output: Shape,
        window: Window,
        groups: usize,
        inputs_first: bool,
    ) -> Self {
        let ([top, left, bottom, right], (kh, kw), (sy, sx)) =
            (window.pads, window.kernel, window.stride);
        let (height, width) = (input.h + top + bottom, input.w + left + right);
        let (runs, run) = slices(kh, kw, width, input.c, groups);
        let mut from = Vec::with_capacity(CHUNK * output.pixels());
        for n in 0..CHUNK {
            for y in 0..output.h {
                for x in 0..output.w {
                    from.push(place(((n * height + y * sy) * width + x * sx) * input.c));
                }
            }
        }
        let to = (0..CHUNK * output.pixels())
            .map(|pixel| place(pixel * output.c))
            .collect();
        let (low_y, low_x) = (kh.div_ceil(sy) - 1, kw.div_ceil(sx) - 1);
        let around = [
            low_y,
            low_x,
            ((input.h - 1 + top) / sy).saturating_sub(output.h - 1),
            ((input.w - 1 + left) / sx).saturating_sub(output.w - 1),
        ];
        let (rows, columns) = (output.h + low_y + around[2], output.w + low_x + around[3]);
        let mut phases = Vec::new();
        for first_y in 0..sy {
            for first_x in 0..sx {
                let taps = (
                    kh.saturating_sub(first_y).div_ceil(sy),
                    kw.saturating_sub(first_x).div_ceil(sx),
                );
                if taps.0 == 0 || taps.1 == 0 {
                    continue;
                }
                let (runs, run) = slices(taps.0, taps.1, columns, output.c, groups);
                let (mut from, mut to) = (Vec::new(), Vec::new());
                for n in 0..CHUNK {
                    for y in (0..input.h).filter(|y| (y + top) % sy == first_y) {
                        for x in (0..input.w).filter(|x| (x + left) % sx == first_x) {
                            // The last tap that meets this pixel belongs to the window furthest up and left.
                            let row = n * rows + (y + top) / sy + low_y + 1 - taps.0;
                            let column = (x + left) / sx + low_x + 1 - taps.1;
                            from.push(place((row * columns + column) * output.c));
                            to.push(place(((n * input.h + y) * input.w + x) * input.c));
                        }
                    }
                }
                let first = (first_y, first_x);
                phases.push(Phase {
                    first,
                    taps,
                    from,
                    to,
                    runs,
                    run,
                });
            }
        }
        Self {
            input,
            output,
            window,
            groups,
            inputs_first,
            from,
            to,
            runs,
            run,
            phases,
            around,
        }
    }

    /// Multiply-accumulates for one picture.
    pub(in crate::tune) fn macs(&self) -> usize {
        self.output.pixels() * self.output.c * self.depth()
    }

    /// Values of the packed weights and of their packed gradient.
    pub(in crate::tune) fn packed_len(&self) -> usize {
        self.groups * self.group_len()
    }

    fn depth(&self) -> usize {
        self.runs.len() * self.run
    }

    fn group_len(&self) -> usize {
        panels(self.output.c / self.groups) * self.depth() * PANEL
    }

    /// Where a weight is in the file's tensor: output, input within its group, row, column.
    fn stored(&self, output: usize, input: usize, y: usize, x: usize) -> usize {
        let (kh, kw) = self.window.kernel;
        if self.inputs_first {
            input * self.output.c + output
        } else {
            ((output * (self.input.c / self.groups) + input) * kh + y) * kw + x
        }
    }

    /// Calls `each(packed, stored)` for every weight.
    fn weights(&self, mut each: impl FnMut(usize, usize)) {
        let (inputs, outputs) = (self.input.c / self.groups, self.output.c / self.groups);
        for output in 0..self.output.c {
            let (group, column) = (output / outputs, output % outputs);
            let start =
                group * self.group_len() + column / PANEL * self.depth() * PANEL + column % PANEL;
            for y in 0..self.window.kernel.0 {
                for x in 0..self.window.kernel.1 {
                    let k = (y * self.window.kernel.1 + x) * inputs;
                    for input in 0..inputs {
                        each(
                            start + (k + input) * PANEL,
                            self.stored(output, input, y, x),
                        );
                    }
                }
            }
        }
    }

    /// The weights as [`Conv::forward`] wants them.
    pub(in crate::tune) fn pack(&self, weights: &[f32], packed: &mut Vec<f32>) {
        packed.clear();
        packed.resize(self.packed_len(), 0.0);
        self.weights(|to, from| packed[to] = weights[from]);
    }

    /// The weights as [`Conv::backward_input`] wants them.
    pub(in crate::tune) fn pack_back(&self, weights: &[f32], packed: &mut Vec<f32>) {
        let (inputs, outputs) = (self.input.c / self.groups, self.output.c / self.groups);
        let len = |phase: &Phase| panels(inputs) * phase.runs.len() * phase.run * PANEL;
        packed.clear();
        packed.resize(
            self.groups * self.phases.iter().map(len).sum::<usize>(),
            0.0,
        );
        let mut start = 0;
        for phase in &self.phases {
            let depth = phase.runs.len() * phase.run;
            for group in 0..self.groups {
                for j in 0..phase.taps.0 {
                    for i in 0..phase.taps.1 {
                        let y = phase.first.0 + self.window.stride.0 * (phase.taps.0 - 1 - j);
                        let x = phase.first.1 + self.window.stride.1 * (phase.taps.1 - 1 - i);
                        for output in 0..outputs {
                            let k = (j * phase.taps.1 + i) * outputs + output;
                            for input in 0..inputs {
                                let to = (input / PANEL * depth + k) * PANEL + input % PANEL;
                                packed[start + to] =
                                    weights[self.stored(group * outputs + output, input, y, x)];
                            }
                        }
                    }
                }
                start += len(phase);
            }
        }
    }

    /// A packed gradient in the order of the file's tensor.
    pub(in crate::tune) fn unpack(&self, packed: &[f32], gradient: &mut [f32]) {
        self.weights(|from, to| gradient[to] = packed[from]);
    }

    fn padded<'a>(&self, n: usize, x: &'a [f32], padded: &'a mut Vec<f32>) -> &'a [f32] {
        if self.window.pads == [0; 4] {
            return x;
        }
        pad(n, self.input, self.window.pads, 0.0, x, padded);
        padded
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
        let src = self.padded(n, x, &mut scratch.padded);
        let (inputs, outputs) = (self.input.c / self.groups, self.output.c / self.groups);
        for group in 0..self.groups {
            Rows {
                src,
                from: &self.from[..n * self.output.pixels()],
                runs: &self.runs,
                run: self.run,
                weights: &packed[group * self.group_len()..][..self.group_len()],
                bias: bias.map(|bias| &bias[group * outputs..][..outputs]),
                to: &self.to[..n * self.output.pixels()],
                dst: y,
                shift: (group * inputs, group * outputs),
                columns: outputs,
                add: false,
            }
            .run();
        }
    }

    /// Adds to the packed gradient of the weights, and to that of the bias.
    pub(in crate::tune) fn backward_weights(
        &self,
        n: usize,
        x: &[f32],
        dy: &[f32],
        gradient: &mut [f32],
        mut bias: Option<&mut [f32]>,
        scratch: &mut Scratch,
    ) {
        let (inputs, outputs) = (self.input.c / self.groups, self.output.c / self.groups);
        let Scratch { padded, packed } = scratch;
        let src = self.padded(n, x, padded);
        for group in 0..self.groups {
            Weights {
                src,
                from: &self.from[..n * self.output.pixels()],
                runs: &self.runs,
                run: self.run,
                to: &self.to[..n * self.output.pixels()],
                dst: dy,
                shift: (group * inputs, group * outputs),
                columns: outputs,
                gradient: &mut gradient[group * self.group_len()..][..self.group_len()],
                bias: bias
                    .as_deref_mut()
                    .map(|bias| &mut bias[group * outputs..][..outputs]),
                packed,
            }
            .run();
        }
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
        let (inputs, outputs) = (self.input.c / self.groups, self.output.c / self.groups);
        let met: usize = self.phases.iter().map(|phase| phase.from.len()).sum();
        if !add && met < CHUNK * self.input.pixels() {
            dx[..n * self.input.len()].fill(0.0);
        }
        let src = if self.around == [0; 4] {
            dy
        } else {
            pad(n, self.output, self.around, 0.0, dy, &mut scratch.padded);
            &scratch.padded
        };
        let mut start = 0;
        for phase in &self.phases {
            let len = panels(inputs) * phase.runs.len() * phase.run * PANEL;
            let rows = phase.from.len() / CHUNK * n;
            for group in 0..self.groups {
                Rows {
                    src,
                    from: &phase.from[..rows],
                    runs: &phase.runs,
                    run: phase.run,
                    weights: &packed[start..][..len],
                    bias: None,
                    to: &phase.to[..rows],
                    dst: dx,
                    shift: (group * outputs, group * inputs),
                    columns: inputs,
                    add,
                }
                .run();
                start += len;
            }
        }
    }
}

const _: () = assert!(SLACK >= PANEL, "a tile reads beyond the last row");

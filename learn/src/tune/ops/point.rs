//! Operators that look at one value at a time, and frozen batch norm.

use pulp::Arch;

/// A function of one value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::tune) enum Point {
    Relu,
    /// Between the two.
    Clip(f32, f32),
    /// Values below 0 times this.
    Leaky(f32),
    Sigmoid,
    /// `clip(alpha · x + beta, 0, 1)`.
    HardSigmoid(f32, f32),
    /// `x · clip(x / 6 + 1 / 2, 0, 1)`.
    HardSwish,
    Sqrt,
}

#[inline(always)]
fn map(x: &[f32], y: &mut [f32], f: impl Fn(f32) -> f32) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = f(*x);
    }
}

/// `f` is the derivative, of input and output.
#[inline(always)]
fn chain(x: &[f32], y: &[f32], dy: &[f32], dx: &mut [f32], add: bool, f: impl Fn(f32, f32) -> f32) {
    let values = dx.iter_mut().zip(dy).zip(x.iter().zip(y));
    if add {
        values.for_each(|((dx, dy), (x, y))| *dx += dy * f(*x, *y));
    } else {
        values.for_each(|((dx, dy), (x, y))| *dx = dy * f(*x, *y));
    }
}

fn one_if(condition: bool) -> f32 {
    if condition { 1.0 } else { 0.0 }
}

impl Point {
    /// Whether input and output may share one buffer, and their gradients too: the derivative can be told
    /// from the output.
    pub(in crate::tune) fn in_place(self) -> bool {
        matches!(self, Self::Relu | Self::Clip(..))
    }

    /// `y = f(x)`.
    pub(in crate::tune) fn forward(self, x: &[f32], y: &mut [f32]) {
        Arch::new().dispatch(|| match self {
            Self::Relu => map(x, y, |x| if x > 0.0 { x } else { 0.0 }),
            Self::Clip(low, high) => map(x, y, |x| x.max(low).min(high)),
            Self::Leaky(slope) => map(x, y, |x| if x > 0.0 { x } else { x * slope }),
            Self::Sigmoid => map(x, y, |x| 1.0 / (1.0 + (-x).exp())),
            Self::HardSigmoid(a, b) => map(x, y, |x| (a * x + b).clamp(0.0, 1.0)),
            Self::HardSwish => map(x, y, |x| x * (x / 6.0 + 0.5).clamp(0.0, 1.0)),
            Self::Sqrt => map(x, y, f32::sqrt),
        });
    }

    /// [`Point::forward`] where input and output are the same buffer.
    pub(in crate::tune) fn forward_in_place(self, y: &mut [f32]) {
        Arch::new().dispatch(|| match self {
            Self::Relu => y
                .iter_mut()
                .for_each(|y| *y = if *y > 0.0 { *y } else { 0.0 }),
            Self::Clip(low, high) => y.iter_mut().for_each(|y| *y = y.max(low).min(high)),
            _ => {}
        });
    }

    /// The gradient of `x`. At the corners the derivative is PyTorch's: 0 for ReLU, inside for the clips.
    pub(in crate::tune) fn backward(
        self,
        x: &[f32],
        y: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        add: bool,
    ) {
        Arch::new().dispatch(|| match self {
            Self::Relu => chain(x, y, dy, dx, add, |_, y| one_if(y > 0.0)),
            Self::Clip(low, high) => {
                chain(x, y, dy, dx, add, |x, _| one_if(x > low && x < high));
            }
            Self::Leaky(slope) => {
                chain(x, y, dy, dx, add, |x, _| if x > 0.0 { 1.0 } else { slope });
            }
            Self::Sigmoid => chain(x, y, dy, dx, add, |_, y| y * (1.0 - y)),
            Self::HardSigmoid(a, _) => {
                chain(
                    x,
                    y,
                    dy,
                    dx,
                    add,
                    |_, y| if y > 0.0 && y < 1.0 { a } else { 0.0 },
                );
            }
            Self::HardSwish => chain(x, y, dy, dx, add, |x, _| {
                if x <= -3.0 {
                    0.0
                } else if x >= 3.0 {
                    1.0
                } else {
                    x / 3.0 + 0.5
                }
            }),
            Self::Sqrt => chain(x, y, dy, dx, add, |_, y| 0.5 / y),
        });
    }

    /// [`Point::backward`] where the gradients of input and output are the same buffer.
    pub(in crate::tune) fn backward_in_place(self, y: &[f32], dy: &mut [f32]) {
        let values = dy.iter_mut().zip(y);
        Arch::new().dispatch(|| match self {
            Self::Relu => values.for_each(|(dy, y)| *dy = if *y > 0.0 { *dy } else { 0.0 }),
            Self::Clip(low, high) => {
                values.for_each(|(dy, y)| *dy = if *y > low && *y < high { *dy } else { 0.0 });
            }
            _ => {}
        });
    }
}

/// Batch norm whose mean and variance are constants: `y = (x - mean) · rate · scale + bias` per channel.
#[derive(Clone, Debug)]
pub(in crate::tune) struct Norm {
    pub(in crate::tune) mean: Vec<f32>,
    /// `1 / sqrt(variance + epsilon)`.
    pub(in crate::tune) rate: Vec<f32>,
}

impl Norm {
    /// Forward.
    pub(in crate::tune) fn forward(&self, x: &[f32], scale: &[f32], bias: &[f32], y: &mut [f32]) {
        let depth = self.mean.len();
        Arch::new().dispatch(|| {
            for (x, y) in x.chunks_exact(depth).zip(y.chunks_exact_mut(depth)) {
                for (c, (x, y)) in x.iter().zip(y).enumerate() {
                    *y = (x - self.mean[c]) * self.rate[c] * scale[c] + bias[c];
                }
            }
        });
    }

    /// The gradient of `x`.
    pub(in crate::tune) fn backward(&self, dy: &[f32], scale: &[f32], dx: &mut [f32], add: bool) {
        let depth = self.mean.len();
        Arch::new().dispatch(|| {
            for (dy, dx) in dy.chunks_exact(depth).zip(dx.chunks_exact_mut(depth)) {
                for (c, (dy, dx)) in dy.iter().zip(dx).enumerate() {
                    let value = dy * self.rate[c] * scale[c];
                    *dx = if add { *dx + value } else { value };
                }
            }
        });
    }

    /// Adds to the gradient of the scale, if wanted.
    pub(in crate::tune) fn backward_scale(&self, x: &[f32], dy: &[f32], gradient: &mut [f32]) {
        let depth = self.mean.len();
        Arch::new().dispatch(|| {
            for (x, dy) in x.chunks_exact(depth).zip(dy.chunks_exact(depth)) {
                for (c, sum) in gradient.iter_mut().enumerate() {
                    *sum += (x[c] - self.mean[c]) * self.rate[c] * dy[c];
                }
            }
        });
    }

    /// Adds to the gradient of the bias.
    pub(in crate::tune) fn backward_bias(dy: &[f32], gradient: &mut [f32]) {
        for dy in dy.chunks_exact(gradient.len()) {
            for (sum, dy) in gradient.iter_mut().zip(dy) {
                *sum += dy;
            }
        }
    }
}

//! From gradients to better numbers.

use std::f32::consts::PI;

use super::graph::Role;

/// How a step is made of a gradient. The formulas are PyTorch's (`torch.optim.SGD`, `torch.optim.AdamW`).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Optimiser {
    /// Momentum after Nesterov.
    Sgd {
        /// 0 (inclusive) to 1 (exclusive).
        momentum: f32,
    },
    /// Adam with decoupled weight decay.
    AdamW {
        /// Memory of the gradient and of its square, each 0 (inclusive) to 1 (exclusive).
        betas: (f32, f32),
    },
}

/// Keeps AdamW's division finite: PyTorch's default.
const EPSILON: f32 = 1e-8;

/// What the optimiser remembers of one constant.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    first: Vec<f32>,
    second: Vec<f32>,
}

impl Optimiser {
    /// Values that are remembered per trained value.
    pub(super) fn memory(self) -> usize {
        match self {
            Self::Sgd { .. } => 1,
            Self::AdamW { .. } => 2,
        }
    }

    /// Step `step` (from 0) of one constant.
    pub(super) fn step(
        self,
        step: usize,
        rate: f32,
        decay: f32,
        values: &mut [f32],
        gradient: &[f32],
        memory: &mut Memory,
    ) {
        memory.first.resize(values.len(), 0.0);
        match self {
            Self::Sgd { momentum } => {
                let memories = memory.first.iter_mut();
                for ((p, g), m) in values.iter_mut().zip(gradient).zip(memories) {
                    let g = g + decay * *p;
                    *m = momentum * *m + g;
                    *p -= rate * (g + momentum * *m);
                }
            }
            Self::AdamW { betas: (b1, b2) } => {
                memory.second.resize(values.len(), 0.0);
                // Beyond that the corrections are 1 in any case.
                let count = i32::try_from(step + 1).unwrap_or(i32::MAX);
                let (c1, c2) = (1.0 - b1.powi(count), (1.0 - b2.powi(count)).sqrt());
                let memories = memory.first.iter_mut().zip(&mut memory.second);
                for ((p, g), (m, v)) in values.iter_mut().zip(gradient).zip(memories) {
                    *p *= 1.0 - rate * decay;
                    *m += (1.0 - b1) * (g - *m);
                    *v = b2 * *v + (1.0 - b2) * g * g;
                    *p -= rate / c1 * *m / (v.sqrt() / c2 + EPSILON);
                }
            }
        }
    }
}

/// The share of the learning rate in step `step` of `steps`: rises in a line over the first `warm` steps,
/// then falls to 0 along half a cosine.
pub(super) fn schedule(step: usize, steps: usize, warm: usize) -> f32 {
    if step < warm {
        return (step + 1) as f32 / warm as f32;
    }
    let rest = steps.saturating_sub(warm).max(1);
    0.5 * (1.0 + (PI * (step - warm) as f32 / rest as f32).cos())
}

/// Biases and scales do not decay.
pub(super) fn decay(role: Role, decay: f32) -> f32 {
    if role.decays { decay } else { 0.0 }
}

/// Cross-entropy of one picture's logits with the label, `smoothing` of it spread over all classes, and its
/// gradient times `share`. The label must be a class.
pub(super) fn loss(
    logits: &[f32],
    label: usize,
    smoothing: f32,
    share: f32,
    gradient: &mut [f32],
) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - largest).exp()).sum();
    let (log_sum, even) = (sum.ln(), smoothing / logits.len() as f32);
    let mut loss = 0.0;
    for (class, (logit, gradient)) in logits.iter().zip(gradient).enumerate() {
        let log = logit - largest - log_sum;
        let target = even + if class == label { 1.0 - smoothing } else { 0.0 };
        loss -= f64::from(target * log);
        *gradient = (log.exp() - target) * share;
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedule_rises_and_falls() {
        assert_eq!(schedule(0, 10, 2), 0.5);
        assert_eq!(schedule(1, 10, 2), 1.0);
        assert_eq!(schedule(2, 10, 2), 1.0);
        assert!((schedule(6, 10, 2) - 0.5).abs() < 1e-6);
        assert_eq!(schedule(0, 1, 0), 1.0);
    }

    #[test]
    fn loss_and_its_gradient() {
        let logits = [0.5, -1.0, 2.0];
        let mut gradient = [0.0; 3];
        let at = loss(&logits, 1, 0.1, 1.0, &mut gradient);
        for class in 0..3 {
            let mut moved = logits;
            moved[class] += 1e-2;
            let up = loss(&moved, 1, 0.1, 1.0, &mut [0.0; 3]);
            moved[class] -= 2e-2;
            let down = loss(&moved, 1, 0.1, 1.0, &mut [0.0; 3]);
            let numeric = (up - down) / 2e-2;
            assert!((numeric - f64::from(gradient[class])).abs() < 1e-3);
        }
        assert!(at > 0.0);
        assert!(gradient.iter().sum::<f32>().abs() < 1e-6);
    }
}

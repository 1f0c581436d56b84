//! Temperature scaling (Guo et al., *On Calibration of Modern Neural Networks*, 2017): one number that all
//! logits are divided by, chosen on rows that were not trained on. It changes no decision.
//!
//! Where every held-back row is answered right, sharpening without end would look best. So the target is not
//! certainty: one wrong answer among n + 2 is assumed, spread over the classes (after Platt, *Probabilistic
//! Outputs for Support Vector Machines*, 1999).

/// Logits may be sharpened or flattened by this much at most; beyond it the head knows nothing anyway.
const MOST: f64 = 100.0;
/// Halvings of the interval of ln T: leaves a part in 10⁸.
const HALVINGS: usize = 30;

/// Softmax of logits divided by `temperature`, relative to the largest so that no power overflows.
pub(crate) fn probabilities(logits: &[f32], temperature: f64) -> Vec<f32> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f64> = logits
        .iter()
        .map(|&z| ((f64::from(z) - f64::from(top)) / temperature).exp())
        .collect();
    let sum: f64 = powers.iter().sum();
    powers
        .into_iter()
        .map(|power| (power / sum) as f32)
        .collect()
}

/// Rows with logits from models that did not see them.
pub(crate) struct Held<'a> {
    /// N×C.
    pub(crate) logits: &'a [f32],
    /// N.
    pub(crate) truth: &'a [u32],
    /// N, adding up to 1.
    pub(crate) weights: &'a [f32],
    pub(crate) classes: usize,
}

impl Held<'_> {
    /// What the truth is not given of its certainty.
    fn doubt(&self) -> f64 {
        let rows = self.weights.iter().filter(|weight| **weight > 0.0).count();
        1.0 / (rows as f64 + 2.0)
    }

    /// Loss, and its slope over 1 / temperature.
    fn look(&self, temperature: f64, doubt: f64) -> (f64, f64) {
        let (mut loss, mut slope) = (0.0, 0.0);
        let rows = self.logits.chunks_exact(self.classes);
        for ((logits, &truth), &weight) in rows.zip(self.truth).zip(self.weights) {
            if weight == 0.0 {
                continue;
            }
            let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let (mut sum, mut mean, mut even) = (0.0, 0.0, 0.0);
            for &z in logits {
                let below = f64::from(z) - top;
                even += below / self.classes as f64;
                let power = (below / temperature).exp();
                sum += power;
                mean += power * below;
            }
            let below = f64::from(logits[truth as usize]) - top;
            let below = (1.0 - doubt) * below + doubt * even;
            loss += f64::from(weight) * (sum.ln() - below / temperature);
            slope += f64::from(weight) * (mean / sum - below);
        }
        (loss, slope)
    }

    /// Mean log-loss of what really was the case.
    pub(crate) fn log_loss(&self, temperature: f64) -> f64 {
        self.look(temperature, 0.0).0
    }

    /// Mean log-loss with the doubt of n rows: what strengths are compared by.
    pub(crate) fn doubted_loss(&self, temperature: f64) -> f64 {
        self.look(temperature, self.doubt()).0
    }

    /// The temperature with the smallest loss. The loss is convex in 1 / T, so its slope has one root.
    pub(crate) fn temperature(&self) -> f64 {
        let doubt = self.doubt();
        let (mut low, mut high) = (-MOST.ln(), MOST.ln());
        for _ in 0..HALVINGS {
            let middle = f64::midpoint(low, high);
            // Downhill towards larger 1 / T means that T is too large.
            if self.look(middle.exp(), doubt).1 < 0.0 {
                high = middle;
            } else {
                low = middle;
            }
        }
        f64::midpoint(low, high).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn logits_that_are_too_sure_by_three_are_found_out() {
        let mut random = Random::new(9);
        let (mut logits, mut truth) = (Vec::new(), Vec::new());
        for _ in 0..4000 {
            let honest = [random.unit() as f32 * 3.0, random.unit() as f32 * 3.0, 0.0];
            let probabilities = probabilities(&honest, 1.0);
            let mut left = random.unit() as f32;
            let class = probabilities.iter().position(|p| {
                left -= p;
                left < 0.0
            });
            truth.push(class.unwrap_or(2) as u32);
            logits.extend(honest.map(|z| z * 3.0));
        }
        let weights = vec![1.0 / 4000.0; 4000];
        let held = Held {
            logits: &logits,
            truth: &truth,
            weights: &weights,
            classes: 3,
        };
        let temperature = held.temperature();
        assert!((2.6..3.5).contains(&temperature), "{temperature}");
        for other in [0.9, 1.1] {
            assert!(held.doubted_loss(temperature) < held.doubted_loss(temperature * other));
        }
    }

    #[test]
    fn all_right_is_no_reason_for_certainty() {
        let held = Held {
            logits: &[0.2, 0.0, 0.0, 0.2].repeat(10),
            truth: &[0, 1].repeat(10),
            weights: &[0.05; 20],
            classes: 2,
        };
        let temperature = held.temperature();
        // Twenty right answers: 1 / 22 spread over two classes is left to the other one.
        let sure = probabilities(&[0.2, 0.0], temperature)[0];
        assert!((sure - (1.0 - 0.5 / 22.0)).abs() < 1e-3, "{sure}");
    }

    #[test]
    fn probabilities_bear_large_logits() {
        assert_eq!(probabilities(&[1e30, -1e30, 1e30], 1.0), [0.5, 0.0, 0.5]);
    }
}

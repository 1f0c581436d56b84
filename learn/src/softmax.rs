//! Multinomial logistic regression by L-BFGS (Nocedal and Wright, *Numerical Optimization*, 2006, chapter 7).
//!
//! Logits are linear in the parameters. Along a search direction they are `z + step · dz`, so that each point
//! that the line search tries costs N×C operations and not another product of matrices: an iteration takes two
//! products, however long it searches. Data and parameters are f32, sums over them f64.

use std::collections::VecDeque;

use tract_onnx::prelude::tract_ndarray::{ArrayView2, ArrayViewMut2, linalg::general_mat_mul};

use crate::progress::Error;

/// Pairs of differences that stand for the curvature.
const MEMORY: usize = 10;
/// The slope must shrink to this part of what it was. Trying is cheap here, so it may be asked for more than
/// the usual 0.9.
const CURVATURE: f64 = 0.4;
/// The least decrease, as part of what the slope promised.
const DECREASE: f64 = 1e-4;
/// The function is convex and smooth along a line; a handful is usual.
const MAX_TRIALS: usize = 30;

/// What is minimised: Σ weight · log-loss + strength / 2 · |W|², the bias going free.
pub(crate) struct Problem<'a> {
    /// N×D.
    pub(crate) rows: ArrayView2<'a, f32>,
    /// N classes.
    pub(crate) truth: &'a [u32],
    /// N, adding up to 1. A row of weight 0 only gets its logits computed.
    pub(crate) weights: &'a [f32],
    pub(crate) classes: usize,
    pub(crate) strength: f64,
}

/// When to stop.
#[derive(Clone, Copy)]
pub(crate) struct Stop {
    /// The largest part of the gradient, of the mean loss per row.
    pub(crate) gradient: f64,
    pub(crate) iterations: usize,
}

/// Where the search stands.
pub(crate) struct Fit {
    /// C×D weights, then C biases.
    pub(crate) parameters: Vec<f32>,
    /// N×C, of all rows.
    pub(crate) logits: Vec<f32>,
    pub(crate) iterations: usize,
}

/// In four sums that do not wait for each other; always in the same order.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let (a4, b4) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest = a4.remainder().iter().zip(b4.remainder());
    let mut sums = [0.0f64; 4];
    for (a, b) in a4.zip(b4) {
        for lane in 0..4 {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    for (a, b) in rest {
        sums[0] += f64::from(*a) * f64::from(*b);
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// to += factor · from
fn add(to: &mut [f32], factor: f64, from: &[f32]) {
    let factor = factor as f32;
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

/// Loss and slope at a step along the direction.
#[derive(Clone, Copy)]
struct Point {
    step: f64,
    loss: f64,
    slope: f64,
}

impl Problem<'_> {
    fn weight_count(&self) -> usize {
        self.classes * self.rows.ncols()
    }

    /// rows × Wᵀ + b into `logits`.
    fn forward(&self, parameters: &[f32], logits: &mut [f32]) {
        let (weight, bias) = parameters.split_at(self.weight_count());
        for row in logits.chunks_exact_mut(self.classes) {
            row.copy_from_slice(bias);
        }
        let shape = (self.classes, self.rows.ncols());
        if let (Ok(weight), Ok(mut logits)) = (
            ArrayView2::from_shape(shape, weight),
            ArrayViewMut2::from_shape((self.rows.nrows(), self.classes), logits),
        ) {
            general_mat_mul(1.0, &self.rows, &weight.t(), 1.0, &mut logits);
        }
    }

    /// The gradient from `residual` (N×C: weight · (probability − truth)).
    fn gradient(&self, residual: &[f32], parameters: &[f32], gradient: &mut [f32]) {
        let count = self.weight_count();
        let shape = (self.classes, self.rows.ncols());
        let strength = self.strength as f32;
        for (to, value) in gradient.iter_mut().zip(&parameters[..count]) {
            *to = strength * value;
        }
        let (weight, bias) = gradient.split_at_mut(count);
        if let (Ok(residual), Ok(mut weight)) = (
            ArrayView2::from_shape((self.rows.nrows(), self.classes), residual),
            ArrayViewMut2::from_shape(shape, weight),
        ) {
            general_mat_mul(1.0, &residual.t(), &self.rows, 1.0, &mut weight);
        }
        let mut sums = vec![0.0f64; self.classes];
        for row in residual.chunks_exact(self.classes) {
            for (sum, &value) in sums.iter_mut().zip(row) {
                *sum += f64::from(value);
            }
        }
        for (to, sum) in bias.iter_mut().zip(sums) {
            *to = sum as f32;
        }
    }

    /// Log-loss and its slope at `logits + step · change`, without the penalty; the residual is left behind.
    fn look(&self, logits: &[f32], change: &[f32], step: f64, residual: &mut [f32]) -> (f64, f64) {
        let classes = self.classes;
        let step = step as f32;
        let (mut loss, mut slope) = (0.0, 0.0);
        let rows = logits
            .chunks_exact(classes)
            .zip(change.chunks_exact(classes))
            .zip(residual.chunks_exact_mut(classes))
            .zip(self.truth.iter().zip(self.weights));
        for (((logits, change), out), (&truth, &weight)) in rows {
            if weight == 0.0 {
                out.fill(0.0);
                continue;
            }
            let mut top = f32::NEG_INFINITY;
            for ((out, z), dz) in out.iter_mut().zip(logits).zip(change) {
                *out = z + step * dz;
                top = top.max(*out);
            }
            let of_truth = out[truth as usize];
            let mut sum = 0.0f32;
            for out in out.iter_mut() {
                *out = (*out - top).exp();
                sum += *out;
            }
            loss += f64::from(weight) * (f64::from(sum).ln() + f64::from(top - of_truth));
            let scale = weight / sum;
            for out in out.iter_mut() {
                *out *= scale;
            }
            out[truth as usize] -= weight;
            let row: f32 = out.iter().zip(change).map(|(out, dz)| out * dz).sum();
            slope += f64::from(row);
        }
        (loss, slope)
    }

    /// Minimises from `start`. `report` gets iteration and loss after each one.
    pub(crate) fn solve(
        &self,
        start: Vec<f32>,
        stop: Stop,
        report: &mut dyn FnMut(usize, f64) -> Result<(), Error>,
    ) -> Result<Fit, Error> {
        let size = self.rows.nrows() * self.classes;
        let count = self.weight_count();
        let mut parameters = start;
        let mut logits = vec![0.0; size];
        let mut change = vec![0.0; size];
        let mut residual = vec![0.0; size];
        let mut gradient = vec![0.0; parameters.len()];
        let mut next_gradient = gradient.clone();
        let mut history = History::default();
        self.forward(&parameters, &mut logits);
        let (log_loss, _) = self.look(&logits, &change, 0.0, &mut residual);
        let penalty = |parameters: &[f32]| {
            self.strength / 2.0 * dot(&parameters[..count], &parameters[..count])
        };
        let mut loss = log_loss + penalty(&parameters);
        self.gradient(&residual, &parameters, &mut gradient);
        let mut iterations = 0;
        while iterations < stop.iterations {
            let steepest = gradient.iter().fold(0.0f32, |top, g| top.max(g.abs()));
            if !loss.is_finite() || !steepest.is_finite() {
                return Err(Error::Diverged("the log-loss"));
            }
            if f64::from(steepest) <= stop.gradient {
                break;
            }
            let mut direction = history.direction(&gradient);
            let mut slope = dot(&direction, &gradient);
            if slope >= 0.0 {
                // Rounding spoiled the curvature: begin anew, downhill.
                history = History::default();
                direction = history.direction(&gradient);
                slope = dot(&direction, &gradient);
            }
            self.forward(&direction, &mut change);
            let along = self.strength * dot(&parameters[..count], &direction[..count]);
            let beyond = self.strength * dot(&direction[..count], &direction[..count]);
            let base = penalty(&parameters);
            let mut look = |step: f64| {
                let (loss, slope) = self.look(&logits, &change, step, &mut residual);
                Point {
                    step,
                    loss: loss + base + step * along + step * step / 2.0 * beyond,
                    slope: slope + along + step * beyond,
                }
            };
            let from = Point {
                step: 0.0,
                loss,
                slope,
            };
            let Some(point) = search(from, &mut look) else {
                // As low as f32 can tell.
                break;
            };
            add(&mut parameters, point.step, &direction);
            add(&mut logits, point.step, &change);
            loss = point.loss;
            self.gradient(&residual, &parameters, &mut next_gradient);
            let step = point.step as f32;
            direction.iter_mut().for_each(|d| *d *= step);
            let difference = next_gradient.iter().zip(&gradient).map(|(a, b)| a - b);
            history.push(direction, difference.collect());
            std::mem::swap(&mut gradient, &mut next_gradient);
            iterations += 1;
            report(iterations, loss)?;
        }
        // Afresh: many small changes were added up.
        self.forward(&parameters, &mut logits);
        if parameters.iter().chain(&logits).all(|v| v.is_finite()) {
            Ok(Fit {
                parameters,
                logits,
                iterations,
            })
        } else {
            Err(Error::Diverged("the parameters"))
        }
    }
}

/// A step after which loss and slope are small enough, by the secant of the slopes between a point that is
/// too near and one that is too far. The last point looked at is the one returned. Nothing if no step helps.
fn search(from: Point, look: &mut dyn FnMut(f64) -> Point) -> Option<Point> {
    let enough = CURVATURE * from.slope.abs();
    // Room for the rounding of a sum of f32 terms.
    let room = 1e-9 * (1.0 + from.loss.abs());
    let lower = |p: &Point| p.loss <= from.loss + DECREASE * p.step * from.slope + room;
    let (mut near, mut far) = (from, None::<Point>);
    let mut step = 1.0;
    for _ in 0..MAX_TRIALS {
        let point = look(step);
        let decreased = point.loss.is_finite() && lower(&point);
        if decreased && point.slope.abs() <= enough {
            return Some(point);
        }
        if decreased && point.slope < 0.0 {
            near = point;
        } else {
            far = Some(point);
        }
        step = match far {
            None => step * 3.0,
            Some(far) => {
                let width = far.step - near.step;
                let part = -near.slope / (far.slope - near.slope);
                // Not so near an end that nothing moves.
                let part = if part.is_finite() {
                    part.clamp(0.1, 0.9)
                } else {
                    0.1
                };
                near.step + width * part
            }
        };
    }
    // What was reached is taken, if it is anything at all.
    (near.step > 0.0 && near.loss < from.loss).then(|| look(near.step))
}

struct Pair {
    step: Vec<f32>,
    change: Vec<f32>,
    /// 1 / (step · change)
    rho: f64,
}

#[derive(Default)]
struct History(VecDeque<Pair>);

impl History {
    fn push(&mut self, step: Vec<f32>, change: Vec<f32>) {
        let product = dot(&step, &change);
        // Without curvature the pair says nothing and would blow up.
        if product <= 1e-10 * dot(&change, &change) {
            return;
        }
        if self.0.len() == MEMORY {
            self.0.pop_front();
        }
        self.0.push_back(Pair {
            step,
            change,
            rho: 1.0 / product,
        });
    }

    /// The two loops of recursion: −H · gradient.
    fn direction(&self, gradient: &[f32]) -> Vec<f32> {
        let mut direction: Vec<f32> = gradient.iter().map(|g| -g).collect();
        let Some(last) = self.0.back() else {
            // The length of the very first step: the search makes it longer or shorter.
            let length = dot(gradient, gradient).sqrt().max(1e-12);
            let scale = (1.0 / length) as f32;
            direction.iter_mut().for_each(|d| *d *= scale);
            return direction;
        };
        let mut alphas = Vec::with_capacity(self.0.len());
        for pair in self.0.iter().rev() {
            let alpha = pair.rho * dot(&pair.step, &direction);
            add(&mut direction, -alpha, &pair.change);
            alphas.push(alpha);
        }
        let scale = (1.0 / (last.rho * dot(&last.change, &last.change))) as f32;
        direction.iter_mut().for_each(|d| *d *= scale);
        for (pair, alpha) in self.0.iter().zip(alphas.into_iter().rev()) {
            let beta = pair.rho * dot(&pair.change, &direction);
            add(&mut direction, alpha - beta, &pair.step);
        }
        direction
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// The objective in f64, by its definition.
    fn objective(problem: &Problem<'_>, parameters: &[f64]) -> f64 {
        let (rows, dim, classes) = (problem.rows, problem.rows.ncols(), problem.classes);
        let mut total = 0.0;
        for (n, row) in rows.rows().into_iter().enumerate() {
            let logits: Vec<f64> = (0..classes)
                .map(|c| {
                    let dot: f64 = (0..dim)
                        .map(|d| parameters[c * dim + d] * f64::from(row[d]))
                        .sum();
                    dot + parameters[classes * dim + c]
                })
                .collect();
            let sum: f64 = logits.iter().map(|z| z.exp()).sum();
            let loss = sum.ln() - logits[problem.truth[n] as usize];
            total += f64::from(problem.weights[n]) * loss;
        }
        let squares: f64 = parameters[..classes * dim].iter().map(|w| w * w).sum();
        total + problem.strength / 2.0 * squares
    }

    #[test]
    fn the_end_is_a_minimum_by_finite_differences() {
        let mut random = Random::new(5);
        let (count, dim, classes) = (40, 3, 3);
        let rows: Vec<f32> = (0..count * dim)
            .map(|_| random.unit() as f32 - 0.5)
            .collect();
        let truth: Vec<u32> = (0..count).map(|_| random.below(classes) as u32).collect();
        let weights = vec![1.0 / count as f32; count];
        let problem = Problem {
            rows: ArrayView2::from_shape((count, dim), &rows).unwrap(),
            truth: &truth,
            weights: &weights,
            classes,
            strength: 0.01,
        };
        let stop = Stop {
            gradient: 1e-6,
            iterations: 200,
        };
        let start = vec![0.0; classes * (dim + 1)];
        let mut last = f64::INFINITY;
        let fit = problem
            .solve(start, stop, &mut |_, loss| {
                assert!(loss <= last + 1e-6, "{loss} after {last}");
                last = loss;
                Ok(())
            })
            .unwrap();
        let at: Vec<f64> = fit.parameters.iter().map(|&p| f64::from(p)).collect();
        let loss = objective(&problem, &at);
        assert!((loss - last).abs() < 1e-5, "{loss} {last}");
        for index in 0..at.len() {
            let shifted = |by: f64| {
                let mut other = at.clone();
                other[index] += by;
                objective(&problem, &other)
            };
            let slope = (shifted(1e-4) - shifted(-1e-4)) / 2e-4;
            assert!(slope.abs() < 2e-5, "parameter {index}: slope {slope}");
        }
    }
}

//! Add, Sub, Mul and Div, with broadcasting.

use pulp::Arch;

use super::Shape;

/// What is done with two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tune) enum Kind {
    Add,
    Sub,
    Mul,
    Div,
}

/// Steps in an operand per picture, row, column and channel; 0 where it is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tune) struct Steps([usize; 4]);

impl Steps {
    /// An operand of this shape within a result; `constant` has no batch.
    fn new(shape: Shape, constant: bool) -> Self {
        let step = |size: usize, step: usize| if size == 1 { 0 } else { step };
        Self([
            if constant { 0 } else { shape.len() },
            step(shape.h, shape.w * shape.c),
            step(shape.w, shape.c),
            step(shape.c, 1),
        ])
    }
}

/// An operation on two operands that are broadcast against each other.
#[derive(Clone, Debug)]
pub(in crate::tune) struct Binary {
    pub(in crate::tune) kind: Kind,
    output: Shape,
    steps: [Steps; 2],
    /// The operands are as large as the result: one long row.
    equal: bool,
}

impl Binary {
    /// The operation and the result's shape; none if the shapes do not fit.
    pub(in crate::tune) fn new(
        kind: Kind,
        shapes: [Shape; 2],
        constant: [bool; 2],
    ) -> Option<(Self, Shape)> {
        let [a, b] = shapes;
        let join = |a: usize, b: usize| match (a, b) {
            (a, b) if a == b => Some(a),
            (1, other) | (other, 1) => Some(other),
            _ => None,
        };
        let output = Shape {
            c: join(a.c, b.c)?,
            h: join(a.h, b.h)?,
            w: join(a.w, b.w)?,
            flat: a.flat && b.flat,
        };
        let equal = a == output && b == output && constant == [false; 2];
        let steps = [Steps::new(a, constant[0]), Steps::new(b, constant[1])];
        Some((
            Self {
                kind,
                output,
                steps,
                equal,
            },
            output,
        ))
    }

    /// Calls `each(start and step in either operand, start in the result, values)` for every row of values.
    #[inline(always)]
    fn each(&self, n: usize, mut each: impl FnMut([(usize, usize); 2], usize, usize)) {
        let Shape { c, h, w, .. } = self.output;
        if self.equal {
            each([(0, 1), (0, 1)], 0, n * self.output.len());
            return;
        }
        let [Steps(a), Steps(b)] = self.steps;
        for n in 0..n {
            for y in 0..h {
                for x in 0..w {
                    let at = |s: [usize; 4]| (n * s[0] + y * s[1] + x * s[2], s[3]);
                    each([at(a), at(b)], ((n * h + y) * w + x) * c, c);
                }
            }
        }
    }

    /// `y = a ∘ b` for `n` pictures.
    pub(in crate::tune) fn forward(&self, n: usize, a: &[f32], b: &[f32], y: &mut [f32]) {
        Arch::new().dispatch(|| match self.kind {
            Kind::Add => self.map(n, a, b, y, |a, b| a + b),
            Kind::Sub => self.map(n, a, b, y, |a, b| a - b),
            Kind::Mul => self.map(n, a, b, y, |a, b| a * b),
            Kind::Div => self.map(n, a, b, y, |a, b| a / b),
        });
    }

    #[inline(always)]
    fn map(&self, n: usize, a: &[f32], b: &[f32], y: &mut [f32], f: impl Fn(f32, f32) -> f32) {
        self.each(n, |[(at_a, step_a), (at_b, step_b)], at, len| {
            let y = &mut y[at..][..len];
            match (step_a, step_b) {
                (1, 1) => {
                    let values = a[at_a..][..len].iter().zip(&b[at_b..][..len]);
                    y.iter_mut()
                        .zip(values)
                        .for_each(|(y, (a, b))| *y = f(*a, *b));
                }
                (1, _) => {
                    let b = b[at_b];
                    y.iter_mut()
                        .zip(&a[at_a..][..len])
                        .for_each(|(y, a)| *y = f(*a, b));
                }
                (_, 1) => {
                    let a = a[at_a];
                    y.iter_mut()
                        .zip(&b[at_b..][..len])
                        .for_each(|(y, b)| *y = f(a, *b));
                }
                _ => y.fill(f(a[at_a], b[at_b])),
            }
        });
    }

    /// Adds to the gradient of one operand: 0 or 1.
    pub(in crate::tune) fn backward(
        &self,
        n: usize,
        which: usize,
        a: &[f32],
        b: &[f32],
        dy: &[f32],
        gradient: &mut [f32],
    ) {
        Arch::new().dispatch(|| match (self.kind, which) {
            (Kind::Add, _) | (Kind::Sub, 0) => self.chain(n, which, a, b, dy, gradient, |_, _| 1.0),
            (Kind::Sub, _) => self.chain(n, which, a, b, dy, gradient, |_, _| -1.0),
            (Kind::Mul, 0) => self.chain(n, which, a, b, dy, gradient, |_, b| b),
            (Kind::Mul, _) => self.chain(n, which, a, b, dy, gradient, |a, _| a),
            (Kind::Div, 0) => self.chain(n, which, a, b, dy, gradient, |_, b| 1.0 / b),
            (Kind::Div, _) => self.chain(n, which, a, b, dy, gradient, |a, b| -a / (b * b)),
        });
    }

    #[inline(always)]
    #[expect(
        clippy::too_many_arguments,
        reason = "the operands, their gradient and what to do"
    )]
    fn chain(
        &self,
        n: usize,
        which: usize,
        a: &[f32],
        b: &[f32],
        dy: &[f32],
        gradient: &mut [f32],
        f: impl Fn(f32, f32) -> f32,
    ) {
        self.each(n, |at, start, len| {
            let [(at_a, step_a), (at_b, step_b)] = at;
            let (to, step) = at[which];
            let dy = &dy[start..][..len];
            if [step, step_a, step_b] == [1; 3] {
                let values = a[at_a..][..len].iter().zip(&b[at_b..][..len]);
                let sums = gradient[to..][..len].iter_mut().zip(dy);
                sums.zip(values)
                    .for_each(|((sum, dy), (a, b))| *sum += dy * f(*a, *b));
            } else {
                for (i, dy) in dy.iter().enumerate() {
                    gradient[to + i * step] += dy * f(a[at_a + i * step_a], b[at_b + i * step_b]);
                }
            }
        });
    }
}

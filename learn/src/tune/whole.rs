//! A graph as a function and its derivatives, without training.

use super::{
    Graph, TuneError,
    ops::{CHUNK, Shape},
    run::{Packed, Part, Plan, to_pixels},
};

/// `[H, W, C]` → `[C, H, W]`.
fn to_planes(shape: Shape, from: &[f32], to: &mut [f32]) {
    for (pixel, from) in from.chunks_exact(shape.c).enumerate() {
        for (channel, value) in from.iter().enumerate() {
            to[channel * shape.pixels() + pixel] = *value;
        }
    }
}

/// Derivatives of a scalar by everything that can be trained, and by the input.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// What the graph gave, `[n, C, H, W]` or `[n, D]`.
    pub output: Vec<f32>,
    /// By the input, `[n, C, H, W]` or `[n, D]`.
    pub input: Vec<f32>,
    /// By each trainable initialiser: its name, and as many values as it has.
    pub constants: Vec<(String, Vec<f32>)>,
}

impl Graph {
    fn check_input(&self, input: &[f32]) -> Result<usize, TuneError> {
        let n = input.len() / self.input_len();
        if n == 0 || n * self.input_len() != input.len() {
            return Err(TuneError::Data(format!(
                "{} values, the input takes {} per picture",
                input.len(),
                self.input_len()
            )));
        }
        Ok(n)
    }

    pub(super) fn values(&self) -> Vec<Vec<f32>> {
        self.constants
            .iter()
            .map(|constant| constant.values.clone())
            .collect()
    }

    /// The output for any number of pictures, `[n, C, H, W]` → `[n, classes]`, one after the other on
    /// this thread.
    ///
    /// # Errors
    /// When the input is no whole number of pictures.
    pub fn forward(&self, input: &[f32]) -> Result<Vec<f32>, TuneError> {
        self.check_input(input)?;
        let plan = Plan::new(self, vec![false; self.constants.len()], false);
        let (mut worker, mut packed, constants) = (plan.worker(), Packed::default(), self.values());
        plan.pack(Part::All, &constants, &mut packed);
        let mut output = Vec::new();
        for pictures in input.chunks(CHUNK * self.input_len()) {
            let n = plan.load_all(&mut worker, pictures);
            plan.forward(&mut worker, Part::All, n, &packed, &constants);
            self.take(&worker.values, self.output, n, &mut output);
        }
        Ok(output)
    }

    /// Derivatives of `Σ output · seed` by the input and everything that can be trained.
    /// For checks; training does not come by here.
    ///
    /// # Errors
    /// When `input` is no whole number of pictures, or `seed` is not as long as their output.
    pub fn gradients(&self, input: &[f32], seed: &[f32]) -> Result<Gradients, TuneError> {
        let count = self.check_input(input)?;
        let shape = self.shapes[self.output];
        if seed.len() != count * shape.len() {
            return Err(TuneError::Data(format!("a seed of {} values", seed.len())));
        }
        let trained: Vec<bool> = self.constants.iter().map(|c| c.role.is_some()).collect();
        let plan = Plan::new(self, trained, true);
        let (mut worker, mut packed, constants) = (plan.worker(), Packed::default(), self.values());
        plan.pack(Part::All, &constants, &mut packed);
        let mut sums = vec![0.0; plan.packed];
        let (mut output, mut by_input) = (Vec::new(), Vec::new());
        let seeds = seed.chunks(CHUNK * shape.len());
        for (pictures, seeds) in input.chunks(CHUNK * self.input_len()).zip(seeds) {
            let n = plan.load_all(&mut worker, pictures);
            plan.forward(&mut worker, Part::All, n, &packed, &constants);
            self.take(&worker.values, self.output, n, &mut output);
            let buffer = plan.room(&mut worker.gradients, self.output);
            for n in 0..n {
                let range = n * shape.len()..(n + 1) * shape.len();
                to_pixels(shape, &seeds[range.clone()], &mut buffer[range]);
            }
            plan.backward(&mut worker, n, &packed, &constants, &mut sums);
            if worker.written[0] {
                self.take(&worker.gradients, 0, n, &mut by_input);
            } else {
                by_input.resize(by_input.len() + pictures.len(), 0.0);
            }
        }
        let mut gradients = vec![Vec::new(); self.constants.len()];
        plan.unpack(&sums, &mut gradients);
        let names = self.constants.iter().map(|constant| constant.name.clone());
        let constants = names
            .zip(gradients)
            .filter(|(_, values)| !values.is_empty())
            .collect();
        Ok(Gradients {
            output,
            input: by_input,
            constants,
        })
    }

    /// Appends `n` pictures of a value, in the order of the file.
    fn take(&self, buffers: &[Vec<f32>], value: usize, n: usize, to: &mut Vec<f32>) {
        let shape = self.shapes[value];
        let from = &buffers[self.buffers[value]];
        for n in 0..n {
            let start = to.len();
            to.resize(start + shape.len(), 0.0);
            to_planes(
                shape,
                &from[n * shape.len()..][..shape.len()],
                &mut to[start..],
            );
        }
    }
}

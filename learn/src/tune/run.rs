//! Runs a graph on a chunk of pictures, and back.

use super::{
    Graph, TuneError,
    graph::{Node, Op, Operand},
    kernel::SLACK,
    ops::{CHUNK, Scratch, Shape, give, point::Norm, pool},
};

/// What is needed of a graph for one training: which constants change, and what that implies.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) graph: &'a Graph,
    /// By constant.
    pub(super) trained: Vec<bool>,
    /// By value: whether a gradient passes through it.
    needs: Vec<bool>,
    /// By constant: where its gradient is in the packed gradients.
    slots: Vec<std::ops::Range<usize>>,
    /// Length of the packed gradients.
    pub(super) packed: usize,
    /// Values that do not change in training, and that those which do start from.
    pub(super) border: Vec<usize>,
}

/// Which nodes run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    All,
    /// Those that do not change in training.
    Frozen,
    /// The others.
    Trained,
}

/// The weights in the order of the inmost loops. By node; empty where there are none.
#[derive(Debug, Default)]
pub(super) struct Packed {
    forward: Vec<Vec<f32>>,
    back: Vec<Vec<f32>>,
}

/// Buffers of one thread, for one chunk.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) values: Vec<Vec<f32>>,
    pub(super) gradients: Vec<Vec<f32>>,
    written: Vec<bool>,
    scratch: Scratch,
}

impl<'a> Plan<'a> {
    /// `trained` by constant; `input`: the gradient of the input is wanted as well.
    pub(super) fn new(graph: &'a Graph, trained: Vec<bool>, input: bool) -> Self {
        let mut needs = vec![false; graph.shapes.len()];
        needs[0] = input;
        let mut slots = vec![0..0; graph.constants.len()];
        let mut packed = 0;
        for node in &graph.nodes {
            let mut hold = |constant: usize, len: usize| {
                if trained[constant] && slots[constant].is_empty() {
                    slots[constant] = packed..packed + len;
                    packed += len;
                }
                trained[constant]
            };
            let mut own = false;
            for constant in node.op.constants() {
                let len = match &node.op {
                    Op::Conv { conv, weight, .. } if constant == *weight => conv.packed_len(),
                    _ => graph.constants[constant].values.len(),
                };
                own |= hold(constant, len);
            }
            needs[node.output] = own || node.inputs.iter().any(|&input| needs[input]);
        }
        let mut border: Vec<usize> = graph
            .nodes
            .iter()
            .filter(|node| needs[node.output])
            .flat_map(|node| node.inputs.iter().copied().filter(|&input| !needs[input]))
            .collect();
        border.sort_unstable();
        border.dedup();
        Self {
            graph,
            trained,
            needs,
            slots,
            packed,
            border,
        }
    }

    /// Values of one picture at the border.
    pub(super) fn border_len(&self) -> usize {
        self.border
            .iter()
            .map(|&value| self.graph.shapes[value].len())
            .sum()
    }

    /// Bytes of one worker's buffers, about.
    pub(super) fn worker_bytes(&self, values: bool) -> usize {
        let mut bytes = 0;
        let mut largest = 0;
        for (value, shape) in self.graph.shapes.iter().enumerate() {
            if self.graph.buffers[value] == value {
                let copies =
                    usize::from(values || self.needs[value]) + usize::from(self.needs[value]);
                bytes += copies * (CHUNK * shape.len() + SLACK) * size_of::<f32>();
            }
            largest = largest.max(CHUNK * shape.len() * size_of::<f32>());
        }
        // Padded copies of the largest.
        bytes + 3 * largest
    }

    pub(super) fn worker(&self) -> Worker {
        let count = self.graph.shapes.len();
        Worker {
            values: vec![Vec::new(); count],
            gradients: vec![Vec::new(); count],
            written: vec![false; count],
            scratch: Scratch::default(),
        }
    }

    fn part(&self, part: Part) -> impl DoubleEndedIterator<Item = (usize, &'a Node)> {
        self.graph
            .nodes
            .iter()
            .enumerate()
            .filter(move |(_, node)| match part {
                Part::All => true,
                Part::Frozen => !self.needs[node.output],
                Part::Trained => self.needs[node.output],
            })
    }

    /// Packs the weights of the nodes that `part` runs; those for the way back where it is needed.
    pub(super) fn pack(&self, part: Part, constants: &[Vec<f32>], packed: &mut Packed) {
        packed.forward.resize(self.graph.nodes.len(), Vec::new());
        packed.back.resize(self.graph.nodes.len(), Vec::new());
        for (at, node) in self.part(part) {
            match &node.op {
                Op::Conv { conv, weight, .. } => {
                    conv.pack(&constants[*weight], &mut packed.forward[at]);
                    if self.needs[node.inputs[0]] {
                        conv.pack_back(&constants[*weight], &mut packed.back[at]);
                    }
                }
                Op::Depthwise { conv, weight, .. } => {
                    conv.pack(&constants[*weight], &mut packed.forward[at]);
                }
                _ => {}
            }
        }
    }

    /// Writes the packed gradients in the order of the file's tensors, by constant.
    pub(super) fn unpack(&self, packed: &[f32], gradients: &mut [Vec<f32>]) {
        for node in &self.graph.nodes {
            for constant in node
                .op
                .constants()
                .filter(|&constant| self.trained[constant])
            {
                let from = &packed[self.slots[constant].clone()];
                let to = &mut gradients[constant];
                to.resize(self.graph.constants[constant].values.len(), 0.0);
                match &node.op {
                    Op::Conv { conv, weight, .. } if constant == *weight => conv.unpack(from, to),
                    Op::Depthwise { conv, weight, .. } if constant == *weight => {
                        conv.unpack(from, to)
                    }
                    _ => to.copy_from_slice(from),
                }
            }
        }
    }

    /// The buffer of a value, long enough for `CHUNK` pictures and the slack.
    fn room<'b>(&self, buffers: &'b mut [Vec<f32>], value: usize) -> &'b mut Vec<f32> {
        let buffer = &mut buffers[self.graph.buffers[value]];
        buffer.resize(CHUNK * self.graph.shapes[value].len() + SLACK, 0.0);
        buffer
    }

    /// Puts one picture, `[C, H, W]`, at the input.
    pub(super) fn load(&self, worker: &mut Worker, at: usize, picture: &[f32]) {
        let shape = self.graph.shapes[0];
        let buffer = self.room(&mut worker.values, 0);
        to_pixels(
            shape,
            picture,
            &mut buffer[at * shape.len()..][..shape.len()],
        );
    }

    /// Puts many at the input and returns how many.
    pub(super) fn load_all(&self, worker: &mut Worker, pictures: &[f32]) -> usize {
        let pictures = pictures.chunks_exact(self.graph.input_len());
        let count = pictures.len();
        for (at, picture) in pictures.enumerate() {
            self.load(worker, at, picture);
        }
        count
    }

    /// The output's values and the buffer for their gradients.
    pub(super) fn output<'b>(&self, worker: &'b mut Worker) -> (&'b [f32], &'b mut [f32]) {
        self.room(&mut worker.gradients, self.graph.output);
        let at = self.graph.buffers[self.graph.output];
        (&worker.values[at], &mut worker.gradients[at])
    }

    /// Puts one picture's values at the border.
    pub(super) fn load_border(&self, worker: &mut Worker, at: usize, mut values: &[f32]) {
        for &value in &self.border {
            let len = self.graph.shapes[value].len();
            let (part, rest) = values.split_at(len);
            self.room(&mut worker.values, value)[at * len..][..len].copy_from_slice(part);
            values = rest;
        }
    }

    /// Takes one picture's values from the border.
    pub(super) fn store_border(&self, worker: &Worker, at: usize, values: &mut [f32]) {
        let mut start = 0;
        for &value in &self.border {
            let len = self.graph.shapes[value].len();
            let from = &worker.values[self.graph.buffers[value]][at * len..][..len];
            values[start..start + len].copy_from_slice(from);
            start += len;
        }
    }

    /// Forward for `n` pictures. The result is in the output's buffer.
    pub(super) fn forward(
        &self,
        worker: &mut Worker,
        part: Part,
        n: usize,
        packed: &Packed,
        constants: &[Vec<f32>],
    ) {
        let buffers = &self.graph.buffers;
        for (at, node) in self.part(part) {
            self.room(&mut worker.values, node.output);
            let mut y = std::mem::take(&mut worker.values[buffers[node.output]]);
            let len = n * self.graph.shapes[node.output].len();
            let Worker {
                values, scratch, ..
            } = &mut *worker;
            let input = |at: usize| values[buffers[node.inputs[at]]].as_slice();
            let shape = |at: usize| self.graph.shapes[node.inputs[at]];
            match &node.op {
                Op::Conv { conv, bias, .. } => {
                    let bias = bias.map(|bias| constants[bias].as_slice());
                    conv.forward(n, input(0), &packed.forward[at], bias, &mut y, scratch);
                }
                Op::Depthwise { conv, bias, .. } => {
                    let bias = bias.map(|bias| constants[bias].as_slice());
                    conv.forward(n, input(0), &packed.forward[at], bias, &mut y, scratch);
                }
                Op::Norm { norm, scale, bias } => {
                    norm.forward(
                        &input(0)[..len],
                        &constants[*scale],
                        &constants[*bias],
                        &mut y[..len],
                    );
                }
                Op::Point(point) if node.in_place => point.forward_in_place(&mut y[..len]),
                Op::Point(point) => point.forward(&input(0)[..len], &mut y[..len]),
                Op::Binary { binary, operands } => {
                    let [a, b] = operands.map(|operand| read(operand, values, buffers, constants));
                    binary.forward(n, a, b, &mut y);
                }
                Op::Global => pool::global(n, shape(0), input(0), &mut y),
                Op::Pool(pool) => pool.forward(n, input(0), &mut y, scratch),
                Op::Concat => {
                    let to = self.graph.shapes[node.output];
                    let mut start = 0;
                    for (number, value) in node.inputs.iter().enumerate() {
                        let depth = self.graph.shapes[*value].c;
                        let rows = y[..len].chunks_exact_mut(to.c);
                        for (to, from) in rows.zip(input(number).chunks_exact(depth)) {
                            to[start..][..depth].copy_from_slice(from);
                        }
                        start += depth;
                    }
                }
                Op::Reorder(None) => y[..len].copy_from_slice(&input(0)[..len]),
                Op::Reorder(Some(table)) => {
                    let pictures = input(0).chunks_exact(table.len());
                    for (to, from) in y[..len].chunks_exact_mut(table.len()).zip(pictures) {
                        to.iter_mut()
                            .zip(table)
                            .for_each(|(to, at)| *to = from[*at as usize]);
                    }
                }
            }
            worker.values[buffers[node.output]] = y;
        }
    }

    /// Back from the output's gradient, which the caller has put into its buffer: adds to `gradients`
    /// (packed). The input's gradient, if wanted, is in its buffer afterwards.
    pub(super) fn backward(
        &self,
        worker: &mut Worker,
        n: usize,
        packed: &Packed,
        constants: &[Vec<f32>],
        gradients: &mut [f32],
    ) {
        worker.written.fill(false);
        worker.written[self.graph.buffers[self.graph.output]] = true;
        for (at, node) in self.part(Part::Trained).rev() {
            let buffer = self.graph.buffers[node.output];
            if !std::mem::take(&mut worker.written[buffer]) {
                continue;
            }
            let mut dy = std::mem::take(&mut worker.gradients[buffer]);
            if node.in_place {
                if let Op::Point(point) = &node.op {
                    let len = n * self.graph.shapes[node.output].len();
                    point.backward_in_place(&worker.values[buffer][..len], &mut dy[..len]);
                }
                worker.written[buffer] = true;
            } else {
                self.node_back(worker, (at, node), n, &dy, packed, constants, gradients);
            }
            worker.gradients[buffer] = dy;
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one step of `backward`, with its arguments"
    )]
    fn node_back(
        &self,
        worker: &mut Worker,
        (at, node): (usize, &Node),
        n: usize,
        dy: &[f32],
        packed: &Packed,
        constants: &[Vec<f32>],
        gradients: &mut [f32],
    ) {
        let buffers = &self.graph.buffers;
        let y = buffers[node.output];
        if let Op::Conv { bias, weight, .. } | Op::Depthwise { bias, weight, .. } = &node.op {
            let (weight, bias) = self.pair(gradients, *weight, *bias);
            let Worker {
                values, scratch, ..
            } = &mut *worker;
            let x = &values[buffers[node.inputs[0]]];
            match (&node.op, weight) {
                (Op::Conv { conv, .. }, Some(weight)) => {
                    conv.backward_weights(n, x, dy, weight, bias, scratch);
                }
                (Op::Depthwise { conv, .. }, Some(weight)) => {
                    conv.backward_weights(n, x, dy, weight, bias, scratch);
                }
                (_, None) => {
                    if let Some(bias) = bias {
                        let len = n * self.graph.shapes[node.output].len();
                        Norm::backward_bias(&dy[..len], bias);
                    }
                }
                _ => {}
            }
        }
        let dy_len = n * self.graph.shapes[node.output].len();
        if let Op::Norm { norm, scale, bias } = &node.op {
            let x = &worker.values[buffers[node.inputs[0]]][..dy_len];
            if self.trained[*scale] {
                norm.backward_scale(x, &dy[..dy_len], &mut gradients[self.slots[*scale].clone()]);
            }
            if self.trained[*bias] {
                Norm::backward_bias(&dy[..dy_len], &mut gradients[self.slots[*bias].clone()]);
            }
        }
        if let Op::Binary { binary, operands } = &node.op {
            let [a, b] = operands.map(|operand| read(operand, &worker.values, buffers, constants));
            for (which, operand) in operands.iter().enumerate() {
                if let Operand::Constant(constant) = operand
                    && self.trained[*constant]
                {
                    let gradient = &mut gradients[self.slots[*constant].clone()];
                    binary.backward(n, which, a, b, dy, gradient);
                }
            }
        }
        let mut start = 0;
        let mut number = 0;
        for (position, &input) in node.inputs.iter().enumerate() {
            let shape = self.graph.shapes[input];
            let first = start;
            start += shape.c;
            // The operand that this input is: constants are not among the inputs.
            if let Op::Binary { operands, .. } = &node.op {
                number = if position == 1 || matches!(operands[0], Operand::Constant(_)) {
                    1
                } else {
                    0
                };
            }
            if !self.needs[input] {
                continue;
            }
            let buffer = buffers[input];
            let add = std::mem::replace(&mut worker.written[buffer], true);
            self.room(&mut worker.gradients, input);
            let mut dx = std::mem::take(&mut worker.gradients[buffer]);
            let Worker {
                values, scratch, ..
            } = &mut *worker;
            let len = n * shape.len();
            match &node.op {
                Op::Conv { conv, .. } => {
                    conv.backward_input(n, dy, &packed.back[at], &mut dx, add, scratch);
                }
                Op::Depthwise { conv, .. } => {
                    conv.backward_input(n, dy, &packed.forward[at], &mut dx, add, scratch);
                }
                Op::Norm { norm, scale, .. } => {
                    norm.backward(&dy[..len], &constants[*scale], &mut dx[..len], add);
                }
                Op::Point(point) => {
                    let x = &values[buffer][..len];
                    point.backward(x, &values[y][..len], &dy[..len], &mut dx[..len], add);
                }
                Op::Binary { binary, operands } => {
                    let [a, b] = operands.map(|operand| read(operand, values, buffers, constants));
                    if !add {
                        dx[..len].fill(0.0);
                    }
                    binary.backward(n, number, a, b, dy, &mut dx);
                }
                Op::Global => pool::global_back(n, shape, dy, &mut dx, add),
                Op::Pool(pool) => {
                    pool.backward(n, &values[buffer], &values[y], dy, &mut dx, add, scratch);
                }
                Op::Concat => {
                    let depth = self.graph.shapes[node.output].c;
                    let rows = dx[..len].chunks_exact_mut(shape.c);
                    for (dx, dy) in rows.zip(dy.chunks_exact(depth)) {
                        give(dx, &dy[first..][..shape.c], add);
                    }
                }
                Op::Reorder(None) => give(&mut dx[..len], &dy[..len], add),
                Op::Reorder(Some(table)) => {
                    if !add {
                        dx[..len].fill(0.0);
                    }
                    let pictures = dx[..len].chunks_exact_mut(table.len());
                    for (dx, dy) in pictures.zip(dy.chunks_exact(table.len())) {
                        dy.iter()
                            .zip(table)
                            .for_each(|(dy, at)| dx[*at as usize] += dy);
                    }
                }
            }
            worker.gradients[buffer] = dx;
        }
    }

    /// The gradients of a weight and its bias, where they are trained.
    fn pair<'b>(
        &self,
        gradients: &'b mut [f32],
        weight: usize,
        bias: Option<usize>,
    ) -> (Option<&'b mut [f32]>, Option<&'b mut [f32]>) {
        let slot = |constant: usize| {
            (!self.slots[constant].is_empty()).then(|| self.slots[constant].clone())
        };
        match (slot(weight), bias.and_then(slot)) {
            (Some(weight), Some(bias)) => {
                match gradients.get_disjoint_mut([weight, bias]) {
                    Ok([weight, bias]) => (Some(weight), Some(bias)),
                    // One tensor that is both: no file has that.
                    Err(_) => (None, None),
                }
            }
            (Some(weight), None) => (gradients.get_mut(weight), None),
            (None, Some(bias)) => (None, gradients.get_mut(bias)),
            (None, None) => (None, None),
        }
    }
}

fn read<'b>(
    operand: Operand,
    values: &'b [Vec<f32>],
    buffers: &[usize],
    constants: &'b [Vec<f32>],
) -> &'b [f32] {
    match operand {
        Operand::Value(value) => &values[buffers[value]],
        Operand::Constant(constant) => &constants[constant],
    }
}

/// `[C, H, W]` → `[H, W, C]`.
fn to_pixels(shape: Shape, from: &[f32], to: &mut [f32]) {
    for (channel, from) in from.chunks_exact(shape.pixels()).enumerate() {
        for (pixel, value) in from.iter().enumerate() {
            to[pixel * shape.c + channel] = *value;
        }
    }
}

/// `[H, W, C]` → `[C, H, W]`.
fn to_planes(shape: Shape, from: &[f32], to: &mut [f32]) {
    for (pixel, from) in from.chunks_exact(shape.c).enumerate() {
        for (channel, value) in from.iter().enumerate() {
            to[channel * shape.pixels() + pixel] = *value;
        }
    }
}

impl Op {
    /// Constants that may be trained.
    pub(super) fn constants(&self) -> impl Iterator<Item = usize> + use<> {
        let pair = match self {
            Self::Conv { weight, bias, .. } | Self::Depthwise { weight, bias, .. } => {
                [Some(*weight), *bias]
            }
            Self::Norm { scale, bias, .. } => [Some(*scale), Some(*bias)],
            Self::Binary { operands, .. } => operands.map(|operand| match operand {
                Operand::Constant(constant) => Some(constant),
                Operand::Value(_) => None,
            }),
            _ => [None, None],
        };
        pair.into_iter().flatten()
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

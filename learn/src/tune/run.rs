//! Runs a graph on a chunk of pictures, and back.

use super::{
    Graph,
    graph::{Node, Op, Operand},
    kernel::SLACK,
    ops::{CHUNK, Scratch, Shape, pool},
};

/// What is needed of a graph for one training: which constants change, and what that implies.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) graph: &'a Graph,
    /// By constant.
    pub(super) trained: Vec<bool>,
    /// By value: whether a gradient passes through it.
    pub(super) needs: Vec<bool>,
    /// By constant: where its gradient is in the packed gradients.
    pub(super) slots: Vec<std::ops::Range<usize>>,
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
    pub(super) forward: Vec<Vec<f32>>,
    pub(super) back: Vec<Vec<f32>>,
}

/// Buffers of one thread, for one chunk.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) values: Vec<Vec<f32>>,
    pub(super) gradients: Vec<Vec<f32>>,
    pub(super) written: Vec<bool>,
    pub(super) scratch: Scratch,
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

    pub(super) fn part(&self, part: Part) -> impl DoubleEndedIterator<Item = (usize, &'a Node)> {
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
    pub(super) fn room<'b>(&self, buffers: &'b mut [Vec<f32>], value: usize) -> &'b mut Vec<f32> {
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
}

/// The numbers of an operand.
pub(super) fn read<'b>(
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
pub(super) fn to_pixels(shape: Shape, from: &[f32], to: &mut [f32]) {
    for (channel, from) in from.chunks_exact(shape.pixels()).enumerate() {
        for (pixel, value) in from.iter().enumerate() {
            to[pixel * shape.c + channel] = *value;
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

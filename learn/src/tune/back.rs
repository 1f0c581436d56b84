//! The way back through a graph.

use super::{
    graph::{Node, Op, Operand},
    ops::{give, point::Norm, pool},
    run::{Packed, Part, Plan, Worker, read},
};

impl Plan<'_> {
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

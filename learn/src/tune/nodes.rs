//! From ONNX's nodes to operators. What they mean: <https://onnx.ai/onnx/operators/>.

use super::{
    TuneError,
    file::Reader,
    graph::{Builder, Op, Operand},
    ops::{
        Shape,
        binary::{self, Binary},
        conv::Window,
        point::Point,
        pool::{self, Pool},
    },
};

impl Builder {
    /// Adds one node.
    pub(super) fn node(&mut self, node: &Reader<'_>) -> Result<(), TuneError> {
        match node.proto.op_type.as_str() {
            "Conv" => self.conv(node),
            "Gemm" => self.gemm(node),
            "MatMul" => self.dense(node, false),
            "BatchNormalization" => self.norm(node),
            "Identity" | "Dropout" => self.alias(node),
            "Relu" => self.point(node, Point::Relu),
            "Clip" => {
                let low = self.bound(node, 1, "min", f32::NEG_INFINITY)?;
                let high = self.bound(node, 2, "max", f32::INFINITY)?;
                self.point(node, Point::Clip(low, high))
            }
            "LeakyRelu" => self.point(node, Point::Leaky(node.float("alpha", 0.01))),
            "Sigmoid" => self.point(node, Point::Sigmoid),
            "HardSigmoid" => {
                let point = Point::HardSigmoid(node.float("alpha", 0.2), node.float("beta", 0.5));
                self.point(node, point)
            }
            "HardSwish" => self.point(node, Point::HardSwish),
            "Sqrt" => self.point(node, Point::Sqrt),
            "Add" => self.binary(node, binary::Kind::Add),
            "Sub" => self.binary(node, binary::Kind::Sub),
            "Mul" => self.binary(node, binary::Kind::Mul),
            "Div" => self.binary(node, binary::Kind::Div),
            "GlobalAveragePool" => {
                let input = self.picture(node)?;
                self.global(node, input, true)
            }
            "ReduceMean" => self.reduce_mean(node),
            "AveragePool" => {
                let all = node.int("count_include_pad", 0) != 0;
                let kind = if all {
                    pool::Kind::AverageAll
                } else {
                    pool::Kind::AverageInside
                };
                self.pool(node, kind)
            }
            "MaxPool" => self.pool(node, pool::Kind::Max),
            "Concat" => self.concat(node),
            "Flatten" => self.flatten(node),
            "Reshape" => self.reshape(node),
            _ => Err(TuneError::Operator(node.name())),
        }
    }

    fn point(&mut self, node: &Reader<'_>, point: Point) -> Result<(), TuneError> {
        let input = self.value(node, 0)?;
        let layer = self.made_by[input];
        self.push(
            node,
            Op::Point(point),
            vec![input],
            self.shapes[input],
            layer,
        )
    }

    /// A limit of Clip: an attribute before operator set 11, an input since.
    fn bound(
        &self,
        node: &Reader<'_>,
        at: usize,
        name: &str,
        default: f32,
    ) -> Result<f32, TuneError> {
        match self.constant(node, at)? {
            Some(constant) => {
                let values = &self.constants[constant].values;
                values
                    .first()
                    .copied()
                    .ok_or_else(|| node.refuse("an empty limit"))
            }
            None => Ok(node.float(name, default)),
        }
    }

    /// The first input, which must be `[N, C, H, W]`.
    pub(super) fn picture(&self, node: &Reader<'_>) -> Result<usize, TuneError> {
        let input = self.value(node, 0)?;
        if self.shapes[input].flat {
            return Err(node.refuse("its input is not [N, C, H, W]"));
        }
        Ok(input)
    }

    /// Window, stride and padding.
    pub(super) fn window(
        node: &Reader<'_>,
        input: Shape,
        kernel: [usize; 2],
    ) -> Result<(Window, Shape), TuneError> {
        let stride: [usize; 2] = node.sizes("strides", 1)?;
        if node.sizes::<2>("dilations", 1)? != [1, 1] {
            return Err(node.refuse("dilation is not supported"));
        }
        if node.int("ceil_mode", 0) != 0 {
            return Err(node.refuse("ceil_mode is not supported"));
        }
        if kernel.contains(&0) || stride.contains(&0) {
            return Err(node.refuse("a window or stride of 0"));
        }
        let mut pads: [usize; 4] = node.sizes("pads", 0)?;
        let auto = node.text("auto_pad");
        match auto.as_str() {
            "" | "NOTSET" => {}
            "VALID" => pads = [0; 4],
            "SAME_UPPER" | "SAME_LOWER" => {
                for (axis, size) in [input.h, input.w].into_iter().enumerate() {
                    let reach = (size.div_ceil(stride[axis]) - 1) * stride[axis] + kernel[axis];
                    let total = reach.saturating_sub(size);
                    // The odd one goes to the end, or to the beginning.
                    let before = if auto == "SAME_UPPER" {
                        total / 2
                    } else {
                        total.div_ceil(2)
                    };
                    (pads[axis], pads[axis + 2]) = (before, total - before);
                }
            }
            _ => return Err(node.refuse(format!("auto_pad {auto}"))),
        }
        if (0..4).any(|side| pads[side] >= kernel[side % 2]) {
            return Err(node.refuse(format!("pads {pads:?} are as wide as the window")));
        }
        let window = Window {
            kernel: kernel.into(),
            stride: stride.into(),
            pads,
        };
        let (h, w) = window
            .output(input)
            .ok_or_else(|| node.refuse("the window is larger than the picture"))?;
        Ok((window, Shape::picture(input.c, h, w)))
    }

    fn binary(&mut self, node: &Reader<'_>, kind: binary::Kind) -> Result<(), TuneError> {
        let missing = || node.refuse("it needs two inputs");
        let operands = [
            self.operand(node, 0)?.ok_or_else(missing)?,
            self.operand(node, 1)?.ok_or_else(missing)?,
        ];
        let value = |operand| match operand {
            Operand::Value(value) => Some(value),
            Operand::Constant(_) => None,
        };
        let inputs: Vec<usize> = operands.into_iter().filter_map(value).collect();
        let Some(&first) = inputs.first() else {
            return Err(node.refuse("it has constants only"));
        };
        let flat = self.shapes[first].flat;
        if inputs.iter().any(|&input| self.shapes[input].flat != flat) {
            return Err(node.refuse("[N, D] with [N, C, H, W]"));
        }
        let mut shapes = [self.shapes[first]; 2];
        for (shape, operand) in shapes.iter_mut().zip(operands) {
            *shape = match operand {
                Operand::Value(value) => self.shapes[value],
                Operand::Constant(constant) => {
                    let dims = &self.constants[constant].shape;
                    broadcast(dims, flat)
                        .ok_or_else(|| node.refuse(format!("a constant of shape {dims:?}")))?
                }
            };
        }
        let constant = operands.map(|operand| matches!(operand, Operand::Constant(_)));
        let (binary, output) = Binary::new(kind, shapes, constant)
            .ok_or_else(|| node.refuse("its inputs are of different shapes"))?;
        let layer = inputs.iter().filter_map(|&input| self.made_by[input]).max();
        // What is added right behind a layer, one per channel, is its bias.
        let made = self.nodes.iter().find(|made| made.output == first);
        if let (binary::Kind::Add, Some(layer), Some(made)) = (kind, layer, made)
            && matches!(made.op, Op::Conv { .. } | Op::Depthwise { .. })
            && let Some(Operand::Constant(constant)) = operands
                .into_iter()
                .find(|operand| matches!(operand, Operand::Constant(_)))
            && self.constants[constant].values.len() == self.shapes[first].c
        {
            self.train(constant, layer, false);
        }
        self.push(node, Op::Binary { binary, operands }, inputs, output, layer)
    }

    fn global(&mut self, node: &Reader<'_>, input: usize, keep: bool) -> Result<(), TuneError> {
        let c = self.shapes[input].c;
        let shape = if keep {
            Shape::picture(c, 1, 1)
        } else {
            Shape::flat(c)
        };
        self.push(node, Op::Global, vec![input], shape, self.made_by[input])
    }

    fn reduce_mean(&mut self, node: &Reader<'_>) -> Result<(), TuneError> {
        let input = self.picture(node)?;
        let given = node.attribute("axes").map(|axes| axes.ints.clone());
        let named = node
            .proto
            .input
            .get(1)
            .and_then(|name| self.ints.get(name))
            .cloned();
        let mut axes = given.or(named).unwrap_or_default();
        axes.iter_mut()
            .for_each(|axis| *axis = if *axis < 0 { *axis + 4 } else { *axis });
        axes.sort_unstable();
        if axes != [2, 3] {
            return Err(node.refuse("only the mean over rows and columns is supported"));
        }
        self.global(node, input, node.int("keepdims", 1) != 0)
    }

    fn pool(&mut self, node: &Reader<'_>, kind: pool::Kind) -> Result<(), TuneError> {
        let input = self.picture(node)?;
        let from = self.shapes[input];
        let (window, to) = Self::window(node, from, node.sizes("kernel_shape", 0)?)?;
        let op = Op::Pool(Pool::new(kind, from, to, window));
        self.push(node, op, vec![input], to, self.made_by[input])
    }

    fn concat(&mut self, node: &Reader<'_>) -> Result<(), TuneError> {
        let count = node.proto.input.len();
        let inputs: Vec<usize> = (0..count)
            .map(|at| self.value(node, at))
            .collect::<Result<_, _>>()?;
        let Some(&first) = inputs.first() else {
            return Err(node.refuse("no input"));
        };
        let mut shape = self.shapes[first];
        let axis = node.int("axis", 0);
        let rank = if shape.flat { 2 } else { 4 };
        if axis != 1 && axis != 1 - rank {
            return Err(node.refuse(format!("axis {axis}: only channels can be joined")));
        }
        shape.c = 0;
        for &input in &inputs {
            let part = self.shapes[input];
            if (part.h, part.w, part.flat) != (shape.h, shape.w, shape.flat) {
                return Err(node.refuse("its inputs are of different shapes"));
            }
            shape.c += part.c;
        }
        let layer = inputs.iter().filter_map(|&input| self.made_by[input]).max();
        self.push(node, Op::Concat, inputs, shape, layer)
    }

    fn flatten(&mut self, node: &Reader<'_>) -> Result<(), TuneError> {
        let input = self.value(node, 0)?;
        let shape = self.shapes[input];
        let axis = node.int("axis", 1);
        if axis != 1 && axis != if shape.flat { -1 } else { -3 } {
            return Err(node.refuse(format!("axis {axis}: only axis 1 is supported")));
        }
        self.reorder(node, input, Shape::flat(shape.len()))
    }

    fn reshape(&mut self, node: &Reader<'_>) -> Result<(), TuneError> {
        let input = self.value(node, 0)?;
        let from = self.shapes[input];
        let sizes = node
            .proto
            .input
            .get(1)
            .and_then(|name| self.ints.get(name))
            .cloned();
        let sizes = sizes.ok_or_else(|| node.refuse("its shape must be constant"))?;
        let wrong = || node.refuse(format!("to shape {sizes:?}: only [N, D] and [N, C, H, W]"));
        // The first is the batch, whatever the file has there.
        let (&batch, rest) = sizes.split_first().ok_or_else(wrong)?;
        let mut known = 1;
        let mut dims = Vec::new();
        for (axis, &size) in rest.iter().enumerate() {
            let old = [from.c, from.h, from.w];
            let size = match size {
                0 if axis < if from.flat { 1 } else { 3 } => old[axis],
                -1 if batch != -1 => 0,
                size => usize::try_from(size)
                    .ok()
                    .filter(|&size| size > 0)
                    .ok_or_else(wrong)?,
            };
            known *= size.clamp(1, super::graph::MAX_VALUES);
            dims.push(size);
            if dims.len() > 3 || known > super::graph::MAX_VALUES {
                return Err(wrong());
            }
        }
        for size in &mut dims {
            if *size == 0 {
                *size = from.len() / known;
                known *= *size;
            }
        }
        let to = match dims.as_slice() {
            [d] => Shape::flat(*d),
            [c, h, w] => Shape::picture(*c, *h, *w),
            _ => return Err(wrong()),
        };
        if to.len() != from.len() {
            return Err(wrong());
        }
        self.reorder(node, input, to)
    }

    /// The same values in ONNX's order, which is not the order in memory.
    fn reorder(&mut self, node: &Reader<'_>, input: usize, to: Shape) -> Result<(), TuneError> {
        let from = self.shapes[input];
        let same = (from.pixels() == 1 && to.pixels() == 1)
            || (from.c, from.h, from.w) == (to.c, to.h, to.w);
        let table = (!same).then(|| {
            (0..to.len()).map(|at| {
                let (pixel, channel) = (at / to.c, at % to.c);
                let flat = channel * to.pixels() + pixel;
                let (channel, pixel) = (flat / from.pixels(), flat % from.pixels());
                u32::try_from(pixel * from.c + channel).unwrap_or(u32::MAX)
            })
        });
        let op = Op::Reorder(table.map(Iterator::collect));
        self.push(node, op, vec![input], to, self.made_by[input])
    }
}

/// A constant's shape next to `[N, D]` or `[N, C, H, W]`, if it has no batch and is the same in every order.
fn broadcast(dims: &[usize], flat: bool) -> Option<Shape> {
    let rank = if flat { 2 } else { 4 };
    let surplus = dims.len().saturating_sub(rank);
    let mut sizes = [1; 4];
    for (size, dim) in sizes[..rank]
        .iter_mut()
        .rev()
        .zip(dims[surplus..].iter().rev())
    {
        *size = *dim;
    }
    if dims[..surplus].iter().any(|&dim| dim != 1) || sizes[0] != 1 || sizes.contains(&0) {
        return None;
    }
    let shape = if flat {
        Shape::flat(sizes[1])
    } else {
        Shape::picture(sizes[1], sizes[2], sizes[3])
    };
    (shape.c == 1 || shape.pixels() == 1).then_some(shape)
}

//! An ONNX graph as the trainer sees it.

use std::collections::{HashMap, HashSet};

use prost::Message;
use tract_onnx::pb::{ModelProto, tensor_shape_proto::dimension, type_proto};

use super::{
    TuneError, file,
    file::{Numbers, Reader},
    ops::{
        Shape,
        binary::Binary,
        conv::Conv,
        depthwise::Depthwise,
        point::{Norm, Point},
        pool::Pool,
    },
};

/// Values of one picture between two operators: 64 million.
pub(super) const MAX_VALUES: usize = 1 << 26;

/// How a constant is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Role {
    /// Which layer it belongs to, counted from the input.
    pub(super) layer: usize,
    /// A weight, that decays, rather than a bias or scale.
    pub(super) decays: bool,
}

/// Numbers of the file.
#[derive(Clone, Debug)]
pub(super) struct Constant {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) values: Vec<f32>,
    /// None if it never changes.
    pub(super) role: Option<Role>,
    /// Can be written back.
    stored: bool,
}

/// An operand: of the batch, or constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operand {
    Value(usize),
    Constant(usize),
}

#[derive(Debug)]
pub(super) enum Op {
    Conv {
        conv: Conv,
        weight: usize,
        bias: Option<usize>,
    },
    Depthwise {
        conv: Depthwise,
        weight: usize,
        bias: Option<usize>,
    },
    Norm {
        norm: Norm,
        scale: usize,
        bias: usize,
    },
    Point(Point),
    Binary {
        binary: Binary,
        operands: [Operand; 2],
    },
    Global,
    Pool(Pool),
    Concat,
    /// Where each value of a picture comes from; none if the order stays.
    Reorder(Option<Vec<u32>>),
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) op: Op,
    /// Values only.
    pub(super) inputs: Vec<usize>,
    pub(super) output: usize,
    /// Input and output are one buffer.
    pub(super) in_place: bool,
}

/// A network that can be trained: read from ONNX, written to ONNX.
///
/// The batch may be of any size, whatever the file says. Only what the wanted output depends on is read.
#[derive(Debug)]
pub struct Graph {
    proto: ModelProto,
    pub(super) nodes: Vec<Node>,
    /// By value; 0 is the input.
    pub(super) shapes: Vec<Shape>,
    /// By value: which buffer it lives in.
    pub(super) buffers: Vec<usize>,
    pub(super) output: usize,
    pub(super) constants: Vec<Constant>,
    pub(super) layers: usize,
}

pub(super) struct Builder {
    pub(super) nodes: Vec<Node>,
    pub(super) shapes: Vec<Shape>,
    pub(super) constants: Vec<Constant>,
    pub(super) layers: usize,
    /// By value: the layer with weights that made it.
    pub(super) made_by: Vec<Option<usize>>,
    names: HashMap<String, Operand>,
    pub(super) ints: HashMap<String, Vec<i64>>,
}

impl Builder {
    fn keep(&mut self, name: &str, numbers: (Vec<usize>, Numbers), stored: bool) {
        match numbers {
            (shape, Numbers::Floats(values)) => {
                self.names
                    .insert(name.to_owned(), Operand::Constant(self.constants.len()));
                let name = name.to_owned();
                self.constants.push(Constant {
                    name,
                    shape,
                    values,
                    role: None,
                    stored,
                });
            }
            (_, Numbers::Ints(values)) => {
                self.ints.insert(name.to_owned(), values);
            }
        }
    }

    /// What the input is, none if it is left out.
    pub(super) fn operand(
        &self,
        node: &Reader<'_>,
        at: usize,
    ) -> Result<Option<Operand>, TuneError> {
        match node.proto.input.get(at).filter(|name| !name.is_empty()) {
            None => Ok(None),
            Some(name) => match self.names.get(name) {
                Some(operand) => Ok(Some(*operand)),
                None => Err(node.refuse(format!("its input {name:?} is nowhere, or not of f32"))),
            },
        }
    }

    /// An input that depends on the picture.
    pub(super) fn value(&self, node: &Reader<'_>, at: usize) -> Result<usize, TuneError> {
        match self.operand(node, at)? {
            Some(Operand::Value(value)) => Ok(value),
            _ => Err(node.refuse(format!("its input {at} must depend on the picture"))),
        }
    }

    /// An input that does not, if there is one.
    pub(super) fn constant(
        &self,
        node: &Reader<'_>,
        at: usize,
    ) -> Result<Option<usize>, TuneError> {
        match self.operand(node, at)? {
            Some(Operand::Constant(constant)) => Ok(Some(constant)),
            None => Ok(None),
            Some(Operand::Value(_)) => Err(node.refuse(format!("its input {at} must be constant"))),
        }
    }

    /// Makes a constant trainable, if it is stored as an initialiser; the first use decides.
    pub(super) fn train(&mut self, constant: usize, layer: usize, decays: bool) {
        let constant = &mut self.constants[constant];
        if constant.stored && constant.role.is_none() {
            constant.role = Some(Role { layer, decays });
        }
    }

    pub(super) fn layer(&mut self) -> usize {
        self.layers += 1;
        self.layers - 1
    }

    pub(super) fn push(
        &mut self,
        node: &Reader<'_>,
        op: Op,
        inputs: Vec<usize>,
        shape: Shape,
        layer: Option<usize>,
    ) -> Result<(), TuneError> {
        if shape.len() == 0 || shape.len() > MAX_VALUES {
            return Err(node.refuse(format!("its result has {} values", shape.len())));
        }
        if node
            .proto
            .output
            .iter()
            .filter(|name| !name.is_empty())
            .count()
            != 1
        {
            return Err(node.refuse("more than one output"));
        }
        let output = self.shapes.len();
        self.shapes.push(shape);
        self.made_by.push(layer);
        self.nodes.push(Node {
            op,
            inputs,
            output,
            in_place: false,
        });
        self.names
            .insert(node.proto.output[0].clone(), Operand::Value(output));
        Ok(())
    }

    /// Another name for the same.
    pub(super) fn alias(&mut self, node: &Reader<'_>) -> Result<(), TuneError> {
        let output = node.proto.output.first().cloned().unwrap_or_default();
        if let Some(ints) = node
            .proto
            .input
            .first()
            .and_then(|name| self.ints.get(name))
            .cloned()
        {
            self.ints.insert(output, ints);
            return Ok(());
        }
        let operand = self
            .operand(node, 0)?
            .ok_or_else(|| node.refuse("no input"))?;
        self.names.insert(output, operand);
        Ok(())
    }
}

impl Graph {
    /// Reads the part of an ONNX file that leads from `input` (`[N, C, H, W]` or `[N, D]`, f32) to `output`
    /// (`[N, classes]`).
    ///
    /// # Errors
    /// When the file cannot be read, has no such input or output, or uses an operator that cannot be
    /// trained: the error names node and operator.
    pub fn read(onnx: &[u8], input: &str, output: &str) -> Result<Self, TuneError> {
        let proto = ModelProto::decode(onnx).map_err(|e| TuneError::Unreadable(e.to_string()))?;
        let graph = proto
            .graph
            .as_ref()
            .ok_or_else(|| TuneError::Unreadable("no graph".into()))?;
        let missing = |name: &str| TuneError::Missing(name.to_owned());
        let info = graph
            .input
            .iter()
            .find(|i| i.name == input)
            .ok_or_else(|| missing(input))?;
        let shape = input_shape(info).map_err(|problem| TuneError::Refused {
            node: format!("input {input}"),
            problem,
        })?;
        let mut builder = Builder {
            nodes: Vec::new(),
            shapes: vec![shape],
            constants: Vec::new(),
            layers: 0,
            made_by: vec![None],
            names: HashMap::from([(input.to_owned(), Operand::Value(0))]),
            ints: HashMap::new(),
        };
        let mut wanted = HashSet::from([output]);
        let mut used = Vec::new();
        for node in graph.node.iter().rev() {
            if node
                .output
                .iter()
                .any(|name| wanted.contains(name.as_str()))
            {
                wanted.extend(node.input.iter().map(String::as_str));
                used.push(node);
            }
        }
        for tensor in graph
            .initializer
            .iter()
            .filter(|t| wanted.contains(t.name.as_str()))
        {
            let numbers = file::numbers(tensor).map_err(|problem| TuneError::Refused {
                node: format!("initialiser {}", tensor.name),
                problem,
            })?;
            builder.keep(&tensor.name, numbers, true);
        }
        for node in used.into_iter().rev() {
            let node = Reader { proto: node };
            if !matches!(node.proto.domain.as_str(), "" | "ai.onnx") {
                return Err(TuneError::Operator(node.name()));
            }
            if node.proto.op_type == "Constant" {
                let name = node.proto.output.first().cloned().unwrap_or_default();
                builder.keep(&name, file::constant(&node)?, false);
            } else {
                builder.node(&node)?;
            }
        }
        let Some(Operand::Value(output)) = builder.names.get(output).copied() else {
            return Err(missing(output));
        };
        let Builder {
            mut nodes,
            shapes,
            constants,
            layers,
            ..
        } = builder;
        let buffers = share(&mut nodes, shapes.len(), output);
        Ok(Self {
            proto,
            nodes,
            shapes,
            buffers,
            output,
            constants,
            layers,
        })
    }

    /// Values of one picture at the input.
    #[must_use]
    pub fn input_len(&self) -> usize {
        self.shapes[0].len()
    }

    /// Values of one picture at the output: classes.
    #[must_use]
    pub fn output_len(&self) -> usize {
        self.shapes[self.output].len()
    }

    /// Layers with weights: what [`Train::LastBlocks`](super::Train::LastBlocks) counts.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Multiply-accumulates of the convolutions and dense layers for one picture.
    #[must_use]
    pub fn macs(&self) -> usize {
        let macs = |node: &Node| match &node.op {
            Op::Conv { conv, .. } => conv.macs(),
            Op::Depthwise { conv, .. } => conv.macs(),
            _ => 0,
        };
        self.nodes.iter().map(macs).sum()
    }

    /// The file with other numbers: `values` by constant, of which only trained ones are written.
    pub(super) fn write(&self, values: &[Vec<f32>], trained: &[bool]) -> Vec<u8> {
        let mut proto = self.proto.clone();
        let tensors = proto
            .graph
            .iter_mut()
            .flat_map(|graph| &mut graph.initializer);
        for tensor in tensors {
            let found = self
                .constants
                .iter()
                .position(|c| c.stored && c.name == tensor.name);
            if let Some(constant) = found.filter(|&constant| trained[constant]) {
                file::replace(tensor, &values[constant]);
            }
        }
        proto.encode_to_vec()
    }
}

/// Lets cheap functions work in place where nobody else needs their input. Returns the buffer of each value.
fn share(nodes: &mut [Node], values: usize, output: usize) -> Vec<usize> {
    let mut uses = vec![0; values];
    uses[output] += 1;
    for input in nodes.iter().flat_map(|node| &node.inputs) {
        uses[*input] += 1;
    }
    let mut buffers: Vec<usize> = (0..values).collect();
    // Whether the value's maker does without it on the way back.
    let mut free = vec![false; values];
    for node in nodes {
        if let Op::Point(point) = node.op
            && point.in_place()
            && free[node.inputs[0]]
            && uses[node.inputs[0]] == 1
        {
            node.in_place = true;
            buffers[node.output] = buffers[node.inputs[0]];
        }
        free[node.output] = matches!(
            node.op,
            Op::Conv { .. } | Op::Depthwise { .. } | Op::Norm { .. } | Op::Binary { .. }
        );
    }
    buffers
}

fn input_shape(info: &tract_onnx::pb::ValueInfoProto) -> Result<Shape, String> {
    let Some(type_proto::Value::TensorType(tensor)) =
        info.r#type.as_ref().and_then(|kind| kind.value.as_ref())
    else {
        return Err("no shape".into());
    };
    let dims = tensor
        .shape
        .iter()
        .flat_map(|shape| &shape.dim)
        .map(|dim| match &dim.value {
            Some(dimension::Value::DimValue(size)) => usize::try_from(*size).ok(),
            _ => None,
        });
    let dims: Vec<Option<usize>> = dims.collect();
    let shape = match dims.as_slice() {
        [_, Some(d)] => Shape::flat(*d),
        [_, Some(c), Some(h), Some(w)] => Shape::picture(*c, *h, *w),
        _ => return Err(format!("its shape {dims:?} is not [N, C, H, W] or [N, D]")),
    };
    let len = [shape.c, shape.h, shape.w]
        .into_iter()
        .try_fold(1usize, usize::checked_mul);
    match len {
        Some(1..=MAX_VALUES) => Ok(shape),
        _ => Err(format!("its shape is {dims:?}")),
    }
}

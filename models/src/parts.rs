//! One model in several parts that run one after the other, each perhaps on another device.
//!
//! A model can be cut where one value, and nothing else, goes from what was computed before to what is computed after.
//! [`Steps::of`] finds these places and what lies between them; [`Part::load`] loads what lies between any two. Every part
//! is made from the whole, checked file: nobody has to believe somebody else's operators.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use tract_onnx::pb::{
    GraphProto, ModelProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    tensor_proto::DataType,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};

use crate::{
    analyse,
    engine::{EngineError, floats},
    manifest::Manifest,
    net::Net,
    onnx,
    tensor::Input,
};

/// Steps that are told apart. Models have a cut for each block of layers; what is beyond is one step with what follows.
const MAX_STEPS: usize = 128;
/// Bytes of the longest name of a value.
const MAX_NAME: usize = 256;
/// Dimensions of a value.
const MAX_RANK: usize = 8;
/// Elements of a value that goes between two devices: 16 MiB of 32-bit floats.
pub const MAX_CUT_ELEMENTS: usize = 4 << 20;

/// A value between two parts, of 32-bit floats.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// Its name in the file.
    pub value: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

impl Cut {
    /// Its elements; nothing if it is more than may travel.
    #[must_use]
    pub fn elements(&self) -> Option<usize> {
        if self.value.len() > MAX_NAME || self.shape.len() > MAX_RANK {
            return None;
        }
        let product = |all: usize, &size: &usize| all.checked_mul(size);
        let elements = self.shape.iter().try_fold(1usize, product)?;
        (1..=MAX_CUT_ELEMENTS)
            .contains(&elements)
            .then_some(elements)
    }
}

/// From where to where a part goes; open ends are those of the model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// What goes in.
    pub from: Option<Cut>,
    /// What comes out.
    pub to: Option<Cut>,
}

/// What lies between two neighbouring cuts.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Multiply-adds of one run.
    pub operations: u64,
    /// Bytes of the stored tensors.
    pub weights: u64,
    /// The cut after it; none after the last.
    pub cut: Option<Cut>,
}

/// A model's steps, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Steps(pub Vec<Step>);

fn fail(manifest: &Manifest, detail: String) -> EngineError {
    EngineError::Tract {
        id: manifest.id(),
        action: "take the model apart",
        detail,
    }
}

fn read(manifest: &Manifest, model: &[u8]) -> Result<ModelProto, EngineError> {
    onnx::read(model, manifest).map_err(|source| EngineError::Onnx {
        id: manifest.id(),
        source,
    })
}

impl Steps {
    /// Where a model can be cut, and what lies between.
    ///
    /// # Errors
    /// Those of [`crate::Engine::load`] for a file that is none.
    pub fn of(manifest: &Manifest, model: &[u8]) -> Result<Self, EngineError> {
        let proto = read(manifest, model)?;
        let mut steps = Vec::new();
        let mut from: Option<Cut> = None;
        let Some(graph) = &proto.graph else {
            return Ok(Self(steps));
        };
        for value in crossings(graph) {
            if steps.len() + 1 >= MAX_STEPS || value.len() > MAX_NAME {
                break;
            }
            let piece = extract(&proto, from.as_ref(), Some(&value));
            let weights = weights(&piece);
            let looked = analyse::piece(piece).map_err(|why| fail(manifest, why))?;
            // Not of floats, or too large to travel: it stays inside of a step.
            let Some(shape) = looked.shape else { continue };
            let cut = Cut { value, shape };
            if cut.elements().is_none() {
                continue;
            }
            // Nothing is gained by a cut before which nothing was done.
            if looked.operations == 0 {
                continue;
            }
            steps.push(Step {
                operations: looked.operations,
                weights,
                cut: Some(cut.clone()),
            });
            from = Some(cut);
        }
        let last = extract(&proto, from.as_ref(), None);
        let weights = weights(&last);
        let looked = analyse::piece(last).map_err(|why| fail(manifest, why))?;
        steps.push(Step {
            operations: looked.operations,
            weights,
            cut: None,
        });
        Ok(Self(steps))
    }

    /// Which steps a span holds, `from..to`; nothing if its cuts are not this model's, or it holds none.
    #[must_use]
    pub fn bounds(&self, span: &Span) -> Option<(usize, usize)> {
        let behind = |cut: &Cut| {
            let found = self
                .0
                .iter()
                .position(|step| step.cut.as_ref() == Some(cut));
            found.map(|at| at + 1)
        };
        let from = span.from.as_ref().map_or(Some(0), behind)?;
        let to = span.to.as_ref().map_or(Some(self.0.len()), behind)?;
        (from < to).then_some((from, to))
    }

    /// The span of steps `from..to`; nothing if there are none such.
    #[must_use]
    pub fn span(&self, from: usize, to: usize) -> Option<Span> {
        if from >= to || to > self.0.len() {
            return None;
        }
        let before = from.checked_sub(1);
        Some(Span {
            from: before.and_then(|at| self.0.get(at)?.cut.clone()),
            to: self.0.get(to - 1)?.cut.clone(),
        })
    }
}

/// A part of a model, ready to run. Share it by reference or `Arc`.
pub struct Part {
    id: String,
    input: Vec<usize>,
    outputs: Vec<usize>,
    net: Net,
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Part")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Part {
    /// Loads what lies within `span`, and runs it once.
    ///
    /// # Errors
    /// A file or cuts that do not belong together; those of [`crate::Engine::load`].
    pub fn load(manifest: &Manifest, model: &[u8], span: &Span) -> Result<Self, EngineError> {
        let cuts = [&span.from, &span.to];
        if cuts
            .into_iter()
            .flatten()
            .any(|cut| cut.elements().is_none())
        {
            return Err(fail(manifest, "a cut is out of bounds".to_owned()));
        }
        let proto = read(manifest, model)?;
        let known: HashSet<String> = proto
            .graph
            .as_ref()
            .map(crossings)
            .unwrap_or_default()
            .into_iter()
            .collect();
        if let Some(cut) = cuts
            .into_iter()
            .flatten()
            .find(|cut| !known.contains(&cut.value))
        {
            return Err(fail(
                manifest,
                format!("it cannot be cut at {:?}", cut.value),
            ));
        }
        let piece = extract(
            &proto,
            span.from.as_ref(),
            span.to.as_ref().map(|cut| cut.value.as_str()),
        );
        drop(proto);
        let net = Net::load(piece).map_err(|why| fail(manifest, why))?;
        let outputs = net.outputs().map_err(|why| fail(manifest, why))?;
        if let Some(cut) = &span.to
            && Some(outputs.as_slice()) != cut.elements().as_ref().map(std::slice::from_ref)
        {
            return Err(fail(
                manifest,
                format!("{:?} has not the shape {:?}", cut.value, cut.shape),
            ));
        }
        let input = span
            .from
            .as_ref()
            .map_or_else(|| manifest.input.shape.to_vec(), |cut| cut.shape.clone());
        let part = Self {
            id: manifest.id(),
            input,
            outputs,
            net,
        };
        part.run(vec![0.0; part.takes()])?;
        Ok(part)
    }

    /// How many values go in.
    #[must_use]
    pub fn takes(&self) -> usize {
        self.input.iter().product()
    }

    /// How many values come out, of each output.
    #[must_use]
    pub fn gives(&self) -> &[usize] {
        &self.outputs
    }

    /// What comes out, in the order of the manifest's outputs (scores first) if it is the last part.
    ///
    /// # Errors
    /// When the number of values is wrong, or the model fails.
    pub fn run(&self, values: Vec<f32>) -> Result<Vec<Vec<f32>>, EngineError> {
        let fail = |detail| EngineError::Tract {
            id: self.id.clone(),
            action: "run a part of the model",
            detail,
        };
        let input = Input::new(&self.input, values).map_err(fail)?;
        let outputs = self.net.run(&input).map_err(fail)?;
        floats(&outputs).map_err(fail)
    }
}

/// The values that depend on what goes in.
fn varying(graph: &GraphProto) -> HashSet<&str> {
    let mut varying: HashSet<&str> = onnx::given(graph)
        .map(|input| input.name.as_str())
        .collect();
    for node in &graph.node {
        if node
            .input
            .iter()
            .any(|name| varying.contains(name.as_str()))
        {
            varying.extend(
                node.output
                    .iter()
                    .map(String::as_str)
                    .filter(|name| !name.is_empty()),
            );
        }
    }
    varying
}

/// The values which alone go from the nodes before to the nodes after, in the order of the file.
fn crossings(graph: &GraphProto) -> Vec<String> {
    let varying = varying(graph);
    let mut last_use: HashMap<&str, usize> = HashMap::new();
    for (at, node) in graph.node.iter().enumerate() {
        for input in &node.input {
            last_use.insert(input, at);
        }
    }
    for output in &graph.output {
        last_use.insert(&output.name, usize::MAX);
    }
    let mut alive: HashSet<&str> = onnx::given(graph)
        .map(|input| input.name.as_str())
        .collect();
    let mut found = Vec::new();
    for (at, node) in graph.node.iter().enumerate() {
        let made = node.output.iter().map(String::as_str);
        alive.extend(made.filter(|name| varying.contains(name)));
        alive.retain(|name| last_use.get(name).is_some_and(|&last| last > at));
        let mut all = alive.iter();
        if let (Some(&only), None) = (all.next(), all.next()) {
            let is_output = last_use.get(only) == Some(&usize::MAX);
            let is_new = node.output.iter().any(|name| name == only);
            if !is_output && is_new {
                found.push(only.to_owned());
            }
        }
    }
    found
}

/// The graph between two values, with the stored tensors that it needs.
fn extract(model: &ModelProto, from: Option<&Cut>, to: Option<&str>) -> ModelProto {
    let mut piece = ModelProto {
        ir_version: model.ir_version,
        opset_import: model.opset_import.clone(),
        ..ModelProto::default()
    };
    let Some(graph) = &model.graph else {
        return piece;
    };
    let output = match to {
        Some(name) => vec![ValueInfoProto {
            name: name.to_owned(),
            ..ValueInfoProto::default()
        }],
        None => graph.output.clone(),
    };
    let mut needed: HashSet<&str> = match to {
        Some(name) => HashSet::from([name]),
        None => graph
            .output
            .iter()
            .map(|output| output.name.as_str())
            .collect(),
    };
    let begin = from.map(|cut| cut.value.as_str());
    let mut node = Vec::new();
    for each in graph.node.iter().rev() {
        if each
            .output
            .iter()
            .any(|name| needed.contains(name.as_str()) && Some(name.as_str()) != begin)
        {
            needed.extend(each.input.iter().map(String::as_str));
            node.push(each.clone());
        }
    }
    node.reverse();
    let stored = |tensor: &&TensorProto| needed.contains(tensor.name.as_str());
    let input = match from {
        Some(cut) => vec![given(cut)],
        None => graph.input.clone(),
    };
    piece.graph = Some(GraphProto {
        name: graph.name.clone(),
        initializer: graph.initializer.iter().filter(stored).cloned().collect(),
        node,
        input,
        output,
        ..GraphProto::default()
    });
    piece
}

fn given(cut: &Cut) -> ValueInfoProto {
    let dim = |&size: &usize| Dimension {
        value: Some(dimension::Value::DimValue(
            i64::try_from(size).unwrap_or(-1),
        )),
        ..Dimension::default()
    };
    ValueInfoProto {
        name: cut.value.clone(),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(type_proto::Tensor {
                elem_type: DataType::Float as i32,
                shape: Some(TensorShapeProto {
                    dim: cut.shape.iter().map(dim).collect(),
                }),
            })),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}

/// Bytes of what is stored.
fn weights(model: &ModelProto) -> u64 {
    let graph = model.graph.iter();
    let bytes = |tensor: &TensorProto| {
        let listed = 4 * (tensor.float_data.len() + tensor.int32_data.len())
            + 8 * (tensor.int64_data.len() + tensor.double_data.len());
        (tensor.raw_data.len() + listed) as u64
    };
    graph.flat_map(|graph| &graph.initializer).map(bytes).sum()
}

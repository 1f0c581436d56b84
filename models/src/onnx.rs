//! What an ONNX file must be before the engine sees it: bounded, self-contained, and the model that the
//! manifest describes. Model files come from elsewhere and may be hostile.

use std::collections::HashSet;

use tract_onnx::{
    pb::{
        GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, TypeProto,
        ValueInfoProto,
        tensor_proto::{DataLocation, DataType},
        tensor_shape_proto::{Dimension, dimension},
        type_proto,
    },
    prelude::Framework,
};

use crate::{
    MAX_MODEL_BYTES,
    manifest::{InputSpec, Manifest},
    wire,
};

/// Newest operator set that the engine is tested against.
const MAX_OPSET: i64 = 20;
/// Large vision models have some thousand operators.
const MAX_NODES: usize = 20_000;
/// Elements of one tensor: a gigabyte of f32.
const MAX_ELEMENTS: u64 = 1 << 28;
/// Sizes of one tensor; vision models use up to six.
const MAX_RANK: usize = 8;

/// Why an ONNX file is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OnnxError {
    /// Longer than [`MAX_MODEL_BYTES`].
    #[error("model file of {0} bytes is larger than 256 MiB")]
    TooLarge(usize),
    /// Cannot be read as ONNX.
    #[error("not a usable ONNX file: {0}")]
    Unreadable(String),
    /// Not an operator set that is supported.
    #[error("operator set {0}: 1 to 20 are supported")]
    Opset(i64),
    /// Something that is not allowed, and where.
    #[error("{place}: {problem}")]
    Refused {
        /// Node, tensor or output.
        place: String,
        /// What about it.
        problem: String,
    },
    /// Not the inputs or outputs of the manifest.
    #[error("the manifest says {expected}, the model has {found}")]
    Mismatch {
        /// In the manifest.
        expected: String,
        /// In the file.
        found: String,
    },
}

fn refuse(place: impl Into<String>, problem: impl Into<String>) -> OnnxError {
    OnnxError::Refused {
        place: place.into(),
        problem: problem.into(),
    }
}

fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// How many elements, if that is a number within bounds.
fn elements(dims: &[i64], place: &str) -> Result<u64, OnnxError> {
    if dims.len() > MAX_RANK {
        return Err(refuse(place, format!("{} dimensions", dims.len())));
    }
    dims.iter()
        .try_fold(1u64, |product, &dim| {
            product.checked_mul(u64::try_from(dim).ok()?)
        })
        .filter(|&product| product <= MAX_ELEMENTS)
        .ok_or_else(|| {
            refuse(
                place,
                format!("dimensions {dims:?} are beyond 2^28 elements"),
            )
        })
}

/// A stored tensor: inside the file, of a type that is supported, as long as its dimensions say.
fn tensor(tensor: &TensorProto, place: &str) -> Result<(), OnnxError> {
    if tensor.data_location == Some(DataLocation::External as i32)
        || !tensor.external_data.is_empty()
    {
        return Err(refuse(
            place,
            "data outside of the model file is not allowed",
        ));
    }
    if tensor.segment.is_some() {
        return Err(refuse(place, "tensors in segments are not supported"));
    }
    let expected = elements(&tensor.dims, place)?;
    let (size, listed) = match DataType::try_from(tensor.data_type) {
        Ok(DataType::Float) => (4, tensor.float_data.len()),
        Ok(DataType::Double) => (8, tensor.double_data.len()),
        Ok(DataType::Float16 | DataType::Int16) => (2, tensor.int32_data.len()),
        Ok(DataType::Int8 | DataType::Uint8 | DataType::Bool) => (1, tensor.int32_data.len()),
        Ok(DataType::Int32) => (4, tensor.int32_data.len()),
        Ok(DataType::Int64) => (8, tensor.int64_data.len()),
        _ => {
            return Err(refuse(
                place,
                format!("element type {} is not supported", tensor.data_type),
            ));
        }
    };
    let found = if tensor.raw_data.is_empty() {
        listed as u64
    } else if tensor.raw_data.len().is_multiple_of(size) {
        (tensor.raw_data.len() / size) as u64
    } else {
        return Err(refuse(
            place,
            "stored bytes are no whole number of elements",
        ));
    };
    if found == expected {
        Ok(())
    } else {
        Err(refuse(
            place,
            format!("{found} elements stored, {expected} announced"),
        ))
    }
}

/// The sizes that a type fixes; none for what is open, nothing if there is no shape at all.
pub(crate) fn sizes(kind: Option<&TypeProto>) -> Option<Vec<Option<i64>>> {
    let type_proto::Value::TensorType(tensor) = kind?.value.as_ref()?;
    let shape = tensor.shape.as_ref()?;
    let size = |dim: &Dimension| match dim.value {
        Some(dimension::Value::DimValue(size)) => Some(size),
        _ => None,
    };
    Some(shape.dim.iter().map(size).collect())
}

fn node(node: &NodeProto, at: usize) -> Result<(), OnnxError> {
    let place = || {
        let name = if node.name.is_empty() {
            node.output.first().map_or("", String::as_str)
        } else {
            &node.name
        };
        format!("node {at} {:?} ({})", name, node.op_type)
    };
    for attribute in &node.attribute {
        if attribute.g.is_some() || !attribute.graphs.is_empty() {
            return Err(refuse(place(), "graphs inside of nodes are not allowed"));
        }
        if attribute.sparse_tensor.is_some() || !attribute.sparse_tensors.is_empty() {
            return Err(refuse(place(), "sparse tensors are not supported"));
        }
        for inner in attribute.t.iter().chain(&attribute.tensors) {
            tensor(inner, &place())?;
        }
    }
    Ok(())
}

/// Each value is made once, and before it is used. That also rules out circles.
fn wiring(graph: &GraphProto) -> Result<(), OnnxError> {
    let mut known: HashSet<&str> = HashSet::new();
    let stored = graph.initializer.iter().map(|tensor| tensor.name.as_str());
    for name in stored.clone() {
        if !known.insert(name) {
            return Err(refuse(format!("value {name:?}"), "is defined twice"));
        }
    }
    let stored: HashSet<&str> = stored.collect();
    for input in &graph.input {
        // Old files list what is stored among the inputs too.
        if !known.insert(&input.name) && !stored.contains(input.name.as_str()) {
            return Err(refuse(
                format!("value {:?}", input.name),
                "is defined twice",
            ));
        }
    }
    for (at, node) in graph.node.iter().enumerate() {
        for input in node.input.iter().filter(|name| !name.is_empty()) {
            if !known.contains(input.as_str()) {
                let problem = format!("uses {input:?} before it is made");
                return Err(refuse(format!("node {at} ({})", node.op_type), problem));
            }
        }
        for output in node.output.iter().filter(|name| !name.is_empty()) {
            if !known.insert(output) {
                return Err(refuse(format!("value {output:?}"), "is defined twice"));
            }
        }
    }
    for output in &graph.output {
        if !known.contains(output.name.as_str()) {
            return Err(refuse(format!("output {:?}", output.name), "is never made"));
        }
    }
    Ok(())
}

/// The inputs that are not stored in the file: what has to be given at each run.
pub(crate) fn given(graph: &GraphProto) -> impl Iterator<Item = &ValueInfoProto> {
    let stored: HashSet<&str> = graph.initializer.iter().map(|t| t.name.as_str()).collect();
    let given = move |input: &&ValueInfoProto| !stored.contains(input.name.as_str());
    graph.input.iter().filter(given)
}

/// The one input becomes exactly the manifest's.
fn input(graph: &mut GraphProto, spec: &InputSpec) -> Result<(), OnnxError> {
    let names: Vec<&str> = given(graph).map(|input| input.name.as_str()).collect();
    if names != [spec.name.as_str()] {
        return Err(OnnxError::Mismatch {
            expected: format!("one input {:?}", spec.name),
            found: format!("the inputs {}", list(names)),
        });
    }
    let Some(input) = graph.input.iter_mut().find(|i| i.name == spec.name) else {
        return Err(refuse(&spec.name, "is missing"));
    };
    let shape = spec.shape.map(|size| i64::try_from(size).unwrap_or(-1));
    if let Some(sizes) = sizes(input.r#type.as_ref()) {
        let fits = sizes.len() == shape.len()
            && sizes
                .iter()
                .zip(shape)
                .all(|(size, wanted)| size.is_none_or(|size| size == wanted));
        if !fits {
            let sizes: Vec<String> = sizes
                .iter()
                .map(|size| size.map_or("?".to_owned(), |size| size.to_string()))
                .collect();
            return Err(OnnxError::Mismatch {
                expected: format!("an input of shape {shape:?}"),
                found: format!("[{}]", sizes.join(", ")),
            });
        }
    }
    let float = match input.r#type.as_ref().and_then(|kind| kind.value.as_ref()) {
        Some(type_proto::Value::TensorType(tensor)) => tensor.elem_type == DataType::Float as i32,
        None => true,
    };
    if !float {
        return Err(refuse(
            format!("input {:?}", spec.name),
            "must be of 32-bit floats",
        ));
    }
    let dim = |size: i64| Dimension {
        value: Some(dimension::Value::DimValue(size)),
        ..Dimension::default()
    };
    input.r#type = Some(TypeProto {
        value: Some(type_proto::Value::TensorType(type_proto::Tensor {
            elem_type: DataType::Float as i32,
            shape: Some(TensorShapeProto {
                dim: shape.map(dim).to_vec(),
            }),
        })),
        ..TypeProto::default()
    });
    // What is stored needs no declaration.
    graph.input.retain(|input| input.name == spec.name);
    Ok(())
}

/// Keeps these outputs, in this order.
fn outputs<'a>(
    graph: &mut GraphProto,
    wanted: impl IntoIterator<Item = &'a String>,
) -> Result<(), OnnxError> {
    let mut kept = Vec::new();
    for name in wanted {
        match graph.output.iter().find(|output| &output.name == name) {
            Some(output) => kept.push(output.clone()),
            None => {
                return Err(OnnxError::Mismatch {
                    expected: format!("an output {name:?}"),
                    found: format!(
                        "the outputs {}",
                        list(graph.output.iter().map(|o| o.name.as_str()))
                    ),
                });
            }
        }
    }
    graph.output = kept;
    Ok(())
}

/// Parses an ONNX file and makes sure of everything above. The result has the manifest's input shape,
/// only its outputs (scores first), and no hints about shapes in between.
pub(crate) fn read(bytes: &[u8], manifest: &Manifest) -> Result<ModelProto, OnnxError> {
    let mut model = parse(bytes)?;
    let output = &manifest.output;
    let wanted = output.scores.iter().chain(&output.embedding);
    fit(&mut model, &manifest.input, wanted)?;
    Ok(model)
}

/// Gives a parsed model this input, these outputs, and nothing that the engine does not bear.
pub(crate) fn fit<'a>(
    model: &mut ModelProto,
    spec: &InputSpec,
    wanted: impl IntoIterator<Item = &'a String>,
) -> Result<(), OnnxError> {
    let Some(graph) = &mut model.graph else {
        return Err(no_graph());
    };
    input(graph, spec)?;
    outputs(graph, wanted)?;
    // Two nodes may carry the same name, which the engine does not bear; it then goes by their outputs.
    graph.node.iter_mut().for_each(|node| node.name.clear());
    graph.value_info.clear();
    graph.quantization_annotation.clear();
    Ok(())
}

fn no_graph() -> OnnxError {
    OnnxError::Unreadable("there is no graph in it".to_owned())
}

/// Parses an ONNX file that is bounded, self-contained and wired soundly, whatever goes in and comes out.
pub(crate) fn parse(bytes: &[u8]) -> Result<ModelProto, OnnxError> {
    if bytes.len() as u64 > MAX_MODEL_BYTES {
        return Err(OnnxError::TooLarge(bytes.len()));
    }
    wire::check(bytes).map_err(|problem| OnnxError::Unreadable(problem.to_owned()))?;
    let model = tract_onnx::onnx()
        .proto_model_for_read(&mut &*bytes)
        .map_err(|error| OnnxError::Unreadable(format!("{error:#}")))?;
    let opset = model
        .opset_import
        .iter()
        .find(|set| matches!(set.domain.as_str(), "" | "ai.onnx"))
        .map_or(0, |set| set.version);
    let Some(graph) = &model.graph else {
        return Err(no_graph());
    };
    if !(1..=MAX_OPSET).contains(&opset) {
        return Err(OnnxError::Opset(opset));
    }
    if !model.functions.is_empty() || !model.training_info.is_empty() {
        return Err(refuse(
            "model",
            "functions and training parts are not supported",
        ));
    }
    if graph.node.len() > MAX_NODES || graph.initializer.len() > MAX_NODES {
        return Err(refuse("graph", "more than 20000 nodes or stored tensors"));
    }
    if !graph.sparse_initializer.is_empty() {
        return Err(refuse("graph", "sparse tensors are not supported"));
    }
    for stored in &graph.initializer {
        tensor(stored, &format!("tensor {:?}", stored.name))?;
    }
    let values = graph
        .input
        .iter()
        .chain(&graph.output)
        .chain(&graph.value_info);
    for value in values {
        // An open size counts as one; a negative one is as wrong as one too large.
        let sizes: Vec<i64> = sizes(value.r#type.as_ref())
            .unwrap_or_default()
            .iter()
            .map(|s| s.unwrap_or(1))
            .collect();
        elements(&sizes, &format!("value {:?}", value.name))?;
    }
    for (at, each) in graph.node.iter().enumerate() {
        node(each, at)?;
    }
    wiring(graph)?;
    Ok(model)
}

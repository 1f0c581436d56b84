//! ONNX in, ONNX out: a new head on a model's embedding, or new values in its stored tensors.
//!
//! What stays is not touched: nodes and stored tensors before the embedding are written as they were read. The
//! same input gives the same bytes. Model bytes must be ones that [`models::Engine`] takes: it refuses what is
//! hostile, this module only what it cannot change.

use std::collections::{BTreeMap, HashSet};

use models::{Engine, EngineError, Input, MAX_MODEL_BYTES};
use prost::Message;
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto,
    attribute_proto::AttributeType,
    tensor_proto::DataType,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};

use crate::head::Head;

/// Gemm spreads its bias over rows by itself since this operator set.
const LEAST_OPSET: i64 = 7;
/// How far an answer of the written model may be off, as part of the largest value of its kind (at least 1).
/// Another order of summing changes some 1e-6; a wrong graph changes far more.
pub const TOLERANCE: f32 = 1e-3;

/// Why a model cannot be changed, or a changed one not be trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SurgeryError {
    /// No ONNX.
    #[error("read the model: {0}")]
    Unreadable(String),
    /// Something in the graph that does not suit.
    #[error("{place}: {problem}")]
    Graph {
        /// Which value.
        place: String,
        /// What about it.
        problem: String,
    },
    /// The engine cannot run the model.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The written model answers otherwise than the head that it was made of.
    #[error("input {input}: {what} {at} is {found}, expected {expected}")]
    Differs {
        /// Which input, from 0.
        input: usize,
        /// `embedding value` or `logit`.
        what: &'static str,
        /// From 0.
        at: usize,
        /// The written model's.
        found: f32,
        /// What it should be.
        expected: f32,
    },
    /// Nothing to compare.
    #[error("verify the model: {0}")]
    Unproven(&'static str),
}

fn wrong(place: &str, problem: impl Into<String>) -> SurgeryError {
    SurgeryError::Graph {
        place: format!("value {place:?}"),
        problem: problem.into(),
    }
}

fn decode(model: &[u8]) -> Result<ModelProto, SurgeryError> {
    if model.len() as u64 > MAX_MODEL_BYTES {
        return Err(SurgeryError::Unreadable("larger than 256 MiB".to_owned()));
    }
    let model = ModelProto::decode(model).map_err(|e| SurgeryError::Unreadable(e.to_string()))?;
    if model.graph.is_none() {
        return Err(SurgeryError::Unreadable(
            "there is no graph in it".to_owned(),
        ));
    }
    Ok(model)
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// A stored f32 tensor.
fn stored(name: &str, dims: &[usize], values: &[f32]) -> TensorProto {
    TensorProto {
        name: name.to_owned(),
        dims: dims.iter().map(|&dim| dim as i64).collect(),
        data_type: DataType::Float as i32,
        raw_data: little_endian(values),
        ..TensorProto::default()
    }
}

fn integer(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::Int as i32,
        i: value,
        ..AttributeProto::default()
    }
}

fn node(kind: &str, inputs: &[&str], output: &str, attribute: AttributeProto) -> NodeProto {
    NodeProto {
        op_type: kind.to_owned(),
        name: output.to_owned(),
        input: inputs.iter().map(ToString::to_string).collect(),
        output: vec![output.to_owned()],
        attribute: vec![attribute],
        ..NodeProto::default()
    }
}

/// The declaration of a [1, `size`] output.
fn declared(name: &str, size: usize) -> ValueInfoProto {
    let dim = |size: usize| Dimension {
        value: Some(dimension::Value::DimValue(size as i64)),
        ..Dimension::default()
    };
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(type_proto::Tensor {
                elem_type: DataType::Float as i32,
                shape: Some(TensorShapeProto {
                    dim: vec![dim(1), dim(size)],
                }),
            })),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}

/// Element type and sizes of a declared value; what is open is none.
fn shape(value: &ValueInfoProto) -> Option<(i32, Option<Vec<Option<i64>>>)> {
    let type_proto::Value::TensorType(tensor) = value.r#type.as_ref()?.value.as_ref()?;
    let size = |dim: &Dimension| match dim.value {
        Some(dimension::Value::DimValue(size)) => Some(size),
        _ => None,
    };
    let sizes = tensor
        .shape
        .as_ref()
        .map(|shape| shape.dim.iter().map(size).collect());
    Some((tensor.elem_type, sizes))
}

/// A name that nothing in the graph has.
fn free(wanted: &str, taken: &mut HashSet<String>) -> String {
    let mut name = wanted.to_owned();
    let mut number = 1;
    while !taken.insert(name.clone()) {
        number += 1;
        name = format!("{wanted}.{number}");
    }
    name
}

/// Keeps only the nodes and stored tensors that `output` needs.
fn cut(graph: &mut GraphProto, output: &str) {
    let mut needed = HashSet::from([output.to_owned()]);
    // Nodes are in the order of their use, so one pass from the end finds everything.
    let mut keep = vec![false; graph.node.len()];
    for (keep, node) in keep.iter_mut().zip(&graph.node).rev() {
        if node.output.iter().any(|made| needed.contains(made)) {
            *keep = true;
            needed.extend(node.input.iter().cloned());
            needed.extend(node.output.iter().cloned());
        }
    }
    let mut kept = keep.into_iter();
    graph.node.retain(|_| kept.next().unwrap_or(false));
    let had: HashSet<String> = graph.initializer.iter().map(|t| t.name.clone()).collect();
    graph
        .initializer
        .retain(|tensor| needed.contains(&tensor.name));
    // Old files list what is stored among the inputs too.
    graph
        .input
        .retain(|input| needed.contains(&input.name) || !had.contains(&input.name));
    graph
        .value_info
        .retain(|value| needed.contains(&value.name));
    graph.quantization_annotation.clear();
}

/// The model cut behind its value `embedding`, with `head` on it as one Gemm that makes `scores`.
///
/// A head that was there goes, whatever it was made of. The outputs are `scores` ([1, C], raw logits: the
/// manifest's activation must be softmax), then `embedding`.
///
/// # Errors
/// When the bytes are no ONNX of operator set 7 or newer, or the embedding is missing, not of f32, or known to
/// be of another length than the head's.
pub fn with_head(
    model: &[u8],
    embedding: &str,
    scores: &str,
    head: &Head,
) -> Result<Vec<u8>, SurgeryError> {
    let mut model = decode(model)?;
    let opset = model
        .opset_import
        .iter()
        .find(|set| matches!(set.domain.as_str(), "" | "ai.onnx"));
    let opset = opset.map_or(0, |set| set.version);
    if opset < LEAST_OPSET {
        return Err(SurgeryError::Unreadable(format!(
            "operator set {opset}: a head needs {LEAST_OPSET} or newer"
        )));
    }
    if head.dim == 0 || head.weight.len() != head.dim * head.classes() || head.classes() == 0 {
        return Err(wrong(scores, "the head's weights do not match its sizes"));
    }
    let Some(graph) = &mut model.graph else {
        return Err(SurgeryError::Unreadable(
            "there is no graph in it".to_owned(),
        ));
    };
    if !graph
        .node
        .iter()
        .any(|node| node.output.iter().any(|made| made == embedding))
    {
        return Err(wrong(
            embedding,
            "is made by no node, so it is no embedding",
        ));
    }
    let declaration = graph
        .output
        .iter()
        .chain(&graph.value_info)
        .find(|v| v.name == embedding);
    let declaration = declaration.cloned();
    let (kind, sizes) = declaration.as_ref().and_then(shape).unwrap_or((0, None));
    if kind != 0 && kind != DataType::Float as i32 {
        return Err(wrong(embedding, "must be of 32-bit floats"));
    }
    if let Some(sizes) = &sizes {
        // An open size is the batch, which is 1.
        let volume = sizes
            .iter()
            .map(|size| size.unwrap_or(1))
            .try_fold(1, i64::checked_mul);
        if volume != i64::try_from(head.dim).ok() {
            return Err(wrong(
                embedding,
                format!(
                    "has the sizes {sizes:?}, the head takes {} values",
                    head.dim
                ),
            ));
        }
    }
    cut(graph, embedding);
    let mut taken: HashSet<String> = graph
        .node
        .iter()
        .flat_map(|node| node.output.iter().cloned())
        .chain(graph.initializer.iter().map(|tensor| tensor.name.clone()))
        .chain(graph.input.iter().map(|input| input.name.clone()))
        .collect();
    if !taken.insert(scores.to_owned()) {
        return Err(wrong(
            scores,
            "is needed by the embedding, so it cannot be replaced",
        ));
    }
    let mut input = embedding.to_owned();
    if sizes.is_none_or(|sizes| sizes.len() != 2) {
        input = free("head.input", &mut taken);
        let flatten = node("Flatten", &[embedding], &input, integer("axis", 1));
        graph.node.push(flatten);
    }
    let weight = free("head.weight", &mut taken);
    let bias = free("head.bias", &mut taken);
    graph
        .initializer
        .push(stored(&weight, &[head.classes(), head.dim], &head.weight));
    graph
        .initializer
        .push(stored(&bias, &[head.classes()], &head.bias));
    graph.node.push(node(
        "Gemm",
        &[&input, &weight, &bias],
        scores,
        integer("transB", 1),
    ));
    graph.value_info.retain(|value| value.name != embedding);
    graph.output = vec![
        declared(scores, head.classes()),
        declaration.unwrap_or_else(|| declared(embedding, head.dim)),
    ];
    Ok(model.encode_to_vec())
}

/// The model with other values in stored f32 tensors; sizes and everything else stay.
///
/// # Errors
/// When a name is not stored in the model, its tensor is not of f32, or the number of values is another, or a
/// value is not finite.
pub fn replace_initializers(
    model: &[u8],
    values: &BTreeMap<String, Vec<f32>>,
) -> Result<Vec<u8>, SurgeryError> {
    let mut model = decode(model)?;
    let tensors = model
        .graph
        .iter_mut()
        .flat_map(|graph| &mut graph.initializer);
    let mut missing: HashSet<&str> = values.keys().map(String::as_str).collect();
    for tensor in tensors {
        let Some(values) = values.get(&tensor.name) else {
            continue;
        };
        missing.remove(tensor.name.as_str());
        if tensor.data_type != DataType::Float as i32 {
            return Err(wrong(&tensor.name, "is not of 32-bit floats"));
        }
        let count = tensor
            .dims
            .iter()
            .try_fold(1i64, |product, &dim| product.checked_mul(dim));
        if count != i64::try_from(values.len()).ok() {
            return Err(wrong(
                &tensor.name,
                format!(
                    "has the sizes {:?}, {} values given",
                    tensor.dims,
                    values.len()
                ),
            ));
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(wrong(
                &tensor.name,
                format!("new value {at} is {}", values[at]),
            ));
        }
        tensor.float_data.clear();
        tensor.raw_data = little_endian(values);
    }
    match missing.into_iter().min() {
        Some(name) => Err(wrong(name, "is not stored in the model")),
        None => Ok(model.encode_to_vec()),
    }
}

fn compare(
    input: usize,
    what: &'static str,
    found: &[f32],
    expected: &[f32],
) -> Result<f32, SurgeryError> {
    if found.len() != expected.len() {
        return Err(SurgeryError::Unproven("another number of values comes out"));
    }
    let scale = expected
        .iter()
        .fold(1.0f32, |top, value| top.max(value.abs()));
    let mut most = 0.0f32;
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let off = (found - expected).abs() / scale;
        // Not a number must not pass.
        if off.is_nan() || off > TOLERANCE {
            return Err(SurgeryError::Differs {
                input,
                what,
                at,
                found,
                expected,
            });
        }
        most = most.max(off);
    }
    Ok(most)
}

/// Compares the written model, loaded again, with what it was made of: its embeddings with those of the model
/// `before`, its logits with those of `head` on them. `inputs` are prepared by either engine (both have the
/// same input). Returns the largest difference, as part of the largest value.
///
/// # Errors
/// When one differs by more than [`TOLERANCE`], there are no inputs, or an engine fails. Such a file must not
/// be used.
pub fn verify(
    before: &Engine,
    after: &Engine,
    head: &Head,
    inputs: &[Input],
) -> Result<f32, SurgeryError> {
    if inputs.is_empty() {
        return Err(SurgeryError::Unproven("there are no inputs to try"));
    }
    let output = &after.manifest().output;
    if output.scores.is_none() || output.embedding.is_none() {
        return Err(SurgeryError::Unproven(
            "scores and embedding must be outputs",
        ));
    }
    let mut most = 0.0f32;
    for (at, input) in inputs.iter().enumerate() {
        let old = before.run(input)?.embedding;
        let outputs = after.bare_run(input)?;
        let values = |at: usize| -> Option<Vec<f32>> {
            let view = outputs.get(at)?.try_as_plain_ram().ok()?;
            view.as_slice::<f32>().ok().map(<[f32]>::to_vec)
        };
        let (Some(logits), Some(embedding)) = (values(0), values(1)) else {
            return Err(SurgeryError::Unproven("scores or embedding are not of f32"));
        };
        most = most.max(compare(at, "embedding value", &embedding, &old)?);
        most = most.max(compare(at, "logit", &logits, &head.logits(&old))?);
    }
    Ok(most)
}

#[cfg(test)]
#[path = "surgery_tests.rs"]
mod tests;

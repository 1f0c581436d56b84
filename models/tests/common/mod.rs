//! Builds small bundles on the fly, so that the tests stand on their own.
#![allow(dead_code, reason = "each test file uses a part of this")]
#![allow(missing_docs, reason = "test support")]
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::{fs, path::Path};

use image::{ImageFormat, RgbImage};
use models::{Bundle, BundleError};
use prost::Message;
use sha2::{Digest, Sha256};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto,
    attribute_proto::AttributeType,
    tensor_proto::DataType,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};

pub(crate) const SIDE: i64 = 16;

pub(crate) fn value(name: &str, shape: &[i64]) -> ValueInfoProto {
    let dim = |&size: &i64| Dimension {
        value: Some(dimension::Value::DimValue(size)),
        ..Dimension::default()
    };
    ValueInfoProto {
        name: name.into(),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(type_proto::Tensor {
                elem_type: DataType::Float as i32,
                shape: Some(TensorShapeProto {
                    dim: shape.iter().map(dim).collect(),
                }),
            })),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}

pub(crate) fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        name: output.into(),
        input: inputs.iter().map(|&name| name.into()).collect(),
        output: vec![output.into()],
        ..NodeProto::default()
    }
}

pub(crate) fn int(name: &str, i: i64) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        i,
        r#type: AttributeType::Int as i32,
        ..AttributeProto::default()
    }
}

pub(crate) fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: DataType::Float as i32,
        raw_data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ..TensorProto::default()
    }
}

pub(crate) fn ints(name: &str, values: &[i64]) -> TensorProto {
    TensorProto {
        name: name.into(),
        dims: vec![i64::try_from(values.len()).unwrap()],
        data_type: DataType::Int64 as i32,
        int64_data: values.to_vec(),
        ..TensorProto::default()
    }
}

/// The mean colour of the picture is the embedding; the label is the strongest channel.
pub(crate) fn model() -> ModelProto {
    let mut gemm = node("Gemm", &["embedding", "weight"], "logits");
    gemm.attribute.push(int("transB", 1));
    let mut weight = [0.0; 9];
    (weight[0], weight[4], weight[8]) = (4.0, 4.0, 4.0);
    ModelProto {
        ir_version: 8,
        opset_import: vec![OperatorSetIdProto {
            domain: String::new(),
            version: 17,
        }],
        graph: Some(GraphProto {
            name: "colour".into(),
            node: vec![
                node("GlobalAveragePool", &["image"], "pooled"),
                node("Flatten", &["pooled"], "embedding"),
                gemm,
            ],
            initializer: vec![floats("weight", &[3, 3], &weight)],
            input: vec![value("image", &[1, 3, SIDE, SIDE])],
            output: vec![value("logits", &[1, 3]), value("embedding", &[1, 3])],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
}

pub(crate) fn graph(model: &mut ModelProto) -> &mut GraphProto {
    model.graph.as_mut().unwrap()
}

/// A manifest for [`model`], with placeholders for the model's digest and length.
pub(crate) const MANIFEST: &str = r#"
schema = 1
name = "colour"
version = "1.0.0"
task = "classify"
description = "which channel is strongest"

[model]
file = "model.onnx"
sha256 = "@sha256@"
bytes = @bytes@

[input]
name = "image"
shape = [1, 3, 16, 16]
layout = "nchw"
color = "rgb"
resize = "stretch"
filter = "bilinear"
mean = [0.0, 0.0, 0.0]
std = [1.0, 1.0, 1.0]

[output]
scores = "logits"
activation = "softmax"
embedding = "embedding"
embedding_dim = 3
labels = ["red", "green", "blue"]

[thresholds]
min_score = 0.5

[budget]
latency_ms = 10000
memory_mib = 1024

[[golden]]
image = "golden/1.png"
label = "red"
scores = [0.964663, 0.0176685, 0.0176685]
embedding = [1.0, 0.0, 0.0]

[lineage]
seed = 1
holdout = "holdout.txt"
[lineage.scores]
accuracy = 1.0
"#;

/// The manifest's text for a model file.
pub(crate) fn manifest_for(text: &str, bytes: &[u8]) -> String {
    let digest: String = Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    text.replace("@sha256@", &digest)
        .replace("@bytes@", &bytes.len().to_string())
}

/// Writes a bundle with this manifest (placeholders are filled in) and model file.
pub(crate) fn write(dir: &Path, manifest: &str, bytes: &[u8]) {
    fs::create_dir_all(dir.join("golden")).unwrap();
    fs::write(dir.join("model.onnx"), bytes).unwrap();
    fs::write(dir.join("manifest.toml"), manifest_for(manifest, bytes)).unwrap();
    fs::write(dir.join("holdout.txt"), "red/1.png\n./red/2.png\n\n").unwrap();
    RgbImage::from_pixel(20, 10, image::Rgb([255, 0, 0]))
        .save_with_format(dir.join("golden/1.png"), ImageFormat::Png)
        .unwrap();
}

/// A bundle in a fresh folder.
pub(crate) fn bundle_of(
    manifest: &str,
    bytes: &[u8],
) -> (tempfile::TempDir, Result<Bundle, BundleError>) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), manifest, bytes);
    let bundle = Bundle::open(dir.path());
    (dir, bundle)
}

/// The bundle of [`model`], changed by `change`.
pub(crate) fn bundle(change: impl FnOnce(&mut ModelProto)) -> (tempfile::TempDir, Bundle) {
    let mut model = model();
    change(&mut model);
    let (dir, bundle) = bundle_of(MANIFEST, &model.encode_to_vec());
    (dir, bundle.unwrap())
}

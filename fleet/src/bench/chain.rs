//! A model that is too slow for one small board: one layer after the other, with weights by lot. It says nothing about
//! anything; it is there to be computed.

use crate::dice::Dice;

/// Channels of each layer.
const CHANNELS: u64 = 64;
/// Layers after the first.
const LAYERS: usize = 16;
/// Pixels across and down of the input; the layers work on half of it.
pub(super) const SIDE: usize = 96;
/// What goes in and what comes out.
pub(super) const INPUT: &str = "image";
pub(super) const SCORES: &str = "logits";

fn varint(mut value: u64, to: &mut Vec<u8>) {
    while value >= 0x80 {
        to.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

fn number(field: u64, value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint(field << 3, &mut bytes);
    varint(value, &mut bytes);
    bytes
}

fn part(field: u64, inner: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint(field << 3 | 2, &mut bytes);
    varint(inner.len() as u64, &mut bytes);
    bytes.extend(inner);
    bytes
}

/// `ValueInfoProto` of 32-bit floats.
fn value(name: &str, sizes: &[u64]) -> Vec<u8> {
    let shape: Vec<u8> = sizes
        .iter()
        .flat_map(|&size| part(1, &number(1, size)))
        .collect();
    let tensor = [number(1, 1), part(2, &shape)].concat();
    [part(1, name.as_bytes()), part(2, &part(1, &tensor))].concat()
}

/// `AttributeProto` of whole numbers.
fn integers(name: &str, values: &[u64]) -> Vec<u8> {
    let mut bytes = part(1, name.as_bytes());
    for &value in values {
        bytes.extend(number(8, value));
    }
    bytes.extend(number(20, 7));
    part(5, &bytes)
}

/// `NodeProto`.
fn node(op: &str, from: &[&str], to: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for name in from {
        bytes.extend(part(1, name.as_bytes()));
    }
    bytes.extend(part(2, to.as_bytes()));
    bytes.extend(part(4, op.as_bytes()));
    bytes.extend(attributes.concat());
    part(1, &bytes)
}

/// `TensorProto` with numbers from -`most` to `most`, evenly.
fn tensor(name: &str, sizes: &[u64], most: f32, dice: &mut Dice) -> Vec<u8> {
    let count = sizes.iter().product::<u64>();
    let mut raw = Vec::new();
    for _ in 0..count {
        // As many bits as fit into the number.
        let unit = (dice.any() >> 40) as f32 / (1 << 24) as f32;
        raw.extend((most * (2.0 * unit - 1.0)).to_le_bytes());
    }
    let mut bytes: Vec<u8> = sizes.iter().flat_map(|&size| number(1, size)).collect();
    bytes.extend(number(2, 1));
    bytes.extend(part(8, name.as_bytes()));
    bytes.extend(part(9, &raw));
    part(5, &bytes)
}

/// The file, with so many classes.
pub(super) fn file(classes: u64, dice: &mut Dice) -> Vec<u8> {
    let mut graph = part(2, b"chain");
    let side = SIDE as u64;
    graph.extend(part(11, &value(INPUT, &[1, 3, side, side])));
    graph.extend(part(12, &value(SCORES, &[1, classes])));
    let mut last = INPUT.to_owned();
    for layer in 0..=LAYERS {
        let (inputs, stride) = if layer == 0 { (3, 2) } else { (CHANNELS, 1) };
        let [weights, conv, relu] = ["w", "conv", "relu"].map(|what| format!("{what}{layer}"));
        // Keeps the spread of the values from layer to layer (He et al. 2015).
        let most = (6.0 / (9.0 * inputs as f32)).sqrt();
        graph.extend(tensor(&weights, &[CHANNELS, inputs, 3, 3], most, dice));
        let attributes = [
            integers("kernel_shape", &[3, 3]),
            integers("strides", &[stride, stride]),
            integers("pads", &[1, 1, 1, 1]),
        ];
        graph.extend(node("Conv", &[&last, &weights], &conv, &attributes));
        graph.extend(node("Relu", &[&conv], &relu, &[]));
        last = relu;
    }
    graph.extend(tensor("head", &[CHANNELS, classes], 1.0, dice));
    graph.extend(node("GlobalAveragePool", &[&last], "mean", &[]));
    graph.extend(node("Flatten", &["mean"], "flat", &[]));
    graph.extend(node("MatMul", &["flat", "head"], SCORES, &[]));
    // IR version 8 (onnx 1.13), operators of version 13.
    let mut model = number(1, 8);
    model.extend(part(7, &graph));
    model.extend(part(8, &number(2, 13)));
    model
}

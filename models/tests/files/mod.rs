//! Files that look like ONNX to whoever only follows the wire format.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

/// A stored tensor: name, data type of onnx.proto, numbers.
pub type Tensor = (String, u8, Vec<u8>);

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let (mut field, mut length) = (vec![number << 3 | 2], bytes.len());
    while length > 0x7f {
        field.push(length as u8 | 0x80);
        length >>= 7;
    }
    field.push(length as u8);
    field.extend_from_slice(bytes);
    field
}

/// A model of these tensors, by this producer.
pub fn onnx(producer: &str, tensors: &[Tensor]) -> Vec<u8> {
    let mut graph = field(2, b"graph");
    for (name, kind, raw) in tensors {
        let mut tensor = vec![2 << 3, *kind];
        tensor.extend(field(8, name.as_bytes()));
        tensor.extend(field(9, raw));
        graph.extend(field(5, &tensor));
    }
    let mut model = vec![1 << 3, 8];
    model.extend(field(2, producer.as_bytes()));
    model.extend(field(7, &graph));
    model
}

/// Numbers without pattern, always the same.
pub fn noise(seed: u32) -> impl Iterator<Item = u32> {
    let mut state = seed | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    })
}

/// Weights of -0.5 to 0.5.
pub fn weights(seed: u32, count: usize) -> Vec<f32> {
    let unit = |n: u32| (f64::from(n) / f64::from(u32::MAX) - 0.5) as f32;
    noise(seed).take(count).map(unit).collect()
}

/// As a tensor stores them.
pub fn raw(weights: &[f32]) -> Vec<u8> {
    weights.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// The weights after training that moves each by about a thousandth.
pub fn tuned(weights: &[f32], seed: u32) -> Vec<f32> {
    let moves = self::weights(seed, weights.len());
    let pairs = weights.iter().zip(moves);
    pairs.map(|(w, m)| w * (1.0 + m * 3e-3)).collect()
}

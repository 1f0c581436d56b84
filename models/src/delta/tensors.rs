//! Finds where an ONNX file stores the numbers of its tensors, and which of them two files share.

use std::collections::HashMap;

use super::{Span, numbers::Kind};
use crate::wire::{self, skip, varint};

/// Bytes below which a tensor is not worth a span of its own, which takes about eight.
const MIN_TENSOR_BYTES: usize = 32;

/// Numbers of the fields in onnx.proto.
const MODEL_GRAPH: u64 = 7;
const GRAPH_INITIALIZER: u64 = 5;
const TENSOR_DATA_TYPE: u64 = 2;
const TENSOR_FLOAT_DATA: u64 = 4;
const TENSOR_NAME: u64 = 8;
const TENSOR_RAW_DATA: u64 = 9;

/// Numbers of a stored tensor.
struct Stored<'a> {
    name: &'a [u8],
    kind: Kind,
    at: usize,
    length: usize,
}

/// A field of a message.
enum Value<'a> {
    Number(u64),
    /// Bytes, and where in the file they begin.
    Bytes(usize, &'a [u8]),
    Fixed,
}

/// Calls `each` with the number and value of every field of a message that begins at `start`; nothing if
/// it is not one.
fn fields<'a>(
    message: &'a [u8],
    start: usize,
    mut each: impl FnMut(u64, Value<'a>) -> Option<()>,
) -> Option<()> {
    let mut rest = message;
    while !rest.is_empty() {
        let tag = varint(&mut rest)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut rest)?),
            1 => skip(&mut rest, 8).map(|_| Value::Fixed)?,
            2 => {
                let length = varint(&mut rest)?;
                let bytes = skip(&mut rest, length)?;
                let end = message.len() - rest.len();
                Value::Bytes(start + end - bytes.len(), bytes)
            }
            5 => skip(&mut rest, 4).map(|_| Value::Fixed)?,
            _ => return None,
        };
        each(tag >> 3, value)?;
    }
    Some(())
}

/// A tensor whose numbers lie in one piece and are of a kind that differences are made of.
fn tensor(message: &[u8], start: usize) -> Option<Stored<'_>> {
    let (mut name, mut data_type, mut numbers) = (&[][..], 0, None);
    fields(message, start, |field, value| {
        match (field, value) {
            (TENSOR_DATA_TYPE, Value::Number(number)) => data_type = number,
            (TENSOR_NAME, Value::Bytes(_, bytes)) => name = bytes,
            (TENSOR_FLOAT_DATA | TENSOR_RAW_DATA, Value::Bytes(at, bytes)) => {
                numbers = Some((at, bytes.len()));
            }
            _ => {}
        }
        Some(())
    })?;
    let kind = match data_type {
        1 => Kind::Single,
        10 | 16 => Kind::Half,
        2 | 3 => Kind::Byte,
        _ => return None,
    };
    let (at, length) = numbers?;
    (length >= MIN_TENSOR_BYTES && length.is_multiple_of(kind.width())).then_some(Stored {
        name,
        kind,
        at,
        length,
    })
}

/// The tensors stored in an ONNX file, in its order; nothing if it is not one.
fn tensors(file: &[u8]) -> Option<Vec<Stored<'_>>> {
    wire::check(file).ok()?;
    let mut found = Vec::new();
    fields(file, 0, |field, value| {
        let (MODEL_GRAPH, Value::Bytes(start, graph)) = (field, value) else {
            return Some(());
        };
        fields(graph, start, |field, value| {
            if let (GRAPH_INITIALIZER, Value::Bytes(start, message)) = (field, value) {
                found.extend(tensor(message, start));
            }
            Some(())
        })
    })?;
    Some(found)
}

/// The tensors of `new` that `old` has too, by name, kind and length; none if either is not ONNX.
pub(super) fn shared(old: &[u8], new: &[u8]) -> Vec<Span> {
    let (Some(old), Some(new)) = (tensors(old), tensors(new)) else {
        return Vec::new();
    };
    let old: HashMap<&[u8], Stored<'_>> = old.into_iter().map(|t| (t.name, t)).collect();
    let mut end = 0;
    let mut spans = Vec::new();
    for tensor in new {
        let same = |old: &&Stored<'_>| old.kind == tensor.kind && old.length == tensor.length;
        if let Some(old) = old.get(tensor.name).filter(same) {
            spans.push(Span {
                literal: tensor.at - end,
                from: old.at,
                length: tensor.length,
                kind: tensor.kind,
            });
            end = tensor.at + tensor.length;
        }
    }
    spans
}

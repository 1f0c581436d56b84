//! Walks the bytes of an ONNX file without building anything, so that a small file which would unfold
//! into gigabytes of parsed messages, or nest without end, is refused first.

use std::mem::size_of;

use tract_onnx::pb::{
    AttributeProto, FunctionProto, GraphProto, NodeProto, SparseTensorProto,
    StringStringEntryProto, TensorAnnotation, TensorProto, TensorShapeProto, TrainingInfoProto,
    TypeProto, ValueInfoProto, tensor_shape_proto::Dimension, type_proto,
};

/// Fields of all messages together. A model of 20,000 operators has about half as many.
const MAX_FIELDS: usize = 1 << 20;
/// Memory of all parsed messages, without the texts and weights that are in the file as they are. 20,000 operators with
/// six attributes each take half of it.
const MAX_PARSED_BYTES: usize = 256 << 20;
/// Bytes of numbers stored one by one with a variable length, each of which becomes eight bytes.
/// Weights are stored raw; only shapes and indices look like this.
const MAX_VARINT_BYTES: usize = 16 << 20;
/// Messages within messages. A graph with its deepest tensor needs six.
const MAX_DEPTH: usize = 16;

/// The messages of ONNX. Each that contains others is known exactly: a field that the parser takes for a message
/// and this walk does not would not be counted.
#[derive(Clone, Copy)]
enum Message {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    Sparse,
    Value,
    Type,
    TensorType,
    Shape,
    Annotation,
    Function,
    Training,
    /// Contains none.
    Leaf,
}

impl Message {
    /// The message in a field of this one, by the field's number in onnx.proto.
    fn child(self, field: u64) -> Option<Self> {
        match (self, field) {
            (Self::Model, 7) | (Self::Attribute, 6 | 11) | (Self::Training, 1 | 2) => {
                Some(Self::Graph)
            }
            (Self::Model, 20) => Some(Self::Training),
            (Self::Model, 25) => Some(Self::Function),
            (Self::Graph, 1) | (Self::Function, 7) => Some(Self::Node),
            (Self::Node, 5) => Some(Self::Attribute),
            (Self::Graph, 5) | (Self::Attribute, 5 | 10) | (Self::Sparse, 1 | 2) => {
                Some(Self::Tensor)
            }
            (Self::Graph, 15) | (Self::Attribute, 22 | 23) => Some(Self::Sparse),
            (Self::Graph, 11..=13) => Some(Self::Value),
            (Self::Graph, 14) => Some(Self::Annotation),
            (Self::Value, 2) | (Self::Attribute, 14 | 15) => Some(Self::Type),
            // Sequences, maps and the like nest types in types; the engine knows tensors only.
            (Self::Type, 1) => Some(Self::TensorType),
            (Self::TensorType, 2) => Some(Self::Shape),
            (Self::Shape, 1)
            | (Self::Model, 8 | 14)
            | (Self::Tensor, 3 | 13)
            | (Self::Function, 9)
            | (Self::Annotation, 2)
            | (Self::Training, 3 | 4) => Some(Self::Leaf),
            _ => None,
        }
    }

    /// What the parser takes for one of these, even for an empty one.
    fn size(self) -> usize {
        match self {
            // There is one.
            Self::Model => 0,
            Self::Graph => size_of::<GraphProto>(),
            Self::Node => size_of::<NodeProto>(),
            Self::Attribute => size_of::<AttributeProto>(),
            Self::Tensor => size_of::<TensorProto>(),
            Self::Sparse => size_of::<SparseTensorProto>(),
            Self::Value => size_of::<ValueInfoProto>(),
            Self::Type => size_of::<TypeProto>(),
            Self::TensorType => size_of::<type_proto::Tensor>(),
            Self::Shape => size_of::<TensorShapeProto>(),
            Self::Annotation => size_of::<TensorAnnotation>(),
            Self::Function => size_of::<FunctionProto>(),
            Self::Training => size_of::<TrainingInfoProto>(),
            Self::Leaf => size_of::<Dimension>().max(size_of::<StringStringEntryProto>()),
        }
    }

    /// Is this field a packed list of variable-length numbers?
    fn packed(self, field: u64) -> bool {
        matches!(
            (self, field),
            (Self::Attribute, 8) | (Self::Tensor, 1 | 5 | 7 | 11) | (Self::Sparse, 3)
        )
    }
}

#[derive(Default)]
struct Count {
    fields: usize,
    parsed_bytes: usize,
    varint_bytes: usize,
}

pub(crate) fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

pub(crate) fn skip<'a>(bytes: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(usize::try_from(length).ok()?)?;
    *bytes = rest;
    Some(head)
}

fn walk(
    mut bytes: &[u8],
    message: Message,
    depth: usize,
    count: &mut Count,
) -> Result<(), &'static str> {
    const CUT: &str = "not a whole ONNX file: it ends inside a field, or is something else";
    if depth > MAX_DEPTH {
        return Err("messages nested deeper than 16");
    }
    count.parsed_bytes += message.size();
    if count.parsed_bytes > MAX_PARSED_BYTES {
        return Err("its messages would take more than 256 MiB");
    }
    while !bytes.is_empty() {
        count.fields += 1;
        if count.fields > MAX_FIELDS {
            return Err("more than 1048576 fields");
        }
        let tag = varint(&mut bytes).ok_or(CUT)?;
        let field = tag >> 3;
        match tag & 7 {
            0 => {
                varint(&mut bytes).ok_or(CUT)?;
            }
            1 => {
                skip(&mut bytes, 8).ok_or(CUT)?;
            }
            2 => {
                let length = varint(&mut bytes).ok_or(CUT)?;
                let inner = skip(&mut bytes, length).ok_or(CUT)?;
                if message.packed(field) {
                    count.varint_bytes += inner.len();
                    if count.varint_bytes > MAX_VARINT_BYTES {
                        return Err("more than 16 MiB of numbers that are not stored raw");
                    }
                } else if let Some(child) = message.child(field) {
                    walk(inner, child, depth + 1, count)?;
                }
            }
            5 => {
                skip(&mut bytes, 4).ok_or(CUT)?;
            }
            _ => return Err(CUT),
        }
    }
    Ok(())
}

/// Is the file safe to parse?
pub(crate) fn check(bytes: &[u8]) -> Result<(), &'static str> {
    walk(bytes, Message::Model, 0, &mut Count::default())
}

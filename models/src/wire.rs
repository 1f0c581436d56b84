//! Walks the bytes of an ONNX file without building anything, so that a small file which would unfold
//! into gigabytes of parsed messages, or nest without end, is refused first.

/// Fields of all messages together. A model of 20,000 operators has about half as many.
const MAX_FIELDS: usize = 1 << 20;
/// Bytes of numbers stored one by one with a variable length, each of which becomes eight bytes.
/// Weights are stored raw; only shapes and indices look like this.
const MAX_VARINT_BYTES: usize = 16 << 20;
/// Messages within messages. A graph with its deepest tensor needs six.
const MAX_DEPTH: usize = 16;

/// The messages of ONNX that contain others.
#[derive(Clone, Copy)]
enum Message {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    /// Anything else: all its length-delimited fields are taken for messages where that is possible.
    Leaf,
}

impl Message {
    /// The message in a field of this one, by the field's number in onnx.proto.
    fn child(self, field: u64) -> Option<Self> {
        match (self, field) {
            (Self::Model, 7) | (Self::Attribute, 6 | 11) => Some(Self::Graph),
            (Self::Graph, 1) => Some(Self::Node),
            (Self::Node, 5) => Some(Self::Attribute),
            (Self::Graph, 5) | (Self::Attribute, 5 | 10) => Some(Self::Tensor),
            (Self::Model, 8 | 14 | 20 | 25)
            | (Self::Graph, 11..=15)
            | (Self::Attribute, 14 | 15 | 22 | 23)
            | (Self::Tensor, 13) => Some(Self::Leaf),
            _ => None,
        }
    }

    /// Is this field a packed list of variable-length numbers?
    fn packed(self, field: u64) -> bool {
        matches!(
            (self, field),
            (Self::Attribute, 8) | (Self::Tensor, 1 | 5 | 7 | 11)
        )
    }
}

#[derive(Default)]
struct Count {
    fields: usize,
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
                } else if matches!(message, Message::Leaf) {
                    // A text or a message: as a message it costs at most what its fields count.
                    let _ = walk(inner, Message::Leaf, depth + 1, count);
                    if count.fields > MAX_FIELDS {
                        return Err("more than 1048576 fields");
                    }
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

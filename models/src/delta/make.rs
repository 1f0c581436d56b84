//! Makes deltas, on the coordinator: time and memory are several times the model's.

use std::io::Write;

use zstd::{
    stream::write::Encoder,
    zstd_safe::{self, CCtx, CParameter},
};

use super::{
    BLOCK_BYTES, DeltaError, Header, MAX_SPANS_BYTES, Span, WINDOW_LOG, numbers::difference,
    tensors::shared,
};
use crate::{MAX_MODEL_BYTES, digest_of};

/// Seven megabytes a second. Against level 3 it takes 15 % off the delta of 16-bit weights; level 19 would
/// take twice as long for nothing on large models.
const DIFFERENCES_LEVEL: i32 = 16;
/// Bytes from which a plane gets a block of its own, with a table that fits it; a table takes about 50.
const OWN_TABLE_BYTES: usize = 4 << 10;
/// Literals are few, or there is nothing better for the whole file.
const LITERALS_LEVEL: i32 = 9;

/// The delta that makes `new` from `old`. Any two files will do; small deltas come from ONNX files that
/// have tensors in common.
///
/// # Errors
/// When a file is larger than [`MAX_MODEL_BYTES`], or zstd runs out of memory.
pub fn make(old: &[u8], new: &[u8]) -> Result<Vec<u8>, DeltaError> {
    for (what, file) in [("an old file", old), ("a new file", new)] {
        let bytes = file.len() as u64;
        if bytes > MAX_MODEL_BYTES {
            return Err(DeltaError::TooLarge { what, bytes });
        }
    }
    let whole = encode(old, new, &[])?;
    let spans = shared(old, new);
    if spans.is_empty() {
        return Ok(whole);
    }
    let tensors = encode(old, new, &spans)?;
    // To apply the whole takes more memory: it has to be worth it.
    let is_worth_it = whole.len() < tensors.len() / 10 * 9;
    Ok(if is_worth_it { whole } else { tensors })
}

fn encode(old: &[u8], new: &[u8], spans: &[Span]) -> Result<Vec<u8>, DeltaError> {
    let failed = |error: std::io::Error| DeltaError::Compress(error.to_string());
    let (mut list, mut literals) = (Vec::new(), Vec::new());
    let mut differences = Encoder::new(Vec::new(), DIFFERENCES_LEVEL).map_err(failed)?;
    differences.window_log(WINDOW_LOG).map_err(failed)?;
    let mut planes = vec![0; BLOCK_BYTES];
    let mut rest = new;
    for span in spans {
        let (literal, from_here) = rest.split_at(span.literal);
        let (tensor, after) = from_here.split_at(span.length);
        let old = &old[span.from..span.from + span.length];
        literals.extend_from_slice(literal);
        for (old, new) in old.chunks(BLOCK_BYTES).zip(tensor.chunks(BLOCK_BYTES)) {
            let planes = &mut planes[..new.len()];
            difference(span.kind, old, new, planes);
            for plane in planes.chunks(new.len() / span.kind.width()) {
                differences.write_all(plane).map_err(failed)?;
                if plane.len() >= OWN_TABLE_BYTES {
                    differences.flush().map_err(failed)?;
                }
            }
        }
        rest = after;
        let width = span.kind.width();
        for number in [span.literal, span.from, span.length, width] {
            put_varint(&mut list, number);
        }
        if list.len() > MAX_SPANS_BYTES {
            return encode(old, new, &[]);
        }
    }
    literals.extend_from_slice(rest);
    // Who applies it reads the old file as a stream wherever there are spans.
    let prefix = if spans.is_empty() { old } else { &[] };
    let literals = pack_literals(prefix, &literals)?;
    let part = |what, length: usize| {
        let bytes = length as u64;
        u32::try_from(length).map_err(|_| DeltaError::TooLarge { what, bytes })
    };
    let header = Header {
        old: digest_of(old),
        new: digest_of(new),
        length: part("a new file", new.len())?,
        spans: part("a list of spans", list.len())?,
        literals: part("a part of literals", literals.len())?,
    };
    let mut delta = header.to_bytes().to_vec();
    for part in [list, literals, differences.finish().map_err(failed)?] {
        delta.extend_from_slice(&part);
    }
    Ok(delta)
}

fn put_varint(list: &mut Vec<u8>, mut number: usize) {
    while number > 0x7f {
        list.push(number as u8 | 0x80);
        number >>= 7;
    }
    list.push(number as u8);
}

/// One frame, in which all of the prefix can be referred to.
fn pack_literals(prefix: &[u8], literals: &[u8]) -> Result<Vec<u8>, DeltaError> {
    let failed = |code| DeltaError::Compress(zstd_safe::get_error_name(code).to_owned());
    let mut packed = Vec::with_capacity(zstd_safe::compress_bound(literals.len()));
    let mut context = CCtx::try_create().ok_or(DeltaError::Memory(literals.len()))?;
    // At least the smallest window of zstd; at most 2^29, for two files of 256 MiB.
    let reach = (prefix.len() + literals.len())
        .max(1 << 10)
        .next_power_of_two();
    for parameter in [
        CParameter::CompressionLevel(LITERALS_LEVEL),
        CParameter::WindowLog(reach.trailing_zeros()),
        CParameter::EnableLongDistanceMatching(true),
    ] {
        context.set_parameter(parameter).map_err(failed)?;
    }
    context.ref_prefix(prefix).map_err(failed)?;
    context.compress2(&mut packed, literals).map_err(failed)?;
    Ok(packed)
}

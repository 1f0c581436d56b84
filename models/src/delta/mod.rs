//! The difference between two versions of a model file, small enough for a slow link and applied in
//! little memory.
//!
//! A delta says how the new file is put together from *literals*, bytes that it carries, and *spans*,
//! tensors of the old file with a difference added to each number (see `numbers.rs`). It knows nothing of
//! ONNX: only [`make()`] does, so whoever applies one parses four small lists. Where nothing is shared,
//! or it does not help, everything is literal; those are compressed with the old file as what came
//! before, so pieces that merely moved cost little.
//!
//! ```text
//! magic "LWDELTA", version 1                         8 bytes
//! SHA-256 of the old file, of the new file          64
//! length of the new file, of the span list,
//!     of the compressed literals                    12      three u32, little-endian
//! spans: literal, from, length, width                       varints; the list ends with its last span
//! literals: one zstd frame, prefix = the old file
//! differences: one zstd frame, window <= 64 KiB             up to the end of the delta
//! ```
//!
//! A span stands for `literal` bytes from the literals, then `length` bytes made from those of the old
//! file at `from`, in numbers of `width` bytes. What is left of the literals follows the last span. The
//! differences of a span are cut into blocks of 128 KiB, the last one shorter, each stored in
//! planes.
//!
//! # Memory
//!
//! [`apply()`] allocates the new file, the span list (ten bytes a tensor, at most 1 MiB) and less than
//! 512 KiB; with the old file, which it only reads, that is twice the model. Literals are unpacked at the
//! end of the new file and moved forward as it grows; compressed, they lie where tensors will be. Only
//! where they are more than the tensors (nothing in common, no ONNX) they take their compressed length
//! besides, at most the new file's; the delta is nearly as long then, and better left for the file's
//! chunks. The delta is read as a stream. No damaged or hostile one takes more than this: all lengths in it
//! are checked against the length that the caller wants.

mod make;
mod numbers;
mod tensors;

use std::io::{self, BufRead, Read};

use zstd::{stream::read::Decoder, zstd_safe};

use self::numbers::{Kind, restore};
use crate::{Digest, MAX_MODEL_BYTES, digest_of, wire};

pub use self::make::make;

/// What a delta begins with; the last byte is the version of the format.
const MAGIC: [u8; 8] = *b"LWDELTA\x01";
/// Magic, two digests, three lengths.
const HEADER_BYTES: usize = 8 + 2 * 32 + 3 * 4;
/// Held while applying. A plane of f32 is then 32 KiB, for which a table costs a five-hundredth.
const BLOCK_BYTES: usize = 128 << 10;
/// Differences hardly repeat: a window of 64 KiB loses a five-hundredth and is most of what unpacking holds.
const WINDOW_LOG: u32 = 16;
/// Bytes of the span list. A model of 20,000 tensors takes about 200,000.
const MAX_SPANS_BYTES: usize = 1 << 20;

/// The file that is to come out, as its signed release describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Bytes of the file.
    pub length: u64,
    /// Digest of the file.
    pub sha256: Digest,
}

/// Why a delta cannot be made or applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeltaError {
    /// Longer than [`MAX_MODEL_BYTES`].
    #[error("{what} of {bytes} bytes is larger than 256 MiB")]
    TooLarge {
        /// Which file.
        what: &'static str,
        /// Its length.
        bytes: u64,
    },
    /// The delta cannot be read.
    #[error("cannot read the delta: {0}")]
    Read(#[source] io::Error),
    /// Something else, or a version of the format that is not known.
    #[error("not a delta of a version that is known")]
    Unknown,
    /// It is for another old file.
    #[error("the delta applies to the file {needs}, not to {found}")]
    OtherOld {
        /// Digest of the file it is for.
        needs: Digest,
        /// Digest of the file at hand.
        found: Digest,
    },
    /// It makes another new file.
    #[error("the delta makes {makes} of {length} bytes, wanted is {} of {}", wanted.sha256, wanted.length)]
    OtherNew {
        /// Digest of what it makes.
        makes: Digest,
        /// Length of what it makes.
        length: u64,
        /// What was asked for.
        wanted: Wanted,
    },
    /// Not as the format says.
    #[error("the delta is damaged: {0}")]
    Damaged(&'static str),
    /// What came out is not the file that was asked for.
    #[error("the delta is damaged: it made {found}, wanted is {wanted}")]
    Wrong {
        /// Digest of what it made.
        found: Digest,
        /// Digest of what was asked for.
        wanted: Digest,
    },
    /// No memory for the new file.
    #[error("no memory for {0} bytes of the new file")]
    Memory(usize),
    /// The compressor failed.
    #[error("cannot compress the delta: {0}")]
    Compress(String),
}

/// Literal bytes, then a tensor made from one of the old file.
#[derive(Clone, Copy, Debug)]
struct Span {
    literal: usize,
    from: usize,
    length: usize,
    kind: Kind,
}

/// Takes the spans off a list one by one, each checked against the old file.
#[derive(Clone)]
struct Spans<'a> {
    list: &'a [u8],
    old: usize,
}

impl Spans<'_> {
    fn span(&mut self) -> Option<Span> {
        let mut number = || usize::try_from(wire::varint(&mut self.list)?).ok();
        let (literal, from, length) = (number()?, number()?, number()?);
        let kind = Kind::of_width(wire::varint(&mut self.list)?)?;
        let fits = from.checked_add(length)? <= self.old;
        (fits && length > 0 && length.is_multiple_of(kind.width())).then_some(Span {
            literal,
            from,
            length,
            kind,
        })
    }
}

impl Iterator for Spans<'_> {
    type Item = Result<Span, DeltaError>;

    fn next(&mut self) -> Option<Self::Item> {
        const WRONG: DeltaError = DeltaError::Damaged("a span that is cut or outside of the file");
        (!self.list.is_empty()).then(|| self.span().ok_or(WRONG))
    }
}

fn broken(error: io::Error) -> DeltaError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => DeltaError::Damaged("it ends too early"),
        _ => DeltaError::Read(error),
    }
}

fn zeros(length: usize) -> Result<Vec<u8>, DeltaError> {
    let mut bytes = Vec::new();
    let room = bytes.try_reserve_exact(length);
    room.map_err(|_| DeltaError::Memory(length))?;
    bytes.resize(length, 0);
    Ok(bytes)
}

/// The fixed part of a delta.
struct Header {
    old: Digest,
    new: Digest,
    length: u32,
    spans: u32,
    literals: u32,
}

impl Header {
    fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let lengths = [self.length, self.spans, self.literals].map(u32::to_le_bytes);
        let parts = [&MAGIC, &self.old.0[..], &self.new.0, lengths.as_flattened()];
        let mut parts = parts.into_iter().flatten();
        std::array::from_fn(|_| parts.next().copied().unwrap_or_default())
    }

    /// Is it for these files, and within all limits?
    fn check(&self, old: &[u8], wanted: &Wanted) -> Result<(), DeltaError> {
        if self.new != wanted.sha256 || u64::from(self.length) != wanted.length {
            return Err(DeltaError::OtherNew {
                makes: self.new,
                length: self.length.into(),
                wanted: *wanted,
            });
        }
        if wanted.length > MAX_MODEL_BYTES {
            return Err(DeltaError::TooLarge {
                what: "a new file",
                bytes: wanted.length,
            });
        }
        if self.spans as usize > MAX_SPANS_BYTES {
            return Err(DeltaError::Damaged("a list of spans beyond 1 MiB"));
        }
        let found = digest_of(old);
        if self.old != found {
            return Err(DeltaError::OtherOld {
                needs: self.old,
                found,
            });
        }
        Ok(())
    }

    fn read(delta: &mut impl Read) -> Result<Self, DeltaError> {
        fn take<const N: usize>(delta: &mut impl Read) -> Result<[u8; N], DeltaError> {
            let mut bytes = [0; N];
            delta.read_exact(&mut bytes).map_err(broken)?;
            Ok(bytes)
        }
        if take(delta)? != MAGIC {
            return Err(DeltaError::Unknown);
        }
        Ok(Self {
            old: Digest(take(delta)?),
            new: Digest(take(delta)?),
            length: u32::from_le_bytes(take(delta)?),
            spans: u32::from_le_bytes(take(delta)?),
            literals: u32::from_le_bytes(take(delta)?),
        })
    }
}

/// Makes the new file from the old one and a delta. What it returns has the length and the digest that
/// were asked for; see the module about memory.
///
/// # Errors
/// When the delta is for other files, is damaged or cannot be read; see [`DeltaError`].
pub fn apply(old: &[u8], mut delta: impl BufRead, wanted: &Wanted) -> Result<Vec<u8>, DeltaError> {
    let header = Header::read(&mut delta)?;
    header.check(old, wanted)?;
    let mut list = zeros(header.spans as usize)?;
    delta.read_exact(&mut list).map_err(broken)?;
    let spans = Spans {
        list: &list,
        old: old.len(),
    };
    let length = header.length as usize;
    let tensors = tensor_bytes(spans.clone(), length)?;

    let mut new = zeros(length)?;
    let packed = header.literals as usize;
    unpack_literals(&mut new, tensors, old, &mut delta, packed)?;
    unpack_tensors(&mut new, tensors, old, delta, spans)?;

    let found = digest_of(&new);
    if found == wanted.sha256 {
        Ok(new)
    } else {
        Err(DeltaError::Wrong {
            found,
            wanted: wanted.sha256,
        })
    }
}

/// Bytes that the spans make; the literals before them must fit besides.
fn tensor_bytes(spans: Spans<'_>, length: usize) -> Result<usize, DeltaError> {
    let (mut literals, mut tensors) = (0usize, 0usize);
    for span in spans {
        let span = span?;
        literals = literals.saturating_add(span.literal);
        tensors = tensors.saturating_add(span.length);
    }
    if literals.saturating_add(tensors) > length {
        return Err(DeltaError::Damaged("spans beyond the end of the new file"));
    }
    Ok(tensors)
}

/// Makes the tensors, and moves the literals before each to their place. Literals wait from `waiting` on,
/// never before `end`: the gap is what spans still have to fill.
fn unpack_tensors(
    new: &mut [u8],
    mut waiting: usize,
    old: &[u8],
    delta: impl BufRead,
    spans: Spans<'_>,
) -> Result<(), DeltaError> {
    let mut decoder = Decoder::with_buffer(delta).map_err(broken)?.single_frame();
    decoder.window_log_max(WINDOW_LOG).map_err(broken)?;
    let mut planes = zeros(BLOCK_BYTES)?;
    let mut end = 0;
    for span in spans {
        let span = span?;
        new.copy_within(waiting..waiting + span.literal, end);
        (end, waiting) = (end + span.literal, waiting + span.literal);
        let old = &old[span.from..span.from + span.length];
        let new = &mut new[end..end + span.length];
        for (old, new) in old.chunks(BLOCK_BYTES).zip(new.chunks_mut(BLOCK_BYTES)) {
            let planes = &mut planes[..new.len()];
            decoder.read_exact(planes).map_err(unpacked)?;
            restore(span.kind, old, planes, new);
        }
        end += span.length;
    }
    let surplus = decoder.read(&mut [0]).map_err(unpacked)?;
    let after = decoder.finish().fill_buf().map_err(broken)?.len();
    if surplus + after > 0 {
        return Err(DeltaError::Damaged("something follows its end"));
    }
    Ok(())
}

/// What zstd reports as `Other` is about the bytes, not about reading them.
fn unpacked(error: io::Error) -> DeltaError {
    match error.kind() {
        io::ErrorKind::Other => DeltaError::Damaged("differences that zstd cannot unpack"),
        _ => broken(error),
    }
}

/// Unpacks the literals to the end of the new file, behind the room for the tensors.
fn unpack_literals(
    new: &mut [u8],
    room: usize,
    old: &[u8],
    delta: &mut impl Read,
    packed: usize,
) -> Result<(), DeltaError> {
    let (room, literals) = new.split_at_mut(room);
    if packed > zstd_safe::compress_bound(literals.len()) {
        return Err(DeltaError::Damaged(
            "literals longer than any frame of them",
        ));
    }
    let mut besides;
    let packed = match room.get_mut(..packed) {
        Some(room) => room,
        None => {
            besides = zeros(packed)?;
            &mut besides[..]
        }
    };
    delta.read_exact(packed).map_err(broken)?;
    let unpacked = zstd_safe::DCtx::try_create().and_then(|mut context| {
        // One frame and nothing else; unpacked in place, so its window takes no memory.
        let whole = zstd_safe::find_frame_compressed_size(packed) == Ok(packed.len());
        context.ref_prefix(old).ok().filter(|_| whole)?;
        context.decompress(literals, packed).ok()
    });
    if unpacked == Some(literals.len()) {
        Ok(())
    } else {
        Err(DeltaError::Damaged("literals that zstd cannot unpack"))
    }
}

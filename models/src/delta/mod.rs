//! The difference between two versions of a model file, small enough for a slow link and applied in
//! little memory.
//!
//! A delta says how the new file is put together from *literals*, bytes that it carries, and *spans*,
//! tensors of the old file with a difference added to each number (see `numbers.rs`). It knows nothing of
//! ONNX: only [`make()`] does, so whoever applies one parses four small lists. Where nothing is shared,
//! or it does not help, everything is literal; those are then compressed with the old file as what came
//! before, so pieces that merely moved cost little.
//!
//! ```text
//! magic "LWDELTA", version 2                         8 bytes
//! SHA-256 of the old file, of the new file          64
//! length of the new file, of the span list,
//!     of the compressed literals                    12      three u32, little-endian
//! spans: literal, from, length, width                       varints; the list ends with its last span
//! literals: one zstd frame; without spans, prefix = the old file
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
//! [`apply()`] reads the old file and the delta and writes the new file as streams. It holds the span list
//! (ten bytes a tensor, at most 1 MiB), the literals, unpacked and until then packed, and less than 768 KiB,
//! whatever the size of the model. Only a delta without spans (nothing in common, no ONNX) takes the old file,
//! the new one and the packed one at once; it is nearly as long as the new file, and better left for the file's
//! chunks. No damaged or hostile one takes more than this: all lengths in it are checked against the length that
//! the caller wants.

mod make;
mod numbers;
mod tensors;

use std::io::{self, BufRead, Read, Seek, SeekFrom, Write};

use sha2::{Digest as _, Sha256};
use zstd::{stream::read::Decoder, zstd_safe};

use self::numbers::{Kind, restore};
use crate::{Digest, MAX_MODEL_BYTES, wire};

pub use self::make::make;

/// What a delta begins with; the last byte is the version of the format.
const MAGIC: [u8; 8] = *b"LWDELTA\x02";
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
    /// The old file cannot be read.
    #[error("cannot read the old file: {0}")]
    ReadOld(#[source] io::Error),
    /// The new file cannot be written.
    #[error("cannot write the new file: {0}")]
    Write(#[source] io::Error),
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
    /// No memory for what a delta carries.
    #[error("no memory for {0} bytes of a file")]
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
    old: u64,
}

impl Spans<'_> {
    fn span(&mut self) -> Option<Span> {
        let mut number = || usize::try_from(wire::varint(&mut self.list)?).ok();
        let (literal, from, length) = (number()?, number()?, number()?);
        let kind = Kind::of_width(wire::varint(&mut self.list)?)?;
        let fits = from.checked_add(length)? as u64 <= self.old;
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
    fn check(&self, wanted: &Wanted) -> Result<(), DeltaError> {
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

/// Makes the new file from the old one and a delta. What it has written when it returns has the length and the
/// digest that were asked for; after an error it is of no use. See the module about memory.
///
/// # Errors
/// When the delta is for other files, is damaged, or something cannot be read or written; see [`DeltaError`].
pub fn apply(
    old: &mut (impl Read + Seek),
    mut delta: impl BufRead,
    wanted: &Wanted,
    new: &mut impl Write,
) -> Result<(), DeltaError> {
    let header = Header::read(&mut delta)?;
    header.check(wanted)?;
    let (found, old_length) = digest_from(old)?;
    if found != header.old {
        let needs = header.old;
        return Err(DeltaError::OtherOld { needs, found });
    }
    let mut list = zeros(header.spans as usize)?;
    delta.read_exact(&mut list).map_err(broken)?;
    let spans = Spans {
        list: &list,
        old: old_length,
    };
    let literals = header.length as usize - tensor_bytes(spans.clone(), header.length as usize)?;
    let prefix = if list.is_empty() {
        whole(old, old_length)?
    } else {
        Vec::new()
    };
    let literals = unpack_literals(&mut delta, header.literals as usize, literals, &prefix)?;
    drop(prefix);

    let mut new = Digesting::new(new);
    write_new(old, delta, spans, &literals, &mut new)?;
    let found = new.digest();
    if found == wanted.sha256 {
        Ok(())
    } else {
        let wanted = wanted.sha256;
        Err(DeltaError::Wrong { found, wanted })
    }
}

/// The digest and the length of a file, from its beginning.
fn digest_from(file: &mut (impl Read + Seek)) -> Result<(Digest, u64), DeltaError> {
    let mut sum = Digesting::new(io::sink());
    let read = file.rewind().and_then(|()| io::copy(file, &mut sum));
    let length = read.map_err(DeltaError::ReadOld)?;
    Ok((sum.digest(), length))
}

/// A whole file of that length, in memory.
fn whole(file: &mut (impl Read + Seek), length: u64) -> Result<Vec<u8>, DeltaError> {
    let too_large = || DeltaError::TooLarge {
        what: "an old file",
        bytes: length,
    };
    let small = usize::try_from(length).ok();
    let small = small.filter(|_| length <= MAX_MODEL_BYTES);
    let mut bytes = zeros(small.ok_or_else(too_large)?)?;
    let read = file.rewind().and_then(|()| file.read_exact(&mut bytes));
    read.map_err(DeltaError::ReadOld)?;
    Ok(bytes)
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

/// The literals, of which there are `length` bytes.
fn unpack_literals(
    delta: &mut impl Read,
    packed: usize,
    length: usize,
    prefix: &[u8],
) -> Result<Vec<u8>, DeltaError> {
    const WRONG: DeltaError = DeltaError::Damaged("literals that zstd cannot unpack");
    if packed > zstd_safe::compress_bound(length) {
        return Err(DeltaError::Damaged(
            "literals longer than any frame of them",
        ));
    }
    let mut frame = zeros(packed)?;
    delta.read_exact(&mut frame).map_err(broken)?;
    // One frame and nothing else; unpacked in one go, so its window takes no memory.
    if zstd_safe::find_frame_compressed_size(&frame) != Ok(packed) {
        return Err(WRONG);
    }
    let mut literals = zeros(length)?;
    let mut context = zstd_safe::DCtx::try_create().ok_or(DeltaError::Memory(length))?;
    context.ref_prefix(prefix).map_err(|_| WRONG)?;
    match context.decompress(&mut literals[..], &frame) {
        Ok(unpacked) if unpacked == length => Ok(literals),
        _ => Err(WRONG),
    }
}

/// Writes the literals and the tensors in turn.
fn write_new(
    old: &mut (impl Read + Seek),
    delta: impl BufRead,
    spans: Spans<'_>,
    mut literals: &[u8],
    new: &mut impl Write,
) -> Result<(), DeltaError> {
    let mut decoder = Decoder::with_buffer(delta).map_err(broken)?.single_frame();
    decoder.window_log_max(WINDOW_LOG).map_err(broken)?;
    let (mut planes, mut was, mut is) = (
        zeros(BLOCK_BYTES)?,
        zeros(BLOCK_BYTES)?,
        zeros(BLOCK_BYTES)?,
    );
    for span in spans {
        let span = span?;
        // Their sum was checked.
        let (before, after) = literals
            .split_at_checked(span.literal)
            .ok_or(DeltaError::Damaged("literals that end too early"))?;
        new.write_all(before).map_err(DeltaError::Write)?;
        literals = after;
        old.seek(SeekFrom::Start(span.from as u64))
            .map_err(DeltaError::ReadOld)?;
        let mut left = span.length;
        while left > 0 {
            let length = left.min(BLOCK_BYTES);
            let (planes, was, is) = (&mut planes[..length], &mut was[..length], &mut is[..length]);
            decoder.read_exact(planes).map_err(unpacked)?;
            old.read_exact(was).map_err(DeltaError::ReadOld)?;
            restore(span.kind, was, planes, is);
            new.write_all(is).map_err(DeltaError::Write)?;
            left -= length;
        }
    }
    new.write_all(literals).map_err(DeltaError::Write)?;
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

/// Passes bytes on and takes their digest.
struct Digesting<W> {
    hash: Sha256,
    to: W,
}

impl<W: Write> Digesting<W> {
    fn new(to: W) -> Self {
        let hash = Sha256::new();
        Self { hash, to }
    }

    fn digest(self) -> Digest {
        Digest(self.hash.finalize().into())
    }
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

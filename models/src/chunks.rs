//! A file in chunks that are named by their digest: fetched in any order and from anybody, resumed after
//! a restart, checked one by one.
//!
//! The size is fixed. Cutting by content was measured on the bundled models and their retrained versions
//! and finds less to keep than a delta does in every case; see `docs/decisions`.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use crate::{Digest, digest_of};

/// Bytes of every chunk but a file's last: the size at which neighbours were measured to serve fastest.
pub const CHUNK_BYTES: usize = 256 << 10;

/// One chunk of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Digest of its bytes, and its name.
    pub sha256: Digest,
    /// How many bytes it has.
    pub length: usize,
}

/// Why a chunk is refused, or a file cannot be put together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChunkError {
    /// No file that is wanted has it.
    #[error("chunk {0} is not wanted")]
    NotWanted(Digest),
    /// Not as long as it should be.
    #[error("chunk {sha256} has {found} bytes, not {expected}")]
    Length {
        /// The chunk.
        sha256: Digest,
        /// How many came.
        found: usize,
        /// How many it has.
        expected: usize,
    },
    /// Other bytes than its name says.
    #[error("chunk {expected} has the digest {found}")]
    Digest {
        /// The chunk.
        expected: Digest,
        /// What came.
        found: Digest,
    },
    /// A chunk's file cannot be read.
    #[error("cannot read the chunk {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write the file of the chunks: {0}")]
    Write(#[source] io::Error),
}

/// The chunks of a file.
#[must_use]
pub fn split(bytes: &[u8]) -> Vec<Chunk> {
    let chunk = |bytes: &[u8]| Chunk {
        sha256: digest_of(bytes),
        length: bytes.len(),
    };
    bytes.chunks(CHUNK_BYTES).map(chunk).collect()
}

/// The chunks of a file of which the length and the digests are known; nothing if these do not fit.
#[must_use]
pub fn listed(length: u64, digests: &[Digest]) -> Option<Vec<Chunk>> {
    let size = CHUNK_BYTES as u64;
    if digests.len() as u64 != length.div_ceil(size) {
        return None;
    }
    let chunk = |(at, &sha256): (u64, &Digest)| Chunk {
        sha256,
        length: (length - at * size).min(size) as usize,
    };
    Some((0..).zip(digests).map(chunk).collect())
}

/// Which chunks of a file are here. It holds none of them: the caller keeps each one that is accepted in a
/// folder, in a file named by its digest.
#[derive(Clone, Debug)]
pub struct Assembly {
    chunks: Vec<Chunk>,
    here: BTreeMap<Digest, bool>,
}

impl Assembly {
    /// None of these chunks is here yet.
    #[must_use]
    pub fn new(chunks: Vec<Chunk>) -> Self {
        let here = chunks.iter().map(|chunk| (chunk.sha256, false)).collect();
        Self { chunks, here }
    }

    /// What is still to be fetched, each chunk once, in the order of the file.
    pub fn missing(&self) -> impl Iterator<Item = Chunk> {
        let mut left: BTreeMap<_, _> = self.here.iter().filter(|(_, here)| !**here).collect();
        let first = move |chunk: &&Chunk| left.remove(&chunk.sha256).is_some();
        self.chunks.iter().filter(first).copied()
    }

    /// Are all chunks here?
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.here.values().all(|here| *here)
    }

    /// Checks the bytes that came for a chunk and counts it as here.
    ///
    /// # Errors
    /// When no such chunk is wanted, or the bytes are not it; nothing has changed then.
    pub fn accept(&mut self, sha256: Digest, bytes: &[u8]) -> Result<(), ChunkError> {
        let mut chunks = self.chunks.iter();
        let chunk = chunks.find(|chunk| chunk.sha256 == sha256);
        check(*chunk.ok_or(ChunkError::NotWanted(sha256))?, bytes)?;
        self.here.insert(sha256, true);
        Ok(())
    }

    /// Takes up what lies in a folder from before a restart. A file that is not what its name says, such
    /// as one cut off by the loss of power, stays missing and is written anew.
    ///
    /// # Errors
    /// When a file that is there cannot be read.
    pub fn resume(&mut self, folder: &Path) -> Result<(), ChunkError> {
        let missing: Vec<Chunk> = self.missing().collect();
        for chunk in missing {
            match read(folder, chunk) {
                Ok(bytes) => {
                    // Refused is the same as missing.
                    let _ = self.accept(chunk.sha256, &bytes);
                }
                Err(ChunkError::Read { source, .. })
                    if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes the file from the chunks in a folder, each checked again as it is read.
    ///
    /// # Errors
    /// When a chunk is missing, cannot be read or is not what its name says, or when the file cannot be
    /// written.
    pub fn write(&self, folder: &Path, to: &mut impl Write) -> Result<(), ChunkError> {
        for &chunk in &self.chunks {
            let bytes = read(folder, chunk)?;
            check(chunk, &bytes)?;
            to.write_all(&bytes).map_err(ChunkError::Write)?;
        }
        Ok(())
    }
}

/// Are these the bytes of the chunk?
fn check(chunk: Chunk, bytes: &[u8]) -> Result<(), ChunkError> {
    if bytes.len() != chunk.length {
        return Err(ChunkError::Length {
            sha256: chunk.sha256,
            found: bytes.len(),
            expected: chunk.length,
        });
    }
    let found = digest_of(bytes);
    if found == chunk.sha256 {
        Ok(())
    } else {
        Err(ChunkError::Digest {
            expected: chunk.sha256,
            found,
        })
    }
}

/// The chunk's file, of which no more is read than shows that it is too long.
fn read(folder: &Path, chunk: Chunk) -> Result<Vec<u8>, ChunkError> {
    let path = folder.join(chunk.sha256.to_string());
    let limit = chunk.length as u64 + 1;
    let mut bytes = Vec::new();
    match File::open(&path).and_then(|file| file.take(limit).read_to_end(&mut bytes)) {
        Ok(_) => Ok(bytes),
        Err(source) => Err(ChunkError::Read { path, source }),
    }
}

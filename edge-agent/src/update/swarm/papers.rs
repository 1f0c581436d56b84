//! What proves that a release is the right one: the registry's files and the document, as they were fetched and verified.
//!
//! They lie in one file, to be handed to a neighbour that does not reach the coordinator. It verifies all of it as if it came
//! from there: signatures, versions, and that nothing has expired.
//!
//! ```text
//! digest of the release document (32), number of files (u16), and for each: length of its path (u16), path,
//! length (u32), bytes
//! ```

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_core::Digest;

use crate::update::{
    disk::{Disk, replace},
    registry::{MAX_FILE_BYTES, Source, SourceError},
};

const FILE: &str = "papers";
/// The largest list of targets, and as much for all the rest.
pub(super) const MAX_BYTES: usize = 2 * MAX_FILE_BYTES as usize;
/// Timestamp, snapshot, targets, document, and the roots that were new.
const MAX_FILES: usize = 80;
/// `metadata/12.targets.json`, `targets/models/…`: a digest and two names.
const MAX_PATH: usize = 512;

/// Files by their path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::update) struct Papers(pub(super) BTreeMap<String, Vec<u8>>);

pub(super) fn path(disk: &Disk) -> PathBuf {
    disk.registry().join(FILE)
}

impl Papers {
    /// Keeps them on the disk, in place of those of another release.
    pub(super) fn keep(&self, disk: &Disk, release: Digest) -> Result<(), String> {
        let bytes = self.to_bytes(release).ok_or("they are too large")?;
        replace(&disk.registry(), FILE, &bytes).map_err(|error| error.to_string())
    }

    fn to_bytes(&self, release: Digest) -> Option<Vec<u8>> {
        let mut bytes = release.0.to_vec();
        bytes.extend_from_slice(&u16::try_from(self.0.len()).ok()?.to_be_bytes());
        for (path, file) in &self.0 {
            bytes.extend_from_slice(&u16::try_from(path.len()).ok()?.to_be_bytes());
            bytes.extend_from_slice(path.as_bytes());
            bytes.extend_from_slice(&u32::try_from(file.len()).ok()?.to_be_bytes());
            bytes.extend_from_slice(file);
        }
        (bytes.len() <= MAX_BYTES && self.0.len() <= MAX_FILES).then_some(bytes)
    }

    /// Reads those of a release; nothing if they are of another one, or no papers.
    pub(super) fn parse(release: Digest, bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(&release.0)?;
        let (count, mut rest) = rest.split_first_chunk()?;
        let count = usize::from(u16::from_be_bytes(*count));
        let mut files = BTreeMap::new();
        for _ in 0..Some(count).filter(|count| *count <= MAX_FILES)? {
            let (length, more) = rest.split_first_chunk()?;
            let length = usize::from(u16::from_be_bytes(*length));
            let (path, more) = more
                .split_at_checked(length)
                .filter(|_| length <= MAX_PATH)?;
            let (length, more) = more.split_first_chunk()?;
            let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
            let (file, more) = more.split_at_checked(length)?;
            files.insert(String::from_utf8(path.to_vec()).ok()?, file.to_vec());
            rest = more;
        }
        rest.is_empty().then_some(Self(files))
    }
}

/// A neighbour's papers in place of the coordinator's registry.
impl Source for Papers {
    fn get(&self, path: &str) -> Result<Vec<u8>, SourceError> {
        self.0.get(path).cloned().ok_or(SourceError::Missing)
    }
}

/// The coordinator's registry, and a copy of what came from there.
#[derive(Debug)]
pub(in crate::update) struct Copied<S> {
    from: S,
    copy: Copies,
}

/// What came.
#[derive(Clone, Debug, Default)]
pub(in crate::update) struct Copies(Arc<Mutex<Papers>>);

impl Copies {
    fn lock(&self) -> MutexGuard<'_, Papers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it.
    pub(in crate::update) fn take(&self) -> Papers {
        std::mem::take(&mut *self.lock())
    }
}

impl<S: Source> Copied<S> {
    pub(in crate::update) fn new(from: S) -> (Self, Copies) {
        let copy = Copies::default();
        let copied = Self {
            from,
            copy: copy.clone(),
        };
        (copied, copy)
    }
}

impl<S: Source> Source for Copied<S> {
    fn get(&self, path: &str) -> Result<Vec<u8>, SourceError> {
        let bytes = self.from.get(path)?;
        self.copy.lock().0.insert(path.to_owned(), bytes.clone());
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn papers_come_back_as_they_were_and_nothing_else_does() {
        let release = Digest([7; 32]);
        let file = |path: &str, bytes: &[u8]| (path.to_owned(), bytes.to_vec());
        let papers = Papers(BTreeMap::from([
            file("metadata/timestamp.json", b"{}"),
            file("targets/a", &[1; 70_000]),
            file("empty", b""),
        ]));
        let bytes = papers.to_bytes(release).unwrap();
        assert_eq!(Papers::parse(release, &bytes), Some(papers.clone()));
        assert_eq!(Papers::parse(Digest([8; 32]), &bytes), None);
        for length in (0..200).chain([bytes.len() - 1]) {
            assert_eq!(Papers::parse(release, &bytes[..length]), None, "{length}");
        }
        let more = [&bytes[..], b"x"].concat();
        assert_eq!(Papers::parse(release, &more), None);
        assert!(matches!(papers.get("other"), Err(SourceError::Missing)));
        assert_eq!(papers.get("empty").unwrap(), b"");
        let large = Papers(BTreeMap::from([file("a", &vec![0; MAX_BYTES])]));
        assert_eq!(large.to_bytes(release), None);
    }
}

//! What a version of a model consists of: the one small document that is signed, and that names every
//! file with its length, digest and chunks.
//!
//! The same content is always the same bytes, and nothing else is accepted, so that the digest of the
//! document stands for the release.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{Digest, MAX_MODEL_BYTES, chunks, digest_of};

/// The version of the document that this crate reads.
const VERSION: u64 = 1;
/// Bytes of the document. The chunks of 320 MiB take 90 KiB.
pub const MAX_RELEASE_BYTES: usize = 256 << 10;
/// A bundle has at most 64 golden pictures, and a handful of other files.
const MAX_FILES: usize = 128;
/// Bytes of all files: the largest model and a megabyte for each golden picture.
const MAX_TOTAL_BYTES: u64 = MAX_MODEL_BYTES + (64 << 20);
/// Bytes of a path; what file systems bear as one name.
const MAX_PATH_BYTES: usize = 255;

/// A version of a model, ready to be signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseDocument {
    /// The version of the form, 1.
    pub v: u64,
    /// Name of the model.
    pub name: String,
    /// Version of the model.
    pub version: String,
    /// All files, in the order of their paths.
    pub files: Vec<ReleaseFile>,
    /// The release that it was trained from, and that a delta is most likely to start at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
}

/// A file of a release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseFile {
    /// Where it lies in the bundle's folder.
    pub path: String,
    /// Digest of the file.
    pub sha256: Digest,
    /// Bytes of the file.
    pub length: u64,
    /// Digests of its chunks, each of [`chunks::CHUNK_BYTES`] but the last.
    pub chunks: Vec<Digest>,
}

/// The release that another one comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Version of the model.
    pub version: String,
    /// Digest of its release document.
    pub sha256: Digest,
}

/// Why there is no release.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReleaseError {
    /// Longer than [`MAX_RELEASE_BYTES`].
    #[error("a release of {0} bytes is larger than 256 KiB")]
    TooLarge(usize),
    /// Not the JSON of a release.
    #[error("not a release: {0}")]
    Json(#[from] serde_json::Error),
    /// The same content in other bytes, such as with blanks or fields in another order.
    #[error("not a release: it is written differently from how releases are")]
    Form,
    /// A field that is not as it must be.
    #[error("release: {field} {problem}")]
    Field {
        /// Which one.
        field: String,
        /// What about it.
        problem: &'static str,
    },
    /// A file of the bundle cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
}

fn wrong(field: impl Into<String>, problem: &'static str) -> ReleaseError {
    let field = field.into();
    ReleaseError::Field { field, problem }
}

fn require(fine: bool, field: &str, problem: &'static str) -> Result<(), ReleaseError> {
    if fine {
        Ok(())
    } else {
        Err(wrong(field, problem))
    }
}

/// Can the path only lead to a place inside of the folder, the same one on every system?
fn is_safe_path(path: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/');
    path.len() <= MAX_PATH_BYTES
        && path.bytes().all(fits)
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fn is_name(text: &str) -> bool {
    let fits = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-');
    (1..=40).contains(&text.len()) && text.bytes().all(fits)
}

/// It also names a folder, so it cannot be `..`.
fn is_version(text: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'+' | b'-');
    (1..=32).contains(&text.len())
        && text.bytes().all(fits)
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
}

impl ReleaseDocument {
    /// Reads a release and checks all of it.
    ///
    /// # Errors
    /// When it is too large, not a release, or has anything in it that is not allowed.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReleaseError> {
        if bytes.len() > MAX_RELEASE_BYTES {
            return Err(ReleaseError::TooLarge(bytes.len()));
        }
        let release: Self = serde_json::from_slice(bytes)?;
        if release.to_bytes()? == bytes {
            Ok(release)
        } else {
            Err(ReleaseError::Form)
        }
    }

    /// The document: what is signed and sent.
    ///
    /// # Errors
    /// When the release could not be read again.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ReleaseError> {
        self.check()?;
        let bytes = serde_json::to_vec(self)?;
        if bytes.len() > MAX_RELEASE_BYTES {
            return Err(ReleaseError::TooLarge(bytes.len()));
        }
        Ok(bytes)
    }

    /// The digest of the document.
    ///
    /// # Errors
    /// As [`Self::to_bytes`].
    pub fn digest(&self) -> Result<Digest, ReleaseError> {
        Ok(digest_of(&self.to_bytes()?))
    }

    /// The release of a bundle: all files in its folder.
    ///
    /// # Errors
    /// When a file cannot be read, is a link or something else than a file, or breaks a rule.
    pub fn of(
        folder: &Path,
        name: &str,
        version: &str,
        parent: Option<Parent>,
    ) -> Result<Self, ReleaseError> {
        let mut files = BTreeMap::new();
        collect(folder, "", &mut files)?;
        let release = Self {
            v: VERSION,
            name: name.to_owned(),
            version: version.to_owned(),
            files: files.into_values().collect(),
            parent,
        };
        release.check()?;
        Ok(release)
    }

    fn check(&self) -> Result<(), ReleaseError> {
        require(
            self.v == VERSION,
            "v",
            "must be 1, the only version that is known",
        )?;
        require(
            is_name(&self.name),
            "name",
            "must be 1 to 40 characters of a-z, 0-9 and -",
        )?;
        const BAD_VERSION: &str = "must be 1 to 32 characters of letters, digits, '.', '+' and '-', \
                                   and begin with a letter or a digit";
        require(is_version(&self.version), "version", BAD_VERSION)?;
        if let Some(parent) = &self.parent {
            require(is_version(&parent.version), "parent.version", BAD_VERSION)?;
        }
        let count = self.files.len();
        require(
            (1..=MAX_FILES).contains(&count),
            "files",
            "must be 1 to 128",
        )?;
        let ascending = self.files.is_sorted_by(|a, b| a.path < b.path);
        require(
            ascending,
            "files",
            "must be in the order of their paths, each once",
        )?;
        let mut total = 0u64;
        for file in &self.files {
            let field = || format!("file {:?}", file.path);
            if !is_safe_path(&file.path) {
                return Err(wrong(
                    field(),
                    "is not a plain relative path of letters, digits and ._-/",
                ));
            }
            if chunks::listed(file.length, &file.chunks).is_none() {
                return Err(wrong(
                    field(),
                    "does not have as many chunks as its length needs",
                ));
            }
            if file.length > MAX_MODEL_BYTES {
                return Err(wrong(field(), "is larger than 256 MiB"));
            }
            total = total.saturating_add(file.length);
        }
        require(
            total <= MAX_TOTAL_BYTES,
            "files",
            "are larger than 320 MiB together",
        )?;
        let paths: BTreeSet<&str> = self.files.iter().map(|file| file.path.as_str()).collect();
        let folders = paths.iter().flat_map(|path| {
            let ends = path.match_indices('/');
            ends.filter_map(|(end, _)| path.get(..end))
        });
        for folder in folders {
            if paths.contains(folder) {
                return Err(wrong(
                    format!("file {folder:?}"),
                    "is a folder of another file too",
                ));
            }
        }
        Ok(())
    }
}

/// Adds all files below a folder, whose path inside of the bundle is `inside`.
fn collect(
    folder: &Path,
    inside: &str,
    files: &mut BTreeMap<String, ReleaseFile>,
) -> Result<(), ReleaseError> {
    let cannot = |path: &Path| {
        let path = path.to_owned();
        move |source| ReleaseError::Read { path, source }
    };
    for entry in fs::read_dir(folder).map_err(cannot(folder))? {
        let entry = entry.map_err(cannot(folder))?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(cannot(folder))?);
        let name = entry.file_name();
        let relative = match name.to_str() {
            Some(name) if is_safe_path(&format!("{inside}{name}")) => format!("{inside}{name}"),
            _ => {
                return Err(wrong(
                    format!("file {path:?}"),
                    "has a name that cannot be sent",
                ));
            }
        };
        if kind.is_dir() {
            collect(&path, &format!("{relative}/"), files)?;
        } else if !kind.is_file() {
            return Err(wrong(
                format!("file {path:?}"),
                "is neither a file nor a folder",
            ));
        } else {
            if files.len() == MAX_FILES {
                return Err(wrong("files", "must be 1 to 128"));
            }
            let file = read(&path, &relative).map_err(cannot(&path))?;
            files.insert(relative, file);
        }
    }
    Ok(())
}

/// A file of the bundle; one byte beyond the limit is enough to refuse it.
fn read(path: &Path, relative: &str) -> io::Result<ReleaseFile> {
    let mut bytes = Vec::new();
    let limit = MAX_MODEL_BYTES + 1;
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    let chunks = chunks::split(&bytes);
    Ok(ReleaseFile {
        path: relative.to_owned(),
        sha256: digest_of(&bytes),
        length: bytes.len() as u64,
        chunks: chunks.iter().map(|chunk| chunk.sha256).collect(),
    })
}

//! A bundle on disk: a folder with a manifest and the files that it names, each read within bounds.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use crate::{
    MAX_ENCODED_BYTES, MAX_MODEL_BYTES, digest_of,
    manifest::{Manifest, ManifestErrors},
    read::is_plain_path,
};

/// The manifest's file name.
const MANIFEST: &str = "manifest.toml";
/// Room for ten thousand labels and as many scores in a few dozen golden cases.
const MAX_MANIFEST_BYTES: u64 = 8 << 20;
/// A hundred bytes for each of some hundred thousand pictures.
const MAX_HOLDOUT_BYTES: u64 = 16 << 20;

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The folder or a file in it cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A name in the manifest that leads out of the bundle, or to something that is not a file.
    #[error("{0}: not a plain file inside the bundle")]
    Outside(PathBuf),
    /// A file beyond its bound.
    #[error("{path}: larger than the allowed {limit} bytes")]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// The bound.
        limit: u64,
    },
    /// A text file that is not UTF-8.
    #[error("{0}: not UTF-8 text")]
    NotText(PathBuf),
    /// The manifest has mistakes.
    #[error("{path}: {errors}")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// All of them.
        errors: ManifestErrors,
    },
    /// The model file is not the one that the manifest describes.
    #[error("{path}: {what} is {found}, the manifest says {expected}")]
    Differs {
        /// The model file.
        path: PathBuf,
        /// `length` or `sha256`.
        what: &'static str,
        /// What the file has.
        found: String,
        /// What it should have.
        expected: String,
    },
}

/// A bundle whose manifest is sound and whose model file is the one described in it.
#[derive(Debug)]
pub struct Bundle {
    /// What the bundle says about itself.
    pub manifest: Manifest,
    dir: PathBuf,
    holdout: HashSet<String>,
}

impl Bundle {
    /// Opens the bundle in `dir` and checks the model file's length and SHA-256.
    ///
    /// # Errors
    /// See [`BundleError`]; each names the file.
    pub fn open(dir: &Path) -> Result<Self, BundleError> {
        let dir = dir.canonicalize().map_err(|source| BundleError::Read {
            path: dir.to_owned(),
            source,
        })?;
        let text = text(&dir, MANIFEST, MAX_MANIFEST_BYTES)?;
        let manifest = Manifest::parse(&text).map_err(|errors| BundleError::Manifest {
            path: dir.join(MANIFEST),
            errors,
        })?;
        let holdout = match &manifest.lineage.holdout {
            Some(file) => self::text(&dir, file, MAX_HOLDOUT_BYTES)?
                .lines()
                .map(|line| plain(line.trim()).to_owned())
                .filter(|line| !line.is_empty())
                .collect(),
            None => HashSet::new(),
        };
        let bundle = Self {
            manifest,
            dir,
            holdout,
        };
        bundle.model_bytes()?;
        for golden in &bundle.manifest.golden {
            inside(&bundle.dir, &golden.image)?;
        }
        Ok(bundle)
    }

    /// `name@version`.
    #[must_use]
    pub fn id(&self) -> String {
        self.manifest.id()
    }

    /// The bundle's folder, absolute.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Is this picture (path relative to the data set's folder) one that the model was never trained on?
    #[must_use]
    pub fn is_held_out(&self, relative: &str) -> bool {
        self.holdout.contains(plain(relative))
    }

    /// The model file, checked against the manifest as it is read: what is returned is what was checked.
    ///
    /// # Errors
    /// When the file cannot be read or is not the one that the manifest describes.
    pub fn model_bytes(&self) -> Result<Vec<u8>, BundleError> {
        let spec = &self.manifest.model;
        let path = self.dir.join(&spec.file);
        let bytes = bytes(&self.dir, &spec.file, MAX_MODEL_BYTES)?;
        let differs = |what, found, expected: &dyn ToString| BundleError::Differs {
            path: path.clone(),
            what,
            found,
            expected: expected.to_string(),
        };
        if bytes.len() as u64 != spec.bytes {
            return Err(differs("length", bytes.len().to_string(), &spec.bytes));
        }
        let digest = digest_of(&bytes).to_string();
        if digest != spec.sha256 {
            return Err(differs("sha256", digest, &spec.sha256));
        }
        Ok(bytes)
    }

    /// An image of the bundle, encoded as it lies there.
    ///
    /// # Errors
    /// When it is not a readable file inside the bundle, or too large for an image.
    pub fn image_bytes(&self, relative: &str) -> Result<Vec<u8>, BundleError> {
        bytes(&self.dir, relative, MAX_ENCODED_BYTES as u64)
    }
}

/// Without a leading `./`.
fn plain(path: &str) -> &str {
    path.strip_prefix("./").unwrap_or(path)
}

/// The real path of a file that must lie inside `dir`, symbolic links followed.
fn inside(dir: &Path, relative: &str) -> Result<PathBuf, BundleError> {
    let path = dir.join(relative);
    if !is_plain_path(relative) {
        return Err(BundleError::Outside(path));
    }
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(source) => return Err(BundleError::Read { path, source }),
    };
    // A device or a pipe would never end or never begin.
    if real.starts_with(dir) && real.is_file() {
        Ok(real)
    } else {
        Err(BundleError::Outside(path))
    }
}

fn bytes(dir: &Path, relative: &str, limit: u64) -> Result<Vec<u8>, BundleError> {
    let path = inside(dir, relative)?;
    match read_bounded(&path, limit) {
        Ok(Some(bytes)) => Ok(bytes),
        Ok(None) => Err(BundleError::TooLarge { path, limit }),
        Err(source) => Err(BundleError::Read { path, source }),
    }
}

/// A file's bytes, or nothing if there are more than `limit`; no more than that is ever read.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    if length > limit {
        return Ok(None);
    }
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
    file.take(limit + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= limit).then_some(bytes))
}

fn text(dir: &Path, relative: &str, limit: u64) -> Result<String, BundleError> {
    let bytes = bytes(dir, relative, limit)?;
    String::from_utf8(bytes).map_err(|_| BundleError::NotText(dir.join(relative)))
}

//! What can go wrong when signing.

use std::path::PathBuf;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// The disk.
    #[error("cannot {operation} {path}: {source}", path = path.display())]
    Disk {
        /// What was being done.
        operation: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Somebody else is signing.
    #[error("the repository {path} is in use by another process", path = .0.display())]
    Busy(PathBuf),
    /// Others may read a private key.
    #[error("the private key {path} can be read by others: chmod 600 it", path = .0.display())]
    KeyExposed(PathBuf),
    /// Not a key.
    #[error("{0} is not a usable key: {1}")]
    Key(String, String),
    /// Too few keys are at hand.
    #[error("too few {0} keys are here to sign: name the files of the others")]
    KeysMissing(String),
    /// The repository does not verify.
    #[error("the repository is damaged: {file}: {detail}")]
    Damaged {
        /// Which file.
        file: String,
        /// What is wrong.
        detail: String,
    },
    /// A new root is refused.
    #[error("this root cannot be used: {0}")]
    Root(String),
    /// Not a name of a model or version.
    #[error(
        "{0:?} is no name here: 1 to 64 of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit"
    )]
    Name(String),
    /// A version is published once.
    #[error("{0} is published already with another content: give it a new version")]
    Exists(String),
    /// Larger than devices take.
    #[error("{what} has {length} bytes, the limit is {limit}")]
    TooLarge {
        /// What.
        what: String,
        /// Its size.
        length: u64,
        /// The bound.
        limit: u64,
    },
    /// A time or number out of range.
    #[error("{0} is out of range")]
    Range(&'static str),
    /// The library refused.
    #[error("cannot {operation}: {source}")]
    Library {
        /// What was being done.
        operation: &'static str,
        /// Its words.
        source: Box<tough::error::Error>,
    },
}

impl SigningError {
    pub(super) fn library(operation: &'static str, error: tough::error::Error) -> Self {
        let source = Box::new(error);
        Self::Library { operation, source }
    }
}

//! Why metadata or a release is not accepted.

use std::{error::Error as _, io, path::PathBuf};

use tough::{TransportError, TransportErrorKind, error::Error, schema::RoleType};

use super::source::SourceError;

/// Why metadata or a release is not accepted. One state and one message for each.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Old signatures: nobody renews them, or somebody holds the new ones back.
    #[error("the {role} metadata has expired: the coordinator must sign it again")]
    Expired {
        /// Whose.
        role: RoleType,
        /// When, in milliseconds since the Unix epoch.
        expires_ms: i64,
    },
    /// Only by this device's clock are the signatures good.
    #[error(
        "the {role} metadata has expired, though not by this clock, which was set back: set the clock"
    )]
    ClockBackwards {
        /// Whose.
        role: RoleType,
        /// What the clock says.
        now_ms: i64,
        /// The time that has passed for certain.
        floor_ms: i64,
    },
    /// Older than what was seen before.
    #[error("the registry went back to an older version: {0}")]
    Rollback(String),
    /// Not signed by enough of the right keys.
    #[error("the {role} metadata is not signed as it must be: {detail}")]
    Signature {
        /// Whose.
        role: RoleType,
        /// What is missing.
        detail: String,
    },
    /// Files that do not belong together, or other bytes than were signed.
    #[error("the registry's files do not fit together: {0}")]
    Mismatch(String),
    /// The coordinator cannot be asked.
    #[error("cannot fetch {file}: {detail}")]
    Unreachable {
        /// What was fetched.
        file: String,
        /// What happened.
        detail: String,
    },
    /// A file that must be there is not.
    #[error("the registry has no {0}")]
    Missing(String),
    /// Longer than it may be.
    #[error("{0} is larger than it may be")]
    TooLarge(String),
    /// The rest is followed by the next refresh.
    #[error("the root changed more than {0} times: the rest is followed the next time")]
    TooManyRoots(u64),
    /// No such version of a model.
    #[error("the registry has no {0}")]
    UnknownTarget(String),
    /// Not a name.
    #[error("{0:?} is not the name of a release")]
    Name(String),
    /// Not what the specification says.
    #[error("the registry's metadata cannot be read: {0}")]
    Malformed(String),
    /// The root that all trust begins with is unusable.
    #[error("the pinned root cannot be used: {0}")]
    Pinned(String),
    /// Nothing is verified yet.
    #[error("the registry is not verified yet")]
    NotVerified,
    /// The disk of this device.
    #[error("cannot {operation} {path}: {source}", path = path.display())]
    Store {
        /// What was being done.
        operation: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl From<Error> for VerifyError {
    fn from(error: Error) -> Self {
        let words = error.to_string();
        match error {
            Error::Transport { url, source, .. } => of_transport(url.path(), &source),
            Error::VerifyMetadata { role, source, .. } => {
                let detail = source.to_string();
                Self::Signature { role, detail }
            }
            Error::OlderMetadata { .. }
            | Error::OlderSnapshotInTimestamp { .. }
            | Error::SnapshotRoleMissing { .. }
            | Error::SnapshotRoleRollback { .. } => Self::Rollback(words),
            Error::VersionMismatch { .. } | Error::HashMismatch { .. } => Self::Mismatch(words),
            Error::MaxSizeExceeded { .. } => Self::TooLarge(words),
            Error::MaxUpdatesExceeded {
                max_root_updates, ..
            } => Self::TooManyRoots(max_root_updates),
            Error::ParseTrustedMetadata { .. } | Error::VerifyTrustedMetadata { .. } => {
                Self::Pinned(words)
            }
            Error::DatastoreCreate { path, source, .. }
            | Error::DatastoreOpen { path, source, .. }
            | Error::DatastoreRemove { path, source, .. } => Self::Store {
                operation: "use",
                path,
                source,
            },
            _ => Self::Malformed(words),
        }
    }
}

/// The library hides its own findings about a file's bytes in the error of the transport.
fn of_transport(path: &str, error: &TransportError) -> VerifyError {
    let file = path.trim_start_matches('/').to_owned();
    let cause = error.source();
    if error.kind() == TransportErrorKind::FileNotFound {
        return VerifyError::Missing(file);
    }
    if let Some(Error::MaxSizeExceeded { .. }) = cause.and_then(|cause| cause.downcast_ref()) {
        return VerifyError::TooLarge(file);
    }
    if let Some(Error::HashMismatch { .. }) = cause.and_then(|cause| cause.downcast_ref()) {
        return VerifyError::Mismatch(format!("{file} has other bytes than were signed"));
    }
    if let Some(SourceError::TooLarge) = cause.and_then(|cause| cause.downcast_ref()) {
        return VerifyError::TooLarge(file);
    }
    let detail = cause.map_or_else(|| error.to_string(), ToString::to_string);
    VerifyError::Unreachable { file, detail }
}

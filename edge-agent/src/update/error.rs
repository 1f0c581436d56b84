//! Why a model does not come to the device: one message for people, one [`Reason`] for machines.

use mesh_core::{Failure, Reason, Release};
use models::{BundleError, ReleaseError, chunks::ChunkError};

use super::{disk::DiskError, registry::VerifyError};

/// Why a release was not fetched or not accepted.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpdateError {
    /// `update.coordinator` is not set.
    #[error("no coordinator to fetch from is configured (update.coordinator)")]
    NoCoordinator,
    /// `update.root` is not set.
    #[error("no root of trust is configured (update.root): nothing can be installed")]
    NoRoot,
    /// The root cannot be read.
    #[error("the root of trust {path} cannot be read: {error}")]
    Root { path: String, error: std::io::Error },
    /// Metadata.
    #[error(transparent)]
    Registry(#[from] VerifyError),
    /// Another document than the one that is wished for.
    #[error("the registry has another {0} than the one that is wished for")]
    Other(Release),
    /// Not a document, or of another release.
    #[error("the document of {release}: {why}")]
    Document { release: Release, why: String },
    /// It would take the device back.
    #[error("{release} is older than {current}, which runs: only a forced wish goes back")]
    Downgrade { release: String, current: String },
    /// Too little room.
    #[error("{needed} MiB are needed and {free} MiB are free")]
    Room { needed: u64, free: u64 },
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// There is no delta, or none that is worth it.
    #[error("there is no delta")]
    NoDelta,
    /// The coordinator's answer.
    #[error("{what}: {why}")]
    Answer { what: String, why: String },
    /// A chunk or a file that was put together is another one.
    #[error("{0}")]
    Bytes(String),
    /// Chunks on the disk.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Something newer takes its place.
    #[error("something newer takes its place")]
    Overtaken,
    /// A thread or a process.
    #[error("cannot start {what}: {error}")]
    Start {
        what: &'static str,
        error: std::io::Error,
    },
}

impl UpdateError {
    pub(super) fn document(release: &Release, error: &ReleaseError) -> Self {
        Self::Document {
            release: release.clone(),
            why: error.to_string(),
        }
    }

    fn reason(&self) -> Reason {
        match self {
            Self::Registry(VerifyError::Unreachable { .. } | VerifyError::Missing(_))
            | Self::NoCoordinator
            | Self::NoDelta
            | Self::Answer { .. }
            | Self::Overtaken => Reason::Fetch,
            Self::Registry(VerifyError::Store { source, .. }) => of_disk(source),
            Self::NoRoot
            | Self::Root { .. }
            | Self::Registry(_)
            | Self::Other(_)
            | Self::Document { .. }
            | Self::Downgrade { .. } => Reason::Metadata,
            Self::Room { .. } => Reason::DiskFull,
            Self::Disk(error) if error.is_full() => Reason::DiskFull,
            Self::Disk(_) => Reason::Fetch,
            Self::Chunk(ChunkError::Read { source, .. } | ChunkError::Write(source)) => {
                of_disk(source)
            }
            Self::Bytes(_) | Self::Chunk(_) => Reason::Bytes,
            // The bytes are those that were signed: there is no good bundle in them.
            Self::Bundle(BundleError::Read { source, .. })
                if source.kind() != std::io::ErrorKind::NotFound =>
            {
                of_disk(source)
            }
            Self::Bundle(_) => Reason::Load,
            Self::Start { .. } => Reason::Unproven,
        }
    }
}

fn of_disk(error: &std::io::Error) -> Reason {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    match error.kind() {
        StorageFull | QuotaExceeded => Reason::DiskFull,
        _ => Reason::Fetch,
    }
}

impl From<UpdateError> for Failure {
    fn from(error: UpdateError) -> Self {
        Self::new(error.reason(), &error.to_string())
    }
}

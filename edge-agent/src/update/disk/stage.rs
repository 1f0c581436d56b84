//! Where a release is put together, below `incoming/`.

use std::{fs, path::PathBuf};

use mesh_core::Digest;

use super::{DELTA, DiskError, cannot, change, remove};

/// Where a release is put together.
#[derive(Debug)]
pub(in crate::update) struct Stage {
    pub(super) root: PathBuf,
}

impl Stage {
    /// The folder that will be the release.
    pub(in crate::update) fn bundle(&self) -> PathBuf {
        self.root.join("bundle")
    }

    /// Chunks of the file that is being fetched, each named by its digest.
    pub(in crate::update) fn chunks(&self) -> PathBuf {
        self.root.join("chunks")
    }

    /// Where a delta is put while it comes.
    pub(in crate::update) fn delta(&self) -> PathBuf {
        self.root.join(DELTA)
    }

    /// It is of no use any more.
    pub(in crate::update) fn drop_delta(&self) -> Result<(), DiskError> {
        remove(&self.delta())
    }

    /// Makes the folders.
    pub(in crate::update) fn prepare(&self) -> Result<(), DiskError> {
        for folder in [self.bundle(), self.chunks()] {
            change(|| fs::create_dir_all(&folder)).map_err(cannot("make", &folder))?;
        }
        Ok(())
    }

    /// Where a file of the release goes; its folder is there afterwards.
    pub(in crate::update) fn file(&self, path: &str) -> Result<PathBuf, DiskError> {
        let file = self.bundle().join(path);
        if let Some(folder) = file.parent() {
            change(|| fs::create_dir_all(folder)).map_err(cannot("make", folder))?;
        }
        Ok(file)
    }

    /// Keeps a chunk. It is hashed when it is taken up again, so it need not be durable.
    pub(in crate::update) fn keep(&self, digest: Digest, bytes: &[u8]) -> Result<(), DiskError> {
        let path = self.chunks().join(digest.to_string());
        change(|| fs::write(&path, bytes)).map_err(cannot("write", &path))
    }

    /// The file that they were for is complete.
    pub(in crate::update) fn drop_chunks(&self) -> Result<(), DiskError> {
        remove(&self.chunks())?;
        self.prepare()
    }
}

//! Settings on the disk of a device.
//!
//! ```text
//! <data>/settings/state.json       what is to be loaded, and what is bad
//! <data>/settings/<digest>.json    one document
//! <data>/settings/registry/        what is trusted: a memory of its own, so that no model's fetch is in the way
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use mesh_core::{
    Digest, Failure, Reason, VERSION,
    settings::{MAX_SETTINGS_BYTES, Saved},
};
use models::digest_of;

use crate::update::disk::{DiskError, cannot, read_bounded, replace};

const STATE: &str = "state.json";
const REGISTRY: &str = "registry";
/// Two settings, a wish and sixteen bad ones with their reasons are 20 KiB.
const MAX_STATE_BYTES: u64 = 256 * 1024;

/// The folder of settings.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    folder: PathBuf,
}

impl Disk {
    pub(super) fn of(data: &Path) -> Self {
        Self {
            folder: data.join("settings"),
        }
    }

    /// The folder of what the registry's client remembers.
    pub(super) fn registry(&self) -> PathBuf {
        self.folder.join(REGISTRY)
    }

    /// What was saved; a new beginning where there is nothing that can be used.
    pub(super) fn read(&self) -> Saved {
        let path = self.folder.join(STATE);
        let read = read_bounded(&path, MAX_STATE_BYTES)
            .and_then(|bytes| serde_json::from_slice::<Saved>(&bytes).map_err(io::Error::other));
        match read {
            Ok(saved) if saved.v == VERSION => return saved,
            Ok(saved) => {
                let version = saved.v;
                tracing::error!(
                    version,
                    "the state of settings is of another version; beginning anew"
                );
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "the state of settings cannot be read; beginning anew");
            }
        }
        Saved::new()
    }

    /// Replaces the state, durably.
    pub(super) fn save(&self, saved: &Saved) -> Result<(), DiskError> {
        let bytes = serde_json::to_vec(saved)
            .map_err(io::Error::other)
            .map_err(cannot("write", &self.folder.join(STATE)))?;
        self.put(STATE, &bytes)
    }

    /// Keeps a document, durably.
    pub(super) fn keep(&self, digest: Digest, bytes: &[u8]) -> Result<(), Failure> {
        self.put(&name(digest), bytes).map_err(|error| {
            let reason = if error.is_full() {
                Reason::DiskFull
            } else {
                Reason::Fetch
            };
            Failure::new(reason, &error.to_string())
        })
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
        fs::create_dir_all(&self.folder).map_err(cannot("make", &self.folder))?;
        replace(&self.folder, name, bytes)
    }

    /// A document that is here and whole.
    pub(super) fn document(&self, digest: Digest) -> Result<Vec<u8>, Failure> {
        let path = self.folder.join(name(digest));
        match read_bounded(&path, MAX_SETTINGS_BYTES as u64) {
            Ok(bytes) if digest_of(&bytes) == digest => Ok(bytes),
            Ok(_) => Err("it is damaged".to_owned()),
            Err(error) => Err(error.to_string()),
        }
        .map_err(|why| Failure::new(Reason::Bytes, &format!("{}: {why}", path.display())))
    }

    /// Removes every document but these; what cannot be removed stays.
    pub(super) fn retain(&self, needed: &[Digest]) {
        let keep: Vec<String> = needed.iter().map(|digest| name(*digest)).collect();
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            if file != STATE && file != REGISTRY && !keep.contains(&file) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn name(digest: Digest) -> String {
    format!("{digest}.json")
}

//! Files of the repository, changed all together or not at all.
//!
//! ```text
//! metadata/       what devices fetch
//! targets/        release documents; each carries its digest in its name, so writing one early does no harm
//! next/           a change that is being written: worthless after a crash
//! commit/         a change that is whole and on the disk: finished after a crash
//! ```
//!
//! A change is written to `next/` and flushed. Renaming that to `commit/` decides it. Its files then move to
//! `metadata/`, `timestamp.json` last and only when the others are on the disk: at every moment the
//! timestamp that is served names a snapshot, and that names targets, which are there.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::SigningError;

/// Largest file that is read here: as large as the metadata that a device still takes, 4 MiB.
pub(super) const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// Old snapshots and targets that are kept for devices which are just fetching them: a fetch takes seconds,
/// and nobody publishes sixteen versions meanwhile.
const KEEP_VERSIONS: u64 = 16;
/// The file that makes the others valid.
const LAST: &str = "timestamp.json";

/// One change of the disk.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// A file is created or emptied, and written.
    Write(&'a Path),
    /// Its bytes are flushed.
    Sync(&'a Path),
    /// A file or folder gets another name.
    Rename(&'a Path, &'a Path),
    /// The names in a folder are flushed.
    SyncFolder(&'a Path),
    /// A file or folder goes.
    Remove(&'a Path),
}

/// Told of each change right before it happens, and may fail it.
///
/// The test of a power cut stands on it: every change of the repository comes through here.
pub type StepHook = Arc<dyn Fn(Step<'_>) -> io::Result<()> + Send + Sync>;

/// A repository's folder.
pub(super) struct Disk {
    folder: PathBuf,
    hook: Option<StepHook>,
}

/// Names the operation and the file in an error.
pub(super) fn failed(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> SigningError {
    let path = path.to_owned();
    move |source| SigningError::Disk {
        operation,
        path,
        source,
    }
}

/// Reads a file of bounded size.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, SigningError> {
    let length = fs::metadata(path).map_err(failed("read", path))?.len();
    if length > MAX_FILE_BYTES {
        let what = path.display().to_string();
        let limit = MAX_FILE_BYTES;
        return Err(SigningError::TooLarge {
            what,
            length,
            limit,
        });
    }
    fs::read(path).map_err(failed("read", path))
}

/// Names of the files in a folder; none where the folder is not there.
pub(super) fn names(folder: &Path) -> Result<Vec<String>, SigningError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed("list", folder))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed("list", folder))?.file_name();
        names.extend(name.to_str().map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

impl Disk {
    pub(super) const fn new(folder: PathBuf, hook: Option<StepHook>) -> Self {
        Self { folder, hook }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Waits for nobody: two who sign at once would give out one version number twice.
    pub(super) fn lock(&self) -> Result<File, SigningError> {
        fs::create_dir_all(&self.folder).map_err(failed("create", &self.folder))?;
        let path = self.path(".lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(failed("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(fs::TryLockError::WouldBlock) => Err(SigningError::Busy(self.folder.clone())),
            Err(fs::TryLockError::Error(error)) => Err(failed("lock", &path)(error)),
        }
    }

    /// Finishes a change that was decided before a crash, and forgets one that was not.
    pub(super) fn recover(&self) -> Result<(), SigningError> {
        for folder in ["metadata", "targets"].map(|name| self.path(name)) {
            fs::create_dir_all(&folder).map_err(failed("create", &folder))?;
        }
        self.sync_folder(&self.folder)?;
        self.finish()
    }

    /// Writes one file whole or not at all.
    pub(super) fn put(&self, path: &Path, bytes: &[u8], mode: u32) -> Result<(), SigningError> {
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(failed("create", folder))?;
        if let Some(above) = folder.parent() {
            self.sync_folder(above)?;
        }
        let fresh = path.with_extension("tmp");
        self.write(&fresh, bytes, mode)?;
        self.rename(&fresh, path)?;
        self.sync_folder(folder)
    }

    /// Changes these files of the metadata together.
    pub(super) fn commit(&self, files: &[(String, Vec<u8>)]) -> Result<(), SigningError> {
        let next = self.path("next");
        self.remove_folder(&next)?;
        fs::create_dir(&next).map_err(failed("create", &next))?;
        for (name, bytes) in files {
            self.write(&next.join(name), bytes, 0o644)?;
        }
        self.sync_folder(&next)?;
        self.rename(&next, &self.path("commit"))?;
        self.sync_folder(&self.folder)?;
        self.finish()
    }

    fn finish(&self) -> Result<(), SigningError> {
        let (commit, metadata) = (self.path("commit"), self.path("metadata"));
        let names = names(&commit)?;
        for name in names.iter().filter(|name| *name != LAST) {
            self.rename(&commit.join(name), &metadata.join(name))?;
        }
        if !names.is_empty() {
            self.sync_folder(&metadata)?;
        }
        if names.iter().any(|name| name == LAST) {
            self.rename(&commit.join(LAST), &metadata.join(LAST))?;
            self.sync_folder(&metadata)?;
        }
        self.remove_folder(&commit)?;
        self.remove_folder(&self.path("next"))
    }

    /// Removes versions that nobody asks for any more. Root is kept from the first on: every device follows it.
    pub(super) fn prune(&self, role: &str, newest: u64) -> Result<(), SigningError> {
        let metadata = self.path("metadata");
        for name in names(&metadata)? {
            let old = |n: u64| n.saturating_add(KEEP_VERSIONS) < newest;
            if version_of(&name, role).is_some_and(old) {
                let path = metadata.join(&name);
                self.step(Step::Remove(&path))
                    .and_then(|()| fs::remove_file(&path))
                    .map_err(failed("remove", &path))?;
            }
        }
        Ok(())
    }

    fn write(&self, path: &Path, bytes: &[u8], mode: u32) -> Result<(), SigningError> {
        self.step(Step::Write(path))
            .and_then(|()| {
                let mut file = OpenOptions::new()
                    .create(true)
                    .truncate(true)
                    .write(true)
                    .mode(mode)
                    .open(path)?;
                file.write_all(bytes)?;
                self.step(Step::Sync(path))?;
                file.sync_all()
            })
            .map_err(failed("write", path))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), SigningError> {
        self.step(Step::Rename(from, to))
            .and_then(|()| fs::rename(from, to))
            .map_err(failed("put in place", to))
    }

    fn sync_folder(&self, folder: &Path) -> Result<(), SigningError> {
        self.step(Step::SyncFolder(folder))
            .and_then(|()| File::open(folder)?.sync_all())
            .map_err(failed("flush", folder))
    }

    fn remove_folder(&self, folder: &Path) -> Result<(), SigningError> {
        let removed = self
            .step(Step::Remove(folder))
            .and_then(|()| fs::remove_dir_all(folder));
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(failed("remove", folder)),
        }
    }

    fn step(&self, step: Step<'_>) -> io::Result<()> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(step))
    }
}

/// The version in `7.snapshot.json`.
pub(super) fn version_of(file: &str, role: &str) -> Option<u64> {
    let (version, rest) = file.split_once('.')?;
    (rest.strip_suffix(".json")? == role)
        .then(|| version.parse().ok())
        .flatten()
}

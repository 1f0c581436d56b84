//! Models on the disk of a device.
//!
//! ```text
//! <data>/models/state.json                    what is to run
//! <data>/models/<name>-<version>-<16 hex>/    one release, unpacked, and its release.json
//! <data>/models/incoming/<digest>/            a release under way: bundle/ and chunks/
//! <data>/models/registry/                     what is trusted: see `super::registry`
//! <data>/models/delta                         the delta that came last, for neighbours
//! ```
//!
//! - `state.json` is replaced as a whole: new file, fsync, rename, fsync of the folder. It is the old one or the new
//!   one, whenever the power goes.
//! - A release gets its name when every file in it is durable. Until then it is below `incoming/`, where nothing is
//!   trusted by its name: each file and chunk is hashed again before it counts as there.
//! - Nothing is removed that the state names.
//!
//! The bundle that the configuration names is the factory model. It is used where it lies, and never written.

mod stage;

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_core::{
    Digest, Release, VERSION,
    update::{Saved, Since},
};
use models::{Bundle, MAX_RELEASE_BYTES, ReleaseDocument};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub(super) use stage::Stage;

/// The state's file.
const STATE: &str = "state.json";
/// The release document inside of its release.
pub(super) const DOCUMENT: &str = "release.json";
/// Releases under way.
const INCOMING: &str = "incoming";
/// What the registry's client remembers.
const REGISTRY: &str = "registry";
/// What a file was made with, while neighbours may want to do the same.
const DELTA: &str = "delta";
/// A state with a wish, three releases and sixteen bad ones is 8 KiB.
const MAX_STATE_BYTES: u64 = 256 * 1024;
/// Read at once while hashing or copying: large enough for the disk, small enough for the memory.
const BLOCK_BYTES: usize = 64 * 1024;

/// Why something on the disk cannot be done.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {path}: {source}", path = path.display())]
pub struct DiskError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl DiskError {
    /// Is it for want of room?
    #[must_use]
    pub fn is_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self.source.kind(), StorageFull | QuotaExceeded)
    }
}

pub(crate) fn cannot(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError {
        operation,
        path,
        source,
    }
}

/// The factory model.
#[derive(Debug)]
struct Factory {
    release: Release,
    folder: PathBuf,
    /// Nothing where it cannot be sent as a release; it runs all the same.
    document: Option<ReleaseDocument>,
}

/// What is in `state.json`.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// The factory model that the rest began with.
    factory: Option<Digest>,
    /// The start of the board in which this was written, as the kernel calls it.
    #[serde(default)]
    boot: Option<String>,
    saved: Saved,
}

/// The folder of models.
#[derive(Clone, Debug)]
pub struct Disk {
    models: PathBuf,
    factory: Option<Arc<Factory>>,
    remembered: Option<Digest>,
    boot: Option<String>,
}

/// What was found.
#[derive(Debug)]
pub struct Opened {
    /// The folder.
    pub disk: Disk,
    /// Where the device was, or a new beginning with the factory model.
    pub saved: Saved,
    /// What has happened since that was written.
    pub since: Since,
    /// Why the factory model cannot be used, if it cannot.
    pub trouble: Option<String>,
}

/// A release on the disk.
#[derive(Debug)]
pub(super) struct Installed {
    pub(super) digest: Digest,
    pub(super) folder: PathBuf,
    pub(super) document: ReleaseDocument,
}

impl Installed {
    /// Is each of its files the one of the document?
    fn is_whole(&self) -> bool {
        let files = &self.document.files;
        files.iter().all(|file| {
            is_file(&self.folder.join(&file.path), file.length, file.sha256).unwrap_or(false)
        })
    }
}

impl Disk {
    /// Opens `<data>/models`, with the folder of the factory model if the device has one.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn open(data: &Path, bundle: Option<&Path>) -> Result<Opened, DiskError> {
        let models = data.join("models");
        fs::create_dir_all(&models).map_err(cannot("make", &models))?;
        let (factory, trouble) = match bundle.map(factory).transpose() {
            Ok(factory) => (factory, None),
            Err(why) => (None, Some(why)),
        };
        let digest = factory.as_ref().map(|factory| factory.release.digest);
        let mut disk = Self {
            models,
            remembered: digest,
            factory: factory.map(Arc::new),
            boot: boot(),
        };
        let read = disk.read();
        let known = read.as_ref().and_then(|state| state.boot.as_ref());
        let since = match known {
            Some(_) if known == disk.boot.as_ref() => Since::SameBoot,
            _ => Since::NewBoot,
        };
        let saved = match read {
            // A factory model that cannot be read now may come back: nothing is forgotten because of it.
            Some(state) if state.factory == digest || trouble.is_some() => {
                disk.remembered = state.factory;
                state.saved
            }
            Some(_) => {
                tracing::info!("another factory model than before: the device begins with it");
                disk.anew()
            }
            None => disk.anew(),
        };
        Ok(Opened {
            disk,
            saved,
            since,
            trouble,
        })
    }

    /// Reads the state only, for people.
    #[must_use]
    pub fn look(data: &Path) -> Option<Saved> {
        let disk = Self {
            models: data.join("models"),
            factory: None,
            remembered: None,
            boot: None,
        };
        disk.read().map(|state| state.saved)
    }

    fn anew(&self) -> Saved {
        Saved::new(self.factory.as_ref().map(|f| f.release.clone()))
    }

    /// Nothing where there is nothing that can be used.
    fn read(&self) -> Option<State> {
        let path = self.models.join(STATE);
        let bytes = match read_bounded(&path, MAX_STATE_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "the state of models cannot be read; beginning anew");
                return None;
            }
        };
        match serde_json::from_slice::<State>(&bytes) {
            Ok(state) if state.saved.v == VERSION => Some(state),
            Ok(state) => {
                tracing::error!(
                    version = state.saved.v,
                    "the state of models is of another version; beginning anew"
                );
                None
            }
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "the state of models is damaged; beginning anew");
                None
            }
        }
    }

    /// Replaces the state, durably.
    ///
    /// # Errors
    /// If that cannot be done; the old one holds then.
    pub fn save(&self, saved: &Saved) -> Result<(), DiskError> {
        let state = State {
            factory: self.remembered,
            boot: self.boot.clone(),
            saved: saved.clone(),
        };
        let bytes = serde_json::to_vec(&state)
            .map_err(io::Error::other)
            .map_err(cannot("write", &self.models.join(STATE)))?;
        replace(&self.models, STATE, &bytes)
    }

    /// Where the bundle of a release is, or will be.
    #[must_use]
    pub fn folder(&self, release: &Release) -> PathBuf {
        match &self.factory {
            Some(factory) if factory.release.digest == release.digest => factory.folder.clone(),
            _ => self.models.join(folder_name(release)),
        }
    }

    /// Is it the factory model?
    #[must_use]
    pub fn is_factory(&self, release: &Release) -> bool {
        let factory = self.factory.as_ref();
        factory.is_some_and(|factory| factory.release.digest == release.digest)
    }

    /// Is it here, as it was when its signatures were checked? Whether it is whole is for [`super::worker`] to verify.
    pub(super) fn has(&self, release: &Release) -> bool {
        self.is_factory(release)
            || self.installed().iter().any(|here| {
                here.digest == release.digest
                    && here.folder == self.folder(release)
                    && here.is_whole()
            })
    }

    /// Everything that is here, the factory model first.
    pub(super) fn installed(&self) -> Vec<Installed> {
        let factory = self.factory.iter().filter_map(|factory| {
            Some(Installed {
                digest: factory.release.digest,
                folder: factory.folder.clone(),
                document: factory.document.clone()?,
            })
        });
        let names = fs::read_dir(&self.models)
            .map(|entries| entries.filter_map(Result::ok).map(|entry| entry.path()));
        let others = names.into_iter().flatten().filter_map(|folder| {
            let limit = MAX_RELEASE_BYTES as u64;
            let bytes = read_bounded(&folder.join(DOCUMENT), limit).ok()?;
            let document = ReleaseDocument::parse(&bytes).ok()?;
            Some(Installed {
                digest: models::digest_of(&bytes),
                folder,
                document,
            })
        });
        factory.chain(others).collect()
    }

    /// The folder of what the registry's client remembers.
    #[must_use]
    pub fn registry(&self) -> PathBuf {
        self.models.join(REGISTRY)
    }

    /// Where the last delta lies, if there is one.
    pub(super) fn delta(&self) -> PathBuf {
        self.models.join(DELTA)
    }

    /// Nobody is to have the last delta any more.
    pub(super) fn drop_delta(&self) -> Result<(), DiskError> {
        remove(&self.delta())
    }

    /// Keeps a delta. It need not be durable: neighbours have other ways.
    pub(super) fn keep_delta(&self, from: &Path) -> Result<(), DiskError> {
        let to = self.delta();
        rename(from, &to).map_err(cannot("keep", &to))
    }

    /// Bytes that are free for models.
    pub(super) fn free(&self) -> Result<u64, DiskError> {
        let space = rustix::fs::statvfs(&self.models)
            .map_err(io::Error::from)
            .map_err(cannot("measure", &self.models))?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }

    /// The folder where a release is put together.
    pub(super) fn stage(&self, release: &Release) -> Stage {
        let root = self.models.join(INCOMING).join(release.digest.to_string());
        Stage { root }
    }

    /// Gives a release that is complete in its stage its name; a damaged one of that name goes.
    pub(super) fn install(&self, release: &Release, document: &[u8]) -> Result<(), DiskError> {
        let stage = self.stage(release);
        let bundle = stage.bundle();
        write(&bundle.join(DOCUMENT), |file| file.write_all(document))?;
        sync_folders(&bundle)?;
        let target = self.models.join(folder_name(release));
        if target.exists() {
            let old = stage.root.join("old");
            remove(&old)?;
            rename(&target, &old).map_err(cannot("move", &target))?;
        }
        rename(&bundle, &target).map_err(cannot("name", &target))?;
        sync_folder(&self.models)?;
        remove(&stage.root)
    }

    /// Removes every model but those that are needed, and what of others is under way.
    ///
    /// # Errors
    /// If the folder cannot be listed. What cannot be removed is said and stays.
    pub fn retain(&self, needed: &[Release], under_way: Option<&Release>) -> Result<(), DiskError> {
        let keep = needed.iter().chain(under_way).map(folder_name);
        let fixed = [STATE, INCOMING, REGISTRY, DELTA].map(str::to_owned);
        let keep: Vec<String> = keep.chain(fixed).collect();
        self.sweep(&self.models, &keep)?;
        let incoming = self.models.join(INCOMING);
        if !incoming.exists() {
            return Ok(());
        }
        let keep: Vec<String> = under_way
            .map(|r| r.digest.to_string())
            .into_iter()
            .collect();
        self.sweep(&incoming, &keep)
    }

    fn sweep(&self, folder: &Path, keep: &[String]) -> Result<(), DiskError> {
        for entry in fs::read_dir(folder).map_err(cannot("list", folder))? {
            let path = entry.map_err(cannot("list", folder))?.path();
            let named = |keep: &String| path.file_name().is_some_and(|name| *name == **keep);
            let is_factory = |factory: &Arc<Factory>| factory.folder.starts_with(&path);
            if keep.iter().any(named) || self.factory.as_ref().is_some_and(is_factory) {
                continue;
            }
            if let Err(error) = remove(&path) {
                tracing::warn!(%error, "a model that is not needed stays");
            }
        }
        Ok(())
    }
}

/// What the kernel calls this start of the board; nothing where it says none.
fn boot() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// `name-version-0123456789abcdef`: for people by name, for machines by the rest.
fn folder_name(release: &Release) -> String {
    let digest = release.digest.to_string();
    let short = digest.get(..16).unwrap_or(&digest);
    format!("{}-{}-{short}", release.name, release.version)
}

/// Reads the factory model's folder.
fn factory(folder: &Path) -> Result<Factory, String> {
    let bundle = Bundle::open(folder).map_err(|error| format!("model not loaded: {error}"))?;
    let (name, version) = (&bundle.manifest.name, &bundle.manifest.version);
    let document = ReleaseDocument::of(bundle.dir(), name, version, None);
    let described = document.and_then(|document| Ok((document.digest()?, document)));
    let (digest, document) = match described {
        Ok((digest, document)) => (digest, Some(document)),
        Err(error) => {
            // The manifest names the model's digest, so that it stands for what matters.
            tracing::warn!("the factory model is no release ({error}); it is used all the same");
            let manifest = fs::read(bundle.dir().join("manifest.toml"))
                .map_err(|error| format!("model not loaded: its manifest: {error}"))?;
            (models::digest_of(&manifest), None)
        }
    };
    Ok(Factory {
        release: Release {
            name: name.clone(),
            version: version.clone(),
            digest,
        },
        folder: bundle.dir().to_owned(),
        document,
    })
}

/// One change of the disk. In tests the power may go before it.
fn change<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(test)]
    tests::power()?;
    work()
}

/// Writes a file, durably; its name becomes durable with its folder.
pub(super) fn write(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), DiskError> {
    change(|| {
        let mut file = File::create(path)?;
        #[cfg(test)]
        tests::created(path);
        change(|| fill(&mut file))?;
        change(|| file.sync_all())?;
        #[cfg(test)]
        tests::clean(path);
        Ok(())
    })
    .map_err(cannot("write", path))
}

/// Replaces a file of a folder, durably: it is the old one or the new one, whenever the power goes.
pub(crate) fn replace(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
    let (path, fresh) = (folder.join(name), folder.join(format!("{name}.new")));
    write(&fresh, |file| file.write_all(bytes))?;
    rename(&fresh, &path).map_err(cannot("replace", &path))?;
    sync_folder(folder)
}

/// Gives something another name, which becomes durable with its folder.
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    change(|| {
        #[cfg(test)]
        tests::renamed(from, to);
        fs::rename(from, to)
    })
}

fn sync_folder(folder: &Path) -> Result<(), DiskError> {
    change(|| {
        File::open(folder)?.sync_all()?;
        #[cfg(test)]
        tests::synced(folder);
        Ok(())
    })
    .map_err(cannot("make durable", folder))
}

/// A folder and those in it.
fn sync_folders(folder: &Path) -> Result<(), DiskError> {
    for entry in fs::read_dir(folder).map_err(cannot("list", folder))? {
        let path = entry.map_err(cannot("list", folder))?.path();
        if path.is_dir() {
            sync_folders(&path)?;
        }
    }
    sync_folder(folder)
}

/// Removes a file or a folder, or nothing if it is not there.
fn remove(path: &Path) -> Result<(), DiskError> {
    let done = change(|| match fs::symlink_metadata(path) {
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    });
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(cannot("remove", path)(error)),
        _ => Ok(()),
    }
}

pub(crate) fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other("it is larger than it may be"));
    }
    Ok(bytes)
}

/// Copies what is in `from` to `to`, of `length` bytes at most, and says what it was.
pub(super) fn copy(from: &mut impl Read, length: u64, to: &mut impl Write) -> io::Result<Digest> {
    let (mut hash, mut block, mut from) = (Sha256::new(), vec![0; BLOCK_BYTES], from.take(length));
    loop {
        match from.read(&mut block)? {
            0 => return Ok(Digest(hash.finalize().into())),
            n => {
                let bytes = block.get(..n).unwrap_or_default();
                hash.update(bytes);
                to.write_all(bytes)?;
            }
        }
    }
}

/// Does the file have this length and this digest?
pub(super) fn is_file(path: &Path, length: u64, digest: Digest) -> io::Result<bool> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() != length {
        return Ok(false);
    }
    Ok(copy(&mut file, length, &mut io::sink())? == digest)
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;

//! The registry of signed models from both ends: real files, real signatures, no stand-ins.

mod attacks;
mod crash;
mod http;
mod keys;
mod mutants;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use aws_lc_rs::rand::SystemRandom;
use tempfile::TempDir;
use tough::{
    editor::signed::SignedRole,
    key_source::{KeySource, LocalKeySource},
    schema::{KeyHolder, Metafile, Role, Root, Signed},
};

use cloud_coordinator::delivery::signing::{self, Lifetimes, Signing, parse_root};
use edge_agent::update::registry::{Folder, Refreshed, Registry, VerifyError};

/// Some time: the tests never look at the clock.
pub(crate) const NOW: i64 = 1_790_000_000_000;
pub(crate) const DAY: i64 = 24 * 60 * 60 * 1000;

/// A coordinator's folder and a device's.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) signing: Signing,
}

/// In memory where that is possible: thousands of syncs are made here, and the disk proves nothing more.
pub(crate) fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

impl World {
    pub(crate) async fn new() -> Self {
        let dir = folder();
        let signing = Signing::open(&dir.path().join("data"), Lifetimes::default(), NOW)
            .await
            .unwrap();
        Self { dir, signing }
    }

    pub(crate) fn repository(&self) -> PathBuf {
        self.signing.repository()
    }

    pub(crate) fn metadata(&self, file: &str) -> PathBuf {
        self.repository().join("metadata").join(file)
    }

    pub(crate) async fn publish(&self, version: &str) {
        self.signing
            .publish("det", version, &document(version), NOW)
            .await
            .unwrap();
    }

    /// A device whose folder has this name, and which reads this repository.
    pub(crate) fn device_at(&self, name: &str, repository: &Path) -> Registry {
        let pinned = self.signing.first_root().unwrap();
        Registry::new(
            &pinned,
            self.dir.path().join(name),
            Folder(repository.to_owned()),
        )
        .unwrap()
    }

    pub(crate) fn device(&self) -> Registry {
        self.device_at("device", &self.repository())
    }

    /// A copy of what is served now.
    pub(crate) fn keep(&self, name: &str) -> PathBuf {
        let to = self.dir.path().join(name);
        copy(&self.repository(), &to);
        to
    }

    /// Signs with every key that is here, as somebody who has stolen them would, and says what pins it.
    pub(crate) async fn forge<T: Role>(&self, role: T, file: &str, repository: &Path) -> Metafile {
        let holder = KeyHolder::Root(self.root());
        let random = SystemRandom::new();
        let signed = SignedRole::new(role, &holder, &self.all_keys(), &random)
            .await
            .unwrap();
        fs::write(repository.join("metadata").join(file), signed.buffer()).unwrap();
        Metafile {
            length: Some(*signed.length()),
            hashes: Some(tough::schema::Hashes {
                sha256: signed.sha256().to_vec().into(),
                _extra: Default::default(),
            }),
            version: signed.signed().signed.version(),
            _extra: Default::default(),
        }
    }

    pub(crate) fn root(&self) -> Root {
        parse_root(&self.signing.root().unwrap()).unwrap().signed
    }

    pub(crate) fn key_files(&self) -> Vec<PathBuf> {
        let folder = self.dir.path().join("data/keys");
        let mut files: Vec<PathBuf> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        files.retain(|file| file.extension().is_some_and(|e| e == "key"));
        files.sort();
        files
    }

    fn all_keys(&self) -> Vec<Box<dyn KeySource>> {
        let source = |path| Box::new(LocalKeySource { path }) as Box<dyn KeySource>;
        self.key_files().into_iter().map(source).collect()
    }
}

pub(crate) fn document(version: &str) -> Vec<u8> {
    format!(r#"{{"model":"det","version":"{version}","files":{{"model.onnx":"0123"}}}}"#)
        .into_bytes()
}

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

pub(crate) fn parse<T: serde::de::DeserializeOwned>(path: &Path) -> Signed<T> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Everything verifies, and gives these documents.
pub(crate) async fn accepts(device: &mut Registry, versions: &[&str], now: i64) -> Refreshed {
    let refreshed = device.refresh(now).await.unwrap();
    for version in versions {
        let bytes = device.release("det", version, now).await.unwrap();
        assert_eq!(bytes, document(version));
    }
    refreshed
}

/// The refresh fails, and then nothing can be had.
pub(crate) async fn refuses(device: &mut Registry, now: i64) -> VerifyError {
    let error = device.refresh(now).await.unwrap_err();
    let none = device.release("det", "1", now).await.unwrap_err();
    assert!(matches!(none, VerifyError::NotVerified), "{none:?}");
    error
}

/// All files below a folder.
pub(crate) fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => drop(all.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    all
}

//! Brings a release to the disk: what is there already stays, what is alike comes as a difference, the rest in chunks; both
//! from neighbours, where these have it.
//!
//! Nothing is believed because of where it lies or who sent it. The document is the one whose digest is wished for and
//! that the registry has signed; each file is the one whose digest is in the document.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

use mesh_core::{Digest, Failure, Reason, Release, Settings};
use models::{ReleaseDocument, ReleaseFile, digest_of};

use super::{
    client::Client,
    disk::{DOCUMENT, Disk, Installed, copy, is_file, write},
    error::UpdateError,
    files::{BATCH_BYTES, Bringing},
    registry::{Registry, Source, VerifyError},
    swarm::{Copied, Swarm, pieces},
    worker::Watchful,
};
use crate::{config::Config, counters::Counters, identity::Tls};

/// Left free for readings: the outbox writes on while a model comes.
const RESERVE_BYTES: u64 = 32 << 20;
/// The file that changes little from one version to the next and is most of a release.
pub(super) const MODEL: &str = "model.onnx";
/// Deltas that are asked for: from the model that runs, the one before, and the factory's.
const MAX_DELTAS: usize = 3;

/// What the document of a release is proved with.
pub(super) struct Proof<'a> {
    pub(super) release: &'a Release,
    /// The root of trust.
    pub(super) pinned: &'a [u8],
    pub(super) disk: &'a Disk,
    pub(super) swarm: Option<&'a Swarm>,
    pub(super) now_ms: i64,
}

impl Proof<'_> {
    /// The document, as the registry has signed it, now; and whether the coordinator could be reached. Where it cannot, a
    /// neighbour's copies of the registry's files do as well: they prove the same.
    pub(super) fn document(
        &self,
        source: impl Source + 'static,
    ) -> Result<(Vec<u8>, bool), UpdateError> {
        let Some(swarm) = self.swarm else {
            return Ok((self.by(source)?, true));
        };
        let digest = self.release.digest;
        let (source, papers) = Copied::new(source);
        let why = match self.by(source) {
            Ok(bytes) => {
                swarm.keep_papers(self.disk, digest, &papers.take());
                return Ok((bytes, true));
            }
            Err(why @ UpdateError::Registry(VerifyError::Unreachable { .. })) => why,
            Err(why) => return Err(why),
        };
        let mut found = None;
        alone()?.block_on(swarm.papers(digest, async |papers| {
            match self.verify(papers.clone()).await {
                Ok(bytes) => {
                    tracing::info!(release = %self.release, "a neighbour proves what the coordinator cannot now");
                    swarm.keep_papers(self.disk, digest, &papers);
                    found = Some(bytes);
                }
                Err(why) => tracing::debug!("a neighbour's papers prove nothing: {why}"),
            }
            found.is_some()
        }));
        Ok((found.ok_or(why)?, false))
    }

    fn by(&self, source: impl Source + 'static) -> Result<Vec<u8>, UpdateError> {
        alone()?.block_on(self.verify(source))
    }

    async fn verify(&self, source: impl Source + 'static) -> Result<Vec<u8>, UpdateError> {
        let mut registry = Registry::new(self.pinned, self.disk.registry(), source)?;
        registry.refresh(self.now_ms).await?;
        let (name, version) = (&self.release.name, &self.release.version);
        let bytes = registry.release(name, version, self.now_ms).await?;
        if digest_of(&bytes) == self.release.digest {
            Ok(bytes)
        } else {
            Err(UpdateError::Other(self.release.clone()))
        }
    }
}

/// The document of settings, as the registry has signed it, now. Blocks.
pub(crate) fn settings(
    config: &Config,
    wanted: &Settings,
    folder: PathBuf,
    counters: Counters,
    tls: Tls,
    now_ms: i64,
) -> Result<Vec<u8>, Failure> {
    let coordinator = config.coordinator().ok_or(UpdateError::NoCoordinator)?;
    let pinned = pinned(config.update.root.as_deref())?;
    let client = Client::with(coordinator, counters, tls)?;
    let made = Registry::new(&pinned, folder, client.registry());
    let mut registry = made.map_err(UpdateError::from)?;
    let fetched = alone()?.block_on(async {
        registry.refresh(now_ms).await?;
        registry.settings(wanted.version, now_ms).await
    });
    let bytes = fetched.map_err(UpdateError::from)?;
    if digest_of(&bytes) == wanted.digest {
        return Ok(bytes);
    }
    let what = "the registry has other settings of this version than those that are wished for";
    Err(Failure::new(Reason::Metadata, what))
}

/// The root of trust.
pub(super) fn pinned(root: Option<&Path>) -> Result<Vec<u8>, UpdateError> {
    let root = root.ok_or(UpdateError::NoRoot)?;
    std::fs::read(root).map_err(|error| UpdateError::Root {
        path: root.display().to_string(),
        error,
    })
}

/// The library is asynchronous; its threads here have nothing else to do.
pub(super) fn alone() -> Result<tokio::runtime::Runtime, UpdateError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| UpdateError::Start {
            what: "the registry's client",
            error,
        })
}

/// Reads a document and checks that it is of this release.
pub(super) fn parse(release: &Release, bytes: &[u8]) -> Result<ReleaseDocument, UpdateError> {
    let document =
        ReleaseDocument::parse(bytes).map_err(|error| UpdateError::document(release, &error))?;
    let wrong = |why: &str| UpdateError::Document {
        release: release.clone(),
        why: why.into(),
    };
    if (&document.name, &document.version) != (&release.name, &release.version) {
        return Err(wrong("it is of another name or version"));
    }
    if document.files.iter().any(|file| file.path == DOCUMENT) {
        return Err(wrong("a file in it has the name of the document"));
    }
    Ok(document)
}

/// One fetch.
pub(super) struct Fetch<'a> {
    pub(super) disk: &'a Disk,
    pub(super) client: &'a Client,
    pub(super) watchful: &'a Watchful,
    /// What neighbours have, where there are any.
    pub(super) swarm: Option<&'a Swarm>,
    /// Did the coordinator answer a moment ago?
    pub(super) uplink: bool,
    /// The model that runs: the best beginning of a delta.
    pub(super) current: Option<Digest>,
    /// Deltas have failed on this line before.
    pub(super) without_delta: bool,
}

impl Fetch<'_> {
    /// Brings all files of a release, and gives it its place. What came stays if this fails, for the next time.
    pub(super) fn run(&self, release: &Release, bytes: &[u8]) -> Result<(), UpdateError> {
        let document = parse(release, bytes)?;
        if self.disk.has(release) {
            return Ok(());
        }
        let stage = self.disk.stage(release);
        stage.prepare()?;
        // Neighbours that need it had time.
        self.disk.drop_delta()?;
        if let Some(swarm) = self.swarm {
            swarm.describe(release.digest, &document);
        }
        let installed = self.disk.installed();
        let here = places(&installed);
        let (mut missing, mut total) = (Vec::new(), 0);
        for file in &document.files {
            self.watch()?;
            total += file.length;
            let to = stage.file(&file.path)?;
            let is_here = is_file(&to, file.length, file.sha256).unwrap_or(false);
            if is_here || self.take(file, here.get(&file.sha256), &to)? {
                self.show(file, &to);
            } else {
                missing.push(file);
            }
        }
        let left: u64 = missing.iter().map(|file| file.length).sum();
        self.make_room(left, &missing)?;
        let mut bringing = Bringing {
            fetch: self,
            release: release.digest,
            pieces: pieces(&document),
            stage: &stage,
            done: total - left,
            total,
        };
        bringing.files(missing, &installed)?;
        Ok(self.disk.install(release, bytes)?)
    }

    /// A file is whole: neighbours may have it.
    pub(super) fn show(&self, file: &ReleaseFile, path: &Path) {
        if let Some(swarm) = self.swarm {
            swarm.put_file(path, file);
        }
    }

    /// Takes a file over from another release, if it is there and whole.
    fn take(
        &self,
        file: &ReleaseFile,
        from: Option<&PathBuf>,
        to: &Path,
    ) -> Result<bool, UpdateError> {
        let Some(mut source) = from.and_then(|path| File::open(path).ok()) else {
            return Ok(false);
        };
        let mut found = None;
        write(to, |to| {
            found = Some(copy(&mut source, file.length, to)?);
            Ok(())
        })?;
        Ok(found == Some(file.sha256))
    }

    fn make_room(&self, left: u64, missing: &[&ReleaseFile]) -> Result<(), UpdateError> {
        // Beside each file its chunks, until it is whole.
        let largest = missing.iter().map(|file| file.length).max().unwrap_or(0);
        let largest = largest.max(left.min(BATCH_BYTES));
        let needed = left + largest + RESERVE_BYTES;
        let free = self.disk.free()?;
        if left == 0 || free >= needed {
            return Ok(());
        }
        let (needed, free) = (needed.div_ceil(1 << 20), free >> 20);
        Err(UpdateError::Room { needed, free })
    }

    /// Models that are here, the one that runs first.
    pub(super) fn candidates<'b>(
        &self,
        installed: &'b [Installed],
    ) -> impl Iterator<Item = (&'b ReleaseFile, PathBuf)> + use<'b> {
        let mut all: Vec<_> = installed
            .iter()
            .filter_map(|release| {
                let file = release.document.files.iter().find(|f| f.path == MODEL)?;
                Some((release.digest, file, release.folder.join(MODEL)))
            })
            .collect();
        all.sort_by_key(|(digest, ..)| Some(*digest) != self.current);
        all.dedup_by_key(|(_, file, _)| file.sha256);
        all.into_iter()
            .take(MAX_DELTAS)
            .map(|(_, file, path)| (file, path))
    }

    pub(super) fn watch(&self) -> Result<(), UpdateError> {
        if self.watchful.is_overtaken() {
            return Err(UpdateError::Overtaken);
        }
        Ok(())
    }
}

/// Where each file that is here lies, by its digest.
fn places(installed: &[Installed]) -> BTreeMap<Digest, PathBuf> {
    let of = |release: &Installed| {
        let folder = release.folder.clone();
        let files = release.document.files.clone();
        files
            .into_iter()
            .map(move |file| (file.sha256, folder.join(file.path)))
    };
    installed.iter().flat_map(of).collect()
}

#[cfg(test)]
#[path = "fetch_tests.rs"]
pub(super) mod tests;

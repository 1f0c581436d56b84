//! Brings a release to the disk: what is there already stays, what is alike comes as a difference, the rest in chunks.
//!
//! Nothing is believed because of where it lies or who sent it. The document is the one whose digest is wished for and
//! that the registry has signed; each file is the one whose digest is in the document.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
};

use mesh_core::{Digest, Failure, Reason, Release, Settings};
use models::{
    ReleaseDocument, ReleaseFile,
    chunks::{Assembly, listed},
    delta::{self, DeltaError, Wanted},
    digest_of,
};

use super::{
    client::Client,
    disk::{DOCUMENT, Disk, Installed, Stage, copy, is_file, write},
    error::UpdateError,
    registry::{Registry, Source},
    worker::Watchful,
};
use crate::{config::Config, counters::Counters, identity::Tls};

/// Left free for readings: the outbox writes on while a model comes.
const RESERVE_BYTES: u64 = 32 << 20;
/// The file that changes little from one version to the next and is most of a release.
const MODEL: &str = "model.onnx";
/// Deltas that are asked for: from the model that runs, the one before, and the factory's.
const MAX_DELTAS: usize = 3;

/// The document of a release, as the registry has signed it, now.
pub(super) fn document(
    release: &Release,
    pinned: &[u8],
    disk: &Disk,
    source: impl Source + 'static,
    now_ms: i64,
) -> Result<Vec<u8>, UpdateError> {
    let mut registry = Registry::new(pinned, disk.registry(), source)?;
    let bytes = alone()?.block_on(async {
        registry.refresh(now_ms).await?;
        let (name, version) = (&release.name, &release.version);
        registry.release(name, version, now_ms).await
    })?;
    if digest_of(&bytes) == release.digest {
        Ok(bytes)
    } else {
        Err(UpdateError::Other(release.clone()))
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
fn alone() -> Result<tokio::runtime::Runtime, UpdateError> {
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
    /// The model that runs: the best beginning of a delta.
    pub(super) current: Option<Digest>,
    /// Deltas have failed on this line before.
    pub(super) without_delta: bool,
}

impl Fetch<'_> {
    /// Brings all files of a release, and gives it its place. What came stays if this fails, for the next time.
    pub(super) fn run(&self, release: &Release, bytes: &[u8]) -> Result<(), UpdateError> {
        let document = parse(release, bytes)?;
        if self.disk.is_factory(release) || self.is_whole(release, &document) {
            return Ok(());
        }
        let stage = self.disk.stage(release);
        stage.prepare()?;
        let installed = self.disk.installed();
        let here = places(&installed);
        let (mut missing, mut total) = (Vec::new(), 0);
        for file in &document.files {
            self.watch()?;
            total += file.length;
            let to = stage.file(&file.path)?;
            let is_here = is_file(&to, file.length, file.sha256).unwrap_or(false);
            if !is_here && !self.take(file, here.get(&file.sha256), &to)? {
                missing.push(file);
            }
        }
        let left: u64 = missing.iter().map(|file| file.length).sum();
        self.make_room(left, &missing)?;
        let mut done = total - left;
        for file in missing {
            self.bring(file, &stage, &installed, (done, total))?;
            done += file.length;
            self.watchful.progress(done, total);
        }
        Ok(self.disk.install(release, bytes)?)
    }

    /// Is it all there already?
    fn is_whole(&self, release: &Release, document: &ReleaseDocument) -> bool {
        let folder = self.disk.folder(release);
        let whole = |file: &ReleaseFile| {
            is_file(&folder.join(&file.path), file.length, file.sha256).unwrap_or(false)
        };
        folder.join(DOCUMENT).is_file() && document.files.iter().all(whole)
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
        let needed = left + largest + RESERVE_BYTES;
        let free = self.disk.free()?;
        if left == 0 || free >= needed {
            return Ok(());
        }
        let (needed, free) = (needed.div_ceil(1 << 20), free >> 20);
        Err(UpdateError::Room { needed, free })
    }

    /// Brings one file: as a difference if there is one, else in chunks.
    fn bring(
        &self,
        file: &ReleaseFile,
        stage: &Stage,
        installed: &[Installed],
        (done, total): (u64, u64),
    ) -> Result<(), UpdateError> {
        let to = stage.file(&file.path)?;
        let chunks = listed(file.length, &file.chunks).unwrap_or_default();
        let mut assembly = Assembly::new(chunks);
        assembly.resume(&stage.chunks())?;
        let wanted = Wanted {
            length: file.length,
            sha256: file.sha256,
        };
        if file.path == MODEL && !self.without_delta && !assembly.is_complete() {
            for old in self.candidates(installed) {
                if self.by_delta(old, &wanted, &to)? {
                    return Ok(stage.drop_chunks()?);
                }
            }
        }
        let missing: Vec<_> = assembly.missing().collect();
        let mut there = file.length
            - missing
                .iter()
                .map(|c| c.length as u64)
                .sum::<u64>()
                .min(file.length);
        for chunk in missing {
            self.watch()?;
            let bytes = self.client.chunk(&chunk)?;
            assembly.accept(chunk.sha256, &bytes)?;
            stage.keep(chunk.sha256, &bytes)?;
            there += chunk.length as u64;
            self.watchful.progress(done + there, total);
        }
        let mut trouble = None;
        let written = write(&to, |to| {
            assembly.write(&stage.chunks(), to).map_err(|error| {
                let words = error.to_string();
                trouble = Some(error);
                io::Error::other(words)
            })
        });
        if let Some(error) = trouble {
            return Err(error.into());
        }
        written?;
        if !is_file(&to, file.length, file.sha256).unwrap_or(false) {
            let path = &file.path;
            return Err(UpdateError::Bytes(format!(
                "{path} is not what its chunks should make"
            )));
        }
        Ok(stage.drop_chunks()?)
    }

    /// Models that are here, the one that runs first.
    fn candidates<'b>(
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

    /// Makes the file from an old one; false if there is no delta, or none that works.
    fn by_delta(
        &self,
        (old, path): (&ReleaseFile, PathBuf),
        wanted: &Wanted,
        file: &Path,
    ) -> Result<bool, UpdateError> {
        self.watch()?;
        let (from, to) = (old.sha256, wanted.sha256);
        let delta = self.client.delta(from, to, wanted.length, self.watchful)?;
        let (Some(delta), Ok(mut old)) = (delta, File::open(&path)) else {
            return Ok(false);
        };
        let mut trouble = None;
        let written = write(file, |to| {
            let mut to = BufWriter::new(to);
            let applied = delta::apply(&mut old, BufReader::new(delta), wanted, &mut to);
            match applied.and_then(|()| to.flush().map_err(DeltaError::Write)) {
                Ok(()) => Ok(()),
                // A full disk is for whoever writes the file to tell.
                Err(DeltaError::Write(error)) => Err(error),
                Err(error) => {
                    let words = error.to_string();
                    trouble = Some(error);
                    Err(io::Error::other(words))
                }
            }
        });
        match trouble {
            None => Ok(written.map(|()| true)?),
            Some(DeltaError::Read(error)) => {
                self.watch()?;
                Err(UpdateError::Answer {
                    what: format!("delta to {}", wanted.sha256),
                    why: error.to_string(),
                })
            }
            Some(error) => {
                tracing::warn!(%error, "a delta is of no use; the file comes whole");
                Ok(false)
            }
        }
    }

    fn watch(&self) -> Result<(), UpdateError> {
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
mod tests;

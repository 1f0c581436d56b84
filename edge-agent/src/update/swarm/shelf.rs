//! What this device has for its neighbours, and where it lies.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_core::Digest;
use models::{
    ReleaseDocument, ReleaseFile,
    chunks::{Chunk, listed},
};
use tokio::sync::watch;

use super::{
    papers,
    wire::{DeltaState, Look, Said},
};
use crate::update::disk::Disk;

/// What neighbours are told by presence: everything else they ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holding {
    /// Releases that are whole.
    pub(crate) holds: Vec<Digest>,
    /// The release that is being fetched.
    pub(crate) fetching: Option<Digest>,
}

/// Where the bytes of a chunk are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) path: Arc<Path>,
    pub(super) offset: u64,
    pub(super) length: usize,
}

#[derive(Debug, Default)]
struct State {
    places: HashMap<Digest, Place>,
    /// The pieces of each release that is here or on the way.
    releases: HashMap<Digest, Arc<[Digest]>>,
    /// Does this device reach the coordinator, as far as its fetch knows? Until it knows, it says so: the others are not to begin
    /// without one that is only slower, and change their minds when it comes.
    uplink: bool,
    delta: Option<((Digest, Digest), DeltaState)>,
    /// Where the delta is, when it is here.
    delta_path: PathBuf,
    papers_path: PathBuf,
}

/// Shared between what fetches and what serves.
#[derive(Debug)]
pub(super) struct Shelf {
    state: Mutex<State>,
    tell: watch::Sender<Holding>,
}

/// The pieces of a release: each of its chunks once, in the order of the document.
pub(in crate::update) fn pieces(document: &ReleaseDocument) -> Vec<Digest> {
    let mut seen = BTreeSet::new();
    let all = document.files.iter().flat_map(|file| &file.chunks);
    all.filter(|name| seen.insert(**name)).copied().collect()
}

impl Shelf {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            tell: watch::Sender::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn holding(&self) -> watch::Receiver<Holding> {
        self.tell.subscribe()
    }

    /// Looks over the disk: models have come or gone.
    pub(super) fn refresh(&self, disk: &Disk) {
        let holds = self.look_over(disk);
        self.change(|holding| holding.holds = holds);
    }

    /// The releases that are whole.
    fn look_over(&self, disk: &Disk) -> Vec<Digest> {
        let installed = disk.installed();
        let mut holds = Vec::new();
        let mut state = self.state();
        state.places.clear();
        state.releases.clear();
        state.delta_path = disk.delta();
        state.papers_path = papers::path(disk);
        for release in &installed {
            let pieces = pieces(&release.document);
            state.releases.insert(release.digest, pieces.into());
            for file in &release.document.files {
                put_file(&mut state, &release.folder.join(&file.path), file);
            }
            holds.push(release.digest);
        }
        holds
    }

    /// A fetch begins.
    pub(super) fn begin(&self, release: Digest) {
        let mut state = self.state();
        state.uplink = true;
        state.delta = None;
        drop(state);
        self.change(|holding| holding.fetching = Some(release));
    }

    /// … and is over, well or not. What is whole now is said in the same breath: a device that says neither is left by those
    /// that still fetch, and they would bring over the uplink what it has.
    pub(super) fn end(&self, disk: &Disk) {
        let holds = self.look_over(disk);
        self.change(|holding| {
            *holding = Holding {
                holds,
                fetching: None,
            };
        });
    }

    fn change(&self, with: impl FnOnce(&mut Holding)) {
        self.tell.send_if_modified(|holding| {
            let before = holding.clone();
            with(holding);
            *holding != before
        });
    }

    /// The pieces of the release that is being fetched are known.
    pub(super) fn describe(&self, release: Digest, pieces: &[Digest]) {
        self.state().releases.insert(release, pieces.into());
    }

    /// A chunk lies in a file of its own, and is what its name says.
    pub(super) fn put(&self, chunk: Chunk, path: PathBuf) {
        let place = Place {
            path: path.into(),
            offset: 0,
            length: chunk.length,
        };
        self.state().places.insert(chunk.sha256, place);
    }

    /// A file is whole.
    pub(super) fn put_file(&self, path: &Path, file: &ReleaseFile) {
        put_file(&mut self.state(), path, file);
    }

    pub(super) fn set_uplink(&self, uplink: bool) {
        self.state().uplink = uplink;
    }

    /// How it is with the delta between two files.
    pub(super) fn set_delta(&self, between: (Digest, Digest), how: DeltaState) {
        self.state().delta = Some((between, how));
    }

    /// Answers a neighbour.
    pub(super) fn offer(&self, look: &Look) -> Said {
        let fetching = self.tell.borrow().fetching;
        let state = self.state();
        let pieces = state.releases.get(&look.release);
        let has = |name: &Digest| state.places.contains_key(name);
        let fetches = fetching == Some(look.release);
        let delta = state
            .delta
            .filter(|(between, _)| Some(*between) == look.delta);
        Said {
            fetches,
            uplink: fetches && state.uplink,
            delta: delta.map(|(_, how)| how).unwrap_or_default(),
            has: pieces.map_or_else(Vec::new, |all| all.iter().map(has).collect()),
        }
    }

    pub(super) fn place(&self, chunk: &Digest) -> Option<Place> {
        self.state().places.get(chunk).cloned()
    }

    /// A chunk is not what it was.
    pub(super) fn forget(&self, chunk: &Digest) {
        self.state().places.remove(chunk);
    }

    /// Where the delta between two files lies, if it is here.
    pub(super) fn delta(&self, between: (Digest, Digest)) -> Option<PathBuf> {
        let state = self.state();
        (state.delta == Some((between, DeltaState::Here))).then(|| state.delta_path.clone())
    }

    pub(super) fn papers(&self) -> PathBuf {
        self.state().papers_path.clone()
    }
}

fn put_file(state: &mut State, path: &Path, file: &ReleaseFile) {
    let path: Arc<Path> = path.into();
    let mut offset = 0;
    for chunk in listed(file.length, &file.chunks).unwrap_or_default() {
        let place = Place {
            path: Arc::clone(&path),
            offset,
            length: chunk.length,
        };
        state.places.insert(chunk.sha256, place);
        offset += chunk.length as u64;
    }
}

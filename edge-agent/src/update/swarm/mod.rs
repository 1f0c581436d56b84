//! Models by swarm: what one device of a site has fetched, the others have from it.
//!
//! ```text
//!                      mesh_core::swarm: which piece from whom
//!                                │
//!   coordinator ══chunks══>   `bring` (on the worker's thread) <══chunks══ neighbours' `serve`
//!                                │ hashed, on the disk
//!                                ▼
//!                             `shelf` ──> `serve` (on the mesh's thread) ══chunks══> neighbours
//!                                │
//!                                └──> presence: what is whole, what is being fetched
//! ```
//!
//! It changes who carries bytes, never which bytes are taken: what proves a release is the same, whoever brought it.

mod ask;
mod bring;
pub(crate) mod fuzzed;
mod load;
mod papers;
mod serve;
mod shelf;
#[cfg(test)]
mod tests;
mod wire;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mesh_core::{
    Digest,
    roster::Peer,
    swarm::{Fault, SETTLE_MS, Standing, first},
};
use models::{ReleaseDocument, ReleaseFile, chunks::Chunk};
use tokio::sync::watch;

use self::{ask::Asking, shelf::Shelf, wire::Want};
use super::disk::{Disk, Stage};
use crate::{
    clock::Monotonic,
    counters::Counters,
    mesh::{Service, Site},
};

pub(super) use bring::{With, bring};
pub(super) use load::{Chunks, Delta};
pub(super) use papers::{Copied, Papers};
pub(crate) use shelf::Holding;
pub(super) use shelf::pieces;
pub(super) use wire::DeltaState;

/// Of those that fetch the same so many look at each other: the same ones for everybody, so that all come to the same.
const CIRCLE: usize = 32;
/// Of those that have it, each looks at so many, others than the next one.
const HOLDERS: usize = 8;
/// Neighbours that are asked for what proves a release.
const WITNESSES: usize = 4;
/// Between two looks at a neighbour …
const PAUSE: Duration = Duration::from_millis(250);
/// … and so much more for each that is looked at: a device looks thirty times in a second.
const PAUSE_EACH: Duration = Duration::from_millis(25);

fn pause(circle: usize) -> Duration {
    PAUSE + PAUSE_EACH * u32::try_from(circle).unwrap_or(u32::MAX)
}

/// The device's part in it. Copies are the same.
#[derive(Clone)]
pub(crate) struct Swarm {
    me: Peer,
    asking: Asking,
    shelf: Arc<Shelf>,
    standing: Arc<Mutex<Standing>>,
    clock: Monotonic,
    /// When the fetch began, if others were there to hear of it.
    begun_ms: Arc<Mutex<Option<u64>>>,
}

/// A fetch that neighbours know of, until it is dropped.
pub(super) struct Fetching<'a>(&'a Swarm, &'a Disk);

impl Drop for Fetching<'_> {
    fn drop(&mut self) {
        self.0.shelf.end(self.1);
    }
}

impl Swarm {
    /// `me` is the device among its neighbours.
    pub(crate) fn new(me: Peer, site: Site, counters: Counters) -> Self {
        Self {
            me,
            asking: Asking { site, counters },
            shelf: Arc::new(Shelf::new()),
            standing: Arc::default(),
            clock: Monotonic::start(),
            begun_ms: Arc::default(),
        }
    }

    /// What neighbours may ask for.
    pub(crate) fn services(&self, kib_per_s: u32) -> Vec<Service> {
        serve::services(&self.shelf, &self.asking.counters, kib_per_s)
    }

    /// What neighbours are to be told.
    pub(crate) fn holding(&self) -> watch::Receiver<Holding> {
        self.shelf.holding()
    }

    const fn me(&self) -> Peer {
        self.me
    }

    const fn clock(&self) -> Monotonic {
        self.clock
    }

    fn asking(&self) -> Asking {
        self.asking.clone()
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begun_ms(&self) -> MutexGuard<'_, Option<u64>> {
        self.begun_ms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Models have come to the disk or gone from it.
    pub(super) fn refresh(&self, disk: &Disk) {
        self.shelf.refresh(disk);
    }

    /// Tells the neighbours that this release is being fetched now, to this disk.
    pub(super) fn begin<'a>(&'a self, release: Digest, disk: &'a Disk) -> Fetching<'a> {
        let is_alone = self.asking.site.present().is_empty();
        *self.begun_ms() = (!is_alone).then(|| self.clock.now_ms());
        self.shelf.begin(release);
        Fetching(self, disk)
    }

    /// The coordinator is not asked for pieces before: with nobody there, there is nothing to wait for.
    fn settled_ms(&self) -> u64 {
        self.begun_ms().map_or(0, |begun_ms| begun_ms + SETTLE_MS)
    }

    /// What the release consists of.
    pub(super) fn describe(&self, release: Digest, document: &ReleaseDocument) {
        self.shelf.describe(release, &pieces(document));
    }

    /// A chunk lies in the stage.
    pub(super) fn put(&self, chunk: Chunk, stage: &Stage) {
        let path = stage.chunks().join(chunk.sha256.to_string());
        self.shelf.put(chunk, path);
    }

    /// A file lies in the stage, whole.
    pub(super) fn put_file(&self, path: &std::path::Path, file: &ReleaseFile) {
        self.shelf.put_file(path, file);
    }

    /// How it is with a delta.
    pub(super) fn set_delta(&self, between: (Digest, Digest), how: DeltaState) {
        self.shelf.set_delta(between, how);
    }

    /// Those that are looked at for a release.
    fn circle(&self, release: Digest, now_ms: u64) -> Vec<Peer> {
        let present = self.asking.site.present();
        let standing = self.standing();
        let good: Vec<_> = present
            .iter()
            .filter(|n| n.peer != self.me && standing.is_good(&n.peer, now_ms))
            .collect();
        let of = |all: &dyn Fn(&crate::mesh::Neighbour) -> bool| {
            let some = good.iter().filter(|n| all(n)).map(|n| n.peer);
            some.collect::<Vec<_>>()
        };
        let fetch = of(&|n| n.presence.fetching.contains(&release)).into_iter();
        let hold = of(&|n| n.presence.holds.contains(&release)).into_iter();
        let mut circle = first(&release, fetch, CIRCLE);
        circle.extend(first(&self.me, hold, HOLDERS));
        circle.sort_unstable();
        circle.dedup();
        circle
    }

    /// Does a neighbour say that it has the whole release?
    pub(super) fn is_in_the_site(&self, release: Digest) -> bool {
        let present = self.asking.site.present();
        let (standing, now_ms) = (self.standing(), self.clock.now_ms());
        let mut good = present.iter().filter(|n| standing.is_good(&n.peer, now_ms));
        good.any(|n| n.presence.holds.contains(&release))
    }

    /// A neighbour has served other bytes than it was asked for.
    pub(super) fn bad(&self, peer: Peer) {
        self.strike(peer, "it has served wrong bytes");
    }

    /// A neighbour has said that there is nothing where there is something.
    fn lied(&self, peer: Peer) {
        self.strike(peer, "it says that there is no delta, and there is one");
    }

    fn strike(&self, peer: Peer, why: &str) {
        if self.standing().bad(peer, self.clock.now_ms()) {
            self.asking.counters.bans.add(1);
            tracing::warn!(%peer, why, "a neighbour does it for the third time, and is not asked any more");
        } else {
            tracing::warn!(%peer, why, "a neighbour is left for a while");
        }
    }

    /// Keeps what proves a release, for neighbours that do not reach the coordinator.
    pub(super) fn keep_papers(&self, disk: &Disk, release: Digest, papers: &Papers) {
        if let Err(why) = papers.keep(disk, release) {
            tracing::debug!("what proves {release} is not kept for neighbours: {why}");
        }
    }

    /// Asks neighbours that have a release for what proves it, one after the other, until `is_enough`. Inside a runtime.
    pub(super) async fn papers(
        &self,
        release: Digest,
        mut is_enough: impl AsyncFnMut(Papers) -> bool,
    ) {
        let now_ms = self.clock.now_ms();
        let all = first(
            &self.me,
            self.circle(release, now_ms).into_iter(),
            WITNESSES,
        );
        for peer in all {
            let want = Want::Papers(release);
            let asked = self.asking.at_most(peer, want, papers::MAX_BYTES).await;
            match asked.map(|bytes| Papers::parse(release, &bytes)) {
                Ok(Some(papers)) => {
                    if is_enough(papers).await {
                        return;
                    }
                }
                Ok(None) | Err(Fault::Bad) => self.bad(peer),
                Err(why) => tracing::debug!(%peer, ?why, "a neighbour gives no papers"),
            }
        }
    }
}

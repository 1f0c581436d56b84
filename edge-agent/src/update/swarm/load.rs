//! What can be brought by swarm: the chunks of some files, or a delta.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use libp2p::futures::future::BoxFuture;
use mesh_core::{
    Digest,
    roster::Peer,
    swarm::{Fault, Offer, PATIENCE_MS, Source},
};
use models::{
    chunks::{Assembly, Chunk},
    digest_of,
};

use super::{
    Swarm,
    ask::Asking,
    wire::{DeltaState, Said, Want},
};
use crate::update::{
    client::Client,
    disk::{Stage, copy, write},
    error::UpdateError,
    worker::Watchful,
};

/// The coordinator makes a delta when it is first asked for: that takes longer than a chunk.
const DELTA_PATIENCE_MS: u64 = 60_000;

/// How an attempt ended that was no success.
#[derive(Debug)]
pub(super) enum Trouble {
    Neighbour(Fault),
    Coordinator(UpdateError),
}

/// A question to the coordinator: is there such a thing?
pub(super) type Check = Box<dyn FnOnce() -> Result<bool, UpdateError> + Send>;

/// What is brought, in pieces.
pub(in crate::update) trait Load {
    /// The name of each piece.
    fn names(&self) -> Vec<Digest>;
    /// A neighbour that brings nothing for so long is waited for no longer.
    fn patience_ms(&self) -> u64;
    /// What a neighbour's words mean for these pieces.
    fn offer(&self, said: &Said) -> Offer;
    /// The delta that neighbours are asked about.
    fn delta(&self) -> Option<(Digest, Digest)>;
    /// A piece from a neighbour.
    fn of_neighbour(
        &self,
        piece: usize,
        peer: Peer,
        asking: Asking,
    ) -> BoxFuture<'static, Result<Vec<u8>, Fault>>;
    /// A piece from the coordinator. Blocks.
    fn of_coordinator(
        &self,
        piece: usize,
        client: &Client,
        watchful: &Watchful,
    ) -> Box<dyn FnOnce() -> Result<Vec<u8>, UpdateError> + Send>;
    /// Asks whether the coordinator has what a neighbour says is nowhere, and takes nothing of it; nothing where there is nothing
    /// to ask. Blocks.
    fn is_there(&self, _: &Client, _: &Watchful) -> Option<Check> {
        None
    }
    /// Takes a piece in if it is what it should be.
    fn take(&mut self, piece: usize, from: Source, bytes: &[u8]) -> Result<(), UpdateError>;
}

/// The chunks of some files of a release.
pub(in crate::update) struct Chunks<'a> {
    /// Those that are missing, and the number of each in the release.
    missing: Vec<(Chunk, usize)>,
    assembly: &'a mut Assembly,
    stage: &'a Stage,
    swarm: Option<&'a Swarm>,
    progress: &'a mut dyn FnMut(u64),
}

impl<'a> Chunks<'a> {
    /// What `assembly` misses; `pieces` is the whole release.
    pub(in crate::update) fn new(
        assembly: &'a mut Assembly,
        pieces: &[Digest],
        stage: &'a Stage,
        swarm: Option<&'a Swarm>,
        progress: &'a mut dyn FnMut(u64),
    ) -> Self {
        let numbers: BTreeMap<_, _> = pieces.iter().zip(0..).collect();
        let missing = assembly.missing();
        let numbered = missing.map(|chunk| {
            let number = numbers.get(&chunk.sha256).copied();
            (chunk, number.unwrap_or(usize::MAX))
        });
        Self {
            missing: numbered.collect(),
            assembly,
            stage,
            swarm,
            progress,
        }
    }

    fn chunk(&self, piece: usize) -> Chunk {
        let nothing = Chunk {
            sha256: Digest([0; 32]),
            length: 0,
        };
        self.missing.get(piece).map_or(nothing, |(chunk, _)| *chunk)
    }
}

impl Load for Chunks<'_> {
    fn names(&self) -> Vec<Digest> {
        self.missing.iter().map(|(chunk, _)| chunk.sha256).collect()
    }

    fn patience_ms(&self) -> u64 {
        PATIENCE_MS
    }

    fn offer(&self, said: &Said) -> Offer {
        let has = |(_, number): &(Chunk, usize)| said.has.get(*number).copied().unwrap_or(false);
        Offer {
            has: self.missing.iter().map(has).collect(),
            fetches: said.fetches,
            uplink: said.uplink,
        }
    }

    fn delta(&self) -> Option<(Digest, Digest)> {
        None
    }

    fn of_neighbour(
        &self,
        piece: usize,
        peer: Peer,
        asking: Asking,
    ) -> BoxFuture<'static, Result<Vec<u8>, Fault>> {
        let chunk = self.chunk(piece);
        // What came is looked at when it is taken in.
        Box::pin(async move {
            let want = Want::Chunk(chunk.sha256);
            asking.exactly(peer, want, chunk.length).await
        })
    }

    fn of_coordinator(
        &self,
        piece: usize,
        client: &Client,
        _: &Watchful,
    ) -> Box<dyn FnOnce() -> Result<Vec<u8>, UpdateError> + Send> {
        let (chunk, client) = (self.chunk(piece), client.clone());
        Box::new(move || client.chunk(&chunk))
    }

    fn take(&mut self, piece: usize, _: Source, bytes: &[u8]) -> Result<(), UpdateError> {
        let chunk = self.chunk(piece);
        self.assembly.accept(chunk.sha256, bytes)?;
        self.stage.keep(chunk.sha256, bytes)?;
        if let Some(swarm) = self.swarm {
            swarm.put(chunk, self.stage);
        }
        (self.progress)(chunk.length as u64);
        Ok(())
    }
}

/// A delta from one file to another: one piece, that nobody can check before it is used.
pub(in crate::update) struct Delta {
    pub(in crate::update) from: Digest,
    pub(in crate::update) to: Digest,
    /// Bytes of the new file: a longer delta is of no use.
    pub(in crate::update) most: u64,
    /// Is it left when no neighbour has it? The whole file is in the site then, and costs the uplink nothing.
    pub(in crate::update) of_neighbours_only: bool,
    /// Where it goes.
    pub(in crate::update) path: Arc<Path>,
    /// Who brought it.
    pub(in crate::update) source: Option<Source>,
}

impl Load for Delta {
    fn names(&self) -> Vec<Digest> {
        vec![digest_of(&[self.from.0, self.to.0].concat())]
    }

    fn patience_ms(&self) -> u64 {
        DELTA_PATIENCE_MS
    }

    fn offer(&self, said: &Said) -> Offer {
        Offer {
            has: vec![said.delta == DeltaState::Here],
            fetches: said.delta == DeltaState::Coming,
            uplink: said.uplink,
        }
    }

    fn delta(&self) -> Option<(Digest, Digest)> {
        Some((self.from, self.to))
    }

    fn of_neighbour(
        &self,
        _: usize,
        peer: Peer,
        asking: Asking,
    ) -> BoxFuture<'static, Result<Vec<u8>, Fault>> {
        let (want, most) = (Want::Delta(self.from, self.to), self.most);
        let path = Arc::clone(&self.path);
        Box::pin(async move {
            asking.to_file(peer, want, most, &path).await?;
            Ok(Vec::new())
        })
    }

    fn of_coordinator(
        &self,
        _: usize,
        client: &Client,
        watchful: &Watchful,
    ) -> Box<dyn FnOnce() -> Result<Vec<u8>, UpdateError> + Send> {
        if self.of_neighbours_only {
            return Box::new(|| Err(UpdateError::NoDelta));
        }
        let (from, to, most) = (self.from, self.to, self.most);
        let (path, client, watchful) =
            (PathBuf::from(&*self.path), client.clone(), watchful.clone());
        Box::new(move || {
            let delta = client.delta(from, to, most, &watchful)?;
            let mut delta = delta.ok_or(UpdateError::NoDelta)?;
            let mut trouble = None;
            let written = write(&path, |file| {
                // Reading is the coordinator's matter, writing the disk's.
                let mut told = Told(&mut delta, &mut trouble);
                copy(&mut told, most, file).map(|_| ())
            });
            match trouble {
                Some(why) => Err(UpdateError::Answer {
                    what: format!("delta to {to}"),
                    why,
                }),
                None => Ok(written.map(|()| Vec::new())?),
            }
        })
    }

    fn is_there(&self, client: &Client, watchful: &Watchful) -> Option<Check> {
        // It would not be fetched from there in any case.
        if self.of_neighbours_only {
            return None;
        }
        let (from, to, most) = (self.from, self.to, self.most);
        let (client, watchful) = (client.clone(), watchful.clone());
        // Nothing is read of what the answer holds: the connection is closed upon it.
        Some(Box::new(move || {
            let delta = client.delta(from, to, most, &watchful)?;
            Ok(delta.is_some())
        }))
    }

    fn take(&mut self, _: usize, source: Source, _: &[u8]) -> Result<(), UpdateError> {
        self.source = Some(source);
        Ok(())
    }
}

/// Remembers what reading said when it failed.
struct Told<'a, R>(&'a mut R, &'a mut Option<String>);

impl<R: std::io::Read> std::io::Read for Told<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let read = self.0.read(bytes);
        if let Err(error) = &read {
            *self.1 = Some(error.to_string());
        }
        read
    }
}

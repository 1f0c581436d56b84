//! Asking neighbours: what they have, and for it.

use std::{path::Path, time::Duration};

use libp2p::{
    Stream,
    futures::{AsyncReadExt, AsyncWriteExt},
};
use mesh_core::{roster::Peer, swarm::Fault};
use tokio::{
    io::AsyncWriteExt as _,
    sync::mpsc,
    time::{sleep, timeout},
};

use super::wire::{CHUNKS, Look, OFFERS, Said, Want};
use crate::{counters::Counters, mesh::Site};

/// An answer of some bytes.
const ANSWER: Duration = Duration::from_secs(10);
/// A chunk, from a neighbour that serves sixteen at its pace.
const CHUNK: Duration = Duration::from_secs(20);
/// Something larger takes this at most, and for each byte …
const LARGE: Duration = Duration::from_secs(30);
/// … as long as at so many bytes a second.
const LARGE_BYTES_PER_S: u64 = 100_000;
/// Looks at a neighbour that fail one after the other until it counts as gone: connections that two make at the same time
/// end, and begin again.
const FAILURES: u32 = 4;
/// Before it is looked at again.
const AGAIN: Duration = Duration::from_millis(500);
/// Read at once.
const BLOCK_BYTES: usize = 64 * 1024;

/// What looking at neighbours brings.
#[derive(Debug)]
pub(super) enum Heard {
    Said(Peer, Said),
    /// It does not answer.
    Lost(Peer),
}

/// Looks at a neighbour again and again, `pause` apart, until whoever wants to know does not any more.
pub(super) async fn look(
    site: Site,
    peer: Peer,
    look: Look,
    pause: Duration,
    tell: mpsc::Sender<Heard>,
) {
    let mut failures = 0;
    loop {
        if let Ok(mut stream) = site.open(peer, OFFERS).await {
            while let Ok(Ok(said)) = timeout(ANSWER, once(&mut stream, &look)).await {
                failures = 0;
                if tell.send(Heard::Said(peer, said)).await.is_err() {
                    return;
                }
                sleep(pause).await;
            }
        }
        failures += 1;
        if failures >= FAILURES && tell.send(Heard::Lost(peer)).await.is_err() {
            return;
        }
        sleep(AGAIN).await;
    }
}

async fn once(stream: &mut Stream, look: &Look) -> std::io::Result<Said> {
    stream.write_all(&look.to_bytes()).await?;
    stream.flush().await?;
    Said::read(stream).await
}

/// Something from a neighbour.
#[derive(Clone, Debug)]
pub(in crate::update) struct Asking {
    pub(super) site: Site,
    pub(super) counters: Counters,
}

impl Asking {
    /// Something of exactly `length` bytes.
    pub(super) async fn exactly(
        &self,
        peer: Peer,
        want: Want,
        length: usize,
    ) -> Result<Vec<u8>, Fault> {
        let bytes = timeout(CHUNK, self.small(peer, want, length));
        let bytes = bytes.await.map_err(|_| Fault::Silent)??;
        match bytes.len() == length {
            true => Ok(bytes),
            false => Err(Fault::Bad),
        }
    }

    /// Something of at most `most` bytes, into the memory.
    pub(super) async fn at_most(
        &self,
        peer: Peer,
        want: Want,
        most: usize,
    ) -> Result<Vec<u8>, Fault> {
        let bytes = timeout(patience(most as u64), self.small(peer, want, most));
        bytes.await.map_err(|_| Fault::Silent)?
    }

    async fn small(&self, peer: Peer, want: Want, most: usize) -> Result<Vec<u8>, Fault> {
        let (mut stream, length) = self.ask(peer, want, most as u64).await?;
        let mut bytes = Vec::new();
        // What is announced is not believed before it is there.
        let mut left = usize::try_from(length).map_err(|_| Fault::Bad)?;
        while left > 0 {
            let at = bytes.len();
            bytes.resize(at + left.min(BLOCK_BYTES), 0);
            let block = bytes.get_mut(at..).unwrap_or_default();
            stream.read_exact(block).await.map_err(|_| Fault::Busy)?;
            self.counters.swarm_bytes.add(block.len() as u64);
            left -= block.len();
        }
        Ok(bytes)
    }

    /// Something of at most `most` bytes, into a file.
    pub(super) async fn to_file(
        &self,
        peer: Peer,
        want: Want,
        most: u64,
        to: &Path,
    ) -> Result<(), Fault> {
        let copied = timeout(patience(most), async {
            let (mut stream, mut left) = self.ask(peer, want, most).await?;
            let file = tokio::fs::File::create(to).await;
            let mut file = file.map_err(|_| Fault::Missing)?;
            let mut block = vec![0; BLOCK_BYTES];
            while left > 0 {
                let n = BLOCK_BYTES.min(usize::try_from(left).unwrap_or(BLOCK_BYTES));
                let part = block.get_mut(..n).unwrap_or_default();
                stream.read_exact(part).await.map_err(|_| Fault::Busy)?;
                self.counters.swarm_bytes.add(n as u64);
                // It is not this neighbour's fault, but another way takes less room.
                file.write_all(part).await.map_err(|_| Fault::Missing)?;
                left -= n as u64;
            }
            file.flush().await.map_err(|_| Fault::Missing)
        });
        copied.await.map_err(|_| Fault::Silent)?
    }

    /// Asks, and reads how long the answer is.
    async fn ask(&self, peer: Peer, want: Want, most: u64) -> Result<(Stream, u64), Fault> {
        let opened = self.site.open(peer, CHUNKS).await;
        let mut stream = opened.map_err(|error| {
            tracing::debug!("{error}");
            Fault::Busy
        })?;
        let mut length = [0; 4];
        let asked = async {
            stream.write_all(&want.to_bytes()).await?;
            stream.flush().await?;
            // The end of the stream instead: it serves too many.
            stream.read_exact(&mut length).await
        };
        asked.await.map_err(|_| Fault::Busy)?;
        match u64::from(u32::from_be_bytes(length)) {
            0 => Err(Fault::Missing),
            length if length > most => Err(Fault::Bad),
            length => Ok((stream, length)),
        }
    }
}

fn patience(bytes: u64) -> Duration {
    LARGE + Duration::from_secs(bytes / LARGE_BYTES_PER_S)
}

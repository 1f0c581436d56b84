//! What neighbours may ask of this device.
//!
//! Whoever asks gets bytes that have just been hashed, at a pace that leaves the device its own work, and no longer than it
//! takes them.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use libp2p::{
    Stream,
    futures::{AsyncReadExt, AsyncWriteExt},
};
use models::digest_of;
use tokio::{
    io::AsyncReadExt as _,
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    papers,
    shelf::{Place, Shelf},
    wire::{CHUNKS, LOOK_BYTES, Look, OFFERS, WANT_BYTES, Want},
};
use crate::{counters::Counters, mesh::Service, update::disk::read_bounded};

/// Streams on which one neighbour asks who has what: one, and the next one while it ends …
const LOOKS_EACH: usize = 2;
/// … and all of them: twice those that look at one another.
const LOOKS: usize = 96;
/// Things that one neighbour is served at the same time: what it asks for at once, and as many that just end …
const SERVED_EACH: usize = 4;
/// … and all of them. Each takes a chunk's bytes of memory, 4 MiB together.
const SERVED: usize = 16;
/// Somebody who looks and has nothing more to ask.
const IDLE: Duration = Duration::from_secs(30);
/// Between two looks of one neighbour.
const BREATH: Duration = Duration::from_millis(50);
/// A question of some bytes.
const QUESTION: Duration = Duration::from_secs(10);
/// A neighbour that does not take a part within this is let go.
const PART: Duration = Duration::from_secs(10);
/// What is written at once.
const PART_BYTES: usize = 64 * 1024;
/// Lets bytes out evenly, to all neighbours together.
#[derive(Debug)]
struct Pace {
    free: Mutex<Instant>,
    bytes_per_s: f64,
}

impl Pace {
    fn new(kib_per_s: u32) -> Self {
        Self {
            free: Mutex::new(Instant::now()),
            bytes_per_s: f64::from(kib_per_s.max(1)) * 1_024.0,
        }
    }

    async fn wait(&self, bytes: usize) {
        let (at, now) = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let at = (*free).max(now);
            *free = at + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s);
            (at, now)
        };
        // A timer goes off at the next millisecond, also one that is due: too long for each part.
        if at > now {
            sleep_until(at).await;
        }
    }
}

/// Both services; chunks leave with so many KiB/s.
pub(super) fn services(shelf: &Arc<Shelf>, counters: &Counters, kib_per_s: u32) -> Vec<Service> {
    let known = Arc::clone(shelf);
    let offers = Service::new(OFFERS, LOOKS_EACH, LOOKS, move |_, stream| {
        offer(Arc::clone(&known), stream)
    });
    let shop = Arc::new(Shop {
        shelf: Arc::clone(shelf),
        counters: counters.clone(),
        pace: Pace::new(kib_per_s),
    });
    let chunks = Service::new(CHUNKS, SERVED_EACH, SERVED, move |peer, stream| {
        let shop = Arc::clone(&shop);
        async move {
            if let Err(why) = shop.serve(stream).await {
                tracing::debug!(%peer, "a neighbour was not served: {why}");
            }
        }
    });
    vec![offers, chunks]
}

/// Answers looks until the neighbour has seen enough.
async fn offer(shelf: Arc<Shelf>, mut stream: Stream) {
    let mut look = [0; LOOK_BYTES];
    while let Ok(Ok(())) = timeout(IDLE, stream.read_exact(&mut look)).await {
        let said = shelf.offer(&Look::parse(&look)).to_bytes();
        let written = timeout(PART, async {
            stream.write_all(&said).await?;
            stream.flush().await
        });
        if !matches!(written.await, Ok(Ok(()))) {
            return;
        }
        sleep(BREATH).await;
    }
}

struct Shop {
    shelf: Arc<Shelf>,
    counters: Counters,
    pace: Pace,
}

impl Shop {
    /// One question and its answer.
    async fn serve(&self, mut stream: Stream) -> std::io::Result<()> {
        let mut asked = [0; WANT_BYTES];
        timeout(QUESTION, stream.read_exact(&mut asked)).await??;
        match Want::parse(&asked) {
            Some(Want::Chunk(name)) => {
                let place = self.shelf.place(&name);
                let read = spawn_blocking(move || place.and_then(|place| read(&place)));
                let mut bytes = read.await.ok().flatten().unwrap_or_default();
                // A disk forgets now and then: this device would be blamed for it.
                if !bytes.is_empty() && digest_of(&bytes) != name {
                    tracing::warn!(chunk = %name, "a model on the disk is damaged: neighbours do not get it from here");
                    self.shelf.forget(&name);
                    bytes.clear();
                }
                self.give(&mut stream, &bytes).await?;
            }
            Some(Want::Delta(from, to)) => {
                if let Some(path) = self.shelf.delta((from, to)) {
                    self.give_file(&mut stream, tokio::fs::File::open(path).await?)
                        .await?;
                } else {
                    self.give(&mut stream, &[]).await?;
                }
            }
            Some(Want::Papers(release)) => {
                let path = self.shelf.papers();
                let read = spawn_blocking(move || read_bounded(&path, papers::MAX_BYTES as u64));
                let bytes = read.await.ok().and_then(Result::ok);
                let bytes = bytes.filter(|bytes| bytes.starts_with(&release.0));
                self.give(&mut stream, &bytes.unwrap_or_default()).await?;
            }
            None => return Err(std::io::Error::other("it asks for something unknown")),
        }
        timeout(PART, stream.close()).await?
    }

    async fn give(&self, stream: &mut Stream, bytes: &[u8]) -> std::io::Result<()> {
        self.length(stream, bytes.len() as u64).await?;
        for part in bytes.chunks(PART_BYTES) {
            self.part(stream, part).await?;
        }
        Ok(())
    }

    async fn give_file(
        &self,
        stream: &mut Stream,
        mut file: tokio::fs::File,
    ) -> std::io::Result<()> {
        let length = file.metadata().await?.len();
        self.length(stream, length).await?;
        let mut part = vec![0; PART_BYTES];
        let mut left = length;
        while left > 0 {
            let n = file.read(&mut part).await?;
            let part = part.get(..n).filter(|part| !part.is_empty());
            self.part(stream, part.ok_or(std::io::ErrorKind::UnexpectedEof)?)
                .await?;
            left = left.saturating_sub(n as u64);
        }
        Ok(())
    }

    async fn length(&self, stream: &mut Stream, length: u64) -> std::io::Result<()> {
        let length = u32::try_from(length).map_err(std::io::Error::other)?;
        timeout(PART, stream.write_all(&length.to_be_bytes())).await?
    }

    async fn part(&self, stream: &mut Stream, part: &[u8]) -> std::io::Result<()> {
        self.pace.wait(part.len()).await;
        timeout(PART, stream.write_all(part)).await??;
        self.counters.served_bytes.add(part.len() as u64);
        Ok(())
    }
}

/// The bytes at a place; nothing if they cannot be read.
fn read(place: &Place) -> Option<Vec<u8>> {
    let mut file = File::open(&place.path).ok()?;
    file.seek(SeekFrom::Start(place.offset)).ok()?;
    let mut bytes = vec![0; place.length];
    file.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

//! A link: the stream of presence between two neighbours, and how much may wait on either end of it.

use std::{
    collections::{HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use libp2p::{
    PeerId, Stream,
    futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
};
use mesh_core::roster::{MAX_MEMBERS, Peer};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::wire::{self, Came, WireError};

/// Frames that wait for a neighbour: all that is known of the largest site, twice. One that is slower is let go.
const WAITING: usize = 2 * MAX_MEMBERS;
/// The same in bytes: the largest site's roster, and twice all that is known of it, a KiB each.
const WAITING_BYTES: usize = 5 * 1024 * 1024;
/// What waits for all of them; then the one for which the most waits is let go.
pub(super) const WAITING_FOR_ALL: usize = 16 * 1024 * 1024;
/// Written at once, where so much waits.
const AT_ONCE: usize = 16 * 1024;
/// Envelopes that were looked at: each comes from several sides.
const SEEN: usize = 4_096;
/// A neighbour may say so much at once …
const BURST: u32 = 2 * 1024 * 1024;
/// … and so much in a second; then it is read more slowly.
const BYTES_PER_SECOND: u32 = 64 * 1024;

/// Something that a link has to say.
#[derive(Debug)]
pub(super) enum News {
    /// There is a stream to or from a peer.
    Opened(PeerId, Stream),
    /// None could be made.
    NotOpened(PeerId, String),
    /// Something came over it.
    Came(Peer, u64, Came),
    /// It is over.
    Ended(Peer, u64, String),
}

/// What a neighbour is to be sent, bounded in frames and in bytes.
#[derive(Debug)]
struct Queue {
    frames: mpsc::Sender<Vec<u8>>,
    bytes: Arc<AtomicUsize>,
}

/// The other end of a [`Queue`].
#[derive(Debug)]
struct Waiting {
    frames: mpsc::Receiver<Vec<u8>>,
    bytes: Arc<AtomicUsize>,
}

impl Queue {
    fn new() -> (Self, Waiting) {
        let (to, from) = mpsc::channel(WAITING);
        let bytes = Arc::<AtomicUsize>::default();
        let waiting = Waiting {
            frames: from,
            bytes: Arc::clone(&bytes),
        };
        (Self { frames: to, bytes }, waiting)
    }

    /// False where too much waits already.
    fn push(&self, frame: Vec<u8>) -> bool {
        let length = frame.len();
        // Only the node puts something in: what is read here only becomes less.
        if self.bytes() + length > WAITING_BYTES {
            return false;
        }
        self.bytes.fetch_add(length, Ordering::Relaxed);
        self.frames.try_send(frame).is_ok()
    }

    fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// A stream of presence.
#[derive(Debug)]
pub(super) struct Link {
    /// Which one with this peer: news of an older one do not count.
    pub(super) number: u64,
    /// Envelopes that came over it with a signature that is not good.
    pub(super) forgeries: u32,
    /// The newest roster that was sent over it: once is enough, however often it is asked for.
    pub(super) roster: u64,
    queue: Queue,
    /// Ends its tasks.
    stop: CancellationToken,
}

impl Link {
    /// Starts to read and to write.
    pub(super) fn start(peer: Peer, number: u64, stream: Stream, tell: mpsc::Sender<News>) -> Self {
        let (queue, waiting) = Queue::new();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let (reader, writer) = stream.split();
        tokio::spawn(async move {
            let why = tokio::select! {
                () = stopped.cancelled() => return,
                why = read(reader, peer, number, &tell) => why,
                why = write(writer, waiting) => why,
            };
            let _ = tell.send(News::Ended(peer, number, why)).await;
        });
        Self {
            number,
            forgeries: 0,
            roster: 0,
            queue,
            stop,
        }
    }

    /// False where the other end does not read what it is sent.
    pub(super) fn send(&self, frame: Vec<u8>) -> bool {
        self.queue.push(frame)
    }

    /// Bytes that wait for the other end.
    pub(super) fn waiting(&self) -> usize {
        self.queue.bytes()
    }

    pub(super) fn stop(self) {
        self.stop.cancel();
    }
}

/// Envelopes whose signature was good and that change nothing any more: they need not be verified again.
#[derive(Debug, Default)]
pub(super) struct Seen {
    set: HashSet<u64>,
    order: VecDeque<u64>,
}

impl Seen {
    pub(super) fn has(&self, envelope: &[u8]) -> bool {
        self.set.contains(&hash(envelope))
    }

    pub(super) fn insert(&mut self, envelope: &[u8]) {
        let hash = hash(envelope);
        if !self.set.insert(hash) {
            return;
        }
        self.order.push_back(hash);
        if self.order.len() > SEEN
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
    }

    /// Others are members now: what was known of somebody may be known no more.
    pub(super) fn clear(&mut self) {
        self.set.clear();
        self.order.clear();
    }
}

fn hash(envelope: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    envelope.hash(&mut hasher);
    hasher.finish()
}

/// Reads a link to its end, and says why it ended. Whoever says too much is read slowly.
async fn read(
    mut from: impl AsyncRead + Unpin,
    peer: Peer,
    number: u64,
    tell: &mpsc::Sender<News>,
) -> String {
    let mut allowed = f64::from(BURST);
    let mut last = tokio::time::Instant::now();
    loop {
        let came = match wire::read(&mut from).await {
            Ok(Some(came)) => came,
            Ok(None) => return "it has closed it".into(),
            Err(WireError::Io(error)) => return error.to_string(),
            Err(error) => return format!("it sends {error}"),
        };
        let now = tokio::time::Instant::now();
        let earned = (now - last).as_secs_f64() * f64::from(BYTES_PER_SECOND);
        allowed = (allowed + earned).min(f64::from(BURST)) - came.cost();
        last = now;
        if allowed < 0.0 {
            tokio::time::sleep(Duration::from_secs_f64(
                -allowed / f64::from(BYTES_PER_SECOND),
            ))
            .await;
        }
        if tell.send(News::Came(peer, number, came)).await.is_err() {
            return "the mesh has stopped".into();
        }
    }
}

/// Writes what waits, several frames at once where there are several.
async fn write(mut to: impl AsyncWrite + Unpin, mut waiting: Waiting) -> String {
    let mut many = Vec::new();
    while let Some(first) = waiting.frames.recv().await {
        many.extend_from_slice(&first);
        while many.len() < AT_ONCE
            && let Ok(next) = waiting.frames.try_recv()
        {
            many.extend_from_slice(&next);
        }
        let written = async {
            to.write_all(&many).await?;
            to.flush().await
        };
        if let Err(error) = written.await {
            return error.to_string();
        }
        waiting.bytes.fetch_sub(many.len(), Ordering::Relaxed);
        many = Vec::new();
    }
    "it was closed here".into()
}

#[cfg(test)]
mod tests {
    use libp2p::futures::io::sink;

    use super::*;

    #[tokio::test]
    async fn what_waits_is_bounded_in_bytes_and_is_no_burden_once_it_is_written() {
        let (queue, waiting) = Queue::new();
        let roster = vec![0; 512 * 1024];
        let taken = (0..100).filter(|_| queue.push(roster.clone())).count();
        assert_eq!(taken, WAITING_BYTES / roster.len());
        let bytes = Arc::clone(&queue.bytes);
        drop(queue);
        write(sink(), waiting).await;
        assert_eq!(bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_was_seen_is_forgotten_in_its_turn() {
        let mut seen = Seen::default();
        for n in 0..=SEEN {
            seen.insert(&n.to_be_bytes());
        }
        assert!(!seen.has(&0_usize.to_be_bytes()));
        assert!(seen.has(&1_usize.to_be_bytes()));
        assert_eq!(seen.order.len(), SEEN);
        seen.clear();
        assert!(!seen.has(&1_usize.to_be_bytes()));
    }
}

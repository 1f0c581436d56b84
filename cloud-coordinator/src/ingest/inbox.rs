//! Where messages from devices wait for ingest: bounded in number and in bytes.

use std::sync::Arc;

use bytes::Bytes;
use mesh_core::{Kind, Topic};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};

use crate::metrics::Metrics;

/// What a message costs besides its payload: its topic and its place in the queue.
const OVERHEAD: usize = 512;

/// One message from a device.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) topic: Topic,
    pub(crate) payload: Bytes,
    pub(crate) at: Instant,
    /// Its share of the queue's bytes, given back when the message is done with.
    _room: Option<OwnedSemaphorePermit>,
}

/// The way into ingest. A full queue makes the sender wait, and with it the device.
#[derive(Clone, Debug)]
pub(crate) struct Inbox {
    sender: mpsc::Sender<Incoming>,
    bytes: Arc<Semaphore>,
    max_bytes: usize,
    metrics: Arc<Metrics>,
}

/// The kinds that ingest has a use for.
pub(crate) const KINDS: [Kind; 10] = [
    Kind::Result,
    Kind::Replay,
    Kind::Gap,
    Kind::Status,
    Kind::Info,
    Kind::Model,
    Kind::State,
    Kind::Metrics,
    Kind::Drift,
    Kind::Reported,
];

impl Inbox {
    /// A queue of at most `messages` messages and about `max_bytes` bytes.
    pub(crate) fn new(
        messages: usize,
        max_bytes: usize,
        metrics: Arc<Metrics>,
    ) -> (Self, mpsc::Receiver<Incoming>) {
        let (sender, receiver) = mpsc::channel(messages);
        let max_bytes = max_bytes.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        let inbox = Self {
            sender,
            bytes: Arc::new(Semaphore::new(max_bytes)),
            max_bytes,
            metrics,
        };
        (inbox, receiver)
    }

    /// Waits for room and puts a message in. Returns at once when ingest has stopped: what is not stored is
    /// not acknowledged, and comes again.
    pub(crate) async fn push(&self, topic: Topic, payload: Bytes) {
        if !KINDS.contains(&topic.kind) || self.sender.is_closed() {
            return;
        }
        let cost = (payload.len() + OVERHEAD).min(self.max_bytes);
        let cost = u32::try_from(cost).unwrap_or(u32::MAX);
        let room = tokio::select! {
            room = self.bytes.clone().acquire_many_owned(cost) => room.ok(),
            () = self.sender.closed() => return,
        };
        let incoming = Incoming {
            topic,
            payload,
            at: Instant::now(),
            _room: room,
        };
        if self.sender.send(incoming).await.is_ok() {
            self.metrics.queue_messages.inc();
        }
    }
}

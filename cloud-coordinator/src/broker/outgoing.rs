//! What goes to one client: answers, what it subscribed to, and what was retained of that.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::BytesMut;
use rumqttc::{Publish, QoS};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    sync::{Notify, mpsc},
    time::timeout,
};

use super::{
    pace::Pace,
    retained::{Look, Pass},
    router::{Delivery, Queue, Router},
    session::End,
};

/// How long one write of at most 64 KiB and a message may take: a client that reads slower than some
/// kilobytes a second is cut.
const MAX_STALL: Duration = Duration::from_secs(60);
/// QoS 1 messages without an answer: enough for the round trip of a slow link.
const WINDOW: usize = 256;
/// Bytes that are gathered for one write, and of answers that may wait before the client is no longer read.
pub(super) const CHUNK: usize = 64 * 1024;
/// How often a second one client is brought further up to date, 256 retained topics each time, and how often at once: all that
/// is ever kept. Who asks for it again and again gets it at this pace.
const LOOKS: (u32, u32) = (100, 2_400);

/// What the reader and the writer of one connection share.
pub(super) struct Wire {
    pub(super) queue: Arc<Queue>,
    /// Answers that are ready to be written.
    pub(super) answers: Mutex<BytesMut>,
    /// Packet ids that wait for their PUBACK, and the last one drawn.
    window: Mutex<(HashSet<u16>, u16)>,
    /// Answers or room in the window for the writer.
    pub(super) wake: Notify,
    /// The writer took the answers.
    pub(super) drained: Notify,
    /// Filters that the client has just subscribed to, whose retained messages it is to be sent. Only such as it has, so that
    /// they are as few.
    pub(super) fresh: Mutex<BTreeMap<String, QoS>>,
    /// There are some.
    pub(super) asked: Notify,
    /// The writer took something out of the queue.
    pub(super) room: Notify,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Wire {
    pub(super) fn new(queue: Arc<Queue>) -> Self {
        Self {
            queue,
            answers: Mutex::default(),
            window: Mutex::default(),
            wake: Notify::new(),
            drained: Notify::new(),
            fresh: Mutex::default(),
            asked: Notify::new(),
            room: Notify::new(),
        }
    }

    /// The client has an answer to one of its messages.
    pub(super) fn acknowledged(&self, pkid: u16) {
        lock(&self.window).0.remove(&pkid);
        self.wake.notify_one();
    }
}

/// Writes all of it, also what TLS would hold back.
pub(super) async fn put(
    write: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
) -> std::io::Result<()> {
    write.write_all(bytes).await?;
    write.flush().await
}

/// Sends the retained messages of what was just subscribed to, as fast as the client reads. One pass at a time: what
/// is subscribed to meanwhile, new or again, is what the next one is for.
pub(super) async fn bring_up_to_date(router: &Router, wire: &Wire) -> End {
    let pace = Pace::new(LOOKS.0, LOOKS.1);
    loop {
        let fresh = std::mem::take(&mut *lock(&wire.fresh));
        if fresh.is_empty() {
            wire.asked.notified().await;
            continue;
        }
        let mut pass = Pass::new(fresh);
        loop {
            pace.turn().await;
            match router.look(&mut pass, &wire.queue).await {
                Look::More => {}
                Look::Full => wire.room.notified().await,
                Look::Done => break,
            }
        }
    }
}

/// Writes answers and deliveries until the connection fails or the client is too slow.
pub(super) async fn send<W: AsyncWrite + Unpin>(
    stream: &mut W,
    mut deliveries: mpsc::Receiver<Delivery>,
    wire: &Wire,
) -> End {
    let mut out = BytesMut::new();
    let mut waiting: Option<Delivery> = None;
    loop {
        {
            let mut answers = lock(&wire.answers);
            if !answers.is_empty() {
                out.extend_from_slice(&answers);
                answers.clear();
                wire.drained.notify_one();
            }
        }
        let mut taken = false;
        while out.len() < CHUNK {
            let Some(delivery) = waiting.take().or_else(|| deliveries.try_recv().ok()) else {
                break;
            };
            if !encode(&delivery, wire, &mut out) {
                waiting = Some(delivery);
                break;
            }
            wire.queue.taken(&delivery);
            taken = true;
        }
        if taken {
            wire.room.notify_one();
        }
        if out.is_empty() {
            tokio::select! {
                () = wire.wake.notified() => {}
                delivery = deliveries.recv(), if waiting.is_none() => match delivery {
                    Some(delivery) => waiting = Some(delivery),
                    None => return End::Stopped,
                },
            }
            continue;
        }
        match timeout(MAX_STALL, put(stream, &out)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return End::Io(error),
            Err(_) => return End::Slow,
        }
        out.clear();
        if out.capacity() > 2 * CHUNK {
            out = BytesMut::new();
        }
    }
}

/// Adds one message to what is written next; false if the window is full.
fn encode(delivery: &Delivery, wire: &Wire, out: &mut BytesMut) -> bool {
    let pkid = if delivery.qos == QoS::AtMostOnce {
        0
    } else {
        let (waiting, last) = &mut *lock(&wire.window);
        if waiting.len() >= WINDOW {
            return false;
        }
        // The window is far smaller than the number of ids, so a free one is near.
        loop {
            *last = last.checked_add(1).unwrap_or(1);
            if waiting.insert(*last) {
                break *last;
            }
        }
    };
    let publish = Publish {
        dup: false,
        qos: delivery.qos,
        retain: delivery.retain,
        topic: delivery.topic.clone(),
        pkid,
        payload: delivery.payload.clone(),
    };
    let before = out.len();
    if let Err(error) = publish.write(out) {
        // Cannot happen: topics were checked when they came in, and sizes are far below MQTT's.
        tracing::error!(%error, "a message could not be encoded");
        out.truncate(before);
    }
    true
}

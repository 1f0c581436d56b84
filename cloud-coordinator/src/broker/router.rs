//! Where messages go: clients, subscriptions and retained messages behind one short lock.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use mesh_core::Topic;
use rumqttc::QoS;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::{
    retained::{Look, Pass, Retained},
    trie::Filters,
};
use crate::metrics::Metrics;

/// A subscriber's queue in messages: a burst of a few seconds from a small fleet. Beyond it, QoS 0 messages
/// are dropped, and at QoS 1 the subscriber is cut, since it would lose messages without knowing.
pub(super) const QUEUE_MESSAGES: usize = 8_192;
/// The same in bytes.
const QUEUE_BYTES: usize = 8 << 20;
/// Retained messages get one in so many of both: they can wait where they are, live ones cannot.
const KEPT_FOR_LIVE: usize = 2;

/// One message on its way to one subscriber.
#[derive(Clone, Debug)]
pub(super) struct Delivery {
    pub(super) topic: Bytes,
    pub(super) payload: Bytes,
    pub(super) qos: QoS,
    pub(super) retain: bool,
}

impl Delivery {
    fn cost(&self) -> usize {
        self.topic.len() + self.payload.len()
    }
}

/// Why the router ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// The client does not read what it asked for.
    Full,
    /// Another connection has its name now.
    Replaced,
}

/// The way to one subscriber: bounded in messages and in bytes.
#[derive(Debug)]
pub(super) struct Queue {
    sender: mpsc::Sender<Delivery>,
    bytes: AtomicUsize,
    /// Ends the connection.
    cut: CancellationToken,
    why: OnceLock<Cut>,
}

impl Queue {
    pub(super) fn new(sender: mpsc::Sender<Delivery>, cut: CancellationToken) -> Self {
        Self {
            sender,
            bytes: AtomicUsize::new(0),
            cut,
            why: OnceLock::new(),
        }
    }

    /// Ends the connection; says whether nobody had before.
    fn end(&self, why: Cut) -> bool {
        let first = self.why.set(why).is_ok();
        self.cut.cancel();
        first
    }

    /// Why it was ended, if it was.
    pub(super) fn ended(&self) -> Option<Cut> {
        self.why.get().copied()
    }

    /// Never waits: a slow subscriber harms only itself.
    fn offer(&self, delivery: Delivery, metrics: &Metrics) {
        let (cost, qos) = (delivery.cost(), delivery.qos);
        let fits = self.bytes.load(Ordering::Relaxed) + cost <= QUEUE_BYTES;
        self.bytes.fetch_add(cost, Ordering::Relaxed);
        if fits && self.sender.try_send(delivery).is_ok() {
            return;
        }
        self.bytes.fetch_sub(cost, Ordering::Relaxed);
        metrics.broker_dropped.inc();
        if qos != QoS::AtMostOnce && self.end(Cut::Full) {
            metrics.broker_cut.inc();
        }
    }

    /// Puts a retained message in, if there is room beside what is kept for live ones.
    fn lay(&self, delivery: Delivery) -> bool {
        let cost = delivery.cost();
        let waiting = self.sender.max_capacity() - self.sender.capacity();
        if self.bytes.load(Ordering::Relaxed) + cost > QUEUE_BYTES / KEPT_FOR_LIVE
            || waiting >= self.sender.max_capacity().div_ceil(KEPT_FOR_LIVE)
        {
            return false;
        }
        self.bytes.fetch_add(cost, Ordering::Relaxed);
        let laid = self.sender.try_send(delivery).is_ok();
        if !laid {
            self.bytes.fetch_sub(cost, Ordering::Relaxed);
        }
        laid
    }

    /// A delivery has left the queue.
    pub(super) fn taken(&self, delivery: &Delivery) {
        self.bytes.fetch_sub(delivery.cost(), Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Subscription {
    queue: Arc<Queue>,
    qos: QoS,
}

/// What the broker says in a client's name when it is gone.
#[derive(Clone, Debug)]
pub(super) struct Will {
    pub(super) topic: Topic,
    pub(super) payload: Bytes,
    pub(super) qos: QoS,
    pub(super) retain: bool,
}

#[derive(Debug)]
struct Client {
    number: u64,
    queue: Arc<Queue>,
    filters: Vec<String>,
    will: Option<Will>,
}

#[derive(Debug, Default)]
struct State {
    clients: HashMap<String, Client>,
    filters: Filters<Subscription>,
    retained: Retained,
    next_number: u64,
}

/// The shared state of the broker.
#[derive(Debug)]
pub(super) struct Router {
    state: Mutex<State>,
    /// Whose turn it is to look at what is retained: one at a time and in turns, so that all who ask for it together
    /// hold the lock no more than one.
    looking: Semaphore,
    metrics: Arc<Metrics>,
}

/// Filters of one client; the contract needs two or three.
pub(super) const MAX_FILTERS: usize = 128;

/// What became of a subscription.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Subscribed {
    /// It stands.
    Stands,
    /// The client has too many.
    TooMany,
    /// The client is not there any more, or has no right to it.
    Gone,
}

impl Router {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            state: Mutex::new(State::default()),
            looking: Semaphore::new(1),
            metrics,
        }
    }

    /// Nothing panics while the lock is held, and the state is whole between any two statements.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Lets a client in. One of the same id is cut, and its last will is handed back to be published.
    pub(super) fn attach(
        &self,
        id: &str,
        queue: Arc<Queue>,
        will: Option<Will>,
    ) -> (u64, Option<Will>) {
        let mut state = self.state();
        state.next_number += 1;
        let number = state.next_number;
        let old = state.clients.insert(
            id.to_owned(),
            Client {
                number,
                queue,
                filters: Vec::new(),
                will,
            },
        );
        let old_will = old.and_then(|old| {
            old.queue.end(Cut::Replaced);
            self.metrics.broker_replaced.inc();
            for filter in &old.filters {
                state.filters.remove(filter, old.number);
            }
            old.will
        });
        (number, old_will)
    }

    /// A client is gone; its last will, unless it said goodbye or was replaced.
    pub(super) fn detach(&self, id: &str, number: u64, goodbye: bool) -> Option<Will> {
        let mut state = self.state();
        if state.clients.get(id)?.number != number {
            return None;
        }
        let client = state.clients.remove(id)?;
        for filter in &client.filters {
            state.filters.remove(filter, number);
        }
        client.will.filter(|_| !goodbye)
    }

    /// Adds a subscription, which the client has a right to.
    pub(super) fn subscribe(&self, id: &str, number: u64, filter: &str, qos: QoS) -> Subscribed {
        let mut state = self.state();
        let Some(client) = state.clients.get_mut(id).filter(|c| c.number == number) else {
            return Subscribed::Gone;
        };
        if !client.filters.iter().any(|f| f == filter) {
            if client.filters.len() >= MAX_FILTERS {
                return Subscribed::TooMany;
            }
            client.filters.push(filter.to_owned());
        }
        let queue = client.queue.clone();
        state
            .filters
            .insert(filter, number, Subscription { queue, qos });
        Subscribed::Stands
    }

    /// Takes a subscription out.
    pub(super) fn unsubscribe(&self, id: &str, number: u64, filter: &str) {
        let mut state = self.state();
        if let Some(client) = state.clients.get_mut(id).filter(|c| c.number == number) {
            client.filters.retain(|f| f != filter);
            state.filters.remove(filter, number);
        }
    }

    /// Goes on bringing a subscriber up to date. What is found goes into its queue as it is at this moment: under the
    /// lock, so that it can never arrive after a newer one.
    pub(super) async fn look(&self, pass: &mut Pass, queue: &Queue) -> Look {
        let Ok(_turn) = self.looking.acquire().await else {
            return Look::Done;
        };
        let state = self.state();
        state.retained.look(pass, |delivery| queue.lay(delivery))
    }

    /// Sends a message to everyone who subscribed, and keeps it if it is retained. The rights were checked.
    ///
    /// Returns false if it should have been retained and the bound forbids it.
    pub(super) fn publish(&self, topic: &str, payload: &[u8], qos: QoS, retain: bool) -> bool {
        let mut state = self.state();
        // One own copy: a slice of a read buffer would keep the whole buffer alive for as long as the
        // slowest subscriber needs.
        let mut copy: Option<Bytes> = None;
        let mut kept = true;
        if retain {
            let body = copy
                .get_or_insert_with(|| Bytes::copy_from_slice(payload))
                .clone();
            kept = state.retained.keep(topic, body, qos);
        }
        let mut found: Vec<(u64, &Subscription)> = Vec::new();
        state.filters.matching(topic, &mut |client, subscription| {
            found.push((client, subscription));
        });
        if found.is_empty() {
            return kept;
        }
        // Overlapping filters deliver once, at the highest QoS.
        found.sort_by_key(|(client, s)| (*client, std::cmp::Reverse(s.qos as u8)));
        found.dedup_by_key(|(client, _)| *client);
        let payload = copy.unwrap_or_else(|| Bytes::copy_from_slice(payload));
        let topic = Bytes::copy_from_slice(topic.as_bytes());
        for (_, subscription) in found {
            let delivery = Delivery {
                topic: topic.clone(),
                payload: payload.clone(),
                qos: lower(qos, subscription.qos),
                retain: false,
            };
            subscription.queue.offer(delivery, &self.metrics);
        }
        kept
    }
}

/// QoS 2 is never granted: resending is always safe here, so "at least once" is enough.
pub(super) fn lower(a: QoS, b: QoS) -> QoS {
    if a == QoS::AtMostOnce || b == QoS::AtMostOnce {
        QoS::AtMostOnce
    } else {
        QoS::AtLeastOnce
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(
        router: &Router,
        id: &str,
        room: usize,
    ) -> (u64, Arc<Queue>, mpsc::Receiver<Delivery>) {
        let (tx, rx) = mpsc::channel(room);
        let queue = Arc::new(Queue::new(tx, CancellationToken::new()));
        (router.attach(id, queue.clone(), None).0, queue, rx)
    }

    #[tokio::test]
    async fn a_full_queue_drops_at_qos_0_and_cuts_at_qos_1_and_nobody_else_notices() {
        let router = Router::new(Arc::default());
        let (slow, slow_queue, _slow_rx) = client(&router, "slow", 2);
        let (lazy, lazy_queue, _lazy_rx) = client(&router, "lazy", 2);
        let (good, good_queue, mut good_rx) = client(&router, "good", 100);
        router.subscribe("slow", slow, "lacewing/#", QoS::AtLeastOnce);
        router.subscribe("lazy", lazy, "lacewing/#", QoS::AtMostOnce);
        router.subscribe("good", good, "lacewing/#", QoS::AtLeastOnce);
        for _ in 0..10 {
            router.publish("lacewing/x", b"1", QoS::AtLeastOnce, false);
        }
        assert!(slow_queue.cut.is_cancelled());
        assert_eq!(slow_queue.ended(), Some(Cut::Full));
        assert!(!lazy_queue.cut.is_cancelled() && !good_queue.cut.is_cancelled());
        let mut got = 0;
        while good_rx.try_recv().is_ok() {
            got += 1;
        }
        assert_eq!(got, 10);
    }

    /// A device that leaves large messages, subscribes to itself and does not read.
    #[tokio::test]
    async fn retained_messages_fill_no_more_than_their_part_of_a_queue() {
        let router = Router::new(Arc::default());
        let large = vec![b'x'; 512 * 1024 - 100];
        for device in 0..64 {
            let topic = format!("lacewing/v1/s/d{device}/c/state");
            assert!(router.publish(&topic, &large, QoS::AtLeastOnce, true));
        }
        let (number, queue, mut rx) = client(&router, "slow", QUEUE_MESSAGES);
        router.subscribe("slow", number, "lacewing/#", QoS::AtLeastOnce);
        let all = || Pass::new([("lacewing/#".to_owned(), QoS::AtLeastOnce)].into());
        for _ in 0..10 {
            let seen = router.look(&mut all(), &queue).await;
            assert_eq!(seen, Look::Full);
            let bytes = queue.bytes.load(Ordering::Relaxed);
            assert!(bytes <= QUEUE_BYTES / KEPT_FOR_LIVE, "{bytes}");
        }
        // There is room for live ones, and whoever reads gets all of it.
        router.publish("lacewing/v1/s/d0/c/state", b"x", QoS::AtLeastOnce, false);
        assert!(!queue.cut.is_cancelled());
        while rx.try_recv().map(|d| queue.taken(&d)).is_ok() {}
        let (mut pass, mut got) = (all(), 0);
        while router.look(&mut pass, &queue).await != Look::Done {
            while rx.try_recv().map(|d| queue.taken(&d)).is_ok() {
                got += 1;
            }
        }
        while rx.try_recv().is_ok() {
            got += 1;
        }
        assert_eq!(got, 64);
    }

    #[tokio::test]
    async fn a_client_has_so_many_subscriptions_and_no_more() {
        let router = Router::new(Arc::default());
        let (greedy, _, _rx) = client(&router, "greedy", 9);
        let (other, _, _rx2) = client(&router, "other", 9);
        let subscribe =
            |id, number, filter: &str| router.subscribe(id, number, filter, QoS::AtMostOnce);
        for n in 0..MAX_FILTERS {
            assert_eq!(
                subscribe("greedy", greedy, &format!("lacewing/{n}")),
                Subscribed::Stands
            );
        }
        assert_eq!(
            subscribe("greedy", greedy, "lacewing/more"),
            Subscribed::TooMany
        );
        assert_eq!(
            subscribe("greedy", greedy, "lacewing/0"),
            Subscribed::Stands,
            "the same again"
        );
        assert_eq!(
            subscribe("other", other, "lacewing/more"),
            Subscribed::Stands
        );
    }

    #[tokio::test]
    async fn the_same_id_again_cuts_the_old_one_and_its_will_comes_first() {
        let router = Router::new(Arc::default());
        let (tx, _rx) = mpsc::channel(1);
        let queue = Arc::new(Queue::new(tx, CancellationToken::new()));
        let will = Will {
            topic: "lacewing/v1/s/d/_/status".parse().unwrap(),
            payload: Bytes::from_static(b"offline"),
            qos: QoS::AtLeastOnce,
            retain: true,
        };
        let (first, none) = router.attach("s/d", queue.clone(), Some(will));
        assert!(none.is_none());
        let (second, _, _rx2) = {
            let (tx, rx) = mpsc::channel(1);
            let new = Arc::new(Queue::new(tx, CancellationToken::new()));
            let (number, will) = router.attach("s/d", new.clone(), None);
            assert!(will.is_some() && queue.cut.is_cancelled());
            assert_eq!(queue.ended(), Some(Cut::Replaced));
            (number, new, rx)
        };
        assert!(
            router.detach("s/d", first, false).is_none(),
            "the old one's end changes nothing"
        );
        let subscribe = |number| router.subscribe("s/d", number, "a", QoS::AtMostOnce);
        assert_eq!(subscribe(first), Subscribed::Gone);
        assert_eq!(subscribe(second), Subscribed::Stands);
    }
}

//! Where messages go: clients, subscriptions and retained messages behind one short lock.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use mesh_core::Topic;
use rumqttc::QoS;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::trie::Filters;
use crate::metrics::Metrics;

/// A subscriber's queue in messages: a burst of a few seconds from a small fleet. Beyond it, QoS 0 messages
/// are dropped, and at QoS 1 the subscriber is cut, since it would lose messages without knowing.
pub(super) const QUEUE_MESSAGES: usize = 8_192;
/// The same in bytes.
const QUEUE_BYTES: usize = 8 << 20;
/// Retained messages of one device: a handful of kinds per source. Bounds what a faulty device can leave.
const RETAINED_PER_DEVICE: usize = 64;
/// Retained messages altogether: six of each of 100,000 devices.
const RETAINED: usize = 600_000;

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

/// The way to one subscriber: bounded in messages and in bytes.
#[derive(Debug)]
pub(super) struct Queue {
    sender: mpsc::Sender<Delivery>,
    bytes: AtomicUsize,
    /// Ends the connection.
    pub(super) cut: CancellationToken,
}

impl Queue {
    pub(super) fn new(sender: mpsc::Sender<Delivery>, cut: CancellationToken) -> Self {
        Self {
            sender,
            bytes: AtomicUsize::new(0),
            cut,
        }
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
        if qos != QoS::AtMostOnce && !self.cut.is_cancelled() {
            metrics.broker_cut.inc();
            self.cut.cancel();
        }
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
    retained: BTreeMap<String, (Bytes, QoS)>,
    /// How many retained messages each `<site>/<device>` has.
    owners: HashMap<String, usize>,
    next_number: u64,
}

/// The shared state of the broker.
#[derive(Debug)]
pub(super) struct Router {
    state: Mutex<State>,
    metrics: Arc<Metrics>,
}

/// Filters of one client; the contract needs two or three.
const MAX_FILTERS: usize = 128;

/// What became of a subscription.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Subscribed {
    /// It stands; these retained topics match it.
    Retained(Vec<String>),
    /// The client has too many.
    TooMany,
    /// The client is not there any more, or has no right to it.
    Gone,
}

impl Router {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            state: Mutex::new(State::default()),
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
            old.queue.cut.cancel();
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
        // Everything that matches begins with the levels before the first wildcard.
        let fixed = filter.split(['+', '#']).next().unwrap_or_default();
        let fixed = fixed.strip_suffix('/').unwrap_or(fixed);
        let found = state
            .retained
            .range(fixed.to_owned()..)
            .map(|(topic, _)| topic)
            .take_while(|topic| topic.starts_with(fixed))
            .filter(|topic| rumqttc::mqttbytes::matches(topic, filter))
            .cloned()
            .collect();
        Subscribed::Retained(found)
    }

    /// Takes a subscription out.
    pub(super) fn unsubscribe(&self, id: &str, number: u64, filter: &str) {
        let mut state = self.state();
        if let Some(client) = state.clients.get_mut(id).filter(|c| c.number == number) {
            client.filters.retain(|f| f != filter);
            state.filters.remove(filter, number);
        }
    }

    /// Hands a retained message to a new subscriber as it is at this moment: under the lock, so that it can
    /// never arrive after a newer one. Waits for room in the subscriber's own queue.
    pub(super) async fn deliver_retained(&self, queue: &Queue, topic: &str, granted: QoS) {
        let Ok(permit) = queue.sender.reserve().await else {
            return;
        };
        let state = self.state();
        let Some((payload, qos)) = state.retained.get(topic) else {
            return;
        };
        let delivery = Delivery {
            topic: Bytes::copy_from_slice(topic.as_bytes()),
            payload: payload.clone(),
            qos: lower(*qos, granted),
            retain: true,
        };
        queue.bytes.fetch_add(delivery.cost(), Ordering::Relaxed);
        permit.send(delivery);
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
            kept = state.retain(topic, body, qos);
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

impl State {
    /// Keeps a message for later subscribers; an empty one takes the kept one away.
    fn retain(&mut self, topic: &str, payload: Bytes, qos: QoS) -> bool {
        let owner: String = topic
            .split('/')
            .skip(2)
            .take(2)
            .collect::<Vec<_>>()
            .join("/");
        if payload.is_empty() {
            if self.retained.remove(topic).is_some()
                && let Some(count) = self.owners.get_mut(&owner)
            {
                *count -= 1;
                if *count == 0 {
                    self.owners.remove(&owner);
                }
            }
            return true;
        }
        if let Some(kept) = self.retained.get_mut(topic) {
            *kept = (payload, qos);
            return true;
        }
        let count = self.owners.get(&owner).copied().unwrap_or(0);
        if count >= RETAINED_PER_DEVICE || self.retained.len() >= RETAINED {
            return false;
        }
        self.owners.insert(owner, count + 1);
        self.retained.insert(topic.to_owned(), (payload, qos));
        true
    }
}

/// QoS 2 is never granted: resending is always safe here, so "at least once" is enough.
fn lower(a: QoS, b: QoS) -> QoS {
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
        assert!(!lazy_queue.cut.is_cancelled() && !good_queue.cut.is_cancelled());
        let mut got = 0;
        while good_rx.try_recv().is_ok() {
            got += 1;
        }
        assert_eq!(got, 10);
    }

    #[tokio::test]
    async fn retained_messages_are_bounded_replaced_and_removed() {
        let router = Router::new(Arc::default());
        for n in 0..RETAINED_PER_DEVICE {
            assert!(router.publish(
                &format!("lacewing/v1/s/d/c{n}/state"),
                b"x",
                QoS::AtMostOnce,
                true
            ));
        }
        let publish = |topic, body: &[u8]| router.publish(topic, body, QoS::AtMostOnce, true);
        assert!(!publish("lacewing/v1/s/d/more/state", b"x"), "the bound");
        assert!(
            publish("lacewing/v1/s/other/more/state", b"x"),
            "of one device only"
        );
        assert!(
            publish("lacewing/v1/s/d/c0/state", b"y"),
            "replacing needs no room"
        );
        assert!(publish("lacewing/v1/s/d/c0/state", b""));
        assert!(publish("lacewing/v1/s/d/more/state", b"x"));
        let (number, _, _rx) = client(&router, "v", 9);
        let found = router.subscribe("v", number, "lacewing/v1/s/+/more/#", QoS::AtMostOnce);
        let expected = [
            "lacewing/v1/s/d/more/state",
            "lacewing/v1/s/other/more/state",
        ];
        assert_eq!(
            found,
            Subscribed::Retained(expected.map(String::from).into())
        );
    }

    #[tokio::test]
    async fn a_client_has_so_many_subscriptions_and_no_more() {
        let router = Router::new(Arc::default());
        let (greedy, _, _rx) = client(&router, "greedy", 9);
        let (other, _, _rx2) = client(&router, "other", 9);
        let none = || Subscribed::Retained(Vec::new());
        let subscribe =
            |id, number, filter: &str| router.subscribe(id, number, filter, QoS::AtMostOnce);
        for n in 0..MAX_FILTERS {
            assert_eq!(
                subscribe("greedy", greedy, &format!("lacewing/{n}")),
                none()
            );
        }
        assert_eq!(
            subscribe("greedy", greedy, "lacewing/more"),
            Subscribed::TooMany
        );
        assert_eq!(
            subscribe("greedy", greedy, "lacewing/0"),
            none(),
            "the same again"
        );
        assert_eq!(subscribe("other", other, "lacewing/more"), none());
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
            (number, new, rx)
        };
        assert!(
            router.detach("s/d", first, false).is_none(),
            "the old one's end changes nothing"
        );
        let subscribe = |number| router.subscribe("s/d", number, "a", QoS::AtMostOnce);
        assert_eq!(subscribe(first), Subscribed::Gone);
        assert_eq!(subscribe(second), Subscribed::Retained(Vec::new()));
    }
}

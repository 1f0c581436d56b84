//! The embedded MQTT 3.1.1 broker: a router of our own over the packet codec of the client library.
//!
//! It does what the contract needs and no more: QoS 0 and 1 (2 is accepted from publishers), retained
//! messages, last wills, rights ([`rights`]) of whoever the certificate or the password says it is ([`gate`]), and
//! bounded queues so that a slow subscriber harms nobody else. A session ends with its connection, and nothing survives a restart: readings are safe in
//! the devices' outboxes until the coordinator has stored them, so the broker needs no disk.

pub(crate) mod fuzzed;
mod gate;
mod outgoing;
pub(crate) mod outside;
mod pace;
mod retained;
mod rights;
mod router;
pub(crate) mod rules;
mod session;
mod trie;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_core::Topic;
use rumqttc::QoS;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::router::{Router, Will};
pub use self::rules::Product;
pub(crate) use self::{
    gate::Gate,
    outside::{Access, Outside},
};
use crate::{
    api::limits::network,
    crowd::{Crowd, share_of_one_address},
    ingest::Inbox,
    metrics::Metrics,
    notice::Notices,
};

/// Connections of one subscriber: every screen and script that was given its password.
const SESSIONS_OF_ONE_SUBSCRIBER: usize = 256;

/// What the configuration bounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections.
    pub(crate) connections: usize,
    /// Messages that one client may publish a second.
    pub(crate) publish_rate: u32,
}

/// What every connection uses.
struct Shared {
    router: Router,
    gate: Gate,
    publish_rate: u32,
    subscribers: Arc<Crowd<String>>,
    inbox: Inbox,
    metrics: Arc<Metrics>,
    notices: Notices,
}

impl Shared {
    async fn publish_will(&self, will: Will) {
        let topic = will.topic.to_string();
        self.router
            .publish(&topic, &will.payload, will.qos, will.retain);
        self.inbox.push(will.topic, will.payload).await;
    }

    /// A connection that never became a client.
    fn refused(&self, peer: SocketAddr, reason: &'static str) {
        self.metrics.broker_refused(reason);
        if let Some(held_back) = self.notices.due(reason) {
            tracing::warn!(%peer, reason, held_back, "a connection to the broker was refused");
        }
    }

    /// Tells why a client's connection was ended.
    fn tell(&self, peer: SocketAddr, client: &str, end: &session::End) {
        if let Some(held_back) = self.notices.due(end.kind()) {
            tracing::warn!(%peer, client, held_back, "a client of the broker {end}");
        }
    }

    /// A client that tried what it has no right to.
    fn denied(&self, client: &str, topic: &str, what: &'static str) {
        self.metrics.broker_denied(what);
        if let Some(held_back) = self.notices.due(what) {
            tracing::warn!(
                client,
                topic,
                held_back,
                "a client may not {what} this topic"
            );
        }
    }
}

/// A running broker.
#[derive(Clone)]
pub(crate) struct Broker {
    shared: Arc<Shared>,
}

impl Broker {
    /// Serves `listener` until `stop`; what devices publish goes to `inbox` as well.
    pub(crate) fn start(
        listener: TcpListener,
        gate: Gate,
        limits: Limits,
        inbox: Inbox,
        metrics: Arc<Metrics>,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let shared = Arc::new(Shared {
            router: Router::new(metrics.clone()),
            gate,
            publish_rate: limits.publish_rate,
            subscribers: Crowd::new(SESSIONS_OF_ONE_SUBSCRIBER),
            inbox,
            metrics,
            notices: Notices::default(),
        });
        let broker = Self {
            shared: shared.clone(),
        };
        let sessions = tasks.clone();
        tasks.spawn(async move {
            let room = Arc::new(Semaphore::new(limits.connections));
            let addresses: Arc<Crowd<IpAddr>> = Crowd::new(share_of_one_address(limits.connections));
            loop {
                let accepted = tokio::select! {
                    () = stop.cancelled() => return,
                    accepted = listener.accept() => accepted,
                };
                let (stream, peer) = match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of descriptors, for example: wait for some to come free.
                        if let Some(held_back) = shared.notices.due("accept") {
                            tracing::warn!(%error, held_back, "the broker cannot accept a connection");
                        }
                        tokio::time::sleep(crate::coordinator::ACCEPT_PAUSE).await;
                        continue;
                    }
                };
                let Ok(permit) = room.clone().try_acquire_owned() else {
                    shared.refused(peer, "too many connections");
                    continue;
                };
                let Some(place) = addresses.enter(network(peer.ip())) else {
                    shared.refused(peer, "too many connections from one address");
                    continue;
                };
                let (shared, stop) = (shared.clone(), stop.clone());
                sessions.spawn(async move {
                    session::serve(stream, peer, shared, stop).await;
                    drop((permit, place));
                });
            }
        });
        broker
    }

    /// Publishes a retained message of the coordinator.
    pub(crate) fn publish(&self, topic: &Topic, payload: &[u8]) {
        let (shared, topic) = (&self.shared, topic.to_string());
        let kept = shared
            .router
            .publish(&topic, payload, QoS::AtLeastOnce, true);
        if !kept && let Some(held_back) = shared.notices.due("not kept") {
            tracing::warn!(
                topic,
                held_back,
                "there is no room to retain a message of the coordinator"
            );
        }
    }

    /// Publishes a message of the coordinator to those who listen now.
    pub(crate) fn tell(&self, topic: &Topic, payload: &[u8]) {
        self.shared
            .router
            .publish(&topic.to_string(), payload, QoS::AtLeastOnce, false);
    }
}

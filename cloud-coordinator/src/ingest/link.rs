//! The way out for acknowledgements, and the client of an external broker.

use std::{sync::Arc, time::Duration};

use mesh_core::{Backoff, Topic};
use rumqttc::{AsyncClient, Event, EventLoop, Incoming, QoS, SubscribeFilter, SubscribeReasonCode};
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{Acks, Inbox, inbox::KINDS};
use crate::{
    broker::{Access, Broker, outside},
    clock,
    metrics::Metrics,
    notice::Notices,
};

/// The largest payload that is taken, and the largest packet that is sent: more than any message of the contract.
const MAX_PAYLOAD: usize = 520 * 1024;
/// The largest packet that MQTT knows. The client would end the connection at a larger one than it is told, and a broker
/// without a bound of its own would send one that is retained again with every new connection: it is read to its end and refused.
const MAX_INCOMING: usize = 268_435_460;
/// Requests that wait in the client: acknowledgements gather by device before it, so it can be short.
const REQUESTS: usize = 64;
/// Between pings; a broker that is silent for twice as long is gone.
const KEEP_ALIVE_S: u16 = 10;
/// Acknowledgements are sent this far apart, so that a device gets some twenty a second under load and not one
/// for every commit.
const GATHER: Duration = Duration::from_millis(50);
/// A broker that is away is tried again after at most this, in milliseconds.
const MAX_RETRY_MS: u64 = 10_000;
const FIRST_RETRY_MS: u64 = 200;
/// How long a broker that is connected may take to take a message that somebody waits for.
const TELL: Duration = Duration::from_secs(5);

/// Where acknowledgements go.
#[derive(Clone)]
pub(crate) enum Link {
    Embedded(Broker),
    /// The client of the connection that stands, if one does.
    External(watch::Receiver<Option<AsyncClient>>),
}

impl Link {
    /// Is the broker there?
    pub(crate) fn stands(&self) -> bool {
        match self {
            Self::Embedded(_) => true,
            Self::External(client) => client.borrow().is_some(),
        }
    }

    /// Publishes a message that is for those who listen now; false if the broker is not there.
    pub(crate) async fn tell(&self, topic: &Topic, bytes: Vec<u8>) -> bool {
        match self {
            Self::Embedded(broker) => {
                broker.tell(topic, &bytes);
                true
            }
            Self::External(client) => {
                let client = client.borrow().clone();
                let Some(client) = client else { return false };
                let options = rumqttc::PublishOptions::at_least_once();
                let publish = client.publish(topic.to_string(), bytes, options);
                // Waits while the broker takes nothing.
                matches!(timeout(TELL, publish).await, Ok(Ok(())))
            }
        }
    }
}

impl Link {
    /// Publishes a message that stays on its topic until the next; false if the broker is not there.
    pub(crate) async fn retain(&self, topic: &Topic, bytes: Vec<u8>) -> bool {
        match self {
            Self::Embedded(broker) => {
                broker.publish(topic, &bytes);
                true
            }
            Self::External(client) => {
                let client = client.borrow().clone();
                let sent = timeout(TELL, send(client, topic, bytes)).await;
                sent.unwrap_or(false)
            }
        }
    }
}

/// Publishes acknowledgements until `stop`. What cannot be sent is dropped: the device asks again.
pub(crate) async fn publish_acks(
    acks: Arc<Acks>,
    link: Link,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    loop {
        let (topic, waiting) = tokio::select! {
            () = stop.cancelled() => return,
            next = acks.next() => next,
        };
        for ack in waiting {
            let Ok(bytes) = ack.encode() else { continue };
            let sent = match &link {
                Link::Embedded(broker) => {
                    broker.publish(&topic, &bytes);
                    true
                }
                Link::External(client) => {
                    let client = client.borrow().clone();
                    tokio::select! {
                        () = stop.cancelled() => return,
                        sent = send(client, &topic, bytes) => sent,
                    }
                }
            };
            if sent {
                metrics.acks.inc();
            }
        }
        if acks.is_empty() {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(GATHER) => {}
            }
        }
    }
}

async fn send(client: Option<AsyncClient>, topic: &Topic, bytes: Vec<u8>) -> bool {
    let Some(client) = client else { return false };
    let options = rumqttc::PublishOptions::at_least_once().retained();
    // Fails when the connection is replaced, which drops the other end of the channel.
    client
        .publish(topic.to_string(), bytes, options)
        .await
        .is_ok()
}

/// The client of an external broker.
pub(crate) struct External {
    pub(crate) access: Arc<Access>,
    pub(crate) inbox: Inbox,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) client: watch::Sender<Option<AsyncClient>>,
    /// Tells when a connection stands: everything is to be acknowledged again.
    pub(crate) connected: Arc<tokio::sync::Notify>,
}

impl External {
    /// Connects, and connects again, until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut retry = Backoff::new(FIRST_RETRY_MS, MAX_RETRY_MS);
        let notices = Notices::default();
        let mut told = false;
        while !stop.is_cancelled() {
            // A fresh client and event loop for each connection: what the old one had in flight is of no
            // use, since devices send again what is not acknowledged.
            let id = format!("lacewing-coordinator-{:016x}", clock::random());
            let error = match self.access.options(&id) {
                Err(error) => error,
                Ok(mut options) => {
                    options
                        .set_keep_alive(KEEP_ALIVE_S)
                        .set_clean_session(true)
                        .set_max_packet_size(MAX_INCOMING, MAX_PAYLOAD);
                    let (client, events) = AsyncClient::builder(options).capacity(REQUESTS).build();
                    tokio::select! {
                        () = stop.cancelled() => break,
                        error = self.connection(client, events, &mut retry, &mut told, &notices) => error,
                    }
                }
            };
            if self.client.send_replace(None).is_some() {
                self.metrics.link_losses.inc();
            }
            if !std::mem::replace(&mut told, true) {
                tracing::warn!("no connection to the broker, trying again: {error}");
            }
            let wait = Duration::from_millis(retry.next(clock::random()));
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(wait) => {}
            }
        }
        self.client.send_replace(None);
    }

    /// One connection to its end; says why it ended.
    async fn connection(
        &self,
        client: AsyncClient,
        mut events: EventLoop,
        retry: &mut Backoff,
        told: &mut bool,
        notices: &Notices,
    ) -> String {
        loop {
            match events.poll().await {
                Err(error) => return outside::explain(&self.access.url, &error),
                Ok(Event::Incoming(Incoming::ConnAck(_))) => {
                    let filters = KINDS.map(|kind| SubscribeFilter {
                        path: Topic::filter(kind),
                        qos: QoS::AtLeastOnce,
                    });
                    // The channel is empty, so this does not wait for the event loop that polls it.
                    if let Err(error) = client.try_subscribe_many(filters) {
                        return error.to_string();
                    }
                }
                Ok(Event::Incoming(Incoming::SubAck(answer))) => {
                    if answer.return_codes.contains(&SubscribeReasonCode::Failure) {
                        return "the broker does not let the coordinator subscribe".to_owned();
                    }
                    retry.reset();
                    *told = false;
                    let url = outside::shown(&self.access.url);
                    tracing::info!(url, "connected to the broker");
                    self.client.send_replace(Some(client.clone()));
                    self.connected.notify_one();
                }
                Ok(Event::Incoming(Incoming::Publish(publish))) => {
                    let topic = std::str::from_utf8(&publish.topic).unwrap_or_default();
                    let bytes = publish.payload.len();
                    let (reason, why) = match topic.parse::<Topic>() {
                        Ok(_) if bytes > MAX_PAYLOAD => (
                            "too_large",
                            format!("{bytes} bytes, the most is {MAX_PAYLOAD}"),
                        ),
                        Ok(topic) => {
                            // A full queue makes the broker wait: nothing is read meanwhile.
                            self.inbox.push(topic, publish.payload).await;
                            continue;
                        }
                        Err(error) => ("topic", error.to_string()),
                    };
                    self.metrics.refused(reason);
                    if let Some(held_back) = notices.due(reason) {
                        tracing::warn!(topic, held_back, "a message was refused: {why}");
                    }
                }
                Ok(_) => {}
            }
        }
    }
}

//! One connection to the broker, from CONNECT to its end.
//!
//! After every error a fresh one is made: what was on its way is not trusted but sent again, because only
//! the coordinator's acknowledgement counts.

use mesh_core::{Kind, Name, Status, Topic};
use rumqttc::{
    AsyncClient, Event, EventLoop, LastWill, MqttOptions, NetworkOptions, Packet, PublishOptions,
    QoS,
};
use tokio::sync::mpsc;

use crate::config::{BrokerConfig, Config};

/// What a connection tells its owner.
#[derive(Debug)]
pub(crate) enum News {
    /// CONNACK came.
    Up,
    /// Something moved: there may be room to send.
    Progress,
    /// The broker took a message.
    Taken,
    /// A message came.
    Message {
        /// Its topic.
        topic: String,
        /// Its payload.
        payload: bytes::Bytes,
        /// It was said before this connection.
        retained: bool,
    },
    /// It is over.
    Lost(String),
}

/// Messages handed over but not yet written. Small, so that a live reading never queues behind many others.
const QUEUE: usize = 32;
/// Messages written but not yet taken by the broker.
const IN_FLIGHT: u16 = 64;
/// The coordinator's messages are small; larger ones are not for us.
const MAX_INCOMING: usize = 64 * 1024;
/// A replay batch and its topic.
const MAX_OUTGOING: usize = 512 * 1024;
/// A broker that does not answer within this is as good as none.
const CONNECT_TIMEOUT_S: u64 = 10;

/// An open or opening connection.
pub(crate) struct Connection {
    client: AsyncClient,
    news: mpsc::Receiver<News>,
    driver: tokio::task::JoinHandle<()>,
}

/// Why a connection could not even be tried.
#[derive(Debug, thiserror::Error)]
#[error("broker {url}: {why}")]
pub(crate) struct ConnectError {
    url: String,
    why: String,
}

fn options(broker: &BrokerConfig, client_id: String) -> Result<MqttOptions, ConnectError> {
    let BrokerConfig {
        url, keep_alive_s, ..
    } = broker;
    let (host, port) = broker.address().map_err(|why| ConnectError {
        url: url.clone(),
        why,
    })?;
    let mut options = MqttOptions::new(client_id, (host, port));
    options
        .set_keep_alive(*keep_alive_s)
        .set_max_packet_size(MAX_INCOMING, MAX_OUTGOING)
        .set_request_channel_capacity(QUEUE)
        .set_inflight(IN_FLIGHT);
    Ok(options)
}

/// The client id that the broker's topic rights go by.
#[must_use]
pub(crate) fn client_id(site: &Name, device: &Name) -> String {
    format!("{site}/{device}")
}

impl Connection {
    /// Starts to connect as the device, with its last will.
    ///
    /// # Errors
    /// If the options make no sense; everything else comes as [`News::Lost`].
    pub(crate) fn open(config: &Config) -> Result<Self, ConnectError> {
        let mut options = options(&config.broker, client_id(&config.site, &config.device))?;
        let status = Topic::of_device(&config.site, &config.device, Kind::Status).to_string();
        options.set_last_will(LastWill::new(
            status,
            Status::Offline.as_str(),
            QoS::AtLeastOnce,
            true,
        ));
        Self::start(config, options)
    }

    /// Starts to connect as a passer-by, which leaves a running agent of the same device alone.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub(crate) fn probe(config: &Config) -> Result<Self, ConnectError> {
        Self::start(
            config,
            options(
                &config.broker,
                format!("doctor-{}-{}", config.device, std::process::id()),
            )?,
        )
    }

    fn start(config: &Config, options: MqttOptions) -> Result<Self, ConnectError> {
        let (client, mut event_loop) =
            AsyncClient::builder(options)
                .try_build()
                .map_err(|error| ConnectError {
                    url: config.broker.url.clone(),
                    why: error.to_string(),
                })?;
        let mut network = NetworkOptions::new();
        network
            .set_connection_timeout(CONNECT_TIMEOUT_S)
            .set_tcp_nodelay(true);
        event_loop.set_network_options(network);
        let (tell, news) = mpsc::channel(QUEUE);
        Ok(Self {
            client,
            news,
            driver: tokio::spawn(drive(event_loop, tell)),
        })
    }

    /// What happens next on it.
    pub(crate) async fn news(&mut self) -> News {
        self.news
            .recv()
            .await
            .unwrap_or_else(|| News::Lost("the connection was closed".into()))
    }

    /// Hands a message over; false where there is no room just now.
    #[must_use]
    pub(crate) fn publish(
        &self,
        topic: &str,
        payload: bytes::Bytes,
        options: PublishOptions,
    ) -> bool {
        self.client.try_publish(topic, payload, options).is_ok()
    }

    /// Asks for the messages of `topic`; false where there is no room just now.
    #[must_use]
    pub(crate) fn subscribe(&self, topic: &str) -> bool {
        self.client.try_subscribe(topic, QoS::AtLeastOnce).is_ok()
    }

    /// Says goodbye, so that the last will is not sent, and waits until it is said or `wait` is over.
    pub(crate) async fn close(mut self, wait: std::time::Duration) {
        let goodbye = async {
            if self.client.disconnect().await.is_ok() {
                while !matches!(self.news().await, News::Lost(_)) {}
            }
        };
        let _ = tokio::time::timeout(wait, goodbye).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

async fn drive(mut event_loop: EventLoop, tell: mpsc::Sender<News>) {
    loop {
        let news = match event_loop.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(_))) => News::Up,
            Ok(Event::Incoming(Packet::Publish(message))) => News::Message {
                topic: String::from_utf8_lossy(&message.topic).into_owned(),
                payload: message.payload,
                retained: message.retain,
            },
            Ok(Event::Incoming(Packet::PubAck(_))) => News::Taken,
            Ok(_) => News::Progress,
            Err(error) => News::Lost(error.to_string()),
        };
        let over = matches!(news, News::Lost(_));
        if tell.send(news).await.is_err() || over {
            return;
        }
    }
}

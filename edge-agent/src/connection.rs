//! One connection to the broker, from CONNECT to its end.
//!
//! After every error a fresh one is made: what was on its way is not trusted but sent again, because only
//! the coordinator's acknowledgement counts.

use std::{
    io::{self, ErrorKind, Read},
    net::{TcpStream, ToSocketAddrs},
    sync::Arc,
    time::Duration,
};

use mesh_core::{Kind, Name, Status, Topic};
use rumqttc::{
    AsyncClient, ConnectionError, Event, EventLoop, LastWill, MqttOptions, NetworkOptions, Packet,
    PublishOptions, QoS, TlsConfiguration, Transport,
};
use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};
use tokio::sync::mpsc;

use crate::{
    config::{Config, broker},
    identity::{MQTTS_PORT, Tls, is_about_certificates},
    mesh::{Carriers, Door},
    trouble::{Peer, explain},
};

/// What a connection tells its owner.
#[derive(Debug)]
pub(crate) enum News {
    /// CONNACK came.
    Up,
    /// Something came: there may be room to send.
    Progress,
    /// Something was written to the network: there may be room to send. Nobody has said a word.
    Left,
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
    Lost {
        /// What happened.
        why: String,
        /// Is it that the broker does not take the device's certificate, or shows a bad one?
        doubt: bool,
    },
}

/// Messages handed over but not yet written. Small, so that a live reading never queues behind many others.
const QUEUE: usize = 32;
/// Messages written but not yet taken by the broker.
const IN_FLIGHT: u16 = 64;
/// The coordinator's messages are small, but for the roster of a large site; larger ones are not for us.
const MAX_INCOMING: usize = mesh_core::roster::MAX_ROSTER_BYTES + 1024;
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

/// Where the broker is: as configured, or as the coordinator says.
pub(crate) fn address(config: &Config, tls: &Tls) -> Result<(String, u16), String> {
    if !config.broker.by_coordinator {
        return config.broker.address();
    }
    let material = tls.material();
    let said = material
        .as_ref()
        .and_then(|material| material.mqtt.as_ref());
    let said = said.ok_or("the coordinator names no broker: set broker.url")?;
    let named = match said.rsplit_once(':') {
        Some((host, port)) => port.parse().ok().map(|port| (host, port)),
        None => Some((said.as_str(), MQTTS_PORT)),
    };
    match named {
        Some((host, port)) if !host.is_empty() && port != 0 => Ok((host.to_owned(), port)),
        _ => Err(format!("the coordinator names {said:?}: set broker.url")),
    }
}

/// The broker's address, for people.
#[must_use]
pub(crate) fn shown(config: &Config, tls: &Tls) -> String {
    if !config.broker.by_coordinator {
        return config.broker.url.clone();
    }
    match address(config, tls) {
        Ok((host, port)) => format!("mqtts://{host}:{port}"),
        Err(_) => "the coordinator's broker".into(),
    }
}

/// What the device and the broker show each other.
fn secured(config: &Config, tls: &Tls) -> Result<Arc<ClientConfig>, String> {
    let ca = config.broker.ca.as_deref().map(broker::roots).transpose();
    let ca = ca.map_err(|why| format!("broker.ca: {why}"))?;
    tls.to_broker(ca, config.broker.user.is_some())
}

/// Connects, proves who the device is and hears whether the broker minds, and goes no further: a broker that knows devices by
/// their certificates ends the connection of a running agent when the same device says its first word of MQTT on another one.
/// Blocks.
///
/// # Errors
/// In words.
pub(crate) fn handshake(config: &Config, tls: &Tls) -> Result<(), String> {
    /// With TLS 1.3 a client hears only after its own last word that its certificate is refused. A broker answers with what it
    /// does not like at once, and is silent otherwise.
    const OBJECTIONS: Duration = Duration::from_secs(1);
    let patience = Duration::from_secs(CONNECT_TIMEOUT_S);
    let said = |error: io::Error| explain(&error, Peer::Broker { tls: true });
    let secured = secured(config, tls)?;
    let (host, port) = address(config, tls)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| format!("{host:?} is no name of a host"))?;
    let mut tried = Err(io::Error::new(ErrorKind::NotFound, "it has no address"));
    for address in (host, port).to_socket_addrs().map_err(said)? {
        tried = TcpStream::connect_timeout(&address, patience);
        if tried.is_ok() {
            break;
        }
    }
    let socket = tried.map_err(said)?;
    socket.set_read_timeout(Some(patience)).map_err(said)?;
    socket.set_write_timeout(Some(patience)).map_err(said)?;
    let connection = ClientConnection::new(secured, name).map_err(|error| error.to_string())?;
    let mut stream = StreamOwned::new(connection, socket);
    stream.conn.complete_io(&mut stream.sock).map_err(said)?;
    stream
        .sock
        .set_read_timeout(Some(OBJECTIONS))
        .map_err(said)?;
    match stream.read(&mut [0]) {
        Ok(0) => Err(said(ErrorKind::UnexpectedEof.into())),
        Err(error) if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            Err(said(error))
        }
        _ => Ok(()),
    }
}

fn options(config: &Config, tls: &Tls, client_id: String) -> Result<MqttOptions, ConnectError> {
    let wrong = |why: String| ConnectError {
        url: shown(config, tls),
        why,
    };
    // First: before that nobody has said where the broker is.
    let transport = if config.broker.is_tls() {
        let config = secured(config, tls).map_err(wrong)?;
        Transport::tls_with_config(TlsConfiguration::Rustls(config))
    } else {
        Transport::Tcp
    };
    let (host, port) = address(config, tls).map_err(wrong)?;
    let mut options = MqttOptions::new(client_id, (host, port));
    if let Some((user, file)) = config
        .broker
        .user
        .clone()
        .zip(config.broker.password_file.as_ref())
    {
        let password =
            broker::password(file).map_err(|why| wrong(format!("broker.password_file: {why}")))?;
        options.set_credentials(user, password);
    }
    options
        .set_transport(transport)
        .set_keep_alive(config.broker.keep_alive_s)
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
    /// Starts to connect as the device, with its last will; by itself, or through one of its neighbours.
    ///
    /// # Errors
    /// If the options make no sense; everything else comes as [`News::Lost`].
    pub(crate) fn open(
        config: &Config,
        tls: &Tls,
        carriers: Option<Carriers>,
    ) -> Result<Self, ConnectError> {
        let mut options = options(config, tls, client_id(&config.site, &config.device))?;
        let status = Topic::of_device(&config.site, &config.device, Kind::Status).to_string();
        options.set_last_will(LastWill::new(
            status,
            Status::Offline.as_str(),
            QoS::AtLeastOnce,
            true,
        ));
        if let Some(carriers) = carriers {
            options.set_socket_connector(move |_, _| {
                let carriers = carriers.clone();
                async move { carriers.connect(Door::Broker).await }
            });
        }
        Self::start(config, tls, options)
    }

    /// Starts to connect as a passer-by. A broker that goes by names or by what clients call themselves leaves a running agent
    /// of the same device alone; one that goes by certificates does not: see [`handshake`].
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub(crate) fn probe(config: &Config, tls: &Tls) -> Result<Self, ConnectError> {
        let client_id = format!("doctor-{}-{}", config.device, std::process::id());
        Self::start(config, tls, options(config, tls, client_id)?)
    }

    fn start(config: &Config, tls: &Tls, options: MqttOptions) -> Result<Self, ConnectError> {
        let (client, mut event_loop) =
            AsyncClient::builder(options)
                .try_build()
                .map_err(|error| ConnectError {
                    url: shown(config, tls),
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
            driver: tokio::spawn(drive(event_loop, config.broker.is_tls(), tell)),
        })
    }

    /// What happens next on it.
    pub(crate) async fn news(&mut self) -> News {
        self.news.recv().await.unwrap_or_else(|| News::Lost {
            why: "the connection was closed".into(),
            doubt: false,
        })
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
                while !matches!(self.news().await, News::Lost { .. }) {}
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

async fn drive(mut event_loop: EventLoop, tls: bool, tell: mpsc::Sender<News>) {
    loop {
        let news = match event_loop.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(_))) => News::Up,
            Ok(Event::Incoming(Packet::Publish(message))) => News::Message {
                topic: String::from_utf8_lossy(&message.topic).into_owned(),
                payload: message.payload,
                retained: message.retain,
            },
            Ok(Event::Incoming(Packet::PubAck(_))) => News::Taken,
            Ok(Event::Outgoing(_)) => News::Left,
            Ok(Event::Incoming(_)) => News::Progress,
            Err(error) => News::Lost {
                why: explain(&error, Peer::Broker { tls }),
                // Who is refused by a broker may be known to it under an older certificate.
                doubt: is_about_certificates(&error)
                    || matches!(error, ConnectionError::ConnectionRefused(_)),
            },
        };
        let over = matches!(news, News::Lost { .. });
        if tell.send(news).await.is_err() || over {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use rumqttc::PublishOptions;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// A broker that takes the connection and then says nothing, as behind a line that swallows everything: what the device sends
    /// itself must not look like an answer, or it waits for one as long as it has something to send.
    #[tokio::test]
    async fn what_leaves_is_not_taken_for_an_answer() {
        const CONNACK: [u8; 4] = [0x20, 2, 0, 0];
        const MESSAGES: usize = 5;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let broker = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut bytes = [0; 1024];
            assert!(stream.read(&mut bytes).await.unwrap() > 0);
            stream.write_all(&CONNACK).await.unwrap();
            while stream.read(&mut bytes).await.unwrap() > 0 {}
        });
        let data = tempfile::tempdir().unwrap();
        let data = data.path();
        let text =
            format!("device = 'd1'\ndata = {data:?}\nbroker.url = 'mqtt://127.0.0.1:{port}'");
        let config = Config::parse(&text).unwrap();
        let mut connection = Connection::open(&config, &Tls::none(), None).unwrap();
        while !matches!(connection.news().await, News::Up) {}
        for _ in 0..MESSAGES {
            let options = PublishOptions::at_least_once();
            assert!(connection.publish("t", bytes::Bytes::from_static(b"reading"), options));
            let news = connection.news().await;
            assert!(matches!(news, News::Left), "{news:?}");
        }
        drop(connection);
        broker.await.unwrap();
    }

    /// A broker that does not take the password says so once, and that is what the log says.
    #[tokio::test]
    async fn a_refusal_is_told_in_words() {
        const REFUSED: [u8; 4] = [0x20, 2, 0, 4];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let broker = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut connect = [0; 1024];
            let length = stream.read(&mut connect).await.unwrap();
            stream.write_all(&REFUSED).await.unwrap();
            connect[..length].to_vec()
        });
        let data = tempfile::tempdir().unwrap();
        let password = data.path().join("password");
        std::fs::write(&password, "wrong").unwrap();
        let of_owner = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&password, of_owner).unwrap();
        let data = data.path();
        let text = format!(
            "device = 'd1'\ndata = {data:?}\n[broker]\nurl = 'mqtt://127.0.0.1:{port}'\nuser = 'somebody'\npassword_file = {password:?}"
        );
        let config = Config::parse(&text).unwrap();
        let mut connection = Connection::open(&config, &Tls::none(), None).unwrap();
        let why = loop {
            match connection.news().await {
                News::Lost { why, doubt: true } => break why,
                News::Left | News::Progress => {}
                news => panic!("{news:?}"),
            }
        };
        assert!(why.contains("BadUserNamePassword"), "{why}");
        let said = broker.await.unwrap();
        assert!(said.windows(5).any(|bytes| bytes == b"wrong"), "{said:?}");
    }
}

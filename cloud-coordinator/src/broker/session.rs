//! One connection: the handshakes, and what the client sends. What is sent to it: [`outgoing`](super::outgoing).

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use rumqttc::{
    ConnAck, ConnectReturnCode, Packet, PubAck, PubComp, PubRec, Publish, QoS, SubAck, Subscribe,
    SubscribeReasonCode, UnsubAck, mqttbytes::Error as MqttError,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    Shared,
    gate::Admitted,
    outgoing::{CHUNK, Wire, bring_up_to_date, lock, put, send},
    pace::Pace,
    rights::Role,
    router::{Cut, MAX_FILTERS, QUEUE_MESSAGES, Queue, Subscribed},
};
use crate::{
    api::limits::network,
    trust::{
        active::Peer,
        tls::{AcceptError, tell_and_close},
    },
};

/// A CONNECT carries two short texts and a last will.
const MAX_CONNECT: usize = 16 * 1024;
/// The contract's largest payload; beyond it the connection is closed before it is read.
pub(super) const MAX_PAYLOAD: usize = 512 * 1024;
/// A topic of the contract has at most 6 levels of 63 bytes, and a filter no more.
const MAX_TOPIC: usize = 512;
/// What is no message: the largest names as many filters as a client may have, each with its length and a QoS.
const MAX_OTHER: usize = 16 + MAX_FILTERS * (MAX_TOPIC + 3);
/// The type of PUBLISH, in the upper half of a packet's first byte.
const PUBLISH: u8 = 3;
/// From the connection to a valid CONNECT.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A client without keep-alive that says nothing for this long is gone.
const MAX_SILENCE: Duration = Duration::from_secs(3_600);
/// QoS 2 publishes of one client whose release is due.
const MAX_UNRELEASED: usize = 256;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("said goodbye")]
    Goodbye,
    #[error("closed the connection")]
    Closed,
    #[error("was silent for too long")]
    Silent,
    #[error("reads too slowly")]
    Slow,
    #[error("was refused: {0}")]
    Refused(&'static str),
    #[error("broke the protocol: {0}")]
    Protocol(#[from] MqttError),
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("was cut: its queue was full, it reads more slowly than it is sent what it asked for")]
    Full,
    #[error("was replaced by a new connection of the same name")]
    Replaced,
    #[error("ended with the broker")]
    Stopped,
    #[error("was shut out: its device was revoked or its subscriber removed")]
    ShutOut,
}

impl End {
    /// Of which one is told at a time.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Full => "queue full",
            Self::Replaced => "replaced",
            Self::Refused(why) => why,
            _ => "sent away",
        }
    }
}

struct Reader<R> {
    stream: R,
    buffer: BytesMut,
    /// How much room the next read gets: doubled while reads fill it, so that an idle client costs little.
    room: usize,
}

const MIN_ROOM: usize = 1_024;

impl<R: AsyncRead + Unpin> Reader<R> {
    /// The next packet, a message of at most `message` bytes or another one of at most `other`; nothing is allocated for a
    /// length that is only claimed.
    async fn packet(&mut self, message: usize, other: usize) -> Result<Packet, End> {
        loop {
            let is_message = self.buffer.first().is_some_and(|b| b >> 4 == PUBLISH);
            let max = if is_message { message } else { other };
            match Packet::read(&mut self.buffer, max) {
                Ok(packet) => return Ok(packet),
                Err(MqttError::InsufficientBytes(_)) => {}
                Err(MqttError::PayloadSizeLimitExceeded(_)) if is_message => {
                    return Err(End::Refused("a message larger than 512 KiB"));
                }
                Err(MqttError::PayloadSizeLimitExceeded(_)) => {
                    return Err(End::Refused(
                        "a packet larger than any that there is a use for",
                    ));
                }
                Err(error) => return Err(error.into()),
            }
            self.buffer.reserve(self.room);
            let read = (&mut self.stream)
                .take(self.room as u64)
                .read_buf(&mut self.buffer)
                .await?;
            if read == 0 {
                return Err(End::Closed);
            }
            self.room = if read == self.room {
                (self.room * 2).min(CHUNK)
            } else {
                (read * 2).clamp(MIN_ROOM, CHUNK)
            };
        }
    }

    /// Is there a whole packet, or the beginning of one?
    fn has_more(&self) -> bool {
        !self.buffer.is_empty()
    }
}

struct Session {
    shared: Arc<Shared>,
    id: String,
    number: u64,
    role: Role,
    wire: Arc<Wire>,
    pace: Pace,
    unreleased: HashSet<u16>,
}

/// Serves one connection to its end.
pub(super) async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    let _ = stream.set_nodelay(true);
    let Some(door) = shared.gate.door() else {
        let (read, write) = stream.into_split();
        return converse(read, write, peer, None, &shared, stop).await;
    };
    let accepted = tokio::select! {
        () = stop.cancelled() => return,
        accepted = door.accept(stream) => accepted,
    };
    match accepted {
        Ok((stream, device)) => {
            let (read, write) = tokio::io::split(stream);
            converse(read, write, peer, device, &shared, stop).await;
        }
        Err(error @ AcceptError::Plain(_)) => {
            shared.refused(peer, error.name());
            if let AcceptError::Plain(stream) = error {
                // "Unacceptable protocol version": MQTT has no better word for it, and clients show it to people.
                tell_and_close(stream, &[0x20, 2, 0, 1]).await;
            }
        }
        Err(AcceptError::Gone) => {
            // Counted, and no more: whoever looks whether there is a door does this.
            shared.metrics.broker_refused(AcceptError::Gone.name());
            tracing::debug!(%peer, "closed before the handshake");
        }
        Err(error) => {
            tracing::debug!(%peer, "{error}");
            shared.refused(peer, error.name());
        }
    }
}

async fn converse<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    read: R,
    mut write: W,
    peer: SocketAddr,
    device: Option<Peer>,
    shared: &Arc<Shared>,
    stop: CancellationToken,
) {
    let mut reader = Reader {
        stream: read,
        buffer: BytesMut::new(),
        room: MIN_ROOM,
    };
    let connect = match timeout(HANDSHAKE, reader.packet(MAX_CONNECT, MAX_CONNECT)).await {
        Ok(Ok(Packet::Connect(connect))) => connect,
        Ok(Ok(_)) => return shared.refused(peer, "the first packet is not CONNECT"),
        Ok(Err(End::Protocol(MqttError::InvalidProtocolLevel(_)))) => {
            answer(&mut write, ConnectReturnCode::RefusedProtocolVersion).await;
            return shared.refused(peer, "not MQTT 3.1.1");
        }
        Ok(Err(End::Protocol(_) | End::Refused(_))) => {
            return shared.refused(peer, "malformed before CONNECT");
        }
        Ok(Err(_)) => return,
        Err(_) => return shared.refused(peer, "no CONNECT within 10 s"),
    };
    let from = network(peer.ip());
    let admitted = match shared.gate.admit(from, device, &connect).await {
        Ok(admitted) => admitted,
        Err((code, reason)) => {
            answer(&mut write, code).await;
            return shared.refused(peer, reason);
        }
    };
    let Admitted {
        id,
        role,
        will,
        cut: shut_out,
        subscriber,
    } = admitted;
    // Held to the end of the session.
    let _place = match subscriber.map(|name| shared.subscribers.enter(name)) {
        Some(None) => {
            answer(&mut write, ConnectReturnCode::ServiceUnavailable).await;
            return shared.refused(peer, "too many connections of one subscriber");
        }
        place => place,
    };

    let cut = stop.child_token();
    let (sender, deliveries) = mpsc::channel(QUEUE_MESSAGES);
    let queue = Arc::new(Queue::new(sender, cut.clone()));
    let (number, replaced) = shared.router.attach(&id, queue.clone(), will);
    if let Some(will) = replaced {
        shared.publish_will(will).await;
    }
    if !answer(&mut write, ConnectReturnCode::Success).await {
        if let Some(will) = shared.router.detach(&id, number, false) {
            shared.publish_will(will).await;
        }
        return;
    }
    shared.metrics.broker_connections.inc();
    tracing::debug!(%peer, client = id, "connected");

    let wire = Arc::new(Wire::new(queue));
    let mut session = Session {
        shared: shared.clone(),
        id: id.clone(),
        number,
        role,
        wire: wire.clone(),
        pace: Pace::new(shared.publish_rate, shared.publish_rate),
        unreleased: HashSet::new(),
    };
    let revoked = async {
        match &shut_out {
            Some(cut) => cut.cancelled().await,
            None => std::future::pending().await,
        }
    };
    let patience = match connect.keep_alive {
        0 => MAX_SILENCE,
        seconds => Duration::from_millis(u64::from(seconds) * 1_500),
    };
    let end = tokio::select! {
        biased;
        () = revoked => End::ShutOut,
        () = cut.cancelled() => match wire.queue.ended() {
            Some(Cut::Full) => End::Full,
            Some(Cut::Replaced) => End::Replaced,
            None => End::Stopped,
        },
        end = session.read(&mut reader, patience) => end,
        end = send(&mut write, deliveries, &wire) => end,
        end = bring_up_to_date(&shared.router, &wire) => end,
    };
    drop(session);
    let will = shared
        .router
        .detach(&id, number, matches!(end, End::Goodbye));
    if let Some(will) = will {
        shared.publish_will(will).await;
    }
    shared.metrics.broker_connections.dec();
    match end {
        End::Goodbye | End::Closed | End::Io(_) | End::Stopped => {
            tracing::debug!(%peer, client = id, "the client {end}");
        }
        // Counted where it was found.
        End::Full | End::Replaced => shared.tell(peer, &id, &end),
        End::Silent | End::Slow | End::Refused(_) | End::Protocol(_) | End::ShutOut => {
            shared.metrics.broker_refused("sent away");
            shared.tell(peer, &id, &end);
        }
    }
}

/// Says yes or no to a CONNECT.
async fn answer(write: &mut (impl AsyncWrite + Unpin), code: ConnectReturnCode) -> bool {
    let mut bytes = BytesMut::new();
    let packet = ConnAck::new(code, false);
    packet.write(&mut bytes).is_ok()
        && matches!(timeout(HANDSHAKE, put(write, &bytes)).await, Ok(Ok(())))
}

/// More filters in one packet than a client may have.
const TOO_MANY_AT_ONCE: End = End::Refused("more than 128 filters at once");

impl Session {
    /// Reads until the client is gone. Answers of everything that is already here go out together.
    async fn read<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut Reader<R>,
        patience: Duration,
    ) -> End {
        loop {
            let max = MAX_PAYLOAD + MAX_TOPIC + 8;
            let packet = match timeout(patience, reader.packet(max, MAX_OTHER)).await {
                Ok(Ok(packet)) => packet,
                Ok(Err(end)) => return end,
                Err(_) => return End::Silent,
            };
            // An answer to what was sent costs nothing, and is due as fast as that was sent.
            let paced = !matches!(packet, Packet::PubAck(_));
            if paced && self.pace.turn().await {
                self.shared.metrics.broker_slowed.inc();
            }
            if let Err(end) = self.take(packet).await {
                return end;
            }
            if !reader.has_more() {
                self.wire.wake.notify_one();
            }
            if lock(&self.wire.answers).len() > CHUNK {
                self.wire.wake.notify_one();
                self.wire.drained.notified().await;
            }
        }
    }

    async fn take(&mut self, packet: Packet) -> Result<(), End> {
        match packet {
            Packet::Publish(publish) => return self.publish(publish).await,
            Packet::PubAck(PubAck { pkid }) => {
                self.wire.acknowledged(pkid);
            }
            Packet::PubRel(release) => {
                self.unreleased.remove(&release.pkid);
                PubComp { pkid: release.pkid }.write(&mut lock(&self.wire.answers))?;
            }
            Packet::Subscribe(subscribe) => return self.subscribe(subscribe),
            Packet::Unsubscribe(unsubscribe) => {
                if unsubscribe.topics.len() > MAX_FILTERS {
                    return Err(TOO_MANY_AT_ONCE);
                }
                for filter in &unsubscribe.topics {
                    let router = &self.shared.router;
                    router.unsubscribe(&self.id, self.number, filter);
                    lock(&self.wire.fresh).remove(filter);
                }
                let pkid = unsubscribe.pkid;
                UnsubAck { pkid }.write(&mut lock(&self.wire.answers))?;
            }
            Packet::PingReq => {
                Packet::PingResp.write(&mut lock(&self.wire.answers), CHUNK)?;
            }
            Packet::Disconnect => return Err(End::Goodbye),
            Packet::Connect(_) => return Err(End::Refused("a second CONNECT")),
            Packet::ConnAck(_)
            | Packet::PubRec(_)
            | Packet::PubComp(_)
            | Packet::SubAck(_)
            | Packet::UnsubAck(_)
            | Packet::PingResp => return Err(End::Refused("a packet that only a broker sends")),
        }
        Ok(())
    }

    /// Passes a message on. One that is not allowed is answered like any other, since MQTT 3.1.1 has no
    /// word for it, and goes nowhere.
    async fn publish(&mut self, publish: Publish) -> Result<(), End> {
        let again = publish.qos == QoS::ExactlyOnce && !self.unreleased.insert(publish.pkid);
        if self.unreleased.len() > MAX_UNRELEASED {
            return Err(End::Refused("too many messages at QoS 2 without a release"));
        }
        if !again {
            let Ok(topic) = std::str::from_utf8(&publish.topic) else {
                return Err(End::Refused("a topic that is no text"));
            };
            match self.role.may_publish(topic) {
                None => self.shared.denied(&self.id, topic, "publish"),
                Some(_) if publish.payload.len() > MAX_PAYLOAD => {
                    return Err(End::Refused("a message larger than 512 KiB"));
                }
                Some(parsed) => {
                    let router = &self.shared.router;
                    if !router.publish(topic, &publish.payload, publish.qos, publish.retain) {
                        self.shared
                            .denied(&self.id, topic, "retain another message on");
                    }
                    self.shared.inbox.push(parsed, publish.payload).await;
                }
            }
        }
        let pkid = publish.pkid;
        let mut answers = lock(&self.wire.answers);
        match publish.qos {
            QoS::AtMostOnce => {}
            QoS::AtLeastOnce => {
                PubAck { pkid }.write(&mut answers)?;
            }
            QoS::ExactlyOnce => {
                PubRec { pkid }.write(&mut answers)?;
            }
        }
        Ok(())
    }

    fn subscribe(&mut self, subscribe: Subscribe) -> Result<(), End> {
        if subscribe.filters.len() > MAX_FILTERS {
            return Err(TOO_MANY_AT_ONCE);
        }
        let mut return_codes = Vec::with_capacity(subscribe.filters.len());
        let mut fresh = BTreeMap::new();
        for filter in subscribe.filters {
            let granted = match filter.qos {
                QoS::AtMostOnce => QoS::AtMostOnce,
                QoS::AtLeastOnce | QoS::ExactlyOnce => QoS::AtLeastOnce,
            };
            let path = filter.path;
            let became = if path.len() <= MAX_TOPIC && self.role.may_subscribe(&path) {
                let router = &self.shared.router;
                router.subscribe(&self.id, self.number, &path, granted)
            } else {
                Subscribed::Gone
            };
            let why = match became {
                Subscribed::Stands => {
                    fresh.insert(path, granted);
                    return_codes.push(SubscribeReasonCode::Success(granted));
                    continue;
                }
                Subscribed::TooMany => "have another subscription beside 128 to",
                Subscribed::Gone => "subscribe to",
            };
            self.shared.denied(&self.id, &path, why);
            return_codes.push(SubscribeReasonCode::Failure);
        }
        let pkid = subscribe.pkid;
        SubAck { pkid, return_codes }.write(&mut lock(&self.wire.answers))?;
        self.wire.wake.notify_one();
        // The reader does not wait for it: it has to hear the client's answers meanwhile.
        lock(&self.wire.fresh).append(&mut fresh);
        self.wire.asked.notify_one();
        Ok(())
    }
}

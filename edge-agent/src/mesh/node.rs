//! Carries out what [`mesh_core::neighbours`] decides: links, dials, signatures, and who is to know.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    net::SocketAddr,
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol, Swarm, Transport,
    connection_limits::{self, ConnectionLimits},
    core::upgrade::Version,
    futures::{AsyncReadExt, AsyncWriteExt, StreamExt},
    identity::Keypair,
    mdns, noise,
    swarm::{
        ConnectionId, NetworkBehaviour, SwarmEvent,
        behaviour::toggle::Toggle,
        dial_opts::{DialOpts, PeerCondition},
    },
    tcp, yamux,
};
use libp2p_stream::IncomingStreams;
use mesh_core::{
    Backoff,
    neighbours::{Action, Frame, Input, Neighbours},
    roster::{MAX_MEMBERS, Peer},
};
use tokio::{sync::mpsc, time::interval};
use tokio_util::sync::CancellationToken;

use super::{
    MeshConfig,
    admission::Admission,
    doctor,
    local::Request,
    names::{id, multiaddress, peer, socket},
    own::Own,
    roster::Rosters,
    streams::{self, Ends, Neighbour, Service, Wanted},
    wire::{self, Came, PRESENCE, WireError},
};
use crate::{clock::Monotonic, counters::Counters, dice};

/// The machine is asked so often: a fraction of a beat.
const TICK: Duration = Duration::from_millis(250);
/// The device looks at itself so often.
const LOOK_TICKS: u64 = 20;
/// Has the roster run out? Looked at so often.
const EXPIRY_TICKS: u64 = 40;
/// Neighbours that are written down are tried at once when there is a roster, then, while nobody is there, after at most this …
const SEARCH_MS: u64 = 500;
/// … and at last this.
const MAX_SEARCH_MS: u64 = 10_000;
/// From the first byte to a link.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A connection over which nothing is spoken.
const IDLE: Duration = Duration::from_secs(15);
/// Connections that are being made at the same time, in and out.
const PENDING: u32 = 64;
/// Two, for a moment, when both dial.
const PER_PEER: u32 = 3;
/// All connections: about twice the logarithm of the largest site, and those that models and readings need.
const CONNECTIONS: u32 = 256;
/// Frames that wait for a neighbour: all that is known of the largest site, twice. One that is slower is let go.
const WAITING: usize = 2 * MAX_MEMBERS;
/// What neighbours say, until it is looked at: they wait.
const NEWS: usize = 256;
/// Envelopes that were looked at: each comes from several sides.
const SEEN: usize = 4_096;
/// Envelopes with a signature that is not good, from one neighbour, until it is let go.
const FORGERIES: u32 = 3;
/// A neighbour may say so much at once …
const BURST: u32 = 2 * 1024 * 1024;
/// … and so much in a second; then it is read more slowly.
const BYTES_PER_SECOND: u32 = 64 * 1024;
/// So often mDNS asks again: who comes asks by itself, and is told of the others by those who answer.
const MDNS_EVERY: Duration = Duration::from_secs(3_600);

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    streams: libp2p_stream::Behaviour,
    mdns: Toggle<mdns::tokio::Behaviour>,
    limits: connection_limits::Behaviour,
}

/// Something that a link has to say.
#[derive(Debug)]
enum News {
    /// There is a stream to or from a peer.
    Opened(PeerId, Stream),
    /// None could be made.
    NotOpened(PeerId, String),
    /// Something came over it.
    Came(Peer, u64, Came),
    /// It is over.
    Ended(Peer, u64, String),
}

/// A stream of presence.
struct Link {
    /// Which one with this peer: news of an older one do not count.
    number: u64,
    out: mpsc::Sender<Vec<u8>>,
    /// Ends its tasks.
    stop: CancellationToken,
    forgeries: u32,
}

/// One connection of libp2p's.
#[derive(Clone, Copy)]
struct Wire {
    id: ConnectionId,
    is_mine: bool,
}

/// What the node is started with.
pub(super) struct Start {
    pub(super) config: MeshConfig,
    pub(super) key: Keypair,
    /// Later than that of any earlier life, as far as is known.
    pub(super) life: u64,
    pub(super) rosters: Rosters,
    pub(super) own: Own,
    pub(super) counters: Counters,
    pub(super) requests: mpsc::Receiver<Request>,
    /// What the rest of the agent asks for and is told.
    pub(super) ends: Ends,
    /// What neighbours may ask for.
    pub(super) services: Vec<Service>,
}

/// The running mesh of one device.
pub(super) struct Node {
    swarm: Swarm<Behaviour>,
    streams: libp2p_stream::Control,
    incoming: IncomingStreams,
    machine: Neighbours,
    key: Keypair,
    me: Peer,
    config: MeshConfig,
    rosters: Rosters,
    own: Own,
    counters: Counters,
    requests: mpsc::Receiver<Request>,
    ends: Ends,
    /// What of it was told last: the machine's sum.
    told: u64,
    /// Streams that wait for a connection.
    waiting: HashMap<Peer, Vec<Wanted>>,
    clock: Monotonic,
    links: HashMap<Peer, Link>,
    wires: HashMap<Peer, Vec<Wire>>,
    /// Where peers were found by mDNS or have been connected to.
    found: HashMap<Peer, Vec<Multiaddr>>,
    /// Why a peer could not be reached the last time.
    failures: BTreeMap<Peer, String>,
    /// When those that are written down are tried again.
    search: Backoff,
    search_at_ms: u64,
    seen: Seen,
    tell: mpsc::Sender<News>,
    news: mpsc::Receiver<News>,
    numbers: u64,
}

/// Envelopes that were looked at.
#[derive(Default)]
struct Seen {
    set: HashSet<u64>,
    order: VecDeque<u64>,
}

impl Seen {
    /// True the first time.
    fn insert(&mut self, envelope: &[u8]) -> bool {
        let mut hasher = DefaultHasher::new();
        envelope.hash(&mut hasher);
        let hash = hasher.finish();
        if !self.set.insert(hash) {
            return false;
        }
        self.order.push_back(hash);
        if self.order.len() > SEEN
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
        true
    }
}

fn behaviour(config: &MeshConfig, me: PeerId) -> Behaviour {
    let mdns = config.mdns.then(|| {
        let settings = mdns::Config {
            query_interval: MDNS_EVERY,
            ..mdns::Config::default()
        };
        mdns::tokio::Behaviour::new(settings, me)
    });
    let mdns = match mdns.transpose() {
        Ok(mdns) => mdns,
        Err(error) => {
            tracing::warn!("neighbours are not looked for by multicast: {error}");
            None
        }
    };
    let limits = ConnectionLimits::default()
        .with_max_pending_incoming(Some(PENDING))
        .with_max_pending_outgoing(Some(PENDING))
        .with_max_established_per_peer(Some(PER_PEER))
        .with_max_established(Some(CONNECTIONS));
    Behaviour {
        streams: libp2p_stream::Behaviour::new(),
        mdns: mdns.into(),
        limits: connection_limits::Behaviour::new(limits),
    }
}

impl Node {
    /// Binds, and is ready to [`run`](Self::run). Inside a runtime.
    pub(super) fn new(start: Start) -> Result<Self, String> {
        let Start {
            config,
            key,
            life,
            rosters,
            own,
            counters,
            requests,
            ends,
            services,
        } = start;
        let local = key.public().to_peer_id();
        let me = peer(&local).ok_or("the device's key is of a kind that neighbours do not know")?;
        let admission = Admission {
            noise: noise::Config::new(&key).map_err(|error| error.to_string())?,
            rosters: rosters.clone(),
            counters: counters.clone(),
        };
        let transport = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true))
            .upgrade(Version::V1)
            .authenticate(admission)
            .multiplex(yamux::Config::default())
            .timeout(HANDSHAKE)
            .boxed();
        let settings =
            libp2p::swarm::Config::with_tokio_executor().with_idle_connection_timeout(IDLE);
        let mut swarm = Swarm::new(transport, behaviour(&config, local), local, settings);
        let mut streams = swarm.behaviour().streams.new_control();
        let incoming = streams
            .accept(StreamProtocol::new(PRESENCE))
            .map_err(|error| error.to_string())?;
        for service in services {
            service.start(&mut streams, rosters.clone())?;
        }
        let (tell, news) = mpsc::channel(NEWS);
        listen(&mut swarm, config.listen)?;
        Ok(Self {
            swarm,
            streams,
            incoming,
            machine: Neighbours::new(me, life, dice::throw()),
            key,
            me,
            config,
            rosters,
            own,
            counters,
            requests,
            ends,
            told: 0,
            waiting: HashMap::new(),
            clock: Monotonic::start(),
            links: HashMap::new(),
            wires: HashMap::new(),
            found: HashMap::new(),
            failures: BTreeMap::new(),
            search: Backoff::new(SEARCH_MS, MAX_SEARCH_MS),
            search_at_ms: 0,
            seen: Seen::default(),
            tell,
            news,
            numbers: 0,
        })
    }

    /// Runs until `stop`, and says goodbye.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut holding = self.own.holding.clone();
        let mut rosters = self.rosters.subscribe();
        rosters.mark_changed();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ticks = 0_u64;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                event = self.swarm.select_next_some() => self.event(event),
                Some((peer, stream)) = self.incoming.next() => self.link(peer, stream),
                Some(news) = self.news.recv() => self.hear(news),
                Ok(()) = rosters.changed() => self.roster(),
                Some(request) = self.requests.recv() => self.answer(request),
                Some(wanted) = self.ends.wanted.recv() => self.want(wanted),
                // Others wait to hear of it.
                Ok(()) = holding.changed() => self.look(),
                _ = tick.tick() => {
                    self.passed(ticks);
                    ticks += 1;
                }
            }
        }
        self.give(Input::Leave);
        // What was said last leaves with the next turns of the writers.
        let _ = tokio::time::timeout(TICK, async {
            loop {
                let _ = self.swarm.select_next_some().await;
            }
        })
        .await;
    }

    /// A tick: the `ticks`-th.
    fn passed(&mut self, ticks: u64) {
        if ticks.is_multiple_of(LOOK_TICKS) {
            self.look();
        }
        if self.links.is_empty() && self.clock.now_ms() >= self.search_at_ms {
            self.search();
        }
        if ticks.is_multiple_of(EXPIRY_TICKS) && self.rosters.current().is_none() {
            // It may have run out.
            self.give(Input::Members(Default::default()));
            self.hang_up_on_strangers();
        }
        self.give(Input::Tick);
        self.counters.neighbours.set(self.machine.count() as u64);
        self.counters.links.set(self.links.len() as u64);
        self.tell_present();
        // Whoever asked has given up by then.
        self.waiting.retain(|_, all| {
            all.retain(|wanted| !wanted.back.is_closed());
            !all.is_empty()
        });
    }

    /// Looks at what this device has to say of itself.
    fn look(&mut self) {
        let presence = self.own.look(self.addresses());
        self.give(Input::Own(presence));
    }

    /// Tells the rest of the agent who is there, if that has changed.
    fn tell_present(&mut self) {
        let sum = self.machine.sum();
        if std::mem::replace(&mut self.told, sum) == sum {
            return;
        }
        let here = self.machine.all().filter(|known| known.is_here);
        let present = here.map(|known| Neighbour {
            peer: known.peer,
            presence: known.presence.clone(),
        });
        self.ends.present.send_replace(present.collect());
    }

    /// Where neighbours reach this device.
    fn addresses(&self) -> Vec<String> {
        let all: Vec<&Multiaddr> = self.swarm.listeners().collect();
        let is_loopback =
            |a: &&Multiaddr| socket(a).is_some_and(|address| address.ip().is_loopback());
        // Of use to nobody else, unless there is nothing else.
        let outside: Vec<_> = all.iter().filter(|a| !is_loopback(a)).collect();
        let chosen = if outside.is_empty() {
            all.iter().collect()
        } else {
            outside
        };
        chosen.into_iter().map(ToString::to_string).collect()
    }

    fn give(&mut self, input: Input) {
        let now_ms = self.clock.now_ms();
        let key = &self.key;
        let actions = self
            .machine
            .step(input, now_ms, &mut |statement| wire::sign(key, statement));
        for action in actions {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(peer, frame) => self.send(&peer, wire::encode(&frame)),
            Action::Dial(peer) => self.dial(peer),
            // The connection may have other streams; without any it ends by itself.
            Action::Close(peer) => self.close(&peer),
            Action::Came(peer) => {
                tracing::info!(device = self.name(&peer), "a neighbour is there");
                self.tell_present();
            }
            Action::Went(peer) => {
                tracing::info!(device = self.name(&peer), "a neighbour is gone");
                self.tell_present();
            }
        }
    }

    /// A peer's name on the roster.
    fn name(&self, peer: &Peer) -> String {
        let roster = self.rosters.newest();
        let name = roster.and_then(|roster| roster.name(peer).map(ToString::to_string));
        name.unwrap_or_else(|| peer.to_string())
    }

    fn roster(&mut self) {
        let roster = self.rosters.current();
        let members = roster
            .as_ref()
            .map(|roster| roster.members())
            .unwrap_or_default();
        self.give(Input::Members(members));
        let known: Vec<Peer> = self.found.keys().copied().collect();
        for peer in known {
            self.give(Input::Found(peer));
        }
        self.hang_up_on_strangers();
        if roster.is_some() && self.links.is_empty() {
            // Nobody was let in before, and some may be now.
            self.search.reset();
            self.search();
        }
        if let Some(roster) = roster {
            let version = wire::version(roster.roster.version);
            for peer in self.links.keys().copied().collect::<Vec<_>>() {
                self.send(&peer, version.clone());
            }
        }
    }

    // ---- links

    fn send(&mut self, peer: &Peer, bytes: Vec<u8>) {
        let Some(link) = self.links.get(peer) else {
            return;
        };
        if link.out.try_send(bytes).is_err() {
            tracing::debug!(device = self.name(peer), "too slow a neighbour");
            let number = link.number;
            self.end(*peer, number, "it does not read what it is sent");
        }
    }

    /// A stream of presence with a peer: either of the two has opened it.
    fn link(&mut self, id: PeerId, stream: Stream) {
        let Some(peer) = peer(&id).filter(|peer| self.rosters.admits(peer)) else {
            return;
        };
        self.numbers += 1;
        let (out, waiting) = mpsc::channel(WAITING);
        let link = Link {
            number: self.numbers,
            out,
            stop: CancellationToken::new(),
            forgeries: 0,
        };
        let (reader, writer) = stream.split();
        let (number, stop) = (link.number, link.stop.clone());
        let tell = self.tell.clone();
        tokio::spawn(async move {
            let why = tokio::select! {
                () = stop.cancelled() => return,
                why = read(reader, peer, number, &tell) => why,
                why = write(writer, waiting) => why,
            };
            let _ = tell.send(News::Ended(peer, number, why)).await;
        });
        self.failures.remove(&peer);
        self.search.reset();
        // The newer one counts: the other end may have lost the older.
        if let Some(old) = self.links.insert(peer, link) {
            old.stop.cancel();
            self.give(Input::Down(peer));
        }
        if let Some(roster) = self.rosters.current() {
            self.send(&peer, wire::version(roster.roster.version));
        }
        self.give(Input::Up(peer));
    }

    fn end(&mut self, peer: Peer, number: u64, why: &str) {
        if self
            .links
            .get(&peer)
            .is_some_and(|link| link.number == number)
        {
            tracing::debug!(device = self.name(&peer), why, "a link has ended");
            self.close(&peer);
            self.hang_up(&peer);
            self.give(Input::Down(peer));
        }
    }

    fn close(&mut self, peer: &Peer) {
        if let Some(link) = self.links.remove(peer) {
            link.stop.cancel();
        }
    }

    /// Ends everything with those that are not on the roster any more, linked or not.
    fn hang_up_on_strangers(&mut self) {
        let connected: Vec<Peer> = self.wires.keys().copied().collect();
        for peer in connected {
            if !self.rosters.admits(&peer) {
                self.hang_up(&peer);
            }
        }
    }

    /// Ends everything with a peer.
    fn hang_up(&mut self, peer: &Peer) {
        for wire in self.wires.get(peer).cloned().unwrap_or_default() {
            self.swarm.close_connection(wire.id);
        }
    }

    fn hear(&mut self, news: News) {
        match news {
            News::Opened(id, stream) => self.link(id, stream),
            News::NotOpened(id, why) => {
                if let Some(peer) = peer(&id) {
                    self.failed(peer, why);
                }
            }
            News::Ended(peer, number, why) => self.end(peer, number, &why),
            News::Came(peer, number, came) => {
                if self
                    .links
                    .get(&peer)
                    .is_some_and(|link| link.number == number)
                {
                    self.came(peer, number, came);
                }
            }
        }
    }

    fn came(&mut self, from: Peer, number: u64, came: Came) {
        let frame = match came {
            Came::Beat => Frame::Beat,
            Came::Probe => Frame::Probe,
            Came::Sum(sum) => Frame::Sum(sum),
            Came::Tell(envelope) => {
                if !self.seen.insert(&envelope) {
                    // It is alive all the same.
                    return self.give(Input::Frame(from, Frame::Beat));
                }
                let Some(signed) = wire::open(&envelope) else {
                    return self.forged(from, number);
                };
                Frame::Tell(signed)
            }
            Came::Version(theirs) => {
                let own = self.rosters.current();
                let version = own.as_ref().map_or(0, |own| own.roster.version);
                match own.filter(|_| version > theirs) {
                    Some(newer) => self.send(&from, wire::roster(&newer.signed)),
                    // Whoever has the newer one sends it when it hears what this device has.
                    None if version < theirs => self.send(&from, wire::version(version)),
                    None => {}
                }
                return;
            }
            Came::Roster(signed) => {
                match self.rosters.offer(&signed) {
                    Ok(true) => {
                        tracing::info!(
                            from = self.name(&from),
                            "a neighbour brought a newer roster"
                        );
                    }
                    Ok(false) => {}
                    Err(why) => {
                        tracing::debug!("a neighbour's roster is not taken: {why}");
                        self.forged(from, number);
                    }
                }
                return;
            }
        };
        self.give(Input::Frame(from, frame));
    }

    fn forged(&mut self, from: Peer, number: u64) {
        self.counters.forgeries.add(1);
        let Some(link) = self.links.get_mut(&from) else {
            return;
        };
        link.forgeries += 1;
        if link.forgeries >= FORGERIES {
            tracing::warn!(
                device = self.name(&from),
                "a neighbour sends what it has not signed"
            );
            self.end(from, number, "it sends forgeries");
        }
    }

    // ---- connections

    /// Tries those that are written down.
    fn search(&mut self) {
        self.search_at_ms = self.clock.now_ms() + self.search.next(dice::throw());
        for address in self.config.peers.clone() {
            self.dial_unknown(address);
        }
    }

    fn dial_unknown(&mut self, address: SocketAddr) {
        let to = DialOpts::unknown_peer_id()
            .address(multiaddress(address))
            .build();
        if let Err(error) = self.swarm.dial(to) {
            tracing::debug!(%address, "not dialled: {error}");
        }
    }

    /// Every address that a peer is known by.
    pub(super) fn addresses_of(&self, peer: &Peer) -> Vec<Multiaddr> {
        let said = self.machine.all().find(|known| known.peer == *peer);
        let said = said
            .map(|known| known.presence.addresses.as_slice())
            .unwrap_or_default();
        let mut all: Vec<Multiaddr> = said.iter().filter_map(|text| text.parse().ok()).collect();
        // Nothing but plain addresses: others would need resolvers and relays that are not here.
        all.extend(self.found.get(peer).into_iter().flatten().cloned());
        all.retain(|address| socket(address).is_some());
        all.sort();
        all.dedup();
        all
    }

    fn dial(&mut self, peer: Peer) {
        let addresses = self.addresses_of(&peer);
        let Some(id) = id(&peer).filter(|_| !addresses.is_empty()) else {
            return self.failed(peer, "no address of it is known".into());
        };
        // It may be connected already, for something else.
        if self.wires.get(&peer).is_some_and(|wires| !wires.is_empty()) {
            return self.open(id);
        }
        let to = DialOpts::peer_id(id)
            .addresses(addresses)
            .condition(PeerCondition::Always)
            .build();
        if let Err(error) = self.swarm.dial(to) {
            self.failed(peer, error.to_string());
        }
    }

    /// Somebody wants a stream: over the connection that there is, or a new one.
    fn want(&mut self, wanted: Wanted) {
        let peer = wanted.peer;
        if self.wires.get(&peer).is_some_and(|wires| !wires.is_empty()) {
            return streams::open(&self.streams, wanted);
        }
        let is_dialled = self.waiting.contains_key(&peer);
        self.waiting.entry(peer).or_default().push(wanted);
        if !is_dialled {
            self.dial(peer);
        }
    }

    fn failed(&mut self, peer: Peer, why: String) {
        for wanted in self.waiting.remove(&peer).unwrap_or_default() {
            let _ = wanted.back.send(Err(why.clone()));
        }
        self.failures.insert(peer, why);
        // Only what was asked for can fail twice.
        self.give(Input::Unreachable(peer));
    }

    /// Opens a stream of presence over a connection.
    fn open(&self, id: PeerId) {
        let (mut streams, tell) = (self.streams.clone(), self.tell.clone());
        tokio::spawn(async move {
            let opened = streams.open_stream(id, StreamProtocol::new(PRESENCE));
            let news = match tokio::time::timeout(HANDSHAKE, opened).await {
                Ok(Ok(stream)) => News::Opened(id, stream),
                Ok(Err(error)) => News::NotOpened(id, error.to_string()),
                Err(_) => News::NotOpened(id, "it does not answer".into()),
            };
            let _ = tell.send(news).await;
        });
    }

    fn event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => {
                let Some(peer) = peer(&peer_id) else { return };
                self.connected(peer_id, peer, connection_id, endpoint.is_dialer());
            }
            SwarmEvent::ConnectionClosed {
                peer_id,
                connection_id,
                ..
            } => {
                let Some(peer) = peer(&peer_id) else { return };
                if let Some(wires) = self.wires.get_mut(&peer) {
                    wires.retain(|wire| wire.id != connection_id);
                    if wires.is_empty() {
                        self.wires.remove(&peer);
                    }
                }
            }
            SwarmEvent::OutgoingConnectionError {
                peer_id: Some(id),
                error,
                ..
            } => {
                if let Some(peer) = peer(&id).filter(|peer| !self.links.contains_key(peer)) {
                    self.failed(peer, doctor::in_words(&error.to_string()));
                }
            }
            SwarmEvent::IncomingConnectionError { error, .. } => {
                tracing::debug!("somebody was turned away: {error}");
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                tracing::info!(%address, "neighbours reach this device");
                self.look();
            }
            SwarmEvent::ListenerClosed {
                reason: Err(error), ..
            } => {
                tracing::warn!("neighbours cannot reach this device any more: {error}");
            }
            SwarmEvent::Behaviour(BehaviourEvent::Mdns(mdns::Event::Discovered(found))) => {
                for (id, address) in found {
                    let Some(peer) = peer(&id).filter(|peer| *peer != self.me) else {
                        continue;
                    };
                    if self.found.len() >= MAX_MEMBERS && !self.found.contains_key(&peer) {
                        continue;
                    }
                    let known = self.found.entry(peer).or_default();
                    if !known.contains(&address) {
                        known.push(address);
                        known.truncate(8);
                    }
                    self.give(Input::Found(peer));
                }
            }
            _ => {}
        }
    }

    /// Of two connections with one peer, that which the lower key has dialled stays; of two that the same one has
    /// dialled, the newer. Both ends come to the same.
    fn connected(&mut self, id: PeerId, peer: Peer, connection: ConnectionId, is_mine: bool) {
        let wires = self.wires.entry(peer).or_default();
        let rightful = self.me < peer;
        let new = Wire {
            id: connection,
            is_mine,
        };
        let old: Vec<Wire> = wires.clone();
        wires.push(new);
        let is_worse = old
            .iter()
            .any(|old| old.is_mine != is_mine && old.is_mine == rightful);
        if is_worse {
            self.swarm.close_connection(connection);
            return;
        }
        for old in old {
            self.swarm.close_connection(old.id);
        }
        for wanted in self.waiting.remove(&peer).unwrap_or_default() {
            streams::open(&self.streams, wanted);
        }
        if is_mine {
            self.open(id);
        }
    }

    // ---- for people

    fn answer(&self, request: Request) {
        let Request { what, back } = request;
        let said = doctor::answer(
            &what,
            &doctor::Facts {
                me: self.me,
                machine: &self.machine,
                rosters: &self.rosters,
                listening: self.addresses(),
                failures: &self.failures,
                links: self.links.keys().copied().collect(),
                now_ms: self.clock.now_ms(),
                counters: &self.counters,
                addresses: &|peer| self.addresses_of(peer),
            },
        );
        let _ = back.send(said);
    }
}

fn listen(swarm: &mut Swarm<Behaviour>, address: SocketAddr) -> Result<(), String> {
    let Err(error) = swarm.listen_on(multiaddress(address)) else {
        return Ok(());
    };
    tracing::warn!(%address, "the mesh takes any other port: {error}");
    let any = SocketAddr::new(address.ip(), 0);
    let done = swarm.listen_on(multiaddress(any));
    done.map(|_| ()).map_err(|error| error.to_string())
}

/// Reads a link to its end, and says why it ended. Whoever says too much is read slowly.
async fn read(
    mut from: impl libp2p::futures::AsyncRead + Unpin,
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
async fn write(
    mut to: impl libp2p::futures::AsyncWrite + Unpin,
    mut waiting: mpsc::Receiver<Vec<u8>>,
) -> String {
    let mut many = Vec::new();
    while let Some(first) = waiting.recv().await {
        many.extend_from_slice(&first);
        while many.len() < 16 * 1024
            && let Ok(next) = waiting.try_recv()
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
        many.clear();
    }
    "it was closed here".into()
}

//! Carries out what [`mesh_core::neighbours`] decides: links, dials, signatures, and who is to know.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol, Swarm, Transport,
    connection_limits::{self, ConnectionLimits},
    core::upgrade::Version,
    futures::StreamExt,
    identity::Keypair,
    mdns, noise,
    swarm::{ConnectionId, NetworkBehaviour, behaviour::toggle::Toggle},
    tcp, yamux,
};
use libp2p_stream::IncomingStreams;
use mesh_core::{
    neighbours::{Action, Frame, Input, Neighbours},
    roster::Peer,
};
use tokio::{sync::mpsc, time::interval};
use tokio_util::sync::CancellationToken;

use super::{
    MeshConfig,
    admission::Admission,
    dialling::Places,
    doctor,
    links::{Link, News, Seen, WAITING_FOR_ALL},
    local::Request,
    names::{multiaddress, peer, socket},
    own::Own,
    roster::Rosters,
    streams::{Ends, Neighbour, Service, Wanted},
    wire::{self, Came, PRESENCE},
};
use crate::{clock::Monotonic, counters::Counters, dice};

/// The machine is asked so often: a fraction of a beat.
const TICK: Duration = Duration::from_millis(250);
/// The device looks at itself so often.
const LOOK_TICKS: u64 = 20;
/// Has the roster run out? Looked at so often.
const EXPIRY_TICKS: u64 = 40;
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
/// What neighbours say, until it is looked at: they wait.
const NEWS: usize = 256;
/// Envelopes with a signature that is not good, from one neighbour, until it is let go.
const FORGERIES: u32 = 3;
/// Addresses at which one peer was found: those of its networks, and of earlier leases.
const FOUND: usize = 8;
/// So often mDNS asks again: who comes asks by itself, and is told of the others by those who answer.
const MDNS_EVERY: Duration = Duration::from_secs(3_600);

mod connections;

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    streams: libp2p_stream::Behaviour,
    mdns: Toggle<mdns::tokio::Behaviour>,
    limits: connection_limits::Behaviour,
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
    /// Why a peer could not be reached the last time, since it was last reached.
    failures: BTreeMap<Peer, String>,
    /// Where somebody may be whom nobody tells of.
    places: Places,
    seen: Seen,
    tell: mpsc::Sender<News>,
    news: mpsc::Receiver<News>,
    numbers: u64,
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
        let places = Places::written(&config.peers);
        Ok(Self {
            swarm,
            streams,
            incoming,
            machine: Neighbours::new(me, life, dice::throw()),
            key,
            me,
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
            places,
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
        let mut meeting = self.rosters.meeting().others();
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
                Ok(()) = meeting.changed() => self.named(),
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
        self.search();
        if ticks.is_multiple_of(EXPIRY_TICKS) && self.rosters.current().is_none() {
            // It may have run out.
            self.seen.clear();
            self.give(Input::Members(Default::default()));
            self.hang_up_on_strangers();
        }
        self.let_go_of_the_slowest();
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
        let addresses = self.addresses();
        let sockets = addresses.iter().filter_map(|text| text.parse().ok());
        let sockets = sockets.filter_map(|address| socket(&address));
        self.rosters.meeting().listens(sockets);
        let presence = self.own.look(addresses);
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
                self.failures.remove(&peer);
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
        self.seen.clear();
        self.give(Input::Members(members));
        let known: Vec<Peer> = self.found.keys().copied().collect();
        for peer in known {
            self.give(Input::Found(peer));
        }
        self.hang_up_on_strangers();
        self.named();
        if roster.is_some() && self.links.is_empty() {
            self.places.begin();
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
        if !link.send(bytes) {
            tracing::debug!(device = self.name(peer), "too slow a neighbour");
            let number = link.number;
            self.end(*peer, number, "it does not read what it is sent");
        }
    }

    /// Many that are slow are a burden that no one of them is.
    fn let_go_of_the_slowest(&mut self) {
        while self.links.values().map(Link::waiting).sum::<usize>() > WAITING_FOR_ALL {
            let slowest = self.links.iter().max_by_key(|(_, link)| link.waiting());
            let Some((peer, number)) = slowest.map(|(peer, link)| (*peer, link.number)) else {
                return;
            };
            self.end(peer, number, "too much waits for it");
        }
    }

    /// A stream of presence with a peer: either of the two has opened it.
    fn link(&mut self, id: PeerId, stream: Stream) {
        let Some(peer) = peer(&id).filter(|peer| self.rosters.admits(peer)) else {
            return;
        };
        self.numbers += 1;
        let link = Link::start(peer, self.numbers, stream, self.tell.clone());
        self.failures.remove(&peer);
        // The newer one counts: the other end may have lost the older.
        if let Some(old) = self.links.insert(peer, link) {
            old.stop();
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
            link.stop();
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
                if self.seen.has(&envelope) {
                    // It is alive all the same.
                    return self.give(Input::Frame(from, Frame::Beat));
                }
                let Some(signed) = wire::open(&envelope) else {
                    return self.forged(from, number);
                };
                let statement = signed.statement.clone();
                self.give(Input::Frame(from, Frame::Tell(signed)));
                if self.machine.is_settled(&statement) {
                    self.seen.insert(&envelope);
                }
                return;
            }
            Came::Version(theirs) => return self.compare(from, theirs),
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

    /// A neighbour says which roster it has. The newer one is sent once over a link: whoever did not take it then does not take
    /// it now, and a question is so much smaller than the answer.
    fn compare(&mut self, from: Peer, theirs: u64) {
        let own = self.rosters.current();
        let version = own.as_ref().map_or(0, |own| own.roster.version);
        match own.filter(|_| version > theirs) {
            Some(newer) => {
                let Some(link) = self.links.get_mut(&from) else {
                    return;
                };
                if std::mem::replace(&mut link.roster, version) < version {
                    self.send(&from, wire::roster(&newer.signed));
                }
            }
            // Whoever has the newer one sends it when it hears what this device has.
            None if version < theirs => self.send(&from, wire::version(version)),
            None => {}
        }
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
                places: self.places.shown().collect(),
                own: &self.own,
                time: self.rosters.time(),
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

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;

//! Whom the node dials, and which of its connections stay.

use std::net::SocketAddr;

use libp2p::{
    Multiaddr, PeerId, StreamProtocol, mdns,
    swarm::{
        ConnectionId, DialError, SwarmEvent,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use mesh_core::{
    meeting::Meeting,
    neighbours::Input,
    roster::{MAX_MEMBERS, Peer},
};

use super::{
    super::{
        doctor,
        links::News,
        names::{id, multiaddress, peer, socket},
        streams::{self, Wanted},
        wire::PRESENCE,
    },
    BehaviourEvent, FOUND, HANDSHAKE, Node, Wire,
};
use crate::dice;

impl Node {
    /// Where the coordinator says that others are: those that are on the roster.
    pub(super) fn named(&mut self) {
        let Meeting { at, .. } = self.rosters.meeting().others().borrow().clone();
        let roster = self.rosters.newest();
        let named = at.into_iter().filter_map(|place| {
            let peer = roster.as_ref()?.roster.peer_of(place.device.as_str())?;
            (peer != self.me).then_some((peer, place.address))
        });
        let named: Vec<_> = named.collect();
        self.places.name(&named, self.clock.now_ms(), dice::throw());
    }

    /// Dials where somebody may be whom nobody has told of.
    pub(super) fn search(&mut self) {
        let mut places = std::mem::take(&mut self.places);
        let due = places.due(self.clock.now_ms(), |peer, address| {
            self.is_met(peer, address)
        });
        self.places = places;
        for (n, address, named) in due {
            let address = multiaddress(address);
            let to = match named.as_ref().and_then(id) {
                Some(id) => DialOpts::peer_id(id)
                    .addresses(vec![address])
                    .condition(PeerCondition::Always)
                    .build(),
                None => DialOpts::unknown_peer_id().address(address).build(),
            };
            let by = to.connection_id();
            self.places.dialled(n, by);
            if let Err(error) = self.swarm.dial(to) {
                self.not_there(by, &error);
            }
        }
    }

    /// Is somebody there who is known by this address? `peer` was to be there, or has answered there.
    pub(super) fn is_met(&self, peer: Option<Peer>, address: SocketAddr) -> bool {
        let is_there = |peer: &Peer| self.machine.presence(peer).is_some();
        let is_its = |peer: &Peer| {
            let all = self.addresses_of(peer);
            all.iter().any(|known| socket(known) == Some(address))
        };
        // By its own word: what others say of an address keeps nobody from trying it.
        peer.as_ref().is_some_and(is_there) || self.wires.keys().any(is_its)
    }

    /// Nobody was reached where somebody may be.
    pub(super) fn not_there(&mut self, by: ConnectionId, error: &DialError) {
        if matches!(error, DialError::LocalPeerId { .. }) {
            return self.places.is_own(by);
        }
        let why = doctor::in_words(&error.to_string());
        let is_alone = self.links.is_empty();
        self.places
            .failed(by, &why, is_alone, self.clock.now_ms(), dice::throw());
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

    pub(super) fn dial(&mut self, peer: Peer) {
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
    pub(super) fn want(&mut self, wanted: Wanted) {
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

    pub(super) fn failed(&mut self, peer: Peer, why: String) {
        for wanted in self.waiting.remove(&peer).unwrap_or_default() {
            let _ = wanted.back.send(Err(why.clone()));
        }
        self.failures.insert(peer, why);
        // Only what was asked for can fail twice.
        self.give(Input::Unreachable(peer));
    }

    /// Opens a stream of presence over a connection.
    pub(super) fn open(&self, id: PeerId) {
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

    pub(super) fn event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => {
                let Some(peer) = peer(&peer_id) else { return };
                self.failures.remove(&peer);
                let now_ms = self.clock.now_ms();
                if let Some(address) = self.places.reached(connection_id, peer, now_ms) {
                    self.found(peer, multiaddress(address));
                }
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
                connection_id,
                peer_id,
                error,
            } => {
                self.not_there(connection_id, &error);
                let peer = peer_id.as_ref().and_then(peer);
                if let Some(peer) = peer.filter(|peer| !self.links.contains_key(peer)) {
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
                    if self.found(peer, address) {
                        self.give(Input::Found(peer));
                    }
                }
            }
            _ => {}
        }
    }

    /// A peer is there, or was. False where no more are kept.
    pub(super) fn found(&mut self, peer: Peer, address: Multiaddr) -> bool {
        if self.found.len() >= MAX_MEMBERS && !self.found.contains_key(&peer) {
            return false;
        }
        let known = self.found.entry(peer).or_default();
        if !known.contains(&address) {
            known.push(address);
            known.truncate(FOUND);
        }
        true
    }

    /// Of two connections with one peer, that which the lower key has dialled stays; of two that the same one has
    /// dialled, the newer. Both ends come to the same.
    pub(super) fn connected(
        &mut self,
        id: PeerId,
        peer: Peer,
        connection: ConnectionId,
        is_mine: bool,
    ) {
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
}

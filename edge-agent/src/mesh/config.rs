//! `[mesh]`: how the device and its neighbours find each other.

use std::net::SocketAddr;

use serde::Deserialize;

/// Neighbours that are written down; the others are learnt from them.
const MAX_PEERS: usize = 16;

/// `[mesh]`: the devices of the same site that carry each other's models and readings.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MeshConfig {
    /// Off: everything else works as ever. It is off in any case where the device has no identity.
    pub enabled: bool,
    /// Where neighbours reach this device. If the port is taken, any other is used, and neighbours are told.
    pub listen: SocketAddr,
    /// Neighbours to begin with, `ADDRESS:PORT`, where mDNS does not reach. At most 16; one that answers is enough.
    pub peers: Vec<SocketAddr>,
    /// Finds neighbours on the local network by multicast.
    pub mdns: bool,
    /// Carries neighbours that have no uplink to the coordinator's doors, each connection with so many KiB/s. 0 carries nobody.
    pub carry_kib_per_s: u32,
    /// Serves neighbours models from its disk, all together with so many KiB/s; at least 64.
    pub serve_kib_per_s: u32,
}

/// Registered for nobody; the same on every device, so that a firewall can be told.
const PORT: u16 = 7473;

/// A device's readings and pictures fit many times; a slow line is still its owner's.
const CARRY_KIB_PER_S: u32 = 512;

/// A third of what a fast local network of such boards carries, and a tenth of a processor to encrypt it.
const SERVE_KIB_PER_S: u32 = 4_096;

/// Less than a chunk in the time that neighbours wait for one helps nobody.
const MIN_SERVE_KIB_PER_S: u32 = 64;

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: SocketAddr::from(([0, 0, 0, 0], PORT)),
            peers: Vec::new(),
            mdns: true,
            carry_kib_per_s: CARRY_KIB_PER_S,
            serve_kib_per_s: SERVE_KIB_PER_S,
        }
    }
}

impl MeshConfig {
    /// What is wrong: field and reason.
    pub(crate) fn mistakes(&self) -> Vec<(&'static str, String)> {
        let mut mistakes = Vec::new();
        if self.peers.len() > MAX_PEERS {
            mistakes.push(("peers", "at most 16: each knows the others".into()));
        }
        if self.peers.iter().any(|peer| peer.port() == 0) {
            mistakes.push(("peers", "each needs a port, ADDRESS:PORT".into()));
        }
        if self.serve_kib_per_s < MIN_SERVE_KIB_PER_S {
            mistakes.push(("serve_kib_per_s", format!("at least {MIN_SERVE_KIB_PER_S}")));
        }
        mistakes
    }
}

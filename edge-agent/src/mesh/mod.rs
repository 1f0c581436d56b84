//! The site's devices and how they know of each other.
//!
//! ```text
//!  coordinator ──signed roster──> broker ──> uplink ──> rosters <──── neighbours (they pass it on)
//!                                                          │ who is let in
//!   mDNS, mesh.peers,
//!   the coordinator ───addresses──> node ══ Noise over TCP ╪══════> other devices
//!                                    │ ▲
//!                                    ▼ │  mesh_core::neighbours: who is there, whom to link with, what to say
//!                            mesh.sock: `edge-agent mesh status | doctor`
//! ```
//!
//! It has a thread and a runtime of its own, so that neither readings nor frames ever wait for a neighbour. Without it
//! everything else works as ever.

mod admission;
mod carry;
mod config;
mod dialling;
mod doctor;
mod links;
mod local;
mod meeting;
mod names;
mod node;
mod own;
mod roster;
mod status;
mod streams;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod wire;

/// What one needs to play a neighbour that means no good, in tests and benchmarks.
pub mod enemy {
    pub use super::{
        names::{keypair, peer},
        wire::{PRESENCE, opened, tell},
    };
}

use std::{path::Path, sync::Arc, thread::JoinHandle};

pub(crate) use carry::{Carriers, Carrying, Detour, Door};
pub use config::MeshConfig;
pub use doctor::Finding;
use mesh_core::roster::Peer;
pub(crate) use own::{DEVICES, Own, accelerators, warmth_now};
pub(crate) use roster::Rosters;
pub use status::{NeighbourStatus, OffloadStatus, PlaceStatus, RosterStatus, Status};
pub(crate) use streams::{Ends, Neighbour, Present, Service, Site};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::{
    local::Question,
    node::{Node, Start},
};
use crate::{
    agent,
    config::Config,
    counters::Counters,
    identity::{Tls, TrustedTime},
};

/// Questions from command lines.
const QUESTIONS: usize = 4;

/// A running mesh.
pub(crate) struct Mesh {
    thread: JoinHandle<()>,
    stop: CancellationToken,
}

/// The device's part in the mesh.
pub(crate) struct Credentials {
    /// Its private key, PKCS#8.
    pub(crate) key: Vec<u8>,
    pub(crate) time: Arc<TrustedTime>,
}

/// What the mesh is made of.
pub(crate) struct Parts {
    pub(crate) rosters: Rosters,
    pub(crate) own: Own,
    pub(crate) ends: Ends,
    /// What neighbours may ask of this device.
    pub(crate) services: Vec<Service>,
}

impl Credentials {
    /// The device among its neighbours; nothing if its key is of a kind that they do not know.
    pub(crate) fn me(&self) -> Option<Peer> {
        let key = names::keypair(&self.key).ok()?;
        names::peer(&key.public().to_peer_id())
    }
}

impl Mesh {
    /// The rosters of the device: there as soon as it has an identity, and filled by the uplink.
    pub(crate) fn rosters(config: &Config, tls: &Tls, credentials: &Credentials) -> Rosters {
        let time = Arc::clone(&credentials.time);
        Rosters::open(&config.data, config.site.clone(), tls.clone(), time)
    }

    /// Starts its thread. A mesh that cannot start is said so, and left out.
    pub(crate) fn start(
        config: &Config,
        credentials: &Credentials,
        parts: Parts,
        counters: Counters,
    ) -> Result<Self, String> {
        let Parts {
            rosters,
            own,
            ends,
            services,
        } = parts;
        let key = names::keypair(&credentials.key)?;
        let life = u64::try_from(credentials.time.now_ms()).unwrap_or(0);
        let (ask, requests) = mpsc::channel(QUESTIONS);
        let start = Start {
            config: config.mesh.clone(),
            key,
            life,
            rosters,
            own,
            counters,
            requests,
            ends,
            services,
        };
        let data = config.data.clone();
        let stop = CancellationToken::new();
        let ended = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        let run = move || {
            runtime.block_on(async {
                match Node::new(start) {
                    Ok(node) => {
                        let _socket = tokio::spawn(local::serve(data, ask, ended.clone()));
                        node.run(ended).await;
                    }
                    Err(why) => tracing::error!("the device has no neighbours: {why}"),
                }
            });
        };
        let thread = agent::thread("mesh", run).map_err(|error| error.to_string())?;
        Ok(Self { thread, stop })
    }

    /// Says goodbye to the neighbours and ends; gives the thread to wait for.
    pub(crate) fn stop(self) -> JoinHandle<()> {
        self.stop.cancel();
        self.thread
    }
}

/// What the agent that runs on this data folder says of its neighbours.
///
/// # Errors
/// In words, if no agent answers.
pub fn status_of(data: &Path) -> Result<Status, String> {
    let answer = local::ask(data, &Question::Status)?;
    serde_json::from_str(&answer).map_err(|error| error.to_string())
}

/// `edge-agent mesh status`
///
/// # Errors
/// In words, if no agent answers.
pub(crate) fn status(data: &Path, json: bool) -> Result<String, String> {
    if json {
        return Ok(local::ask(data, &Question::Status)? + "\n");
    }
    Ok(status::shown(&status_of(data)?))
}

/// `edge-agent mesh doctor PEER`: what was found, and whether all is well.
///
/// # Errors
/// In words, if no agent answers.
pub(crate) fn examine(data: &Path, peer: &str) -> Result<(String, bool), String> {
    let answer = local::ask(data, &Question::Doctor(peer.to_owned()))?;
    let all: Vec<Finding> = serde_json::from_str(&answer).map_err(|error| error.to_string())?;
    let line = |found: &Finding| {
        let mark = if found.well { "ok  " } else { "FAIL" };
        format!("{mark}  {}: {}\n", found.what, found.said)
    };
    Ok((
        all.iter().map(line).collect(),
        all.iter().all(|found| found.well),
    ))
}

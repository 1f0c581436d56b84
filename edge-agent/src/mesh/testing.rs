//! Real nodes on loopback, each on a thread of its own as in an agent.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    thread::JoinHandle,
    time::Duration,
};

use libp2p::identity::{Keypair, ecdsa};
use mesh_core::roster::Peer;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    Ends, MeshConfig, Own, Rosters, Service,
    names::peer,
    node::{Node, Start},
};
use crate::{
    counters::Counters,
    update::{Engines, Holding},
};

/// How long something that should happen may take on a busy machine.
const BOUND: Duration = Duration::from_secs(60);

/// A device among its neighbours.
pub(crate) struct Member {
    key: Keypair,
    pub(crate) peer: Peer,
    address: SocketAddr,
}

/// So many devices of one site.
pub(crate) fn members(count: usize) -> Vec<Member> {
    let member = |_| {
        let key: Keypair = ecdsa::Keypair::generate().into();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        Member {
            peer: peer(&key.public().to_peer_id()).unwrap(),
            address: port.local_addr().unwrap(),
            key,
        }
    };
    (0..count).map(member).collect()
}

/// A node that runs, until it is dropped.
pub(crate) struct Running {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Starts the `n`-th of the members.
pub(crate) fn start(
    members: &[Member],
    n: usize,
    ends: Ends,
    services: Vec<Service>,
    holding: watch::Receiver<Holding>,
    counters: Counters,
) -> Running {
    let peers: Vec<Peer> = members.iter().map(|member| member.peer).collect();
    let rosters = Rosters::of_test(&peers);
    let config = MeshConfig {
        listen: members[n].address,
        peers: members.iter().map(|member| member.address).collect(),
        mdns: false,
        ..MeshConfig::default()
    };
    let key = members[n].key.clone();
    let stop = CancellationToken::new();
    let ended = stop.clone();
    let thread = std::thread::spawn(move || {
        let (_ask, requests) = mpsc::channel(1);
        let start = Start {
            config,
            key,
            life: 1,
            rosters,
            own: Own {
                engines: watch::channel(Engines::default()).1,
                uplink: watch::channel(true).1,
                answers: true,
                holding,
            },
            counters,
            requests,
            ends,
            services,
        };
        runtime().block_on(async { Node::new(start).unwrap().run(ended).await });
    });
    Running {
        stop,
        thread: Some(thread),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Looks again and again until something is so.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    runtime().block_on(async {
        let end = tokio::time::Instant::now() + BOUND;
        while !is_so() {
            assert!(tokio::time::Instant::now() < end, "{what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
}

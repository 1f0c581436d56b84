//! Real nodes on loopback, each on a thread of its own as in an agent.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    thread::JoinHandle,
    time::Duration,
};

use libp2p::identity::{Keypair, ecdsa};
use mesh_core::roster::Peer;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{
    Ends, MeshConfig, Own, Rosters, Service, Site, Status,
    local::{Question, Request},
    names::peer,
    node::{Node, Start},
};
use crate::{
    clock::WallClock,
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

/// Starts the `n`-th of the members, that knows where all of them are.
pub(crate) fn start(
    members: &[Member],
    n: usize,
    ends: Ends,
    services: Vec<Service>,
    holding: watch::Receiver<Holding>,
    counters: Counters,
) -> Running {
    let rosters = rosters(members);
    let all: Vec<usize> = (0..members.len()).collect();
    let parts = (rosters, ends, services, holding, counters);
    run(members, n, &all, parts).0
}

/// A roster with all of them.
pub(super) fn rosters(members: &[Member]) -> Rosters {
    let peers: Vec<Peer> = members.iter().map(|member| member.peer).collect();
    Rosters::of_test(&peers)
}

/// A device that has nothing and serves nothing, and where some of the members are written down.
pub(super) struct Quiet {
    pub(super) rosters: Rosters,
    pub(super) site: Site,
    ask: mpsc::Sender<Request>,
    pub(super) running: Running,
}

impl Quiet {
    pub(super) fn start(members: &[Member], n: usize, peers: &[usize], rosters: Rosters) -> Self {
        let (site, ends) = Site::new();
        let holding = watch::channel(Holding::default()).1;
        let parts = (
            rosters.clone(),
            ends,
            Vec::new(),
            holding,
            Counters::default(),
        );
        let (running, ask) = run(members, n, peers, parts);
        Self {
            rosters,
            site,
            ask,
            running,
        }
    }

    /// Does it see exactly these?
    pub(super) fn sees(&self, members: &[Member], who: &[usize]) -> bool {
        let mut seen: Vec<Peer> = self.site.present().iter().map(|n| n.peer).collect();
        let mut wanted: Vec<Peer> = who.iter().map(|n| members[*n].peer).collect();
        seen.sort_unstable();
        wanted.sort_unstable();
        seen == wanted
    }

    pub(super) fn status(&self) -> Status {
        let (back, answer) = oneshot::channel();
        let what = Question::Status;
        // On a thread that drives nothing else.
        let ask = || {
            self.ask.blocking_send(Request { what, back }).unwrap();
            answer.blocking_recv().unwrap()
        };
        let said = std::thread::scope(|scope| scope.spawn(ask).join().unwrap());
        serde_json::from_str(&said).unwrap()
    }
}

impl Member {
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn key(&self) -> &Keypair {
        &self.key
    }
}

type Parts = (
    Rosters,
    Ends,
    Vec<Service>,
    watch::Receiver<Holding>,
    Counters,
);

fn run(
    members: &[Member],
    n: usize,
    peers: &[usize],
    (rosters, ends, services, holding, counters): Parts,
) -> (Running, mpsc::Sender<Request>) {
    let config = MeshConfig {
        listen: members[n].address,
        peers: peers.iter().map(|n| members[*n].address).collect(),
        mdns: false,
        ..MeshConfig::default()
    };
    let key = members[n].key.clone();
    let stop = CancellationToken::new();
    let ended = stop.clone();
    let (ask, requests) = mpsc::channel(1);
    let thread = std::thread::spawn(move || {
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
                accelerators: Vec::new(),
                wall: WallClock::system(),
            },
            counters,
            requests,
            ends,
            services,
        };
        runtime().block_on(async { Node::new(start).unwrap().run(ended).await });
    });
    let running = Running {
        stop,
        thread: Some(thread),
    };
    (running, ask)
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

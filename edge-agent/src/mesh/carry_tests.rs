//! Real nodes on loopback: one without an uplink, one that carries, and a coordinator of a few lines.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
};

use super::*;
use crate::{
    http::{self, Patience},
    mesh::testing::{Running, members, start, until},
    update::Holding,
};

const PATIENCE: Patience = Patience {
    connect: Duration::from_secs(20),
    answer: Duration::from_secs(20),
    body: Duration::from_secs(20),
    whole: None,
};

/// Answers every request alike, one after the other.
fn coordinator() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut asked = Vec::new();
            let mut block = [0; 1_024];
            while !asked.ends_with(b"\r\n\r\n") {
                match stream.read(&mut block) {
                    Ok(n @ 1..) => asked.extend_from_slice(&block[..n]),
                    _ => break,
                }
            }
            let _ = stream.write_all(
                b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
            );
        }
    });
    address
}

struct Pair {
    /// Of the device without an uplink.
    carriers: Carriers,
    site: Site,
    carrier: Peer,
    /// Does the carrier reach its broker?
    uplink: watch::Sender<bool>,
    counters: Counters,
    _runtime: tokio::runtime::Runtime,
    _nodes: Vec<Running>,
}

impl Pair {
    /// The second one carries to this coordinator, and has no broker.
    fn new(coordinator: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let all = members(2);
        let (uplink, has_uplink) = watch::channel(true);
        let counters = Counters::default();
        let carrying = Carrying {
            doors: Box::new(move |door| match door {
                Door::Coordinator => Some(coordinator.to_string()),
                Door::Broker => None,
            }),
            uplink: has_uplink,
            bytes_per_s: 1 << 20,
            counters: counters.clone(),
        };
        let holding = || watch::channel(Holding::default()).1;
        let (site, ends) = Site::new();
        let (_other, other_ends) = Site::new();
        let nodes = vec![
            start(&all, 0, ends, Vec::new(), holding(), Counters::default()),
            start(
                &all,
                1,
                other_ends,
                vec![carrying.service()],
                holding(),
                counters.clone(),
            ),
        ];
        until("they see each other", || site.present().len() == 1);
        let carriers = {
            let _inside = runtime.enter();
            Carriers::new(site.clone())
        };
        Self {
            carriers,
            site,
            carrier: all[1].peer,
            uplink,
            counters,
            _runtime: runtime,
            _nodes: nodes,
        }
    }
}

#[test]
fn a_request_takes_the_detour_while_there_is_no_uplink() {
    let pair = Pair::new(coordinator());
    let (own, has_own) = watch::channel(false);
    let tls = Tls::none();
    tls.detour().set(pair.carriers.clone(), has_own);
    // Its name means nothing here, and need not.
    let ask = || {
        let agent = http::agent(PATIENCE, &tls);
        let mut answer = agent.get("http://coordinator.invalid:7/x").call()?;
        answer.body_mut().read_to_string()
    };
    assert_eq!(ask().unwrap(), "hello");
    assert_eq!(pair.counters.carried.get(), 1);
    assert!(pair.counters.carried_bytes.get() > 50);
    // With an uplink of its own it asks by itself.
    own.send_replace(true);
    ask().unwrap_err();
    assert_eq!(pair.counters.carried.get(), 1);
    // A carrier that has lost its uplink says so.
    own.send_replace(false);
    pair.uplink.send_replace(false);
    ask().unwrap_err();
    pair.uplink.send_replace(true);
    assert_eq!(ask().unwrap(), "hello");
}

#[test]
fn a_carrier_leads_to_its_own_doors_only() {
    let pair = Pair::new(coordinator());
    let (runtime, carriers) = (pair.carriers.runtime.clone(), pair.carriers.clone());
    let refused = runtime.block_on(carriers.connect(Door::Broker));
    assert!(refused.unwrap_err().to_string().contains("does not reach"));
    let answer = runtime.block_on(async {
        let mut stream = pair
            .site
            .open(pair.carrier, PROTOCOL)
            .await
            .unwrap()
            .compat();
        stream.write_all(&[9]).await.unwrap();
        stream.flush().await.unwrap();
        let mut said = Vec::new();
        stream.read_to_end(&mut said).await.unwrap();
        said
    });
    assert_eq!(answer, [CLOSED], "a door that there is not");
    // No more than its share, at the same time.
    let many = runtime.block_on(async {
        let mut open = Vec::new();
        for _ in 0..EACH + 2 {
            open.extend(carriers.connect(Door::Coordinator).await.ok());
        }
        open.len()
    });
    assert_eq!(many, EACH);
    assert_eq!(pair.counters.carried.get(), EACH as u64);
}

#[tokio::test(start_paused = true)]
async fn own_readings_go_first() {
    let counters = Counters::default();
    let carrying = Carrying {
        doors: Box::new(|_| None),
        uplink: watch::channel(true).1,
        bytes_per_s: 1 << 30,
        counters: counters.clone(),
    };
    let (mut theirs, here) = tokio::io::duplex(1_024);
    let (there, mut door) = tokio::io::duplex(1_024);
    let carried = async {
        let _ = copy(here, there, |n| carrying.turn(n)).await;
    };
    let asks = async {
        // How long a byte of somebody else's takes to get to the door.
        let mut pass = async || {
            let begin = tokio::time::Instant::now();
            theirs.write_all(b"x").await.unwrap();
            assert_eq!(door.read_u8().await.unwrap(), b'x');
            begin.elapsed()
        };
        assert_eq!(pass().await, Duration::ZERO, "nothing of its own waits");
        counters.backlog.set(OWN_FIRST);
        assert_eq!(pass().await, Duration::ZERO, "what is just on its way");
        // Until its own are gone …
        counters.backlog.set(OWN_FIRST + 1);
        let gone = async {
            sleep(YIELD / 2).await;
            counters.backlog.set(OWN_FIRST);
        };
        let (waited, ()) = tokio::join!(pass(), gone);
        assert!(waited >= YIELD / 2 && waited < YIELD, "{waited:?}");
        // … but not for ever: a block for each turn goes on while there is more all the time.
        counters.backlog.set(100 * OWN_FIRST);
        for _ in 0..3 {
            let waited = pass().await;
            assert!(waited >= YIELD && waited < YIELD + LOOK, "{waited:?}");
        }
    };
    tokio::select! {
        () = carried => panic!("it has ended"),
        () = asks => {}
    }
}

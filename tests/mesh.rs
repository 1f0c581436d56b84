//! Devices know of each other: real agents, a real coordinator, real keys.

use std::{path::Path, process::Stdio, time::Duration};

use edge_agent::mesh::Status;
use fleet::{
    agent_file::OffloadPart,
    process::EXIT_WITH_STDIN,
    site::{Camera, Plan, Site},
};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, Transport,
    core::upgrade::Version,
    futures::StreamExt,
    identity::{Keypair, ecdsa},
    noise,
    swarm::SwarmEvent,
    tcp, yamux,
};
use tests::{BOUND, Tap, bundle, exactly_once, plan, until};
use tokio::time::sleep;

/// As long as a stranger has to get somewhere.
const STRANGER: Duration = Duration::from_secs(20);

async fn run(node: &str, arguments: &[&str]) -> (bool, String) {
    let mut command = tokio::process::Command::new(node);
    command.args(arguments).stdin(Stdio::null());
    let done = command.env_remove(EXIT_WITH_STDIN).output().await.unwrap();
    let said = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8(said).unwrap())
}

/// `edge-agent mesh status --json` on a device.
async fn status(node: &str, site: &Site, n: usize) -> Option<Status> {
    let config = site.devices[n].config.to_str().unwrap();
    let asked = ["edge-agent", "mesh", "status", "--json", "--config", config];
    let (worked, said) = run(node, &asked).await;
    worked.then(|| serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}")))
}

/// Whom a device sees.
async fn sees(node: &str, site: &Site, n: usize) -> Vec<String> {
    let status = status(node, site, n).await;
    let all = status.map(|status| status.neighbours).unwrap_or_default();
    all.into_iter()
        .filter(|n| n.here)
        .map(|n| n.device)
        .collect()
}

/// Until each of these devices sees exactly the others of them.
async fn all_see_each_other(node: &str, site: &Site, who: &[usize]) {
    let what = format!("{who:?} see each other");
    until(&what, async || {
        for n in who {
            let others = who.iter().filter(|m| *m != n);
            let wanted: Vec<String> = others.map(|m| site.devices[*m].name.clone()).collect();
            if sees(node, site, *n).await != wanted {
                return false;
            }
        }
        true
    })
    .await
    .unwrap();
}

fn quiet_plan(node: &str, root: &Path, agents: usize) -> Plan {
    let mut plan = plan(node, root);
    plan.agents = agents;
    plan.mesh = true;
    // Without a model they are light.
    plan.camera = Camera::None;
    plan.bundle = None;
    plan
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_know_who_is_there_with_and_without_the_coordinator() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut site = Site::start(&quiet_plan(node, &dir.path().join("site"), 4))
        .await
        .unwrap();
    all_see_each_other(node, &site, &[0, 1, 2, 3]).await;
    // They know each other sooner than the broker knows them.
    until("all have said that they have an uplink", async || {
        let status = status(node, &site, 0).await;
        status.is_some_and(|s| s.neighbours.iter().all(|n| n.uplink && n.free_mib > 0))
    })
    .await
    .unwrap();
    let first = status(node, &site, 0).await.unwrap();
    assert_eq!(first.device.as_deref(), Some("d1"));
    let config = site.devices[0].config.to_str().unwrap().to_owned();
    let examine = |peer: &'static str| {
        let config = config.clone();
        async move {
            run(
                node,
                &["edge-agent", "mesh", "doctor", peer, "--config", &config],
            )
            .await
        }
    };
    let (well, said) = examine("d3").await;
    assert!(well, "{said}");
    let (well, said) = examine("nobody").await;
    assert!(!well && said.contains("not on the roster"), "{said}");

    // One dies, and comes back, and all notice.
    site.devices[2].agent.kill().await.unwrap();
    all_see_each_other(node, &site, &[0, 1, 3]).await;
    let (well, said) = examine("d3").await;
    assert!(!well && said.contains("is gone"), "{said}");
    site.devices[2].agent.start().unwrap();
    all_see_each_other(node, &site, &[0, 1, 2, 3]).await;

    // The same with nobody but themselves: whoever starts now trusts what it was told before.
    site.coordinator.kill().await.unwrap();
    until("they notice that there is no uplink", async || {
        let status = status(node, &site, 0).await;
        status.is_some_and(|s| s.neighbours.iter().all(|n| n.here && !n.uplink))
    })
    .await
    .unwrap();
    site.devices[3].agent.kill().await.unwrap();
    all_see_each_other(node, &site, &[0, 1, 2]).await;
    site.devices[3].agent.start().unwrap();
    all_see_each_other(node, &site, &[0, 1, 2, 3]).await;
    site.coordinator.start().unwrap();

    // One that stops says so itself.
    site.devices[1]
        .agent
        .stop(Duration::from_secs(20))
        .await
        .unwrap();
    all_see_each_other(node, &site, &[0, 2, 3]).await;
    site.stop().await.unwrap();
}

/// No multicast, no address that is written down: as in two networks of one site.
#[tokio::test(flavor = "multi_thread")]
async fn two_that_nobody_has_told_of_each_other_meet_by_the_coordinator_and_stay_without_it() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut plan = quiet_plan(node, &dir.path().join("site"), 2);
    plan.spawn = false;
    let mut site = Site::start(&plan).await.unwrap();
    let tap = Tap::start(&site).unwrap();
    for device in &mut site.devices {
        device.file.mesh.peers.clear();
        assert!(!device.file.mesh.mdns);
        device.write_config().unwrap();
        device.agent.start().unwrap();
    }
    all_see_each_other(node, &site, &[0, 1]).await;
    for n in [0, 1] {
        let places = status(node, &site, n).await.unwrap().places;
        assert!(places.iter().all(|place| !place.written), "{places:?}");
    }
    let heard = tap.stop().await;
    assert_eq!(heard.bad, Vec::<String>::new());
    let meeting = heard.last.get("lacewing/v1/demo/_/_/meeting").unwrap();
    assert!(
        meeting.contains(&site.devices[0].file.mesh.listen.to_string()),
        "{meeting}"
    );
    site.coordinator.kill().await.unwrap();
    until("they notice that there is no uplink", async || {
        let status = status(node, &site, 0).await;
        status.is_some_and(|s| s.neighbours.iter().all(|n| n.here && !n.uplink))
    })
    .await
    .unwrap();
    // As long as anybody who is gone would still be thought to be there.
    sleep(Duration::from_secs(10)).await;
    all_see_each_other(node, &site, &[0, 1]).await;
    site.coordinator.start().unwrap();
    site.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_revoked_is_nobodys_neighbour_even_of_those_without_an_uplink() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut site = Site::start(&quiet_plan(node, &dir.path().join("site"), 4))
        .await
        .unwrap();
    all_see_each_other(node, &site, &[0, 1, 2, 3]).await;
    let before = status(node, &site, 0)
        .await
        .unwrap()
        .roster
        .unwrap()
        .version;
    // It cannot hear it from the coordinator.
    site.devices[0].link.cut();
    let data = site.data();
    let data = data.to_str().unwrap();
    let revoke = [
        "cloud-coordinator",
        "device",
        "revoke",
        "--data",
        data,
        "demo/d4",
    ];
    let (worked, said) = run(node, &revoke).await;
    assert!(worked, "{said}");
    all_see_each_other(node, &site, &[0, 1, 2]).await;
    for n in 0..3 {
        let status = status(node, &site, n).await.unwrap();
        assert!(status.roster.unwrap().version > before, "d{}", n + 1);
        assert!(
            status.neighbours.iter().all(|n| n.device != "d4"),
            "{:?}",
            status.neighbours
        );
    }
    // It goes on trying, and is turned away each time.
    until("it is turned away", async || {
        let mut strangers = 0;
        for n in 0..3 {
            strangers += status(node, &site, n).await.map_or(0, |s| s.strangers);
        }
        strangers > 0
    })
    .await
    .unwrap();
    all_see_each_other(node, &site, &[0, 1, 2]).await;
    site.stop().await.unwrap();
}

/// Readings of a device that are stored.
async fn stored(site: &Site, n: usize) -> u64 {
    let seen = site.witness(Default::default()).look().await.unwrap();
    let account = seen.devices.get(&site.devices[n].name);
    account.map_or(0, |account| account.stored)
}

/// Waits until `more` readings of a device are stored than now.
async fn arrive(site: &Site, n: usize, more: u64) {
    let before = stored(site, n).await;
    let what = format!("{more} more readings of d{}", n + 1);
    until(&what, async || stored(site, n).await >= before + more)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_without_an_uplink_is_carried_whoever_dies() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut plan = plan(node, &dir.path().join("site"));
    plan.fps = 5.0;
    plan.mesh = true;
    let mut site = Site::start(&plan).await.unwrap();
    all_see_each_other(node, &site, &[0, 1, 2]).await;
    arrive(&site, 0, 5).await;
    // Its connection stands, and nothing passes any more.
    site.devices[0].link.hang();
    until("it is carried", async || {
        let status = status(node, &site, 0).await;
        status.is_some_and(|status| status.by_neighbours > 0)
    })
    .await
    .unwrap();
    arrive(&site, 0, 20).await;
    // Whoever carries it: one of the two dies, then the other.
    for n in [1, 2] {
        site.devices[n].agent.kill().await.unwrap();
        arrive(&site, 0, 20).await;
        site.devices[n].agent.start().unwrap();
        all_see_each_other(node, &site, &[0, 1, 2]).await;
    }
    // The same with a network that says that it is gone, from a start.
    site.devices[0].link.cut();
    site.devices[0].agent.kill().await.unwrap();
    site.devices[0].agent.start().unwrap();
    arrive(&site, 0, 20).await;
    assert!(status(node, &site, 0).await.unwrap().by_neighbours > 0);
    site.devices[0].link.heal();
    until("it has an uplink of its own again", async || {
        let status = status(node, &site, 1).await;
        let all = status.map(|status| status.neighbours).unwrap_or_default();
        all.iter().any(|n| n.device == "d1" && n.uplink)
    })
    .await
    .unwrap();
    let seen = site.finish(Default::default(), BOUND).await.unwrap();
    exactly_once(&seen.total()).unwrap();
    site.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_board_doubts_its_neighbour_looks_at_and_it_goes_on_alone() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut plan = plan(node, &dir.path().join("site"));
    plan.agents = 2;
    plan.mesh = true;
    plan.spawn = false;
    plan.fps = 5.0;
    plan.bundle = Some(bundle("steel-small"));
    // Drawn pictures, of which no model is sure.
    plan.camera = Camera::Folder {
        path: bundle("steel").join("golden"),
        repeat: true,
    };
    let mut site = Site::start(&plan).await.unwrap();
    site.devices[0].file.offload = Some(OffloadPart {
        escalate: true,
        share: 0.5,
        deadline_ms: 3_000,
        ..OffloadPart::default()
    });
    site.devices[1].file.offload = Some(OffloadPart {
        serve: Some(bundle("steel")),
        ..OffloadPart::default()
    });
    site.devices[1].file.source.clear();
    site.devices[1].file.model = None;
    for device in &mut site.devices {
        device.write_config().unwrap();
        device.agent.start().unwrap();
    }
    until("the neighbour has answered, and was used", async || {
        let asked = status(node, &site, 0).await.map(|s| s.offload);
        let served = status(node, &site, 1).await.map(|s| s.offload.served);
        asked.is_some_and(|asked| asked.answered >= 5) && served >= Some(5)
    })
    .await
    .unwrap();
    // Readings say whose they are, all the way up.
    until(
        "a reading says that the neighbour has computed it",
        async || {
            let tap = Tap::start(&site).unwrap();
            sleep(Duration::from_secs(1)).await;
            let heard = tap.stop().await;
            assert_eq!(heard.bad, Vec::<String>::new());
            heard.last.iter().any(|(topic, text)| {
                topic.ends_with("/d1/cam0/result")
                    && text.contains(r#""by":"d2""#)
                    && text.contains(r#""model":"steel@"#)
            })
        },
    )
    .await
    .unwrap();
    site.devices[1].agent.kill().await.unwrap();
    let before = status(node, &site, 0).await.unwrap().offload;
    sleep(Duration::from_secs(5)).await;
    let after = status(node, &site, 0).await.unwrap().offload;
    // It notices by itself, or by its neighbour's silence, and does not stop.
    assert!(after.asked - before.asked < 10, "{before:?} {after:?}");
    // Nothing was lost or doubled by it.
    site.devices[0].agent.stop(STRANGER).await.unwrap();
    site.bound_sources().await.unwrap();
    site.devices[0].agent.start().unwrap();
    let seen = site
        .witness(Default::default())
        .settle(BOUND)
        .await
        .unwrap();
    exactly_once(&seen.total()).unwrap();
    site.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_no_board_has_room_for_runs_on_two_without_any_coordinator() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut plan = plan(node, &dir.path().join("site"));
    plan.agents = 3;
    plan.mesh = true;
    plan.spawn = false;
    plan.fps = 5.0;
    plan.bundle = Some(bundle("steel-small"));
    plan.camera = Camera::Folder {
        path: bundle("steel").join("golden"),
        repeat: true,
    };
    let mut site = Site::start(&plan).await.unwrap();
    site.devices[0].file.offload = Some(OffloadPart {
        escalate: true,
        share: 1.0,
        below: Some(1.0),
        deadline_ms: 5_000,
        ..OffloadPart::default()
    });
    let large = Some(bundle("steel"));
    site.devices[1].file.offload = Some(OffloadPart {
        serve: large.clone(),
        split: true,
        // Its first layer has room, the others have not.
        room_mib: 1,
        time_share: 0.9,
        ..OffloadPart::default()
    });
    site.devices[2].file.offload = Some(OffloadPart {
        lend: large,
        time_share: 0.9,
        ..OffloadPart::default()
    });
    for device in &mut site.devices[1..] {
        device.file.source.clear();
        device.file.model = None;
    }
    for device in &mut site.devices {
        device.write_config().unwrap();
        device.agent.start().unwrap();
    }
    all_see_each_other(node, &site, &[0, 1, 2]).await;
    // It has named them to each other; from now on they are alone.
    site.coordinator.kill().await.unwrap();
    let answered = async |site: &Site| {
        let asked = status(node, site, 0).await.map(|s| s.offload.answered);
        asked.unwrap_or_default()
    };
    let more = async |site: &Site, what: &str| {
        let before = answered(site).await;
        until(what, async || answered(site).await >= before + 5)
            .await
            .unwrap();
    };
    more(&site, "a model in two parts has answered").await;
    let parts = status(node, &site, 2).await.unwrap().offload.parts;
    assert!(parts >= 5, "{parts} parts");
    site.devices[2].agent.kill().await.unwrap();
    until("nobody is asked for what nobody can answer", async || {
        let before = answered(&site).await;
        sleep(Duration::from_secs(3)).await;
        answered(&site).await == before
    })
    .await
    .unwrap();
    site.devices[2].agent.start().unwrap();
    more(&site, "the lender is back, and the model answers").await;
    // Each frame has become one reading, whoever has answered.
    site.coordinator.start().unwrap();
    site.devices[0].agent.stop(STRANGER).await.unwrap();
    site.bound_sources().await.unwrap();
    site.devices[0].agent.start().unwrap();
    let seen = site
        .witness(Default::default())
        .settle(BOUND)
        .await
        .unwrap();
    exactly_once(&seen.total()).unwrap();
    site.stop().await.unwrap();
}

/// A node of libp2p with a good key that nobody has enrolled.
fn stranger() -> (Swarm<libp2p_stream::Behaviour>, libp2p_stream::Control) {
    let key: Keypair = ecdsa::Keypair::generate().into();
    let transport = tcp::tokio::Transport::new(tcp::Config::default())
        .upgrade(Version::V1)
        .authenticate(noise::Config::new(&key).unwrap())
        .multiplex(yamux::Config::default())
        .boxed();
    let behaviour = libp2p_stream::Behaviour::new();
    let control = behaviour.new_control();
    let settings = libp2p::swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(Duration::from_secs(60));
    let id = PeerId::from(key.public());
    (Swarm::new(transport, behaviour, id, settings), control)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_no_further_than_the_handshake() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut site = Site::start(&quiet_plan(node, &dir.path().join("site"), 2))
        .await
        .unwrap();
    all_see_each_other(node, &site, &[0, 1]).await;
    let address = site.devices[0].file.mesh.listen;
    let address: Multiaddr = format!("/ip4/{}/tcp/{}", address.ip(), address.port())
        .parse()
        .unwrap();
    let (mut swarm, mut control) = stranger();
    swarm.dial(address).unwrap();
    let mut opened = false;
    let tried = tokio::time::timeout(STRANGER, async {
        loop {
            match swarm.select_next_some().await {
                // The side that dials has nothing more to wait for; the other one hangs up.
                SwarmEvent::ConnectionEstablished { peer_id, .. } => {
                    let mut control = control.clone();
                    let protocol = StreamProtocol::new("/lacewing/presence/1");
                    let open = tokio::spawn(async move {
                        control.open_stream(peer_id, protocol).await.is_ok()
                    });
                    tokio::select! {
                        done = open => { opened = done.unwrap(); break; }
                        () = async { loop { let _ = swarm.select_next_some().await; } } => {}
                    }
                }
                SwarmEvent::OutgoingConnectionError { .. } => break,
                _ => {}
            }
        }
    });
    assert!(tried.await.is_ok(), "it was left hanging");
    assert!(!opened, "a stranger was let in");
    drop(control.accept(StreamProtocol::new("/x")));
    let status = status(node, &site, 0).await.unwrap();
    assert!(status.strangers >= 1, "{status:?}");
    all_see_each_other(node, &site, &[0, 1]).await;
    site.stop().await.unwrap();
}

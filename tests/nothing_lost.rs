//! The promise itself: whatever dies, whenever it dies, every frame is stored exactly once, or its loss is
//! recorded. An independent witness counts. Seeds are printed.

use std::{path::Path, time::Duration};

use fleet::{
    chaos::{self, Chaos},
    dice::Dice,
    process::Program,
    site::{Broker, Site},
};
use mesh_core::Kind;
use tests::{BOUND, SmallDisk, Tap, counted, exactly_once, plan, until};
use tokio::sync::Mutex;

/// One site at a time: each is a load of its own.
static ONE: Mutex<()> = Mutex::const_new(());

/// Two hundred in all; `LACEWING_KILLS` asks for another number per broker.
fn kills() -> u64 {
    let wanted = std::env::var("LACEWING_KILLS").ok();
    wanted.and_then(|n| n.parse().ok()).unwrap_or(100)
}

async fn survives_kills(broker: Broker) {
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let mut plan = plan(env!("CARGO_BIN_EXE_node"), dir.path());
    plan.broker = broker;
    let seed = Dice::seed();
    println!("{broker:?}: seed {seed}");
    let told = |line| println!("{broker:?}: {line}");
    let outcome = chaos::run(&plan, &Chaos::new(kills(), seed), told).await;
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => panic!("{error}\nall is kept in {:?}", dir.keep()),
    };
    let total = outcome.seen.total();
    println!(
        "{broker:?}: killed {} agents, {} coordinators, {} brokers; lost {} answers; {total:?}",
        outcome.agents, outcome.coordinators, outcome.brokers, outcome.lost_answers
    );
    if let Err(why) = exactly_once(&total) {
        panic!("{why}\nall is kept in {:?}", dir.keep());
    }
    assert!(
        total.replayed > 0,
        "nothing came from a backlog: this was no test"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_with_the_embedded_broker() {
    survives_kills(Broker::Embedded).await;
}

/// A broker without persistence forgets sessions, retained messages and whatever it had acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn kills_with_a_broker_that_forgets_everything() {
    assert!(
        fleet::broker::mosquitto().is_some(),
        "mosquitto is not installed (Debian: apt-get install mosquitto)"
    );
    survives_kills(Broker::Mosquitto).await;
}

fn has_gap(outbox: &Path) -> bool {
    let entries = std::fs::read_dir(outbox).into_iter().flatten().flatten();
    entries
        .into_iter()
        .any(|e| e.file_name().to_string_lossy().starts_with("gap-"))
}

/// The disk is full, the coordinator away: the oldest readings go, and it is known which.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_recorded() {
    /// Something else has taken most of the disk, so that it is full within a test's time.
    const TAKEN: usize = 10 << 20;
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let mut plan = plan(env!("CARGO_BIN_EXE_node"), dir.path());
    let at = dir.path().join("small");
    let disk = SmallDisk::mount(&at, 16);
    if disk.is_some() {
        println!("on a tmpfs of 16 MiB");
        std::fs::write(at.join("taken"), vec![1; TAKEN]).unwrap();
        plan.outboxes = Some(at);
    } else {
        println!("mounting is not permitted: bounded by outbox.max_bytes instead");
        plan.outbox_bytes = 4 << 20;
    }
    plan.agents = 1;
    plan.fps = 0.0;
    // The embedded broker goes with the coordinator; the tap outlives both.
    let mut site = Site::start(&plan).await.unwrap();
    let tap = Tap::start(&site).unwrap();
    site.coordinator.kill().await.unwrap();
    let outbox = site.devices[0].file.data.join("outbox");
    until("a gap is recorded on the disk", async || has_gap(&outbox))
        .await
        .unwrap();
    // Half-way through, the device dies too.
    site.devices[0].agent.kill().await.unwrap();
    site.devices[0].agent.start().unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    // The device has to wait until somebody listens to what it will say.
    site.devices[0].link.cut();
    let begun = tap.begun();
    site.coordinator.start().unwrap();
    site.ready().await.unwrap();
    until("the tap listens again", async || tap.begun() > begun)
        .await
        .unwrap();
    let seen = site.finish(Default::default(), BOUND).await.unwrap();
    let tapped = tap.stop().await;
    site.stop().await.unwrap();
    let total = seen.total();
    println!("{total:?}\n{:?}", tapped.counts);
    assert!(
        tapped.bad.is_empty() && tapped.count(Kind::Gap) > 0,
        "{tapped:#?}"
    );
    assert!(total.gaps > 0 && total.is_whole(), "{total:?}");
    assert_eq!(total.produced, total.stored + total.gaps, "{total:?}");
}

/// The coordinator's disk is full: it says so, and acknowledges nothing that it does not have; when there is room again,
/// everything arrives.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_of_the_coordinator_loses_nothing() {
    const DISK_MIB: u32 = 48;
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let mut plan = plan(env!("CARGO_BIN_EXE_node"), dir.path());
    plan.agents = 2;
    let at = dir.path().join("coordinator");
    let Some(_disk) = SmallDisk::mount(&at, DISK_MIB) else {
        println!("skipped: mounting is not permitted");
        return;
    };
    let mut site = Site::start(&plan).await.unwrap();
    let mut witness = site.witness(Default::default());
    until("readings are stored", async || {
        witness.look().await.unwrap().total().stored > 20
    })
    .await
    .unwrap();
    // As much as there is, and a little more: what the database gives up in between is taken, too.
    let taken = at.join("taken");
    let fill = || {
        use std::io::Write;
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&taken);
        let mut file = file.unwrap();
        while file.write_all(&[1; 4_096]).is_ok() {}
    };
    let errors = "lacewing_store_errors_total";
    until("the coordinator says that it cannot store", async || {
        fill();
        counted(&site, errors).await > 1.0
    })
    .await
    .unwrap();
    let stuck = witness.look().await.unwrap().total();
    tokio::time::sleep(Duration::from_secs(2)).await;
    site.check().unwrap();
    let later = witness.look().await.unwrap().total();
    assert!(later.produced > stuck.produced, "the cameras stopped");
    // What it has not stored, the devices still have: nobody has freed it.
    let pending: u64 = later.produced - later.stored;
    assert!(pending > 20, "{later:?}");
    let log = std::fs::read_to_string(site.coordinator.log()).unwrap();
    assert!(log.contains("cannot store readings"), "{log}");
    std::fs::remove_file(&taken).unwrap();
    let seen = site.finish(Default::default(), BOUND).await.unwrap();
    let log = std::fs::read_to_string(site.coordinator.log()).unwrap();
    assert!(log.contains("readings are stored again"), "{log}");
    site.stop().await.unwrap();
    exactly_once(&seen.total()).unwrap();
}

/// A year forward, two back, and home again, with a restart and an outage at the wrong moments.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps() {
    use std::sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    };

    use edge_agent::{Agent, AgentHandle, clock::WallClock, config::Config};

    const YEAR_MS: i64 = 365 * 24 * 3_600 * 1_000;
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let mut plan = plan(env!("CARGO_BIN_EXE_node"), dir.path());
    plan.agents = 2;
    plan.spawn = false;
    let mut site = Site::start(&plan).await.unwrap();
    let offset = Arc::new(AtomicI64::new(0));
    let start = async |site: &Site| -> Vec<AgentHandle> {
        let mut agents = Vec::new();
        for device in &site.devices {
            let config = Config::parse(&device.file.text().unwrap()).unwrap();
            let clock = WallClock::shifted(offset.clone());
            agents.push(Agent::start(config, clock).await.unwrap());
        }
        agents
    };
    let mut agents = start(&site).await;
    for (jump, cut) in [(1, false), (-1, true), (0, false), (-1, false), (1, true)] {
        offset.store(jump * YEAR_MS, Ordering::Relaxed);
        if cut {
            site.devices[0].link.cut();
        }
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        site.devices[0].link.heal();
        if jump == 0 {
            for agent in agents {
                agent.stop().await;
            }
            offset.store(-2 * YEAR_MS, Ordering::Relaxed);
            agents = start(&site).await;
        }
    }
    for agent in agents {
        agent.stop().await;
    }
    site.bound_sources().await.unwrap();
    let agents = start(&site).await;
    let seen = site
        .witness(Default::default())
        .settle(BOUND)
        .await
        .unwrap();
    for agent in agents {
        agent.stop().await;
    }
    site.stop().await.unwrap();
    exactly_once(&seen.total()).unwrap();
    assert!(seen.devices.values().all(|d| d.produced > 50), "{seen:?}");
}

/// When the fleet itself is killed, nothing that it started lives on.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_outlives_the_fleet() {
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let node = Program(env!("CARGO_BIN_EXE_node").into());
    let data = dir.path().join("data");
    let args = [
        "--no-plug",
        "--agents",
        "1",
        "--broker",
        "mosquitto",
        "--data",
    ];
    let args = args
        .into_iter()
        .map(Into::into)
        .chain([data.clone().into()]);
    let log = dir.path().join("demo.log");
    let mut demo = fleet::process::Process::part("demo", &node, "demo", args, log);
    demo.start().unwrap();
    let pid = demo.pid().unwrap();
    // The demo, its coordinator, its agent, a guard and its mosquitto.
    until("all parts run", async || {
        family(pid).len() >= 5 && data.join("d1/journal").exists()
    })
    .await
    .unwrap_or_else(|why| panic!("{why}\n{}", demo.last_words()));
    let family = family(pid);
    demo.kill().await.unwrap();
    until("all parts are gone", async || {
        !family.iter().any(|pid| runs(*pid))
    })
    .await
    .unwrap();
}

/// A process and all that descend from it.
fn family(pid: u32) -> Vec<u32> {
    let children = fleet::process::children(pid).into_iter().flat_map(family);
    std::iter::once(pid).chain(children).collect()
}

/// Does it run? One that has ended and waits to be collected does not.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

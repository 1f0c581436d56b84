//! A network that is cut, slow, hung or loses answers: nothing is lost or doubled, and every message that
//! is sent fits its schema.

use std::time::Duration;

use fleet::site::{Broker, Site};
use mesh_core::Kind;
use tests::{BOUND, Tap, exactly_once, plan, until};
use tokio::sync::Mutex;

/// One site at a time: each is a load of its own.
static ONE: Mutex<()> = Mutex::const_new(());

const A_WHILE: Duration = Duration::from_secs(3);

async fn weathers(broker: Broker) {
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let mut plan = plan(env!("CARGO_BIN_EXE_node"), dir.path());
    plan.broker = broker;
    let mut site = Site::start(&plan).await.unwrap();
    let tap = Tap::start(&site).unwrap();
    let mut witness = site.witness(Default::default());
    until("readings flow", async || {
        witness
            .look()
            .await
            .unwrap()
            .devices
            .values()
            .all(|d| d.stored > 10)
    })
    .await
    .unwrap();

    // Each device has its own bad luck at the same time, then they swap.
    for turn in 0..3 {
        let link = |n: usize| &site.devices[(turn + n) % 3].link;
        link(0).cut();
        link(1).slow(8_000, Duration::from_millis(200));
        if turn == 1 {
            link(2).hang();
        }
        for _ in 0..5 {
            link(2).lose_answers();
            tokio::time::sleep(A_WHILE / 5).await;
        }
        site.devices.iter().for_each(|d| d.link.heal());
        tokio::time::sleep(A_WHILE / 2).await;
    }
    // Long enough for a state of health and metrics, too.
    tokio::time::sleep(A_WHILE).await;
    let seen = site.finish(Default::default(), BOUND).await.unwrap();
    let tapped = tap.stop().await;
    let resets: u64 = site
        .devices
        .iter()
        .map(|d| d.link.counters().resets())
        .sum();
    let refused = std::fs::read_to_string(site.coordinator.log()).unwrap_or_default();
    let refused: Vec<&str> = refused.lines().filter(|l| l.contains("refused")).collect();
    site.stop().await.unwrap();
    println!(
        "{:?}\n{:?}\n{resets} connections broken",
        seen.total(),
        tapped.counts
    );
    exactly_once(&seen.total()).unwrap();
    assert!(resets > 3 && seen.total().replayed > 0);
    assert!(tapped.bad.is_empty(), "{:#?}", tapped.bad);
    assert!(
        refused.is_empty(),
        "the coordinator refused what its own devices say: {refused:#?}"
    );
    for kind in [
        Kind::Status,
        Kind::Info,
        Kind::Model,
        Kind::State,
        Kind::Result,
        Kind::Replay,
        Kind::Metrics,
        Kind::Ack,
    ] {
        assert!(
            tapped.count(kind) > 0,
            "nobody sent {kind:?}: {:?}",
            tapped.counts
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_weather_with_the_embedded_broker() {
    weathers(Broker::Embedded).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_weather_with_mosquitto() {
    weathers(Broker::Mosquitto).await;
}

//! A board without neighbours asks the coordinator about what it is unsure of: real agent, real coordinator, real keys.

use std::{path::Path, process::Stdio, time::Duration};

use edge_agent::mesh::{OffloadStatus, Status};
use fleet::{
    agent_file::OffloadPart,
    process::EXIT_WITH_STDIN,
    site::{Camera, Site},
};
use models::{Bundle, Engine, Picture};
use serde_json::Value;
use tests::{BOUND, Tap, bundle, exactly_once, plan, until};
use tokio::time::sleep;

/// For an agent to stop.
const STOP: Duration = Duration::from_secs(20);
/// The board's own answer counts after this.
const DEADLINE_MS: u32 = 3_000;

/// What `edge-agent mesh status` of the board says about asking.
async fn asking(node: &str, site: &Site) -> Option<OffloadStatus> {
    let mut command = tokio::process::Command::new(node);
    command.args(["edge-agent", "mesh", "status", "--json", "--config"]);
    command.arg(&site.devices[0].config).stdin(Stdio::null());
    let said = command.env_remove(EXIT_WITH_STDIN).output().await.ok()?;
    let status: Status = serde_json::from_slice(&said.stdout).ok()?;
    Some(status.offload)
}

/// The board's last live reading of a second.
async fn live(site: &Site) -> Option<Value> {
    let tap = Tap::start(site).unwrap();
    sleep(Duration::from_secs(1)).await;
    let heard = tap.stop().await;
    assert_eq!(heard.bad, Vec::<String>::new());
    let mut last = heard.last.iter();
    let (_, text) = last.find(|(topic, _)| topic.ends_with("/d1/cam0/result"))?;
    Some(serde_json::from_str(text).unwrap())
}

/// What the larger model says about the file of a reading.
fn larger(engine: &Engine, reading: &Value) -> String {
    let file = Path::new(reading["file"].as_str().unwrap());
    let path = bundle("steel")
        .join("golden")
        .join(file.file_name().unwrap());
    engine.infer(&Picture::read(&path).unwrap()).unwrap().label
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_board_alone_doubts_the_coordinator_looks_at_and_it_goes_on_without() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut plan = plan(node, &dir.path().join("site"));
    let config = dir.path().join("coordinator.toml");
    let large = bundle("steel");
    std::fs::write(&config, format!("[training]\nmodels = [{large:?}]\n")).unwrap();
    plan.coordinator_config = Some(config);
    plan.agents = 1;
    // It is where the board asks; there is nothing to take.
    plan.updates = true;
    // The board has a place among its neighbours, and none of them is there.
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
        coordinator: true,
        share: 0.5,
        deadline_ms: DEADLINE_MS,
        ..OffloadPart::default()
    });
    site.devices[0].write_config().unwrap();
    site.devices[0].agent.start().unwrap();
    until("the coordinator has answered", async || {
        let asked = asking(node, &site).await;
        asked.is_some_and(|asked| asked.answered >= 5)
    })
    .await
    .unwrap();
    // Readings say whose they are, all the way up.
    let engine = Engine::load(&Bundle::open(&large).unwrap()).unwrap();
    until("a reading is the coordinator's", async || {
        let Some(reading) = live(&site).await else {
            return false;
        };
        let is_far = reading["by"] == "_";
        if is_far {
            assert_eq!(reading["model"], engine.id());
            assert_eq!(reading["label"], larger(&engine, &reading), "{reading}");
        }
        is_far
    })
    .await
    .unwrap();
    // With the coordinator its broker is gone, and the board goes on alone.
    site.coordinator.kill().await.unwrap();
    sleep(Duration::from_millis(DEADLINE_MS.into())).await;
    let before = asking(node, &site).await.unwrap();
    sleep(Duration::from_secs(5)).await;
    let after = asking(node, &site).await.unwrap();
    assert!(after.asked - before.asked < 3, "{before:?} {after:?}");
    assert_eq!(after.answered, before.answered);
    site.coordinator.start().unwrap();
    until("it is asked again", async || {
        let asked = asking(node, &site).await;
        asked.is_some_and(|asked| asked.answered > after.answered)
    })
    .await
    .unwrap();
    // Each frame has become one reading.
    site.devices[0].agent.stop(STOP).await.unwrap();
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

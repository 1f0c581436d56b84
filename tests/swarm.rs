//! A release crosses the uplink of a site once, and goes on without any: real agents, a real coordinator.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use edge_agent::mesh::Status;
use fleet::{
    process::EXIT_WITH_STDIN,
    site::{Camera, Site},
};
use serde_json::json;
use tests::{bundle, plan, until, web::Web};

const TIMEOUT: Duration = Duration::from_secs(60);
const VERSION: &str = "1.2.0";
/// Beside the model, which the devices have already: sixteen chunks that nothing compresses.
const PADDING: usize = 4 << 20;
/// What TLS, metadata and questions take beside the pieces themselves, for four devices.
const AROUND: u64 = 700_000;

/// The shipped model as another version, and a large file beside it.
fn release(to: &Path) {
    std::fs::create_dir_all(to.join("golden")).unwrap();
    for n in 1..=6 {
        let golden = format!("golden/{n}.png");
        std::fs::copy(bundle("conveyor").join(&golden), to.join(&golden)).unwrap();
    }
    std::fs::copy(bundle("conveyor").join("model.onnx"), to.join("model.onnx")).unwrap();
    let manifest = std::fs::read_to_string(bundle("conveyor").join("manifest.toml")).unwrap();
    let newer = format!("version = \"{VERSION}\"");
    let manifest = manifest.replacen("version = \"1.1.0\"", &newer, 1);
    assert!(manifest.contains(&newer));
    std::fs::write(to.join("manifest.toml"), manifest).unwrap();
    let mut state = 1_u64;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    let padding: Vec<u8> = (0..PADDING).map(|_| noise()).collect();
    std::fs::write(to.join("padding.bin"), padding).unwrap();
}

async fn run(node: &str, arguments: &[&str]) -> String {
    let mut command = tokio::process::Command::new(node);
    command.args(arguments).stdin(Stdio::null());
    let done = command.env_remove(EXIT_WITH_STDIN).output().await.unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{arguments:?}: {said}");
    String::from_utf8(done.stdout).unwrap()
}

async fn status(node: &str, site: &Site, n: usize) -> Status {
    let config = site.devices[n].config.to_str().unwrap();
    let asked = ["edge-agent", "mesh", "status", "--json", "--config", config];
    serde_json::from_str(&run(node, &asked).await).unwrap()
}

/// Is the release on the device's disk? It has its name when it is whole.
fn has(site: &Site, n: usize) -> Option<PathBuf> {
    let entries = std::fs::read_dir(site.devices[n].file.data.join("models")).ok()?;
    let name = format!("conveyor-{VERSION}-");
    entries
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&name))
        .map(|entry| entry.path())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_crosses_the_uplink_once_and_reaches_those_that_have_none() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut plan = plan(node, &dir.path().join("site"));
    plan.agents = 4;
    plan.mesh = true;
    plan.updates = true;
    plan.door = true;
    plan.camera = Camera::None;
    let config = dir.path().join("coordinator.toml");
    let models = format!("[training]\nmodels = [{:?}]\n", bundle("conveyor"));
    std::fs::write(&config, models).unwrap();
    plan.coordinator_config = Some(config);
    let mut site = Site::start(&plan).await.unwrap();
    let api = Web::api(&site, TIMEOUT);
    until("four devices run what they came with", async || {
        let devices = api.get("/devices");
        let all = devices["items"].as_array().unwrap();
        all.len() == 4 && all.iter().all(|d| d["update"]["phase"] == "settled")
    })
    .await
    .unwrap();
    // The last one is away.
    site.devices[3].agent.kill().await.unwrap();
    for n in 0..3 {
        until("three see each other", async || {
            let here = status(node, &site, n).await.neighbours;
            here.iter().filter(|n| n.here).count() == 2
        })
        .await
        .unwrap();
    }
    let folder = dir.path().join("release");
    release(&folder);
    let (data, path) = (site.data(), folder.to_str().unwrap());
    let data = data.to_str().unwrap();
    let push = ["cloud-coordinator", "model", "--data", data, "push"];
    run(node, &[&push[..], &["--author", "ada", path]].concat()).await;

    // Over a line on which three copies would take half a minute.
    let door = site.door.as_ref().unwrap();
    door.narrow(500_000);
    let before = door.counters().down();
    let asked = json!({
        "model": format!("conveyor@{VERSION}"), "author": "ada",
        "plan": {"stages": [{"percent": 100, "soak_s": 0}]},
    });
    api.post("/rollouts", &asked);
    until("three devices have it", async || {
        (0..3).all(|n| has(&site, n).is_some())
    })
    .await
    .unwrap();
    let carried = site.door.as_ref().unwrap().counters().down() - before;
    println!("{carried} bytes over the uplink for {PADDING}");
    assert!(
        carried < PADDING as u64 + AROUND + PADDING as u64 / 8,
        "{carried}"
    );
    let (mut had, mut gave) = (0, 0);
    for n in 0..3 {
        let status = status(node, &site, n).await;
        had += status.swarm_bytes;
        gave += status.served_bytes;
        assert_eq!(status.bans, 0, "{status:?}");
    }
    assert!(had > 3 * PADDING as u64 / 2 && gave >= had, "{had} {gave}");

    // The last one comes back, hears what it should run, and finds nobody who has it.
    let door = site.door.as_ref().unwrap();
    door.cut();
    let before = door.counters().down();
    for n in 0..3 {
        site.devices[n].agent.kill().await.unwrap();
    }
    site.devices[3].agent.start().unwrap();
    let state = site.devices[3].file.data.join("models").join("state.json");
    until("the last one knows what it should run", async || {
        std::fs::read_to_string(&state).is_ok_and(|text| text.contains(VERSION))
    })
    .await
    .unwrap();
    // Then coordinator and broker are gone, and all devices begin anew.
    site.devices[3].agent.kill().await.unwrap();
    site.coordinator.kill().await.unwrap();
    assert!(has(&site, 3).is_none());
    for device in &mut site.devices {
        device.agent.start().unwrap();
    }
    until("the last one has it from its neighbours", async || {
        has(&site, 3).is_some()
    })
    .await
    .unwrap();
    assert_eq!(site.door.as_ref().unwrap().counters().down(), before);
    let padding = std::fs::read(has(&site, 3).unwrap().join("padding.bin")).unwrap();
    assert!(padding == std::fs::read(folder.join("padding.bin")).unwrap());
    assert!(status(node, &site, 3).await.swarm_bytes >= PADDING as u64);
    site.coordinator.start().unwrap();
    site.door.as_ref().unwrap().heal();
    site.stop().await.unwrap();
}

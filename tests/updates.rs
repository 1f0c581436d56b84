//! A better model reaches every device, and a worse one none for long: real agents, a real coordinator.

use std::{path::Path, process::Stdio, time::Duration};

use fleet::{process::EXIT_WITH_STDIN, site::Site};
use serde_json::{Value, json};
use tests::{SmallDisk, bundle, exactly_once, plan, until, web::Web};

const TIMEOUT: Duration = Duration::from_secs(60);

/// A copy of the conveyor's bundle with its manifest changed.
fn changed(to: &Path, change: impl Fn(String) -> String) {
    std::fs::create_dir_all(to.join("golden")).unwrap();
    for n in 1..=6 {
        let golden = format!("golden/{n}.png");
        std::fs::copy(bundle("conveyor").join(&golden), to.join(&golden)).unwrap();
    }
    std::fs::copy(bundle("conveyor").join("model.onnx"), to.join("model.onnx")).unwrap();
    let manifest = std::fs::read_to_string(bundle("conveyor").join("manifest.toml")).unwrap();
    std::fs::write(to.join("manifest.toml"), change(manifest)).unwrap();
}

fn version(manifest: &str, version: &str) -> String {
    manifest.replacen(
        "version = \"1.1.0\"",
        &format!("version = \"{version}\""),
        1,
    )
}

/// As an operator would: on the command line.
async fn push(node: &str, data: &Path, dir: &Path) {
    let pushed = tokio::process::Command::new(node)
        .args(["cloud-coordinator", "model", "--data"])
        .arg(data)
        .args(["push", "--author", "ada"])
        .arg(dir)
        .env_remove(EXIT_WITH_STDIN)
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    assert!(
        pushed.status.success(),
        "{}",
        String::from_utf8_lossy(&pushed.stderr)
    );
}

fn devices(api: &Web) -> Vec<Value> {
    api.get("/devices")["items"].as_array().unwrap().clone()
}

/// So many devices, all that there are, have this version in memory and are at rest.
fn all_on(api: &Web, all: usize, version: &str) -> bool {
    let devices = devices(api);
    devices.len() == all
        && devices.iter().all(|device| {
            device["model"]["version"] == version && device["update"]["phase"] == "settled"
        })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_model_reaches_everybody_and_a_bad_one_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut plan = plan(node, &dir.path().join("site"));
    plan.updates = true;
    let config = dir.path().join("coordinator.toml");
    let models = format!("[training]\nmodels = [{:?}]\n", bundle("conveyor"));
    std::fs::write(&config, models).unwrap();
    plan.coordinator_config = Some(config);
    let mut site = Site::start(&plan).await.unwrap();
    let tap = tests::Tap::start(&site).unwrap();
    let data = site.data();
    let api = Web::api(&site, TIMEOUT);
    until("three devices run what they came with", async || {
        all_on(&api, 3, "1.1.0")
    })
    .await
    .unwrap();

    let stage = |percent: u32| json!({"percent": percent, "soak_s": 0});
    let trial = json!({"share": 1.0, "shadow_frames": 40, "watch_frames": 20, "watch_s_min": 0});
    let start = |model: &str| {
        json!({
            "model": model, "plan": {"stages": [stage(34), stage(100)]}, "trial": trial, "author": "ada",
            // The machine is busy, and both models are the same.
            "limits": {"latency_times": 100.0},
        })
    };
    let better = dir.path().join("better");
    changed(&better, |manifest| version(&manifest, "1.2.0"));
    push(node, &data, &better).await;
    let begun = api.post("/rollouts", &start("conveyor@1.2.0"));
    let path = format!("/rollouts/{}", begun["id"]);
    until("the rollout is done", async || {
        let rollout = api.get(&path);
        assert_ne!(
            rollout["status"],
            "aborted",
            "{rollout} {:?}",
            devices(&api)
        );
        rollout["status"] == "done"
    })
    .await
    .unwrap();
    assert!(all_on(&api, 3, "1.2.0"), "{:?}", devices(&api));

    // It passes its own golden pictures, and calls what is sound scratched and what is scratched sound.
    let worse = dir.path().join("worse");
    changed(&worse, |manifest| {
        version(&manifest, "1.3.0")
            .replace("[\"ok\", \"scratch\",", "[\"scratch\", \"ok\",")
            .replacen("label = \"ok\"", "label = \"?\"", 1)
            .replacen("label = \"scratch\"", "label = \"ok\"", 1)
            .replacen("label = \"?\"", "label = \"scratch\"", 1)
    });
    push(node, &data, &worse).await;
    let begun = api.post("/rollouts", &start("conveyor@1.3.0"));
    let path = format!("/rollouts/{}", begun["id"]);
    until("the rollout is aborted", async || {
        let rollout = api.get(&path);
        assert_ne!(rollout["status"], "done", "{rollout} {:?}", devices(&api));
        rollout["status"] == "aborted"
    })
    .await
    .unwrap();
    let rollout = api.get(&path);
    assert_eq!(
        (&rollout["exposed"], &rollout["failed"]),
        (&json!(1), &json!(1)),
        "{rollout}"
    );
    let story = rollout["events"].to_string();
    assert!(
        story.contains("disagreement") || story.contains("balance"),
        "{story}"
    );
    until("everybody is on the last good model", async || {
        all_on(&api, 3, "1.2.0")
    })
    .await
    .unwrap();

    // Every message was what its schema says.
    let tapped = tap.stop().await;
    assert!(tapped.bad.is_empty(), "{:#?}", tapped.bad);

    // All of it cost nobody a reading.
    let seen = site
        .finish(Default::default(), Duration::from_secs(120))
        .await
        .unwrap();
    exactly_once(&seen.total()).unwrap();
    site.stop().await.unwrap();
}

/// A full disk, a rollout that another one overtakes, and a step back on purpose: each says so and harms nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_stands_in_the_way_is_named_and_passes() {
    /// What the agent leaves free for readings does not fit beside it.
    const TAKEN: usize = 44 << 20;
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    let Some(_disk) = SmallDisk::mount(&small, 64) else {
        println!("skipped: mounting is not permitted here");
        return;
    };
    let taken = small.join("taken");
    std::fs::write(&taken, vec![1; TAKEN]).unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut plan = plan(node, &dir.path().join("site"));
    plan.updates = true;
    plan.agents = 1;
    plan.outboxes = Some(small);
    let config = dir.path().join("coordinator.toml");
    let models = format!("[training]\nmodels = [{:?}]\n", bundle("conveyor"));
    std::fs::write(&config, models).unwrap();
    plan.coordinator_config = Some(config);
    let mut site = Site::start(&plan).await.unwrap();
    let api = Web::api(&site, TIMEOUT);
    until("the device runs what it came with", async || {
        all_on(&api, 1, "1.1.0")
    })
    .await
    .unwrap();
    for number in ["1.2.0", "1.4.0"] {
        let to = dir.path().join(number);
        changed(&to, |manifest| version(&manifest, number));
        push(node, &site.data(), &to).await;
    }
    let start = |model: &str, force: bool| {
        let asked = json!({
            "model": model, "plan": {"stages": [{"percent": 100, "soak_s": 0}]}, "author": "ada", "force": force,
            "trial": {"share": 1.0, "shadow_frames": 20, "watch_frames": 10, "watch_s_min": 0},
            "limits": {"latency_times": 100.0},
        });
        format!("/rollouts/{}", api.post("/rollouts", &asked)["id"])
    };
    let says = async |words: &str| {
        until(words, async || {
            devices(&api)[0]["update"].to_string().contains(words)
        })
        .await
        .unwrap_or_else(|error| panic!("{error}: {:#}", devices(&api)[0]["update"]));
    };

    // No room: the device says so and goes on; the model is not to blame.
    let first = start("conveyor@1.2.0", false);
    says("disk_full").await;
    says("MiB are free").await;
    let rollout = api.get(&first);
    assert_eq!(
        (&rollout["status"], &rollout["failed"]),
        (&json!("running"), &json!(0)),
        "{rollout}"
    );
    assert_eq!(devices(&api)[0]["model"]["version"], "1.1.0");

    // Another one for the same devices: the newest wins, as soon as there is room.
    let second = start("conveyor@1.4.0", false);
    let story = api.get(&first);
    assert_eq!(story["ended"], true, "{story}");
    assert!(
        story["events"].to_string().contains("takes its place"),
        "{story}"
    );
    std::fs::remove_file(&taken).unwrap();
    until("the newer one is done", async || {
        api.get(&second)["status"] == "done"
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {} {:#?}", api.get(&second), devices(&api)));
    assert!(all_on(&api, 1, "1.4.0"), "{:?}", devices(&api));

    // Back to an older one: only if that is meant.
    start("conveyor@1.1.0", false);
    says("only a forced wish goes back").await;
    assert_eq!(devices(&api)[0]["model"]["version"], "1.4.0");
    start("conveyor@1.1.0", true);
    until("the device is back on purpose", async || {
        all_on(&api, 1, "1.1.0")
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {:#?}", devices(&api)));

    let seen = site
        .finish(Default::default(), Duration::from_secs(120))
        .await
        .unwrap();
    exactly_once(&seen.total()).unwrap();
    site.stop().await.unwrap();
}

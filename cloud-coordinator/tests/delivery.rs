//! Models on their way to devices: published, signed, rolled out, taken back. The devices are played over real MQTT.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;

use std::{net::SocketAddr, path::Path, time::Duration};

use cloud_coordinator::Config;
use common::*;
use mesh_core::{Bad, Desired, Failure, Phase, Reason, Release, Reported, VERSION};
use serde_json::{Value, json};
use sqlx::Connection as _;
use tokio::time::{sleep, timeout};

/// The bytes at a path.
async fn fetch(http: SocketAddr, path: &str) -> (u16, Vec<u8>) {
    let (status, _, body) = send(http, &format!("GET {path}"), "", b"").await;
    (status, body)
}

fn bundle() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles/conveyor")
}

fn config_with(data: &Path) -> Config {
    let mut config = config(data);
    config.training.models = vec![bundle()];
    config.training.program = vec![env!("CARGO_BIN_EXE_cloud-coordinator").into()];
    config
}

/// The conveyor's bundle as a tar, with its manifest changed.
fn tar(change: impl Fn(String) -> String) -> Vec<u8> {
    tar_of(&std::fs::read(bundle().join("model.onnx")).unwrap(), change)
}

/// As [`tar`], with that model.
fn tar_of(model: &[u8], change: impl Fn(String) -> String) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let manifest = std::fs::read_to_string(bundle().join("manifest.toml")).unwrap();
    let mut add = |path: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, bytes).unwrap();
    };
    add("manifest.toml", change(manifest).as_bytes());
    add("model.onnx", model);
    for n in 1..=6 {
        let path = format!("golden/{n}.png");
        add(&path, &std::fs::read(bundle().join(&path)).unwrap());
    }
    tar.into_inner().unwrap()
}

fn version(text: &'static str) -> impl Fn(String) -> String {
    move |manifest| manifest.replacen("version = \"1.1.0\"", &format!("version = \"{text}\""), 1)
}

/// A device that says what it is told to say.
struct Played {
    client: Client,
    name: String,
    wish: Option<Desired>,
    loaded: Release,
}

impl Played {
    async fn start(broker: SocketAddr, name: &str, loaded: &Release) -> Self {
        let mut client = Client::connect(broker, &format!("demo/{name}")).await;
        assert!(
            client
                .subscribe(&format!("lacewing/v1/demo/{name}/_/desired"))
                .await
        );
        client
            .publish_as(&topic(name, "_", "status"), "online", true)
            .await;
        let model = json!({
            "v": 1, "name": loaded.name, "version": loaded.version, "sha256": "0".repeat(64),
            "task": "classify", "labels": "ok",
        });
        client
            .publish_as(&topic(name, "_", "model"), model.to_string(), true)
            .await;
        let name = name.to_owned();
        let mut played = Self {
            client,
            name,
            wish: None,
            loaded: loaded.clone(),
        };
        played.report(loaded, None).await;
        played
    }

    /// Waits for the next wish.
    async fn wished(&mut self) -> Release {
        let (_, message) = self.client.next().await;
        let desired = Desired::decode(&message).unwrap();
        if let Some(before) = &self.wish {
            assert!(desired.revision > before.revision, "{before:?} {desired:?}");
        }
        let release = desired.release.clone().unwrap();
        self.wish = Some(desired);
        release
    }

    async fn report(&mut self, loaded: &Release, bad: Option<&Release>) {
        self.loaded = loaded.clone();
        let failure = || Failure::new(Reason::Disagreement, "contradicts");
        let reported = Reported {
            v: VERSION,
            ts: 1,
            revision: self.wish.as_ref().map_or(0, |wish| wish.revision),
            phase: Phase::Settled,
            target: self.wish.as_ref().and_then(|wish| wish.release.clone()),
            loaded: Some(loaded.clone()),
            last_good: None,
            failure: bad.map(|_| failure()),
            bad: bad
                .map(|bad| Bad {
                    digest: bad.digest,
                    failure: failure(),
                })
                .into_iter()
                .collect(),
            progress: 0.0,
            evidence: Default::default(),
            settings: None,
            erased: None,
        };
        let message = reported.encode().unwrap();
        self.client
            .publish_as(&topic(&self.name, "_", "reported"), message, true)
            .await;
    }
}

async fn until(http: SocketAddr, id: &Value, what: impl Fn(&Value) -> bool) -> Value {
    let end = tokio::time::Instant::now() + WORK;
    loop {
        let (_, rollout) = get(http, &format!("/api/v1/rollouts/{id}")).await;
        if what(&rollout) {
            return rollout;
        }
        assert!(tokio::time::Instant::now() < end, "{rollout}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_comes_to_the_devices_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start_as(config_with(dir.path())).await;
    let (http, broker) = (handle.http, handle.mqtt.unwrap());

    // What was given is published, and what was signed is served.
    let (_, releases) = get(http, "/api/v1/releases").await;
    let row = &releases[0];
    assert_eq!(
        (&row["name"], &row["version"]),
        (&json!("conveyor"), &json!("1.1.0")),
        "{releases}"
    );
    let factory = Release {
        name: "conveyor".into(),
        version: "1.1.0".into(),
        digest: row["digest"].as_str().unwrap().parse().unwrap(),
    };
    let (status, root) = fetch(http, "/api/v1/tuf/metadata/1.root.json").await;
    assert_eq!(
        (status, root),
        (200, std::fs::read(dir.path().join("root.json")).unwrap())
    );
    let target = format!(
        "/api/v1/tuf/targets/{}.models/conveyor/1.1.0.json",
        factory.digest
    );
    let (status, document) = fetch(http, &target).await;
    assert_eq!(
        (status, models::digest_of(&document)),
        (200, factory.digest)
    );
    let document = models::ReleaseDocument::parse(&document).unwrap();
    let piece = document
        .files
        .iter()
        .find(|f| f.path == "model.onnx")
        .unwrap()
        .chunks[0];
    let (status, bytes) = fetch(http, &format!("/api/v1/chunks/{piece}")).await;
    assert_eq!((status, models::digest_of(&bytes)), (200, piece));
    for nothing in [
        "/api/v1/chunks/xyz",
        &format!("/api/v1/chunks/{}", "0".repeat(64)),
        "/api/v1/tuf/metadata/..%2f..%2fkeys",
        "/api/v1/tuf/metadata/nothing.json",
    ] {
        assert!(matches!(get(http, nothing).await.0, 400 | 404), "{nothing}");
    }

    // A bundle that is brought is tried first.
    let brought = |change: Vec<u8>| async move {
        let (status, said) =
            bring(http, "POST /api/v1/catalog", "application/x-tar", &change).await;
        (status, said.to_string())
    };
    let wrong = tar(|m| version("1.2.0")(m).replacen("label = \"ok\"", "label = \"hole\"", 1));
    let (status, said) = brought(wrong).await;
    assert!(
        status == 422 && said.contains("golden/1.png"),
        "{status} {said}"
    );
    assert_eq!(brought(b"no tar".to_vec()).await.0, 422);
    assert_eq!(brought(tar(version("1.2.0"))).await.0, 200);
    assert_eq!(brought(tar(version("1.3.0"))).await.0, 200);

    // In stages: first one of three, the others when that has kept it.
    let mut devices = Vec::new();
    for name in ["d1", "d2", "d3"] {
        devices.push(Played::start(broker, name, &factory).await);
    }
    // Devices that run something else, or nothing, are not meant.
    let other = Release {
        name: "strip".into(),
        ..factory.clone()
    };
    let strip = Played::start(broker, "d4", &other).await;
    let blank = Played::start(broker, "d5", &factory).await;
    let none = topic("d5", "_", "model");
    blank.client.publish_as(&none, Vec::new(), true).await;
    let known = tokio::time::Instant::now() + WORK;
    while get(http, "/api/v1/devices").await.1["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|d| !d["update"].is_null())
        .count()
        < 5
    {
        assert!(tokio::time::Instant::now() < known);
        sleep(Duration::from_millis(50)).await;
    }
    while !get(http, "/api/v1/devices/demo/d5").await.1["model"].is_null()
        || get(http, "/api/v1/devices/demo/d4").await.1["model"].is_null()
    {
        assert!(tokio::time::Instant::now() < known);
        sleep(Duration::from_millis(50)).await;
    }
    let stage = |percent: u32| json!({"percent": percent, "soak_s": 0});
    let plan = json!({"stages": [stage(34), stage(100)]});
    let start = |model: &str| json!({"model": model, "plan": plan, "author": "ada"});
    let (status, begun) = say(http, "POST /api/v1/rollouts", start("conveyor@1.2.0")).await;
    assert_eq!(status, 201, "{begun}");
    // A name that is only said stands with the one that was proved.
    assert_eq!(begun["author"], "ada, as machine");
    let id = begun["id"].clone();
    let first = until(http, &id, |r| r["exposed"] == 1).await;
    assert_eq!(
        (&first["devices"], &first["status"]),
        (&json!(3), &json!("running"))
    );
    let mut told = 0;
    for device in &mut devices {
        // Only one hears of it; the others' time is short.
        if let Ok(release) = timeout(Duration::from_secs(2), device.wished()).await {
            assert_eq!(release.version, "1.2.0");
            device.report(&release, None).await;
            told += 1;
        }
    }
    for device in devices.iter_mut().filter(|device| device.wish.is_none()) {
        let release = device.wished().await;
        device.report(&release, None).await;
        told += 1;
    }
    assert_eq!(told, 3);
    let done = until(http, &id, |r| r["status"] == "done").await;
    assert_eq!(
        (&done["kept"], &done["failed"]),
        (&json!(3), &json!(0)),
        "{done}"
    );

    // The next one fails on the first device: everybody else never hears of it, and that one is set back.
    let (_, begun) = say(http, "POST /api/v1/rollouts", start("conveyor@1.3.0")).await;
    let id = begun["id"].clone();
    until(http, &id, |r| r["exposed"] == 1).await;
    let mut unlucky = None;
    for (at, device) in devices.iter_mut().enumerate() {
        if let Ok(release) = timeout(Duration::from_secs(2), device.wished()).await {
            assert_eq!(release.version, "1.3.0");
            let before = device.loaded.clone();
            device.report(&before, Some(&release)).await;
            unlucky = Some(at);
        }
    }
    let failed = until(http, &id, |r| r["status"] == "aborted").await;
    assert_eq!(
        (&failed["exposed"], &failed["failed"]),
        (&json!(1), &json!(1)),
        "{failed}"
    );
    let story = failed["events"].to_string();
    let name = &devices[unlucky.unwrap()].name;
    assert!(
        story.contains(&format!("it failed on demo/{name}: disagreement")),
        "{story}"
    );
    assert_eq!(devices[unlucky.unwrap()].wished().await.version, "1.2.0");

    // One device by hand; a rollout that was superseded cannot be commanded.
    let pin = json!({"model": "conveyor@1.1.0", "author": "ada"});
    let (status, _) = say(http, "PUT /api/v1/devices/demo/d2/pin", pin).await;
    assert_eq!(status, 204);
    assert_eq!(devices[1].wished().await, factory);
    let order = json!({"command": "pause"});
    let (status, _) = say(
        http,
        &format!("POST /api/v1/rollouts/{}", done["id"]),
        order,
    )
    .await;
    assert_eq!(status, 409);
    let past = get(http, &format!("/api/v1/rollouts/{}", done["id"]))
        .await
        .1;
    assert_eq!(
        (&past["ended"], &past["kept"]),
        (&json!(true), &json!(3)),
        "{past}"
    );
    assert!(
        past["events"].to_string().contains("takes its place"),
        "{past}"
    );
    let nobody = json!({"model": "conveyor@1.3.0", "plan": plan, "author": ""});
    assert_eq!(say(http, "POST /api/v1/rollouts", nobody).await.0, 422);
    let none = json!({"model": "conveyor@1.3.0", "plan": {"stages": []}, "author": "ada"});
    assert_eq!(say(http, "POST /api/v1/rollouts", none).await.0, 422);

    // What cannot be written down is said to nobody, and made up for.
    let file = format!("sqlite://{}/learning.db", dir.path().display());
    let mut database = sqlx::SqliteConnection::connect(&file).await.unwrap();
    for (from, to) in [("wishes", "away"), ("away", "wishes")] {
        let rename = sqlx::AssertSqlSafe(format!("ALTER TABLE {from} RENAME TO {to}"));
        sqlx::query(rename).execute(&mut database).await.unwrap();
        if to == "away" {
            let pin = json!({"model": "conveyor@1.2.0", "author": "ada"});
            let (status, said) = say(http, "PUT /api/v1/devices/demo/d2/pin", pin).await;
            assert_eq!(status, 503, "{said}");
            let early = timeout(Duration::from_secs(2), devices[1].wished()).await;
            assert!(early.is_err(), "{early:?}");
        }
    }
    assert_eq!(devices[1].wished().await.version, "1.2.0");

    // The coordinator ends and comes back: it has changed its mind about nothing.
    let before = get(http, "/api/v1/rollouts").await.1;
    let wishes: Vec<_> = devices.iter().map(|d| d.wish.clone()).collect();
    handle.stop().await;
    drop((devices, strip, blank));
    let handle = start_as(config_with(dir.path())).await;
    let (http, broker) = (handle.http, handle.mqtt.unwrap());
    let after = get(http, "/api/v1/rollouts").await.1;
    for field in ["id", "model", "status", "exposed", "failed"] {
        assert_eq!(before[0][field], after[0][field], "{before} {after}");
    }
    for (name, wish) in ["d1", "d2", "d3"].iter().zip(wishes) {
        let mut client = Client::connect(broker, "somebody").await;
        assert!(
            client
                .subscribe(&format!("lacewing/v1/demo/{name}/_/desired"))
                .await
        );
        let (_, message) = client.next().await;
        assert_eq!(Desired::decode(&message).ok(), wish, "{name}");
    }
    handle.stop().await;
}

/// A device may run what was never published, as it came with it: what it has is not sent again all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_delta_begins_at_any_model_of_that_name() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start_as(config_with(dir.path())).await;
    let http = handle.http;
    let file = std::fs::read(bundle().join("model.onnx")).unwrap();
    let factory = models::digest_of(&file);
    // Another producer's name (field 2) at the end: other bytes, the same answers.
    let versions = ["1.4.0", "1.5.0"].map(|number| {
        let name = format!("made for {number}");
        let head = [0x12, u8::try_from(name.len()).unwrap()];
        let model = [&file[..], &head, name.as_bytes()].concat();
        (number, models::digest_of(&model), model)
    });
    for (number, digest, model) in &versions {
        let manifest = |m: String| {
            version(number)(m)
                .replace(&factory.to_string(), &digest.to_string())
                .replace(&file.len().to_string(), &model.len().to_string())
        };
        let tar = tar_of(model, manifest);
        let (status, said) = bring(http, "POST /api/v1/catalog", "application/x-tar", &tar).await;
        assert_eq!(status, 200, "{said}");
    }
    let [(_, old, from), (_, new, to)] = &versions;
    let path = |from, to| format!("/api/v1/deltas/{from}/{to}");
    assert_eq!(
        fetch(http, &path(old, new)).await.0,
        404,
        "nothing is published"
    );

    let said = json!({"model": "conveyor@1.5.0", "author": "ada"});
    assert_eq!(say(http, "POST /api/v1/releases", said).await.0, 200);
    for (digest, file) in [(old, from), (&factory, &file)] {
        let (status, delta) = fetch(http, &path(digest, new)).await;
        assert_eq!(status, 200);
        assert!(delta.len() < to.len() / 50, "{}", delta.len());
        let wanted = models::delta::Wanted {
            length: to.len() as u64,
            sha256: *new,
        };
        let mut made = Vec::new();
        models::delta::apply(
            &mut std::io::Cursor::new(file),
            &delta[..],
            &wanted,
            &mut made,
        )
        .unwrap();
        assert!(made == *to);
    }
    assert_eq!(
        fetch(http, &path(new, old)).await.0,
        404,
        "the other way leads to what is not published"
    );
    let unknown = models::digest_of(b"unknown");
    assert_eq!(fetch(http, &path(&unknown, new)).await.0, 404);
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_rollouts_that_are_under_way_count() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start_as(config_with(dir.path())).await;
    let http = handle.http;
    let start = async |tag: usize| {
        let request = json!({"model": "conveyor@1.1.0", "group": {"tag": format!("t{tag}")}});
        say(http, "POST /api/v1/rollouts", request).await
    };
    for tag in 0..100 {
        let (status, begun) = start(tag).await;
        assert_eq!(status, 201, "{begun}");
    }
    let (status, said) = start(100).await;
    assert_eq!(status, 429, "{said}");
    // What takes another's place is not one more, and what is aborted is none.
    assert_eq!(start(7).await.0, 201);
    let abort = json!({"command": "abort"});
    assert_eq!(say(http, "POST /api/v1/rollouts/1", abort).await.0, 200);
    assert_eq!(start(100).await.0, 201);
    assert_eq!(start(101).await.0, 429);
    handle.stop().await;
}

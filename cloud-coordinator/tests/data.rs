//! What devices' data may do to what is learnt, with the backbone that ships.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;

use std::{io::Cursor, net::SocketAddr, path::Path, process::Command, time::Duration};

use cloud_coordinator::{Config, objects::digest};
use common::*;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

/// A training of some hundred images, on a machine that compiles at the same time.
const TRAINED: Duration = Duration::from_secs(300);
const CLASSES: [&str; 2] = ["upright", "flat"];
/// How far an honest fleet's model may fall when one device lies.
const BOUND: f64 = 0.02;

/// Lines of a class, another picture for each number, in light of its own for each device.
fn picture(class: usize, n: u32, light: u32) -> Vec<u8> {
    let picture = image::RgbImage::from_fn(64, 64, |x, y| {
        let wave = if class == 0 { x } else { y };
        let value = 128.0 + (f64::from(wave + n) / 3.0).sin() * (40.0 + f64::from(n % 9));
        let dimmed = (value * (1.0 - f64::from(light) * 0.12)) as u8;
        image::Rgb([dimmed, dimmed, (n * 3 % 251) as u8])
    });
    let mut bytes = Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

fn config_with(data: &Path) -> Config {
    let mut config = config(data);
    let backbone = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles/backbone");
    config.training.models = vec![backbone];
    config.training.program = vec![env!("CARGO_BIN_EXE_cloud-coordinator").into()];
    config
}

/// What people vouch for: pictures to measure with, which nobody trains with.
async fn holdout(http: SocketAddr) {
    let mut tar = tar::Builder::new(Vec::new());
    for (class, name) in CLASSES.into_iter().enumerate() {
        for n in 1_000..1_060 {
            let bytes = picture(class, n, n % 4);
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("{name}/{n}.png"), bytes.as_slice())
                .unwrap();
        }
    }
    let line = "POST /api/v1/tasks/lines/import?format=folder&author=me&holdout=true";
    let tar = tar.into_inner().unwrap();
    let (status, said) = bring(http, line, "application/x-tar", &tar).await;
    assert_eq!(status, 200, "{said}");
}

fn words(device: &str, seq: u64, image: &[u8]) -> Value {
    json!({
        "v": 1, "device": device, "source": "cam0", "epoch": 7, "seq": seq, "ts": 1_700_000_000_000_i64,
        "reason": "uncertain", "label": "ok", "score": 0.5, "margin": 0.25, "entropy": 0.75,
        "model": "lines@0.1.0", "image": { "sha256": digest(image), "bytes": image.len() },
    })
}

/// A device sends a sample with its picture; its number.
async fn sent(http: SocketAddr, device: &str, seq: u64, image: &[u8]) -> i64 {
    let (status, said) = say(http, "POST /api/v1/samples", words(device, seq, image)).await;
    assert_eq!(status, 201, "{said}");
    let line = format!("PATCH /api/v1/samples/{device}/7/{seq}/image");
    let (status, _, body) = send(http, &line, "upload-offset: 0\r\n", image).await;
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
    let path = format!("GET /api/v1/samples?limit=1&device={device}");
    let (_, page) = ask(http, &path).await;
    page["items"][0]["id"].as_i64().unwrap()
}

async fn label(http: SocketAddr, id: i64, class: &str) {
    let line = format!("POST /api/v1/samples/{id}/labels");
    let (status, said) = say(http, &line, json!({"class": class})).await;
    assert_eq!(status, 201, "{said}");
}

/// A device sends pictures of both classes; of a liar each is called what it is not.
async fn device(http: SocketAddr, name: &str, first: u32, count: u32, light: u32, lies: bool) {
    for n in 0..count {
        let class = (n % 2) as usize;
        let image = picture(class, first + n, light);
        let id = sent(http, name, u64::from(n) + 1, &image).await;
        label(http, id, CLASSES[if lies { 1 - class } else { class }]).await;
    }
}

/// Trains; the model that came out.
async fn trained(http: SocketAddr) -> Value {
    let body = json!({"author": "me", "base": "backbone"});
    let (status, job) = say(http, "POST /api/v1/tasks/lines/train", body).await;
    assert_eq!(status, 202, "{job}");
    let path = format!("/api/v1/jobs/{}", job["id"]);
    let ended = async {
        loop {
            let (_, job) = get(http, &path).await;
            if !matches!(job["state"].as_str(), Some("queued" | "running")) {
                return job;
            }
            sleep(Duration::from_millis(200)).await;
        }
    };
    let job = timeout(TRAINED, ended).await.unwrap();
    assert_eq!(job["state"], "done", "{job}");
    let path = format!("/api/v1/catalog/{}", job["model"].as_str().unwrap());
    get(http, &path).await.1
}

fn accuracy(model: &Value) -> f64 {
    model["report"]["accuracy"].as_f64().unwrap()
}

async fn honest_fleet(http: SocketAddr) {
    let classes = json!({ "classes": CLASSES });
    assert_eq!(say(http, "PUT /api/v1/tasks/lines", classes).await.0, 200);
    holdout(http).await;
    for (at, name) in ["d1", "d2", "d3"].into_iter().enumerate() {
        device(http, name, 100 * at as u32, 24, at as u32, false).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_lies_moves_the_model_little() {
    // Without anything against it, and with the share of a device alone.
    let mut figures = Vec::new();
    for share in [1.0, 0.25] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config_with(dir.path());
        config.training.device_share = share;
        config.training.suspect.min_rows = usize::MAX;
        let handle = start_as(config).await;
        honest_fleet(handle.http).await;
        device(handle.http, "d4", 300, 120, 3, true).await;
        figures.push(accuracy(&trained(handle.http).await));
        handle.stop().await;
    }

    let dir = tempfile::tempdir().unwrap();
    let handle = start_as(config_with(dir.path())).await;
    let http = handle.http;
    honest_fleet(http).await;
    let honest = trained(http).await;
    let (_, list) = get(http, "/api/v1/quarantine").await;
    assert_eq!(list, json!([]), "nobody who is honest is set apart");

    device(http, "d4", 300, 120, 3, true).await;
    let open = sent(http, "d4", 999, &picture(0, 999, 3)).await;
    let controlled = trained(http).await;
    println!(
        "accuracy on the holdout: honest {:.3}; one device lies: {:.3} without control, {:.3} with the share alone, \
         {:.3} with all of it",
        accuracy(&honest),
        figures[0],
        figures[1],
        accuracy(&controlled)
    );
    assert!(accuracy(&honest) > 0.95, "{honest}");
    assert!(
        figures[0] < accuracy(&honest) - 0.2,
        "without control the lie must show, or this proves nothing: {figures:?}"
    );
    assert!(
        accuracy(&controlled) >= accuracy(&honest) - BOUND,
        "{controlled}"
    );

    // It is said who, why, and written down.
    let (_, list) = get(http, "/api/v1/quarantine").await;
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    let why = list[0]["why"].as_str().unwrap();
    assert!(
        list[0]["device"] == "d4" && why.contains("labels contradict"),
        "{list}"
    );
    let (_, log) = get(http, "/api/v1/audit").await;
    assert!(
        log.to_string().contains("\"quarantine\""),
        "the log says so: {log}"
    );
    let program = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cloud-coordinator"));
        command.args(["device", "quarantine"]).args(arguments);
        let data = dir.path().to_owned();
        command.arg("--data").arg(data);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        said
    };
    let said = program(&[]);
    assert!(
        said.contains("_/d4") && said.contains("labels contradict"),
        "{said}"
    );

    // Nobody is asked about it, and nothing that it sent is learnt from.
    let queued = |queue: &Value| {
        let items = queue["items"].as_array().unwrap();
        items.iter().any(|item| item["id"] == open)
    };
    let (_, queue) = get(http, "/api/v1/tasks/lines/queue?limit=50").await;
    assert!(!queued(&queue), "{queue}");
    let snapshot = || {
        say(
            http,
            "POST /api/v1/tasks/lines/datasets",
            json!({"author": "me"}),
        )
    };
    assert_eq!(snapshot().await.1["train"], 72);
    // Also not by way of a snapshot from before.
    let before = honest["dataset"].as_str().unwrap();
    let (_, all) = get(http, "/api/v1/tasks/lines/datasets").await;
    let poisoned = all.as_array().or(all["items"].as_array()).unwrap();
    let poisoned = poisoned.iter().find(|d| d["train"].as_i64() > Some(72));
    let poisoned = poisoned.unwrap()["digest"].as_str().unwrap();
    assert_ne!(before, poisoned);
    let body = json!({"author": "me", "dataset": poisoned});
    let (_, job) = say(http, "POST /api/v1/tasks/lines/train", body).await;
    let path = format!("/api/v1/jobs/{}", job["id"]);
    let refused = async {
        loop {
            let (_, job) = get(http, &path).await;
            if job["state"] == "failed" {
                return job;
            }
            assert_ne!(job["state"], "done", "{job}");
            sleep(Duration::from_millis(100)).await;
        }
    };
    let job = timeout(TRAINED, refused).await.unwrap();
    assert!(
        job["error"].as_str().unwrap().contains("in quarantine"),
        "{job}"
    );

    // A person lifts it and vouches for what is here: it counts again, within its share.
    let said = program(&["_/d4", "--lift"]);
    assert!(said.contains("count again"), "{said}");
    let (_, queue) = get(http, "/api/v1/tasks/lines/queue?limit=50").await;
    assert!(queued(&queue), "{queue}");
    let (_, dataset) = snapshot().await;
    assert_eq!(dataset["train"], 72 + 72, "{dataset}");
    assert_eq!(dataset["report"]["share_limit"], 0.5, "{dataset}");
    // And a person sets it apart without any finding.
    program(&["_/d4", "--why", "it was stolen"]);
    assert_eq!(snapshot().await.1["train"], 72);
    let (status, _) = say(
        http,
        "PUT /api/v1/devices/_/d4/quarantine",
        json!({"why": ""}),
    )
    .await;
    assert_eq!(status, 422);
    assert_eq!(
        ask(http, "DELETE /api/v1/devices/_/d9/quarantine").await.0,
        404
    );
    handle.stop().await;
}

/// The holdout as a snapshot names it, and what each of its pictures is.
async fn held(http: SocketAddr, data: &Path) -> Vec<(String, i64, Vec<u8>)> {
    let (_, page) = get(http, "/api/v1/samples?limit=1000").await;
    let mut held = Vec::new();
    for sample in page["items"].as_array().unwrap() {
        if sample["holdout"] == true {
            let sha256 = sample["sha256"].as_str().unwrap().to_owned();
            let file = data.join("objects").join(&sha256[..2]).join(&sha256);
            let id = sample["id"].as_i64().unwrap();
            let what = format!("{sha256} {}", sample["class"]);
            held.push((what, id, std::fs::read(file).unwrap()));
        }
    }
    held.sort();
    held
}

#[tokio::test(flavor = "multi_thread")]
async fn no_device_writes_the_holdout() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start_as(config_with(dir.path())).await;
    let http = handle.http;
    honest_fleet(http).await;
    // One picture of a device was put there by a person, too.
    let (_, page) = get(http, "/api/v1/samples?limit=1&device=d1").await;
    let own = &page["items"][0];
    let (id, seq) = (own["id"].as_i64().unwrap(), own["seq"].as_u64().unwrap());
    let put = |id: i64| {
        let line = format!("PUT /api/v1/samples/{id}/holdout");
        let body = json!({"holdout": true});
        async move { say(http, &line, body).await }
    };
    assert_eq!(put(id).await.0, 200);
    let before = held(http, dir.path()).await;
    assert_eq!(before.len(), 121);

    // A device says that its sample is held out, in every word that the database knows.
    let image = picture(0, 5_000, 0);
    let mut claims = words("d9", 1, &image);
    for (word, value) in [
        ("holdout", json!(true)),
        ("holdout_by", json!("me")),
        ("origin", json!("import")),
        ("class", json!("flat")),
        ("id", json!(id)),
    ] {
        claims[word] = value;
    }
    let (status, said) = say(http, "POST /api/v1/samples", claims).await;
    assert!(status == 201 || status == 422, "{said}");
    // It sends the identity of one that is held out again, with another picture; pieces of it; a mark.
    let other = picture(1, 6_000, 0);
    let (status, said) = say(http, "POST /api/v1/samples", words("d1", seq, &other)).await;
    assert_eq!(status, 422, "{said}");
    for offset in [0, 10, own["bytes"].as_u64().unwrap()] {
        let line = format!("PATCH /api/v1/samples/d1/7/{seq}/image");
        let headers = format!("upload-offset: {offset}\r\n");
        let (status, _, said) = send(http, &line, &headers, &other).await;
        // Behind the end there is nothing to add: all that it wants is here, and nothing of this is taken.
        let said = String::from_utf8_lossy(&said);
        let done = status == 200 && offset == own["bytes"].as_u64().unwrap();
        assert!(status >= 400 || done, "{offset}: {status} {said}");
    }
    // What it sends may have the same picture as one that is held out; it says that it is something else.
    let held_image = before[0].2.clone();
    let (status, _) = say(http, "POST /api/v1/samples", words("d9", 3, &held_image)).await;
    assert_eq!(status, 201);
    let mut mark = words("d1", seq, &std::fs::read(path_of(dir.path(), own)).unwrap());
    mark["reason"] = json!("wrong");
    mark["label"] = json!("flat");
    let (status, said) = say(http, "POST /api/v1/samples", mark).await;
    assert_eq!(status, 200, "{said}");
    // A picture that is not here yet is not put there: the device could still choose it.
    let late = picture(1, 7_000, 0);
    let (status, _) = say(http, "POST /api/v1/samples", words("d9", 4, &late)).await;
    assert_eq!(status, 201);
    let (_, page) = get(http, "/api/v1/samples?limit=1&device=d9").await;
    let (status, said) = put(page["items"][0]["id"].as_i64().unwrap()).await;
    assert_eq!(status, 409, "{said}");

    assert!(
        held(http, dir.path()).await == before,
        "the holdout changed"
    );
    // And one who proves to be a device may not ask for it at all.
    let line = format!("PUT /api/v1/samples/{id}/holdout");
    let body = br#"{"holdout":false}"#;
    let kind = "content-type: application/json\r\n";
    let (status, _, _) = send_as(http, &line, kind, body).await;
    assert_eq!(status, 401);
    handle.stop().await;
}

fn path_of(data: &Path, sample: &Value) -> std::path::PathBuf {
    let sha256 = sample["sha256"].as_str().unwrap();
    data.join("objects").join(&sha256[..2]).join(sha256)
}

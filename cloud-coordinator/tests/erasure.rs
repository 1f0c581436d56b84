//! What is erased is nowhere: a planted picture is searched for in every byte of the coordinator's folder.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;

use std::{io::Cursor, net::SocketAddr, path::Path, process::Command};

use cloud_coordinator::objects::digest;
use common::*;
use mesh_core::{Desired, Erase, Gone, Phase, Reported, VERSION};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

/// Nobody else's bytes: noise that nothing compresses.
fn picture(seed: u32) -> Vec<u8> {
    let picture = image::RgbImage::from_fn(48, 48, |x, y| {
        let mut n = seed.wrapping_mul(0x9e37_79b9) ^ (x * 7_919 + y * 104_729);
        let mut byte = || {
            n ^= n << 13;
            n ^= n >> 17;
            n ^= n << 5;
            (n >> 8) as u8
        };
        byte();
        image::Rgb([byte(), byte(), byte()])
    });
    let mut bytes = Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.push(path);
        }
    }
    all
}

/// Where one of these byte strings is.
fn found(folder: &Path, needles: &[Vec<u8>]) -> Vec<String> {
    let mut found = Vec::new();
    for path in files(folder) {
        // What is being written may get its name just now; what is gone holds nothing.
        let Ok(bytes) = std::fs::read(&path) else {
            continue;
        };
        for needle in needles {
            if bytes.windows(needle.len()).any(|w| w == needle) {
                found.push(format!("{} of {} bytes", path.display(), needle.len()));
            }
        }
    }
    found
}

/// The picture as a whole, and pieces of it from everywhere: half an upload is a picture too.
fn pieces(image: &[u8]) -> Vec<Vec<u8>> {
    let mut pieces = vec![image.to_vec()];
    // What all pictures of one size begin with says nothing.
    let body = &image[64..image.len() - 16];
    pieces.extend(body.chunks_exact(40).map(<[u8]>::to_vec));
    pieces
}

fn words(device: &str, seq: u64, image: &[u8], secret: &str) -> Value {
    json!({
        "v": 1, "device": device, "source": "cam0", "epoch": 7, "seq": seq, "ts": 1_700_000_000_000_i64 + seq as i64,
        "reason": "uncertain", "label": format!("label-{secret}"), "score": 0.5, "margin": 0.25, "entropy": 0.75,
        "model": "steel@1.0.0", "file": format!("file-{secret}"),
        "embedding": embedding(secret), "image": { "sha256": digest(image), "bytes": image.len() },
    })
}

fn embedding(secret: &str) -> Vec<f32> {
    secret.bytes().map(|b| f32::from(b) * 1.25 + 0.5).collect()
}

fn stored_embedding(secret: &str) -> Vec<u8> {
    let values = embedding(secret);
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

async fn announce(http: SocketAddr, words: Value) -> (u16, Value) {
    say(http, "POST /api/v1/samples", words).await
}

async fn piece(http: SocketAddr, device: &str, seq: u64, offset: usize, bytes: &[u8]) -> u16 {
    let line = format!("PATCH /api/v1/samples/{device}/7/{seq}/image");
    let headers = format!("upload-offset: {offset}\r\n");
    send(http, &line, &headers, bytes).await.0
}

async fn newest(http: SocketAddr) -> i64 {
    let (_, page) = get(http, "/api/v1/samples?limit=1").await;
    page["items"][0]["id"].as_i64().unwrap()
}

async fn label(http: SocketAddr, id: i64, class: &str) {
    let line = format!("POST /api/v1/samples/{id}/labels");
    let (status, said) = say(http, &line, json!({"class": class})).await;
    assert_eq!(status, 201, "{said}");
}

fn tar_of(name: &str, image: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(image.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, format!("hole/{name}.png"), image)
        .unwrap();
    tar.into_inner().unwrap()
}

async fn import(http: SocketAddr, author: &str, name: &str, image: &[u8]) -> Value {
    let line = format!("POST /api/v1/tasks/steel/import?format=folder&author={author}");
    let (status, said) = bring(http, &line, "application/x-tar", &tar_of(name, image)).await;
    assert_eq!(status, 200, "{said}");
    said
}

async fn receipt(http: SocketAddr, id: &Value, wanted: impl Fn(&Value) -> bool) -> Value {
    let path = format!("/api/v1/erasures/{id}");
    let reached = async {
        loop {
            let (status, said) = get(http, &path).await;
            assert_eq!(status, 200, "{said}");
            if wanted(&said) {
                return said;
            }
            sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, reached).await.unwrap()
}

/// The next wish with anything, or with nothing, to erase.
async fn wished(device: &mut Client, anything: bool) -> Desired {
    loop {
        let (topic, bytes) = device.next().await;
        if topic.ends_with("/desired") {
            let wish = Desired::decode(&bytes).unwrap();
            if wish.erase.is_empty() != anything {
                return wish;
            }
        }
    }
}

fn reported(revision: u64, erased: Option<u64>) -> Vec<u8> {
    let reported = Reported {
        v: VERSION,
        ts: 1,
        revision,
        phase: Phase::Settled,
        target: None,
        loaded: None,
        last_good: None,
        failure: None,
        bad: Vec::new(),
        progress: 0.0,
        evidence: mesh_core::Evidence::default(),
        settings: None,
        erased,
    };
    reported.encode().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planted_picture_is_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let mut d1 = device(handle.mqtt.unwrap(), "d1").await;
    assert!(d1.subscribe(&topic("d1", "_", "desired")).await);
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 7, 1))
        .await;
    d1.acknowledged(7, 1).await;

    // It gets everywhere: half of an upload, the store, labels, a dataset, embeddings; by two ways.
    let (planted, other) = (picture(1), picture(2));
    let secret = "pLaNtEd-7f3a";
    let classes = json!({"classes": ["ok", "hole"]});
    say(http, "PUT /api/v1/tasks/steel", classes).await;
    let half = planted.len() / 2;
    let (status, said) = announce(http, words("d1", 1, &planted, secret)).await;
    assert_eq!(status, 201, "{said}");
    assert_eq!(piece(http, "d1", 1, 0, &planted[..half]).await, 200);
    let sample = newest(http).await;
    label(http, sample, "hole").await;
    import(http, "ana", secret, &planted).await;
    let (status, _) = announce(http, words("d1", 2, &other, "somebody else")).await;
    assert_eq!(status, 201);
    assert_eq!(piece(http, "d1", 2, 0, &other).await, 200);
    label(http, newest(http).await, "ok").await;
    let (status, dataset) = say(
        http,
        "POST /api/v1/tasks/steel/datasets",
        json!({"author": "me"}),
    )
    .await;
    assert_eq!((status, &dataset["erased"]), (201, &json!(0)), "{dataset}");
    let mut needles = pieces(&planted);
    needles.push(stored_embedding(secret));
    needles.push(secret.as_bytes().to_vec());
    let before = found(dir.path(), &needles);
    for place in ["objects", "uploads", "learning.db"] {
        assert!(
            before.iter().any(|path| path.contains(place)),
            "{place}: it must be there to be erased, or this proves nothing"
        );
    }
    assert!(before.len() > needles.len(), "each piece is found");

    // Erased by the number of the sample that was only half here.
    let output = Command::new(env!("CARGO_BIN_EXE_cloud-coordinator"))
        .args(["erase", "sample", &sample.to_string(), "--why", "a test"])
        .arg("--data")
        .arg(dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.contains("2 samples, 1 images, 1 uploads"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(found(dir.path(), &needles), Vec::<String>::new());
    assert!(
        !found(dir.path(), &pieces(&other)).is_empty(),
        "and nothing else is gone"
    );

    // What remains says so.
    let path = format!("/api/v1/datasets/{}", dataset["digest"].as_str().unwrap());
    let (_, after) = get(http, &path).await;
    assert_eq!((&after["erased"], &after["train"]), (&json!(1), &json!(2)));
    let body = json!({"author": "me", "dataset": dataset["digest"]});
    let (status, said) = say(http, "POST /api/v1/tasks/steel/train", body).await;
    assert_eq!(status, 202, "{said}");
    let (_, log) = get(http, "/api/v1/audit").await;
    assert!(log.to_string().contains("POST /api/v1/erasures"), "{log}");

    // The device is told, and awaited.
    let (_, all) = get(http, "/api/v1/erasures").await;
    let id = all[0]["id"].clone();
    assert_eq!(
        (&all[0]["awaited"], &all[0]["done_ms"]),
        (&json!(["demo/d1"]), &Value::Null)
    );
    assert!(all[0]["here_ms"].is_i64(), "{all}");
    let wish = wished(&mut d1, true).await;
    let item = wish.erase[0].clone();
    assert_eq!(item.what, Gone::One { epoch: 7, seq: 1 });
    d1.publish(
        &topic("d1", "_", "reported"),
        reported(wish.revision, Some(item.id)),
    )
    .await;
    let done = receipt(http, &id, |said| said["done_ms"].is_i64()).await;
    assert_eq!(done["answered"], json!(["demo/d1"]), "{done}");
    assert_eq!(wished(&mut d1, false).await.erase, Vec::<Erase>::new());

    // Nobody brings it back: not the device under the same number, nor under another, nor another device, nor a person;
    // also not after a restart.
    handle.stop().await;
    let handle = start(dir.path()).await;
    let http = handle.http;
    let (status, here) = announce(http, words("d1", 1, &planted, secret)).await;
    assert_eq!(
        (status, &here["offset"]),
        (200, &json!(planted.len())),
        "it is told that nothing more is wanted"
    );
    assert_eq!(piece(http, "d1", 1, 0, &planted).await, 410);
    for (device, seq) in [("d1", 3), ("d2", 1)] {
        let (status, said) = announce(http, words(device, seq, &planted, secret)).await;
        assert_eq!(status, 410, "{said}");
    }
    let said = import(http, "ben", secret, &planted).await;
    assert_eq!((&said["imported"], &said["failed"]), (&json!(0), &json!(1)));
    assert_eq!(found(dir.path(), &needles), Vec::<String>::new());
    handle.stop().await;
    assert_eq!(found(dir.path(), &needles), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_a_device_or_of_a_person() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let mut d1 = device(handle.mqtt.unwrap(), "d1").await;
    assert!(d1.subscribe(&topic("d1", "_", "desired")).await);
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 7, 1))
        .await;
    d1.acknowledged(7, 1).await;
    let images: Vec<_> = (10..14).map(picture).collect();
    for (seq, image) in (1..).zip(&images) {
        let (status, said) = announce(http, words("d1", seq, image, "x")).await;
        assert_eq!(status, 201, "{said}");
        assert_eq!(piece(http, "d1", seq, 0, image).await, 200);
    }
    let there = |n: usize| !found(dir.path(), &pieces(&images[n])).is_empty();
    let erase = |which: Value| {
        let body = json!({"which": which, "why": "asked for"});
        async move { say(http, "POST /api/v1/erasures", body).await }
    };
    // A time: both ends with it.
    let ts = |seq: i64| 1_700_000_000_000_i64 + seq;
    let range = json!({"device": {"name": "demo/d1", "from_ms": ts(1), "to_ms": ts(2)}});
    let (status, said) = erase(range).await;
    assert_eq!(
        (status, &said["receipt"]["samples"]),
        (201, &json!(2)),
        "{said}"
    );
    assert_eq!(
        [there(0), there(1), there(2), there(3)],
        [false, false, true, true]
    );
    let wish = wished(&mut d1, true).await;
    assert_eq!(
        wish.erase[0].what,
        Gone::Between {
            from: ts(1),
            to: ts(2)
        }
    );
    // What the device had not sent yet of that time is not taken; of another time it is.
    let late = picture(20);
    let mut from_then = words("d1", 9, &late, "x");
    from_then["ts"] = json!(ts(2));
    assert_eq!(announce(http, from_then).await.0, 410);
    assert_eq!(announce(http, words("d1", 9, &late, "x")).await.0, 201);
    // All of it: until the device says that it has nothing left, nothing is taken from it.
    let (status, said) = erase(json!({"device": {"name": "demo/d1"}})).await;
    assert_eq!(
        (status, &said["receipt"]["samples"]),
        (201, &json!(3)),
        "{said}"
    );
    assert!(!there(2) && !there(3));
    let newer = picture(21);
    assert_eq!(announce(http, words("d1", 10, &newer, "x")).await.0, 410);
    let wish = loop {
        let wish = wished(&mut d1, true).await;
        if wish.erase.iter().any(|e| e.what == Gone::All) {
            break wish;
        }
    };
    let highest = wish.erase.iter().map(|e| e.id).max();
    let answer = reported(wish.revision, highest);
    d1.publish(&topic("d1", "_", "reported"), answer).await;
    receipt(http, &said["id"], |said| said["done_ms"].is_i64()).await;
    assert_eq!(announce(http, words("d1", 10, &newer, "x")).await.0, 201);

    // What a person has brought, and nobody else's.
    let (anas, bens) = (picture(30), picture(31));
    import(http, "ana", "a", &anas).await;
    import(http, "ben", "b", &bens).await;
    let (status, said) = erase(json!({"person": "ana"})).await;
    assert_eq!(
        (status, &said["receipt"]["samples"]),
        (201, &json!(1)),
        "{said}"
    );
    assert!(said["done_ms"].is_i64(), "no device is awaited: {said}");
    assert!(found(dir.path(), &pieces(&anas)).is_empty());
    assert!(!found(dir.path(), &pieces(&bens)).is_empty());

    // What cannot be meant.
    for which in [
        json!({"sample": 999_999}),
        json!({"person": " "}),
        json!({"device": {"name": "nobody"}}),
        json!({"device": {"name": "a/b", "from_ms": 2, "to_ms": 1}}),
        json!({}),
        json!("all"),
    ] {
        let (status, said) = erase(which).await;
        assert!(matches!(status, 400 | 422), "{status} {said}");
    }
    let (status, _) = say(
        http,
        "POST /api/v1/erasures",
        json!({"which": {"person": "ben"}, "why": ""}),
    )
    .await;
    assert_eq!(status, 422);
    assert_eq!(get(http, "/api/v1/erasures/99").await.0, 404);
    handle.stop().await;
}

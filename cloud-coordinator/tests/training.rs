//! Training over HTTP, with the backbone that ships.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;

use std::{io::Cursor, net::SocketAddr, path::Path, time::Duration};

use cloud_coordinator::{Config, Coordinator, Handle};
use common::*;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

/// A training of a few images, on a machine that compiles at the same time.
const TRAINED: Duration = Duration::from_secs(120);

fn picture(class: usize, n: u32) -> Vec<u8> {
    let picture = image::RgbImage::from_fn(64, 64, |x, y| {
        let wave = if class == 0 { x } else { y };
        let value = 128.0 + (f64::from(wave + n) / 3.0).sin() * (40.0 + f64::from(n % 9));
        image::Rgb([value as u8, value as u8, (n * 3 % 251) as u8])
    });
    let mut bytes = Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// A folder-of-classes as a tar: `count` images of each of two classes, from the `first`-th on.
fn tar(first: u32, count: u32) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (class, name) in ["upright", "flat"].into_iter().enumerate() {
        for n in first..first + count {
            let bytes = picture(class, n);
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            let path = format!("{name}/{n}.png");
            tar.append_data(&mut header, path, bytes.as_slice())
                .unwrap();
        }
    }
    tar.into_inner().unwrap()
}

fn config_with(data: &Path) -> Config {
    let mut config = config(data);
    let backbone = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles/backbone");
    config.training.models = vec![backbone];
    config.training.program = vec![env!("CARGO_BIN_EXE_cloud-coordinator").into()];
    config
}

async fn start_with_backbone(data: &Path) -> Handle {
    start_as(config_with(data)).await
}

async fn import(http: SocketAddr, tar: &[u8], holdout: bool) -> Value {
    let line = format!("POST /api/v1/tasks/lines/import?format=folder&author=me&holdout={holdout}");
    let (status, said) = bring(http, &line, "application/x-tar", tar).await;
    assert_eq!(status, 200, "{said}");
    said
}

async fn ended(http: SocketAddr, job: &Value) -> Value {
    let path = format!("/api/v1/jobs/{}", job["id"]);
    let wait = async {
        loop {
            let (_, job) = get(http, &path).await;
            if !matches!(job["state"].as_str(), Some("queued" | "running")) {
                return job;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(TRAINED, wait).await.unwrap()
}

async fn train(http: SocketAddr, request: Value) -> Value {
    let (status, job) = say(http, "POST /api/v1/tasks/lines/train", request).await;
    assert_eq!(status, 202, "{job}");
    ended(http, &job).await
}

#[tokio::test(flavor = "multi_thread")]
async fn labelled_images_become_a_model_that_serves() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start_with_backbone(dir.path()).await;
    let http = handle.http;
    import(http, &tar(0, 12), false).await;
    import(http, &tar(100, 60), true).await;

    let job = train(http, json!({"author": "me"})).await;
    assert_eq!(job["state"], "done", "{job}");
    let (_, model) = get(http, "/api/v1/catalog/lines@1.0.0").await;
    assert_eq!(
        (&model["state"], &model["parent"]),
        (&json!("accepted"), &json!("backbone@1.1.0")),
        "{model}"
    );
    assert!(model["report"]["accuracy"].as_f64() > Some(0.95), "{model}");
    let (status, svg) = get(http, "/api/v1/catalog/lines@1.0.0/confusion.svg").await;
    assert!(
        status == 200 && svg.as_str().unwrap().contains("<svg"),
        "{svg}"
    );

    // The same again is no better, so it does not pass; and the same data and seed give the same bytes.
    let again = train(http, json!({"author": "me", "base": "backbone"})).await;
    assert_eq!(again["model"], "lines@1.1.0", "{again}");
    let (_, second) = get(http, "/api/v1/catalog/lines@1.1.0").await;
    assert_eq!(second["state"], "refused", "{second}");
    assert_eq!(second["sha256"], model["sha256"]);
    assert_eq!(second["dataset"], model["dataset"]);
    let (_, current) = get(http, "/api/v1/catalog/lines").await;
    assert_eq!(current["version"], "1.0.0", "the refused one is not in use");

    // The model as a service.
    let (status, said) = bring(
        http,
        "POST /api/v1/models/lines:predict",
        "image/png",
        &picture(1, 500),
    )
    .await;
    assert_eq!(
        (status, &said["predictions"][0]["label"]),
        (200, &json!("flat")),
        "{said}"
    );
    let (status, said) = bring(
        http,
        "POST /api/v1/features?model=lines",
        "image/png",
        &picture(1, 500),
    )
    .await;
    assert_eq!(
        (status, said["embeddings"][0].as_array().unwrap().len()),
        (200, 704),
        "{said}"
    );
    let tensor = vec![0.0; 3 * 96 * 96];
    let (status, said) = say(
        http,
        "POST /api/v1/models/lines:predict",
        json!({"instances": [tensor, tensor]}),
    )
    .await;
    assert_eq!(
        (status, said["predictions"].as_array().unwrap().len()),
        (200, 2),
        "{said}"
    );

    // The same for devices, of what has their labels: what is in use, and not what was refused since.
    let bundle = models::Bundle::open(&dir.path().join("models/lines/1.0.0")).unwrap();
    let offer = models::offer_of(&bundle.manifest).unwrap();
    let (status, said) = get(http, &format!("/api/v1/offload?kind={}", offer.kind)).await;
    assert_eq!(
        (status, said),
        (200, json!([serde_json::to_value(&offer).unwrap()]))
    );
    let (_, none) = get(http, &format!("/api/v1/offload?kind={}", offer.digest)).await;
    assert_eq!(none, json!([]));
    assert_eq!(get(http, "/api/v1/offload?kind=x").await.0, 400);
    let line = format!("POST /api/v1/offload/{}", offer.digest);
    let (status, said) = bring(http, &line, "image/png", &picture(1, 500)).await;
    assert_eq!(
        (status, &said["label"], &said["model"]),
        (200, &json!("flat"), &json!("lines@1.0.0")),
        "{said}"
    );
    assert_eq!(bring(http, &line, "image/png", b"<svg/>").await.0, 422);
    let line = format!("POST /api/v1/offload/{}", offer.kind);
    assert_eq!(
        bring(http, &line, "image/png", &picture(1, 500)).await.0,
        404
    );

    // And what is none.
    for (body, kind) in [
        (&b"<svg/>"[..], "image/png"),
        (b"{\"instances\": [[1.0]]}", "application/json"),
    ] {
        let (status, said) = bring(http, "POST /api/v1/models/lines:predict", kind, body).await;
        assert_eq!(status, 422, "{said}");
    }
    assert_eq!(
        bring(
            http,
            "POST /api/v1/models/nothing:predict",
            "image/png",
            b"x"
        )
        .await
        .0,
        404
    );
    handle.stop().await;

    // After a restart it is all still there.
    let handle = start_with_backbone(dir.path()).await;
    let (_, model) = get(handle.http, "/api/v1/catalog/lines").await;
    assert_eq!(model["version"], "1.0.0", "{model}");
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_learned_from_fails_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start_with_backbone(dir.path()).await;
    let http = handle.http;
    let failed = |job: &Value| job["state"] == "failed" && job["error"].is_string();
    // No such task, no such model, no external trainer.
    let job = train(http, json!({"author": "me"})).await;
    assert!(failed(&job), "{job}");
    import(http, &tar(0, 8), false).await;
    let job = train(http, json!({"author": "me", "base": "nobody@1"})).await;
    assert!(
        failed(&job) && job["error"].as_str().unwrap().contains("nobody@1"),
        "{job}"
    );
    let job = train(http, json!({"author": "me", "trainer": "external"})).await;
    assert!(failed(&job), "{job}");
    // Without a holdout a model is made, and refused.
    let job = train(http, json!({"author": "me"})).await;
    assert_eq!(job["state"], "done", "{job}");
    let (_, model) = get(http, "/api/v1/catalog/lines@1.0.0").await;
    assert_eq!(
        (&model["state"], &model["report"]),
        (&json!("refused"), &Value::Null),
        "{model}"
    );
    // Requests that are none.
    for body in [
        json!({"author": ""}),
        json!({"author": "me", "epochs": 0}),
        json!({"author": "me", "x": 1}),
    ] {
        let (status, said) = say(http, "POST /api/v1/tasks/lines/train", body).await;
        assert!(status == 422 || status == 400, "{status} {said}");
    }
    assert_eq!(get(http, "/api/v1/jobs/999").await.0, 404);
    let (status, _) = bring(http, "DELETE /api/v1/jobs/1", "text/plain", b"").await;
    assert_eq!(status, 409, "it has ended");
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_external_trainer_is_bound_to_its_contract() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("trainer.sh");
    let command = |what: &str| {
        std::fs::write(&script, format!("set -e\ncd \"$1\"\n{what}\n")).unwrap();
    };
    let mut config = config_with(dir.path());
    config.training.external = vec!["/bin/sh".into(), script.display().to_string()];
    config.training.time_limit_s = 6;
    let handle = start_as(config).await;
    let http = handle.http;
    import(http, &tar(0, 6), false).await;
    let external = || json!({"author": "me", "trainer": "external"});
    for (what, words) in [
        ("echo sorry >&2; exit 3", "sorry"),
        ("echo done", "model.onnx"),
        ("echo nonsense > model.onnx", "lines@"),
        // The backbone has no scores: another shape than was asked for.
        ("echo progress 1 2 0.5; cp base.onnx model.onnx", "lines@"),
        ("sleep 600", "longer than"),
    ] {
        command(what);
        let job = train(http, external()).await;
        let error = job["error"].as_str().unwrap_or_default();
        assert!(
            job["state"] == "failed" && error.contains(words),
            "{what}: {job}"
        );
    }
    // After so many failures it is left alone for a while, the one that hung among them.
    let open = "lacewing_part_open{part=\"trainer\"}";
    assert_eq!(metric(http, open).await, 1.0);
    // A person ends one that hangs; everything else answers meanwhile.
    command("sleep 600");
    let submit = async {
        loop {
            let (status, said) = say(http, "POST /api/v1/tasks/lines/train", external()).await;
            if status == 202 {
                return said;
            }
            assert_eq!((status, &said["part"]), (503, &json!("trainer")), "{said}");
            sleep(Duration::from_millis(100)).await;
        }
    };
    let job = timeout(PATIENCE, submit).await.unwrap();
    for path in [
        "/api/v1/devices",
        "/api/v1/samples",
        "/api/v1/users",
        "/api/v1/catalog",
        "/readyz",
    ] {
        assert_eq!(get(http, path).await.0, 200, "{path}");
    }
    let (status, _) = bring(http, "POST /api/v1/features", "image/png", &picture(0, 1)).await;
    assert_eq!(status, 200);
    let line = format!("DELETE /api/v1/jobs/{}", job["id"]);
    let (status, _) = bring(http, &line, "text/plain", b"").await;
    assert_eq!(status, 200);
    assert_eq!(ended(http, &job).await["state"], "cancelled");
    let (_, models) = get(http, "/api/v1/catalog?name=lines").await;
    assert_eq!(models, json!([]), "nothing was published");
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_features_are_learned_from() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let rows: Vec<[f64; 2]> = (0..40)
        .map(|n| [f64::from(n % 2) * 4.0, f64::from(n % 5)])
        .collect();
    let labels: Vec<&str> = (0..40)
        .map(|n| if n % 2 == 0 { "low" } else { "high" })
        .collect();
    let (status, said) = say(
        http,
        "POST /api/v1/train",
        json!({"features": rows, "labels": labels}),
    )
    .await;
    assert_eq!(status, 200, "{said}");
    assert_eq!(said["labels"], json!(["high", "low"]));
    let weight = |class: usize| said["weight"][class][0].as_f64().unwrap();
    assert!(weight(0) > weight(1), "{said}");
    for (features, labels) in [
        (json!([[1.0], [2.0, 3.0]]), json!(["a", "b"])),
        (json!([[1.0]]), json!(["a", "b"])),
        (json!([[1.0], [2.0]]), json!(["a", "a"])),
        (json!([[1e30], [2.0]]), json!(["a", "b"])),
        (json!([]), json!([])),
    ] {
        let body = json!({"features": features, "labels": labels});
        let (status, said) = say(http, "POST /api/v1/train", body).await;
        assert_eq!(status, 422, "{said}");
    }
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_leads_out_of_its_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    start_with_backbone(&data).await.stop().await;
    let evil = dir.path().join("evil");
    let backbone = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles/backbone");
    std::fs::create_dir_all(evil.join("golden")).unwrap();
    for name in ["manifest.toml", "model.onnx"] {
        std::fs::copy(backbone.join(name), evil.join(name)).unwrap();
    }
    for golden in std::fs::read_dir(backbone.join("golden")).unwrap() {
        let golden = golden.unwrap();
        std::fs::copy(golden.path(), evil.join("golden").join(golden.file_name())).unwrap();
    }
    let manifest = std::fs::read_to_string(evil.join("manifest.toml")).unwrap();
    let manifest = manifest.replace("version = \"1.1.0\"", "version = \"..\"");
    std::fs::write(evil.join("manifest.toml"), manifest).unwrap();
    let mut config = config(&data);
    config.training.models = vec![evil];
    let error = Coordinator::start(config).await.unwrap_err().to_string();
    assert!(error.contains("version"), "{error}");
    let kept = data.join("models/backbone/1.1.0/model.onnx");
    assert!(kept.is_file(), "the models are untouched");
}

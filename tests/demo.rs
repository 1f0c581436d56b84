//! The demo as a visitor runs it, unattended.

use fleet::process::{Process, Program};
use tests::{BOUND, bundle};
use tokio::sync::Mutex;

/// One demo at a time: it listens where people expect it.
static ONE: Mutex<()> = Mutex::const_new(());

#[tokio::test(flavor = "multi_thread")]
async fn runs_unattended_and_reports() {
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report.json");
    let node = Program(env!("CARGO_BIN_EXE_node").into());
    let args = ["--for", "24s", "--report"].map(Into::into);
    let args = args.into_iter().chain([report.clone().into()]);
    let mut demo = Process::part("demo", &node, "demo", args, dir.path().join("log"));
    demo.start().unwrap();
    assert!(demo.ended(BOUND).await, "{}", demo.last_words());
    let said = std::fs::read_to_string(demo.log()).unwrap();
    for words in [
        "mosquitto_sub",
        "pulling d2's plug",
        "delivered its backlog",
        "Nothing was lost",
    ] {
        assert!(said.contains(words), "{words:?} is missing in:\n{said}");
    }
    let text = std::fs::read_to_string(report).unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(report["produced"].as_u64() > Some(100), "{text}");
    assert_eq!(report["produced"], report["stored"], "{text}");
    assert!(report["replayed"].as_u64() > Some(0), "{text}");
    for none in ["duplicates", "lost", "gaps", "invented"] {
        assert_eq!(report[none], 0, "{text}");
    }
    assert_eq!(report["devices"], 3);
}

/// On somebody's own pictures and bundle, over a broker that forgets everything: it ends when all have been looked at.
#[tokio::test(flavor = "multi_thread")]
async fn looks_at_own_images_over_mosquitto() {
    const IMAGES: u64 = 24;
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let (images, report) = (dir.path().join("images"), dir.path().join("report.json"));
    let node = Program(env!("CARGO_BIN_EXE_node").into());
    let count = IMAGES.to_string();
    let drawn = std::process::Command::new(&node.0)
        .args(["edge-agent", "scene", "--count", &count, "--out"])
        .arg(&images)
        .status();
    assert!(drawn.unwrap().success());
    let args = [
        "--images".into(),
        images.into(),
        "--bundle".into(),
        bundle("conveyor").into(),
        "--report".into(),
        report.clone().into(),
    ];
    let more = [
        "--broker",
        "mosquitto",
        "--agents",
        "2",
        "--fps",
        "4",
        "--no-plug",
    ];
    let args = args.into_iter().chain(more.map(Into::into));
    let mut demo = Process::part("demo", &node, "demo", args, dir.path().join("log"));
    demo.start().unwrap();
    assert!(demo.ended(BOUND).await, "{}", demo.last_words());
    let said = std::fs::read_to_string(demo.log()).unwrap();
    assert!(said.contains("Nothing was lost"), "{said}");
    let text = std::fs::read_to_string(report).unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (field, count) in [
        ("produced", 2 * IMAGES),
        ("stored", 2 * IMAGES),
        // The name of an image's folder is what it shows.
        ("judged", 2 * IMAGES),
        ("gaps", 0),
    ] {
        assert_eq!(report[field], count, "{field}: {text}");
    }
    assert!(report["accuracy"].as_f64() > Some(0.7), "{text}");
}

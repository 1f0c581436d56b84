//! The demo as a visitor runs it, unattended.

use fleet::process::{Process, Program};
use tests::BOUND;

#[tokio::test(flavor = "multi_thread")]
async fn runs_unattended_and_reports() {
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

//! Unknown models are tried in a process of their own.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{path::Path, time::Duration};

use models::{Fault, Trial, try_bundle};

const LIMIT: Duration = Duration::from_secs(120);

fn trial(dir: &Path, limit: Duration) -> Trial {
    let program = [env!("CARGO_BIN_EXE_edge-agent").into()];
    try_bundle(&program, dir, limit).unwrap()
}

/// A copy of a bundle that ships, with its manifest changed.
fn changed(from: &str, change: impl Fn(String) -> String) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/bundles")
        .join(from);
    std::fs::create_dir(dir.path().join("golden")).unwrap();
    for file in std::fs::read_dir(shipped.join("golden")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(
            file.path(),
            dir.path().join("golden").join(file.file_name()),
        )
        .unwrap();
    }
    std::fs::copy(shipped.join("model.onnx"), dir.path().join("model.onnx")).unwrap();
    let manifest = std::fs::read_to_string(shipped.join("manifest.toml")).unwrap();
    std::fs::write(dir.path().join("manifest.toml"), change(manifest)).unwrap();
    dir
}

#[test]
fn a_good_model_passes_and_says_what_it_takes() {
    let dir = changed("conveyor", |manifest| manifest);
    let trial = trial(dir.path(), LIMIT);
    assert_eq!(trial.fault, None, "{}", trial.detail);
    assert!(
        trial.latency_ms.unwrap() > 0.0 && trial.memory_mib.unwrap() > 0.5,
        "{trial:?}"
    );
}

#[test]
fn each_fault_has_its_name() {
    let wrong = changed("conveyor", |m| {
        m.replacen("label = \"ok\"", "label = \"hole\"", 1)
    });
    let slow = changed("conveyor", |m| {
        m.replace("latency_ms = 150", "latency_ms = 0.001")
    });
    let large = changed("conveyor", |m| {
        m.replace("memory_mib = 48", "memory_mib = 1")
    });
    for (dir, fault) in [
        (&wrong, Fault::SelfTest),
        (&slow, Fault::Latency),
        (&large, Fault::Memory),
    ] {
        let trial = trial(dir.path(), LIMIT);
        assert_eq!(trial.fault, Some(fault), "{trial:?}");
    }
    std::fs::write(large.path().join("model.onnx"), b"no model").unwrap();
    assert_eq!(trial(large.path(), LIMIT).fault, Some(Fault::Load));
}

#[test]
fn what_hangs_or_dies_is_ended() {
    let dir = changed("conveyor", |manifest| manifest);
    let said = trial(dir.path(), Duration::ZERO);
    assert_eq!(said.fault, Some(Fault::Crash), "{said:?}");
    let none = try_bundle(&["/bin/false".into()], dir.path(), LIMIT).unwrap();
    assert_eq!(none.fault, Some(Fault::Crash), "{none:?}");
    assert!(try_bundle(&["/no/such/file".into()], dir.path(), LIMIT).is_err());
}

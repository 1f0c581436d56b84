//! The program itself: arguments, environment, configuration, signals.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_cloud-coordinator");

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

/// Ends a child that a failing test leaves behind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn addresses(data: &Path) -> serde_json::Value {
    for _ in 0..1_000 {
        if let Ok(text) = std::fs::read_to_string(data.join("addresses.json")) {
            return serde_json::from_str(&text).unwrap();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the coordinator does not say where it listens");
}

#[tokio::test]
async fn serves_until_it_is_told_to_stop() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let child = Command::new(PROGRAM)
        .args(["serve", "--http", "127.0.0.1:0"])
        .env("LACEWING_COORDINATOR_MQTT", "127.0.0.1:0")
        .env("LACEWING_COORDINATOR_DATA", &data)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut child = Running(child);
    let said = addresses(&data).await;
    for name in ["http", "mqtt"] {
        let address = said[name].as_str().unwrap();
        assert!(
            tokio::net::TcpStream::connect(address).await.is_ok(),
            "{address}"
        );
    }
    let pid = child.0.id().to_string();
    assert!(Command::new("kill").arg(&pid).status().unwrap().success());
    for _ in 0..1_000 {
        if let Some(status) = child.0.try_wait().unwrap() {
            assert!(status.success());
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the coordinator does not stop");
}

#[test]
fn config_check_names_every_mistake() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("coordinator.toml");
    std::fs::write(&file, "http = 1\ncolour = 2\n[ingest]\nqueue_bytes = 0\n").unwrap();
    let path = file.to_str().unwrap();
    for arguments in [
        ["config", "check", "--config", path].as_slice(),
        &["serve", "--config", path],
    ] {
        let output = run(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        for field in ["http: ", "colour: ", "ingest.queue_bytes: "] {
            assert!(text.contains(field), "{field} in {text}");
        }
    }
    assert!(run(&["config", "check"]).status.success());
    let open = run(&["config", "check", "--no-tls", "--mqtt", "0.0.0.0:1883"]);
    assert!(!open.status.success());
    assert!(
        String::from_utf8(open.stderr)
            .unwrap()
            .contains("broker.listen: 0.0.0.0:1883")
    );
    let url = run(&["config", "check", "--broker", "http://x"]);
    assert!(String::from_utf8(url.stderr).unwrap().contains("--broker"));
}

#[test]
fn prints_the_description_of_the_api() {
    let output = run(&["openapi"]);
    let description: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        description["openapi"].as_str().unwrap().split('.').next(),
        Some("3")
    );
}

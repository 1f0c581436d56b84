//! Settings on trial, in a real agent: without a broker, killed again and again, or not fit for it at all.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use mesh_core::{
    Reason, Settings, VERSION,
    settings::{Begun, Document, Saved, Whom},
};
use tokio::time::Instant;

/// Much longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(90);

/// The text of a configuration whose broker is not there.
fn own(data: &Path) -> String {
    format!(
        "site = 'test'\ndevice = 'd1'\ndata = {data:?}\n[broker]\nurl = 'mqtt://127.0.0.1:9'\n\
         [[source]]\nname = 'cam0'\nkind = 'scene'\n"
    )
}

fn state(data: &Path) -> Saved {
    let path = data.join("settings/state.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The device is about to start with these for the first time.
fn begin(data: &Path, settings: &str, whom: Whom) -> Settings {
    let document = Document {
        v: VERSION,
        version: 3,
        whom,
        settings: serde_json::from_str(settings).unwrap(),
    };
    let bytes = document.encode().unwrap();
    let settings = Settings {
        version: 3,
        digest: models::digest_of(&bytes),
        trial_s: 15,
    };
    let saved = Saved {
        revision: 7,
        wished: Some(settings),
        begun: Some(Begun {
            settings,
            sources: Default::default(),
        }),
        ..Saved::new()
    };
    let folder = data.join("settings");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(format!("{}.json", settings.digest)), bytes).unwrap();
    let state = serde_json::to_vec(&saved).unwrap();
    std::fs::write(folder.join("state.json"), state).unwrap();
    std::fs::write(data.join("agent.toml"), own(data)).unwrap();
    settings
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn agent(data: &Path, command: &[&str]) -> Command {
    let mut agent = Command::new(env!("CARGO_BIN_EXE_edge-agent"));
    agent
        .args(command)
        .arg("--config")
        .arg(data.join("agent.toml"));
    agent.stdin(Stdio::null()).stderr(Stdio::null());
    agent
}

fn run(data: &Path) -> Killed {
    Killed(agent(data, &["run"]).spawn().unwrap())
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

#[test]
fn without_a_broker_the_device_goes_back_in_the_same_process() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    let settings = begin(data, r#"{"report":{"every_s":5}}"#, Whom::default());
    let mut agent_runs = run(data);
    until("it goes back", || !state(data).bad.is_empty());
    let saved = state(data);
    assert_eq!((saved.begun, saved.good), (None, None));
    let bad = &saved.bad[0];
    assert_eq!(
        (bad.digest, bad.failure.reason),
        (settings.digest, Reason::Unreachable)
    );
    until("the document goes", || {
        !data
            .join(format!("settings/{}.json", settings.digest))
            .exists()
    });
    assert!(agent_runs.0.try_wait().unwrap().is_none(), "it runs on");
    let status = agent(data, &["model", "status"]).output().unwrap();
    let words = String::from_utf8(status.stdout).unwrap();
    assert!(
        words.contains("version 3 is not tried again, unreachable"),
        "{words}"
    );
}

#[test]
fn an_agent_that_is_killed_with_new_settings_comes_back_with_the_old_ones() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    begin(data, r#"{"report":{"every_s":5}}"#, Whom::default());
    for start in 1..=4 {
        let _agent = run(data);
        until("the start is counted", || {
            let saved = state(data);
            saved.starts == start || !saved.bad.is_empty()
        });
    }
    let saved = state(data);
    assert_eq!((saved.begun, saved.bad.len()), (None, 1));
    assert_eq!(saved.bad[0].failure.reason, Reason::Crash);
}

#[test]
fn what_is_not_for_the_device_never_runs() {
    let elsewhere = Whom {
        site: Some("elsewhere".parse().unwrap()),
        ..Whom::default()
    };
    for (settings, whom, words) in [
        (
            r#"{"data":"/elsewhere"}"#,
            Whom::default(),
            "data: cannot be set from afar",
        ),
        (
            r#"{"report":{"every_s":0}}"#,
            Whom::default(),
            "report.every_s",
        ),
        (
            r#"{"report":{"every_s":5}}"#,
            elsewhere,
            "not for this device",
        ),
    ] {
        let data = tempfile::tempdir().unwrap();
        let data = data.path();
        begin(data, settings, whom);
        let _agent = run(data);
        until("it is refused", || !state(data).bad.is_empty());
        let saved = state(data);
        assert_eq!((saved.begun, saved.starts), (None, 0));
        let failure = &saved.bad[0].failure;
        assert_eq!(failure.reason, Reason::Refused);
        assert!(failure.detail.contains(words), "{failure:?}");
    }
}

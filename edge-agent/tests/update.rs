//! Models on trial, in real agents: one that is kept, one that contradicts, one that crashes the agent.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use edge_agent::{Agent, AgentHandle, clock::WallClock, config::Config, update::disk::Disk};
use mesh_core::{Desired, Limits, Reason, Release, Trial, update::Saved};
use models::ReleaseDocument;
use tokio::time::Instant;

/// Much longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn conveyor() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles/conveyor")
}

/// Frames that a source gives in one test.
const FRAMES: u64 = 400;

/// The text of a configuration, with a camera.
fn config(data: &Path, frames: u64) -> String {
    format!(
        "site = 'test'\ndevice = 'd1'\ndata = {data:?}\n[broker]\nurl = 'mqtt://127.0.0.1:9'\n\
         [model]\nbundle = {:?}\n[samples]\nrandom = 0.0\nmin_score = 0.0\nmin_margin = 0.0\nmax_entropy = 1.0\nnovelty = 1e6\n\
         [[source]]\nname = 'cam0'\nkind = 'scene'\nfps = 100.0\nframes = {frames}\n",
        conveyor()
    )
}

/// The conveyor's model under another version, with its manifest changed, installed on the device.
fn install(data: &Path, version: &str, change: impl Fn(String) -> String) -> Release {
    let folder = data.join("models/new");
    std::fs::create_dir_all(folder.join("golden")).unwrap();
    for entry in std::fs::read_dir(conveyor().join("golden")).unwrap() {
        let entry = entry.unwrap();
        let to = folder.join("golden").join(entry.file_name());
        std::fs::copy(entry.path(), to).unwrap();
    }
    std::fs::copy(conveyor().join("model.onnx"), folder.join("model.onnx")).unwrap();
    let manifest = std::fs::read_to_string(conveyor().join("manifest.toml")).unwrap();
    let manifest = manifest.replace("version = \"1.1.0\"", &format!("version = {version:?}"));
    std::fs::write(folder.join("manifest.toml"), change(manifest)).unwrap();
    let document = ReleaseDocument::of(&folder, "conveyor", version, None).unwrap();
    std::fs::write(folder.join("release.json"), document.to_bytes().unwrap()).unwrap();
    let release = Release {
        name: "conveyor".into(),
        version: version.into(),
        digest: document.digest().unwrap(),
    };
    let Ok(opened) = Disk::open(data, Some(&conveyor())) else {
        panic!("the disk opens");
    };
    std::fs::rename(folder, opened.disk.folder(&release)).unwrap();
    release
}

/// The device has just taken `new` over, and watches it beside the factory's.
fn watch(data: &Path, new: &Release, watch_frames: u32) -> Release {
    let Ok(opened) = Disk::open(data, Some(&conveyor())) else {
        panic!("the disk opens");
    };
    let factory = opened.saved.current.clone().unwrap();
    let saved = Saved {
        desired: Some(Desired {
            v: 1,
            revision: 7,
            release: Some(new.clone()),
            limits: Limits::default(),
            trial: Trial {
                share: 1.0,
                watch_frames,
                watch_s_min: 0,
                ..Trial::default()
            },
            force: false,
            settings: None,
            erase: Vec::new(),
        }),
        current: Some(new.clone()),
        last_good: Some(factory.clone()),
        begun: Some(new.clone()),
        ..opened.saved
    };
    opened.disk.save(&saved).unwrap();
    factory
}

async fn start(data: &Path) -> AgentHandle {
    let config = Config::parse(&config(data, FRAMES)).unwrap();
    let program = vec![env!("CARGO_BIN_EXE_edge-agent").into()];
    Agent::start_with(config, WallClock::system(), program)
        .await
        .unwrap()
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "{what}");
}

/// Every frame became a reading.
async fn all_frames(agent: &AgentHandle) {
    until("all frames are readings", || {
        agent.counters.readings.get() == FRAMES
    })
    .await;
    assert_eq!(agent.counters.frames.get(), FRAMES);
    assert_eq!(agent.counters.frames_bad.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_holds_up_is_kept() {
    let data = tempfile::tempdir().unwrap();
    let new = install(data.path(), "2.0.0", |manifest| manifest);
    let factory = watch(data.path(), &new, 50);
    let agent = start(data.path()).await;
    let kept = || Disk::look(data.path()).is_some_and(|saved| saved.begun.is_none());
    until("it is kept", kept).await;
    all_frames(&agent).await;
    agent.stop().await;
    let saved = Disk::look(data.path()).unwrap();
    assert_eq!((saved.current, saved.last_good), (Some(new), Some(factory)));
    assert!(saved.bad.is_empty() && saved.starts == 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_contradicts_goes_between_two_frames() {
    let data = tempfile::tempdir().unwrap();
    // Two classes swapped: right on its golden pictures, wrong on live ones.
    let new = install(data.path(), "2.0.0", |manifest| {
        manifest
            .replace("\"ok\"", "\"?\"")
            .replace("\"scratch\"", "\"ok\"")
            .replace("\"?\"", "\"scratch\"")
    });
    let factory = watch(data.path(), &new, 1_000_000);
    let agent = start(data.path()).await;
    let gone = || Disk::look(data.path()).is_some_and(|saved| !saved.bad.is_empty());
    until("it is stopped", gone).await;
    let before = agent.counters.readings.get();
    assert!(before < FRAMES, "while frames come");
    all_frames(&agent).await;
    agent.stop().await;
    let saved = Disk::look(data.path()).unwrap();
    assert_eq!((saved.current, saved.begun), (Some(factory), None));
    let failure = &saved.bad[0].failure;
    assert_eq!((saved.bad.len(), failure.reason), (1, Reason::Disagreement));
    assert!(failure.detail.contains("disagrees"), "{}", failure.detail);
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_agent_that_crashes_with_a_new_model_comes_back_with_the_old_one() {
    let data = tempfile::tempdir().unwrap();
    let new = install(data.path(), "2.0.0", |manifest| manifest);
    let factory = watch(data.path(), &new, 1_000_000);
    let file = data.path().join("agent.toml");
    std::fs::write(&file, config(data.path(), 0)).unwrap();
    let run = |command: &[&str]| {
        let mut run = Command::new(env!("CARGO_BIN_EXE_edge-agent"));
        run.args(command).arg("--config").arg(&file);
        run.stdin(Stdio::null()).stderr(Stdio::null());
        run
    };
    let lives: [(&str, &dyn Fn(Saved) -> bool); 3] = [
        ("it is watched", &|saved| {
            saved.alive && saved.current.as_ref() == Some(&new)
        }),
        (
            "after a crash the old one looks while the trial begins again",
            &|saved| saved.current.as_ref() == Some(&factory) && saved.begun.as_ref() == Some(&new),
        ),
        ("after another one it is out", &|saved| {
            !saved.bad.is_empty()
        }),
    ];
    for (what, is_so) in lives {
        let _agent = Killed(run(&["run"]).spawn().unwrap());
        let begin = Instant::now();
        while !Disk::look(data.path()).is_some_and(is_so) {
            assert!(begin.elapsed() < PATIENCE, "{what}");
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }
    let saved = Disk::look(data.path()).unwrap();
    assert_eq!((saved.current, saved.begun), (Some(factory), None));
    assert_eq!(saved.bad[0].failure.reason, Reason::Crash);
    let status = run(&["model", "status"]).output().unwrap();
    let words = String::from_utf8(status.stdout).unwrap();
    for expected in ["conveyor@1.1.0", "crash: the agent died", "not tried again"] {
        assert!(words.contains(expected), "{words}");
    }
}

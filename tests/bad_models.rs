//! Models that must not run: each is stopped before anybody gets it or on the first device, and every device ends on the
//! last good one.

use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use fleet::{process::EXIT_WITH_STDIN, site::Site};
use learn::{head::Head, surgery::with_head};
use models::{Bundle, Draft};
use serde_json::{Value, json};
use tests::{bundle, exactly_once, plan, until, web::Web};

const TIMEOUT: Duration = Duration::from_secs(60);
const NODE: &str = env!("CARGO_BIN_EXE_node");
/// A device has to be back on the old model within this time, whoever is gone.
const BACK: Duration = Duration::from_secs(60);
/// What all devices run at first.
const GOOD: &str = "1.1.0";

/// What a bad model is made of: the one that ships, changed, with its own answers as its golden ones.
struct Bad {
    draft: Draft,
}

impl Bad {
    fn like(name: &str, version: &str) -> Self {
        let good = Bundle::open(&bundle(name)).unwrap();
        let mut manifest = good.manifest.clone();
        manifest.version = version.into();
        manifest.lineage.holdout = None;
        let golden = (1..=6)
            .map(|n| std::fs::read(bundle("conveyor").join(format!("golden/{n}.png"))).unwrap());
        let draft = Draft {
            model: good.model_bytes().unwrap(),
            manifest,
            golden: golden.collect(),
            card: "# Bad\n".into(),
            holdout: Vec::new(),
        };
        Self { draft }
    }

    /// With another head on the same features.
    fn head(mut self, weight: impl Fn(usize) -> f32, bias: impl Fn(usize) -> f32) -> Self {
        let output = &mut self.draft.manifest.output;
        let dim = output.embedding_dim;
        let classes = output.labels.len();
        let head = Head {
            dim,
            weight: (0..dim * classes).map(weight).collect(),
            bias: (0..classes).map(bias).collect(),
            strength: 1.0,
            temperature: 1.0,
            fold_loss: None,
            iterations: 0,
        };
        let embedding = output.embedding.clone().unwrap();
        let scores = output.scores.clone().unwrap();
        self.draft.model = with_head(&self.draft.model, &embedding, &scores, &head).unwrap();
        self
    }

    fn manifest(mut self, change: impl Fn(&mut models::Manifest)) -> Self {
        change(&mut self.draft.manifest);
        self
    }

    /// Made for pictures of 256×256 instead of 96×96: seven times the work.
    fn larger(mut self) -> Self {
        let size = |dim: &[u8]| match dim {
            [8, 96] => vec![8, 0x80, 2],
            other => other.to_vec(),
        };
        // onnx.proto: model.graph.input.type.tensor_type.shape.dim, whose field 1 is its size.
        self.draft.model = edited(&self.draft.model, &[7, 11, 2, 1, 2, 1], &size);
        self.manifest(|manifest| {
            manifest.input.shape = [1, 3, 256, 256];
            manifest.budget.latency_ms = 10_000.0;
            manifest.budget.memory_mib = 1_000;
        })
    }

    fn write(self, to: &Path) -> PathBuf {
        let dir = to.join(&self.draft.manifest.version);
        self.draft.write(&dir).unwrap();
        dir
    }
}

/// A protobuf message with another content in every field that is reached on this path of field numbers.
fn edited(bytes: &[u8], path: &[u64], leaf: &dyn Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    fn varint(bytes: &[u8], at: &mut usize) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = bytes[*at];
            *at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }
    let (mut new, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let begin = at;
        let tag = varint(bytes, &mut at);
        let after_tag = at;
        match tag & 7 {
            0 => drop(varint(bytes, &mut at)),
            1 => at += 8,
            5 => at += 4,
            _ => {
                let length = varint(bytes, &mut at) as usize;
                let inner = &bytes[at..at + length];
                at += length;
                if tag >> 3 == path[0] {
                    let inner = match &path[1..] {
                        [] => leaf(inner),
                        rest => edited(inner, rest, leaf),
                    };
                    new.extend_from_slice(&bytes[begin..after_tag]);
                    let mut length = inner.len();
                    while length > 0x7f {
                        new.push(length as u8 | 0x80);
                        length >>= 7;
                    }
                    new.push(length as u8);
                    new.extend(inner);
                    continue;
                }
            }
        }
        new.extend_from_slice(&bytes[begin..at]);
    }
    new
}

/// Numbers without pattern, -0.5 to 0.5, always the same.
fn noise(n: usize) -> f32 {
    let mixed = (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 24) as f32
        - 0.5
}

/// As an operator would: on the command line.
async fn push(data: &Path, dir: &Path) -> Output {
    let mut command = tokio::process::Command::new(NODE);
    command
        .args(["cloud-coordinator", "model", "--data"])
        .arg(data);
    command.args(["push", "--author", "ada"]).arg(dir);
    command.env_remove(EXIT_WITH_STDIN).stdin(Stdio::null());
    command.output().await.unwrap()
}

/// A site of three devices that run the good model.
struct Scene {
    site: Site,
    api: Web,
    dir: tempfile::TempDir,
}

impl Scene {
    async fn start(agents: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = plan(NODE, &dir.path().join("site"));
        plan.updates = true;
        plan.agents = agents;
        plan.fps = 20.0;
        plan.kept = Some(0.0);
        let config = dir.path().join("coordinator.toml");
        let models = format!("[training]\nmodels = [{:?}]\n", bundle("conveyor"));
        std::fs::write(&config, models).unwrap();
        plan.coordinator_config = Some(config);
        let site = Site::start(&plan).await.unwrap();
        let api = Web::api(&site, TIMEOUT);
        let scene = Self { site, api, dir };
        scene.all_on(GOOD).await;
        scene
    }

    fn data(&self) -> PathBuf {
        self.site.data()
    }

    fn devices(&self) -> Vec<Value> {
        self.api.get("/devices")["items"]
            .as_array()
            .unwrap()
            .clone()
    }

    async fn all_on(&self, version: &str) {
        let all = self.site.devices.len();
        let what = format!("all devices are on {version}");
        let done = until(&what, async || {
            let devices = self.devices();
            devices.len() == all
                && devices.iter().all(|device| {
                    device["model"]["version"] == version && device["update"]["phase"] == "settled"
                })
        });
        if let Err(error) = done.await {
            panic!("{error}: {:#?}", self.devices());
        }
    }

    /// Pushes a model that the coordinator finds nothing wrong with, and begins to roll it out: to a third, then to all.
    async fn roll_out(&self, bad: Bad, limits: Value, trial: Value) -> String {
        let version = bad.draft.manifest.version.clone();
        let pushed = push(&self.data(), &bad.write(self.dir.path())).await;
        assert!(
            pushed.status.success(),
            "{}",
            String::from_utf8_lossy(&pushed.stderr)
        );
        let stage = |percent: u32| json!({"percent": percent, "soak_s": 0});
        let begun = self.api.post(
            "/rollouts",
            &json!({
                "model": format!("conveyor@{version}"), "author": "ada", "limits": limits, "trial": trial,
                "plan": {"stages": [stage(34), stage(100)]},
            }),
        );
        format!("/rollouts/{}", begun["id"])
    }

    /// The rollout is aborted for one of these reasons, and nobody but one device has seen the model.
    async fn aborted(&self, path: &str, reasons: &[&str]) {
        let done = until("the rollout is aborted", async || {
            let rollout = self.api.get(path);
            assert_ne!(rollout["status"], "done", "{rollout}");
            rollout["status"] == "aborted"
        });
        if let Err(error) = done.await {
            panic!("{error}: {} {:#?}", self.api.get(path), self.devices());
        }
        let rollout = self.api.get(path);
        assert_eq!(
            (&rollout["exposed"], &rollout["failed"]),
            (&json!(1), &json!(1)),
            "{rollout}"
        );
        let story = rollout["events"].to_string();
        assert!(
            reasons.iter().any(|reason| story.contains(reason)),
            "{reasons:?}: {story}"
        );
        self.all_on(GOOD).await;
    }

    /// The number of the device that is in one of these phases with that version.
    async fn one_in(&self, phases: &[&str], version: &str) -> usize {
        let mut found = None;
        let what = format!("a device is in {phases:?}");
        let done = until(&what, async || {
            found = self.devices().iter().find_map(|device| {
                let update = &device["update"];
                let is = phases.iter().any(|phase| update["phase"] == *phase)
                    && update["target"]["version"] == version;
                let name = device["device"].as_str().filter(|_| is)?.to_owned();
                self.site.devices.iter().position(|one| one.name == name)
            });
            found.is_some()
        });
        if let Err(error) = done.await {
            panic!("{error}: {:#?}", self.devices());
        }
        found.unwrap()
    }

    /// All of it cost nobody a reading.
    async fn nothing_is_lost(mut self) {
        let seen = self
            .site
            .finish(Default::default(), Duration::from_secs(120))
            .await
            .unwrap();
        exactly_once(&seen.total()).unwrap();
        self.site.stop().await.unwrap();
    }
}

/// Every rule is off.
fn lenient() -> Value {
    json!({
        "latency_times": 1000.0, "disagreement": 1.0, "confidence_fall": 1.0, "collapse": 1.0, "balance": 1.0,
        "new_labels": 1.0,
    })
}

fn with(mut limits: Value, key: &str, value: Value) -> Value {
    limits[key] = value;
    limits
}

#[tokio::test(flavor = "multi_thread")]
async fn what_golden_pictures_show_is_refused_before_any_device_has_it() {
    let scene = Scene::start(0).await;
    let to = scene.dir.path();
    let cut = Bad::like("conveyor", "2.0.1").write(to);
    let model = std::fs::read(cut.join("model.onnx")).unwrap();
    let broken = model[..model.len() / 2].to_vec();
    rewrite(&cut, &broken, |text| text);
    let shape = Bad::like("conveyor", "2.0.2").write(to);
    rewrite(&shape, &model, |text| {
        text.replace("shape = [1, 3, 96, 96]", "shape = [1, 3, 64, 64]")
            .replace(
                "shape = [\n    1,\n    3,\n    96,\n    96,\n]",
                "shape = [1, 3, 64, 64]",
            )
    });
    // The stored numbers are finite, what they make is not.
    let nan = Bad::like("conveyor", "2.0.3").write(to);
    let huge =
        Bad::like("conveyor", "2.0.3").head(|n| if n % 2 == 0 { 3e38 } else { -3e38 }, |_| 0.0);
    rewrite(&nan, &huge.draft.model, |text| text);
    let slow =
        Bad::like("conveyor", "2.0.4").manifest(|manifest| manifest.budget.latency_ms = 0.001);
    let large = Bad::like("conveyor", "2.0.5").manifest(|manifest| manifest.budget.memory_mib = 1);
    let wrong = Bad::like("conveyor", "2.0.6").write(to);
    let other = Bad::like("conveyor", "2.0.6").head(noise, noise);
    rewrite(&wrong, &other.draft.model, |text| text);
    for (dir, words) in [
        (cut, ["load", "cannot", "onnx"]),
        (shape, ["shape", "input", "load"]),
        (nan, ["finite", "no number", "golden"]),
        (slow.write(to), ["ms", "slow", "latency"]),
        (large.write(to), ["MiB", "memory", "memory"]),
        (wrong, ["golden", "self-test", "differs"]),
    ] {
        let pushed = push(&scene.data(), &dir).await;
        let said = String::from_utf8_lossy(&pushed.stderr).into_owned();
        println!("{}: {}", dir.display(), said.trim());
        assert!(!pushed.status.success(), "{}", dir.display());
        assert!(words.iter().any(|word| said.contains(word)), "{said}");
    }
    assert_eq!(scene.api.get("/rollouts"), json!([]));
    scene.nothing_is_lost_by_nobody().await;
}

impl Scene {
    /// There were no devices.
    async fn nothing_is_lost_by_nobody(mut self) {
        self.site.stop().await.unwrap();
    }
}

/// Puts other bytes in place of a bundle's model, and names them in its manifest.
fn rewrite(dir: &Path, model: &[u8], change: impl Fn(String) -> String) {
    let path = dir.join("manifest.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let old = Bundle::open(dir).unwrap();
    let (sha256, bytes) = (&old.manifest.model.sha256, old.manifest.model.bytes);
    let text = text
        .replace(sha256.as_str(), &models::digest_of(model).to_string())
        .replace(
            &format!("bytes = {bytes}"),
            &format!("bytes = {}", model.len()),
        );
    std::fs::write(dir.join("model.onnx"), model).unwrap();
    std::fs::write(path, change(text)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_live_frames_show_is_stopped_on_the_first_device() {
    let scene = Scene::start(3).await;
    let trial = json!({"share": 1.0, "shadow_frames": 40, "watch_frames": 20, "watch_s_min": 0});
    let strict = json!({"latency_times": 100.0});

    let one_class =
        Bad::like("conveyor", "2.1.1").head(|_| 0.0, |class| if class == 1 { 20.0 } else { 0.0 });
    let path = scene
        .roll_out(one_class, strict.clone(), trial.clone())
        .await;
    scene
        .aborted(&path, &["collapse", "disagreement", "balance"])
        .await;

    // The right shape, and nothing that was ever learned.
    let garbage = Bad::like("conveyor", "2.1.2").head(|n| noise(n) * 0.5, noise);
    let path = scene.roll_out(garbage, strict.clone(), trial.clone()).await;
    scene
        .aborted(
            &path,
            &["confidence", "disagreement", "balance", "collapse"],
        )
        .await;

    // Sure of everything in its golden pictures, and wrong about parts that are sound.
    let swapped =
        Bad::like("conveyor", "2.1.3").manifest(|manifest| manifest.output.labels.swap(0, 1));
    let path = scene.roll_out(swapped, strict, trial.clone()).await;
    scene.aborted(&path, &["disagreement", "balance"]).await;
    // What the two disagreed about has come to be looked at, and the numbers stand in the rollout's story.
    let story = scene.api.get(&path)["events"].to_string();
    assert!(
        story.contains("labels moved") || story.contains("frames where the old one was sure"),
        "{story}"
    );
    let samples = "/samples?reason=disputed&limit=1000";
    until("frames of the disagreement arrive", async || {
        let samples = scene.api.get(samples);
        let items = samples["items"].as_array().unwrap();
        items
            .iter()
            .any(|item| item["model"] == format!("conveyor@{GOOD}"))
    })
    .await
    .unwrap();

    // The same model on larger pictures takes seven times as long; what it says is of no interest.
    let slow = Bad::like("conveyor", "2.1.4").larger();
    let limits = with(lenient(), "latency_times", json!(2.5));
    let path = scene.roll_out(slow, limits, trial.clone()).await;
    scene.aborted(&path, &["latency"]).await;

    let limits = with(lenient(), "memory_mib", json!(16));
    let path = scene
        .roll_out(Bad::like("conveyor", "2.1.5").larger(), limits, trial)
        .await;
    scene.aborted(&path, &["memory"]).await;
    scene.nothing_is_lost().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_crashes_its_agent_later_is_given_up() {
    let mut scene = Scene::start(3).await;
    let same = Bad::like("conveyor", "2.2.1");
    // Long enough that the crashes come while it is watched.
    let trial =
        json!({"share": 1.0, "shadow_frames": 10, "watch_frames": 100_000, "watch_s_max": 600});
    let path = scene.roll_out(same, lenient(), trial).await;
    // Once may be an accident: the old one looks at the frames while the trial begins again.
    for _ in 0..2 {
        let at = scene.one_in(&["watching"], "2.2.1").await;
        scene.site.devices[at].agent.kill().await.unwrap();
        let killed = tokio::time::Instant::now();
        scene.site.devices[at].agent.start().unwrap();
        let name = scene.site.devices[at].name.clone();
        until("the old one looks again", async || {
            let devices = scene.devices();
            let device = devices.iter().find(|d| d["device"] == name).unwrap();
            device["update"]["loaded"]["version"] == GOOD
        })
        .await
        .unwrap();
        let took = killed.elapsed();
        assert!(took < BACK, "back after {took:?}");
    }
    scene.aborted(&path, &["crash"]).await;
    scene.nothing_is_lost().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_goes_back_by_itself_while_the_coordinator_is_gone() {
    let mut scene = Scene::start(3).await;
    let strict = || json!({"latency_times": 100.0});
    let quick = with(lenient(), "latency_times", json!(2.5));
    let bad: [(Bad, Value, &[&str]); 4] = [
        (
            Bad::like("conveyor", "2.3.1").manifest(|manifest| manifest.output.labels.swap(0, 1)),
            strict(),
            &["disagreement", "balance"],
        ),
        (
            Bad::like("conveyor", "2.3.2").head(|n| noise(n) * 0.5, noise),
            strict(),
            &["confidence", "disagreement", "balance", "collapse"],
        ),
        (
            Bad::like("conveyor", "2.3.3")
                .head(|_| 0.0, |class| if class == 1 { 20.0 } else { 0.0 }),
            strict(),
            &["collapse", "disagreement", "balance"],
        ),
        (Bad::like("conveyor", "2.3.4").larger(), quick, &["latency"]),
    ];
    for (bad, limits, reasons) in bad {
        let version = bad.draft.manifest.version.clone();
        // Without a shadow it takes over at once, as if it had looked good so far.
        let trial =
            json!({"share": 1.0, "shadow_frames": 0, "watch_frames": 400, "watch_s_min": 0});
        let path = scene.roll_out(bad, limits, trial).await;
        let at = scene
            .one_in(&["testing", "activating", "watching"], &version)
            .await;
        scene.site.coordinator.kill().await.unwrap();
        let killed = tokio::time::Instant::now();
        let agent = scene.site.devices[at].config();
        let mut said = String::new();
        let done = until("the device is back on its own", async || {
            let mut status = tokio::process::Command::new(NODE);
            status.args(["edge-agent", "model", "status", "--config"]);
            status.arg(agent);
            status.env_remove(EXIT_WITH_STDIN).stdin(Stdio::null());
            said = String::from_utf8_lossy(&status.output().await.unwrap().stdout).into_owned();
            said.contains(GOOD) && reasons.iter().any(|reason| said.contains(reason))
        });
        if let Err(error) = done.await {
            panic!("{error}: {said}");
        }
        let took = killed.elapsed();
        assert!(took < BACK, "{version}: back after {took:?}");
        scene.site.coordinator.start().unwrap();
        scene.site.ready().await.unwrap();
        scene.aborted(&path, reasons).await;
    }
    scene.nothing_is_lost().await;
}

/// An operator's words, and what is answered.
async fn operate(data: &Path, words: &[&str]) -> String {
    let mut command = tokio::process::Command::new(NODE);
    command.arg("cloud-coordinator").args(words);
    command.arg("--data").arg(data).env("USER", "ada");
    command.env_remove(EXIT_WITH_STDIN).stdin(Stdio::null());
    let output = command.output().await.unwrap();
    let (said, error) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{words:?}: {said}{error}");
    println!("{words:?}: {}", said.trim());
    said.into_owned()
}

/// What is kept already and says something else is no judge of what it replaced. And an operator's words do what they say.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_is_taken_back_when_somebody_says_so() {
    let scene = Scene::start(2).await;
    let data = scene.data();
    let swapped =
        Bad::like("conveyor", "2.4.1").manifest(|manifest| manifest.output.labels.swap(0, 1));
    let pushed = push(&data, &swapped.write(scene.dir.path())).await;
    assert!(pushed.status.success());
    let start = "rollout start conveyor@2.4.1 --stages 50,100 --soak 3600 --no-trial";
    let words: Vec<&str> = start.split(' ').collect();
    let said = operate(&data, &words).await;
    assert!(said.contains("stage 1 of 2"), "{said}");
    let kept = |n: usize| {
        let scene = &scene;
        async move {
            let rollout = scene.api.get("/rollouts/1");
            rollout["kept"] == n && rollout["exposed"] == n
        }
    };
    until("the first has kept it", async || kept(1).await)
        .await
        .unwrap();
    let said = operate(&data, &["rollout", "pause", "1"]).await;
    assert!(
        said.contains("paused") && said.contains("somebody said so"),
        "{said}"
    );
    let said = operate(&data, &["rollout", "resume", "1"]).await;
    assert!(said.contains("running"), "{said}");
    let said = operate(&data, &["rollout", "next", "1"]).await;
    assert!(said.contains("stage 2 of 2"), "{said}");
    until("all have kept it", async || kept(2).await)
        .await
        .unwrap();
    scene.all_on("2.4.1").await;
    let said = operate(&data, &["rollout", "abort", "1"]).await;
    assert!(said.contains("aborted"), "{said}");
    scene.all_on(GOOD).await;
    let story = operate(&data, &["rollout", "status", "1"]).await;
    for what in [
        "begun by ada",
        "pause by",
        "resume by",
        "abort by",
        "stage 2",
    ] {
        assert!(story.contains(what), "{what}: {story}");
    }
    // Nothing was found bad on the way.
    for device in scene.devices() {
        assert!(device["update"]["failure"].is_null(), "{device}");
    }
    // One device alone, and back to what the rollouts say.
    let name = format!("demo/{}", scene.site.devices[0].name);
    operate(&data, &["device", "pin", &name, "conveyor@2.4.1"]).await;
    let on = |version: &'static str| {
        let (scene, name) = (&scene, scene.site.devices[0].name.clone());
        async move {
            let devices = scene.devices();
            let device = devices.iter().find(|d| d["device"] == name).unwrap();
            device["model"]["version"] == version && device["update"]["phase"] == "settled"
        }
    };
    until("it is on the pinned one", async || on("2.4.1").await)
        .await
        .unwrap();
    let said = operate(&data, &["device", "list"]).await;
    assert!(
        said.contains("conveyor@2.4.1") && said.contains(GOOD),
        "{said}"
    );
    operate(
        &data,
        &["device", "pin", &name, &format!("conveyor@{GOOD}")],
    )
    .await;
    until("and back", async || on(GOOD).await).await.unwrap();
    operate(&data, &["device", "unpin", &name]).await;
    let keys = operate(&data, &["keys", "status"]).await;
    for role in ["root", "targets", "snapshot", "timestamp"] {
        assert!(keys.contains(role), "{keys}");
    }
    scene.nothing_is_lost().await;
}

//! `swarm`: one release to all devices of a site, over an uplink that they share: from neighbours, and each for itself.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use models::{Bundle, Draft, ReleaseDocument, delta};
use serde_json::{Value, json};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

use super::{
    figures::{Goal, Results},
    rollout::push,
    weights::{fine_tuned, laden},
};
use crate::{
    api::Api,
    cli::{BenchArgs, shipped_bundle},
    dice::Dice,
    process::Program,
    site::{Camera, Plan, Site},
};

pub(super) const MODEL: &str = "conveyor";
const VERSION: &str = "8.0.1";
/// What the devices have before a fine-tune, and the fine-tune.
const BASE: &str = "8.1.0";
const TUNED: &str = "8.1.1";
/// Bytes of weights beyond the shipped model's, so that the delta is about as long as the release: what else goes over the uplink for
/// each device, signatures and handshakes, weighs as much on both.
const LOAD: usize = 32_000_000;
/// A fine-tune moves each weight by up to this share of itself: enough for another file, too little for another answer.
const NOISE: f32 = 1e-4;
/// The release has so many bytes.
const BYTES: usize = 13_000_000;
/// The uplink: 10 Mbit/s for all devices together.
const UPLINK_BYTES_PER_S: u64 = 1_250_000;
/// Over the uplink, in copies of the release.
const COPIES: f64 = 1.1;
/// Until the last device has it, in times of what one alone takes.
const TIMES: f64 = 1.5;
/// Until every device is there, and knows the others.
const READY: Duration = Duration::from_secs(300);
/// How long it may take beyond what the uplink needs for a copy for each.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// Presence spreads, and start-up is over.
const REST: Duration = Duration::from_secs(8);

/// Rolls a release out three times: to one device, to all by swarm, and to all without a mesh; and a fine-tune of what the devices
/// have, which is a delta, to all by swarm.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or_else(Dice::seed);
    println!("seed {seed} (repeat with --seed {seed})");
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let outcome = play(args, seed, dir.path(), results).await;
    outcome.map_err(|error| {
        let kept = dir.keep();
        error.context(format!("all is kept in {}", kept.display()))
    })
}

async fn play(
    args: &BenchArgs,
    seed: u64,
    root: &Path,
    results: &mut Results,
) -> anyhow::Result<()> {
    let count = usize::from(args.agents);
    let release = root.join("release");
    let bytes = write_release(&release, VERSION, BYTES, &mut Dice::new(seed))? as f64;
    let shipped = Bundle::open(&shipped_bundle(MODEL)?)?;
    let bundle = shipped.dir().to_owned();
    let wave = |name: &str, count, mesh| Wave {
        root: root.join(name),
        bundle: bundle.clone(),
        release: release.clone(),
        version: VERSION,
        count,
        mesh,
    };
    let alone = roll(&wave("alone", 1, false)).await?;
    println!("one alone: {alone:?}");
    let swarm = roll(&wave("swarm", count, true)).await?;
    println!("{count} by swarm: {swarm:?}");
    let each = roll(&wave("each", count, false)).await?;
    println!("{count} each for itself: {each:?}");
    let (base, tuned) = (root.join("base"), root.join("tuned"));
    let mut dice = Dice::new(seed);
    let old = laden(&shipped.model_bytes()?, LOAD, &mut dice);
    let new = fine_tuned(&old, NOISE, &mut dice)?;
    let delta = delta::make(&old, &new)?.len() as f64;
    let whole = new.len() as f64;
    write_model(&shipped, BASE, old, &base)?;
    write_model(&shipped, TUNED, new, &tuned)?;
    let by_delta = roll(&Wave {
        root: root.join("delta"),
        bundle: base,
        release: tuned,
        version: TUNED,
        count,
        mesh: true,
    })
    .await?;
    println!("{count} by swarm, a fine-tune: {by_delta:?}");
    results.add("devices", count as f64, "", None, Goal::None);
    results.add("the release", bytes / 1e6, "MB", None, Goal::None);
    let copies = |rolled: &Rolled| rolled.bytes as f64 / bytes;
    results.add(
        "over the uplink, against each for itself",
        copies(&swarm),
        "copies",
        Some(copies(&each)),
        Goal::AtMost(COPIES),
    );
    results.add(
        "until the last device has it, against one alone",
        swarm.last_s,
        "s",
        Some(alone.last_s),
        Goal::RatioAtMost(TIMES),
    );
    results.add(
        "… against each for itself",
        swarm.last_s,
        "s",
        Some(each.last_s),
        Goal::None,
    );
    results.add(
        "until the first device has it",
        swarm.first_s,
        "s",
        Some(each.first_s),
        Goal::None,
    );
    results.add(
        "the delta of a fine-tune, against its model",
        delta / 1e6,
        "MB",
        Some(whole / 1e6),
        Goal::None,
    );
    results.add(
        "of a fine-tune, over the uplink",
        by_delta.bytes as f64 / delta,
        "copies of its delta",
        None,
        Goal::AtMost(COPIES),
    );
    results.add(
        "until the last device has the fine-tune",
        by_delta.last_s,
        "s",
        None,
        Goal::None,
    );
    Ok(())
}

/// The shipped model as another version, with a file beside it that nothing compresses, so many bytes all in all. What of
/// it is new to a device.
pub(super) fn write_release(
    to: &Path,
    version: &str,
    bytes: usize,
    dice: &mut Dice,
) -> anyhow::Result<u64> {
    let from = shipped_bundle(MODEL)?;
    let bundle = Bundle::open(&from)?;
    let document = ReleaseDocument::of(&from, MODEL, &bundle.manifest.version, None)?;
    let mut left = bytes;
    for file in &document.files {
        let target = to.join(&file.path);
        let folder = target.parent().context("a file has a folder")?;
        std::fs::create_dir_all(folder)?;
        std::fs::copy(from.join(&file.path), target)?;
    }
    let manifest = std::fs::read_to_string(from.join("manifest.toml"))?;
    let old = format!("version = \"{}\"", bundle.manifest.version);
    let changed = manifest.replacen(&old, &format!("version = \"{version}\""), 1);
    left = left.saturating_sub(changed.len());
    std::fs::write(to.join("manifest.toml"), changed)?;
    let noise: Vec<u8> = (0..left / 8)
        .flat_map(|_| dice.any().to_be_bytes())
        .collect();
    // Of another name than any before: nothing is a delta of it.
    std::fs::write(to.join(format!("padding-{version}.bin")), noise)?;
    let document = ReleaseDocument::of(to, MODEL, version, None)?;
    let known = ReleaseDocument::of(&from, MODEL, &bundle.manifest.version, None)?;
    // What the devices have already need not come.
    let is_new = |sha256| known.files.iter().all(|file| file.sha256 != sha256);
    let new = document.files.iter().filter(|file| is_new(file.sha256));
    Ok(new.map(|file| file.length).sum())
}

/// A bundle like another one, with this model.
pub(super) fn write_model(
    like: &Bundle,
    version: &str,
    model: Vec<u8>,
    to: &Path,
) -> anyhow::Result<()> {
    let mut manifest = like.manifest.clone();
    version.clone_into(&mut manifest.version);
    manifest.lineage.holdout = None;
    // What nobody uses is in memory, too, and several times while it is loaded.
    manifest.budget.memory_mib += (4 * model.len() as u64) >> 20;
    let golden = manifest
        .golden
        .iter()
        .map(|golden| std::fs::read(like.dir().join(&golden.image)));
    let draft = Draft {
        golden: golden.collect::<Result<_, _>>()?,
        manifest,
        model,
        card: "# Made to travel\n".into(),
        holdout: Vec::new(),
    };
    draft.write(to)?;
    Ok(())
}

/// What is rolled out, and to whom.
struct Wave {
    root: PathBuf,
    /// What the devices have before.
    bundle: PathBuf,
    release: PathBuf,
    version: &'static str,
    count: usize,
    mesh: bool,
}

/// How a rollout went.
#[derive(Clone, Copy, Debug)]
struct Rolled {
    /// Came over the uplink until the last device had it.
    bytes: u64,
    first_s: f64,
    last_s: f64,
}

/// Rolls the release out to so many devices, and waits until it lies on all their disks.
async fn roll(wave: &Wave) -> anyhow::Result<Rolled> {
    let (root, bundle, count) = (&wave.root, &wave.bundle, wave.count);
    std::fs::create_dir_all(root)?;
    let config = root.join("coordinator.toml");
    std::fs::write(&config, format!("[training]\nmodels = [{bundle:?}]\n"))?;
    let program = Program::current()?;
    let mut plan = Plan::new(program.clone(), root.join("site"), bundle.clone());
    plan.agents = count;
    plan.camera = Camera::None;
    plan.updates = true;
    plan.door = true;
    plan.mesh = wave.mesh;
    plan.coordinator_config = Some(config);
    let mut site = Site::start(&plan).await?;
    let api = Api::of(&site)?;
    push(&program, &site, &wave.release).await?;
    all_there(&mut site, &api).await?;
    sleep(REST).await;
    let door = site.door.as_ref().context("the site has no door")?;
    door.narrow(UPLINK_BYTES_PER_S);
    let before = door.counters().down();
    let start = Instant::now();
    let asked = json!({
        "model": format!("{MODEL}@{}", wave.version), "author": "bench",
        "plan": {"stages": [{"percent": 100, "soak_s": 0, "keep": 1.0}]},
        "limits": {"latency_times": 100.0},
    });
    let api = api.clone();
    spawn_blocking(move || api.post("/rollouts", &asked)).await??;
    let folders: Vec<PathBuf> = site
        .devices
        .iter()
        .map(|device| device.file.data.join("models"))
        .collect();
    let one = Duration::from_secs(BYTES as u64 / UPLINK_BYTES_PER_S);
    let patience = PATIENCE + one * u32::try_from(count)?;
    let mut first_s = None;
    let last_s = loop {
        let had = folders.iter().filter(|folder| has(folder, wave.version));
        let had = had.count();
        let now_s = start.elapsed().as_secs_f64();
        if had > 0 {
            first_s.get_or_insert(now_s);
        }
        if had == count {
            break now_s;
        }
        site.check()?;
        anyhow::ensure!(
            start.elapsed() < patience,
            "only {had} of {count} devices have it after {now_s:.0} s"
        );
        sleep(LOOK).await;
    };
    let door = site.door.as_ref().context("the site has no door")?;
    let bytes = door.counters().down() - before;
    site.stop().await?;
    Ok(Rolled {
        bytes,
        first_s: first_s.unwrap_or(last_s),
        last_s,
    })
}

/// Is the release on this disk, whole? It has its name when it is.
pub(super) fn has(models: &Path, version: &str) -> bool {
    let name = format!("{MODEL}-{version}-");
    let entries = std::fs::read_dir(models).into_iter().flatten();
    let mut names = entries.flatten().map(|entry| entry.file_name());
    names.any(|entry| entry.to_string_lossy().starts_with(&name))
}

/// Until all devices run what they came with.
pub(super) async fn all_there(site: &mut Site, api: &Api) -> anyhow::Result<()> {
    let patience = Instant::now() + READY;
    loop {
        site.check()?;
        let api = api.clone();
        let page: Value = spawn_blocking(move || api.get("/devices?limit=1000")).await??;
        let all = page["items"].as_array();
        let there = all.into_iter().flatten().filter(|device| {
            device["status"] == "online" && device["update"]["phase"] == "settled"
        });
        let there = there.count();
        if there == site.devices.len() {
            return Ok(());
        }
        anyhow::ensure!(
            Instant::now() < patience,
            "only {there} of {} devices are there",
            site.devices.len()
        );
        sleep(LOOK * 10).await;
    }
}

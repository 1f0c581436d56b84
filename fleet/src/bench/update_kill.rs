//! `update-kill`: a device dies at random moments of updates, and always has one whole model to run.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::Context;
use models::{Bundle, Draft, ReleaseDocument, digest_of};
use serde_json::{Value, json};
use tokio::{task::spawn_blocking, time::Instant};

use super::{
    figures::{Goal, Results},
    rollout::push,
    weights::fine_tuned,
};
use crate::{
    api::Api,
    cli::{BenchArgs, shipped_bundle},
    dice::Dice,
    process::Program,
    site::{Camera, Plan, Site},
};

/// The model that is updated.
const MODEL: &str = "conveyor";
/// The versions that take turns: their weights differ a little.
const VERSIONS: [&str; 2] = ["8.0.1", "8.0.2"];
/// So little that they agree on what they see.
const NOISE: f32 = 1e-4;
/// One kill in so many comes at any moment after the start …
const ANY: usize = 5;
const ANY_MS: usize = 5_000;
/// … and one in so many so late that updates also come to their end. The others come soon after the device has said
/// that it is about an update.
const LATE: usize = 5;
const LATE_MS: usize = 9_000;
const SOON_MS: usize = 2_500;
/// How long it has to say so, in steps of [`LOOK`].
const LOOKS: usize = 160;
const LOOK: Duration = Duration::from_millis(25);
/// How long the device may take to be at rest in the end.
const PATIENCE: Duration = Duration::from_secs(120);

/// Kills the device again and again, and looks at its disk each time.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or_else(Dice::seed);
    println!("seed {seed} (repeat with --seed {seed}; the moments depend on the machine, too)");
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let outcome = play(args, &mut Dice::new(seed), dir.path(), results).await;
    outcome.map_err(|error| {
        let kept = dir.keep();
        error.context(format!("all is kept in {}", kept.display()))
    })
}

async fn play(
    args: &BenchArgs,
    dice: &mut Dice,
    root: &Path,
    results: &mut Results,
) -> anyhow::Result<()> {
    let bundle = shipped_bundle(MODEL)?;
    let config = root.join("coordinator.toml");
    std::fs::write(&config, format!("[training]\nmodels = [{bundle:?}]\n"))?;
    let program = Program::current()?;
    let mut plan = Plan::new(program.clone(), root.join("site"), bundle.clone());
    plan.agents = 1;
    plan.fps = 20.0;
    plan.camera = Camera::Scene {
        width: 64,
        height: 64,
    };
    plan.updates = true;
    plan.coordinator_config = Some(config);
    let mut site = Site::start(&plan).await?;
    let api = Api::of(&site)?;
    for version in VERSIONS {
        let to = root.join(version);
        write_version(&bundle, version, &to, dice)?;
        push(&program, &site, &to).await?;
    }
    let data = match site.devices.first() {
        Some(device) => device.file.data.clone(),
        None => anyhow::bail!("the site has no device"),
    };
    let (mut whole, mut updates, mut rollout, mut next) = (0, 0, None, 0);
    let mut phases: BTreeMap<&str, u64> = BTreeMap::new();
    for kill in 1..=args.kills {
        let ended = match &rollout {
            None => true,
            Some(id) => {
                let state = get(&api, format!("/rollouts/{id}")).await?;
                let done = state["status"] == "done";
                updates += u64::from(done);
                done || state["status"] != "running"
            }
        };
        if ended {
            rollout = Some(begin(&api, VERSIONS.get(next % 2).unwrap_or(&VERSIONS[0])).await?);
            next += 1;
        }
        let life = if dice.below(ANY) == 0 {
            dice.below(ANY_MS)
        } else if dice.below(LATE) == 0 {
            dice.below(LATE_MS)
        } else {
            is_about_it(&api).await?;
            dice.below(SOON_MS)
        };
        tokio::time::sleep(Duration::from_millis(life as u64)).await;
        let Some(device) = site.devices.first_mut() else {
            continue;
        };
        device.agent.kill().await?;
        let phase = look(&data).with_context(|| format!("after kill {kill}"))?;
        *phases.entry(phase).or_default() += 1;
        whole += 1;
        device.agent.start()?;
        if kill % 50 == 0 {
            println!("{kill} kills, {updates} updates came to their end; killed in {phases:?}");
        }
    }
    at_rest(&api, &mut site).await?;
    let seen = site
        .finish(Default::default(), Duration::from_secs(120))
        .await?;
    let total = seen.total();
    site.stop().await?;
    println!("killed in {phases:?}");
    let all = Goal::AtLeast(args.kills as f64);
    results.add("kills", args.kills as f64, "", None, Goal::None);
    results.add(
        "… with one whole model on the disk",
        f64::from(whole),
        "",
        None,
        all,
    );
    results.add(
        "updates that came to their end meanwhile",
        updates as f64,
        "",
        None,
        Goal::AtLeast(1.0),
    );
    let lost = total.produced.saturating_sub(total.stored) as f64;
    results.add(
        "readings produced",
        total.produced as f64,
        "",
        None,
        Goal::None,
    );
    results.add("… not stored", lost, "", None, Goal::AtMost(0.0));
    Ok(())
}

/// Waits for a while until the device says that it is about an update.
async fn is_about_it(api: &Api) -> anyhow::Result<()> {
    for _ in 0..LOOKS {
        tokio::time::sleep(LOOK).await;
        let devices = get(api, "/devices".into()).await?;
        let device = &devices["items"][0];
        if device["status"] == "online" && device["update"]["phase"] != "settled" {
            break;
        }
    }
    Ok(())
}

/// A bundle of its own with weights that differ a little.
fn write_version(from: &Path, version: &str, to: &Path, dice: &mut Dice) -> anyhow::Result<()> {
    let old = Bundle::open(from)?;
    let mut manifest = old.manifest.clone();
    version.clone_into(&mut manifest.version);
    manifest.lineage.holdout = None;
    let golden = manifest
        .golden
        .iter()
        .map(|golden| std::fs::read(from.join(&golden.image)));
    let draft = Draft {
        golden: golden.collect::<Result<_, _>>()?,
        manifest,
        model: fine_tuned(&old.model_bytes()?, NOISE, dice)?,
        card: "# Made to be updated to\n".into(),
        holdout: Vec::new(),
    };
    draft.write(to)?;
    Ok(())
}

/// Begins an update of everybody, whatever was tried before.
async fn begin(api: &Api, version: &str) -> anyhow::Result<u64> {
    let asked = json!({
        "model": format!("{MODEL}@{version}"), "author": "bench", "force": true,
        "plan": {"stages": [{"percent": 100, "soak_s": 0, "keep": 1.0}]},
        "trial": {"share": 1.0, "shadow_frames": 20, "watch_frames": 20, "watch_s_min": 0},
        "limits": {"latency_times": 100.0},
    });
    let api = api.clone();
    let begun = spawn_blocking(move || api.post("/rollouts", &asked)).await??;
    begun["id"].as_u64().context("a rollout without a number")
}

async fn get(api: &Api, path: String) -> anyhow::Result<Value> {
    let api = api.clone();
    spawn_blocking(move || api.get(&path)).await?
}

/// What is on the disk of the dead device names a model whose every byte is as it was signed. Says how far the update was.
fn look(data: &Path) -> anyhow::Result<&'static str> {
    let models = data.join("models");
    let path = models.join("state.json");
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let state: Value = serde_json::from_slice(&text).context("state.json is damaged")?;
    let current = &state["saved"]["current"];
    let begun = &state["saved"]["begun"]["digest"];
    let wished = current["digest"].as_str().is_some_and(|digest| {
        let desired = state["saved"]["desired"].to_string();
        desired.contains(digest)
    });
    let phase = match (begun.is_null(), wished) {
        (false, _) if *begun == current["digest"] => "watch",
        (false, _) => "shadow",
        (true, false) => "fetch or test",
        (true, true) => "rest",
    };
    if state["factory"] == current["digest"] {
        return Ok(phase);
    }
    let part = |key: &str| current[key].as_str().context("no model is named");
    let (name, version, digest) = (part("name")?, part("version")?, part("digest")?);
    let short = digest.get(..16).context("no digest")?;
    let folder = models.join(format!("{name}-{version}-{short}"));
    let document = std::fs::read(folder.join("release.json"))
        .with_context(|| format!("the document in {}", folder.display()))?;
    anyhow::ensure!(
        digest_of(&document).to_string() == digest,
        "the document is another one"
    );
    for file in &ReleaseDocument::parse(&document)?.files {
        let bytes = std::fs::read(folder.join(&file.path))
            .with_context(|| format!("reading {}", file.path))?;
        anyhow::ensure!(digest_of(&bytes) == file.sha256, "{} is damaged", file.path);
    }
    Bundle::open(&folder)?;
    Ok(phase)
}

/// Waits until the device runs a model and nothing is under way.
async fn at_rest(api: &Api, site: &mut Site) -> anyhow::Result<()> {
    let patience = Instant::now() + PATIENCE;
    loop {
        site.check()?;
        let devices = get(api, "/devices".into()).await?;
        let update = &devices["items"][0]["update"];
        if update["phase"] == "settled" && update["loaded"].is_object() {
            println!("at rest with {}", update["loaded"]["version"]);
            return Ok(());
        }
        anyhow::ensure!(
            Instant::now() < patience,
            "the device does not come to rest: {update}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

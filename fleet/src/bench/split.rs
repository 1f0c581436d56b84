//! `split`: a model that is too slow for one board runs in parts on two, and on one after the other has died.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use edge_agent::{
    capture::scene::{SceneConfig, draw},
    mesh::OffloadStatus,
};
use models::{Bundle, Draft, Engine, Outcome};
use tokio::time::{Instant, sleep};

use super::{
    cascade::{readings, status},
    chain,
    figures::{Goal, Results, median},
};
use crate::{
    agent_file::OffloadPart,
    api::Api,
    cli::{BenchArgs, shipped_bundle},
    dice::Dice,
    site::{Camera, Device, Plan, Site},
};

/// What the camera's own board runs; its labels are the large model's, too.
const SMALL: &str = "steel-small";
/// Different pictures, shown again and again.
const IMAGES: u64 = 40;
/// More than the two boards can answer.
const FPS: f64 = 40.0;
/// Of which the rest is answered by the camera's board.
const DEADLINE_MS: u32 = 5_000;
/// One measurement.
const LASTS: Duration = Duration::from_secs(20);
/// Until a plan is in use.
const PATIENCE: Duration = Duration::from_secs(120);
/// How far a score may be off: parts are optimised each for itself, so additions differ in their order.
const TOLERANCE: f64 = 1e-3;
/// Two boards, less what goes between them.
const WORTH: f64 = 1.5;

/// In turns: two boards, and one after the other was killed.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or(1);
    println!("seed {seed}");
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let played = play(args, dir.path(), &mut Dice::new(seed), results).await;
    played.map_err(|error| {
        let kept = dir.keep();
        error.context(format!("all is kept in {}", kept.display()))
    })
}

async fn play(
    args: &BenchArgs,
    root: &Path,
    dice: &mut Dice,
    results: &mut Results,
) -> anyhow::Result<()> {
    let large = root.join("large");
    write_model(&large, dice)?;
    let images = root.join("images");
    let wanted = write_images(&large, &images)?;
    let mut plan = Plan::new(
        crate::process::Program::current()?,
        root.join("site"),
        shipped_bundle(SMALL)?,
    );
    plan.agents = 3;
    plan.spawn = false;
    plan.mesh = true;
    plan.fps = FPS;
    plan.camera = Camera::Folder {
        path: images,
        repeat: true,
    };
    let mut site = Site::start(&plan).await?;
    set_up(&mut site, &large)?;
    let api = Api::of(&site)?;
    let (mut both, mut alone) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        site.devices[2].agent.start()?;
        until(&site, 2, |lender| lender.parts > 3).await?;
        let with = rate(&site).await?;
        site.devices[2].agent.kill().await?;
        let before = offload(&site, 1).await?.served;
        until(&site, 1, move |leader| leader.served > before + 5).await?;
        let without = rate(&site).await?;
        println!("round {round}: {with:.1} frames a second on two boards, {without:.1} on one");
        both.push(with);
        alone.push(without);
    }
    let leader = offload(&site, 1).await?;
    let name = site.devices[0].name.clone();
    let all = readings(&api, &name).await?;
    let answered: Vec<_> = all
        .iter()
        .filter(|reading| reading.get("by").is_some())
        .collect();
    let mut differ = 0;
    for reading in &answered {
        let file = reading["file"]
            .as_str()
            .and_then(|file| file.rsplit('/').next());
        let outcome: &Outcome = file
            .and_then(|file| wanted.get(file))
            .context("a reading of a picture that nobody has shown")?;
        let score = reading["score"].as_f64().unwrap_or(f64::NAN);
        let same = reading["label"] == outcome.label.as_str()
            && (score - f64::from(outcome.score)).abs() <= TOLERANCE;
        differ += u32::from(!same);
    }
    site.stop().await?;
    results.add(
        "frames per second, two boards against one",
        median(both),
        "1/s",
        Some(median(alone)),
        Goal::RatioAtLeast(WORTH),
    );
    results.add(
        "answers compared with those of the whole model",
        answered.len() as f64,
        "",
        None,
        Goal::AtLeast(1.0),
    );
    results.add(
        "… that differ",
        f64::from(differ),
        "",
        None,
        Goal::AtMost(0.0),
    );
    results.add(
        "frames that were sent again because a board had died",
        leader.replaced as f64,
        "",
        None,
        Goal::None,
    );
    Ok(())
}

/// The camera's board, the one that leads, the one that lends. The last does not run yet.
fn set_up(site: &mut Site, large: &Path) -> anyhow::Result<()> {
    let [camera, leader, lender] = site.devices.as_mut_slice() else {
        bail!("a site of three has three devices");
    };
    camera.file.offload = Some(OffloadPart {
        escalate: true,
        share: 1.0,
        below: Some(1.0),
        deadline_ms: DEADLINE_MS,
        ..OffloadPart::default()
    });
    leader.file.offload = Some(OffloadPart {
        serve: Some(large.to_owned()),
        split: true,
        time_share: 0.9,
        ..OffloadPart::default()
    });
    lender.file.offload = Some(OffloadPart {
        lend: Some(large.to_owned()),
        time_share: 0.9,
        ..OffloadPart::default()
    });
    for (cpu, device) in [&mut *leader, &mut *lender].into_iter().enumerate() {
        device.file.source.clear();
        device.file.model = None;
        device.agent.set_cpu(Some(cpu));
    }
    for device in [&mut *lender, leader, camera] {
        device.write_config()?;
    }
    site.devices[0].agent.start()?;
    site.devices[1].agent.start()?;
    Ok(())
}

fn write_model(to: &Path, dice: &mut Dice) -> anyhow::Result<()> {
    let from = shipped_bundle(SMALL)?;
    let mut manifest = Bundle::open(&from)?.manifest;
    manifest.name = "chain".into();
    manifest.input.name = chain::INPUT.into();
    manifest.input.shape = [1, 3, chain::SIDE, chain::SIDE];
    manifest.output.scores = Some(chain::SCORES.into());
    manifest.output.embedding = None;
    manifest.output.embedding_dim = 0;
    manifest.thresholds.min_score = None;
    manifest.budget.latency_ms = 5_000.0;
    manifest.budget.memory_mib = 512;
    manifest.reference = None;
    manifest.lineage.holdout = None;
    let draft = Draft {
        model: chain::file(manifest.output.labels.len() as u64, dice),
        golden: vec![std::fs::read(from.join("golden/1.png"))?],
        manifest,
        card: "# Made to be computed\n".into(),
        holdout: Vec::new(),
    };
    draft.write(to)?;
    Ok(())
}

/// Pictures, and what the whole model says about each, by the name of its file.
fn write_images(bundle: &Path, to: &Path) -> anyhow::Result<HashMap<String, Outcome>> {
    let scene = SceneConfig {
        width: 160,
        height: 160,
        ..SceneConfig::default()
    };
    let engine = Engine::load(&Bundle::open(bundle)?)?;
    std::fs::create_dir_all(to)?;
    let mut wanted = HashMap::new();
    for frame in 0..IMAGES {
        let (picture, _) = draw(&scene, frame);
        let name = format!("{frame:04}.jpg");
        let path: PathBuf = to.join(&name);
        picture.save(&path).context("writing an image")?;
        let input = engine.tensor_from_bytes(&std::fs::read(&path)?)?;
        wanted.insert(name, engine.run(&input)?);
    }
    Ok(wanted)
}

async fn offload(site: &Site, device: usize) -> anyhow::Result<OffloadStatus> {
    let device: &Device = site.devices.get(device).context("no such device")?;
    Ok(status(&device.config).await?.offload)
}

/// Waits until a device says so.
async fn until(
    site: &Site,
    device: usize,
    what: impl Fn(&OffloadStatus) -> bool,
) -> anyhow::Result<()> {
    let begin = Instant::now();
    loop {
        // It may just be starting.
        if offload(site, device).await.is_ok_and(|found| what(&found)) {
            return Ok(());
        }
        if begin.elapsed() > PATIENCE {
            bail!("nothing of the kind on device {device} within {PATIENCE:?}");
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// Frames per second that are answered by the one who leads.
async fn rate(site: &Site) -> anyhow::Result<f64> {
    let (begin, before) = (Instant::now(), offload(site, 1).await?.served);
    sleep(LASTS).await;
    let after = offload(site, 1).await?.served;
    Ok((after - before) as f64 / begin.elapsed().as_secs_f64())
}

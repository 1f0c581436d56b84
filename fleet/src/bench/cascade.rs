//! `cascade`: a small board that asks a stronger neighbour about what it is unsure of, over two real agents.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail};
use edge_agent::mesh::{OffloadStatus, Status};
use models::{Bundle, Engine};
use serde_json::Value;
use tokio::{
    process::Command,
    task::spawn_blocking,
    time::{Instant, sleep},
};

use super::figures::{Goal, Results};
use crate::{
    agent_file::OffloadPart,
    api::Api,
    cli::{BenchArgs, shipped_bundle},
    dice::Dice,
    process::{EXIT_WITH_STDIN, Program},
    site::{Camera, Plan, Site},
};

/// What the board runs, and what its neighbour has.
const SMALL: &str = "steel-small";
const LARGE: &str = "steel";
/// Photographs a second: the neighbour gives a quarter of its time, of a processor that others use, too.
const FPS: f64 = 8.0;
/// Of the frames that may be asked about.
const SHARE: f64 = 0.3;
/// A device that watches a conveyor has so long.
const DEADLINE_MS: u32 = 500;
/// From the deadline to the reading: one turn of the pipeline, on a machine that may be busy.
const SLACK_MS: f64 = 50.0;
/// What is to be reached: of the accuracy that the large model has and the small one lacks, and of the deadlines.
const CLOSED: f64 = 0.9;
const KEPT: f64 = 0.99;
/// Until the two know each other, and the first answer is there.
const START: Duration = Duration::from_secs(90);
/// Until a reading is in the database.
const ARRIVED: Duration = Duration::from_secs(2);
/// Where the photographs of the recipes lie, beside the repository.
const IMAGES: &str = "../../shared/data/steel";
/// Rows of one page of readings.
const PAGE: usize = 1_000;

/// A photograph that no model was trained on.
struct Photograph {
    path: PathBuf,
    label: String,
    small: String,
    large: String,
}

/// What came of it.
struct Played {
    /// Of the frames that are counted, in order.
    readings: Vec<Value>,
    /// Frames since the agent's start.
    seen: usize,
    /// What was asked by then.
    offload: OffloadStatus,
}

/// Two agents on what was held out, in a new order for each round.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join(IMAGES);
    let images = args.images.clone().unwrap_or(beside);
    if !images.is_dir() {
        println!(
            "skipped: no photographs in {}; --images DIR names a folder of the NEU surface defects, one folder a class",
            images.display()
        );
        return Ok(());
    }
    let seed = args.seed.unwrap_or(1);
    println!("seed {seed}");
    let photographs = spawn_blocking(move || look(&images)).await??;
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let frames = dir.path().join("frames");
    lay_out(
        &photographs,
        // The first is not counted: a device may save up some frames that it did not ask about, and has by then.
        usize::from(args.rounds) + 1,
        &frames,
        &mut Dice::new(seed),
    )?;
    let played = match play(
        dir.path(),
        frames,
        photographs.len(),
        usize::from(args.rounds),
    )
    .await
    {
        Ok(played) => played,
        Err(error) => {
            let kept = dir.keep();
            return Err(error).with_context(|| format!("all is kept in {}", kept.display()));
        }
    };
    tell(&photographs, &played, results)
}

/// What both models say about each photograph that was held out.
fn look(images: &Path) -> anyhow::Result<Vec<Photograph>> {
    let bundle = Bundle::open(&shipped_bundle(SMALL)?)?;
    let small = Engine::load(&bundle)?;
    let large = Engine::load(&Bundle::open(&shipped_bundle(LARGE)?)?)?;
    let mut all = Vec::new();
    for label in &small.manifest().output.labels {
        let folder = images.join(label);
        let entries = std::fs::read_dir(&folder);
        let entries = entries.with_context(|| format!("reading {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if !bundle.is_held_out(&format!("{label}/{name}")) {
                continue;
            }
            // As on a device.
            let file = std::fs::read(&path)?;
            let says = |engine: &Engine| engine.run(&engine.tensor_from_bytes(&file)?);
            all.push(Photograph {
                small: says(&small)?.label,
                large: says(&large)?.label,
                label: label.clone(),
                path,
            });
        }
    }
    if all.is_empty() {
        bail!(
            "{} has none of the photographs that were held out",
            images.display()
        );
    }
    all.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(all)
}

/// A folder that a camera goes through: `NUMBER/CLASS/FILE`, each round in another order.
fn lay_out(
    photographs: &[Photograph],
    rounds: usize,
    to: &Path,
    dice: &mut Dice,
) -> anyhow::Result<()> {
    let mut number = 0;
    for _ in 0..rounds {
        let mut order: Vec<&Photograph> = photographs.iter().collect();
        for at in (1..order.len()).rev() {
            order.swap(at, dice.below(at + 1));
        }
        for photograph in order {
            let folder = to.join(format!("{number:06}")).join(&photograph.label);
            std::fs::create_dir_all(&folder)?;
            let name = photograph
                .path
                .file_name()
                .context("a photograph without a name")?;
            std::fs::copy(&photograph.path, folder.join(name))?;
            number += 1;
        }
    }
    Ok(())
}

/// Plays it with real agents: so many rounds of frames, from one round after the first answer on.
async fn play(root: &Path, frames: PathBuf, round: usize, rounds: usize) -> anyhow::Result<Played> {
    let count = round * rounds;
    let mut plan = Plan::new(
        Program::current()?,
        root.join("site"),
        shipped_bundle(SMALL)?,
    );
    plan.agents = 2;
    plan.spawn = false;
    plan.mesh = true;
    plan.fps = FPS;
    plan.camera = Camera::Folder {
        path: frames,
        repeat: true,
    };
    let mut site = Site::start(&plan).await?;
    let [board, strong] = site.devices.as_mut_slice() else {
        bail!("a site of two has two devices");
    };
    board.file.offload = Some(OffloadPart {
        escalate: true,
        share: SHARE as f32,
        deadline_ms: DEADLINE_MS,
        ..OffloadPart::default()
    });
    strong.file.offload = Some(OffloadPart {
        serve: Some(shipped_bundle(LARGE)?),
        ..OffloadPart::default()
    });
    strong.file.source.clear();
    strong.file.model = None;
    for device in [&mut *strong, &mut *board] {
        device.write_config()?;
        device.agent.start()?;
    }
    let (name, config) = (board.name.clone(), board.config.clone());
    let api = Api::of(&site)?;
    let begin = Instant::now();
    let first = loop {
        let all = readings(&api, &name).await.unwrap_or_default();
        if let Some(first) = all.iter().position(|reading| reading.get("by").is_some()) {
            break first;
        }
        if begin.elapsed() > START {
            bail!("no answer of the neighbour within {START:?}; it is as if nobody were there");
        }
        site.check()?;
        sleep(Duration::from_secs(1)).await;
    };
    let first = first + round;
    let lasts = Duration::from_secs_f64((round + count) as f64 / FPS);
    println!(
        "the neighbour answers; {} photographs take {lasts:.0?}",
        round + count
    );
    let until = Instant::now() + lasts * 2 + START;
    let (all, offload) = loop {
        // First what was asked; the readings of these frames have arrived by then, and some more.
        let offload = status(&config).await?.offload;
        sleep(ARRIVED).await;
        site.check()?;
        let all = readings(&api, &name).await?;
        if all.len() >= first + count {
            break (all, offload);
        }
        if Instant::now() > until {
            bail!("{} readings of {} have arrived", all.len(), first + count);
        }
    };
    site.stop().await?;
    Ok(Played {
        seen: all.len(),
        readings: all.into_iter().skip(first).take(count).collect(),
        offload,
    })
}

/// All readings of a device, in order.
pub(super) async fn readings(api: &Api, device: &str) -> anyhow::Result<Vec<Value>> {
    let (api, device) = (api.clone(), device.to_owned());
    let asked = spawn_blocking(move || -> anyhow::Result<Vec<Value>> {
        let mut all = Vec::new();
        let mut after = String::new();
        loop {
            let page = api.get(&format!(
                "/readings?device={device}&order=asc&limit={PAGE}{after}"
            ))?;
            let items = page["items"].as_array().cloned().unwrap_or_default();
            let is_last = items.len() < PAGE;
            let last = items.last().and_then(|reading| reading["id"].as_i64());
            all.extend(items);
            match last.filter(|_| !is_last) {
                Some(id) => after = format!("&after={id}"),
                None => break,
            }
        }
        all.sort_by_key(|reading| reading["seq"].as_u64());
        Ok(all)
    });
    asked.await?
}

/// `edge-agent mesh status`
pub(super) async fn status(config: &Path) -> anyhow::Result<Status> {
    let mut command = Command::new(Program::current()?.0);
    command.args(["edge-agent", "mesh", "status", "--json", "--config"]);
    command.arg(config).stdin(Stdio::null());
    let said = command.env_remove(EXIT_WITH_STDIN).output().await?;
    serde_json::from_slice(&said.stdout).context("asking the board for its neighbours")
}

fn tell(photographs: &[Photograph], played: &Played, results: &mut Results) -> anyhow::Result<()> {
    let Played {
        readings,
        seen,
        offload,
    } = played;
    let known: HashMap<&str, &Photograph> = photographs
        .iter()
        .filter_map(|photograph| Some((photograph.path.file_name()?.to_str()?, photograph)))
        .collect();
    let (mut small, mut large, mut both, mut asked, mut prompt) =
        (0_u32, 0_u32, 0_u32, 0_u32, 0_u32);
    for reading in readings {
        let file = reading["file"]
            .as_str()
            .and_then(|file| file.rsplit('/').next());
        let photograph = file.and_then(|file| known.get(file));
        let photograph = photograph.context("a reading of a photograph that nobody has shown")?;
        small += u32::from(photograph.small == photograph.label);
        large += u32::from(photograph.large == photograph.label);
        both += u32::from(reading["label"] == photograph.label.as_str());
        asked += u32::from(reading.get("by").is_some());
        let ms = reading["latency_ms"].as_f64().unwrap_or(f64::INFINITY);
        prompt += u32::from(ms <= f64::from(DEADLINE_MS) + SLACK_MS);
    }
    let count = readings.len() as f64;
    let of_all = |n: u32| f64::from(n) / count;
    let gap = of_all(large) - of_all(small);
    if gap <= 0.0 {
        bail!("the large model is no better than the small one on these photographs");
    }
    let sent = offload.asked as f64 / *seen as f64;
    let in_time = offload.answered as f64 / (offload.answered + offload.late).max(1) as f64;
    results.add(
        "accuracy of the small model",
        of_all(small),
        "",
        None,
        Goal::None,
    );
    results.add(
        "accuracy of the large model",
        of_all(large),
        "",
        None,
        Goal::None,
    );
    results.add(
        "accuracy of both together",
        of_all(both),
        "",
        None,
        Goal::None,
    );
    results.add(
        "of the gap, closed",
        (of_all(both) - of_all(small)) / gap,
        "",
        None,
        Goal::AtLeast(CLOSED),
    );
    results.add(
        "of all frames since the start, asked about",
        sent,
        "",
        None,
        Goal::AtMost(SHARE),
    );
    results.add(
        "of the frames, answered by the neighbour",
        of_all(asked),
        "",
        None,
        Goal::None,
    );
    results.add(
        "of those not refused, answered in time",
        in_time,
        "",
        None,
        Goal::AtLeast(KEPT),
    );
    results.add("refused", offload.refused as f64, "", None, Goal::None);
    results.add(
        "of the results, there by the deadline",
        of_all(prompt),
        "",
        None,
        Goal::AtLeast(KEPT),
    );
    Ok(())
}

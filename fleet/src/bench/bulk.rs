//! `bulk`: how fast a large release comes from a neighbour's disk, against the coordinator over HTTPS.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use edge_agent::mesh::status_of;
use serde_json::json;
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

use super::{
    figures::{Goal, Results, median},
    rollout::push,
    swarm::{MODEL, all_there, has, write_release},
};
use crate::{
    api::Api,
    cli::{BenchArgs, shipped_bundle},
    dice::Dice,
    process::Program,
    site::{Camera, Plan, Site},
};

/// The release has so many bytes.
const BYTES: usize = 64_000_000;
/// Each time a new one.
const ROUNDS: usize = 5;
/// The neighbour serves as fast as it can.
const SERVE_KIB_PER_S: u32 = 4_000_000;
/// Of a release, so much has to have come from the neighbour, or something else was measured.
const FROM_NEIGHBOUR: f64 = 0.98;
/// Between two looks at the disk.
const LOOK: Duration = Duration::from_millis(5);
/// Presence spreads, and start-up is over.
const REST: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or_else(Dice::seed);
    println!("seed {seed} (repeat with --seed {seed})");
    let mut dice = Dice::new(seed);
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let bundle = shipped_bundle(MODEL)?;
    let config = dir.path().join("coordinator.toml");
    std::fs::write(&config, format!("[training]\nmodels = [{bundle:?}]\n"))?;
    let program = Program::current()?;
    let mut plan = Plan::new(program.clone(), dir.path().join("site"), bundle);
    plan.agents = 2;
    plan.camera = Camera::None;
    plan.updates = true;
    plan.mesh = true;
    plan.serve_kib_per_s = Some(SERVE_KIB_PER_S);
    plan.coordinator_config = Some(config);
    let mut site = Site::start(&plan).await?;
    let api = Api::of(&site)?;
    all_there(&mut site, &api).await?;
    sleep(REST).await;
    let (mut of_neighbour, mut of_coordinator) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let version = format!("8.1.{round}");
        let release = dir.path().join(&version);
        let bytes = write_release(&release, &version, BYTES, &mut dice)? as f64;
        push(&program, &site, &release).await?;
        // The first one finds nobody who has it, the second one the first.
        let first = fetch(&mut site, &api, 0, &version).await?;
        let before = swarm_bytes(&site, 1)?;
        let second = fetch(&mut site, &api, 1, &version).await?;
        let came = (swarm_bytes(&site, 1)? - before) as f64 / bytes;
        anyhow::ensure!(
            came >= FROM_NEIGHBOUR,
            "only {came:.2} of the release came from the neighbour"
        );
        let rate = |took: Duration| bytes / 1e6 / took.as_secs_f64();
        println!(
            "of the coordinator {:.0} MB/s, of the neighbour {:.0} MB/s",
            rate(first),
            rate(second)
        );
        of_coordinator.push(rate(first));
        of_neighbour.push(rate(second));
    }
    site.stop().await?;
    results.add(
        "a release from a neighbour, onto the disk, against HTTPS from the coordinator",
        median(of_neighbour),
        "MB/s",
        Some(median(of_coordinator)),
        Goal::RatioAtLeast(0.8),
    );
    Ok(())
}

/// Has one device run a version. From the first bytes on its disk until all of it is there.
async fn fetch(site: &mut Site, api: &Api, n: usize, version: &str) -> anyhow::Result<Duration> {
    let device = site.devices.get(n).context("there are two devices")?;
    let models = device.file.data.join("models");
    let path = format!("/devices/{}/{}/pin", device.file.site, device.name);
    let body = json!({"model": format!("{MODEL}@{version}"), "author": "bench"});
    let api = api.clone();
    spawn_blocking(move || api.put(&path, &body)).await??;
    let asked = Instant::now();
    let mut begun = None;
    loop {
        if begun.is_none() && holds_chunks(&models.join("incoming")) {
            begun = Some(Instant::now());
        }
        if has(&models, version) {
            let begun = begun.context("it was whole before it began")?;
            return Ok(begun.elapsed());
        }
        site.check()?;
        anyhow::ensure!(
            asked.elapsed() < PATIENCE,
            "{version} has not come within {PATIENCE:?}"
        );
        sleep(LOOK).await;
    }
}

/// Does something that is fetched lie there?
fn holds_chunks(incoming: &Path) -> bool {
    let entries = std::fs::read_dir(incoming).into_iter().flatten();
    let chunks = |stage: PathBuf| {
        std::fs::read_dir(stage.join("chunks"))
            .into_iter()
            .flatten()
    };
    entries
        .flatten()
        .any(|stage| chunks(stage.path()).next().is_some())
}

fn swarm_bytes(site: &Site, n: usize) -> anyhow::Result<u64> {
    let device = site.devices.get(n).context("there are two devices")?;
    let status = status_of(&device.file.data).map_err(anyhow::Error::msg)?;
    Ok(status.swarm_bytes)
}

//! The end of the loop: the better model reaches every device, in stages, while all of them go on looking.

use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

use crate::{api::Api, site::Site};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// How long the devices may take to be where they should be.
const PATIENCE: Duration = Duration::from_secs(300);
/// What the devices report about themselves arrives within this.
const REPORTED: Duration = Duration::from_secs(3);
/// Readings of a device that are looked at: the last minutes.
const READINGS: usize = 1_000;

/// Stages and trials for people who watch, not for a factory: a tenth of the devices, then all.
fn settings(model: &str, author: &str) -> Value {
    let stage = |percent: u32| json!({"percent": percent, "soak_s": 0, "keep": 1.0});
    json!({
        "model": model,
        "author": author,
        "plan": {"stages": [stage(10), stage(100)]},
        "trial": {"share": 1.0, "shadow_frames": 4, "watch_frames": 2, "watch_s_min": 0},
        // All devices share the processors of one machine, and both models are of one family.
        "limits": {"latency_times": 20.0},
    })
}

/// Waits until every device runs this version and is at rest.
///
/// # Errors
/// If that takes too long, or a device ends.
pub(crate) async fn all_on(api: &Api, site: &mut Site, version: &str) -> anyhow::Result<()> {
    let patience = Instant::now() + PATIENCE;
    loop {
        check(site)?;
        let devices = devices(api).await?;
        let there = devices.iter().filter(|device| {
            device["model"]["version"] == version && device["update"]["phase"] == "settled"
        });
        if there.count() == site.devices.len() {
            return Ok(());
        }
        anyhow::ensure!(
            Instant::now() < patience,
            "not every device came to run version {version}: {}",
            json!(devices)
        );
        sleep(LOOK).await;
    }
}

/// Rolls a model out and waits for its end. What it took, for the report.
///
/// # Errors
/// If it does not come to every device.
pub(crate) async fn deliver(
    api: &Api,
    site: &mut Site,
    model: &str,
    author: &str,
    last_label: Instant,
) -> anyhow::Result<Value> {
    let version = model.split_once('@').map_or(model, |(_, version)| version);
    let before = fetched(api).await?;
    let asked = settings(model, author);
    let start = Instant::now();
    let begun = post(api, "/rollouts", asked).await?;
    let path = format!("/rollouts/{}", begun["id"]);
    let (mut stage, patience) = (Value::Null, Instant::now() + PATIENCE);
    let rollout = loop {
        check(site)?;
        let rollout = get(api, &path).await?;
        if rollout["stage"] != stage {
            stage = rollout["stage"].clone();
            println!(
                "stage {stage} of {}: {} of {} devices, after {:.1} s",
                rollout["stages"].as_array().map_or(0, Vec::len),
                rollout["exposed"],
                rollout["devices"],
                start.elapsed().as_secs_f64()
            );
        }
        match rollout["status"].as_str() {
            Some("done") => break rollout,
            Some("running") if Instant::now() < patience => sleep(LOOK).await,
            _ => anyhow::bail!("the rollout did not come to its end: {rollout}"),
        }
    };
    all_on(api, site, version).await?;
    let (whole, rollout_s) = (last_label.elapsed(), start.elapsed());
    // The last readings and numbers are on their way.
    sleep(REPORTED).await;
    let after = fetched(api).await?;
    let swaps = swaps(api, site, model).await?;
    let most = |at: fn(&Swap) -> f64| swaps.iter().map(at).fold(0.0, f64::max);
    Ok(json!({
        "label_to_fleet_s": whole.as_secs_f64(),
        "rollout_s": rollout_s.as_secs_f64(),
        "bytes_per_device": after.saturating_sub(before) / site.devices.len().max(1) as u64,
        "stages": rollout["stages"],
        "devices": rollout["kept"],
        "swap_wait": most(|swap| swap.wait),
        "swap_latency": most(|swap| swap.latency),
    }))
}

/// What a swap cost one device.
struct Swap {
    /// Time from the last frame of the old model to the first of the new one, by the usual time between two frames.
    wait: f64,
    /// Time that the first frame of the new model took, by the median of those before.
    latency: f64,
}

/// Looks for the swap in the readings of each device.
async fn swaps(api: &Api, site: &Site, model: &str) -> anyhow::Result<Vec<Swap>> {
    let mut swaps = Vec::new();
    for device in &site.devices {
        let path = format!("/readings?device={}&limit={READINGS}", device.name);
        let page = get(api, &path).await?;
        let mut readings: Vec<&Value> = page["items"].as_array().into_iter().flatten().collect();
        readings.sort_by_key(|reading| (reading["epoch"].as_u64(), reading["seq"].as_u64()));
        let new = readings
            .iter()
            .position(|reading| reading["model"] == model);
        let new = new.with_context(|| format!("{} has no reading of {model}", device.name))?;
        let old = readings.get(..new).unwrap_or_default();
        let number = |reading: &Value, key: &str| reading[key].as_f64().unwrap_or_default();
        let usual = median(
            old.windows(2)
                .filter_map(|pair| Some(number(pair.last()?, "ts") - number(pair.first()?, "ts"))),
        );
        let latency = median(old.iter().map(|reading| number(reading, "latency_ms")));
        let (Some(last), Some(first)) = (old.last(), readings.get(new)) else {
            continue;
        };
        swaps.push(Swap {
            wait: (number(first, "ts") - number(last, "ts")) / usual.max(1.0),
            latency: number(first, "latency_ms") / latency.max(0.001),
        });
    }
    Ok(swaps)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn check(site: &mut Site) -> anyhow::Result<()> {
    site.coordinator.check()?;
    for device in &mut site.devices {
        device.agent.check()?;
    }
    Ok(())
}

async fn get(api: &Api, path: &str) -> anyhow::Result<Value> {
    let (api, path) = (api.clone(), path.to_owned());
    spawn_blocking(move || api.get(&path)).await?
}

async fn post(api: &Api, path: &str, body: Value) -> anyhow::Result<Value> {
    let (api, path) = (api.clone(), path.to_owned());
    spawn_blocking(move || api.post(&path, &body)).await?
}

async fn devices(api: &Api) -> anyhow::Result<Vec<Value>> {
    let page = get(api, "/devices?limit=1000").await?;
    Ok(page["items"].as_array().cloned().unwrap_or_default())
}

/// Bytes that all devices together have fetched for models.
async fn fetched(api: &Api) -> anyhow::Result<u64> {
    let devices = devices(api).await?;
    Ok(devices
        .iter()
        .filter_map(|device| device["update_bytes"].as_u64())
        .sum())
}

//! `mesh-hostile`: a third of a site means no good; what do the others know of each other?

use std::{collections::HashSet, net::SocketAddr, time::Duration};

use anyhow::Context;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{
    figures::{Goal, Results},
    mesh::{all_met, plan, statuses},
};
use crate::{
    cli::BenchArgs,
    dice::Dice,
    neighbour::{self, Deed, NOWHERE},
    process::usage,
    site::Site,
};

const DEVICES: usize = 30;
/// Their last ones are the enemy's.
const ENEMIES: usize = 9;
/// Honest devices that are killed and started, one after the other, so that there is something to be heard of.
const EVENTS: usize = 8;
/// What happened is to be known to everybody within this …
const BOUND: Duration = Duration::from_secs(10);
/// … by so many of those whom it concerns.
const DELIVERED: f64 = 0.99;
/// The enemy has this long before it is counted.
const BEGIN: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
const MIB: f64 = 1_048_576.0;

/// What was seen.
#[derive(Debug, Default)]
struct Seen {
    /// News that were to be heard, and those that were in time.
    news: u32,
    heard: u32,
    /// Looks at an honest device that was there, by another one; and those that saw it.
    looks: u64,
    there: u64,
    /// The most that an honest agent takes.
    rss: f64,
}

impl Seen {
    fn delivered(&self) -> f64 {
        f64::from(self.heard) / f64::from(self.news.max(1))
    }

    fn constant(&self) -> f64 {
        self.there as f64 / self.looks.max(1) as f64
    }
}

pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or_else(Dice::seed);
    println!("seed {seed} (repeat with --seed {seed})");
    let mut dice = Dice::new(seed);
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let mut site = Site::start(&plan(&dir, DEVICES, true)?).await?;
    all_met(&mut site).await?;
    // Their keys are what the enemy has; the agents themselves are out of his way.
    let stolen = site.devices.split_off(DEVICES - ENEMIES);
    let names = site.devices.iter().chain(&stolen).map(|d| d.name.clone());
    let members: HashSet<String> = names.collect();
    let mut taken = Vec::new();
    for mut device in stolen {
        device.agent.kill().await?;
        taken.push(device.file.data.clone());
    }
    let calm = watch(&mut site, &mut dice).await?;
    println!("without enemies: {calm:?}");
    let victims: Vec<SocketAddr> = site.devices.iter().map(|d| d.file.mesh.listen).collect();
    let stop = CancellationToken::new();
    let mut enemies = JoinSet::new();
    for (data, deed) in taken.into_iter().zip(Deed::ALL.into_iter().cycle()) {
        let (victims, dice, stop) = (victims.clone(), Dice::new(dice.any()), stop.clone());
        enemies.spawn(async move {
            let done = neighbour::run(&data, &victims, deed, dice, stop).await;
            (deed, done)
        });
    }
    sleep(BEGIN).await;
    let beset = watch(&mut site, &mut dice).await?;
    println!("with {ENEMIES} enemies: {beset:?}");
    stop.cancel();
    while let Some(ended) = enemies.join_next().await {
        let (deed, done) = ended?;
        let done = done?;
        println!("{deed:?}: {done} times");
        anyhow::ensure!(done > 0, "{deed:?} was never done: nothing was tested");
    }
    let (mut turned_away, mut forgeries, mut strangers, mut accepted) = (0, 0, 0, 0);
    for status in statuses(&site).await? {
        turned_away += status.strangers;
        forgeries += status.forgeries;
        for neighbour in &status.neighbours {
            strangers += u32::from(!members.contains(&neighbour.device));
            let is_forged = neighbour.addresses.iter().any(|address| address == NOWHERE);
            let is_honest = site.devices.iter().any(|d| d.name == neighbour.device);
            accepted += u32::from(is_forged && is_honest);
        }
    }
    println!("turned away: {turned_away} strangers' handshakes, {forgeries} forged envelopes");
    site.stop().await?;
    results.add(
        "news of honest devices that all honest ones had within 10 s, against no enemies",
        beset.delivered(),
        "",
        Some(calm.delivered()),
        Goal::AtLeast(DELIVERED),
    );
    results.add(
        "looks at an honest device that saw it there, against no enemies",
        beset.constant(),
        "",
        Some(calm.constant()),
        Goal::AtLeast(DELIVERED),
    );
    results.add(
        "strangers that honest devices take for neighbours",
        f64::from(strangers),
        "",
        None,
        Goal::AtMost(0.0),
    );
    results.add(
        "forged statements about honest devices that honest ones believe",
        f64::from(accepted),
        "",
        None,
        Goal::AtMost(0.0),
    );
    results.add(
        "most memory of an honest agent, against no enemies",
        beset.rss,
        "MiB",
        Some(calm.rss),
        Goal::AtMost(128.0),
    );
    Ok(())
}

/// Kills and starts some honest devices, and looks who of the others hears of it.
async fn watch(site: &mut Site, dice: &mut Dice) -> anyhow::Result<Seen> {
    let mut seen = Seen::default();
    for _ in 0..EVENTS {
        let chosen = dice.below(site.devices.len());
        let device = site.devices.get_mut(chosen).context("there are devices")?;
        let name = device.name.clone();
        device.agent.kill().await?;
        heard(site, &name, false, &mut seen).await?;
        let device = site.devices.get_mut(chosen).context("there are devices")?;
        device.agent.start()?;
        heard(site, &name, true, &mut seen).await?;
    }
    Ok(seen)
}

/// Looks for ten seconds who knows that this device is there, or is not.
async fn heard(site: &mut Site, name: &str, is_there: bool, seen: &mut Seen) -> anyhow::Result<()> {
    let others = site.devices.len() - 1;
    let end = Instant::now() + BOUND;
    loop {
        let all = statuses(site).await?;
        let others_say = all.iter().filter(|s| s.device.as_deref() != Some(name));
        let mut knows = 0;
        for status in others_say {
            let says = status.neighbours.iter().find(|n| n.device == name);
            knows += usize::from(says.is_some_and(|n| n.here) == is_there);
            // The others have been there all the time.
            for other in site.devices.iter().map(|d| d.name.as_str()) {
                if other != name && Some(other) != status.device.as_deref() {
                    let says = status.neighbours.iter().find(|n| n.device == other);
                    seen.looks += 1;
                    seen.there += u64::from(says.is_some_and(|n| n.here));
                }
            }
        }
        for device in &site.devices {
            if let Some(pid) = device.agent.pid() {
                seen.rss = seen.rss.max(usage(pid)?.rss as f64 / MIB);
            }
        }
        if knows >= others || Instant::now() > end {
            println!(
                "{name} {}: {knows} of {others} know",
                if is_there { "is back" } else { "is killed" }
            );
            seen.news += u32::try_from(others)?;
            seen.heard += u32::try_from(knows)?;
            return Ok(());
        }
        sleep(LOOK).await;
    }
}

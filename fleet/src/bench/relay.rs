//! `relay`: half of a site loses its uplink, carriers die meanwhile, and readings arrive all the same, in time.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use anyhow::Context;
use sqlx::{Connection, Row, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::time::{Instant, sleep};

use super::figures::{Goal, Results};
use crate::{
    cli::{BenchArgs, shipped_bundle},
    dice::Dice,
    process::Program,
    site::{Camera, Plan, Site},
};

const DEVICES: usize = 20;
/// The first of them lose their uplink: one half's connections are reset, the other half's stand and nothing passes.
const WITHOUT: usize = 10;
const FPS: f64 = 2.0;
/// Until everybody knows everybody.
const MEET: Duration = Duration::from_secs(30);
/// What is usual is measured so long.
const USUAL: Duration = Duration::from_secs(30);
const OUTAGE: Duration = Duration::from_secs(120);
/// Without neighbours it need not be as long to be seen.
const OUTAGE_ALONE: Duration = Duration::from_secs(30);
/// A carrier dies so often during the outage, and is away for …
const KILL_EVERY: Duration = Duration::from_secs(15);
/// … so long.
const AWAY: Duration = Duration::from_secs(5);
const SETTLE: Duration = Duration::from_secs(180);

/// From the frame to the coordinator's database, in milliseconds; those of one kind, in order.
#[derive(Default)]
struct Delays(Vec<i64>);

impl Delays {
    fn quantile(&self, q: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        let at = (last as f64 * q).round() as usize;
        self.0.get(at).copied().unwrap_or(0) as f64
    }
}

/// One site and what was seen of it.
struct Seen {
    before: Delays,
    /// Of those without an uplink, while they had none.
    during: Delays,
    /// Of the others at the same time, those that were killed left out.
    carriers: Delays,
    total: crate::witness::Account,
    killed: usize,
}

pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or_else(Dice::seed);
    println!("seed {seed} (repeat with --seed {seed})");
    let alone = site(false, OUTAGE_ALONE, &mut Dice::new(seed)).await?;
    let meshed = site(true, OUTAGE, &mut Dice::new(seed)).await?;
    for (what, value, goal) in [
        ("produced", meshed.total.produced, Goal::AtLeast(1.0)),
        (
            "stored",
            meshed.total.stored,
            Goal::AtLeast(meshed.total.produced as f64),
        ),
        ("lost", meshed.total.lost, Goal::AtMost(0.0)),
        ("stored twice", meshed.total.duplicates, Goal::AtMost(0.0)),
        ("recorded as gaps", meshed.total.gaps, Goal::AtMost(0.0)),
        ("carriers killed", meshed.killed as u64, Goal::None),
    ] {
        results.add(what, value as f64, "", None, goal);
    }
    let usual = meshed.before.quantile(0.5);
    results.add("usual delay p50", usual, "ms", None, Goal::None);
    results.add(
        "usual delay p99",
        meshed.before.quantile(0.99),
        "ms",
        None,
        Goal::None,
    );
    for (what, q) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
        let goal = if what == "p99" {
            Goal::AtMost(3_000.0)
        } else {
            Goal::None
        };
        results.add(
            &format!("added delay {what} without an uplink"),
            meshed.during.quantile(q) - usual,
            "ms",
            Some(alone.during.quantile(q) - alone.before.quantile(0.5)),
            goal,
        );
    }
    results.add(
        "added delay p99 of who carries",
        meshed.carriers.quantile(0.99) - usual,
        "ms",
        Some(alone.carriers.quantile(0.99) - alone.before.quantile(0.5)),
        Goal::None,
    );
    Ok(())
}

async fn site(mesh: bool, outage: Duration, dice: &mut Dice) -> anyhow::Result<Seen> {
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let mut plan = Plan::new(
        Program::current()?,
        dir.path().to_owned(),
        shipped_bundle("conveyor")?,
    );
    plan.agents = DEVICES;
    plan.fps = FPS;
    plan.mesh = mesh;
    plan.camera = Camera::Scene {
        width: 64,
        height: 64,
    };
    let how = if mesh {
        "with a mesh"
    } else {
        "without neighbours"
    };
    println!("{how}: {DEVICES} devices start …");
    let mut site = Site::start(&plan).await?;
    sleep(MEET).await;
    let from_ms = now_ms();
    sleep(USUAL).await;
    println!("{how}: {WITHOUT} of them lose their uplink for {outage:?}");
    let cut_ms = now_ms();
    for (n, device) in site.devices.iter().take(WITHOUT).enumerate() {
        if n % 2 == 0 {
            device.link.cut();
        } else {
            device.link.hang();
        }
    }
    let end = Instant::now() + outage;
    let mut killed = BTreeSet::new();
    while Instant::now() + KILL_EVERY + AWAY < end {
        sleep(KILL_EVERY).await;
        let carrier = WITHOUT + dice.below(DEVICES - WITHOUT);
        if let Some(device) = site.devices.get_mut(carrier) {
            println!("{how}: {} is killed", device.name);
            device.agent.kill().await?;
            sleep(AWAY).await;
            device.agent.start()?;
            killed.insert(device.name.clone());
        }
    }
    tokio::time::sleep_until(end).await;
    site.check()?;
    let healed_ms = now_ms();
    for device in &site.devices {
        device.link.heal();
    }
    println!("{how}: the uplinks are back");
    let seen = site.finish(Default::default(), SETTLE).await?;
    let names = |from: usize, to: usize| -> BTreeSet<String> {
        let all = site.devices.iter().skip(from).take(to - from);
        all.map(|d| d.name.clone())
            .filter(|name| !killed.contains(name))
            .collect()
    };
    let (without, with) = (names(0, WITHOUT), names(WITHOUT, DEVICES));
    let database = site.database();
    site.stop().await?;
    let total = seen.total();
    if !total.is_whole() {
        println!("{how}: all is kept in {}: {total:?}", dir.keep().display());
    }
    Ok(Seen {
        before: delays(&database, &without, from_ms..cut_ms).await?,
        during: delays(&database, &without, cut_ms..healed_ms).await?,
        carriers: delays(&database, &with, cut_ms..healed_ms).await?,
        total,
        killed: killed.len(),
    })
}

/// Of the readings of these devices whose frames were taken in this time.
async fn delays(
    database: &PathBuf,
    devices: &BTreeSet<String>,
    when: std::ops::Range<i64>,
) -> anyhow::Result<Delays> {
    let options = SqliteConnectOptions::new()
        .filename(database)
        .read_only(true);
    let mut database = SqliteConnection::connect_with(&options).await?;
    let rows = sqlx::query(
        "SELECT d.device, r.received_ms - r.ts AS delay FROM readings r JOIN devices d ON d.id = r.device \
         WHERE r.ts >= ? AND r.ts < ?",
    )
    .bind(when.start)
    .bind(when.end)
    .fetch_all(&mut database)
    .await?;
    let mut all = Vec::new();
    for row in rows {
        if devices.contains(row.try_get::<&str, _>("device")?) {
            all.push(row.try_get("delay")?);
        }
    }
    all.sort_unstable();
    Ok(Delays(all))
}

/// The clock that devices and coordinator stamp with.
#[expect(
    clippy::disallowed_methods,
    reason = "compared with what parts that are measured wrote down"
)]
fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}

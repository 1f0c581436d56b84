//! `device`: a whole device on one core, against what one would write today; and what it costs by itself.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use edge_agent::{
    capture::scene::{SceneConfig, draw},
    counters::Counters,
    outbox::{Options, Outbox},
    store::{Command, Draft, Store, Stored},
};
use models::{Bundle, Engine, Input, Picture};
use tokio::{sync::mpsc, time::Instant};

use super::{
    figures::{Goal, Results, median},
    peer::Peer,
};
use crate::{
    cli::{BenchArgs, shipped_bundle},
    process::{Program, Usage, children, usage},
    site::{Broker, Camera, Plan, Site},
};

/// A small model, where preparing the image weighs most, and the backbone with a head, where the model does.
const BUNDLES: [&str; 2] = ["conveyor", "steel"];
/// Different images, shown again and again.
const IMAGES: u64 = 60;
/// Readings per round …
const COUNT: u64 = 600;
/// … of which the first are not measured: starting is not what a device does all day.
const WARM: u64 = 100;
/// Everybody who is measured runs here; the broker and the coordinator where there is room.
const CPU: usize = 0;
/// How long a round may take.
const BOUND: Duration = Duration::from_secs(300);
const MIB: f64 = 1_048_576.0;

/// In turns with the Python device.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    match own_program(&Program::current()?.0) {
        Some(own) => println!("the device is {}", own.display()),
        None => println!("the device is played by the fleet's program, which is larger"),
    }
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let images = dir.path().join("images");
    write_images(&images)?;
    for name in BUNDLES {
        in_turns(args, name, dir.path(), &images, results).await?;
    }
    let small = Camera::Scene {
        width: 320,
        height: 240,
    };
    let loaded = at_rest(
        &dir.path().join("loaded"),
        Some(shipped_bundle("backbone")?),
        small,
    )
    .await?;
    results.add(
        "resident memory with the backbone at 5 frames a second",
        loaded,
        "MiB",
        None,
        Goal::AtMost(40.0),
    );
    let idle = at_rest(&dir.path().join("idle"), None, Camera::None).await?;
    results.add(
        "resident memory without a model",
        idle,
        "MiB",
        None,
        Goal::AtMost(15.0),
    );
    for name in ["backbone", "conveyor"] {
        let (rounds, dir, bundle) = (args.rounds, dir.path().join(name), shipped_bundle(name)?);
        let measured = tokio::task::spawn_blocking(move || overhead(rounds, &dir, &bundle));
        let (bare, whole) = measured.await??;
        let name = format!("{name}: prepared tensor to durable reading, against tract");
        results.add(&name, whole, "ms", Some(bare), Goal::RatioAtMost(1.15));
    }
    Ok(())
}

/// One model on the same images, ours and the peer in turns.
async fn in_turns(
    args: &BenchArgs,
    name: &str,
    dir: &Path,
    images: &Path,
    results: &mut Results,
) -> anyhow::Result<()> {
    let bundle = shipped_bundle(name)?;
    let (mut rates, mut peer_rates) = (Vec::new(), Vec::new());
    let (mut memory, mut peer_memory) = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        let root = dir.join(format!("{name}-round{round}"));
        let (rate, rss) = ours(&root, &bundle, images).await?;
        let (peer_rate, peer_rss) = peers(&root, &bundle, images).await?;
        println!(
            "{name}, round {}: {rate:.0} readings per CPU second in {:.0} MiB, the peer {peer_rate:.0} in {:.0} MiB",
            round + 1,
            rss / MIB,
            peer_rss / MIB
        );
        rates.push(rate);
        memory.push(rss / MIB);
        peer_rates.push(peer_rate);
        peer_memory.push(peer_rss / MIB);
    }
    let (rss, peer_rss) = (median(memory), median(peer_memory));
    results.add(
        &format!("{name}: readings per CPU second, 1080p JPEG to acknowledged"),
        median(rates),
        "1/s",
        Some(median(peer_rates)),
        Goal::RatioAtLeast(2.0),
    );
    results.add(
        &format!("{name}: most resident memory, the same run"),
        rss,
        "MiB",
        Some(peer_rss),
        Goal::RatioAtMost(1.0 / 3.0),
    );
    Ok(())
}

/// Photographs of the conveyor as a camera gives them.
fn write_images(to: &Path) -> anyhow::Result<()> {
    let scene = SceneConfig {
        width: 1920,
        height: 1080,
        ..SceneConfig::default()
    };
    for frame in 0..IMAGES {
        let (picture, truth) = draw(&scene, frame);
        let folder = to.join(truth.label);
        std::fs::create_dir_all(&folder)?;
        picture
            .save(folder.join(format!("{frame:04}.jpg")))
            .context("writing an image")?;
    }
    Ok(())
}

fn plan(root: &Path, bundle: Option<PathBuf>) -> anyhow::Result<Plan> {
    let mut plan = Plan::new(Program::current()?, root.to_owned(), PathBuf::new());
    plan.bundle = bundle;
    plan.agents = 1;
    plan.agent_cpu = Some(CPU);
    plan.agent_program = own_program(&plan.program.0);
    if crate::broker::mosquitto().is_none() {
        bail!("mosquitto is not installed; both devices report to one");
    }
    plan.broker = Broker::Mosquitto;
    // As the peer does: plain text on loopback.
    plan.tls = false;
    Ok(plan)
}

/// What runs on a device, where it was built: the build that is installed first, then the one beside this program. The fleet
/// can play it, but is a larger program.
fn own_program(fleet: &Path) -> Option<PathBuf> {
    let beside = fleet.with_file_name("edge-agent");
    let installed = fleet.parent()?.parent()?.join("dist").join("edge-agent");
    [installed, beside].into_iter().find(|own| own.exists())
}

/// The agent's process, below its guard if it has one.
fn agent_pid(site: &Site, plan: &Plan) -> anyhow::Result<u32> {
    let agent = site.devices.first().and_then(|d| d.agent.pid());
    let agent = agent.context("the agent does not run")?;
    if plan.agent_program.is_none() {
        return Ok(agent);
    }
    let below = children(agent);
    below.first().copied().context("the agent has ended")
}

/// Readings per CPU second from the first to the last that count, and the most memory.
fn cost(from: (u64, Usage), to: (u64, Usage)) -> (f64, f64) {
    let readings = (to.0 - from.0) as f64;
    (
        readings / (to.1.cpu_s - from.1.cpu_s).max(0.001),
        to.1.peak_rss as f64,
    )
}

async fn ours(root: &Path, bundle: &Path, images: &Path) -> anyhow::Result<(f64, f64)> {
    let mut plan = plan(root, Some(bundle.to_owned()))?;
    plan.camera = Camera::Folder {
        path: images.to_owned(),
        repeat: true,
    };
    (plan.fps, plan.frames) = (0.0, COUNT);
    let mut site = Site::start(&plan).await?;
    let mut witness = site.witness(Default::default());
    let end = Instant::now() + BOUND;
    let mut start = None;
    let used = loop {
        let stored = witness.look().await?.total().stored;
        if stored >= WARM && start.is_none() {
            start = Some((stored, usage(agent_pid(&site, &plan)?)?));
        }
        if stored >= COUNT {
            break usage(agent_pid(&site, &plan)?)?;
        }
        site.check()?;
        anyhow::ensure!(Instant::now() < end, "only {stored} readings in {BOUND:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    site.stop().await?;
    Ok(cost(
        start.context("it was too fast to be measured")?,
        (COUNT, used),
    ))
}

async fn peers(root: &Path, bundle: &Path, images: &Path) -> anyhow::Result<(f64, f64)> {
    // A mosquitto with nobody else on it; the coordinator next to it hears nothing of the peer's topics.
    let mut plan = plan(&root.join("peer"), None)?;
    plan.agents = 0;
    let mut site = Site::start(&plan).await?;
    let (mqtt, database) = (site.mqtt(), root.join("peer").join("peer.db"));
    let numbers = [COUNT, WARM].map(|n| n.to_string().into());
    let broker = [mqtt.ip().to_string(), mqtt.port().to_string()].map(Into::into);
    let args = [bundle.into(), images.into()]
        .into_iter()
        .chain(numbers)
        .chain(broker);
    let args = args.chain([database.into(), CPU.to_string().into()]);
    let mut peer = Peer::start("device.py", args)?;
    let mut marks = Vec::new();
    for _ in 0..2 {
        let said = tokio::time::timeout(BOUND, peer.says()).await??;
        let at = said["at"].as_u64().context("where the peer is")?;
        marks.push((at, usage(peer.pid())?));
    }
    peer.end().await?;
    site.stop().await?;
    match marks.as_slice() {
        [from, to] => Ok(cost(*from, *to)),
        _ => bail!("the peer did not say where it was"),
    }
}

/// Resident memory of an agent that has run for a while, in MiB.
async fn at_rest(root: &Path, bundle: Option<PathBuf>, camera: Camera) -> anyhow::Result<f64> {
    /// Long enough for connections, first readings, and acknowledgements.
    const A_WHILE: Duration = Duration::from_secs(8);
    let mut plan = plan(root, bundle)?;
    plan.camera = camera;
    let mut site = Site::start(&plan).await?;
    tokio::time::sleep(A_WHILE).await;
    site.check()?;
    let pid = agent_pid(&site, &plan)?;
    let rss = usage(pid)?.rss;
    site.stop().await?;
    Ok(rss as f64 / MIB)
}

/// Milliseconds per tensor: the bare model, and the model with everything until the reading is durable.
fn overhead(rounds: u16, dir: &Path, bundle: &Path) -> anyhow::Result<(f64, f64)> {
    /// Per round: some seconds at most.
    const TIMES: u16 = 300;
    let engine = Engine::load(&Bundle::open(bundle)?)?;
    let scene = SceneConfig::default();
    let mut inputs = Vec::new();
    for frame in 0..20 {
        let (picture, _) = draw(&scene, frame);
        let (width, height) = picture.dimensions();
        inputs.push(engine.tensor(&Picture::from_rgb(width, height, picture.into_raw())?)?);
    }
    let (mut bare, mut whole) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let start = Instant::now();
        for input in inputs.iter().cycle().take(usize::from(TIMES)) {
            engine.bare_run(input)?;
        }
        bare.push(start.elapsed().as_secs_f64() * 1_000.0 / f64::from(TIMES));
        let outbox = dir.join(format!("outbox{round}"));
        let taken = durable(
            &engine,
            inputs.iter().cycle().take(usize::from(TIMES)),
            &outbox,
        )?;
        whole.push(taken.as_secs_f64() * 1_000.0 / f64::from(TIMES));
    }
    Ok((median(bare), median(whole)))
}

/// As on the device: one thread infers, one owns the outbox and commits what has come in the meantime.
fn durable<'a>(
    engine: &Engine,
    inputs: impl Iterator<Item = &'a Input>,
    outbox: &Path,
) -> anyhow::Result<Duration> {
    let outbox = Outbox::open(Options::new(outbox, 256 << 20))?.outbox;
    let (to_store, commands) = mpsc::channel(256);
    let (to_uplink, mut stored) = mpsc::channel(16);
    let store = Store::new(
        "d1".parse()?,
        outbox,
        Default::default(),
        to_uplink,
        Counters::default(),
    );
    let model: Arc<str> = engine.id().into();
    let start = Instant::now();
    let (sent, made) = std::thread::scope(|threads| {
        threads.spawn(|| store.run(commands));
        // The uplink's place.
        let uplink = threads.spawn(move || {
            let mut made = 0;
            while let Some(said) = stored.blocking_recv() {
                if let Stored::Appended(readings) = said {
                    made += readings.len();
                }
            }
            made
        });
        let infer = || -> anyhow::Result<usize> {
            let mut sent = 0;
            for input in inputs {
                let outcome = engine.run(input)?;
                let draft = Draft {
                    source: "cam0".parse()?,
                    frame: sent as u64,
                    ts: 0,
                    label: outcome.label,
                    score: outcome.score,
                    margin: outcome.margin,
                    model: model.clone(),
                    latency_ms: 0.0,
                    file: None,
                    truth: None,
                    answered: None,
                };
                to_store.blocking_send(Command::Append(draft))?;
                sent += 1;
            }
            Ok(sent)
        };
        let sent = infer();
        drop(to_store);
        (sent, uplink.join().unwrap_or(0))
    });
    anyhow::ensure!(sent? == made, "not everything became durable");
    Ok(start.elapsed())
}

//! `hostile`: how long honest devices and an honest API client wait while somebody abuses the coordinator's doors, against how long
//! they wait without. A round takes some ten seconds for each abuse, eight minutes for all of them.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, bail};
use mesh_core::Ack;
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, PublishOptions, QoS};
use tokio::{
    process::Command,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    figures::{Goal, Results, median},
    ingest::reading,
};
use crate::{
    abuse::{self, Enemy},
    cli::BenchArgs,
    process::{Program, usage},
    site::{Plan, Site},
    way::Way,
};

/// How long the honest are watched, without and with each abuse.
const WATCHED: Duration = Duration::from_secs(4);
/// Between two readings, and between two requests.
const READING: Duration = Duration::from_millis(20);
const REQUEST: Duration = Duration::from_millis(40);
/// Between two strokes: the enemy shares the machine, and is not to win by taking its processors.
const PAUSE: Duration = Duration::from_millis(50);
/// Nothing honest takes longer, whatever goes on.
const BOUND: Duration = Duration::from_secs(60);
const MIB: f64 = 1_048_576.0;

/// What the honest waited, in milliseconds.
#[derive(Debug, Default)]
struct Waited {
    acks: Vec<f64>,
    answers: Vec<f64>,
}

fn p99(mut waited: Vec<f64>) -> f64 {
    waited.sort_by(f64::total_cmp);
    let at = waited.len() * 99 / 100;
    waited.get(at).copied().unwrap_or(f64::INFINITY)
}

/// A device that reports at a steady pace; each reading's way to its acknowledgement.
async fn device(mut options: MqttOptions, name: String, epoch: u64) -> anyhow::Result<Vec<f64>> {
    options.set_max_packet_size(1 << 16, 1 << 16);
    let (client, mut events) = AsyncClient::builder(options).capacity(256).build();
    let topic = format!("lacewing/v1/demo/{name}/cam0/result");
    let mut tick = interval(READING);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut sent, mut waited) = (Vec::new(), Vec::new());
    let mut ready: Option<Instant> = None;
    loop {
        let over = ready.is_some_and(|since| since.elapsed() >= WATCHED);
        if over && waited.len() == sent.len() {
            return Ok(waited);
        }
        tokio::select! {
            _ = tick.tick(), if ready.is_some() && !over => {
                let seq = sent.len() as u64 + 1;
                sent.push(Instant::now());
                let bytes = reading(&name, epoch, seq)?;
                client.try_publish(topic.as_str(), bytes, PublishOptions::new(QoS::AtLeastOnce))?;
            }
            event = events.poll() => match event.context("an honest device")? {
                Event::Incoming(Packet::ConnAck(_)) => {
                    client.try_subscribe(format!("lacewing/v1/demo/{name}/+/ack"), QoS::AtLeastOnce)?;
                }
                Event::Incoming(Packet::SubAck(_)) => ready = Some(Instant::now()),
                Event::Incoming(Packet::Publish(message)) => {
                    let ack = Ack::decode(&message.payload)?;
                    let upto = usize::try_from(ack.upto)?.min(sent.len());
                    if ack.epoch == epoch && upto > waited.len() {
                        let now = Instant::now();
                        let newly = sent.get(waited.len()..upto).unwrap_or_default();
                        let newly: Vec<f64> = newly.iter().map(|at| (now - *at).as_secs_f64() * 1_000.0).collect();
                        waited.extend(newly);
                    }
                }
                _ => {}
            },
        }
    }
}

/// Somebody who looks at the devices, again and again.
#[expect(
    clippy::disallowed_methods,
    reason = "a blocking client has nothing else to wait on"
)]
fn client(way: &Way) -> anyhow::Result<Vec<f64>> {
    let agent = way.client(BOUND)?;
    let url = format!("{}/api/v1/devices", way.console());
    let mut waited = Vec::new();
    let mut slept = Duration::ZERO;
    while slept < WATCHED {
        let before = Instant::now();
        let mut answer = way.ask(|token| agent.get(&url).header("authorization", token).call())?;
        if !answer.status().is_success() {
            bail!("an honest client is answered {}", answer.status());
        }
        answer.body_mut().read_to_string()?;
        let took = before.elapsed();
        waited.push(took.as_secs_f64() * 1_000.0);
        std::thread::sleep(REQUEST);
        slept += REQUEST + took;
    }
    Ok(waited)
}

/// Both, for a while.
async fn watch(site: &Site, options: &MqttOptions, epoch: u64) -> anyhow::Result<Waited> {
    let way = site.way().clone();
    let asks = tokio::task::spawn_blocking(move || client(&way));
    let reports = device(options.clone(), "d1".into(), epoch);
    let acks = timeout(BOUND, reports)
        .await
        .context("an honest device waits for ever")??;
    Ok(Waited {
        acks,
        answers: asks.await??,
    })
}

/// In turns, without and with each abuse.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    abuse::make_room()?;
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let program = Program::current()?;
    let mut plan = Plan::new(program.clone(), dir.path().to_owned(), Default::default());
    plan.agents = 1;
    // It lends its identity to the honest device, and never runs.
    plan.spawn = false;
    let mut site = Site::start(&plan).await?;
    let honest = site.devices.first().context("there is no device")?;
    let done = Command::new(&program.0)
        .args(["edge-agent", "enrol", "--config"])
        .arg(honest.config())
        .output()
        .await?;
    anyhow::ensure!(
        done.status.success(),
        "enrolling: {}",
        String::from_utf8_lossy(&done.stdout)
    );
    let badge = honest.file.data.join("identity");
    let mut options = MqttOptions::new(
        "demo/d1",
        (site.mqtt().ip().to_string(), site.mqtt().port()),
    );
    options.set_transport(site.way().transport(Some(&badge))?);
    let enemy = Arc::new(Enemy::of(&site, &program).await?);
    let pid = site.coordinator.pid().context("the coordinator")?;
    let rest = usage(pid)?.rss as f64;
    let mut epoch = 0;
    let mut next = || {
        epoch += 1;
        epoch
    };
    // The first readings make the device known.
    watch(&site, &options, next()).await?;
    for abuse in abuse::all() {
        let (mut acks, mut answers) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for _ in 0..args.rounds {
            let quiet = watch(&site, &options, next()).await?;
            let stop = CancellationToken::new();
            let (enemy, stopped) = (enemy.clone(), stop.clone());
            let strokes = tokio::spawn(async move {
                let mut count = 0_u64;
                while !stopped.is_cancelled() {
                    let stroke = tokio::select! {
                        () = stopped.cancelled() => break,
                        done = abuse.strike(&enemy) => done,
                    };
                    // Being thrown out is what it is about.
                    if let Err(error) = stroke {
                        tracing::debug!("{error:#}");
                    }
                    count += 1;
                    sleep(PAUSE).await;
                }
                count
            });
            let abused = watch(&site, &options, next()).await;
            stop.cancel();
            strokes.await?;
            let abused = abused.with_context(|| format!("beside {abuse:?}"))?;
            site.check()?;
            for (n, waited) in [quiet, abused].into_iter().enumerate() {
                acks[n].push(p99(waited.acks));
                answers[n].push(p99(waited.answers));
            }
        }
        let [quiet, abused] = acks.map(median);
        println!("{abuse:?}: a reading {abused:.0} ms, without it {quiet:.0} ms");
        for (what, [quiet, abused]) in [
            ("reading", [quiet, abused]),
            ("request", answers.map(median)),
        ] {
            results.add(
                &format!("{what}, 99 of 100 within, beside {abuse:?}"),
                abused,
                "ms",
                Some(quiet),
                Goal::RatioAtMost(2.0),
            );
        }
    }
    let most = usage(pid)?.peak_rss as f64;
    site.stop().await?;
    results.add(
        "memory of the coordinator, the most",
        most / MIB,
        "MiB",
        Some(rest / MIB),
        Goal::AtMost(320.0),
    );
    Ok(())
}

//! `ingest`: what one coordinator takes in, against mosquitto and a consumer that writes to SQLite.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context, bail};
use mesh_core::{Ack, Reading};
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, PublishOptions, QoS};
use tokio::{task::JoinSet, time::Instant};

use super::{
    figures::{Goal, Results, median},
    peer::{Peer, number},
};
use crate::{
    cli::BenchArgs,
    process::{Program, usage},
    site::{Plan, Site},
    witness::Witness,
};

/// Devices that report at once.
pub(super) const DEVICES: u64 = 4;
/// Readings of each per round.
pub(super) const EACH: u64 = 10_000;
/// Rounds before the first that counts: they fill the coordinator's page cache, which is bounded.
const WARM: u64 = 5;
/// Readings of one device without an acknowledgement: what an agent's own pace allows in a burst.
const WINDOW: u64 = 500;
/// How long a round may take.
const BOUND: Duration = Duration::from_secs(300);
const MIB: f64 = 1_048_576.0;

/// In turns with the Python consumer.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let mut plan = Plan::new(
        Program::current()?,
        dir.path().join("ours"),
        Default::default(),
    );
    plan.agents = 0;
    // As the peer does: plain text on loopback.
    plan.tls = false;
    // One coordinator for all rounds: its memory must not grow with what it has seen.
    let mut site = Site::start(&plan).await?;
    let pid = site.coordinator.pid().context("the coordinator")?;
    let mut witness = site.witness(Default::default());
    let (mut rates, mut peer_rates, mut delays, mut memory) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..WARM {
        tokio::time::timeout(BOUND, load(&senders(site.mqtt()), round, true))
            .await
            .context("the load")??;
    }
    let warm = usage(pid)?.rss as f64;
    for round in WARM..WARM + u64::from(args.rounds) {
        let before = usage(pid)?.cpu_s;
        let devices = senders(site.mqtt());
        let load = load(&devices, round, true);
        delays.extend(
            tokio::time::timeout(BOUND, load)
                .await
                .context("the load")??,
        );
        wait_for(&mut witness, (round + 1) * DEVICES * EACH).await?;
        let used = usage(pid)?;
        let rate = (DEVICES * EACH) as f64 / (used.cpu_s - before);
        let (peer_rate, peer_rss) = peer_round(dir.path(), round).await?;
        println!(
            "round {}: {rate:.0} readings per CPU second in {:.0} MiB, the peer {peer_rate:.0} in {:.0} MiB",
            round + 1 - WARM,
            used.rss as f64 / MIB,
            peer_rss / MIB
        );
        rates.push(rate);
        peer_rates.push(peer_rate);
        memory.push(used.rss as f64);
    }
    site.stop().await?;
    delays.sort();
    let p99 = delays
        .get(delays.len() * 99 / 100)
        .copied()
        .unwrap_or_default();
    results.add(
        "durable readings per CPU second, broker included",
        median(rates),
        "1/s",
        Some(median(peer_rates)),
        Goal::RatioAtLeast(3.0),
    );
    results.add(
        "acknowledgement under load, 99 of 100 within",
        p99.as_secs_f64() * 1_000.0,
        "ms",
        None,
        Goal::AtMost(1_000.0),
    );
    let most = memory.into_iter().fold(warm, f64::max);
    results.add(
        "resident memory, the most",
        most / MIB,
        "MiB",
        None,
        Goal::None,
    );
    let grown = "resident memory, the most ÷ when its cache was full";
    results.add(grown, most / warm, "", None, Goal::AtMost(1.15));
    Ok(())
}

async fn wait_for(witness: &mut Witness, stored: u64) -> anyhow::Result<()> {
    let end = Instant::now() + BOUND;
    while witness.look().await?.total().stored < stored {
        anyhow::ensure!(
            Instant::now() < end,
            "not everything was stored in {BOUND:?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// One round of mosquitto and the consumer. Readings per CPU second of both together, and their memory.
async fn peer_round(dir: &Path, round: u64) -> anyhow::Result<(f64, f64)> {
    let root = dir.join(format!("peer{round}"));
    std::fs::create_dir_all(&root)?;
    let address = crate::broker::free_port()?;
    let mut broker = crate::broker::forgetful(&Program::current()?, &root, address)?;
    broker.start()?;
    if !crate::broker::answers(address, BOUND).await {
        bail!("mosquitto does not start:\n{}", broker.last_words());
    }
    let total = DEVICES * EACH;
    let (at, database, until) = (address.to_string(), root.join("peer.db"), total.to_string());
    let args = [
        "--broker".into(),
        at.into(),
        "--db".into(),
        database.into(),
        "--until".into(),
        until.into(),
    ];
    let mut peer = Peer::start("ingest.py", args)?;
    let ready = peer.line().await?;
    anyhow::ensure!(ready == "ready", "the peer said {ready:?}");
    let broker_pid = broker.pid().context("mosquitto")?;
    let (broker_before, peer_before) = (usage(broker_pid)?, usage(peer.pid())?);
    tokio::time::timeout(BOUND, load(&senders(address), round, false))
        .await
        .context("the load")??;
    let said = tokio::time::timeout(BOUND, peer.says()).await??;
    let broker_after = usage(broker_pid)?;
    peer.end().await?;
    broker.stop(Duration::from_secs(10)).await?;
    let cpu =
        number(&said, "cpu_s")? - peer_before.cpu_s + broker_after.cpu_s - broker_before.cpu_s;
    let rss = number(&said, "rss_bytes")? + broker_after.peak_rss as f64;
    Ok((total as f64 / cpu, rss))
}

/// One device that reports.
#[derive(Clone)]
pub(super) struct Sender {
    pub(super) site: String,
    pub(super) device: String,
    /// How it comes in.
    pub(super) options: MqttOptions,
}

/// All of them in the clear, where everybody is believed.
fn senders(mqtt: SocketAddr) -> Vec<Sender> {
    let sender = |n: u64| {
        let (site, device) = ("bench".to_owned(), format!("d{n}"));
        let id = format!("{site}/{device}");
        let options = MqttOptions::new(id, (mqtt.ip().to_string(), mqtt.port()));
        Sender {
            site,
            device,
            options,
        }
    };
    (1..=DEVICES).map(sender).collect()
}

/// Lets all devices report at once, each in an epoch of its own per round. Says how long each
/// acknowledgement took, where there are any.
pub(super) async fn load(
    senders: &[Sender],
    round: u64,
    acknowledged: bool,
) -> anyhow::Result<Vec<Duration>> {
    let mut devices = JoinSet::new();
    for sender in senders {
        devices.spawn(report(sender.clone(), round + 1, acknowledged));
    }
    let mut delays = Vec::new();
    while let Some(device) = devices.join_next().await {
        delays.extend(device??);
    }
    Ok(delays)
}

/// One device: sends as long as not too much is unanswered, by the coordinator or else by the broker.
async fn report(sender: Sender, epoch: u64, acknowledged: bool) -> anyhow::Result<Vec<Duration>> {
    let Sender {
        site,
        device: name,
        mut options,
    } = sender;
    options
        .set_inflight(100)
        .set_max_packet_size(1 << 16, 1 << 16);
    let (client, mut events) = AsyncClient::builder(options).capacity(64).build();
    let topic = format!("lacewing/v1/{site}/{name}/cam0/result");
    let (mut next, mut queued, mut answered, mut ready) = (1, 0, 0, false);
    let mut sent: Vec<Instant> = Vec::new();
    let mut delays = Vec::new();
    while answered < EACH {
        // The client's own queue is kept short, so that a reading counts as sent about when it is.
        while ready && next <= EACH && next - answered <= WINDOW && queued < 32 {
            let bytes = reading(&name, epoch, next)?;
            if client
                .try_publish(topic.as_str(), bytes, PublishOptions::new(QoS::AtLeastOnce))
                .is_err()
            {
                break;
            }
            sent.push(Instant::now());
            next += 1;
            queued += 1;
        }
        match events.poll().await.context("the load's connection")? {
            Event::Incoming(Packet::ConnAck(_)) => {
                client
                    .try_subscribe(format!("lacewing/v1/{site}/{name}/+/ack"), QoS::AtLeastOnce)?;
            }
            Event::Incoming(Packet::SubAck(_)) => ready = true,
            Event::Incoming(Packet::PubAck(_)) => {
                queued -= 1;
                answered += u64::from(!acknowledged);
            }
            Event::Incoming(Packet::Publish(message)) => {
                let ack = Ack::decode(&message.payload)?;
                if acknowledged && ack.epoch == epoch && ack.upto > answered {
                    let now = Instant::now();
                    let newly = sent.get(usize::try_from(answered)?..usize::try_from(ack.upto)?);
                    delays.extend(newly.unwrap_or_default().iter().map(|at| now - *at));
                    answered = ack.upto;
                }
            }
            _ => {}
        }
    }
    client.disconnect().await?;
    Ok(delays)
}

pub(super) fn reading(device: &str, epoch: u64, seq: u64) -> anyhow::Result<Vec<u8>> {
    let reading = Reading {
        v: mesh_core::VERSION,
        device: device.parse()?,
        source: "cam0".parse()?,
        epoch,
        seq,
        ts: 1_800_000_000_000 + i64::try_from(seq)?,
        // Distinct over all epochs, as a device that lost its outbox would count on.
        frame: epoch * EACH + seq,
        label: "scratch".into(),
        score: 0.9731,
        margin: 0.8412,
        model: "conveyor@1.0.0".into(),
        latency_ms: 4.31,
        by: None,
        file: None,
        truth: Some("scratch".into()),
    };
    Ok(reading.encode()?)
}

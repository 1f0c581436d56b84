//! `tls`: what encryption and identities cost, from the device to the acknowledgement, against plain text on loopback.

use std::time::Duration;

use anyhow::{Context, bail};
use rumqttc::{AsyncClient, Event, MqttOptions, Packet};
use tokio::{process::Command, time::Instant};

use super::{
    figures::{Goal, Results, median},
    ingest::{DEVICES, EACH, Sender, load},
};
use crate::{
    cli::BenchArgs,
    process::{Program, usage},
    site::{Plan, Site},
};

/// Rounds before the first that counts: caches fill.
const WARM: u64 = 2;
/// How long a round may take.
const BOUND: Duration = Duration::from_secs(300);
/// Connections of which the cost of one is measured.
const CONNECTIONS: u32 = 200;
const MILLI: f64 = 1_000.0;

/// One of the two ways, and what was measured on it.
struct Lane {
    site: Site,
    senders: Vec<Sender>,
    rates: Vec<f64>,
    /// CPU seconds of the coordinator, and of the devices, for 1,000 readings.
    coordinator: Vec<f64>,
    devices: Vec<f64>,
    /// The same for one connection, in milliseconds.
    connection: Vec<f64>,
}

impl Lane {
    async fn open(root: &std::path::Path, tls: bool) -> anyhow::Result<Self> {
        let name = if tls { "tls" } else { "plain" };
        let program = Program::current()?;
        let mut plan = Plan::new(program.clone(), root.join(name), Default::default());
        plan.tls = tls;
        plan.agents = usize::try_from(DEVICES)?;
        // They lend their identities to the load, and never run.
        plan.spawn = false;
        let site = Site::start(&plan).await?;
        let mut senders = Vec::new();
        for device in &site.devices {
            let mut options = MqttOptions::new(
                format!("{}/{}", device.file.site, device.name),
                (site.mqtt().ip().to_string(), site.mqtt().port()),
            );
            if tls {
                let done = Command::new(&program.0)
                    .args(["edge-agent", "enrol", "--config"])
                    .arg(device.config())
                    .output()
                    .await?;
                if !done.status.success() {
                    bail!("enrolling: {}", String::from_utf8_lossy(&done.stdout));
                }
                let badge = device.file.data.join("identity");
                options.set_transport(site.way().transport(Some(&badge))?);
            }
            senders.push(Sender {
                site: device.file.site.clone(),
                device: device.name.clone(),
                options,
            });
        }
        Ok(Self {
            site,
            senders,
            rates: Vec::new(),
            coordinator: Vec::new(),
            devices: Vec::new(),
            connection: Vec::new(),
        })
    }

    async fn round(&mut self, round: u64, counts: bool) -> anyhow::Result<f64> {
        let pid = self.site.coordinator.pid().context("the coordinator")?;
        let (before, own) = (usage(pid)?.cpu_s, own_cpu_s()?);
        let start = Instant::now();
        tokio::time::timeout(BOUND, load(&self.senders, round, true))
            .await
            .context("the load")??;
        let took = start.elapsed().as_secs_f64();
        let thousands = (DEVICES * EACH) as f64 / 1_000.0;
        let rate = (DEVICES * EACH) as f64 / took;
        if counts {
            self.rates.push(rate);
            self.coordinator
                .push((usage(pid)?.cpu_s - before) / thousands);
            self.devices.push((own_cpu_s()? - own) / thousands);
        }
        Ok(rate)
    }

    /// What it costs the coordinator to let one device in.
    async fn connect(&mut self) -> anyhow::Result<()> {
        let pid = self.site.coordinator.pid().context("the coordinator")?;
        let before = usage(pid)?.cpu_s;
        let sender = self.senders.first().context("there is no device")?;
        for _ in 0..CONNECTIONS {
            let (client, mut events) = AsyncClient::builder(sender.options.clone())
                .capacity(1)
                .build();
            loop {
                if let Event::Incoming(Packet::ConnAck(_)) = events.poll().await? {
                    break;
                }
            }
            drop(client);
        }
        let used = usage(pid)?.cpu_s - before;
        self.connection.push(used * MILLI / f64::from(CONNECTIONS));
        Ok(())
    }
}

/// CPU seconds of this process alone: here the devices are.
fn own_cpu_s() -> anyhow::Result<f64> {
    Ok(crate::process::own_usage(std::process::id())?.cpu_s)
}

/// In turns, TLS and plain text.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let mut lanes = [
        Lane::open(dir.path(), true).await?,
        Lane::open(dir.path(), false).await?,
    ];
    for round in 0..WARM + u64::from(args.rounds) {
        let counts = round >= WARM;
        let mut rates = Vec::new();
        for lane in &mut lanes {
            rates.push(lane.round(round, counts).await?);
            if counts {
                lane.connect().await?;
            }
        }
        println!(
            "round {}: {:.0} readings/s with TLS, {:.0} without",
            round + 1,
            rates[0],
            rates[1]
        );
    }
    let [mut tls, mut plain] = lanes;
    tls.site.stop().await?;
    plain.site.stop().await?;
    let micro = |thousand: Vec<f64>| median(thousand) * MILLI;
    results.add(
        "readings per second, device to acknowledgement",
        median(tls.rates),
        "1/s",
        Some(median(plain.rates)),
        Goal::RatioAtLeast(0.75),
    );
    results.add(
        "CPU of the coordinator per reading",
        micro(tls.coordinator),
        "µs",
        Some(micro(plain.coordinator)),
        Goal::None,
    );
    results.add(
        "CPU of the devices per reading",
        micro(tls.devices),
        "µs",
        Some(micro(plain.devices)),
        Goal::None,
    );
    results.add(
        "CPU of the coordinator per connection",
        median(tls.connection),
        "ms",
        Some(median(plain.connection)),
        Goal::None,
    );
    Ok(())
}

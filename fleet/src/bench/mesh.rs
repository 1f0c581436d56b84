//! `mesh`: what it costs that the devices of a site know each other: how soon they do, connections, memory, and traffic at rest.

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use anyhow::{Context, bail};
use edge_agent::mesh::{Status, status_of};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

use super::figures::{Goal, Results, median};
use crate::{
    cli::BenchArgs,
    process::{Program, usage},
    site::{Camera, Plan, Site},
};

/// Sites of so many devices.
const SIZES: [usize; 3] = [10, 50, 200];
/// A site that starts anew, all at once, and whose memory is compared with one without a mesh.
const JOINING: usize = 20;
/// Times that it starts anew.
const JOINS: u32 = 3;
/// Devices of a large site start so many at a time: all of them share this machine's processors, as no real site does.
const AT_ONCE: usize = 10;
/// Until those that were started have enrolled and met.
const MEET: Duration = Duration::from_secs(120);
/// Then what there was to say has been said, …
const CALM: Duration = Duration::from_secs(30);
/// … and the machine's load, which each device tells the others, is down to this, …
const AT_REST: f64 = 0.4;
/// … or will not come down further; and what there was to say of it has been said.
const REST_BEFORE: Duration = Duration::from_secs(300);
const SAID: Duration = Duration::from_secs(65);
/// Traffic is counted so long.
const REST: Duration = Duration::from_secs(60);
/// Between two looks, for each pair of devices, for that is what a look reads: 50 ms at 20 devices.
const LOOK_EACH: Duration = Duration::from_micros(125);
const MIB: f64 = 1_048_576.0;

pub(crate) async fn run(_: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let (mut alone, mut meshed) = (Vec::new(), Vec::new());
    join(&mut alone, &mut meshed, results).await?;
    results.add(
        "resident memory that the mesh adds",
        median(meshed) - median(alone),
        "MiB",
        None,
        Goal::AtMost(12.0),
    );
    let mut rates = Vec::new();
    // Devices without a mesh do not know of one another: it is the same for each in a site of any size.
    let without = at_rest(JOINING, false).await?;
    for devices in SIZES {
        let with = at_rest(devices, true).await?;
        let kbit_s = with - without;
        println!(
            "{devices} devices: {kbit_s:.2} kbit/s each for the mesh ({with:.2} in all, {without:.2} without it)"
        );
        results.add(
            &format!("traffic at rest for each of {devices} devices, all headers"),
            kbit_s,
            "kbit/s",
            None,
            Goal::AtMost(1.0),
        );
        rates.push(kbit_s);
    }
    if let [least, .., most] = rates.as_slice() {
        // ln 200 / ln 10.
        let growth = (SIZES.map(|n| (n as f64).ln())).into_iter();
        let logarithm = growth.clone().fold(0.0, f64::max) / growth.fold(f64::MAX, f64::min);
        results.add(
            "… of the largest site against the smallest (logarithm of devices)",
            *most,
            "kbit/s",
            Some(*least),
            Goal::RatioAtMost(logarithm),
        );
    }
    Ok(())
}

pub(super) fn plan(dir: &tempfile::TempDir, devices: usize, mesh: bool) -> anyhow::Result<Plan> {
    let mut plan = Plan::new(Program::current()?, dir.path().to_owned(), "".into());
    plan.bundle = None;
    plan.camera = Camera::None;
    plan.agents = devices;
    plan.mesh = mesh;
    Ok(plan)
}

/// What each device says of its neighbours; of those whose mesh runs.
pub(super) async fn statuses(site: &Site) -> anyhow::Result<Vec<Status>> {
    let folders: Vec<_> = site.devices.iter().map(|d| d.file.data.clone()).collect();
    let asked = spawn_blocking(move || folders.iter().flat_map(|data| status_of(data)).collect());
    Ok(asked.await?)
}

pub(super) fn here(status: &Status) -> usize {
    status.neighbours.iter().filter(|n| n.here).count()
}

/// Until all know all. How long all of them have run then, and how long it took in all.
pub(super) async fn all_met(site: &mut Site) -> anyhow::Result<(Duration, Duration)> {
    some_met(site, site.devices.len()).await
}

/// The same of the first `count`, while the others are not there yet.
async fn some_met(site: &mut Site, count: usize) -> anyhow::Result<(Duration, Duration)> {
    let begun = Instant::now();
    let mut all_run = None;
    loop {
        let all = statuses(site).await?;
        if all.len() == count {
            let since = *all_run.get_or_insert_with(Instant::now);
            if all.iter().all(|status| here(status) == count - 1) {
                return Ok((since.elapsed(), begun.elapsed()));
            }
        }
        site.check()?;
        if begun.elapsed() > MEET {
            let seen: Vec<_> = all.iter().map(here).collect();
            bail!("not all know all after {MEET:?}: {seen:?}");
        }
        sleep(LOOK_EACH * u32::try_from(count * count)?).await;
    }
}

fn memory(site: &Site) -> anyhow::Result<Vec<f64>> {
    let one = |device: &crate::site::Device| {
        let pid = device.agent.pid().context("a device has ended")?;
        Ok(usage(pid)?.rss as f64 / MIB)
    };
    site.devices.iter().map(one).collect()
}

/// A site that knows itself from before and starts anew; and the same without a mesh, for its memory.
async fn join(
    alone: &mut Vec<f64>,
    meshed: &mut Vec<f64>,
    results: &mut Results,
) -> anyhow::Result<()> {
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let mut site = Site::start(&plan(&dir, JOINING, false)?).await?;
    sleep(CALM).await;
    alone.extend(memory(&site)?);
    site.stop().await?;
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let mut site = Site::start(&plan(&dir, JOINING, true)?).await?;
    all_met(&mut site).await?;
    sleep(CALM).await;
    meshed.extend(memory(&site)?);
    one_connection_each(&site, results).await?;
    let (mut running, mut all) = (Vec::new(), Vec::new());
    for _ in 0..JOINS {
        for device in &mut site.devices {
            device.agent.kill().await?;
        }
        for device in &mut site.devices {
            device.agent.start()?;
        }
        let (since, whole) = all_met(&mut site).await?;
        println!(
            "{JOINING} devices start at once: all know all {:.2} s later, {:.2} s after the last one's mesh ran",
            whole.as_secs_f64(),
            since.as_secs_f64()
        );
        running.push(since.as_secs_f64());
        all.push(whole.as_secs_f64());
    }
    results.add(
        "20 devices that know each other from before, all killed and started: until all know all",
        median(all),
        "s",
        None,
        Goal::None,
    );
    results.add(
        "… from when the last one's mesh ran",
        median(running),
        "s",
        None,
        Goal::AtMost(2.0),
    );
    site.stop().await?;
    Ok(())
}

/// Connections between the devices' own ports, against pairs that say they are linked.
async fn one_connection_each(site: &Site, results: &mut Results) -> anyhow::Result<()> {
    let mut pairs = HashSet::new();
    let mut most = 0;
    for status in statuses(site).await? {
        let me = status.device.clone().unwrap_or_default();
        let linked = status.neighbours.iter().filter(|n| n.linked);
        let names: Vec<_> = linked.map(|n| n.device.clone()).collect();
        most = most.max(names.len());
        for name in names {
            let mut pair = [me.clone(), name];
            pair.sort_unstable();
            pairs.insert(pair);
        }
    }
    let ports = site.devices.iter().map(|d| d.file.mesh.listen.port());
    let connections = established(&ports.collect(), &std::fs::read_to_string("/proc/net/tcp")?);
    results.add("most links of one of 20", most as f64, "", None, Goal::None);
    results.add(
        "connections between 20, against pairs that are linked",
        connections as f64,
        "",
        Some(pairs.len() as f64),
        Goal::RatioAtMost(1.0),
    );
    Ok(())
}

/// Connections that one of these local ports has accepted and that stand, in the words of `/proc/net/tcp` (proc(5)).
fn established(ports: &BTreeSet<u16>, table: &str) -> usize {
    const ESTABLISHED: &str = "01";
    let accepted = table.lines().skip(1).filter(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let port = fields.next().and_then(|at| at.rsplit(':').next());
        let port = port.and_then(|hex| u16::from_str_radix(hex, 16).ok());
        let state = fields.nth(1);
        port.is_some_and(|port| ports.contains(&port)) && state == Some(ESTABLISHED)
    });
    accepted.count()
}

/// Bits per second over the loopback interface for each device, in thousands: nothing else may use it meanwhile.
async fn at_rest(devices: usize, mesh: bool) -> anyhow::Result<f64> {
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let mut plan = plan(&dir, devices, mesh)?;
    plan.spawn = false;
    let mut site = Site::start(&plan).await?;
    for begin in (0..devices).step_by(AT_ONCE) {
        let end = devices.min(begin + AT_ONCE);
        let mut next = site.devices.get_mut(begin..end).into_iter().flatten();
        next.try_for_each(|device| device.agent.start())?;
        if mesh {
            let (_, took) = some_met(&mut site, end).await?;
            println!(
                "{end} devices know each other {:.1} s after the last {AT_ONCE} began",
                took.as_secs_f64()
            );
        } else {
            sleep(CALM / 10).await;
        }
    }
    let patience = Instant::now() + REST_BEFORE;
    while load()? > AT_REST && Instant::now() < patience {
        sleep(CALM / 10).await;
    }
    sleep(SAID).await;
    let before = loopback()?;
    let start = Instant::now();
    sleep(REST).await;
    let bits = (loopback()? - before) as f64 * 8.0;
    let rate = bits / start.elapsed().as_secs_f64() / devices as f64 / 1_000.0;
    site.check()?;
    site.stop().await?;
    Ok(rate)
}

/// The kernel's average of the last minute, in processors.
fn load() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    let minute = text.split(' ').next().unwrap_or_default();
    minute.parse().context("/proc/loadavg")
}

/// Bytes that the loopback interface has carried, with all headers.
fn loopback() -> anyhow::Result<u64> {
    let table = std::fs::read_to_string("/proc/net/dev")?;
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix("lo:"));
    let bytes = line.and_then(|line| line.split_whitespace().next());
    let bytes = bytes.context("there is no loopback interface in /proc/net/dev")?;
    Ok(bytes.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_counted_once_and_only_those_that_stand() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n\
            0: 0100007F:1D31 0100007F:9C40 01 00000000:00000000\n\
            1: 0100007F:9C40 0100007F:1D31 01 00000000:00000000\n\
            2: 0100007F:1D31 00000000:0000 0A 00000000:00000000\n\
            3: 0100007F:1D31 0100007F:9C44 06 00000000:00000000\n";
        assert_eq!(established(&[7473].into(), table), 1);
        assert_eq!(established(&[80].into(), table), 0);
    }
}

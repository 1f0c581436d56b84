//! `outbox`: how fast readings become durable, what they take on disk, and how fast it opens.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use anyhow::Context;
use edge_agent::outbox::{Options, Outbox, directory_bytes};
use mesh_core::{RangeSet, Reading};
use serde_json::{Value, json};
use tokio::{process::Command, time::Instant};

use super::{
    figures::{Goal, Results, median},
    peer::{Peer, number},
};
use crate::{cli::BenchArgs, dice::Dice, process::usage};

/// The hidden part that loads an outbox, in a process of its own so that its memory is its own.
pub(crate) const OUTBOX_LOAD: &str = "outbox-load";
/// As the promise says.
const RECORDS: u64 = 100_000;
/// Readings that become durable together.
const GROUP: usize = 100;

/// Fills and drains an outbox, in turns with SQLite.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let records = dir.path().join("records");
    write_records(&records)?;
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    let mut said = Vec::new();
    for round in 0..args.rounds {
        let program = std::env::current_exe()?;
        let output = Command::new(program)
            .arg(OUTBOX_LOAD)
            .args([&records, &dir.path().join(format!("outbox{round}"))])
            .stderr(Stdio::inherit())
            .output()
            .await?;
        anyhow::ensure!(output.status.success(), "loading the outbox failed");
        let report: Value = serde_json::from_slice(&output.stdout)?;
        ours.push(number(&report, "per_s")?);
        said.push(report);

        let database = dir.path().join(format!("peer{round}"));
        let peer_args = [
            records.clone().into(),
            database.into(),
            GROUP.to_string().into(),
        ];
        let mut peer = Peer::start("outbox.py", peer_args)?;
        peers.push(number(&peer.says().await?, "per_s")?);
        peer.end().await?;
        println!(
            "round {}: {:.0}/s, SQLite {:.0}/s",
            round + 1,
            ours.last().unwrap_or(&0.0),
            peers.last().unwrap_or(&0.0)
        );
    }
    let of = |key: &str| -> anyhow::Result<f64> {
        Ok(median(
            said.iter()
                .map(|r| number(r, key))
                .collect::<Result<_, _>>()?,
        ))
    };
    let mib = f64::from(1 << 20);
    results.add(
        "readings made durable, 100 at a time",
        median(ours),
        "1/s",
        Some(median(peers)),
        Goal::RatioAtLeast(1.0),
    );
    results.add(
        "directory with 100,000 readings",
        of("peak")? / mib,
        "MiB",
        None,
        Goal::None,
    );
    results.add(
        "directory after the drain, part of its peak",
        of("left")? / of("peak")? * 100.0,
        "%",
        None,
        Goal::AtMost(2.0),
    );
    results.add(
        "opening with 100,000 pending",
        of("open_ms")?,
        "ms",
        None,
        Goal::AtMost(300.0),
    );
    results.add(
        "resident memory added",
        of("rss")? / mib,
        "MiB",
        None,
        Goal::AtMost(25.0),
    );
    results.add(
        "readings read and freed",
        of("drain_per_s")?,
        "1/s",
        None,
        Goal::None,
    );
    Ok(())
}

/// One encoded reading per line, about 400 bytes each, a good part of them as chance has it: the outbox
/// compresses.
fn write_records(to: &Path) -> anyhow::Result<()> {
    let mut text = Vec::new();
    let mut dice = Dice::new(1);
    let labels = ["scratches", "inclusion", "patches"];
    for seq in 1..=RECORDS {
        let reading = Reading {
            v: mesh_core::VERSION,
            device: "d1".parse()?,
            source: "cam0".parse()?,
            epoch: 77,
            seq,
            ts: 1_800_000_000_000 + i64::try_from(seq)? * 40 + i64::try_from(dice.below(9))?,
            frame: seq,
            label: labels[dice.below(labels.len())].into(),
            score: dice.below(1 << 20) as f32 / (1 << 20) as f32,
            margin: dice.below(1 << 20) as f32 / (1 << 20) as f32,
            model: "conveyor@1.0.0".into(),
            latency_ms: 4.0 + dice.below(1 << 20) as f32 / (1 << 20) as f32,
            by: None,
            file: Some(format!(
                "{:016x}{:016x}{:016x}{:016x}{}/image-{seq:09}.jpg",
                dice.any(),
                dice.any(),
                dice.any(),
                dice.any(),
                "-a-folder-with-a-rather-long-name".repeat(2)
            )),
            truth: Some(labels[dice.below(labels.len())].into()),
        };
        text.extend(reading.encode()?);
        text.push(b'\n');
    }
    std::fs::write(to, text).context("writing the records")
}

/// The hidden part: `outbox-load RECORDS DIR` prints what it measured as one line of JSON.
pub(crate) fn outbox_load(args: impl Iterator<Item = OsString>) -> ExitCode {
    let paths: Vec<PathBuf> = args.map(PathBuf::from).collect();
    let report = match paths.as_slice() {
        [records, dir] => load(records, dir),
        _ => Err(anyhow::anyhow!("outbox-load RECORDS DIR")),
    };
    match report {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("outbox-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(records: &Path, dir: &Path) -> anyhow::Result<Value> {
    /// More than all of it.
    const MAX_BYTES: u64 = 1 << 30;
    let text = std::fs::read(records)?;
    let lines: Vec<&[u8]> = text
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .collect();
    let me = std::process::id();
    let before = usage(me)?.rss;
    let start = Instant::now();
    let mut outbox = Outbox::open(Options::new(dir, MAX_BYTES))?.outbox;
    for group in lines.chunks(GROUP) {
        let mut records = group.iter();
        outbox.append(
            group.len(),
            |_| Ok::<_, std::io::Error>(records.next().map_or_else(Vec::new, |r| r.to_vec())),
            b"{}",
        )?;
    }
    let per_s = lines.len() as f64 / start.elapsed().as_secs_f64();
    let rss = usage(me)?.rss.saturating_sub(before);
    let peak = directory_bytes(dir);
    drop(outbox);

    let start = Instant::now();
    let opened = Outbox::open(Options::new(dir, MAX_BYTES))?;
    let open_ms = start.elapsed().as_secs_f64() * 1_000.0;
    let mut outbox = opened.outbox;
    anyhow::ensure!(
        outbox.pending() == lines.len() as u64,
        "the outbox lost something"
    );
    let start = Instant::now();
    let mut stored = RangeSet::new();
    while let Some((from, _)) = first_pending(&outbox, &stored, lines.len() as u64) {
        let batch = outbox.read(from, from + GROUP as u64 - 1, 192 * 1024)?;
        let last = batch
            .last()
            .context("the outbox holds what it does not give")?
            .0;
        stored.insert(1, last);
        outbox.free(&stored)?;
    }
    let drain_per_s = lines.len() as f64 / start.elapsed().as_secs_f64();
    let left = directory_bytes(dir);
    Ok(json!({
        "per_s": per_s, "rss": rss, "peak": peak, "open_ms": open_ms, "drain_per_s": drain_per_s, "left": left,
    }))
}

fn first_pending(outbox: &Outbox, stored: &RangeSet, last: u64) -> Option<(u64, u64)> {
    let from = stored.last().map_or(1, |l| l + 1);
    (outbox.pending() > 0 && from <= last).then_some((from, last))
}

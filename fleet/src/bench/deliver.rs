//! `deliver`: how much of a model travels when it has changed, and what it takes a device to put it together.

use std::{
    ffi::OsString,
    fs::File,
    io::{BufReader, BufWriter, Write},
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use anyhow::Context;
use models::{
    Digest,
    delta::{self, Wanted},
    digest_of,
};
use serde_json::{Value, json};
use tokio::{process::Command, time::Instant};

use super::{
    figures::{Goal, Results, median},
    peer::number,
    weights,
};
use crate::{
    cli::{BenchArgs, shipped_bundle},
    dice::Dice,
    process::usage,
};

/// The hidden part that applies a delta, in a process of its own so that its memory is its own.
pub(crate) const DELTA_APPLY: &str = "delta-apply";
/// Shipped models that have a head.
const BUNDLES: [&str; 2] = ["conveyor", "steel"];
/// Bytes of the large model: as many as a MobileNetV2 has.
const LARGE: usize = 13_000_000;
/// By so much of itself a training of all layers moves a weight at most: little, and much.
const SHARES: [(f32, &str); 2] = [(1e-3, "0.1 %"), (1e-2, "1 %")];
/// The same numbers each time, unless somebody wants others.
const SEED: u64 = 1;
/// What a delta of a new head may be of the file, and one of all weights, in percent.
const HEAD_PERCENT: f64 = 4.0;
const FULL_PERCENT: f64 = 50.0;
/// What applying one may take, in sizes of the model.
const TIMES: f64 = 2.0;

/// One version of a model, made from another.
struct Version {
    what: String,
    file: Vec<u8>,
    percent: f64,
}

/// Makes the deltas here, and applies them in processes of their own.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or(SEED);
    println!("seed {seed}");
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let mut models = Vec::new();
    for name in BUNDLES {
        let file = shipped_bundle(name)?.join("model.onnx");
        let file = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        models.push((name, file));
    }
    let (_, last) = models.last().context("no model")?;
    let large = weights::enlarged(last, LARGE)?;
    models.push(("large", large));

    let (mut right, mut made) = (0, 0);
    for (name, old) in &models {
        let mb = old.len() as f64 / 1e6;
        for version in versions(old, seed)? {
            let what = format!("{name} ({mb:.1} MB), {}", version.what);
            let delta = delta::make(old, &version.file)?;
            let percent = delta.len() as f64 / version.file.len() as f64 * 100.0;
            println!("{what}: {} bytes", delta.len());
            let files = Files::write(dir.path(), old, &delta, &version.file)?;
            let (mut ours, mut peers, mut memory) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..args.rounds {
                let report = files.apply().await?;
                ours.push(number(&report, "ms")?);
                peers.push(number(&report, "copy_ms")?);
                memory.push(number(&report, "memory")? / version.file.len() as f64);
                made += 1;
                right += u32::from(files.is_right()?);
            }
            results.add(
                &format!("{what}: of the file"),
                percent,
                "%",
                None,
                Goal::AtMost(version.percent),
            );
            results.add(
                "… applied in (peer: copied and hashed)",
                median(ours),
                "ms",
                Some(median(peers)),
                Goal::None,
            );
            results.add(
                "… memory, in sizes of the model",
                median(memory),
                "",
                None,
                Goal::AtMost(TIMES),
            );
        }
    }
    results.add(
        "results with the digest of the new file",
        f64::from(right),
        "",
        None,
        Goal::AtLeast(f64::from(made)),
    );
    Ok(())
}

/// The model with another head, and after trainings of all its layers.
fn versions(old: &[u8], seed: u64) -> anyhow::Result<Vec<Version>> {
    let mut dice = Dice::new(seed);
    let mut versions = vec![Version {
        what: "a new head".into(),
        file: weights::new_head(old, &mut dice)?,
        percent: HEAD_PERCENT,
    }];
    for (share, told) in SHARES {
        versions.push(Version {
            what: format!("all weights ±{told}"),
            file: weights::fine_tuned(old, share, &mut dice)?,
            percent: FULL_PERCENT,
        });
    }
    Ok(versions)
}

/// What a device has, what it gets, and what it makes of that.
struct Files {
    old: PathBuf,
    delta: PathBuf,
    made: PathBuf,
    wanted: Wanted,
}

impl Files {
    fn write(dir: &Path, old: &[u8], delta: &[u8], new: &[u8]) -> anyhow::Result<Self> {
        let files = Self {
            old: dir.join("old"),
            delta: dir.join("delta"),
            made: dir.join("made"),
            wanted: Wanted {
                length: new.len() as u64,
                sha256: digest_of(new),
            },
        };
        std::fs::write(&files.old, old)?;
        std::fs::write(&files.delta, delta)?;
        Ok(files)
    }

    async fn apply(&self) -> anyhow::Result<Value> {
        // What the round before has made proves nothing about this one.
        let _ = std::fs::remove_file(&self.made);
        let output = Command::new(std::env::current_exe()?)
            .arg(DELTA_APPLY)
            .args([&self.old, &self.delta, &self.made])
            .arg(self.wanted.length.to_string())
            .arg(self.wanted.sha256.to_string())
            .stderr(Stdio::inherit())
            .output()
            .await?;
        anyhow::ensure!(output.status.success(), "applying the delta failed");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn is_right(&self) -> anyhow::Result<bool> {
        let made = std::fs::read(&self.made)?;
        Ok(digest_of(&made) == self.wanted.sha256)
    }
}

/// The hidden part: `delta-apply OLD DELTA MADE LENGTH SHA256` prints what it measured as one line of JSON.
pub(crate) fn delta_apply(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.collect();
    let report = match args.as_slice() {
        [old, delta, made, length, sha256] => wanted(length, sha256)
            .and_then(|wanted| apply([old, delta, made].map(Path::new), &wanted)),
        _ => Err(anyhow::anyhow!("delta-apply OLD DELTA MADE LENGTH SHA256")),
    };
    match report {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("delta-apply: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn wanted(length: &OsString, sha256: &OsString) -> anyhow::Result<Wanted> {
    let sha256: Digest = sha256.to_string_lossy().parse()?;
    Ok(Wanted {
        length: length.to_string_lossy().parse()?,
        sha256,
    })
}

/// As the agent does it: the old file, the delta and the new file are streams. Neither that nor the copy waits for
/// the disk.
fn apply([old, delta, made]: [&Path; 3], wanted: &Wanted) -> anyhow::Result<Value> {
    let me = std::process::id();
    let before = usage(me)?.rss;
    let start = Instant::now();
    let delta = BufReader::new(File::open(delta)?);
    let mut new = BufWriter::new(File::create(made)?);
    delta::apply(&mut File::open(old)?, delta, wanted, &mut new)?;
    new.flush()?;
    let ms = start.elapsed().as_secs_f64() * 1_000.0;
    let memory = usage(me)?.peak_rss.saturating_sub(before);

    let start = Instant::now();
    let whole = std::fs::read(made)?;
    anyhow::ensure!(
        digest_of(&whole) == wanted.sha256,
        "the file has changed on the disk"
    );
    std::fs::write(made.with_extension("copy"), &whole)?;
    let copy_ms = start.elapsed().as_secs_f64() * 1_000.0;
    Ok(json!({"ms": ms, "copy_ms": copy_ms, "memory": memory}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delta_is_applied_and_told_about() {
        let dir = tempfile::tempdir().unwrap();
        let old = std::fs::read(shipped_bundle("conveyor").unwrap().join("model.onnx")).unwrap();
        let new = weights::new_head(&old, &mut Dice::new(SEED)).unwrap();
        let delta = delta::make(&old, &new).unwrap();
        let files = Files::write(dir.path(), &old, &delta, &new).unwrap();
        let report = apply([&files.old, &files.delta, &files.made], &files.wanted).unwrap();
        assert!(files.is_right().unwrap());
        assert!(number(&report, "ms").unwrap() > 0.0 && number(&report, "copy_ms").unwrap() > 0.0);
    }
}

//! `rollout`: a model that fails on some devices, and one that does not, on their way to a large fleet.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::Context;
use mesh_core::{ModelInfo, Release, VERSION};
use models::Bundle;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::{
    process::Command,
    time::{Instant, sleep},
};

use super::{
    figures::{Goal, Results},
    simulated::{Swarm, World},
};
use crate::{
    api::Api,
    cli::{BenchArgs, shipped_bundle},
    dice::Dice,
    learning::ask,
    process::{EXIT_WITH_STDIN, Program, usage},
    site::{Plan, Site},
};

/// What all devices run at first.
const MODEL: &str = "conveyor";
/// Versions of it above any that ships.
const BAD: &str = "9.1.0";
const GOOD: &str = "9.2.0";
/// The bad one fails on this share of the devices.
const SHARE: f32 = 0.05;
/// The stages as they are by default. Nobody waits in them: what time alone would show is not simulated.
const STAGES: [u32; 4] = [1, 10, 50, 100];
/// Of all devices, those that may ever hear of the bad model: the first stage.
const MOST_EXPOSED: f64 = 0.01;
/// Until everybody is there, and until a rollout has ended.
const PATIENCE: Duration = Duration::from_secs(1_200);
/// … and until everybody is at rest after it.
const SETTLE: Duration = Duration::from_secs(600);
/// It stays so for this long, or it was not so.
const HOLD: Duration = Duration::from_secs(3);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// Between two looks at all devices through the API.
const LOOK_AT_ALL: Duration = Duration::from_secs(2);
/// Files that are open besides the devices' connections.
const SPARE_FILES: u64 = 500;
const AUTHOR: &str = "bench";
const MIB: f64 = 1_048_576.0;

/// The bad one first, then the good one in its place.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or_else(Dice::seed);
    println!("seed {seed} (repeat with --seed {seed})");
    let count = usize::try_from(args.devices)?;
    make_room(u64::from(args.devices))?;
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    match play(args, count, seed, dir.path(), results).await {
        Ok(()) => Ok(()),
        Err(error) => {
            let kept = dir.keep();
            Err(error).with_context(|| format!("all is kept in {}", kept.display()))
        }
    }
}

/// One file for each connection, here and in the coordinator, which inherits the limit.
fn make_room(devices: u64) -> anyhow::Result<()> {
    let needed = devices + SPARE_FILES;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|now| now >= needed) {
        return Ok(());
    }
    anyhow::ensure!(
        limit.maximum.is_none_or(|most| most >= needed),
        "{devices} devices take {needed} open files; raise the limit (ulimit -n), or take fewer (--devices N)"
    );
    let raised = Rlimit {
        current: Some(needed),
        ..limit
    };
    setrlimit(Resource::Nofile, raised).context("raising the limit of open files")
}

async fn play(
    args: &BenchArgs,
    count: usize,
    seed: u64,
    root: &Path,
    results: &mut Results,
) -> anyhow::Result<()> {
    let bundle = shipped_bundle(MODEL)?;
    let manifest = Bundle::open(&bundle)?.manifest;
    let config = root.join("coordinator.toml");
    std::fs::write(&config, format!("[training]\nmodels = [{bundle:?}]\n"))?;
    let program = Program::current()?;
    let mut plan = Plan::new(program.clone(), root.join("site"), bundle.clone());
    plan.agents = 0;
    // Ten thousand handshakes are not what is looked at.
    plan.tls = false;
    plan.coordinator_config = Some(config);
    if let Some(broker) = args.broker {
        plan.broker = broker.into();
    }
    let mut site = Site::start(&plan).await?;
    let api = Api::of(&site)?;
    let base = published(&api, &manifest.version).await?;
    for version in [BAD, GOOD] {
        let to = root.join(version);
        write_version(&bundle, &to, &manifest.version, version)?;
        push(&program, &site, &to).await?;
    }
    let (bad, good) = (published(&api, BAD).await?, published(&api, GOOD).await?);

    let world = World {
        mqtt: site.mqtt(),
        site: "hall".parse()?,
        base: base.clone(),
        model: ModelInfo {
            v: VERSION,
            name: manifest.name.clone(),
            version: base.version.clone(),
            sha256: manifest.model.sha256.clone(),
            task: manifest.task.as_str().into(),
            labels: manifest.output.labels.join(","),
        },
        bad: BAD.into(),
        share: SHARE,
    };
    let start = Instant::now();
    let swarm = Swarm::start(world, count, seed)?;
    let there = all_on(&mut site, &api, &base.version, count, PATIENCE).await?;
    anyhow::ensure!(there == count, "only {there} of {count} devices are there");
    println!(
        "{count} devices are there after {:.0} s; {BAD} fails on {} of them",
        start.elapsed().as_secs_f64(),
        swarm.faulty()
    );
    results.add("devices", count as f64, "", None, Goal::None);

    let all = Goal::AtLeast(count as f64);
    let few = Goal::AtMost((count as f64 * MOST_EXPOSED).floor());
    let aborted = roll(&mut site, &api, &swarm, &bad, &base, count).await?;
    aborted.must_be("aborted")?;
    let seen = all_on(&mut site, &api, &base.version, count, SETTLE).await?;
    for (what, value, goal) in [
        ("bad model: devices exposed", aborted.number("exposed"), few),
        ("… by their own count", swarm.told(bad.digest) as f64, few),
        (
            "… on which it was active for a moment or longer",
            swarm.ran(bad.digest) as f64,
            few,
        ),
        (
            "… failed, as the coordinator knew at the abort",
            aborted.number("failed"),
            Goal::None,
        ),
        (
            "… all devices back on the last good one",
            aborted.settled as f64,
            all,
        ),
        ("… as the coordinator sees it", seen as f64, all),
    ] {
        results.add(what, value, "", None, goal);
    }
    aborted.add_times("aborted", results);

    let done = roll(&mut site, &api, &swarm, &good, &good, count).await?;
    done.must_be("done")?;
    let seen = all_on(&mut site, &api, GOOD, count, SETTLE).await?;
    results.add(
        "good model: devices that keep it",
        done.settled as f64,
        "",
        None,
        all,
    );
    results.add("… as the coordinator sees it", seen as f64, "", None, all);
    done.add_times("done", results);

    let used = usage(site.coordinator.pid().context("the coordinator")?)?;
    let memory = used.peak_rss as f64 / MIB;
    for (what, value, unit) in [
        ("coordinator: processor time", used.cpu_s, "s"),
        ("coordinator: most memory", memory, "MiB"),
        ("connections lost", swarm.losses() as f64, ""),
    ] {
        results.add(what, value, unit, None, Goal::None);
    }
    site.stop().await?;
    Ok(())
}

/// How a rollout went.
struct Rolled {
    view: Value,
    ended_s: f64,
    /// Devices at rest where they belong.
    settled: usize,
    /// When they were.
    settled_s: f64,
}

impl Rolled {
    fn must_be(&self, status: &str) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.view["status"] == status,
            "the rollout should be {status}: {:#}",
            self.view
        );
        Ok(())
    }

    fn number(&self, key: &str) -> f64 {
        self.view[key].as_f64().unwrap_or(f64::NAN)
    }

    fn add_times(&self, status: &str, results: &mut Results) {
        results.add(
            &format!("… from its start until it was {status}"),
            self.ended_s,
            "s",
            None,
            Goal::None,
        );
        results.add(
            "… from its start until everybody was at rest",
            self.settled_s,
            "s",
            None,
            Goal::None,
        );
    }
}

/// Rolls a model out and waits until that has ended and everybody is at rest with the model that they should have.
async fn roll(
    site: &mut Site,
    api: &Api,
    swarm: &Swarm,
    model: &Release,
    after: &Release,
    count: usize,
) -> anyhow::Result<Rolled> {
    let stages = STAGES.map(|percent| json!({"percent": percent, "soak_s": 0}));
    let wish = json!({
        "model": model.to_string(), "plan": {"stages": stages}, "author": AUTHOR,
        // Two or three seconds of a camera.
        "trial": {"share": 1.0, "shadow_frames": 40, "watch_frames": 20, "watch_s_min": 0},
    });
    let start = Instant::now();
    let begun = ask(api, move |api| api.post("/rollouts", &wish)).await?;
    let id = begun["id"].as_u64().context("a rollout without a number")?;
    println!("rollout {id}: {model} to {} devices", begun["devices"]);
    let mut stage = Value::Null;
    let view = loop {
        sleep(LOOK).await;
        site.check()?;
        let view = ask(api, move |api| api.get(&format!("/rollouts/{id}"))).await?;
        if view["stage"] != stage {
            stage = view["stage"].clone();
            println!(
                "{:>6.1} s: stage {stage}, {} exposed",
                start.elapsed().as_secs_f64(),
                view["exposed"]
            );
        }
        if view["status"] != "running" {
            break view;
        }
        anyhow::ensure!(start.elapsed() < PATIENCE, "it does not end: {view:#}");
    };
    let ended_s = start.elapsed().as_secs_f64();
    println!("{ended_s:>6.1} s: {}", view["status"]);

    let until = Instant::now() + SETTLE;
    let mut since: Option<Instant> = None;
    loop {
        let now = Instant::now();
        let settled = swarm.settled_on(after.digest);
        since = (settled == count).then(|| since.unwrap_or(now));
        let held = since.is_some_and(|since| now - since >= HOLD);
        if held || now > until {
            let settled_s = (since.unwrap_or(now) - start).as_secs_f64();
            println!("{settled_s:>6.1} s: {settled} of {count} are at rest with {after}");
            return Ok(Rolled {
                view,
                ended_s,
                settled,
                settled_s,
            });
        }
        site.check()?;
        sleep(LOOK).await;
    }
}

/// Waits (at most for `bound`) until the coordinator sees all devices online and at rest with a version. How many it
/// sees so.
async fn all_on(
    site: &mut Site,
    api: &Api,
    version: &str,
    count: usize,
    bound: Duration,
) -> anyhow::Result<usize> {
    let until = Instant::now() + bound;
    loop {
        site.check()?;
        let wanted = version.to_owned();
        let seen = ask(api, move |api| count_on(&api, &wanted)).await?;
        if seen == count || Instant::now() > until {
            return Ok(seen);
        }
        sleep(LOOK_AT_ALL).await;
    }
}

fn count_on(api: &Api, version: &str) -> anyhow::Result<usize> {
    let (mut after, mut found) = (String::new(), 0);
    loop {
        let page = api.get(&format!("/devices?limit=1000{after}"))?;
        let items = page["items"].as_array().context("no devices")?;
        let fits = |device: &&Value| {
            device["status"] == "online"
                && device["model"]["version"] == version
                && device["update"]["phase"] == "settled"
        };
        found += items.iter().filter(fits).count();
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => return Ok(found),
        }
    }
}

/// A published version of the model; it is published if it is not yet.
async fn published(api: &Api, version: &str) -> anyhow::Result<Release> {
    let wish = json!({"model": format!("{MODEL}@{version}"), "author": AUTHOR});
    let said = ask(api, move |api| api.post("/releases", &wish)).await?;
    let digest = said["digest"]
        .as_str()
        .context("a release without a digest")?;
    Ok(Release {
        name: MODEL.into(),
        version: version.into(),
        digest: digest.parse()?,
    })
}

/// The same bundle under another version.
fn write_version(bundle: &Path, to: &Path, old: &str, new: &str) -> anyhow::Result<()> {
    copy(bundle, to)?;
    let manifest = to.join("manifest.toml");
    let text = std::fs::read_to_string(&manifest)?;
    let line = |version: &str| format!("version = \"{version}\"");
    let changed = text.replacen(&line(old), &line(new), 1);
    anyhow::ensure!(changed != text, "the manifest names no version {old}");
    std::fs::write(&manifest, changed)?;
    Ok(())
}

/// Copies a folder of a bundle, and those in it.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    let entries: Vec<PathBuf> = std::fs::read_dir(from)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    for path in entries {
        let to = to.join(path.file_name().context("a file without a name")?);
        if path.is_dir() {
            copy(&path, &to)?;
        } else {
            std::fs::copy(&path, &to).with_context(|| format!("copying {}", path.display()))?;
        }
    }
    Ok(())
}

/// As an operator would: on the command line.
pub(super) async fn push(program: &Program, site: &Site, dir: &Path) -> anyhow::Result<()> {
    let pushed = Command::new(&program.0)
        .args(["cloud-coordinator", "model", "--data"])
        .arg(site.data())
        .args(["push", "--author", AUTHOR])
        .arg(dir)
        // A part of a fleet ends when its input does.
        .env_remove(EXIT_WITH_STDIN)
        .stdin(Stdio::null())
        .output()
        .await?;
    anyhow::ensure!(
        pushed.status.success(),
        "pushing {} failed: {}",
        dir.display(),
        String::from_utf8_lossy(&pushed.stderr)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_a_bundle_of_its_own() {
        let bundle = shipped_bundle(MODEL).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join(BAD);
        let old = Bundle::open(&bundle).unwrap().manifest.version;
        write_version(&bundle, &to, &old, BAD).unwrap();
        assert_eq!(Bundle::open(&to).unwrap().manifest.version, BAD);
        assert!(write_version(&bundle, &to, "0.0.0", BAD).is_err());
    }
}

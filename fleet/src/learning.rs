//! The loop: devices see, keep what is worth learning from, people label it, the coordinator trains and proves.
//!
//! The part of the people is played by the names of the folders that the images lie in.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::Context;
use serde_json::{Value, json};
use tokio::{
    process::Command,
    task::spawn_blocking,
    time::{Instant, sleep},
};

use crate::{
    agent_file::SamplesPart,
    api::Api,
    cli::{LoopArgs, shipped_bundle},
    delivery,
    dice::Dice,
    process::{self, Program},
    site::{Camera, Plan, Site},
};

/// The task, and so the name of the models.
const TASK: &str = "loop";
/// One in so many images of a class is held out.
const HOLDOUT: usize = 5;
/// Samples that are labelled before the queue is asked again.
const AT_ONCE: usize = 10;
/// Frames per second of each device: what a small machine can look at.
const FPS: f64 = 10.0;
/// Frames per second of all devices together while the model is trained and brought to them: that needs the processor too.
const SERVING_FPS: f64 = 40.0;
/// … and while all they do is look.
const LOOKING_FPS: f64 = 60.0;
/// How long nothing may arrive before the samples are taken as complete.
const QUIET: Duration = Duration::from_secs(15);
/// How long the devices and a training may take.
const PATIENCE: Duration = Duration::from_secs(3_600);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// Who labels.
const AUTHOR: &str = "fleet";

/// How the images were divided.
struct Division {
    classes: usize,
    holdout: usize,
    stream: usize,
}

/// Runs the loop once. Says whether it came to its end; whether the gate opened is in the report.
///
/// # Errors
/// If a part cannot be started, or the images cannot be used.
pub(crate) async fn run(args: &LoopArgs) -> anyhow::Result<bool> {
    let root = tempfile::tempdir().context("making a temporary folder")?;
    let root = root.path();
    let divided = divide(args, root)?;
    let per_class = usize::from(args.per_class);
    let rounds = usize::from(args.train_rounds);
    println!(
        "{} classes: {} labelled to begin with, {} to be seen by {} devices, {} held out",
        divided.classes,
        per_class * divided.classes,
        divided.stream,
        args.agents,
        divided.holdout
    );
    let program = Program::current()?;
    let config = root.join("coordinator.toml");
    let backbone = match &args.backbone {
        Some(dir) => dir
            .canonicalize()
            .with_context(|| format!("{}", dir.display()))?,
        None => shipped_bundle("backbone")?,
    };
    let text = format!("[training]\nmodels = [{backbone:?}]\n");
    std::fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
    // Where the coordinator will put the first model that it trains.
    let first = root.join(format!("coordinator/models/{TASK}/1.0.0"));
    let mut plan = Plan::new(program.clone(), root.to_owned(), first);
    plan.agents = usize::from(args.agents);
    plan.spawn = false;
    plan.fps = (LOOKING_FPS / f64::from(args.agents)).min(FPS);
    plan.updates = true;
    plan.coordinator_config = Some(config);
    plan.camera = Camera::Folder {
        path: root.join("stream"),
        repeat: false,
    };
    let mut site = Site::start(&plan).await?;
    let api = Api::of(&site)?;
    for (part, holdout) in [("initial", false), ("holdout", true)] {
        import(&program, &site, &root.join(part), holdout).await?;
    }
    let before = train(&api, args, "head").await?;
    println!("before: {}", told(&before));

    let console = site.way().console();
    for (at, device) in site.devices.iter_mut().enumerate() {
        device.file.samples = Some(SamplesPart::everything(console.clone()));
        for source in &mut device.file.source {
            source.path = Some(root.join("stream").join(format!("{at}")));
        }
        device.write_config()?;
        device.agent.start()?;
    }
    let seen = arrived(&api, &mut site, divided.stream).await?;
    for device in &mut site.devices {
        device.agent.stop(Duration::from_secs(15)).await?;
    }
    println!("{seen} of {} frames arrived as samples", divided.stream);
    // From now on they only serve, whatever happens to the models.
    for device in &mut site.devices {
        device.file.samples = None;
        for source in &mut device.file.source {
            source.repeat = true;
            source.fps = (SERVING_FPS / f64::from(args.agents)).min(FPS);
        }
        device.write_config()?;
        device.agent.start()?;
    }
    let first = before["version"].as_str().unwrap_or_default().to_owned();
    delivery::all_on(&api, &mut site, &first).await?;

    let mut curve = vec![json!([
        per_class * divided.classes,
        before["report"]["accuracy"]
    ])];
    let budget = args.labels.unwrap_or(20 * divided.classes);
    let mut labelled = 0;
    let mut after = before.clone();
    let mut last_label = Instant::now();
    for round in 1..=rounds {
        let until = budget * round / rounds;
        let so_far = labelled;
        labelled += label(&api, args, until - labelled).await?;
        if labelled == so_far {
            break;
        }
        last_label = Instant::now();
        after = train(&api, args, args.trainer.as_str()).await?;
        let total = per_class * divided.classes + labelled;
        println!("{total} labels: {}", told(&after));
        curve.push(json!([total, after["report"]["accuracy"]]));
    }
    let model = format!("{TASK}@{}", after["version"].as_str().unwrap_or_default());
    let delivered = if after["verdict"]["pass"] == json!(true) {
        let delivered = delivery::deliver(&api, &mut site, &model, AUTHOR, last_label).await?;
        println!(
            "{model} runs on {} devices {:.1} s after the last label",
            delivered["devices"],
            delivered["label_to_fleet_s"].as_f64().unwrap_or_default()
        );
        delivered
    } else {
        println!("{model} is not proved to be better: no device gets it");
        Value::Null
    };
    let mut report = json!({
        "accuracy_before": before["report"]["accuracy"],
        "accuracy_after": after["report"]["accuracy"],
        "labels": per_class * divided.classes + labelled,
        "labels_from_queue": labelled,
        "train_s": after["train_s"],
        "classes": divided.classes,
        "holdout": divided.holdout,
        "passed": after["verdict"]["pass"],
        "reasons": after["verdict"]["reasons"],
        "model": model,
        "strategy": args.strategy.as_str(),
        "trainer": args.trainer.as_str(),
        "seed": args.seed,
        "curve": curve,
        "label_to_fleet_s": null,
        "bytes_per_device": null,
        "stages": null,
    });
    if let (Some(report), Value::Object(delivered)) = (report.as_object_mut(), delivered) {
        report.extend(delivered);
    }
    site.stop().await?;
    println!("{report:#}");
    if let Some(file) = &args.json {
        std::fs::write(file, format!("{report:#}\n"))
            .with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(true)
}

/// In a few words.
fn told(model: &Value) -> String {
    let share = |value: &Value| {
        value
            .as_f64()
            .map_or("?".into(), |v| format!("{:.1} %", v * 100.0))
    };
    format!(
        "accuracy {} on the holdout, calibration error {}, gate {}",
        share(&model["report"]["accuracy"]),
        share(&model["report"]["ece"]),
        if model["verdict"]["pass"] == json!(true) {
            "open"
        } else {
            "closed"
        },
    )
}

/// Is this a file that could be an image, by its name?
fn is_image(path: &Path) -> bool {
    let extension = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default();
    let known = ["jpg", "jpeg", "png"];
    known.contains(&extension.to_ascii_lowercase().as_str())
}

/// Divides the images of each class by lot: held out, labelled to begin with, and what the devices see.
fn divide(args: &LoopArgs, root: &Path) -> anyhow::Result<Division> {
    let mut dice = Dice::new(args.seed);
    let mut classes: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let entries = std::fs::read_dir(&args.images)
        .with_context(|| format!("reading {}", args.images.display()))?;
    for entry in entries {
        let folder = entry?.path();
        let name = folder
            .file_name()
            .and_then(|name| name.to_str())
            .map(str::to_owned);
        let Some(name) = name.filter(|_| folder.is_dir()) else {
            continue;
        };
        let mut files = Vec::new();
        for file in std::fs::read_dir(&folder)? {
            files.push(file?.path());
        }
        files.retain(|file| is_image(file));
        files.sort_unstable();
        for at in (1..files.len()).rev() {
            files.swap(at, dice.below(at + 1));
        }
        files.truncate(args.most_per_class);
        if files.len() >= HOLDOUT {
            classes.insert(name, files);
        }
    }
    anyhow::ensure!(
        classes.len() >= 2,
        "{} must have at least two folders, each named like a class and with at least {HOLDOUT} images \
         (JPEG or PNG)",
        args.images.display()
    );
    let mut divided = Division {
        classes: classes.len(),
        holdout: 0,
        stream: 0,
    };
    for (class, files) in &classes {
        let held = files.len().div_ceil(HOLDOUT);
        for (at, file) in files.iter().enumerate() {
            let part = if at < held {
                divided.holdout += 1;
                PathBuf::from("holdout")
            } else if at < held + usize::from(args.per_class) {
                PathBuf::from("initial")
            } else {
                divided.stream += 1;
                PathBuf::from("stream")
                    .join((divided.stream % usize::from(args.agents)).to_string())
            };
            let folder = root.join(part).join(class);
            std::fs::create_dir_all(&folder)?;
            let name = file.file_name().context("a file without a name")?;
            std::fs::copy(file, folder.join(name))
                .with_context(|| format!("copying {}", file.display()))?;
        }
    }
    anyhow::ensure!(
        divided.stream > 0,
        "nothing is left for the devices to see: lower --per-class"
    );
    Ok(divided)
}

/// As a person would: by the command line.
async fn import(program: &Program, site: &Site, dir: &Path, holdout: bool) -> anyhow::Result<()> {
    let mut command = Command::new(&program.0);
    command
        .args(["cloud-coordinator", "import", TASK])
        .arg(dir)
        .args(["--format", "folder", "--author", AUTHOR, "--data"])
        .arg(site.data())
        // A part of a fleet ends when its input does.
        .env_remove(process::EXIT_WITH_STDIN)
        .stdin(Stdio::null());
    if holdout {
        command.arg("--holdout");
    }
    let done = command.output().await?;
    anyhow::ensure!(
        done.status.success(),
        "importing {} failed: {}",
        dir.display(),
        String::from_utf8_lossy(&done.stderr)
    );
    anyhow::ensure!(
        !done.stdout.is_empty(),
        "importing {} did nothing",
        dir.display()
    );
    Ok(())
}

/// Asks the coordinator without holding up the others.
pub(crate) async fn ask<T: Send + 'static>(
    api: &Api,
    work: impl FnOnce(Api) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let api = api.clone();
    spawn_blocking(move || work(api)).await?
}

/// Trains and waits. The model that came out, accepted or refused, with the seconds that it took.
async fn train(api: &Api, args: &LoopArgs, trainer: &str) -> anyhow::Result<Value> {
    let mut request = json!({
        "trainer": trainer, "author": AUTHOR, "seed": args.seed, "min_score": 0.3,
    });
    if trainer == "head" {
        request["base"] = json!("backbone");
    } else {
        request["epochs"] = json!(args.epochs);
    }
    let job = ask(api, move |api| {
        api.post(&format!("/tasks/{TASK}/train"), &request)
    })
    .await?;
    let id = job["id"].as_i64().context("a job without a number")?;
    let patience = Instant::now() + PATIENCE;
    loop {
        let job = ask(api, move |api| api.get(&format!("/jobs/{id}"))).await?;
        match job["state"].as_str() {
            Some("done") => {
                let model = job["model"]
                    .as_str()
                    .context("a job without a model")?
                    .to_owned();
                let mut model = ask(api, move |api| api.get(&format!("/catalog/{model}"))).await?;
                let took = |key: &str| job[key].as_f64().unwrap_or_default();
                model["train_s"] = json!((took("ended_ms") - took("started_ms")) / 1_000.0);
                return Ok(model);
            }
            Some("queued" | "running") => {}
            _ => anyhow::bail!("the training failed: {}", job["error"]),
        }
        anyhow::ensure!(
            Instant::now() < patience,
            "the training does not end: {job}"
        );
        sleep(LOOK).await;
    }
}

/// Waits until what the devices saw has arrived. How many samples did.
async fn arrived(api: &Api, site: &mut Site, expected: usize) -> anyhow::Result<usize> {
    let patience = Instant::now() + PATIENCE;
    let (mut stored, mut changed) = (0, Instant::now());
    loop {
        site.coordinator.check()?;
        for device in &mut site.devices {
            device.agent.check()?;
        }
        let now = ask(api, |api| count(&api)).await?;
        if now != stored {
            (stored, changed) = (now, Instant::now());
        }
        let quiet = stored > 0 && changed.elapsed() > QUIET;
        if stored >= expected || quiet || Instant::now() > patience {
            return Ok(stored);
        }
        sleep(LOOK).await;
    }
}

/// How many images of devices are stored.
fn count(api: &Api) -> anyhow::Result<usize> {
    let (mut after, mut stored) = (String::new(), 0);
    loop {
        let page = api.get(&format!("/samples?task={TASK}&limit=1000{after}"))?;
        let items = page["items"].as_array().context("no samples")?;
        let whole = |item: &&Value| item["origin"] == "device" && item["image"] == "stored";
        stored += items.iter().filter(whole).count();
        match page["next"].as_i64() {
            Some(next) => after = format!("&after={next}"),
            None => return Ok(stored),
        }
    }
}

/// Labels up to `most` samples in the order of the queue. How many.
async fn label(api: &Api, args: &LoopArgs, most: usize) -> anyhow::Result<usize> {
    let mut labelled = 0;
    while labelled < most {
        let (strategy, seed) = (args.strategy.as_str(), args.seed);
        let take = AT_ONCE.min(most - labelled);
        let done = ask(api, move |api| {
            let path = format!("/tasks/{TASK}/queue?strategy={strategy}&limit={take}&seed={seed}");
            let queue = api.get(&path)?;
            let items = queue["items"].as_array().context("no queue")?;
            for item in items {
                let id = item["id"].as_i64().context("a sample without a number")?;
                let file = item["file"].as_str().context("a sample without a file")?;
                let class = Path::new(file).parent().and_then(Path::file_name);
                let class = class
                    .and_then(|name| name.to_str())
                    .context("a file without a class")?;
                let said = json!({"class": class});
                api.post(&format!("/samples/{id}/labels"), &said)?;
            }
            Ok(items.len())
        })
        .await?;
        if done == 0 {
            break;
        }
        labelled += done;
    }
    Ok(labelled)
}

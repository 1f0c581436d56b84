//! The demo: devices at work, a plug that is pulled and put back, and a witness who counts.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc::Receiver,
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{
    api::Api,
    cli::{DemoArgs, shipped_bundle},
    lesson,
    process::Program,
    report::Report,
    screen::{Line, Screen},
    site::{Camera, HTTP, MQTT, Plan, Site},
    witness::Testimony,
};

/// When the plug is pulled, and for how long: enough to read along. A bounded demo is cut to its length.
const PLUG: Duration = Duration::from_secs(15);
/// Frames per second of a synthetic camera: a conveyor one can follow.
const FPS: f64 = 5.0;
/// … and at most of a folder, on the slowest machine one would try it on.
const MAX_FOLDER_FPS: f64 = 30.0;
/// How long everything may take to arrive when the cameras have stopped.
const SETTLE: Duration = Duration::from_secs(90);
/// A part that ends so often by itself is broken, not unplugged.
const MAX_RESTARTS: u32 = 50;

/// Runs the demo. Says whether every reading was stored once.
///
/// # Errors
/// If a part cannot be started or counted.
pub(crate) async fn run(args: &DemoArgs) -> anyhow::Result<bool> {
    let mut interrupts = Interrupts::new()?;
    let (root, _removed_at_the_end) = match &args.data {
        Some(dir) => {
            std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
            (dir.canonicalize()?, None)
        }
        None => {
            let dir = tempfile::tempdir().context("making a temporary folder")?;
            (dir.path().to_owned(), Some(dir))
        }
    };
    anyhow::ensure!(
        !root.join("coordinator/coordinator.db").exists(),
        "{} holds an earlier run, which would be counted too; take another folder",
        root.display()
    );
    let bundle = match &args.bundle {
        Some(dir) => dir
            .canonicalize()
            .with_context(|| format!("the bundle {}", dir.display()))?,
        None => shipped_bundle("conveyor")?,
    };
    let held_out = held_out(&bundle);
    let mut plan = Plan::new(Program::current()?, root, bundle);
    plan.broker = args.broker.into();
    plan.agents = usize::from(args.agents);
    plan.fps = args.fps.unwrap_or(FPS);
    (plan.http, plan.mqtt) = (Some(HTTP), Some(MQTT));
    let mut expected = None;
    if let Some(images) = &args.images {
        let images = images
            .canonicalize()
            .with_context(|| format!("the images {}", images.display()))?;
        let count = count_images(&images);
        anyhow::ensure!(count > 0, "no images in {}", images.display());
        expected = Some(count * plan.agents as u64);
        if args.fps.is_none() {
            // Through the folder in three quarters of the time that there is.
            let seconds = args.bound.map_or(60.0, |b| b.as_secs_f64()) * 0.75;
            plan.fps = (count as f64 / seconds.max(1.0)).clamp(1.0, MAX_FOLDER_FPS);
        }
        plan.camera = Camera::Folder {
            path: images,
            repeat: false,
        };
    }

    let own = args.images.is_none() && args.bundle.is_none();
    let lesson = own && !args.no_drift && args.bound.is_none_or(|bound| bound >= lesson::LEAST);
    if let (true, Some(bundle)) = (lesson, &plan.bundle) {
        let config = plan.root.join("coordinator.toml");
        std::fs::write(&config, lesson::coordinator_config(bundle))
            .with_context(|| format!("writing {}", config.display()))?;
        plan.coordinator_config = Some(config);
        plan.ageing = Some(lesson::ageing(plan.fps));
    }

    let mut site = Site::start(&plan).await?;
    greet(&site);
    let (say, mut said) = tokio::sync::mpsc::channel(16);
    let api = Api::of(&site)?;
    let telling = lesson.then(|| {
        let bundle = plan.bundle.clone().unwrap_or_default();
        tokio::spawn(async move {
            if let Err(error) = lesson::tell(api, &bundle, say.clone()).await {
                let _ = say.send(format!("the lesson ends early: {error:#}")).await;
            }
        })
    });
    let story = Story {
        plug: (!args.no_plug).then(|| plug_times(args.bound)),
        bound: args.bound,
        expected,
    };
    let seconds = watch(
        &mut site,
        &story,
        held_out.clone(),
        &mut said,
        &mut interrupts,
    )
    .await?;
    if let Some(telling) = telling {
        telling.abort();
    }

    println!("\nThe cameras stop; what is on its way arrives …");
    let seen = tokio::select! {
        seen = site.finish(held_out, SETTLE) => seen?,
        () = interrupts.next() => anyhow::bail!("interrupted before everything was counted"),
    };
    let rude = site.stop().await?;
    for name in &rude {
        println!("{name} had to be killed");
    }
    let report = Report::new(&seen, seconds);
    println!("{report}");
    if let Some(file) = &args.report {
        report
            .write(file)
            .with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(report.is_good())
}

/// What is to happen.
struct Story {
    /// When the plug is pulled and put back.
    plug: Option<(Duration, Duration)>,
    /// When it all ends.
    bound: Option<Duration>,
    /// How many readings there will be, where the cameras have an end.
    expected: Option<u64>,
}

fn plug_times(bound: Option<Duration>) -> (Duration, Duration) {
    let pull = bound.map_or(PLUG, |b| PLUG.min(b / 4));
    (pull, 2 * pull)
}

/// Shows the site once a second until the story or the user ends it. Says how many seconds that were.
async fn watch(
    site: &mut Site,
    story: &Story,
    held_out: BTreeSet<String>,
    said: &mut Receiver<String>,
    interrupts: &mut Interrupts,
) -> anyhow::Result<f64> {
    let start = Instant::now();
    let mut witness = site.witness(held_out);
    let mut screen = Screen::new();
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut before: Option<(Instant, Testimony)> = None;
    let mut plug = story.plug.map(|(pull, back)| Plug::new(site, pull, back));
    let mut restarts = 0;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = interrupts.next() => break,
        }
        for (name, pid) in restart_dead(site)? {
            restarts += 1;
            anyhow::ensure!(
                restarts < MAX_RESTARTS,
                "{name} ends again and again: see the logs"
            );
            screen.say(&format!(
                "{name} was gone and is started again (process {pid})"
            ));
        }
        while let Ok(what) = said.try_recv() {
            screen.say(&what);
        }
        let now = Instant::now();
        let seen = witness.look().await?;
        if let Some(plug) = &mut plug {
            plug.act(site, now - start, &seen, &mut screen);
        }
        let lines = lines(site, &seen, before.as_ref().map(|(at, b)| (now - *at, b)));
        screen.show(&lines);
        let total = seen.total();
        before = Some((now, seen));
        let over = story.bound.is_some_and(|bound| now - start >= bound);
        if over
            || story
                .expected
                .is_some_and(|e| total.stored + total.gaps >= e)
        {
            break;
        }
    }
    Ok(start.elapsed().as_secs_f64())
}

/// One device's network is cut for a while.
struct Plug {
    device: usize,
    name: String,
    pull: Duration,
    back: Duration,
    state: PlugState,
}

#[derive(PartialEq)]
enum PlugState {
    In,
    Out,
    Draining { backlog: u64 },
    Done,
}

impl Plug {
    fn new(site: &Site, pull: Duration, back: Duration) -> Self {
        // The second, so that one can see that its neighbours do not care.
        let device = usize::from(site.devices.len() > 1);
        let name = site
            .devices
            .get(device)
            .map_or_else(String::new, |d| d.name.clone());
        Self {
            device,
            name,
            pull,
            back,
            state: PlugState::In,
        }
    }

    fn act(&mut self, site: &Site, at: Duration, seen: &Testimony, screen: &mut Screen) {
        let (Some(device), Some(account)) =
            (site.devices.get(self.device), seen.devices.get(&self.name))
        else {
            return;
        };
        let name = &self.name;
        match self.state {
            PlugState::In if at >= self.pull => {
                device.link.cut();
                screen.say(&format!(
                    "pulling {name}'s plug: its network is gone, its camera is not"
                ));
                self.state = PlugState::Out;
            }
            PlugState::Out if at >= self.back => {
                device.link.heal();
                let backlog = account.missing();
                screen.say(&format!(
                    "plugging {name} in again: {backlog} readings wait in its outbox"
                ));
                self.state = PlugState::Draining { backlog };
            }
            // A frame or two are always on their way.
            PlugState::Draining { backlog } if account.missing() <= 3 => {
                screen.say(&format!(
                    "{name} has delivered its backlog of {backlog}: nothing lost, {} produced, {} stored",
                    account.produced, account.stored
                ));
                self.state = PlugState::Done;
            }
            _ => {}
        }
    }
}

/// Starts again what somebody has killed. Says who and under which process id.
fn restart_dead(site: &mut Site) -> anyhow::Result<Vec<(String, u32)>> {
    let mut started = Vec::new();
    let agents = site.devices.iter_mut().map(|d| &mut d.agent);
    let parts = agents
        .chain([&mut site.coordinator])
        .chain(&mut site.broker);
    for process in parts {
        if let Err(error) = process.check() {
            tracing::debug!(%error, "a part is gone");
            process.start()?;
            started.push((process.name().to_owned(), process.pid().unwrap_or(0)));
        }
    }
    Ok(started)
}

fn lines(site: &Site, seen: &Testimony, before: Option<(Duration, &Testimony)>) -> Vec<Line> {
    let line = |device: &crate::site::Device| {
        let account = seen.devices.get(&device.name).cloned().unwrap_or_default();
        let rate = before.and_then(|(since, b)| {
            let produced = b.devices.get(&device.name)?.produced;
            Some((account.produced - produced.min(account.produced)) as f64 / since.as_secs_f64())
        });
        Line {
            name: device.name.clone(),
            connected: !device.link.is_cut(),
            rate: rate.unwrap_or(0.0),
            account,
        }
    };
    site.devices.iter().map(line).collect()
}

fn greet(site: &Site) {
    let way = site.way();
    let mqtt = way.mqtt();
    println!(
        "Lacewing: a coordinator, {} devices and a network between them.\n",
        site.devices.len()
    );
    // Whoever looks in for the first time makes the first admin.
    let link = std::fs::read_to_string(site.data().join("trust/setup-link"));
    let console = link.map_or_else(|_| way.console(), |link| link.trim().to_owned());
    println!("  console       {console}");
    let mut subscribe = format!("mosquitto_sub -h {} -p {}", mqtt.ip(), mqtt.port());
    if let (Some((name, password)), Some(authority)) = (way.subscriber(), way.authority()) {
        let authority = authority.display();
        subscribe += &format!(" --cafile {authority} -u {name} -P {password}");
    }
    println!("  subscribe     {subscribe} -v -t 'lacewing/v1/+/+/+/result'");
    let agents = site.devices.iter().map(|d| &d.agent);
    let parts = agents.chain([&site.coordinator]).chain(&site.broker);
    let plugs: Vec<String> = parts
        .take(8)
        .filter_map(|p| Some(format!("{} ({})", p.pid()?, p.name())))
        .collect();
    println!("  pull a plug   kill -9 any of {}", plugs.join(", "));
    println!("  end           Ctrl-C, and an independent witness counts\n");
}

/// The files that the model was never trained on, as the bundle says.
fn held_out(bundle: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(bundle.join("holdout.txt")).unwrap_or_default();
    let lines = text.lines().map(str::trim);
    lines
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

/// How many files look like images, by their names.
fn count_images(dir: &Path) -> u64 {
    const ENDINGS: [&str; 6] = ["jpg", "jpeg", "png", "bmp", "gif", "webp"];
    let mut folders: Vec<PathBuf> = vec![dir.to_owned()];
    let mut count = 0;
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        for entry in entries {
            let path = entry.path();
            let ending = path
                .extension()
                .and_then(|e| e.to_str())
                .map(str::to_lowercase);
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                folders.push(path);
            } else if ending.is_some_and(|e| ENDINGS.contains(&e.as_str())) {
                count += 1;
            }
        }
    }
    count
}

/// Ctrl-C and SIGTERM.
struct Interrupts {
    int: Signal,
    term: Signal,
}

impl Interrupts {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            int: signal(SignalKind::interrupt()).context("listening for Ctrl-C")?,
            term: signal(SignalKind::terminate()).context("listening for SIGTERM")?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.int.recv() => {}
            _ = self.term.recv() => {}
        }
    }
}

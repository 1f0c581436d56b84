//! The command line.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use models::{Bundle, Engine};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    Agent,
    capture::{
        look,
        scene::{Drift, SceneConfig, draw},
    },
    clock::WallClock,
    config::{Config, Layers, TOKEN},
    doctor, identity, mesh,
    settings::Home,
    update,
};

/// An agent that does not start with settings on trial is started again after this.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Looks at images on a small device, and never loses a reading.
#[derive(Debug, Parser)]
#[command(name = "edge-agent", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent until it is told to stop (Ctrl-C or SIGTERM).
    ///
    /// Example: edge-agent run --config base.toml --config raspberry-pi-4.toml --config site.toml
    Run(Configured),
    /// Look at single images with a model and say what it sees.
    ///
    /// Example: edge-agent infer --bundle models/bundles/steel strip.jpg --json
    Infer {
        /// The model's folder.
        #[arg(long, value_name = "DIR")]
        bundle: PathBuf,
        /// One JSON object per line, with all scores and the embedding.
        #[arg(long)]
        json: bool,
        /// Images: JPEG, PNG, BMP, GIF or WebP.
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<PathBuf>,
    },
    /// Work with configuration files.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Try everything that the configuration names and say in plain words what works and what does not.
    Doctor(Configured),
    /// Ask the coordinator for the device's certificate, once, and say what happened. The running agent does it by itself;
    /// this is for people who want to see it.
    ///
    /// Example: edge-agent enrol --config base.toml --config site.toml --token eyJ…
    Enrol {
        #[command(flatten)]
        configured: Configured,
        /// The enrolment token, instead of the configuration's.
        #[arg(long, value_name = "TOKEN")]
        token: Option<String>,
    },
    /// Work with the device's models.
    #[command(subcommand)]
    Model(ModelCommand),
    /// Ask the running agent about the other devices of its site.
    #[command(subcommand)]
    Mesh(MeshCommand),
    /// Draw pictures of the synthetic camera into a folder, one subfolder per label.
    Scene(SceneArgs),
    /// Try a model and print what was found: how a running agent tries one that it does not know.
    #[command(name = models::TRY_MODEL, hide = true)]
    TryModel {
        /// The bundle's folder.
        dir: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check configuration files: every mistake at once, each with its place.
    Check(Configured),
}

#[derive(Debug, Subcommand)]
enum ModelCommand {
    /// Say which model runs, which one the device would go back to, and which ones are bad and why. Can be asked at any
    /// time: it only looks at what the agent has written down.
    Status(Configured),
}

#[derive(Debug, Subcommand)]
enum MeshCommand {
    /// Say who is there: load, memory, models, who reaches the coordinator.
    Status {
        #[command(flatten)]
        configured: Configured,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Find out why this device does not see another one: clock, roster, name, presence, address, link.
    ///
    /// Example: edge-agent mesh doctor gate-2 --config base.toml --config site.toml
    Doctor {
        /// The other device's name.
        peer: String,
        #[command(flatten)]
        configured: Configured,
    },
}

#[derive(Debug, Args)]
struct Configured {
    /// Configuration file (TOML). Several are layered, a later one over an earlier one; LACEWING_SITE,
    /// LACEWING_DEVICE, LACEWING_DATA, LACEWING_COORDINATOR_URL, LACEWING_COORDINATOR_TOKEN,
    /// LACEWING_COORDINATOR_TOKEN_FILE, LACEWING_BROKER_URL, LACEWING_MODEL_BUNDLE, LACEWING_SAMPLES_COORDINATOR,
    /// LACEWING_UPDATE_COORDINATOR and LACEWING_UPDATE_ROOT override them.
    #[arg(long = "config", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
struct SceneArgs {
    /// Where to draw to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How many frames.
    #[arg(long, default_value_t = 100)]
    count: u64,
    /// The first frame's number.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Another seed is another day at the conveyor.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Drift of the light, -1 to 1 or 0 for none.
    #[arg(long, default_value_t = 0.0)]
    light: f32,
    /// Blur, 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    blur: f32,
    /// Change of the background, 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    background: f32,
    /// Share of the parts that have a fault, 0 to 1.
    #[arg(long, default_value_t = SceneConfig::default().defect_rate)]
    defect_rate: f32,
    /// Share of the frames without a part, 0 to 1.
    #[arg(long, default_value_t = SceneConfig::default().empty_rate)]
    empty_rate: f32,
}

/// Runs the program with `args`, the first of which is its name.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("edge-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(configured) => run_agent(configured.layers()),
        Command::Infer {
            bundle,
            json,
            images,
        } => infer(&bundle, &images, json),
        Command::Config(ConfigCommand::Check(configured)) => {
            let config = configured.load()?;
            println!(
                "the configuration is sound: device {}/{}, {} source(s)",
                config.site,
                config.device,
                config.source.len()
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Doctor(configured) => {
            let config = configured.load()?;
            let sick = runtime()?.block_on(doctor::examine(&config));
            Ok(if sick == 0 {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Enrol { configured, token } => {
            let environment = |name: &str| {
                let given = token.clone().filter(|_| name == TOKEN);
                given.or_else(|| std::env::var(name).ok())
            };
            let config = Layers::new(&configured.files, environment).read(None)?;
            identity::enrol(&config)
        }
        Command::Model(ModelCommand::Status(configured)) => {
            print!("{}", update::status(&configured.load()?));
            Ok(ExitCode::SUCCESS)
        }
        Command::Mesh(MeshCommand::Status { configured, json }) => {
            let said = mesh::status(&configured.load()?.data, json);
            print!("{}", said.map_err(anyhow::Error::msg)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Mesh(MeshCommand::Doctor { peer, configured }) => {
            let said = mesh::examine(&configured.load()?.data, &peer);
            let (text, is_well) = said.map_err(anyhow::Error::msg)?;
            print!("{text}");
            Ok(if is_well {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Scene(args) => scene(&args),
        Command::TryModel { dir } => {
            models::try_here(&dir);
            Ok(ExitCode::SUCCESS)
        }
    }
}

impl Configured {
    fn layers(&self) -> Layers {
        Layers::new(&self.files, |name| std::env::var(name).ok())
    }

    fn load(&self) -> anyhow::Result<Config> {
        Ok(self.layers().read(None)?)
    }
}

/// One thread drives the network; cameras, model and outbox have threads of their own.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
}

/// Runs the agent, life after life: other settings begin a new one.
fn run_agent(layers: Layers) -> anyhow::Result<ExitCode> {
    let home = Home::new(layers, WallClock::system());
    log();
    let (mut config, mut life) = home.begin()?;
    spare_memory(config.model.bundle.is_some());
    runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        // Kept from life to life, so that none is missed in between.
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for Ctrl-C")?;
        loop {
            let trial = life.is_trial();
            let again = match Agent::start_life(config, WallClock::system(), life).await {
                Ok(agent) => {
                    let again = tokio::select! {
                        _ = interrupt.recv() => false,
                        _ = terminate.recv() => false,
                        () = agent.wants_another_life() => true,
                    };
                    tracing::info!(again, "stopping");
                    agent.stop().await;
                    again
                }
                // Each of these starts counts; after some the device is back on the last good settings.
                Err(error) if trial => {
                    tracing::error!("cannot start with the settings on trial: {error}");
                    tokio::select! {
                        _ = interrupt.recv() => false,
                        _ = terminate.recv() => false,
                        () = tokio::time::sleep(AFTER_FAILURE) => true,
                    }
                }
                Err(error) => return Err(error.into()),
            };
            if !again {
                return Ok(ExitCode::SUCCESS);
            }
            (config, life) = home.begin()?;
        }
    })
}

/// Makes the allocator give the largest blocks back to the system at once and share one arena between the
/// threads. The outbox's page tables, a few MiB each, would stay on the heap otherwise after they are done with.
fn spare_memory(looks_at_frames: bool) {
    /// Blocks of this size and more are mapped on their own.
    const MAPPED_FROM: i32 = 128 * 1024;
    /// The same where a model runs: the buffers between its layers are smaller than this and stay on the heap, the
    /// picture's are larger. With 1 MiB it is as fast and takes 6 MiB more.
    const MAPPED_FROM_WITH_MODEL: i32 = 256 * 1024;
    let size = if looks_at_frames {
        MAPPED_FROM_WITH_MODEL
    } else {
        MAPPED_FROM
    };
    #[cfg(not(target_env = "gnu"))]
    let _ = size;
    #[cfg(target_env = "gnu")]
    #[expect(
        unsafe_code,
        reason = "mallopt only sets numbers, before other threads exist"
    )]
    // SAFETY: called once, before the runtime and the agent start their threads.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, size);
        // Free memory at the end of the heap up to that is kept for the next frame.
        libc::mallopt(libc::M_TRIM_THRESHOLD, size);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// `RUST_LOG` chooses what is logged (default `info`), `LACEWING_LOG=json` makes it machine-readable.
fn log() {
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let json = std::env::var("LACEWING_LOG").is_ok_and(|format| format == "json");
    let started = if json {
        builder.json().try_init()
    } else {
        builder.try_init()
    };
    if started.is_err() {
        tracing::debug!("logging was already set up");
    }
}

fn infer(bundle: &std::path::Path, images: &[PathBuf], json: bool) -> anyhow::Result<ExitCode> {
    let bundle = Bundle::open(bundle)?;
    let engine = Engine::load(&bundle)?;
    let wanted = update::Wanted::default();
    wanted.fit(&engine);
    let mut bad = 0;
    for path in images {
        let shown = path.display();
        let result = look(path, &wanted)
            .map_err(anyhow::Error::from)
            .and_then(|(picture, _)| Ok(engine.infer(&picture)?));
        match result {
            Ok(outcome) if json => {
                let labels = &engine.manifest().output.labels;
                let scores: serde_json::Map<_, _> = labels
                    .iter()
                    .zip(&outcome.scores)
                    .map(|(label, score)| (label.clone(), (*score).into()))
                    .collect();
                let line = serde_json::json!({
                    "image": path, "label": outcome.label, "score": outcome.score, "margin": outcome.margin,
                    "model": engine.id(), "scores": scores, "embedding": outcome.embedding,
                });
                println!("{line}");
            }
            Ok(outcome) => println!("{shown}: {} {:.1} %", outcome.label, outcome.score * 100.0),
            Err(error) => {
                bad += 1;
                if json {
                    println!(
                        "{}",
                        serde_json::json!({ "image": path, "error": format!("{error:#}") })
                    );
                }
                eprintln!("{shown}: {error:#}");
            }
        }
    }
    Ok(if bad == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn scene(args: &SceneArgs) -> anyhow::Result<ExitCode> {
    let drift = Drift {
        light: args.light,
        blur: args.blur,
        background: args.background,
        ..Drift::default()
    };
    let (defect_rate, empty_rate) = (args.defect_rate, args.empty_rate);
    let config = SceneConfig {
        seed: args.seed,
        defect_rate,
        empty_rate,
        drift,
        ..SceneConfig::default()
    };
    for frame in args.first..args.first.saturating_add(args.count) {
        let (picture, truth) = draw(&config, frame);
        let folder = args.out.join(truth.label);
        std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join(format!("{frame:07}.png"));
        picture
            .save(&path)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    println!("{} pictures in {}", args.count, args.out.display());
    Ok(ExitCode::SUCCESS)
}

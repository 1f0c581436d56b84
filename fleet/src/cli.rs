//! The command line of the fleet, and the doors to the parts it plays.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

use crate::{bench, demo, learning, process, site::Broker};

/// A whole fleet on one machine.
#[derive(Debug, Parser)]
#[command(name = "fleet", version, about, long_about = None)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    demo: DemoArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows devices at work, pulls a plug, and counts that nothing was lost (the default).
    Demo(DemoArgs),
    /// Devices see a folder of images, the queue is labelled from the folders' names, a better model is trained,
    /// judged, and brought to every device while all of them go on looking.
    Loop(LoopArgs),
    /// Measures, each time in turns with its peer.
    Bench(BenchArgs),
}

/// What the loop learns from.
#[derive(Clone, Debug, Args)]
pub struct LoopArgs {
    /// A folder with a folder of images (JPEG or PNG) for each class.
    #[arg(long, value_name = "DIR")]
    pub images: PathBuf,
    /// Labelled images of each class to begin with.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..))]
    pub per_class: u16,
    /// Labels that may be asked for after that. Default: 20 for each class.
    #[arg(long)]
    pub labels: Option<usize>,
    /// How the samples to label are chosen.
    #[arg(long, value_enum, default_value = "queue")]
    pub strategy: StrategyArg,
    /// How the better model is trained.
    #[arg(long, value_enum, default_value = "head")]
    pub trainer: TrainerArg,
    /// `fine-tune`: passes over the data.
    #[arg(long, default_value_t = 5)]
    pub epochs: usize,
    /// Train so many times on the way, to see a curve.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub train_rounds: u16,
    /// Use at most so many images of each class.
    #[arg(long, default_value_t = 100_000)]
    pub most_per_class: usize,
    /// The model to start from. Default: the backbone that ships.
    #[arg(long, value_name = "DIR")]
    pub backbone: Option<PathBuf>,
    /// How many devices.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=50))]
    pub agents: u16,
    /// Decides what is held out, and everything else that is random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Write the report to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// How samples are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum StrategyArg {
    /// What teaches most.
    Queue,
    /// By lot.
    Random,
}

impl StrategyArg {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Random => "random",
        }
    }
}

/// How a model is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum TrainerArg {
    /// A new classifier on the embedding.
    Head,
    /// The layers below it too.
    FineTune,
}

impl TrainerArg {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::FineTune => "fine-tune",
        }
    }
}

/// What the demo shows.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// End by itself after this time, `60s` or `5m` for example.
    #[arg(long = "for", value_name = "TIME", value_parser = duration)]
    pub bound: Option<Duration>,
    /// Write what the witness counted to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// How many devices.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=200))]
    pub agents: u16,
    /// Look at the images of this folder, once, instead of the synthetic conveyor. The name of an image's
    /// folder is taken as what it shows.
    #[arg(long, value_name = "DIR", requires = "bundle")]
    pub images: Option<PathBuf>,
    /// The model bundle.
    #[arg(long, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// Frames per second of each device.
    #[arg(long, value_parser = fps)]
    pub fps: Option<f64>,
    /// The coordinator's own broker, or a mosquitto that forgets everything when it ends.
    #[arg(long, value_enum, default_value = "embedded")]
    pub broker: BrokerArg,
    /// Keep everything in this folder. Default: a temporary one, removed at the end.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Leave the network alone.
    #[arg(long)]
    pub no_plug: bool,
    /// Leave the light alone. Otherwise, where there is time (two and a half minutes) and the conveyor is looked
    /// at, the lamps age, the devices notice, and a better model is taught.
    #[arg(long)]
    pub no_drift: bool,
}

/// Which broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BrokerArg {
    /// The coordinator's own.
    Embedded,
    /// A mosquitto without persistence.
    Mosquitto,
}

impl From<BrokerArg> for Broker {
    fn from(arg: BrokerArg) -> Self {
        match arg {
            BrokerArg::Embedded => Self::Embedded,
            BrokerArg::Mosquitto => Self::Mosquitto,
        }
    }
}

/// What to measure.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Which benchmark.
    #[arg(required_unless_present = "list")]
    pub name: Option<String>,
    /// Say which benchmarks there are.
    #[arg(long)]
    pub list: bool,
    /// Write the figures to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// `kill`: how many kills.
    #[arg(long, default_value_t = 200)]
    pub kills: u64,
    /// `kill`: with this broker only. Default: half with each. `rollout`: with this broker. Default: the coordinator's own.
    #[arg(long, value_enum)]
    pub broker: Option<BrokerArg>,
    /// `rollout`: how many simulated devices. Each takes a connection, and the broker lets 20,000 in.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=19_000))]
    pub devices: u32,
    /// `swarm`: how many devices, each a process.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(2..=50))]
    pub agents: u16,
    /// `kill`, `rollout`: repeat the run with this seed. Default: a new one, printed. `deliver`: other weights.
    #[arg(long)]
    pub seed: Option<u64>,
    /// `cascade`: the photographs, a folder for each class. Default: those of the recipes, beside the repository.
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// Rounds in turns with the peer. `cascade`: rounds through the photographs.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub rounds: u16,
}

/// Plays the part that the first argument names, or the fleet.
pub fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let _fleet = args.next();
    let rest: Vec<OsString> = args.collect();
    // A part that tries a model starts itself again, and waits for that.
    let begin = || match rest.get(1) {
        Some(what) if what == models::TRY_MODEL => {}
        _ => process::begin_part(),
    };
    match rest.first().and_then(|part| part.to_str()) {
        Some("edge-agent") => {
            begin();
            edge_agent::cli::main(rest)
        }
        Some("cloud-coordinator") => {
            begin();
            cloud_coordinator::cli::main(rest)
        }
        Some(bench::OUTBOX_LOAD) => bench::outbox_load(rest.into_iter().skip(1)),
        Some(bench::DELTA_APPLY) => bench::delta_apply(rest.into_iter().skip(1)),
        Some(process::GUARD) => {
            process::choose_cpu();
            process::guard(rest.into_iter().skip(1))
        }
        _ => match fleet(Cli::parse()) {
            Ok(code) => code,
            Err(error) => {
                eprintln!("fleet: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn fleet(cli: Cli) -> anyhow::Result<ExitCode> {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let good = match cli.command {
        Some(Command::Demo(args)) => runtime.block_on(demo::run(&args))?,
        None => runtime.block_on(demo::run(&cli.demo))?,
        Some(Command::Loop(args)) => runtime.block_on(learning::run(&args))?,
        Some(Command::Bench(args)) => runtime.block_on(bench::run(&args))?,
    };
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The bundle of this name: below the working directory, as in a clone, or where the fleet was built.
///
/// # Errors
/// If it is in neither place.
pub fn shipped_bundle(name: &str) -> anyhow::Result<PathBuf> {
    let here = Path::new("models/bundles").join(name);
    let built = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/bundles")
        .join(name);
    [here, built]
        .into_iter()
        .find(|dir| dir.join("manifest.toml").exists())
        .and_then(|dir| dir.canonicalize().ok())
        .with_context(|| {
            format!("no models/bundles/{name} here: run this in the repository, or name a bundle")
        })
}

fn duration(text: &str) -> Result<Duration, String> {
    let at = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let factor = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" | "min" => 60.0,
        "h" => 3_600.0,
        _ => return Err(format!("{unit:?} is no unit: ms, s, m or h")),
    };
    let seconds = number.parse::<f64>().map_err(|e| e.to_string())? * factor;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

fn fps(text: &str) -> Result<f64, String> {
    let fps: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=1_000.0).contains(&fps) {
        Ok(fps)
    } else {
        Err("must lie between 0 and 1000".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let cli = Cli::parse_from(["fleet", "--for", "60s", "--agents", "5"]);
        assert_eq!(cli.demo.bound, Some(Duration::from_secs(60)));
        assert!(cli.command.is_none() && cli.demo.agents == 5);
        assert!(Cli::try_parse_from(["fleet", "demo", "--images", "x"]).is_err());
        assert!(Cli::try_parse_from(["fleet", "demo", "--agents", "0"]).is_err());
        assert!(Cli::try_parse_from(["fleet", "bench"]).is_err());
        assert!(Cli::try_parse_from(["fleet", "bench", "--list"]).is_ok());
    }

    #[test]
    fn times() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert!(
            duration("5 parsecs").is_err() && duration("-1s").is_err() && duration("").is_err()
        );
        assert!(fps("NaN").is_err() && fps("2000").is_err() && fps("0").is_ok());
    }
}

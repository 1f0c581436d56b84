//! `rollout …`: how a model comes to the devices.

use axum::http::Method;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use super::{Where, Who, each, text};

/// Rollouts.
#[derive(Subcommand)]
pub(crate) enum RolloutCommand {
    /// Brings a model to the devices, a few first, more when those have kept it.
    ///
    /// Example: cloud-coordinator rollout start steel@1.2.0 --site plant-3 --stages 1,10,50,100 --soak 300
    Start(Box<Start>),
    /// Shows the rollouts, or one of them with its history.
    Status {
        /// Its number.
        id: Option<u64>,
    },
    /// Exposes nobody else for now.
    Pause(One),
    /// Goes on after a pause.
    Resume(One),
    /// Sets everybody back to what they had before, also when it was done.
    Abort(One),
    /// Goes to the next stage without waiting for evidence.
    Next(One),
    /// Goes to the last stage without waiting for evidence.
    Force(One),
}

/// What a rollout is to be.
#[derive(Args)]
pub(crate) struct Start {
    /// `name@version`, or `name` for the newest one in use.
    model: String,
    /// Only to devices of this site.
    #[arg(long)]
    site: Option<String>,
    /// Only to devices on this board.
    #[arg(long)]
    board: Option<String>,
    /// Only to devices with this tag.
    #[arg(long)]
    tag: Option<String>,
    /// Percent of the devices in each stage.
    #[arg(long, value_delimiter = ',', default_value = "1,10,50,100")]
    stages: Vec<f32>,
    /// Seconds for which the devices of a stage must have kept it before the next begins.
    #[arg(long, default_value_t = 300)]
    soak: u32,
    /// Share of a stage's devices that must have kept it, of those that can be reached.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9)]
    keep: f32,
    /// Seconds after which a stage that is not enough is over.
    #[arg(long, default_value_t = 3_600)]
    timeout: u32,
    /// What happens then.
    #[arg(long, value_enum, default_value = "pause")]
    on_timeout: OnTimeout,
    /// Abort when it has failed on more than this share of the devices that have it.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    max_failed: f32,
    /// Also where it is marked as bad, or older than what runs.
    #[arg(long)]
    force: bool,
    /// Keep it where it passes its self-test, without comparing it with what runs: where that is no measure.
    #[arg(long, conflicts_with_all = ["shadow_frames", "watch_frames", "watch_s"])]
    no_trial: bool,
    /// Frames on which each device compares it with what runs, before it takes over. Default: 200.
    #[arg(long, value_name = "FRAMES")]
    shadow_frames: Option<u32>,
    /// Frames that a device watches it for after that. Default: 1,200.
    #[arg(long, value_name = "FRAMES")]
    watch_frames: Option<u32>,
    /// Seconds that a device watches it for at least. Default: 60.
    #[arg(long, value_name = "SECONDS")]
    watch_s: Option<u32>,
    /// Median latency of a frame in milliseconds that ends its trial. Default: 2.5 times that of what runs.
    #[arg(long, value_name = "MS")]
    latency_ms: Option<f32>,
    /// Memory of the agent, with both models, that ends its trial. Default: 256 MiB more than before.
    #[arg(long, value_name = "MIB")]
    memory_mib: Option<u32>,
    /// Share of frames where what runs is sure and the new one disagrees that ends its trial. Default: 0.15.
    #[arg(long, value_name = "SHARE")]
    disagreement: Option<f32>,
    #[command(flatten)]
    who: Who,
}

/// What happens to a stage that takes too long.
#[derive(Clone, Copy, ValueEnum)]
enum OnTimeout {
    /// Somebody has to look at it.
    Pause,
    /// Everybody goes back.
    Abort,
}

/// One rollout.
#[derive(Args)]
pub(crate) struct One {
    /// Its number.
    id: u64,
    #[command(flatten)]
    who: Who,
}

impl Start {
    /// As the API takes it. What nothing is said about has the API's own defaults.
    fn request(&self) -> Value {
        let on_timeout = match self.on_timeout {
            OnTimeout::Pause => "pause",
            OnTimeout::Abort => "abort",
        };
        let stage = |percent: &f32| {
            json!({
                "percent": percent, "soak_s": self.soak, "keep": self.keep,
                "timeout_s": self.timeout, "on_timeout": on_timeout,
            })
        };
        let stages: Vec<Value> = self.stages.iter().map(stage).collect();
        let zero = |given: Option<u32>| if self.no_trial { Some(0) } else { given };
        json!({
            "model": self.model,
            "group": {"site": self.site, "board": self.board, "tag": self.tag},
            "plan": {"stages": stages, "max_failed": self.max_failed},
            "trial": said([
                ("shadow_frames", json!(zero(self.shadow_frames))),
                ("watch_frames", json!(zero(self.watch_frames))),
                ("watch_s_min", json!(zero(self.watch_s))),
            ]),
            "limits": said([
                ("latency_ms", json!(self.latency_ms)),
                ("memory_mib", json!(self.memory_mib)),
                ("disagreement", json!(self.disagreement)),
            ]),
            "force": self.force,
            "author": self.who.author,
        })
    }
}

/// Those of which something is said.
fn said<const N: usize>(all: [(&str, Value); N]) -> Map<String, Value> {
    let said = all.into_iter().filter(|(_, value)| !value.is_null());
    said.map(|(key, value)| (key.to_owned(), value)).collect()
}

fn show(rollout: &Value) {
    let number = |key: &str| rollout[key].as_u64().unwrap_or_default();
    println!(
        "{:>4}  {:<28} {:<8} stage {} of {}  exposed {} of {}, kept {}, failed {}{}",
        number("id"),
        text(rollout, "model"),
        text(rollout, "status"),
        number("stage"),
        each(&rollout["stages"]).count(),
        number("exposed"),
        number("devices"),
        number("kept"),
        number("failed"),
        rollout["why"]
            .as_str()
            .map_or(String::new(), |why| format!("  ({why})")),
    );
}

/// Does what `rollout …` asks for.
pub(crate) async fn rollout(place: &Where, command: RolloutCommand) -> anyhow::Result<()> {
    let (one, order) = match command {
        RolloutCommand::Start(start) => {
            let request = start.request();
            show(&place.ask(Method::POST, "/rollouts", Some(request)).await?);
            return Ok(());
        }
        RolloutCommand::Status { id: None } => {
            let rollouts = place.ask(Method::GET, "/rollouts", None).await?;
            if each(&rollouts).count() == 0 {
                println!(
                    "there is no rollout; begin one with: cloud-coordinator rollout start MODEL"
                );
            }
            each(&rollouts).for_each(show);
            return Ok(());
        }
        RolloutCommand::Status { id: Some(id) } => {
            let rollout = place
                .ask(Method::GET, &format!("/rollouts/{id}"), None)
                .await?;
            show(&rollout);
            for event in each(&rollout["events"]) {
                println!("      {}  {}", event["at_ms"], text(event, "what"));
            }
            return Ok(());
        }
        RolloutCommand::Pause(one) => (one, "pause"),
        RolloutCommand::Resume(one) => (one, "resume"),
        RolloutCommand::Abort(one) => (one, "abort"),
        RolloutCommand::Next(one) => (one, "next_stage"),
        RolloutCommand::Force(one) => (one, "last_stage"),
    };
    let said = json!({"command": order, "author": one.who.author});
    let path = format!("/rollouts/{}", one.id);
    show(&place.ask(Method::POST, &path, Some(said)).await?);
    Ok(())
}

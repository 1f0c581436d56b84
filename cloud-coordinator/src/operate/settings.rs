//! `settings …`

use std::path::PathBuf;

use anyhow::{Context, bail};
use axum::http::Method;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Where, Who, each, text};
use crate::exchange::in_query;

/// Settings of devices.
#[derive(Subcommand)]
pub(crate) enum SettingsCommand {
    /// Sets a part of the configuration of devices, in place of what was set before for the same site, board or device.
    /// Each device checks and tries it, and goes back by itself if it loses the broker or a source.
    ///
    /// Example: cloud-coordinator settings push night.toml --site plant-3
    Push {
        /// A TOML file with any of: `[broker]` (without url), `[drift]`, `[outbox]`, `[publish]`, `[reject]`, `[report]`,
        /// `[samples]` (without coordinator), and `[[source]]` with the name of the source that it changes.
        file: PathBuf,
        #[command(flatten)]
        whom: Scope,
        /// Seconds after which a device without the broker or a source that worked before goes back, 15 to 3600.
        #[arg(long, default_value_t = 120)]
        trial: u32,
        #[command(flatten)]
        who: Who,
    },
    /// Shows the settings that count, how many devices have kept them, and where they failed and why.
    Status,
    /// Takes settings back: the devices have what is set less near, or their own files.
    Unset {
        #[command(flatten)]
        whom: Scope,
        #[command(flatten)]
        who: Who,
    },
}

/// For whom.
#[derive(Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Scope {
    /// All devices.
    #[arg(long, conflicts_with_all = ["site", "board", "device"])]
    all: bool,
    /// Devices of this site.
    #[arg(long)]
    site: Option<String>,
    /// Devices on this board.
    #[arg(long)]
    board: Option<String>,
    /// One device, SITE/DEVICE.
    #[arg(long, value_name = "SITE/DEVICE", conflicts_with_all = ["site", "board"])]
    device: Option<String>,
}

impl Scope {
    /// Site, board and device.
    fn parts(self) -> anyhow::Result<[Option<String>; 3]> {
        let Some(device) = self.device else {
            return Ok([self.site, self.board, None]);
        };
        match device.split_once('/') {
            Some((site, name)) => Ok([Some(site.into()), None, Some(name.into())]),
            None => bail!("{device:?} is not SITE/DEVICE"),
        }
    }
}

fn show(settings: &Value) {
    let number = |key: &str| settings[key].as_u64().unwrap_or_default();
    let whom = ["site", "board", "device"]
        .iter()
        .filter_map(|key| Some(format!("{key} {}", settings[key].as_str()?)))
        .collect::<Vec<_>>();
    let whom = if whom.is_empty() {
        "all devices".to_owned()
    } else {
        whom.join(", ")
    };
    println!(
        "{:>4}  {whom}: kept by {} of {}, failed on {}, by {}",
        number("version"),
        number("kept"),
        number("devices"),
        number("failed"),
        text(settings, "author"),
    );
    for failure in each(&settings["failures"]) {
        let part = |key| text(failure, key);
        println!(
            "      {} {}: {}",
            part("device"),
            part("reason"),
            part("detail")
        );
    }
}

/// Does what `settings …` asks for.
pub(crate) async fn settings(place: &Where, command: SettingsCommand) -> anyhow::Result<()> {
    match command {
        SettingsCommand::Push {
            file,
            whom,
            trial,
            who,
        } => {
            let shown = file.display().to_string();
            let said =
                std::fs::read_to_string(&file).with_context(|| format!("reading {shown}"))?;
            let table: toml::Table = said.parse().with_context(|| shown)?;
            let [site, board, device] = whom.parts()?;
            let push = json!({
                "site": site, "board": board, "device": device, "settings": table,
                "trial_s": trial, "author": who.author,
            });
            show(&place.ask(Method::PUT, "/settings", Some(push)).await?);
        }
        SettingsCommand::Status => {
            let all = place.ask(Method::GET, "/settings", None).await?;
            if each(&all).count() == 0 {
                println!("nothing is set; the devices have their own files");
            }
            each(&all).for_each(show);
        }
        SettingsCommand::Unset { whom, who } => {
            let mut path = format!("/settings?author={}", in_query(&who.author));
            for (key, value) in ["site", "board", "device"].iter().zip(whom.parts()?) {
                if let Some(value) = value {
                    path += &format!("&{key}={}", in_query(&value));
                }
            }
            place.ask(Method::DELETE, &path, None).await?;
            println!("the devices are told");
        }
    }
    Ok(())
}

//! `device quarantine`

use anyhow::bail;
use axum::http::Method;
use clap::Args;
use serde_json::{Value, json};

use super::{Where, each, text};

/// Devices whose samples are not learnt from.
#[derive(Args)]
pub(crate) struct QuarantineCommand {
    /// `SITE/DEVICE`; without it, who is in quarantine and why.
    device: Option<String>,
    /// Sets the device apart, and says why.
    #[arg(long, value_name = "TEXT", requires = "device")]
    why: Option<String>,
    /// Lets its samples count again; you vouch for those that are here.
    #[arg(long, requires = "device", conflicts_with = "why")]
    lift: bool,
}

/// Shows, sets or lifts.
pub(super) async fn quarantine(place: &Where, command: QuarantineCommand) -> anyhow::Result<()> {
    let named = |one: &Value| format!("{}/{}", text(one, "site"), text(one, "device"));
    let Some(device) = &command.device else {
        let all = place.ask(Method::GET, "/quarantine", None).await?;
        let mut none = true;
        for one in each(&all).filter(|one| one["lifted_by"].is_null()) {
            none = false;
            println!("{}: {}", named(one), text(one, "why"));
            println!(
                "    set by {}; lift it with: device quarantine {} --lift",
                text(one, "author"),
                named(one)
            );
        }
        if none {
            println!("no device is in quarantine");
        }
        return Ok(());
    };
    if device.split('/').count() != 2 {
        bail!("{device:?} is not SITE/DEVICE");
    }
    let path = format!("/devices/{device}/quarantine");
    if command.lift {
        place.ask(Method::DELETE, &path, None).await?;
        println!("{device}: its samples count again");
    } else if let Some(why) = command.why {
        let said = json!({ "why": why });
        place.ask(Method::PUT, &path, Some(said)).await?;
        println!("{device}: its samples do not count until this is lifted");
    } else {
        let all = place.ask(Method::GET, "/quarantine", None).await?;
        let own: Vec<&Value> = each(&all).filter(|one| named(one) == *device).collect();
        if own.is_empty() {
            println!("{device} was never in quarantine");
        }
        for one in own {
            let end = match one["lifted_by"].as_str() {
                Some(by) => format!("lifted by {by}"),
                None => "it lasts".into(),
            };
            println!(
                "set by {}, {end}: {}",
                text(one, "author"),
                text(one, "why")
            );
        }
    }
    Ok(())
}

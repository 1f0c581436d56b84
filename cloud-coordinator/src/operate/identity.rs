//! `device token|approve|revoke` and `subscriber …`

use anyhow::bail;
use axum::http::Method;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Where, each, text};

/// Who may come in.
#[derive(Subcommand)]
pub(crate) enum IdentityCommand {
    /// Makes a token with which devices enrol at a site, and prints it.
    ///
    /// Example: cloud-coordinator device token --site plant-3 --device cam-7
    Token(Token),
    /// Lets a device in that asked for it.
    Approve {
        /// `SITE/DEVICE`
        device: String,
    },
    /// Shuts a device out: its connections end now, and its key never comes in again.
    Revoke {
        /// `SITE/DEVICE`
        device: String,
    },
}

/// A new token.
#[derive(Args)]
pub(crate) struct Token {
    /// The site of the devices.
    #[arg(long)]
    site: String,
    /// Only this device; any name unless given.
    #[arg(long)]
    device: Option<String>,
    /// How many devices.
    #[arg(long, default_value_t = 1)]
    uses: u32,
    /// For how many hours.
    #[arg(long, default_value_t = 24)]
    hours: u32,
    /// Each device waits until somebody says `device approve`.
    #[arg(long)]
    approve: bool,
    /// Under which address devices find this coordinator, https://HOST:PORT.
    #[arg(long)]
    url: Option<String>,
}

/// Who may listen on the broker without being a device.
#[derive(Subcommand)]
pub(crate) enum SubscriberCommand {
    /// Lets somebody listen, and prints the password.
    ///
    /// Example: cloud-coordinator subscriber add panel --site plant-3
    Add {
        /// The user name.
        name: String,
        /// A site that it may read; all unless given.
        #[arg(long = "site")]
        sites: Vec<String>,
    },
    /// Lists who may listen.
    List,
    /// Shuts somebody out; the connections end now.
    Remove {
        /// The user name.
        name: String,
    },
}

/// Does what `device token|approve|revoke` asks for.
pub(super) async fn identity(place: &Where, command: IdentityCommand) -> anyhow::Result<()> {
    let (device, verb) = match command {
        IdentityCommand::Token(new) => {
            let asked = json!({
                "site": new.site, "device": new.device, "uses": new.uses, "hours": new.hours,
                "approve": new.approve, "url": new.url,
            });
            let path = "/enrolment-tokens";
            let said = place.ask(Method::POST, path, Some(asked)).await?;
            println!("{}", text(&said, "token"));
            eprintln!(
                "\nOn the device, in its configuration: [coordinator] token = \"…\" with this token.\n\
                 It enrols at {} and trusts only the authority {}.\n\
                 For {} device(s) of {} within {} h; take it back with DELETE /api/v1/enrolment-tokens/{}",
                text(&said, "url"),
                text(&said, "ca"),
                new.uses,
                new.site,
                new.hours,
                text(&said, "jti"),
            );
            return Ok(());
        }
        IdentityCommand::Approve { device } => (device, "approve"),
        IdentityCommand::Revoke { device } => (device, "revoke"),
    };
    if device.split('/').count() != 2 {
        bail!("{device:?} is not SITE/DEVICE");
    }
    let path = format!("/identities/{device}/{verb}");
    let said = place.ask(Method::POST, &path, None).await?;
    println!("{device} is {}", text(&said, "state"));
    Ok(())
}

/// Does what `subscriber …` asks for.
pub(crate) async fn subscriber(place: &Where, command: SubscriberCommand) -> anyhow::Result<()> {
    match command {
        SubscriberCommand::Add { name, sites } => {
            let sites = if sites.is_empty() {
                Value::Null
            } else {
                json!(sites)
            };
            let asked = json!({"name": name, "sites": sites});
            let said = place.ask(Method::POST, "/subscribers", Some(asked)).await?;
            println!("{}", text(&said, "password"));
            eprintln!(
                "\nThis is the password; it is not shown again. For example:\n\
                 mosquitto_sub --cafile DATA/trust/ca.pem -p PORT -u {name} -P PASSWORD -t 'lacewing/#' -v"
            );
        }
        SubscriberCommand::List => {
            let all = place.ask(Method::GET, "/subscribers", None).await?;
            println!("{:<28} sites", "subscriber");
            for one in each(&all) {
                let sites: Vec<&str> = each(&one["sites"]).filter_map(Value::as_str).collect();
                let sites = if one["sites"].is_null() {
                    "all".to_owned()
                } else {
                    sites.join(", ")
                };
                println!("{:<28} {sites}", text(one, "name"));
            }
        }
        SubscriberCommand::Remove { name } => {
            let path = format!("/subscribers/{name}");
            place.ask(Method::DELETE, &path, None).await?;
            println!("{name} is shut out");
        }
    }
    Ok(())
}

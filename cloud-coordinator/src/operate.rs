//! What an operator says on the command line to a coordinator that runs.

mod audit;
mod connect;
mod erase;
mod identity;
mod people;
mod quarantine;
mod rollout;
mod settings;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use axum::{
    body::Body,
    http::{Method, Request, StatusCode, header},
};
use clap::{Args, Subcommand};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

use crate::{
    adopt::{self, ModelImport},
    trust::operator_token,
};
pub(crate) use audit::{AuditCommand, audit};
pub(crate) use connect::{Wire, connect};
pub(crate) use erase::{EraseCommand, erase};
pub(crate) use identity::{IdentityCommand, SubscriberCommand, subscriber};
pub(crate) use people::{TokenCommand, UserCommand, token, user};
pub(crate) use rollout::{RolloutCommand, rollout};
pub(crate) use settings::{SettingsCommand, settings};

/// The largest answer: a list of a thousand rows.
const ANSWER: usize = 16 << 20;

/// What to do without a token that counts.
pub(crate) const HOW: &str =
    "show a token with --token or LACEWING_TOKEN, or name the data folder with --data";

/// Which coordinator.
#[derive(Args)]
pub(crate) struct Where {
    /// Where the coordinator serves its API; without it the data folder says so.
    #[arg(
        long,
        value_name = "ADDR",
        env = "LACEWING_COORDINATOR_HTTP",
        global = true
    )]
    http: Option<SocketAddr>,
    /// The coordinator's data folder.
    #[arg(
        long,
        value_name = "DIR",
        env = "LACEWING_COORDINATOR_DATA",
        default_value = "lacewing-data",
        global = true
    )]
    data: PathBuf,
    /// An API token; without it the one that the coordinator lays into its data folder at each start is shown.
    #[arg(
        long,
        value_name = "TOKEN",
        env = "LACEWING_TOKEN",
        hide_env_values = true,
        global = true
    )]
    token: Option<String>,
}

/// Who says it.
#[derive(Args)]
pub(crate) struct Who {
    /// Who says it; it is recorded.
    #[arg(long, env = "USER")]
    author: String,
}

/// Models.
#[derive(Subcommand)]
pub(crate) enum ModelCommand {
    /// Lists the models and what became of them.
    List,
    /// Makes a bundle of your own ONNX file, with golden pictures out of your samples.
    ///
    /// What the file says (input, sizes, output) is read from it; how pictures are prepared follows from where it was
    /// trained (--like). It prints what the model says about your samples: if that is wrong, the labels are in another
    /// order, or --scale or --resize is not that of the training. Nothing is sent without --push.
    ///
    /// Example: cloud-coordinator model import best.onnx --name cups --labels labels.txt --like torchvision --images samples
    Import(Box<ModelImport>),
    /// Takes in a bundle from a folder, after it was tried, and publishes it.
    ///
    /// Example: cloud-coordinator model push models/bundles/steel
    Push {
        /// The folder, with manifest.toml, the model and its golden pictures.
        dir: PathBuf,
        #[command(flatten)]
        who: Who,
    },
    /// Signs a model of the catalog and lays it ready for the devices.
    Publish {
        /// `name@version`, or `name` for the newest one in use.
        model: String,
        #[command(flatten)]
        who: Who,
    },
}

/// Devices.
#[derive(Subcommand)]
pub(crate) enum DeviceCommand {
    /// Lists the devices, what they run and how far they are with what they should run.
    List,
    /// Makes one device run a model, whatever rollouts say. It has to pass its self-test there, but need not agree with what
    /// runs now: that is also the way back to an older one.
    Pin {
        /// `SITE/DEVICE`
        device: String,
        /// `name@version`
        model: String,
        #[command(flatten)]
        who: Who,
    },
    /// Shows whose samples are not learnt from, and why; sets a device apart, or lifts that.
    ///
    /// Example: cloud-coordinator device quarantine plant-3/cam-7 --lift
    Quarantine(quarantine::QuarantineCommand),
    /// Who may come in.
    #[command(flatten)]
    Identity(IdentityCommand),
    /// Gives a device back to the rollouts.
    Unpin {
        /// `SITE/DEVICE`
        device: String,
        #[command(flatten)]
        who: Who,
    },
}

/// Where the coordinator on a data folder says that it serves its API.
pub(crate) fn address(data: &Path) -> anyhow::Result<SocketAddr> {
    let path = data.join("addresses.json");
    let text = std::fs::read_to_string(&path).with_context(|| {
        format!(
            "cannot read {}: name the coordinator with --http or --data",
            path.display()
        )
    })?;
    let said: Value = serde_json::from_str(&text)?;
    let http = said["http"].as_str().and_then(|text| text.parse().ok());
    http.with_context(|| format!("{} names no address", path.display()))
}

impl Where {
    /// The coordinator's data folder.
    pub(crate) fn data(&self) -> &Path {
        &self.data
    }

    pub(crate) fn address(&self) -> anyhow::Result<SocketAddr> {
        self.http.map_or_else(|| address(&self.data), Ok)
    }

    /// What is shown to the coordinator, if there is anything to show.
    pub(crate) fn token(&self) -> anyhow::Result<Option<String>> {
        match &self.token {
            Some(token) => Ok(Some(token.trim().to_owned())),
            None => Ok(operator_token(&self.data)?),
        }
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let body = body.map_or_else(String::new, |body| body.to_string());
        self.send(method, path, "application/json", Body::from(body))
            .await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: Body,
    ) -> anyhow::Result<Value> {
        let address = self.address()?;
        let stream = connect(&self.data, address).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("/api/v1{path}"))
            .header(header::HOST, address.to_string())
            .header(header::CONTENT_TYPE, kind);
        if let Some(token) = self.token()? {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(body)?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = axum::body::to_bytes(Body::new(answer.into_body()), ANSWER).await?;
        drop(sender);
        connection.abort();
        let said: Value = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&body)?
        };
        if !status.is_success() {
            let why = said["detail"].as_str().or(said["title"].as_str());
            let why = why.unwrap_or("?");
            if status == StatusCode::UNAUTHORIZED {
                bail!("the coordinator answers {status}: {why}; {HOW}");
            }
            bail!("the coordinator answers {status}: {why}");
        }
        Ok(said)
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("-")
}

fn each(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Brings the bundle in `dir` and publishes it.
async fn push(place: &Where, dir: &Path, author: &str) -> anyhow::Result<()> {
    // Whoever made it should learn here what is wrong with it, not from the answer.
    let bundle = models::Bundle::open(dir)?;
    let document =
        models::ReleaseDocument::of(dir, &bundle.manifest.name, &bundle.manifest.version, None)?;
    let mut tar = tar::Builder::new(Vec::new());
    for file in &document.files {
        tar.append_path_with_name(dir.join(&file.path), &file.path)?;
    }
    let body = Body::from(tar.into_inner()?);
    let path = "/catalog";
    let said = place
        .send(Method::POST, path, "application/x-tar", body)
        .await?;
    let model = text(&said, "model").to_owned();
    let publication = json!({"model": model, "author": author});
    let said = place
        .ask(Method::POST, "/releases", Some(publication))
        .await?;
    println!("{model} is published as {}", text(&said, "digest"));
    Ok(())
}

/// Does what `model …` asks for.
pub(crate) async fn model(place: &Where, command: ModelCommand) -> anyhow::Result<()> {
    match command {
        ModelCommand::List => {
            let models = place.ask(Method::GET, "/catalog?limit=1000", None).await?;
            let releases = place.ask(Method::GET, "/releases?limit=1000", None).await?;
            println!(
                "{:<32} {:<9} {:<10} accuracy",
                "model", "state", "published"
            );
            for model in each(&models) {
                let is =
                    |r: &&Value| r["name"] == model["name"] && r["version"] == model["version"];
                let published = each(&releases).find(is).map_or("-", |_| "yes");
                let id = format!("{}@{}", text(model, "name"), text(model, "version"));
                let accuracy = model["report"]["accuracy"].as_f64();
                let accuracy = accuracy.map_or("-".into(), |a| format!("{:.1} %", a * 100.0));
                println!(
                    "{id:<32} {:<9} {published:<10} {accuracy}",
                    text(model, "state")
                );
            }
        }
        ModelCommand::Import(import) => {
            let dir = adopt::import(&import)?;
            match &import.author {
                Some(author) if import.push => push(place, &dir, author).await?,
                _ => println!("next: cloud-coordinator model push {}", dir.display()),
            }
        }
        ModelCommand::Push { dir, who } => push(place, &dir, &who.author).await?,
        ModelCommand::Publish { model, who } => {
            let publication = json!({"model": model, "author": who.author});
            let said = place
                .ask(Method::POST, "/releases", Some(publication))
                .await?;
            println!(
                "{} is published as {}",
                text(&said, "model"),
                text(&said, "digest")
            );
        }
    }
    Ok(())
}

/// Does what `device …` asks for.
pub(crate) async fn device(place: &Where, command: DeviceCommand) -> anyhow::Result<()> {
    let (device, model, author) = match command {
        DeviceCommand::List => {
            let devices = place.ask(Method::GET, "/devices?limit=1000", None).await?;
            let known = place
                .ask(Method::GET, "/identities?limit=1000", None)
                .await?;
            println!(
                "{:<28} {:<9} {:<8} {:<28} {:<11} {:<11} {:<9} {:<8} why",
                "device", "identity", "status", "model", "update", "failure", "settings", "failure"
            );
            let same = |a: &Value, b: &Value| a["site"] == b["site"] && a["device"] == b["device"];
            let never_heard = |i: &&Value| !each(&devices["items"]).any(|device| same(device, i));
            for device in each(&devices["items"]).chain(each(&known).filter(never_heard)) {
                let (model, update) = (&device["model"], &device["update"]);
                let settings = &update["settings"];
                println!(
                    "{:<28} {:<9} {:<8} {:<28} {:<11} {:<11} {:<9} {:<8} {}",
                    format!("{}/{}", text(device, "site"), text(device, "device")),
                    each(&known)
                        .find(|i| same(device, i))
                        .map_or("-", |i| text(i, "state")),
                    text(device, "status"),
                    format!("{}@{}", text(model, "name"), text(model, "version")),
                    text(update, "phase"),
                    text(&update["failure"], "reason"),
                    settings["loaded"]["version"]
                        .as_u64()
                        .map_or("-".into(), |version| version.to_string()),
                    text(&settings["failure"], "reason"),
                    [update, settings]
                        .map(|of| of["failure"]["detail"].as_str().unwrap_or_default())
                        .join(" ")
                        .trim(),
                );
            }
            return Ok(());
        }
        DeviceCommand::Quarantine(command) => return quarantine::quarantine(place, command).await,
        DeviceCommand::Identity(command) => return identity::identity(place, command).await,
        DeviceCommand::Pin { device, model, who } => (device, json!(model), who.author),
        DeviceCommand::Unpin { device, who } => (device, Value::Null, who.author),
    };
    if device.split('/').count() != 2 {
        bail!("{device:?} is not SITE/DEVICE");
    }
    let said = json!({"model": model, "author": author});
    let path = format!("/devices/{device}/pin");
    place.ask(Method::PUT, &path, Some(said)).await?;
    println!("{device} is told");
    Ok(())
}

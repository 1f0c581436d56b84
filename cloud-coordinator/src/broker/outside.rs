//! A broker that is another program: how this coordinator reaches it, and how it learns who may do what.
//!
//! What it needs lies in one folder and is written whenever it would be different: certificates that do not count any more,
//! rights where the broker has no pattern for them, and its own certificate before it runs out. Then the broker is told to read
//! it. Sessions that are open are nothing that a list ends: whoever was revoked is turned out by somebody of the same name, which
//! every broker understands.

mod access;
mod files;

use std::{collections::HashSet, path::Path, sync::Arc, time::Duration};

use tokio::{process::Command, sync::Notify, time::timeout};
use tokio_util::sync::CancellationToken;

pub(crate) use self::access::{Access, explain};
use self::files::Folder;
use super::rules::{COORDINATOR, Facts, Product};
use crate::{
    Config, clock,
    config::{BrokerConfig, BrokerUrl},
    metrics::Metrics,
    records::Records,
    trust::{Authority, Identity, Subscribers, devices::Devices, folder},
};

/// Nothing happens for this long, and it is looked whether the broker's certificate is to be renewed.
const LOOK: Duration = Duration::from_secs(3_600);
/// What failed is tried again after this.
const AGAIN: Duration = Duration::from_secs(10);
/// To tell the broker that it should read its files takes a signal, or a command that asks a cluster.
const RELOAD: Duration = Duration::from_secs(30);
/// Changes come in swarms when a fleet enrols: they are written together.
const GATHER: Duration = Duration::from_millis(200);
/// After the broker was told, a revoked device is turned out at these moments: it may have been told before it has read.
const TURN_OUT: [Duration; 4] = [
    Duration::from_millis(500),
    Duration::from_secs(4),
    Duration::from_secs(15),
    Duration::from_secs(25),
];

/// Keeps the broker's folder up to date.
pub(crate) struct Outside {
    pub(crate) folder: Folder,
    pub(crate) access: Arc<Access>,
    pub(crate) identity: Arc<Identity>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) reload: Vec<String>,
    /// Somebody came, went or was revoked.
    pub(crate) changed: Arc<Notify>,
}

impl Outside {
    /// If there is an external broker whose files are ours to write.
    pub(crate) fn new(
        config: &BrokerConfig,
        access: &Arc<Access>,
        identity: &Arc<Identity>,
        metrics: &Arc<Metrics>,
    ) -> Option<Self> {
        Some(Self {
            folder: Folder::of(config)?,
            access: access.clone(),
            identity: identity.clone(),
            metrics: metrics.clone(),
            reload: config.external.reload.clone(),
            changed: identity.changed.clone(),
        })
    }

    /// Until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut turned_out = HashSet::new();
        // Whatever was written before this coordinator started: the broker may not have been told.
        let mut told = false;
        loop {
            let done = self.once(&mut told, &mut turned_out, &stop).await;
            let wait = match done {
                Ok(()) => LOOK,
                Err(why) => {
                    self.metrics.outside_errors.inc();
                    tracing::error!(
                        "the external broker does not know what has changed, trying again: {why}"
                    );
                    AGAIN
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.changed.notified() => tokio::time::sleep(GATHER).await,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn once(
        &self,
        told: &mut bool,
        turned_out: &mut HashSet<[u8; 32]>,
        stop: &CancellationToken,
    ) -> Result<(), String> {
        let identity = &self.identity;
        let now_ms = clock::now_ms();
        let revoked = identity.devices.revoked(now_ms).await;
        let revoked = revoked.map_err(|e| e.to_string())?;
        let serials: Vec<String> = revoked.iter().flat_map(|r| r.serials.clone()).collect();
        let facts = facts(&self.folder, &identity.devices, &identity.subscribers).await?;
        let written = self
            .folder
            .write(&facts, &identity.authority, &serials, now_ms)?;
        *told &= written.is_empty();
        if !*told {
            reload(&self.reload).await?;
            *told = true;
            tracing::info!(?written, "the external broker knows who may do what");
        }
        let here: HashSet<_> = revoked.iter().map(|r| r.key).collect();
        turned_out.retain(|key| here.contains(key));
        let new = revoked.into_iter().filter(|r| turned_out.insert(r.key));
        let names: Vec<String> = new.map(|r| r.name).collect();
        if !names.is_empty() {
            let (access, metrics, stop) = (self.access.clone(), self.metrics.clone(), stop.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = turn_out(&access, &metrics, &names) => {}
                }
            });
        }
        Ok(())
    }
}

/// Ends the sessions of these devices by taking their places for a moment.
async fn turn_out(access: &Access, metrics: &Metrics, names: &[String]) {
    for wait in TURN_OUT {
        tokio::time::sleep(wait).await;
        for name in names {
            match access.take_place(name).await {
                Ok(()) => {
                    metrics.outside_turned_out.inc();
                    tracing::info!(device = name, "turned out of the external broker");
                }
                Err(why) => {
                    tracing::warn!(
                        device = name,
                        "cannot be turned out of the external broker, where its session may stand until it is lost: {why}"
                    );
                }
            }
        }
    }
}

/// Runs what makes the broker read its files.
async fn reload(command: &[String]) -> Result<(), String> {
    let [program, arguments @ ..] = command else {
        return Ok(());
    };
    let failed = |why: String| format!("broker.reload: {}: {why}", command.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(RELOAD, output)
        .await
        .map_err(|_| failed(format!("does not end within {} s", RELOAD.as_secs())))?
        .map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.trim().chars().take(200).collect();
    Err(failed(format!("{}: {said}", output.status)))
}

async fn facts(
    folder: &Folder,
    devices: &Devices,
    subscribers: &Subscribers,
) -> Result<Facts, String> {
    let devices = devices.names().await.map_err(|e| e.to_string())?;
    Ok(Facts {
        folder: folder.path.clone(),
        bind: folder.bind(),
        port: folder.url.port,
        coordinator: folder.user.clone().unwrap_or_else(|| COORDINATOR.into()),
        by_password: folder.user.is_some(),
        devices,
        subscribers: subscribers.all(),
    })
}

/// Writes the folder once, from the data folder; what to do next, for people.
pub(crate) async fn write_once(config: &Config) -> anyhow::Result<String> {
    use anyhow::Context;
    let broker = &config.broker;
    let said = "which broker, where are its files to go, and under which address is it reached? Give --for, --to and \
                --broker mqtts://HOST:PORT, or broker.rules_for, broker.rules and broker.url in --config";
    let target = Folder::of(broker).context(said)?;
    let errors = config.contradictions();
    anyhow::ensure!(errors.is_empty(), "{}", errors.join("\n"));
    let authority = Arc::new(Authority::open(&folder(&config.data)?)?);
    let records = Arc::new(Records::trust(&config.data).await?);
    let life = Duration::from_secs(config.tls.device_s);
    let most = config.ingest.max_devices;
    let devices = Devices::open(records.clone(), authority.clone(), life, most).await?;
    let subscribers = Subscribers::open(records).await?;
    let failed = |why: String| anyhow::anyhow!(why);
    let facts = facts(&target, &devices, &subscribers)
        .await
        .map_err(failed)?;
    let now_ms = clock::now_ms();
    let revoked = devices.revoked(now_ms).await?;
    let serials: Vec<String> = revoked.into_iter().flat_map(|r| r.serials).collect();
    let written = target
        .write(&facts, &authority, &serials, now_ms)
        .map_err(failed)?;
    Ok(words(&target.path, target.product, &written))
}

fn words(folder: &Path, product: Product, written: &[&str]) -> String {
    let shown = folder.display();
    let done = match written {
        [] => format!("{shown} is up to date"),
        some => format!("written to {shown}: {}", some.join(", ")),
    };
    let next = match product {
        Product::Mosquitto => format!(
            "include_dir or copy {shown}/lacewing.conf into mosquitto's configuration, let its user read broker.key, add each \
             subscriber with `mosquitto_passwd {shown}/passwords NAME`, and reload it"
        ),
        Product::Rabbitmq => format!(
            "include {shown}/lacewing.conf, let RabbitMQ's user read broker.key, run `rabbitmqctl import_definitions \
             {shown}/definitions.json`, and give each subscriber a password with `rabbitmqctl change_password`"
        ),
        Product::Nats => format!(
            "start nats-server with {shown}/lacewing.conf and a variable LACEWING_SUBSCRIBER_<NAME> for each subscriber's \
             password; `nats-server --signal reload` after each change"
        ),
    };
    format!("{done}\n{next}")
}

/// The address, as it is shown.
pub(crate) fn shown(url: &BrokerUrl) -> String {
    let scheme = if url.tls { "mqtts" } else { "mqtt" };
    format!("{scheme}://{}:{}", url.host, url.port)
}

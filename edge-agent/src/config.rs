//! The agent's configuration: TOML files in layers, then the environment, then one check of everything.

pub(crate) mod broker;
mod layers;

use std::{fmt, path::PathBuf};

use mesh_core::{
    Name,
    decide::{Publish, Rule},
};
use serde::Deserialize;

pub use layers::Layers;
pub(crate) use layers::TOKEN;

use crate::{
    board::BoardConfig,
    capture::{self, SourceConfig},
    drift::DriftConfig,
    identity::{self, CoordinatorConfig, IdentityConfig, Named},
    mesh::MeshConfig,
    offload::OffloadConfig,
    samples::SamplesConfig,
    update::UpdateConfig,
};

/// More cameras and sensors than this do not fit a small board.
const MAX_SOURCES: usize = 16;
/// They stand in one short message.
const MAX_TAGS: usize = 8;
/// The outbox keeps several segments, so that it can drop the oldest one.
const MIN_OUTBOX_BYTES: u64 = 4 * 1024 * 1024;

/// Everything that can be set. Each part has working defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The site that the device belongs to.
    pub site: Name,
    /// The device's name, unique in its site. Default: the host's name.
    pub device: Name,
    /// What it is sorted by besides: a rollout can go to all devices with a tag. At most 8.
    pub tags: Vec<Name>,
    /// The folder for everything that must survive a restart.
    pub data: PathBuf,
    /// Whom the device belongs to.
    pub coordinator: CoordinatorConfig,
    /// What follows from that and from what is on the disk; nothing where the device has no identity and is to get none.
    #[serde(skip)]
    pub identity: Option<IdentityConfig>,
    /// Where readings go.
    pub broker: BrokerConfig,
    /// Cameras.
    pub source: Vec<SourceConfig>,
    /// What looks at the frames.
    pub model: ModelConfig,
    /// Which results become readings.
    pub publish: Publish,
    /// What makes the reject output pulse.
    pub reject: Option<Rule>,
    /// What keeps readings until the coordinator has them.
    pub outbox: OutboxConfig,
    /// How it lies on the disk.
    pub storage: StorageConfig,
    /// Pins.
    pub board: BoardConfig,
    /// How often the device speaks about itself.
    pub report: ReportConfig,
    /// Frames that are kept to learn from.
    pub samples: SamplesConfig,
    /// Has what a source sees moved away from what training saw?
    pub drift: DriftConfig,
    /// Models that come from the coordinator.
    pub update: UpdateConfig,
    /// The other devices of the site.
    pub mesh: MeshConfig,
    /// Frames that go to neighbours, and theirs that come here.
    pub offload: OffloadConfig,
}

/// The broker's address and how to keep in touch with it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BrokerConfig {
    /// `mqtts://HOST:PORT`, or `mqtt://HOST:PORT` in the clear. Default: what the coordinator says, where the device has
    /// an identity.
    pub url: String,
    /// Is it the coordinator that says where the broker is?
    #[serde(skip)]
    pub by_coordinator: bool,
    /// Who signed the broker's certificate, a file in PEM. Default: the coordinator's authority.
    pub ca: Option<PathBuf>,
    /// The device's name at a broker that asks for a name and a password. Default: it shows its certificate.
    pub user: Option<String>,
    /// The file with the password, which only the agent can read.
    pub password_file: Option<PathBuf>,
    /// Seconds between signs of life, 5 to 3600. A dead broker is noticed after about 1.5 of them.
    pub keep_alive_s: u16,
    /// The longest wait between two tries to connect, 1 to 3600 seconds.
    pub max_backoff_s: u16,
}

/// The model's bundle.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Folder of the bundle. Without one the device captures nothing and says so.
    pub bundle: Option<PathBuf>,
}

/// Bounds of the outbox.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutboxConfig {
    /// The most that it takes on disk, in bytes, at least 4 MiB. Beyond it the oldest readings go, and a gap
    /// says which.
    pub max_bytes: u64,
}

/// How often the device reports on itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReportConfig {
    /// Seconds between two `metrics` messages, 1 to 86400.
    pub every_s: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            site: default_name("home"),
            device: host_name(),
            tags: Vec::new(),
            data: PathBuf::from("/var/lib/lacewing"),
            coordinator: CoordinatorConfig::default(),
            identity: None,
            broker: BrokerConfig::default(),
            source: Vec::new(),
            model: ModelConfig::default(),
            publish: Publish::All,
            reject: None,
            outbox: OutboxConfig::default(),
            storage: StorageConfig::default(),
            board: BoardConfig::default(),
            report: ReportConfig::default(),
            samples: SamplesConfig::default(),
            drift: DriftConfig::default(),
            update: UpdateConfig::default(),
            mesh: MeshConfig::default(),
            offload: OffloadConfig::default(),
        }
    }
}

impl Default for BrokerConfig {
    fn default() -> Self {
        Self {
            url: "mqtt://127.0.0.1:1883".into(),
            by_coordinator: false,
            ca: None,
            user: None,
            password_file: None,
            keep_alive_s: 30,
            max_backoff_s: 30,
        }
    }
}

/// `[storage]`: readings, samples and the private key on the disk.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StorageConfig {
    /// A file with 32 random bytes, or their 64 hexadecimal digits, that only the agent's user can read: what is written from now
    /// on is encrypted with them. The file should not lie on the same disk: see docs/security.md.
    pub key_file: Option<PathBuf>,
}

impl Default for OutboxConfig {
    /// A reading takes about 400 bytes: this is a week at one reading a second.
    fn default() -> Self {
        Self {
            max_bytes: 256 * 1024 * 1024,
        }
    }
}

impl Default for ReportConfig {
    fn default() -> Self {
        Self { every_s: 60 }
    }
}

fn default_name(text: &str) -> Name {
    text.parse().unwrap_or_else(|_| Name::itself())
}

fn host_name() -> Name {
    let node = rustix::system::uname();
    let text = node.nodename().to_string_lossy().to_lowercase();
    text.split('.')
        .next()
        .and_then(|host| host.parse().ok())
        .unwrap_or_else(|| default_name("device"))
}

/// Every mistake that was found, each with the place it is in.
#[derive(Debug, thiserror::Error)]
pub struct ConfigErrors(pub Vec<String>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(
            f,
            "the configuration has {count} mistake{}:",
            if count == 1 { "" } else { "s" }
        )?;
        self.0
            .iter()
            .try_for_each(|mistake| write!(f, "\n  {mistake}"))
    }
}

impl Config {
    /// Reads the files in order, a later one over an earlier one, then the environment, and checks it all.
    ///
    /// # Errors
    /// Every mistake at once.
    pub fn load(
        files: &[PathBuf],
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigErrors> {
        Layers::new(files, environment).read(None)
    }

    /// Reads one text, as [`Config::load`] does with files.
    ///
    /// # Errors
    /// Every mistake at once.
    pub fn parse(text: &str) -> Result<Self, ConfigErrors> {
        match text.parse::<toml::Table>() {
            Ok(table) => Self::from_table(table, Vec::new()),
            Err(error) => Err(ConfigErrors(vec![error.to_string()])),
        }
    }

    /// A key that cannot be read is noted and taken out, so that the next one is seen too.
    fn from_table(mut table: toml::Table, mut mistakes: Vec<String>) -> Result<Self, ConfigErrors> {
        let named = Named {
            site: table.contains_key("site"),
            broker: table
                .get("broker")
                .is_some_and(|broker| broker.get("url").is_some()),
        };
        let mut config: Self = loop {
            match serde_path_to_error::deserialize(table.clone()) {
                Ok(config) => break config,
                Err(error) => {
                    let path = error.path().clone();
                    mistakes.push(format!("{path}: {}", error.inner().message()));
                    if !take_out(&mut table, &path) {
                        return Err(ConfigErrors(mistakes));
                    }
                }
            }
        };
        config.check(&mut mistakes);
        identity::settle(&mut config, named, &mut mistakes);
        if mistakes.is_empty() {
            Ok(config)
        } else {
            Err(ConfigErrors(mistakes))
        }
    }

    /// Where models come from, if anywhere.
    #[must_use]
    pub fn coordinator(&self) -> Option<&str> {
        let own = self.update.coordinator.as_deref();
        own.or(self.samples.coordinator.as_deref())
    }

    fn check(&self, mistakes: &mut Vec<String>) {
        let mut must = |good: bool, field: &str, what: &str| {
            if !good {
                mistakes.push(format!("{field}: {what}"));
            }
        };
        must(
            self.site != Name::itself(),
            "site",
            "must be a name, `_` is reserved",
        );
        must(
            self.device != Name::itself(),
            "device",
            "must be a name, `_` is reserved",
        );
        must(
            self.tags.len() <= MAX_TAGS && !self.tags.contains(&Name::itself()),
            "tags",
            "at most 8 names, `_` is reserved",
        );
        if let Err(why) = self.broker.address() {
            must(false, "broker.url", &why);
        }
        for (field, what) in broker::mistakes(&self.broker) {
            must(false, &format!("broker.{field}"), &what);
        }
        must(
            (5..=3600).contains(&self.broker.keep_alive_s),
            "broker.keep_alive_s",
            "must be 5 to 3600 seconds",
        );
        must(
            (1..=3600).contains(&self.broker.max_backoff_s),
            "broker.max_backoff_s",
            "must be 1 to 3600 seconds",
        );
        must(
            (1..=86_400).contains(&self.report.every_s),
            "report.every_s",
            "must be 1 to 86400 seconds",
        );
        must(
            self.outbox.max_bytes >= MIN_OUTBOX_BYTES,
            "outbox.max_bytes",
            "must be at least 4194304 (4 MiB)",
        );
        must(
            self.source.len() <= MAX_SOURCES,
            "source",
            "at most 16 sources",
        );
        if let Publish::AtMostEvery { every_s } = self.publish {
            must(every_s > 0, "publish.every_s", "must be at least 1 second");
        }
        if let Some(rule) = &self.reject {
            must(
                !rule.labels.is_empty(),
                "reject.labels",
                "must name at least one label",
            );
            must(
                (0.0..=1.0).contains(&rule.min_score),
                "reject.min_score",
                "must lie between 0 and 1",
            );
        }
        for (at, source) in self.source.iter().enumerate() {
            let twice = self.source.iter().take(at).any(|s| s.name == source.name);
            must(
                !twice,
                &format!("source[{at}].name"),
                "another source has this name",
            );
            for (field, what) in source.mistakes() {
                must(false, &format!("source[{at}].{field}"), &what);
            }
        }
        for (at, what) in capture::without_trigger(&self.source, self.board.trigger.is_some()) {
            must(false, &format!("source[{at}].trigger"), what);
        }
        for (field, what) in self.mesh.mistakes() {
            must(false, &format!("mesh.{field}"), &what);
        }
        let (neighbours, rejects) = (self.mesh.enabled, self.reject.is_some());
        let coordinator = self.coordinator().is_some();
        for (field, what) in self.offload.mistakes(neighbours, coordinator, rejects) {
            must(false, &format!("offload.{field}"), what);
        }
        for (field, what) in self.samples.mistakes() {
            must(false, &format!("samples.{field}"), &what);
        }
        for (field, what) in self.drift.mistakes() {
            must(false, &format!("drift.{field}"), what);
        }
        for (field, what) in self.update.mistakes() {
            must(false, &format!("update.{field}"), &what);
        }
        for (field, what) in self.board.mistakes() {
            must(false, &format!("board.{field}"), &what);
        }
    }
}

impl BrokerConfig {
    /// Can the device tell who the broker is, and say who it is itself, without an identity?
    pub(crate) const fn is_enough(&self) -> bool {
        self.ca.is_some() && self.user.is_some()
    }

    /// Host and port.
    ///
    /// # Errors
    /// Says what the address should look like.
    pub fn address(&self) -> Result<(String, u16), String> {
        let wrong = || {
            format!(
                "must be mqtts://HOST:PORT or mqtt://HOST:PORT, not {:?}",
                self.url
            )
        };
        let (scheme, rest) = self.url.split_once("://").ok_or_else(wrong)?;
        let default = match scheme {
            "mqtt" => 1883,
            "mqtts" => identity::MQTTS_PORT,
            _ => return Err(wrong()),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().map_err(|_| wrong())?),
            None => (rest, default),
        };
        if host.is_empty() || port == 0 || host.contains(['/', '@', ' ']) {
            return Err(wrong());
        }
        Ok((host.to_owned(), port))
    }

    /// Is the connection encrypted, and both ends known by their certificates?
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.by_coordinator || self.url.starts_with("mqtts://")
    }
}

/// Takes out what `path` points at, or as much of the way to it as exists.
fn take_out(table: &mut toml::Table, path: &serde_path_to_error::Path) -> bool {
    use serde_path_to_error::Segment;
    let mut segments = path.iter().peekable();
    let Some(Segment::Map { key }) = segments.next() else {
        return false;
    };
    let mut key = key.clone();
    let mut table = table;
    loop {
        match (table.get_mut(&key), segments.next()) {
            (Some(toml::Value::Table(_)), Some(Segment::Map { key: next })) => {
                let Some(toml::Value::Table(inner)) = table.get_mut(&key) else {
                    return false;
                };
                (table, key) = (inner, next.clone());
            }
            (Some(toml::Value::Array(items)), Some(Segment::Seq { index })) => {
                let Some(Segment::Map { key: next }) = segments.next() else {
                    return *index < items.len() && {
                        items.remove(*index);
                        true
                    };
                };
                let Some(toml::Value::Array(items)) = table.get_mut(&key) else {
                    return false;
                };
                let Some(toml::Value::Table(inner)) = items.get(*index) else {
                    return false;
                };
                if !inner.contains_key(next) {
                    // A key that is missing: the entry cannot be completed, so it goes.
                    items.remove(*index);
                    return true;
                }
                let Some(toml::Value::Table(inner)) = items.get_mut(*index) else {
                    return false;
                };
                (table, key) = (inner, next.clone());
            }
            (Some(_), _) => return table.remove(&key).is_some(),
            (None, _) => return false,
        }
    }
}

//! The configuration: TOML, every mistake reported at once with the name of its field.

mod broker;

use std::{
    ffi::OsString,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

pub use self::broker::{BrokerConfig, BrokerUrl, ExternalConfig, Product, broker_url};
pub use crate::directory::{DirectoryConfig, GroupConfig};
use crate::objects::folder_of;
pub use crate::train::StartPolicy;

/// A quarter: with eight devices or more, none weighs more than a third of all others together.
const DEVICE_SHARE: f64 = 0.25;
/// One day in seconds.
const DAY_S: u64 = 86_400;

/// Where HTTP is spoken over TLS.
pub const HTTPS_PORT: u16 = 8443;
/// Where it is spoken in the clear.
pub const HTTP_PORT: u16 = 8080;

/// How a coordinator runs. The default listens on loopback only and keeps its data in `./lacewing-data`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The folder of the database; made if it does not exist.
    pub data: PathBuf,
    /// Where the API and the page are served. Port 0 is any free one.
    pub http: SocketAddr,
    /// The broker.
    pub broker: BrokerConfig,
    /// How much is kept.
    pub retention: RetentionConfig,
    /// How much may wait.
    pub ingest: IngestConfig,
    /// What several cameras of a site see.
    pub sightings: SightingsConfig,
    /// What is kept to learn from.
    pub samples: SamplesConfig,
    /// How models are trained and judged.
    pub training: TrainingConfig,
    /// Certificates, and whether they are asked for.
    pub tls: TlsConfig,
    /// A directory that people may come in by.
    pub oidc: Option<DirectoryConfig>,
}

/// Certificates, and whether they are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// TLS on the API and on the embedded broker. Without it both are kept on loopback, and the broker believes what
    /// clients say.
    pub enabled: bool,
    /// More names and addresses under which this coordinator is reached; the last one is told to new devices.
    pub names: Vec<String>,
    /// For how long a device's certificate holds, in seconds; in the file in days, 1..=365.
    pub device_s: u64,
}

/// What is kept of the readings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetentionConfig {
    /// Days, at least 1/24.
    pub max_age_days: f64,
    /// Bytes of the database, at least 16 MiB.
    pub max_bytes: u64,
}

/// What several cameras of a site see, and is said once.
#[derive(Clone, Debug, PartialEq)]
pub struct SightingsConfig {
    /// Labels of readings that are about something that happens; at most 64. None: nothing is looked for.
    pub labels: Vec<String>,
    /// Readings with a lower score do not count, 0..=1.
    pub min_score: f64,
    /// Readings this far apart at most are about the same thing, and it is said so long after the first, in milliseconds,
    /// 100..=60000.
    pub window_ms: u64,
}

impl Default for SightingsConfig {
    /// Two seconds: clocks that are set over the network, a frame every second, and a network between.
    fn default() -> Self {
        Self {
            labels: Vec::new(),
            min_score: 0.5,
            window_ms: 2_000,
        }
    }
}

/// What may wait between the broker and the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IngestConfig {
    /// Messages, 1..=1,000,000.
    pub queue_messages: usize,
    /// Bytes, at least 1 MiB: the largest message and some more.
    pub queue_bytes: usize,
    /// The most devices, 1..=1,000,000.
    pub max_devices: usize,
}

/// What is kept to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SamplesConfig {
    /// Where images are kept, `file:///folder`; without it in `objects` in the folder of the database.
    pub objects: Option<String>,
    /// Bytes of images that are on their way, at least 8 MiB: the largest image.
    pub staging_bytes: u64,
    /// The most samples, at least 1. Those that were deleted count, since a device may send them again.
    pub max_samples: u64,
    /// The most bytes of images, at least 8 MiB.
    pub max_bytes: u64,
    /// Days that samples are kept which are neither labelled nor held out, at most 36,500; 0 is for ever.
    pub max_age_days: u64,
}

/// How models are trained and judged.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingConfig {
    /// Bundles to start from: taken in at every start, if they are not known yet.
    pub models: Vec<PathBuf>,
    /// A job that takes longer is ended, in seconds, 1..=604,800.
    pub time_limit_s: u64,
    /// The external trainer and its arguments; empty is none.
    pub external: Vec<String>,
    /// What a candidate must fulfil, see [`learn::gate`].
    pub policy: learn::gate::Policy,
    /// The largest share of a training set that one device may give where there are many, above 0 and at most 1.
    pub device_share: f64,
    /// When a device's samples are set apart, see [`learn::suspect`].
    pub suspect: learn::suspect::Policy,
    /// What starts a training without anybody asking for it.
    pub start: StartPolicy,
    /// The program that tries models, with its first arguments; empty is this one. Not read from the file.
    pub program: Vec<OsString>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data: PathBuf::from("lacewing-data"),
            http: SocketAddr::from(([127, 0, 0, 1], HTTPS_PORT)),
            broker: BrokerConfig {
                url: None,
                external: ExternalConfig::default(),
                listen: BrokerConfig::default_listen(true),
                max_connections: 20_000,
                publish_rate: 10_000,
            },
            retention: RetentionConfig {
                max_age_days: 30.0,
                max_bytes: 10 << 30,
            },
            sightings: SightingsConfig::default(),
            ingest: IngestConfig {
                queue_messages: 16_384,
                queue_bytes: 32 << 20,
                max_devices: 100_000,
            },
            samples: SamplesConfig {
                objects: None,
                staging_bytes: 1 << 30,
                max_samples: 1_000_000,
                max_bytes: 100 << 30,
                max_age_days: 0,
            },
            training: TrainingConfig {
                models: Vec::new(),
                time_limit_s: 3_600,
                external: Vec::new(),
                policy: learn::gate::Policy::default(),
                device_share: DEVICE_SHARE,
                suspect: learn::suspect::Policy::default(),
                start: StartPolicy::default(),
                program: Vec::new(),
            },
            tls: TlsConfig {
                enabled: true,
                names: Vec::new(),
                device_s: 7 * DAY_S,
            },
            oidc: None,
        }
    }
}

/// Everything that is wrong with a configuration.
#[derive(Debug)]
pub struct ConfigErrors(pub Vec<String>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration cannot be used:")?;
        self.0.iter().try_for_each(|e| write!(f, "\n  {e}"))
    }
}

impl std::error::Error for ConfigErrors {}

/// Reads the fields of one table and gathers what is wrong with them.
struct Fields<'a> {
    table: Table,
    prefix: &'static str,
    errors: &'a mut Vec<String>,
}

impl Fields<'_> {
    /// Replaces `value` by what the field says, if it says something right.
    fn take<T>(
        &mut self,
        name: &str,
        value: &mut T,
        read: impl FnOnce(Value) -> Result<T, String>,
    ) {
        match self.table.remove(name).map(read) {
            None => {}
            Some(Ok(read)) => *value = read,
            Some(Err(error)) => {
                self.errors.push(format!("{}{name}: {error}", self.prefix));
            }
        }
    }

    /// The same of a section whose fields serde knows, and each of which has a default: they are looked at one by one, so that
    /// every mistake is told. `check` says of a value what is out of its range, beginning with its field.
    fn section<T: serde::de::DeserializeOwned>(
        &mut self,
        name: &str,
        value: &mut T,
        check: impl Fn(&T) -> Result<(), String>,
    ) {
        let section = match self.table.remove(name) {
            None => return,
            Some(Value::Table(section)) => section,
            Some(other) => {
                let kind = other.type_str();
                let wrong = format!("{}{name}: is a section, not {kind}", self.prefix);
                self.errors.push(wrong);
                return;
            }
        };
        let mistakes: Vec<_> = section
            .iter()
            .filter_map(|(field, value)| {
                let alone = Table::from_iter([(field.clone(), value.clone())]);
                let read = alone
                    .try_into()
                    .map_err(|error: toml::de::Error| format!("{field}: {}", error.message()));
                read.and_then(|read| check(&read)).err()
            })
            .collect();
        match section.try_into::<T>() {
            Ok(read) if mistakes.is_empty() => *value = read,
            Err(error) if mistakes.is_empty() => {
                let wrong = format!("{}{name}: {}", self.prefix, error.message());
                self.errors.push(wrong);
            }
            _ => {
                let named = mistakes
                    .iter()
                    .map(|m| format!("{}{name}.{m}", self.prefix));
                self.errors.extend(named);
            }
        }
    }

    fn finish(self) {
        for name in self.table.keys() {
            self.errors
                .push(format!("{}{name}: no such field", self.prefix));
        }
    }
}

fn text(value: Value) -> Result<String, String> {
    match value {
        Value::String(text) if !text.is_empty() => Ok(text),
        Value::String(_) => Err("is empty".into()),
        other => Err(format!("is a text in quotes, not {}", other.type_str())),
    }
}

fn texts(value: Value) -> Result<Vec<String>, String> {
    match value {
        Value::Array(items) => items.into_iter().map(text).collect(),
        other => Err(format!("is a list of texts, not {}", other.type_str())),
    }
}

/// Labels of readings.
fn labels(value: Value) -> Result<Vec<String>, String> {
    let all = texts(value)?;
    if all.len() <= 64 && all.iter().all(|l| (1..=128).contains(&l.len())) {
        Ok(all)
    } else {
        Err("at most 64 labels of 1 to 128 bytes".into())
    }
}

/// Names of a host, or its addresses: what can stand in a certificate.
fn hosts(value: Value) -> Result<Vec<String>, String> {
    let names = texts(value)?;
    let own = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
    let fits = |name: &String| {
        name.parse::<std::net::IpAddr>().is_ok() || (name.len() <= 253 && name.chars().all(own))
    };
    match names.iter().find(|name| !fits(name)) {
        Some(name) => Err(format!("{name:?} is neither a host's name nor an address")),
        None => Ok(names),
    }
}

fn address(value: Value) -> Result<SocketAddr, String> {
    text(value)?
        .parse()
        .map_err(|_| "is an address and a port, as in \"127.0.0.1:8443\"".into())
}

fn boolean(value: Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| "is true or false".into())
}

/// A whole number from `least` to `most`.
fn whole(least: u64, most: u64) -> impl FnOnce(Value) -> Result<u64, String> {
    move |value| {
        value
            .as_integer()
            .and_then(|n| u64::try_from(n).ok())
            .filter(|n| (least..=most).contains(n))
            .ok_or_else(|| format!("is a whole number from {least} to {most}"))
    }
}

fn size(least: u64, most: u64) -> impl FnOnce(Value) -> Result<usize, String> {
    move |value| usize::try_from(whole(least, most)(value)?).map_err(|e| e.to_string())
}

fn days(value: Value) -> Result<f64, String> {
    let number = match value {
        Value::Integer(n) => n as f64,
        Value::Float(n) => n,
        _ => f64::NAN,
    };
    if (1.0 / 24.0..=36_500.0).contains(&number) {
        Ok(number)
    } else {
        Err("is a number of days from 0.05 to 36500".into())
    }
}

/// A share above 0 and at most 1.
fn share(value: Value) -> Result<f64, String> {
    let number = match value {
        Value::Integer(n) => n as f64,
        Value::Float(n) => n,
        _ => f64::NAN,
    };
    if number > 0.0 && number <= 1.0 {
        Ok(number)
    } else {
        Err("is a share above 0 and at most 1".into())
    }
}

impl Config {
    /// Reads a configuration; what it does not say is as in [`Config::default`].
    ///
    /// # Errors
    /// Everything that is wrong with it, each with the name of its field.
    pub fn parse(toml: &str) -> Result<Self, ConfigErrors> {
        Self::parse_as(toml, false)
    }

    /// The same, and in the clear if `plain`, whatever the text says about that.
    fn parse_as(toml: &str, plain: bool) -> Result<Self, ConfigErrors> {
        let mut table: Table = toml
            .parse()
            .map_err(|e| ConfigErrors(vec![format!("not TOML: {e}")]))?;
        if plain {
            let tls = table.entry("tls").or_insert_with(|| Table::new().into());
            // Anything but a table is told of below.
            if let Some(tls) = tls.as_table_mut() {
                tls.insert("enabled".into(), false.into());
            }
        }
        let mut config = Self::default();
        let mut errors = Vec::new();
        config.fill(table, &mut errors);
        errors.extend(config.contradictions());
        if errors.is_empty() {
            Ok(config)
        } else {
            Err(ConfigErrors(errors))
        }
    }

    /// Reads the file, if there is one. In the clear if `plain`, whatever the file says about that.
    ///
    /// # Errors
    /// The file cannot be read, or as in [`Config::parse`].
    pub fn read(path: Option<&Path>, plain: bool) -> Result<Self, ConfigErrors> {
        let text = match path {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|e| ConfigErrors(vec![format!("cannot read {}: {e}", path.display())]))?,
            None => String::new(),
        };
        Self::parse_as(&text, plain)
    }

    fn fill(&mut self, mut table: Table, errors: &mut Vec<String>) {
        if let Some(section) = table.remove("oidc") {
            match DirectoryConfig::read(section) {
                Ok(directory) => self.oidc = Some(directory),
                Err(mistakes) => errors.extend(mistakes),
            }
        }
        let listens = |t: &Value| t.get("listen").is_some();
        let (http, mqtt) = (
            table.contains_key("http"),
            table.get("broker").is_some_and(listens),
        );
        let mut sections = Vec::new();
        for name in [
            "broker",
            "retention",
            "ingest",
            "sightings",
            "samples",
            "training",
            "tls",
        ] {
            sections.push(match table.remove(name) {
                None => Table::new(),
                Some(Value::Table(section)) => section,
                Some(_) => {
                    errors.push(format!("{name}: is a section, [{name}]"));
                    Table::new()
                }
            });
        }
        let mut sections = sections.into_iter();
        let mut section = move || sections.next().unwrap_or_default();

        let mut top = Fields {
            table,
            prefix: "",
            errors,
        };
        top.take("data", &mut self.data, |v| Ok(PathBuf::from(text(v)?)));
        top.take("http", &mut self.http, address);
        top.finish();

        self.broker.fill(Fields {
            table: section(),
            prefix: "broker.",
            errors,
        });

        let mut retention = Fields {
            table: section(),
            prefix: "retention.",
            errors,
        };
        retention.take("max_age_days", &mut self.retention.max_age_days, days);
        let bytes = &mut self.retention.max_bytes;
        retention.take("max_bytes", bytes, whole(16 << 20, i64::MAX as u64));
        retention.finish();

        let mut ingest = Fields {
            table: section(),
            prefix: "ingest.",
            errors,
        };
        let messages = &mut self.ingest.queue_messages;
        ingest.take("queue_messages", messages, size(1, 1_000_000));
        let bytes = &mut self.ingest.queue_bytes;
        ingest.take("queue_bytes", bytes, size(1 << 20, 1 << 32));
        let devices = &mut self.ingest.max_devices;
        ingest.take("max_devices", devices, size(1, 1_000_000));
        ingest.finish();

        let mut sightings = Fields {
            table: section(),
            prefix: "sightings.",
            errors,
        };
        sightings.take("labels", &mut self.sightings.labels, labels);
        sightings.take("min_score", &mut self.sightings.min_score, share);
        let window = &mut self.sightings.window_ms;
        sightings.take("window_ms", window, whole(100, 60_000));
        sightings.finish();

        let mut samples = Fields {
            table: section(),
            prefix: "samples.",
            errors,
        };
        samples.take("objects", &mut self.samples.objects, |v| {
            let url = text(v)?;
            folder_of(&url)?;
            Ok(Some(url))
        });
        let largest = mesh_core::MAX_SAMPLE_IMAGE_BYTES;
        let bytes = &mut self.samples.staging_bytes;
        samples.take("staging_bytes", bytes, whole(largest, i64::MAX as u64));
        let most = &mut self.samples.max_samples;
        samples.take("max_samples", most, whole(1, 1_000_000_000));
        let bytes = &mut self.samples.max_bytes;
        samples.take("max_bytes", bytes, whole(largest, i64::MAX as u64));
        let days = &mut self.samples.max_age_days;
        samples.take("max_age_days", days, whole(0, 36_500));
        samples.finish();

        let mut training = Fields {
            table: section(),
            prefix: "training.",
            errors,
        };
        let paths = |v| Ok(texts(v)?.into_iter().map(PathBuf::from).collect());
        training.take("models", &mut self.training.models, paths);
        let limit = &mut self.training.time_limit_s;
        training.take("time_limit_s", limit, whole(1, 604_800));
        training.take("external", &mut self.training.external, texts);
        training.section("policy", &mut self.training.policy, |_| Ok(()));
        training.take("device_share", &mut self.training.device_share, share);
        let check = learn::suspect::Policy::check;
        training.section("suspect", &mut self.training.suspect, check);
        training.section("start", &mut self.training.start, |_| Ok(()));
        training.finish();

        let mut tls = Fields {
            table: section(),
            prefix: "tls.",
            errors,
        };
        tls.take("enabled", &mut self.tls.enabled, boolean);
        tls.take("names", &mut self.tls.names, hosts);
        let days = |v| Ok(whole(1, 365)(v)? * DAY_S);
        tls.take("device_days", &mut self.tls.device_s, days);
        tls.finish();

        // The ports that people expect there.
        if !self.tls.enabled && !http {
            self.http.set_port(HTTP_PORT);
        }
        if !self.tls.enabled && !mqtt {
            self.broker.listen = BrokerConfig::default_listen(false);
        }
    }

    /// What cannot be used together, whoever said it: the file, the environment or the command line.
    #[must_use]
    pub fn contradictions(&self) -> Vec<String> {
        let mut errors = self.broker.contradictions();
        if self.tls.enabled {
            return errors;
        }
        let mut doors = vec![("http", self.http)];
        if self.broker.url.is_none() {
            doors.push(("broker.listen", self.broker.listen));
        }
        let open = doors.iter().filter(|(_, a)| !a.ip().is_loopback());
        errors.extend(open.map(|(name, address)| {
            format!(
                "{name}: {address} can be reached from outside, and tls.enabled is false; keep it on 127.0.0.1, or \
                 leave tls.enabled as it is"
            )
        }));
        errors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_said_is_loopback() {
        let config = Config::parse("").unwrap();
        assert_eq!(config, Config::default());
        assert!(config.http.ip().is_loopback() && config.broker.listen.ip().is_loopback());
        assert_eq!(
            (config.http.port(), config.broker.listen.port()),
            (8443, 8883)
        );
    }

    #[test]
    fn every_mistake_of_a_section_is_named() {
        let error = Config::parse(
            r#"
            [training]
            policy = { alpha = "much", min_total = -1, colour = 1 }
            suspect = { alpha = 0.9, margin = 7, far = 0 }
            start = 5
            "#,
        )
        .unwrap_err();
        for field in [
            "training.policy.alpha",
            "training.policy.min_total",
            "training.policy.colour",
            "training.suspect.alpha",
            "training.suspect.margin",
            "training.suspect.far",
            "training.start",
        ] {
            let named = error
                .0
                .iter()
                .filter(|e| e.starts_with(&format!("{field}: ")));
            assert_eq!(named.count(), 1, "{field}: {error}");
        }
        assert_eq!(error.0.len(), 7, "{error}");
    }

    #[test]
    fn reads_every_field() {
        let config = Config::parse(
            r#"
            data = "/var/lib/lacewing"
            http = "[::1]:0"
            [broker]
            listen = "0.0.0.0:1884"
            max_connections = 10
            publish_rate = 77
            [retention]
            max_age_days = 1
            max_bytes = 20000000
            [ingest]
            queue_messages = 5
            queue_bytes = 1048576
            max_devices = 7
            [samples]
            objects = "file:///srv/images"
            staging_bytes = 8388608
            max_samples = 3
            max_bytes = 9000000
            [training]
            time_limit_s = 9
            [training.policy]
            min_total = 50
            [training.start]
            labels = 200
            drift_labels = 20
            every_h = 24
            trainer = "fine-tune"
            [tls]
            names = ["lacewing.example", "192.0.2.7", "fd00::7"]
            device_days = 2
            "#,
        )
        .unwrap();
        let training = &config.training;
        assert_eq!((training.time_limit_s, training.policy.min_total), (9, 50));
        let start = training.start;
        assert_eq!(
            (start.labels, start.drift_labels, start.every_h),
            (200, 20, 24)
        );
        assert_eq!(
            config.samples.objects.as_deref(),
            Some("file:///srv/images")
        );
        assert_eq!(
            (config.samples.max_samples, config.samples.max_bytes),
            (3, 9_000_000)
        );
        let broker = &config.broker;
        assert_eq!((broker.max_connections, broker.publish_rate), (10, 77));
        assert!(config.tls.enabled);
        assert_eq!((config.tls.names.len(), config.tls.device_s), (3, 172_800));
        assert_eq!(
            (config.retention.max_bytes, config.ingest.max_devices),
            (20_000_000, 7)
        );
        let external = Config::parse("[broker]\nurl = \"mqtts://broker.local\"").unwrap();
        let url = external.broker.url.unwrap();
        assert_eq!((url.host.as_str(), url.port), ("broker.local", 8883));
    }

    #[test]
    fn names_every_mistake_at_once() {
        let errors = Config::parse(
            r#"
            data = ""
            http = "8443"
            htttp = "127.0.0.1:1"
            [broker]
            url = "tcp://x"
            listen = "127.0.0.1:1"
            max_connections = 0
            [retention]
            max_age_days = nan
            max_bytes = -1
            [ingest]
            queue_messages = "many"
            batch = 1
            [samples]
            objects = "ftp://x"
            staging_bytes = 1
            [tls]
            names = ["a b"]
            device_days = 0
            enabled = 1
            "#,
        )
        .unwrap_err()
        .to_string();
        for field in [
            "data: ",
            "http: ",
            "htttp: no such field",
            "broker: either",
            "broker.url: ",
            "broker.max_connections: ",
            "retention.max_age_days: ",
            "retention.max_bytes: ",
            "ingest.queue_messages: ",
            "ingest.batch: no such field",
            "samples.objects: ",
            "samples.staging_bytes: ",
            "tls.names: ",
            "tls.device_days: ",
            "tls.enabled: ",
        ] {
            assert!(errors.contains(field), "{field} in {errors}");
        }
        assert!(
            Config::parse("broker = 1")
                .unwrap_err()
                .to_string()
                .contains("broker: is a section")
        );
        assert!(Config::parse("= 1").is_err());
    }

    #[test]
    fn speaks_plain_text_on_loopback_only() {
        let open = "http = \"0.0.0.0:80\"\n[broker]\nlisten = \"0.0.0.0:1883\"\n";
        assert!(Config::parse(open).is_ok());
        let plain = "[tls]\nenabled = false\n";
        let said = Config::parse(&format!("{open}{plain}")).unwrap_err();
        let said = said.to_string();
        assert!(said.contains("http: 0.0.0.0:80"), "{said}");
        assert!(said.contains("broker.listen: 0.0.0.0:1883"), "{said}");
        let config = Config::parse(plain).unwrap();
        assert_eq!(
            (config.http.port(), config.broker.listen.port()),
            (8080, 1883)
        );
        let some = Config::parse_as("http = \"127.0.0.1:8443\"", true).unwrap();
        assert!(!some.tls.enabled);
        assert_eq!((some.http.port(), some.broker.listen.port()), (8443, 1883));
    }
}

//! The rights of everybody as other brokers want to be told: written from the table in [`super::rights`], never by hand.
//!
//! Texts in, texts out; who writes them where is [`super::outside`]'s.

mod mosquitto;
mod nats;
mod rabbitmq;

use std::path::PathBuf;

use clap::ValueEnum;
use mesh_core::{Name, Topic};
use serde::Deserialize;

use super::rights::{beginnings, below, kinds_of_a_device, kinds_of_the_coordinator, of_site};
use crate::{ingest::KINDS, trust::subscribers::Sites};

/// A broker that rules can be written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Product {
    /// Eclipse Mosquitto 2.
    Mosquitto,
    /// RabbitMQ with its MQTT plugin.
    Rabbitmq,
    /// NATS with JetStream.
    Nats,
}

/// What the rules are about.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Where the files will lie for the broker.
    pub(crate) folder: PathBuf,
    /// The address it listens on, where that is not every one.
    pub(crate) bind: Option<String>,
    /// Its port for devices.
    pub(crate) port: u16,
    /// The coordinator, as its certificate or its password names it.
    pub(crate) coordinator: String,
    /// Does it come with a password, and not with a certificate?
    pub(crate) by_password: bool,
    /// Devices that may come in, as their certificates name them.
    pub(crate) devices: Vec<String>,
    /// Who may listen, and to what.
    pub(crate) subscribers: Vec<(Name, Sites)>,
}

/// The name in the coordinator's own certificate. No device has it: theirs have a slash.
pub(crate) const COORDINATOR: &str = "coordinator";
/// Who signs certificates.
pub(crate) const CA: &str = "ca.pem";
/// Certificates that do not count any more.
pub(crate) const CRL: &str = "crl.pem";
/// The broker's own certificate.
pub(crate) const CERTIFICATE: &str = "broker.pem";
/// Its key.
pub(crate) const KEY: &str = "broker.key";
/// Passwords of subscribers; made once, and somebody else's from then on.
pub(crate) const PASSWORDS: &str = "passwords";

/// What stands at the beginning of each file.
const HEAD: &str =
    "Written by `cloud-coordinator broker rules`; changes are lost with the next writing.";

impl Facts {
    fn at(&self, file: &str) -> String {
        self.folder.join(file).display().to_string()
    }

    /// Where to listen with which port.
    fn port_above(&self, more: u16) -> u16 {
        self.port.saturating_add(more)
    }

    /// Filters that the coordinator reads, and topics that it publishes on: always of a device itself or of one of its sources.
    fn of_coordinator() -> (Vec<String>, Vec<String>) {
        let reads = KINDS.map(Topic::filter).into();
        let writes = kinds_of_the_coordinator().map(Topic::filter).collect();
        (reads, writes)
    }
}

/// The topics of its site that a device reads.
fn of_site_of(device: &str) -> Vec<String> {
    let site = device
        .split_once('/')
        .and_then(|(site, _)| site.parse().ok());
    site.map(|site| of_site(&site).into()).unwrap_or_default()
}

/// The files of a broker: name and content.
pub(crate) fn files(product: Product, facts: &Facts) -> Vec<(&'static str, String)> {
    match product {
        Product::Mosquitto => mosquitto::files(facts),
        Product::Rabbitmq => rabbitmq::files(facts),
        Product::Nats => nats::files(facts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            folder: "/etc/b".into(),
            bind: None,
            port: 8883,
            coordinator: COORDINATOR.into(),
            by_password: false,
            devices: vec!["demo/d1".into(), "east/d-2".into()],
            subscribers: vec![
                ("house".parse().unwrap(), Sites::All),
                (
                    "panel".parse().unwrap(),
                    Sites::Some(["demo".parse().unwrap()].into()),
                ),
            ],
        }
    }

    fn file(product: Product, name: &str) -> String {
        let all = files(product, &facts());
        all.into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    fn has(text: &str, lines: &[&str]) {
        for line in lines {
            let there = text.lines().any(|l| l.trim() == *line);
            assert!(there, "{line:?} is not in\n{text}");
        }
    }

    #[test]
    fn mosquitto_gives_each_device_its_own_by_its_certificate() {
        let devices = file(Product::Mosquitto, "devices.acl");
        has(
            &devices,
            &[
                "user coordinator",
                "topic read lacewing/v1/+/+/+/result",
                "topic write lacewing/v1/+/+/+/ack",
                "pattern read lacewing/v1/%u/#",
                "pattern write lacewing/v1/%u/+/result",
                "user demo/d1",
                "topic read lacewing/v1/demo/_/_/roster",
                "topic read lacewing/v1/demo/_/_/meeting",
            ],
        );
        assert!(!devices.contains("%u/+/ack"));
        let subscribers = file(Product::Mosquitto, "subscribers.acl");
        has(
            &subscribers,
            &[
                "user house",
                "topic read lacewing/#",
                "topic read homeassistant/#",
                "user panel",
                "topic read lacewing/v1/demo/#",
            ],
        );
        assert!(!subscribers.contains("write") && !subscribers.contains("pattern"));
    }

    #[test]
    fn rabbitmq_names_everybody_and_matches_names_exactly() {
        let text = file(Product::Rabbitmq, "definitions.json");
        let said: serde_json::Value = serde_json::from_str(&text).unwrap();
        let of = |user: &str| {
            let all = said["topic_permissions"].as_array().unwrap();
            all.iter().find(|p| p["user"] == user).unwrap().clone()
        };
        let d1 = of("demo/d1");
        assert_eq!(
            d1["read"],
            r"^(lacewing\.v1\.demo\.d1\..+|lacewing\.v1\.demo\._\._\.roster|lacewing\.v1\.demo\._\._\.meeting)$"
        );
        let write = d1["write"].as_str().unwrap();
        assert!(write.starts_with(r"^lacewing\.v1\.demo\.d1\.(_|[a-z0-9][a-z0-9_-]*)\.(status|"));
        assert!(!write.contains("ack"), "{write}");
        assert_eq!(of("panel")["write"], "^$");
        assert_eq!(of("panel")["read"], r"^lacewing\.v1\.demo\..+$");
        assert_eq!(
            of("house")["read"],
            r"^(lacewing(\..*)?|homeassistant(\..*)?)$"
        );
        for kind in said["users"].as_array().unwrap() {
            assert_eq!(kind["password_hash"], "", "no password is written");
        }
        // A name with a hyphen is itself, and not a range.
        assert!(of("east/d-2")["read"].as_str().unwrap().contains("d-2"));
    }

    #[test]
    fn nats_names_everybody() {
        let text = file(Product::Nats, "lacewing.conf");
        assert!(text.contains("user: \"CN=demo/d1\""), "{text}");
        assert!(text.contains("\"lacewing.v1.demo.d1.*.result\""));
        assert!(!text.contains("\"lacewing.v1.demo.d1.*.ack\""));
        assert!(text.contains(
            "\"lacewing.v1.demo.d1.>\", \"lacewing.v1.demo._._.roster\", \"lacewing.v1.demo._._.meeting\""
        ));
        assert!(text.contains("password: $LACEWING_SUBSCRIBER_PANEL"));
        assert!(text.contains("verify_and_map: true"));
    }
}

//! `[broker]`: which broker, its limits, and how another one than our own is reached and told who may do what.

use std::{net::SocketAddr, path::PathBuf};

use toml::Value;

use super::{Fields, address, size, text, texts, whole};
pub use crate::broker::Product;

/// Where MQTT is spoken in the clear.
pub(super) const MQTT_PORT: u16 = 1883;
/// Where MQTT is spoken over TLS.
pub(super) const MQTTS_PORT: u16 = 8883;

/// Which broker, and its limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerConfig {
    /// An external broker; without it the embedded one runs.
    pub url: Option<BrokerUrl>,
    /// How it is reached, and told who may do what.
    pub external: ExternalConfig,
    /// Where the embedded broker listens. Port 0 is any free one.
    pub listen: SocketAddr,
    /// The most clients of the embedded broker, 1..=1,000,000.
    pub max_connections: usize,
    /// Messages that one client may publish a second, 1..=1,000,000; beyond it, it is read more slowly.
    pub publish_rate: u32,
}

/// `mqtts://host:port`, or `mqtt://host:port` in the clear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerUrl {
    /// The host's name or address.
    pub host: String,
    /// The port, 8883 unless given; 1883 in the clear.
    pub port: u16,
    /// Over TLS.
    pub tls: bool,
}

/// How an external broker is reached, and told who may do what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExternalConfig {
    /// Who signed its certificate, a file in PEM; without it the coordinator's own authority did.
    pub ca: Option<PathBuf>,
    /// The coordinator's name there; without it the coordinator shows a certificate of its own authority.
    pub user: Option<String>,
    /// The file with its password.
    pub password_file: Option<PathBuf>,
    /// What the broker is.
    pub rules_for: Option<Product>,
    /// The folder in which its rules are kept up to date.
    pub rules: Option<PathBuf>,
    /// What makes it read them again: a program and its arguments.
    pub reload: Vec<String>,
}

impl BrokerConfig {
    /// In the clear or not, where the file does not say where.
    pub(super) fn default_listen(tls: bool) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], if tls { MQTTS_PORT } else { MQTT_PORT }))
    }

    pub(super) fn fill(&mut self, mut broker: Fields<'_>) {
        let both = broker.table.contains_key("url") && broker.table.contains_key("listen");
        if both {
            let error = "broker: either url (an external broker) or listen (the embedded one)";
            broker.errors.push(error.into());
        }
        broker.take("url", &mut self.url, |v| broker_url(&text(v)?).map(Some));
        broker.take("listen", &mut self.listen, address);
        let connections = &mut self.max_connections;
        broker.take("max_connections", connections, size(1, 1_000_000));
        let rate = |v| u32::try_from(whole(1, 1_000_000)(v)?).map_err(|e| e.to_string());
        broker.take("publish_rate", &mut self.publish_rate, rate);
        let path = |v: Value| Ok(Some(PathBuf::from(text(v)?)));
        let external = &mut self.external;
        broker.take("ca", &mut external.ca, path);
        broker.take("user", &mut external.user, |v| text(v).map(Some));
        broker.take("password_file", &mut external.password_file, path);
        broker.take("rules_for", &mut external.rules_for, |v| {
            let known = |_| "is \"mosquitto\", \"rabbitmq\" or \"nats\"".to_owned();
            v.try_into().map(Some).map_err(known)
        });
        broker.take("rules", &mut external.rules, path);
        broker.take("reload", &mut external.reload, texts);
        broker.finish();
    }

    /// What cannot be used together.
    pub(super) fn contradictions(&self) -> Vec<String> {
        let external = &self.external;
        let mut errors = Vec::new();
        let mut wrong = |is: bool, what: &str| {
            if is {
                errors.push(what.to_owned());
            }
        };
        wrong(
            self.url.is_none() && *external != ExternalConfig::default(),
            "broker: ca, user, password_file, rules_for, rules and reload are for an external broker, and there is no \
             broker.url",
        );
        wrong(
            external.user.is_some() != external.password_file.is_some(),
            "broker: user and password_file belong together; without both the coordinator shows a certificate",
        );
        wrong(
            external.rules.is_some() && external.rules_for.is_none(),
            "broker.rules: for which broker? set broker.rules_for",
        );
        wrong(
            !external.reload.is_empty() && external.rules.is_none(),
            "broker.reload: there is nothing to read again without broker.rules",
        );
        if let Some(url) = self.url.as_ref().filter(|url| !url.tls) {
            let host = &url.host;
            if !is_this_machine(host) {
                errors.push(format!(
                    "broker.url: what goes to {host} over mqtt:// can be read and changed on the way; use mqtts://, or a \
                     broker on this machine (127.0.0.1)"
                ));
            }
            if external.ca.is_some() || external.rules.is_some() {
                errors.push(
                    "broker: ca and rules are for a broker over TLS; use mqtts:// in broker.url"
                        .into(),
                );
            }
        }
        errors
    }
}

/// Does this name or address never leave this machine?
fn is_this_machine(host: &str) -> bool {
    host == "localhost"
        || host
            .parse()
            .is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

/// Reads `mqtts://host:port` or `mqtt://host:port`.
///
/// # Errors
/// Says what a broker's address looks like.
pub fn broker_url(text: &str) -> Result<BrokerUrl, String> {
    let wrong = || "is an address like \"mqtts://broker.example:8883\"".to_owned();
    let (tls, rest) = match text.split_once("://") {
        Some(("mqtts", rest)) => (true, rest),
        Some(("mqtt", rest)) => (false, rest),
        _ => return Err(wrong()),
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !host.ends_with(':') => {
            (host, port.parse::<u16>().map_err(|_| wrong())?)
        }
        _ if tls => (rest, MQTTS_PORT),
        _ => (rest, MQTT_PORT),
    };
    let plain =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '[' | ']' | ':');
    if host.is_empty() || port == 0 || !host.chars().all(plain) {
        return Err(wrong());
    }
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    Ok(BrokerUrl { host, port, tls })
}

#[cfg(test)]
mod tests {
    use super::{super::Config, *};

    #[test]
    fn urls() {
        assert_eq!(broker_url("mqtt://[::1]:99").unwrap().host, "::1");
        assert_eq!(broker_url("mqtts://a.b:1/").unwrap().port, 1);
        let default = |text| broker_url(text).map(|url| (url.port, url.tls));
        assert_eq!(default("mqtts://a"), Ok((8883, true)));
        assert_eq!(default("mqtt://a"), Ok((1883, false)));
        for bad in [
            "",
            "mqtt://",
            "mqtts://",
            "tcp://x",
            "mqtt://x:0",
            "mqtt://x:99999",
            "mqtt://a b",
            "mqtt://u@h",
        ] {
            assert!(broker_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_external_broker_is_described_as_a_whole() {
        let whole = Config::parse(
            r#"
            [broker]
            url = "mqtts://broker.example"
            ca = "/etc/ssl/broker.pem"
            user = "lacewing"
            password_file = "/etc/lacewing/broker.password"
            rules_for = "mosquitto"
            rules = "/etc/mosquitto/lacewing"
            reload = ["systemctl", "reload", "mosquitto"]
            "#,
        );
        let external = whole.unwrap().broker.external;
        assert_eq!(external.rules_for, Some(Product::Mosquitto));
        assert_eq!(external.reload.len(), 3);
        let url = "url = \"mqtts://b\"\n";
        for (text, why) in [
            ("ca = \"/x\"", "no broker.url"),
            (&format!("{url}user = \"x\""), "belong together"),
            (&format!("{url}password_file = \"/x\""), "belong together"),
            (&format!("{url}rules = \"/x\""), "set broker.rules_for"),
            (&format!("{url}reload = [\"x\"]"), "without broker.rules"),
            (&format!("{url}rules_for = \"emqx\""), "is \"mosquitto\""),
            ("url = \"mqtt://b\"", "use mqtts://"),
            (
                "url = \"mqtt://127.0.0.1\"\nca = \"/x\"",
                "for a broker over TLS",
            ),
        ] {
            let said = Config::parse(&format!("[broker]\n{text}\n")).unwrap_err();
            assert!(said.to_string().contains(why), "{text}: {said}");
        }
        assert!(Config::parse("[broker]\nurl = \"mqtt://localhost:1\"\n").is_ok());
    }
}

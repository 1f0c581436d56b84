//! What can be set about the device's identity, and what follows from it for everything else.

use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    disk::Disk,
    token::{MAX_TOKEN_BYTES, Token},
};
use crate::{config::Config, samples::coordinator_url, update::disk::read_bounded};

/// `[coordinator]`: whom the device belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CoordinatorConfig {
    /// `https://HOST:PORT`. Default: what the token says, or where the device was enrolled.
    pub url: Option<String>,
    /// The enrolment token.
    pub token: Option<Secret>,
    /// A file with the enrolment token. It may be removed once the device is enrolled.
    pub token_file: Option<PathBuf>,
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What configuration and disk say together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityConfig {
    /// The coordinator; empty where nobody says.
    pub url: String,
    /// The enrolment token, if there is one.
    pub token: Option<Token>,
}

/// Which keys the configuration names, as opposed to those at their defaults.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named {
    pub(crate) site: bool,
    pub(crate) broker: bool,
}

/// Finds out whether the device has an identity, or is to get one, and fills in what follows from it.
pub(crate) fn settle(config: &mut Config, named: Named, mistakes: &mut Vec<String>) {
    let disk = Disk::of(&config.data);
    let notes = disk.notes();
    let is_enrolled = disk.certificate_path().exists();
    let token = match token(&config.coordinator, is_enrolled) {
        Ok(token) => token,
        Err(mistake) => return mistakes.push(mistake),
    };
    let claims = token.as_ref().map(Token::claims);
    let own = &config.coordinator;
    if let Some(url) = own.url.as_ref().or(claims.map(|claims| &claims.url))
        && let Err(why) = https(url)
    {
        let field = match own.url {
            Some(_) => "coordinator.url",
            None => "coordinator.token: its url",
        };
        return mistakes.push(format!("{field}: {why}"));
    }
    if let Some(claims) = claims {
        if named.site && config.site != claims.site {
            mistakes.push(format!(
                "site: is \"{}\", but the token (coordinator.token) is for site \"{}\": leave `site` out, or get a token for \
                 this site",
                config.site, claims.site
            ));
        }
        config.site = claims.site.clone();
    } else if let Some(notes) = notes.as_ref().filter(|_| is_enrolled && !named.site) {
        config.site = notes.site.clone();
    }
    let wants = own.url.is_some() || token.is_some() || is_enrolled;
    if !wants {
        return without(config, mistakes);
    }
    let noted = notes.map(|notes| notes.url);
    let url = own.url.clone().or_else(|| claims.map(|c| c.url.clone()));
    let url = url.or(noted).unwrap_or_default();
    let url = url.strip_suffix('/').unwrap_or(&url).to_owned();
    config.broker.by_coordinator = !named.broker;
    if named.broker && !config.broker.is_tls() {
        plain(mistakes, "broker.url", &config.broker.url, "mqtts://");
    }
    for (field, set) in [
        ("samples.coordinator", &config.samples.coordinator),
        ("update.coordinator", &config.update.coordinator),
    ] {
        if let Some(set) = set
            && set.starts_with("http://")
        {
            plain(mistakes, field, set, "https://");
        }
    }
    if config.samples.coordinator.is_none() && !url.is_empty() {
        config.samples.coordinator = Some(url.clone());
    }
    config.identity = Some(IdentityConfig { url, token });
}

/// A device without an identity cannot tell who is on the other side of TLS.
fn without(config: &Config, mistakes: &mut Vec<String>) {
    let is_https = |url: &Option<String>| url.as_ref().is_some_and(|u| u.starts_with("https://"));
    for (field, is_tls) in [
        (
            "broker.url",
            config.broker.is_tls() && !config.broker.is_enough(),
        ),
        ("samples.coordinator", is_https(&config.samples.coordinator)),
        ("update.coordinator", is_https(&config.update.coordinator)),
    ] {
        if is_tls {
            let or = match field {
                "broker.url" => "; or broker.ca, broker.user and broker.password_file",
                _ => "",
            };
            mistakes.push(format!(
                "{field}: needs the device to have an identity: set coordinator.token{or}"
            ));
        }
    }
    let broker = &config.broker;
    if broker.user.is_some() && !broker.is_tls() && !is_itself(&broker.url) {
        mistakes.push(format!(
            "broker.user: a password can be read on the way to {:?}: use mqtts://",
            broker.url
        ));
    }
}

/// Is the address one of this device itself?
fn is_itself(url: &str) -> bool {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host = rest.trim_end_matches('/');
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost"
        || bare
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// A device with an identity speaks in the clear only with itself.
fn plain(mistakes: &mut Vec<String>, field: &str, url: &str, scheme: &str) {
    if !is_itself(url) {
        mistakes.push(format!(
            "{field}: {url:?} is not encrypted, and the device has an identity ([coordinator]): use {scheme}, or leave it out"
        ));
    }
}

fn https(url: &str) -> Result<(), String> {
    if !url.starts_with("https://") {
        return Err(format!("must be https://HOST:PORT, not {url:?}"));
    }
    coordinator_url(url).map(|_| ())
}

/// The token from the configuration or its file.
fn token(config: &CoordinatorConfig, is_enrolled: bool) -> Result<Option<Token>, String> {
    let (field, text) = match (&config.token, &config.token_file) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => {
            return Err(
                "coordinator.token_file: there is coordinator.token, too; one of them is enough"
                    .into(),
            );
        }
        (Some(Secret(text)), None) => ("coordinator.token", text.clone()),
        (None, Some(path)) => match read(path) {
            Ok(text) => ("coordinator.token_file", text),
            // It has served its purpose.
            Err(_) if is_enrolled => return Ok(None),
            Err(error) => {
                let shown = path.display();
                return Err(format!("coordinator.token_file: {shown}: {error}"));
            }
        },
    };
    let token = Token::parse(&text).map_err(|why| format!("{field}: {why}"))?;
    Ok(Some(token))
}

fn read(path: &Path) -> std::io::Result<String> {
    let bytes = read_bounded(path, MAX_TOKEN_BYTES as u64)?;
    String::from_utf8(bytes).map_err(std::io::Error::other)
}

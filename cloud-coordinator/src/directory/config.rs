//! `[oidc]`: which directory people may come in by, and what its groups may do.

use std::path::PathBuf;

use serde::Deserialize;
use toml::Value;
use url::{Host, Url};

use crate::trust::Role;

/// Groups that are mapped: a table that a person still reads.
const MAX_GROUPS: usize = 100;

/// A directory of people that speaks OpenID Connect.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirectoryConfig {
    /// Its address, exactly as it calls itself: `https://id.example/realms/plant`.
    pub issuer: String,
    /// What this coordinator is called there.
    pub client_id: String,
    /// A file with the secret of this client, which only the coordinator may read; without one there is none.
    #[serde(default)]
    pub client_secret_file: Option<PathBuf>,
    /// Where browsers reach this coordinator: `https://lacewing.example:8080`.
    pub url: String,
    /// The claim with a person's groups.
    #[serde(default = "groups_claim")]
    pub claim: String,
    /// What is asked for besides `openid`.
    #[serde(default = "profile")]
    pub scopes: Vec<String>,
    /// Who signs the directory's certificate, in PEM; without it, whom the system trusts.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// What groups may do; the first line that fits counts, and whom none fits does not come in.
    pub group: Vec<GroupConfig>,
}

/// What the people of a group may do.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// The group, as it stands in the claim.
    pub name: String,
    /// `viewer`, `labeller`, `operator` or `admin`.
    pub(crate) role: Role,
    /// The only site that they may see; all unless given.
    #[serde(default)]
    pub site: Option<String>,
}

fn groups_claim() -> String {
    "groups".to_owned()
}

fn profile() -> Vec<String> {
    vec!["profile".to_owned()]
}

/// `https`, or this machine: what is sent there is worth a login.
pub(super) fn safe(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| error.to_string())?;
    let here = match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        _ => false,
    };
    match url.scheme() {
        "https" if url.host().is_some() => Ok(url),
        "http" if here => Ok(url),
        _ => Err("is an https:// address, or http:// on 127.0.0.1".into()),
    }
}

impl DirectoryConfig {
    /// Reads the section; all mistakes.
    pub(crate) fn read(section: Value) -> Result<Self, Vec<String>> {
        let read: Result<Self, _> = section.try_into();
        let config = read.map_err(|error| vec![format!("oidc: {}", error.to_string().trim())])?;
        let mut mistakes = Vec::new();
        for (name, address) in [("issuer", &config.issuer), ("url", &config.url)] {
            if let Err(why) = safe(address) {
                mistakes.push(format!("oidc.{name}: {address:?}: {why}"));
            }
        }
        if config.url.ends_with('/') || safe(&config.url).is_ok_and(|url| url.path() != "/") {
            mistakes.push("oidc.url: is a host and a port, without a path".into());
        }
        for (name, text) in [("client_id", &config.client_id), ("claim", &config.claim)] {
            if text.trim().is_empty() {
                mistakes.push(format!("oidc.{name}: is empty"));
            }
        }
        if config.group.is_empty() || config.group.len() > MAX_GROUPS {
            mistakes.push(format!(
                "oidc.group: 1 to {MAX_GROUPS} groups say who may do what; without any nobody comes in"
            ));
        }
        for group in &config.group {
            let name = &group.name;
            if name.trim().is_empty() {
                mistakes.push("oidc.group: a name is empty".into());
            }
            if let Some(site) = &group.site {
                if let Err(error) = site.parse::<mesh_core::Name>() {
                    mistakes.push(format!("oidc.group: site of {name:?}: {error}"));
                }
                if group.role == Role::Admin {
                    let why = "an admin says who may do what everywhere, and is for all sites";
                    mistakes.push(format!("oidc.group: {name:?}: {why}"));
                }
            }
        }
        if mistakes.is_empty() {
            Ok(config)
        } else {
            Err(mistakes)
        }
    }

    /// What somebody of these groups may do, and where; nothing if no line fits.
    pub(crate) fn rights(&self, groups: &[String]) -> Option<(Role, Option<&str>)> {
        let fits = |line: &&GroupConfig| groups.contains(&line.name);
        let line = self.group.iter().find(fits)?;
        Some((line.role, line.site.as_deref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<DirectoryConfig, String> {
        let table: toml::Table = toml::from_str(text).unwrap();
        DirectoryConfig::read(Value::Table(table)).map_err(|mistakes| mistakes.join("\n"))
    }

    const GOOD: &str = r#"
        issuer = "https://id.example/realms/plant"
        client_id = "lacewing"
        url = "https://lacewing.example:8080"
        group = [
            {name = "admins", role = "admin"},
            {name = "line 3", role = "operator", site = "plant-3"},
            {name = "everybody", role = "viewer"},
        ]
    "#;

    #[test]
    fn the_first_line_that_fits_counts_and_none_is_nothing() {
        let config = read(GOOD).unwrap();
        let rights = |groups: &[&str]| {
            let groups: Vec<_> = groups.iter().map(|g| (*g).to_owned()).collect();
            config.rights(&groups)
        };
        assert_eq!(
            rights(&["everybody", "line 3"]),
            Some((Role::Operator, Some("plant-3")))
        );
        assert_eq!(rights(&["everybody"]), Some((Role::Viewer, None)));
        assert_eq!(rights(&["everybody", "admins"]), Some((Role::Admin, None)));
        for none in [&[][..], &["Admins"], &["line"], &["admins "], &[""]] {
            assert_eq!(rights(none), None, "{none:?}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (from, to, words) in [
            ("https://id.example", "http://id.example", "oidc.issuer"),
            ("https://id.example", "ftp://id.example", "oidc.issuer"),
            ("example:8080", "example:8080/x", "oidc.url"),
            ("\"lacewing\"", "\" \"", "oidc.client_id"),
            ("\"operator\"", "\"king\"", "king"),
            ("\"plant-3\"", "\"Plant 3\"", "site of \"line 3\""),
            (
                "role = \"admin\"",
                "role = \"admin\", site = \"a\"",
                "for all sites",
            ),
            ("client_id", "colour = 1\nclient_id", "colour"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let said = read(&GOOD.replace(from, to)).unwrap_err();
            assert!(said.contains(words), "{said}: {words}");
        }
        let nobody = GOOD.split("group = [").next().unwrap();
        assert!(
            read(&format!("{nobody}group = []"))
                .unwrap_err()
                .contains("nobody")
        );
        assert!(read(nobody).unwrap_err().contains("group"));
    }
}

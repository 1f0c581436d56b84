//! Who may do what on the broker. The embedded one asks here; rules for other brokers are [written](super::rules) from here.
//!
//! | who | publishes | last will | subscribes to |
//! |---|---|---|---|
//! | device `S/D` | `lacewing/v1/S/D/<source>/<kind>`, with a source that is a name and a kind that is a device's | `lacewing/v1/S/D/_/status` | whatever begins with `lacewing/v1/S/D/`; `lacewing/v1/S/_/_/roster`; `lacewing/v1/S/_/_/meeting` |
//! | subscriber for some sites | nothing | none | whatever begins with `lacewing/v1/<one of its sites>/` |
//! | subscriber for all sites | nothing | none | whatever has `lacewing` or `homeassistant` as its first level |
//!
//! A filter has at most 16 levels, `+` and `#` stand alone in theirs, `#` only in the last. A level that is written out
//! above is not matched by a wildcard.
//!
//! The coordinator itself is not a client of the embedded broker: it is linked to the router and nobody can pose as it. On
//! another broker it reads what ingest has a use for, and publishes on the kinds that are its own. Who a client is, the
//! [gate](super::gate) finds out.

use mesh_core::{Kind, Name, ROOT, Topic};

use crate::trust::{common_name, subscribers::Sites};

/// The contract has six levels; a filter has no reason for many more, and each costs a step per message.
const MAX_LEVELS: usize = 16;
/// What a subscriber for all sites may see.
const VIEWER_ROOTS: [&str; 2] = ["lacewing", "homeassistant"];

/// On what a device publishes.
pub(super) fn kinds_of_a_device() -> impl Iterator<Item = Kind> {
    Kind::ALL.into_iter().filter(|k| !k.is_coordinators())
}

/// On what the coordinator publishes.
pub(super) fn kinds_of_the_coordinator() -> impl Iterator<Item = Kind> {
    Kind::ALL.into_iter().filter(|k| k.is_coordinators())
}

/// The beginning of every topic below these levels: a site, or a device as its certificate names it.
pub(super) fn below(levels: &str) -> String {
    format!("{ROOT}/{levels}/")
}

/// What the coordinator says to all devices of a site, which they read: who they are, and where some of them are.
pub(super) fn of_site(site: &Name) -> [String; 2] {
    [Kind::Roster, Kind::Meeting].map(|kind| Topic::of_site(site, kind).to_string())
}

/// With what begins whatever a subscriber may read.
pub(super) fn beginnings(sites: &Sites) -> Vec<String> {
    match sites {
        Sites::All => VIEWER_ROOTS.map(|root| format!("{root}/")).into(),
        Sites::Some(sites) => sites.iter().map(|site| below(site.as_str())).collect(),
    }
}

/// What a client is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Device { site: Name, device: Name },
    Viewer { sites: Sites },
}

impl Role {
    /// The topic, if this client may publish on it.
    pub(super) fn may_publish(&self, topic: &str) -> Option<Topic> {
        let Self::Device { site, device } = self else {
            return None;
        };
        let topic: Topic = topic.parse().ok()?;
        let own = topic.site == *site && topic.device == *device;
        (own && kinds_of_a_device().any(|k| k == topic.kind)).then_some(topic)
    }

    /// The topic, if this client may have its last will on it.
    pub(super) fn may_will(&self, topic: &str) -> Option<Topic> {
        self.may_publish(topic)
            .filter(|t| t.kind == Kind::Status && t.source == Name::itself())
    }

    /// May this client subscribe to the filter? A filter that is not valid is nobody's.
    pub(super) fn may_subscribe(&self, filter: &str) -> bool {
        if !rumqttc::mqttbytes::valid_filter(filter) || filter.split('/').count() > MAX_LEVELS {
            return false;
        }
        match self {
            Self::Device { site, device } => {
                filter.starts_with(&below(&common_name(site, device)))
                    || of_site(site).iter().any(|topic| topic == filter)
            }
            Self::Viewer { sites } => {
                // A root alone is a first level, too.
                let whole = match sites {
                    Sites::All => format!("{filter}/"),
                    Sites::Some(_) => filter.to_owned(),
                };
                beginnings(sites).iter().any(|b| whole.starts_with(b))
            }
        }
    }
}

#[cfg(test)]
#[path = "rights_tests.rs"]
mod tests;

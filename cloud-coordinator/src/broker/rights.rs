//! Who may do what on the embedded broker.
//!
//! | who | publishes | last will | subscribes to |
//! |---|---|---|---|
//! | device `S/D` | `lacewing/v1/S/D/<source>/<kind>`, with a source that is a name and a kind that is a device's | `lacewing/v1/S/D/_/status` | whatever begins with `lacewing/v1/S/D/`; `lacewing/v1/S/_/_/roster` |
//! | subscriber for some sites | nothing | none | whatever begins with `lacewing/v1/<one of its sites>/` |
//! | subscriber for all sites | nothing | none | whatever has `lacewing` or `homeassistant` as its first level |
//!
//! A filter has at most 16 levels, `+` and `#` stand alone in theirs, `#` only in the last. A level that is written out
//! above is not matched by a wildcard.
//!
//! The coordinator itself is not a client: it is linked to the router and nobody can pose as it. Who a client is, the
//! [gate](super::gate) finds out.

use mesh_core::{Kind, Name, Topic};

use crate::trust::subscribers::Sites;

/// The contract has six levels; a filter has no reason for many more, and each costs a step per message.
const MAX_LEVELS: usize = 16;
/// What a subscriber for all sites may see.
const VIEWER_ROOTS: [&str; 2] = ["lacewing", "homeassistant"];

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
        (topic.site == *site && topic.device == *device && !topic.kind.is_coordinators())
            .then_some(topic)
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
        let mut levels = filter.split('/');
        match self {
            Self::Device { site, device } => {
                filter.starts_with(&Topic::prefix(site, device))
                    || filter == Topic::of_site(site, Kind::Roster).to_string()
            }
            Self::Viewer { sites: Sites::All } => levels
                .next()
                .is_some_and(|root| VIEWER_ROOTS.contains(&root)),
            Self::Viewer {
                sites: Sites::Some(sites),
            } => {
                let root = (levels.next(), levels.next()) == (Some("lacewing"), Some("v1"));
                let site = levels.next().is_some_and(|site| sites.contains(site));
                root && site && levels.next().is_some()
            }
        }
    }
}

#[cfg(test)]
#[path = "rights_tests.rs"]
mod tests;

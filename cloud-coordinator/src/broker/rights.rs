//! Who may do what on the embedded broker.
//!
//! | client id | is | publishes | subscribes | last will |
//! |---|---|---|---|---|
//! | `<site>/<device>` | that device | the device's kinds below its own prefix | below its own prefix | its own status |
//! | anything else | a viewer | nothing | below `lacewing/` and `homeassistant/` | none |
//!
//! The coordinator itself is not a client: it is linked to the router and nobody can pose as it.

use mesh_core::{Kind, Name, Topic};

/// Ids are for people and logs; longer ones are a mistake. Two names and a slash fit.
const MAX_CLIENT_ID: usize = 128;
/// The contract has six levels; a filter has no reason for many more, and each costs a step per message.
const MAX_LEVELS: usize = 16;
/// What a viewer may see.
const VIEWER_ROOTS: [&str; 2] = ["lacewing", "homeassistant"];

/// What a client is, by its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Device { site: Name, device: Name },
    Viewer,
}

impl Role {
    /// The role of a client id, or why it is refused.
    pub(super) fn of(client_id: &str) -> Result<Self, &'static str> {
        if client_id.len() > MAX_CLIENT_ID {
            return Err("client id longer than 128 bytes");
        }
        if client_id.contains(['#', '+']) || client_id.chars().any(char::is_control) {
            return Err("client id with a wildcard or a control character");
        }
        if let Some((site, device)) = client_id.split_once('/')
            && let (Ok(site), Ok(device)) = (site.parse::<Name>(), device.parse::<Name>())
            && site != Name::itself()
            && device != Name::itself()
        {
            return Ok(Self::Device { site, device });
        }
        Ok(Self::Viewer)
    }

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
        match self {
            Self::Device { site, device } => filter.starts_with(&Topic::prefix(site, device)),
            Self::Viewer => filter
                .split('/')
                .next()
                .is_some_and(|root| VIEWER_ROOTS.contains(&root)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> Role {
        Role::of("demo/d1").unwrap()
    }

    #[test]
    fn ids() {
        assert!(matches!(device(), Role::Device { .. }));
        for viewer in [
            "mosq-123", "a/b/c", "demo/", "/d1", "demo/_", "Demo/d1", "_/_",
        ] {
            assert_eq!(Role::of(viewer), Ok(Role::Viewer), "{viewer}");
        }
        for refused in ["#", "+", "demo/+", "a#", "a\u{7}b", &"x".repeat(129)] {
            assert!(Role::of(refused).is_err(), "{refused:?}");
        }
    }

    #[test]
    fn publishing() {
        let may = |topic| device().may_publish(topic).is_some();
        assert!(may("lacewing/v1/demo/d1/cam0/result") && may("lacewing/v1/demo/d1/_/status"));
        for denied in [
            "lacewing/v1/demo/d2/cam0/result",
            "lacewing/v1/other/d1/cam0/result",
            "lacewing/v1/demo/d1/_/ack",
            "lacewing/v1/demo/d1/_/desired",
            "lacewing/v1/demo/d1/cam0/nonsense",
            "lacewing/v1/demo/d1/cam0",
            "homeassistant/device/d1/config",
            "$SYS/x",
        ] {
            assert!(!may(denied), "{denied}");
            assert!(Role::Viewer.may_publish(denied).is_none());
        }
        assert!(
            Role::Viewer
                .may_publish("lacewing/v1/demo/d1/cam0/result")
                .is_none()
        );
    }

    #[test]
    fn wills() {
        assert!(device().may_will("lacewing/v1/demo/d1/_/status").is_some());
        for denied in [
            "lacewing/v1/demo/d2/_/status",
            "lacewing/v1/demo/d1/cam0/status",
            "lacewing/v1/demo/d1/_/result",
        ] {
            assert!(device().may_will(denied).is_none(), "{denied}");
        }
        assert!(
            Role::Viewer
                .may_will("lacewing/v1/demo/d1/_/status")
                .is_none()
        );
    }

    #[test]
    fn subscribing() {
        assert!(device().may_subscribe("lacewing/v1/demo/d1/_/ack"));
        assert!(device().may_subscribe("lacewing/v1/demo/d1/#"));
        for denied in [
            "lacewing/#",
            "lacewing/v1/demo/+/_/ack",
            "lacewing/v1/demo/d1",
            "lacewing/v1/demo/d10/_/ack",
            "lacewing/v1/demo/d1/a#",
            "#",
        ] {
            assert!(!device().may_subscribe(denied), "{denied}");
        }
        let viewer = |f| Role::Viewer.may_subscribe(f);
        assert!(
            viewer("lacewing/#")
                && viewer("homeassistant/+/x")
                && viewer("lacewing/v1/+/+/+/result")
        );
        for denied in [
            "#",
            "+/v1/#",
            "$SYS/#",
            "",
            "lacewing/#/x",
            "lacewingx/#",
            &"lacewing/".repeat(20),
        ] {
            assert!(!viewer(denied), "{denied}");
        }
    }
}

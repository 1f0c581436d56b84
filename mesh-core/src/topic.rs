//! Where each message travels: `lacewing/v1/<site>/<device>/<source>/<kind>`.

use alloc::{format, string::String};
use core::{fmt, str::FromStr};

use crate::{Name, NameError};

/// The first two levels of every topic.
pub const ROOT: &str = "lacewing/v1";

/// What a message on a topic is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `online` or `offline`; retained, and the last will.
    Status,
    /// What the device is; retained.
    Info,
    /// The model that is loaded; retained.
    Model,
    /// Health; retained.
    State,
    /// One live reading.
    Result,
    /// A batch of readings from the backlog.
    Replay,
    /// Readings that had to be dropped.
    Gap,
    /// Flat numbers about the device.
    Metrics,
    /// A JPEG of what was seen, opt-in.
    Image,
    /// What the coordinator wants the device to be.
    Desired,
    /// What the device says it is in answer.
    Reported,
    /// What the coordinator has stored.
    Ack,
    /// Somebody's word on what a source has just reported.
    Mark,
    /// How far what a source sees has moved from what training saw; retained.
    Drift,
    /// Which devices of the site trust one another, signed; retained, on the topic of the site.
    Roster,
    /// What several cameras of a site have seen, once.
    Sighting,
    /// Where some devices of the site are to be found by the others; retained, on the topic of the site.
    Meeting,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 17] = [
        Self::Status,
        Self::Info,
        Self::Model,
        Self::State,
        Self::Result,
        Self::Replay,
        Self::Gap,
        Self::Metrics,
        Self::Image,
        Self::Desired,
        Self::Reported,
        Self::Ack,
        Self::Mark,
        Self::Drift,
        Self::Roster,
        Self::Sighting,
        Self::Meeting,
    ];

    /// The last level of the topic.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Info => "info",
            Self::Model => "model",
            Self::State => "state",
            Self::Result => "result",
            Self::Replay => "replay",
            Self::Gap => "gap",
            Self::Metrics => "metrics",
            Self::Image => "image",
            Self::Desired => "desired",
            Self::Reported => "reported",
            Self::Ack => "ack",
            Self::Mark => "mark",
            Self::Drift => "drift",
            Self::Roster => "roster",
            Self::Sighting => "sighting",
            Self::Meeting => "meeting",
        }
    }

    /// Does the coordinator speak on it? (The device speaks on all others.)
    #[must_use]
    pub const fn is_coordinators(self) -> bool {
        matches!(
            self,
            Self::Desired | Self::Ack | Self::Mark | Self::Roster | Self::Sighting | Self::Meeting
        )
    }
}

/// A topic of the contract.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Topic {
    /// The site that the device belongs to.
    pub site: Name,
    /// The device.
    pub device: Name,
    /// The camera or sensor on the device; `_` is the device itself.
    pub source: Name,
    /// What the message is.
    pub kind: Kind,
}

/// Why a text is not a topic of the contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// Not six levels under the root.
    #[error("not a topic of the form {ROOT}/<site>/<device>/<source>/<kind>")]
    Shape,
    /// One level is not a name.
    #[error("{0}: {1}")]
    Name(&'static str, NameError),
    /// The last level is not a kind.
    #[error("no such kind of message: {0:?}")]
    Kind(String),
}

impl Topic {
    /// A topic of the device itself.
    #[must_use]
    pub fn of_device(site: &Name, device: &Name, kind: Kind) -> Self {
        Self {
            site: site.clone(),
            device: device.clone(),
            source: Name::itself(),
            kind,
        }
    }

    /// A topic of the site itself: `_` stands for all its devices.
    #[must_use]
    pub fn of_site(site: &Name, kind: Kind) -> Self {
        Self::of_device(site, &Name::itself(), kind)
    }

    /// The filter for one kind of message from every device and source.
    #[must_use]
    pub fn filter(kind: Kind) -> String {
        format!("{ROOT}/+/+/+/{}", kind.as_str())
    }

    /// The prefix of everything that one device may publish, with the closing `/`.
    #[must_use]
    pub fn prefix(site: &Name, device: &Name) -> String {
        format!("{ROOT}/{site}/{device}/")
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{ROOT}/{}/{}/{}/{}",
            self.site,
            self.device,
            self.source,
            self.kind.as_str()
        )
    }
}

impl FromStr for Topic {
    type Err = TopicError;

    fn from_str(text: &str) -> Result<Self, TopicError> {
        let rest = text
            .strip_prefix(ROOT)
            .and_then(|t| t.strip_prefix('/'))
            .ok_or(TopicError::Shape)?;
        let mut levels = rest.split('/');
        let mut level = || levels.next().ok_or(TopicError::Shape);
        let (site, device, source, kind) = (level()?, level()?, level()?, level()?);
        if levels.next().is_some() {
            return Err(TopicError::Shape);
        }
        let name = |what, text: &str| text.parse().map_err(|e| TopicError::Name(what, e));
        Ok(Self {
            site: name("site", site)?,
            device: name("device", device)?,
            source: name("source", source)?,
            kind: Kind::ALL
                .into_iter()
                .find(|k| k.as_str() == kind)
                .ok_or_else(|| TopicError::Kind(kind.chars().take(40).collect()))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn every_kind_survives_the_way_through_text() {
        for kind in Kind::ALL {
            let topic = Topic {
                site: "hall-2".parse().unwrap(),
                device: "d1".parse().unwrap(),
                source: "cam0".parse().unwrap(),
                kind,
            };
            assert_eq!(topic.to_string().parse::<Topic>().unwrap(), topic);
        }
    }

    #[test]
    fn refuses_other_shapes() {
        for bad in [
            "",
            "lacewing/v1",
            "lacewing/v1/s/d/_",
            "lacewing/v1/s/d/_/result/x",
            "lacewing/v1/s/d/_/other",
            "lacewing/v2/s/d/_/result",
            "lacewing/v1/+/d/_/result",
            "lacewing/v1/s/#/_/result",
            "lacewing/v1//d/_/result",
        ] {
            assert!(bad.parse::<Topic>().is_err(), "{bad}");
        }
    }
}

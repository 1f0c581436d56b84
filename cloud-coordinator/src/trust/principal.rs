//! Who asks, and what they may do.

use std::fmt;

use mesh_core::Name;
use serde::{Deserialize, Serialize};

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Principal {
    /// A device, by its certificate.
    Device { site: Name, device: Name },
    /// A person or a program, by a session or an API token.
    User {
        name: String,
        role: Role,
        /// Nothing: all sites.
        site: Option<Name>,
    },
}

impl Principal {
    /// The only site that it may see.
    pub(crate) fn site(&self) -> Option<&Name> {
        match self {
            Self::Device { site, .. } => Some(site),
            Self::User { site, .. } => site.as_ref(),
        }
    }

    /// What it may do; a device has no role.
    pub(crate) fn role(&self) -> Option<Role> {
        match self {
            Self::Device { .. } => None,
            Self::User { role, .. } => Some(*role),
        }
    }
}

/// As it stands in the audit log.
impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device { site, device } => write!(f, "device {site}/{device}"),
            Self::User { name, .. } => write!(f, "user {name}"),
        }
    }
}

/// What people and programs may do; each may do what those before it may.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
    sqlx::Type,
    utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
#[sqlx(rename_all = "lowercase")]
pub(crate) enum Role {
    /// Looks.
    Viewer,
    /// Says what samples show.
    Labeller,
    /// Trains, publishes, and says what devices are to be.
    Operator,
    /// Says who may do what.
    Admin,
}

impl Role {
    /// As it is written.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Labeller => "labeller",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Put into a request's extensions by the door when a valid client certificate was shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerDevice {
    /// Its site.
    pub(crate) site: Name,
    /// Its name.
    pub(crate) device: Name,
}

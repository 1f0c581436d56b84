//! What is asked of the registry, and what it answers.

use serde::Deserialize;
use tough::schema::RoleType;

use super::SigningError;

const DAY: i64 = 24 * 60 * 60;

/// How long signatures are good for, in days.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lifetimes {
    /// Root: as long as a device may lie in a drawer and still be told what is expired.
    pub root: u32,
    /// Targets.
    pub targets: u32,
    /// Snapshot.
    pub snapshot: u32,
    /// Timestamp: a device that is shown old metadata notices within this time.
    pub timestamp: u32,
}

impl Default for Lifetimes {
    fn default() -> Self {
        Self {
            root: 365,
            targets: 90,
            snapshot: 14,
            timestamp: 2,
        }
    }
}

impl Lifetimes {
    pub(super) const fn seconds(self, role: RoleType) -> i64 {
        let days = match role {
            RoleType::Root => self.root,
            RoleType::Snapshot => self.snapshot,
            RoleType::Timestamp => self.timestamp,
            RoleType::Targets | RoleType::DelegatedTargets => self.targets,
        };
        days as i64 * DAY
    }
}

/// What became of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Its name in the registry.
    pub target: String,
    /// The version of the registry that names it.
    pub targets_version: u64,
    /// The very same document was there before.
    pub already: bool,
}

/// What a renewal did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Renewed {
    /// Signed again.
    pub renewed: Vec<RoleType>,
    /// Due, but its keys are elsewhere. Signatures that nobody renews stop all updates when they expire.
    pub keys_elsewhere: Vec<RoleType>,
}

/// Target and file name of a model's version.
///
/// # Errors
/// Not a name.
pub fn target_name(name: &str, version: &str) -> Result<String, SigningError> {
    for part in [name, version] {
        // As `mesh_core::Release::is_valid` has it.
        let fits = (1..=64).contains(&part.len())
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
            && part.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !fits {
            return Err(SigningError::Name(part.chars().take(80).collect()));
        }
    }
    Ok(format!("models/{name}/{version}.json"))
}

//! What there is to say about the keys.

use serde::Serialize;
use tough::schema::{Role, RoleType};

use super::{
    SigningError,
    current::Current,
    keys::{KeyRing, key_id, public_of},
    root::{self, ROLES},
};

/// One key of a role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeyStatus {
    /// Its identity.
    pub id: String,
    /// Its private half is on this machine.
    pub here: bool,
}

/// One role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RoleStatus {
    /// Which.
    pub role: RoleType,
    /// The version in force.
    pub version: u64,
    /// When it expires, in milliseconds since the Unix epoch.
    pub expires_ms: i64,
    /// So many keys must sign.
    pub threshold: u64,
    /// Who may.
    pub keys: Vec<KeyStatus>,
}

/// The keys and what they have signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Root, targets, snapshot, timestamp.
    pub roles: Vec<RoleStatus>,
    /// Model versions that are published.
    pub targets: usize,
    /// Files of keys that may sign nothing (any more).
    pub unused: Vec<String>,
}

pub(super) fn status(current: &Current, keys: &KeyRing) -> Result<Status, SigningError> {
    let root = &current.root.signed;
    let (mut here, mut unused) = (Vec::new(), Vec::new());
    for path in keys.files()? {
        let key = public_of(&path)?;
        if !root::knows(root, &key)? {
            unused.push(path.display().to_string());
        }
        here.push(key_id(&key)?);
    }
    let dates = |role: &dyn Dated| role.dates();
    let roles = ROLES.map(|role| {
        let (version, expires_ms) = match role {
            RoleType::Root => dates(root),
            RoleType::Snapshot => dates(&current.snapshot.signed),
            RoleType::Timestamp => dates(&current.timestamp.signed),
            RoleType::Targets | RoleType::DelegatedTargets => dates(&current.targets.signed),
        };
        let is_here = |id: String| KeyStatus {
            here: here.contains(&id),
            id,
        };
        RoleStatus {
            role,
            version,
            expires_ms,
            threshold: root
                .roles
                .get(&role)
                .map_or(0, |holders| holders.threshold.get()),
            keys: root::ids(root, role).into_iter().map(is_here).collect(),
        }
    });
    Ok(Status {
        roles: roles.into(),
        targets: current.targets.signed.targets.len(),
        unused,
    })
}

/// Version and expiry of any role.
trait Dated {
    fn dates(&self) -> (u64, i64);
}

impl<T: Role> Dated for T {
    fn dates(&self) -> (u64, i64) {
        (self.version().get(), self.expires().as_millisecond())
    }
}

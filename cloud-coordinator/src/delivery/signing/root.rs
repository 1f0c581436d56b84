//! The root of trust: which keys may sign what. Its changes are proposed, signed where the keys are, and
//! installed; between these steps the new root is a file that may travel on a stick.

use std::{num::NonZeroU64, path::PathBuf};

use aws_lc_rs::rand::SystemRandom;
use tough::{
    editor::signed::SignedRole,
    schema::{KeyHolder, RoleKeys, RoleType, Root, Signed, key::Key},
};

use super::{
    SPEC_VERSION, SigningError,
    keys::{hex, key_id, sources},
};

/// The roles that every repository has. Others are not used.
pub const ROLES: [RoleType; 4] = [
    RoleType::Root,
    RoleType::Targets,
    RoleType::Snapshot,
    RoleType::Timestamp,
];

/// One change of the root.
#[derive(Clone, Debug)]
pub enum Edit {
    /// This key may sign for the role.
    Add(RoleType, Key),
    /// The key of this identity, or of the only one that begins so, may not sign for the role any more.
    Remove(RoleType, String),
    /// So many keys must sign for the role.
    Threshold(RoleType, u64),
}

fn refused(why: impl Into<String>) -> SigningError {
    SigningError::Root(why.into())
}

/// The first root: no keys yet.
pub(super) fn empty(expires: jiff::Timestamp) -> Root {
    let none = || RoleKeys {
        keyids: Vec::new(),
        threshold: NonZeroU64::MIN,
        _extra: Default::default(),
    };
    Root {
        spec_version: SPEC_VERSION.into(),
        consistent_snapshot: true,
        version: NonZeroU64::MIN,
        expires,
        keys: Default::default(),
        roles: ROLES.map(|role| (role, none())).into(),
        _extra: Default::default(),
    }
}

/// Makes the changes.
pub(super) fn edit(root: &mut Root, edits: &[Edit]) -> Result<(), SigningError> {
    for change in edits {
        let (Edit::Add(role, _) | Edit::Remove(role, _) | Edit::Threshold(role, _)) = change;
        let Some(holders) = root.roles.get_mut(role) else {
            return Err(refused(format!("there is no role {role}")));
        };
        match change {
            Edit::Add(_, key) => {
                let id = key
                    .key_id()
                    .map_err(|error| refused(format!("the new key is unusable: {error}")))?;
                if holders.keyids.contains(&id) {
                    let id = hex(&id);
                    return Err(refused(format!("{id} is a {role} key already")));
                }
                root.keys.insert(id.clone(), key.clone());
                holders.keyids.push(id);
            }
            Edit::Remove(_, id) => {
                let before = holders.keyids.len();
                holders
                    .keyids
                    .retain(|known| !hex(known).starts_with(id.as_str()));
                match before - holders.keyids.len() {
                    1 => {}
                    0 => return Err(refused(format!("no {role} key begins with {id:?}"))),
                    n => return Err(refused(format!("{n} {role} keys begin with {id:?}"))),
                }
            }
            Edit::Threshold(_, threshold) => {
                holders.threshold = NonZeroU64::new(*threshold)
                    .ok_or_else(|| refused("a threshold is at least 1"))?;
            }
        }
    }
    let Root { keys, roles, .. } = root;
    keys.retain(|id, _| roles.values().any(|role| role.keyids.contains(id)));
    complete(root)
}

/// Whether each role can be signed for at all, and devices will understand it.
fn complete(root: &Root) -> Result<(), SigningError> {
    if !root.consistent_snapshot || root.roles.len() != ROLES.len() {
        return Err(refused("it is not made for this registry"));
    }
    for role in ROLES {
        let Some(holders) = root.roles.get(&role) else {
            return Err(refused(format!("it has no role {role}")));
        };
        let (keys, threshold) = (holders.keyids.len(), holders.threshold);
        if (keys as u64) < threshold.get() {
            return Err(refused(format!(
                "{threshold} of {keys} keys cannot sign for {role}"
            )));
        }
    }
    Ok(())
}

/// Reads a root that was signed elsewhere; nothing is checked yet.
///
/// # Errors
/// Not a root.
pub fn parse(bytes: &[u8]) -> Result<Signed<Root>, SigningError> {
    if bytes.len() as u64 > super::disk::MAX_FILE_BYTES {
        return Err(refused("it is too large"));
    }
    serde_json::from_slice(bytes).map_err(|error| refused(format!("it cannot be read: {error}")))
}

/// Signs a proposed root with files of keys, wherever they are: keeps the signatures that it has and adds those
/// of keys that the new root or the one before it (`previous`) names for root. Needs no repository.
///
/// # Errors
/// No key fits.
pub async fn sign(
    proposed: &[u8],
    previous: Option<&[u8]>,
    keys: &[PathBuf],
) -> Result<Vec<u8>, SigningError> {
    let proposed = parse(proposed)?;
    let mut holders = vec![proposed.signed.clone()];
    if let Some(previous) = previous {
        holders.push(parse(previous)?.signed);
    }
    let (sources, random) = (sources(keys), SystemRandom::new());
    let mut signatures = Vec::new();
    for holder in holders {
        let holder = KeyHolder::Root(holder);
        match SignedRole::new(proposed.signed.clone(), &holder, &sources, &random).await {
            Ok(signed) => signatures.extend(signed.signed().signatures.clone()),
            // It may be a key of the other root.
            Err(tough::error::Error::KeysNotFoundInRoot { .. }) => {}
            Err(error) => return Err(SigningError::library("sign the root", error)),
        }
    }
    if signatures.is_empty() {
        return Err(refused(
            "none of these keys is a root key of it or of the one before",
        ));
    }
    // An old signature by the same key is of no use: the text may have changed since.
    let mut signed = Signed {
        signed: proposed.signed,
        signatures: Vec::new(),
    };
    for signature in signatures.into_iter().chain(proposed.signatures) {
        if signed.signatures.iter().all(|s| s.keyid != signature.keyid) {
            signed.signatures.push(signature);
        }
    }
    to_bytes(&signed)
}

/// The text of a root, as it travels.
pub(super) fn to_bytes(root: &Signed<Root>) -> Result<Vec<u8>, SigningError> {
    serde_json::to_vec_pretty(root).map_err(|error| refused(error.to_string()))
}

/// Whether devices that trust `old` will follow it to `new`.
pub(super) fn check_follows(
    old: Option<&Signed<Root>>,
    new: &Signed<Root>,
    now: jiff::Timestamp,
) -> Result<(), SigningError> {
    complete(&new.signed)?;
    let wanted = old.map_or(1, |old| old.signed.version.get().saturating_add(1));
    if new.signed.version.get() != wanted {
        let found = new.signed.version;
        return Err(refused(format!(
            "its version is {found}, the next one is {wanted}"
        )));
    }
    if new.signed.expires <= now {
        return Err(refused(format!("it expired at {}", new.signed.expires)));
    }
    for (whose, holder) in [("its own", Some(new)), ("the present", old)] {
        if let Some(Err(error)) = holder.map(|holder| holder.signed.verify_role(new)) {
            return Err(refused(format!(
                "{whose} root keys have not signed it: {error}"
            )));
        }
    }
    Ok(())
}

/// The identities of a role's keys.
pub(super) fn ids(root: &Root, role: RoleType) -> Vec<String> {
    let holders = root.roles.get(&role);
    holders.map_or_else(Vec::new, |holders| {
        holders.keyids.iter().map(|id| hex(id)).collect()
    })
}

/// Whether this key may sign anything.
pub(super) fn knows(root: &Root, key: &Key) -> Result<bool, SigningError> {
    let id = key_id(key)?;
    Ok(ROLES.iter().any(|role| ids(root, *role).contains(&id)))
}

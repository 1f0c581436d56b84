//! The metadata on the disk: read and checked before anything is done with it, signed and pinned anew.

use std::{collections::HashMap, num::NonZeroU64, path::Path};

use aws_lc_rs::rand::SystemRandom;
use serde::de::DeserializeOwned;
use tough::{
    editor::signed::SignedRole,
    error::Error,
    schema::{Hashes, KeyHolder, Metafile, Role, Root, Signed, Snapshot, Targets, Timestamp},
};

use super::{
    SigningError,
    disk::{self, Disk, MAX_FILE_BYTES, names, version_of},
    keys::KeyRing,
    root,
};

/// The metadata that is in force.
pub(super) struct Current {
    pub(super) root: Signed<Root>,
    pub(super) root_bytes: Vec<u8>,
    pub(super) targets: Signed<Targets>,
    pub(super) snapshot: Signed<Snapshot>,
    pub(super) timestamp: Signed<Timestamp>,
}

/// Files of one change, in the order of their making.
pub(super) type Files = Vec<(String, Vec<u8>)>;

impl Current {
    /// Reads what is in force, and checks that it is.
    pub(super) fn load(disk: &Disk) -> Result<Self, SigningError> {
        let metadata = disk.path("metadata");
        let files = names(&metadata)?;
        let newest = files
            .iter()
            .filter_map(|file| version_of(file, "root"))
            .max();
        let newest = newest.ok_or_else(|| SigningError::Damaged {
            file: "metadata".into(),
            detail: "there is no root".into(),
        })?;
        let root_file = format!("{newest}.root.json");
        let root_bytes = disk::read(&metadata.join(&root_file))?;
        let root: Signed<Root> = root::parse(&root_bytes)?;
        verified(&root, &root, &root_file)?;
        let timestamp: Signed<Timestamp> = read(&root, &metadata, "timestamp.json")?;
        let version = named(&timestamp.signed.meta, "snapshot.json")?;
        let snapshot: Signed<Snapshot> =
            read(&root, &metadata, &format!("{version}.snapshot.json"))?;
        let version = named(&snapshot.signed.meta, "targets.json")?;
        let targets = read(&root, &metadata, &format!("{version}.targets.json"))?;
        Ok(Self {
            root,
            root_bytes,
            targets,
            snapshot,
            timestamp,
        })
    }
}

/// Signs one role, adds its file, and says what pins it.
pub(super) async fn seal<T: Role>(
    keys: &KeyRing,
    role: T,
    holder: &KeyHolder,
    files: &mut Files,
) -> Result<Metafile, SigningError> {
    let (version, file) = (role.version(), role.filename(true));
    let sources = keys.sources()?;
    let signed = match SignedRole::new(role, holder, &sources, &SystemRandom::new()).await {
        Ok(signed) => signed,
        Err(Error::SigningKeysNotFound { .. } | Error::KeysNotFoundInRoot { .. }) => {
            return Err(SigningError::KeysMissing(T::TYPE.to_string()));
        }
        Err(error) => return Err(SigningError::library("sign metadata", error)),
    };
    if *signed.length() > MAX_FILE_BYTES {
        let (length, limit) = (*signed.length(), MAX_FILE_BYTES);
        return Err(SigningError::TooLarge {
            what: file,
            length,
            limit,
        });
    }
    files.push((file, signed.buffer().clone()));
    Ok(Metafile {
        length: Some(*signed.length()),
        hashes: Some(Hashes {
            sha256: signed.sha256().to_vec().into(),
            _extra: Default::default(),
        }),
        version,
        _extra: Default::default(),
    })
}

fn verified<T: Role>(
    root: &Signed<Root>,
    role: &Signed<T>,
    file: &str,
) -> Result<(), SigningError> {
    root.signed
        .verify_role(role)
        .map_err(|error| SigningError::Damaged {
            file: file.to_owned(),
            detail: error.to_string(),
        })
}

fn read<T: Role + DeserializeOwned>(
    root: &Signed<Root>,
    metadata: &Path,
    file: &str,
) -> Result<Signed<T>, SigningError> {
    let bytes = disk::read(&metadata.join(file))?;
    let role = serde_json::from_slice(&bytes).map_err(|error| SigningError::Damaged {
        file: file.to_owned(),
        detail: error.to_string(),
    })?;
    verified(root, &role, file)?;
    Ok(role)
}

fn named(meta: &HashMap<String, Metafile>, file: &str) -> Result<NonZeroU64, SigningError> {
    let pinned = meta.get(file).map(|pinned| pinned.version);
    pinned.ok_or_else(|| SigningError::Damaged {
        file: file.to_owned(),
        detail: "it is not named by what pins it".into(),
    })
}

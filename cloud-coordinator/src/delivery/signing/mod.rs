//! The signed registry of models: metadata by The Update Framework.
//!
//! `keys/` holds private keys, `repository/` what devices fetch. One target per model version is signed: a
//! small document which pins every file of the release by its digest. All cryptography and the formats are the
//! library's (`tough`); here is decided what is signed when, and that the disk survives a crash.
//!
//! Everything is read from the disk, under a lock, each time: the command line may work beside the
//! coordinator.

mod current;
mod disk;
mod error;
mod keys;
mod root;
mod status;
mod terms;

use std::{
    num::NonZeroU64,
    path::{Path, PathBuf},
};

use tough::{
    TargetName,
    schema::{
        Hashes, KeyHolder, Role, RoleType, Root, Signed, Snapshot, Target, Targets, Timestamp,
    },
};

use current::{Current, Files, seal};
use disk::Disk;
use keys::KeyRing;

pub use disk::{Step, StepHook};
pub use error::SigningError;
/// A role of The Update Framework.
pub type RoleName = RoleType;
pub use keys::{generate, public_from_json, public_of};
pub use root::{Edit, ROLES, parse as parse_root, sign as sign_root};
pub use status::{KeyStatus, RoleStatus, Status};
pub use terms::{Lifetimes, Published, Renewed, target_name};

/// The version of the specification that the library writes.
const SPEC_VERSION: &str = "1.0.0";
/// The largest release document.
pub const MAX_DOCUMENT_BYTES: usize = models::MAX_RELEASE_BYTES;
/// Metadata is renewed when a third of its life is over, so that one that lives two days is renewed by a
/// call each day, and one call may fail.
const RENEW_AFTER: i64 = 3;

/// Signs.
pub struct Signing {
    disk: Disk,
    keys: KeyRing,
    lifetimes: Lifetimes,
}

fn time(now_ms: i64) -> Result<jiff::Timestamp, SigningError> {
    // Whole seconds, as the specification writes them.
    jiff::Timestamp::from_second(now_ms.div_euclid(1000))
        .map_err(|_| SigningError::Range("the time"))
}

fn next(version: NonZeroU64) -> Result<NonZeroU64, SigningError> {
    version
        .checked_add(1)
        .ok_or(SigningError::Range("a version"))
}

impl Signing {
    /// Opens the registry in `data`, or makes one with new keys.
    ///
    /// # Errors
    /// The disk, or what is on it.
    pub async fn open(
        data: &Path,
        lifetimes: Lifetimes,
        now_ms: i64,
    ) -> Result<Self, SigningError> {
        Self::open_with(data, lifetimes, now_ms, None).await
    }

    /// The same, and tells `hook` of each change of the disk.
    ///
    /// # Errors
    /// The disk, or what is on it.
    pub async fn open_with(
        data: &Path,
        lifetimes: Lifetimes,
        now_ms: i64,
        hook: Option<StepHook>,
    ) -> Result<Self, SigningError> {
        let signing = Self {
            disk: Disk::new(data.join("repository"), hook),
            keys: KeyRing::new(data.join("keys")),
            lifetimes,
        };
        let lock = signing.disk.lock()?;
        signing.disk.recover()?;
        if disk::names(&signing.disk.path("metadata"))?.is_empty() {
            let files = signing.first(now_ms).await?;
            signing.disk.commit(&files)?;
        }
        Current::load(&signing.disk)?;
        drop(lock);
        Ok(signing)
    }

    /// Signs with these keys, too.
    #[must_use]
    pub fn with_keys(mut self, files: impl IntoIterator<Item = PathBuf>) -> Self {
        self.keys.add(files);
        self
    }

    /// The folder that is served: `metadata/` and `targets/`.
    #[must_use]
    pub fn repository(&self) -> PathBuf {
        self.disk.path("")
    }

    /// The first root's text, which devices are given in person.
    ///
    /// # Errors
    /// The disk.
    pub fn first_root(&self) -> Result<Vec<u8>, SigningError> {
        disk::read(&self.disk.path("metadata/1.root.json"))
    }

    /// The present root's text.
    ///
    /// # Errors
    /// The disk, or what is on it.
    pub fn root(&self) -> Result<Vec<u8>, SigningError> {
        Ok(Current::load(&self.disk)?.root_bytes)
    }

    /// Adds one version of a model. On success devices can find it.
    ///
    /// # Errors
    /// It exists with another content; keys are missing; the disk.
    pub async fn publish(
        &self,
        name: &str,
        version: &str,
        document: &[u8],
        now_ms: i64,
    ) -> Result<Published, SigningError> {
        let target = target_name(name, version)?;
        self.publish_target(target, document, now_ms).await
    }

    /// Adds settings with this number.
    ///
    /// # Errors
    /// As [`Signing::publish`].
    pub async fn publish_settings(
        &self,
        version: u64,
        document: &[u8],
        now_ms: i64,
    ) -> Result<Published, SigningError> {
        let target = format!("settings/v1/{version}.json");
        self.publish_target(target, document, now_ms).await
    }

    async fn publish_target(
        &self,
        target: String,
        document: &[u8],
        now_ms: i64,
    ) -> Result<Published, SigningError> {
        if document.len() > MAX_DOCUMENT_BYTES {
            return Err(SigningError::TooLarge {
                what: target,
                length: document.len() as u64,
                limit: MAX_DOCUMENT_BYTES as u64,
            });
        }
        let _lock = self.start()?;
        let current = Current::load(&self.disk)?;
        let key = TargetName::new(&*target)
            .map_err(|error| SigningError::library("name the target", error))?;
        let digest = models::digest_of(document);
        let sha256 = digest.0.to_vec();
        if let Some(there) = current.targets.signed.targets.get(&key) {
            let targets_version = current.targets.signed.version.get();
            let already = there.hashes.sha256 == sha256;
            return already
                .then_some(Published {
                    target: target.clone(),
                    targets_version,
                    already,
                })
                .ok_or(SigningError::Exists(target));
        }
        // The library asks for the digest before the whole name, not before its last part.
        let file = format!("targets/{digest}.{target}");
        self.disk.put(&self.disk.path(&file), document, 0o644)?;

        let mut targets = current.targets.signed.clone();
        let entry = Target {
            length: document.len() as u64,
            hashes: Hashes {
                sha256: sha256.into(),
                _extra: Default::default(),
            },
            custom: Default::default(),
            _extra: Default::default(),
        };
        targets.targets.insert(key, entry);
        let root = current.root.signed.clone();
        let files = self
            .sign(current, root, Some(targets), true, now_ms)
            .await?;
        self.store(&files)?;
        let targets_version = Current::load(&self.disk)?.targets.signed.version.get();
        Ok(Published {
            target,
            targets_version,
            already: false,
        })
    }

    /// Signs again what will expire. Called once a day.
    ///
    /// # Errors
    /// Keys of the timestamp or snapshot are missing; the disk.
    pub async fn refresh(&self, now_ms: i64) -> Result<Renewed, SigningError> {
        let mut result = Renewed::default();
        if self.due(&Current::load(&self.disk)?.root.signed, now_ms)? {
            let root = self.propose(&[], now_ms)?;
            let renewed = match sign_root(&root, None, &self.keys.files()?).await {
                Ok(root) => self.install_root(&root, now_ms).await,
                Err(error) => Err(error),
            };
            match renewed {
                Ok(_) => result.renewed.push(RoleType::Root),
                Err(SigningError::Root(_) | SigningError::KeysMissing(_)) => {
                    result.keys_elsewhere.push(RoleType::Root);
                }
                Err(other) => return Err(other),
            }
        }
        let _lock = self.start()?;
        let mut current = Current::load(&self.disk)?;
        let root = current.root.signed.clone();
        if self.due(&current.targets.signed, now_ms)? {
            let targets = current.targets.signed.clone();
            match self
                .sign(current, root.clone(), Some(targets), true, now_ms)
                .await
            {
                Ok(files) => {
                    self.store(&files)?;
                    result.renewed.extend([
                        RoleType::Targets,
                        RoleType::Snapshot,
                        RoleType::Timestamp,
                    ]);
                    return Ok(result);
                }
                Err(SigningError::KeysMissing(role)) if role == RoleType::Targets.to_string() => {
                    result.keys_elsewhere.push(RoleType::Targets);
                }
                Err(other) => return Err(other),
            }
            current = Current::load(&self.disk)?;
        }
        let snapshot = self.due(&current.snapshot.signed, now_ms)?;
        if snapshot || self.due(&current.timestamp.signed, now_ms)? {
            let files = self.sign(current, root, None, snapshot, now_ms).await?;
            self.store(&files)?;
            result
                .renewed
                .extend(snapshot.then_some(RoleType::Snapshot));
            result.renewed.push(RoleType::Timestamp);
        }
        Ok(result)
    }

    /// The next root with these changes, not signed by anybody: for [`sign_root`] here or on another machine.
    ///
    /// # Errors
    /// The changes make no sense.
    pub fn propose(&self, edits: &[Edit], now_ms: i64) -> Result<Vec<u8>, SigningError> {
        let mut root = Current::load(&self.disk)?.root.signed;
        root.version = next(root.version)?;
        root.expires = self.expires(RoleType::Root, now_ms)?;
        root::edit(&mut root, edits)?;
        root::to_bytes(&Signed {
            signed: root,
            signatures: Vec::new(),
        })
    }

    /// Puts a signed root in force, and signs everything else again as it demands. Says its version.
    ///
    /// # Errors
    /// Devices would not follow it, or it names keys for the other roles that are not here.
    pub async fn install_root(&self, bytes: &[u8], now_ms: i64) -> Result<u64, SigningError> {
        let _lock = self.start()?;
        let current = Current::load(&self.disk)?;
        let new = root::parse(bytes)?;
        root::check_follows(Some(&current.root), &new, time(now_ms)?)?;
        let targets = (new.signed.verify_role(&current.targets).is_err())
            .then(|| current.targets.signed.clone());
        let version = new.signed.version.get();
        let mut files = self
            .sign(current, new.signed, targets, true, now_ms)
            .await?;
        files.insert(0, (format!("{version}.root.json"), bytes.to_vec()));
        self.store(&files)?;
        Ok(version)
    }

    /// Replaces all keys of a role by one new one; needs the root keys here. For more, [`Signing::propose`].
    ///
    /// # Errors
    /// Keys are missing; the disk.
    pub async fn rotate(&self, role: RoleType, now_ms: i64) -> Result<u64, SigningError> {
        let current = Current::load(&self.disk)?;
        let mut edits: Vec<Edit> = root::ids(&current.root.signed, role)
            .into_iter()
            .map(|id| Edit::Remove(role, id))
            .collect();
        let (_, key) = generate(self.keys.folder(), role)?;
        edits.extend([Edit::Add(role, key), Edit::Threshold(role, 1)]);
        let root = self.propose(&edits, now_ms)?;
        let root = sign_root(&root, Some(&current.root_bytes), &self.keys.files()?).await?;
        self.install_root(&root, now_ms).await
    }

    /// Roles, keys, thresholds and expiry.
    ///
    /// # Errors
    /// The disk, or what is on it.
    pub fn status(&self) -> Result<Status, SigningError> {
        status::status(&Current::load(&self.disk)?, &self.keys)
    }

    fn start(&self) -> Result<std::fs::File, SigningError> {
        let lock = self.disk.lock()?;
        self.disk.recover()?;
        Ok(lock)
    }

    fn store(&self, files: &Files) -> Result<(), SigningError> {
        self.disk.commit(files)?;
        let current = Current::load(&self.disk)?;
        self.disk
            .prune("targets", current.targets.signed.version.get())?;
        self.disk
            .prune("snapshot", current.snapshot.signed.version.get())
    }

    fn expires(&self, role: RoleType, now_ms: i64) -> Result<jiff::Timestamp, SigningError> {
        time(now_ms.saturating_add(self.lifetimes.seconds(role).saturating_mul(1000)))
    }

    fn due<T: Role>(&self, role: &T, now_ms: i64) -> Result<bool, SigningError> {
        let life = self.lifetimes.seconds(T::TYPE);
        let left = role.expires().as_second() - time(now_ms)?.as_second();
        Ok(left < life - life / RENEW_AFTER)
    }

    /// Keys, and the first version of everything.
    async fn first(&self, now_ms: i64) -> Result<Files, SigningError> {
        let mut root = root::empty(self.expires(RoleType::Root, now_ms)?);
        let mut edits = Vec::new();
        for role in ROLES {
            edits.push(Edit::Add(role, self.keys.first(role)?));
        }
        root::edit(&mut root, &edits)?;
        let unsigned = Signed {
            signed: root,
            signatures: Vec::new(),
        };
        let root_bytes = sign_root(&root::to_bytes(&unsigned)?, None, &self.keys.files()?).await?;
        let root = root::parse(&root_bytes)?;
        root::check_follows(None, &root, time(now_ms)?)?;
        // Versions are counted up before they are signed: these stand for "none yet", and are never seen.
        let (spec, none) = (SPEC_VERSION.to_owned(), NonZeroU64::MIN);
        let at = time(now_ms)?;
        let signatures = Vec::new;
        let current = Current {
            targets: Signed {
                signed: Targets::new(spec.clone(), none, at),
                signatures: signatures(),
            },
            snapshot: Signed {
                signed: Snapshot::new(spec.clone(), none, at),
                signatures: signatures(),
            },
            timestamp: Signed {
                signed: Timestamp::new(spec, none, at),
                signatures: signatures(),
            },
            root_bytes: root_bytes.clone(),
            root: root.clone(),
        };
        let targets = current.targets.signed.clone();
        let mut files = self
            .sign(current, root.signed, Some(targets), true, now_ms)
            .await?;
        files.insert(0, ("1.root.json".into(), root_bytes));
        Ok(files)
    }

    /// Signs the timestamp, the snapshot if wanted, and `targets` if there are any, as `root` demands.
    async fn sign(
        &self,
        current: Current,
        root: Root,
        targets: Option<Targets>,
        with_snapshot: bool,
        now_ms: i64,
    ) -> Result<Files, SigningError> {
        let holder = KeyHolder::Root(root);
        let mut files = Files::new();
        let (mut snapshot, mut timestamp) = (current.snapshot.signed, current.timestamp.signed);
        if let Some(mut targets) = targets {
            targets.version = next(targets.version)?;
            targets.expires = self.expires(RoleType::Targets, now_ms)?;
            let pinned = seal(&self.keys, targets, &holder, &mut files).await?;
            snapshot.meta.insert("targets.json".into(), pinned);
        }
        if with_snapshot {
            snapshot.version = next(snapshot.version)?;
            snapshot.expires = self.expires(RoleType::Snapshot, now_ms)?;
            let pinned = seal(&self.keys, snapshot, &holder, &mut files).await?;
            timestamp.meta.insert("snapshot.json".into(), pinned);
        }
        timestamp.version = next(timestamp.version)?;
        timestamp.expires = self.expires(RoleType::Timestamp, now_ms)?;
        seal(&self.keys, timestamp, &holder, &mut files).await?;
        Ok(files)
    }
}

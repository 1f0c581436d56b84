//! What a device believes about released models: metadata by The Update Framework, checked by `tough`.
//!
//! On the disk is one file, `trusted.json`: the newest root, timestamp and snapshot that were verified, and the
//! time that is known to have passed. It is replaced as a whole. The library gets a scratch copy of it in
//! `work/`, because it writes its own files in place and one after the other, and what it left there when it was
//! done or gave up is taken over.
//!
//! Time is an argument: the library is told not to look at the clock, and expiry is judged here against the
//! later of that time and the one that has passed for certain.

mod error;
mod source;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tough::{
    ExpirationEnforcement, IntoVec, Limits, Repository, RepositoryLoader, TargetName,
    schema::{Role, RoleType},
};
use url::Url;

pub use error::VerifyError;
pub use source::{Folder, Http, MAX_FILE_BYTES, Source, SourceError};

/// The largest release document.
pub const MAX_DOCUMENT_BYTES: u64 = models::MAX_RELEASE_BYTES as u64;
/// Twenty keys in four roles are 12 kB; a timestamp names one file, a snapshot one or two. Roots are changed
/// some times in a year; a device that missed more of them than this follows the rest the next time.
const LIMITS: Limits = Limits {
    max_root_size: 128 * 1024,
    max_timestamp_size: 16 * 1024,
    max_snapshot_size: 64 * 1024,
    max_targets_size: MAX_FILE_BYTES,
    max_root_updates: 64,
};
/// The time floor moves in steps of an hour, which spares the flash: metadata lives for days.
const FLOOR_STEP_MS: i64 = 60 * 60 * 1000;
/// What is trusted from one refresh to the next, in the order of its checking.
const KEPT: [(RoleType, &str); 3] = [
    (RoleType::Root, "root.json"),
    (RoleType::Timestamp, "timestamp.json"),
    (RoleType::Snapshot, "snapshot.json"),
];

/// What survives a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Trusted {
    /// The root that all trust began with. With another one it begins anew.
    pinned: String,
    /// A refresh succeeded at this time; it is not earlier now, whatever the clock says. As nothing that was
    /// accepted then had expired, a clock that ran ahead cannot push this beyond the next signatures.
    floor_ms: i64,
    files: BTreeMap<String, String>,
}

impl Trusted {
    /// The library goes on when something has expired, and keeps it. That, and what came after it, does not
    /// take the place of what was there. (A root counts although it has expired: it leads to the next one. And
    /// a new one may have told the library to forget.)
    fn give_back(&mut self, expired: RoleType, old: &Self) {
        let same_root = self.files.get("root.json") == old.files.get("root.json");
        let late = KEPT.iter().skip_while(|(role, _)| *role != expired);
        for (_, file) in late.filter(|(role, _)| *role != RoleType::Root) {
            self.files.remove(*file);
            if let Some(text) = old.files.get(*file).filter(|_| same_root) {
                self.files.insert((*file).into(), text.clone());
            }
        }
    }
}

/// What a refresh found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refreshed {
    /// Version of the root.
    pub root: u64,
    /// Version of the list of targets.
    pub targets: u64,
    /// The first of the four expires at this time, in milliseconds since the Unix epoch.
    pub expires_ms: i64,
    /// How far the clock is behind the time that has passed for certain.
    pub clock_behind_ms: i64,
}

/// The registry as this device verified it.
#[derive(Debug)]
pub struct Registry {
    pinned: String,
    folder: PathBuf,
    source: Arc<dyn Source>,
    verified: Option<Repository>,
    floor_ms: i64,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VerifyError {
    let path = path.to_owned();
    move |source| VerifyError::Store {
        operation,
        path,
        source,
    }
}

fn base(folder: &str) -> Result<Url, VerifyError> {
    // The library wants an address to join file names to; a source sees only its path.
    let base = format!("registry:///{folder}/");
    Url::parse(&base).map_err(|error| VerifyError::Name(format!("{base}: {error}")))
}

fn target_name(name: &str, version: &str) -> Result<TargetName, VerifyError> {
    let target = format!("models/{name}/{version}.json");
    // As `mesh_core::Release::is_valid` has it.
    let plain = |part: &str| {
        let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'+');
        (1..=64).contains(&part.len())
            && part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.bytes().all(fits)
    };
    let named = (plain(name) && plain(version)).then(|| TargetName::new(&*target).ok());
    named
        .flatten()
        .ok_or_else(|| VerifyError::Name(target.chars().take(160).collect()))
}

impl Registry {
    /// Trusts `pinned`, the text of a root that came by a safe way, and keeps what it learns in `folder`.
    ///
    /// # Errors
    /// The pinned root is not text.
    pub fn new(
        pinned: &[u8],
        folder: PathBuf,
        source: impl Source + 'static,
    ) -> Result<Self, VerifyError> {
        let pinned = String::from_utf8(pinned.to_vec())
            .map_err(|error| VerifyError::Pinned(error.to_string()))?;
        let source = Arc::new(source);
        Ok(Self {
            pinned,
            folder,
            source,
            verified: None,
            floor_ms: 0,
        })
    }

    /// Fetches and verifies the metadata. Until it succeeds nothing can be installed; nothing else depends on it.
    ///
    /// # Errors
    /// The first thing that is wrong. What was verified before that is remembered.
    pub async fn refresh(&mut self, now_ms: i64) -> Result<Refreshed, VerifyError> {
        self.verified = None;
        let old = self.read();
        self.floor_ms = old.floor_ms;
        let work = self.prepare(&old)?;
        let root = old.files.get("root.json").unwrap_or(&self.pinned).clone();
        let loaded = RepositoryLoader::new(&root, base("metadata")?, base("targets")?)
            .transport(source::Carrier(Arc::clone(&self.source)))
            .limits(LIMITS)
            .datastore(&work)
            // Judged below, by our time.
            .expiration_enforcement(ExpirationEnforcement::Unsafe)
            .load()
            .await
            .map_err(VerifyError::from);
        let (mut new, unseen) = self.take_over(&old, &work)?;
        let judged = loaded
            .as_ref()
            .map_or(unseen, |repository| expiries_of(repository).into());
        let expired = judged
            .iter()
            .find(|(_, ms)| *ms <= self.at(now_ms))
            .copied();
        if let Some((role, _)) = expired {
            new.give_back(role, &old);
        } else if loaded.is_ok() && now_ms > old.floor_ms.saturating_add(FLOOR_STEP_MS) {
            new.floor_ms = now_ms;
        }
        self.write(&old, &new)?;
        self.floor_ms = new.floor_ms;
        match expired {
            Some((role, expires_ms)) if expires_ms <= now_ms => {
                return Err(VerifyError::Expired { role, expires_ms });
            }
            Some((role, _)) => {
                let floor_ms = self.floor_ms;
                return Err(VerifyError::ClockBackwards {
                    role,
                    now_ms,
                    floor_ms,
                });
            }
            None => {}
        }
        let repository = loaded?;
        let refreshed = Refreshed {
            root: repository.root().signed.version.get(),
            targets: repository.targets().signed.version.get(),
            expires_ms: judged.iter().map(|(_, ms)| *ms).min().unwrap_or(0),
            clock_behind_ms: (self.floor_ms - now_ms).max(0),
        };
        self.verified = Some(repository);
        Ok(refreshed)
    }

    /// Fetches the release document of one version of a model, as the last refresh knows it.
    ///
    /// # Errors
    /// There is none, or its bytes are others than were signed.
    pub async fn release(
        &self,
        name: &str,
        version: &str,
        now_ms: i64,
    ) -> Result<Vec<u8>, VerifyError> {
        self.target(&target_name(name, version)?, now_ms).await
    }

    /// Fetches the document of settings with this number, as the last refresh knows it.
    ///
    /// # Errors
    /// As [`Registry::release`].
    pub async fn settings(&self, version: u64, now_ms: i64) -> Result<Vec<u8>, VerifyError> {
        let target = format!("settings/v1/{version}.json");
        let target = TargetName::new(&*target).map_err(|_| VerifyError::Name(target))?;
        self.target(&target, now_ms).await
    }

    async fn target(&self, target: &TargetName, now_ms: i64) -> Result<Vec<u8>, VerifyError> {
        let repository = self.verified.as_ref().ok_or(VerifyError::NotVerified)?;
        let now_ms = self.at(now_ms);
        if let Some((role, expires_ms)) = expiries_of(repository)
            .into_iter()
            .find(|(_, ms)| *ms <= now_ms)
        {
            return Err(VerifyError::Expired { role, expires_ms });
        }
        let unknown = || VerifyError::UnknownTarget(target.raw().to_owned());
        // Only what the targets role itself has signed: delegations are not used.
        let entry = repository
            .targets()
            .signed
            .targets
            .get(target)
            .ok_or_else(unknown)?;
        if entry.length > MAX_DOCUMENT_BYTES {
            return Err(VerifyError::TooLarge(target.raw().to_owned()));
        }
        let stream = repository.read_target(target).await?.ok_or_else(unknown)?;
        Ok(stream.into_vec().await?)
    }

    /// All that the last refresh verified, for people who look for a fault.
    #[must_use]
    pub const fn verified(&self) -> Option<&Repository> {
        self.verified.as_ref()
    }

    fn at(&self, now_ms: i64) -> i64 {
        now_ms.max(self.floor_ms)
    }

    /// What is remembered; nothing where there is nothing that can be read.
    fn read(&self) -> Trusted {
        let path = self.folder.join("trusted.json");
        let anew = || Trusted {
            pinned: self.pinned.clone(),
            ..Trusted::default()
        };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return anew(),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "cannot read what is trusted: beginning with the pinned root");
                return anew();
            }
        };
        match serde_json::from_slice::<Trusted>(&bytes) {
            Ok(trusted) if trusted.pinned == self.pinned => trusted,
            Ok(trusted) => {
                tracing::info!("another root is pinned than before: trust begins with it");
                Trusted {
                    floor_ms: trusted.floor_ms,
                    ..anew()
                }
            }
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "what is trusted is damaged: beginning with the pinned root");
                anew()
            }
        }
    }

    /// A scratch copy for the library.
    fn prepare(&self, old: &Trusted) -> Result<PathBuf, VerifyError> {
        let work = self.folder.join("work");
        match fs::remove_dir_all(&work) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("clear", &work)(error));
            }
            _ => fs::create_dir_all(&work).map_err(failed("create", &work))?,
        }
        for (file, text) in &old.files {
            let path = work.join(file);
            fs::write(&path, text).map_err(failed("write", &path))?;
        }
        Ok(work)
    }

    /// What the library has verified and left in `work`, and when that expires which is new.
    fn take_over(
        &self,
        old: &Trusted,
        work: &Path,
    ) -> Result<(Trusted, Vec<(RoleType, i64)>), VerifyError> {
        let mut new = Trusted {
            files: BTreeMap::new(),
            ..old.clone()
        };
        let mut expiries = Vec::new();
        for (role, file) in KEPT {
            let path = work.join(file);
            let text = match fs::read_to_string(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(failed("read", &path))?,
            };
            // The library writes the same content in another order each time.
            let value = |text: &str| serde_json::from_str::<Value>(text).ok();
            let (before, now) = (old.files.get(file), value(&text));
            if let Some(same) = before.filter(|before| value(before) == now) {
                new.files.insert(file.into(), same.clone());
                continue;
            }
            let expires = now
                .as_ref()
                .and_then(|now| now["signed"]["expires"].as_str());
            let expires = expires.and_then(|text| text.parse::<jiff::Timestamp>().ok());
            expiries.extend(expires.map(|at| (role, at.as_millisecond())));
            new.files.insert(file.into(), text);
        }
        Ok((new, expiries))
    }

    /// Replaces `trusted.json` if anything is new.
    fn write(&self, old: &Trusted, new: &Trusted) -> Result<(), VerifyError> {
        if old == new {
            return Ok(());
        }
        let path = self.folder.join("trusted.json");
        let fresh = self.folder.join("trusted.json.new");
        let replace = || {
            let mut file = File::create(&fresh)?;
            file.write_all(&serde_json::to_vec(new)?)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        replace().map_err(failed("write", &path))
    }
}

fn expiries_of(repository: &Repository) -> [(RoleType, i64); 4] {
    fn of<T: Role>(role: &T) -> (RoleType, i64) {
        (T::TYPE, role.expires().as_millisecond())
    }
    [
        of(&repository.root().signed),
        of(&repository.timestamp().signed),
        of(&repository.snapshot().signed),
        of(&repository.targets().signed),
    ]
}

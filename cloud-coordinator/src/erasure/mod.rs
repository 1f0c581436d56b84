//! Erasing samples everywhere: what a person asked to be gone is in no file of this coordinator afterwards, is not taken
//! again, and devices that may still have it are told to drop it.
//!
//! An erasure is written down before anything is removed, and goes on after a restart. Each step can be repeated.

mod store;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use mesh_core::{Erase, Gone, MAX_ERASE, Name};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

pub(crate) use store::ErasureView;

use crate::{
    clock,
    delivery::{RolloutError, Rollouts},
    objects::{ObjectError, digest},
    records::{RecordError, Records},
    registry::Registry,
    samples::{SampleError, Samples},
};

/// Samples that are erased in one transaction: labelling waits for some milliseconds.
const AT_ONCE: i64 = 200;
/// How soon a device's answer has consequences, and how soon what failed is tried again.
const LOOK: Duration = Duration::from_secs(1);
/// Characters of a reason.
const MAX_WHY: usize = 500;

/// Why nothing can be erased.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ErasureError {
    #[error(transparent)]
    Records(#[from] RecordError),
    #[error(transparent)]
    Objects(#[from] ObjectError),
    #[error(transparent)]
    Samples(#[from] SampleError),
    #[error(transparent)]
    Rollouts(#[from] RolloutError),
    #[error("cannot look at the golden pictures in {path}: {error}")]
    Golden { path: PathBuf, error: io::Error },
    #[error("there is no erasure {0}")]
    Unknown(i64),
    #[error("{0}")]
    Invalid(String),
}

/// Which samples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Which {
    /// This one.
    Sample(i64),
    /// Those of a device, `SITE/DEVICE`, with `_` where no site was proved: all, or captured in a time by its clock.
    Device {
        /// `SITE/DEVICE`
        name: String,
        /// From this moment, milliseconds since 1970.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from_ms: Option<i64>,
        /// Up to this moment, milliseconds since 1970.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        to_ms: Option<i64>,
    },
    /// Those that this person has brought in.
    Person(String),
}

/// What was gone, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub(crate) struct Receipt {
    /// Samples.
    pub(crate) samples: u64,
    /// Images in the store.
    pub(crate) images: u64,
    /// Uploads on their way.
    pub(crate) uploads: u64,
    /// Labels, with those that were taken back.
    pub(crate) labels: u64,
    /// Embeddings of devices and of this coordinator.
    pub(crate) embeddings: u64,
    /// Datasets that name one of them: they keep its digest and say that it was erased.
    pub(crate) datasets: u64,
    /// Models that carry one of them as a golden picture: made by others, and to be removed by a person.
    pub(crate) models: Vec<String>,
}

/// See the module.
pub(crate) struct Erasures {
    samples: Samples,
    registry: Arc<Registry>,
    rollouts: Arc<Rollouts>,
    models: PathBuf,
    /// One at a time.
    work: Mutex<()>,
}

fn split(name: &str) -> Result<(String, String), ErasureError> {
    let wrong = || ErasureError::Invalid(format!("device: {name:?} is not SITE/DEVICE"));
    let (site, device) = name.split_once('/').ok_or_else(wrong)?;
    if site.parse::<Name>().is_err() || device.parse::<Name>().is_err() || device == "_" {
        return Err(wrong());
    }
    let site = if site == "_" { "" } else { site };
    Ok((site.to_owned(), device.to_owned()))
}

impl Which {
    fn check(&self) -> Result<(), ErasureError> {
        match self {
            Self::Sample(_) => Ok(()),
            Self::Person(name) if name.trim().is_empty() => {
                Err(ErasureError::Invalid("person: is empty".into()))
            }
            Self::Person(_) => Ok(()),
            Self::Device {
                name,
                from_ms,
                to_ms,
            } => {
                split(name)?;
                if from_ms.zip(*to_ms).is_some_and(|(from, to)| from > to) {
                    let why = "from_ms: is not after to_ms";
                    return Err(ErasureError::Invalid(why.into()));
                }
                Ok(())
            }
        }
    }
}

impl Erasures {
    pub(crate) fn new(
        data: &Path,
        samples: Samples,
        registry: Arc<Registry>,
        rollouts: Arc<Rollouts>,
    ) -> Self {
        Self {
            samples,
            registry,
            rollouts,
            models: data.join("models"),
            work: Mutex::default(),
        }
    }

    fn records(&self) -> &Records {
        &self.samples.records
    }

    /// Erases, as far as that can be done here and now; what is left is awaited from devices.
    pub(crate) async fn erase(
        &self,
        which: Which,
        why: &str,
        author: &str,
    ) -> Result<ErasureView, ErasureError> {
        which.check()?;
        let why = why.trim();
        if !(1..=MAX_WHY).contains(&why.chars().count()) || why.chars().any(char::is_control) {
            let how = format!("why: say it in 1 to {MAX_WHY} characters");
            return Err(ErasureError::Invalid(how));
        }
        if let Which::Sample(id) = which
            && self.records().device_of(id).await?.is_none()
        {
            return Err(ErasureError::Invalid(format!("there is no sample {id}")));
        }
        let now = clock::now_ms();
        let id = self.records().add_erasure(&which, why, author, now).await?;
        self.carry_out(id, &which).await?;
        self.view(id).await
    }

    /// How far an erasure is.
    pub(crate) async fn view(&self, id: i64) -> Result<ErasureView, ErasureError> {
        let found = self.records().erasures(Some(id)).await?;
        found.into_iter().next().ok_or(ErasureError::Unknown(id))
    }

    /// The newest erasures.
    pub(crate) async fn list(&self) -> Result<Vec<ErasureView>, ErasureError> {
        Ok(self.records().erasures(None).await?)
    }

    /// Everything that is done on this coordinator. Can be repeated.
    async fn carry_out(&self, id: i64, which: &Which) -> Result<(), ErasureError> {
        let _one = self.work.lock().await;
        let records = self.records();
        if let Which::Device {
            name,
            from_ms,
            to_ms,
        } = which
        {
            // Also where nothing of it is here: the device may not have sent it yet.
            let (site, device) = split(name)?;
            let range = (from_ms.is_some() || to_ms.is_some()).then(|| {
                (
                    from_ms.unwrap_or(i64::MIN >> 11),
                    to_ms.unwrap_or(i64::MAX >> 10),
                )
            });
            let what = range.map_or(Gone::All, |(from, to)| Gone::Between { from, to });
            records
                .await_device(id, (site.as_str(), device.as_str()), what)
                .await?;
        }
        let (mut uploads, mut images) = (0, 0);
        loop {
            let victims = records.victims(which, AT_ONCE).await?;
            if victims.is_empty() {
                break;
            }
            // The rows first: from then on nothing of it is taken in.
            records.erase_rows(id, &victims, clock::now_ms()).await?;
            for victim in &victims {
                uploads += u64::from(self.samples.drop_upload(victim.id).await?);
                if victim.counted() {
                    let whose = (&victim.site, &victim.device);
                    self.samples
                        .removed(victim.id, whose, victim.bytes.unsigned_abs());
                }
            }
        }
        let digests = records.erased_by(id).await?;
        for sha256 in &digests {
            let alone = self.samples.objects.alone().await?;
            images += u64::from(self.samples.objects.erase(&alone, sha256).await?);
        }
        let models = self.golden(digests).await?;
        records.count_files(id, images, uploads, &models).await?;
        // What was deleted is overwritten in the database; the log still has it.
        records.empty_log().await?;
        records.gone_here(id, clock::now_ms()).await?;
        Ok(())
    }

    /// Models here whose golden pictures were erased.
    async fn golden(&self, digests: Vec<String>) -> Result<Vec<String>, ErasureError> {
        let models = self.models.clone();
        let looked = tokio::task::spawn_blocking(move || golden_of(&models, &digests));
        looked.await.unwrap_or_else(|error| {
            Err(ErasureError::Invalid(format!(
                "the search gave up: {error}"
            )))
        })
    }

    /// Tells devices, hears them, and goes on with what was interrupted, until `stop`.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut failing = false;
        loop {
            match self.go_on().await {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    failing = true;
                    tracing::error!(%error, "an erasure does not get on; it is tried again");
                }
                Err(_) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    async fn go_on(&self) -> Result<(), ErasureError> {
        for (id, which) in self.records().unfinished_erasures().await? {
            self.carry_out(id, &which).await?;
        }
        for (site, device, items) in self.records().awaited_of_devices().await? {
            let standing = match (site.parse::<Name>(), device.parse::<Name>()) {
                (Ok(site), Ok(device)) => self.registry.standing(&site, &device),
                // Where no site was proved there may be one device of this name.
                (Err(_), Ok(device)) => {
                    let only = self.registry.only(device.as_str(), None).ok();
                    only.and_then(|(device, site)| self.registry.standing(&site, &device))
                }
                _ => None,
            };
            let Some(standing) = standing else { continue };
            let reported = standing.reported.as_deref();
            let done = reported.and_then(|r| r.erased).unwrap_or(0);
            let heard = reported.map_or(0, |r| r.revision);
            self.records()
                .device_erased(
                    (site.as_str(), device.as_str()),
                    done.cast_signed(),
                    clock::now_ms(),
                )
                .await?;
            let left: Vec<Erase> = items
                .into_iter()
                .filter(|item| item.id > done)
                .take(MAX_ERASE)
                .collect();
            self.rollouts.erase(standing.id, left, heard).await?;
        }
        Ok(())
    }
}

fn golden_of(models: &Path, digests: &[String]) -> Result<Vec<String>, ErasureError> {
    let read = |path: &Path| match std::fs::read_dir(path) {
        Ok(entries) => Ok(entries.flatten().map(|e| e.path()).collect::<Vec<_>>()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(Vec::new()),
        Err(error) => Err(ErasureError::Golden {
            path: path.to_owned(),
            error,
        }),
    };
    let mut found = Vec::new();
    if digests.is_empty() {
        return Ok(found);
    }
    let last = |path: &Path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    for name in read(models)? {
        for version in read(&name)? {
            for picture in read(&version.join("golden"))? {
                let bytes = std::fs::read(&picture).map_err(|error| ErasureError::Golden {
                    path: picture.clone(),
                    error,
                })?;
                if digests.contains(&digest(&bytes)) {
                    found.push(format!("{}@{}", last(&name), last(&version)));
                }
            }
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

//! Published models: a signed document for each, and its files in pieces that devices can fetch.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use mesh_core::{Digest, Release};
use models::{Parent, ReleaseDocument, chunks, delta};
use serde::Serialize;
use tokio::{sync::Semaphore, task::spawn_blocking};

use super::signing::{Lifetimes, Signing, SigningError};
use crate::{
    clock,
    records::{RecordError, Records},
    train::{Catalog, CatalogError, Model, ModelState},
};

/// A delta that saves less than this share of the file is not worth its computing on the device.
const WORTH: f64 = 0.9;
/// Deltas that are kept: from the last ten versions of a few dozen models.
const MAX_DELTAS: usize = 256;

/// Why a model is not published, or a piece of it not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReleaseError {
    #[error("the gate stopped {0}: a model that did not prove itself is not published")]
    Refused(String),
    #[error("{0} is not published")]
    Unpublished(String),
    #[error("cannot {operation} {path}: {error}")]
    Disk {
        operation: &'static str,
        path: PathBuf,
        error: io::Error,
    },
    #[error(transparent)]
    Document(#[from] models::ReleaseError),
    #[error(transparent)]
    Signing(#[from] SigningError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Records(#[from] RecordError),
    #[error("publishing gave up: {0}")]
    Gone(#[from] tokio::task::JoinError),
}

/// A published model.
#[derive(Clone, Debug, Serialize, sqlx::FromRow, utoipa::ToSchema)]
#[schema(as = Release)]
pub(crate) struct ReleaseRow {
    /// The model's name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// SHA-256 of its release document.
    pub(crate) digest: String,
    /// Who published it.
    pub(crate) author: String,
    /// When, in milliseconds since the Unix epoch.
    pub(crate) created_ms: i64,
}

impl ReleaseRow {
    /// As devices are told.
    pub(crate) fn release(&self) -> Option<Release> {
        Some(Release {
            name: self.name.clone(),
            version: self.version.clone(),
            digest: self.digest.parse().ok()?,
        })
    }
}

/// See the module.
pub(crate) struct Releases {
    signing: Signing,
    catalog: Arc<Catalog>,
    records: Arc<Records>,
    /// Pieces of files by their digests.
    chunks: PathBuf,
    /// Differences between two model files, by their digests; an empty file says that it is not worth it.
    deltas: PathBuf,
    /// Making a delta takes both files and some more in memory.
    making: Semaphore,
}

fn disk(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ReleaseError {
    let path = path.to_owned();
    move |error| ReleaseError::Disk {
        operation,
        path,
        error,
    }
}

/// Writes a file that is there whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> Result<(), ReleaseError> {
    let new = path.with_extension(format!("{:016x}.new", clock::random()));
    let write = || {
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(disk("write", path))
}

impl Releases {
    /// Opens what is published in `data`, and signs again what would expire.
    pub(crate) async fn open(
        data: &Path,
        catalog: Arc<Catalog>,
        records: Arc<Records>,
    ) -> Result<Self, ReleaseError> {
        let folder = data.join("releases");
        let (chunks, deltas) = (folder.join("chunks"), folder.join("deltas"));
        for folder in [&chunks, &deltas] {
            fs::create_dir_all(folder).map_err(disk("make", folder))?;
        }
        let signing = Signing::open(&folder, Lifetimes::default(), clock::now_ms()).await?;
        // A coordinator's data folder is where somebody looks for what devices are given.
        write(&data.join("root.json"), &signing.first_root()?)?;
        let releases = Self {
            signing,
            catalog,
            records,
            chunks,
            deltas,
            making: Semaphore::new(1),
        };
        releases.renew().await?;
        Ok(releases)
    }

    /// Signs again what expires soon. Called at least once a day.
    pub(crate) async fn renew(&self) -> Result<(), ReleaseError> {
        let renewed = self.signing.refresh(clock::now_ms()).await?;
        if !renewed.keys_elsewhere.is_empty() {
            let roles = format!("{:?}", renewed.keys_elsewhere);
            tracing::warn!(
                roles,
                "signatures expire soon, and their keys are elsewhere: see cloud-coordinator keys"
            );
        }
        Ok(())
    }

    /// Publishes a model of the catalog; nothing happens if it is published already.
    pub(crate) async fn publish(&self, id: &str, author: &str) -> Result<Release, ReleaseError> {
        let model = self.catalog.find(id).await?;
        let known = self.records.release(&model.name, &model.version).await?;
        if let Some(release) = known.as_ref().and_then(ReleaseRow::release) {
            return Ok(release);
        }
        if model.state == ModelState::Refused {
            return Err(ReleaseError::Refused(model.id()));
        }
        let parent = self.parent(&model).await;
        let (catalog, chunks) = (self.catalog.clone(), self.chunks.clone());
        let (name, version) = (model.name.clone(), model.version.clone());
        let document = spawn_blocking(move || {
            let bundle = catalog.bundle(&model)?;
            let folder = bundle.dir();
            let document = ReleaseDocument::of(folder, &model.name, &model.version, parent)?;
            for file in &document.files {
                let path = folder.join(&file.path);
                let bytes = fs::read(&path).map_err(disk("read", &path))?;
                for (chunk, piece) in chunks::split(&bytes)
                    .iter()
                    .zip(bytes.chunks(chunks::CHUNK_BYTES))
                {
                    let to = piece_path(&chunks, &chunk.sha256);
                    if !to.is_file() {
                        if let Some(folder) = to.parent() {
                            fs::create_dir_all(folder).map_err(disk("make", folder))?;
                        }
                        write(&to, piece)?;
                    }
                }
            }
            Ok::<_, ReleaseError>(document)
        })
        .await??;
        let bytes = document.to_bytes()?;
        let now = clock::now_ms();
        self.signing.publish(&name, &version, &bytes, now).await?;
        let row = ReleaseRow {
            name,
            version,
            digest: document.digest()?.to_string(),
            author: author.to_owned(),
            created_ms: now,
        };
        self.records.add_release(&row, &bytes).await?;
        tracing::info!(model = id, digest = row.digest, "published");
        row.release()
            .ok_or_else(|| ReleaseError::Unpublished(id.to_owned()))
    }

    /// Signs settings and lays them ready for the devices.
    pub(super) async fn sign_settings(
        &self,
        version: u64,
        document: &[u8],
    ) -> Result<(), SigningError> {
        let now = clock::now_ms();
        let signed = self.signing.publish_settings(version, document, now).await;
        signed.map(drop)
    }

    async fn parent(&self, model: &Model) -> Option<Parent> {
        let (name, version) = model.parent.as_ref()?.split_once('@')?;
        let row = self.records.release(name, version).await.ok()??;
        let fits = name == model.name;
        fits.then(|| row.digest.parse().ok())?.map(|sha256| Parent {
            version: version.to_owned(),
            sha256,
        })
    }

    /// A piece of a file.
    pub(crate) async fn chunk(&self, sha256: Digest) -> Option<Bytes> {
        let path = piece_path(&self.chunks, &sha256);
        tokio::fs::read(path).await.ok().map(Bytes::from)
    }

    /// What leads from one model file to another, by their digests; nothing if that is not worth it.
    pub(crate) async fn delta(
        &self,
        from: Digest,
        to: Digest,
    ) -> Result<Option<Bytes>, ReleaseError> {
        let path = self.deltas.join(format!("{from}-{to}"));
        let known = |path: &Path| fs::read(path).ok().map(Bytes::from);
        if let Some(known) = known(&path) {
            return Ok(Some(known).filter(|delta| !delta.is_empty()));
        }
        let Some(new) = self.published(to).await? else {
            return Ok(None);
        };
        // What devices came with need not have been published. Of models that have nothing to do with each other there are
        // too many pairs to keep.
        let old = self.records.file_of(&new.name, &from.to_string()).await?;
        let Some(old) = old else { return Ok(None) };
        let old = self.catalog.find(&old).await?;
        let Ok(_one_at_a_time) = self.making.acquire().await else {
            return Ok(None);
        };
        if let Some(known) = known(&path) {
            return Ok(Some(known).filter(|delta| !delta.is_empty()));
        }
        let (catalog, deltas) = (self.catalog.clone(), self.deltas.clone());
        let delta = spawn_blocking(move || {
            let old = catalog
                .bundle(&old)?
                .model_bytes()
                .map_err(CatalogError::from)?;
            let new = catalog
                .bundle(&new)?
                .model_bytes()
                .map_err(CatalogError::from)?;
            #[expect(clippy::cast_precision_loss, reason = "a size")]
            let worth = |delta: &Vec<u8>| (delta.len() as f64) < new.len() as f64 * WORTH;
            let delta = delta::make(&old, &new)
                .ok()
                .filter(worth)
                .unwrap_or_default();
            write(&path, &delta)?;
            forget_oldest(&deltas);
            Ok::<_, ReleaseError>(delta)
        })
        .await??;
        Ok(Some(Bytes::from(delta)).filter(|delta| !delta.is_empty()))
    }

    /// The published model whose file has this digest.
    async fn published(&self, sha256: Digest) -> Result<Option<Model>, ReleaseError> {
        let Some(id) = self.records.published_file(&sha256.to_string()).await? else {
            return Ok(None);
        };
        Ok(Some(self.catalog.find(&id).await?))
    }

    /// A file of the registry of signatures: `metadata/…` or `targets/…`.
    pub(crate) async fn signed(&self, path: &str) -> Option<Bytes> {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+');
        let plain =
            |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(fits);
        if !path.split('/').all(plain) {
            return None;
        }
        let path = self.signing.repository().join(path);
        tokio::fs::read(path).await.ok().map(Bytes::from)
    }
}

/// Keeps the newest [`MAX_DELTAS`]; one that is gone is made again when somebody asks. Failing costs space.
fn forget_oldest(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let mut files: Vec<_> = entries
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort_unstable();
    let surplus = files.len().saturating_sub(MAX_DELTAS);
    for (_, path) in files.into_iter().take(surplus) {
        let _ = fs::remove_file(path);
    }
}

fn piece_path(folder: &Path, sha256: &Digest) -> PathBuf {
    let name = sha256.to_string();
    // 256 folders, so that none of them becomes slow.
    folder.join(name.get(..2).unwrap_or_default()).join(name)
}

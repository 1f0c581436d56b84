//! Images in an object store, addressed by their SHA-256.
//!
//! The store is reached through one interface and found by an address, so that a bucket can take the place
//! of the folder. What is in it has been looked at: whole, of its digest, an image within bounds.

use std::{borrow::Cow, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_core::MAX_SAMPLE_IMAGE_BYTES;
use object_store::{
    ObjectStore, ObjectStoreExt, PutPayload, local::LocalFileSystem, path::Path as Key,
};
use tokio::{
    sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, Semaphore},
    time::timeout,
};

/// What the store may take for one image, or to let somebody have it alone: a slow disk, or a bucket far away.
const LIMIT: Duration = Duration::from_secs(5);
/// What is with the store at a time. Where it hangs that is all that ever hangs with it.
const AT_ONCE: usize = 16;
/// Images that are decoded at a time: each may take 150 MB.
const DECODING: usize = 2;

/// What can go wrong with the images.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// The store cannot be used at all.
    #[error("cannot open the object store {url}: {detail}")]
    Open {
        /// Its address.
        url: String,
        /// What is wrong.
        detail: String,
    },
    /// There is no such image.
    #[error("there is no image {0}")]
    Missing(String),
    /// The store failed.
    #[error("cannot {operation} the image {sha256}: {error}")]
    Store {
        /// What was being done.
        operation: &'static str,
        /// With which.
        sha256: String,
        /// What the store says.
        error: object_store::Error,
    },
    /// The store does not answer.
    #[error("cannot {operation} the image {sha256}: the store did not answer within {} s", LIMIT.as_secs())]
    Late {
        /// What was being done.
        operation: &'static str,
        /// With which.
        sha256: String,
    },
    /// What is stored is not what was stored.
    #[error("the image {0} is damaged: its bytes have another digest")]
    Damaged(String),
    /// Not a digest.
    #[error("{0:?} is not a SHA-256 in lower-case hex")]
    Digest(String),
}

/// Why bytes are not taken as an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAnImage {
    /// Too long.
    #[error("it has more than {MAX_SAMPLE_IMAGE_BYTES} bytes")]
    TooLarge,
    /// Other bytes than were announced.
    #[error("its SHA-256 is {found}, not {wanted}")]
    Digest {
        /// What they are.
        found: String,
        /// What they should be.
        wanted: String,
    },
    /// Neither JPEG nor PNG by its first bytes.
    #[error("it is neither JPEG nor PNG")]
    Format,
    /// It cannot be decoded within bounds.
    #[error("{0}")]
    Content(String),
}

/// What an image file is, by its first bytes: its media type and the end of its name.
#[must_use]
pub(crate) fn kind_of(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    if bytes.starts_with(&[0xff, 0xd8, 0xff]) {
        Some(("image/jpeg", "jpg"))
    } else if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        Some(("image/png", "png"))
    } else {
        None
    }
}

/// SHA-256 in lower-case hex.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    models::digest_of(bytes).to_string()
}

/// An image as it is stored: whole, within bounds, and without anything that a camera wrote beside the pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspected {
    /// What it is stored under.
    pub sha256: String,
    /// The file.
    pub bytes: Bytes,
}

/// Looks at an image as the store takes it: size, digest where one was announced, format, every pixel. What is beside
/// the pixels is taken away.
/// Takes a while: not for a thread that others wait for.
///
/// # Errors
/// The first thing that is wrong.
pub fn inspect(bytes: &Bytes, wanted: Option<&str>) -> Result<Inspected, NotAnImage> {
    if bytes.len() as u64 > MAX_SAMPLE_IMAGE_BYTES {
        return Err(NotAnImage::TooLarge);
    }
    let found = digest(bytes);
    if let Some(wanted) = wanted
        && wanted != found
    {
        let wanted = wanted.to_owned();
        return Err(NotAnImage::Digest { found, wanted });
    }
    if kind_of(bytes).is_none() {
        return Err(NotAnImage::Format);
    }
    // 8 MiB.
    let most = usize::try_from(MAX_SAMPLE_IMAGE_BYTES).unwrap_or(usize::MAX);
    match models::bare(bytes, most) {
        Ok(Cow::Borrowed(_)) => Ok(Inspected {
            sha256: found,
            bytes: bytes.clone(),
        }),
        Ok(Cow::Owned(bare)) => Ok(Inspected {
            sha256: digest(&bare),
            bytes: bare.into(),
        }),
        Err(error) => Err(NotAnImage::Content(error.to_string())),
    }
}

/// The images.
#[derive(Clone, Debug)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    folder: std::path::PathBuf,
    /// Whoever stores an image and then names it in the database holds this shared; whoever removes one
    /// that nobody names holds it alone.
    gate: Arc<RwLock<()>>,
    places: Arc<Semaphore>,
    decoding: Arc<Semaphore>,
}

/// See [`Objects::shared`]. What the store is still busy with holds it too.
#[derive(Clone, Debug)]
pub(crate) struct Shared(#[expect(dead_code, reason = "it is held")] Arc<OwnedRwLockReadGuard<()>>);

/// See [`Objects::alone`]. What the store is still busy with holds it too.
#[derive(Clone, Debug)]
pub(crate) struct Alone(#[expect(dead_code, reason = "it is held")] Arc<OwnedRwLockWriteGuard<()>>);

fn key(sha256: &str) -> Result<Key, ObjectError> {
    let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    if sha256.len() == 64 && sha256.bytes().all(hex) {
        // 256 folders, so that none of them becomes slow.
        Ok(Key::from(format!("{}/{sha256}", &sha256[..2])))
    } else {
        Err(ObjectError::Digest(sha256.chars().take(80).collect()))
    }
}

fn failed(
    operation: &'static str,
    sha256: &str,
) -> impl FnOnce(object_store::Error) -> ObjectError {
    let sha256 = sha256.to_owned();
    move |error| match error {
        object_store::Error::NotFound { .. } => ObjectError::Missing(sha256),
        error => ObjectError::Store {
            operation,
            sha256,
            error,
        },
    }
}

fn waited(operation: &'static str) -> ObjectError {
    ObjectError::Late {
        operation,
        sha256: "that comes next".to_owned(),
    }
}

impl Objects {
    /// Opens the store at `url` (`file:///folder`), or `<data>/objects` without one. The folder is made.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn open(url: Option<&str>, data: &Path) -> Result<Self, ObjectError> {
        let folder = match url {
            None => data.join("objects"),
            Some(url) => folder_of(url).map_err(|detail| ObjectError::Open {
                url: url.to_owned(),
                detail,
            })?,
        };
        let open = |detail: String| ObjectError::Open {
            url: folder.display().to_string(),
            detail,
        };
        std::fs::create_dir_all(&folder).map_err(|e| open(e.to_string()))?;
        let store = LocalFileSystem::new_with_prefix(&folder)
            .map_err(|e| open(e.to_string()))?
            // An image is on the disk before the device that sent it may forget it.
            .with_fsync(true);
        Ok(Self {
            store: Arc::new(store),
            folder,
            gate: Arc::default(),
            places: Arc::new(Semaphore::new(AT_ONCE)),
            decoding: Arc::new(Semaphore::new(DECODING)),
        })
    }

    /// Does something with the store. Whoever waits does not wait for ever; what hangs keeps its place, and whatever it
    /// holds, until it has ended.
    async fn ask<T: Send + 'static>(
        &self,
        operation: &'static str,
        sha256: &str,
        work: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Result<T, ObjectError> {
        let late = || ObjectError::Late {
            operation,
            sha256: sha256.to_owned(),
        };
        let place = timeout(LIMIT, self.places.clone().acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            return Err(late());
        };
        let working = tokio::spawn(async move {
            let _place = place;
            work.await
        });
        match timeout(LIMIT, working).await {
            Ok(Ok(done)) => done.map_err(failed(operation, sha256)),
            Ok(Err(_)) | Err(_) => Err(late()),
        }
    }

    /// The bytes of an image, which are those that were stored.
    ///
    /// # Errors
    /// If there is none of this digest, it cannot be read, or it is damaged.
    pub async fn read(&self, sha256: &str) -> Result<Bytes, ObjectError> {
        let (store, key) = (self.store.clone(), key(sha256)?);
        let read = async move {
            let found = store.get(&key).await?;
            if found.meta.size > MAX_SAMPLE_IMAGE_BYTES {
                return Ok(None);
            }
            found.bytes().await.map(Some)
        };
        let bytes = self.ask("read", sha256, read).await?;
        let damaged = || ObjectError::Damaged(sha256.to_owned());
        bytes
            .filter(|bytes| digest(bytes) == sha256)
            .ok_or_else(damaged)
    }

    /// The first bytes of an image, enough for [`kind_of`].
    pub(crate) async fn head(&self, sha256: &str) -> Result<Bytes, ObjectError> {
        let (store, key) = (self.store.clone(), key(sha256)?);
        let read = async move { store.get_range(&key, 0..16).await };
        self.ask("read", sha256, read).await
    }

    /// Whether there is an image of this digest.
    ///
    /// # Errors
    /// If the store cannot tell.
    pub async fn has(&self, sha256: &str) -> Result<bool, ObjectError> {
        let (store, key) = (self.store.clone(), key(sha256)?);
        let look = async move { store.head(&key).await };
        match self.ask("look for", sha256, look).await {
            Ok(_) => Ok(true),
            Err(ObjectError::Missing(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Stores bytes that were [inspected](inspect) and have this digest.
    pub(crate) async fn put(
        &self,
        shared: &Shared,
        sha256: &str,
        bytes: Bytes,
    ) -> Result<(), ObjectError> {
        let (store, key, shared) = (self.store.clone(), key(sha256)?, shared.clone());
        let put = async move {
            let _shared = shared;
            store.put(&key, PutPayload::from_bytes(bytes)).await
        };
        self.ask("store", sha256, put).await.map(drop)
    }

    /// Removes an image; it is no error if there is none.
    pub(crate) async fn remove(&self, alone: &Alone, sha256: &str) -> Result<(), ObjectError> {
        let (store, key, alone) = (self.store.clone(), key(sha256)?, alone.clone());
        let remove = async move {
            let _alone = alone;
            store.delete(&key).await
        };
        match self.ask("remove", sha256, remove).await {
            Err(ObjectError::Missing(_)) => Ok(()),
            done => done,
        }
    }

    /// Removes an image and whatever an interrupted write has left of it. Says whether it was there. Hold
    /// [`Objects::alone`].
    pub(crate) async fn erase(&self, alone: &Alone, sha256: &str) -> Result<bool, ObjectError> {
        let was = self.has(sha256).await?;
        self.remove(alone, sha256).await?;
        // The store writes beside the name that a file will have, and names that after it.
        let folder = self.folder.join(&sha256[..2]);
        let half = format!("{sha256}#");
        let sha256 = sha256.to_owned();
        let done = tokio::task::spawn_blocking(move || {
            let entries = match std::fs::read_dir(&folder) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_name().to_string_lossy().starts_with(&half) {
                    std::fs::remove_file(entry.path())?;
                }
            }
            // The names are gone when this is said, whatever happens to the power.
            std::fs::File::open(&folder)?.sync_all()
        })
        .await;
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| ObjectError::Store {
            operation: "erase",
            sha256: sha256.clone(),
            error: object_store::Error::Generic {
                store: "folder",
                source,
            },
        };
        done.map_err(|error| failed(error.into()))?
            .map_err(|error| failed(error.into()))?;
        Ok(was)
    }

    /// Held from before an image is stored until the database names it.
    pub(crate) async fn shared(&self) -> Result<Shared, ObjectError> {
        let held = timeout(LIMIT, self.gate.clone().read_owned()).await;
        held.map(|held| Shared(Arc::new(held)))
            .map_err(|_| waited("store"))
    }

    /// Held from before the database is asked who names an image until it is removed.
    pub(crate) async fn alone(&self) -> Result<Alone, ObjectError> {
        let held = timeout(LIMIT, self.gate.clone().write_owned()).await;
        held.map(|held| Alone(Arc::new(held)))
            .map_err(|_| waited("remove"))
    }

    /// [`inspect`] on a thread where nobody waits, a few at a time.
    pub(crate) async fn inspect(
        &self,
        bytes: Bytes,
        wanted: Option<String>,
    ) -> Result<Inspected, NotAnImage> {
        let place = self.decoding.clone().acquire_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _place = place;
            inspect(&bytes, wanted.as_deref())
        });
        done.await
            .unwrap_or_else(|error| Err(NotAnImage::Content(error.to_string())))
    }
}

/// The folder of `file:///folder`.
pub(crate) fn folder_of(url: &str) -> Result<std::path::PathBuf, String> {
    match url.strip_prefix("file://") {
        Some(path) if path.starts_with('/') => Ok(path.into()),
        _ => Err("is an address like \"file:///var/lib/lacewing/objects\"; other stores are not built in".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn by_digest_and_never_anything_else() {
        let dir = tempfile::tempdir().unwrap();
        let objects = Objects::open(None, dir.path()).unwrap();
        let bytes = Bytes::from_static(b"hello");
        let sha256 = digest(&bytes);
        assert!(!objects.has(&sha256).await.unwrap());
        let shared = objects.shared().await.unwrap();
        objects.put(&shared, &sha256, bytes.clone()).await.unwrap();
        drop(shared);
        assert!(objects.has(&sha256).await.unwrap());
        assert_eq!(objects.read(&sha256).await.unwrap(), bytes);
        for bad in ["../../etc/passwd", "", "AB", &"g".repeat(64)] {
            let error = objects.read(bad).await.unwrap_err();
            assert!(matches!(error, ObjectError::Digest(_)), "{error}");
        }
        let file = dir.path().join("objects").join(&sha256[..2]).join(&sha256);
        std::fs::write(file, b"hallo").unwrap();
        let error = objects.read(&sha256).await.unwrap_err();
        assert!(matches!(error, ObjectError::Damaged(_)), "{error}");
        let alone = objects.alone().await.unwrap();
        objects.remove(&alone, &sha256).await.unwrap();
        objects.remove(&alone, &sha256).await.unwrap();
        let error = objects.read(&sha256).await.unwrap_err();
        assert!(matches!(error, ObjectError::Missing(_)), "{error}");
        assert!(Objects::open(Some("s3://bucket"), dir.path()).is_err());
    }

    #[test]
    fn what_is_no_image() {
        let svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>";
        let svg = Bytes::from_static(svg);
        assert_eq!(inspect(&svg, None), Err(NotAnImage::Format));
        assert_eq!(inspect(&Bytes::new(), None), Err(NotAnImage::Format));
        let wrong = inspect(&svg, Some("00")).unwrap_err();
        assert!(matches!(wrong, NotAnImage::Digest { .. }));
        // A PNG header of 60,000 × 60,000 pixels.
        let mut bomb =
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xea\x60\0\0\xea\x60\x08\x02\0\0\0".to_vec();
        bomb.extend([0; 64]);
        let error = inspect(&bomb.into(), None).unwrap_err().to_string();
        assert!(error.contains("60000×60000"), "{error}");
    }
}

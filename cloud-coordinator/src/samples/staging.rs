//! Images that are still on their way: one file each, which survives a restart.
//!
//! What an upload will need is set aside when it begins, so that uploads that have begun can always end.

use std::{
    collections::HashMap,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::OwnedMutexGuard, time::Instant};

/// An upload that nobody went on with for this long is removed; the device begins it again.
const ORPHAN: Duration = Duration::from_secs(24 * 3_600);

/// Where there is no room for another upload, one that nobody went on with for this long gives way: an honest device goes on
/// within seconds, or begins again when it is back.
const GIVES_WAY: Duration = Duration::from_secs(60);
/// One device may set aside one of so many parts of the room, but always enough for one image.
const SHARE: u64 = 8;

/// Why a piece was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StagingError {
    #[error("the piece does not begin where the upload stands")]
    Offset(u64),
    #[error("too many images are on their way")]
    Full,
    #[error("too many images of this device are on their way; it has to end some first")]
    Share,
    #[error("cannot {operation} the upload {path}: {error}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        error: io::Error,
    },
}

fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StagingError {
    let path = path.to_owned();
    move |error| StagingError::Io {
        operation,
        path,
        error,
    }
}

#[derive(Debug)]
struct Part {
    /// Bytes that the whole image has.
    reserved: u64,
    /// Whose it is; nobody's after a restart, until somebody goes on with it.
    owner: String,
    touched: Instant,
    /// Held by the one request that works on the file.
    lock: Arc<tokio::sync::Mutex<()>>,
}

/// The folder of the unfinished images.
#[derive(Debug)]
pub(crate) struct Staging {
    folder: PathBuf,
    most: u64,
    parts: Mutex<HashMap<i64, Part>>,
}

impl Staging {
    /// Opens or makes the folder for at most `most` bytes. `total` says how long the image of a sample is,
    /// if one is still awaited; files of others are removed.
    pub(crate) fn open(
        folder: &Path,
        most: u64,
        total: &HashMap<i64, u64>,
    ) -> Result<Self, StagingError> {
        std::fs::create_dir_all(folder).map_err(io("make the folder of", folder))?;
        let mut parts = HashMap::new();
        let now = Instant::now();
        for entry in std::fs::read_dir(folder).map_err(io("look for", folder))? {
            let path = entry.map_err(io("look for", folder))?.path();
            let name = path.file_name().and_then(|n| n.to_str());
            let id = name
                .and_then(|n| n.strip_suffix(".part"))
                .and_then(|n| n.parse::<i64>().ok());
            match id.and_then(|id| total.get(&id).map(|bytes| (id, *bytes))) {
                Some((id, reserved)) => {
                    let lock = Arc::default();
                    let part = Part {
                        reserved,
                        owner: String::new(),
                        touched: now,
                        lock,
                    };
                    parts.insert(id, part);
                }
                None => std::fs::remove_file(&path).map_err(io("remove", &path))?,
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            most,
            parts: Mutex::new(parts),
        })
    }

    fn path(&self, id: i64) -> PathBuf {
        self.folder.join(format!("{id}.part"))
    }

    /// The right of `owner` to work on the image of a sample, which has `total` bytes.
    pub(crate) async fn lock(
        &self,
        id: i64,
        total: u64,
        owner: &str,
    ) -> Result<OwnedMutexGuard<()>, StagingError> {
        let (lock, gone) = self.enter(id, total, owner, Instant::now())?;
        for path in gone {
            tokio::fs::remove_file(&path)
                .await
                .or_else(|error| match error.kind() {
                    io::ErrorKind::NotFound => Ok(()),
                    _ => Err(io("remove", &path)(error)),
                })?;
        }
        Ok(lock.lock_owned().await)
    }

    /// Sets room aside, and says whose files have to go for it.
    fn enter(
        &self,
        id: i64,
        total: u64,
        owner: &str,
        now: Instant,
    ) -> Result<(Arc<tokio::sync::Mutex<()>>, Vec<PathBuf>), StagingError> {
        let mut parts = self.parts.lock().unwrap_or_else(|e| e.into_inner());
        let mut gone = Vec::new();
        if !parts.contains_key(&id) {
            let sum = |of: &dyn Fn(&Part) -> bool| -> u64 {
                let all = parts.values().filter(|p| of(p));
                all.map(|p| p.reserved).sum()
            };
            let share = (self.most / SHARE).max(mesh_core::MAX_SAMPLE_IMAGE_BYTES);
            let own = sum(&|p| p.owner == owner);
            if total > 0 && own > 0 && own.saturating_add(total) > share {
                return Err(StagingError::Share);
            }
            let mut used = sum(&|_| true);
            let idle = |p: &Part| {
                Arc::strong_count(&p.lock) == 1
                    && now.saturating_duration_since(p.touched) >= GIVES_WAY
            };
            let mut old: Vec<(Instant, i64)> = parts
                .iter()
                .filter(|(_, p)| idle(p))
                .map(|(id, p)| (p.touched, *id))
                .collect();
            old.sort_unstable();
            let mut old = old.into_iter();
            let mut leave = Vec::new();
            while used.saturating_add(total) > self.most {
                let Some((_, oldest)) = old.next() else {
                    return Err(StagingError::Full);
                };
                used -= parts.get(&oldest).map_or(0, |p| p.reserved);
                leave.push(oldest);
            }
            for id in leave {
                parts.remove(&id);
                gone.push(self.path(id));
            }
        }
        let part = parts.entry(id).or_insert_with(|| Part {
            reserved: total,
            owner: String::new(),
            touched: now,
            lock: Arc::default(),
        });
        (part.touched, part.owner) = (now, owner.to_owned());
        Ok((part.lock.clone(), gone))
    }

    /// How many bytes of an image are here.
    pub(crate) async fn offset(&self, id: i64) -> Result<u64, StagingError> {
        let path = self.path(id);
        match tokio::fs::metadata(&path).await {
            Ok(found) => Ok(found.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(io("look at", &path)(error)),
        }
    }

    /// Adds a piece, which is on the disk when this returns. Hold the lock. Says how many bytes are here.
    pub(crate) async fn append(
        &self,
        id: i64,
        offset: u64,
        piece: Bytes,
    ) -> Result<u64, StagingError> {
        let here = self.offset(id).await?;
        if here != offset {
            return Err(StagingError::Offset(here));
        }
        if piece.is_empty() {
            return Ok(here);
        }
        let path = self.path(id);
        let written = piece.len() as u64;
        let task = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || append(&path, offset, &piece))
        };
        let done = task.await.unwrap_or_else(|e| Err(io::Error::other(e)));
        done.map_err(io("write", &path))?;
        Ok(here + written)
    }

    /// All bytes of an image. Hold the lock.
    pub(crate) async fn read(&self, id: i64) -> Result<Bytes, StagingError> {
        let path = self.path(id);
        let bytes = tokio::fs::read(&path).await.map_err(io("read", &path))?;
        Ok(bytes.into())
    }

    /// Forgets an upload.
    pub(crate) async fn remove(&self, id: i64) -> Result<(), StagingError> {
        let path = self.path(id);
        match tokio::fs::remove_file(&path).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io("remove", &path)(error));
            }
            _ => {}
        }
        let mut parts = self.parts.lock().unwrap_or_else(|e| e.into_inner());
        parts.remove(&id);
        Ok(())
    }

    /// Removes the uploads that nobody goes on with; says how many.
    pub(crate) async fn remove_orphans(&self, now: Instant) -> Result<usize, StagingError> {
        let orphans: Vec<i64> = {
            let parts = self.parts.lock().unwrap_or_else(|e| e.into_inner());
            let old = |p: &Part| now.saturating_duration_since(p.touched) >= ORPHAN;
            // One that somebody works on right now has a lock that others know too.
            let idle = |p: &Part| Arc::strong_count(&p.lock) == 1;
            parts
                .iter()
                .filter(|(_, p)| old(p) && idle(p))
                .map(|(id, _)| *id)
                .collect()
        };
        for id in &orphans {
            self.remove(*id).await?;
        }
        Ok(orphans.len())
    }
}

/// A piece that was only written in part is cut off again: the length of the file is what a device is told.
fn append(path: &Path, offset: u64, piece: &[u8]) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)?;
    let done = file.write_all(piece).and_then(|()| file.sync_data());
    if done.is_err() {
        file.set_len(offset)?;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn set_aside_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::open(dir.path(), 100, &HashMap::new()).unwrap();
        let one = staging.lock(1, 60, "d1").await.unwrap();
        assert!(matches!(
            staging.lock(2, 60, "d2").await,
            Err(StagingError::Full)
        ));
        assert_eq!(
            staging
                .append(1, 0, Bytes::from_static(b"abc"))
                .await
                .unwrap(),
            3
        );
        let wrong = staging.append(1, 0, Bytes::from_static(b"abc")).await;
        assert!(matches!(wrong, Err(StagingError::Offset(3))));
        drop(one);
        let late = Instant::now() + ORPHAN;
        assert_eq!(staging.remove_orphans(Instant::now()).await.unwrap(), 0);
        assert_eq!(staging.remove_orphans(late).await.unwrap(), 1);
        assert_eq!(staging.offset(1).await.unwrap(), 0);
        drop(staging.lock(2, 60, "d2").await.unwrap());
    }

    /// A thousand uploads that stop half-way: their device gets its share and no more, and what it leaves lying gives way.
    #[tokio::test(start_paused = true)]
    async fn a_thousand_that_stop_half_way() {
        const MIB: u64 = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::open(dir.path(), 128 * MIB, &HashMap::new()).unwrap();
        let half = Bytes::from(vec![7; 1_024]);
        let mut begun = 0;
        for id in 0..1_000 {
            match staging.lock(id, 2 * MIB, "thief").await {
                Ok(_held) => {
                    staging.append(id, 0, half.clone()).await.unwrap();
                    begun += 1;
                }
                Err(error) => assert!(matches!(error, StagingError::Share), "{error}"),
            }
        }
        assert_eq!(begun, 8, "an eighth of the room");
        // Others fill what is left, and stop, too.
        for id in 1_000..2_000 {
            let owner = format!("d{}", id % 40);
            if staging.lock(id, 2 * MIB, &owner).await.is_ok() {
                staging.append(id, 0, half.clone()).await.unwrap();
            }
        }
        assert!(matches!(
            staging.lock(5_000, 2 * MIB, "honest").await,
            Err(StagingError::Full)
        ));
        tokio::time::advance(GIVES_WAY).await;
        for id in 5_000..5_008 {
            drop(staging.lock(id, 2 * MIB, "honest").await.unwrap());
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 64 - 8);
        let late = Instant::now() + ORPHAN;
        staging.remove_orphans(late).await.unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        drop(staging.lock(9_000, 128 * MIB, "big").await.unwrap());
    }

    #[tokio::test]
    async fn a_restart_finds_what_is_awaited() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["1.part", "2.part", "else"] {
            std::fs::write(dir.path().join(name), b"abc").unwrap();
        }
        let staging = Staging::open(dir.path(), 100, &HashMap::from([(1, 90)])).unwrap();
        assert_eq!(staging.offset(1).await.unwrap(), 3);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(matches!(
            staging.lock(2, 60, "d2").await,
            Err(StagingError::Full)
        ));
    }
}

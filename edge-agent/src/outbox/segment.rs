//! One segment: a sled database in a directory of its own.
//!
//! Everything that sled may do to us stops here: its panics on damaged files become
//! [`StoreError::Damaged`], its flush, which is no fsync, is followed by one, and space is taken before it
//! writes.

use std::{
    fs::File,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_core::RangeSet;

use super::{
    block::{self, Assembler, Block, Key},
    disk::{self, Disk, Tail},
};
use crate::seal::Seal;

/// sled's own unit of writing. A quarter of it bounds a page (see [`block::PART_BYTES`]); small, so that an
/// outbox lives on a disk of 16 MiB.
pub(super) const SLED_SEGMENT: usize = 256 * 1024;
const UNIT: u64 = SLED_SEGMENT as u64;

/// How much sled writes for a group of `payload` bytes, at most: the log entry, a page rewritten every ten
/// entries and both halves of a split, measured below 5 ×; and two units where the writing position moves on.
pub(super) const fn footprint(payload: u64) -> u64 {
    payload * 5 + 2 * UNIT
}

/// What a segment takes beside its data, at most: a snapshot of sled's page table, written when it is opened
/// (some 20 bytes for each of some 3,000 values), and a file with sled's settings.
const EXTRAS: u64 = 64 * 1024;

/// What a full segment grows by while it is open for reading: sled fills its last unit.
pub(super) const READING: u64 = UNIT + EXTRAS;

/// The key of the header: no reading has the number 0.
const HEADER: Key = [0; 9];
const VERSION: u8 = 3;

/// What sled calls a snapshot of its page table that it is still writing. Where it was killed in the middle, it would take the
/// half for the newest whole one when it opens, and refuse to.
const HALF_SNAPSHOT: &str = ".generating";

/// The threads of sled let go of a closed database's lock a moment later: 100 × 20 ms is far more than that.
pub(super) const LOCK_TRIES: u32 = 100;
pub(super) const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Why a segment could not be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error("no space left")]
    NoSpace,
    #[error("damaged: {0}")]
    Damaged(String),
    #[error(transparent)]
    Io(io::Error),
}

impl From<sled::Error> for StoreError {
    fn from(error: sled::Error) -> Self {
        match error {
            sled::Error::Io(error) => error.into(),
            // The only bug report that is about the process and not about the file.
            sled::Error::ReportableBug(what) if what.contains("IO thread") => {
                Self::Io(io::Error::other(what))
            }
            other => Self::Damaged(other.to_string()),
        }
    }
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        /// The error of a sector that cannot be read (errno(3)).
        const EIO: i32 = 5;
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::InvalidData
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::IsADirectory
            | io::ErrorKind::NotFound => Self::Damaged(error.to_string()),
            _ if error.raw_os_error() == Some(EIO) => Self::Damaged(error.to_string()),
            _ => Self::Io(error),
        }
    }
}

/// What an opened segment was found to hold.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// The readings.
    pub(super) readings: RangeSet,
    /// The newest cursor.
    pub(super) cursor: Vec<u8>,
}

/// What every segment of an outbox is opened with.
#[derive(Clone, Debug)]
pub(super) struct Means {
    /// The memory for its cache.
    pub(super) cache_bytes: u64,
    pub(super) seal: Seal,
}

/// A cursor names files: it is sealed as readings are.
fn cursor_of(first: u64) -> String {
    format!("outbox cursor {first}")
}

fn sealed_cursor(seal: &Seal, first: u64, cursor: &[u8]) -> Result<Vec<u8>, StoreError> {
    let sealed = seal.wrap(&cursor_of(first), cursor.to_vec());
    sealed.map_err(|error| StoreError::Io(io::Error::other(error)))
}

/// An open segment.
pub(super) struct Store {
    /// `None` only while it is dropped.
    db: Option<sled::Db>,
    file: File,
    path: PathBuf,
    tail: Tail,
    seal: Seal,
    /// Nothing will be appended any more.
    full: bool,
}

impl Store {
    /// Makes a segment in `path`. When this returns it is durable; its parent's entry is not.
    pub(super) fn create(
        disk: &Disk,
        path: &Path,
        (epoch, first, cursor): (u64, u64, &[u8]),
        means: &Means,
    ) -> Result<Self, StoreError> {
        let store = guarded(|| Self::start(path, means))?;
        disk::lengthen(&store.file, 0, UNIT, 0)?;
        let mut header = vec![VERSION];
        header.extend_from_slice(&epoch.to_be_bytes());
        header.extend_from_slice(&first.to_be_bytes());
        header.extend_from_slice(&sealed_cursor(&means.seal, first, cursor)?);
        guarded(|| {
            let db = store.db()?;
            db.insert(HEADER, header)?;
            db.flush()?;
            Ok(())
        })?;
        disk.sync_tree(path)?;
        Ok(store)
    }

    /// Opens a full segment, for reading only, and reads all of it.
    pub(super) fn open_full(
        disk: &Disk,
        path: &Path,
        identity: (u64, u64),
        means: &Means,
    ) -> Result<(Self, Contents), StoreError> {
        let (mut store, contents) = Self::open(disk, path, identity, means)?;
        store.full = true;
        Ok((store, contents))
    }

    /// Opens a segment and reads all of it.
    pub(super) fn open(
        disk: &Disk,
        path: &Path,
        (epoch, first): (u64, u64),
        means: &Means,
    ) -> Result<(Self, Contents), StoreError> {
        if !path.join("db").is_file() {
            return Err(StoreError::Damaged("it has no data file".into()));
        }
        let store = guarded(|| Self::start(path, means))?;
        let contents = guarded(|| store.contents(epoch, first))?;
        // Opening repairs and writes a snapshot; what is appended stands on both.
        disk.sync_tree(path)?;
        Ok((store, contents))
    }

    fn start(path: &Path, means: &Means) -> Result<Self, StoreError> {
        forget_half_snapshots(path)?;
        let config = sled::Config::new()
            .path(path)
            .cache_capacity(means.cache_bytes)
            .segment_size(SLED_SEGMENT)
            .use_compression(false)
            .flush_every_ms(None);
        let mut tries = 0;
        let db = loop {
            match config.open() {
                Err(sled::Error::Io(error))
                    if tries < LOCK_TRIES && error.to_string().contains("acquire lock") =>
                {
                    tries += 1;
                    std::thread::park_timeout(LOCK_PAUSE);
                }
                result => break result?,
            }
        };
        let file = File::options()
            .read(true)
            .write(true)
            .open(path.join("db"))?;
        Ok(Self {
            db: Some(db),
            tail: Tail::find(&file, UNIT)?,
            file,
            path: path.to_path_buf(),
            seal: means.seal.clone(),
            full: false,
        })
    }

    fn db(&self) -> Result<&sled::Db, StoreError> {
        self.db
            .as_ref()
            .ok_or_else(|| StoreError::Io(io::Error::other("the segment is closed")))
    }

    fn contents(&self, epoch: u64, first: u64) -> Result<Contents, StoreError> {
        let damaged = |what: &str| StoreError::Damaged(what.into());
        let mut items = self.db()?.iter();
        let (key, header) = items.next().ok_or_else(|| damaged("it is empty"))??;
        let cursor = header
            .get(17..)
            .filter(|_| {
                key == HEADER[..]
                    && header[0] == VERSION
                    && header[1..9] == epoch.to_be_bytes()
                    && header[9..17] == first.to_be_bytes()
            })
            .ok_or_else(|| damaged("its header is not this outbox's"))?;
        let mut contents = Contents {
            readings: RangeSet::new(),
            cursor: self
                .seal
                .unwrap(&cursor_of(first), cursor.to_vec())
                .ok_or_else(|| damaged("its cursor cannot be decrypted"))?,
        };
        let mut assembler = Assembler::new(&self.seal);
        for item in items {
            let (key, value) = item?;
            if let Some(block) = assembler.push(&key, &value) {
                contents.readings.insert(block.first, block.last());
                contents.cursor = block.cursor;
            }
        }
        Ok(contents)
    }

    /// Appends the values of one group, taking `ahead` bytes more of the disk than they need when it takes
    /// any. When this returns they survive a power cut.
    ///
    /// They are no sled batch, which would cost a write and a wait of its own: the group is atomic by its
    /// form (see [`block`]).
    pub(super) fn append(
        &mut self,
        disk: &Disk,
        values: &[(Key, Vec<u8>)],
        ahead: u64,
    ) -> Result<(), StoreError> {
        let payload: u64 = values.iter().map(|(_, value)| value.len() as u64).sum();
        disk::lengthen(
            &self.file,
            self.tail.units(),
            footprint(payload) - UNIT,
            ahead,
        )?;
        guarded(|| {
            let db = self.db()?;
            for (key, value) in values {
                db.insert(key, value.as_slice())?;
            }
            db.flush()?;
            Ok(())
        })?;
        disk.sync_data(&self.file, &self.path.join("db"))?;
        Ok(self.tail.advance(&self.file)?)
    }

    /// Takes out every reading above `last`: a group whose append failed half-way.
    pub(super) fn cut(&self, disk: &Disk, last: u64) -> Result<(), StoreError> {
        guarded(|| {
            let db = self.db()?;
            let mut batch = sled::Batch::default();
            for key in db.range(block::key(last + 1, 0)..).keys() {
                batch.remove(key?);
            }
            db.apply_batch(batch)?;
            db.flush()?;
            Ok(())
        })?;
        Ok(disk.sync_data(&self.file, &self.path.join("db"))?)
    }

    /// The readings of `from..=to` that are there, up to `budget` bytes but at least one.
    pub(super) fn read(
        &self,
        from: u64,
        to: u64,
        budget: usize,
    ) -> Result<Vec<(u64, Vec<u8>)>, StoreError> {
        guarded(|| {
            let db = self.db()?;
            let start = match db
                .range(..=block::key(from, u8::MAX))
                .next_back()
                .transpose()?
            {
                Some((key, _)) => block::parse_key(&key).map_or(from, |(first, _)| first),
                None => from,
            };
            let mut taken: Vec<(u64, Vec<u8>)> = Vec::new();
            let mut size = 0;
            let mut assembler = Assembler::new(&self.seal);
            for item in db.range(block::key(start.max(1), 0)..=block::key(to, u8::MAX)) {
                let (key, value) = item?;
                let Some(Block {
                    first, readings, ..
                }) = assembler.push(&key, &value)
                else {
                    continue;
                };
                for (seq, bytes) in (first..).zip(readings) {
                    if seq < from || seq > to {
                        continue;
                    }
                    size += bytes.len();
                    if size > budget && !taken.is_empty() {
                        return Ok(taken);
                    }
                    taken.push((seq, bytes));
                }
            }
            Ok(taken)
        })
    }

    /// The directory has another name now. sled needs its path only while it opens.
    pub(super) fn moved(&mut self, path: PathBuf) {
        self.path = path;
    }

    /// Nothing will be appended any more: closing it gives back what was taken for that.
    pub(super) fn full(&mut self) {
        self.full = true;
    }

    /// The bytes that sled has written, without what is taken ahead.
    pub(super) fn length(&self) -> u64 {
        self.tail.data()
    }

    /// The bytes that it takes on the disk.
    pub(super) fn bytes(&self) -> u64 {
        disk::file_usage(&self.file).unwrap_or_default() + EXTRAS
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let db = self.db.take();
        // sled panics where it cannot sync while it closes; whatever had to be durable is.
        if catch_unwind(AssertUnwindSafe(|| drop(db))).is_err() {
            tracing::warn!(segment = %self.path.display(), "the segment did not close cleanly");
        } else if self.full {
            disk::release(&self.file, UNIT);
        }
    }
}

/// The snapshot before is still there: sled removes it when the next one is whole.
fn forget_half_snapshots(path: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().ends_with(HALF_SNAPSHOT) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// sled panics on much of what it finds in damaged files.
fn guarded<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("a panic without words");
        Err(StoreError::Damaged(what.to_string()))
    })
}

//! Samples on the disk, until the coordinator has them.
//!
//! A sample is `<epoch>-<seq>.json`, and `<epoch>-<seq>.jpg` where it has an image. The image is written first: a
//! sample whose JSON is there is whole. The JSON is what travels, byte by byte.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::seal::{OVERHEAD, Seal, SealError};
use mesh_core::{Gone, MAX_SAMPLE_BYTES, Sample, SampleImage, SampleReason};

/// Files on small boards' cards take room in these.
const BLOCK: u64 = 4_096;
/// Each takes some hundred bytes of memory, and two entries of a folder that is listed at the start.
const MAX_SAMPLES: usize = 20_000;

/// The identity of a sample on this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) epoch: u64,
    pub(super) seq: u64,
}

/// What the shelf knows of a sample without reading it.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) key: Key,
    pub(super) reason: SampleReason,
    /// Rises with each sample that is put in: also tells a sample from the one that it replaced.
    pub(super) age: u64,
    pub(super) image: Option<SampleImage>,
    ts: i64,
    bytes: u64,
}

/// Why the shelf cannot do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum ShelfError {
    /// The disk.
    #[error("samples: {doing} {path}: {error}")]
    Disk {
        doing: &'static str,
        path: PathBuf,
        error: io::Error,
    },
    /// It would not be taken anywhere.
    #[error("samples: {0}")]
    Sample(#[from] mesh_core::EventError),
    /// It does not become JSON.
    #[error("samples: encoding a sample: {0}")]
    Json(#[from] serde_json::Error),
    /// It could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The coordinator wants it nowhere.
    #[error("samples: it was erased before it was written")]
    Erased,
    /// Everything on the shelf matters more.
    #[error("samples: no room for {0} bytes among samples that matter more")]
    Full(u64),
}

fn disk<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ShelfError + 'a {
    move |error| ShelfError::Disk {
        doing,
        path: path.to_owned(),
        error,
    }
}

/// The folder of samples.
#[derive(Debug)]
pub(super) struct Shelf {
    root: PathBuf,
    seal: Seal,
    max_bytes: u64,
    items: BTreeMap<Key, Item>,
    bytes: u64,
    next_age: u64,
    evicted: u64,
    /// What is not to come any more, though it may be on its way: see [`Shelf::erase`].
    gone: Vec<Gone>,
}

/// What matters least goes first.
const fn rank(reason: SampleReason) -> u8 {
    match reason {
        SampleReason::Random | SampleReason::Uncertain => 0,
        SampleReason::Novel | SampleReason::Disputed => 1,
        SampleReason::Wrong | SampleReason::Missed => 2,
    }
}

fn room(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK) * BLOCK
}

impl Shelf {
    /// Opens the folder: takes stock of what is whole, removes what is not. Samples of `epoch`, the outbox's life
    /// of today, are the youngest. Says how many samples were damaged.
    pub(super) fn open(
        root: PathBuf,
        max_bytes: u64,
        epoch: u64,
        seal: Seal,
    ) -> Result<(Self, u64), ShelfError> {
        fs::create_dir_all(&root).map_err(disk("making", &root))?;
        let mut shelf = Self {
            root,
            seal,
            max_bytes,
            items: BTreeMap::new(),
            bytes: 0,
            next_age: 0,
            evicted: 0,
            gone: Vec::new(),
        };
        let (mut notes, mut others) = (Vec::new(), Vec::new());
        let list = fs::read_dir(&shelf.root).map_err(disk("listing", &shelf.root))?;
        for entry in list {
            let path = entry.map_err(disk("listing", &shelf.root))?.path();
            match key_of(&path) {
                Some((key, "json")) => notes.push(key),
                Some((key, "jpg")) => others.push((Some(key), path)),
                // Half-written, or not ours: only what we write is removed.
                _ if path.extension().is_some_and(|e| e == "tmp") => others.push((None, path)),
                _ => {}
            }
        }
        notes.sort_unstable_by_key(|key| (key.epoch == epoch, *key));
        let mut damaged = 0;
        for key in notes {
            match shelf.take_stock(key) {
                Some(item) => shelf.put(item),
                None => {
                    damaged += 1;
                    shelf.delete(key);
                }
            }
        }
        for (key, path) in others {
            let known = key.and_then(|key| shelf.items.get(&key));
            if known.is_none_or(|item| item.image.is_none()) {
                let _ = fs::remove_file(path);
            }
        }
        // The bound may have been lowered.
        shelf.make_room(0, u8::MAX);
        Ok((shelf, damaged))
    }

    fn take_stock(&self, key: Key) -> Option<Item> {
        let bytes = self.json(key).ok()?;
        let sample = Sample::decode(&bytes).ok()?;
        let whole = match &sample.image {
            Some(image) => {
                let length = fs::metadata(self.path(key, "jpg")).ok()?.len();
                // What was written before there was a key is not sealed.
                length == image.bytes
                    || self.seal.is_on() && length == image.bytes + OVERHEAD as u64
            }
            None => true,
        };
        let is_it = (sample.epoch, sample.seq) == (key.epoch, key.seq);
        (whole && is_it).then(|| item(key, &sample, bytes.len() as u64))
    }

    fn put(&mut self, mut item: Item) {
        item.age = self.next_age;
        self.next_age += 1;
        self.bytes += item.bytes;
        if let Some(old) = self.items.insert(item.key, item) {
            self.bytes -= old.bytes;
        }
    }

    /// Keeps a sample; when this returns it survives a power cut. One with the same identity is replaced.
    pub(super) fn add(&mut self, sample: &Sample, image: Option<&[u8]>) -> Result<u64, ShelfError> {
        sample.check()?;
        let json = serde_json::to_vec(sample)?;
        if json.len() > MAX_SAMPLE_BYTES {
            return Err(mesh_core::EventError::TooLarge {
                size: json.len(),
                most: MAX_SAMPLE_BYTES,
            }
            .into());
        }
        let key = Key {
            epoch: sample.epoch,
            seq: sample.seq,
        };
        let is_gone = |gone: &Gone| gone.has(sample.epoch, sample.seq, sample.ts);
        if self.gone.iter().any(is_gone) {
            return Err(ShelfError::Erased);
        }
        let item = item(key, sample, json.len() as u64);
        let bytes = item.bytes;
        if !self.make_room(bytes, rank(sample.reason)) {
            return Err(ShelfError::Full(bytes));
        }
        if let Some(image) = image {
            self.write(key, "jpg", image.to_vec())?;
        }
        self.write(key, "json", json)?;
        File::open(&self.root)
            .and_then(|folder| folder.sync_all())
            .map_err(disk("syncing", &self.root))?;
        self.put(item);
        Ok(bytes)
    }

    fn write(&self, key: Key, kind: &str, bytes: Vec<u8>) -> Result<(), ShelfError> {
        let path = self.path(key, kind);
        let bytes = self.seal.wrap(&what(key, kind), bytes)?;
        let new = self.path(key, "tmp");
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
        let done = written.and_then(|()| fs::rename(&new, &path));
        done.map_err(|error| {
            let _ = fs::remove_file(&new);
            disk("writing", &path)(error)
        })
    }

    /// Drops what matters no more than `rank`, the least and oldest first, until `bytes` more fit; drops nothing
    /// if they would not.
    fn make_room(&mut self, bytes: u64, most: u8) -> bool {
        let fits =
            |taken: u64, count: usize| taken + bytes <= self.max_bytes && count < MAX_SAMPLES;
        if fits(self.bytes, self.items.len()) {
            return true;
        }
        let mut least: Vec<&Item> = self
            .items
            .values()
            .filter(|i| rank(i.reason) <= most)
            .collect();
        least.sort_unstable_by_key(|item| (rank(item.reason), item.age));
        let (mut taken, mut gone) = (self.bytes, Vec::new());
        for item in least {
            if fits(taken, self.items.len() - gone.len()) {
                break;
            }
            taken -= item.bytes;
            gone.push(item.key);
        }
        if !fits(taken, self.items.len() - gone.len()) {
            return false;
        }
        for key in gone {
            self.evicted += 1;
            self.forget(key);
        }
        true
    }

    fn forget(&mut self, key: Key) {
        if let Some(item) = self.items.remove(&key) {
            self.bytes -= item.bytes;
        }
        self.delete(key);
    }

    fn delete(&self, key: Key) {
        // The JSON first: an image alone is nothing. One that comes back after a power cut is sent once more.
        for kind in ["json", "jpg"] {
            let path = self.path(key, kind);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "a sample cannot be removed");
                }
                _ => {}
            }
        }
    }

    /// The coordinator has it, or will never take it. One that was replaced in the meantime stays.
    pub(super) fn done(&mut self, item: &Item) {
        if self
            .items
            .get(&item.key)
            .is_some_and(|now| now.age == item.age)
        {
            self.forget(item.key);
        }
    }

    /// Removes samples for good: when this returns no file of them is there, also after a power cut. What is on its way
    /// to the shelf and is named by its reading or its time does not come any more, as long as this runs.
    pub(super) fn erase(&mut self, gone: &[Gone]) -> Result<usize, ShelfError> {
        self.gone = gone.iter().filter(|g| **g != Gone::All).copied().collect();
        let keys: Vec<Key> = self
            .items
            .values()
            .filter(|i| gone.iter().any(|g| g.has(i.key.epoch, i.key.seq, i.ts)))
            .map(|item| item.key)
            .collect();
        for key in &keys {
            for kind in ["json", "jpg", "tmp"] {
                let path = self.path(*key, kind);
                match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(disk("erasing", &path)(error));
                    }
                    _ => {}
                }
            }
            self.forget(*key);
        }
        File::open(&self.root)
            .and_then(|folder| folder.sync_all())
            .map_err(disk("syncing", &self.root))?;
        Ok(keys.len())
    }

    /// What to send next, apart from those in `tried`: what people marked, the newest first; then the oldest.
    pub(super) fn next(&self, tried: &BTreeSet<Key>) -> Option<Item> {
        let open = || self.items.values().filter(|i| !tried.contains(&i.key));
        open()
            .filter(|item| rank(item.reason) == 2)
            .max_by_key(|item| item.age)
            .or_else(|| open().min_by_key(|item| item.age))
            .cloned()
    }

    /// What travels.
    pub(super) fn json(&self, key: Key) -> io::Result<Vec<u8>> {
        let path = self.path(key, "json");
        if fs::metadata(&path)?.len() > (MAX_SAMPLE_BYTES + OVERHEAD) as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.opened(key, "json", fs::read(path)?)
    }

    /// The image of a sample: as long as its sample says.
    pub(super) fn image(&self, key: Key) -> io::Result<Vec<u8>> {
        self.opened(key, "jpg", fs::read(self.path(key, "jpg"))?)
    }

    fn opened(&self, key: Key, kind: &str, bytes: Vec<u8>) -> io::Result<Vec<u8>> {
        let opened = self.seal.unwrap(&what(key, kind), bytes);
        opened.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn path(&self, key: Key, kind: &str) -> PathBuf {
        self.root.join(format!("{}-{}.{kind}", key.epoch, key.seq))
    }

    /// How many samples there are.
    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    /// What they take on disk.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many were dropped to make room, since it was opened.
    pub(super) const fn evicted(&self) -> u64 {
        self.evicted
    }
}

fn item(key: Key, sample: &Sample, json: u64) -> Item {
    Item {
        key,
        reason: sample.reason,
        age: 0,
        ts: sample.ts,
        bytes: room(json) + sample.image.as_ref().map_or(0, |image| room(image.bytes)),
        image: sample.image.clone(),
    }
}

/// What a file is, so that it cannot be taken for another one.
fn what(key: Key, kind: &str) -> String {
    format!("sample {}-{}.{kind}", key.epoch, key.seq)
}

/// What a file of ours is called, and which kind it is.
fn key_of(path: &Path) -> Option<(Key, &str)> {
    let (stem, kind) = path.file_name()?.to_str()?.rsplit_once('.')?;
    let (epoch, seq) = stem.split_once('-')?;
    let key = Key {
        epoch: epoch.parse().ok()?,
        seq: seq.parse().ok()?,
    };
    (format!("{}-{}", key.epoch, key.seq) == stem).then_some((key, kind))
}

#[cfg(test)]
#[path = "shelf_tests.rs"]
pub(super) mod tests;

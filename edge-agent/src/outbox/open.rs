//! Opening: the names say what there is, only the newest segment is read.

use std::{
    collections::BTreeMap,
    fs::{File, TryLockError},
    io::{self, Read},
    path::Path,
};

use mesh_core::{GapReason, RangeSet};

use super::{
    Active, GapRecord, Kept, MIN_BYTES, Opened, Options, Outbox, OutboxError, SEGMENT_BYTES,
    SEGMENT_READINGS, Sealed,
    disk::{Disk, Mark},
    gaps::Gaps,
    io as failed,
    names::Entry,
    room::MAX_KEPT,
    segment::{Contents, LOCK_PAUSE, LOCK_TRIES, Means, SLED_SEGMENT, Store, StoreError},
};

/// The segments that a full outbox consists of at least: what one eviction costs is that part of it.
const SEGMENTS: u64 = 8;
/// Epochs are below this: JSON readers everywhere keep such integers exactly.
const EPOCH_LIMIT: u64 = 1 << 53;

pub(super) fn open(options: Options) -> Result<Opened, OutboxError> {
    if options.max_bytes < MIN_BYTES {
        return Err(OutboxError::TooSmall(options.max_bytes));
    }
    let disk = Disk::create(&options.dir, options.on_sync).map_err(failed("make its directory"))?;
    let entries = disk.entries().map_err(failed("list its directory"))?;
    let (epoch, lock) = epoch(&disk, &entries)?;
    let mark = Mark::read(&disk.join("mark")).filter(|mark| mark.epoch == epoch);
    let gaps = Gaps::load(&disk, &entries).map_err(failed("read its gaps"))?;
    let room = disk.room().map_err(failed("ask for free space"))?;
    let mut outbox = Outbox {
        segment_bytes: (options.max_bytes.min(room.total) / SEGMENTS)
            .clamp(2 * SLED_SEGMENT as u64, SEGMENT_BYTES),
        disk,
        max_bytes: options.max_bytes,
        means: Means {
            cache_bytes: options.cache_bytes,
            seal: options.seal,
        },
        epoch,
        next: 1,
        active: None,
        sealed: BTreeMap::new(),
        reader: None,
        kept: Vec::new(),
        held: RangeSet::new(),
        gaps,
        cursor: Vec::new(),
        mark: None,
        _lock: lock,
    };
    let mut warnings = Vec::new();
    let newest = outbox.adopt(&entries)?;
    outbox.find_end(newest, mark.as_ref(), &entries, &mut warnings)?;
    if let Some(mark) = &mark {
        outbox.held.remove(1, mark.stored);
    }
    outbox.sweep()?;
    outbox.start(&mut warnings)?;
    // Without its mark an outbox only resends more after a restart.
    let path = outbox.disk.join("mark");
    outbox.mark = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .ok();
    outbox.note();
    // Everything found here is in `gaps`.
    outbox.gaps.take_news();
    Ok(Opened {
        pending: outbox.held.clone(),
        gaps: outbox.gaps.all().to_vec(),
        warnings,
        cursor: Some(outbox.cursor.clone()).filter(|cursor| !cursor.is_empty()),
        outbox,
    })
}

/// Has another process the outbox in `dir` open? Only looks.
pub(super) fn is_in_use(dir: &Path) -> bool {
    let items = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let epoch = items.into_iter().find(|item| {
        let name = item.file_name();
        let entry = name.to_str().and_then(Entry::parse);
        matches!(entry, Some(Entry::Epoch(_)))
    });
    let file = epoch.and_then(|item| File::open(item.path()).ok());
    // Shared and for an instant: whoever opens it just then tries again.
    file.is_some_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Finds or draws the epoch, and locks the outbox.
fn epoch(disk: &Disk, entries: &[Entry]) -> Result<(u64, File), OutboxError> {
    let known = entries.iter().find_map(|entry| match entry {
        Entry::Epoch(epoch) => Some(*epoch),
        _ => None,
    });
    let epoch = match known {
        Some(epoch) => epoch,
        None => draw().map_err(failed("draw an epoch"))?,
    };
    let path = disk.path(Entry::Epoch(epoch));
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(failed("make its epoch"))?;
    let mut tries = 0;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            // A child that this process is just starting holds all open files for an instant.
            Err(TryLockError::WouldBlock) if tries < LOCK_TRIES => {
                tries += 1;
                std::thread::park_timeout(LOCK_PAUSE);
            }
            Err(TryLockError::WouldBlock) => return Err(OutboxError::InUse(path)),
            Err(TryLockError::Error(error)) => return Err(failed("lock its epoch")(error)),
        }
    }
    if known.is_none() {
        disk.sync().map_err(failed("make its epoch durable"))?;
    }
    Ok((epoch, file))
}

fn draw() -> io::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok((u64::from_le_bytes(bytes) % EPOCH_LIMIT).max(1))
}

impl Outbox {
    /// Takes over what the names say and finishes what was under way. Gives the newest segment, if one is
    /// open-ended.
    fn adopt(&mut self, entries: &[Entry]) -> Result<Option<u64>, OutboxError> {
        let mut newest: Option<u64> = None;
        for entry in entries {
            match *entry {
                Entry::New { .. } | Entry::Old { .. } => {
                    self.disk.remove(*entry).map_err(failed("clean up"))?;
                }
                Entry::Bad { from, to } => self.keep(from, to)?,
                Entry::Kept { from, to } => {
                    self.kept.push(Kept {
                        from,
                        to,
                        bytes: self.disk.usage(*entry),
                    });
                }
                Entry::Sealed { first, last } => {
                    self.adopt_sealed(first, last);
                }
                Entry::Active { first } => {
                    // Names are in order: an open-ended one before the newest was about to be sealed.
                    if let Some(before) = newest.replace(first) {
                        let sealed = Entry::Sealed {
                            first: before,
                            last: first - 1,
                        };
                        self.disk
                            .rename(Entry::Active { first: before }, sealed)
                            .map_err(failed("seal a segment"))?;
                        self.adopt_sealed(before, first - 1);
                    }
                }
                Entry::Epoch(_) | Entry::Gap(_) => {}
            }
        }
        while self.kept.len() > MAX_KEPT {
            self.drop_kept()?;
        }
        for gap in self.gaps.all() {
            self.held.remove(gap.from, gap.to);
        }
        Ok(newest)
    }

    fn adopt_sealed(&mut self, first: u64, last: u64) {
        let bytes = self.disk.usage(Entry::Sealed { first, last });
        self.sealed.insert(first, Sealed { last, bytes });
        self.held.insert(first, last);
    }

    /// Opens the newest segment and finds the next number and the cursor.
    fn find_end(
        &mut self,
        newest: Option<u64>,
        mark: Option<&Mark>,
        entries: &[Entry],
        warnings: &mut Vec<String>,
    ) -> Result<(), OutboxError> {
        let named = entries.iter().map(|entry| entry.end()).max().unwrap_or(0);
        let marked = mark.map_or(0, |mark| mark.last);
        if let Some(mark) = mark {
            self.cursor.clone_from(&mark.cursor);
        }
        self.next = named.max(marked) + 1;
        let Some(first) = newest else {
            let known = mark.map_or(0, |mark| mark.stored).max(named);
            if marked > known {
                let gap = GapRecord {
                    from: known + 1,
                    to: marked,
                    reason: GapReason::Corrupt,
                };
                warnings.push(format!(
                    "the outbox misses its newest segment: {} to {}",
                    gap.from, gap.to
                ));
                self.gaps
                    .record(&self.disk, gap, &self.held)
                    .map_err(failed("record a gap"))?;
            }
            return Ok(());
        };
        // All that the segment can have held, if it turns out to be damaged.
        let bound = (first + SEGMENT_READINGS - 1).max(marked);
        match self.open_newest(first) {
            Err(StoreError::Damaged(why)) => {
                warnings.push(format!("the newest segment of the outbox is damaged ({why}): readings {first} to at most {bound} are a gap"));
                self.next = bound + 1;
                let gap = GapRecord {
                    from: first,
                    to: bound,
                    reason: GapReason::Corrupt,
                };
                self.quarantine(Entry::Active { first }, Some(gap), &why)
            }
            Err(StoreError::NoSpace) => Err(OutboxError::Full),
            Err(StoreError::Io(source)) => Err(OutboxError::Io {
                what: "open a segment",
                source,
            }),
            Ok((store, contents)) => {
                let last = contents.readings.last().unwrap_or(first - 1);
                let whole = last < first || contents.readings.covers(first, last);
                if whole && last >= marked {
                    self.next = last + 1;
                    self.held.insert(first, last);
                    self.cursor = contents.cursor;
                    self.active = Some(Active {
                        first,
                        store: Some(store),
                    });
                    return Ok(());
                }
                drop(store);
                self.salvage(first, bound, &contents, marked, warnings)
            }
        }
    }

    /// Opens the newest segment, making room for it if the disk is full.
    fn open_newest(&mut self, first: u64) -> Result<(Store, Contents), StoreError> {
        let path = self.disk.path(Entry::Active { first });
        loop {
            match Store::open(&self.disk, &path, (self.epoch, first), &self.means) {
                Err(StoreError::NoSpace) => match self.evict_oldest() {
                    Ok(true) => {}
                    Ok(false) | Err(_) => return Err(StoreError::NoSpace),
                },
                result => return result,
            }
        }
    }

    /// The newest segment opens but has holes, or lacks its end: keeps what is there, as a full segment.
    fn salvage(
        &mut self,
        first: u64,
        bound: u64,
        contents: &Contents,
        marked: u64,
        warnings: &mut Vec<String>,
    ) -> Result<(), OutboxError> {
        self.next = bound + 1;
        if contents.readings.last() > Some(marked) {
            // Newer than the mark's.
            self.cursor.clone_from(&contents.cursor);
        }
        let Some(last) = contents.readings.last() else {
            warnings.push(format!("the newest segment of the outbox has lost its readings: {first} to at most {bound} are a gap"));
            let gap = GapRecord {
                from: first,
                to: bound,
                reason: GapReason::Corrupt,
            };
            return self.quarantine(
                Entry::Active { first },
                Some(gap),
                "it has lost its readings",
            );
        };
        let mut missing = RangeSet::new();
        missing.insert(first, bound);
        for (from, to) in contents.readings.iter() {
            missing.remove(from, to);
            self.held.insert(from, to);
        }
        for (from, to) in missing.iter() {
            warnings.push(format!(
                "readings {from} to {to} of the outbox are unreadable and a gap"
            ));
            let gap = GapRecord {
                from,
                to,
                reason: GapReason::Corrupt,
            };
            self.gaps
                .record(&self.disk, gap, &self.held)
                .map_err(failed("record a gap"))?;
        }
        let sealed = Entry::Sealed { first, last };
        self.disk
            .rename(Entry::Active { first }, sealed)
            .map_err(failed("seal a segment"))?;
        let bytes = self.disk.usage(sealed);
        self.sealed.insert(first, Sealed { last, bytes });
        Ok(())
    }

    /// Sees to it that there is a segment to append to. A disk that is too full for one is said, no failure.
    fn start(&mut self, warnings: &mut Vec<String>) -> Result<(), OutboxError> {
        match self.open_active() {
            Ok(()) => Ok(()),
            Err(StoreError::NoSpace) => {
                warnings
                    .push("the disk is full: the outbox starts without room for readings".into());
                Ok(())
            }
            Err(StoreError::Damaged(why)) => Err(OutboxError::Broken {
                what: "start a segment",
                why,
            }),
            Err(StoreError::Io(source)) => Err(OutboxError::Io {
                what: "start a segment",
                source,
            }),
        }
    }
}

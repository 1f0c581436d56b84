//! The outbox: every reading lies here, durable, until the coordinator says that it has it.
//!
//! # On the disk
//!
//! ```text
//! epoch-<n>               the life of this outbox, and its lock
//! mark                    a hint, never synced: how far it was (see `disk::Mark`)
//! seg-<first>             the segment that is appended to
//! seg-<first>-<last>      full segments
//! gap-<from>-<to>-<why>   an empty directory: readings that had to be dropped, the coordinator is to know
//! kept-<from>-<to>        damaged segments, for inspection
//! new-…, old-…, bad-…     on the way in, out and into quarantine
//! ```
//!
//! A segment is a sled database of its own. What must hold at every instant, whatever happens next:
//!
//! 1. A reading is *held* if its number lies in a segment and in no gap. `append` returns when its readings
//!    are held and would be after a power cut: sled's `flush` only hands the bytes to the disk's cache, so
//!    its file is synced after it, and a directory whenever an entry appears or goes.
//! 2. A group and its cursor are one block (see `block`): all of it is there or none of it counts.
//! 3. A segment appears by renaming `new-` when all of it is durable; the old one is named full after that.
//!    So there is always one whose header knows the next number and the cursor; numbers are never reused.
//! 4. Every loss is one rename: a segment *becomes* the record of its gap. That is atomic, needs no space,
//!    and comes before anything in it is deleted. The record goes only when the coordinator knows of it.
//! 5. A segment is deleted (by way of `old-`) when all of it is acknowledged. Which readings in a segment
//!    are acknowledged is not stored: they may be sent again after a restart, ingest is idempotent.
//! 6. Damage costs what cannot be read, never the rest and never the start: a segment that opens but misses
//!    readings keeps the others, one that does not open goes into quarantine, and the gap is recorded. Where
//!    the end of the newest segment is lost, its gap and the numbers skipped cover all it could have held.
//!
//! Space is bounded twice, by `max_bytes` and by the file system: the oldest segment goes before either is
//! exceeded. What sled is about to write is allocated before, because a sled whose write fails is stuck.

mod block;
mod disk;
mod gaps;
mod names;
mod open;
mod room;
mod segment;

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use mesh_core::{GapReason, MAX_EVENT_BYTES, RangeSet};

use crate::seal::{Seal, SealError};
pub use disk::SyncHook;
use disk::{Disk, Mark};
use gaps::Gaps;
use segment::{Means, Store, StoreError, footprint};

/// The smallest `max_bytes`: eight segments of two of sled's units each.
pub const MIN_BYTES: u64 = 4 * 1024 * 1024;
/// The most readings in one `append`.
pub const MAX_GROUP: usize = 1024;
/// The most encoded bytes in one `append`: with what sled adds to it, it fits the smallest outbox.
pub const MAX_GROUP_BYTES: usize = 256 * 1024;
/// The most bytes of a cursor: a few sources with a file name each. It is written with every group.
pub const MAX_CURSOR: usize = 4 * 1024;

/// The most readings in a segment: what is lost with it if it is damaged, and what is read to open it.
const SEGMENT_READINGS: u64 = 16_384;
/// The most bytes of a segment (beyond it by one group): an eighth of the room there is, up to this.
const SEGMENT_BYTES: u64 = 4 * 1024 * 1024;
/// The share of a segment that is taken from the disk at a time: each time the file's length has to become durable, too.
const AHEAD_SHARE: u64 = 4;
/// A drained outbox whose newest segment is larger than this gives that back too.
const DRAINED_BYTES: u64 = 256 * 1024;
/// What a new segment takes before the first group is in it.
const NEXT_SEGMENT: u64 = 2 * segment::SLED_SEGMENT as u64;
/// How often a group moves to a fresh segment because the one it went to is damaged, before giving up.
const DAMAGE_TRIES: usize = 3;

/// How an outbox is opened.
#[derive(Clone)]
pub struct Options {
    /// Its directory, made if there is none.
    pub dir: PathBuf,
    /// The most bytes it may take on the disk, at least [`MIN_BYTES`].
    pub max_bytes: u64,
    /// The memory for one segment's cache, in bytes; at most two are open.
    pub cache_bytes: u64,
    /// Seals what is written.
    pub seal: Seal,
    /// Told before every sync. For tests of power cuts.
    pub on_sync: Option<SyncHook>,
}

impl Options {
    /// The options for an outbox in `dir` of at most `max_bytes`.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, max_bytes: u64) -> Self {
        Self {
            dir: dir.into(),
            max_bytes,
            // A quarter of a segment: a live reading is sent from memory, a replay reads each page once.
            cache_bytes: 1024 * 1024,
            seal: Seal::none(),
            on_sync: None,
        }
    }
}

/// Readings `from..=to` that were dropped. The upper end is a bound where `reason` is `Corrupt`; readings
/// in between may have been acknowledged before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GapRecord {
    /// The first.
    pub from: u64,
    /// The last, inclusive.
    pub to: u64,
    /// Why.
    pub reason: GapReason,
}

/// What `append` did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The number of the first reading.
    pub from: u64,
    /// The number of the last reading.
    pub to: u64,
    /// What had to go for them (and any other loss found since the last call of
    /// [`Outbox::append`] or [`Outbox::take_lost`]).
    pub evicted: Vec<GapRecord>,
}

/// An open outbox and what was found in it.
pub struct Opened {
    /// The outbox.
    pub outbox: Outbox,
    /// The readings that it holds.
    pub pending: RangeSet,
    /// The gaps that the coordinator has not acknowledged.
    pub gaps: Vec<GapRecord>,
    /// What someone should know, one sentence each.
    pub warnings: Vec<String>,
    /// What was given to the last `append`, if there was one.
    pub cursor: Option<Vec<u8>>,
}

/// Why an operation failed. Nothing was changed, except that room may have been made.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// Another process has it open.
    #[error("the outbox {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The options make no sense.
    #[error("an outbox has at least {MIN_BYTES} bytes, not {0}")]
    TooSmall(u64),
    /// No room, and nothing left that could be dropped. Try again later.
    #[error("the disk is full and the outbox has nothing left to drop")]
    Full,
    /// The group is empty or too large.
    #[error(
        "a group has 1 to {MAX_GROUP} readings and at most {MAX_GROUP_BYTES} bytes, not {count} and {bytes}"
    )]
    Group {
        /// Readings in it.
        count: usize,
        /// Encoded bytes, as far as they were counted.
        bytes: usize,
    },
    /// A reading is too large.
    #[error("reading {seq} has {size} bytes, the most is {MAX_EVENT_BYTES}")]
    Reading {
        /// The number that it would have had.
        seq: u64,
        /// Its encoded size.
        size: usize,
    },
    /// The cursor is too large.
    #[error("a cursor has at most {MAX_CURSOR} bytes, not {0}")]
    Cursor(usize),
    /// The caller's `encode` failed.
    #[error("a reading could not be encoded: {0}")]
    Encode(Box<dyn std::error::Error + Send + Sync>),
    /// It could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The file system failed.
    #[error("the outbox could not {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Fresh segments are damaged as soon as they are written.
    #[error("the outbox could not {what}: {why}")]
    Broken {
        /// What was tried.
        what: &'static str,
        /// What was found.
        why: String,
    },
}

/// Names the operation of an I/O error.
fn io(what: &'static str) -> impl Fn(io::Error) -> OutboxError {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => OutboxError::Full,
        _ => OutboxError::Io { what, source },
    }
}

struct Active {
    first: u64,
    /// Closed after an error, opened again before the next use.
    store: Option<Store>,
}

struct Sealed {
    last: u64,
    bytes: u64,
}

struct Kept {
    from: u64,
    to: u64,
    bytes: u64,
}

/// A device's durable queue of encoded readings. Blocking; owned by one thread.
pub struct Outbox {
    disk: Disk,
    max_bytes: u64,
    /// A segment of this length is full.
    segment_bytes: u64,
    means: Means,
    epoch: u64,
    /// The number of the next reading.
    next: u64,
    active: Option<Active>,
    sealed: BTreeMap<u64, Sealed>,
    /// The one full segment that is open for reading.
    reader: Option<(u64, Store)>,
    kept: Vec<Kept>,
    held: RangeSet,
    gaps: Gaps,
    cursor: Vec<u8>,
    mark: Option<File>,
    /// Held as long as the outbox is open.
    _lock: File,
}

impl Outbox {
    /// Opens the outbox in `options.dir`, making it where there is none. Damage is no reason to fail.
    ///
    /// # Errors
    /// If it is open elsewhere, the options are out of range or the file system refuses.
    pub fn open(options: Options) -> Result<Opened, OutboxError> {
        open::open(options)
    }

    /// The life of this outbox: drawn at random when its directory was made, 1..2⁵³.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The number that the next reading will get, unless damage is found while it is appended.
    #[must_use]
    pub fn next_seq(&self) -> u64 {
        self.next
    }

    /// How many readings are held.
    #[must_use]
    pub fn pending(&self) -> u64 {
        self.held.len()
    }

    /// The bytes that it takes on the disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        /// What an empty directory takes on common file systems.
        const DIRECTORY: u64 = 4_096;
        let sealed: u64 = self.sealed.values().map(|segment| segment.bytes).sum();
        let kept: u64 = self.kept.iter().map(|kept| kept.bytes).sum();
        let gaps = self.gaps.all().len() as u64 * DIRECTORY;
        sealed + kept + gaps + self.active_bytes()
    }

    /// The gaps that the coordinator has not acknowledged, in order.
    #[must_use]
    pub fn gaps(&self) -> &[GapRecord] {
        self.gaps.all()
    }

    /// The losses that were found since the last call, or the last [`Outbox::append`].
    pub fn take_lost(&mut self) -> Vec<GapRecord> {
        self.gaps.take_news()
    }

    /// Appends `count` readings as one group; `encode` gives the bytes of each from its number, and may be
    /// asked again with another number. `cursor` is stored with them or not at all. When this returns, they
    /// would survive a power cut.
    ///
    /// # Errors
    /// [`OutboxError::Full`] if there is no room and nothing to drop. After any error the numbers of the
    /// group are free, and it is as if it had never been tried.
    pub fn append<E>(
        &mut self,
        count: usize,
        mut encode: impl FnMut(u64) -> Result<Vec<u8>, E>,
        cursor: &[u8],
    ) -> Result<Appended, OutboxError>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        const WHAT: &str = "append";
        if cursor.len() > MAX_CURSOR {
            return Err(OutboxError::Cursor(cursor.len()));
        }
        let mut damaged = 0;
        loop {
            let from = self.next;
            let readings = encode_group(from, count, &mut encode)?;
            let to = from + count as u64 - 1;
            let values = block::pack(&self.means.seal, from, &readings, cursor)?;
            let payload: u64 = values.iter().map(|(_, value)| value.len() as u64).sum();
            let ahead = self.segment_bytes / AHEAD_SHARE;
            self.make_room(footprint(payload) + ahead + NEXT_SEGMENT + segment::READING)?;
            let done = self
                .ready(count as u64)
                .and_then(|()| match &mut self.active {
                    Some(Active {
                        store: Some(store), ..
                    }) => store.append(&self.disk, &values, ahead),
                    _ => Err(StoreError::Io(io::Error::other("no segment is open"))),
                });
            match done {
                Ok(()) => {
                    self.next = to + 1;
                    self.held.insert(from, to);
                    self.cursor = cursor.to_vec();
                    self.note();
                    return Ok(Appended {
                        from,
                        to,
                        evicted: self.gaps.take_news(),
                    });
                }
                Err(StoreError::NoSpace) => {
                    self.close_active();
                    if !self.evict_oldest()? {
                        return Err(OutboxError::Full);
                    }
                }
                Err(StoreError::Damaged(why)) if damaged < DAMAGE_TRIES => {
                    damaged += 1;
                    self.close_active();
                    self.quarantine_active(&why)?;
                }
                Err(StoreError::Damaged(why)) => {
                    self.close_active();
                    return Err(OutboxError::Broken { what: WHAT, why });
                }
                Err(StoreError::Io(source)) => {
                    self.close_active();
                    return Err(OutboxError::Io { what: WHAT, source });
                }
            }
        }
    }

    /// The readings of `from..=to` that are held, in order: as many as `max_bytes` take, at least one if
    /// there is any. What turns out to be unreadable becomes a gap (see [`Outbox::take_lost`]).
    ///
    /// # Errors
    /// If the file system refuses, or is too full even to open a segment.
    pub fn read(
        &mut self,
        from: u64,
        to: u64,
        max_bytes: usize,
    ) -> Result<Vec<(u64, Vec<u8>)>, OutboxError> {
        let mut taken: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut left = max_bytes;
        let mut from = from;
        loop {
            let piece = self.held.overlap(from, to).next();
            let Some((a, b)) = piece else {
                return Ok(taken);
            };
            let Some((first, last)) = self.segment_of(a) else {
                // In no segment after all: cannot happen, and must not loop.
                self.held.remove(a, a);
                continue;
            };
            let b = b.min(last);
            let got = match self.store(first)? {
                // Damaged: what is held has changed.
                None => continue,
                Some(store) => store.read(a, b, left),
            };
            let got = match got {
                Ok(got) => got,
                Err(StoreError::Damaged(why)) => {
                    self.quarantine_segment(first, &why)?;
                    continue;
                }
                Err(StoreError::NoSpace) => return Err(OutboxError::Full),
                Err(StoreError::Io(source)) => {
                    return Err(OutboxError::Io {
                        what: "read",
                        source,
                    });
                }
            };
            let size: usize = got.iter().map(|(_, bytes)| bytes.len()).sum();
            let in_order = got
                .iter()
                .zip(a..)
                .all(|((seq, _), expected)| *seq == expected);
            if got.is_empty() || !in_order {
                self.quarantine_segment(first, "readings that were there are missing")?;
                continue;
            }
            from = got.last().map_or(from, |(seq, _)| seq + 1);
            if size > left && !taken.is_empty() {
                return Ok(taken);
            }
            taken.extend(got);
            left = left.saturating_sub(size);
            if left == 0 || from > to {
                return Ok(taken);
            }
            if from <= b {
                // The segment stopped at the budget.
                return Ok(taken);
            }
        }
    }

    /// The coordinator has stored these readings, and knows of the gaps in between.
    ///
    /// # Errors
    /// If the file system refuses; what was not deleted is deleted by a later call.
    pub fn free(&mut self, stored: &RangeSet) -> Result<(), OutboxError> {
        for (from, to) in stored.iter() {
            self.held.remove(from, to);
        }
        // While no segment is open, the gaps' names alone may say which number comes next.
        if self.active.is_some() {
            self.gaps
                .acknowledge(&self.disk, stored)
                .map_err(io("forget a gap"))?;
        }
        self.sweep()?;
        self.note();
        Ok(())
    }

    /// Notes how far it is, for the next start. Only a hint: failing costs nothing.
    fn note(&self) {
        let Some(file) = &self.mark else { return };
        let last = self.next - 1;
        let mark = Mark {
            epoch: self.epoch,
            last,
            stored: self.held.first().map_or(last, |(first, _)| first - 1),
            cursor: self.cursor.clone(),
        };
        if let Err(error) = mark.write(file) {
            tracing::debug!(%error, "the outbox's mark could not be written");
        }
    }
}

fn encode_group<E>(
    from: u64,
    count: usize,
    encode: &mut impl FnMut(u64) -> Result<Vec<u8>, E>,
) -> Result<Vec<Vec<u8>>, OutboxError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut bytes = 0;
    if count == 0 || count > MAX_GROUP {
        return Err(OutboxError::Group { count, bytes });
    }
    let mut readings = Vec::with_capacity(count);
    for seq in (from..).take(count) {
        let reading = encode(seq).map_err(|error| OutboxError::Encode(error.into()))?;
        if reading.len() > MAX_EVENT_BYTES {
            return Err(OutboxError::Reading {
                seq,
                size: reading.len(),
            });
        }
        bytes += reading.len();
        readings.push(reading);
    }
    if bytes > MAX_GROUP_BYTES {
        return Err(OutboxError::Group { count, bytes });
    }
    Ok(readings)
}

/// The bytes that everything in an outbox's directory takes, for tools that look from outside.
#[must_use]
pub fn directory_bytes(dir: &Path) -> u64 {
    disk::usage(dir)
}

/// Has another process the outbox in `dir` open? A running agent has.
#[must_use]
pub fn is_in_use(dir: &Path) -> bool {
    open::is_in_use(dir)
}

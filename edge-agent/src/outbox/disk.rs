//! What the outbox asks of the file system: that things are durable when it says so, and how much room is left.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::names::Entry;

/// Told the path of a file or directory right before its content is made durable.
///
/// The test of a power cut stands on it: every sync of the outbox comes through here.
pub type SyncHook = Arc<dyn Fn(&Path) + Send + Sync>;

/// `st_blocks` counts in these, whatever the file system's block is (stat(2)).
const STAT_BLOCK: u64 = 512;

/// The outbox's directory.
pub(super) struct Disk {
    root: PathBuf,
    hook: Option<SyncHook>,
}

/// How much room the file system has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Bytes in all.
    pub(super) total: u64,
    /// Bytes that this process may still use.
    pub(super) free: u64,
}

impl Disk {
    /// Makes the directory where there is none, durably.
    pub(super) fn create(root: &Path, hook: Option<SyncHook>) -> io::Result<Self> {
        let disk = Self {
            root: root.to_path_buf(),
            hook,
        };
        if !root.is_dir() {
            fs::create_dir_all(root)?;
            if let Some(parent) = root.parent().filter(|p| !p.as_os_str().is_empty()) {
                disk.sync_dir(parent)?;
            }
        }
        Ok(disk)
    }

    pub(super) fn path(&self, entry: Entry) -> PathBuf {
        self.root.join(entry.name())
    }

    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// What is in the directory, as far as it is the outbox's, in the order of names.
    pub(super) fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut names = Vec::new();
        for item in fs::read_dir(&self.root)? {
            if let Ok(name) = item?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names.iter().filter_map(|name| Entry::parse(name)).collect())
    }

    /// Makes the bytes of a file durable.
    pub(super) fn sync_data(&self, file: &File, path: &Path) -> io::Result<()> {
        self.tell(path);
        file.sync_data()
    }

    /// Makes a whole small tree durable: every file, then the directories.
    pub(super) fn sync_tree(&self, dir: &Path) -> io::Result<()> {
        for item in fs::read_dir(dir)? {
            let path = item?.path();
            if path.is_dir() {
                self.sync_tree(&path)?;
            } else {
                self.sync_data(&File::open(&path)?, &path)?;
            }
        }
        self.sync_dir(dir)
    }

    /// Makes the entries of a directory durable.
    pub(super) fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.tell(path);
        File::open(path)?.sync_all()
    }

    /// Makes the outbox's own entries durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.sync_dir(&self.root)
    }

    /// Gives an entry another name, durably. Atomic, and needs no space. Where it could not be made durable the name may be the
    /// new one already: the next try is content with that, and makes it durable.
    pub(super) fn rename(&self, from: Entry, to: Entry) -> io::Result<()> {
        let (from, to) = (self.path(from), self.path(to));
        match fs::rename(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && to.exists() => {}
            renamed => renamed?,
        }
        self.sync()
    }

    /// Makes an empty directory, durably.
    pub(super) fn mkdir(&self, entry: Entry) -> io::Result<()> {
        match fs::create_dir(self.path(entry)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.sync()
    }

    /// Deletes an entry and what is in it. Half-done it must mean the same as not done.
    pub(super) fn remove(&self, entry: Entry) -> io::Result<()> {
        match fs::remove_dir_all(self.path(entry)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.sync(),
        }
    }

    /// Deletes what is in an entry and keeps the entry.
    pub(super) fn empty(&self, entry: Entry) -> io::Result<()> {
        for item in fs::read_dir(self.path(entry))? {
            let path = item?.path();
            if path.is_dir() {
                fs::remove_dir_all(path)?;
            } else {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// The bytes that an entry takes on the disk.
    pub(super) fn usage(&self, entry: Entry) -> u64 {
        usage(&self.path(entry))
    }

    /// The room on the file system.
    pub(super) fn room(&self) -> io::Result<Room> {
        let stat = rustix::fs::statvfs(&self.root)?;
        Ok(Room {
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }

    fn tell(&self, path: &Path) {
        if let Some(hook) = &self.hook {
            hook(path);
        }
    }
}

/// The bytes that a file or a tree takes on the disk; what cannot be read counts as nothing.
pub(super) fn usage(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return 0;
    };
    let own = meta.blocks() * STAT_BLOCK;
    if !meta.is_dir() {
        return own;
    }
    let Ok(items) = fs::read_dir(path) else {
        return own;
    };
    own + items.flatten().map(|item| usage(&item.path())).sum::<u64>()
}

/// The bytes that an open file takes on the disk.
pub(super) fn file_usage(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * STAT_BLOCK)
}

/// What is looked at, and given back, at a time.
const PAGE: usize = 4096;
const ZEROS: &[u8] = &[0; 16 * PAGE];

/// Where what was written ends, in a file that is written in units of one size (a multiple of a page), one after the other,
/// and that [`lengthen`] makes longer. A unit begins with something else than 16 zeros.
pub(super) struct Tail {
    unit: u64,
    /// The end of the last unit that was written to.
    units: u64,
    /// In that unit, the end of the last page that is not all zeros.
    data: u64,
}

impl Tail {
    /// Looks through all of the file.
    pub(super) fn find(file: &File, unit: u64) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let mut tail = Self {
            unit,
            units: 0,
            data: 0,
        };
        for end in (1..=length.div_ceil(unit)).rev().map(|at| at * unit) {
            if begun(file, end - unit)? {
                tail.units = end;
                break;
            }
        }
        tail.data = tail.units.saturating_sub(unit);
        tail.advance(file)?;
        Ok(tail)
    }

    /// Looks at what was written since.
    pub(super) fn advance(&mut self, file: &File) -> io::Result<()> {
        let before = self.units;
        while begun(file, self.units)? {
            self.units += self.unit;
        }
        if self.units > before {
            self.data = self.units - self.unit;
        }
        let mut page = [0; PAGE];
        while self.data < self.units {
            let length = page.len().min((self.units - self.data) as usize);
            let read = file.read_at(&mut page[..length], self.data)?;
            if page[..read] == ZEROS[..read] {
                break;
            }
            self.data += read as u64;
        }
        Ok(())
    }

    /// The end of the last unit that was written to.
    pub(super) const fn units(&self) -> u64 {
        self.units
    }

    /// The end of the data, or of the first page of it that is all zeros.
    pub(super) const fn data(&self) -> u64 {
        self.data
    }
}

/// Was anything written to the unit that begins here?
fn begun(file: &File, at: u64) -> io::Result<bool> {
    let mut head = [0; 16];
    Ok(file.read_at(&mut head, at)? == head.len() && head != [0; 16])
}

/// Sees to it that the `need` bytes after `end` can be written whatever happens to the disk.
///
/// sled cannot survive a write that fails for want of space, and waits for it for ever: so the space is taken before,
/// and `ahead` bytes more. It is taken by writing zeros: making bytes durable that lie in blocks that were written before
/// needs no commit of the file system's journal, which costs more than the bytes do.
pub(super) fn lengthen(file: &File, end: u64, need: u64, ahead: u64) -> io::Result<()> {
    let length = file.metadata()?.len();
    if length >= end + need {
        return Ok(());
    }
    let wanted = end + need + ahead;
    let mut at = length;
    while at < wanted {
        let piece = ZEROS.len().min((wanted - at) as usize);
        if let Err(error) = file.write_all_at(&ZEROS[..piece], at) {
            // What was got of it is of no use. Failing costs space, and is seen in the usage.
            let _ = file.set_len(length);
            return Err(error);
        }
        at += piece as u64;
    }
    Ok(())
}

/// Gives back what holds nothing but zeros: the units that were never written to, and the end of the last one, as a hole.
/// Who reads the rest finds it as it was. Failing costs space, and is seen in the usage.
pub(super) fn release(file: &File, unit: u64) {
    let (Ok(tail), Ok(meta)) = (Tail::find(file, unit), file.metadata()) else {
        return;
    };
    let length = meta.len().min(tail.units);
    let _ = file.set_len(length);
    let mut data = length;
    let mut page = [0; PAGE];
    // From the end: there may be a page of zeros in the middle of the data.
    while let Some(start) = data.checked_sub(1).map(|last| last - last % PAGE as u64)
        && let Ok(read) = file.read_at(&mut page[..(data - start) as usize], start)
        && page[..read] == ZEROS[..read]
    {
        data = start;
    }
    if length > data {
        let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        let _ = rustix::fs::fallocate(file, hole, data, length - data);
    }
}

/// The first bytes of a [`Mark`].
const MARK_MAGIC: &[u8; 8] = b"lacemrk2";
/// Magic, epoch, last, stored, length of the cursor.
const MARK_HEAD: usize = 8 + 8 + 8 + 8 + 4;

/// A note on how far the outbox was, written after every change and never synced: it survives a kill, and
/// mostly a power cut. It may be old or gone, never ahead of what is durable; so it can show that a tail is
/// missing, and spare resending, but nothing depends on it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// The outbox that wrote it.
    pub(super) epoch: u64,
    /// The last reading that was durable.
    pub(super) last: u64,
    /// Everything up to here was acknowledged or is recorded as a gap.
    pub(super) stored: u64,
    /// The cursor that was durable with `last`.
    pub(super) cursor: Vec<u8>,
}

impl Mark {
    pub(super) fn write(&self, file: &File) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(MARK_HEAD + self.cursor.len() + 4);
        bytes.extend_from_slice(MARK_MAGIC);
        for number in [self.epoch, self.last, self.stored] {
            bytes.extend_from_slice(&number.to_be_bytes());
        }
        bytes.extend_from_slice(&(self.cursor.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&self.cursor);
        let sum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&sum.to_be_bytes());
        file.write_all_at(&bytes, 0)
    }

    /// `None` if there is none or it is damaged.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let bytes = fs::read(path).ok()?;
        let head = bytes.get(..MARK_HEAD)?;
        let number = |at: usize| Some(u64::from_be_bytes(head.get(at..at + 8)?.try_into().ok()?));
        let length = u32::from_be_bytes(head.get(32..36)?.try_into().ok()?) as usize;
        let end = MARK_HEAD.checked_add(length)?;
        let sum = bytes.get(end..end + 4)?;
        if head.get(..8)? != MARK_MAGIC || sum != crc32fast::hash(bytes.get(..end)?).to_be_bytes() {
            return None;
        }
        Some(Self {
            epoch: number(8)?,
            last: number(16)?,
            stored: number(24)?,
            cursor: bytes.get(MARK_HEAD..end)?.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_whole_or_nothing() {
        let path = tempfile::tempdir().unwrap().keep().join("mark");
        let mark = Mark {
            epoch: 1 << 52,
            last: 9,
            stored: 3,
            cursor: b"cam0=12".to_vec(),
        };
        let file = File::create(&path).unwrap();
        mark.write(&file).unwrap();
        assert_eq!(Mark::read(&path).as_ref(), Some(&mark));
        let bytes = fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            fs::write(&path, &bad).unwrap();
            assert_eq!(Mark::read(&path), None, "byte {at}");
            fs::write(&path, &bytes[..at]).unwrap();
            assert_eq!(Mark::read(&path), None, "cut at {at}");
        }
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }
}

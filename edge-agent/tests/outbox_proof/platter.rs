//! A disk that only keeps what was synced.
//!
//! Every sync of the outbox is observed. For each file the platter knows its bytes at its last sync, for
//! each directory its entries. A cut builds a new directory from that: of what was not synced, nothing, all
//! or any part may have reached the disk, page by page and entry by entry.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use crate::Dice;

const PAGE: usize = 4_096;

/// A file or directory whatever its name: numbers of inodes are used again, with another birth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Id(u64, u128);

impl Id {
    fn of(path: &Path) -> Option<Self> {
        let meta = fs::symlink_metadata(path).ok()?;
        let born = meta
            .created()
            .ok()
            .and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        Some(Self(meta.ino(), born.map_or(0, |at| at.as_nanos())))
    }
}

#[derive(Clone)]
struct Child {
    id: Id,
    is_dir: bool,
}

/// What a cut does to that which was not synced.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fate {
    Lost,
    Kept,
    Mixed,
}

pub(crate) struct Platter {
    root: PathBuf,
    files: BTreeMap<Id, Vec<u8>>,
    dirs: BTreeMap<Id, BTreeMap<String, Child>>,
}

fn children(dir: &Path) -> BTreeMap<String, Child> {
    let Ok(items) = fs::read_dir(dir) else {
        return BTreeMap::new();
    };
    let entry = |item: fs::DirEntry| {
        let path = item.path();
        let child = Child {
            id: Id::of(&path)?,
            is_dir: path.is_dir(),
        };
        Some((item.file_name().into_string().ok()?, child))
    };
    items.flatten().filter_map(entry).collect()
}

impl Platter {
    /// A disk on which all that is in `root` now is safe.
    pub(crate) fn new(root: &Path) -> Self {
        let mut platter = Self {
            root: root.to_path_buf(),
            files: BTreeMap::new(),
            dirs: BTreeMap::new(),
        };
        platter.adopt(root);
        platter
    }

    fn adopt(&mut self, path: &Path) {
        self.synced(path);
        if path.is_dir() {
            for name in children(path).keys() {
                self.adopt(&path.join(name));
            }
        }
    }

    /// `path` was made durable as it is now.
    pub(crate) fn synced(&mut self, path: &Path) {
        let Some(id) = Id::of(path) else { return };
        if path.is_dir() {
            self.dirs.insert(id, children(path));
        } else {
            self.files.insert(id, fs::read(path).unwrap());
        }
    }

    /// What someone finds who mounts the disk after the power was cut now.
    pub(crate) fn cut(&self, to: &Path, fate: Fate, dice: &mut Dice) {
        let id = Id::of(&self.root).unwrap();
        self.dir(id, Some(&self.root), to, fate, dice);
    }

    fn dir(&self, id: Id, live: Option<&Path>, to: &Path, fate: Fate, dice: &mut Dice) {
        fs::create_dir_all(to).unwrap();
        let safe = self.dirs.get(&id).cloned().unwrap_or_default();
        let now = live.map(children).unwrap_or_default();
        let mut names: BTreeMap<Id, (Option<&String>, Option<&String>, bool)> = BTreeMap::new();
        for (name, child) in &safe {
            names
                .entry(child.id)
                .or_insert((None, None, child.is_dir))
                .0 = Some(name);
        }
        for (name, child) in &now {
            names
                .entry(child.id)
                .or_insert((None, None, child.is_dir))
                .1 = Some(name);
        }
        for (id, (safe, now, is_dir)) in names {
            let changed = match fate {
                Fate::Lost => false,
                Fate::Kept => true,
                Fate::Mixed => dice.one_in(2),
            };
            let Some(name) = (if changed { now } else { safe }) else {
                continue;
            };
            let (target, live) = (to.join(name), now.and_then(|name| Some(live?.join(name))));
            if target.exists() {
                continue;
            }
            if is_dir {
                self.dir(id, live.as_deref(), &target, fate, dice);
            } else {
                // sled syncs a snapshot's bytes before it gives it its name (its `write_snapshot`).
                let whole = name.starts_with("snap.") && !name.ends_with("generating");
                let fate = if whole && live.is_some() {
                    Fate::Kept
                } else {
                    fate
                };
                fs::write(&target, self.file(id, live.as_deref(), fate, dice)).unwrap();
            }
        }
    }

    fn file(&self, id: Id, live: Option<&Path>, fate: Fate, dice: &mut Dice) -> Vec<u8> {
        let safe = self.files.get(&id).map(Vec::as_slice).unwrap_or_default();
        let Some(now) = live.and_then(|path| fs::read(path).ok()) else {
            return safe.to_vec();
        };
        match fate {
            Fate::Lost => safe.to_vec(),
            Fate::Kept => now,
            Fate::Mixed => {
                let size = if dice.one_in(2) {
                    safe.len()
                } else {
                    now.len()
                };
                let mut bytes = vec![0; size];
                for (page, at) in bytes.chunks_mut(PAGE).zip((0..).step_by(PAGE)) {
                    let from = if dice.one_in(2) { safe } else { &now };
                    let from = from.get(at..).unwrap_or_default();
                    let length = from.len().min(page.len());
                    page[..length].copy_from_slice(&from[..length]);
                }
                bytes
            }
        }
    }
}

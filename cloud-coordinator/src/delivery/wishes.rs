//! What each device was last told to be. The newest wish wins, so each has a larger revision than the one before.

use std::collections::HashMap;

use mesh_core::{Desired, Erase, Limits, Release, Settings, Trial, VERSION};

use super::store::WishRow;
use crate::clock;

/// A device's wish.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wish {
    pub(super) desired: Desired,
    /// A person chose it for this device; rollouts pass by.
    pub(super) pinned: bool,
}

/// All wishes, by the device's number in the database of readings.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    all: HashMap<i64, Wish>,
}

impl Wishes {
    /// Those that were kept; one that cannot be read any more is as good as none.
    pub(super) fn of_rows(rows: Vec<WishRow>) -> Self {
        let read = |row: WishRow| {
            let desired = Desired::decode(row.message.as_bytes()).ok()?;
            let pinned = row.pinned;
            Some((row.device, Wish { desired, pinned }))
        };
        Self {
            all: rows.into_iter().filter_map(read).collect(),
        }
    }

    pub(super) fn get(&self, device: i64) -> Option<&Wish> {
        self.all.get(&device)
    }

    pub(super) fn is_pinned(&self, device: i64) -> bool {
        self.get(device).is_some_and(|wish| wish.pinned)
    }

    /// The model that the device was last told to run.
    pub(super) fn release(&self, device: i64) -> Option<&Release> {
        self.get(device)?.desired.release.as_ref()
    }

    pub(super) fn revision(&self, device: i64) -> u64 {
        self.get(device).map_or(0, |wish| wish.desired.revision)
    }

    /// Wishes something else; what is to be kept and sent, if it is new.
    pub(super) fn wish(
        &mut self,
        device: i64,
        release: Option<Release>,
        (limits, trial): (Limits, Trial),
        force: bool,
        pinned: bool,
    ) -> Option<WishRow> {
        let before = self.get(device);
        if before.is_some_and(|w| w.desired.release == release && w.pinned == pinned && !force) {
            return None;
        }
        if before.is_none() && release.is_none() {
            return None;
        }
        // A coordinator that was restored from a backup must not repeat a revision: the clock has gone on.
        let now = clock::now_ms().max(0).cast_unsigned();
        let desired = Desired {
            v: VERSION,
            revision: now.max(self.revision(device) + 1),
            release,
            limits,
            trial,
            force,
            settings: before.and_then(|wish| wish.desired.settings),
            erase: before.map_or_else(Vec::new, |wish| wish.desired.erase.clone()),
        };
        let message = serde_json::to_string(&desired).ok()?;
        self.all.insert(device, Wish { desired, pinned });
        Some(WishRow {
            device,
            message,
            pinned,
        })
    }

    /// Does any device have settings that were wished for?
    pub(super) fn have_settings(&self) -> bool {
        let mut all = self.all.values();
        all.any(|wish| wish.desired.settings.is_some())
    }

    /// Wishes other settings, and nothing else; what is to be kept and sent, if it is new. `heard` is the newest wish that
    /// the device has answered.
    pub(super) fn set(
        &mut self,
        device: i64,
        settings: Option<Settings>,
        heard: u64,
    ) -> Option<WishRow> {
        let before = self.get(device);
        if before.and_then(|wish| wish.desired.settings) == settings {
            return None;
        }
        self.change(device, heard, |desired| desired.settings = settings)
    }

    /// Wishes that other samples are gone, and nothing else; what is to be kept and sent, if it is new.
    pub(super) fn erase(&mut self, device: i64, erase: Vec<Erase>, heard: u64) -> Option<WishRow> {
        let before = self.get(device).map(|wish| wish.desired.erase.as_slice());
        if before.unwrap_or_default() == erase {
            return None;
        }
        self.change(device, heard, |desired| desired.erase = erase)
    }

    /// Changes a part of what a device is to be.
    fn change(
        &mut self,
        device: i64,
        heard: u64,
        change: impl FnOnce(&mut Desired),
    ) -> Option<WishRow> {
        let pinned = self.is_pinned(device);
        let mut desired = self.get(device).map_or_else(
            || Desired {
                v: VERSION,
                revision: 0,
                release: None,
                limits: Limits::default(),
                trial: Trial::default(),
                force: false,
                settings: None,
                erase: Vec::new(),
            },
            |wish| wish.desired.clone(),
        );
        // To force a model counts once: a device that has heard of it must not try it again because of this.
        desired.force &= heard < desired.revision;
        desired.revision = clock::now_ms()
            .max(0)
            .cast_unsigned()
            .max(desired.revision + 1);
        change(&mut desired);
        let message = serde_json::to_string(&desired).ok()?;
        self.all.insert(device, Wish { desired, pinned });
        Some(WishRow {
            device,
            message,
            pinned,
        })
    }

    /// Every wish, to be said again.
    pub(super) fn all(&self) -> impl Iterator<Item = (i64, &Desired)> {
        self.all
            .iter()
            .map(|(device, wish)| (*device, &wish.desired))
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::Digest;

    use super::*;

    #[test]
    fn a_wish_is_new_or_nothing_and_outlives_a_restart() {
        let release = |n: u8| {
            Some(Release {
                name: "steel".into(),
                version: format!("1.{n}.0"),
                digest: Digest([n; 32]),
            })
        };
        let terms = (Limits::default(), Trial::default());
        let mut wishes = Wishes::default();
        assert!(wishes.wish(7, None, terms, false, false).is_none());
        let first = wishes.wish(7, release(1), terms, false, false).unwrap();
        assert!(wishes.wish(7, release(1), terms, false, false).is_none());
        let second = wishes.wish(7, release(2), terms, false, true).unwrap();
        assert!(wishes.is_pinned(7) && !wishes.is_pinned(8));
        let again = Wishes::of_rows(vec![first, second]);
        assert_eq!(
            (again.get(7), again.release(7)),
            (wishes.get(7), release(2).as_ref())
        );
        let revision = wishes.revision(7);
        wishes.wish(7, release(1), terms, true, false).unwrap();
        assert!(wishes.revision(7) > revision);
    }

    #[test]
    fn what_is_to_be_gone_stays_until_it_is() {
        let gone = |id| Erase {
            id,
            what: mesh_core::Gone::All,
        };
        let mut wishes = Wishes::default();
        assert!(wishes.erase(7, Vec::new(), 0).is_none());
        let first = wishes.erase(7, vec![gone(1)], 0).unwrap();
        assert!(wishes.erase(7, vec![gone(1)], 0).is_none());
        let terms = (Limits::default(), Trial::default());
        let release = Release {
            name: "steel".into(),
            version: "1".into(),
            digest: Digest([9; 32]),
        };
        wishes.wish(7, Some(release), terms, false, false).unwrap();
        assert_eq!(wishes.get(7).unwrap().desired.erase, [gone(1)]);
        let again = Wishes::of_rows(vec![first]);
        assert_eq!(again.get(7).unwrap().desired.erase, [gone(1)]);
        assert!(wishes.erase(7, Vec::new(), 0).is_some());
        assert!(wishes.get(7).unwrap().desired.erase.is_empty());
    }

    #[test]
    fn models_and_settings_do_not_disturb_each_other() {
        let settings = |n: u8| Settings {
            version: n.into(),
            digest: Digest([n; 32]),
            trial_s: 60,
        };
        let release = Release {
            name: "steel".into(),
            version: "1".into(),
            digest: Digest([9; 32]),
        };
        let terms = (Limits::default(), Trial::default());
        let mut wishes = Wishes::default();
        assert!(!wishes.have_settings() && wishes.set(7, None, 0).is_none());
        assert!(wishes.set(7, Some(settings(1)), 0).is_some());
        assert!(wishes.set(7, Some(settings(1)), 0).is_none());
        wishes
            .wish(7, Some(release.clone()), terms, true, true)
            .unwrap();
        let forced = wishes.get(7).unwrap().desired.clone();
        assert_eq!((forced.settings, forced.force), (Some(settings(1)), true));
        // Not heard of yet: still forced. Heard of: never again.
        for (n, heard, force) in [(2, forced.revision - 1, true), (3, u64::MAX, false)] {
            wishes.set(7, Some(settings(n)), heard).unwrap();
            let desired = &wishes.get(7).unwrap().desired;
            assert_eq!(
                (desired.release.as_ref(), desired.force),
                (Some(&release), force)
            );
            assert!(desired.revision > forced.revision && wishes.is_pinned(7));
        }
        assert!(wishes.set(7, None, 0).is_some() && !wishes.have_settings());
    }
}

//! Where readings lie and what goes when there is no room: rotation, eviction, quarantine.

use std::io;

use mesh_core::GapReason;

use super::{
    Active, DRAINED_BYTES, GapRecord, Kept, Outbox, OutboxError, SEGMENT_READINGS, Sealed,
    io as failed,
    names::Entry,
    segment::{Contents, Store, StoreError},
};

/// How many damaged segments are kept for inspection.
pub(super) const MAX_KEPT: usize = 2;
/// The share of the disk that is left to others, and the most of it: enough to open segments and to log.
const RESERVE_SHARE: u64 = 16;
const RESERVE_BYTES: u64 = 1024 * 1024;

impl Outbox {
    /// Evicts the oldest until `need` more bytes stay within both bounds.
    pub(super) fn make_room(&mut self, need: u64) -> Result<(), OutboxError> {
        loop {
            let room = self.disk.room().map_err(failed("ask for free space"))?;
            let reserve = (room.total / RESERVE_SHARE).min(RESERVE_BYTES);
            // What is allocated for the newest segment counts as taken, and is there to be used.
            if self.bytes() + need <= self.max_bytes && room.free >= reserve + need {
                return Ok(());
            }
            if !self.evict_oldest()? {
                return Err(OutboxError::Full);
            }
        }
    }

    /// Gives up what is worth least. `false` if there is nothing left.
    pub(super) fn evict_oldest(&mut self) -> Result<bool, OutboxError> {
        if !self.kept.is_empty() {
            self.drop_kept()?;
            return Ok(true);
        }
        if self.sealed.is_empty() && self.active_readings() > 0 {
            match self.rotate() {
                Ok(()) => {}
                Err(StoreError::NoSpace | StoreError::Damaged(_)) => {
                    // Then without the new one first. The gap's name says which number comes next.
                    self.seal().map_err(failed("seal a segment"))?;
                }
                Err(StoreError::Io(source)) => {
                    return Err(OutboxError::Io {
                        what: "start a segment",
                        source,
                    });
                }
            }
        }
        let Some((&first, &Sealed { last, .. })) = self.sealed.first_key_value() else {
            return Ok(false);
        };
        let Some(gap) = self.hull(first, last, GapReason::Full) else {
            self.delete(first)?;
            return Ok(true);
        };
        tracing::warn!(
            from = gap.from,
            to = gap.to,
            "the outbox is full: its oldest readings are dropped"
        );
        self.close_reader(first);
        // The rename is what counts: until it is done the readings are there, and the next try begins with them.
        self.disk
            .rename(Entry::Sealed { first, last }, Entry::Gap(gap))
            .map_err(failed("drop the oldest segment"))?;
        self.held.remove(first, last);
        self.sealed.remove(&first);
        self.gaps
            .take_over(&self.disk, gap, &self.held)
            .map_err(failed("empty the oldest segment"))?;
        Ok(true)
    }

    /// Sees to it that a segment is open that takes `count` more readings.
    pub(super) fn ready(&mut self, count: u64) -> Result<(), StoreError> {
        self.open_active()?;
        let length = self.active_length();
        let full =
            self.active_readings() + count > SEGMENT_READINGS || length >= self.segment_bytes;
        if full && self.active_readings() > 0 {
            self.rotate()?;
        }
        Ok(())
    }

    /// Opens the newest segment after an error, or makes one.
    pub(super) fn open_active(&mut self) -> Result<(), StoreError> {
        match &self.active {
            Some(Active { store: Some(_), .. }) => Ok(()),
            None => {
                self.active = Some(self.create()?);
                Ok(())
            }
            &Some(Active { first, store: None }) => {
                let path = self.disk.path(Entry::Active { first });
                let identity = (self.epoch, first);
                let (store, Contents { readings, .. }) =
                    Store::open(&self.disk, &path, identity, &self.means)?;
                if self.next > first && !readings.covers(first, self.next - 1) {
                    return Err(StoreError::Damaged(
                        "readings that were there are missing".into(),
                    ));
                }
                if readings.last().is_some_and(|last| last >= self.next) {
                    store.cut(&self.disk, self.next - 1)?;
                }
                self.active = Some(Active {
                    first,
                    store: Some(store),
                });
                Ok(())
            }
        }
    }

    /// Makes the segment for the next reading.
    fn create(&self) -> Result<Active, StoreError> {
        let first = self.next;
        let new = Entry::New { first };
        self.disk.remove(new)?;
        let identity = (self.epoch, first, self.cursor.as_slice());
        let made = Store::create(&self.disk, &self.disk.path(new), identity, &self.means);
        let mut store = match made {
            Ok(store) => store,
            Err(error) => {
                // What is left of it is in the way of nobody, and deleted at the next try.
                let _ = self.disk.remove(new);
                return Err(error);
            }
        };
        self.disk.rename(new, Entry::Active { first })?;
        store.moved(self.disk.path(Entry::Active { first }));
        Ok(Active {
            first,
            store: Some(store),
        })
    }

    /// Starts a new segment and seals the one before. Needs a newest segment with readings.
    fn rotate(&mut self) -> Result<(), StoreError> {
        let new = self.create()?;
        self.seal()?;
        self.active = Some(new);
        Ok(())
    }

    /// Names the newest segment full.
    fn seal(&mut self) -> io::Result<()> {
        let Some(Active { first, .. }) = self.active else {
            return Ok(());
        };
        if let Some(store) = self
            .active
            .as_mut()
            .and_then(|active| active.store.as_mut())
        {
            store.full();
        }
        self.close_active();
        let sealed = Entry::Sealed {
            first,
            last: self.next - 1,
        };
        self.disk.rename(Entry::Active { first }, sealed)?;
        self.active = None;
        let bytes = self.disk.usage(sealed);
        self.sealed.insert(
            first,
            Sealed {
                last: self.next - 1,
                bytes,
            },
        );
        Ok(())
    }

    /// Deletes the segments of which nothing is held, and shrinks an outbox that is drained.
    pub(super) fn sweep(&mut self) -> Result<(), OutboxError> {
        if self.held.is_empty()
            && self.active_readings() > 0
            && self.active_length() > DRAINED_BYTES
        {
            match self.rotate() {
                Ok(()) | Err(StoreError::NoSpace) => {}
                Err(error) => tracing::warn!(%error, "a drained segment could not be replaced"),
            }
        }
        let empty: Vec<u64> = self
            .sealed
            .iter()
            .filter(|&(&first, segment)| self.held.overlap(first, segment.last).next().is_none())
            .map(|(&first, _)| first)
            .collect();
        empty.into_iter().try_for_each(|first| self.delete(first))
    }

    /// Deletes a full segment of which nothing is held.
    fn delete(&mut self, first: u64) -> Result<(), OutboxError> {
        let Some(segment) = self.sealed.remove(&first) else {
            return Ok(());
        };
        self.close_reader(first);
        let old = Entry::Old { first };
        self.disk
            .rename(
                Entry::Sealed {
                    first,
                    last: segment.last,
                },
                old,
            )
            .and_then(|()| self.disk.remove(old))
            .map_err(failed("delete a segment"))
    }

    /// The segment that a reading lies in: its first and last number.
    pub(super) fn segment_of(&self, seq: u64) -> Option<(u64, u64)> {
        if let Some(active) = &self.active
            && seq >= active.first
        {
            return (seq < self.next).then(|| (active.first, self.next - 1));
        }
        let (&first, segment) = self.sealed.range(..=seq).next_back()?;
        (seq <= segment.last).then_some((first, segment.last))
    }

    /// The open segment that starts at `first`. `None` if opening it showed damage: what is held has changed.
    pub(super) fn store(&mut self, first: u64) -> Result<Option<&Store>, OutboxError> {
        let active = self
            .active
            .as_ref()
            .is_some_and(|active| active.first == first);
        let opened = if active {
            self.open_active()
        } else {
            self.open_reader(first)
        };
        match opened {
            Ok(()) if active => Ok(self
                .active
                .as_ref()
                .and_then(|active| active.store.as_ref())),
            Ok(()) => Ok(self
                .reader
                .as_ref()
                .filter(|open| open.0 == first)
                .map(|open| &open.1)),
            Err(StoreError::Damaged(why)) => {
                self.quarantine_segment(first, &why)?;
                Ok(None)
            }
            Err(StoreError::NoSpace) => Err(OutboxError::Full),
            Err(StoreError::Io(source)) => Err(OutboxError::Io {
                what: "open a segment",
                source,
            }),
        }
    }

    /// Opens a full segment and compares what it holds with what it should.
    fn open_reader(&mut self, first: u64) -> Result<(), StoreError> {
        if self.reader.as_ref().is_some_and(|(open, _)| *open == first) {
            return Ok(());
        }
        self.reader = None;
        let Some(&Sealed { last, .. }) = self.sealed.get(&first) else {
            return Ok(());
        };
        let path = self.disk.path(Entry::Sealed { first, last });
        let (store, contents) =
            Store::open_full(&self.disk, &path, (self.epoch, first), &self.means)?;
        self.reader = Some((first, store));
        let held: Vec<_> = self.held.overlap(first, last).collect();
        self.missing(&held, &contents)
    }

    /// Records what of `held` a segment does not hold.
    fn missing(&mut self, held: &[(u64, u64)], contents: &Contents) -> Result<(), StoreError> {
        for &(from, to) in held {
            let mut missing = mesh_core::RangeSet::new();
            missing.insert(from, to);
            for (a, b) in contents.readings.overlap(from, to) {
                missing.remove(a, b);
            }
            for (from, to) in missing.iter() {
                tracing::warn!(from, to, "readings in the outbox are unreadable");
                let gap = GapRecord {
                    from,
                    to,
                    reason: GapReason::Corrupt,
                };
                self.held.remove(from, to);
                self.gaps.record(&self.disk, gap, &self.held)?;
            }
        }
        Ok(())
    }

    /// Takes a damaged segment out of use.
    pub(super) fn quarantine_segment(&mut self, first: u64, why: &str) -> Result<(), OutboxError> {
        if self
            .active
            .as_ref()
            .is_some_and(|active| active.first == first)
        {
            return self.quarantine_active(why);
        }
        self.close_reader(first);
        let Some(&Sealed { last, .. }) = self.sealed.get(&first) else {
            return Ok(());
        };
        self.quarantine(
            Entry::Sealed { first, last },
            self.hull(first, last, GapReason::Corrupt),
            why,
        )
    }

    /// Takes the newest segment out of use. Which numbers it held is known, so none are skipped.
    pub(super) fn quarantine_active(&mut self, why: &str) -> Result<(), OutboxError> {
        self.close_active();
        let Some(Active { first, .. }) = self.active else {
            return Ok(());
        };
        let gap = match self.next - 1 {
            last if last >= first => self.hull(first, last, GapReason::Corrupt),
            _ => None,
        };
        self.quarantine(Entry::Active { first }, gap, why)?;
        self.active = None;
        Ok(())
    }

    /// Moves a damaged segment aside and records its gap; deletes it if nothing is missed.
    pub(super) fn quarantine(
        &mut self,
        segment: Entry,
        gap: Option<GapRecord>,
        why: &str,
    ) -> Result<(), OutboxError> {
        let Some(gap) = gap else {
            tracing::warn!(
                segment = segment.name(),
                why,
                "a damaged segment, all acknowledged, is deleted"
            );
            const WHAT: &str = "delete a damaged segment";
            let old = Entry::Old { first: self.next };
            self.disk.rename(segment, old).map_err(failed(WHAT))?;
            self.moved_away(segment);
            return self.disk.remove(old).map_err(failed(WHAT));
        };
        let GapRecord { from, to, .. } = gap;
        tracing::warn!(
            from,
            to,
            why,
            "a segment of the outbox is damaged: its readings are a gap"
        );
        self.disk
            .rename(segment, Entry::Bad { from, to })
            .map_err(failed("quarantine a segment"))?;
        self.moved_away(segment);
        self.held.remove(from, to);
        self.keep(from, to)
    }

    /// A segment is not under its name any more.
    fn moved_away(&mut self, segment: Entry) {
        if let Entry::Sealed { first, .. } = segment {
            self.sealed.remove(&first);
        }
    }

    /// Finishes a quarantine: records the gap, then keeps the segment for inspection.
    pub(super) fn keep(&mut self, from: u64, to: u64) -> Result<(), OutboxError> {
        let (bad, kept) = (Entry::Bad { from, to }, Entry::Kept { from, to });
        let gap = GapRecord {
            from,
            to,
            reason: GapReason::Corrupt,
        };
        if self.gaps.record(&self.disk, gap, &self.held).is_err() {
            // No room for a copy: the segment itself becomes the record.
            return self
                .gaps
                .replace(&self.disk, bad, gap, &self.held)
                .map_err(failed("record a gap"));
        }
        self.disk
            .rename(bad, kept)
            .map_err(failed("keep a damaged segment"))?;
        self.kept.push(Kept {
            from,
            to,
            bytes: self.disk.usage(kept),
        });
        while self.kept.len() > MAX_KEPT {
            self.drop_kept()?;
        }
        Ok(())
    }

    pub(super) fn drop_kept(&mut self) -> Result<(), OutboxError> {
        if self.kept.is_empty() {
            return Ok(());
        }
        let Kept { from, to, .. } = self.kept.remove(0);
        self.disk
            .remove(Entry::Kept { from, to })
            .map_err(failed("delete a damaged segment"))
    }

    /// The gap that losing a segment makes: from its first held reading to its last.
    fn hull(&self, first: u64, last: u64, reason: GapReason) -> Option<GapRecord> {
        let mut held = self.held.overlap(first, last);
        let (from, end) = held.next()?;
        let to = held.last().map_or(end, |(_, to)| to);
        Some(GapRecord { from, to, reason })
    }

    pub(super) fn close_active(&mut self) {
        if let Some(active) = &mut self.active {
            active.store = None;
        }
    }

    fn close_reader(&mut self, first: u64) {
        if self.reader.as_ref().is_some_and(|(open, _)| *open == first) {
            self.reader = None;
        }
    }

    /// How many numbers the newest segment has given out.
    fn active_readings(&self) -> u64 {
        self.active
            .as_ref()
            .map_or(0, |active| self.next - active.first)
    }

    fn active_length(&self) -> u64 {
        let store = self
            .active
            .as_ref()
            .and_then(|active| active.store.as_ref());
        store.map_or(0, Store::length)
    }

    pub(super) fn active_bytes(&self) -> u64 {
        let store = self
            .active
            .as_ref()
            .and_then(|active| active.store.as_ref());
        store.map_or(0, Store::bytes)
    }
}

#[cfg(test)]
mod tests {
    use crate::outbox::{MIN_BYTES, Options, Outbox};

    use super::*;

    /// An eviction that fails has dropped nothing: its readings are held as before, and the next one drops and records them.
    #[test]
    fn an_eviction_that_fails_forgets_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut outbox = Outbox::open(Options::new(dir.path(), MIN_BYTES))
            .unwrap()
            .outbox;
        while outbox.sealed.is_empty() {
            let encode = |seq: u64| Ok::<_, io::Error>(seq.to_string().repeat(500).into_bytes());
            outbox.append(50, encode, b"").unwrap();
        }
        let (&first, &Sealed { last, .. }) = outbox.sealed.first_key_value().unwrap();
        let gap = GapRecord {
            from: first,
            to: last,
            reason: GapReason::Full,
        };
        // Something that is not empty is in the way.
        let way = dir.path().join(Entry::Gap(gap).name());
        std::fs::create_dir_all(way.join("something")).unwrap();
        let before = outbox.pending();
        assert!(outbox.evict_oldest().is_err());
        assert_eq!((outbox.pending(), outbox.gaps().len()), (before, 0));
        assert_eq!(outbox.read(first, first, 1).unwrap().len(), 1);
        std::fs::remove_dir_all(&way).unwrap();
        assert!(outbox.evict_oldest().unwrap());
        assert_eq!(outbox.gaps(), [gap]);
        assert_eq!(outbox.pending(), before - (last - first + 1));
    }
}

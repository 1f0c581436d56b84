//! The record of what had to be dropped: one empty directory per gap, until the coordinator knows of it.

use std::io;

use mesh_core::{GapReason, RangeSet};

use super::{GapRecord, disk::Disk, names::Entry};

/// The most gaps that are kept apart; beyond it the oldest two become one that spans what was acknowledged
/// between them. Eviction takes neighbours, which merge, so that this many need a very unusual history.
const MAX_GAPS: usize = 256;

/// All gaps of the outbox, in order.
#[derive(Default)]
pub(super) struct Gaps {
    all: Vec<GapRecord>,
    /// Recorded since they were last taken.
    news: Vec<GapRecord>,
}

impl Gaps {
    /// Takes over what the directory says, and finishes what was under way.
    pub(super) fn load(disk: &Disk, entries: &[Entry]) -> io::Result<Self> {
        let mut gaps = Self::default();
        for entry in entries {
            if let Entry::Gap(gap) = *entry {
                disk.empty(*entry)?;
                gaps.insert(disk, gap)?;
            }
        }
        Ok(gaps)
    }

    pub(super) fn all(&self) -> &[GapRecord] {
        &self.all
    }

    pub(super) fn take_news(&mut self) -> Vec<GapRecord> {
        std::mem::take(&mut self.news)
    }

    /// Turns a segment into the record of its loss. The rename is what counts; it needs no space.
    pub(super) fn replace(
        &mut self,
        disk: &Disk,
        segment: Entry,
        gap: GapRecord,
        held: &RangeSet,
    ) -> io::Result<()> {
        disk.rename(segment, Entry::Gap(gap))?;
        self.take_over(disk, gap, held)
    }

    /// Notes a loss that the disk has the record of already: a segment that was given its name. It is known from here on,
    /// also where what was in the segment cannot be deleted yet.
    pub(super) fn take_over(
        &mut self,
        disk: &Disk,
        gap: GapRecord,
        held: &RangeSet,
    ) -> io::Result<()> {
        self.news.push(gap);
        let at = self.place(gap);
        disk.empty(Entry::Gap(gap))?;
        self.join(disk, at)?;
        self.bound(disk, held)
    }

    /// Records a loss that no segment stands for.
    pub(super) fn record(
        &mut self,
        disk: &Disk,
        gap: GapRecord,
        held: &RangeSet,
    ) -> io::Result<()> {
        disk.mkdir(Entry::Gap(gap))?;
        self.news.push(gap);
        self.insert(disk, gap)?;
        self.bound(disk, held)
    }

    /// Forgets what the coordinator knows.
    pub(super) fn acknowledge(&mut self, disk: &Disk, stored: &RangeSet) -> io::Result<()> {
        let mut at = 0;
        while let Some(&gap) = self.all.get(at) {
            let mut open = RangeSet::new();
            open.insert(gap.from, gap.to);
            for (from, to) in stored.overlap(gap.from, gap.to) {
                open.remove(from, to);
            }
            match open.first().zip(open.last()) {
                None => {
                    disk.remove(Entry::Gap(gap))?;
                    self.all.remove(at);
                }
                Some(((from, _), to)) => {
                    let rest = GapRecord { from, to, ..gap };
                    if rest != gap {
                        disk.rename(Entry::Gap(gap), Entry::Gap(rest))?;
                        self.all[at] = rest;
                    }
                    at += 1;
                }
            }
        }
        Ok(())
    }

    /// Puts a gap that is on the disk in its place, and merges it with its neighbours.
    fn insert(&mut self, disk: &Disk, gap: GapRecord) -> io::Result<()> {
        let at = self.place(gap);
        self.join(disk, at)
    }

    fn place(&mut self, gap: GapRecord) -> usize {
        let at = self
            .all
            .partition_point(|other| (other.from, other.to) < (gap.from, gap.to));
        self.all.insert(at, gap);
        at
    }

    /// Merges a gap with its neighbours.
    fn join(&mut self, disk: &Disk, at: usize) -> io::Result<()> {
        if self.touches(at) {
            self.merge(disk, at)?;
        }
        if at > 0 && self.touches(at - 1) {
            self.merge(disk, at - 1)?;
        }
        Ok(())
    }

    /// Makes one gap of two that have nothing held between them, where there are too many.
    fn bound(&mut self, disk: &Disk, held: &RangeSet) -> io::Result<()> {
        while self.all.len() > MAX_GAPS {
            let apart =
                |pair: &[GapRecord]| held.overlap(pair[0].to, pair[1].from).next().is_none();
            let Some(at) = self.all.windows(2).position(apart) else {
                break;
            };
            self.merge(disk, at)?;
        }
        Ok(())
    }

    fn touches(&self, at: usize) -> bool {
        match (self.all.get(at), self.all.get(at + 1)) {
            (Some(a), Some(b)) => a.reason == b.reason && b.from <= a.to.saturating_add(1),
            _ => false,
        }
    }

    /// Makes one gap of this one and the next. In between both are on the disk and say the same.
    fn merge(&mut self, disk: &Disk, at: usize) -> io::Result<()> {
        let (Some(&a), Some(&b)) = (self.all.get(at), self.all.get(at + 1)) else {
            return Ok(());
        };
        let reason = if a.reason == b.reason {
            a.reason
        } else {
            GapReason::Corrupt
        };
        let both = GapRecord {
            from: a.from,
            to: a.to.max(b.to),
            reason,
        };
        if both != a {
            if both == b {
                disk.remove(Entry::Gap(a))?;
            } else {
                disk.rename(Entry::Gap(a), Entry::Gap(both))?;
            }
        }
        if both != b {
            disk.remove(Entry::Gap(b))?;
        }
        self.all[at] = both;
        self.all.remove(at + 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(from: u64, to: u64) -> GapRecord {
        GapRecord {
            from,
            to,
            reason: GapReason::Full,
        }
    }

    #[test]
    fn neighbours_merge_and_acknowledged_parts_go() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::create(dir.path(), None).unwrap();
        let mut gaps = Gaps::default();
        let held = RangeSet::new();
        for (from, to) in [(1, 10), (21, 30), (11, 20), (40, 50)] {
            gaps.record(&disk, gap(from, to), &held).unwrap();
        }
        assert_eq!(gaps.all(), [gap(1, 30), gap(40, 50)]);
        assert_eq!(gaps.take_news().len(), 4);
        let mut stored = RangeSet::new();
        stored.insert(1, 12);
        stored.insert(40, 50);
        gaps.acknowledge(&disk, &stored).unwrap();
        assert_eq!(gaps.all(), [gap(13, 30)]);
        let again = Gaps::load(&disk, &disk.entries().unwrap()).unwrap();
        assert_eq!(again.all(), [gap(13, 30)]);
        for from in 0..400 {
            let lost = gap(1_000 + from * 2, 1_000 + from * 2);
            gaps.record(&disk, lost, &held).unwrap();
        }
        assert_eq!(gaps.all().len(), MAX_GAPS);
        assert_eq!(disk.entries().unwrap().len(), MAX_GAPS);
        assert_eq!(gaps.all()[0].from, 13);
    }
}

//! The disk has an end: the oldest goes, every loss is recorded, and what is left works.

use std::{fs, path::Path, process::Command};

use edge_agent::outbox::{Outbox, OutboxError, directory_bytes};
use mesh_core::RangeSet;

use crate::{Dice, append, reading, scratch, small};

const LARGEST: u64 = 760;

/// Everything produced is readable or in a gap.
fn account(outbox: &mut Outbox, produced: u64) -> (u64, u64) {
    let mut seen = RangeSet::new();
    let mut gaps = 0;
    for gap in outbox.gaps() {
        gaps += gap.to - gap.from + 1;
        seen.insert(gap.from, gap.to);
    }
    let (mut from, mut held) = (1, 0);
    loop {
        let readings = outbox.read(from, u64::MAX, 500_000).unwrap();
        let Some((last, _)) = readings.last() else {
            break;
        };
        from = last + 1;
        for (seq, bytes) in readings {
            assert_eq!(bytes, reading(seq, LARGEST));
            assert!(!seen.contains(seq));
            seen.insert(seq, seq);
            held += 1;
        }
    }
    assert!(seen.covers(1, produced), "{seen:?}");
    assert_eq!(held + gaps, produced);
    (held, gaps)
}

#[test]
fn the_bound_is_kept_and_every_loss_is_on_record() {
    let dir = scratch();
    let mut outbox = Outbox::open(small(dir.path())).unwrap().outbox;
    let mut produced = 0;
    let mut evicted = 0;
    for _ in 0..250 {
        let done = append(&mut outbox, 100, LARGEST).unwrap();
        produced = done.to;
        evicted += done
            .evicted
            .iter()
            .map(|gap| gap.to - gap.from + 1)
            .sum::<u64>();
        assert!(directory_bytes(dir.path()) <= edge_agent::outbox::MIN_BYTES);
    }
    let (held, gaps) = account(&mut outbox, produced);
    assert_eq!(gaps, evicted);
    assert_eq!(outbox.gaps().len(), 1, "neighbours merge");
    println!("{produced} produced, {held} held, {gaps} recorded as a gap");
    // sled writes 400-byte readings three to four times where a segment is too short for its own cleaning.
    assert!(held > 1_000, "{held}");
    drop(outbox);
    account(
        &mut Outbox::open(small(dir.path())).unwrap().outbox,
        produced,
    );
}

struct Mount<'a>(&'a Path);

impl Mount<'_> {
    /// A file system of 16 MiB, if this process may mount one.
    fn small(at: &Path) -> Option<Mount<'_>> {
        let args = ["-t", "tmpfs", "-o", "size=16m", "lacewing-test"];
        let done = Command::new("mount").args(args).arg(at).output();
        done.is_ok_and(|done| done.status.success())
            .then_some(Mount(at))
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[test]
fn a_disk_of_16_mib_fills_and_nothing_is_lost_silently() {
    let at = tempfile::tempdir().unwrap();
    let Some(_mount) = Mount::small(at.path()) else {
        println!("skipped: mounting is not permitted here");
        return;
    };
    let mut dice = Dice::new("full disk");
    let dir = at.path().join("outbox");
    let hog = at.path().join("hog");
    // It believes that it may take 64 MiB: only the disk stops it.
    let mut options = small(&dir);
    options.max_bytes = 64 * 1024 * 1024;
    let mut outbox = Outbox::open(options.clone()).unwrap().outbox;
    let (mut produced, mut refused) = (0, 0);
    for round in 0..500 {
        match append(&mut outbox, 1 + dice.below(120) as usize, LARGEST) {
            Ok(done) => produced = done.to,
            Err(OutboxError::Full) => refused += 1,
            Err(error) => panic!("round {round}: {error}"),
        }
        // Someone else takes all that is left for a while.
        match round % 100 {
            60 => {
                let size = fs::metadata(&hog).map_or(0, |meta| meta.len());
                assert_eq!(size, 0);
                let mut file = fs::File::create(&hog).unwrap();
                while std::io::Write::write_all(&mut file, &[7; 4_096]).is_ok() {}
            }
            75 => fs::remove_file(&hog).unwrap(),
            _ => {}
        }
        if dice.one_in(60) {
            drop(outbox);
            outbox = Outbox::open(options.clone()).unwrap().outbox;
        }
    }
    let (held, gaps) = account(&mut outbox, produced);
    println!(
        "{produced} produced, {held} held, {gaps} recorded as gaps, {refused} appends refused"
    );
    // How much fits depends on when the disk was full, and for whom.
    assert!(held > 1_500, "{held}");
}

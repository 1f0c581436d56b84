//! Bits flip and files are cut: it opens, says so, records the gap and keeps the rest.

use std::{
    fs,
    path::{Path, PathBuf},
};

use edge_agent::outbox::{MIN_BYTES, Options, Outbox};
use mesh_core::{GapReason, RangeSet};

use crate::{Dice, append, reading, scratch, small};

const LARGEST: u64 = 2_000;

/// Room enough that nothing is evicted, in several segments.
fn roomy(dir: &Path) -> Options {
    Options::new(dir, 2 * MIN_BYTES)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for item in fs::read_dir(dir).unwrap() {
        let path = item.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap() {
        let path = item.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target)
        } else {
            {
                fs::copy(&path, &target).unwrap();
            }
        }
    }
}

fn harm(path: &Path, dice: &mut Dice) -> String {
    let mut bytes = fs::read(path).unwrap();
    let size = bytes.len() as u64;
    if size == 0 {
        fs::write(path, b"junk").unwrap();
        return format!("{}: junk", path.display());
    }
    let at = dice.below(size) as usize;
    let what = match dice.below(5) {
        0 => {
            bytes.truncate(at);
            "cut"
        }
        1 => {
            let end = bytes.len().min(at + 4_096);
            bytes[at..end].fill(0);
            "zeroed"
        }
        2 => {
            fs::remove_file(path).unwrap();
            return format!("{}: removed", path.display());
        }
        _ => {
            bytes[at] ^= 1 << dice.below(8);
            "flipped"
        }
    };
    fs::write(path, bytes).unwrap();
    format!("{}: {what} at {at} of {size}", path.display())
}

#[test]
fn damage_costs_what_is_damaged_and_never_the_start() {
    let mut dice = Dice::new("damage");
    let good = scratch();
    let mut total = 0;
    let mut outbox = Outbox::open(roomy(good.path())).unwrap().outbox;
    while total < 1_100 {
        total = append(&mut outbox, 25, LARGEST).unwrap().to;
    }
    drop(outbox);
    let (mut readable, mut lost) = (0, 0);
    for round in 0..100 {
        let dir = scratch();
        copy(good.path(), dir.path());
        let names = files(dir.path());
        let name = &names[dice.below(names.len() as u64) as usize];
        let db = names
            .iter()
            .filter(|n| n.ends_with("db"))
            .nth(dice.below(3) as usize);
        let mut done = Vec::new();
        // The epoch's name is the file; its content does not matter. Mostly the data is hit.
        done.push(harm(
            if dice.one_in(3) {
                name
            } else {
                db.unwrap_or(name)
            },
            &mut dice,
        ));
        let epoch_gone = !files(dir.path())
            .iter()
            .any(|n| n.to_string_lossy().contains("epoch-"));
        let note = format!("round {round}: {done:?}");
        println!("{note}");
        let opened = Outbox::open(roomy(dir.path())).unwrap_or_else(|e| panic!("{note}: {e}"));
        let mut outbox = opened.outbox;
        let mut got = RangeSet::new();
        let mut from = 1;
        loop {
            let readings = outbox.read(from, u64::MAX, 100_000).unwrap();
            let Some((last, _)) = readings.last() else {
                break;
            };
            from = last + 1;
            for (seq, bytes) in readings {
                assert_eq!(bytes, reading(seq, LARGEST), "{note}");
                got.insert(seq, seq);
            }
        }
        let mut gaps = RangeSet::new();
        for gap in outbox.gaps() {
            assert_eq!(gap.reason, GapReason::Corrupt, "{note}");
            assert!(gap.to <= total + 16_384, "{note}");
            gaps.insert(gap.from, gap.to);
        }
        assert!(
            epoch_gone || (1..=total).all(|seq| got.contains(seq) != gaps.contains(seq)),
            "{note}: {got:?} {gaps:?}"
        );
        readable += got.len();
        lost += total.saturating_sub(got.len());
        let next = append(&mut outbox, 3, LARGEST).unwrap();
        assert!(epoch_gone || next.from > total, "{note}: {next:?}");
        drop(outbox);
        let again = Outbox::open(roomy(dir.path())).unwrap();
        assert!(again.pending.contains(next.to), "{note}");
        assert!(
            got.iter().all(|(a, b)| again.pending.covers(a, b)),
            "{note}"
        );
    }
    println!("100 damaged outboxes: {readable} readings were read, {lost} lost");
}

#[test]
fn what_is_not_the_outbox_s_is_left_alone() {
    let dir = scratch();
    fs::create_dir(dir.path().join("lost+found")).unwrap();
    fs::write(dir.path().join("seg-notes.txt"), b"mine").unwrap();
    let mut outbox = Outbox::open(small(dir.path())).unwrap().outbox;
    append(&mut outbox, 3, LARGEST).unwrap();
    drop(outbox);
    Outbox::open(small(dir.path())).unwrap();
    assert_eq!(fs::read(dir.path().join("seg-notes.txt")).unwrap(), b"mine");
}

/// A process that is killed while sled writes its snapshot, which it does whenever it opens, leaves half of one.
#[test]
fn half_a_snapshot_costs_nothing() {
    let dir = scratch();
    for round in 1..=3 {
        let opened = Outbox::open(small(dir.path())).unwrap();
        assert!(opened.warnings.is_empty(), "{:?}", opened.warnings);
        assert_eq!(opened.pending.len(), 10 * (round - 1));
        let mut outbox = opened.outbox;
        append(&mut outbox, 10, LARGEST).unwrap();
        drop(outbox);
        let segments = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path());
        for segment in segments.filter(|path| path.is_dir()) {
            let half = segment.join("snap.7FFFFFFFFFFFFFFF.generating");
            fs::write(half, [round as u8; 40]).unwrap();
        }
    }
}

//! The process is killed at any moment: what it reported is there, and no number is given out twice.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
};

use edge_agent::outbox::{GapRecord, Outbox};
use mesh_core::{GapReason, RangeSet};

use crate::{Dice, append, reading, small};

const CHILD: &str = "LACEWING_OUTBOX_CHILD";
const LARGEST: u64 = 3_000;

/// A small outbox may have dropped its oldest when nothing was freed for long. It is on record from then on, so each
/// later life of the process opens with it, too.
fn only_full(gaps: &[GapRecord]) -> Result<(), &[GapRecord]> {
    match gaps.iter().all(|gap| gap.reason == GapReason::Full) {
        true => Ok(()),
        false => Err(gaps),
    }
}

/// Not a test: what the killed process does. It appends, frees and says each when it is done.
#[test]
fn child_of_the_kill_test() {
    let Ok(dir) = std::env::var(CHILD) else {
        return;
    };
    let mut out = std::io::stdout().lock();
    let opened = Outbox::open(small(dir.as_ref())).unwrap();
    assert!(opened.warnings.is_empty(), "{:?}", opened.warnings);
    assert_eq!(only_full(&opened.gaps), Ok(()));
    let mut outbox = opened.outbox;
    let mut dice = Dice::new("child");
    loop {
        let count = 1 + dice.below(40) as usize;
        let done = append(&mut outbox, count, LARGEST).unwrap();
        writeln!(out, "\nDONE {} {}", done.from, done.to).unwrap();
        if outbox.pending() > 300 {
            let mut stored = RangeSet::new();
            let upto = done.to - 100;
            writeln!(out, "\nFREE {upto}").unwrap();
            stored.insert(1, upto);
            outbox.free(&stored).unwrap();
        }
    }
}

#[test]
fn nothing_that_was_reported_is_lost_by_a_kill() {
    let mut dice = Dice::new("kill");
    let dir = tempfile::tempdir().unwrap();
    let (mut last, mut free) = (0, 0);
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["kill::child_of_the_kill_test", "--exact", "--nocapture"])
            .env(CHILD, dir.path())
            .env("LACEWING_SEED", dice.next().to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut before_kill = 1 + dice.below(40);
        let mut killed = false;
        // After the kill the pipe still holds what was reported before it.
        while let Some(Ok(line)) = lines.next() {
            let mut words = line.split(' ');
            let kind = words.next();
            let mut number = || {
                words
                    .next()
                    .and_then(|word| word.parse::<u64>().ok())
                    .unwrap()
            };
            match kind {
                Some("DONE") => {
                    let (from, to) = (number(), number());
                    assert!(
                        from > last,
                        "round {round}: number {from} was given out twice"
                    );
                    last = to;
                }
                Some("FREE") => free = number(),
                _ => continue,
            }
            before_kill = before_kill.saturating_sub(1);
            if before_kill == 0 && !killed {
                child.kill().unwrap();
                killed = true;
            }
        }
        child.wait().unwrap();
        assert!(killed, "the child died by itself in round {round}");
        let opened = Outbox::open(small(dir.path())).unwrap();
        assert!(opened.warnings.is_empty(), "{:?}", opened.warnings);
        let gaps = opened.gaps;
        assert_eq!(only_full(&gaps), Ok(()), "round {round}");
        let held = opened.pending;
        let mut outbox = opened.outbox;
        let mut next = free + 1;
        while next <= last {
            if let Some(gap) = gaps.iter().find(|gap| (gap.from..=gap.to).contains(&next)) {
                next = gap.to + 1;
                continue;
            }
            let before_gap = gaps.iter().map(|gap| gap.from - 1);
            let until = before_gap.filter(|to| *to >= next).min().unwrap_or(last);
            let got = outbox.read(next, until.min(last), 1_000_000).unwrap();
            assert!(!got.is_empty(), "round {round}: {next} of {last} is gone");
            for (seq, bytes) in got {
                assert_eq!(
                    seq, next,
                    "round {round}: {free} freed, {last} appended, holds {held:?}"
                );
                assert_eq!(bytes, reading(seq, LARGEST));
                next += 1;
            }
        }
        // A group that was durable but not yet reported keeps its numbers.
        last = outbox.next_seq() - 1;
    }
    println!("20 kills, {last} readings");
}

const BRIEF: &str = "LACEWING_OUTBOX_BRIEF";

/// Not a test: a process that is killed at any moment, also while it opens. Groups as a device makes them: small ones.
#[test]
fn child_that_lives_briefly() {
    let Ok(dir) = std::env::var(BRIEF) else {
        return;
    };
    let mut out = std::io::stdout().lock();
    let opened = Outbox::open(large(dir.as_ref())).unwrap();
    assert!(opened.warnings.is_empty(), "{:?}", opened.warnings);
    assert_eq!(opened.gaps, []);
    let mut outbox = opened.outbox;
    let mut dice = Dice::new("child");
    loop {
        let most = if dice.one_in(10) { 100 } else { 3 };
        let count = 1 + dice.below(most) as usize;
        let done = append(&mut outbox, count, BRIEF_LARGEST).unwrap();
        writeln!(out, "\nDONE {} {}", done.from, done.to).unwrap();
        if dice.one_in(5) {
            let from = done.to - dice.below(done.to.min(3_000));
            let _ = outbox.read(from, done.to, 200_000).unwrap();
        }
        if dice.one_in(30) {
            // Mostly some of it, sometimes all: then a new segment is begun, and the old one goes.
            let upto = match dice.below(3) {
                0 => done.to,
                _ => done.to - dice.below(done.to.min(2_000)),
            };
            let mut stored = RangeSet::new();
            stored.insert(1, upto);
            writeln!(out, "\nFREE {upto}").unwrap();
            outbox.free(&stored).unwrap();
        }
    }
}

const BRIEF_LARGEST: u64 = 400;

fn large(dir: &std::path::Path) -> edge_agent::outbox::Options {
    edge_agent::outbox::Options::new(dir, 256 << 20)
}

/// `LACEWING_KILLS` sets how often.
#[test]
fn nothing_is_lost_by_a_kill_at_any_moment_of_a_life() {
    let kills = std::env::var("LACEWING_KILLS").ok();
    let kills: u32 = kills.and_then(|n| n.parse().ok()).unwrap_or(60);
    let mut dice = Dice::new("brief");
    let dir = tempfile::tempdir().unwrap();
    let (mut last, mut free, mut read) = (0, 0, 0);
    for round in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["kill::child_that_lives_briefly", "--exact", "--nocapture"])
            .env(BRIEF, dir.path())
            .env("LACEWING_SEED", dice.next().to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let most = if dice.one_in(4) { 400_000 } else { 40_000 };
        std::thread::park_timeout(std::time::Duration::from_micros(dice.below(most)));
        child.kill().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for line in lines.map_while(Result::ok) {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["DONE", from, to] => {
                    let from: u64 = from.parse().unwrap();
                    assert!(
                        from > last,
                        "round {round}: number {from} was given out twice"
                    );
                    last = to.parse().unwrap();
                }
                ["FREE", upto] => free = free.max(upto.parse().unwrap()),
                _ => {}
            }
        }
        let status = child.wait().unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(9), "round {round}: the child died by itself");
        if dice.one_in(3) {
            // Mostly the next life finds what the last one left, and not what a look in between has mended.
            continue;
        }
        let opened = Outbox::open(large(dir.path())).unwrap();
        assert!(
            opened.warnings.is_empty(),
            "round {round}: {:?}",
            opened.warnings
        );
        assert_eq!(opened.gaps, [], "round {round}");
        let mut outbox = opened.outbox;
        let end = outbox.next_seq() - 1;
        assert!(end >= last, "round {round}: {end} of {last}");
        last = end;
        let mut next = free + 1;
        while next <= last {
            let got = outbox.read(next, last, 1_000_000).unwrap();
            assert!(!got.is_empty(), "round {round}: {next} of {last} is gone");
            for (seq, bytes) in got {
                assert_eq!(seq, next, "round {round}: {free} freed, {last} appended");
                assert_eq!(bytes, reading(seq, BRIEF_LARGEST));
                (next, read) = (next + 1, read + 1);
            }
        }
    }
    println!("{kills} kills, {last} readings, {read} read");
}

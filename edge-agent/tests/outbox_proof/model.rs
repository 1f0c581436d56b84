//! Whatever is done to it, the outbox is a queue.

use std::collections::BTreeMap;

use edge_agent::outbox::{Options, Outbox, directory_bytes};
use mesh_core::RangeSet;
use proptest::prelude::*;

use crate::{Dice, append, reading, scratch, small};

#[derive(Clone, Debug)]
enum Step {
    Append {
        count: usize,
        largest: u64,
    },
    /// Free this share (of 8) of what is held, from the start.
    FreeFirst(u64),
    /// Free a stretch somewhere.
    Free {
        at: u64,
        count: u64,
    },
    Read {
        at: u64,
        count: u64,
        bytes: usize,
    },
    FreeGaps,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (1usize..60, prop_oneof![Just(400u64), Just(3_000), Just(4_200)])
            .prop_map(|(count, largest)| Step::Append { count, largest }),
        1 => Just(Step::Append { count: 16, largest: 16_000 }),
        2 => (0u64..9).prop_map(Step::FreeFirst),
        2 => (0u64..1_000, 1u64..100).prop_map(|(at, count)| Step::Free { at, count }),
        3 => (0u64..1_000, 1u64..200, 1usize..200_000)
            .prop_map(|(at, count, bytes)| Step::Read { at, count, bytes }),
        1 => Just(Step::FreeGaps),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..60)
}

fn range(from: u64, to: u64) -> RangeSet {
    let mut set = RangeSet::new();
    set.insert(from, to);
    set
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn it_is_a_queue(history in steps()) {
        let dir = scratch();
        let mut outbox = Outbox::open(small(dir.path())).unwrap().outbox;
        let epoch = outbox.epoch();
        let mut held: BTreeMap<u64, u64> = BTreeMap::new();
        let (mut next, mut freed) = (1, RangeSet::new());
        for step in history {
            let at_of = |at: u64| 1 + at % next.max(1);
            match step {
                Step::Append { count, largest } => {
                    let done = append(&mut outbox, count, largest).unwrap();
                    prop_assert_eq!((done.from, done.to), (next, next + count as u64 - 1));
                    held.extend((done.from..=done.to).map(|seq| (seq, largest)));
                    next = done.to + 1;
                    for gap in done.evicted {
                        prop_assert_eq!(held.range(gap.from..=gap.to).next().map(|(seq, _)| *seq), Some(gap.from));
                        prop_assert!(held.contains_key(&gap.to));
                        held.retain(|seq, _| *seq < gap.from || *seq > gap.to);
                    }
                }
                Step::FreeFirst(eighths) => {
                    let upto = held.keys().nth((held.len() as u64 * eighths / 8) as usize).copied().unwrap_or(next) - 1;
                    outbox.free(&range(1, upto)).unwrap();
                    held.retain(|seq, _| *seq > upto);
                    freed.insert(1, upto);
                }
                Step::Free { at, count } => {
                    let (from, to) = (at_of(at), at_of(at) + count);
                    outbox.free(&range(from, to.min(next - 1))).unwrap();
                    held.retain(|seq, _| *seq < from || *seq > to);
                    freed.insert(from, to.min(next - 1));
                }
                Step::Read { at, count, bytes } => {
                    let (from, to) = (at_of(at), at_of(at) + count);
                    let got = outbox.read(from, to, bytes).unwrap();
                    let expected: Vec<(u64, Vec<u8>)> = held.range(from..=to).map(|(seq, l)| (*seq, reading(*seq, *l))).collect();
                    prop_assert_eq!(got.is_empty(), expected.is_empty());
                    prop_assert_eq!(&got[..], &expected[..got.len()]);
                    let size: usize = got.iter().map(|(_, b)| b.len()).sum();
                    prop_assert!(size <= bytes || got.len() == 1, "{size} of {bytes}");
                    if got.len() < expected.len() {
                        prop_assert!(size + expected[got.len()].1.len() > bytes, "more would have fitted");
                    }
                }
                Step::FreeGaps => {
                    let gaps = outbox.gaps().to_vec();
                    for gap in gaps {
                        outbox.free(&range(gap.from, gap.to)).unwrap();
                        freed.insert(gap.from, gap.to);
                    }
                    prop_assert!(outbox.gaps().is_empty());
                }
                Step::Reopen => {
                    let gaps = outbox.gaps().to_vec();
                    drop(outbox);
                    let opened = Outbox::open(small(dir.path())).unwrap();
                    outbox = opened.outbox;
                    prop_assert_eq!(outbox.epoch(), epoch);
                    prop_assert_eq!(&opened.gaps, &gaps);
                    prop_assert!(opened.warnings.is_empty(), "{:?}", opened.warnings);
                    let cursor = (next > 1).then(|| (next - 1).to_string().into_bytes());
                    prop_assert_eq!(opened.cursor, cursor);
                    prop_assert!(held.keys().all(|seq| opened.pending.contains(*seq)), "a held reading is gone");
                    // What was acknowledged out of order may come back; nothing else may.
                    for (from, to) in opened.pending.iter() {
                        prop_assert!((from..=to).all(|seq| held.contains_key(&seq) || freed.contains(seq)));
                    }
                    outbox.free(&freed).unwrap();
                }
            }
            prop_assert_eq!(outbox.pending(), held.len() as u64);
            prop_assert!(directory_bytes(dir.path()) <= edge_agent::outbox::MIN_BYTES, "the bound is kept");
            prop_assert!(outbox.gaps().len() < 100);
        }
    }
}

#[test]
fn a_drained_outbox_gives_its_space_back() {
    let dir = scratch();
    let mut options = small(dir.path());
    options.max_bytes = 256 * 1024 * 1024;
    let mut outbox = Outbox::open(options.clone()).unwrap().outbox;
    for _ in 0..200 {
        append(&mut outbox, 100, 760).unwrap();
    }
    let peak = directory_bytes(dir.path());
    drop(outbox);
    let opened = Outbox::open(options).unwrap();
    let mut outbox = opened.outbox;
    assert_eq!(opened.pending.len(), 20_000);
    let mut next = 1;
    while outbox.pending() > 0 {
        let got = outbox.read(next, u64::MAX, 100_000).unwrap();
        next = got.last().unwrap().0 + 1;
        outbox.free(&range(1, next - 1)).unwrap();
    }
    assert_eq!(next, 20_001);
    let rest = directory_bytes(dir.path());
    println!("peak {peak} bytes, after the drain {rest}");
    assert!(rest < 1024 * 1024, "{rest}");
}

#[test]
fn what_is_refused_is_as_if_never_tried() {
    use edge_agent::outbox::{Options, OutboxError};
    let dir = scratch();
    let mut outbox = Outbox::open(small(dir.path())).unwrap().outbox;
    assert!(matches!(
        Outbox::open(small(dir.path())),
        Err(OutboxError::InUse(_))
    ));
    assert!(matches!(
        Outbox::open(Options::new(dir.path(), 1_000)),
        Err(OutboxError::TooSmall(1_000))
    ));
    let ok = |seq: u64| Ok::<_, std::io::Error>(seq.to_string().into_bytes());
    assert!(matches!(
        outbox.append(0, ok, b""),
        Err(OutboxError::Group { .. })
    ));
    assert!(matches!(
        outbox.append(1_025, ok, b""),
        Err(OutboxError::Group { .. })
    ));
    assert!(matches!(
        outbox.append(1, ok, &[0; 5_000]),
        Err(OutboxError::Cursor(5_000))
    ));
    let large = |_| Ok::<_, std::io::Error>(vec![0; 16_385]);
    assert!(matches!(
        outbox.append(1, large, b""),
        Err(OutboxError::Reading { seq: 1, .. })
    ));
    let full = |_| Ok::<_, std::io::Error>(vec![0; 16_384]);
    assert!(matches!(
        outbox.append(17, full, b""),
        Err(OutboxError::Group { .. })
    ));
    let fails = |seq| {
        if seq < 3 {
            ok(seq)
        } else {
            Err(std::io::Error::other("no"))
        }
    };
    assert!(matches!(
        outbox.append(5, fails, b""),
        Err(OutboxError::Encode(_))
    ));
    assert_eq!(
        (outbox.pending(), outbox.append(1, ok, b"").unwrap().from),
        (0, 1)
    );
}

/// A full segment gives back what it took ahead. sled goes on in units that it freed before, so the unit with the
/// newest readings need not be the last one in the file: what is given back must lie behind all of them.
#[test]
fn full_segments_give_back_all_that_they_took() {
    let mut dice = Dice::new("full_segments_give_back_all_that_they_took");
    // Groups of up to so many, of up to so many bytes each.
    for (round, (group, largest)) in [(400, 700), (100, 900), (100, 100), (1, 1_500)]
        .into_iter()
        .enumerate()
    {
        let dir = scratch();
        let options = Options::new(dir.path(), 256 * 1024 * 1024);
        let mut outbox = Outbox::open(options.clone()).unwrap().outbox;
        while outbox.pending() < 50_000 {
            let count = 1 + dice.below(group) as usize;
            append(&mut outbox, count, largest).unwrap();
        }
        let last = outbox.next_seq() - 1;
        for reopened in [false, true] {
            if reopened {
                drop(outbox);
                let opened = Outbox::open(options.clone()).unwrap();
                assert!(opened.warnings.is_empty(), "{:?}", opened.warnings);
                assert!(opened.gaps.is_empty(), "{:?}", opened.gaps);
                assert_eq!(opened.pending.len(), last);
                outbox = opened.outbox;
            }
            let mut next = 1;
            while next <= last {
                let got = outbox.read(next, u64::MAX, 1 << 20).unwrap();
                assert!(
                    !got.is_empty(),
                    "round {round}: nothing from {next} on, of {last}"
                );
                for (seq, bytes) in got {
                    assert_eq!(seq, next, "round {round}");
                    assert_eq!(bytes, reading(seq, largest));
                    next += 1;
                }
            }
        }
    }
}

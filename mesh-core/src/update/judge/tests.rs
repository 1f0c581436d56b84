use alloc::vec::Vec;

use super::*;
use crate::testing::Dice;

const LABELS: [&str; 4] = ["ok", "hole", "stain", "scratch"];

/// How a new model differs from the old one. The old one is right on 90 frames of 100 and knows three labels.
#[derive(Clone, Copy, Debug)]
enum New {
    Identical,
    /// Differs on some frames in a hundred, and is a little less sure.
    Differs(f32),
    /// Knows a fourth label, which is on 20 frames in a hundred.
    OneMore,
    /// Recognises what was unknown to the old one.
    KnowsMore,
    /// Is 2 times slower.
    Larger,
    OneClass,
    /// The same where all but one frame in ten show one class.
    OneClassOfFew,
    Swapped,
    Garbage,
    NaN,
    Slow,
    Stutters,
    Unsure,
    /// Sees holes where the old one was not sure.
    Shifts,
}

fn said(label: &str, score: f32, ms: f32) -> Said {
    Said {
        label: label.into(),
        score,
        finite: true,
        sure: score >= 0.8 && label != UNKNOWN,
        shared: label != LABELS[3],
        ms,
    }
}

/// A frame as both models see it.
fn frame(kind: New, dice: &mut Dice) -> (Said, Said) {
    let truth = match (kind, dice.unit()) {
        (New::OneClassOfFew, x) => usize::from(x > 0.9),
        (New::OneMore, x) if x < 0.2 => 3,
        (_, x) if x < 0.5 => 0,
        (_, x) if x < 0.8 => 1,
        _ => 2,
    };
    let sure = dice.chance(0.8);
    let score = if sure {
        0.8 + 0.2 * dice.unit()
    } else {
        0.5 + 0.3 * dice.unit()
    };
    let old_label = if truth == 3 || (!sure && dice.chance(0.3)) {
        dice.below(2) as usize
    } else {
        truth
    };
    let ms = 20.0 + 10.0 * dice.unit();
    let mut old = said(LABELS[old_label], score, ms);
    let mut new = old.clone();
    new.ms = 20.0 + 10.0 * dice.unit();
    match kind {
        New::Identical => {}
        New::Differs(share) => {
            new.score -= 0.05 * dice.unit();
            if dice.chance(share) {
                new.label = LABELS[dice.below(3) as usize].into();
            }
        }
        New::OneMore => new.label = LABELS[truth].into(),
        New::KnowsMore => {
            if !sure {
                old.label = UNKNOWN.into();
            }
        }
        New::Larger => new.ms *= 2.0,
        New::OneClass | New::OneClassOfFew => new = said("ok", 0.99, new.ms),
        New::Swapped => new.label = LABELS[[1, 0, 2, 3][old_label]].into(),
        New::Garbage => new = said(LABELS[dice.below(3) as usize], dice.unit(), new.ms),
        New::NaN => new.finite = !dice.chance(0.1),
        New::Slow => new.ms *= 4.0,
        New::Stutters => new.ms *= if dice.chance(0.1) { 20.0 } else { 1.0 },
        New::Unsure => new.score *= 0.6,
        New::Shifts => {
            if !sure {
                old.score = 0.5;
                old.label = LABELS[0].into();
                new.label = LABELS[1].into();
            }
            // More of those than elsewhere.
            if dice.chance(0.3) {
                (old, new) = (said("ok", 0.5, 20.0), said("hole", 0.5, 20.0));
            }
        }
    }
    new.shared = new.label != LABELS[3];
    (new, old)
}

/// The verdict and the number of frames that it took, at most `frames`.
fn judge(kind: New, seed: u64, frames: u32) -> (Verdict, u32) {
    let mut dice = Dice(seed);
    let mut judge = Judge::new(Limits::default(), Health::default());
    for n in 1..=frames {
        let (new, old) = frame(kind, &mut dice);
        judge.see(&new, Some(&old));
        match judge.verdict(n == frames) {
            Verdict::Wait => {}
            verdict => return (verdict, n),
        }
    }
    (Verdict::Wait, frames)
}

#[test]
fn each_bad_model_is_stopped_for_its_reason_and_soon() {
    for (kind, reasons, most) in [
        (
            New::OneClass,
            &[Reason::Disagreement, Reason::Collapse][..],
            60,
        ),
        (New::Swapped, &[Reason::Disagreement], 40),
        (
            New::Garbage,
            &[Reason::Disagreement, Reason::Confidence],
            60,
        ),
        (New::NaN, &[Reason::NotFinite], 100),
        (New::Slow, &[Reason::Latency], MIN_MEDIAN),
        (New::Stutters, &[Reason::Latency], 200),
        (New::Unsure, &[Reason::Confidence], 60),
        (New::Shifts, &[Reason::Balance], 200),
        (
            New::OneClassOfFew,
            &[Reason::Collapse, Reason::Disagreement],
            500,
        ),
    ] {
        let mut took = Vec::new();
        let mut missed = 0;
        for seed in 0..1_000 {
            match judge(kind, seed, 500) {
                (Verdict::Stop(reason), n) => {
                    assert!(
                        reasons.contains(&reason),
                        "{kind:?}, seed {seed}: {reason:?}"
                    );
                    took.push(n);
                }
                _ => missed += 1,
            }
        }
        took.sort_unstable();
        let (median, p99) = (took[took.len() / 2], took[took.len() * 99 / 100]);
        std::println!(
            "{kind:?}: median {median} frames, 99 of 100 within {p99}, missed {missed} of 1000"
        );
        let allowed = if matches!(kind, New::OneClassOfFew) {
            300
        } else {
            0
        };
        assert!(
            p99 <= most && missed <= allowed,
            "{kind:?}: {p99} frames, {missed} missed"
        );
    }
}

#[test]
fn a_good_model_passes() {
    for kind in [
        New::Identical,
        New::Differs(0.03),
        New::Differs(0.05),
        New::Differs(0.1),
        New::OneMore,
        New::KnowsMore,
        New::Larger,
    ] {
        let stopped = (0..1_000)
            .filter(|seed| judge(kind, *seed, 500).0 != Verdict::Go)
            .count();
        std::println!("{kind:?}: stopped {stopped} of 1000 within 500 frames");
        assert!(stopped <= 2, "{kind:?}: {stopped} false alarms in 1000");
    }
}

#[test]
fn without_an_old_model_only_the_plain_rules_hold() {
    let alone = |label: fn(u32) -> &'static str, frames: u32, limits: Limits| {
        let mut judge = Judge::new(limits, Health::default());
        (1..=frames).for_each(|n| judge.see(&said(label(n), 0.3, 50.0), None));
        judge.verdict(true)
    };
    let budget = |ms| Limits {
        latency_ms: Some(ms),
        ..Limits::default()
    };
    assert_eq!(
        alone(|_| "ok", 4_999, Limits::default()),
        Verdict::Go,
        "a scene may rest"
    );
    assert_eq!(
        alone(|_| "ok", 5_000, Limits::default()),
        Verdict::Stop(Reason::Collapse)
    );
    assert_eq!(
        alone(
            |n| ["ok", "hole"][(n % 2) as usize],
            5_000,
            Limits::default()
        ),
        Verdict::Go
    );
    assert_eq!(alone(|_| "ok", 100, budget(60.0)), Verdict::Go);
    assert_eq!(
        alone(|_| "ok", 100, budget(40.0)),
        Verdict::Stop(Reason::Latency)
    );
}

#[test]
fn heat_and_memory_count_when_they_last_and_come_from_the_trial() {
    // The device had 100 MiB in use.
    let feel = |before, limit, memory: &[u32], heat: &[f32]| {
        let health = |mib, c| Health {
            memory_mib: mib,
            temperature_c: c,
        };
        let limits = Limits {
            memory_mib: limit,
            ..Limits::default()
        };
        let mut judge = Judge::new(limits, health(Some(100), Some(before)));
        memory
            .iter()
            .for_each(|mib| judge.feel(health(Some(*mib), None)));
        heat.iter().for_each(|c| judge.feel(health(None, Some(*c))));
        judge.verdict(true)
    };
    assert_eq!(
        feel(60.0, Some(200), &[300, 300, 150], &[85.0, 85.0, 70.0]),
        Verdict::Go
    );
    for (memory, heat) in [(&[300, 150, 300][..], &[][..]), (&[], &[85.0])] {
        assert_eq!(
            feel(60.0, Some(200), memory, heat),
            Verdict::Wait,
            "not before it is known whether that was chance"
        );
    }
    assert_eq!(
        feel(60.0, Some(200), &[300, 300, 300], &[]),
        Verdict::Stop(Reason::Memory)
    );
    assert_eq!(
        feel(60.0, None, &[300; 9], &[85.0; 3]),
        Verdict::Stop(Reason::Heat)
    );
    assert_eq!(
        feel(60.0, None, &[357; 3], &[]),
        Verdict::Stop(Reason::Memory),
        "256 MiB more than before, where nothing is said"
    );
    assert_eq!(feel(60.0, None, &[356; 9], &[]), Verdict::Go);
    assert_eq!(
        feel(81.0, None, &[], &[84.0; 9]),
        Verdict::Go,
        "it was hot before"
    );
}

#[test]
fn whatever_comes_is_bounded() {
    let mut judge = Judge::new(Limits::default(), Health::default());
    for n in 0..10_000u32 {
        let mut wild = said(
            &format!("label {n}"),
            0.9,
            f32::from_bits(n.wrapping_mul(2_654_435_761)),
        );
        wild.shared = n % 3 > 0;
        judge.see(&wild, Some(&said(&format!("label {}", n / 2), 0.9, -1.0)));
    }
    assert!(judge.labels.len() <= MAX_LABELS + 1 && judge.alone.len() <= MAX_LABELS + 1);
    assert!(matches!(judge.verdict(true), Verdict::Stop(_)));
    judge.see(&said("x", f32::NAN, f32::NAN), None);
    assert_eq!(judge.verdict(true), Verdict::Stop(Reason::NotFinite));
    assert!(!judge.explain(Reason::Latency).is_empty() && judge.evidence().frames == 10_001);
}

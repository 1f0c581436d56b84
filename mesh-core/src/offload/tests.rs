use alloc::{string::ToString, vec, vec::Vec};

use proptest::prelude::*;

use super::{
    Answer, Offer,
    ask::{Asker, Asking, Chosen, Heard, Known, MAX_AWAY},
    serve::{Admission, Condition, MAX_WAITING, Refusal},
};
use crate::Digest;

const ASKING: Asking = Asking {
    escalate: true,
    spill: true,
    share: 0.3,
    below: None,
    hot: 80,
};

fn offer(digest: u8, bytes: u64) -> Offer {
    Offer {
        model: "steel@1".to_string(),
        digest: Digest([digest; 32]),
        kind: Digest([7; 32]),
        bytes,
    }
}

fn known(peer: u8, load: u8, offers: Vec<Offer>) -> Known {
    Known {
        peer: Digest([peer; 32]),
        load,
        offers,
        far: false,
    }
}

fn asker(asking: Asking, known: Vec<Known>) -> Asker {
    let mut asker = Asker::new(asking);
    asker.know(known);
    asker
}

/// Frames that are all unsure, each answered at once by `heard`, until somebody is asked.
fn next_asked(asker: &mut Asker, now_ms: u64) -> Option<Chosen> {
    (0..40).find_map(|_| asker.escalate(&offer(1, 10), 0.1, now_ms))
}

#[test]
fn only_a_bigger_model_of_the_same_kind_knows_better() {
    let other_kind = Offer {
        kind: Digest([8; 32]),
        ..offer(3, 99)
    };
    for (offers, wanted) in [
        (vec![offer(2, 10)], None),
        (vec![offer(1, 99)], None),
        (vec![other_kind.clone()], None),
        (vec![other_kind, offer(2, 11), offer(4, 12)], Some(4)),
    ] {
        let mut asker = asker(ASKING, vec![known(1, 0, offers)]);
        let asked = next_asked(&mut asker, 0).map(|chosen| chosen.model.0[0]);
        assert_eq!(asked, wanted);
    }
    let mut off = asker(
        Asking {
            escalate: false,
            ..ASKING
        },
        vec![known(1, 0, vec![offer(2, 99)])],
    );
    assert_eq!(next_asked(&mut off, 0), None);
}

#[test]
fn the_coordinator_is_asked_where_no_neighbour_can_be() {
    let far = Known {
        far: true,
        ..known(0, 0, vec![offer(5, 1_000), offer(1, 10)])
    };
    let here = known(1, 40, vec![offer(2, 11)]);
    let mut asker = asker(ASKING, vec![far.clone(), here]);
    let peer = |chosen: Option<Chosen>| chosen.map(|chosen| chosen.peer.0[0]);
    // However much bigger its model is.
    assert_eq!(peer(next_asked(&mut asker, 0)), Some(1));
    asker.heard(&Digest([1; 32]), Heard::Refused, 0);
    let chosen = next_asked(&mut asker, 1).unwrap();
    assert_eq!((chosen.peer.0[0], chosen.model.0[0]), (0, 5));
    // It does not look either: it is left as a neighbour is, longer each time.
    let mut now_ms = 1;
    asker.heard(&chosen.peer, Heard::Missed, now_ms);
    for wait_ms in [0, 0, 5_000, 10_000, 20_000] {
        asker.know(vec![far.clone()]);
        let early = wait_ms > 0 && next_asked(&mut asker, now_ms + wait_ms - 1).is_some();
        assert!(!early, "{wait_ms}");
        now_ms += wait_ms;
        assert_eq!(peer(next_asked(&mut asker, now_ms)), Some(0), "{wait_ms}");
        asker.heard(&far.peer, Heard::Missed, now_ms);
    }
    // It relieves nobody of frames.
    let mut asker = super::tests::asker(ASKING, vec![far]);
    assert_eq!(asker.spill(&offer(1, 10), true, Some(99), 0), None);
}

#[test]
fn frames_are_spilled_to_idle_neighbours_with_the_same_model_only() {
    let own = offer(1, 10);
    let idle = known(1, 10, vec![own.clone()]);
    let busy = known(2, 90, vec![own.clone()]);
    let other = known(3, 0, vec![offer(2, 99)]);
    let spill = |neighbours: &[Known], behind, warmth| {
        asker(ASKING, neighbours.to_vec())
            .spill(&own, behind, warmth, 0)
            .map(|chosen| chosen.peer.0[0])
    };
    let all = [busy.clone(), other.clone(), idle];
    assert_eq!(spill(&all, true, None), Some(1));
    assert_eq!(spill(&all, false, Some(80)), Some(1));
    assert_eq!(spill(&all, false, Some(79)), None);
    assert_eq!(spill(&all, false, None), None);
    assert_eq!(spill(&[busy, other], true, None), None);
}

#[test]
fn who_misses_deadlines_is_left_for_longer_and_longer_and_comes_back() {
    let mut asker = asker(ASKING, vec![known(1, 0, vec![offer(2, 99)])]);
    let mut now = 0;
    for _ in 0..3 {
        let chosen = next_asked(&mut asker, now).unwrap();
        asker.heard(&chosen.peer, Heard::Missed, now);
    }
    let mut left = 5_000;
    for _ in 0..9 {
        assert_eq!(
            next_asked(&mut asker, now + left - 1),
            None,
            "left for {left} ms"
        );
        now += left;
        let chosen = next_asked(&mut asker, now).unwrap();
        assert_eq!(next_asked(&mut asker, now), None, "one at a time");
        asker.heard(&chosen.peer, Heard::Missed, now);
        left = (left * 2).min(300_000);
    }
    now += left;
    let chosen = next_asked(&mut asker, now).unwrap();
    asker.heard(&chosen.peer, Heard::Answered(20), now);
    // As if nothing had been: two at once.
    assert!(next_asked(&mut asker, now).is_some() && next_asked(&mut asker, now).is_some());
}

#[test]
fn who_refuses_is_left_for_a_moment_and_who_talks_nonsense_at_once() {
    let neighbours = vec![
        known(1, 0, vec![offer(2, 99)]),
        known(2, 0, vec![offer(2, 99)]),
    ];
    for (heard, until) in [(Heard::Refused, 1_000), (Heard::Nonsense, 5_000)] {
        let mut asker = asker(ASKING, neighbours.clone());
        let chosen = next_asked(&mut asker, 0).unwrap();
        asker.heard(&chosen.peer, heard, 0);
        let mut asked = Vec::new();
        while let Some(other) = next_asked(&mut asker, until - 1) {
            asked.push(other.peer);
        }
        assert!(
            !asked.is_empty() && !asked.contains(&chosen.peer),
            "{heard:?}"
        );
        assert_eq!(
            next_asked(&mut asker, until).map(|c| c.peer),
            Some(chosen.peer)
        );
    }
}

#[test]
fn the_quicker_of_two_is_asked() {
    let neighbours = vec![
        known(1, 0, vec![offer(2, 99)]),
        known(2, 0, vec![offer(2, 99)]),
    ];
    let mut asker = asker(ASKING, neighbours);
    for _ in 0..2 {
        let chosen = next_asked(&mut asker, 0).unwrap();
        let ms = if chosen.peer.0[0] == 1 { 90 } else { 20 };
        asker.heard(&chosen.peer, Heard::Answered(ms), 0);
    }
    for _ in 0..9 {
        let chosen = next_asked(&mut asker, 0).unwrap();
        assert_eq!(chosen.peer.0[0], 2);
        asker.heard(&chosen.peer, Heard::Answered(20), 0);
    }
}

#[test]
fn what_no_model_says_is_not_believed() {
    let good = Answer {
        model: "m@1".to_string(),
        label: "hole".to_string(),
        score: 0.9,
        margin: 0.8,
    };
    let knows = |label: &str| label == "hole";
    assert!(good.is_sound(knows));
    let with = |change: &dyn Fn(&mut Answer)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad.is_sound(knows)
    };
    assert!(!with(&|a| a.label = "cat".to_string()));
    assert!(!with(&|a| a.score = f32::NAN));
    assert!(!with(&|a| a.margin = 1.5));
    assert!(!with(&|a| a.model = "m".repeat(200)));
    assert!(!with(&|a| a.model.clear()));
}

/// What a neighbour does with a frame.
fn fate() -> impl Strategy<Value = Option<Heard>> {
    prop_oneof![
        4 => (1_u64..400).prop_map(|ms| Some(Heard::Answered(ms))),
        1 => Just(Some(Heard::Refused)),
        1 => Just(Some(Heard::Missed)),
        1 => Just(Some(Heard::Nonsense)),
        // It comes later.
        2 => Just(None),
    ]
}

proptest! {
    /// Whatever the frames, the neighbours and their answers: never more than the share, from the first frame on; never
    /// more than a few away; and who is away comes back to the count.
    #[test]
    fn the_share_is_never_exceeded(
        share in 0.0_f32..=1.0,
        below in prop::option::of(0.0_f32..=1.0),
        frames in prop::collection::vec((0.0_f32..=1.0, fate(), 0_u64..500, any::<bool>()), 1..600),
    ) {
        let asking = Asking { share, below, ..ASKING };
        let everybody = vec![
            known(1, 0, vec![offer(2, 99)]),
            known(2, 50, vec![offer(3, 98), offer(1, 10)]),
            known(3, 0, vec![offer(3, 98)]),
        ];
        let mut asker = asker(asking, everybody.clone());
        let (mut asked, mut now) = (0_u32, 0);
        let mut away = Vec::new();
        for (n, (margin, fate, passed, stays)) in frames.into_iter().enumerate() {
            now += passed;
            if !stays {
                asker.know(everybody[..n % 4].to_vec());
            }
            if let Some(chosen) = asker.escalate(&offer(1, 10), margin, now) {
                prop_assert!(below.is_none_or(|below| margin <= below));
                asked += 1;
                away.push(chosen.peer);
            }
            prop_assert!(f64::from(asked) <= f64::from(share) * (n + 1) as f64 + 1e-6);
            prop_assert!(asker.away() == away.len() && away.len() <= MAX_AWAY);
            if let Some(heard) = fate && !away.is_empty() {
                asker.heard(&away.swap_remove(0), heard, now);
            }
        }
    }

    /// Where neighbours answer, what is allowed is nearly used, and it is used for what is least sure.
    #[test]
    fn the_share_is_used_for_what_is_least_sure(seed in any::<u64>(), share in 0.1_f32..0.5) {
        let mut asker = asker(Asking { share, ..ASKING }, vec![known(1, 0, vec![offer(2, 99)])]);
        let mut random = seed | 1;
        let (mut asked, mut above) = (0_u32, 0_u32);
        let count = 4_000_u32;
        for _ in 0..count {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let margin = (random >> 40) as f32 / (1_u64 << 24) as f32;
            if let Some(chosen) = asker.escalate(&offer(1, 10), margin, 0) {
                asked += 1;
                above += u32::from(margin > share * 1.6 + 0.05);
                asker.heard(&chosen.peer, Heard::Answered(5), 0);
            }
        }
        let allowed = share * count as f32;
        prop_assert!(asked as f32 > 0.93 * allowed, "{asked} of {allowed}");
        prop_assert!((above as f32) < 0.05 * asked as f32, "{above} of {asked}");
    }

    /// Whatever is asked of a device: others use no more than their share of its time, but for what one frame takes
    /// beyond what was expected.
    #[test]
    fn others_never_have_more_than_their_share(
        share in 0.0_f32..=1.0,
        events in prop::collection::vec((0_u64..3_000, 1_u32..200, 1_u32..1_000, 0_u32..4, any::<bool>(), any::<bool>()), 1..400),
    ) {
        const OVER: u32 = 300;
        let mut admission = Admission::new(share, 0);
        let (mut now, mut used) = (0_u64, 0_u64);
        let mut taken: Vec<u32> = Vec::new();
        for (passed, cost, deadline, kind, behind, hot) in events {
            now += passed;
            let condition = Condition { behind: behind && kind == 3, hot: hot && kind == 3 };
            let waiting: u32 = taken.iter().sum();
            match admission.admit(cost, deadline, condition, now) {
                Ok(()) => {
                    prop_assert!(!condition.behind && !condition.hot);
                    prop_assert!(taken.len() < MAX_WAITING && waiting + cost <= deadline);
                    taken.push(cost);
                }
                Err(Refusal::Full) => prop_assert_eq!(taken.len(), MAX_WAITING),
                Err(_) => {}
            }
            if kind > 0 && !taken.is_empty() {
                let cost = taken.remove(0);
                // Mostly as expected, sometimes less, sometimes more.
                let really = match kind { 1 => cost, 2 => cost / 2, _ => cost + OVER };
                admission.done(cost, really);
                used += u64::from(really);
            }
            prop_assert_eq!(admission.waiting(), taken.len());
            let over = u64::from(OVER) * (MAX_WAITING as u64 + 1);
            prop_assert!(used as f64 <= f64::from(share) * now as f64 + over as f64 + 1e-3);
        }
    }
}

#[test]
fn time_that_was_not_used_is_kept_for_a_while_only() {
    let mut admission = Admission::new(0.25, 0);
    let ready = Condition::default();
    assert_eq!(admission.admit(100, 500, ready, 0), Err(Refusal::ShareUsed));
    assert_eq!(admission.admit(100, 500, ready, 400), Ok(()));
    assert_eq!(
        admission.admit(401, 500, ready, 9_000),
        Err(Refusal::TooLate)
    );
    admission.done(100, 100);
    // A day later there are 2.5 s, not six hours.
    let mut frames = 0;
    while admission.admit(100, 500, ready, 86_400_000).is_ok() {
        admission.done(100, 100);
        frames += 1;
    }
    assert_eq!(frames, 25);
}

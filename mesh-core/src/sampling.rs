//! Which frames are worth keeping: uncertain ones, new ones, and a few drawn by lot, within a budget.
//!
//! The lot is drawn before anybody looks at the result, and a frame that is drawn is [`SampleReason::Random`]
//! whatever else it is: the random samples stay a fair picture of all frames, from which accuracy and drift can
//! be estimated. For the same reason their budget is their own, and whether one fits it never depends on its size.

use alloc::{vec, vec::Vec};

use crate::SampleReason;

/// A day in milliseconds.
const DAY_MS: f64 = 24.0 * 3_600.0 * 1_000.0;
/// This share of a day's budget may be spent at once: two hours' worth, so that a bad hour leaves the rest of the
/// day its samples.
const BURST: f64 = 1.0 / 12.0;

/// The kinds of budget, in the order of [`SampleReason::ALL`], as shares of a day's bytes. What people say, and what a
/// trial shows, is not held back by what the device finds by itself, but a button that is stuck does not fill the disk either.
const SHARES: [f64; SampleReason::ALL.len()] = [1.0, 1.0, 0.4, 0.4, 0.2, 0.2];

/// When a frame is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// A top score below this is uncertain, 0..=1.
    pub min_score: f32,
    /// A margin below this is uncertain, 0..=1.
    pub min_margin: f32,
    /// An entropy above this is uncertain, 0..=1.
    pub max_entropy: f32,
    /// A novelty above this is novel; 1 lets one training image in a hundred pass.
    pub novelty: f32,
    /// The share of all frames that is drawn by lot, 0..=1.
    pub random: f64,
    /// Bytes of samples that the device finds by itself in 24 hours.
    pub day_bytes: u64,
    /// The least time between two uncertain or two novel samples of one source, in milliseconds: what is strange
    /// for a minute is one lesson, not a thousand.
    pub apart_ms: u64,
}

/// What is known about a frame.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Look {
    /// The top score, 0..=1.
    pub score: f32,
    /// How far the second lies behind, 0..=1.
    pub margin: f32,
    /// How unsure the scores are, 0..=1.
    pub entropy: f32,
    /// Distance from what training saw, in units of its 99th percentile, where that is known.
    pub novelty: Option<f32>,
}

/// What the samples of one reason have come to since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// How many were dealt with, kept or dropped on the way.
    pub done: u64,
    /// What those that were kept take, in bytes.
    pub bytes: u64,
}

/// The ledger of one reason: a token bucket that may be overdrawn by the frame that empties it. It never asks how
/// large a frame is before it takes it, so large ones are not at a disadvantage.
#[derive(Clone, Debug)]
struct Ledger {
    /// Bytes that may be spent now; negative while overdrawn.
    level: f64,
    most: f64,
    per_ms: f64,
    at_ms: u64,
    /// Taken, and not yet known to the byte.
    open: u64,
    /// What was set aside for those.
    aside: f64,
    seen: Used,
}

impl Ledger {
    fn new(day_bytes: f64) -> Self {
        let most = day_bytes * BURST;
        Self {
            level: most,
            most,
            // A full burst and a day of refilling make one day's budget.
            per_ms: (day_bytes - most) / DAY_MS,
            at_ms: 0,
            open: 0,
            aside: 0.0,
            seen: Used::default(),
        }
    }

    fn settle(&mut self, used: Used, now_ms: u64) {
        let passed = now_ms.saturating_sub(self.at_ms);
        self.at_ms = self.at_ms.max(now_ms);
        self.level = self.most.min(self.level + passed as f64 * self.per_ms);
        let done = used.done.saturating_sub(self.seen.done).min(self.open);
        if done > 0 {
            let back = self.aside * done as f64 / self.open as f64;
            self.open -= done;
            self.aside -= back;
            self.level += back;
        }
        self.level -= used.bytes.saturating_sub(self.seen.bytes) as f64;
        self.seen = used;
    }

    /// Takes one frame, if anything is left.
    fn take(&mut self) -> bool {
        if self.level <= 0.0 {
            return false;
        }
        let guess = match self.seen {
            Used { done, bytes } if done > 0 && bytes > 0 => bytes as f64 / done as f64,
            _ => FIRST_GUESS,
        };
        self.open += 1;
        self.aside += guess;
        self.level -= guess;
        true
    }
}

/// A sample's size before there was one: an image of a megapixel.
const FIRST_GUESS: f64 = 128.0 * 1024.0;

/// Decides for all sources of a device. Time is an argument: milliseconds of any clock that only goes forward.
#[derive(Clone, Debug)]
pub struct Sampler {
    policy: Policy,
    ledgers: [Ledger; SampleReason::ALL.len()],
    /// When each source last gave a novel, an uncertain and a disputed sample.
    last_ms: Vec<[Option<u64>; 3]>,
}

impl Sampler {
    /// Has kept nothing yet. Sources are numbered from 0.
    #[must_use]
    pub fn new(policy: Policy, sources: usize) -> Self {
        Self {
            ledgers: SHARES.map(|share| Ledger::new(policy.day_bytes as f64 * share)),
            last_ms: vec![[None; 3]; sources],
            policy,
        }
    }

    /// Draws the lot of a frame that nobody has looked at yet; `random` is any evenly drawn number.
    #[must_use]
    pub fn draw(&self, random: u64) -> bool {
        // 53 bits make an even share of 0..1 (as f64 holds them exactly).
        let share = (random >> 11) as f64 / (1u64 << 53) as f64;
        share < self.policy.random
    }

    /// Why to keep the frame, if at all. `drawn` is what [`Sampler::draw`] said of it; `used` what became of the
    /// samples so far, in the order of [`SampleReason::ALL`].
    pub fn decide(
        &mut self,
        source: usize,
        drawn: bool,
        look: &Look,
        used: &[Used; SampleReason::ALL.len()],
        now_ms: u64,
    ) -> Option<SampleReason> {
        self.settle(used, now_ms);
        if drawn && self.take(SampleReason::Random) {
            return Some(SampleReason::Random);
        }
        // What nobody has seen before is rarer than what is hard to tell.
        let reasons = [
            (SampleReason::Novel, self.is_novel(look)),
            (SampleReason::Uncertain, self.is_uncertain(look)),
        ];
        let mut reasons = (0..).zip(reasons);
        reasons.find_map(|(at, (reason, is_so))| {
            (is_so && self.apart(source, at, reason, now_ms)).then_some(reason)
        })
    }

    /// May a frame be kept on which a model on trial contradicts the one that runs?
    pub fn disputed(
        &mut self,
        source: usize,
        used: &[Used; SampleReason::ALL.len()],
        now_ms: u64,
    ) -> bool {
        self.settle(used, now_ms);
        self.apart(source, 2, SampleReason::Disputed, now_ms)
    }

    /// Takes one of a source, if the last for this reason, the `at`-th, is long enough ago.
    fn apart(&mut self, source: usize, at: usize, reason: SampleReason, now_ms: u64) -> bool {
        let last = (self.last_ms.get(source)).and_then(|times| times.get(at).copied().flatten());
        let apart = last.is_none_or(|last| now_ms.saturating_sub(last) >= self.policy.apart_ms);
        if !apart || !self.take(reason) {
            return false;
        }
        if let Some(last) = self.last_ms.get_mut(source).and_then(|t| t.get_mut(at)) {
            *last = Some(now_ms);
        }
        true
    }

    /// May a frame be kept because somebody marked it? Only a flood of marks is held back.
    pub fn marked(
        &mut self,
        reason: SampleReason,
        used: &[Used; SampleReason::ALL.len()],
        now_ms: u64,
    ) -> bool {
        self.settle(used, now_ms);
        matches!(reason, SampleReason::Wrong | SampleReason::Missed) && self.take(reason)
    }

    fn is_uncertain(&self, look: &Look) -> bool {
        look.score < self.policy.min_score
            || look.margin < self.policy.min_margin
            || look.entropy > self.policy.max_entropy
    }

    fn is_novel(&self, look: &Look) -> bool {
        look.novelty.is_some_and(|n| n > self.policy.novelty)
    }

    fn settle(&mut self, used: &[Used; SampleReason::ALL.len()], now_ms: u64) {
        for (ledger, used) in self.ledgers.iter_mut().zip(used) {
            ledger.settle(*used, now_ms);
        }
    }

    fn take(&mut self, reason: SampleReason) -> bool {
        SampleReason::ALL
            .iter()
            .position(|r| *r == reason)
            .and_then(|at| self.ledgers.get_mut(at))
            .is_some_and(Ledger::take)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NONE: [Used; SampleReason::ALL.len()] =
        [Used { done: 0, bytes: 0 }; SampleReason::ALL.len()];
    const DAY: u64 = 24 * 3_600 * 1_000;

    fn policy() -> Policy {
        Policy {
            min_score: 0.6,
            min_margin: 0.2,
            max_entropy: 0.6,
            novelty: 1.0,
            random: 0.002,
            day_bytes: 20 << 20,
            apart_ms: 10_000,
        }
    }

    const SURE: Look = Look {
        score: 0.99,
        margin: 0.98,
        entropy: 0.05,
        novelty: Some(0.4),
    };

    #[test]
    fn each_reason_has_its_sign() {
        let why = |look: Look| Sampler::new(policy(), 1).decide(0, false, &look, &NONE, 0);
        assert_eq!(why(SURE), None);
        for look in [
            Look { score: 0.5, ..SURE },
            Look {
                margin: 0.1,
                ..SURE
            },
            Look {
                entropy: 0.7,
                ..SURE
            },
        ] {
            assert_eq!(why(look), Some(SampleReason::Uncertain));
        }
        let novel = Look {
            novelty: Some(1.2),
            score: 0.1,
            ..SURE
        };
        assert_eq!(why(novel), Some(SampleReason::Novel));
        assert_eq!(
            why(Look {
                novelty: None,
                ..SURE
            }),
            None
        );
        assert_eq!(
            why(Look {
                novelty: Some(f32::NAN),
                ..SURE
            }),
            None
        );
    }

    #[test]
    fn one_strange_minute_is_one_lesson_for_each_source() {
        let mut sampler = Sampler::new(policy(), 2);
        let doubt = Look { score: 0.3, ..SURE };
        let (mut used, mut kept) = (NONE, [0; 2]);
        for now in (0..60_000).step_by(100) {
            for (source, kept) in kept.iter_mut().enumerate() {
                if sampler.decide(source, false, &doubt, &used, now).is_some() {
                    *kept += 1;
                    used[2].done += 1;
                    used[2].bytes += 10_000;
                }
            }
        }
        assert_eq!(kept, [6, 6]);
        // A source that nobody announced is no reason to panic.
        assert_eq!(sampler.decide(9, false, &SURE, &NONE, 60_000), None);
    }

    #[test]
    fn people_are_heard_beside_everything_else_and_a_stuck_button_is_not() {
        let mut sampler = Sampler::new(policy(), 1);
        let mut heard = 0;
        for _ in 0..100_000 {
            heard += u64::from(sampler.marked(SampleReason::Wrong, &NONE, 0));
        }
        assert!((10..=20).contains(&heard), "{heard}");
        assert!(sampler.marked(SampleReason::Missed, &NONE, 0));
        assert!(!sampler.marked(SampleReason::Random, &NONE, 0));
        assert!(sampler.marked(SampleReason::Wrong, &NONE, DAY / 2));
    }

    /// What is dropped on the way costs nothing.
    #[test]
    fn what_was_not_kept_is_given_back() {
        let mut sampler = Sampler::new(
            Policy {
                random: 1.0,
                ..policy()
            },
            1,
        );
        let mut used = NONE;
        for n in 1..1_000 {
            assert_eq!(
                sampler.decide(0, true, &SURE, &used, 0),
                Some(SampleReason::Random)
            );
            used[4] = Used { done: n, bytes: 0 };
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// Whatever the frames: no day costs more than its budget (and the frame that emptied the ledger), and no
        /// hour takes more than a fifth of it.
        #[test]
        fn the_budget_holds(
            steps in prop::collection::vec((1u64..400_000, 0f32..1.0, 0f32..2.0, any::<u64>(), 1_000u64..200_000), 1..1_500),
            share in 0f64..1.0,
        ) {
            let policy = Policy { random: share, apart_ms: 0, ..policy() };
            let mut sampler = Sampler::new(policy, 1);
            let (mut used, mut now, mut kept) = (NONE, 0, Vec::new());
            for (pause, score, novelty, random, bytes) in steps {
                now += pause;
                let look = Look { score, novelty: Some(novelty), ..SURE };
                let drawn = sampler.draw(random);
                if let Some(reason) = sampler.decide(0, drawn, &look, &used, now) {
                    let at = SampleReason::ALL.iter().position(|r| *r == reason).unwrap();
                    used[at].done += 1;
                    used[at].bytes += bytes;
                    kept.push((now, bytes));
                }
            }
            let most_within = |window: u64| {
                (0..kept.len()).map(|from| {
                    let end = kept[from].0 + window;
                    kept[from..].iter().take_while(|(at, _)| *at < end).map(|(_, b)| b).sum::<u64>()
                }).max().unwrap_or(0)
            };
            // Each of three ledgers may be overdrawn by one frame.
            let over = 3 * 200_000;
            prop_assert!(most_within(DAY) <= policy.day_bytes + over);
            prop_assert!(most_within(DAY / 24) <= policy.day_bytes / 5 + over);
        }

        /// The random samples say nothing about the results: they are the same frames, whatever the model says.
        #[test]
        fn the_lot_is_blind(lots in prop::collection::vec(any::<u64>(), 1..400), looks in prop::collection::vec((0f32..1.0, 0f32..2.0), 400)) {
            let policy = Policy { random: 0.1, ..policy() };
            let random = |look: &dyn Fn(usize) -> Look| {
                let mut sampler = Sampler::new(policy, 1);
                let mut used = NONE;
                lots.iter().enumerate().filter(|(n, lot)| {
                    let drawn = sampler.draw(**lot);
                    let why = sampler.decide(0, drawn, &look(*n), &used, *n as u64 * 1_000);
                    for (at, reason) in SampleReason::ALL.iter().enumerate() {
                        if Some(*reason) == why {
                            used[at].done += 1;
                            used[at].bytes += 60_000;
                        }
                    }
                    why == Some(SampleReason::Random)
                }).map(|(n, _)| n).collect::<Vec<_>>()
            };
            let mixed = random(&|n| Look { score: looks[n].0, novelty: Some(looks[n].1), ..SURE });
            prop_assert_eq!(mixed, random(&|_| SURE));
        }
    }

    #[test]
    fn the_lot_is_as_large_as_was_asked_for() {
        let sampler = Sampler::new(
            Policy {
                random: 0.01,
                ..policy()
            },
            1,
        );
        // An even sequence (Weyl, by the golden ratio).
        let drawn = (0..100_000u64)
            .filter(|n| sampler.draw(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
            .count();
        assert!((950..1_050).contains(&drawn), "{drawn}");
        let all = Sampler::new(
            Policy {
                random: 1.0,
                ..policy()
            },
            1,
        );
        let none = Sampler::new(
            Policy {
                random: 0.0,
                ..policy()
            },
            1,
        );
        assert!(all.draw(u64::MAX) && !none.draw(0));
    }
}

//! Results of one source that wait for one that is away: they become readings in the order of their frames.

use std::collections::VecDeque;

use mesh_core::offload::Answered;

/// Results that wait: a second of a fast camera.
const MAX_HELD: usize = 32;
/// What they may take in memory.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// What one waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Away {
    /// Of the errand.
    pub(crate) number: u64,
    /// It is not waited for any longer than that.
    pub(crate) until_ms: u64,
}

#[derive(Debug)]
enum State {
    Away(Away),
    /// There is nothing to wait for (any more).
    Ready(Option<Answered>),
}

#[derive(Debug)]
struct Item<T> {
    what: T,
    bytes: usize,
    state: State,
}

/// The line of one source.
#[derive(Debug)]
pub(crate) struct Held<T> {
    items: VecDeque<Item<T>>,
    bytes: usize,
}

impl<T> Default for Held<T> {
    fn default() -> Self {
        Self {
            items: VecDeque::new(),
            bytes: 0,
        }
    }
}

impl<T> Held<T> {
    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Puts a result at the end, which takes so many bytes of memory.
    pub(crate) fn push(&mut self, what: T, bytes: usize, away: Option<Away>) {
        self.bytes += bytes;
        let state = away.map_or(State::Ready(None), State::Away);
        self.items.push_back(Item { what, bytes, state });
    }

    /// An errand is back, with or without an answer; false if nobody waits for it any more.
    pub(crate) fn back(&mut self, number: u64, answer: Option<Answered>) -> bool {
        let waits =
            |item: &&mut Item<T>| matches!(&item.state, State::Away(away) if away.number == number);
        match self.items.iter_mut().find(waits) {
            Some(item) => {
                item.state = State::Ready(answer);
                true
            }
            None => false,
        }
    }

    /// The first of the line, if it waits for nothing more; or if more wait than there is room for. At the end of all,
    /// `now_ms` is the end of time.
    pub(crate) fn next(&mut self, now_ms: u64) -> Option<(T, Option<Answered>)> {
        let crowded = self.items.len() > MAX_HELD || self.bytes > MAX_BYTES;
        let first = self.items.front()?;
        if matches!(&first.state, State::Away(away) if now_ms < away.until_ms) && !crowded {
            return None;
        }
        let Item { what, bytes, state } = self.items.pop_front()?;
        self.bytes -= bytes;
        let answer = match state {
            State::Ready(answer) => answer,
            State::Away(_) => None,
        };
        Some((what, answer))
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::offload::Answer;
    use proptest::prelude::*;

    use super::*;

    fn answered(label: u64) -> Answered {
        Answered {
            by: "box".parse().unwrap(),
            answer: Answer {
                model: "m@1".into(),
                label: label.to_string(),
                score: 1.0,
                margin: 1.0,
            },
        }
    }

    proptest! {
        /// Whatever comes back when: every result leaves once, in order, by its deadline, with its own answer or none;
        /// and no more wait than there is room for.
        #[test]
        fn results_leave_in_order_and_in_time(
            steps in prop::collection::vec((prop::option::of(0_u64..300), 0_u64..60, 0_usize..3 << 20, any::<u8>()), 1..200),
        ) {
            let mut held = Held::default();
            let (mut now, mut expected) = (0, 0_u64);
            let mut deadlines = Vec::new();
            let mut leave = |held: &mut Held<u64>, now, all: bool, deadlines: &[Option<u64>]| {
                while let Some((what, answer)) = held.next(if all { u64::MAX } else { now }) {
                    assert_eq!(what, expected);
                    if let Some(answer) = answer {
                        assert_eq!(answer.answer.label, what.to_string());
                    }
                    expected += 1;
                }
                let waits = deadlines.len() as u64 - expected;
                assert!(waits <= MAX_HELD as u64);
                if !all && waits > 0 {
                    let first = deadlines[usize::try_from(expected).unwrap()];
                    assert!(first.is_some_and(|until| until > now), "the first is late");
                }
            };
            for (n, (away, passed, bytes, back)) in steps.into_iter().enumerate() {
                now += passed;
                let number = n as u64;
                let away = away.map(|ms| Away { number, until_ms: now + ms });
                deadlines.push(away.map(|away| away.until_ms));
                held.push(number, bytes, away);
                leave(&mut held, now, false, &deadlines);
                let back = number.saturating_sub(u64::from(back % 8));
                held.back(back, (back % 2 == 0).then(|| answered(back)));
                leave(&mut held, now, false, &deadlines);
            }
            leave(&mut held, now, true, &deadlines);
            prop_assert!(held.is_empty() && held.bytes == 0);
            prop_assert_eq!(expected, deadlines.len() as u64);
        }
    }
}

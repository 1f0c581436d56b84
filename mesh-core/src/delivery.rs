//! What a device sends next, and when it sends it again.
//!
//! A reading waits in exactly one of three places until the coordinator has acknowledged it:
//!
//! ```text
//!  appended while online ─> live ──sent──┐
//!  appended while offline ─> backlog ────┴─sent─> in flight ──acknowledged──> gone
//!                               ▲                     │
//!                               └── no answer in time, or the connection went ──┘
//! ```
//!
//! Live readings go first, one message each. The backlog follows in batches, of which only a few may be
//! unanswered, so that it can neither hold up a live reading nor bury a coordinator that comes back.

use alloc::{collections::VecDeque, vec::Vec};

use crate::{Ack, RangeSet};

/// How a [`Delivery`] paces itself.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The most readings in one batch of the backlog.
    pub batch: u64,
    /// The most batches without an answer.
    pub batches: usize,
    /// The most readings that wait to be sent live; older ones join the backlog.
    pub live: u64,
    /// How long the first answer is waited for, in milliseconds. Doubles with each silence …
    pub patience_ms: u64,
    /// … up to this.
    pub max_patience_ms: u64,
}

impl Default for Pace {
    /// 100 readings a batch fill a TCP window of a slow link without hogging it; 4 batches cover a round
    /// trip of a second at 400 readings a second. An acknowledgement is promised within one second, so five
    /// are patient; two minutes bound what a site sends into the void while its coordinator is gone.
    fn default() -> Self {
        Self {
            batch: 100,
            batches: 4,
            live: 256,
            patience_ms: 5_000,
            max_patience_ms: 120_000,
        }
    }
}

/// What to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Send {
    /// One reading as `result`.
    Live(u64),
    /// Readings `from..=to` as `replay`.
    Replay {
        /// The first.
        from: u64,
        /// The last, inclusive.
        to: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    from: u64,
    to: u64,
    sent_ms: u64,
    replay: bool,
}

/// Live readings that were sent within this time are waited for together.
const LIVE_TOGETHER_MS: u64 = 250;

/// The state of one outbox's delivery. Times are milliseconds of a clock that only goes forward.
#[derive(Debug)]
pub struct Delivery {
    pace: Pace,
    online: bool,
    live: RangeSet,
    backlog: RangeSet,
    flights: VecDeque<Flight>,
    flying: RangeSet,
    patience_ms: u64,
}

impl Delivery {
    /// Starts offline with what the outbox holds.
    #[must_use]
    pub fn new(pace: Pace, pending: RangeSet) -> Self {
        Self {
            pace,
            online: false,
            live: RangeSet::new(),
            backlog: pending,
            flights: VecDeque::new(),
            flying: RangeSet::new(),
            patience_ms: pace.patience_ms,
        }
    }

    /// Readings `from..=to` are durable.
    pub fn appended(&mut self, from: u64, to: u64) {
        if !self.online {
            self.backlog.insert(from, to);
            return;
        }
        self.live.insert(from, to);
        while let Some((first, last)) = self.live.first()
            && self.live.len() > self.pace.live
        {
            let last = last.min(first + (self.live.len() - self.pace.live) - 1);
            self.live.remove(first, last);
            self.backlog.insert(first, last);
        }
    }

    /// The connection stands.
    pub fn connected(&mut self) {
        self.online = true;
        self.patience_ms = self.pace.patience_ms;
    }

    /// The connection is gone, and with it every certainty about what was in flight.
    pub fn disconnected(&mut self) {
        self.online = false;
        for (from, to) in core::mem::take(&mut self.live).iter() {
            self.backlog.insert(from, to);
        }
        self.recall();
    }

    /// The coordinator has stored these. They can be freed.
    pub fn acknowledged(&mut self, ack: &Ack) {
        for (from, to) in ack.stored().iter() {
            self.gone(from, to);
        }
        // After a silence any word is a sign of life: send at once what the silence swallowed.
        if self.patience_ms > self.pace.patience_ms {
            self.patience_ms = self.pace.patience_ms;
            self.recall();
        }
    }

    /// Readings `from..=to` are no longer in the outbox.
    pub fn gone(&mut self, from: u64, to: u64) {
        self.live.remove(from, to);
        self.backlog.remove(from, to);
        self.flying.remove(from, to);
        let flying = &self.flying;
        self.flights
            .retain(|f| flying.overlap(f.from, f.to).next().is_some());
    }

    /// The live reading `seq` cannot be sent live after all: it joins the backlog.
    pub fn postpone(&mut self, seq: u64) {
        if self.live.contains(seq) {
            self.live.remove(seq, seq);
            self.backlog.insert(seq, seq);
        }
    }

    /// What to send now. Call [`Delivery::sent`] when it is on its way, or nothing if it could not be sent.
    #[must_use]
    pub fn next(&self) -> Option<Send> {
        if !self.online {
            return None;
        }
        if let Some((first, _)) = self.live.first() {
            return Some(Send::Live(first));
        }
        if self.flights.iter().filter(|f| f.replay).count() >= self.pace.batches {
            return None;
        }
        let (from, last) = self.backlog.first()?;
        Some(Send::Replay {
            from,
            to: last.min(from + self.pace.batch - 1),
        })
    }

    /// This was handed to the network.
    pub fn sent(&mut self, what: Send, now_ms: u64) {
        match what {
            Send::Live(seq) => {
                self.live.remove(seq, seq);
                self.flying.insert(seq, seq);
                match self.flights.back_mut() {
                    Some(last)
                        if !last.replay
                            && last.to + 1 == seq
                            && now_ms < last.sent_ms + LIVE_TOGETHER_MS =>
                    {
                        last.to = seq;
                    }
                    _ => self.flights.push_back(Flight {
                        from: seq,
                        to: seq,
                        sent_ms: now_ms,
                        replay: false,
                    }),
                }
            }
            Send::Replay { from, to } => {
                self.backlog.remove(from, to);
                self.flying.insert(from, to);
                self.flights.push_back(Flight {
                    from,
                    to,
                    sent_ms: now_ms,
                    replay: true,
                });
            }
        }
    }

    /// Time has passed: what had no answer is sent again, more patiently each time.
    pub fn tick(&mut self, now_ms: u64) {
        let patience = self.patience_ms;
        while let Some(flight) = self.flights.front()
            && now_ms >= flight.sent_ms + patience
        {
            let unanswered: Vec<_> = self.flying.overlap(flight.from, flight.to).collect();
            self.flights.pop_front();
            for (from, to) in unanswered {
                self.flying.remove(from, to);
                self.backlog.insert(from, to);
            }
            self.patience_ms = (patience * 2).min(self.pace.max_patience_ms);
        }
    }

    /// When [`Delivery::tick`] is due, if nothing happens before.
    #[must_use]
    pub fn due_ms(&self) -> Option<u64> {
        self.flights.front().map(|f| f.sent_ms + self.patience_ms)
    }

    /// How many readings wait for their acknowledgement.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.live.len() + self.backlog.len() + self.flying.len()
    }

    /// Everything in flight goes back to the backlog.
    fn recall(&mut self) {
        self.flights.clear();
        for (from, to) in core::mem::take(&mut self.flying).iter() {
            self.backlog.insert(from, to);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PACE: Pace = Pace {
        batch: 4,
        batches: 2,
        live: 3,
        patience_ms: 100,
        max_patience_ms: 400,
    };

    fn ack(upto: u64) -> Ack {
        Ack {
            v: 1,
            epoch: 1,
            upto,
            ranges: RangeSet::new(),
        }
    }

    fn drain(delivery: &mut Delivery, now: u64) -> Vec<Send> {
        core::iter::from_fn(|| {
            let next = delivery.next()?;
            delivery.sent(next, now);
            Some(next)
        })
        .collect()
    }

    #[test]
    fn live_goes_before_the_backlog_and_the_backlog_keeps_its_window() {
        let mut backlog = RangeSet::new();
        backlog.insert(1, 20);
        let mut delivery = Delivery::new(PACE, backlog);
        assert_eq!(delivery.next(), None, "offline");
        delivery.connected();
        delivery.appended(21, 22);
        let sent = drain(&mut delivery, 0);
        assert_eq!(
            sent,
            [
                Send::Live(21),
                Send::Live(22),
                Send::Replay { from: 1, to: 4 },
                Send::Replay { from: 5, to: 8 }
            ]
        );
        delivery.appended(23, 23);
        assert_eq!(
            delivery.next(),
            Some(Send::Live(23)),
            "a full window does not hold up the live reading"
        );
        delivery.acknowledged(&ack(4));
        assert_eq!(
            drain(&mut delivery, 1),
            [Send::Live(23), Send::Replay { from: 9, to: 12 }]
        );
        assert_eq!(delivery.waiting(), 19);
    }

    #[test]
    fn silence_is_met_with_patience_and_ended_by_any_word() {
        let mut delivery = Delivery::new(PACE, RangeSet::new());
        delivery.connected();
        delivery.appended(1, 2);
        assert_eq!(drain(&mut delivery, 0).len(), 2);
        assert_eq!(delivery.due_ms(), Some(100));
        delivery.tick(99);
        assert_eq!(delivery.next(), None);
        delivery.tick(100);
        assert_eq!(drain(&mut delivery, 100), [Send::Replay { from: 1, to: 2 }]);
        assert_eq!(delivery.due_ms(), Some(300), "twice as patient");
        delivery.acknowledged(&ack(0));
        assert_eq!(
            drain(&mut delivery, 150),
            [Send::Replay { from: 1, to: 2 }],
            "a word, though it freed nothing"
        );
        delivery.acknowledged(&ack(2));
        assert_eq!((delivery.waiting(), delivery.due_ms()), (0, None));
    }

    #[test]
    fn more_live_readings_than_the_network_takes_join_the_backlog_oldest_first() {
        let mut delivery = Delivery::new(PACE, RangeSet::new());
        delivery.connected();
        delivery.appended(1, 10);
        assert_eq!(delivery.next(), Some(Send::Live(8)));
        delivery.disconnected();
        delivery.connected();
        assert_eq!(delivery.next(), Some(Send::Replay { from: 1, to: 4 }));
    }

    /// One thing that can happen to a device, its network or the coordinator.
    #[derive(Clone, Debug)]
    enum Step {
        Append(u64),
        Connect,
        Cut,
        /// Send one thing; the network keeps it (`true`) or loses it.
        Send(bool),
        /// The coordinator speaks; the network keeps it or loses it.
        Ack(bool),
        Wait(u64),
        /// The agent is killed and comes back with what its outbox held.
        Kill,
        /// The outbox drops its oldest reading.
        Evict,
        /// The bytes of the next live reading are not at hand.
        Postpone,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (1u64..6).prop_map(Step::Append),
            2 => Just(Step::Connect),
            1 => Just(Step::Cut),
            8 => any::<bool>().prop_map(Step::Send),
            4 => any::<bool>().prop_map(Step::Ack),
            2 => (1u64..500).prop_map(Step::Wait),
            1 => Just(Step::Kill),
            1 => Just(Step::Evict),
            1 => Just(Step::Postpone),
        ];
        prop::collection::vec(step, 0..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Whatever happens on the way: what the device holds or the coordinator stored is all there ever
        /// was, and once the network behaves everything arrives.
        #[test]
        fn every_reading_arrives(history in steps()) {
            let mut held = RangeSet::new();
            let mut evicted = RangeSet::new();
            let mut stored = RangeSet::new();
            let mut delivery = Delivery::new(PACE, RangeSet::new());
            let (mut now, mut last) = (0, 0);
            let settle = core::iter::repeat_n([Step::Connect, Step::Send(true), Step::Ack(true), Step::Wait(401)], 800).flatten();
            for step in history.into_iter().chain(settle) {
                match step {
                    Step::Append(n) => {
                        held.insert(last + 1, last + n);
                        delivery.appended(last + 1, last + n);
                        last += n;
                    }
                    Step::Connect => delivery.connected(),
                    Step::Cut => delivery.disconnected(),
                    Step::Send(arrives) => if let Some(send) = delivery.next() {
                        let (from, to) = match send { Send::Live(s) => (s, s), Send::Replay { from, to } => (from, to) };
                        prop_assert!(held.covers(from, to), "sends only what the outbox holds");
                        delivery.sent(send, now);
                        if arrives { stored.insert(from, to); }
                    },
                    Step::Ack(arrives) => if arrives {
                        let ack = Ack::of(1, &stored);
                        delivery.acknowledged(&ack);
                        for (a, b) in ack.stored().iter() { held.remove(a, b); }
                    },
                    Step::Wait(ms) => { now += ms; delivery.tick(now); }
                    Step::Postpone => if let Some(Send::Live(seq)) = delivery.next() { delivery.postpone(seq) },
                    Step::Kill => delivery = Delivery::new(PACE, held.clone()),
                    Step::Evict => if let Some((first, _)) = held.first() {
                        held.remove(first, first);
                        evicted.insert(first, first);
                        delivery.gone(first, first);
                    },
                }
                prop_assert_eq!(delivery.waiting(), held.len());
            }
            prop_assert!(held.is_empty(), "still held: {:?}", held);
            prop_assert!((1..=last).all(|s| stored.contains(s) || evicted.contains(s)));
        }
    }
}

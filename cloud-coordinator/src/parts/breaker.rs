//! When to stop asking something that fails, and when to try it again. Pure: time comes from outside.
//!
//! ```text
//!            so many failures in a row                 its time is over: one may try
//!  closed ──────────────────────────────> open ─────────────────────────────────────> half open
//!    ▲                                     ▲              the try failed: longer          │ │
//!    │                                     └──────────────────────────────────────────────┘ │
//!    └────────────────────────────────── the try went well ─────────────────────────────────┘
//! ```

/// Failures in a row after which nobody asks any more: fewer could be the bad luck of one.
pub(super) const FAILURES: u32 = 5;
/// Nobody asks for so long at first, in milliseconds: a restart of what failed.
pub(super) const FIRST_MS: u64 = 1_000;
/// The longest pause, which each failed try doubles up to: somebody who has mended it does not wait longer.
pub(super) const LONGEST_MS: u64 = 30_000;
/// Until somebody who comes while one is trying may come back, in milliseconds.
const TRYING_MS: u64 = 1_000;

/// A permission to ask. What came of it is told with it; what came of one of before does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Everybody may ask.
    Closed { failures: u32 },
    /// Nobody may, until then.
    Open { until_ms: u64, pause_ms: u64 },
    /// One is trying.
    HalfOpen { pause_ms: u64 },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Breaker {
    state: State,
    /// Counts the changes of the state.
    age: u64,
}

impl Breaker {
    pub(super) fn new() -> Self {
        Self {
            state: State::Closed { failures: 0 },
            age: 0,
        }
    }

    /// Whether everybody may ask.
    pub(super) fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed { .. })
    }

    fn turn(&mut self, state: State) {
        self.state = state;
        self.age += 1;
    }

    /// After how many milliseconds to come back; nothing if somebody may ask now.
    pub(super) fn wait(&self, now_ms: u64) -> Option<u64> {
        match self.state {
            State::Closed { .. } => None,
            State::Open { until_ms, .. } => until_ms.checked_sub(now_ms).filter(|wait| *wait > 0),
            State::HalfOpen { .. } => Some(TRYING_MS),
        }
    }

    /// May somebody ask now? If not, after how many milliseconds to come back.
    pub(super) fn ask(&mut self, now_ms: u64) -> Result<Ticket, u64> {
        if let Some(wait) = self.wait(now_ms) {
            return Err(wait);
        }
        if let State::Open { pause_ms, .. } = self.state {
            self.turn(State::HalfOpen { pause_ms });
        }
        Ok(Ticket(self.age))
    }

    /// It went well.
    pub(super) fn well(&mut self, ticket: Ticket) {
        if ticket.0 != self.age {
            return;
        }
        match &mut self.state {
            State::Closed { failures } => *failures = 0,
            _ => self.turn(State::Closed { failures: 0 }),
        }
    }

    /// It failed.
    pub(super) fn failed(&mut self, ticket: Ticket, now_ms: u64) {
        if ticket.0 != self.age {
            return;
        }
        match self.state {
            State::Closed { failures } if failures + 1 < FAILURES => {
                let failures = failures + 1;
                self.state = State::Closed { failures };
            }
            State::Closed { .. } => self.pause(now_ms, FIRST_MS),
            State::HalfOpen { pause_ms } => self.pause(now_ms, (pause_ms * 2).min(LONGEST_MS)),
            State::Open { .. } => {}
        }
    }

    fn pause(&mut self, now_ms: u64, pause_ms: u64) {
        let until_ms = now_ms.saturating_add(pause_ms);
        self.turn(State::Open { until_ms, pause_ms });
    }

    /// Nobody knows what came of it: who asked has gone. The next may try.
    pub(super) fn lost(&mut self, ticket: Ticket, now_ms: u64) {
        if let State::HalfOpen { pause_ms } = self.state
            && ticket.0 == self.age
        {
            let until_ms = now_ms;
            self.turn(State::Open { until_ms, pause_ms });
        }
    }

    /// Somebody who asked without a ticket found that it failed: that counts as long as everybody may ask.
    pub(super) fn noticed(&mut self, now_ms: u64) {
        if self.is_closed() {
            self.failed(Ticket(self.age), now_ms);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Wait(u64),
        Ask,
        Well(usize),
        Failed(usize),
        Lost(usize),
        Noticed,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..40_000u64).prop_map(Step::Wait),
            (0..200u64).prop_map(Step::Wait),
            Just(Step::Ask),
            Just(Step::Ask),
            (0..4usize).prop_map(Step::Well),
            (0..4usize).prop_map(Step::Failed),
            (0..4usize).prop_map(Step::Failed),
            (0..4usize).prop_map(Step::Lost),
            Just(Step::Noticed),
        ]
    }

    /// What must hold, said another way: it keeps the whole history and never looks into the breaker.
    #[derive(Default)]
    struct Watcher {
        /// Failures in a row since it was closed.
        failures: u32,
        /// When it was opened last and for how long; nothing: it is closed.
        open: Option<(u64, u64)>,
        /// One is trying.
        trying: bool,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn any_history(steps in proptest::collection::vec(step(), 0..120)) {
            let (mut breaker, mut watch, mut now) = (Breaker::new(), Watcher::default(), LONGEST_MS);
            // Tickets that are out, with the number of the period in which they were given.
            let (mut out, mut period) = (Vec::<(Ticket, u64)>::new(), 0u64);
            for step in steps {
                let chosen = |at: usize, out: &Vec<(Ticket, u64)>| (!out.is_empty()).then(|| at % out.len());
                match step {
                    Step::Wait(ms) => now += ms,
                    Step::Ask => {
                        let asked = breaker.ask(now);
                        match watch.open {
                            None => prop_assert!(asked.is_ok()),
                            Some(_) if watch.trying => prop_assert_eq!(asked, Err(TRYING_MS)),
                            Some((since, pause)) if now < since + pause => {
                                prop_assert_eq!(asked, Err(since + pause - now));
                            }
                            Some(_) => {
                                prop_assert!(asked.is_ok());
                                watch.trying = true;
                                period += 1;
                            }
                        }
                        if let Ok(ticket) = asked {
                            out.push((ticket, period));
                        }
                    }
                    Step::Well(at) => {
                        let Some(at) = chosen(at, &out) else { continue };
                        let (ticket, of) = out.swap_remove(at);
                        breaker.well(ticket);
                        if of == period && (watch.open.is_none() || watch.trying) {
                            if watch.trying {
                                period += 1;
                            }
                            watch = Watcher::default();
                        }
                    }
                    Step::Failed(at) => {
                        let Some(at) = chosen(at, &out) else { continue };
                        let (ticket, of) = out.swap_remove(at);
                        breaker.failed(ticket, now);
                        if of == period {
                            match watch.open {
                                None => {
                                    watch.failures += 1;
                                    if watch.failures == FAILURES {
                                        watch.open = Some((now, FIRST_MS));
                                        period += 1;
                                    }
                                }
                                Some((_, pause)) if watch.trying => {
                                    watch.open = Some((now, (pause * 2).min(LONGEST_MS)));
                                    watch.trying = false;
                                    period += 1;
                                }
                                Some(_) => {}
                            }
                        }
                    }
                    Step::Lost(at) => {
                        let Some(at) = chosen(at, &out) else { continue };
                        let (ticket, of) = out.swap_remove(at);
                        breaker.lost(ticket, now);
                        if of == period && watch.trying {
                            // The pause that it had stays, but it is over.
                            let pause = watch.open.map_or(FIRST_MS, |(_, pause)| pause);
                            watch.open = Some((now - pause, pause));
                            watch.trying = false;
                            period += 1;
                        }
                    }
                    Step::Noticed => {
                        breaker.noticed(now);
                        if watch.open.is_none() {
                            watch.failures += 1;
                            if watch.failures == FAILURES {
                                watch.open = Some((now, FIRST_MS));
                                period += 1;
                            }
                        }
                    }
                }
                prop_assert_eq!(breaker.is_closed(), watch.open.is_none());
            }
            // Whatever was: once it is well again, it is asked again soon.
            for (ticket, _) in out {
                breaker.lost(ticket, now);
            }
            now += LONGEST_MS;
            let ticket = breaker.ask(now);
            prop_assert!(ticket.is_ok());
            if let Ok(ticket) = ticket {
                breaker.well(ticket);
            }
            prop_assert!(breaker.is_closed());
        }
    }

    #[test]
    fn pauses_double_to_the_longest() {
        let (mut breaker, mut now) = (Breaker::new(), 0);
        for _ in 0..FAILURES {
            breaker.noticed(now);
        }
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let wait = breaker.ask(now).unwrap_err();
            assert_eq!(breaker.ask(now + wait - 1), Err(1));
            now += wait;
            pauses.push(wait);
            let ticket = breaker.ask(now).unwrap();
            breaker.failed(ticket, now);
        }
        assert_eq!(pauses, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
    }
}

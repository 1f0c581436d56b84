//! Which way a device takes to its broker: by itself, or carried by a neighbour that has an uplink.
//!
//! ```text
//!                 lost, failed or silent, and somebody can carry
//!   by itself ──────────────────────────────────────────────────> carried
//!       ▲                                                            │
//!       └──────── its own way answers again (tried now and then) ────┘
//! ```
//!
//! While it is carried its own way is only tried, not taken, so that readings never wait for a way that may be dead. Time
//! is a clock that only goes forward, in milliseconds.

/// Something was sent and nothing at all has come for this long: the way is dead, if somebody else's is not. A broker
/// answers each message in a round trip.
const SILENCE_MS: u64 = 1_500;
/// A way that was thought dead and was only slow gets more patience each time, up to this.
const MAX_SILENCE_MS: u64 = 60_000;
/// An attempt to connect that has led to nothing for this long is given up, if somebody can carry: a way that swallows
/// everything says no word. Twice as long each time that the own way was given up so, …
const CONNECT_MS: u64 = 3_000;
/// … up to this.
const MAX_CONNECT_MS: u64 = 30_000;
/// The device's own way is tried this long after it was left, …
const TRY_MS: u64 = 3_000;
/// … and then each time after twice as long, up to this: a handshake a minute is little.
const MAX_TRY_MS: u64 = 60_000;
/// A way that has stood for this long has been well.
const WELL_MS: u64 = 60_000;
/// Attempts to be carried that may fail before the device's own way is taken once more.
const CARRIED_FAILURES: u32 = 3;

/// A way to the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// The device's own.
    Own,
    /// Through a neighbour.
    Carried,
}

/// How long to wait before an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all: it is the first since the other way was lost.
    Not,
    /// As before a first attempt: another neighbour is asked, and only so many are in a row.
    Short,
    /// Longer each time.
    Longer,
}

/// The next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Which way.
    pub path: Path,
    /// And when.
    pub wait: Wait,
}

/// The state of a device's way to its broker.
#[derive(Clone, Debug)]
pub struct Way {
    path: Path,
    /// Since when the connection is being made.
    begun_ms: Option<u64>,
    /// How long that may take.
    connect_ms: u64,
    /// Since when the connection stands.
    up_ms: Option<u64>,
    /// The own way has failed and has not answered since.
    is_bad: bool,
    is_at_once: bool,
    carried_failures: u32,
    silence_ms: u64,
    /// It was left because it was silent.
    was_silent: bool,
    /// Something was sent since the last word.
    asked_ms: Option<u64>,
    try_at_ms: u64,
    try_wait_ms: u64,
}

impl Default for Way {
    fn default() -> Self {
        Self::new()
    }
}

impl Way {
    /// A device that has not tried anything yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            path: Path::Own,
            begun_ms: None,
            connect_ms: CONNECT_MS,
            up_ms: None,
            is_bad: false,
            is_at_once: false,
            carried_failures: 0,
            silence_ms: SILENCE_MS,
            was_silent: false,
            asked_ms: None,
            try_at_ms: 0,
            try_wait_ms: TRY_MS,
        }
    }

    /// How to connect next. `can_carry`: a neighbour says that it has an uplink.
    pub const fn next(&mut self, can_carry: bool) -> Attempt {
        let is_tired = self.carried_failures >= CARRIED_FAILURES;
        self.path = if self.is_bad && can_carry && !is_tired {
            Path::Carried
        } else {
            self.carried_failures = 0;
            Path::Own
        };
        let wait = if self.is_at_once {
            Wait::Not
        } else if matches!(self.path, Path::Carried) && self.carried_failures > 0 {
            Wait::Short
        } else {
            Wait::Longer
        };
        self.is_at_once = false;
        Attempt {
            path: self.path,
            wait,
        }
    }

    /// The attempt begins.
    pub const fn begun(&mut self, now_ms: u64) {
        self.up_ms = None;
        self.asked_ms = None;
        self.begun_ms = Some(now_ms);
    }

    /// The way of the connection that stands, or is being made.
    #[must_use]
    pub const fn path(&self) -> Path {
        self.path
    }

    /// The connection stands.
    pub const fn up(&mut self, now_ms: u64) {
        self.begun_ms = None;
        self.connect_ms = CONNECT_MS;
        self.up_ms = Some(now_ms);
        self.asked_ms = None;
        self.carried_failures = 0;
        if matches!(self.path, Path::Own) {
            self.is_bad = false;
        }
    }

    /// It is over, or could not be made.
    pub fn lost(&mut self, can_carry: bool, now_ms: u64) {
        self.begun_ms = None;
        let stood_ms = self.up_ms.take().map(|since| now_ms.saturating_sub(since));
        self.asked_ms = None;
        match self.path {
            Path::Own => {
                if stood_ms.is_some_and(|ms| ms >= WELL_MS) {
                    self.try_wait_ms = TRY_MS;
                }
                self.is_at_once = can_carry && (!self.is_bad || stood_ms.is_some());
                self.is_bad = true;
                self.try_later(now_ms);
            }
            // The carrier went; there may be another one.
            Path::Carried if stood_ms.is_some() => self.is_at_once = can_carry,
            Path::Carried => self.carried_failures += 1,
        }
    }

    /// Something was sent that the broker answers.
    pub const fn sent(&mut self, now_ms: u64) {
        if self.asked_ms.is_none() {
            self.asked_ms = Some(now_ms);
        }
    }

    /// Something came. `is_waiting`: more that was sent is still without an answer.
    pub const fn heard(&mut self, is_waiting: bool, now_ms: u64) {
        self.asked_ms = if is_waiting { Some(now_ms) } else { None };
    }

    /// When the connection that is being made, or the own way that stands, has been silent for too long: nothing while
    /// nothing is asked.
    #[must_use]
    pub fn silent_at_ms(&self) -> Option<u64> {
        if let Some(begun_ms) = self.begun_ms {
            return Some(begun_ms + self.connect_ms);
        }
        self.up_ms?;
        let asked_ms = self.asked_ms.filter(|_| self.path == Path::Own)?;
        Some(asked_ms + self.silence_ms)
    }

    /// Is it to be left, for somebody who can carry? To be followed by [`lost`](Self::lost).
    pub fn is_silent(&mut self, can_carry: bool, now_ms: u64) -> bool {
        let is_silent = can_carry && self.silent_at_ms().is_some_and(|at| at <= now_ms);
        if is_silent && self.path == Path::Own {
            self.was_silent = true;
            if self.begun_ms.is_some() {
                self.connect_ms = (self.connect_ms * 2).min(MAX_CONNECT_MS);
            }
        }
        is_silent
    }

    /// When the own way is to be tried, while the device is carried.
    #[must_use]
    pub fn try_at_ms(&self) -> Option<u64> {
        let is_carried = self.path == Path::Carried && self.up_ms.is_some();
        is_carried.then_some(self.try_at_ms)
    }

    /// The own way was tried. True if it is to be taken again.
    pub fn tried(&mut self, answers: bool, now_ms: u64) -> bool {
        if !answers {
            self.was_silent = false;
            self.try_later(now_ms);
            return false;
        }
        if core::mem::take(&mut self.was_silent) {
            // It was slow, not dead.
            self.silence_ms = (self.silence_ms * 2).min(MAX_SILENCE_MS);
        }
        self.is_bad = false;
        true
    }

    fn try_later(&mut self, now_ms: u64) {
        self.try_at_ms = now_ms + self.try_wait_ms;
        self.try_wait_ms = (self.try_wait_ms * 2).min(MAX_TRY_MS);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: Attempt = Attempt {
        path: Path::Own,
        wait: Wait::Longer,
    };

    const fn carried(wait: Wait) -> Attempt {
        Attempt {
            path: Path::Carried,
            wait,
        }
    }

    #[test]
    fn alone_it_is_as_if_there_were_no_neighbours() {
        let mut way = Way::new();
        for now in 0..10 {
            assert_eq!(way.next(false), OWN);
            way.up(now * 1_000);
            way.sent(now * 1_000);
            assert!(!way.is_silent(false, now * 1_000 + 100_000));
            way.lost(false, now * 1_000 + 1);
        }
    }

    #[test]
    fn a_lost_uplink_is_carried_at_once_and_taken_again_when_it_answers() {
        let mut way = Way::new();
        assert_eq!(way.next(true), OWN);
        way.up(0);
        way.lost(true, 10_000);
        assert_eq!(way.next(true), carried(Wait::Not));
        way.up(10_100);
        assert_eq!(way.try_at_ms(), Some(13_000));
        assert!(!way.tried(false, 13_000));
        assert_eq!(way.try_at_ms(), Some(19_000));
        // The carrier dies: another one, at once.
        way.lost(true, 14_000);
        assert_eq!(way.next(true), carried(Wait::Not));
        way.up(14_100);
        assert!(way.tried(true, 19_000));
        way.lost(true, 19_000);
        assert_eq!(way.next(true).path, Path::Own);
        way.up(19_100);
        assert_eq!(way.try_at_ms(), None);
    }

    #[test]
    fn nobody_who_carries_leads_back_to_the_own_way() {
        let mut way = Way::new();
        way.next(true);
        way.lost(true, 0);
        assert_eq!(way.next(true), carried(Wait::Not));
        for now in 1..=3 {
            way.lost(true, now);
            let next = if now == 3 { OWN } else { carried(Wait::Short) };
            assert_eq!(way.next(true), next, "a broker that is down is not stormed");
        }
        way.lost(true, 4);
        assert_eq!(way.next(true), carried(Wait::Longer));
        assert_eq!(way.next(false).path, Path::Own);
    }

    #[test]
    fn a_silent_way_is_left_and_a_slow_one_gets_more_patience() {
        let mut way = Way::new();
        way.next(true);
        way.up(0);
        assert_eq!(way.silent_at_ms(), None);
        way.sent(1_000);
        way.sent(2_000);
        assert!(!way.is_silent(true, 2_499));
        assert!(!way.is_silent(false, 2_500));
        way.heard(true, 2_400);
        assert!(!way.is_silent(true, 3_000));
        way.heard(false, 3_000);
        assert!(!way.is_silent(true, 100_000));
        way.sent(100_000);
        assert!(way.is_silent(true, 101_500));
        way.lost(true, 101_500);
        assert_eq!(way.next(true), carried(Wait::Not));
        way.up(101_600);
        assert!(way.tried(true, 104_500));
        way.lost(true, 104_500);
        assert_eq!(way.next(true).path, Path::Own);
        way.up(104_600);
        way.sent(105_000);
        assert!(!way.is_silent(true, 107_900));
        assert!(way.is_silent(true, 108_000));
    }

    #[test]
    fn an_attempt_that_leads_to_nothing_is_given_up_where_somebody_can_carry() {
        let mut way = Way::new();
        let mut now = 0;
        // Each time round: the own way, and three neighbours who said that they could.
        for patience in [3_000, 6_000, 12_000, 24_000, 30_000, 30_000] {
            assert_eq!(way.next(true).path, Path::Own);
            way.begun(now);
            assert_eq!(way.silent_at_ms(), Some(now + patience));
            assert!(
                !way.is_silent(false, now + patience),
                "there is nothing better"
            );
            assert!(!way.is_silent(true, now + patience - 1));
            now += patience;
            assert!(way.is_silent(true, now));
            way.lost(true, now);
            for _ in 0..3 {
                assert_eq!(way.next(true).path, Path::Carried);
                way.begun(now);
                now = way.silent_at_ms().unwrap_or(now);
                assert!(way.is_silent(true, now));
                way.lost(true, now);
            }
        }
        way.next(true);
        way.begun(now);
        way.up(now);
        assert_eq!(way.silent_at_ms(), None);
        way.begun(now + 1);
        assert_eq!(
            way.silent_at_ms(),
            Some(now + 3_001),
            "patience is as before"
        );
    }

    proptest! {
        /// Whatever ways there are, a device that keeps trying takes one that works in the end, and never storms.
        #[test]
        fn whoever_can_get_through_does(
            steps in prop::collection::vec((any::<bool>(), any::<bool>(), 1u64..5_000), 1..200),
            own_works: bool,
            claims: bool,
        ) {
            let mut way = Way::new();
            let mut now = 0;
            let mut at_once = 0;
            for (own, carry, wait) in steps {
                now += wait;
                let attempt = way.next(carry);
                way.begun(now);
                if attempt.wait == Wait::Not {
                    at_once += 1;
                    prop_assert!(at_once <= 2, "twice without a wait, and neither came up");
                } else {
                    at_once = 0;
                }
                let works = if attempt.path == Path::Own { own } else { carry };
                if works {
                    at_once = 0;
                    way.up(now);
                    way.sent(now);
                    now += wait;
                }
                way.lost(carry, now);
            }
            // From now on one of the two works, for ever; a neighbour may say that it can carry, and cannot.
            let can_carry = claims || !own_works;
            let came_up = (0..8).any(|_| {
                let attempt = way.next(can_carry);
                let works = (attempt.path == Path::Own) == own_works;
                if !works {
                    way.lost(can_carry, now);
                }
                works
            });
            prop_assert!(came_up);
        }
    }
}

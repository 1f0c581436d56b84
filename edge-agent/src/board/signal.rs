//! What the pins say and mean: LED patterns, pulses, debouncing. Pure; times in milliseconds.

/// What the status LED shows.
///
/// | State      | Pattern                                        |
/// |------------|------------------------------------------------|
/// | `Starting` | even quick blinking: 100 ms on, 100 ms off     |
/// | `Running`  | on, with a short wink (100 ms off) every 2 s   |
/// | `Offline`  | two short flashes (100 ms) every 2 s           |
/// | `NoModel`  | three short flashes (100 ms) every 2 s         |
/// | `Fault`    | even slow blinking: 500 ms on, 500 ms off      |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Not yet working.
    #[default]
    Starting,
    /// Looking, and connected.
    Running,
    /// Looking and remembering, without a connection.
    Offline,
    /// There is no model that runs.
    NoModel,
    /// It cannot do its work, and says why in its log.
    Fault,
}

impl State {
    /// The state with this number, for one that was kept as a number.
    pub(super) const fn from_u8(number: u8) -> Self {
        match number {
            1 => Self::Running,
            2 => Self::Offline,
            3 => Self::NoModel,
            4 => Self::Fault,
            _ => Self::Starting,
        }
    }
}

/// The finest step of every pattern: it is enough to look at [`led`] this often.
pub const LED_STEP_MS: u64 = 100;

/// Is the LED on, `elapsed_ms` after any fixed moment?
#[must_use]
pub const fn led(state: State, elapsed_ms: u64) -> bool {
    let (period, on): (u64, &[(u64, u64)]) = match state {
        State::Starting => (200, &[(0, 100)]),
        State::Running => (2_000, &[(0, 1_900)]),
        State::Offline => (2_000, &[(0, 100), (300, 400)]),
        State::NoModel => (2_000, &[(0, 100), (300, 400), (600, 700)]),
        State::Fault => (1_000, &[(0, 500)]),
    };
    let at = elapsed_ms % period;
    let mut part = 0;
    while part < on.len() {
        if at >= on[part].0 && at < on[part].1 {
            return true;
        }
        part += 1;
    }
    false
}

/// An output that is on for a while after each request.
#[derive(Clone, Copy, Debug)]
pub struct Pulse {
    length_ms: u64,
    until: Option<u64>,
}

impl Pulse {
    /// An output that is off, and will be on for `length_ms` at a time.
    #[must_use]
    pub const fn new(length_ms: u64) -> Self {
        Self {
            length_ms,
            until: None,
        }
    }

    /// Starts the pulse, or starts it again. `true` if one was going on.
    pub fn request(&mut self, now_ms: u64) -> bool {
        let joined = self.is_on(now_ms);
        self.until = Some(now_ms.saturating_add(self.length_ms));
        joined
    }

    /// Is it on?
    #[must_use]
    pub fn is_on(&self, now_ms: u64) -> bool {
        self.until.is_some_and(|until| now_ms < until)
    }

    /// When it goes off, if it is on.
    #[must_use]
    pub fn ends_ms(&self, now_ms: u64) -> Option<u64> {
        self.until.filter(|until| now_ms < *until)
    }
}

/// Turns a bouncing contact into edges: a level counts when it has been the same for a while.
#[derive(Clone, Copy, Debug)]
pub struct Debounce {
    stable_ms: u64,
    /// The level that counts.
    level: bool,
    /// Since when the input has differed from it.
    since: Option<u64>,
}

impl Debounce {
    /// Starts inactive. A level must hold for `stable_ms`; 0 believes every sample.
    #[must_use]
    pub const fn new(stable_ms: u64) -> Self {
        Self {
            stable_ms,
            level: false,
            since: None,
        }
    }

    /// Takes a sample; `true` when the input has become active.
    pub fn sample(&mut self, active: bool, now_ms: u64) -> bool {
        if active == self.level {
            self.since = None;
            return false;
        }
        let since = *self.since.get_or_insert(now_ms);
        if now_ms.saturating_sub(since) < self.stable_ms {
            return false;
        }
        self.level = active;
        self.since = None;
        active
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_a_pattern_of_its_own() {
        let states = [
            State::Starting,
            State::Running,
            State::Offline,
            State::NoModel,
            State::Fault,
        ];
        let shown = |state| {
            (0..40)
                .map(|step| led(state, step * LED_STEP_MS))
                .collect::<Vec<_>>()
        };
        for (at, a) in states.into_iter().enumerate() {
            assert_eq!(State::from_u8(a as u8), a);
            for b in states.into_iter().skip(at + 1) {
                assert_ne!(shown(a), shown(b), "{a:?} {b:?}");
            }
            // The documented step misses nothing.
            assert!((0..4_000).all(|ms| led(a, ms) == led(a, ms / LED_STEP_MS * LED_STEP_MS)));
        }
        assert_eq!(
            shown(State::Offline)[..6],
            [true, false, false, true, false, false]
        );
    }

    #[test]
    fn a_pulse_has_its_length_and_a_second_one_makes_it_longer() {
        let mut pulse = Pulse::new(80);
        assert!(!pulse.is_on(0));
        assert!(!pulse.request(10));
        assert_eq!((pulse.is_on(89), pulse.is_on(90)), (true, false));
        assert!(!pulse.request(100));
        assert!(pulse.request(150));
        assert_eq!((pulse.is_on(229), pulse.is_on(230)), (true, false));
        assert_eq!(pulse.ends_ms(200), Some(230));
    }

    #[test]
    fn bouncing_is_one_edge() {
        let mut input = Debounce::new(20);
        let mut edges = 0;
        let level = |ms: u64| match ms {
            100..130 => ms % 10 < 5,
            130..300 => true,
            300..330 => ms % 10 < 5,
            // Too short to count.
            400..410 => true,
            _ => false,
        };
        for ms in (0..600).step_by(5) {
            edges += u32::from(input.sample(level(ms), ms));
        }
        assert_eq!(edges, 1);
        let mut all = Debounce::new(0);
        assert_eq!(
            [true, false, true].map(|active| all.sample(active, 0)),
            [true, false, true]
        );
    }
}

//! Between the signals and the pins: touches a pin only when its level changes.

use embedded_hal::digital::{InputPin, OutputPin};

use super::{
    Pins,
    signal::{Debounce, LED_STEP_MS, Pulse, State, led},
};

/// How often the trigger is sampled: four samples within the default debouncing.
const TRIGGER_STEP_MS: u64 = 5;
/// How soon a trigger that cannot be read is tried again.
const RETRY_MS: u64 = 1_000;
/// The longest rest. Nothing needs it; it bounds what a lost wake-up could cost.
const IDLE_MS: u64 = 1_000;

/// A pin, and which level is its active one.
pub struct Wired<P> {
    pin: P,
    name: &'static str,
    active_low: bool,
    /// The level that an output was last set to.
    level: Option<bool>,
    warned: bool,
}

impl<P> Wired<P> {
    /// `name` is what it is called in warnings.
    pub const fn new(pin: P, name: &'static str, active_low: bool) -> Self {
        Self {
            pin,
            name,
            active_low,
            level: None,
            warned: false,
        }
    }

    /// One warning per pin; the rest is counted.
    fn failed(&mut self, error: &dyn std::fmt::Debug) -> u64 {
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(
                pin = self.name,
                ?error,
                "a pin does not work; going on without it"
            );
        }
        1
    }
}

impl<P: OutputPin> Wired<P> {
    /// Makes an output active or not; gives the number of errors.
    fn set(&mut self, active: bool) -> u64 {
        if self.level == Some(active) {
            return 0;
        }
        let done = if active == self.active_low {
            self.pin.set_low()
        } else {
            self.pin.set_high()
        };
        match done {
            Ok(()) => {
                self.level = Some(active);
                0
            }
            Err(error) => self.failed(&error),
        }
    }
}

impl<P: InputPin> Wired<P> {
    fn is_active(&mut self) -> Result<bool, u64> {
        match self.pin.is_high() {
            Ok(high) => Ok(high != self.active_low),
            Err(error) => Err(self.failed(&error)),
        }
    }
}

/// What one step did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Step {
    /// The trigger became active.
    pub(super) triggered: bool,
    /// The button was pressed.
    pub(super) pressed: bool,
    /// Rejects that came while a pulse was going on.
    pub(super) joined: u64,
    /// Pins that failed.
    pub(super) errors: u64,
    /// When to take the next step, if nothing is asked for before.
    pub(super) next_ms: u64,
}

/// All pins of a board.
pub(super) struct Driver<L, T, R> {
    pins: Pins<L, T, R>,
    pulse: Pulse,
    debounce: Debounce,
    sample_ms: u64,
    button_debounce: Debounce,
    button_ms: u64,
}

impl<L: OutputPin, T: InputPin, R: OutputPin> Driver<L, T, R> {
    pub(super) fn new(pins: Pins<L, T, R>, reject_ms: u32, debounce_ms: u32) -> Self {
        Self {
            pins,
            pulse: Pulse::new(reject_ms.into()),
            debounce: Debounce::new(debounce_ms.into()),
            sample_ms: 0,
            button_debounce: Debounce::new(debounce_ms.into()),
            button_ms: 0,
        }
    }

    /// Brings the pins to what they should be at `now_ms`.
    pub(super) fn step(&mut self, now_ms: u64, state: State, rejects: u64) -> Step {
        let mut step = Step {
            next_ms: now_ms + IDLE_MS,
            ..Step::default()
        };
        // What throws parts out goes first.
        for _ in 0..rejects {
            step.joined += u64::from(self.pulse.request(now_ms));
        }
        if let Some(reject) = &mut self.pins.reject {
            step.errors += reject.set(self.pulse.is_on(now_ms));
            if let Some(ends) = self.pulse.ends_ms(now_ms) {
                step.next_ms = step.next_ms.min(ends);
            }
        }
        if let Some(trigger) = &mut self.pins.trigger {
            let (debounce, due) = (&mut self.debounce, &mut self.sample_ms);
            step.triggered = sample(trigger, debounce, due, now_ms, &mut step.errors);
            step.next_ms = step.next_ms.min(self.sample_ms);
        }
        if let Some(button) = &mut self.pins.button {
            let (debounce, due) = (&mut self.button_debounce, &mut self.button_ms);
            step.pressed = sample(button, debounce, due, now_ms, &mut step.errors);
            step.next_ms = step.next_ms.min(self.button_ms);
        }
        if let Some(lamp) = &mut self.pins.led {
            step.errors += lamp.set(led(state, now_ms));
            step.next_ms = step.next_ms.min((now_ms / LED_STEP_MS + 1) * LED_STEP_MS);
        }
        step
    }

    /// Switches every output off.
    pub(super) fn off(&mut self) {
        if let Some(reject) = &mut self.pins.reject {
            reject.set(false);
        }
        if let Some(lamp) = &mut self.pins.led {
            lamp.set(false);
        }
    }
}

/// Looks at an input if it is time to; true where it has just become active.
fn sample<P: InputPin>(
    pin: &mut Wired<P>,
    debounce: &mut Debounce,
    due_ms: &mut u64,
    now_ms: u64,
    errors: &mut u64,
) -> bool {
    if now_ms < *due_ms {
        return false;
    }
    match pin.is_active() {
        Ok(active) => {
            *due_ms = now_ms + TRIGGER_STEP_MS;
            debounce.sample(active, now_ms)
        }
        Err(failed) => {
            *errors += failed;
            *due_ms = now_ms + RETRY_MS;
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use embedded_hal_mock::eh1::{
        MockError,
        digital::{Mock, State as Level, Transaction},
    };
    use std::io::ErrorKind;

    use super::*;

    type Mocks = Driver<Mock, Mock, Mock>;

    fn set(level: Level) -> Transaction {
        Transaction::set(level)
    }

    fn get(level: Level) -> Transaction {
        Transaction::get(level)
    }

    fn pins() -> Pins<Mock, Mock, Mock> {
        Pins {
            led: None,
            trigger: None,
            reject: None,
            button: None,
        }
    }

    #[test]
    fn the_reject_pin_sees_exactly_one_pulse_for_two_parts_in_a_row() {
        let mut pin = Mock::new(&[
            set(Level::High),
            set(Level::Low),
            set(Level::High),
            set(Level::Low),
            set(Level::High),
        ]);
        let reject = Some(Wired::new(pin.clone(), "reject", true));
        let mut driver: Mocks = Driver::new(Pins { reject, ..pins() }, 80, 0);
        assert_eq!(driver.step(0, State::Running, 0).next_ms, IDLE_MS);
        assert_eq!(driver.step(10, State::Running, 1).next_ms, 90);
        let joined = driver.step(50, State::Running, 1);
        assert_eq!((joined.joined, joined.next_ms), (1, 130));
        driver.step(129, State::Running, 0);
        driver.step(130, State::Running, 0);
        driver.step(200, State::Running, 1);
        driver.off();
        pin.done();
    }

    #[test]
    fn the_led_is_touched_when_it_changes() {
        let mut pin = Mock::new(&[
            set(Level::High),
            set(Level::Low),
            set(Level::High),
            set(Level::Low),
        ]);
        let led = Some(Wired::new(pin.clone(), "led", false));
        let mut driver: Mocks = Driver::new(Pins { led, ..pins() }, 80, 0);
        for now in (0..2_000).step_by(100) {
            let step = driver.step(now, State::Offline, 0);
            assert_eq!(
                step,
                Step {
                    next_ms: now + 100,
                    ..Step::default()
                }
            );
        }
        driver.off();
        pin.done();
    }

    #[test]
    fn a_trigger_is_one_edge_however_it_bounces() {
        let (low, high) = (get(Level::Low), get(Level::High));
        let samples = [&low, &high, &low, &high, &high, &high, &high, &high, &low];
        let mut pin = Mock::new(samples.iter().copied());
        let trigger = Some(Wired::new(pin.clone(), "trigger", false));
        let mut driver: Mocks = Driver::new(Pins { trigger, ..pins() }, 80, 10);
        let seen: Vec<bool> = (0..samples.len() as u64)
            .map(|n| {
                let step = driver.step(n * 5, State::Running, 0);
                assert_eq!(step.next_ms, n * 5 + 5);
                // Asked in between, it does not sample again.
                driver.step(n * 5 + 1, State::Running, 0);
                step.triggered
            })
            .collect();
        assert_eq!(
            seen,
            [false, false, false, false, false, true, false, false, false]
        );
        pin.done();
    }

    #[test]
    fn a_button_is_heard_beside_the_trigger() {
        let (low, high) = (get(Level::Low), get(Level::High));
        let mut pin = Mock::new(&[low.clone(), high.clone(), high, low]);
        let mut other = Mock::new(&vec![get(Level::Low); 4]);
        let pins = Pins {
            trigger: Some(Wired::new(other.clone(), "trigger", false)),
            button: Some(Wired::new(pin.clone(), "button", false)),
            ..pins()
        };
        let mut driver: Mocks = Driver::new(pins, 80, 0);
        let seen: Vec<_> = (0..4)
            .map(|n| driver.step(n * 5, State::Running, 0))
            .map(|step| (step.triggered, step.pressed))
            .collect();
        assert_eq!(
            seen,
            [
                (false, false),
                (false, true),
                (false, false),
                (false, false)
            ]
        );
        pin.done();
        other.done();
    }

    #[test]
    fn a_pin_that_fails_is_counted_and_the_others_go_on() {
        let broken = || MockError::Io(ErrorKind::BrokenPipe);
        let mut led = Mock::new(&[
            set(Level::High).with_error(broken()),
            set(Level::High),
            set(Level::Low),
        ]);
        let mut trigger = Mock::new(&[get(Level::High).with_error(broken()), get(Level::High)]);
        let mut reject = Mock::new(&[set(Level::Low), set(Level::High), set(Level::Low)]);
        let mut driver: Mocks = Driver::new(
            Pins {
                led: Some(Wired::new(led.clone(), "led", false)),
                trigger: Some(Wired::new(trigger.clone(), "trigger", false)),
                reject: Some(Wired::new(reject.clone(), "reject", false)),
                button: None,
            },
            80,
            0,
        );
        assert_eq!(driver.step(0, State::Running, 0).errors, 2);
        let step = driver.step(20, State::Running, 1);
        assert_eq!((step.errors, step.triggered, step.next_ms), (0, false, 100));
        assert!(
            driver.step(1_000, State::Running, 0).triggered,
            "tried again after a second"
        );
        driver.off();
        for pin in [&mut led, &mut trigger, &mut reject] {
            pin.done();
        }
    }
}

//! The device's pins: a status LED, a trigger input, a button and a reject output. Whatever is not configured is not
//! there, and costs nothing.
//!
//! One thread serves them all. What it decides is in [`signal`], pure and with the time as an argument; how
//! it touches pins is behind the traits of `embedded-hal`; which pins those are on Linux is in `pins`.

mod config;
mod driver;
#[cfg(feature = "gpio")]
mod pins;
pub mod signal;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

pub use config::{BoardConfig, Button, Line, Meaning};
use driver::{Driver, Wired};
use embedded_hal::digital::{InputPin, OutputPin};
pub use signal::State;
use tokio::time::Instant;

/// Triggers that wait to be taken. A source that is slower than its trigger for longer misses parts, and
/// that is counted.
const TRIGGERS: usize = 16;
/// The thread ends at once when it is told to.
const RELEASE: Duration = Duration::from_secs(1);

/// Why the board could not be started.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// A configured line cannot be used.
    #[error("the {what} pin, {chip} line {line}: {why}")]
    Pin {
        /// `led`, `trigger`, `reject` or `button`.
        what: &'static str,
        /// The chip's device file.
        chip: String,
        /// The line on it.
        line: u32,
        /// What the system said.
        why: String,
    },
    /// Pins are configured, but this program was built without them.
    #[error("pins are configured, but this program was built without the feature `gpio`")]
    NoGpio,
    /// No thread.
    #[error("the board's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// What happened at the pins so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Times that a pin could not be read or set.
    pub pin_errors: u64,
    /// Rejects that were asked for.
    pub rejects: u64,
    /// Rejects that made a pulse longer, because one was still going on.
    pub rejects_joined: u64,
    /// Triggers that were seen.
    pub triggers: u64,
    /// Triggers that nobody took in time.
    pub triggers_dropped: u64,
    /// Times that the button was pressed.
    pub presses: u64,
}

#[derive(Default)]
struct Shared {
    state: AtomicU8,
    rejects: AtomicU64,
    rejects_joined: AtomicU64,
    pin_errors: AtomicU64,
    triggers: AtomicU64,
    triggers_dropped: AtomicU64,
    presses: AtomicU64,
}

/// The pins that a board has.
pub struct Pins<L, T, R> {
    /// The status LED.
    pub led: Option<Wired<L>>,
    /// The trigger input.
    pub trigger: Option<Wired<T>>,
    /// The reject output.
    pub reject: Option<Wired<R>>,
    /// The button.
    pub button: Option<Wired<T>>,
}

/// Starts the board.
pub struct Board;

impl Board {
    /// Takes the configured lines and starts the thread that serves them; the receiver gives one `()` for
    /// each trigger, where there is one. Without lines there is no thread.
    ///
    /// # Errors
    /// If a line is not there or taken: wiring that someone configured is meant to work.
    pub fn start(config: &BoardConfig) -> Result<(BoardHandle, Option<Receiver<()>>), BoardError> {
        if config.lines().next().is_none() {
            return Ok((BoardHandle::default(), None));
        }
        #[cfg(feature = "gpio")]
        return Self::serve(config, pins::take(config)?);
        #[cfg(not(feature = "gpio"))]
        return Err(BoardError::NoGpio);
    }

    /// Starts the thread on any pins.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn serve<L, T, R>(
        config: &BoardConfig,
        pins: Pins<L, T, R>,
    ) -> Result<(BoardHandle, Option<Receiver<()>>), BoardError>
    where
        L: OutputPin + Send + 'static,
        T: InputPin + Send + 'static,
        R: OutputPin + Send + 'static,
    {
        let shared = Arc::new(Shared::default());
        let (wake, woken) = sync_channel(1);
        let (triggers, triggered) = sync_channel(TRIGGERS);
        let has_trigger = pins.trigger.is_some();
        let driver = Driver::new(pins, config.reject_ms, config.debounce_ms);
        let theirs = shared.clone();
        thread::Builder::new()
            .name("board".into())
            .spawn(move || run(driver, &theirs, &woken, &triggers))?;
        let handle = BoardHandle {
            shared,
            wake: Some(wake),
        };
        Ok((handle, has_trigger.then_some(triggered)))
    }

    /// For `doctor`: are the configured lines there? A sentence.
    ///
    /// # Errors
    /// Names the first that is not.
    pub fn try_pins(config: &BoardConfig) -> Result<String, BoardError> {
        if config.lines().next().is_none() {
            return Ok("no pins configured".into());
        }
        #[cfg(feature = "gpio")]
        return pins::look(config);
        #[cfg(not(feature = "gpio"))]
        return Err(BoardError::NoGpio);
    }
}

/// Speaks to the board. The thread ends, and its outputs are switched off, when the last handle is gone.
#[derive(Clone, Default)]
pub struct BoardHandle {
    shared: Arc<Shared>,
    /// Holds at most one token: the newest state and the number of rejects are what counts.
    wake: Option<SyncSender<()>>,
}

impl BoardHandle {
    /// Shows a state on the LED. The newest wins.
    pub fn set_state(&self, state: State) {
        self.shared.state.store(state as u8, Ordering::Relaxed);
        self.wake();
    }

    /// Pulses the reject output. While it is pulsing, the pulse starts again: two parts in a row make one
    /// long pulse.
    pub fn reject(&self) {
        self.shared.rejects.fetch_add(1, Ordering::Relaxed);
        self.wake();
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Counts {
            pin_errors: get(&self.shared.pin_errors),
            rejects: get(&self.shared.rejects),
            rejects_joined: get(&self.shared.rejects_joined),
            triggers: get(&self.shared.triggers),
            triggers_dropped: get(&self.shared.triggers_dropped),
            presses: get(&self.shared.presses),
        }
    }

    /// Lets go of the board, and waits until its lines are free for whoever starts it anew. Other handles must be gone.
    pub(crate) async fn release(self) {
        let Self { shared, wake } = self;
        drop(wake);
        let end = Instant::now() + RELEASE;
        // The thread has the other one.
        while Arc::strong_count(&shared) > 1 && Instant::now() < end {
            tokio::time::sleep(RELEASE / 50).await;
        }
    }

    fn wake(&self) {
        if let Some(wake) = &self.wake {
            // Full: it is about to wake anyway.
            let _ = wake.try_send(());
        }
    }
}

fn run<L: OutputPin, T: InputPin, R: OutputPin>(
    mut driver: Driver<L, T, R>,
    shared: &Shared,
    woken: &Receiver<()>,
    triggers: &SyncSender<()>,
) {
    let start = Instant::now();
    let mut rejected = 0;
    loop {
        let now = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let rejects = shared.rejects.load(Ordering::Relaxed);
        let state = State::from_u8(shared.state.load(Ordering::Relaxed));
        let step = driver.step(now, state, rejects - rejected);
        rejected = rejects;
        shared
            .rejects_joined
            .fetch_add(step.joined, Ordering::Relaxed);
        shared.pin_errors.fetch_add(step.errors, Ordering::Relaxed);
        if step.triggered {
            shared.triggers.fetch_add(1, Ordering::Relaxed);
            if triggers.try_send(()).is_err() {
                shared.triggers_dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        if step.pressed {
            shared.presses.fetch_add(1, Ordering::Relaxed);
        }
        let wait = Duration::from_millis(step.next_ms.saturating_sub(now).max(1));
        if woken.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected) {
            driver.off();
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use embedded_hal_mock::eh1::digital::{Mock, State as Level, Transaction};

    use super::*;

    #[test]
    fn without_pins_there_is_no_thread_and_everything_may_be_said() {
        let (handle, triggers) = Board::start(&BoardConfig::default()).unwrap();
        assert!(triggers.is_none() && handle.wake.is_none());
        handle.set_state(State::Running);
        handle.reject();
        assert_eq!(
            handle.counts(),
            Counts {
                rejects: 1,
                ..Counts::default()
            }
        );
        assert_eq!(
            Board::try_pins(&BoardConfig::default()).unwrap(),
            "no pins configured"
        );
    }

    /// The thread itself: a reject arrives at the pin, and the last handle switches it off.
    #[test]
    fn the_thread_serves_until_the_last_handle_is_gone() {
        let level = |level| Transaction::set(level);
        let mut pin = Mock::new(&[level(Level::Low), level(Level::High), level(Level::Low)]);
        let reject = Some(Wired::new(pin.clone(), "reject", false));
        let pins: Pins<Mock, Mock, Mock> = Pins {
            led: None,
            trigger: None,
            reject,
            button: None,
        };
        let mut driver = Driver::new(pins, 10_000, 0);
        // The first step, so that it does not matter how soon the thread sees the reject.
        driver.step(0, State::Starting, 0);
        let shared = Arc::new(Shared::default());
        let (wake, woken) = sync_channel(1);
        let (triggers, _triggered) = sync_channel(TRIGGERS);
        let handle = BoardHandle {
            shared: shared.clone(),
            wake: Some(wake),
        };
        handle.reject();
        let thread = thread::spawn(move || run(driver, &shared, &woken, &triggers));
        drop(handle.clone());
        drop(handle);
        thread.join().unwrap();
        pin.done();
    }
}

//! Runs one source: when to shoot, what to number it, where to go on.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io::Write,
    path::Path,
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender},
    time::Duration,
};

use mesh_core::Name;
use tokio::sync::watch;

use super::{Frame, Shot, Source, SourceConfig, SourceError};
use crate::{clock::WallClock, counters::Counters};

/// What a capture thread needs.
pub struct Start {
    /// The source's place in the configuration.
    pub index: usize,
    /// Its settings.
    pub config: SourceConfig,
    /// The opened source.
    pub source: Box<dyn Source>,
    /// The first frame to take.
    pub first: u64,
    /// When it shoots.
    pub pace: Pace,
    /// Where frames go. Closed when the pipeline stops.
    pub frames: SyncSender<Frame>,
    /// Closed when the agent stops.
    pub stop: Receiver<()>,
    /// Stamps the frames.
    pub clock: WallClock,
    /// What is counted.
    pub counters: Counters,
    /// Sources that work: they gave a picture, came to their end, or wait for their trigger.
    pub works: watch::Sender<BTreeSet<Name>>,
}

/// When a source shoots.
#[derive(Debug)]
pub enum Pace {
    /// As fast as its frames are taken.
    Free,
    /// So far apart.
    Every(Duration),
    /// At each pulse of the trigger input.
    Trigger(Receiver<()>),
}

impl Pace {
    /// As the settings say. `trigger` gives the pulses of the trigger input, where that works and nobody has taken it.
    ///
    /// # Errors
    /// If the source waits for a trigger that is not there: without, it would take frames of nothing at full speed.
    pub fn of(
        config: &SourceConfig,
        trigger: &mut Option<Receiver<()>>,
    ) -> Result<Self, SourceError> {
        if config.trigger {
            let pulses = trigger.take();
            let missing = || SourceError::Trigger(config.name.to_string());
            return pulses.map(Self::Trigger).ok_or_else(missing);
        }
        Ok(if config.fps > 0.0 {
            Self::Every(Duration::from_secs_f64(1.0 / config.fps))
        } else {
            Self::Free
        })
    }
}

/// How often a waiting source looks whether it should stop.
const LOOK_UP: Duration = Duration::from_millis(100);
/// A folder of nothing but bad files must not spin.
const AFTER_BAD: Duration = Duration::from_millis(5);

/// Captures until the source ends or the agent stops. Blocks: it has a thread of its own.
pub fn run(mut start: Start) {
    let name = start.config.name.clone();
    let mut journal = start
        .config
        .journal
        .as_deref()
        .and_then(|path| open_journal(path, &name));
    if matches!(start.pace, Pace::Trigger(_)) {
        start.works();
    }
    let mut due = tokio::time::Instant::now();
    let mut number = start.first;
    tracing::debug!(source = %name, number, "capture starts");
    loop {
        if start.config.frames > 0 && number >= start.config.frames {
            break;
        }
        if !start.wait(due) {
            return;
        }
        if let Pace::Every(period) = start.pace {
            // A device that cannot keep up takes its next frame now, it does not catch up in a burst.
            due = (due + period).max(tokio::time::Instant::now());
        }
        let ts = start.clock.now_ms();
        let shot = start.source.shoot(number);
        match shot {
            Shot::Picture {
                picture,
                original,
                file,
                truth,
            } => {
                start.counters.frames.add(1);
                start.works();
                if let Some(journal) = &mut journal
                    && let Err(error) = journal.write_all(format!("{number}\n").as_bytes())
                {
                    tracing::warn!(source = %name, %error, "the journal cannot be written");
                }
                let frame = Frame {
                    source: start.index,
                    number,
                    ts,
                    picture,
                    original,
                    file,
                    truth,
                };
                // Waits while the pipeline is busy. Closed: the agent stops.
                if start.frames.send(frame).is_err() {
                    return;
                }
            }
            Shot::Bad { why } => {
                start.counters.frames_bad.add(1);
                tracing::warn!(source = %name, frame = number, "frame skipped: {why}");
                due = due.max(tokio::time::Instant::now() + AFTER_BAD);
            }
            Shot::End => break,
        }
        number += 1;
    }
    start.works();
    tracing::info!(source = %name, frames = number, "the source has ended");
}

impl Start {
    fn works(&self) {
        let name = &self.config.name;
        self.works.send_if_modified(|works| {
            let is_new = !works.contains(name);
            if is_new {
                works.insert(name.clone());
            }
            is_new
        });
    }

    /// Waits for the next moment to shoot; false when the agent stops.
    fn wait(&self, due: tokio::time::Instant) -> bool {
        if let Pace::Trigger(trigger) = &self.pace {
            loop {
                if matches!(
                    self.stop.try_recv(),
                    Err(std::sync::mpsc::TryRecvError::Disconnected)
                ) {
                    return false;
                }
                match trigger.recv_timeout(LOOK_UP) {
                    Ok(()) => return true,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return false,
                }
            }
        }
        let wait = due.saturating_duration_since(tokio::time::Instant::now());
        matches!(self.stop.recv_timeout(wait), Err(RecvTimeoutError::Timeout))
    }
}

fn open_journal(path: &Path, name: &mesh_core::Name) -> Option<File> {
    match OpenOptions::new().create(true).append(true).open(path) {
        Ok(file) => Some(file),
        Err(error) => {
            tracing::warn!(source = %name, path = %path.display(), %error, "the journal cannot be opened");
            None
        }
    }
}

//! The thread that owns the outbox.
//!
//! Results come in, become numbered readings, are made durable as one group, and only then does anything
//! else see them (law: durable before visible).

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use mesh_core::{EventError, Name, RangeSet, Reading, VERSION, offload::Answered};
use tokio::sync::mpsc::{Receiver, Sender};

use crate::{
    counters::Counters,
    outbox::{GapRecord, Outbox, OutboxError},
    samples::{Job, Kept, Tray},
};

/// A result on its way to become a reading.
#[derive(Clone, Debug)]
pub struct Draft {
    /// The source's name.
    pub source: Name,
    /// The frame's number at the source.
    pub frame: u64,
    /// When it was captured.
    pub ts: i64,
    /// The class.
    pub label: String,
    /// How sure, 0..=1.
    pub score: f32,
    /// How far before the second, 0..=1.
    pub margin: f32,
    /// `name@version`.
    pub model: Arc<str>,
    /// From frame to result.
    pub latency_ms: f32,
    /// The frame's file.
    pub file: Option<String>,
    /// What it really shows.
    pub truth: Option<String>,
    /// What a neighbour said about it: that becomes the reading. What is kept of the frame to learn from goes by what
    /// the device's own model said.
    pub answered: Option<Box<Answered>>,
}

/// What the thread is asked for.
#[derive(Debug)]
pub enum Command {
    /// Make this durable.
    Append(Draft),
    /// Make this durable, and keep the frame under its number.
    Keep {
        /// The result.
        draft: Draft,
        /// What is kept.
        kept: Box<Kept>,
        /// It was appended a moment ago: keep the frame under the number that it has.
        again: bool,
    },
    /// The coordinator has these.
    Free(RangeSet),
    /// Give me these, as many as fit a batch.
    Read {
        /// The first.
        from: u64,
        /// The last, inclusive.
        to: u64,
    },
}

/// What the thread says.
#[derive(Debug)]
pub enum Stored {
    /// These are durable now, in order of their numbers.
    Appended(Vec<Durable>),
    /// What was asked for, as far as it is there: the range that was looked through, and what it holds.
    Batch {
        /// The first number looked for.
        from: u64,
        /// The last number looked for.
        to: u64,
        /// What is there.
        readings: Vec<(u64, Vec<u8>)>,
    },
    /// What was asked for cannot be read now.
    Unreadable,
    /// All gaps that the coordinator does not know yet.
    Gaps(Vec<GapRecord>),
}

/// One durable reading.
#[derive(Clone, Debug)]
pub struct Durable {
    /// Its number.
    pub seq: u64,
    /// Its source.
    pub source: Name,
    /// Its bytes.
    pub bytes: Bytes,
}

/// Where each source goes on after a restart.
pub type Cursor = BTreeMap<Name, u64>;

/// As many results become durable with one write to the disk: at a hundred the cost of the write is spread
/// thin, and a group still fits one batch of the uplink.
const MAX_GROUP: usize = 100;
/// Bytes of one batch for the uplink; below the largest replay message.
const MAX_BATCH_BYTES: usize = 192 * 1024;
/// Readings of each source whose numbers are remembered for a mark that comes after them: more than the pipeline
/// looks back.
const RECENT: usize = 8;
/// How long to wait before trying a full or failing disk again.
const AFTER_FAILURE: Duration = Duration::from_millis(500);

/// The thread's state.
pub struct Store {
    device: Name,
    outbox: Outbox,
    cursor: Cursor,
    gaps_said: Vec<GapRecord>,
    to_uplink: Sender<Stored>,
    /// Where frames that are kept go, where any are.
    samples: Option<Tray>,
    /// Frame and number of each source's last readings.
    recent: BTreeMap<Name, VecDeque<(u64, u64)>>,
    counters: Counters,
}

/// A result, and what is kept of its frame.
type Entry = (Draft, Option<Box<Kept>>);

impl Store {
    /// Owns `outbox`, speaks to the uplink.
    #[must_use]
    pub fn new(
        device: Name,
        outbox: Outbox,
        cursor: Cursor,
        to_uplink: Sender<Stored>,
        counters: Counters,
    ) -> Self {
        let gaps_said = outbox.gaps().to_vec();
        let store = Self {
            device,
            outbox,
            cursor,
            gaps_said,
            to_uplink,
            samples: None,
            recent: BTreeMap::new(),
            counters,
        };
        store.count();
        store
    }

    /// With a way for frames that are kept.
    #[must_use]
    pub fn with_samples(self, samples: Option<Tray>) -> Self {
        Self { samples, ..self }
    }

    /// Serves until every sender of commands is gone. Blocks: it has a thread of its own.
    pub fn run(mut self, mut commands: Receiver<Command>) {
        let mut held = None;
        while let Some(command) = held.take().or_else(|| commands.blocking_recv()) {
            match command {
                Command::Keep {
                    draft,
                    kept,
                    again: true,
                } => self.keep_again(draft, kept),
                Command::Append(_) | Command::Keep { .. } => {
                    let mut group: Vec<Entry> = as_entry(command).into_iter().collect();
                    while group.len() < MAX_GROUP {
                        match commands.try_recv().map(as_entry) {
                            Ok(Ok(next)) => group.push(next),
                            Ok(Err(other)) => {
                                held = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    self.append(group);
                }
                Command::Free(stored) => {
                    if let Err(error) = self.outbox.free(&stored) {
                        tracing::warn!(%error, "acknowledged readings stay on disk for now");
                    }
                    self.say_gaps();
                }
                Command::Read { from, to } => {
                    let answer = match self.outbox.read(from, to, MAX_BATCH_BYTES) {
                        Ok(readings) => Stored::Batch { from, to, readings },
                        Err(error) => {
                            tracing::warn!(%error, "the backlog cannot be read; trying again");
                            std::thread::park_timeout(AFTER_FAILURE);
                            Stored::Unreadable
                        }
                    };
                    self.say_gaps();
                    self.say(answer);
                }
            }
            self.count();
        }
    }

    /// A disk that takes nothing holds the pipeline back; the reading waits, it is not dropped.
    fn append(&mut self, group: Vec<Entry>) {
        let mut cursor = self.cursor.clone();
        for (draft, _) in &group {
            // A frame that was marked becomes a reading after younger ones.
            let next = cursor.entry(draft.source.clone()).or_default();
            *next = (*next).max(draft.frame + 1);
        }
        let note = serde_json::to_vec(&cursor).unwrap_or_default();
        let mut complained = false;
        loop {
            let mut durable: Vec<Durable> = Vec::with_capacity(group.len());
            let (epoch, device) = (self.outbox.epoch(), &self.device);
            let encode = |seq: u64| {
                // The outbox may ask for the whole group again, with other numbers.
                if durable.len() == group.len() {
                    durable.clear();
                }
                let (draft, _) = group
                    .get(durable.len())
                    .ok_or(EventError::Value("more numbers than results"))?;
                let bytes = reading(device, epoch, seq, draft).encode()?;
                durable.push(Durable {
                    seq,
                    source: draft.source.clone(),
                    bytes: Bytes::from(bytes.clone()),
                });
                Ok::<_, EventError>(bytes)
            };
            match self.outbox.append(group.len(), encode, &note) {
                Ok(_) => {
                    self.cursor = cursor;
                    self.counters.readings.add(group.len() as u64);
                    self.say_gaps();
                    self.number(epoch, &durable, group);
                    self.say(Stored::Appended(durable));
                    return;
                }
                // Nothing that trying again could mend.
                Err(
                    error @ (OutboxError::Encode(_)
                    | OutboxError::Reading { .. }
                    | OutboxError::Group { .. }
                    | OutboxError::Cursor(_)),
                ) => {
                    self.counters.frames_bad.add(group.len() as u64);
                    tracing::error!(%error, results = group.len(), "results dropped: they make no reading");
                    return;
                }
                Err(error) => {
                    if !complained {
                        tracing::error!(%error, "readings cannot be stored; the device waits and tries again");
                        complained = true;
                    }
                    if self.to_uplink.is_closed() {
                        return;
                    }
                    std::thread::park_timeout(AFTER_FAILURE);
                }
            }
        }
    }

    /// What was kept goes on with its number. The disk has the readings already.
    fn number(&mut self, epoch: u64, durable: &[Durable], group: Vec<Entry>) {
        let Some(samples) = &self.samples else {
            return;
        };
        for (Durable { seq, .. }, (draft, kept)) in durable.iter().zip(group) {
            let recent = self.recent.entry(draft.source.clone()).or_default();
            recent.push_back((draft.frame, *seq));
            if recent.len() > RECENT {
                recent.pop_front();
            }
            if let Some(kept) = kept {
                samples.put(Job {
                    epoch,
                    seq: *seq,
                    draft,
                    kept,
                });
            }
        }
    }

    /// Somebody marked a frame whose reading is durable already.
    fn keep_again(&self, draft: Draft, kept: Box<Kept>) {
        let recent = self.recent.get(&draft.source);
        let seq = recent
            .and_then(|r| r.iter().rev().find(|(frame, _)| *frame == draft.frame))
            .map(|(_, seq)| *seq);
        match (seq, &self.samples) {
            (Some(seq), Some(samples)) => samples.put(Job {
                epoch: self.outbox.epoch(),
                seq,
                draft,
                kept,
            }),
            _ => self.counters.samples.lost(kept.reason),
        }
    }

    fn say_gaps(&mut self) {
        if self.outbox.gaps() != self.gaps_said {
            self.gaps_said = self.outbox.gaps().to_vec();
            self.say(Stored::Gaps(self.gaps_said.clone()));
        }
    }

    /// The uplink listens as long as the agent runs; after that what is durable waits for the next start.
    fn say(&self, what: Stored) {
        let _ = self.to_uplink.blocking_send(what);
    }

    fn count(&self) {
        self.counters.outbox_bytes.set(self.outbox.bytes());
        self.counters
            .gaps_pending
            .set(self.gaps_said.iter().map(|g| g.to - g.from + 1).sum());
    }
}

/// A result to append, if it is one.
#[expect(
    clippy::result_large_err,
    reason = "a command that is none comes back as it was"
)]
fn as_entry(command: Command) -> Result<Entry, Command> {
    match command {
        Command::Append(draft) => Ok((draft, None)),
        Command::Keep {
            draft,
            kept,
            again: false,
        } => Ok((draft, Some(kept))),
        other => Err(other),
    }
}

fn reading(device: &Name, epoch: u64, seq: u64, draft: &Draft) -> Reading {
    let answered = draft.answered.as_deref();
    let (label, score, margin, model) = match answered {
        Some(Answered { answer, .. }) => (
            &answer.label,
            answer.score,
            answer.margin,
            answer.model.as_str(),
        ),
        None => (&draft.label, draft.score, draft.margin, &*draft.model),
    };
    Reading {
        v: VERSION,
        device: device.clone(),
        source: draft.source.clone(),
        epoch,
        seq,
        ts: draft.ts,
        frame: draft.frame,
        label: label.clone(),
        score: round(score, 10_000.0),
        margin: round(margin, 10_000.0),
        model: model.to_owned(),
        latency_ms: round(draft.latency_ms, 100.0),
        by: answered.map(|answered| answered.by.clone()),
        file: draft.file.clone(),
        truth: draft.truth.clone(),
    }
}

/// As many digits as mean something: a reading travels over slow links.
fn round(value: f32, steps: f32) -> f32 {
    (value * steps).round() / steps
}

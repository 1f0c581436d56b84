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
use mesh_core::{
    EventError, Name, RangeSet, Reading, VERSION, fit_path, fit_share, fit_text, offload::Answered,
};
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

impl Draft {
    /// Makes it one that a reading can be made of, and a sample; true if something had to be changed. A coordinator refuses texts
    /// that are too long and scores outside 0..=1, whoever meant them: a folder may call its files anything, and a model without
    /// an activation gives out any number. That something was seen, and when, is worth more than the rest of a path, so
    /// it is not dropped. What a neighbour said has been looked at when it came.
    fn fit(&mut self) -> bool {
        let mut changed = fit_text(&mut self.label);
        if self.label.is_empty() {
            self.label = "unknown".into();
            changed = true;
        }
        let mut model = self.model.to_string();
        if fit_text(&mut model) {
            self.model = model.into();
            changed = true;
        }
        changed |= self.file.as_mut().is_some_and(fit_path);
        changed |= self.truth.as_mut().is_some_and(fit_text);
        changed |= fit_share(&mut self.score);
        changed |= fit_share(&mut self.margin);
        changed
    }
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
    /// It was said that results are cut.
    complained_of_cuts: bool,
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
            complained_of_cuts: false,
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
                    mut draft,
                    kept,
                    again: true,
                } => {
                    draft.fit();
                    self.keep_again(draft, kept);
                }
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
                    self.fit(&mut group);
                    self.append(group);
                }
                Command::Free(stored) => {
                    if let Err(error) = self.outbox.free(&stored) {
                        self.counters.store_errors.add(1);
                        tracing::warn!(%error, "acknowledged readings stay on disk for now");
                    }
                    self.say_gaps();
                }
                Command::Read { from, to } => {
                    let answer = match self.outbox.read(from, to, MAX_BATCH_BYTES) {
                        Ok(readings) => Stored::Batch { from, to, readings },
                        Err(error) => {
                            self.counters.store_errors.add(1);
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

    /// Makes readings possible of all of them.
    fn fit(&mut self, group: &mut [Entry]) {
        for (draft, _) in group {
            let frame = draft.frame;
            if !draft.fit() {
                continue;
            }
            self.counters.readings_cut.add(1);
            if !std::mem::replace(&mut self.complained_of_cuts, true) {
                tracing::warn!(source = %draft.source, frame, "a result did not fit into a reading and was cut (said once): a text has at most 256 bytes, scores lie between 0 and 1");
            }
        }
    }

    /// A disk that takes nothing holds the pipeline back; the reading waits, it is not dropped.
    fn append(&mut self, mut group: Vec<Entry>) {
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
                    // … but it may be mended for those beside it: a half at a time, until the bad one is alone.
                    let half = group.split_off(group.len() / 2);
                    if !group.is_empty() {
                        tracing::warn!(%error, results = group.len() + half.len(), "results make no readings together; trying fewer at a time");
                        self.append(group);
                        self.append(half);
                        return;
                    }
                    for (_, kept) in half {
                        self.counters.frames_bad.add(1);
                        if let Some(kept) = kept {
                            self.counters.samples.lost(kept.reason);
                        }
                    }
                    // It has no number yet, so that it leaves no gap among those that have.
                    self.counters.results_dropped.add(1);
                    tracing::error!(%error, "a result is dropped: it makes no reading");
                    return;
                }
                Err(error) => {
                    self.counters.store_errors.add(1);
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

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::outbox::Options;

    fn draft(frame: u64) -> Draft {
        Draft {
            source: "cam0".parse().unwrap(),
            frame,
            ts: 0,
            label: "ok".into(),
            score: 0.5,
            margin: 0.5,
            model: "m@1".into(),
            latency_ms: 1.0,
            file: None,
            truth: None,
            answered: None,
        }
    }

    /// What the store makes of these, together in one group; frames and bytes.
    fn stored(drafts: Vec<Draft>, counters: &Counters) -> Vec<Durable> {
        let dir = tempfile::tempdir().unwrap();
        let outbox = Outbox::open(Options::new(dir.path(), 8 << 20)).unwrap();
        let (say, mut said) = mpsc::channel(64);
        let (ask, asked) = mpsc::channel(MAX_GROUP);
        counters.results.add(drafts.len() as u64);
        for draft in drafts {
            ask.try_send(Command::Append(draft)).unwrap();
        }
        drop(ask);
        let device = "d1".parse().unwrap();
        Store::new(device, outbox.outbox, Cursor::new(), say, counters.clone()).run(asked);
        let mut all = Vec::new();
        while let Ok(said) = said.try_recv() {
            if let Stored::Appended(readings) = said {
                all.extend(readings);
            }
        }
        all
    }

    /// Whatever a source and a model say: what becomes durable is what a coordinator takes.
    #[test]
    fn what_is_stored_can_be_ingested() {
        let long = |length: usize| "ä".repeat(length);
        let odd: Vec<Draft> = [
            Draft {
                file: Some(long(2_000) + "/17.jpg"),
                ..draft(0)
            },
            Draft {
                label: long(200),
                ..draft(1)
            },
            Draft {
                label: String::new(),
                ..draft(2)
            },
            Draft {
                truth: Some(long(129)),
                ..draft(3)
            },
            Draft {
                model: long(300).into(),
                ..draft(4)
            },
            Draft {
                score: 7.25,
                margin: 9.0,
                ..draft(5)
            },
            Draft {
                score: -0.001,
                margin: f32::NAN,
                ..draft(6)
            },
        ]
        .into();
        let counters = Counters::default();
        let count = odd.len();
        let readings = stored(odd.into_iter().chain([draft(7)]).collect(), &counters);
        assert_eq!(readings.len(), count + 1);
        let device: Name = "d1".parse().unwrap();
        for Durable { seq, bytes, .. } in &readings {
            let reading = Reading::decode(bytes, &device).unwrap();
            assert_eq!(reading.frame + 1, *seq, "{reading:?}");
        }
        let file = Reading::decode(&readings[0].bytes, &device).unwrap().file;
        assert!(file.unwrap().ends_with("ä/17.jpg"));
        assert_eq!(counters.readings_cut.get(), count as u64);
        assert!(counters.is_stored());
    }

    /// A hundred results of which each is all right, and together too large for one write to the outbox.
    #[test]
    fn what_makes_no_group_makes_smaller_ones() {
        // Six bytes each in JSON.
        let file = Some("\u{1}".repeat(256));
        let drafts = (0..MAX_GROUP as u64).map(|frame| Draft {
            file: file.clone(),
            label: "\u{1}".repeat(256),
            ..draft(frame)
        });
        let counters = Counters::default();
        let readings = stored(drafts.collect(), &counters);
        let seqs: Vec<u64> = readings.iter().map(|r| r.seq).collect();
        assert_eq!(seqs, (1..=MAX_GROUP as u64).collect::<Vec<_>>());
        assert!(counters.is_stored() && counters.frames_bad.get() == 0);
    }

    /// One that cannot be encoded costs itself and nothing else.
    #[test]
    fn a_bad_result_goes_alone() {
        let counters = Counters::default();
        let drafts = (0..MAX_GROUP as u64).map(|frame| match frame {
            // Said by a neighbour, and not looked at.
            37 => Draft {
                answered: Some(Box::new(unsound())),
                ..draft(frame)
            },
            _ => draft(frame),
        });
        let readings = stored(drafts.collect(), &counters);
        assert_eq!(readings.len(), MAX_GROUP - 1);
        assert!(readings.iter().map(|r| r.seq).eq(1..MAX_GROUP as u64));
        let dropped = (counters.frames_bad.get(), counters.results_dropped.get());
        assert!(dropped == (1, 1) && counters.is_stored());
    }

    fn unsound() -> Answered {
        Answered {
            by: "d2".parse().unwrap(),
            answer: mesh_core::offload::Answer {
                model: "m@1".into(),
                label: "ok".into(),
                score: 2.0,
                margin: 0.5,
            },
        }
    }

    /// A disk that fails is counted, and tried again until it works.
    #[test]
    fn a_disk_that_takes_nothing_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("outbox");
        let outbox = Outbox::open(Options::new(&at, 8 << 20)).unwrap().outbox;
        // The folder is away, as a disk that was pulled.
        let away = dir.path().join("away");
        std::fs::rename(&at, &away).unwrap();
        let (say, mut said) = mpsc::channel(8);
        let (ask, asked) = mpsc::channel(8);
        let counters = Counters::default();
        let store = Store::new(
            "d1".parse().unwrap(),
            outbox,
            Cursor::new(),
            say,
            counters.clone(),
        );
        let thread = std::thread::spawn(move || store.run(asked));
        ask.blocking_send(Command::Append(draft(0))).unwrap();
        while counters.store_errors.get() == 0 {
            std::thread::park_timeout(Duration::from_millis(10));
        }
        std::fs::rename(&away, &at).unwrap();
        assert!(
            matches!(said.blocking_recv(), Some(Stored::Appended(readings)) if readings.len() == 1)
        );
        drop(ask);
        thread.join().unwrap();
    }
}

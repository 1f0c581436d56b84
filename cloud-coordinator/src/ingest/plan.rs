//! From messages to one commit. Pure: what is stored already goes in, what is to be written comes out.

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;
use mesh_core::{Event, EventError, Gap, Kind, Name, RangeSet, Reading, Refused, Replay};

use crate::store::{NewGap, NewReading};

/// The most ranges that are kept of one outbox. An honest device leaves a few; one that skips every other
/// number would otherwise grow without end. Beyond it only readings that join a range are taken.
const MAX_PIECES: usize = 4_096;

/// Why a message was not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Event(#[from] EventError),
    #[error("not a word that a status can be")]
    Status,
    #[error("the readings of this outbox are too scattered")]
    Scattered,
    #[error("more devices than this coordinator takes")]
    Devices,
    #[error("the device has had more outboxes than can be told from a fault")]
    Outboxes,
}

impl Refusal {
    /// One word for the counter.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Event(EventError::TooLarge { .. }) => "too_large",
            Self::Event(EventError::Json(_)) => "not_json",
            Self::Event(EventError::Version(_)) => "version",
            Self::Event(EventError::Device(..)) => "wrong_device",
            Self::Event(EventError::Value(_)) | Self::Status => "value",
            Self::Scattered => "scattered",
            Self::Devices => "too_many_devices",
            Self::Outboxes => "too_many_outboxes",
        }
    }
}

/// Reads the events of a message of `kind`, which is `result`, `replay` or `gap`. What of it cannot be used is told to `refuse`.
/// What never will be is a gap among the events: its acknowledgement frees the device, which would send it for ever.
pub(crate) fn events(
    kind: Kind,
    payload: &Bytes,
    device: &Name,
    mut refuse: impl FnMut(&Refusal),
) -> Result<Vec<Event>, Refusal> {
    let mut event = |taken: Result<Reading, Refused>| match taken {
        Ok(reading) => Some(Event::Reading(reading)),
        Err(Refused { error, gap }) => {
            refuse(&error.into());
            gap.map(Event::Gap)
        }
    };
    Ok(match kind {
        Kind::Result => event(Reading::take(payload, device)).into_iter().collect(),
        Kind::Replay => {
            let taken = Replay::decode(payload, device)?;
            taken.into_iter().filter_map(event).collect()
        }
        Kind::Gap => vec![Event::Gap(Gap::decode(payload, device)?)],
        _ => Vec::new(),
    })
}

/// The outbox that an event is from.
pub(crate) fn epoch(event: &Event) -> u64 {
    match event {
        Event::Reading(reading) => reading.epoch,
        Event::Gap(gap) => gap.epoch,
    }
}

/// What is known of each outbox: device, epoch → stored or known to be missing.
pub(crate) type Progress = HashMap<(i64, u64), RangeSet>;

/// One commit in the making.
#[derive(Debug)]
pub(crate) struct Plan {
    /// As it will be after the commit, for every outbox that was named.
    pub(crate) progress: Progress,
    /// Those of them that the commit changes. The others are acknowledged again all the same.
    pub(crate) changed: BTreeSet<(i64, u64)>,
    pub(crate) readings: Vec<NewReading>,
    pub(crate) gaps: Vec<NewGap>,
    pub(crate) duplicates: u64,
    next_id: i64,
    pub(crate) now_ms: i64,
}

impl Plan {
    /// Starts with what is stored of the outboxes that the messages name; others are refused.
    pub(crate) fn new(progress: Progress, next_id: i64, now_ms: i64) -> Self {
        Self {
            progress,
            changed: BTreeSet::new(),
            readings: Vec::new(),
            gaps: Vec::new(),
            duplicates: 0,
            next_id,
            now_ms,
        }
    }

    /// Takes one event in.
    pub(crate) fn add(&mut self, device: i64, event: Event, replayed: bool) -> Result<(), Refusal> {
        match event {
            Event::Reading(reading) => self.add_reading(device, reading, replayed),
            Event::Gap(gap) => self.add_gap(device, &gap),
        }
    }

    fn add_reading(
        &mut self,
        device: i64,
        reading: Reading,
        replayed: bool,
    ) -> Result<(), Refusal> {
        let key = (device, reading.epoch);
        let known = self.progress.get_mut(&key).ok_or(Refusal::Outboxes)?;
        if known.contains(reading.seq) {
            self.duplicates += 1;
            return Ok(());
        }
        room(known, reading.seq, reading.seq)?;
        known.insert(reading.seq, reading.seq);
        self.changed.insert(key);
        self.readings.push(NewReading {
            id: self.next_id,
            device,
            received_ms: self.now_ms,
            replayed,
            reading,
        });
        self.next_id += 1;
        Ok(())
    }

    /// Of a gap, only what is not stored is missing: a reading may have been dropped on the device after it
    /// had arrived here, before the device could know.
    fn add_gap(&mut self, device: i64, gap: &Gap) -> Result<(), Refusal> {
        let key = (device, gap.epoch);
        let known = self.progress.get_mut(&key).ok_or(Refusal::Outboxes)?;
        room(known, gap.from, gap.to)?;
        let mut missing = RangeSet::new();
        missing.insert(gap.from, gap.to);
        for (from, to) in known.overlap(gap.from, gap.to) {
            missing.remove(from, to);
        }
        if missing.is_empty() {
            return Ok(());
        }
        known.insert(gap.from, gap.to);
        self.changed.insert(key);
        self.gaps.extend(missing.iter().map(|(from, to)| NewGap {
            device,
            epoch: gap.epoch,
            from,
            to,
            reason: gap.reason,
            received_ms: self.now_ms,
        }));
        Ok(())
    }
}

/// Is there room for `from..=to` in the set?
fn room(known: &RangeSet, from: u64, to: u64) -> Result<(), Refusal> {
    let joins = || {
        let (before, after) = (from.saturating_sub(1), to.saturating_add(1));
        known.overlap(before, after).next().is_some()
    };
    if known.pieces() < MAX_PIECES || joins() {
        Ok(())
    } else {
        Err(Refusal::Scattered)
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{GapReason, VERSION};
    use proptest::prelude::*;

    use super::*;

    fn reading(epoch: u64, seq: u64) -> Reading {
        Reading {
            v: VERSION,
            device: "d1".parse().unwrap(),
            source: "cam0".parse().unwrap(),
            epoch,
            seq,
            ts: 0,
            frame: seq,
            label: "ok".into(),
            score: 0.5,
            margin: 0.5,
            model: "m@1".into(),
            latency_ms: 1.0,
            by: None,
            file: None,
            truth: None,
        }
    }

    fn gap(epoch: u64, from: u64, to: u64) -> Event {
        Event::Gap(Gap {
            v: VERSION,
            device: "d1".parse().unwrap(),
            epoch,
            from,
            to,
            reason: GapReason::Full,
        })
    }

    #[test]
    fn a_shattered_outbox_is_bounded_but_its_holes_can_be_filled() {
        let known = Progress::from([((1, 1), RangeSet::new())]);
        let mut plan = Plan::new(known, 1, 0);
        let stranger = plan.add(1, Event::Reading(reading(2, 1)), false);
        assert!(matches!(stranger, Err(Refusal::Outboxes)));
        let add = |plan: &mut Plan, seq| plan.add(1, Event::Reading(reading(1, seq)), false);
        for n in 1..=MAX_PIECES as u64 {
            add(&mut plan, n * 2).unwrap();
        }
        assert!(matches!(add(&mut plan, 1 << 40), Err(Refusal::Scattered)));
        add(&mut plan, 3).unwrap();
        assert!(plan.add(1, gap(1, 1, 1 << 41), false).is_ok());
        assert_eq!(plan.progress[&(1, 1)].pieces(), 1);
    }

    proptest! {
        /// Whatever comes, however often and in whatever order, cut into whatever commits: each number is
        /// stored once, or missing once, or neither if it never came, and the progress says exactly that.
        #[test]
        fn every_number_is_counted_once(
            steps in prop::collection::vec((any::<bool>(), 0u64..2, 1u64..50, 0u64..10, any::<bool>()), 1..120)
        ) {
            let mut progress = Progress::from([0, 1].map(|epoch| ((1, epoch), RangeSet::new())));
            let (mut stored, mut missing) = (BTreeSet::new(), BTreeSet::new());
            let (mut next_id, mut came) = (1, BTreeSet::new());
            for chunk in steps.chunks(7) {
                let mut plan = Plan::new(progress.clone(), next_id, 0);
                for (is_gap, epoch, from, length, replayed) in chunk {
                    if *is_gap {
                        plan.add(1, gap(*epoch, *from, from + length), *replayed).unwrap();
                        came.extend((*from..=from + length).map(|s| (*epoch, s)));
                    } else {
                        plan.add(1, Event::Reading(reading(*epoch, *from)), *replayed).unwrap();
                        came.insert((*epoch, *from));
                    }
                }
                for r in &plan.readings {
                    prop_assert!(stored.insert((r.reading.epoch, r.reading.seq)), "stored twice");
                    prop_assert!(r.id >= next_id);
                }
                for g in &plan.gaps {
                    for seq in g.from..=g.to {
                        prop_assert!(missing.insert((g.epoch, seq)), "missing twice");
                    }
                }
                next_id += plan.readings.len() as i64;
                progress = plan.progress;
            }
            prop_assert!(stored.is_disjoint(&missing));
            let known: BTreeSet<_> = progress.iter()
                .flat_map(|((_, epoch), set)| set.iter().flat_map(move |(a, b)| (a..=b).map(move |s| (*epoch, s))))
                .collect();
            prop_assert_eq!(&known, &came);
            prop_assert_eq!(known, stored.union(&missing).copied().collect::<BTreeSet<_>>());
        }
    }
}

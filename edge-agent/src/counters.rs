//! What the agent counts about itself.

use std::{
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use mesh_core::{Metrics, VERSION};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Replaces the number: for those that say how much there is now.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters, shared between the threads.
#[derive(Clone, Debug, Default)]
pub struct Counters(Arc<Numbers>);

impl Deref for Counters {
    type Target = Numbers;
    fn deref(&self) -> &Numbers {
        &self.0
    }
}

/// The numbers.
#[derive(Debug, Default)]
pub struct Numbers {
    /// Frames captured.
    pub frames: Counter,
    /// Frames that could not be read, decoded or looked at.
    pub frames_bad: Counter,
    /// Frames that the gate held back.
    pub frames_gated: Counter,
    /// Results handed to the store.
    pub results: Counter,
    /// Results that make no reading, and were dropped.
    pub results_dropped: Counter,
    /// Readings made durable.
    pub readings: Counter,
    /// Readings with a text that was cut or a number that was brought into its range.
    pub readings_cut: Counter,
    /// Times that the outbox could not be written, read or freed.
    pub store_errors: Counter,
    /// Connections to the broker that were lost.
    pub reconnects: Counter,
    /// Tries to connect to the broker that came to nothing.
    pub connect_failures: Counter,
    /// Messages from the broker that could not be used.
    pub refused: Counter,
    /// Devices of the site that are there, this one left out.
    pub neighbours: Counter,
    /// Neighbours with which there is a link.
    pub links: Counter,
    /// Handshakes with somebody who is not on the roster.
    pub strangers: Counter,
    /// What came from neighbours and was not signed by whom it names.
    pub forgeries: Counter,
    /// Connections that were carried for neighbours.
    pub carried: Counter,
    /// What went over them, in bytes, both ways.
    pub carried_bytes: Counter,
    /// Connections to the broker that a neighbour carried.
    pub by_neighbours: Counter,
    /// Readings that wait for the coordinator's acknowledgement.
    pub backlog: Counter,
    /// Bytes that the outbox takes on disk.
    pub outbox_bytes: Counter,
    /// Readings dropped whose gap the coordinator does not know yet.
    pub gaps_pending: Counter,
    /// Moving average of the time from frame to result, in microseconds.
    pub latency_us: Counter,
    /// Sources that see something else than they should.
    pub drifting: Counter,
    /// Bytes that came for new models over the uplink …
    pub update_bytes: Counter,
    /// Frames that neighbours look at, and those of neighbours.
    pub offload: OffloadNumbers,
    /// … and from neighbours.
    pub swarm_bytes: Counter,
    /// Bytes of models that neighbours had from this device.
    pub served_bytes: Counter,
    /// Neighbours that have served wrong bytes too often.
    pub bans: Counter,
    /// Frames that are kept to learn from.
    pub samples: crate::samples::SampleNumbers,
}

/// Frames that neighbours look at for this device, and those that it looks at for them.
#[derive(Debug, Default)]
pub struct OffloadNumbers {
    /// Handed to a neighbour.
    pub asked: Counter,
    /// Of these, answered in time: the answer became the result.
    pub answered: Counter,
    /// Of these, refused at once.
    pub refused: Counter,
    /// Of these, answered too late, wrongly or not at all.
    pub late: Counter,
    /// Frames of neighbours that were looked at.
    pub served: Counter,
    /// Frames of neighbours that were not.
    pub turned_away: Counter,
    /// Parts of a model that were run for a neighbour.
    pub parts: Counter,
    /// Times that a neighbour with a part of a model failed a frame.
    pub replaced: Counter,
}

impl Numbers {
    /// Is the store done with every result that was handed to it?
    #[must_use]
    pub fn is_stored(&self) -> bool {
        self.results.get() == self.readings.get() + self.results_dropped.get()
    }

    /// What a device says about its counts. What is not counted here is left at nothing.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let samples = &self.samples;
        // In the order of the reasons.
        let kept = |at: usize| samples.kept.get(at).map_or(0, Counter::get);
        Metrics {
            v: VERSION,
            frames: self.frames.get(),
            frames_bad: self.frames_bad.get(),
            frames_gated: self.frames_gated.get(),
            readings: self.readings.get(),
            readings_cut: self.readings_cut.get(),
            backlog: self.backlog.get(),
            outbox_bytes: self.outbox_bytes.get(),
            store_errors: self.store_errors.get(),
            gaps_pending: self.gaps_pending.get(),
            reconnects: self.reconnects.get(),
            connect_failures: self.connect_failures.get(),
            refused: self.refused.get(),
            latency_ms: self.latency_us.get() as f32 / 1_000.0,
            rss_bytes: resident_bytes(),
            samples_wrong: kept(0),
            samples_missed: kept(1),
            samples_uncertain: kept(2),
            samples_novel: kept(3),
            samples_random: kept(4),
            samples_disputed: kept(5),
            samples_dropped: samples.dropped.get() + samples.evicted.get(),
            samples_sent: samples.sent.get(),
            samples_refused: samples.refused.get(),
            samples_waiting: samples.waiting.get(),
            drifting: self.drifting.get(),
            update_bytes: self.update_bytes.get(),
            ..Metrics::default()
        }
    }

    /// Takes one more time from frame to result into the average.
    pub fn latency(&self, us: u64) {
        let old = self.latency_us.get();
        // An eighth of the new value: follows a change within a second or two of frames.
        self.latency_us
            .set(if old == 0 { us } else { (old * 7 + us) / 8 });
    }
}

/// The resident memory of this process in bytes, 0 where the system does not say.
#[must_use]
pub fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line
        .and_then(|rest| rest.split_ascii_whitespace().next())
        .and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

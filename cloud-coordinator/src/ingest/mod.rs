//! Takes messages in: bounded queue → one commit → acknowledgements.
//!
//! While one commit is on its way to the disk the next batch gathers, so that a commit holds as much as
//! arrived meanwhile: little when little happens, thousands of readings under load. Nothing is acknowledged
//! that is not committed; a commit that fails is tried again until it works or the coordinator stops, and
//! meanwhile the queue fills and the devices wait.

mod acks;
mod inbox;
mod link;
mod plan;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    Backoff, Event, Info, Kind, Metrics as DeviceMetrics, ModelInfo, RangeSet, Reported,
    State as Health, Status, Topic, drift::Drift,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

pub(crate) use acks::Acks;
pub(crate) use inbox::{Inbox, Incoming, KINDS};
pub(crate) use link::{External, Link, publish_acks};
use plan::{Plan, Progress, Refusal};

use crate::{
    api::live::Live,
    clock,
    metrics::Metrics,
    notice::Notices,
    registry::{Change, Device, Registry},
    store::{Batch, Store, StoreError},
};

/// Messages of one commit. Some thousand make the cost of a commit disappear in that of its rows.
const BATCH_MESSAGES: usize = 4_096;
/// Payload of one commit in bytes, for batches of large replays.
const BATCH_BYTES: usize = 8 << 20;
/// Messages below which a batch is small: the commit would cost more than its rows.
const SMALL: usize = 512;
/// How long a small batch waits for company: far below the second that devices are promised.
const LINGER: Duration = Duration::from_millis(20);
/// Outboxes whose progress is kept in memory; each takes a few hundred bytes. Others are read when needed.
const CACHED_OUTBOXES: usize = 150_000;
/// Outboxes of one device: a new one is made when a device is set up anew or its disk was damaged. Each is
/// remembered for ever, so a device that makes one for every reading is refused.
const MAX_OUTBOXES: i64 = 10_000;
/// A failed commit is tried again after at most this, in milliseconds.
const MAX_RETRY_MS: u64 = 5_000;
const FIRST_RETRY_MS: u64 = 50;
/// Devices that were heard of within this time are told at the start what is stored of them.
const RECENT_MS: i64 = 7 * 24 * 3_600 * 1_000;

/// What ingest works on.
pub(crate) struct Ingest {
    pub(crate) store: Arc<Store>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) acks: Arc<Acks>,
    pub(crate) live: Live,
    /// The error of the last commit, for `/readyz`.
    pub(crate) health: watch::Sender<Option<String>>,
    pub(crate) next_id: i64,
    pub(crate) started: Instant,
    pub(crate) cache: HashMap<(i64, u64), (RangeSet, u64)>,
    pub(crate) batches: u64,
    pub(crate) notices: Notices,
}

/// An event with its origin.
struct Arrived {
    device: i64,
    replayed: bool,
    event: Event,
}

impl Ingest {
    /// Works until `stop`; a commit that is under way is finished.
    pub(crate) async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Incoming>,
        stop: CancellationToken,
    ) {
        let mut batch = Vec::with_capacity(BATCH_MESSAGES);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = gather(&mut inbox, &mut batch) => {}
            }
            if batch.is_empty() {
                return;
            }
            let messages = i64::try_from(batch.len()).unwrap_or(i64::MAX);
            self.metrics.queue_messages.dec_by(messages);
            if !self.take(&mut batch, &stop).await {
                return;
            }
        }
    }

    /// Stores one batch and acknowledges it; false if it was stopped before it could.
    async fn take(&mut self, batch: &mut Vec<Incoming>, stop: &CancellationToken) -> bool {
        let oldest = batch.iter().map(|m| m.at).min();
        let now_ms = clock::now_ms();
        let (mut arrived, mut touched) = (Vec::with_capacity(batch.len()), Vec::new());
        for message in batch.iter() {
            let (site, device) = (&message.topic.site, &message.topic.device);
            let done = match self.registry.heard(site, device, now_ms) {
                Some(id) => self.read(id, message, &mut arrived, &mut touched),
                None => Err(Refusal::Devices),
            };
            if let Err(refusal) = done {
                self.refuse(&message.topic.to_string(), &refusal);
            }
        }
        // From here the payloads are not needed: their room goes to what arrives during the commit.
        batch.clear();

        let Some(known) = self.known(&arrived, stop).await else {
            return false;
        };
        let mut plan = Plan::new(known, self.next_id, now_ms);
        for a in arrived {
            if let Err(refusal) = plan.add(a.device, a.event, a.replayed) {
                self.refuse(&format!("device {}", a.device), &refusal);
            }
        }
        if !self.write(&plan, &touched, stop).await {
            return false;
        }
        if let Some(oldest) = oldest
            && !plan.progress.is_empty()
        {
            let waited = oldest.elapsed().as_secs_f64();
            self.metrics.ack_seconds.observe(waited);
        }
        self.remember(plan.progress);
        true
    }

    /// One log line per kind of refusal, and a counter.
    fn refuse(&self, origin: &str, refusal: &Refusal) {
        let reason = refusal.reason();
        self.metrics.refused(reason);
        if let Some(held_back) = self.notices.due(reason) {
            tracing::warn!(
                origin,
                reason,
                held_back,
                "a message or a reading in it was refused: {refusal}"
            );
        }
    }

    /// Reads one message: readings and gaps are gathered, reports go into the registry.
    fn read(
        &self,
        id: i64,
        message: &Incoming,
        arrived: &mut Vec<Arrived>,
        touched: &mut Vec<i64>,
    ) -> Result<(), Refusal> {
        let payload = &message.payload;
        let kind = message.topic.kind;
        let changed = match kind {
            Kind::Status => {
                let status = Status::decode(payload).ok_or(Refusal::Status)?;
                let set = |d: &mut Device| d.status.replace(status) != Some(status);
                self.registry.update(id, set)
            }
            Kind::Info => {
                let info = Info::decode(payload)?;
                let set = |d: &mut Device| d.info.replace(info.clone()).as_ref() != Some(&info);
                self.registry.update(id, set)
            }
            Kind::Model => {
                // Empty: none is left in memory.
                let model = match payload.is_empty() {
                    true => None,
                    false => Some(ModelInfo::decode(payload)?),
                };
                let set = |d: &mut Device| std::mem::replace(&mut d.model, model.clone()) != model;
                self.registry.update(id, set)
            }
            Kind::State => {
                let health = Health::decode(payload)?;
                let set =
                    |d: &mut Device| d.health.replace(health.clone()).as_ref() != Some(&health);
                self.registry.update(id, set)
            }
            Kind::Metrics => {
                let metrics = DeviceMetrics::decode(payload)?;
                self.registry.update(id, |d| {
                    d.metrics = Some(metrics);
                    false
                })
            }
            Kind::Result | Kind::Replay | Kind::Gap => {
                let topic = &message.topic;
                let refuse = |refusal: &Refusal| self.refuse(&topic.to_string(), refusal);
                let events = plan::events(kind, payload, &topic.device, refuse)?;
                arrived.extend(events.into_iter().map(|event| Arrived {
                    device: id,
                    replayed: kind == Kind::Replay,
                    event,
                }));
                false
            }
            Kind::Drift => {
                let Topic { device, source, .. } = &message.topic;
                let drift = Drift::decode(payload, device, source)?;
                self.registry.update(id, |d| d.drifted(drift));
                false
            }
            Kind::Reported => {
                let reported = Reported::decode(payload)?;
                self.registry.update(id, |d| {
                    d.told(reported);
                    false
                })
            }
            Kind::Image
            | Kind::Desired
            | Kind::Ack
            | Kind::Mark
            | Kind::Roster
            | Kind::Meeting
            | Kind::Sighting => false,
        };
        if changed {
            touched.push(id);
        }
        Ok(())
    }

    /// What is stored of every outbox that the events name, except those that are one too many; `None` if it
    /// was stopped before it could be read.
    async fn known(&mut self, arrived: &[Arrived], stop: &CancellationToken) -> Option<Progress> {
        let keys = arrived.iter().map(|a| (a.device, plan::epoch(&a.event)));
        let keys: HashSet<(i64, u64)> = keys.collect();
        let mut known = Progress::new();
        let mut retry = Backoff::new(FIRST_RETRY_MS, MAX_RETRY_MS);
        for key in keys {
            loop {
                match self.of_outbox(key).await {
                    Ok(stored) => {
                        known.extend(stored.map(|stored| (key, stored)));
                        break;
                    }
                    Err(error) if self.failed(&error, &mut retry, stop).await => return None,
                    Err(_) => {}
                }
            }
        }
        Some(known)
    }

    /// What is stored of one outbox; `None` if it is new and the device has had too many.
    async fn of_outbox(&self, key: (i64, u64)) -> Result<Option<RangeSet>, StoreError> {
        if let Some((stored, _)) = self.cache.get(&key) {
            return Ok(Some(stored.clone()));
        }
        if let Some(stored) = self.store.progress(key.0, key.1).await? {
            return Ok(Some(stored));
        }
        let had = self.store.outboxes(key.0).await?;
        Ok((had < MAX_OUTBOXES).then(RangeSet::new))
    }

    /// Says that the database failed and waits a while; true if it is time to stop.
    async fn failed(
        &self,
        error: &StoreError,
        retry: &mut Backoff,
        stop: &CancellationToken,
    ) -> bool {
        self.metrics.store_errors.inc();
        if let Some(held_back) = self.notices.due("store") {
            tracing::error!(%error, held_back, "cannot store readings, trying again");
        }
        self.health.send_replace(Some(error.to_string()));
        let wait = Duration::from_millis(retry.next(clock::random()));
        tokio::select! {
            () = stop.cancelled() => true,
            () = tokio::time::sleep(wait) => false,
        }
    }

    /// Commits, then acknowledges and shows; false if it was stopped before the commit succeeded.
    async fn write(&mut self, plan: &Plan, touched: &[i64], stop: &CancellationToken) -> bool {
        let mut changes: HashMap<i64, Change<'_>> =
            touched.iter().map(|id| (*id, Change::default())).collect();
        let mut replayed = 0;
        for new in &plan.readings {
            let change = changes.entry(new.device).or_default();
            change.stored += 1;
            match &new.reading.truth {
                Some(truth) if *truth == new.reading.label => change.right += 1,
                Some(_) => change.wrong += 1,
                None => {}
            }
            replayed += u64::from(new.replayed);
            if !new.replayed {
                change.live = Some(&new.reading);
            }
        }
        let mut missing = 0;
        for gap in &plan.gaps {
            let length = gap.to - gap.from + 1;
            missing += length;
            changes.entry(gap.device).or_default().missing += length;
        }
        let devices: Vec<_> = changes
            .iter()
            .filter_map(|(id, change)| self.registry.row_after(*id, change))
            .collect();
        let progress: Vec<_> = plan
            .changed
            .iter()
            .filter_map(|key| plan.progress.get_key_value(key))
            .collect();
        let batch = Batch {
            devices: &devices,
            readings: &plan.readings,
            gaps: &plan.gaps,
            progress: &progress,
            now_ms: plan.now_ms,
        };
        if !batch.is_empty() {
            let started = Instant::now();
            let mut retry = Backoff::new(FIRST_RETRY_MS, MAX_RETRY_MS);
            while let Err(error) = self.store.commit(&batch).await {
                if self.failed(&error, &mut retry, stop).await {
                    return false;
                }
            }
            let took = started.elapsed().as_secs_f64();
            self.metrics.commit_seconds.observe(took);
            if self.health.send_replace(None).is_some() {
                tracing::info!("readings are stored again");
            }
        }
        // It is on the disk: say so to the devices first. Duplicates are acknowledged again, since the
        // device would not have sent them if it knew.
        for ((device, epoch), stored) in &plan.progress {
            if let Some((site, name)) = self.registry.names(*device) {
                self.acks.put(&site, &name, *epoch, stored);
            }
        }
        self.next_id += i64::try_from(plan.readings.len()).unwrap_or(0);
        let second = self.started.elapsed().as_secs();
        for (id, change) in &changes {
            self.registry.committed(*id, change, second);
        }
        let stored = plan.readings.len() as u64;
        self.metrics.ingested.inc_by(stored);
        self.metrics.replayed.inc_by(replayed);
        self.metrics.duplicates.inc_by(plan.duplicates);
        self.metrics.missing.inc_by(missing);
        if stored > 0 {
            self.metrics.batch_readings.observe(stored as f64);
            self.live.readings(&self.registry, &plan.readings);
        }
        true
    }

    /// Keeps the progress at hand for the next batch; beyond the bound the longest unused is forgotten.
    fn remember(&mut self, progress: Progress) {
        self.batches += 1;
        let now = self.batches;
        let seen = progress.into_iter().map(|(key, set)| (key, (set, now)));
        self.cache.extend(seen);
        if self.cache.len() > CACHED_OUTBOXES {
            let mut ages: Vec<u64> = self.cache.values().map(|(_, used)| *used).collect();
            let middle = ages.len() / 2;
            let (_, median, _) = ages.select_nth_unstable(middle);
            let median = *median;
            self.cache.retain(|_, (_, used)| *used > median);
        }
    }
}

/// Waits for messages and takes as many as belong in one commit; none at all if the queue is closed.
async fn gather(inbox: &mut mpsc::Receiver<Incoming>, batch: &mut Vec<Incoming>) {
    let first = inbox.recv_many(batch, BATCH_MESSAGES).await;
    if (1..SMALL).contains(&first) {
        tokio::time::sleep(LINGER).await;
    }
    let mut bytes: usize = batch.iter().map(|m| m.payload.len()).sum();
    while batch.len() < BATCH_MESSAGES
        && bytes < BATCH_BYTES
        && let Ok(message) = inbox.try_recv()
    {
        bytes += message.payload.len();
        batch.push(message);
    }
}

/// Acknowledges again what is stored of every device that was heard of lately, so that devices that wait
/// learn that the coordinator is back.
pub(crate) async fn announce(
    store: &Store,
    registry: &Registry,
    acks: &Acks,
) -> Result<usize, StoreError> {
    let recent = store
        .recent_progress(clock::now_ms().saturating_sub(RECENT_MS))
        .await?;
    let mut announced = 0;
    for (device, epoch, stored) in recent {
        if let Some((site, name)) = registry.names(device) {
            acks.put(&site, &name, epoch, &stored);
            announced += 1;
        }
    }
    Ok(announced)
}

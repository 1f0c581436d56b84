//! Samples: frames that are kept to learn from, on their way to the coordinator.
//!
//! ```text
//!  pipeline ──frame + why──> store ──number──> writer ──> shelf (disk) ──> sender ══HTTP══> coordinator
//!   (desk)                  (reading)         (JPEG)
//! ```
//!
//! Which frames: [`mesh_core::sampling`], asked by the pipeline at its `desk`. A sample has the identity of its
//! frame's reading, so it is written after that is durable. Nobody waits for it: what comes too fast is dropped and
//! counted.

mod client;
mod config;
pub(crate) mod desk;
pub(crate) mod eraser;
mod image;
mod sender;
mod shelf;

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
};

use mesh_core::{Name, Sample, SampleImage, SampleReason, VERSION, sampling::Used};

pub(crate) use config::coordinator_url;
pub use config::{Keep, SamplesConfig};
pub use image::Material;
use shelf::Shelf;

use crate::{
    counters::{Counter, Counters},
    identity::Tls,
    seal::Seal,
    store::Draft,
};

/// Samples between the store and the writer. Each may hold a photograph.
const JOBS: usize = 4;

/// What is known of a frame beyond its reading.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Why.
    pub reason: SampleReason,
    /// What the model said, also below its threshold.
    pub label: String,
    /// How unsure the scores are, 0..=1.
    pub entropy: f32,
    /// Distance from what training saw, where that is known.
    pub novelty: Option<f32>,
    /// The model's embedding; may be empty.
    pub embedding: Vec<f32>,
    /// The picture, where it may be kept.
    pub material: Option<Arc<Material>>,
}

/// A frame whose reading is durable.
#[derive(Debug)]
pub struct Job {
    /// The life of the outbox.
    pub epoch: u64,
    /// The reading's number.
    pub seq: u64,
    /// What the reading says.
    pub draft: Draft,
    /// What else is known.
    pub kept: Box<Kept>,
}

/// What is counted about samples.
#[derive(Debug, Default)]
pub struct SampleNumbers {
    /// Written to disk, by reason, in the order of [`SampleReason::ALL`].
    pub kept: [Counter; SampleReason::ALL.len()],
    /// Their bytes.
    pub kept_bytes: [Counter; SampleReason::ALL.len()],
    /// Chosen and dealt with in any way.
    pub done: [Counter; SampleReason::ALL.len()],
    /// Chosen and dropped: too fast, no room, no image.
    pub dropped: Counter,
    /// Removed from the disk to make room.
    pub evicted: Counter,
    /// Taken by the coordinator.
    pub sent: Counter,
    /// Refused by the coordinator for good.
    pub refused: Counter,
    /// On the disk now.
    pub waiting: Counter,
    /// What those take, in bytes.
    pub bytes: Counter,
}

impl SampleNumbers {
    /// What has become of samples so far, for the budget.
    #[must_use]
    pub fn used(&self) -> [Used; SampleReason::ALL.len()] {
        std::array::from_fn(|at| Used {
            done: self.done.get(at).map_or(0, Counter::get),
            bytes: self.kept_bytes.get(at).map_or(0, Counter::get),
        })
    }

    /// One of `reason` was written, with so many bytes.
    fn written(&self, reason: SampleReason, bytes: u64) {
        let at = place(reason);
        // In this order: the budget must never see a sample that is done and costs nothing yet.
        for (counter, n) in [(&self.kept_bytes, bytes), (&self.kept, 1), (&self.done, 1)] {
            if let Some(counter) = counter.get(at) {
                counter.add(n);
            }
        }
    }

    /// One of `reason` was dropped.
    pub(crate) fn lost(&self, reason: SampleReason) {
        self.dropped.add(1);
        if let Some(done) = self.done.get(place(reason)) {
            done.add(1);
        }
    }
}

fn place(reason: SampleReason) -> usize {
    SampleReason::ALL
        .iter()
        .position(|r| *r == reason)
        .unwrap_or_default()
}

/// The way from the store to the samples. Never waits.
#[derive(Clone, Debug)]
pub struct Tray {
    jobs: SyncSender<Job>,
    counters: Counters,
}

impl Tray {
    /// Hands a frame over, or drops it if there are too many.
    pub fn put(&self, job: Job) {
        let reason = job.kept.reason;
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.jobs.try_send(job)
        {
            self.counters.samples.lost(reason);
        }
    }
}

/// The threads.
pub(crate) struct Samples {
    pub(crate) tray: Tray,
    pub(crate) writer: JoinHandle<()>,
    pub(crate) sender: Option<JoinHandle<()>>,
    pub(crate) eraser: eraser::Eraser,
}

impl Samples {
    /// Opens the folder and starts the threads; they end when the last [`Tray`] is gone.
    ///
    /// # Errors
    /// In words, if there can be no samples.
    pub(crate) fn start(
        config: &SamplesConfig,
        folder: &Path,
        device: Name,
        epoch: u64,
        counters: &Counters,
        tls: &Tls,
        seal: Seal,
    ) -> Result<Self, String> {
        let (shelf, damaged) = Shelf::open(folder.to_owned(), config.max_bytes, epoch, seal)
            .map_err(|error| error.to_string())?;
        if damaged > 0 {
            tracing::warn!(samples = damaged, "damaged samples were removed");
            counters.samples.dropped.add(damaged);
        }
        if shelf.len() > 0 {
            tracing::info!(samples = shelf.len(), "samples from before wait to be sent");
        }
        let shelf = Arc::new(Mutex::new(shelf));
        let eraser = eraser::Eraser {
            shelf: shelf.clone(),
            counters: counters.clone(),
        };
        let (jobs, to_write) = sync_channel(JOBS);
        let (tell, news) = sync_channel(1);
        let writer = Writer {
            device: device.clone(),
            config: config.clone(),
            shelf: shelf.clone(),
            counters: counters.clone(),
            tell,
        };
        writer.count();
        let thread = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(run)
                .map_err(|error| format!("thread {name}: {error}"))
        };
        let sender = match &config.coordinator {
            Some(url) => {
                let sender = sender::Sender {
                    device,
                    client: client::Client::new(url, tls)?,
                    shelf,
                    rate: u64::from(config.max_kib_per_s) * 1_024,
                    backoff: sender::backoff(),
                    counters: counters.clone(),
                    news,
                };
                Some(thread("sample-send", Box::new(move || sender.run()))?)
            }
            None => {
                tracing::info!("samples stay on the device: samples.coordinator is not set");
                None
            }
        };
        let writer = thread("sample-write", Box::new(move || writer.run(&to_write)))?;
        let tray = Tray {
            jobs,
            counters: counters.clone(),
        };
        Ok(Self {
            tray,
            writer,
            sender,
            eraser,
        })
    }
}

/// For `doctor`: does anybody take samples at this address? A sentence either way.
pub(crate) fn probe(coordinator: &str, tls: &Tls) -> Result<String, String> {
    use client::Answer;
    // An empty sample is refused: only somebody who knows samples does that.
    match client::Client::new(coordinator, tls)?.announce(b"{}") {
        Answer::Never(_) => Ok(format!("{coordinator} takes samples")),
        Answer::Nobody(why) => Err(format!(
            "{coordinator}: {why}; is the coordinator running, and is samples.coordinator right? Samples wait on \
             the device"
        )),
        other => Err(format!(
            "{coordinator} answers, but does not take samples ({other:?}); is it a coordinator of this version?"
        )),
    }
}

/// The thread that makes images and writes samples.
struct Writer {
    device: Name,
    config: SamplesConfig,
    shelf: Arc<Mutex<Shelf>>,
    counters: Counters,
    tell: SyncSender<()>,
}

impl Writer {
    fn run(self, jobs: &Receiver<Job>) {
        let mut complained = false;
        while let Ok(job) = jobs.recv() {
            let reason = job.kept.reason;
            match self.write(job) {
                Ok(bytes) => {
                    self.counters.samples.written(reason, bytes);
                    complained = false;
                }
                Err(why) => {
                    self.counters.samples.lost(reason);
                    if !std::mem::replace(&mut complained, true) {
                        tracing::warn!("a sample was dropped: {why}");
                    }
                }
            }
            self.count();
            // Full: it is about to look anyway. Closed: there is nobody to send it to.
            let _ = self.tell.try_send(());
        }
    }

    fn write(&self, job: Job) -> Result<u64, String> {
        let Job {
            epoch,
            seq,
            draft,
            kept,
        } = job;
        let image = match &kept.material {
            Some(material) if self.config.keep == Keep::Image => {
                Some(image::make(material, &self.config).map_err(|error| error.to_string())?)
            }
            _ => None,
        };
        let sample = Sample {
            v: VERSION,
            device: self.device.clone(),
            source: draft.source,
            epoch,
            seq,
            ts: draft.ts,
            reason: kept.reason,
            label: kept.label,
            score: draft.score,
            margin: draft.margin,
            entropy: kept.entropy,
            novelty: kept.novelty,
            model: draft.model.to_string(),
            embedding: kept.embedding,
            file: draft.file,
            image: image.as_ref().map(|bytes| SampleImage {
                sha256: models::digest_of(bytes).to_string(),
                bytes: bytes.len() as u64,
            }),
        };
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        shelf
            .add(&sample, image.as_deref())
            .map_err(|error| error.to_string())
    }

    fn count(&self) {
        let shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        self.counters.samples.waiting.set(shelf.len() as u64);
        self.counters.samples.bytes.set(shelf.bytes());
        self.counters.samples.evicted.set(shelf.evicted());
    }
}

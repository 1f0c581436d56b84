//! The composition root: opens everything, wires it, starts it, stops it.
//!
//! ```text
//!  capture threads ──frames──> pipeline thread ──results──> store thread ──durable──> uplink task ══> broker
//!                                    │ reject                  ▲  free, read             │
//!                                    ▼                         └─────────────────────────┘
//!                                  board
//! ```
//!
//! Frames that are kept to learn from leave at the store, for threads of their own: see [`crate::samples`].

use std::{
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use mesh_core::{Info, ModelInfo, SampleReason, State, VERSION};
use models::{Bundle, Engine, self_test};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    board::{Board, BoardHandle, Meaning, State as BoardState},
    capture,
    clock::WallClock,
    config::Config,
    counters::Counters,
    outbox::{Opened, Options, Outbox, OutboxError},
    pipeline::{Drifts, Loaded, Pipeline},
    samples::{Samples, desk::Desk},
    store::{Cursor, Store},
    uplink::{Identity, Start, Uplink},
};

/// Frames between the cameras and the pipeline: enough to keep it busy, few enough to be fresh.
const FRAMES: usize = 2;
/// Results and requests between pipeline, uplink and store: two full groups.
const COMMANDS: usize = 256;
/// Marks that wait to be heard: somebody who presses a button more often than this means the same.
const MARKS: usize = 16;
/// A sample that is just being sent is given up after this when the agent stops; it is taken up again at the next
/// start.
const SENDING: Duration = Duration::from_secs(1);
/// Groups between store and uplink.
const STORED: usize = 16;

/// Why an agent cannot start. A model, a source or a pin that does not work is not among these: the agent starts,
/// says so and does the rest.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The folder for what must survive.
    #[error("data folder {path}: {error}")]
    Data {
        /// The folder.
        path: std::path::PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// The outbox.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    /// A thread.
    #[error("thread {0}: {1}")]
    Thread(String, std::io::Error),
}

/// A running agent.
pub struct AgentHandle {
    /// What it counts.
    pub counters: Counters,
    /// The model in use; a swap is one `send`.
    pub engine: watch::Sender<Loaded>,
    stop: CancellationToken,
    captures: Vec<mpsc::Sender<()>>,
    /// Capture and pipeline: they end with the cameras. The store ends with the uplink.
    threads: Vec<JoinHandle<()>>,
    store: JoinHandle<()>,
    /// They end with the store: first what writes samples, then what sends them.
    sample_writer: Option<JoinHandle<()>>,
    sample_sender: Option<JoinHandle<()>>,
    uplink: tokio::task::JoinHandle<()>,
}

/// The agent.
pub struct Agent;

impl Agent {
    /// Starts everything that `config` names.
    ///
    /// # Errors
    /// If readings could not be kept: see [`AgentError`].
    pub async fn start(config: Config, clock: WallClock) -> Result<AgentHandle, AgentError> {
        let counters = Counters::default();
        std::fs::create_dir_all(&config.data).map_err(|error| AgentError::Data {
            path: config.data.clone(),
            error,
        })?;
        let mut broken = Vec::new();
        let (board, mut triggers) = Board::start(&config.board).unwrap_or_else(|error| {
            tracing::error!("{error}; the device goes on without its pins");
            broken.push(error.to_string());
            (BoardHandle::default(), None)
        });
        board.set_state(BoardState::Starting);
        let opened = open_outbox(&config)?;
        let Opened {
            outbox,
            pending,
            gaps,
            cursor,
            ..
        } = opened;
        let cursor: Cursor = cursor
            .and_then(|note| serde_json::from_slice(&note).ok())
            .unwrap_or_default();
        let loaded = load(&config);
        let (engine, why) = match loaded {
            Ok(engine) => (engine, None),
            Err(why) => {
                tracing::error!("{why}");
                (None, Some(why))
            }
        };
        let (to_store, commands) = tokio::sync::mpsc::channel(COMMANDS);
        let (to_uplink, stored) = tokio::sync::mpsc::channel(STORED);
        let (to_pipeline, frames) = mpsc::sync_channel(FRAMES);
        let (swap, engine_watch) = watch::channel(engine.clone());

        let mut threads = Vec::new();
        let mut captures = Vec::new();
        let mut blind = Vec::new();
        let wanted = engine.as_deref().map(wanted_size);
        for (index, source_config) in config
            .source
            .iter()
            .enumerate()
            .filter(|_| engine.is_some())
        {
            match capture::open(source_config, wanted) {
                Ok(source) => {
                    let (stop, stopped) = mpsc::channel();
                    captures.push(stop);
                    // A source goes on after its last frame whose reading is durable.
                    let first = cursor.get(&source_config.name).copied().unwrap_or(0);
                    let start = capture::Start {
                        index,
                        config: source_config.clone(),
                        source,
                        first,
                        trigger: source_config.trigger.then(|| triggers.take()).flatten(),
                        frames: to_pipeline.clone(),
                        stop: stopped,
                        clock: clock.clone(),
                        counters: counters.clone(),
                    };
                    threads.push(thread(&format!("cap-{}", source_config.name), move || {
                        capture::run(start)
                    })?);
                }
                Err(error) => {
                    tracing::error!("{error}");
                    blind.push(error.to_string());
                }
            }
        }
        drop(to_pipeline);

        let identity = Identity {
            info: Info {
                v: VERSION,
                agent: env!("CARGO_PKG_VERSION").into(),
                board: config.board.name.clone(),
                arch: std::env::consts::ARCH.into(),
                sources: config
                    .source
                    .iter()
                    .map(|s| s.name.as_str())
                    .collect::<Vec<_>>()
                    .join(","),
                epoch: outbox.epoch(),
            },
            model: engine.as_deref().map(model_info),
            state: state(clock.now_ms(), engine.is_some(), why, &blind, &broken),
        };
        let lanes = config
            .source
            .iter()
            .map(|s| (s.name.clone(), s.gate))
            .collect::<Vec<_>>();
        let samples = start_samples(&config, outbox.epoch(), &counters);
        let (tray, sample_writer, sample_sender) = match samples {
            Some(samples) => (Some(samples.tray), Some(samples.writer), samples.sender),
            None => (None, None, None),
        };
        let (mark, marks) = mpsc::sync_channel(MARKS);
        let (found, drifts) = watch::channel(Drifts::new());
        let desk = tray
            .is_some()
            .then(|| Desk::new(&config.samples, config.source.len(), counters.clone()));
        let pipeline = Pipeline::new(
            lanes,
            config.publish,
            config.reject.clone(),
            engine_watch,
            board.clone(),
            to_store.clone(),
            counters.clone(),
        )
        .with_samples(desk.map(|desk| (desk, marks)))
        .with_button(
            config
                .board
                .button
                .as_ref()
                .map(|button| match button.means {
                    Meaning::Wrong => SampleReason::Wrong,
                    Meaning::Missed => SampleReason::Missed,
                }),
        )
        .with_drift(&config.drift, config.device.clone(), found);
        threads.push(thread("pipeline", move || pipeline.run(&frames))?);
        let store = Store::new(
            config.device.clone(),
            outbox,
            cursor,
            to_uplink,
            counters.clone(),
        )
        .with_samples(tray);
        let store_thread = thread("store", move || store.run(commands))?;
        let stop = CancellationToken::new();
        let uplink = Uplink::new(Start {
            config,
            identity,
            pending,
            gaps,
            store: to_store,
            drifts,
            marks: mark,
            board,
            counters: counters.clone(),
            wall: clock,
        });
        let uplink = tokio::spawn(uplink.run(stored, stop.clone()));
        Ok(AgentHandle {
            counters,
            engine: swap,
            stop,
            captures,
            threads,
            store: store_thread,
            sample_writer,
            sample_sender,
            uplink,
        })
    }
}

impl AgentHandle {
    /// Stops the cameras, makes what they gave durable, sends what can be sent in a moment, and ends.
    pub async fn stop(self) {
        drop(self.captures);
        join(self.threads).await;
        self.stop.cancel();
        let _ = self.uplink.await;
        join(
            std::iter::once(self.store)
                .chain(self.sample_writer)
                .collect(),
        )
        .await;
        // It may be waiting for an answer from far away.
        let end = tokio::time::Instant::now() + SENDING;
        while let Some(sender) = &self.sample_sender
            && !sender.is_finished()
            && tokio::time::Instant::now() < end
        {
            tokio::time::sleep(SENDING / 50).await;
        }
    }
}

/// A device that cannot keep samples does everything else.
fn start_samples(config: &Config, epoch: u64, counters: &Counters) -> Option<Samples> {
    if !config.samples.enabled {
        return None;
    }
    let folder = config.data.join("samples");
    Samples::start(
        &config.samples,
        &folder,
        config.device.clone(),
        epoch,
        counters,
    )
    .map_err(|why| tracing::error!("no frames are kept to learn from: {why}"))
    .ok()
}

async fn join(threads: Vec<JoinHandle<()>>) {
    let all = tokio::task::spawn_blocking(move || {
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread ended by a panic");
            }
        }
    });
    let _ = all.await;
}

fn open_outbox(config: &Config) -> Result<Opened, AgentError> {
    let options = Options::new(config.data.join("outbox"), config.outbox.max_bytes);
    let opened = Outbox::open(options)?;
    for warning in &opened.warnings {
        tracing::warn!("{warning}");
    }
    if !opened.pending.is_empty() {
        tracing::info!(
            readings = opened.pending.len(),
            "the outbox holds readings from before"
        );
    }
    Ok(opened)
}

/// A model runs only if its golden images give the golden answers on this device.
fn load(config: &Config) -> Result<Loaded, String> {
    let Some(path) = &config.model.bundle else {
        tracing::warn!("no model is configured (model.bundle): the device looks at nothing");
        return Ok(None);
    };
    let bundle = Bundle::open(path).map_err(|error| format!("model not loaded: {error}"))?;
    let engine = Engine::load(&bundle).map_err(|error| format!("model not loaded: {error}"))?;
    let test = self_test(&bundle, &engine);
    if !test.passed() {
        return Err(format!("model not used, its self-test failed:\n{test}"));
    }
    tracing::info!(model = engine.id(), "model loaded, self-test passed");
    Ok(Some(Arc::new(engine)))
}

fn model_info(engine: &Engine) -> ModelInfo {
    let manifest = engine.manifest();
    ModelInfo {
        v: VERSION,
        name: manifest.name.clone(),
        version: manifest.version.clone(),
        sha256: manifest.model.sha256.clone(),
        task: manifest.task.as_str().into(),
        labels: manifest.output.labels.join(","),
    }
}

/// Width and height of the model's input in pixels.
fn wanted_size(engine: &Engine) -> (u32, u32) {
    let (_, height, width) = engine.manifest().input.channels_height_width();
    let pixels = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
    (pixels(width), pixels(height))
}

fn state(ts: i64, model: bool, why: Option<String>, blind: &[String], broken: &[String]) -> State {
    let (health, detail) = match (model, why, blind) {
        (false, why, _) => (
            "no_model",
            why.unwrap_or_else(|| "no model is configured".into()),
        ),
        (true, _, []) => ("ok", broken.join("; ")),
        (true, _, blind) => ("no_source", blind.join("; ")),
    };
    State {
        v: VERSION,
        ts,
        health: health.into(),
        detail,
    }
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, AgentError> {
    // The system shows 15 characters.
    let short: String = name.chars().take(15).collect();
    std::thread::Builder::new()
        .name(short)
        .spawn(run)
        .map_err(|error| AgentError::Thread(name.into(), error))
}

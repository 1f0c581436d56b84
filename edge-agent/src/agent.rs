//! The composition root: opens everything, wires it, starts it, stops it.
//!
//! ```text
//!  capture threads ──frames──> pipeline thread ──results──> store thread ──durable──> uplink task ══> broker
//!                                    │ reject                  ▲  free, read             │
//!                                    ▼                         └─────────────────────────┘
//!                                  board
//! ```
//!
//! Frames that are kept to learn from leave at the store, for threads of their own: see [`crate::samples`]. Which model
//! looks at them is the matter of [`crate::update`].

use std::{collections::BTreeSet, ffi::OsString, sync::mpsc, thread::JoinHandle, time::Duration};

use mesh_core::{Info, Name, SampleReason, VERSION};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    about::About,
    board::{Board, BoardHandle, Meaning, State as BoardState},
    cameras::{self, Cameras},
    clock::WallClock,
    config::Config,
    counters::Counters,
    identity::{self, IdentityError, Keeper, Tls},
    mesh::{self, Mesh, Own},
    offload::{self, Pressure},
    outbox::{Opened, Options, Outbox, OutboxError},
    pipeline::{Drifts, Pipeline},
    samples::{
        Samples,
        desk::Desk,
        eraser::{self, Eraser},
    },
    seal::{Seal, SealError},
    settings::{self, Life},
    store::{Cursor, Store},
    update::{StartError, Swarm, Updates},
    uplink::{Start, Uplink},
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
    /// What would be on the disk cannot be sealed or opened.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// Who the device is.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The folder of models, or what takes care of them.
    #[error(transparent)]
    Update(#[from] StartError),
    /// A thread.
    #[error("thread {0}: {1}")]
    Thread(String, std::io::Error),
}

/// A running agent.
pub struct AgentHandle {
    /// What it counts.
    pub counters: Counters,
    stop: CancellationToken,
    cameras: Cameras,
    /// It ends with the cameras. The store ends with the uplink.
    pipeline: JoinHandle<()>,
    updates: Updates,
    store: JoinHandle<()>,
    /// They end with the store: first what writes samples, then what sends them.
    sample_writer: Option<JoinHandle<()>>,
    sample_sender: Option<JoinHandle<()>>,
    uplink: tokio::task::JoinHandle<()>,
    board: BoardHandle,
    /// What follows the coordinator's settings, if anything does.
    settings: Option<tokio::task::JoinHandle<()>>,
    settings_stop: CancellationToken,
    /// What keeps the device's certificate, if it has one or is to get one.
    identity: Option<tokio::task::JoinHandle<()>>,
    /// What knows the neighbours, if the device has any.
    mesh: Option<Mesh>,
    again: CancellationToken,
}

/// The agent.
pub struct Agent;

impl Agent {
    /// Starts everything that `config` names.
    ///
    /// # Errors
    /// If readings could not be kept: see [`AgentError`].
    pub async fn start(config: Config, clock: WallClock) -> Result<AgentHandle, AgentError> {
        let program = models::this_program("edge-agent")
            .map_err(|error| StartError::Thread("the self-test of new models", error))?;
        Self::start_with(config, clock, program).await
    }

    /// The same in a life that follows the coordinator's settings; `config` is what it began with.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub async fn start_life(
        config: Config,
        clock: WallClock,
        life: Life,
    ) -> Result<AgentHandle, AgentError> {
        let program = models::this_program("edge-agent")
            .map_err(|error| StartError::Thread("the self-test of new models", error))?;
        Self::start_all(config, clock, program, Some(life)).await
    }

    /// The same where this program is another one than the agent's: `program` is a file and its first arguments that lead
    /// to [`models::try_here`].
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub async fn start_with(
        config: Config,
        clock: WallClock,
        program: Vec<OsString>,
    ) -> Result<AgentHandle, AgentError> {
        Self::start_all(config, clock, program, None).await
    }

    async fn start_all(
        config: Config,
        clock: WallClock,
        program: Vec<OsString>,
        life: Option<Life>,
    ) -> Result<AgentHandle, AgentError> {
        let counters = Counters::default();
        std::fs::create_dir_all(&config.data).map_err(|error| AgentError::Data {
            path: config.data.clone(),
            error,
        })?;
        let seal = Seal::open(config.storage.key_file.as_deref(), &config.data)?;
        if seal.is_on() {
            tracing::info!(
                "readings, samples and the device's private key are encrypted on the disk"
            );
        }
        let keeper = Keeper::open(&config, clock.clone())?;
        let tls = keeper.as_ref().map_or_else(Tls::none, Keeper::tls);
        // Neighbours know each other by their keys: a device without one has none.
        let credentials = keeper.as_ref().filter(|_| config.mesh.enabled);
        let credentials = credentials.map(Keeper::credentials);
        let rosters = credentials
            .as_ref()
            .map(|credentials| Mesh::rosters(&config, &tls, credentials));
        let (site, site_ends) = mesh::Site::new();
        let me = credentials.as_ref().and_then(mesh::Credentials::me);
        let swarm = me.map(|me| Swarm::new(me, site.clone(), counters.clone()));
        let mut broken = Vec::new();
        let (board, mut triggers) = Board::start(&config.board).unwrap_or_else(|error| {
            tracing::error!("{error}; the device goes on without its pins");
            broken.push(error.to_string());
            (BoardHandle::default(), None)
        });
        board.set_state(BoardState::Starting);
        let opened = open_outbox(&config, seal.clone())?;
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
        let (updates, ends) = Updates::start(
            &config,
            clock.clone(),
            counters.clone(),
            (tls.clone(), swarm.clone()),
            program,
        )
        .await?;
        let (to_store, commands) = tokio::sync::mpsc::channel(COMMANDS);
        let (to_uplink, stored) = tokio::sync::mpsc::channel(STORED);
        let (to_pipeline, frames) = mpsc::sync_channel(FRAMES);
        let (see, blind) = watch::channel(Vec::new());
        let (work, works) = watch::channel(BTreeSet::new());
        let (link, connected) = watch::channel(false);
        let (answer, answered) = watch::channel(None);
        let again = CancellationToken::new();
        let settings_ends = settings::Ends {
            desired: ends.desired.subscribe(),
            connected: connected.clone(),
            works,
            reported: answer,
            again: again.clone(),
            tls: tls.clone(),
            counters: counters.clone(),
        };
        let cameras = Cameras::start(
            cameras::Start {
                sources: config.source.clone(),
                cursor: cursor.clone(),
                trigger: triggers.take(),
                wanted: ends.wanted,
                frames: to_pipeline,
                blind: see,
                works: work,
                clock: clock.clone(),
                counters: counters.clone(),
            },
            ends.engines.clone(),
        )?;

        let about = About {
            info: Info {
                v: VERSION,
                agent: env!("CARGO_PKG_VERSION").into(),
                board: config.board.name.clone(),
                arch: std::env::consts::ARCH.into(),
                sources: joined(config.source.iter().map(|s| &s.name)),
                tags: joined(&config.tags),
                epoch: outbox.epoch(),
                mesh: String::new(),
            },
            mesh: rosters.as_ref().map_or_else(
                || watch::channel(String::new()).1,
                |rosters| rosters.meeting().own(),
            ),
            engines: ends.engines.clone(),
            blind,
            broken,
            wall: clock.clone(),
        };
        let (own_way, has_own_way) = watch::channel(false);
        let carriers = credentials
            .as_ref()
            .map(|_| mesh::Carriers::new(site.clone()));
        if let Some(carriers) = &carriers {
            tls.detour().set(carriers.clone(), has_own_way.clone());
        }
        let carrying = mesh::Carrying::new(&config, &tls, has_own_way.clone(), &counters);
        let pressure = Pressure::default();
        let mut services: Vec<_> = carrying.map(mesh::Carrying::service).into_iter().collect();
        let stop = CancellationToken::new();
        let neighbours = offload::Mesh {
            site,
            rosters: rosters.clone(),
        };
        if rosters.is_some() {
            services.extend(offload::services(
                &config.offload,
                &ends.engines,
                &pressure,
                neighbours.clone(),
                &counters,
                &stop,
            ));
        }
        let coordinator = config.coordinator().filter(|_| config.offload.coordinator);
        let coordinator = coordinator.and_then(|url| {
            offload::Coordinator::new(url, &tls, has_own_way.clone(), ends.engines.clone())
                .map_err(|why| tracing::error!("the coordinator is not asked about frames: {why}"))
                .ok()
        });
        let engines = ends.engines.clone();
        let mesh = credentials.zip(rosters.clone()).zip(swarm).and_then(
            |((credentials, rosters), swarm)| {
                services.extend(swarm.services(config.mesh.serve_kib_per_s));
                let own = Own {
                    engines,
                    uplink: has_own_way,
                    answers: config.offload.answers(),
                    holding: swarm.holding(),
                    accelerators: mesh::accelerators(mesh::DEVICES.as_ref()),
                    wall: clock.clone(),
                };
                let parts = mesh::Parts {
                    rosters,
                    own,
                    ends: site_ends,
                    services,
                };
                Mesh::start(&config, &credentials, parts, counters.clone())
                    .map_err(|why| tracing::error!("the device has no neighbours: {why}"))
                    .ok()
            },
        );
        let asks = config.offload.asks() && (mesh.is_some() || coordinator.is_some());
        let handoff = asks
            .then(|| offload::start(&config.offload, neighbours, coordinator, &counters, &stop));
        let lanes = config
            .source
            .iter()
            .map(|s| (s.name.clone(), s.gate))
            .collect::<Vec<_>>();
        let samples = start_samples(&config, outbox.epoch(), &counters, &tls, seal.clone());
        let (tray, sample_writer, sample_sender, eraser) = match samples {
            Some(samples) => (
                Some(samples.tray),
                Some(samples.writer),
                samples.sender,
                Some(samples.eraser),
            ),
            None => {
                let eraser = Eraser::of_folder(config.data.join("samples"), &counters, seal);
                (None, None, None, eraser)
            }
        };
        let (erase, erased) = watch::channel(None);
        let to_erase = ends.desired.subscribe();
        let (mark, marks) = mpsc::sync_channel(MARKS);
        let (found, drifts) = watch::channel(Drifts::new());
        let desk = tray
            .is_some()
            .then(|| Desk::new(&config.samples, config.source.len(), counters.clone()));
        let pipeline = Pipeline::new(
            lanes,
            config.publish,
            config.reject.clone(),
            ends.engines,
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
        .with_trial(ends.trial, ends.disagreed)
        .with_offload(handoff, pressure)
        .with_drift(&config.drift, config.device.clone(), found);
        let pipeline = thread("pipeline", move || pipeline.run(&frames))?;
        let store = Store::new(
            config.device.clone(),
            outbox,
            cursor,
            to_uplink,
            counters.clone(),
        )
        .with_samples(tray);
        let store_thread = thread("store", move || store.run(commands))?;
        let pins = board.clone();
        let uplink = Uplink::new(Start {
            config,
            about,
            pending,
            gaps,
            store: to_store,
            drifts,
            desired: ends.desired,
            reported: ends.reported,
            settings: answered,
            erased,
            tls,
            rosters,
            connected: link,
            own_way,
            carriers,
            marks: mark,
            board,
            counters: counters.clone(),
            wall: clock,
        });
        let uplink = tokio::spawn(uplink.run(stored, stop.clone()));
        tokio::spawn(eraser::run(eraser, to_erase, erase, stop.clone()));
        let settings_stop = CancellationToken::new();
        let identity = keeper.map(|keeper| tokio::spawn(identity::run(keeper, stop.clone())));
        let settings = life.map(|life| {
            let driver = settings::Driver::new(life, settings_ends);
            tokio::spawn(driver.run(settings_stop.clone()))
        });
        Ok(AgentHandle {
            counters,
            stop,
            cameras,
            pipeline,
            updates,
            store: store_thread,
            sample_writer,
            sample_sender,
            uplink,
            board: pins,
            settings,
            settings_stop,
            identity,
            mesh,
            again,
        })
    }
}

impl AgentHandle {
    /// Waits until the agent is to stop and start anew, with other settings.
    pub async fn wants_another_life(&self) {
        self.again.cancelled().await;
    }

    /// Stops the cameras, makes what they gave durable, sends what can be sent in a moment, and ends.
    pub async fn stop(self) {
        // First: a start that ends in good order is no crash.
        self.settings_stop.cancel();
        if let Some(settings) = self.settings {
            let _ = settings.await;
        }
        let mut threads = self.cameras.stop().await;
        threads.push(self.pipeline);
        // Neighbours hear it from the device itself before they miss it.
        threads.extend(self.mesh.map(Mesh::stop));
        join(threads).await;
        self.updates.stop().await;
        self.stop.cancel();
        let _ = self.uplink.await;
        if let Some(identity) = self.identity {
            let _ = identity.await;
        }
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
        self.board.release().await;
    }
}

/// A device that cannot keep samples does everything else.
fn start_samples(
    config: &Config,
    epoch: u64,
    counters: &Counters,
    tls: &Tls,
    seal: Seal,
) -> Option<Samples> {
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
        tls,
        seal,
    )
    .map_err(|why| tracing::error!("no frames are kept to learn from: {why}"))
    .ok()
}

fn joined<'a>(names: impl IntoIterator<Item = &'a Name>) -> String {
    let names: Vec<_> = names.into_iter().map(Name::as_str).collect();
    names.join(",")
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

fn open_outbox(config: &Config, seal: Seal) -> Result<Opened, AgentError> {
    let mut options = Options::new(config.data.join("outbox"), config.outbox.max_bytes);
    options.seal = seal;
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

/// A thread with a name.
pub(crate) fn thread(
    name: &str,
    run: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, AgentError> {
    // The system shows 15 characters.
    let short: String = name.chars().take(15).collect();
    std::thread::Builder::new()
        .name(short)
        .spawn(run)
        .map_err(|error| AgentError::Thread(name.into(), error))
}

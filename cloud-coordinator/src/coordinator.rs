//! The composition root: starts every part and joins them.

use std::{
    fs::{File, TryLockError},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::TcpListener,
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    api::{self, learning::Learning, live::Live},
    broker::{self, Access, Broker, Gate, Outside},
    clock,
    config::{Config, ConfigErrors},
    datasets::Datasets,
    delivery::{Releases, Rollouts},
    directory::Directory,
    erasure::Erasures,
    ingest::{self, Acks, External, Inbox, Ingest, Link},
    meeting::Meetings,
    metrics::Metrics,
    notice::Notices,
    objects::Objects,
    parts::Parts,
    quarantine::Quarantine,
    records::Records,
    registry::Registry,
    samples::Samples,
    sightings,
    store::{self, Limits, Store},
    train::{self, Catalog, Jobs, Settings, Work},
    trust::{Door, Identity, Rosters, Trust},
};

/// How long parts may take to end before they are dropped: a commit on a slow disk.
const GRACE: Duration = Duration::from_secs(5);
/// After a failed `accept`, for example when all descriptors are in use.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Between two counts of the devices for the metrics.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// The coordinator.
#[derive(Debug)]
pub struct Coordinator;

/// A running coordinator.
#[derive(Debug)]
pub struct Handle {
    /// Where the API and the page are served.
    pub http: SocketAddr,
    /// Where the embedded broker listens, if it runs.
    pub mqtt: Option<SocketAddr>,
    stop: CancellationToken,
    tasks: TaskTracker,
    store: Arc<Store>,
    samples: Samples,
    datasets: Datasets,
    trust: Trust,
    /// Held for as long as this coordinator runs.
    _lock: File,
}

/// Why a coordinator does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The data folder cannot be used.
    #[error("cannot use the data folder {path}: {error}")]
    Data {
        /// The folder, or the file in it.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// Another coordinator is using the data folder.
    #[error("another coordinator is using the data folder {0}")]
    Taken(PathBuf),
    /// The database cannot be used.
    #[error("{0}")]
    Store(String),
    /// Who may do what cannot be read, or can be read by others.
    #[error("{0}")]
    Trust(String),
    /// A model that the configuration names cannot be used.
    #[error("the model {path}: {error}")]
    Model {
        /// The bundle.
        path: PathBuf,
        /// Why.
        error: String,
    },
    /// The address is taken, or not of this machine.
    #[error("cannot listen for {what} on {address}: {error}")]
    Listen {
        /// `HTTP` or `MQTT`.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: std::io::Error,
    },
}

async fn listen(
    what: &'static str,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |error| StartError::Listen {
        what,
        address,
        error,
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

impl Coordinator {
    /// Starts every part. When this returns, both addresses accept connections.
    ///
    /// # Errors
    /// [`StartError`] names what cannot be used.
    pub async fn start(config: Config) -> Result<Handle, StartError> {
        let contradictions = config.contradictions();
        if !contradictions.is_empty() {
            return Err(ConfigErrors(contradictions).into());
        }
        let started = Instant::now();
        let data = &config.data;
        std::fs::create_dir_all(data).map_err(|error| StartError::Data {
            path: data.clone(),
            error,
        })?;
        let lock = lock(data)?;
        let untrusted = |error: crate::trust::TrustError| StartError::Trust(error.to_string());
        let trust = Trust::open(data).await.map_err(untrusted)?;
        let broken = |error: store::StoreError| StartError::Store(error.to_string());
        let store = Arc::new(Store::open(data).await.map_err(broken)?);
        let unlearnt = |error: &dyn std::fmt::Display| StartError::Store(error.to_string());
        let records = Arc::new(Records::open(data).await.map_err(|e| unlearnt(&e))?);
        let objects =
            Objects::open(config.samples.objects.as_deref(), data).map_err(|e| unlearnt(&e))?;
        let samples = Samples::open(data, &config.samples, records.clone(), objects)
            .await
            .map_err(|e| unlearnt(&e))?;
        let datasets = Datasets::new(records.clone(), config.training.device_share);
        let quarantine = Quarantine::new(records.clone(), trust.clone());
        let program = match &config.training.program {
            set if !set.is_empty() => set.clone(),
            _ => models::this_program("cloud-coordinator").map_err(|e| unlearnt(&e))?,
        };
        let catalog = Catalog::new(data.join("models"), records.clone(), program);
        let catalog = Arc::new(catalog);
        let mut given = Vec::new();
        for bundle in &config.training.models {
            let taken = catalog.give(bundle).await;
            let id = taken.map_err(|error| StartError::Model {
                path: bundle.clone(),
                error: error.to_string(),
            })?;
            tracing::info!(model = id, "a model is given");
            given.push(id);
        }
        let jobs = Arc::new(
            Jobs::open(records.clone())
                .await
                .map_err(|e| unlearnt(&e))?,
        );
        let metrics = Metrics::shared();
        let parts = Parts::new(metrics.clone());
        let training = Work {
            parts: parts.clone(),
            catalog: catalog.clone(),
            datasets: datasets.clone(),
            objects: samples.objects.clone(),
            quarantine: quarantine.clone(),
            settings: Settings {
                time_limit: Duration::from_secs(config.training.time_limit_s),
                external: config.training.external.clone(),
                policy: config.training.policy.clone(),
                suspect: config.training.suspect.clone(),
            },
        };
        let learning = Learning::new(catalog.clone(), jobs.clone());
        let releases = Releases::open(data, catalog, records.clone()).await;
        let releases = Arc::new(releases.map_err(|e| unlearnt(&e))?);
        for model in given {
            // What devices come with is what they may have to go back to.
            if let Err(error) = releases.publish(&model, "given").await {
                tracing::warn!(model, %error, "a given model is not published");
            }
        }
        let devices = store.devices().await.map_err(broken)?;
        let next_id = store.last_reading().await.map_err(broken)? + 1;
        let registry = Arc::new(Registry::new(devices, config.ingest.max_devices));
        let acks = Arc::new(Acks::default());
        let live = Live::new(metrics.clone());
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let (queue, bytes) = (config.ingest.queue_messages, config.ingest.queue_bytes);
        let (inbox, messages) = Inbox::new(queue, bytes, metrics.clone());

        let listening = [config.http.ip(), config.broker.listen.ip()];
        let identity = Identity::open(
            data,
            &trust,
            &config.tls,
            &listening,
            config.ingest.max_devices,
            metrics.clone(),
        );
        let identity = Arc::new(identity.await.map_err(StartError::Trust)?);

        let (http_listener, http) = listen("HTTP", config.http).await?;
        let door = Door {
            tls: config.tls.enabled,
        };
        let connected = Arc::new(Notify::new());
        let mut mqtt = None;
        let access = Access::open(&config.broker, &identity.authority);
        let access = access.map_err(|why| ConfigErrors(vec![why]))?;
        let link = if let Some(access) = access.map(Arc::new) {
            let outside = Outside::new(&config.broker, &access, &identity, &metrics);
            if let Some(outside) = outside {
                tasks.spawn(outside.run(stop.clone()));
            }
            let (client, current) = watch::channel(None);
            let external = External {
                access,
                inbox,
                metrics: metrics.clone(),
                client,
                connected: connected.clone(),
            };
            tasks.spawn(external.run(stop.clone()));
            Link::External(current)
        } else {
            let (listener, bound) = listen("MQTT", config.broker.listen).await?;
            mqtt = Some(bound);
            connected.notify_one();
            let limits = broker::Limits {
                connections: config.broker.max_connections,
                publish_rate: config.broker.publish_rate,
            };
            let gate = Gate::new(identity.clone());
            let metrics = metrics.clone();
            Link::Embedded(Broker::start(
                listener,
                gate,
                limits,
                inbox,
                metrics,
                &tasks,
                stop.clone(),
            ))
        };

        let (health, store_error) = watch::channel(None);
        let work = Ingest {
            store: store.clone(),
            registry: registry.clone(),
            metrics: metrics.clone(),
            acks: acks.clone(),
            live: live.clone(),
            health,
            next_id,
            started,
            cache: std::collections::HashMap::new(),
            batches: 0,
            notices: Notices::default(),
        };
        tasks.spawn(work.run(messages, stop.clone()));
        tasks.spawn(ingest::publish_acks(
            acks.clone(),
            link.clone(),
            metrics.clone(),
            stop.clone(),
        ));
        let meetings = Arc::new(Meetings::new(registry.clone()));
        tasks.spawn(announce(
            store.clone(),
            registry.clone(),
            acks,
            connected,
            (identity.devices.rosters.clone(), meetings.clone()),
            stop.clone(),
        ));
        tasks.spawn(meetings.run(link.clone(), stop.clone()));
        tasks.spawn(sightings::run(
            store.clone(),
            link.clone(),
            config.sightings,
            stop.clone(),
        ));
        let rosters = identity.devices.rosters.clone();
        tasks.spawn(rosters.run(link.clone(), stop.clone()));
        let limits = Limits {
            max_age_ms: (config.retention.max_age_days * 86_400_000.0) as i64,
            max_bytes: config.retention.max_bytes,
        };
        tasks.spawn(store::keep_bounded(
            store.clone(),
            limits,
            metrics.clone(),
            stop.clone(),
        ));
        tasks.spawn(tell_devices(
            registry.clone(),
            live.clone(),
            metrics.clone(),
            started,
            stop.clone(),
        ));
        tasks.spawn(samples.clone().keep_clean(stop.clone()));
        let rollouts = Rollouts::open(
            releases.clone(),
            records.clone(),
            registry.clone(),
            link.clone(),
        );
        let rollouts = Arc::new(rollouts.await.map_err(|e| unlearnt(&e))?);
        tasks.spawn(rollouts.clone().run(stop.clone()));
        let erasures = Erasures::new(data, samples.clone(), registry.clone(), rollouts.clone());
        let erasures = Arc::new(erasures);
        tasks.spawn(erasures.clone().run(stop.clone()));
        tasks.spawn(train::by_itself(
            config.training.start,
            records,
            registry.clone(),
            jobs.clone(),
            stop.clone(),
        ));
        tasks.spawn(jobs.run(Arc::new(training), stop.clone()));
        let directory = config.oidc.map(Directory::open).transpose();
        let directory = directory.map_err(StartError::Trust)?.map(Arc::new);
        trust.start(http, door).await.map_err(untrusted)?;
        let state = api::State {
            gate: api::gate(&trust, door, &metrics, &parts),
            parts,
            directory,
            trust: trust.clone(),
            door,
            samples: samples.clone(),
            datasets: datasets.clone(),
            quarantine,
            erasures,
            learning,
            releases,
            rollouts,
            importing: Arc::new(tokio::sync::Semaphore::new(1)),
            store: store.clone(),
            registry,
            metrics,
            live,
            link,
            identity: identity.clone(),
            http,
            mqtt,
            broker_url: config.broker.url.clone(),
            store_error,
            started,
            stop: stop.clone(),
        };
        let shown = identity.shown.as_ref();
        let door = shown.map(|shown| shown.door(&api::PROTOCOLS));
        api::serve(http_listener, state, door, &tasks, stop.clone());
        let addresses = serde_json::json!({
            "http": http, "mqtt": mqtt, "tls": config.tls.enabled, "ca": identity.authority.path(),
        });
        write_addresses(data, &addresses)?;
        match mqtt {
            Some(mqtt) => tracing::info!(%http, %mqtt, "the coordinator is listening"),
            None => tracing::info!(%http, "the coordinator is listening"),
        }
        Ok(Handle {
            http,
            mqtt,
            stop,
            tasks,
            store,
            samples,
            datasets,
            trust,
            _lock: lock,
        })
    }
}

impl Handle {
    /// The datasets, and what was computed from their images.
    #[must_use]
    pub fn datasets(&self) -> &Datasets {
        &self.datasets
    }

    /// The images.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.samples.objects
    }

    /// Stops every part; a commit that is under way is finished. Returns after five seconds at the latest.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(GRACE, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("not everything ended in time, it is dropped");
            return;
        }
        if tokio::time::timeout(GRACE, self.store.close())
            .await
            .is_err()
        {
            tracing::warn!("the database was not closed in time");
        }
        if tokio::time::timeout(GRACE, self.samples.records.close())
            .await
            .is_err()
        {
            tracing::warn!("the database of the samples was not closed in time");
        }
        if tokio::time::timeout(GRACE, self.trust.records.close())
            .await
            .is_err()
        {
            tracing::warn!("the database of who may do what was not closed in time");
        }
    }
}

/// Whenever a broker is there (again), tells every recent device what is stored, and each site who belongs to it and where it meets.
async fn announce(
    store: Arc<Store>,
    registry: Arc<Registry>,
    acks: Arc<Acks>,
    connected: Arc<Notify>,
    (rosters, meetings): (Arc<Rosters>, Arc<Meetings>),
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = connected.notified() => {}
        }
        rosters.tell_again();
        meetings.tell_again();
        match ingest::announce(&store, &registry, &acks).await {
            Ok(devices) => tracing::debug!(devices, "told devices what is stored"),
            Err(error) => tracing::warn!(%error, "cannot tell devices what is stored"),
        }
    }
}

/// Every second: counts the devices, and shows those that changed to whoever watches.
async fn tell_devices(
    registry: Arc<Registry>,
    live: Live,
    metrics: Arc<Metrics>,
    started: Instant,
    stop: CancellationToken,
) {
    let mut tick = tokio::time::interval(COUNT_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let (known, online) = registry.counts();
        metrics
            .devices
            .set(i64::try_from(known).unwrap_or(i64::MAX));
        metrics
            .devices_online
            .set(i64::try_from(online).unwrap_or(i64::MAX));
        for (sign, sources) in registry.drifting() {
            metrics.drifting(sign.as_str(), sources);
        }
        live.devices(&registry, started.elapsed().as_secs());
    }
}

/// Makes sure that only one coordinator works on a data folder: each numbers the readings itself.
fn lock(data: &Path) -> Result<File, StartError> {
    let path = data.join("coordinator.lock");
    let failed = |error| StartError::Data {
        path: path.clone(),
        error,
    };
    let file = File::create(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StartError::Taken(data.to_owned())),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// Tells other programs where this one listens: `<data>/addresses.json`, whole or not at all.
fn write_addresses(data: &Path, addresses: &serde_json::Value) -> Result<(), StartError> {
    let path = data.join("addresses.json");
    let failed = |error| StartError::Data {
        path: path.clone(),
        error,
    };
    let text = addresses.to_string();
    let fresh = data.join(format!("addresses.{:016x}.new", clock::random()));
    std::fs::write(&fresh, text).map_err(failed)?;
    std::fs::rename(&fresh, &path).map_err(failed)
}

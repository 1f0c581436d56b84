//! A whole site on one machine: a coordinator, a broker, devices, and a stretch of network for each.

use std::{
    ffi::OsString,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::json;
use tokio::task::spawn_blocking;

use crate::{
    agent_file::{
        AgentFile, BrokerPart, CoordinatorPart, DriftPart, MeshPart, ModelPart, OutboxPart,
        PublishPart, ReportPart, SamplesPart, ScenePart, ScenePartDrift, SourcePart, UpdatePart,
    },
    api::Api,
    broker,
    dice::Dice,
    net::Link,
    process::{EXIT_WITH_STDIN, Process, ProcessError, Program},
    way::Way,
    witness::{Journal, Testimony, Witness, WitnessError},
};

/// A start includes making a database or loading a model, on a machine that may be busy.
const READY: Duration = Duration::from_secs(60);
/// What each part gets to end politely.
const GRACE: Duration = Duration::from_secs(15);
/// A network that hangs is noticed within seconds: nobody who watches waits longer.
const KEEP_ALIVE_S: u16 = 10;
/// People watch: a network that is back is to be noticed at once. A large fleet would spread its devices more.
const MAX_BACKOFF_S: u16 = 3;
/// The one camera of each device.
pub const SOURCE: &str = "cam0";
/// The name of the site.
const SITE: &str = "demo";

/// What went wrong with a site.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// A child process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The witness.
    #[error(transparent)]
    Witness(#[from] WitnessError),
    /// A file or a socket.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The coordinator refuses what a fleet begins with.
    #[error("preparing the devices' way in: {0}")]
    Entry(String),
    /// A part was started and does not answer.
    #[error("{name} does not answer; the end of its log:\n{log}")]
    Silent {
        /// Which.
        name: String,
        /// Its last words.
        log: String,
    },
}

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> SiteError {
    let doing = doing.into();
    move |source| SiteError::Io { doing, source }
}

/// Which broker the site has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Broker {
    /// The coordinator's own: it dies with the coordinator.
    #[default]
    Embedded,
    /// A mosquitto that forgets everything when it ends; with TLS, under the rules that the coordinator writes for it.
    Mosquitto,
}

/// Something to learn from: the light changes, and what is seen is kept.
#[derive(Clone, Copy, Debug)]
pub struct Ageing {
    /// How much darker and warmer the lamp gets, 0..=1.
    pub light: f32,
    /// The first frame that is darker.
    pub onset: u64,
    /// Frames until the lamp is as dark as it gets.
    pub ramp: u64,
    /// Share of the parts that have a fault.
    pub defect_rate: f32,
    /// Share of the frames that are kept to learn from.
    pub kept: f64,
    /// Frames of the window in which drift is looked for.
    pub window: u32,
}

/// What each device looks at.
#[derive(Clone, Debug)]
pub enum Camera {
    /// The synthetic conveyor, each device with parts of its own.
    Scene {
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
    },
    /// A folder of images; the name of the directory says what an image shows.
    Folder {
        /// Where.
        path: PathBuf,
        /// Start again at its end?
        repeat: bool,
    },
    /// Nothing.
    None,
}

/// What a site is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Plays every part.
    pub program: Program,
    /// Everything is kept below it.
    pub root: PathBuf,
    /// Where the devices' outboxes lie, if not below `root`.
    pub outboxes: Option<PathBuf>,
    /// Which broker.
    pub broker: Broker,
    /// How many devices.
    pub agents: usize,
    /// Are the agents child processes? If not, whoever made the plan runs them.
    pub spawn: bool,
    /// What the devices look at.
    pub camera: Camera,
    /// What they think with.
    pub bundle: Option<PathBuf>,
    /// Frames per second of each camera; 0 is as fast as possible.
    pub fps: f64,
    /// How many frames each camera gives; 0 is no end.
    pub frames: u64,
    /// The agent's own executable, where `program` is not to play it: it runs under a guard.
    pub agent_program: Option<PathBuf>,
    /// The only processor that the agents may use.
    pub agent_cpu: Option<usize>,
    /// Bound of each outbox in bytes.
    pub outbox_bytes: u64,
    /// The coordinator's configuration file; its defaults without one.
    pub coordinator_config: Option<PathBuf>,
    /// Where the console should be, if that port is free.
    pub http: Option<SocketAddr>,
    /// Where the broker should be, if that port is free.
    pub mqtt: Option<SocketAddr>,
    /// The synthetic cameras' lamps age.
    pub ageing: Option<Ageing>,
    /// Everything is encrypted and everybody has an identity; else it is plain text on loopback.
    pub tls: bool,
    /// The devices take models from the coordinator.
    pub updates: bool,
    /// The devices know each other.
    pub mesh: bool,
    /// How fast devices serve neighbours models; the agent's own default where it is nothing.
    pub serve_kib_per_s: Option<u32>,
    /// The devices fetch models over one stretch of network, [`Site::door`].
    pub door: bool,
    /// Share of the frames that the devices keep by lot, beside those worth learning from; without one they keep none. An
    /// `ageing` has its own.
    pub kept: Option<f64>,
}

impl Plan {
    /// Three devices on small scenes, everything on free ports.
    #[must_use]
    pub const fn new(program: Program, root: PathBuf, bundle: PathBuf) -> Self {
        Self {
            program,
            root,
            outboxes: None,
            broker: Broker::Embedded,
            agents: 3,
            spawn: true,
            camera: Camera::Scene {
                width: 320,
                height: 240,
            },
            bundle: Some(bundle),
            fps: 5.0,
            frames: 0,
            agent_program: None,
            agent_cpu: None,
            outbox_bytes: 256 << 20,
            coordinator_config: None,
            http: None,
            mqtt: None,
            ageing: None,
            tls: true,
            updates: false,
            mesh: false,
            serve_kib_per_s: None,
            door: false,
            kept: None,
        }
    }
}

/// One device and its stretch of network.
#[derive(Debug)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// What it is configured to be.
    pub file: AgentFile,
    /// Its way to the broker.
    pub link: Link,
    /// The process, if the site runs it.
    pub agent: Process,
    /// Its configuration file.
    pub config: PathBuf,
}

impl Device {
    /// Writes its configuration file anew: it counts from the agent's next start on.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_config(&self) -> Result<(), SiteError> {
        let text = self.file.text();
        text.and_then(|text| std::fs::write(&self.config, text))
            .map_err(io_error(format!("writing {}", self.config.display())))
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    fn journal(&self) -> Option<Journal> {
        let source = self.file.source.first()?;
        Some(Journal {
            device: self.name.clone(),
            source: source.name.clone(),
            path: source.journal.clone(),
        })
    }
}

/// A site that runs. Its processes end when it is dropped.
#[derive(Debug)]
pub struct Site {
    /// The coordinator.
    pub coordinator: Process,
    /// The broker, if it is a process of its own.
    pub broker: Option<Process>,
    /// The devices.
    pub devices: Vec<Device>,
    /// The way of all devices to the coordinator's door for HTTP, where they have one of their own.
    pub door: Option<Link>,
    spawn: bool,
    http: SocketAddr,
    mqtt: SocketAddr,
    root: PathBuf,
    way: Way,
}

/// Who listens in a fleet.
const SUBSCRIBER: &str = "fleet";

impl Site {
    /// Starts everything and waits until the coordinator answers.
    ///
    /// # Errors
    /// If a part cannot be started or does not answer.
    pub async fn start(plan: &Plan) -> Result<Self, SiteError> {
        let logs = plan.root.join("logs");
        make_dir(&logs)?;
        let http = pick(plan.http)?;
        let mqtt = pick(plan.mqtt)?;
        let data = plan.root.join("coordinator");
        make_dir(&data)?;
        let mut args: Vec<OsString> = vec!["serve".into(), "--data".into(), data.clone().into()];
        args.extend(["--http".into(), http.to_string().into()]);
        if !plan.tls {
            args.push("--no-tls".into());
        }
        let guarded = plan.tls && plan.broker == Broker::Mosquitto;
        if let Some(config) = plan.coordinator_config.as_ref().filter(|_| !guarded) {
            args.extend(["--config".into(), config.into()]);
        }
        let broker = match plan.broker {
            Broker::Embedded => {
                args.extend(["--mqtt".into(), mqtt.to_string().into()]);
                None
            }
            Broker::Mosquitto if guarded => {
                let config = plan.root.join("coordinator-and-broker.toml");
                // One file: what the plan says, and where the broker is.
                let mut text = match &plan.coordinator_config {
                    Some(own) => std::fs::read_to_string(own)
                        .map_err(io_error(format!("reading {}", own.display())))?,
                    None => String::new(),
                };
                text += "\n";
                text += &broker::guarded_config(&plan.root, mqtt);
                let doing = format!("writing {}", config.display());
                std::fs::write(&config, text).map_err(io_error(doing))?;
                let config: [OsString; 2] = ["--config".into(), config.into()];
                // Before there is any coordinator: as an operator prepares a broker.
                let mut prepare = vec!["cloud-coordinator", "broker", "rules"];
                prepare.push("--data");
                let prepared = std::process::Command::new(&plan.program.0)
                    .args(prepare)
                    .arg(&data)
                    .args(&config)
                    // It has no input, and is not to end because of that.
                    .env_remove(EXIT_WITH_STDIN)
                    .output()
                    .map_err(io_error("writing the rules of the broker"))?;
                if !prepared.status.success() {
                    let said = String::from_utf8_lossy(&prepared.stderr).into_owned();
                    return Err(SiteError::Entry(said));
                }
                args.extend(config);
                Some(
                    broker::guarded(&plan.program, &plan.root, &logs)
                        .map_err(io_error("preparing mosquitto"))?,
                )
            }
            Broker::Mosquitto => {
                args.extend(["--broker".into(), format!("mqtt://{mqtt}").into()]);
                Some(
                    broker::forgetful(&plan.program, &logs, mqtt)
                        .map_err(io_error("preparing mosquitto"))?,
                )
            }
        };
        let mut listeners = mqtt;
        if guarded {
            listeners.set_port(mqtt.port() + broker::LISTENERS);
        }
        let log = logs.join("coordinator.log");
        let coordinator =
            Process::part("coordinator", &plan.program, "cloud-coordinator", args, log);
        let mut site = Self {
            coordinator,
            broker,
            devices: Vec::new(),
            door: None,
            spawn: plan.spawn,
            http,
            mqtt,
            root: plan.root.clone(),
            way: Way::new(data, http, listeners, plan.tls),
        };
        // The coordinator comes first: it lets the devices in, and in its folder is the root of their trust.
        site.start_all()?;
        site.ready().await?;
        let token = if plan.tls && plan.agents > 0 {
            Some(site.entry(plan).await?)
        } else {
            None
        };
        if plan.door {
            let door = Link::new(http).await;
            site.door = Some(door.map_err(io_error("opening the door"))?);
        }
        for n in 1..=plan.agents {
            let device = site.device(plan, n, &logs, token.clone()).await?;
            site.devices.push(device);
        }
        site.start_all()?;
        Ok(site)
    }

    /// Lets the devices enrol, and somebody listen.
    async fn entry(&mut self, plan: &Plan) -> Result<String, SiteError> {
        // Its port is open a moment before it has written what is needed to ask.
        let until = tokio::time::Instant::now() + READY;
        while self.way.bearer().is_err() && tokio::time::Instant::now() < until {
            self.coordinator.check()?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let api = Api::of(self).map_err(|error| SiteError::Entry(format!("{error:#}")))?;
        let (uses, embedded) = (plan.agents, plan.broker == Broker::Embedded);
        let root = plan.root.clone();
        let asked = spawn_blocking(move || -> anyhow::Result<_> {
            let token = api.post("/enrolment-tokens", &json!({"site": SITE, "uses": uses}))?;
            let mut asked = json!({"name": SUBSCRIBER});
            if !embedded {
                // The other broker has passwords of its own; it reads them when the coordinator tells it who may listen.
                let password = format!("{:032x}", u128::from(Dice::seed()));
                broker::set_password(&root, SUBSCRIBER, &password)?;
                asked["password"] = password.into();
            }
            let subscriber = api.post("/subscribers", &asked)?;
            Ok((token, Some(subscriber)))
        });
        let failed = |error: &dyn std::fmt::Display| SiteError::Entry(format!("{error:#}"));
        let (token, subscriber) = asked
            .await
            .map_err(|e| failed(&e))?
            .map_err(|e| failed(&e))?;
        if let Some(password) = subscriber.as_ref().and_then(|s| s["password"].as_str()) {
            self.way.with_subscriber(SUBSCRIBER, password);
        }
        let token = token["token"].as_str().map(str::to_owned);
        token.ok_or_else(|| SiteError::Entry("there is no token in the answer".into()))
    }

    async fn device(
        &self,
        plan: &Plan,
        n: usize,
        logs: &Path,
        token: Option<String>,
    ) -> Result<Device, SiteError> {
        let name = format!("d{n}");
        let dir = plan.root.join(&name);
        make_dir(&dir)?;
        let data = plan.outboxes.as_ref().unwrap_or(&plan.root).join(&name);
        let link = Link::new(self.mqtt)
            .await
            .map_err(io_error("opening a link"))?;
        let mut source = SourcePart {
            name: SOURCE.into(),
            kind: "scene",
            fps: plan.fps,
            frames: plan.frames,
            journal: dir.join("journal"),
            path: None,
            repeat: false,
            labelled: false,
            scene: None,
        };
        let has_camera = match &plan.camera {
            Camera::Scene { width, height } => {
                source.scene = Some(ScenePart {
                    seed: n as u64,
                    width: *width,
                    height: *height,
                    defect_rate: plan.ageing.map(|a| a.defect_rate),
                    drift: plan.ageing.map(|a| ScenePartDrift {
                        light: a.light,
                        onset: a.onset,
                        ramp: a.ramp,
                    }),
                });
                true
            }
            Camera::Folder { path, repeat } => {
                source.kind = "folder";
                source.path = Some(path.clone());
                source.repeat = *repeat;
                source.labelled = true;
                true
            }
            Camera::None => false,
        };
        let mesh = MeshPart {
            enabled: plan.mesh,
            listen: broker::free_port().map_err(io_error("finding a free port"))?,
            peers: self
                .devices
                .iter()
                .map(|d| d.file.mesh.listen)
                .take(FIRST_PEERS)
                .collect(),
            mdns: false,
            serve_kib_per_s: plan.serve_kib_per_s,
        };
        let file = AgentFile {
            mesh,
            offload: None,
            site: SITE.into(),
            device: name.clone(),
            data: data.join("data"),
            coordinator: token.map(|token| CoordinatorPart { token }),
            broker: BrokerPart {
                url: match plan.tls {
                    true => format!("mqtts://{}", link.address()),
                    false => format!("mqtt://{}", link.address()),
                },
                keep_alive_s: KEEP_ALIVE_S,
                max_backoff_s: MAX_BACKOFF_S,
            },
            source: has_camera.then_some(source).into_iter().collect(),
            model: plan.bundle.clone().map(|bundle| ModelPart { bundle }),
            publish: PublishPart { when: "all" },
            outbox: OutboxPart {
                max_bytes: plan.outbox_bytes,
            },
            report: ReportPart { every_s: 2 },
            samples: plan
                .ageing
                .map(|ageing| ageing.kept)
                .or(plan.kept)
                .map(|random| SamplesPart {
                    random,
                    ..SamplesPart::everything(self.way.console())
                }),
            drift: plan.ageing.map(|ageing| DriftPart {
                frames: ageing.window,
            }),
            update: plan.updates.then(|| UpdatePart {
                coordinator: match &self.door {
                    Some(door) if plan.tls => format!("https://{}", door.address()),
                    Some(door) => format!("http://{}", door.address()),
                    None => self.way.console(),
                },
                root: plan.root.join("coordinator/root.json"),
            }),
        };
        let config = dir.join("agent.toml");
        let args = ["run".into(), "--config".into(), config.clone().into()];
        let log = logs.join(format!("{name}.log"));
        let agent = match &plan.agent_program {
            Some(own) => {
                let command = std::iter::once(own.clone().into()).chain(args);
                Process::other(&name, &plan.program, command, log)
            }
            None => Process::part(&name, &plan.program, "edge-agent", args, log),
        };
        let device = Device {
            agent: agent.on_cpu(plan.agent_cpu),
            name,
            file,
            link,
            config,
        };
        device.write_config()?;
        Ok(device)
    }

    /// The coordinator's data folder.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.root.join("coordinator")
    }

    /// The way to the coordinator and the broker.
    #[must_use]
    pub const fn way(&self) -> &Way {
        &self.way
    }

    /// Where the console is.
    #[must_use]
    pub const fn http(&self) -> SocketAddr {
        self.http
    }

    /// Where the broker is.
    #[must_use]
    pub const fn mqtt(&self) -> SocketAddr {
        self.mqtt
    }

    /// The coordinator's database file.
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.root.join("coordinator").join("coordinator.db")
    }

    /// A witness who has seen nothing yet. `held_out` names the files the model was never trained on.
    #[must_use]
    pub fn witness(&self, held_out: std::collections::BTreeSet<String>) -> Witness {
        let journals = self.devices.iter().filter_map(Device::journal);
        Witness::new(self.database(), journals, held_out)
    }

    /// Starts whatever does not run.
    ///
    /// # Errors
    /// If a process cannot be started.
    pub fn start_all(&mut self) -> Result<(), SiteError> {
        if let Some(broker) = &mut self.broker {
            broker.start()?;
        }
        self.coordinator.start()?;
        if self.spawn {
            for device in &mut self.devices {
                device.agent.start()?;
            }
        }
        Ok(())
    }

    /// Waits until broker and coordinator answer.
    ///
    /// # Errors
    /// [`SiteError::Silent`] if one does not.
    pub async fn ready(&mut self) -> Result<(), SiteError> {
        if let Some(broker) = &mut self.broker {
            answers(self.mqtt, broker).await?;
        }
        answers(self.http, &mut self.coordinator).await?;
        answers(self.mqtt, &mut self.coordinator).await
    }

    /// Fails if a part that should run has ended by itself.
    ///
    /// # Errors
    /// [`ProcessError::EndedByItself`].
    pub fn check(&mut self) -> Result<(), SiteError> {
        self.coordinator.check()?;
        if let Some(broker) = &mut self.broker {
            broker.check()?;
        }
        for device in &mut self.devices {
            device.agent.check()?;
        }
        Ok(())
    }

    /// Lets no source begin another frame after those it has in its journal, as of the agents' next start.
    ///
    /// # Errors
    /// If a journal cannot be read or a configuration cannot be written.
    pub async fn bound_sources(&mut self) -> Result<(), SiteError> {
        // A witness that sees no database has read the journals only.
        let nowhere = self.root.join("no database");
        let journals = self.devices.iter().filter_map(Device::journal);
        let mut witness = Witness::new(nowhere, journals, Default::default());
        witness.look().await?;
        for device in &mut self.devices {
            let next = witness.next_frame(&device.name);
            for source in &mut device.file.source {
                // 0 would be "for ever".
                source.frames = next.max(1);
            }
            device.write_config()?;
        }
        Ok(())
    }

    /// Stops the cameras, heals the network, starts what does not run, and waits (at most for `bound`)
    /// until all that was produced has arrived. The testimony is counted from nothing.
    ///
    /// # Errors
    /// If a part fails or cannot be read.
    pub async fn finish(
        &mut self,
        held_out: std::collections::BTreeSet<String>,
        bound: Duration,
    ) -> Result<Testimony, SiteError> {
        for device in &mut self.devices {
            device.link.heal();
            device.agent.stop(GRACE).await?;
        }
        self.bound_sources().await?;
        self.start_all()?;
        self.ready().await?;
        let seen = self.witness(held_out.clone()).settle(bound).await?;
        self.check()?;
        if seen.total().is_whole() {
            return Ok(seen);
        }
        // Once more from nothing, in case it is the witness who is confused.
        Ok(self.witness(held_out).look().await?)
    }

    /// Ends every part politely. Says which had to be killed.
    ///
    /// # Errors
    /// If a process does not even die.
    pub async fn stop(&mut self) -> Result<Vec<String>, SiteError> {
        let mut rude = Vec::new();
        let agents = self.devices.iter_mut().map(|d| &mut d.agent);
        for process in agents.chain([&mut self.coordinator]) {
            if !process.stop(GRACE).await? {
                rude.push(process.name().to_owned());
            }
        }
        if let Some(broker) = &mut self.broker {
            // Its guard ends by the signal, which is no success: nothing to report.
            broker.stop(GRACE).await?;
        }
        Ok(rude)
    }
}

async fn answers(address: SocketAddr, process: &mut Process) -> Result<(), SiteError> {
    if broker::answers(address, READY).await {
        return Ok(());
    }
    process.check()?;
    Err(SiteError::Silent {
        name: process.name().to_owned(),
        log: process.last_words(),
    })
}

fn make_dir(dir: &Path) -> Result<(), SiteError> {
    std::fs::create_dir_all(dir).map_err(io_error(format!("making {}", dir.display())))
}

/// The wanted address if it is free, else another.
fn pick(wanted: Option<SocketAddr>) -> Result<SocketAddr, SiteError> {
    match wanted {
        Some(address) if TcpListener::bind(address).is_ok() => Ok(address),
        _ => broker::free_port().map_err(io_error("finding a free port")),
    }
}

/// A device knows so many of those that were there before it; of the others it hears from them.
const FIRST_PEERS: usize = 3;
/// The console's usual address.
pub const HTTP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8443);
/// MQTT's usual address.
pub const MQTT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8883);

//! Simulated devices: on each the real state machine of an update, behind a connection of its own, as the broker's
//! rights demand. What takes a device's disk, network, processor and camera is made up.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyhow::{Context, bail};
use mesh_core::{
    Desired, Digest, Info, Kind, ModelInfo, Name, Phase, Release, Reported, State, Status, Topic,
    VERSION,
    update::{Action, Input, Said, Saved, Since, Update},
};
use rumqttc::{
    Connect, ConnectReturnCode, LastWill, Packet, PingReq, PubAck, Publish, QoS, Subscribe,
};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout},
};

use super::wire::{STALL, Wire};
use crate::dice::Dice;

/// Devices that connect at once: below what a listener lets wait.
const TURNS: usize = 200;
/// Before it begins again.
const RECONNECT: Duration = Duration::from_secs(1);
/// Between pings; the broker waits for three of them.
const PING: Duration = Duration::from_secs(30);
const KEEP_ALIVE_S: u16 = 60;
/// What a device's work takes, in milliseconds: a fast network and a fast board, so that the rollout is what takes time.
const FETCH: std::ops::Range<u64> = 200..2_000;
const VERIFY: std::ops::Range<u64> = 20..200;
const TEST: std::ops::Range<u64> = 100..1_000;
const LOAD: std::ops::Range<u64> = 20..200;
/// A camera of some twenty frames a second, looked at in bursts.
const BURST: std::ops::Range<u64> = 400..600;
const FRAMES: usize = 10;
/// What a model takes for a frame, in milliseconds, and one that is far too slow.
const MS: f32 = 5.0;
const SLOW_MS: f32 = 100.0;

/// What all devices share.
#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) mqtt: SocketAddr,
    pub(super) site: Name,
    /// The model that everybody has at first.
    pub(super) base: Release,
    /// The same, as devices tell of it; later versions differ in the version only.
    pub(super) model: ModelInfo,
    /// The version that fails on some devices.
    pub(super) bad: String,
    /// On this share of them.
    pub(super) share: f32,
}

/// What the bad version does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Slow,
    Wrong,
}

/// What is known of a device without asking the coordinator.
#[derive(Debug, Default)]
struct Seen {
    /// What is active.
    loaded: Option<Digest>,
    /// Nothing is under way.
    settled: bool,
    /// Models that it was told to run.
    told: BTreeSet<Digest>,
    /// Models that were ever active.
    ran: BTreeSet<Digest>,
    /// Connections that it lost.
    losses: u64,
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(|e| e.into_inner())
}

/// All simulated devices; they end when it is dropped.
pub(super) struct Swarm {
    seen: Vec<Arc<Mutex<Seen>>>,
    faulty: usize,
    _tasks: JoinSet<()>,
}

impl Swarm {
    /// Starts `count` devices. The lot decides on which the bad version fails, and how.
    pub(super) fn start(world: World, count: usize, seed: u64) -> anyhow::Result<Self> {
        let world = Arc::new(world);
        let turns = Arc::new(Semaphore::new(TURNS));
        let start = Instant::now();
        let mut lot = Dice::new(seed);
        let (mut seen, mut faulty, mut tasks) = (Vec::new(), 0, JoinSet::new());
        for n in 1..=count {
            let name: Name = format!("d{n}").parse()?;
            let fault = fault(&mut lot, world.share);
            faulty += usize::from(fault.is_some());
            let known = Arc::new(Mutex::new(Seen::default()));
            seen.push(known.clone());
            let device = Device::new(world.clone(), name, fault, lot.any(), known, start);
            let turns = turns.clone();
            tasks.spawn(device.live(turns));
        }
        Ok(Self {
            seen,
            faulty,
            _tasks: tasks,
        })
    }

    /// Devices on which the bad version would fail.
    pub(super) const fn faulty(&self) -> usize {
        self.faulty
    }

    fn count(&self, holds: impl Fn(&Seen) -> bool) -> usize {
        self.seen.iter().filter(|seen| holds(&lock(seen))).count()
    }

    /// Devices that are at rest with this model.
    pub(super) fn settled_on(&self, digest: Digest) -> usize {
        self.count(|seen| seen.settled && seen.loaded == Some(digest))
    }

    /// Devices that were ever told to run this model.
    pub(super) fn told(&self, digest: Digest) -> usize {
        self.count(|seen| seen.told.contains(&digest))
    }

    /// Devices on which this model was ever active.
    pub(super) fn ran(&self, digest: Digest) -> usize {
        self.count(|seen| seen.ran.contains(&digest))
    }

    /// Connections that were lost.
    pub(super) fn losses(&self) -> u64 {
        self.seen.iter().map(|seen| lock(seen).losses).sum()
    }
}

/// Draws on one device in `1 / share`.
fn fault(lot: &mut Dice, share: f32) -> Option<Fault> {
    const OF: usize = 1_000_000;
    let hit = (lot.below(OF) as f32) < share * OF as f32;
    let which = lot.below(2);
    hit.then_some(if which == 0 {
        Fault::Slow
    } else {
        Fault::Wrong
    })
}

struct Device {
    world: Arc<World>,
    name: Name,
    fault: Option<Fault>,
    dice: Dice,
    seen: Arc<Mutex<Seen>>,
    start: Instant,
    update: Update,
    /// What is in memory: active, beside it, and the ticket of that.
    active: Option<Release>,
    beside: Option<Release>,
    ticket: u64,
    /// What was ordered last will be done then. What was ordered before is of no interest any more.
    answer: Option<(Instant, u64)>,
    /// When the next frames come, while there is a trial.
    burst: Option<Instant>,
    /// There is something new to say.
    news: bool,
    /// The model that this connection was told of.
    model: Option<Digest>,
}

/// What happens next to a device.
enum Event {
    Packet(Packet),
    Answer(u64),
    Frames,
    Tick,
    Ping,
}

impl Device {
    fn new(
        world: Arc<World>,
        name: Name,
        fault: Option<Fault>,
        random: u64,
        seen: Arc<Mutex<Seen>>,
        start: Instant,
    ) -> Self {
        let saved = Saved::new(Some(world.base.clone()));
        let (update, actions) = Update::resume(saved, Since::NewBoot, 0, random);
        let mut device = Self {
            world,
            name,
            fault,
            dice: Dice::new(random),
            seen,
            start,
            update,
            active: None,
            beside: None,
            ticket: 0,
            answer: None,
            burst: None,
            news: true,
            model: None,
        };
        device.carry_out(actions);
        device
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Connects, and connects again.
    async fn live(mut self, turns: Arc<Semaphore>) {
        loop {
            if let Err(error) = self.connection(&turns).await {
                tracing::debug!(device = %self.name, "{error:#}");
            }
            lock(&self.seen).losses += 1;
            sleep(RECONNECT).await;
        }
    }

    /// One connection to its end.
    async fn connection(&mut self, turns: &Semaphore) -> anyhow::Result<()> {
        let mut wire = {
            let _turn = turns.acquire().await?;
            timeout(STALL, self.connect())
                .await
                .context("connecting took too long")??
        };
        self.greet(&mut wire)?;
        let mut ping = interval(PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.say(&mut wire)?;
            wire.flush().await?;
            let due = self.update.due_ms();
            let due = due.and_then(|ms| self.start.checked_add(Duration::from_millis(ms)));
            let answer = self.answer;
            let event = tokio::select! {
                // What is done is done in time, however late it is heard.
                biased;
                () = at(answer.map(|(at, _)| at)) => Event::Answer(answer.map_or(0, |(_, ticket)| ticket)),
                () = at(self.burst) => Event::Frames,
                () = at(due) => Event::Tick,
                _ = ping.tick() => Event::Ping,
                packet = wire.packet() => Event::Packet(packet?),
            };
            match event {
                Event::Packet(Packet::Publish(publish)) => self.hear(&publish, &mut wire)?,
                Event::Packet(Packet::Disconnect) => bail!("sent away"),
                Event::Packet(_) => {}
                Event::Answer(ticket) => {
                    self.answer = None;
                    self.give(Input::Done {
                        ticket,
                        result: Ok(()),
                    });
                }
                Event::Frames => self.look(),
                Event::Tick => self.give(Input::Tick),
                Event::Ping => {
                    PingReq.write(&mut wire.output)?;
                }
            }
        }
    }

    // What it hears and says.

    fn topic(&self, kind: Kind) -> String {
        Topic::of_device(&self.world.site, &self.name, kind).to_string()
    }

    async fn connect(&self) -> anyhow::Result<Wire> {
        let mut wire = Wire::open(self.world.mqtt).await?;
        let will = LastWill::new(
            self.topic(Kind::Status),
            Status::Offline.as_str(),
            QoS::AtLeastOnce,
            true,
        );
        let mut connect = Connect::new(format!("{}/{}", self.world.site, self.name));
        connect.keep_alive = KEEP_ALIVE_S;
        connect.last_will = Some(will);
        connect.write(&mut wire.output)?;
        wire.flush().await?;
        match wire.packet().await? {
            Packet::ConnAck(answer) if answer.code == ConnectReturnCode::Success => Ok(wire),
            other => bail!("the broker answered {other:?}"),
        }
    }

    /// What an agent says at the start of each connection.
    fn greet(&mut self, wire: &mut Wire) -> anyhow::Result<()> {
        let mut subscribe = Subscribe::new(self.topic(Kind::Desired), QoS::AtLeastOnce);
        subscribe.pkid = wire.next_id();
        subscribe.write(&mut wire.output)?;
        let info = Info {
            v: VERSION,
            agent: env!("CARGO_PKG_VERSION").into(),
            board: "simulated".into(),
            arch: std::env::consts::ARCH.into(),
            sources: "cam0".into(),
            tags: String::new(),
            epoch: 1,
            mesh: String::new(),
        };
        let state = State {
            v: VERSION,
            ts: 0,
            health: "ok".into(),
            detail: String::new(),
        };
        let online = Status::Online.as_str().into();
        wire.retain(&self.topic(Kind::Status), online)?;
        wire.retain(&self.topic(Kind::Info), info.encode()?)?;
        wire.retain(&self.topic(Kind::State), state.encode()?)?;
        self.model = None;
        self.news = true;
        Ok(())
    }

    /// Says what is new, the last of it only.
    fn say(&mut self, wire: &mut Wire) -> anyhow::Result<()> {
        if !std::mem::take(&mut self.news) {
            return Ok(());
        }
        let reported = self.note();
        if let Some(loaded) = &reported.loaded
            && self.model != Some(loaded.digest)
        {
            let model = ModelInfo {
                version: loaded.version.clone(),
                ..self.world.model.clone()
            };
            wire.retain(&self.topic(Kind::Model), model.encode()?)?;
            self.model = Some(loaded.digest);
        }
        wire.retain(&self.topic(Kind::Reported), reported.encode()?)
    }

    fn hear(&mut self, publish: &Publish, wire: &mut Wire) -> anyhow::Result<()> {
        if publish.qos == QoS::AtLeastOnce {
            PubAck::new(publish.pkid).write(&mut wire.output)?;
        }
        let desired = Desired::decode(&publish.payload)?;
        if let Some(release) = &desired.release {
            lock(&self.seen).told.insert(release.digest);
        }
        self.give(Input::Desired(Box::new(desired)));
        Ok(())
    }

    // What it does.

    fn give(&mut self, input: Input) {
        let now = self.now_ms();
        let actions = self.update.step(input, now);
        self.carry_out(actions);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            let (ticket, takes) = match action {
                Action::Fetch { ticket, .. } => (ticket, FETCH),
                Action::Verify { ticket, .. } => (ticket, VERIFY),
                Action::Test { ticket, .. } => (ticket, TEST),
                Action::Run {
                    active,
                    beside,
                    ticket,
                    ..
                } => {
                    (self.active, self.beside, self.ticket) = (active, beside, ticket);
                    (ticket, LOAD)
                }
                Action::Report => {
                    self.news = true;
                    continue;
                }
                // The disk never fails here, and has room for everything.
                Action::Save(_) | Action::Retain(_) => continue,
            };
            let takes = self.dice.wait(&takes);
            self.answer = Some((Instant::now() + takes, ticket));
        }
        let on_trial = matches!(self.update.phase(), Phase::Shadowing | Phase::Watching);
        if !on_trial {
            self.burst = None;
        } else if self.burst.is_none() {
            self.burst = Some(Instant::now() + self.dice.wait(&BURST));
        }
        self.note();
    }

    /// Notes what it is, for those who count.
    fn note(&self) -> Reported {
        let ts = i64::try_from(self.now_ms()).unwrap_or(i64::MAX);
        let reported = self.update.report(ts);
        let loaded = reported.loaded.as_ref().map(|release| release.digest);
        let mut seen = lock(&self.seen);
        seen.loaded = loaded;
        seen.settled = reported.phase == Phase::Settled;
        seen.ran.extend(loaded);
        // What is watched is active already, proven or not.
        if matches!(reported.phase, Phase::Activating | Phase::Watching) {
            seen.ran.extend(self.active.as_ref().map(|r| r.digest));
        }
        reported
    }

    /// Some frames go through the models in memory.
    fn look(&mut self) {
        self.burst = None;
        for _ in 0..FRAMES {
            let Some(active) = self.active.clone() else {
                break;
            };
            let class = self.dice.below(4);
            let input = Input::Frame {
                ticket: self.ticket,
                active: self.said(&active, class),
                beside: self.beside.clone().map(|beside| self.said(&beside, class)),
            };
            self.give(input);
        }
    }

    /// What a model says about a frame that shows this class.
    fn said(&mut self, release: &Release, class: usize) -> Said {
        let fault = self.fault.filter(|_| release.version == self.world.bad);
        let shown = match fault {
            Some(Fault::Wrong) => class + 1,
            _ => class,
        };
        let ms = match fault {
            Some(Fault::Slow) => SLOW_MS,
            _ => MS,
        };
        Said {
            label: format!("class{}", shown % 4),
            score: 0.95,
            finite: true,
            sure: true,
            shared: true,
            // No two frames take the same time.
            ms: ms * (1.0 + self.dice.below(100) as f32 / 1_000.0),
        }
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

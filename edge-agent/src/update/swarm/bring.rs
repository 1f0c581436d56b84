//! Carries out what [`mesh_core::swarm`] decides: looks at neighbours, asks them and the coordinator, takes in what comes.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use mesh_core::{
    Digest,
    roster::Peer,
    swarm::{Ask, Fault, Plan, SETTLE_MS, Source},
};
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet, spawn_blocking},
    time::{MissedTickBehavior, interval},
};

use super::{
    Swarm,
    ask::{self, Heard},
    load::{Load, Trouble},
    wire::{DeltaState, Look},
};
use crate::{
    clock::Monotonic,
    update::{client::Client, error::UpdateError, fetch::alone, worker::Watchful},
};

/// What waits is looked over so often, besides when something comes.
const TICK: Duration = Duration::from_millis(100);
/// Those that are looked at have so long to say what they have before anybody is asked for anything.
const HELLO_MS: u64 = 1_500;
/// What neighbours say, until it is heard.
const WORDS: usize = 64;

/// What a fetch is carried out with.
pub(in crate::update) struct With<'a> {
    pub(in crate::update) release: Digest,
    pub(in crate::update) client: &'a Client,
    pub(in crate::update) watchful: &'a Watchful,
    /// Nothing where the device has no neighbours to ask.
    pub(in crate::update) swarm: Option<&'a Swarm>,
    /// Did the coordinator answer a moment ago?
    pub(in crate::update) uplink: bool,
}

/// An attempt that has ended.
type Done = (Ask, Result<Vec<u8>, Trouble>);

/// Brings all pieces of a load. Blocks.
pub(in crate::update) fn bring(load: &mut impl Load, with: &With<'_>) -> Result<(), UpdateError> {
    let runtime = alone()?;
    let result = runtime.block_on(async { Bringing::new(load, with).run().await });
    // A request to the coordinator may still wait for its answer: nobody is interested in it any more.
    runtime.shutdown_background();
    result
}

struct Bringing<'a, L> {
    load: &'a mut L,
    with: &'a With<'a>,
    clock: Monotonic,
    plan: Plan,
    tasks: JoinSet<Done>,
    looks: Looks,
    /// Nothing is asked for before.
    hello_ms: u64,
    nowhere: Nowhere,
    /// What the coordinator did not bring, and why.
    last: Option<UpdateError>,
}

/// Some neighbours say that the coordinator has no delta. It saves everybody who hears it the wait for a delta that does not come;
/// as a lie it would make everybody fetch what one of them would have brought. So each asks the coordinator, once, and
/// fetches nothing by that.
#[derive(Default)]
struct Nowhere {
    /// The question that is under way.
    check: JoinSet<Result<bool, UpdateError>>,
    is_asked: bool,
    /// There is one.
    is_a_lie: bool,
    said_by: HashSet<Peer>,
}

/// Those that are looked at.
struct Looks {
    tasks: JoinSet<()>,
    peers: HashMap<Peer, AbortHandle>,
    /// Those that have answered, or do not.
    known: HashSet<Peer>,
    tell: mpsc::Sender<Heard>,
    heard: mpsc::Receiver<Heard>,
}

impl<'a, L: Load> Bringing<'a, L> {
    fn new(load: &'a mut L, with: &'a With<'a>) -> Self {
        let clock = with.swarm.map_or_else(Monotonic::start, Swarm::clock);
        let (tell, heard) = mpsc::channel(WORDS);
        let now_ms = clock.now_ms();
        let mut settled_ms = with.swarm.map_or(0, Swarm::settled_ms);
        if !with.uplink {
            // There is hope until the neighbours had time to answer.
            settled_ms = settled_ms.max(now_ms + SETTLE_MS);
        }
        let me = with.swarm.map_or(Digest([0; 32]), Swarm::me);
        let times = (settled_ms, load.patience_ms());
        let names = load.names().into_iter();
        let mut plan = Plan::new(me, with.release, names, times, now_ms);
        if !with.uplink {
            plan.line_is_down(now_ms);
        }
        Self {
            load,
            with,
            clock,
            plan,
            tasks: JoinSet::new(),
            looks: Looks {
                tasks: JoinSet::new(),
                peers: HashMap::new(),
                known: HashSet::new(),
                tell,
                heard,
            },
            hello_ms: now_ms + HELLO_MS,
            nowhere: Nowhere::default(),
            last: None,
        }
    }

    async fn run(mut self) -> Result<(), UpdateError> {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.with.watchful.is_overtaken() {
                return Err(UpdateError::Overtaken);
            }
            if self.plan.is_done() {
                return Ok(());
            }
            let now_ms = self.clock.now_ms();
            self.meet(now_ms);
            let looks = &self.looks;
            let all_known = looks.peers.keys().all(|peer| looks.known.contains(peer));
            if all_known || now_ms >= self.hello_ms {
                for ask in self.plan.asks(now_ms) {
                    self.ask(ask);
                }
            }
            if self.plan.is_hopeless(now_ms) {
                let nobody = || UpdateError::Answer {
                    what: "neighbours".into(),
                    why: "nothing came from any of them, nor from the coordinator".into(),
                };
                return Err(self.last.take().unwrap_or_else(nobody));
            }
            if let Some(swarm) = self.with.swarm {
                swarm.shelf.set_uplink(self.plan.has_line(now_ms));
            }
            tokio::select! {
                Some(done) = self.tasks.join_next() => {
                    let done = done.map_err(|error| UpdateError::Answer {
                        what: "a piece".into(),
                        why: error.to_string(),
                    });
                    self.done(done?)?;
                }
                Some(heard) = self.looks.heard.recv() => self.hear(heard),
                Some(checked) = self.nowhere.check.join_next() => self.checked(checked.ok())?,
                _ = tick.tick() => {}
            }
        }
    }

    /// Looks at those that have it or fetch it too, and at nobody else.
    fn meet(&mut self, now_ms: u64) {
        let Some(swarm) = self.with.swarm else {
            return;
        };
        let circle = swarm.circle(self.with.release, now_ms);
        let plan = &mut self.plan;
        self.looks.peers.retain(|peer, look| {
            let stays = circle.contains(peer);
            if !stays {
                look.abort();
                plan.gone(peer);
            }
            stays
        });
        let pause = super::pause(circle.len());
        for peer in circle {
            if self.looks.peers.contains_key(&peer) {
                continue;
            }
            let look = Look {
                release: self.with.release,
                delta: self.load.delta(),
            };
            let looking = ask::look(
                swarm.asking().site,
                peer,
                look,
                pause,
                self.looks.tell.clone(),
            );
            let task = self.looks.tasks.spawn(looking);
            self.looks.peers.insert(peer, task);
        }
        while self.looks.tasks.try_join_next().is_some() {}
    }

    fn hear(&mut self, heard: Heard) {
        match heard {
            // What was said before it was left.
            Heard::Said(peer, _) if !self.looks.peers.contains_key(&peer) => {}
            Heard::Said(peer, said) => {
                if said.delta == DeltaState::Nowhere {
                    self.doubt(peer);
                }
                self.looks.known.insert(peer);
                let offer = self.load.offer(&said);
                self.plan.offer(peer, offer, self.clock.now_ms());
            }
            Heard::Lost(peer) => {
                self.looks.known.insert(peer);
                self.plan.gone(&peer);
            }
        }
    }

    /// A neighbour says that the coordinator has no delta.
    fn doubt(&mut self, peer: Peer) {
        let is_new = self.nowhere.said_by.insert(peer);
        if !self.nowhere.is_asked {
            self.nowhere.is_asked = true;
            if let Some(check) = self.load.is_there(self.with.client, self.with.watchful) {
                self.nowhere.check.spawn_blocking(check);
            }
        } else if self.nowhere.is_a_lie
            && is_new
            && let Some(swarm) = self.with.swarm
        {
            swarm.lied(peer);
        }
    }

    /// The coordinator has said whether there is one.
    fn checked(&mut self, answer: Option<Result<bool, UpdateError>>) -> Result<(), UpdateError> {
        match answer {
            Some(Ok(false)) => Err(UpdateError::NoDelta),
            Some(Ok(true)) => {
                self.nowhere.is_a_lie = true;
                if let Some(swarm) = self.with.swarm {
                    self.nowhere
                        .said_by
                        .iter()
                        .for_each(|peer| swarm.lied(*peer));
                }
                Ok(())
            }
            // It cannot be asked: then it is as if nobody had said anything.
            Some(Err(_)) | None => Ok(()),
        }
    }

    fn ask(&mut self, ask: Ask) {
        match ask.of {
            Source::Neighbour(peer) => {
                let Some(swarm) = self.with.swarm else {
                    return;
                };
                let coming = self.load.of_neighbour(ask.piece, peer, swarm.asking());
                self.tasks.spawn(async move {
                    let came = coming.await;
                    (ask, came.map_err(Trouble::Neighbour))
                });
            }
            Source::Coordinator => {
                let (circle, known) = (self.looks.peers.len(), self.looks.known.len());
                tracing::debug!(piece = ask.piece, circle, known, "asked of the coordinator");
                let (client, watchful) = (self.with.client, self.with.watchful);
                let fetch = self.load.of_coordinator(ask.piece, client, watchful);
                self.tasks.spawn(async move {
                    let came = spawn_blocking(fetch).await.unwrap_or_else(|error| {
                        Err(UpdateError::Answer {
                            what: "a piece".into(),
                            why: error.to_string(),
                        })
                    });
                    (ask, came.map_err(Trouble::Coordinator))
                });
            }
        }
    }

    fn done(&mut self, (ask, result): Done) -> Result<(), UpdateError> {
        let now_ms = self.clock.now_ms();
        let (piece, of) = (ask.piece, ask.of);
        let trouble = match result {
            Ok(bytes) => match self.load.take(piece, of, &bytes) {
                Ok(()) => {
                    self.plan.got(piece, of, now_ms);
                    return Ok(());
                }
                // The disk, whoever brought it.
                Err(error @ UpdateError::Disk(_)) => return Err(error),
                Err(error) => match of {
                    Source::Coordinator => Trouble::Coordinator(error),
                    Source::Neighbour(_) => Trouble::Neighbour(Fault::Bad),
                },
            },
            Err(trouble) => trouble,
        };
        let fault = match trouble {
            Trouble::Neighbour(fault) => fault,
            Trouble::Coordinator(
                error @ (UpdateError::NoDelta | UpdateError::Disk(_) | UpdateError::Overtaken),
            ) => return Err(error),
            Trouble::Coordinator(error) => {
                tracing::debug!("the coordinator does not bring a piece: {error}");
                self.last = Some(error);
                Fault::Silent
            }
        };
        self.plan.failed(piece, of, fault, now_ms);
        if let (Source::Neighbour(peer), Fault::Bad, Some(swarm)) = (of, fault, self.with.swarm) {
            swarm.bad(peer);
        }
        Ok(())
    }
}

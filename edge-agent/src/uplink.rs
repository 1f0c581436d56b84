//! The uplink: keeps a connection to the broker and delivers what the store made durable.
//!
//! All decisions about what to send, and when again, are [`Delivery`]'s; this drives it.

mod itself;

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use mesh_core::{
    Ack, Backoff, Desired, Gap, Info, Kind, Mark, ModelInfo, Name, Reported, SettingsReport, State,
    Status, Topic, VERSION,
    delivery::{Delivery, Pace, Send},
    replay_bytes,
    way::Wait,
};
use rumqttc::PublishOptions;
use tokio::sync::{
    mpsc::{Receiver, Sender},
    watch,
};
use tokio_util::sync::CancellationToken;

use crate::{
    about::About,
    board::{BoardHandle, State as BoardState},
    clock::{Monotonic, WallClock},
    config::Config,
    connection::{self, Connection, News},
    counters::Counters,
    dice,
    identity::Tls,
    mesh::{Carriers, Rosters},
    outbox::GapRecord,
    passage::{Passage, Turn},
    pipeline::Drifts,
    samples::desk::Marked,
    store::{Command, Durable, Stored},
};

/// The first wait after a lost connection is at most this; the configuration says how far it grows.
const BACKOFF_MS: u64 = 500;
/// A gap is said again until it is acknowledged.
const SAY_GAPS_AGAIN_MS: u64 = 10_000;
/// A renewed certificate is connected with as soon as nothing waits to be acknowledged, and after this at the latest.
const RENEWED: Duration = Duration::from_secs(5);
/// For a goodbye to the broker before the device comes back with another certificate.
const GOODBYE: Duration = Duration::from_millis(500);
/// What was made durable in the last moments before a stop still gets out, if the coordinator answers.
const FAREWELL: Duration = Duration::from_secs(2);

/// A message: topic, payload, and how it is sent.
type Said = (String, Bytes, PublishOptions);

/// Everything that can happen to the uplink.
enum Event {
    Network(News),
    Store(Stored),
    Reconnect,
    Due,
    Report,
    /// Something is to be said: about a source, the models or the device.
    News,
    /// The device has another certificate than before.
    Renewed,
    /// Another way to the broker may be better.
    Turn(Turn),
    Stop,
}

/// The uplink's state.
pub(crate) struct Uplink {
    config: Config,
    about: About,
    epoch: u64,
    delivery: Delivery,
    /// Live readings whose bytes are still in memory, so that they need not be read back.
    live: BTreeMap<u64, (Name, Bytes)>,
    gaps: Vec<GapRecord>,
    gaps_said_ms: Option<u64>,
    /// Waits to be sent: asked from the store, or answered and without room in the connection.
    batch: Batch,
    /// What the device says about itself and has not said on this connection.
    greetings: Vec<Said>,
    /// Topics that wait to be asked for on this connection.
    to_ask: Vec<String>,
    /// What was found about the sources, and what of it this connection knows.
    drifts: watch::Receiver<Drifts>,
    drifts_said: Drifts,
    /// Where wishes go, and what the device says in answer; what of it this connection knows.
    desired: watch::Sender<Option<Desired>>,
    reported: watch::Receiver<Option<Reported>>,
    settings: watch::Receiver<Option<(i64, SettingsReport)>>,
    erased: watch::Receiver<Option<u64>>,
    reported_said: Option<Reported>,
    /// Whether the broker is there, for whoever wants to know.
    rosters: Option<Rosters>,
    connected: watch::Sender<bool>,
    passage: Passage,
    /// What was last said of the model, of the state and of the device.
    said: (Option<ModelInfo>, State, Info),
    /// Where marks go.
    marks: std::sync::mpsc::SyncSender<Marked>,
    connection: Option<Connection>,
    /// What it is made with, and until when it is to be made anew.
    tls: Tls,
    renewed: Option<tokio::time::Instant>,
    up: bool,
    backoff: Backoff,
    /// Why there was no connection, as it was last said.
    complaint: String,
    /// Acknowledged, not yet told to the store because it was busy.
    to_free: Option<mesh_core::RangeSet>,
    store: Sender<Command>,
    board: BoardHandle,
    counters: Counters,
    wall: WallClock,
    clock: Monotonic,
}

/// The backlog's next batch.
enum Batch {
    None,
    Asked,
    Ready { from: u64, to: u64, payload: Bytes },
}

/// What the uplink starts from.
pub(crate) struct Start {
    /// The agent's configuration.
    pub(crate) config: Config,
    /// What it says about itself.
    pub(crate) about: About,
    /// What the outbox holds.
    pub(crate) pending: mesh_core::RangeSet,
    /// What it had to drop.
    pub(crate) gaps: Vec<GapRecord>,
    /// Commands to the store.
    pub(crate) store: Sender<Command>,
    /// What is found about the sources.
    pub(crate) drifts: watch::Receiver<Drifts>,
    /// Where wishes go.
    pub(crate) desired: watch::Sender<Option<Desired>>,
    /// What the device says in answer.
    pub(crate) reported: watch::Receiver<Option<Reported>>,
    /// The same about settings, and since when.
    pub(crate) settings: watch::Receiver<Option<(i64, SettingsReport)>>,
    /// How far it is with what is to be erased.
    pub(crate) erased: watch::Receiver<Option<u64>>,
    /// What the connection is made with.
    pub(crate) tls: Tls,
    /// Is the broker there?
    pub(crate) rosters: Option<Rosters>,
    pub(crate) connected: watch::Sender<bool>,
    /// Does the device reach it by itself?
    pub(crate) own_way: watch::Sender<bool>,
    /// Neighbours that can carry it there otherwise.
    pub(crate) carriers: Option<Carriers>,
    /// Where marks go.
    pub(crate) marks: std::sync::mpsc::SyncSender<Marked>,
    /// The board's lights.
    pub(crate) board: BoardHandle,
    /// What is counted.
    pub(crate) counters: Counters,
    /// Stamps what the device says about itself.
    pub(crate) wall: WallClock,
}

impl Uplink {
    /// Offline, with what the outbox holds.
    #[must_use]
    pub(crate) fn new(start: Start) -> Self {
        let Start {
            config,
            about,
            pending,
            gaps,
            store,
            drifts,
            desired,
            reported,
            settings,
            erased,
            tls,
            rosters,
            connected,
            own_way,
            carriers,
            marks,
            board,
            counters,
            wall,
        } = start;
        Self {
            passage: Passage::new(config.clone(), tls.clone(), carriers, own_way),
            epoch: about.info.epoch,
            delivery: Delivery::new(Pace::default(), pending),
            live: BTreeMap::new(),
            gaps,
            gaps_said_ms: None,
            batch: Batch::None,
            greetings: Vec::new(),
            to_ask: Vec::new(),
            drifts,
            drifts_said: Drifts::new(),
            desired,
            reported,
            settings,
            erased,
            reported_said: None,
            rosters,
            connected,
            said: (about.model(), about.state(), about.info()),
            marks,
            connection: None,
            tls,
            renewed: None,
            up: false,
            complaint: String::new(),
            backoff: Backoff::new(BACKOFF_MS, u64::from(config.broker.max_backoff_s) * 1_000),
            to_free: None,
            config,
            about,
            store,
            board,
            counters,
            wall,
            clock: Monotonic::start(),
        }
    }

    /// Delivers until `stop`, and a little longer.
    pub(crate) async fn run(mut self, mut stored: Receiver<Stored>, stop: CancellationToken) {
        let mut reconnect = Some(tokio::time::Instant::now());
        let period = Duration::from_secs(u64::from(self.config.report.every_s));
        let mut report = tokio::time::interval(period);
        report.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut farewell: Option<tokio::time::Instant> = None;
        loop {
            let event = {
                let Self {
                    connection,
                    delivery,
                    clock,
                    gaps,
                    gaps_said_ms,
                    drifts,
                    reported,
                    settings,
                    erased,
                    about,
                    tls,
                    renewed,
                    up,
                    passage,
                    ..
                } = &mut self;
                let gaps_due = gaps_said_ms
                    .filter(|_| *up && !gaps.is_empty())
                    .map(|at| at + SAY_GAPS_AGAIN_MS);
                let due = delivery
                    .due_ms()
                    .into_iter()
                    .chain(gaps_due)
                    .min()
                    .map(|at| clock.at(at));
                tokio::select! {
                    // The store first: what is durable must never wait for the network.
                    biased;
                    () = stop.cancelled(), if farewell.is_none() => Event::Stop,
                    said = stored.recv() => match said {
                        Some(said) => Event::Store(said),
                        None => break,
                    },
                    news = news(connection) => Event::Network(news),
                    () = at(reconnect) => Event::Reconnect,
                    () = at(due) => Event::Due,
                    () = at(farewell) => break,
                    _ = report.tick() => Event::Report,
                    // Closed: the pipeline has ended, there is nothing more to find.
                    Ok(()) = drifts.changed() => Event::News,
                    // The same of the models.
                    Ok(()) = reported.changed() => Event::News,
                    Ok(()) = settings.changed() => Event::News,
                    Ok(()) = erased.changed() => Event::News,
                    () = about.changed() => Event::News,
                    () = tls.changed() => Event::Renewed,
                    turn = passage.turn(), if farewell.is_none() => Event::Turn(turn),
                    // Looked at below.
                    () = at(*renewed), if farewell.is_none() => Event::News,
                }
            };
            match event {
                Event::Network(News::Lost { why, doubt }) => {
                    self.lost(&why);
                    if doubt {
                        self.tls.doubt();
                    }
                    reconnect = Some(self.next_try());
                }
                Event::Network(news) => self.network(news),
                Event::Turn(turn) => {
                    if self.turn(turn).await {
                        reconnect = Some(self.next_try());
                    }
                }
                Event::Store(said) => self.store_said(said),
                Event::Reconnect => reconnect = self.connect(),
                Event::Due => self.due(),
                Event::Report => self.report(),
                // Said below, with everything else.
                Event::News => self.renew(),
                Event::Renewed if farewell.is_some() || !self.config.broker.is_tls() => {}
                Event::Renewed if self.connection.is_some() => {
                    self.renewed = Some(tokio::time::Instant::now() + RENEWED);
                }
                Event::Renewed => reconnect = Some(tokio::time::Instant::now()),
                Event::Stop => {
                    farewell = Some(tokio::time::Instant::now() + FAREWELL);
                    reconnect = None;
                }
            }
            self.pump();
            if farewell.is_none() && self.is_time_to_come_back() {
                self.come_back().await;
                reconnect = self.connect();
            }
            let told =
                self.delivery.waiting() == 0 && stored.is_empty() && self.counters.is_stored();
            if farewell.is_some() && (told || !self.up) {
                break;
            }
        }
        self.say_goodbye().await;
    }

    fn connect(&mut self) -> Option<tokio::time::Instant> {
        if self.config.broker.is_tls() && self.tls.material().is_none() {
            tracing::debug!("the device is not enrolled yet; readings are kept and sent later");
            return None;
        }
        self.renewed = None;
        self.tls.seen();
        match self.passage.connect() {
            Ok(connection) => {
                self.connection = Some(connection);
                None
            }
            Err(error) => {
                self.counters.connect_failures.add(1);
                tracing::error!(%error, "cannot connect");
                self.passage.lost();
                Some(self.next_try())
            }
        }
    }

    /// There is another certificate, and nothing or no more time to wait for.
    fn is_time_to_come_back(&self) -> bool {
        let is_over = |at| self.delivery.waiting() == 0 || tokio::time::Instant::now() >= at;
        self.renewed.is_some_and(is_over)
    }

    /// Leaves without a last will. What was under way is sent again.
    async fn come_back(&mut self) {
        tracing::info!("connecting with the new certificate");
        let was_up = self.up;
        if let Some(connection) = self.connection.take().filter(|_| was_up) {
            connection.close(GOODBYE).await;
        }
        self.down();
    }

    /// The way to the broker has changed. True if a new connection is to be made.
    async fn turn(&mut self, turn: Turn) -> bool {
        match turn {
            Turn::Silent => self.lost("nothing comes back any more"),
            Turn::Better => {
                tracing::info!("the device's own way answers again");
                if let Some(connection) = self.connection.take().filter(|_| self.up) {
                    connection.close(GOODBYE).await;
                }
                self.down();
                self.passage.lost();
            }
            // Otherwise an attempt is under way.
            Turn::Carriers => return self.connection.is_none(),
        }
        true
    }

    fn next_try(&mut self) -> tokio::time::Instant {
        let wait = match self.passage.next() {
            Wait::Not => return tokio::time::Instant::now(),
            Wait::Short => dice::throw() % BACKOFF_MS,
            Wait::Longer => self.backoff.next(dice::throw()),
        };
        tracing::debug!(wait_ms = wait, "next try to connect");
        tokio::time::Instant::now() + Duration::from_millis(wait)
    }

    fn lost(&mut self, why: &str) {
        // The same again and again is said once; something else is news.
        if self.up || self.complaint != why {
            self.complaint = why.to_owned();
            tracing::warn!(broker = %connection::shown(&self.config, &self.tls), "connection lost: {why}; readings are kept and sent later");
        }
        let counters = &self.counters;
        if self.up {
            counters.reconnects.add(1);
        } else {
            counters.connect_failures.add(1);
        }
        self.down();
        self.passage.lost();
        self.board.set_state(self.board_state());
    }

    /// There is no connection.
    fn down(&mut self) {
        self.up = false;
        self.connected.send_replace(false);
        self.connection = None;
        self.batch = Batch::None;
        self.live.clear();
        self.delivery.disconnected();
    }

    fn network(&mut self, news: News) {
        self.passage.heard(&news);
        match news {
            News::Up => {
                self.passage.up();
                let is_carried = self.passage.is_carried();
                tracing::info!(broker = %connection::shown(&self.config, &self.tls), waiting = self.delivery.waiting(), is_carried, "connected");
                self.counters.by_neighbours.add(u64::from(is_carried));
                self.up = true;
                self.connected.send_replace(true);
                // The last is asked for first.
                self.to_ask =
                    vec![Topic::prefix(&self.config.site, &self.config.device) + "+/mark"];
                if self.config.update.enabled {
                    self.to_ask.push(self.topic(Kind::Desired));
                }
                if self.rosters.is_some() {
                    self.to_ask.push(self.site_topic(Kind::Roster));
                    self.to_ask.push(self.site_topic(Kind::Meeting));
                }
                self.to_ask.push(self.topic(Kind::Ack));
                self.drifts_said.clear();
                self.reported_said = None;
                self.gaps_said_ms = None;
                self.said = (self.about.model(), self.about.state(), self.about.info());
                self.greetings = self.greet();
                self.delivery.connected();
                self.board.set_state(self.board_state());
            }
            // Only a broker that takes messages is worth coming back to at once.
            News::Taken => {
                self.backoff.reset();
                self.complaint.clear();
            }
            News::Message {
                topic,
                payload,
                retained,
            } => self.message(&topic, &payload, retained),
            News::Progress | News::Left | News::Lost { .. } => {}
        }
    }

    fn message(&mut self, topic: &str, payload: &[u8], retained: bool) {
        let mine = match topic.parse::<Topic>() {
            Ok(parsed)
                if matches!(parsed.kind, Kind::Roster | Kind::Meeting)
                    && topic == self.site_topic(parsed.kind) =>
            {
                Ok(parsed)
            }
            Ok(topic) if topic.site == self.config.site && topic.device == self.config.device => {
                Ok(topic)
            }
            Ok(_) => Err("not a topic of this device".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        let understood = mine.and_then(|topic| match topic.kind {
            Kind::Ack => self.ack(payload),
            // A mark is about what is seen now: one that somebody left lying about is not.
            Kind::Mark if retained => Err("a mark must not be retained".into()),
            Kind::Mark => self.mark(topic.source, payload),
            Kind::Desired => self.wish(payload),
            Kind::Roster => self.roster(payload),
            Kind::Meeting => self.meeting(payload),
            _ => Err("nothing that is said to a device".into()),
        });
        if let Err(why) = understood {
            self.counters.refused.add(1);
            tracing::warn!(topic, "message refused: {why}");
        }
    }

    fn ack(&mut self, payload: &[u8]) -> Result<(), String> {
        let ack = Ack::decode(payload).map_err(|error| error.to_string())?;
        // Otherwise the outbox was made anew since: nothing to free.
        if ack.epoch == self.epoch {
            self.delivery.acknowledged(&ack);
            let stored = ack.stored();
            self.gaps.retain(|gap| !stored.covers(gap.from, gap.to));
            self.to_free = Some(stored);
        }
        Ok(())
    }

    fn site_topic(&self, kind: Kind) -> String {
        Topic::of_site(&self.config.site, kind).to_string()
    }

    /// Where the coordinator says that others are.
    fn meeting(&self, payload: &[u8]) -> Result<(), String> {
        match &self.rosters {
            Some(rosters) => rosters.meeting().heard(payload),
            None => Ok(()),
        }
    }

    /// Whom the coordinator names as the site's devices.
    fn roster(&self, payload: &[u8]) -> Result<(), String> {
        let Some(rosters) = &self.rosters else {
            return Ok(());
        };
        let text = std::str::from_utf8(payload).map_err(|error| error.to_string())?;
        let taken = rosters.offer(text);
        taken
            .map(|_| ())
            .map_err(|why| format!("the site's roster: {why}"))
    }

    /// The newest revision wins, in whatever order they come.
    fn wish(&self, payload: &[u8]) -> Result<(), String> {
        let wish = Desired::decode(payload).map_err(|error| error.to_string())?;
        self.desired.send_if_modified(|newest| {
            let newer = newest
                .as_ref()
                .is_none_or(|newest| newest.revision < wish.revision);
            if newer {
                *newest = Some(wish);
            }
            newer
        });
        Ok(())
    }

    fn mark(&self, source: Name, payload: &[u8]) -> Result<(), String> {
        let mark = Mark::decode(payload).map_err(|error| error.to_string())?;
        let marked = Marked {
            source: Some(source).filter(|source| *source != Name::itself()),
            reason: mark.mark,
        };
        self.marks
            .try_send(marked)
            .map_err(|_| "there are too many marks, or no samples are kept".into())
    }

    fn store_said(&mut self, said: Stored) {
        match said {
            Stored::Appended(readings) => {
                let (Some(first), Some(last)) = (readings.first(), readings.last()) else {
                    return;
                };
                self.delivery.appended(first.seq, last.seq);
                if self.up {
                    for Durable { seq, source, bytes } in readings {
                        self.live.insert(seq, (source, bytes));
                    }
                    let live = usize::try_from(Pace::default().live).unwrap_or(usize::MAX);
                    while self.live.len() > live {
                        self.live.pop_first();
                    }
                }
            }
            Stored::Batch { from, to, readings } => self.batch_read(from, to, readings),
            Stored::Unreadable => self.batch = Batch::None,
            Stored::Gaps(gaps) => {
                for gap in &gaps {
                    self.delivery.gone(gap.from, gap.to);
                }
                self.gaps = gaps;
                self.gaps_said_ms = None;
            }
        }
    }

    fn batch_read(&mut self, from: u64, to: u64, readings: Vec<(u64, Vec<u8>)>) {
        if !matches!(self.batch, Batch::Asked) {
            return;
        }
        let views: Vec<&[u8]> = readings.iter().map(|(_, bytes)| bytes.as_slice()).collect();
        let (payload, taken) = replay_bytes(&views);
        let Some(&(last, _)) = taken.checked_sub(1).and_then(|at| readings.get(at)) else {
            // Nothing of it is left; a gap or an acknowledgement came in between.
            self.delivery.gone(from, to);
            self.batch = Batch::None;
            return;
        };
        // What is missing inside the batch is not in the outbox any more.
        let mut expected = from;
        for (seq, _) in readings.iter().take(taken) {
            if *seq > expected {
                self.delivery.gone(expected, seq - 1);
            }
            expected = seq + 1;
        }
        self.batch = Batch::Ready {
            from,
            to: last,
            payload: payload.into(),
        };
    }

    fn due(&mut self) {
        self.delivery.tick(self.clock.now_ms());
        if self
            .gaps_said_ms
            .is_some_and(|at| self.clock.now_ms() >= at + SAY_GAPS_AGAIN_MS)
        {
            self.gaps_said_ms = None;
        }
    }

    /// Sends as much as there is room for, the most urgent first.
    fn pump(&mut self) {
        self.counters.backlog.set(self.delivery.waiting());
        if let Some(stored) = self.to_free.take()
            && let Err(error) = self.store.try_send(Command::Free(stored))
            && let tokio::sync::mpsc::error::TrySendError::Full(Command::Free(stored)) = error
        {
            self.to_free = Some(stored);
        }
        let Some(connection) = self.connection.take_if(|_| self.up) else {
            return;
        };
        if self.say_what_is_new(&connection) {
            self.deliver(&connection);
        }
        self.connection = Some(connection);
    }

    /// Asks for what it wants to hear, and says what the device is; false where there is no room just now.
    fn say_what_is_new(&mut self, connection: &Connection) -> bool {
        while let Some(topic) = self.to_ask.last() {
            if !connection.subscribe(topic) {
                break;
            }
            self.to_ask.pop();
        }
        while let Some((topic, payload, options)) = self.greetings.last() {
            if !connection.publish(topic, payload.clone(), *options) {
                return false;
            }
            self.greetings.pop();
        }
        if !self.say_reported(connection) {
            return false;
        }
        let said = &self.drifts_said;
        let news: Vec<_> = self
            .drifts
            .borrow_and_update()
            .iter()
            .filter(|(source, drift)| said.get(*source) != Some(*drift))
            .map(|(source, drift)| (source.clone(), drift.clone()))
            .collect();
        for (source, drift) in news {
            let topic = Topic {
                source: source.clone(),
                ..self.topic_of(Kind::Drift)
            };
            let payload = drift.encode().unwrap_or_default();
            let retained = PublishOptions::at_least_once().retained();
            if !connection.publish(&topic.to_string(), payload.into(), retained) {
                // With the next sign of life from the broker.
                break;
            }
            self.drifts_said.insert(source, drift);
        }
        true
    }

    fn deliver(&mut self, connection: &Connection) {
        if self.gaps_said_ms.is_none() {
            for gap in &self.gaps {
                if !connection.publish(
                    &self.topic(Kind::Gap),
                    self.gap(*gap),
                    PublishOptions::at_least_once(),
                ) {
                    return;
                }
            }
            self.gaps_said_ms = Some(self.clock.now_ms());
        }
        while let Some(next) = self.delivery.next() {
            match next {
                Send::Live(seq) => {
                    let Some((source, bytes)) = self.live.remove(&seq) else {
                        // Its bytes are no longer at hand: it goes with the backlog.
                        self.delivery.postpone(seq);
                        continue;
                    };
                    let topic = Topic {
                        source: source.clone(),
                        ..self.topic_of(Kind::Result)
                    }
                    .to_string();
                    if !connection.publish(&topic, bytes.clone(), PublishOptions::at_least_once()) {
                        self.live.insert(seq, (source, bytes));
                        return;
                    }
                    self.delivery.sent(next, self.clock.now_ms());
                    self.passage.sent();
                }
                Send::Replay { from, to } => {
                    match &self.batch {
                        Batch::Asked => return,
                        Batch::None => {
                            if self.store.try_send(Command::Read { from, to }).is_ok() {
                                self.batch = Batch::Asked;
                            }
                            return;
                        }
                        Batch::Ready { from: first, .. } if *first != from => {
                            self.batch = Batch::None
                        }
                        Batch::Ready {
                            to: last, payload, ..
                        } => {
                            let topic = self.topic(Kind::Replay);
                            if !connection.publish(
                                &topic,
                                payload.clone(),
                                PublishOptions::at_least_once(),
                            ) {
                                return;
                            }
                            // An acknowledgement may have shortened the range since it was read.
                            self.delivery.sent(
                                Send::Replay {
                                    from,
                                    to: to.min(*last),
                                },
                                self.clock.now_ms(),
                            );
                            self.passage.sent();
                            self.batch = Batch::None;
                        }
                    }
                }
            }
        }
    }

    fn topic_of(&self, kind: Kind) -> Topic {
        Topic::of_device(&self.config.site, &self.config.device, kind)
    }

    fn topic(&self, kind: Kind) -> String {
        self.topic_of(kind).to_string()
    }

    fn gap(&self, gap: GapRecord) -> Bytes {
        let GapRecord { from, to, reason } = gap;
        let gap = Gap {
            v: VERSION,
            device: self.config.device.clone(),
            epoch: self.epoch,
            from,
            to,
            reason,
        };
        gap.encode().unwrap_or_default().into()
    }

    fn board_state(&self) -> BoardState {
        match (&self.said.0, self.up) {
            (None, _) => BoardState::NoModel,
            (Some(_), true) => BoardState::Running,
            (Some(_), false) => BoardState::Offline,
        }
    }

    async fn say_goodbye(mut self) {
        let status = self.topic(Kind::Status);
        if let Some(connection) = self.connection.take().filter(|_| self.up) {
            let offline = Bytes::from_static(Status::Offline.as_str().as_bytes());
            let _ =
                connection.publish(&status, offline, PublishOptions::at_least_once().retained());
            connection.close(FAREWELL).await;
        }
    }
}

async fn news(connection: &mut Option<Connection>) -> News {
    match connection {
        Some(connection) => connection.news().await,
        None => std::future::pending().await,
    }
}

async fn at(instant: Option<tokio::time::Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

//! Drives the rollouts: who belongs to them, what devices report, what devices are told.
//!
//! All decisions are [`mesh_core::rollout::Rollout`]'s. Each step is written down before any device is told.

mod settings;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    Erase, Kind, Limits, Name, Release, Topic, Trial,
    rollout::{Command, Input, Outcome, Output, Plan, Rollout, Status, Why},
};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

use settings::Active;
pub(crate) use settings::{Push, SettingsError, SettingsView};

use super::{
    ReleaseError, Releases,
    store::{Changes, RolloutRow},
    wishes::Wishes,
};
use crate::{
    clock,
    ingest::Link,
    records::{RecordError, Records},
    registry::{Registry, Standing},
};

/// How soon a report has consequences.
const TICK: Duration = Duration::from_millis(500);
/// What is only known better, and has no consequences, is written down this often.
const SAVE_TICKS: u64 = 20;
/// Signatures are looked after this often; they live for days.
const RENEW_TICKS: u64 = 2 * 3_600;
/// Rollouts that are under way at the same time.
const MAX_UNDER_WAY: usize = 100;
/// Rollouts that count, one for each group and model: those that are done still bring the model to devices that come later.
const MAX_LIVE: usize = 1_000;

/// Why a rollout cannot be begun or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RolloutError {
    #[error("there is no rollout {0}")]
    Unknown(u64),
    #[error("there is no device {0}")]
    Device(String),
    #[error("plan: {0}")]
    Plan(#[from] mesh_core::rollout::PlanError),
    #[error("a newer rollout has taken the place of rollout {0}")]
    Ended(u64),
    #[error("{MAX_UNDER_WAY} rollouts are under way already: wait for one, or abort it")]
    Full,
    #[error(
        "{MAX_LIVE} groups have a rollout already: use the group of one of them, which is replaced"
    )]
    Groups,
    #[error(transparent)]
    Release(#[from] ReleaseError),
    #[error(transparent)]
    Records(#[from] RecordError),
}

/// Which devices. Those that run another model than the one that is rolled out do not belong to any group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Group {
    /// Only of this site.
    #[schema(value_type = Option<String>)]
    pub(crate) site: Option<Name>,
    /// Only on this board.
    pub(crate) board: Option<String>,
    /// Only with this tag.
    #[schema(value_type = Option<String>)]
    pub(crate) tag: Option<Name>,
}

impl Group {
    fn has(&self, device: &Standing, model: &str) -> bool {
        self.site.as_ref().is_none_or(|site| *site == device.site)
            && self
                .board
                .as_ref()
                .is_none_or(|board| device.board.as_ref() == Some(board))
            && self
                .tag
                .as_ref()
                .is_none_or(|tag| device.tags.split(',').any(|has| has == tag.as_str()))
            && device.model.as_deref() == Some(model)
    }
}

/// What a rollout was asked to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) group: Group,
    pub(crate) plan: Plan,
    pub(crate) limits: Limits,
    pub(crate) trial: Trial,
    /// Also to devices that have marked it as bad, or run a newer one.
    pub(crate) force: bool,
    pub(crate) author: String,
}

/// One rollout that counts.
#[derive(Debug)]
struct Live {
    id: u64,
    settings: Settings,
    rollout: Rollout,
    created_ms: i64,
    /// Newer than what is written down.
    dirty: bool,
    /// As the machine was last told: is it there, does it answer?
    known: HashMap<i64, bool>,
}

impl Live {
    /// Nothing if it cannot be read any more.
    fn of_row(row: &RolloutRow) -> Option<Self> {
        Some(Self {
            id: row.id.cast_unsigned(),
            settings: serde_json::from_str(&row.settings).ok()?,
            rollout: serde_json::from_str(&row.state).ok()?,
            created_ms: row.created_ms,
            dirty: false,
            known: HashMap::new(),
        })
    }

    fn is_under_way(&self) -> bool {
        matches!(self.rollout.status(), Status::Running | Status::Paused(_))
    }

    fn row(&self, ended: bool) -> RolloutRow {
        RolloutRow {
            id: self.id.cast_signed(),
            settings: serde_json::to_string(&self.settings).unwrap_or_default(),
            state: serde_json::to_string(&self.rollout).unwrap_or_default(),
            ended,
            created_ms: self.created_ms,
        }
    }
}

/// What is known, all of it written down or about to be.
#[derive(Debug, Default)]
struct State {
    live: BTreeMap<u64, Live>,
    wishes: Wishes,
    /// The settings that count, oldest first.
    settings: Vec<Active>,
    next: u64,
    /// Decided and not written down: the database could not. No device has heard of it.
    unsaved: Changes,
}

/// A rollout as it is shown.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Rollout)]
pub(crate) struct RolloutView {
    /// Its number.
    pub(crate) id: u64,
    /// `name@version`.
    pub(crate) model: String,
    /// SHA-256 of the release document.
    pub(crate) digest: String,
    /// Which devices.
    pub(crate) group: Group,
    /// `running`, `paused`, `done` or `aborted`.
    pub(crate) status: &'static str,
    /// A newer one has taken its place: it is as it stood then.
    pub(crate) ended: bool,
    /// Why it stands still, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) why: Option<String>,
    /// The stage, from 1.
    pub(crate) stage: usize,
    /// Percent of the devices in each stage.
    pub(crate) stages: Vec<f32>,
    /// Devices of the group.
    pub(crate) devices: usize,
    /// Devices that were told to run it.
    pub(crate) exposed: usize,
    /// Devices that run it for good.
    pub(crate) kept: usize,
    /// Devices on which it failed.
    pub(crate) failed: usize,
    /// Who asked for it.
    pub(crate) author: String,
    /// When it was begun, in milliseconds since the Unix epoch.
    pub(crate) created_ms: i64,
}

/// See the module.
pub(crate) struct Rollouts {
    state: Mutex<State>,
    releases: Arc<Releases>,
    records: Arc<Records>,
    registry: Arc<Registry>,
    link: Link,
}

impl Rollouts {
    /// Goes on where the last coordinator stopped.
    pub(crate) async fn open(
        releases: Arc<Releases>,
        records: Arc<Records>,
        registry: Arc<Registry>,
        link: Link,
    ) -> Result<Self, RecordError> {
        let mut state = State {
            wishes: Wishes::of_rows(records.wish_rows().await?),
            ..State::default()
        };
        for row in records.settings_rows().await? {
            match Active::of_row(&row) {
                Some(active) => state.settings.push(active),
                None => tracing::error!(
                    version = row.version,
                    "settings cannot be read any more and are left out"
                ),
            }
        }
        for row in records.rollout_rows().await? {
            let id = row.id.cast_unsigned();
            state.next = state.next.max(id);
            if row.ended {
                continue;
            }
            match Live::of_row(&row) {
                Some(live) => drop(state.live.insert(id, live)),
                None => tracing::error!(id, "a rollout cannot be read any more and is left out"),
            }
        }
        Ok(Self {
            state: Mutex::new(state),
            releases,
            records,
            registry,
            link,
        })
    }

    /// Begins a rollout of a model; the newest takes the place of others for the same group.
    pub(crate) async fn start(
        &self,
        model: &str,
        settings: Settings,
    ) -> Result<RolloutView, RolloutError> {
        settings.plan.check()?;
        let target = self.releases.publish(model, &settings.author).await?;
        let mut state = self.state.lock().await;
        let same = |live: &&Live| {
            live.settings.group == settings.group && live.rollout.target().name == target.name
        };
        let before = state.live.values().find(same).map(|live| live.id);
        let others = || state.live.values().filter(|live| Some(live.id) != before);
        if others().filter(|live| live.is_under_way()).count() >= MAX_UNDER_WAY {
            return Err(RolloutError::Full);
        }
        if others().count() >= MAX_LIVE {
            return Err(RolloutError::Groups);
        }
        state.next += 1;
        let id = state.next;
        let mut changes = Changes::default();
        let plan = settings.plan.clone();
        let what = format!("begun by {}: {target}", settings.author);
        let rollout = match before.and_then(|id| state.live.remove(&id)) {
            Some(old) => {
                changes.ended.push(old.row(true));
                changes.events.push((
                    old.id.cast_signed(),
                    format!("rollout {id} takes its place"),
                ));
                old.rollout.supersede(id, target, plan)
            }
            None => Rollout::new(id, target, plan),
        };
        changes.events.push((id.cast_signed(), what));
        let live = Live {
            id,
            settings,
            rollout,
            created_ms: clock::now_ms(),
            dirty: true,
            known: HashMap::new(),
        };
        state.live.insert(id, live);
        let outputs = self.gather(&mut state, false);
        self.carry_out(&mut state, changes, outputs).await?;
        let live = state.live.get(&id).ok_or(RolloutError::Unknown(id))?;
        Ok(view(live, false))
    }

    /// Does what an operator asks for.
    pub(crate) async fn command(
        &self,
        id: u64,
        command: Command,
        author: &str,
    ) -> Result<RolloutView, RolloutError> {
        let mut state = self.state.lock().await;
        let Some(live) = state.live.get_mut(&id) else {
            let known = (1..=state.next).contains(&id);
            return Err(if known {
                RolloutError::Ended(id)
            } else {
                RolloutError::Unknown(id)
            });
        };
        live.dirty = true;
        let outputs = live.rollout.step(Input::Command(command), now());
        let word = serde_json::to_value(command).unwrap_or_default();
        let what = format!("{} by {author}", word.as_str().unwrap_or("changed"));
        let changes = Changes {
            events: vec![(id.cast_signed(), what)],
            ..Changes::default()
        };
        self.carry_out(&mut state, changes, vec![(id, outputs)])
            .await?;
        let live = state.live.get(&id).ok_or(RolloutError::Unknown(id))?;
        Ok(view(live, false))
    }

    /// Makes one device run a model whatever rollouts say; without a model rollouts have it again.
    pub(crate) async fn pin(
        &self,
        site: &Name,
        device: &Name,
        model: Option<&str>,
        author: &str,
    ) -> Result<(), RolloutError> {
        let unknown = || RolloutError::Device(format!("{site}/{device}"));
        let standing = self.registry.standing(site, device).ok_or_else(unknown)?;
        let release = match model {
            Some(model) => Some(self.releases.publish(model, author).await?),
            None => None,
        };
        let mut state = self.state.lock().await;
        // Who names one device knows what it is for: a model that is pinned need not agree with the one that it replaces.
        let terms = (Limits::default(), Trial::NONE);
        let pinned = release.is_some();
        let release = release.or_else(|| state.wishes.release(standing.id).cloned());
        let row = state
            .wishes
            .wish(standing.id, release, terms, pinned, pinned);
        let changes = Changes {
            wishes: row.into_iter().map(|row| (row.device, row)).collect(),
            ..Changes::default()
        };
        let outputs = self.gather(&mut state, false);
        self.carry_out(&mut state, changes, outputs).await
    }

    /// Tells a device which samples it is to have no more; nothing takes that back. `heard` is the newest wish that the
    /// device has answered.
    pub(crate) async fn erase(
        &self,
        device: i64,
        erase: Vec<Erase>,
        heard: u64,
    ) -> Result<(), RolloutError> {
        let mut state = self.state.lock().await;
        let Some(row) = state.wishes.erase(device, erase, heard) else {
            return Ok(());
        };
        let changes = Changes {
            wishes: [(row.device, row)].into(),
            ..Changes::default()
        };
        self.carry_out(&mut state, changes, Vec::new()).await
    }

    /// The rollouts that count, newest first.
    pub(crate) async fn list(&self) -> Vec<RolloutView> {
        let state = self.state.lock().await;
        let newest = state.live.values().rev();
        newest.map(|live| view(live, false)).collect()
    }

    /// One rollout, and what happened to it.
    pub(crate) async fn get(
        &self,
        id: u64,
    ) -> Result<(RolloutView, Vec<(i64, String)>), RolloutError> {
        let live = {
            let state = self.state.lock().await;
            state.live.get(&id).map(|live| view(live, false))
        };
        let view = match live {
            Some(view) => view,
            None => {
                let row = self.records.rollout_row(id.cast_signed()).await?;
                let past = row.and_then(|row| Live::of_row(&row));
                view(&past.ok_or(RolloutError::Unknown(id))?, true)
            }
        };
        Ok((view, self.records.rollout_events(id.cast_signed()).await?))
    }

    /// Looks at the devices again and again, until `stop`.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut up = false;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for count in 0_u64.. {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            if count % RENEW_TICKS == RENEW_TICKS - 1
                && let Err(error) = self.releases.renew().await
            {
                tracing::warn!(%error, "the signatures of the models cannot be renewed");
            }
            let stands = self.link.stands();
            let again = stands && !up;
            up = stands;
            if let Err(error) = self.look(again, count % SAVE_TICKS == 0).await {
                tracing::warn!(%error, "a step of the rollouts cannot be recorded, trying again");
            }
        }
    }

    /// One look. `again`: the broker has forgotten everything. `save`: also what has no consequences.
    async fn look(&self, again: bool, save: bool) -> Result<(), RolloutError> {
        let mut state = self.state.lock().await;
        if again {
            self.say_all(&state).await;
        }
        self.follow_settings(&mut state);
        let outputs = self.gather(&mut state, save);
        let idle = outputs.iter().all(|(_, outputs)| outputs.is_empty());
        if idle && !save && state.unsaved.is_empty() {
            return Ok(());
        }
        self.carry_out(&mut state, Changes::default(), outputs)
            .await
    }

    /// Tells the rollouts who is there and what was reported. What follows, by rollout.
    /// `all`: also what was reported before, should a step have got lost.
    fn gather(&self, state: &mut State, all: bool) -> Vec<(u64, Vec<Output>)> {
        let now = now();
        let mut outputs = Vec::new();
        let devices = self.registry.standings();
        for device in &devices {
            let pinned = state.wishes.is_pinned(device.id);
            let revision = state.wishes.revision(device.id);
            let Ok(member) = member(device.id) else {
                continue;
            };
            // The newest rollout has the device.
            let mut free = !pinned;
            for (id, live) in state.live.iter_mut().rev() {
                let belongs = free && live.settings.group.has(device, &live.rollout.target().name);
                free &= !belongs;
                let known = live.known.get(&device.id).copied();
                let mut tell = |live: &mut Live, input| {
                    live.dirty = true;
                    outputs.push((*id, live.rollout.step(input, now)));
                };
                if !belongs {
                    if live.known.remove(&device.id).is_some()
                        || (known.is_none() && is_member(live, &member))
                    {
                        tell(live, Input::Left(member.clone()));
                    }
                    continue;
                }
                // A first report says what to go back to.
                if known != Some(device.online) || device.fresh {
                    live.known.insert(device.id, device.online);
                    let previous = device
                        .loaded()
                        .or_else(|| state.wishes.release(device.id).cloned());
                    let joined = Input::Joined {
                        device: member.clone(),
                        reachable: device.online,
                        previous,
                    };
                    tell(live, joined);
                }
                if let Some(reported) = device.reported.as_ref().filter(|_| device.fresh || all) {
                    let outcome = Outcome::of(reported, live.rollout.target(), revision);
                    if outcome != Outcome::Trying {
                        tell(live, Input::Report(member.clone(), outcome));
                    }
                }
            }
        }
        for (id, live) in &mut state.live {
            outputs.push((*id, live.rollout.step(Input::Tick, now)));
        }
        outputs
    }

    /// Writes down what changed, then tells the devices.
    async fn carry_out(
        &self,
        state: &mut State,
        mut changes: Changes,
        outputs: Vec<(u64, Vec<Output>)>,
    ) -> Result<(), RolloutError> {
        for (id, outputs) in outputs {
            let Some(live) = state.live.get_mut(&id) else {
                continue;
            };
            let (limits, trial) = (live.settings.limits, live.settings.trial);
            let target = live.rollout.target().clone();
            let force = live.settings.force;
            for output in outputs {
                match output {
                    Output::Set { device, release } => {
                        let Ok(device) = device.as_str().parse::<i64>() else {
                            continue;
                        };
                        if state.wishes.is_pinned(device) {
                            continue;
                        }
                        // The way back leads to something older, and what runs now is no measure for it.
                        let is_back = release.as_ref() != Some(&target);
                        let trial = if is_back { Trial::NONE } else { trial };
                        let terms = (limits, trial);
                        let force = force || is_back;
                        let row = state.wishes.wish(device, release, terms, force, false);
                        changes.wishes.extend(row.map(|row| (row.device, row)));
                    }
                    Output::Changed { status, stage } => {
                        let mut what = told(&status, stage, |device| self.registry.called(device));
                        if let Some(detail) = self.evidence(&status) {
                            what = format!("{what} ({detail})");
                        }
                        tracing::info!(rollout = id, model = %target, what, "rollout");
                        changes.events.push((id.cast_signed(), what));
                    }
                }
            }
        }
        state.unsaved.add(changes);
        let dirty = state.live.values().filter(|live| live.dirty);
        let rows: Vec<RolloutRow> = dirty.map(|live| live.row(false)).collect();
        if rows.is_empty() && state.unsaved.is_empty() {
            return Ok(());
        }
        self.records.save_delivery(&rows, &state.unsaved).await?;
        for live in state.live.values_mut() {
            live.dirty = false;
        }
        let saved = std::mem::take(&mut state.unsaved);
        for row in saved.wishes.into_values() {
            self.say(row.device, row.message.into_bytes()).await;
        }
        Ok(())
    }

    /// The numbers behind an abort, as the device on which it failed has said them.
    fn evidence(&self, status: &Status) -> Option<String> {
        let Status::Aborted(Why::Failed { device, reason }) = status else {
            return None;
        };
        let device: i64 = device.as_str().parse().ok()?;
        let stands = self.registry.stands();
        let reported = stands
            .iter()
            .find(|one| one.id == device)?
            .reported
            .as_ref()?;
        let newest = reported.bad.iter().rev().map(|bad| &bad.failure);
        let mut failures = reported.failure.iter().chain(newest);
        let failure = failures.find(|failure| failure.reason == *reason)?;
        (!failure.detail.is_empty()).then(|| failure.detail.clone())
    }

    async fn say_all(&self, state: &MutexGuard<'_, State>) {
        let unsaved = &state.unsaved.wishes;
        let saved = |(device, _): &(i64, _)| !unsaved.contains_key(device);
        for (device, desired) in state.wishes.all().filter(saved) {
            if let Ok(message) = desired.encode() {
                self.say(device, message).await;
            }
        }
    }

    /// What cannot be said now is said when the broker is back.
    async fn say(&self, device: i64, message: Vec<u8>) {
        if let Some((site, name)) = self.registry.names(device) {
            let topic = Topic::of_device(&site, &name, Kind::Desired);
            self.link.retain(&topic, message).await;
        }
    }
}

/// The clock of the rollouts; they bear its jumps.
fn now() -> u64 {
    clock::now_ms().max(0).cast_unsigned()
}

/// A device by the number that it has for ever; names may be given again at another site.
fn member(device: i64) -> Result<Name, mesh_core::NameError> {
    device.to_string().parse()
}

fn is_member(live: &Live, member: &Name) -> bool {
    live.rollout.setting(member).is_some()
}

fn told(status: &Status, stage: usize, called: impl Fn(i64) -> String) -> String {
    let why = |why: &Why| match why {
        Why::Operator => "somebody said so".to_owned(),
        Why::Timeout => "the stage took too long".to_owned(),
        Why::Failed { device, reason } => {
            let device = device
                .as_str()
                .parse()
                .map_or_else(|_| device.to_string(), &called);
            format!("it failed on {device}: {}", reason.as_str())
        }
    };
    match status {
        Status::Running => format!("stage {}", stage + 1),
        Status::Paused(reason) => format!("paused: {}", why(reason)),
        Status::Done => "done".to_owned(),
        Status::Aborted(reason) => format!("aborted: {}", why(reason)),
    }
}

fn view(live: &Live, ended: bool) -> RolloutView {
    let (rollout, count) = (&live.rollout, live.rollout.count());
    let status = rollout.status();
    let still = matches!(status, Status::Paused(_) | Status::Aborted(_));
    RolloutView {
        id: live.id,
        ended,
        model: rollout.target().to_string(),
        digest: rollout.target().digest.to_string(),
        group: live.settings.group.clone(),
        status: match status {
            Status::Running => "running",
            Status::Paused(_) => "paused",
            Status::Done => "done",
            Status::Aborted(_) => "aborted",
        },
        why: still.then(|| told(status, rollout.stage(), |id| format!("device {id}"))),
        stage: rollout.stage() + 1,
        stages: live
            .settings
            .plan
            .stages
            .iter()
            .map(|stage| stage.percent)
            .collect(),
        devices: count.devices,
        exposed: count.exposed,
        kept: count.kept,
        failed: count.failed,
        author: live.settings.author.clone(),
        created_ms: live.created_ms,
    }
}

impl Standing {
    /// What it runs, as far as it is a release.
    fn loaded(&self) -> Option<Release> {
        self.reported.as_ref()?.loaded.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_all_that_fits_everything_it_says() {
        let device = Standing {
            id: 1,
            site: "plant-3".parse().unwrap(),
            name: "d1".parse().unwrap(),
            online: true,
            board: Some("raspberry-pi-5".into()),
            tags: "line-3,night".into(),
            model: Some("steel".into()),
            reported: None,
            fresh: false,
        };
        let has = |json: &str| {
            let group: Group = serde_json::from_str(json).unwrap();
            group.has(&device, "steel")
        };
        for inside in [
            "{}",
            r#"{"site":"plant-3"}"#,
            r#"{"tag":"line-3"}"#,
            r#"{"site":"plant-3","board":"raspberry-pi-5","tag":"night"}"#,
        ] {
            assert!(has(inside), "{inside}");
        }
        for outside in [
            r#"{"site":"plant-4"}"#,
            r#"{"board":"raspberry-pi-4"}"#,
            r#"{"tag":"line"}"#,
            r#"{"site":"plant-3","tag":"line-4"}"#,
        ] {
            assert!(!has(outside), "{outside}");
        }
        assert!(!Group::default().has(&device, "conveyor"));
    }
}

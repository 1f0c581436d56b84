//! The devices as they last reported, in memory, for the page and the API.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use mesh_core::{
    Info, Metrics, ModelInfo, Name, Reading, Reported, State as Health, Status,
    drift::{Drift, Sign},
};
use serde::Serialize;

use crate::store::DeviceRow;

/// Seconds of history of a device's rate.
const HISTORY: usize = 60;
/// The rate that is shown is the mean of the last whole seconds.
const RATE_OVER: usize = 5;

/// Sources of one device whose drift is remembered: as many as an agent may have.
const MAX_DRIFTS: usize = 16;

/// One device.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) id: i64,
    pub(crate) site: Name,
    pub(crate) name: Name,
    pub(crate) first_seen_ms: i64,
    pub(crate) last_seen_ms: i64,
    pub(crate) status: Option<Status>,
    pub(crate) info: Option<Info>,
    pub(crate) model: Option<ModelInfo>,
    pub(crate) health: Option<Health>,
    /// Of the moment: not kept in the database.
    pub(crate) metrics: Option<Metrics>,
    /// What each source's frames have come to. Retained on the broker, so not kept in the database either.
    drifts: BTreeMap<Name, Drift>,
    /// What it says it is, in answer to what it should be; retained on the broker, too.
    reported: Option<Arc<Reported>>,
    /// It has said that since somebody last looked.
    fresh: bool,
    pub(crate) stored: u64,
    pub(crate) missing: u64,
    pub(crate) right: u64,
    pub(crate) wrong: u64,
    last: Option<Last>,
    rate: Rate,
    /// Something that the page shows has changed since the last look.
    changed: bool,
}

/// The last live result of a device.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
#[schema(as = LastResult)]
pub(crate) struct Last {
    /// The camera or sensor.
    source: String,
    /// The number of the frame.
    frame: u64,
    /// Captured, milliseconds since 1970 by the device's clock.
    ts: i64,
    /// The class.
    label: String,
    /// How sure the model is, 0 to 1.
    score: f32,
    /// The model, `name@version`.
    model: String,
    /// From frame to result, milliseconds.
    latency_ms: f32,
    /// The file that the frame came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    /// What the frame really shows, where the source knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    truth: Option<String>,
}

/// Readings per second over the last minute.
#[derive(Clone, Debug, Default)]
struct Rate {
    /// The second that the last entry counts.
    second: u64,
    counts: VecDeque<u32>,
}

impl Rate {
    fn advance(&mut self, second: u64) {
        let passed = second.saturating_sub(self.second);
        for _ in 0..passed.min(HISTORY as u64) {
            self.counts.push_back(0);
        }
        self.second = self.second.max(second);
        while self.counts.len() > HISTORY {
            self.counts.pop_front();
        }
    }

    fn add(&mut self, second: u64, readings: u32) {
        self.advance(second);
        match self.counts.back_mut() {
            Some(last) => *last = last.saturating_add(readings),
            None => self.counts.push_back(readings),
        }
    }

    /// The seconds that are over.
    fn whole(&self) -> impl Iterator<Item = u32> + '_ {
        let whole = self.counts.len().saturating_sub(1);
        self.counts.iter().take(whole).copied()
    }

    /// The mean of the last whole seconds.
    fn now(&self) -> f64 {
        let whole = self.counts.len().saturating_sub(1);
        let over = whole.min(RATE_OVER);
        if over == 0 {
            return 0.0;
        }
        let sum: u32 = self.counts.iter().skip(whole - over).take(over).sum();
        f64::from(sum) / over as f64
    }
}

/// A device as the API and the page show it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Device)]
pub(crate) struct View {
    /// The site.
    site: String,
    /// The device.
    device: String,
    /// `online`, `offline`, or nothing if it never said.
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'static str>,
    /// First heard of, milliseconds since 1970.
    first_seen_ms: i64,
    /// Last heard of, milliseconds since 1970.
    last_seen_ms: i64,
    /// The version of its agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<String>,
    /// Its board.
    #[serde(skip_serializing_if = "Option::is_none")]
    board: Option<String>,
    /// Its processor's architecture.
    #[serde(skip_serializing_if = "Option::is_none")]
    arch: Option<String>,
    /// What people sort their devices by, separated by commas.
    #[serde(skip_serializing_if = "Option::is_none")]
    tags: Option<String>,
    /// Its cameras and sensors, separated by commas.
    #[serde(skip_serializing_if = "Option::is_none")]
    sources: Option<String>,
    /// The life of its outbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<u64>,
    /// The model that it has loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<ModelView>,
    /// Its last live result.
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<Last>,
    /// Readings stored per second, over the last five.
    rate: f64,
    /// Readings stored in each of the last seconds, the newest last.
    history: Vec<u32>,
    /// `ok`, `no_model` or `no_source`, as it last said.
    #[serde(skip_serializing_if = "Option::is_none")]
    health: Option<String>,
    /// What is wrong, in the device's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    /// Readings that wait on the device, as it last said.
    #[serde(skip_serializing_if = "Option::is_none")]
    backlog: Option<u64>,
    /// Resident memory of the agent in bytes, as it last said.
    #[serde(skip_serializing_if = "Option::is_none")]
    rss_bytes: Option<u64>,
    /// Bytes fetched for models since the agent started.
    #[serde(skip_serializing_if = "Option::is_none")]
    update_bytes: Option<u64>,
    /// What each source's frames have come to, as far as the device said.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    drift: Vec<DriftView>,
    /// What it says about the model and the settings that it should have: how far it is, what failed and why, what the
    /// trial showed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    update: Option<Reported>,
    /// Readings ever stored.
    stored: u64,
    /// Readings ever reported as dropped.
    missing: u64,
    /// Readings whose label was the truth.
    right: u64,
    /// Readings whose label was not.
    wrong: u64,
}

impl View {
    /// The site.
    pub(crate) fn site(&self) -> &str {
        &self.site
    }

    /// Where the next page begins.
    pub(crate) fn cursor(&self) -> String {
        format!("{}/{}", self.site, self.device)
    }
}

/// What a source sees, compared with what the model's training saw and with what it used to see.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
#[schema(as = SourceDrift)]
pub(crate) struct DriftView {
    /// The camera or sensor.
    source: String,
    /// `ok` or `drift`.
    state: String,
    /// What is wrong, separated by commas: unknown, scores, embedding, novelty, dark, bright, blurred, blocked,
    /// frozen.
    names: String,
    /// Said, milliseconds since 1970 by the device's clock.
    ts: i64,
    /// The model that looked, `name@version`.
    model: String,
    /// Frames that it is about.
    frames: u32,
    /// Share of unknown results, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    unknown: Option<f32>,
    /// Population stability index of the top scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    scores: Option<f32>,
    /// Shift of the mean embedding in training's standard deviations.
    #[serde(skip_serializing_if = "Option::is_none")]
    shift: Option<f32>,
    /// The same in units of what chance shows.
    #[serde(skip_serializing_if = "Option::is_none")]
    shift_chance: Option<f32>,
    /// Median novelty.
    #[serde(skip_serializing_if = "Option::is_none")]
    novelty: Option<f32>,
    /// Mean brightness, 0 to 1.
    brightness: f32,
    /// Mean contrast, 0 to 1.
    contrast: f32,
    /// Detail over what is usual for the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<f32>,
    /// Share of frames that equal the one before, 0 to 1.
    still: f32,
}

impl From<&Drift> for DriftView {
    fn from(drift: &Drift) -> Self {
        Self {
            source: drift.source.as_str().to_owned(),
            state: drift.state.clone(),
            names: drift.names.clone(),
            ts: drift.ts,
            model: drift.model.clone(),
            frames: drift.frames,
            unknown: drift.unknown,
            scores: drift.scores,
            shift: drift.shift,
            shift_chance: drift.shift_chance,
            novelty: drift.novelty,
            brightness: drift.brightness,
            contrast: drift.contrast,
            detail: drift.detail,
            still: drift.still,
        }
    }
}

/// A model as a device reports it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, utoipa::ToSchema)]
#[schema(as = LoadedModel)]
pub(crate) struct ModelView {
    /// The bundle's name.
    pub(crate) name: String,
    /// The bundle's version.
    pub(crate) version: String,
    /// SHA-256 of the model in the device's memory.
    pub(crate) sha256: String,
    /// `classify` or `embed`.
    pub(crate) task: String,
    /// The labels, separated by commas.
    pub(crate) labels: String,
}

impl From<&ModelInfo> for ModelView {
    fn from(model: &ModelInfo) -> Self {
        Self {
            name: model.name.clone(),
            version: model.version.clone(),
            sha256: model.sha256.clone(),
            task: model.task.clone(),
            labels: model.labels.clone(),
        }
    }
}

/// What a commit changed about one device.
#[derive(Debug, Default)]
pub(crate) struct Change<'a> {
    pub(crate) stored: u32,
    pub(crate) missing: u64,
    pub(crate) right: u64,
    pub(crate) wrong: u64,
    pub(crate) live: Option<&'a Reading>,
}

impl Device {
    fn new(id: i64, site: Name, name: Name, now_ms: i64) -> Self {
        Self {
            id,
            site,
            name,
            first_seen_ms: now_ms,
            last_seen_ms: now_ms,
            status: None,
            info: None,
            model: None,
            health: None,
            metrics: None,
            drifts: BTreeMap::new(),
            reported: None,
            fresh: false,
            stored: 0,
            missing: 0,
            right: 0,
            wrong: 0,
            last: None,
            rate: Rate::default(),
            changed: true,
        }
    }

    /// As the database keeps it.
    pub(crate) fn row(&self) -> DeviceRow {
        fn json<T: Serialize>(value: Option<&T>) -> Option<String> {
            value.and_then(|v| serde_json::to_string(v).ok())
        }
        DeviceRow {
            id: self.id,
            site: self.site.as_str().to_owned(),
            device: self.name.as_str().to_owned(),
            first_seen_ms: self.first_seen_ms,
            last_seen_ms: self.last_seen_ms,
            status: self.status.map(|s| s.as_str().to_owned()),
            info: json(self.info.as_ref()),
            model: json(self.model.as_ref()),
            state: json(self.health.as_ref()),
            stored: self.stored.cast_signed(),
            missing: self.missing.cast_signed(),
            right_count: self.right.cast_signed(),
            wrong_count: self.wrong.cast_signed(),
        }
    }

    fn of_row(row: DeviceRow) -> Option<Self> {
        fn json<T: serde::de::DeserializeOwned>(text: Option<String>) -> Option<T> {
            text.and_then(|t| serde_json::from_str(&t).ok())
        }
        let (site, name) = (row.site.parse().ok()?, row.device.parse().ok()?);
        Some(Self {
            first_seen_ms: row.first_seen_ms,
            last_seen_ms: row.last_seen_ms,
            status: row.status.and_then(|s| Status::decode(s.as_bytes())),
            info: json(row.info),
            model: json(row.model),
            health: json(row.state),
            stored: row.stored.cast_unsigned(),
            missing: row.missing.cast_unsigned(),
            right: row.right_count.cast_unsigned(),
            wrong: row.wrong_count.cast_unsigned(),
            ..Self::new(row.id, site, name, row.first_seen_ms)
        })
    }

    /// Takes in what was found about a source; false if there are too many sources.
    pub(crate) fn drifted(&mut self, drift: Drift) -> bool {
        let fits = self.drifts.len() < MAX_DRIFTS || self.drifts.contains_key(&drift.source);
        if fits {
            self.drifts.insert(drift.source.clone(), drift);
            self.changed = true;
        }
        fits
    }

    /// Takes in how far it is with what it should be.
    pub(crate) fn told(&mut self, reported: Reported) {
        self.reported = Some(Arc::new(reported));
        self.fresh = true;
        self.changed = true;
    }

    fn standing(&self) -> Standing {
        Standing {
            id: self.id,
            site: self.site.clone(),
            name: self.name.clone(),
            online: self.status == Some(Status::Online),
            board: self.info.as_ref().map(|info| info.board.clone()),
            tags: self.info.as_ref().map_or(String::new(), |i| i.tags.clone()),
            model: match (&self.model, &self.reported) {
                (Some(model), _) => Some(model.name.clone()),
                // It has none in memory now, and is on its way to one.
                (None, Some(reported)) => reported.target.as_ref().map(|r| r.name.clone()),
                (None, None) => None,
            },
            reported: self.reported.clone(),
            fresh: self.fresh,
        }
    }

    fn view(&mut self, second: u64) -> View {
        self.rate.advance(second);
        View {
            site: self.site.as_str().to_owned(),
            device: self.name.as_str().to_owned(),
            status: self.status.map(Status::as_str),
            first_seen_ms: self.first_seen_ms,
            last_seen_ms: self.last_seen_ms,
            agent: self.info.as_ref().map(|i| i.agent.clone()),
            board: self.info.as_ref().map(|i| i.board.clone()),
            arch: self.info.as_ref().map(|i| i.arch.clone()),
            tags: self
                .info
                .as_ref()
                .map(|i| i.tags.clone())
                .filter(|tags| !tags.is_empty()),
            sources: self.info.as_ref().map(|i| i.sources.clone()),
            epoch: self.info.as_ref().map(|i| i.epoch),
            model: self.model.as_ref().map(ModelView::from),
            last: self.last.clone(),
            rate: self.rate.now(),
            history: self.rate.whole().collect(),
            health: self.health.as_ref().map(|h| h.health.clone()),
            detail: self
                .health
                .as_ref()
                .map(|h| h.detail.clone())
                .filter(|d| !d.is_empty()),
            backlog: self.metrics.as_ref().map(|m| m.backlog),
            rss_bytes: self.metrics.as_ref().map(|m| m.rss_bytes),
            update_bytes: self.metrics.as_ref().map(|m| m.update_bytes),
            drift: self.drifts.values().map(DriftView::from).collect(),
            update: self.reported.as_deref().cloned(),
            stored: self.stored,
            missing: self.missing,
            right: self.right,
            wrong: self.wrong,
        }
    }
}

/// What rollouts need to know about a device.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    pub(crate) id: i64,
    pub(crate) site: Name,
    pub(crate) name: Name,
    pub(crate) online: bool,
    pub(crate) board: Option<String>,
    /// What people sort it by, separated by commas.
    pub(crate) tags: String,
    /// The name of the model that it runs, or that it is to run if it has none.
    pub(crate) model: Option<String>,
    pub(crate) reported: Option<Arc<Reported>>,
    /// It has reported since the last look at all devices.
    pub(crate) fresh: bool,
}

#[derive(Debug, Default)]
struct State {
    devices: HashMap<(Name, Name), Device>,
    by_id: HashMap<i64, (Name, Name)>,
    last_id: i64,
}

/// Every device that was ever heard of, up to a bound.
#[derive(Debug)]
pub(crate) struct Registry {
    state: Mutex<State>,
    max: usize,
}

impl Registry {
    /// Starts with what the database knows.
    pub(crate) fn new(rows: Vec<DeviceRow>, max: usize) -> Self {
        let mut state = State::default();
        for row in rows {
            state.last_id = state.last_id.max(row.id);
            if let Some(device) = Device::of_row(row) {
                let key = (device.site.clone(), device.name.clone());
                state.by_id.insert(device.id, key.clone());
                state.devices.insert(key, device);
            }
        }
        Self {
            state: Mutex::new(state),
            max,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The device of a topic, new or known; `None` if there are too many. Notes that it was heard of.
    pub(crate) fn heard(&self, site: &Name, name: &Name, now_ms: i64) -> Option<i64> {
        let mut state = self.state();
        let key = (site.clone(), name.clone());
        if let Some(device) = state.devices.get_mut(&key) {
            device.last_seen_ms = now_ms;
            device.changed = true;
            return Some(device.id);
        }
        if state.devices.len() >= self.max {
            return None;
        }
        state.last_id += 1;
        let id = state.last_id;
        let device = Device::new(id, site.clone(), name.clone(), now_ms);
        state.by_id.insert(id, key.clone());
        state.devices.insert(key, device);
        Some(id)
    }

    /// Changes what a device reported; false if it said nothing new.
    pub(crate) fn update(&self, id: i64, change: impl FnOnce(&mut Device) -> bool) -> bool {
        let mut state = self.state();
        let State { devices, by_id, .. } = &mut *state;
        by_id
            .get(&id)
            .and_then(|key| devices.get_mut(key))
            .is_some_and(change)
    }

    /// What a device would be after this change, for the commit.
    pub(crate) fn row_after(&self, id: i64, change: &Change<'_>) -> Option<DeviceRow> {
        let state = self.state();
        let device = state
            .by_id
            .get(&id)
            .and_then(|key| state.devices.get(key))?;
        let mut row = device.row();
        row.stored += i64::from(change.stored);
        row.missing += change.missing.cast_signed();
        row.right_count += change.right.cast_signed();
        row.wrong_count += change.wrong.cast_signed();
        Some(row)
    }

    /// The commit is done.
    pub(crate) fn committed(&self, id: i64, change: &Change<'_>, second: u64) {
        self.update(id, |device| {
            device.stored += u64::from(change.stored);
            device.missing += change.missing;
            device.right += change.right;
            device.wrong += change.wrong;
            device.rate.add(second, change.stored);
            if let Some(reading) = change.live {
                device.last = Some(Last {
                    source: reading.source.as_str().to_owned(),
                    frame: reading.frame,
                    ts: reading.ts,
                    label: reading.label.clone(),
                    score: reading.score,
                    model: reading.model.clone(),
                    latency_ms: reading.latency_ms,
                    file: reading.file.clone(),
                    truth: reading.truth.clone(),
                });
            }
            device.changed = true;
            true
        });
    }

    /// Site and device of an id.
    pub(crate) fn names(&self, id: i64) -> Option<(Name, Name)> {
        self.state().by_id.get(&id).cloned()
    }

    /// One device.
    pub(crate) fn view(&self, site: &Name, name: &Name, second: u64) -> Option<View> {
        let mut state = self.state();
        let key = (site.clone(), name.clone());
        state.devices.get_mut(&key).map(|d| d.view(second))
    }

    /// Name and site of the only device of this name, at this site if one is given; else how many there are.
    pub(crate) fn only(&self, name: &str, site: Option<&str>) -> Result<(Name, Name), usize> {
        let state = self.state();
        let fits =
            |(s, d): &&(Name, Name)| d.as_str() == name && site.is_none_or(|t| t == s.as_str());
        let mut found = state.devices.keys().filter(fits);
        match (found.next(), found.count()) {
            (Some((site, device)), 0) => Ok((device.clone(), site.clone())),
            (None, _) => Err(0),
            (Some(_), more) => Err(1 + more),
        }
    }

    /// Devices in order of their names: the page after `after`.
    pub(crate) fn views(
        &self,
        after: Option<&(Name, Name)>,
        limit: usize,
        second: u64,
        wanted: impl Fn(&Device) -> bool,
    ) -> Vec<View> {
        let mut state = self.state();
        let mut keys: Vec<_> = state
            .devices
            .iter()
            .filter(|(key, device)| after.is_none_or(|a| *key > a) && wanted(device))
            .map(|(key, _)| key.clone())
            .collect();
        keys.sort();
        keys.truncate(limit);
        keys.iter()
            .filter_map(|key| state.devices.get_mut(key).map(|d| d.view(second)))
            .collect()
    }

    /// Devices that changed since the last call, at most `limit`. Also those whose rate still falls.
    pub(crate) fn changed(&self, limit: usize, second: u64) -> Vec<View> {
        let mut state = self.state();
        state
            .devices
            .values_mut()
            .filter(|d| d.changed || d.rate.counts.iter().any(|n| *n > 0))
            .take(limit)
            .map(|device| {
                device.changed = false;
                device.view(second)
            })
            .collect()
    }

    /// Devices altogether, and those that are online.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.state();
        let online = |d: &&Device| d.status == Some(Status::Online);
        (
            state.devices.len(),
            state.devices.values().filter(online).count(),
        )
    }

    /// The devices that are online and have a mesh: site, name and where neighbours reach it.
    pub(crate) fn meet(&self) -> Vec<(Name, Name, String)> {
        let state = self.state();
        let online = state
            .devices
            .values()
            .filter(|device| device.status == Some(Status::Online));
        let reached = online.filter_map(|device| {
            let mesh = &device.info.as_ref()?.mesh;
            (!mesh.is_empty()).then(|| (device.site.clone(), device.name.clone(), mesh.clone()))
        });
        reached.collect()
    }

    /// How many sources show each sign of drift now, in the order of [`Sign::ALL`].
    pub(crate) fn drifting(&self) -> [(Sign, usize); Sign::ALL.len()] {
        let state = self.state();
        let mut counts = Sign::ALL.map(|sign| (sign, 0));
        let signs = state
            .devices
            .values()
            .flat_map(|device| device.drifts.values())
            .flat_map(Drift::signs);
        for sign in signs {
            if let Some((_, count)) = counts.iter_mut().find(|(s, _)| *s == sign) {
                *count += 1;
            }
        }
        counts
    }

    /// The tasks whose models see drift somewhere now.
    pub(crate) fn drifting_tasks(&self) -> BTreeSet<String> {
        let state = self.state();
        let drifts = state
            .devices
            .values()
            .flat_map(|device| device.drifts.values());
        drifts
            .filter(|drift| !drift.names.is_empty())
            .filter_map(|drift| Some(drift.model.split_once('@')?.0.to_owned()))
            .collect()
    }

    /// Every device as rollouts need it; what was reported is not fresh any more then.
    pub(crate) fn standings(&self) -> Vec<Standing> {
        let look = |device: &mut Device| {
            let standing = device.standing();
            device.fresh = false;
            standing
        };
        self.state().devices.values_mut().map(look).collect()
    }

    /// The same, and what was reported stays fresh.
    pub(crate) fn stands(&self) -> Vec<Standing> {
        self.state()
            .devices
            .values()
            .map(Device::standing)
            .collect()
    }

    /// The same of one device, which stays fresh.
    pub(crate) fn standing(&self, site: &Name, device: &Name) -> Option<Standing> {
        let state = self.state();
        let key = (site.clone(), device.clone());
        state.devices.get(&key).map(Device::standing)
    }

    /// A device's name for people.
    pub(crate) fn called(&self, id: i64) -> String {
        match self.names(id) {
            Some((site, device)) => format!("{site}/{device}"),
            None => format!("device {id}"),
        }
    }

    /// The models that devices have loaded, and on how many devices each.
    pub(crate) fn models(&self) -> Vec<(ModelView, usize)> {
        let state = self.state();
        let mut models: HashMap<ModelView, usize> = HashMap::new();
        for model in state.devices.values().filter_map(|d| d.model.as_ref()) {
            *models.entry(ModelView::from(model)).or_default() += 1;
        }
        let mut models: Vec<_> = models.into_iter().collect();
        models.sort_by(|(a, _), (b, _)| {
            (&a.name, &a.version, &a.sha256).cmp(&(&b.name, &b.version, &b.sha256))
        });
        models
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_the_mean_of_whole_seconds_and_falls() {
        let mut rate = Rate::default();
        for second in 0..10 {
            rate.add(second, 7);
        }
        assert!((rate.now() - 7.0).abs() < 1e-9);
        rate.advance(13);
        assert!(rate.now() < 7.0);
        rate.advance(10_000);
        assert!(rate.now() == 0.0 && rate.counts.len() == HISTORY);
    }

    #[test]
    fn devices_are_bounded_and_survive_the_database() {
        let registry = Registry::new(Vec::new(), 1);
        let (site, d1, d2): (Name, Name, Name) = (
            "s".parse().unwrap(),
            "d1".parse().unwrap(),
            "d2".parse().unwrap(),
        );
        let id = registry.heard(&site, &d1, 5).unwrap();
        assert_eq!(registry.heard(&site, &d1, 6), Some(id));
        assert_eq!(registry.heard(&site, &d2, 6), None);
        registry.update(id, |d| {
            d.status = Some(Status::Online);
            true
        });
        registry.committed(
            id,
            &Change {
                stored: 3,
                ..Change::default()
            },
            0,
        );
        let row = registry
            .row_after(
                id,
                &Change {
                    missing: 2,
                    ..Change::default()
                },
            )
            .unwrap();
        assert_eq!((row.stored, row.missing), (3, 2));
        let again = Registry::new(vec![row], 9);
        assert_eq!(again.counts(), (1, 1));
        assert_eq!(again.heard(&site, &d2, 7), Some(id + 1));
        assert_eq!(again.view(&site, &d1, 0).unwrap().stored, 3);
    }

    #[test]
    fn drift_is_shown_counted_and_bounded() {
        let registry = Registry::new(Vec::new(), 9);
        let (site, name): (Name, Name) = ("s".parse().unwrap(), "d1".parse().unwrap());
        let id = registry.heard(&site, &name, 5).unwrap();
        let say = |source: String, names: &str| {
            let state = if names.is_empty() { "ok" } else { "drift" };
            let text = format!(
                r#"{{"v":1,"device":"d1","source":"{source}","ts":1,"model":"m@1","frames":500,"state":"{state}",
                "names":"{names}","brightness":0.5,"contrast":0.1,"still":0.0}}"#
            );
            let drift = Drift::decode(text.as_bytes(), &name, &source.parse().unwrap()).unwrap();
            registry.update(id, |d| d.drifted(drift))
        };
        assert!(say("cam0".into(), "dark,frozen") && say("cam1".into(), "dark"));
        let count = |sign| {
            registry
                .drifting()
                .iter()
                .find(|(s, _)| *s == sign)
                .unwrap()
                .1
        };
        assert_eq!(
            (count(Sign::Dark), count(Sign::Frozen), count(Sign::Novelty)),
            (2, 1, 0)
        );
        assert!(say("cam0".into(), ""));
        assert_eq!((count(Sign::Dark), count(Sign::Frozen)), (1, 0));
        let shown = registry.view(&site, &name, 0).unwrap();
        assert_eq!(
            (shown.drift.len(), shown.drift[1].names.as_str()),
            (2, "dark")
        );
        for n in 2..16 {
            assert!(say(format!("cam{n}"), ""));
        }
        assert!(!say("cam16".into(), ""));
    }
}

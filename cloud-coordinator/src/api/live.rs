//! What happens now, to everyone who watches: bounded, so that who is slow misses events and is told.

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use axum::{
    extract::State as Shared,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{Stream, StreamExt, stream};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};
use tokio_stream::wrappers::{BroadcastStream, errors::BroadcastStreamRecvError};

use super::{Params, State, gate::Caller, held::Endless, limits::network, problem::Problem};
use crate::{
    crowd::{Crowd, Place, share_of_one_address},
    metrics::Metrics,
    registry::{Device, Registry, View},
    store::{NewReading, ReadingRow},
    trust::Trust,
};

/// Readings that a slow client may be behind: some seconds of a small fleet.
const BEHIND: usize = 1_024;
/// Devices in one event.
pub(super) const DEVICES: usize = 1_000;
/// Clients that watch at a time; each holds a connection.
const WATCHERS: usize = 256;
/// Of those, of one person, program or address: some screens each, and nobody shuts others out.
const WATCHERS_OF_ONE: usize = 32;
/// A comment is sent after this silence, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How often it is looked whether who watches still may: a stream has no end of its own.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// One event, serialised once for everyone.
#[derive(Clone, Debug)]
enum Happening {
    Reading {
        site: Arc<str>,
        device: Arc<str>,
        json: Arc<str>,
    },
    Devices {
        views: Arc<[View]>,
        json: Arc<str>,
    },
}

/// The way to everyone who watches.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    readings: broadcast::Sender<Happening>,
    devices: broadcast::Sender<Happening>,
    watchers: Arc<Semaphore>,
    principals: Arc<Crowd<String>>,
    addresses: Arc<Crowd<IpAddr>>,
    metrics: Arc<Metrics>,
}

impl Live {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            readings: broadcast::Sender::new(BEHIND),
            devices: broadcast::Sender::new(BEHIND),
            watchers: Arc::new(Semaphore::new(WATCHERS)),
            principals: Crowd::new(WATCHERS_OF_ONE),
            addresses: Crowd::new(share_of_one_address(WATCHERS)),
            metrics,
        }
    }

    /// A place among those who watch.
    fn enter(&self, caller: &Caller) -> Result<Watching, Problem> {
        let too_many = |detail: String| Problem::new(503, "Too many watchers", detail);
        let principal = caller.principal().map(ToString::to_string);
        let principal = self
            .principals
            .enter(principal.unwrap_or_default())
            .ok_or_else(|| too_many(format!("you watch {WATCHERS_OF_ONE} times already")))?;
        let address = self
            .addresses
            .enter(network(caller.address))
            .ok_or_else(|| too_many("too many watch from this address".to_owned()))?;
        let place = self.watchers.clone().try_acquire_owned();
        let place = place.map_err(|_| too_many(format!("{WATCHERS} clients watch already")))?;
        Ok(Watching {
            _place: place,
            _principal: principal,
            _address: address,
        })
    }

    /// Tells of readings that were stored; those from a backlog are not live.
    pub(crate) fn readings(&self, registry: &Registry, readings: &[NewReading]) {
        if self.readings.receiver_count() == 0 {
            return;
        }
        for new in readings.iter().filter(|r| !r.replayed) {
            let Some((site, device)) = registry.names(new.device) else {
                continue;
            };
            let row = row(new, site.as_str(), device.as_str());
            if let Ok(json) = serde_json::to_string(&row) {
                // Fails if nobody watches any more, which is fine.
                let _ = self.readings.send(Happening::Reading {
                    site: row.site.into(),
                    device: row.device.into(),
                    json: json.into(),
                });
            }
        }
    }

    /// Tells of devices that changed.
    pub(crate) fn devices(&self, registry: &Registry, second: u64) {
        if self.devices.receiver_count() == 0 {
            return;
        }
        let changed = registry.changed(DEVICES, second);
        if changed.is_empty() {
            return;
        }
        if let Ok(json) = serde_json::to_string(&changed) {
            let views = changed.into();
            let json = json.into();
            let _ = self.devices.send(Happening::Devices { views, json });
        }
    }
}

/// Given back when the stream ends.
#[derive(Debug)]
struct Watching {
    _place: OwnedSemaphorePermit,
    _principal: Place<String>,
    _address: Place<IpAddr>,
}

fn row(new: &NewReading, site: &str, device: &str) -> ReadingRow {
    let r = &new.reading;
    ReadingRow {
        id: new.id,
        site: site.to_owned(),
        device: device.to_owned(),
        source: r.source.as_str().to_owned(),
        epoch: r.epoch.cast_signed(),
        seq: r.seq.cast_signed(),
        ts: r.ts,
        received_ms: new.received_ms,
        frame: r.frame.cast_signed(),
        label: r.label.clone(),
        score: f64::from(r.score),
        margin: f64::from(r.margin),
        model: r.model.clone(),
        latency_ms: f64::from(r.latency_ms),
        by: r.by.as_ref().map(ToString::to_string),
        file: r.file.clone(),
        truth: r.truth.clone(),
        replayed: new.replayed,
    }
}

/// What a watcher wants.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct Watch {
    /// `readings` (the default): one event per live reading. `devices`: once a second those that changed.
    what: What,
    /// Only of this site.
    site: Option<String>,
    /// Only readings of devices of this name.
    device: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
enum What {
    #[default]
    Readings,
    Devices,
}

/// What happens now, as server-sent events.
///
/// Events: `reading` (a reading), `devices` (an array of devices), `lagged` (how many events were missed
/// because the client was too slow).
#[utoipa::path(
    get,
    path = "/api/v1/live",
    params(Watch),
    responses(
        (status = 200, description = "A stream of events", content_type = "text/event-stream", body = String),
        (status = 400, description = "A parameter is wrong", content_type = "application/problem+json", body = Problem),
        (status = 503, description = "Too many watch already", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn live(
    Shared(state): Shared<State>,
    caller: Caller,
    Params(mut watch): Params<Watch>,
) -> Result<Response, Problem> {
    watch.site = caller.narrowed(watch.site)?;
    let live = &state.live;
    let place = live.enter(&caller)?;
    // Subscribe first, so that nothing falls between the first picture and the changes.
    let (receiver, first) = match watch.what {
        What::Readings => (live.readings.subscribe(), None),
        What::Devices => {
            let receiver = live.devices.subscribe();
            let second = state.started.elapsed().as_secs();
            let site = watch.site.as_deref();
            let wanted = |d: &Device| site.is_none_or(|site| site == d.site.as_str());
            let all = state.registry.views(None, DEVICES, second, wanted);
            let json = serde_json::to_string(&all).unwrap_or_else(|_| "[]".to_owned());
            (receiver, Some(Event::default().event("devices").data(json)))
        }
    };
    let events = stream::iter(first).chain(changes(receiver, watch, live.metrics.clone(), place));
    let stop = state.stop.clone().cancelled_owned();
    let grant = caller.who.map(|who| who.grant).unwrap_or_default();
    let over = revoked(state.trust, grant);
    let events = events
        .take_until(stop)
        .take_until(over)
        .map(Ok::<_, Infallible>);
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    response.extensions_mut().insert(Endless);
    Ok(response)
}

/// Returns when what was shown does not count any more.
async fn revoked(trust: Trust, grant: String) {
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        if !trust.counts(&grant).await {
            return;
        }
    }
}

fn changes(
    receiver: broadcast::Receiver<Happening>,
    watch: Watch,
    metrics: Arc<Metrics>,
    place: Watching,
) -> impl Stream<Item = Event> {
    BroadcastStream::new(receiver).filter_map(move |happening| {
        // The place is given back when the stream ends.
        let _place = &place;
        let wanted = |want: &Option<String>, is: &str| want.as_ref().is_none_or(|w| w == is);
        std::future::ready(match happening {
            Ok(Happening::Reading { site, device, json }) => {
                let both = wanted(&watch.site, &site) && wanted(&watch.device, &device);
                both.then(|| Event::default().event("reading").data(&*json))
            }
            Ok(Happening::Devices { views, json }) => match &watch.site {
                None => Some(Event::default().event("devices").data(&*json)),
                Some(site) => {
                    let own: Vec<_> = views.iter().filter(|view| view.site() == site).collect();
                    let some = !own.is_empty();
                    let json = some.then(|| serde_json::to_string(&own).ok()).flatten();
                    json.map(|json| Event::default().event("devices").data(json))
                }
            },
            Err(BroadcastStreamRecvError::Lagged(missed)) => {
                metrics.live_missed.inc_by(missed);
                let json = format!("{{\"missed\":{missed}}}");
                Some(Event::default().event("lagged").data(json))
            }
        })
    })
}

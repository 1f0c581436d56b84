//! Frames that neighbours, or the coordinator, look at for this device, and those of neighbours that this device looks at.
//!
//! ```text
//!  pipeline ── handoff ──errands──> courier ══ /lacewing/infer/1 ══> server of a neighbour
//!     ▲          │  ▲                  │ ║                              │ admission
//!     └─ held <──┘  └──── returned ────┘ ╚═ HTTP ═> coordinator         ▼
//!        (in order, until a deadline)                              thread with its models
//! ```
//!
//! What is asked and taken is decided by [`mesh_core::offload`]. The pipeline never waits for anybody: a frame that is away
//! when its deadline comes is published with the device's own answer.

mod config;
mod coordinator;
mod courier;
mod handoff;
mod held;
mod picture;
mod serve;
pub(crate) mod split;
#[cfg(test)]
mod tests;
pub(crate) mod wire;
mod work;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use models::offer_of;

pub use config::OffloadConfig;
pub(crate) use handoff::Handoff;
pub(crate) use held::{Away, Held};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) use self::{coordinator::Coordinator, courier::Mesh};
use self::{
    courier::Courier,
    serve::{Models, Server},
    split::{Leader, Lender, PART, Terms},
    wire::INFER,
    work::Worker,
};
use crate::{
    counters::Counters,
    mesh::{self, Service},
    update::Engines,
};

/// How busy the pipeline is with the device's own frames.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pressure(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    looking: AtomicBool,
    behind: AtomicBool,
}

impl Pressure {
    /// It looks at one, or it waits for the next.
    pub(crate) fn set_looking(&self, looking: bool) {
        self.0.looking.store(looking, Ordering::Relaxed);
    }

    /// Frames wait for it all the time, or not.
    pub(crate) fn set_behind(&self, behind: bool) {
        self.0.behind.store(behind, Ordering::Relaxed);
    }

    fn is_looking(&self) -> bool {
        self.0.looking.load(Ordering::Relaxed)
    }

    pub(crate) fn is_behind(&self) -> bool {
        self.0.behind.load(Ordering::Relaxed)
    }
}

/// Looks at the device's temperature now and then.
#[derive(Clone, Copy, Debug, Default)]
struct Thermometer {
    at_ms: Option<u64>,
    warmth: Option<i8>,
}

/// Silicon and its housing take longer to warm up.
const THERMOMETER_MS: u64 = 5_000;

impl Thermometer {
    fn read(&mut self, now_ms: u64) -> Option<i8> {
        if self
            .at_ms
            .is_none_or(|at| now_ms.saturating_sub(at) >= THERMOMETER_MS)
        {
            *self = Self {
                at_ms: Some(now_ms),
                warmth: mesh::warmth_now(),
            };
        }
        self.warmth
    }
}

/// The most streams of one neighbour, and of all: each may hold a picture.
const ASKING: (usize, usize) = (2, 8);

/// The most streams of one neighbour for parts, and of all: each may hold the values of a layer.
const LENDING: (usize, usize) = (8, 16);

/// What neighbours may ask of this device; what plans for it ends with `stop`.
pub(crate) fn services(
    config: &OffloadConfig,
    engines: &watch::Receiver<Engines>,
    pressure: &Pressure,
    mesh: Mesh,
    counters: &Counters,
    stop: &CancellationToken,
) -> Vec<Service> {
    if !config.answers() {
        return Vec::new();
    }
    let started = Worker::start(config, pressure.clone(), counters.clone())
        .and_then(|worker| start_services(config, engines, mesh, &worker, stop));
    started.unwrap_or_else(|why| {
        tracing::error!("frames of neighbours are not looked at: {why}");
        Vec::new()
    })
}

fn start_services(
    config: &OffloadConfig,
    engines: &watch::Receiver<Engines>,
    mesh: Mesh,
    worker: &Arc<Worker>,
    stop: &CancellationToken,
) -> Result<Vec<Service>, String> {
    let kept = config.serve.clone();
    let (kept, split) = if config.split {
        (None, kept)
    } else {
        (kept, None)
    };
    let split = split.map(|folder| {
        let present = mesh.site.subscribe();
        let terms = Terms {
            room: config.room(),
            share: config.time_share.into(),
        };
        let (leader, planner) = Leader::new(folder, terms, mesh.clone());
        tokio::spawn(planner.run(present, stop.clone()));
        leader
    });
    let models = Models {
        own: config.answer.then(|| engines.clone()),
        kept,
        split,
    };
    let server = Arc::new(Server::start(Arc::clone(worker), models)?);
    let (each, all) = ASKING;
    let mut services = vec![Service::new(INFER, each, all, move |_, stream| {
        let server = Arc::clone(&server);
        async move { server.serve(stream).await }
    })];
    if let Some(folder) = &config.lend {
        let lender = Lender::start(Arc::clone(worker), folder.clone(), config.room())?;
        let (each, all) = LENDING;
        services.push(Service::new(PART, each, all, move |peer, stream| {
            Arc::clone(&lender).serve(peer, stream)
        }));
    }
    Ok(services)
}

/// The way to neighbours, and to the coordinator where it is asked, too, that look at frames; what carries them ends with
/// `stop`.
pub(crate) fn start(
    config: &OffloadConfig,
    mesh: Mesh,
    coordinator: Option<Arc<Coordinator>>,
    counters: &Counters,
    stop: &CancellationToken,
) -> Handoff {
    let (handoff, ends) = Handoff::new(config, counters.clone());
    let courier = Courier {
        present: mesh.site.subscribe(),
        roads: mesh,
        coordinator,
        errands: ends.errands,
        returned: ends.returned,
        known: ends.known,
    };
    tokio::spawn(courier.run(stop.clone()));
    handoff
}

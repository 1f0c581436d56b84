//! Carries frames to neighbours, or to the coordinator, and brings back what they say; knows who answers with what.

use std::{
    collections::BTreeMap,
    future::pending,
    sync::{Arc, mpsc::SyncSender},
    time::Duration,
};

use libp2p::futures::{AsyncRead, AsyncWrite};
use mesh_core::{
    Name,
    offload::{
        Answered, MAX_KNOWN, Offer,
        ask::{Chosen, Heard, Known},
    },
    roster::Peer,
};
use models::{Engine, UNKNOWN};
use tokio::{
    sync::{mpsc::Receiver, watch},
    time::{Instant, MissedTickBehavior, interval, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    coordinator::{COORDINATOR, Coordinator},
    picture::{Shown, encode},
    wire::{self, INFER, Question, Reply},
};
use crate::mesh::{Neighbour, Present, Rosters, Site};

/// Offers are asked for again after this: a neighbour may have another model by then …
pub(super) const OFFERS: Duration = Duration::from_secs(60);
/// … and after this where there were none: it may just have started.
const NO_OFFERS: Duration = Duration::from_secs(3);
/// For a neighbour to say what it offers.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked who is to be asked for offers.
const LOOK: Duration = Duration::from_secs(1);

/// A frame that a neighbour is to look at.
#[derive(Debug)]
pub(crate) struct Errand {
    pub(super) number: u64,
    pub(super) chosen: Chosen,
    pub(super) shown: Shown,
    pub(super) until: Instant,
    /// The model whose labels the answer has to be one of.
    pub(super) engine: Arc<Engine>,
}

/// What came of an errand; there is one for each.
#[derive(Debug)]
pub(crate) struct Returned {
    pub(super) number: u64,
    pub(super) peer: Peer,
    pub(super) heard: Heard,
    pub(super) answer: Option<Answered>,
}

/// Whom it can reach, and by which names they are known.
pub(crate) trait Roads: Clone + Send + Sync + 'static {
    /// A way there and back.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send;
    /// A new stream of a protocol.
    fn open(
        &self,
        peer: Peer,
        protocol: &'static str,
    ) -> impl Future<Output = Result<Self::Stream, String>> + Send;
    /// The neighbour's name.
    fn name(&self, peer: &Peer) -> Option<Name>;
}

/// The mesh.
#[derive(Clone)]
pub(crate) struct Mesh {
    pub(crate) site: Site,
    /// Nothing where the device has no neighbours.
    pub(crate) rosters: Option<Rosters>,
}

impl Roads for Mesh {
    type Stream = libp2p::Stream;

    async fn open(&self, peer: Peer, protocol: &'static str) -> Result<Self::Stream, String> {
        let opened = self.site.open(peer, protocol).await;
        opened.map_err(|error| error.to_string())
    }

    fn name(&self, peer: &Peer) -> Option<Name> {
        self.rosters.as_ref()?.current()?.name(peer).cloned()
    }
}

/// Between the pipeline and the neighbours.
pub(crate) struct Courier<R> {
    pub(crate) roads: R,
    /// Where it is asked, too.
    pub(crate) coordinator: Option<Arc<Coordinator>>,
    pub(crate) present: watch::Receiver<Present>,
    pub(crate) errands: Receiver<Errand>,
    pub(crate) returned: SyncSender<Returned>,
    pub(crate) known: watch::Sender<Vec<Known>>,
}

/// What a neighbour offers, and when it is to be asked again.
struct Card {
    offers: Vec<Offer>,
    again: Instant,
}

impl<R: Roads> Courier<R> {
    /// Carries until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let Self {
            roads,
            coordinator,
            present,
            mut errands,
            returned,
            known,
        } = self;
        let (tell, far) = watch::channel(Vec::new());
        let asks = coordinator.clone();
        let know_far = async {
            match &asks {
                Some(coordinator) => coordinator.know(&tell).await,
                None => pending().await,
            }
        };
        let carry = async {
            // As many at the same time as the pipeline lets go.
            while let Some(errand) = errands.recv().await {
                let (roads, returned, stop) = (roads.clone(), returned.clone(), stop.clone());
                let coordinator = coordinator.clone();
                tokio::spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        // Nobody else sends more: there is room. If the pipeline has ended, nobody waits.
                        back = carry(&roads, coordinator, errand) => { let _ = returned.try_send(back); }
                    }
                });
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = carry => {}
            () = know_far => {}
            () = know(&roads, present, &far, &known) => {}
        }
    }
}

/// Asks, and says what came of it.
async fn carry(
    roads: &impl Roads,
    coordinator: Option<Arc<Coordinator>>,
    errand: Errand,
) -> Returned {
    let Errand {
        number,
        chosen: Chosen { peer, model },
        shown,
        until,
        engine,
    } = errand;
    let begin = Instant::now();
    let far = coordinator.filter(|_| peer == COORDINATOR);
    let is_far = far.is_some();
    let asked = async {
        let encoded = move || encode(&shown).map_err(|error| error.to_string());
        if let Some(coordinator) = far {
            let looked = move || coordinator.look(model, &encoded()?, until);
            let looked = tokio::task::spawn_blocking(looked).await;
            return looked.map_err(|error| error.to_string())?;
        }
        let image = tokio::task::spawn_blocking(encoded).await;
        let image = image.map_err(|error| error.to_string())??;
        let stream = roads.open(peer, INFER).await?;
        let left = until.saturating_duration_since(Instant::now());
        let question = Question::Run {
            model,
            deadline_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
            bytes: u32::try_from(image.len()).unwrap_or(u32::MAX),
        };
        let reply = wire::ask(stream, &question, &image).await;
        reply.map_err(|error| error.to_string())
    };
    let labels = &engine.manifest().output.labels;
    let knows = |label: &str| label == UNKNOWN || labels.iter().any(|known| known == label);
    let (heard, answer) = match timeout_at(until, asked).await {
        Ok(Ok(Reply::Answer(answer))) if answer.is_sound(knows) => {
            let ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
            let by = if is_far {
                // As in topics: what is no device of the site.
                Some(Name::itself())
            } else {
                roads.name(&peer)
            };
            let answered = by.map(|by| Answered { by, answer });
            // Who is not on the roster any more is nobody's neighbour.
            match answered {
                Some(answered) => (Heard::Answered(ms), Some(answered)),
                None => (Heard::Missed, None),
            }
        }
        Ok(Ok(Reply::Refused(why))) => {
            tracing::debug!(%peer, "a neighbour does not look at a frame: {}", why.as_str());
            (Heard::Refused, None)
        }
        Ok(Ok(_)) => {
            tracing::warn!(%peer, "a neighbour says what no model says");
            (Heard::Nonsense, None)
        }
        Ok(Err(why)) => {
            tracing::debug!(%peer, "a neighbour did not answer: {why}");
            (Heard::Missed, None)
        }
        Err(_) => (Heard::Missed, None),
    };
    Returned {
        number,
        peer,
        heard,
        answer,
    }
}

/// Knows who answers with what, for ever.
async fn know(
    roads: &impl Roads,
    mut present: watch::Receiver<Present>,
    far: &watch::Receiver<Vec<Offer>>,
    known: &watch::Sender<Vec<Known>>,
) {
    let mut cards: BTreeMap<Peer, Card> = BTreeMap::new();
    let mut tick = interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let here = present.borrow_and_update().clone();
        let answering: BTreeMap<Peer, &Neighbour> = here
            .iter()
            .filter(|neighbour| neighbour.presence.answers)
            .map(|neighbour| (neighbour.peer, neighbour))
            .collect();
        cards.retain(|peer, _| answering.contains_key(peer));
        for peer in answering.keys() {
            let now = Instant::now();
            let card = cards.get(peer);
            if card.is_some_and(|card| now < card.again)
                || (card.is_none() && cards.len() >= MAX_KNOWN)
            {
                continue;
            }
            let offers = offers(roads, *peer).await;
            let after = if offers.is_empty() { NO_OFFERS } else { OFFERS };
            let again = Instant::now() + after;
            cards.insert(*peer, Card { offers, again });
        }
        let near = cards.iter().filter_map(|(peer, card)| {
            let load = answering.get(peer)?.presence.load;
            Some(Known {
                peer: *peer,
                load,
                offers: card.offers.clone(),
                far: false,
            })
        });
        let offers = far.borrow().clone();
        let far = (!offers.is_empty()).then_some(Known {
            peer: COORDINATOR,
            load: 0,
            offers,
            far: true,
        });
        // First, so that a crowd of neighbours does not push it out.
        let all: Vec<Known> = far.into_iter().chain(near).collect();
        known.send_if_modified(|known| {
            let is_new = *known != all;
            if is_new {
                *known = all;
            }
            is_new
        });
    }
}

async fn offers(roads: &impl Roads, peer: Peer) -> Vec<Offer> {
    let asked = async {
        let stream = roads.open(peer, INFER).await?;
        let reply = wire::ask(stream, &Question::Offers, &[]).await;
        reply.map_err(|error| error.to_string())
    };
    match timeout(PATIENCE, asked).await {
        Ok(Ok(Reply::Offers(offers))) => offers,
        Ok(Err(why)) => {
            tracing::debug!(%peer, "a neighbour does not say what it offers: {why}");
            Vec::new()
        }
        Ok(Ok(_)) | Err(_) => Vec::new(),
    }
}

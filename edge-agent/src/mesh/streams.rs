//! What the rest of the agent has of its neighbours: who is there, and streams to and from them.
//!
//! A service is a protocol of its own over the same connection: it is spoken with members of the roster only, its streams are
//! counted, and it ends with the mesh.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use libp2p::{Stream, StreamProtocol, futures::StreamExt};
use libp2p_stream::{Control, IncomingStreams};
use mesh_core::{neighbours::Presence, roster::Peer};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    names::{id, peer},
    roster::Rosters,
};

/// Streams that are being asked for.
const ASKED: usize = 64;
/// A neighbour that does not answer within this is left.
const PATIENCE: Duration = Duration::from_secs(5);

/// A device that is there, and what it last said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Neighbour {
    pub(crate) peer: Peer,
    pub(crate) presence: Presence,
}

/// Everybody who is there, this device left out.
pub(crate) type Present = Arc<[Neighbour]>;

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
#[error("neighbour {peer}: {why}")]
pub(crate) struct NoStream {
    peer: Peer,
    why: String,
}

/// A stream that somebody wants.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) peer: Peer,
    pub(super) protocol: StreamProtocol,
    pub(super) back: oneshot::Sender<Result<Stream, String>>,
}

/// The site, for the rest of the agent.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    present: watch::Receiver<Present>,
    wanted: mpsc::Sender<Wanted>,
}

/// The node's ends of a [`Site`].
#[derive(Debug)]
pub(crate) struct Ends {
    pub(super) present: watch::Sender<Present>,
    pub(super) wanted: mpsc::Receiver<Wanted>,
}

impl Site {
    /// Nobody is there before a node runs.
    pub(crate) fn new() -> (Self, Ends) {
        let (tell, present) = watch::channel(Present::default());
        let (ask, wanted) = mpsc::channel(ASKED);
        let site = Self {
            present,
            wanted: ask,
        };
        let ends = Ends {
            present: tell,
            wanted,
        };
        (site, ends)
    }

    /// Who is there now.
    pub(crate) fn present(&self) -> Present {
        self.present.borrow().clone()
    }

    /// Tells of each change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Present> {
        self.present.clone()
    }

    /// A new stream to a neighbour, over the connection that there is or a new one.
    ///
    /// # Errors
    /// In words, if it does not come within 5 s.
    pub(crate) async fn open(
        &self,
        peer: Peer,
        protocol: &'static str,
    ) -> Result<Stream, NoStream> {
        let no = |why: &str| NoStream {
            peer,
            why: why.to_owned(),
        };
        let (back, answer) = oneshot::channel();
        let wanted = Wanted {
            peer,
            protocol: StreamProtocol::new(protocol),
            back,
        };
        if self.wanted.try_send(wanted).is_err() {
            return Err(no("too many streams are asked for, or the mesh has ended"));
        }
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(Ok(Ok(stream))) => Ok(stream),
            Ok(Ok(Err(why))) => Err(no(&why)),
            Ok(Err(_)) => Err(no("the mesh has ended")),
            Err(_) => Err(no("it does not answer")),
        }
    }
}

/// Asks for a stream over the connection with a peer.
pub(super) fn open(control: &Control, wanted: Wanted) {
    let mut control = control.clone();
    tokio::spawn(async move {
        let Wanted {
            peer,
            protocol,
            back,
        } = wanted;
        let Some(id) = id(&peer) else { return };
        let opened = control.open_stream(id, protocol).await;
        let _ = back.send(opened.map_err(|error| error.to_string()));
    });
}

/// What serves a stream.
type Serve = dyn Fn(Peer, Stream) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync;

/// What neighbours may ask of this device over a protocol.
pub(crate) struct Service {
    protocol: &'static str,
    /// Streams at the same time from one neighbour …
    each: usize,
    /// … and from all.
    all: usize,
    serve: Box<Serve>,
}

impl Service {
    pub(crate) fn new<F>(
        protocol: &'static str,
        each: usize,
        all: usize,
        serve: impl Fn(Peer, Stream) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self {
            protocol,
            each,
            all,
            serve: Box::new(move |peer, stream| Box::pin(serve(peer, stream))),
        }
    }

    /// Serves whoever comes, in tasks of their own.
    pub(super) fn start(self, control: &mut Control, rosters: Rosters) -> Result<(), String> {
        let incoming = control
            .accept(StreamProtocol::new(self.protocol))
            .map_err(|error| error.to_string())?;
        tokio::spawn(self.run(incoming, rosters));
        Ok(())
    }

    async fn run(self, mut incoming: IncomingStreams, rosters: Rosters) {
        let places = Arc::new(Places::default());
        while let Some((from, stream)) = incoming.next().await {
            let Some(peer) = peer(&from).filter(|peer| rosters.admits(peer)) else {
                continue;
            };
            // Who asks for more than its share hears the end of the stream.
            let Some(place) = Places::take(&places, peer, self.each, self.all) else {
                tracing::debug!(%peer, self.protocol, "a neighbour asks for too much at once");
                continue;
            };
            let served = (self.serve)(peer, stream);
            tokio::spawn(async move {
                served.await;
                drop(place);
            });
        }
    }
}

/// How many streams each neighbour has.
#[derive(Debug, Default)]
struct Places(Mutex<HashMap<Peer, usize>>);

/// One of them, until it is dropped.
struct Place {
    places: Arc<Places>,
    peer: Peer,
}

impl Places {
    fn take(this: &Arc<Self>, peer: Peer, each: usize, all: usize) -> Option<Place> {
        let mut taken = this.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.get(&peer).copied().unwrap_or(0);
        if own >= each || taken.values().sum::<usize>() >= all {
            return None;
        }
        taken.insert(peer, own + 1);
        Some(Place {
            places: Arc::clone(this),
            peer,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.peer) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::Digest;

    use super::*;

    #[test]
    fn nobody_takes_all_places() {
        let places = Arc::new(Places::default());
        let peer = |n| Digest([n; 32]);
        let take = |n| Places::take(&places, peer(n), 2, 3);
        let first = take(1).unwrap();
        let _second = take(1).unwrap();
        assert!(take(1).is_none(), "more than its share");
        let third = take(2).unwrap();
        assert!(take(3).is_none(), "more than there are");
        drop(first);
        assert!(take(1).is_some());
        drop(third);
        assert_eq!(places.0.lock().unwrap().len(), 1);
    }
}

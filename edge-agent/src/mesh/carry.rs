//! A device without an uplink reaches the coordinator through a neighbour that has one.
//!
//! ```text
//!  device ══ TLS, end to end ═══════════════════════════════════════════> broker, coordinator
//!     └── stream within Noise ──> carrier ── TCP, to its own doors only ──────┘
//! ```
//!
//! What is carried is the same TLS connection that the device would have made by itself, with its own certificate: the carrier
//! sees no reading and can change none, the acknowledgement comes back the same way, and whatever is carried twice is stored once as
//! ever. One byte names the door, one byte answers, and the rest belongs to the two ends.

use std::{
    io,
    os::unix::net::UnixStream as Blocking,
    sync::{Arc, OnceLock},
    time::Duration,
};

use libp2p::Stream;
use mesh_core::roster::Peer;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    runtime::Handle,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::compat::FuturesAsyncReadCompatExt;

use super::streams::{Present, Service, Site};
use crate::{config::Config, connection, counters::Counters, dice, identity::Tls};

const PROTOCOL: &str = "/lacewing/carry/1";
/// Connections that one neighbour may have carried: to the broker, for models, for samples, and one that ends.
const EACH: usize = 4;
/// All together.
const ALL: usize = 32;
/// For the byte that names the door, and for the carrier to reach it.
const PATIENCE: Duration = Duration::from_secs(4);
/// Who has not opened by then is left for the next one: it believes in an uplink that is dead.
const ANSWER: Duration = Duration::from_millis(1_500);
/// A connection over which nothing goes: longer than any keep-alive.
const IDLE: Duration = Duration::from_secs(300);
/// Carriers that are asked before a device gives up.
const ASKED: usize = 3;
/// Copied in one go.
const BLOCK: usize = 16 * 1024;
/// With more of its own waiting than this, a carrier puts that first …
const OWN_FIRST: u64 = 128;
/// … and lets each block of the others wait this long at most: they are slower then, not lost.
const YIELD: Duration = Duration::from_millis(500);
/// Looked at so often.
const LOOK: Duration = Duration::from_millis(25);

/// Where a neighbour can be carried to. Nowhere else: a device is nobody's way into its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    Broker,
    Coordinator,
}

impl Door {
    const fn byte(self) -> u8 {
        match self {
            Self::Broker => 0,
            Self::Coordinator => 1,
        }
    }

    const fn of(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Broker),
            1 => Some(Self::Coordinator),
            _ => None,
        }
    }
}

const OPEN: u8 = 0;
const CLOSED: u8 = 1;

// ---- who is carried

/// The neighbours that can carry this device.
#[derive(Clone, Debug)]
pub(crate) struct Carriers {
    site: Site,
    /// Drives what is carried for threads that wait.
    runtime: Handle,
}

impl Carriers {
    /// Inside a runtime that lives as long as the agent.
    pub(crate) fn new(site: Site) -> Self {
        let runtime = Handle::current();
        Self { site, runtime }
    }

    /// Does a neighbour say that it has an uplink?
    pub(crate) fn are_there(&self) -> bool {
        self.site.present().iter().any(|n| n.presence.uplink)
    }

    /// Tells of each change in who is there.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Present> {
        self.site.subscribe()
    }

    /// The least busy first, those that are alike in any order.
    fn chosen(&self) -> Vec<Peer> {
        let present = self.site.present();
        let with_uplink = present.iter().filter(|n| n.presence.uplink);
        let mut all: Vec<_> = with_uplink
            .map(|n| (n.presence.load / 25, dice::throw(), n.peer))
            .collect();
        all.sort_unstable();
        all.into_iter().take(ASKED).map(|(.., peer)| peer).collect()
    }

    /// A connection to a door, through the first neighbour that opens it.
    ///
    /// # Errors
    /// If none does.
    pub(crate) async fn connect(&self, door: Door) -> io::Result<UnixStream> {
        let mut why = String::from("no neighbour has an uplink");
        for peer in self.chosen() {
            match self.ask(peer, door).await {
                Ok(stream) => {
                    let (near, far) = UnixStream::pair()?;
                    self.runtime.spawn(pump(stream, far));
                    tracing::info!(carrier = %peer, ?door, "carried by a neighbour");
                    return Ok(near);
                }
                Err(error) => why = error.to_string(),
            }
        }
        Err(io::Error::new(io::ErrorKind::HostUnreachable, why))
    }

    /// The same for a thread that waits.
    fn connect_blocking(&self, door: Door) -> io::Result<Blocking> {
        let stream = self.runtime.block_on(self.connect(door))?.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    }

    async fn ask(&self, peer: Peer, door: Door) -> io::Result<Stream> {
        let asked = async {
            let opened = self.site.open(peer, PROTOCOL).await;
            let mut stream = opened.map_err(io::Error::other)?.compat();
            stream.write_all(&[door.byte()]).await?;
            stream.flush().await?;
            match stream.read_u8().await? {
                OPEN => Ok(stream.into_inner()),
                _ => Err(io::Error::other(format!(
                    "neighbour {peer} does not reach it either"
                ))),
            }
        };
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        timeout(ANSWER, asked).await.map_err(late)?
    }
}

/// The way through a neighbour, for whatever asks over HTTP: there as soon as the mesh is, and of use while the device has no uplink.
#[derive(Clone, Debug, Default)]
pub(crate) struct Detour(Arc<OnceLock<(Carriers, watch::Receiver<bool>)>>);

impl Detour {
    /// There are neighbours. `has_uplink`: the device reaches its broker by itself.
    pub(crate) fn set(&self, carriers: Carriers, has_uplink: watch::Receiver<bool>) {
        // Once in a life of the agent.
        let _ = self.0.set((carriers, has_uplink));
    }

    /// Has the device no uplink, and a neighbour one?
    pub(crate) fn is_needed(&self) -> bool {
        let set = self.0.get();
        set.is_some_and(|(carriers, has_uplink)| !*has_uplink.borrow() && carriers.are_there())
    }

    /// A connection to the coordinator, if it is needed and a neighbour makes it. Blocks.
    pub(crate) fn open(&self) -> Option<Blocking> {
        let (carriers, _) = self.0.get().filter(|_| self.is_needed())?;
        match carriers.connect_blocking(Door::Coordinator) {
            Ok(stream) => Some(stream),
            Err(error) => {
                tracing::debug!("no neighbour carries it: {error}");
                None
            }
        }
    }
}

/// Until either end closes, or nothing has gone over it for too long.
async fn pump(stream: Stream, far: UnixStream) {
    let (from_peer, to_peer) = tokio::io::split(stream.compat());
    let (from_here, to_here) = far.into_split();
    let calm = || async {};
    tokio::select! {
        _ = copy(from_peer, to_here, |_| calm()) => {}
        _ = copy(from_here, to_peer, |_| calm()) => {}
    }
}

/// Copies to the end, `before` each block.
async fn copy<F: Future<Output = ()>>(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    before: impl Fn(usize) -> F,
) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    loop {
        let n = match timeout(IDLE, from.read(&mut block)).await {
            Ok(n) => n?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        };
        let Some(bytes) = block.get(..n).filter(|bytes| !bytes.is_empty()) else {
            return to.shutdown().await;
        };
        before(n).await;
        to.write_all(bytes).await?;
        to.flush().await?;
    }
}

// ---- who carries

/// `host:port` of a coordinator's address.
fn authority(url: &str) -> Option<String> {
    let url: ureq::http::Uri = url.parse().ok()?;
    let port = match (url.port_u16(), url.scheme_str()) {
        (Some(port), _) => port,
        (None, Some("https")) => 443,
        (None, _) => 80,
    };
    Some(format!("{}:{port}", url.host()?))
}

/// Where a door is, as this device knows it: `host:port`.
type Doors = dyn Fn(Door) -> Option<String> + Send + Sync;

/// What carries others.
pub(crate) struct Carrying {
    doors: Box<Doors>,
    /// Does this device reach its broker by itself?
    uplink: watch::Receiver<bool>,
    /// For others, in bytes per second.
    bytes_per_s: u64,
    counters: Counters,
}

impl Carrying {
    /// Nothing, where the device is to carry nobody.
    pub(crate) fn new(
        config: &Config,
        tls: &Tls,
        uplink: watch::Receiver<bool>,
        counters: &Counters,
    ) -> Option<Self> {
        let bytes_per_s = u64::from(config.mesh.carry_kib_per_s) * 1_024;
        let (config, tls) = (config.clone(), tls.clone());
        let doors = move |door| match door {
            Door::Broker => connection::address(&config, &tls)
                .ok()
                .map(|(host, port)| format!("{host}:{port}")),
            Door::Coordinator => config.coordinator().and_then(authority),
        };
        (bytes_per_s > 0).then(|| Self {
            doors: Box::new(doors),
            uplink,
            bytes_per_s,
            counters: counters.clone(),
        })
    }

    /// What neighbours may ask for.
    pub(crate) fn service(self) -> Service {
        let this = Arc::new(self);
        Service::new(PROTOCOL, EACH, ALL, move |peer, stream| {
            let this = Arc::clone(&this);
            async move {
                if let Err(error) = this.carry(stream).await {
                    tracing::debug!(%peer, "carrying has ended: {error}");
                }
            }
        })
    }

    async fn carry(&self, stream: Stream) -> io::Result<()> {
        let mut stream = stream.compat();
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        let asked = timeout(PATIENCE, stream.read_u8()).await.map_err(late)??;
        let reached = match Door::of(asked) {
            Some(door) => self.reach(door).await,
            None => Err(io::ErrorKind::InvalidData.into()),
        };
        let answer = if reached.is_ok() { OPEN } else { CLOSED };
        let answered = async {
            stream.write_all(&[answer]).await?;
            stream.flush().await
        };
        timeout(PATIENCE, answered).await.map_err(late)??;
        let (from_door, to_door) = reached?.into_split();
        let (from_peer, to_peer) = tokio::io::split(stream);
        self.counters.carried.add(1);
        // One that loses its own uplink sends the other one elsewhere.
        let mut uplink = self.uplink.clone();
        tokio::select! {
            ended = copy(from_peer, to_door, |n| self.turn(n)) => ended,
            ended = copy(from_door, to_peer, |n| self.turn(n)) => ended,
            _ = uplink.wait_for(|is_up| !is_up) => Ok(()),
        }
    }

    async fn reach(&self, door: Door) -> io::Result<TcpStream> {
        if !*self.uplink.borrow() {
            return Err(io::ErrorKind::NetworkDown.into());
        }
        let address = (self.doors)(door).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let connected = timeout(PATIENCE, TcpStream::connect(address)).await;
        let stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Before `n` bytes of somebody else's: this device's own readings go first, and others get no more than their share.
    async fn turn(&self, n: usize) {
        self.counters.carried_bytes.add(n as u64);
        let mut waited = Duration::ZERO;
        while self.counters.backlog.get() > OWN_FIRST && waited < YIELD {
            sleep(LOOK).await;
            waited += LOOK;
        }
        // Each connection by itself: there are few, and what they share is the line.
        let pace = Duration::from_secs_f64(n as f64 / self.bytes_per_s.max(1) as f64);
        if pace > Duration::from_millis(1) {
            sleep(pace).await;
        }
    }
}

#[cfg(test)]
#[path = "carry_tests.rs"]
mod tests;

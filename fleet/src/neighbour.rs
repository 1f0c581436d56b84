//! A neighbour that means no good: it has a device's key, stands on the roster, and does as it likes.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use edge_agent::mesh::enemy::{PRESENCE, keypair, opened, peer, tell};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, Transport,
    core::upgrade::Version,
    futures::{AsyncRead, AsyncReadExt, AsyncWriteExt, StreamExt},
    identity::Keypair,
    multiaddr::Protocol,
    noise,
    swarm::SwarmEvent,
    tcp, yamux,
};
use libp2p_stream::{Behaviour, Control};
use mesh_core::neighbours::{Presence, Said, Statement};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject};
use tokio::time::{interval, sleep};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::dice::Dice;

/// Between two deeds: as often as may be, on a machine that plays all sides.
const PAUSE: Duration = Duration::from_millis(5);
/// Whoever was thrown out comes back after this.
const AGAIN: Duration = Duration::from_millis(500);
/// Neighbours that are dialled then.
const DIALS: usize = 3;
/// Statements of others that are kept, to be used.
const KEPT: usize = 512;
/// The longest frame that is listened to.
const MAX_FRAME: usize = 1 << 20;
/// The protocol in which devices ask each other what they have of a release.
const OFFERS: &str = "/lacewing/offers/1";
/// The kind of a frame that holds a signed statement …
const TELL: u8 = 3;
/// … and that of one that says which roster the sender has.
const VERSION: u8 = 4;
/// Questions in one deed: the answers to all of them are what fills a neighbour's memory.
const QUESTIONS: usize = 20;
/// Where a forged statement says that a device is: nobody is there.
pub(crate) const NOWHERE: &str = "/ip4/192.0.2.1/tcp/9";

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// Bytes by lot.
    Garbage,
    /// Frames that say they are of gigabytes.
    Oversize,
    /// What others have signed, again and again.
    Replay,
    /// Says of all others that they are gone.
    Slander,
    /// Has something new to say of itself all the time.
    Chatter,
    /// Makes links and ends them.
    Churn,
    /// Asks what others have, and reads no answer.
    Greed,
    /// Asks for the roster again and again, and reads none.
    Nag,
    /// Says of others what they have not said.
    Forge,
}

impl Deed {
    /// All of them.
    pub(crate) const ALL: [Self; 9] = [
        Self::Garbage,
        Self::Oversize,
        Self::Replay,
        Self::Slander,
        Self::Chatter,
        Self::Churn,
        Self::Greed,
        Self::Nag,
        Self::Forge,
    ];
}

/// One enemy, and what it has heard and done.
#[derive(Clone)]
struct Enemy {
    key: Keypair,
    deed: Deed,
    /// Envelopes of others.
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
    done: Arc<AtomicU64>,
}

/// Does `deed` to all `victims` until `stop`, with the key of the device whose data lie here. Gives how often it did.
///
/// # Errors
/// If it has no key, or cannot speak at all.
pub(crate) async fn run(
    data: &Path,
    victims: &[SocketAddr],
    deed: Deed,
    mut dice: Dice,
    stop: CancellationToken,
) -> anyhow::Result<u64> {
    let path = data.join("identity").join("key.pem");
    let key = PrivatePkcs8KeyDer::from_pem_file(&path).context("reading a device's key")?;
    let key = keypair(key.secret_pkcs8_der()).map_err(anyhow::Error::msg)?;
    let mut swarm = swarm(&key)?;
    let mut control = swarm.behaviour().new_control();
    let mut incoming = control.accept(StreamProtocol::new(PRESENCE))?;
    let enemy = Enemy {
        key,
        deed,
        heard: Arc::default(),
        done: Arc::default(),
    };
    for address in victims {
        swarm.dial(multiaddress(*address))?;
    }
    let mut again = interval(AGAIN);
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(enemy.done.load(Ordering::Relaxed)),
            event = swarm.select_next_some() => {
                if let SwarmEvent::ConnectionEstablished { peer_id, .. } = event {
                    let (enemy, control) = (enemy.clone(), control.clone());
                    let (dice, stop) = (Dice::new(dice.any()), stop.clone());
                    tokio::spawn(async move {
                        stop.run_until_cancelled(enemy.torment(peer_id, control, dice)).await;
                    });
                }
            }
            Some((_, stream)) = incoming.next() => {
                let (enemy, stop) = (enemy.clone(), stop.clone());
                tokio::spawn(async move { stop.run_until_cancelled(enemy.listen(stream)).await });
            }
            _ = again.tick() => {
                for _ in 0..DIALS {
                    if let Some(address) = victims.get(dice.below(victims.len())) {
                        let _ = swarm.dial(multiaddress(*address));
                    }
                }
            }
        }
    }
}

fn multiaddress(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

fn swarm(key: &Keypair) -> anyhow::Result<Swarm<Behaviour>> {
    let transport = tcp::tokio::Transport::new(tcp::Config::default())
        .upgrade(Version::V1)
        .authenticate(noise::Config::new(key)?)
        .multiplex(yamux::Config::default())
        .boxed();
    let settings = libp2p::swarm::Config::with_tokio_executor();
    let me = key.public().to_peer_id();
    Ok(Swarm::new(transport, Behaviour::new(), me, settings))
}

impl Enemy {
    fn heard(&self) -> Vec<Vec<u8>> {
        self.heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn keep(&self, envelope: Vec<u8>) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if heard.len() >= KEPT {
            heard.remove(0);
        }
        heard.push(envelope);
    }

    /// Takes in what is told over a link.
    async fn listen(self, mut stream: impl AsyncRead + Unpin) {
        loop {
            let mut head = [0; 5];
            if stream.read_exact(&mut head).await.is_err() {
                return;
            }
            let [a, b, c, d, kind] = head;
            let length = u32::from_be_bytes([a, b, c, d]).saturating_sub(1) as usize;
            let mut content = vec![0; length.min(MAX_FRAME)];
            if length > MAX_FRAME || stream.read_exact(&mut content).await.is_err() {
                return;
            }
            if kind == TELL {
                self.keep(content);
            }
        }
    }

    /// Until the connection is gone.
    async fn torment(self, victim: PeerId, mut control: Control, mut dice: Dice) {
        let name = match self.deed {
            Deed::Greed => OFFERS,
            _ => PRESENCE,
        };
        let mut seq = 0;
        while let Ok(stream) = control.open_stream(victim, StreamProtocol::new(name)).await {
            let (from, mut to) = stream.split();
            // The half that is not read stays open.
            let (listening, _unread) = match self.deed {
                Deed::Greed | Deed::Nag => (None, Some(from)),
                _ => {
                    let listening = tokio::spawn(self.clone().listen(from));
                    (Some(AbortOnDropHandle::new(listening)), None)
                }
            };
            loop {
                seq += 1;
                let bytes = self.bytes(seq, &mut dice);
                if to.write_all(&bytes).await.is_err() || to.flush().await.is_err() {
                    break;
                }
                self.done.fetch_add(1, Ordering::Relaxed);
                sleep(PAUSE).await;
                if matches!(self.deed, Deed::Churn | Deed::Greed) {
                    break;
                }
            }
            drop(listening);
        }
    }

    /// Some of what it does.
    fn bytes(&self, seq: u64, dice: &mut Dice) -> Vec<u8> {
        let frame = |envelope: &Vec<u8>| framed(TELL, envelope);
        match self.deed {
            Deed::Garbage => (0..512).flat_map(|_| dice.any().to_be_bytes()).collect(),
            Deed::Oversize => [vec![0xff, 0xff, 0xff, 0xff, TELL], vec![0; 4_096]].concat(),
            Deed::Replay => self.heard().iter().flat_map(frame).collect(),
            Deed::Slander => {
                let heard = self.heard();
                let about = heard.iter().filter_map(|envelope| opened(envelope));
                let gone = about.map(|statement| Statement {
                    said: Said::Gone,
                    ..statement
                });
                gone.flat_map(|statement| tell(&self.key, &statement))
                    .collect()
            }
            Deed::Chatter => {
                let Some(about) = peer(&self.key.public().to_peer_id()) else {
                    return Vec::new();
                };
                let presence = Presence {
                    load: (seq % 101) as u8,
                    uplink: seq.is_multiple_of(2),
                    ..Presence::default()
                };
                let statement = Statement {
                    about,
                    life: u64::MAX / 2,
                    seq,
                    said: Said::Here(presence),
                };
                tell(&self.key, &statement)
            }
            Deed::Churn => framed(2, &dice.any().to_be_bytes()),
            Deed::Greed => vec![7; 96],
            Deed::Nag => framed(VERSION, &[0; 8]).repeat(QUESTIONS),
            Deed::Forge => {
                let heard = self.heard();
                let all = heard.iter().filter_map(|envelope| opened(envelope));
                let forged = all.map(|statement| Statement {
                    seq: statement.seq.saturating_add(1),
                    said: Said::Here(Presence {
                        addresses: vec![NOWHERE.into()],
                        ..Presence::default()
                    }),
                    ..statement
                });
                forged
                    .flat_map(|statement| tell(&self.key, &statement))
                    .collect()
            }
        }
    }
}

fn framed(kind: u8, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len() + 1).unwrap_or(u32::MAX);
    [&length.to_be_bytes()[..], &[kind], content].concat()
}

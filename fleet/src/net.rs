//! A network that can be cut, slowed and made to lose answers: a TCP proxy on loopback.
//!
//! Each device gets a [`Link`] of its own to the broker, so that one can lose its network while the
//! others keep theirs.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;

/// One read. Small, so that a slow link is smooth.
const CHUNK: usize = 8 * 1024;
/// Chunks on their way at once in one direction: 512 KiB, what a long fat network holds.
const ON_THE_WAY: usize = 64;
/// A target on the same machine answers at once or is not there.
const CONNECT: Duration = Duration::from_secs(5);
/// How long the far side gets to act on what it received before the connection is reset.
const ACT: Duration = Duration::from_millis(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Bytes pass.
    Open,
    /// Every connection is reset.
    Cut,
    /// Connections stand, nothing passes.
    Hung,
}

/// What the network is like at the moment.
#[derive(Clone, Copy, Debug)]
struct Weather {
    mode: Mode,
    target: SocketAddr,
    bytes_per_s: Option<u64>,
    /// Is that for all connections together?
    together: bool,
    latency: Duration,
    /// How often it was cut: a connection that is older than the last time ends.
    cuts: u64,
    /// How often answers were to be lost: a connection that is older than the last time loses them.
    losses: u64,
}

/// What passed through a [`Link`].
#[derive(Debug, Default)]
pub struct Counters {
    connections: AtomicU64,
    resets: AtomicU64,
    up: AtomicU64,
    down: AtomicU64,
    /// Where the connections share a rate: when the way up is free again, and the way down.
    free: [Mutex<Option<Instant>>; 2],
}

impl Counters {
    /// Connections that were accepted.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }

    /// Connections that the network broke.
    #[must_use]
    pub fn resets(&self) -> u64 {
        self.resets.load(Relaxed)
    }

    /// Bytes that reached the target.
    #[must_use]
    pub fn up(&self) -> u64 {
        self.up.load(Relaxed)
    }

    /// Bytes that came back from it.
    #[must_use]
    pub fn down(&self) -> u64 {
        self.down.load(Relaxed)
    }
}

/// One stretch of network between a client and a target. It ends when this is dropped.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    counters: Arc<Counters>,
    _accepting: AbortOnDropHandle<()>,
}

impl Link {
    /// Opens a link on a free port of loopback.
    ///
    /// # Errors
    /// If no port can be bound.
    pub async fn new(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let weather = watch::Sender::new(Weather {
            mode: Mode::Open,
            target,
            bytes_per_s: None,
            together: false,
            latency: Duration::ZERO,
            cuts: 0,
            losses: 0,
        });
        let counters = Arc::new(Counters::default());
        let accepting = tokio::spawn(accept(listener, weather.clone(), counters.clone()));
        Ok(Self {
            address,
            weather,
            counters,
            _accepting: AbortOnDropHandle::new(accepting),
        })
    }

    /// Where clients connect to.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// What passed so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Resets every connection, and each new one as soon as it comes.
    pub fn cut(&self) {
        self.weather.send_modify(|w| {
            w.mode = Mode::Cut;
            w.cuts += 1;
        });
    }

    /// Leads new connections to another target.
    pub fn retarget(&self, target: SocketAddr) {
        self.weather.send_modify(|w| w.target = target);
    }

    /// Is it cut?
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.weather.borrow().mode == Mode::Cut
    }

    /// Accepts connections and holds them, but nothing passes any more: the worst kind of outage.
    pub fn hang(&self) {
        self.weather.send_modify(|w| w.mode = Mode::Hung);
    }

    /// Everything passes again, at full speed.
    pub fn heal(&self) {
        self.weather.send_modify(|w| {
            w.mode = Mode::Open;
            w.bytes_per_s = None;
            w.latency = Duration::ZERO;
        });
    }

    /// At most `bytes_per_s` (0 counts as 1) in each direction, each byte `latency` late.
    pub fn slow(&self, bytes_per_s: u64, latency: Duration) {
        self.weather.send_modify(|w| {
            w.bytes_per_s = Some(bytes_per_s.max(1));
            w.together = false;
            w.latency = latency;
        });
    }

    /// At most `bytes_per_s` (0 counts as 1) in each direction, for all connections together: an uplink that many share.
    pub fn narrow(&self, bytes_per_s: u64) {
        self.weather.send_modify(|w| {
            w.bytes_per_s = Some(bytes_per_s.max(1));
            w.together = true;
        });
    }

    /// From now on nothing comes back over the connections that stand. Each is reset as soon as something
    /// has gone up, so that the client cannot know it arrived, and sends it again. Later connections are
    /// not touched.
    pub fn lose_answers(&self) {
        self.weather.send_modify(|w| w.losses += 1);
    }
}

async fn accept(listener: TcpListener, weather: watch::Sender<Weather>, counters: Arc<Counters>) {
    // Dropped together with this task, which ends every connection.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    counters.connections.fetch_add(1, Relaxed);
                    connections.spawn(carry(client, weather.subscribe(), counters.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "the network could not accept a connection");
                    tokio::time::sleep(ACT).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn carry(
    mut client: TcpStream,
    mut weather: watch::Receiver<Weather>,
    counters: Arc<Counters>,
) {
    let Weather { cuts, losses, .. } = *weather.borrow();
    let target = loop {
        let now = *weather.borrow_and_update();
        match now.mode {
            Mode::Open => break timeout(CONNECT, TcpStream::connect(now.target)).await,
            Mode::Cut => return reset(&client, &counters),
            Mode::Hung => {
                if weather.changed().await.is_err() {
                    return;
                }
            }
        }
    };
    let Ok(Ok(mut target)) = target else {
        return reset(&client, &counters);
    };
    // Small packets are the rule here; waiting to merge them would be a network of its own.
    let _ = (client.set_nodelay(true), target.set_nodelay(true));
    let broken = {
        let (client_read, client_write) = client.split();
        let (target_read, target_write) = target.split();
        let up = Direction {
            weather: weather.clone(),
            losses,
            up: true,
            passed: &counters.up,
            shared: &counters,
        };
        let down = Direction {
            weather: weather.clone(),
            losses,
            up: false,
            passed: &counters.down,
            shared: &counters,
        };
        tokio::select! {
            broken = up.carry(client_read, target_write) => broken,
            broken = down.carry(target_read, client_write) => broken,
            // An error means that the link itself is gone, which is as good as cut.
            _ = weather.wait_for(|w| w.cuts > cuts) => true,
        }
    };
    if broken {
        reset(&client, &counters);
        let _ = target.set_zero_linger();
    }
}

fn reset(connection: &TcpStream, counters: &Counters) {
    counters.resets.fetch_add(1, Relaxed);
    let _ = connection.set_zero_linger();
}

/// One direction of one connection.
struct Direction<'a> {
    weather: watch::Receiver<Weather>,
    /// `Weather::losses` when the connection was made.
    losses: u64,
    up: bool,
    passed: &'a AtomicU64,
    shared: &'a Counters,
}

impl Direction<'_> {
    /// Carries bytes until the connection ends. Says whether the network broke it.
    async fn carry(self, from: ReadHalf<'_>, to: WriteHalf<'_>) -> bool {
        let (send, receive) = mpsc::channel(ON_THE_WAY);
        let weather = self.weather.clone();
        let hand_out = self.hand_out(to, receive);
        tokio::pin!(hand_out);
        tokio::select! {
            broken = &mut hand_out => broken,
            // Nothing more comes; what is on its way still arrives.
            () = take_in(from, send, weather) => hand_out.await,
        }
    }

    /// When this direction, which all connections share, has carried what takes so long.
    fn turn(&self, takes: Duration) -> Instant {
        let [up, down] = &self.shared.free;
        let free = if self.up { up } else { down };
        let mut free = free.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let done = free.map_or(now, |free| free.max(now)) + takes;
        *free = Some(done);
        done
    }

    /// Hands each chunk out when it is due.
    async fn hand_out(
        mut self,
        mut to: WriteHalf<'_>,
        mut chunks: mpsc::Receiver<(Instant, Vec<u8>)>,
    ) -> bool {
        let mut free = Instant::now();
        while let Some((due, chunk)) = chunks.recv().await {
            sleep_until(due).await;
            let now = match self.weather.wait_for(|w| w.mode == Mode::Open).await {
                Ok(now) => *now,
                Err(_) => return true,
            };
            if let Some(rate) = now.bytes_per_s {
                let takes = Duration::from_secs_f64(chunk.len() as f64 / rate as f64);
                free = match now.together {
                    true => self.turn(takes),
                    false => free.max(Instant::now()) + takes,
                };
                sleep_until(free).await;
            }
            let losing = now.losses > self.losses;
            if losing && !self.up {
                // The way back is gone; the other direction ends the connection.
                std::future::pending::<()>().await;
            }
            if to.write_all(&chunk).await.is_err() {
                return false;
            }
            self.passed.fetch_add(chunk.len() as u64, Relaxed);
            if losing {
                tokio::time::sleep(ACT).await;
                return true;
            }
        }
        false
    }
}

/// Reads chunks and notes when each is due on the other side.
async fn take_in(
    mut from: ReadHalf<'_>,
    to: mpsc::Sender<(Instant, Vec<u8>)>,
    weather: watch::Receiver<Weather>,
) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                let due = Instant::now() + weather.borrow().latency;
                let chunk = buffer.get(..n).unwrap_or_default().to_vec();
                if to.send((due, chunk)).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers every byte with two.
    async fn doubler() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).await.is_ok() {
                        if stream.write_all(&[byte[0], byte[0]]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    async fn ask(stream: &mut TcpStream, byte: u8) -> io::Result<[u8; 2]> {
        let mut answer = [0; 2];
        stream.write_all(&[byte]).await?;
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    }

    async fn connected(link: &Link) -> TcpStream {
        TcpStream::connect(link.address()).await.unwrap()
    }

    const SOON: Duration = Duration::from_millis(150);
    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn passes_and_counts() {
        let link = Link::new(doubler().await).await.unwrap();
        let mut client = connected(&link).await;
        for byte in 0..50 {
            assert_eq!(ask(&mut client, byte).await.unwrap(), [byte, byte]);
        }
        let seen = link.counters();
        assert_eq!((seen.connections(), seen.up(), seen.down()), (1, 50, 100));
    }

    #[tokio::test]
    async fn a_cut_ends_what_stands_and_what_comes() {
        let link = Link::new(doubler().await).await.unwrap();
        let mut client = connected(&link).await;
        ask(&mut client, 1).await.unwrap();
        link.cut();
        let mut one = [0];
        assert!(!matches!(
            timeout(LONG, client.read(&mut one)).await.unwrap(),
            Ok(1..)
        ));
        let mut next = connected(&link).await;
        assert!(timeout(LONG, ask(&mut next, 2)).await.unwrap().is_err());
        link.heal();
        let mut last = connected(&link).await;
        assert_eq!(
            timeout(LONG, ask(&mut last, 3)).await.unwrap().unwrap(),
            [3, 3]
        );
        assert_eq!(link.counters().resets(), 2);
        // However short.
        link.cut();
        link.heal();
        assert!(timeout(LONG, ask(&mut last, 4)).await.unwrap().is_err());
    }

    #[tokio::test]
    async fn what_hangs_goes_on_when_healed() {
        let link = Link::new(doubler().await).await.unwrap();
        let mut old = connected(&link).await;
        ask(&mut old, 1).await.unwrap();
        link.hang();
        old.write_all(&[2]).await.unwrap();
        let mut new = connected(&link).await;
        new.write_all(&[3]).await.unwrap();
        let mut answer = [0; 2];
        assert!(timeout(SOON, old.read_exact(&mut answer)).await.is_err());
        assert!(timeout(SOON, new.read_exact(&mut answer)).await.is_err());
        link.heal();
        timeout(LONG, old.read_exact(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(answer, [2, 2]);
        timeout(LONG, new.read_exact(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(answer, [3, 3]);
    }

    #[tokio::test]
    async fn loses_answers_once() {
        let link = Link::new(doubler().await).await.unwrap();
        let mut client = connected(&link).await;
        ask(&mut client, 1).await.unwrap();
        let before = link.counters().up();
        link.lose_answers();
        assert!(timeout(LONG, ask(&mut client, 2)).await.unwrap().is_err());
        assert_eq!(link.counters().up(), before + 1, "it did arrive");
        let mut next = connected(&link).await;
        assert!(timeout(LONG, ask(&mut next, 3)).await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn a_narrow_one_is_shared() {
        let link = Link::new(doubler().await).await.unwrap();
        link.narrow(1_000);
        let start = Instant::now();
        let (mut one, mut two) = (connected(&link).await, connected(&link).await);
        for client in [&mut one, &mut two] {
            client.write_all(&[7; 50]).await.unwrap();
        }
        let mut answers = [0; 100];
        one.read_exact(&mut answers).await.unwrap();
        two.read_exact(&mut answers).await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(200));
    }

    #[tokio::test]
    async fn slow_is_slow() {
        let link = Link::new(doubler().await).await.unwrap();
        let latency = Duration::from_millis(40);
        link.slow(1_000, latency);
        let mut client = connected(&link).await;
        let start = Instant::now();
        ask(&mut client, 1).await.unwrap();
        assert!(start.elapsed() >= 2 * latency);
        let start = Instant::now();
        client.write_all(&[7; 50]).await.unwrap();
        let mut answers = [0; 100];
        client.read_exact(&mut answers).await.unwrap();
        assert!(start.elapsed() >= 2 * latency + Duration::from_millis(100));
    }
}

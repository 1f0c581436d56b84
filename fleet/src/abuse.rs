//! What somebody hostile does to a coordinator's doors: each abuse as one stroke that ends, so that tests and benchmarks can give
//! as many as they want, beside honest traffic.
//!
//! The enemy has what enemies can have: a network, a device of the fleet that was stolen, and a subscriber's password. It comes from
//! an address of its own.

mod http;
mod mqtt;
mod odd;
mod packets;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::{ClientConfig, pki_types::ServerName};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{api::Api, process::Program, site::Site};

/// The address that the enemy comes from: not that of honest devices, and of this machine all the same.
const FROM: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);
/// An answer, or the end of a connection, that is due at once.
const SOON: Duration = Duration::from_secs(20);

/// One stroke of an abuse.
type Stroke =
    for<'a> fn(&'a Enemy) -> Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send + 'a>>;

/// An abuse.
#[derive(Clone, Copy)]
pub struct Abuse {
    /// What it is.
    pub name: &'static str,
    /// The counter that moves, as it stands in the metrics; none where nothing of it is refused.
    pub counter: Option<&'static str>,
    /// What the coordinator's log says about it; none where nobody has to be told.
    pub log: Option<&'static str>,
    stroke: Stroke,
}

impl std::fmt::Debug for Abuse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl Abuse {
    /// One stroke.
    ///
    /// # Errors
    /// If the enemy could not even do it; what the coordinator says to it is no error.
    pub async fn strike(&self, enemy: &Enemy) -> anyhow::Result<()> {
        (self.stroke)(enemy)
            .await
            .with_context(|| format!("the abuse {:?}", self.name))
    }
}

/// All of them.
#[must_use]
pub fn all() -> Vec<Abuse> {
    [&mqtt::ALL[..], &odd::ALL, &http::ALL].concat()
}

/// Open files of the enemy, and of the coordinator, which inherits the limit: some thousand connections at a time.
const FILES: u64 = 8_192;

/// Lets this process, and those that it starts from now on, have as many files open as the abuses take.
///
/// # Errors
/// If the system allows fewer.
pub fn make_room() -> anyhow::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|now| now >= FILES) {
        return Ok(());
    }
    let raised = Rlimit {
        current: Some(FILES),
        ..limit
    };
    setrlimit(Resource::Nofile, raised)
        .with_context(|| format!("the abuses take {FILES} open files; raise the limit (ulimit -n)"))
}

/// Whom the abuses come from.
#[derive(Debug)]
pub struct Enemy {
    /// The coordinator's doors.
    pub http: SocketAddr,
    /// See `http`.
    pub mqtt: SocketAddr,
    /// Without a certificate.
    pub nobody: Arc<ClientConfig>,
    /// With that of a device.
    pub device: Arc<ClientConfig>,
    /// The device's site and name.
    pub name: (String, String),
    /// A subscriber's name and password.
    pub login: (String, String),
}

impl Enemy {
    /// The enemy of a site: a device of it that was stolen, and a listener's password that was found.
    ///
    /// # Errors
    /// If the site does not let that device in to begin with.
    pub async fn of(site: &Site, program: &Program) -> anyhow::Result<Self> {
        let (api, way) = (Api::of(site)?, site.way().clone());
        let (dir, program, mqtt) = (site.data().join("../evil"), program.clone(), site.mqtt());
        let http = site.http();
        tokio::task::spawn_blocking(move || {
            let name = ("demo".to_owned(), "evil".to_owned());
            let token = api.post(
                "/enrolment-tokens",
                &json!({"site": name.0, "device": name.1}),
            )?;
            let token = token["token"].as_str().context("there is no token")?;
            std::fs::create_dir_all(&dir)?;
            let config = dir.join("agent.toml");
            let data = dir.join("data");
            let text = format!(
                "device = {:?}\ndata = {data:?}\n[coordinator]\ntoken = {token:?}\n",
                name.1
            );
            std::fs::write(&config, text)?;
            let done = std::process::Command::new(&program.0)
                .args(["edge-agent", "enrol", "--config"])
                .arg(&config)
                .output()?;
            let said = String::from_utf8_lossy(&done.stdout);
            anyhow::ensure!(done.status.success(), "enrolling: {said}");
            let listener = "overheard".to_owned();
            let password = api.post("/subscribers", &json!({"name": listener}))?;
            let password = password["password"]
                .as_str()
                .context("there is no password")?;
            Ok(Self {
                http,
                mqtt,
                nobody: way.config(None)?,
                device: way.config(Some(&data.join("identity")))?,
                name,
                login: (listener, password.to_owned()),
            })
        })
        .await?
    }

    async fn tcp(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((FROM, 0).into())?;
        let stream = socket.connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn tls(
        &self,
        to: SocketAddr,
        who: &Arc<ClientConfig>,
    ) -> io::Result<TlsStream<TcpStream>> {
        let stream = self.tcp(to).await?;
        let connect = TlsConnector::from(who.clone()).connect(ServerName::from(to.ip()), stream);
        timeout(SOON, connect).await?
    }
}

/// Writes as much as is taken; a door that is shut in the middle of it is what the enemy expects.
async fn shove(stream: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8]) -> bool {
    let write = async {
        stream.write_all(bytes).await?;
        stream.flush().await
    };
    matches!(timeout(SOON, write).await, Ok(Ok(())))
}

/// Reads to the end of the connection, or for as long; what was said, at most 64 KiB of it.
async fn hear(stream: &mut (impl AsyncReadExt + Unpin), bound: Duration) -> Vec<u8> {
    const MOST: usize = 64 * 1024;
    let mut heard = Vec::new();
    let mut chunk = [0; 4_096];
    let until = tokio::time::Instant::now() + bound;
    while let Ok(Ok(read)) = tokio::time::timeout_at(until, stream.read(&mut chunk)).await {
        if read == 0 {
            break;
        }
        let room = MOST - heard.len();
        heard.extend(chunk.iter().take(read.min(room)));
    }
    heard
}

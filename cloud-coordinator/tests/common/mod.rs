//! What the tests share: a coordinator, clients, a mosquitto, and a plain HTTP request.

pub mod images;
pub mod site;

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{LazyLock, Mutex},
    time::Duration,
};

use cloud_coordinator::{Config, Coordinator, Handle, config::BrokerUrl};
use mesh_core::{Ack, Gap, GapReason, Reading, VERSION};
use rumqttc::{AsyncClient, Event, Incoming, LastWill, MqttOptions, PublishOptions, QoS};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};

/// No single step of a test takes longer, also on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// The same where the coordinator has to train or to try a model.
pub const WORK: Duration = Duration::from_secs(120);

pub fn config(data: &Path) -> Config {
    let mut config = Config {
        data: data.to_owned(),
        http: ([127, 0, 0, 1], 0).into(),
        ..Config::default()
    };
    config.broker.listen = ([127, 0, 0, 1], 0).into();
    config.tls.enabled = false;
    config
}

pub async fn start(data: &Path) -> Handle {
    start_as(config(data)).await
}

/// Starts a coordinator; requests to it show the token that it made for commands on its machine.
pub async fn start_as(config: Config) -> Handle {
    let file = config.data.join("trust/operator.token");
    let handle = Coordinator::start(config).await.unwrap();
    let token = std::fs::read_to_string(file).unwrap();
    let mut tokens = TOKENS.lock().unwrap_or_else(|e| e.into_inner());
    tokens.insert(handle.http, token);
    handle
}

static TOKENS: LazyLock<Mutex<HashMap<SocketAddr, String>>> = LazyLock::new(Mutex::default);

/// The header that shows who asks, an admin.
pub fn shown(http: SocketAddr) -> String {
    let tokens = TOKENS.lock().unwrap_or_else(|e| e.into_inner());
    let token = tokens.get(&http);
    token.map_or_else(String::new, |token| {
        format!("authorization: Bearer {token}\r\n")
    })
}

/// A mosquitto of our own, ended with the test.
pub struct Mosquitto {
    child: Child,
    pub address: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Mosquitto {
    pub async fn start() -> Self {
        // A port that was free a moment ago; somebody may take it, so try a few.
        for _ in 0..5 {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = free.local_addr().unwrap();
            drop(free);
            if let Some(started) = Self::start_on(address).await {
                return started;
            }
        }
        panic!("mosquitto does not start");
    }

    pub async fn start_on(address: SocketAddr) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("mosquitto.conf");
        let port = address.port();
        let text = format!("listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n");
        std::fs::write(&file, text).unwrap();
        let program = ["/usr/sbin/mosquitto", "/usr/bin/mosquitto"];
        let program = program.into_iter().find(|p| Path::new(p).exists());
        let child = Command::new(program.unwrap_or("mosquitto"))
            .arg("-c")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut started = Self {
            child,
            address,
            _dir: dir,
        };
        for _ in 0..200 {
            if started.child.try_wait().unwrap().is_some() {
                return None;
            }
            let second = Duration::from_secs(1);
            if let Ok(Ok(_)) = timeout(second, TcpStream::connect(address)).await {
                return Some(started);
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        None
    }
}

impl Mosquitto {
    /// Stops its process, which stays connected; or lets it go on.
    pub fn stands_still(&self, stands: bool) {
        let id = i32::try_from(self.child.id()).unwrap();
        let id = rustix::process::Pid::from_raw(id).unwrap();
        let signal = if stands {
            rustix::process::Signal::STOP
        } else {
            rustix::process::Signal::CONT
        };
        rustix::process::kill_process(id, signal).unwrap();
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub async fn start_with(mosquitto: &Mosquitto, data: &Path) -> Handle {
    let mut config = config(data);
    config.broker.url = Some(BrokerUrl {
        host: "127.0.0.1".into(),
        port: mosquitto.address.port(),
        tls: false,
    });
    let handle = start_as(config).await;
    ready(handle.http).await;
    handle
}

/// An MQTT client whose messages are gathered.
pub struct Client {
    pub client: AsyncClient,
    messages: mpsc::UnboundedReceiver<(String, Vec<u8>)>,
    granted: mpsc::UnboundedReceiver<bool>,
    /// Ends when the connection does.
    pub ended: tokio::task::JoinHandle<()>,
}

impl Client {
    pub async fn connect(broker: SocketAddr, id: &str) -> Self {
        Self::try_connect(broker, id, None).await.unwrap()
    }

    pub async fn try_connect(
        broker: SocketAddr,
        id: &str,
        will: Option<LastWill>,
    ) -> Result<Self, String> {
        let mut options = MqttOptions::new(id, (broker.ip().to_string(), broker.port()));
        options.set_max_packet_size(2 << 20, 2 << 20);
        if let Some(will) = will {
            options.set_last_will(will);
        }
        Self::with(options).await
    }

    pub async fn with(options: MqttOptions) -> Result<Self, String> {
        let (client, mut events) = AsyncClient::builder(options).capacity(1_000).build();
        match timeout(PATIENCE, events.poll()).await.unwrap() {
            Ok(Event::Incoming(Incoming::ConnAck(_))) => {}
            other => return Err(format!("{other:?}")),
        }
        let (message, messages) = mpsc::unbounded_channel();
        let (grant, granted) = mpsc::unbounded_channel();
        let ended = tokio::spawn(async move {
            while let Ok(event) = events.poll().await {
                match event {
                    Event::Incoming(Incoming::Publish(publish)) => {
                        let topic = String::from_utf8(publish.topic.to_vec()).unwrap();
                        let _ = message.send((topic, publish.payload.to_vec()));
                    }
                    Event::Incoming(Incoming::SubAck(answer)) => {
                        let no = rumqttc::SubscribeReasonCode::Failure;
                        let _ = grant.send(!answer.return_codes.contains(&no));
                    }
                    _ => {}
                }
            }
        });
        Ok(Self {
            client,
            messages,
            granted,
            ended,
        })
    }

    /// Subscribes; says whether it was granted.
    pub async fn subscribe(&mut self, filter: &str) -> bool {
        self.client
            .subscribe(filter, QoS::AtLeastOnce)
            .await
            .unwrap();
        timeout(PATIENCE, self.granted.recv())
            .await
            .unwrap()
            .unwrap_or(false)
    }

    pub async fn publish(&self, topic: &str, payload: impl Into<Vec<u8>>) {
        self.publish_as(topic, payload, false).await;
    }

    pub async fn publish_as(&self, topic: &str, payload: impl Into<Vec<u8>>, retain: bool) {
        let options = PublishOptions::at_least_once().retain(retain);
        self.client
            .publish(topic, payload.into(), options)
            .await
            .unwrap();
    }

    /// The next message.
    pub async fn next(&mut self) -> (String, Vec<u8>) {
        timeout(PATIENCE, self.messages.recv())
            .await
            .unwrap()
            .unwrap()
    }

    /// Waits for an acknowledgement of everything up to `upto`.
    pub async fn acknowledged(&mut self, epoch: u64, upto: u64) -> Ack {
        loop {
            let (topic, bytes) = self.next().await;
            if topic.ends_with("/ack") {
                let ack = Ack::decode(&bytes).unwrap();
                if ack.epoch == epoch && ack.upto >= upto {
                    return ack;
                }
            }
        }
    }
}

/// A device `demo/<name>` that listens for its acknowledgements.
pub async fn device(broker: SocketAddr, name: &str) -> Client {
    let mut client = Client::connect(broker, &format!("demo/{name}")).await;
    assert!(client.subscribe(&topic(name, "_", "ack")).await);
    client
}

pub fn topic(device: &str, source: &str, kind: &str) -> String {
    format!("lacewing/v1/demo/{device}/{source}/{kind}")
}

pub fn reading(device: &str, epoch: u64, seq: u64) -> Reading {
    Reading {
        v: VERSION,
        device: device.parse().unwrap(),
        source: "cam0".parse().unwrap(),
        epoch,
        seq,
        ts: 1_700_000_000_000 + seq.cast_signed(),
        frame: seq,
        label: if seq.is_multiple_of(3) { "hole" } else { "ok" }.into(),
        score: 0.875,
        margin: 0.5,
        model: "m@1".into(),
        latency_ms: 1.5,
        by: None,
        file: None,
        truth: Some("ok".into()),
    }
}

pub fn encoded(device: &str, epoch: u64, seq: u64) -> Vec<u8> {
    reading(device, epoch, seq).encode().unwrap()
}

pub fn batch(device: &str, epoch: u64, seqs: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let readings: Vec<_> = seqs
        .into_iter()
        .map(|s| encoded(device, epoch, s))
        .collect();
    let views: Vec<&[u8]> = readings.iter().map(Vec::as_slice).collect();
    let (bytes, taken) = mesh_core::replay_bytes(&views);
    assert_eq!(taken, views.len());
    bytes
}

pub fn gap(device: &str, epoch: u64, from: u64, to: u64) -> Vec<u8> {
    Gap {
        v: VERSION,
        device: device.parse().unwrap(),
        epoch,
        from,
        to,
        reason: GapReason::Full,
    }
    .encode()
    .unwrap()
}

/// A request of an admin with a body; status, headers in lower case, body.
pub async fn request(http: SocketAddr, text: &str) -> (u16, String, String) {
    let (line, rest) = text.split_once("\r\n").unwrap();
    request_of_nobody(http, &format!("{line}\r\n{}{rest}", shown(http))).await
}

/// The same, with nothing added to it.
pub async fn request_of_nobody(http: SocketAddr, text: &str) -> (u16, String, String) {
    let stream = timeout(PATIENCE, TcpStream::connect(http)).await.unwrap();
    let mut stream = stream.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head[9..12].parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}

pub async fn get(http: SocketAddr, path: &str) -> (u16, Value) {
    let text = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let (status, head, body) = request(http, &text).await;
    let body = if head.contains("json") {
        serde_json::from_str(&body).unwrap()
    } else {
        Value::String(body)
    };
    (status, body)
}

/// One exchange of an admin; status, head in lower case, body.
pub async fn send(
    http: SocketAddr,
    line: &str,
    headers: &str,
    body: &[u8],
) -> (u16, String, Vec<u8>) {
    send_as(http, line, &format!("{}{headers}", shown(http)), body).await
}

/// The same, with these headers and no others.
pub async fn send_as(
    http: SocketAddr,
    line: &str,
    headers: &str,
    body: &[u8],
) -> (u16, String, Vec<u8>) {
    let mut stream = TcpStream::connect(http).await.unwrap();
    let head = format!(
        "{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // A body that is too long is not read.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = timeout(WORK, stream.read_to_end(&mut answer))
        .await
        .unwrap();
    let at = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(answer[..at].to_vec()).unwrap();
    let mut body = answer[at + 4..].to_vec();
    if head.to_lowercase().contains("transfer-encoding: chunked") {
        body = unchunked(&body);
    }
    (head[9..12].parse().unwrap(), head.to_lowercase(), body)
}

fn unchunked(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let at = rest.windows(2).position(|w| w == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..at]).unwrap(), 16).unwrap();
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&rest[at + 2..at + 2 + size]);
        rest = &rest[at + 4 + size..];
    }
}

/// Says something in JSON.
pub async fn say(http: SocketAddr, line: &str, body: Value) -> (u16, Value) {
    let kind = "content-type: application/json\r\n";
    let (status, _, body) = send(http, line, kind, body.to_string().as_bytes()).await;
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// A request without a body, such as `DELETE /api/v1/…`.
pub async fn ask(http: SocketAddr, line: &str) -> (u16, Value) {
    let (status, _, body) = send(http, line, "", b"").await;
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// Sends what is no JSON; the answer as JSON, or else as text.
pub async fn bring(http: SocketAddr, line: &str, kind: &str, body: &[u8]) -> (u16, Value) {
    let kind = format!("content-type: {kind}\r\n");
    let (status, _, body) = send(http, line, &kind, body).await;
    let text = || Value::String(String::from_utf8_lossy(&body).into_owned());
    (
        status,
        serde_json::from_slice(&body).unwrap_or_else(|_| text()),
    )
}

/// The value of a metric, 0 if it is not there yet.
pub async fn metric(http: SocketAddr, name: &str) -> f64 {
    let (_, text) = get(http, "/metrics").await;
    let text = text.as_str().unwrap();
    let line = text
        .lines()
        .find(|l| l.rsplit_once(' ').is_some_and(|(n, _)| n == name));
    line.map_or(0.0, |l| l.rsplit_once(' ').unwrap().1.parse().unwrap())
}

/// Waits until a metric has at least this value.
pub async fn metric_reaches(http: SocketAddr, name: &str, value: f64) {
    let reached = async {
        while metric(http, name).await < value {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, reached)
        .await
        .unwrap_or_else(|_| panic!("{name} does not reach {value}"));
}

/// Waits until a metric has at most this value.
pub async fn metric_falls(http: SocketAddr, name: &str, value: f64) {
    let fallen = async {
        while metric(http, name).await > value {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, fallen)
        .await
        .unwrap_or_else(|_| panic!("{name} does not fall to {value}"));
}

pub async fn ready(http: SocketAddr) {
    let ready = async {
        while get(http, "/readyz").await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, ready).await.unwrap();
}

/// All readings of all pages.
pub async fn all_readings(http: SocketAddr, query: &str, limit: usize) -> Vec<Value> {
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let path = format!("/api/v1/readings?limit={limit}{query}{after}");
        let (status, page) = get(http, &path).await;
        assert_eq!(status, 200, "{page}");
        all.extend(page["items"].as_array().unwrap().iter().cloned());
        match page["next"].as_i64() {
            Some(next) => after = format!("&after={next}"),
            None => return all,
        }
    }
}

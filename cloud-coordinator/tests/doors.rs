//! The same rights on our own broker and on a mosquitto with the rules that the coordinator writes: real connections, real
//! certificates and passwords, judged by what is delivered, against the oracle that knows neither of them.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;
#[path = "../src/broker/rights_oracle.rs"]
mod oracle;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use cloud_coordinator::config::{BrokerUrl, Product};
use common::{
    PATIENCE,
    site::{Badge, Site},
};
use oracle::{CAST, Dice, KINDS_OF_A_DEVICE, Whose};
use rumqttc::{
    Connect, ConnectAuth, ConnectReturnCode, LastWill, Packet, PingReq, Publish, QoS, Subscribe,
    SubscribeReasonCode, Unsubscribe, mqttbytes::Error as MqttError,
};
use rustls::{ClientConfig, pki_types::ServerName};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// Bytes to and from a broker.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// One connection, packet by packet: it says also what no client library would.
struct Wire {
    stream: Box<dyn Stream>,
    input: BytesMut,
}

type Gone = String;

impl Wire {
    async fn packet(&mut self) -> Result<Packet, Gone> {
        let read = async {
            loop {
                match Packet::read(&mut self.input, 1 << 20) {
                    Ok(packet) => return Ok(packet),
                    Err(MqttError::InsufficientBytes(_)) => {}
                    Err(error) => return Err(error.to_string()),
                }
                match self.stream.read_buf(&mut self.input).await {
                    Ok(0) => return Err("closed".into()),
                    Ok(_) => {}
                    Err(error) => return Err(error.to_string()),
                }
            }
        };
        timeout(PATIENCE, read)
            .await
            .unwrap_or_else(|_| panic!("the broker says nothing"))
    }

    async fn say(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        let write = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        write.await.map_err(|e: std::io::Error| e.to_string())
    }
}

/// How one of the cast comes in.
#[derive(Clone)]
struct Door {
    address: SocketAddr,
    /// Nothing is plain text.
    tls: Option<Arc<ClientConfig>>,
    login: Option<(String, String)>,
}

impl Door {
    async fn enter(&self, will: Option<LastWill>) -> Result<Wire, Gone> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(stream),
            Some(tls) => {
                let name = ServerName::from(self.address.ip());
                let connector = tokio_rustls::TlsConnector::from(tls.clone());
                let stream = timeout(PATIENCE, connector.connect(name, stream)).await;
                Box::new(stream.unwrap().map_err(|e| e.to_string())?)
            }
        };
        let mut wire = Wire {
            stream,
            input: BytesMut::new(),
        };
        let mut connect = Connect::new("");
        connect.clean_session = true;
        connect.keep_alive = 600;
        connect.last_will = will;
        if let Some((name, password)) = &self.login {
            connect.auth = ConnectAuth::UsernamePassword {
                username: name.clone(),
                password: Bytes::from(password.clone()),
            };
        }
        let mut out = BytesMut::new();
        connect.write(&mut out).unwrap();
        wire.say(&out).await?;
        match wire.packet().await? {
            Packet::ConnAck(answer) if answer.code == ConnectReturnCode::Success => Ok(wire),
            other => Err(format!("{other:?}")),
        }
    }
}

/// A broker under test, and everybody's way in.
struct Stage {
    site: Site,
    doors: Vec<Door>,
    /// Who sees everything that is delivered.
    observer: Door,
    /// May publish anything, where there is somebody like that.
    trusted: Option<Door>,
    mosquitto: Option<tokio::process::Child>,
}

const PASSWORD: &str = "a password of the test";

/// Devices and subscribers of the cast, at a coordinator.
async fn cast(site: &Site, devices: SocketAddr, listeners: SocketAddr) -> Vec<Door> {
    let mut doors = Vec::new();
    for (n, whose) in CAST.into_iter().enumerate() {
        doors.push(match whose {
            Whose::Device(at, device) => {
                let badge: Badge = site.enrol_at(at, device).await;
                Door {
                    address: devices,
                    tls: Some(site.tls(Some(&badge))),
                    login: None,
                }
            }
            Whose::Sites(_) | Whose::Everywhere => {
                let sites = match whose {
                    Whose::Sites(sites) => json!(sites),
                    _ => json!(null),
                };
                let name = format!("s{n}");
                let asked = json!({"name": name, "sites": sites, "password": PASSWORD});
                let (status, said) = site.ask("POST /api/v1/subscribers", Some(asked)).await;
                assert_eq!(status, 201, "{said}");
                Door {
                    address: listeners,
                    tls: Some(site.tls(None)),
                    login: Some((name, PASSWORD.into())),
                }
            }
        });
    }
    doors
}

async fn embedded() -> Stage {
    let site = Site::start_with(tempfile::tempdir().unwrap(), |_| {}).await;
    let doors = cast(&site, site.mqtt(), site.mqtt()).await;
    let asked = json!({"name": "observer", "password": PASSWORD});
    assert_eq!(
        site.ask("POST /api/v1/subscribers", Some(asked)).await.0,
        201
    );
    let observer = Door {
        login: Some(("observer".into(), PASSWORD.into())),
        ..doors[7].clone()
    };
    Stage {
        site,
        doors,
        observer,
        trusted: None,
        mosquitto: None,
    }
}

/// Three ports in a row that the kernel does not hand out by itself.
fn ports() -> u16 {
    let random = u64::from_ne_bytes(*uuid().first_chunk().unwrap());
    for n in 0..1_000 {
        let port = 15_000 + u16::try_from((random.wrapping_add(n * 7_919)) % 15_000).unwrap();
        let free = |port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
        if (port..port + 3).all(free) {
            return port;
        }
    }
    panic!("no ports are free");
}

fn uuid() -> [u8; 16] {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    bytes
}

fn run(program: &str, arguments: &[&std::ffi::OsStr]) {
    let output = std::process::Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {said}");
}

async fn listens(address: SocketAddr) {
    let up = async {
        while TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, up).await.unwrap();
}

fn mosquitto_conf(dir: &Path, rules: &Path, trusted: u16) -> std::path::PathBuf {
    let conf = dir.join("mosquitto.conf");
    let text = format!(
        "user root\npid_file {}\npersistence false\nmax_queued_messages 0\ninclude_dir {}\n\
         listener {trusted} 127.0.0.1\nallow_anonymous true\n",
        dir.join("pid").display(),
        rules.display()
    );
    std::fs::write(&conf, text).unwrap();
    conf
}

/// A mosquitto as an operator sets it up: the command writes the rules, the coordinator keeps them up to date.
async fn mosquitto() -> Stage {
    let dir = tempfile::tempdir().unwrap();
    let port = ports();
    let rules = dir.path().join("rules");
    let url = format!("mqtts://127.0.0.1:{port}");
    run(
        env!("CARGO_BIN_EXE_cloud-coordinator"),
        &[
            "broker".as_ref(),
            "rules".as_ref(),
            "--data".as_ref(),
            dir.path().as_os_str(),
            "--broker".as_ref(),
            url.as_ref(),
            "--for".as_ref(),
            "mosquitto".as_ref(),
            "--to".as_ref(),
            rules.as_os_str(),
        ],
    );
    for (n, whose) in CAST.into_iter().enumerate() {
        if !matches!(whose, Whose::Device(..)) {
            let file = rules.join("passwords");
            let name = format!("s{n}");
            run(
                "mosquitto_passwd",
                &[
                    "-b".as_ref(),
                    file.as_os_str(),
                    name.as_ref(),
                    PASSWORD.as_ref(),
                ],
            );
        }
    }
    let conf = mosquitto_conf(dir.path(), &rules, port + 2);
    let program = ["/usr/sbin/mosquitto", "/usr/bin/mosquitto"];
    let program = program.into_iter().find(|p| Path::new(p).exists());
    let missing = || panic!("mosquitto is not installed (Debian: apt-get install mosquitto)");
    let program = program.unwrap_or_else(missing);
    let child = tokio::process::Command::new(program)
        .arg("-c")
        .arg(conf)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let at = |more| SocketAddr::from(([127, 0, 0, 1], port + more));
    listens(at(0)).await;
    let pid = child.id().unwrap().to_string();
    let site = Site::start_with(dir, |config| {
        config.broker.url = Some(BrokerUrl {
            host: "127.0.0.1".into(),
            port,
            tls: true,
        });
        let external = &mut config.broker.external;
        external.rules_for = Some(Product::Mosquitto);
        external.rules = Some(rules);
        external.reload = ["kill", "-HUP", &pid].map(String::from).into();
    })
    .await;
    let ready = async {
        while site.ask("GET /readyz", None).await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, ready).await.unwrap();
    let doors = cast(&site, at(0), at(1)).await;
    let trusted = Door {
        address: at(2),
        tls: None,
        login: None,
    };
    // The subscribers count as soon as mosquitto has read who they are; the last one was added last.
    let ready = "lacewing/ready";
    let mut wire = trusted.enter(None).await.unwrap();
    wire.say(&retained(ready, ready)).await.unwrap();
    wire.packet().await.unwrap();
    let known = async {
        loop {
            if let Ok(mut listener) = doors[7].enter(None).await {
                let (_, came) = subscribed(&mut listener, ready, 0).await.unwrap();
                if came.contains(ready) {
                    break;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, known).await.unwrap();
    wire.say(&retained(ready, "")).await.unwrap();
    wire.packet().await.unwrap();
    Stage {
        site,
        doors,
        observer: trusted.clone(),
        trusted: Some(trusted),
        mosquitto: Some(child),
    }
}

/// Everything that the observer sees, until it has seen a word.
struct Seen {
    payloads: Arc<Mutex<HashSet<String>>>,
    _task: tokio::task::JoinHandle<()>,
}

impl Seen {
    async fn of(stage: &Stage) -> Self {
        let mut wire = stage.observer.enter(None).await.unwrap();
        let mut out = BytesMut::new();
        let filters: &[&str] = match stage.trusted {
            Some(_) => &["#"],
            None => &["lacewing/#", "homeassistant/#"],
        };
        for (n, filter) in filters.iter().enumerate() {
            let mut subscribe = Subscribe::new(*filter, QoS::AtMostOnce);
            subscribe.pkid = n as u16 + 1;
            subscribe.write(&mut out).unwrap();
        }
        wire.say(&out).await.unwrap();
        for _ in filters {
            let Packet::SubAck(answer) = wire.packet().await.unwrap() else {
                panic!("no answer to SUBSCRIBE")
            };
            assert!(!answer.return_codes.contains(&SubscribeReasonCode::Failure));
        }
        let payloads: Arc<Mutex<HashSet<String>>> = Arc::default();
        let into = payloads.clone();
        let task = tokio::spawn(async move {
            loop {
                // It may be quiet for longer than a test is patient.
                match Packet::read(&mut wire.input, 1 << 20) {
                    Ok(Packet::Publish(publish)) => {
                        let text = String::from_utf8_lossy(&publish.payload).into_owned();
                        into.lock().unwrap().insert(text);
                    }
                    Ok(_) => {}
                    Err(_) => match wire.stream.read_buf(&mut wire.input).await {
                        Ok(0) | Err(_) => return,
                        Ok(_) => {}
                    },
                }
            }
        });
        Self {
            payloads,
            _task: task,
        }
    }

    /// All that was delivered before this word, which a device says now.
    async fn until(&self, stage: &Stage, word: &str) -> HashSet<String> {
        let mut wire = stage.doors[0].enter(None).await.unwrap();
        wire.say(&publish("lacewing/v1/demo/d1/_/metrics", word, 1))
            .await
            .unwrap();
        let heard = async {
            while !self.payloads.lock().unwrap().contains(word) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, heard).await.unwrap();
        self.payloads.lock().unwrap().clone()
    }
}

/// PUBLISH at QoS 1 (MQTT 3.1.1, section 3.3), byte by byte: the library refuses to write what a broker has to refuse.
fn publish(topic: &str, payload: &str, id: u16) -> BytesMut {
    let mut length = 2 + topic.len() + 2 + payload.len();
    let mut out = BytesMut::from(&[0x32][..]);
    loop {
        let more = if length > 0x7f { 0x80 } else { 0 };
        out.put_u8((length & 0x7f) as u8 | more);
        length >>= 7;
        if length == 0 {
            break;
        }
    }
    out.put_u16(u16::try_from(topic.len()).unwrap());
    out.put_slice(topic.as_bytes());
    out.put_u16(id);
    out.put_slice(payload.as_bytes());
    out
}

fn retained(topic: &str, payload: &str) -> BytesMut {
    let mut kept = Publish::from_bytes(
        topic,
        QoS::AtLeastOnce,
        Bytes::copy_from_slice(payload.as_bytes()),
    );
    (kept.retain, kept.pkid) = (true, 1);
    let mut out = BytesMut::new();
    kept.write(&mut out).unwrap();
    out
}

/// What a broker cannot tell apart: a source that is no name. It stays within the device's own topics, and the coordinator
/// refuses it.
fn only_the_source_is_no_name(whose: Whose, topic: &str) -> bool {
    let Whose::Device(site, device) = whose else {
        return false;
    };
    let levels: Vec<&str> = topic.split('/').collect();
    let [a, b, c, d, source, kind] = levels[..] else {
        return false;
    };
    [a, b, c, d] == ["lacewing", "v1", site, device]
        && KINDS_OF_A_DEVICE.contains(&kind)
        && !source.contains(['+', '#'])
}

/// Where the coordinator keeps the roster of a site.
fn roster(site: &str) -> String {
    format!("lacewing/v1/{site}/_/_/roster")
}

/// Is the topic below what this one may read?
fn readable(whose: Whose, topic: &str) -> bool {
    let below = |beginning: String| topic.starts_with(&beginning);
    match whose {
        Whose::Device(site, device) => {
            below(format!("lacewing/v1/{site}/{device}/")) || topic == roster(site)
        }
        Whose::Sites(sites) => sites.iter().any(|s| below(format!("lacewing/v1/{s}/"))),
        // A root alone is a first level, too.
        Whose::Everywhere => {
            ["lacewing", "homeassistant"].contains(&topic.split('/').next().unwrap())
        }
    }
}

/// MQTT 3.1.1, section 4.7, level by level.
fn matches(filter: &[&str], topic: &[&str]) -> bool {
    match (filter, topic) {
        (["#"], _) | ([], []) => true,
        ([f, rest @ ..], [t, more @ ..]) if *f == "+" || f == t => matches(rest, more),
        // "a/#" is also "a".
        ([f, "#"], [t]) => f == t || *f == "+",
        _ => false,
    }
}

/// Is it a filter at all? What is none ends the connection on some brokers.
fn is_filter(filter: &str) -> bool {
    let levels: Vec<&str> = filter.split('/').collect();
    let last = levels.len() - 1;
    !filter.is_empty()
        && levels.iter().enumerate().all(|(n, level)| match *level {
            "+" => true,
            "#" => n == last,
            level => !level.contains(['+', '#']),
        })
}

/// Messages of each kind of action; as many as `LACEWING_DOORS_CASES` says, from the seed `LACEWING_DOORS_SEED`.
fn cases() -> (usize, u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|t| t.parse::<u64>().ok());
    let cases = number("LACEWING_DOORS_CASES").unwrap_or(1_500) as usize;
    let seed = number("LACEWING_DOORS_SEED")
        .unwrap_or_else(|| u64::from_ne_bytes(*uuid().first_chunk().unwrap()) | 1);
    println!(
        "seed {seed}, {cases} publishes and subscriptions each, {} wills",
        cases / 8
    );
    (cases, seed)
}

async fn agrees(stage: &Stage) {
    let (cases, seed) = cases();
    let mut dice = Dice(seed);
    let strict = stage.trusted.is_none();
    let (mut allowed, mut refused, mut wider, mut heard) = ([0; 3], [0; 3], 0, 0);

    // Publishing: everybody says everything, and one looks what comes out.
    let seen = Seen::of(stage).await;
    let mut said: Vec<(String, Whose, String, bool)> = Vec::new();
    let mut by_whom: HashMap<usize, Vec<(String, String)>> = HashMap::new();
    let own: Vec<HashSet<String>> = CAST.iter().map(|w| w.publishes()).collect();
    for n in 0..cases {
        let who = dice.below(CAST.len());
        let topic = dice.topic(CAST[who]);
        let word = format!("publish {n}");
        by_whom
            .entry(who)
            .or_default()
            .push((topic.clone(), word.clone()));
        let should = own[who].contains(&topic);
        said.push((word, CAST[who], topic, should));
    }
    for (who, all) in by_whom {
        let mut wire = stage.doors[who].enter(None).await.unwrap();
        for (n, (topic, word)) in all.iter().enumerate() {
            let id = u16::try_from(n % 60_000).unwrap() + 1;
            // What is no topic ends the connection; what is one is answered, allowed or not. Mosquitto 2.0.11 answers
            // and hangs up on who may not.
            let done = match wire.say(&publish(topic, word, id)).await {
                Ok(()) => wire.packet().await.map(|_| ()),
                gone => gone,
            };
            let may = own[who].contains(topic);
            if done.is_err() {
                let is_none = topic.contains(['+', '#']) || topic.is_empty();
                assert!(is_none || !(strict || may), "{topic:?}");
            }
            if done.is_err() || !(strict || may) {
                wire = stage.doors[who].enter(None).await.unwrap();
            }
        }
    }
    let delivered = seen.until(stage, "all is published").await;
    for (word, whose, topic, should) in &said {
        let is = delivered.contains(word);
        let wide = !strict && only_the_source_is_no_name(*whose, topic);
        assert_eq!(
            is,
            *should || wide,
            "seed {seed}: {whose:?} publishes on {topic:?}"
        );
        wider += usize::from(wide && !should);
        // Of a reading the coordinator hears in any case.
        heard += usize::from(wide && !should && topic.ends_with("/result"));
        if is { allowed[0] += 1 } else { refused[0] += 1 }
    }

    // Last wills: the connection breaks, and one looks what comes out.
    let mut said = Vec::new();
    for n in 0..cases / 8 {
        let who = dice.below(CAST.len());
        let whose = CAST[who];
        // Chance alone rarely hits the only one that is allowed.
        let own_will = whose.will().filter(|_| n % 8 == 0);
        let topic = own_will.unwrap_or_else(|| dice.topic(whose));
        let word = format!("will {n}");
        let will = LastWill::new(topic.clone(), word.clone(), QoS::AtLeastOnce, false);
        // Refused, or dropped at once.
        drop(stage.doors[who].enter(Some(will)).await);
        // Another broker knows one right for publishing and for wills.
        let should = match strict {
            true => whose.will().as_ref() == Some(&topic),
            false => own[who].contains(&topic) || only_the_source_is_no_name(whose, &topic),
        };
        said.push((word, whose, topic, should));
    }
    // A broker learns of a broken connection in its own time.
    let expected: HashSet<&String> = said.iter().filter(|s| s.3).map(|s| &s.0).collect();
    let arrived = async {
        while !expected
            .iter()
            .all(|word| seen.payloads.lock().unwrap().contains(*word))
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, arrived)
        .await
        .unwrap_or_else(|_| panic!("seed {seed}: a last will is missing"));
    let delivered = seen.until(stage, "all wills are out").await;
    for (word, whose, topic, should) in &said {
        let is = delivered.contains(word);
        assert_eq!(is, *should, "seed {seed}: {whose:?} leaves {topic:?}");
        if is { allowed[1] += 1 } else { refused[1] += 1 }
    }

    // Subscriptions: what is kept is there for whoever may have it.
    let probes = probes(stage).await;
    let mut wires = Vec::new();
    for door in &stage.doors {
        wires.push(door.enter(None).await.unwrap());
    }
    for n in 0..cases {
        let who = dice.below(CAST.len());
        let (whose, filter) = (CAST[who], dice.topic(CAST[who]));
        let granted = whose.subscribes(&filter);
        let levels: Vec<&str> = filter.split('/').collect();
        let expected: BTreeSet<&String> = probes
            .iter()
            .filter(|_| is_filter(&filter))
            .filter(|probe| matches(&levels, &probe.split('/').collect::<Vec<_>>()))
            .filter(|probe| readable(whose, probe) && (granted || !strict))
            .collect();
        let what = || format!("seed {seed}: {whose:?} subscribes to {filter:?}");
        match subscribed(&mut wires[who], &filter, expected.len()).await {
            Err(gone) => {
                assert!(!is_filter(&filter), "{}: {gone}", what());
                wires[who] = stage.doors[who].enter(None).await.unwrap();
                refused[2] += 1;
            }
            Ok((is, delivered)) => {
                if strict {
                    assert_eq!(is, granted, "{}", what());
                }
                let delivered: BTreeSet<&String> = delivered.iter().collect();
                assert_eq!(delivered, expected, "{}", what());
                if granted {
                    allowed[2] += 1
                } else {
                    refused[2] += 1
                }
            }
        }
        assert!(n > 0 || !probes.is_empty());
    }
    println!(
        "allowed {allowed:?}, refused {refused:?} (publish, will, subscribe); {wider} with a source that is no name; 0 differences"
    );
    let least = cases / 200;
    for (yes, no) in allowed.iter().zip(&refused) {
        assert!(*yes >= 1 && *no >= least, "both are tried");
    }
    // What only the coordinator can tell to be wrong, it does.
    if heard > 0 {
        let name = "lacewing_ingest_refused_total{reason=\"topic\"}";
        stage.site.metric_reaches(name, 1.0).await;
    }
}

/// Retained messages on topics of everybody, on both sides of every line.
async fn probes(stage: &Stage) -> Vec<String> {
    let mut topics = Vec::new();
    let devices = [
        ("demo", "d1"),
        ("demo", "d10"),
        ("east", "d1"),
        ("dem", "d"),
    ];
    for (site, device) in devices {
        for (source, kind) in [
            ("_", "status"),
            ("_", "info"),
            ("cam0", "result"),
            ("cam1", "result"),
            ("cam0", "drift"),
            ("d1", "state"),
        ] {
            topics.push((
                Some((site, device)),
                format!("lacewing/v1/{site}/{device}/{source}/{kind}"),
            ));
        }
    }
    if stage.trusted.is_some() {
        // What only the coordinator says, and what nobody ever should.
        for topic in [
            "lacewing/v1/demo/d1/_/ack",
            "lacewing/v1/demo/d10/_/desired",
            "lacewing/v1/v1/d1/_/status",
            "lacewing/v2/demo/d1/_/status",
            "lacewing/v1/demo/status",
            "lacewing",
            "homeassistant/device/d1/config",
            "demo/d1",
            "d1",
        ] {
            topics.push((None, topic.into()));
        }
    }
    let mut wires: HashMap<Option<(&str, &str)>, Wire> = HashMap::new();
    for (whose, topic) in &topics {
        let at = |(site, device)| {
            let is = |w: &Whose| matches!(w, Whose::Device(s, d) if (*s, *d) == (site, device));
            CAST.iter().position(is).unwrap()
        };
        let door = match (&stage.trusted, whose) {
            (Some(trusted), _) => trusted,
            (None, Some(whose)) => &stage.doors[at(*whose)],
            (None, None) => unreachable!(),
        };
        if !wires.contains_key(whose) {
            wires.insert(*whose, door.enter(None).await.unwrap());
        }
        let wire = wires.get_mut(whose).unwrap();
        wire.say(&retained(topic, topic)).await.unwrap();
        assert!(matches!(wire.packet().await, Ok(Packet::PubAck(_))));
    }
    let mut topics: Vec<String> = topics.into_iter().map(|(_, topic)| topic).collect();
    // The coordinator's own, as soon as it has said them.
    let mut wire = stage.observer.enter(None).await.unwrap();
    for (site, _) in devices {
        if !topics.contains(&roster(site)) {
            let (_, came) = subscribed(&mut wire, &roster(site), 1).await.unwrap();
            topics.extend(came);
        }
    }
    topics
}

/// Subscribes, waits for so many messages and for whatever else there is, and takes it back. Whether it was granted, and what
/// came.
async fn subscribed(
    wire: &mut Wire,
    filter: &str,
    expected: usize,
) -> Result<(bool, BTreeSet<String>), Gone> {
    let mut out = BytesMut::new();
    let mut subscribe = Subscribe::new(filter, QoS::AtMostOnce);
    subscribe.pkid = 1;
    subscribe.write(&mut out).unwrap();
    PingReq.write(&mut out).unwrap();
    wire.say(&out).await?;
    let (mut granted, mut pinged) = (None, false);
    let mut came = BTreeSet::new();
    while granted.is_none() || !pinged || came.len() < expected {
        match wire.packet().await? {
            Packet::SubAck(answer) => {
                granted = Some(!answer.return_codes.contains(&SubscribeReasonCode::Failure));
            }
            Packet::PingResp => pinged = true,
            Packet::Publish(publish) => {
                came.insert(String::from_utf8_lossy(&publish.topic).into_owned());
            }
            other => panic!("{other:?}"),
        }
    }
    let mut out = BytesMut::new();
    let mut unsubscribe = Unsubscribe::new(filter);
    unsubscribe.pkid = 2;
    unsubscribe.write(&mut out).unwrap();
    wire.say(&out).await?;
    loop {
        match wire.packet().await? {
            Packet::UnsubAck(_) => break,
            Packet::Publish(publish) => {
                came.insert(String::from_utf8_lossy(&publish.topic).into_owned());
            }
            other => panic!("{other:?}"),
        }
    }
    Ok((granted == Some(true), came))
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_on_our_own_broker() {
    let stage = embedded().await;
    agrees(&stage).await;
    stage.site.handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_on_mosquitto() {
    let mut stage = mosquitto().await;
    agrees(&stage).await;
    if let Some(child) = &mut stage.mosquitto {
        assert!(child.try_wait().unwrap().is_none(), "mosquitto has died");
    }
    stage.site.handle.stop().await;
}

/// A device that was revoked is off another broker, too: its session ends, none of its certificates opens a new one, also after
/// somebody else has its name; others notice nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_device_is_off_mosquitto() {
    /// What is promised from the revocation to the end of the session.
    const PROMISE: Duration = Duration::from_secs(60);
    let stage = mosquitto().await;
    let site = &stage.site;
    let address = stage.doors[0].address;
    let door = |badge: &Badge| Door {
        address,
        tls: Some(site.tls(Some(badge))),
        login: None,
    };
    let mut badge = site.enrol_at("demo", "thief").await;
    assert_eq!(badge.mqtt, format!("127.0.0.1:{}", address.port()));
    let first = door(&badge);
    let (status, said) = site.renew(&badge.key, "demo/thief").await;
    assert_eq!(status, 200, "{said}");
    badge.chain = common::site::chain(said["certificate"].as_str().unwrap());
    let second = door(&badge);
    for good in [&first, &second] {
        drop(good.enter(None).await.unwrap());
    }
    let mut live = second.enter(None).await.unwrap();
    let mut honest = stage.doors[0].enter(None).await.unwrap();
    let (status, said) = site
        .ask("POST /api/v1/identities/demo/thief/revoke", None)
        .await;
    assert_eq!(status, 200, "{said}");
    let ended = async {
        let mut byte = [0];
        !matches!(live.stream.read(&mut byte).await, Ok(n) if n > 0)
    };
    assert!(timeout(PROMISE, ended).await.expect("the session stands"));
    for gone in [&first, &second] {
        assert!(gone.enter(None).await.is_err(), "it comes back in");
    }
    // Somebody else gets the name; the old certificates stay shut out.
    let heir = site.enrol_at("demo", "thief").await;
    drop(door(&heir).enter(None).await.unwrap());
    for gone in [&first, &second] {
        assert!(gone.enter(None).await.is_err(), "it comes back in");
    }
    honest
        .say(&publish("lacewing/v1/demo/d1/_/metrics", "x", 1))
        .await
        .unwrap();
    assert!(matches!(honest.packet().await, Ok(Packet::PubAck(_))));
    assert_eq!(
        site.metric("lacewing_external_broker_errors_total").await,
        0.0
    );
    assert!(
        site.metric("lacewing_external_broker_turned_out_total")
            .await
            >= 1.0
    );
    stage.site.handle.stop().await;
}

//! A coordinator in small: an authority, the two routes for devices, a broker that takes everything.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, date_time_ymd,
};
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
    time_provider::TimeProvider,
};
use serde_json::{Value, json};
use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    prelude::{FromDer, X509Certificate},
};

/// Nothing here takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// What it does with a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Mood {
    Well,
    /// Does its work and hangs up before it says so.
    Mute,
    /// A person has to approve.
    Pending,
    /// 403 with this reason.
    Refuses(&'static str),
    /// Gives the certificate under another name.
    Misnames,
    /// An answer that does not end.
    Floods,
    /// Somebody in between takes no certificate of a device, and hangs up without a word.
    HangsUp,
}

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) route: String,
    pub(crate) body: Value,
    /// How it was proven that the device asks now.
    pub(crate) proof: Proof,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// The certificate of the connection.
    Certificate,
    /// A signature over a challenge.
    Challenge,
    /// None: it shows a token.
    Token,
}

/// A device on the broker.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    /// The common name of its certificate.
    pub(crate) name: String,
    /// The certificate's serial number.
    pub(crate) serial: String,
    pub(crate) client_id: String,
    /// Messages taken from it.
    pub(crate) messages: usize,
    /// It said goodbye.
    pub(crate) is_over: bool,
}

pub(crate) struct Shared {
    now_ms: AtomicI64,
    pub(crate) life_ms: AtomicI64,
    pub(crate) mood: Mutex<Mood>,
    pub(crate) requests: Mutex<Vec<Request>>,
    /// The public keys that it gave certificates for.
    pub(crate) keys: Mutex<Vec<Vec<u8>>>,
    /// Those of them that it gives no more to.
    pub(crate) revoked: Mutex<Vec<Vec<u8>>>,
    pub(crate) sessions: Mutex<Vec<Session>>,
    /// Does its own clock run?
    runs: bool,
    begun: tokio::time::Instant,
    stop: AtomicBool,
    mqtt: Mutex<String>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl Shared {
    pub(crate) fn now_ms(&self) -> i64 {
        let since = match self.runs {
            true => i64::try_from(self.begun.elapsed().as_millis()).unwrap(),
            false => 0,
        };
        self.now_ms.load(Ordering::Relaxed) + since
    }

    pub(crate) fn set(&self, now_ms: i64) {
        self.now_ms.store(now_ms, Ordering::Relaxed);
    }

    pub(crate) fn feel(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    /// Takes back every key that it has given a certificate for.
    pub(crate) fn revoke_all(&self) {
        *self.revoked.lock().unwrap() = self.keys.lock().unwrap().clone();
    }

    pub(crate) fn proofs(&self) -> Vec<Proof> {
        let requests = self.requests.lock().unwrap();
        requests.iter().map(|r| r.proof).collect()
    }

    pub(crate) fn asked(&self) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        requests.iter().map(|r| r.route.clone()).collect()
    }
}

impl TimeProvider for Shared {
    fn current_time(&self) -> Option<UnixTime> {
        let ms = u64::try_from(self.now_ms()).unwrap();
        Some(UnixTime::since_unix_epoch(Duration::from_millis(ms)))
    }
}

/// The authority and its server.
pub(crate) struct StandIn {
    pub(crate) shared: Arc<Shared>,
    pub(crate) https: SocketAddr,
    pub(crate) mqtts: SocketAddr,
    ca: Arc<Authority>,
    threads: Vec<JoinHandle<()>>,
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
    pem: String,
}

fn at(ms: i64) -> impl Fn(&mut CertificateParams, i64) {
    move |params, until_ms| {
        let zero = date_time_ymd(1970, 1, 1);
        let whole = |ms: i64| Duration::from_secs(u64::try_from(ms / 1_000).unwrap());
        params.not_before = zero + whole(ms);
        params.not_after = zero + whole(until_ms);
    }
}

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    Authority {
        der: certificate.der().clone(),
        pem: certificate.pem(),
        issuer: Issuer::new(params, key),
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

impl StandIn {
    /// At this time, by a clock that stands still or runs; its server's certificate was issued an hour before.
    pub(crate) fn start(now_ms: i64, runs: bool) -> Self {
        let ca = Arc::new(authority("an authority"));
        let shared = Arc::new(Shared {
            now_ms: AtomicI64::new(now_ms),
            life_ms: AtomicI64::new(7 * 86_400_000),
            mood: Mutex::new(Mood::Well),
            requests: Mutex::default(),
            keys: Mutex::default(),
            revoked: Mutex::default(),
            sessions: Mutex::default(),
            runs,
            begun: tokio::time::Instant::now(),
            stop: AtomicBool::new(false),
            mqtt: Mutex::default(),
        });
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        at(now_ms - 3_600_000)(&mut params, now_ms + 90 * 86_400_000);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params.signed_by(&key, &ca.issuer).unwrap();
        let chain = vec![leaf.der().clone(), ca.der.clone()];
        let private = || PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let builder = || {
            ServerConfig::builder_with_details(provider(), Arc::clone(&shared) as _)
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca.der.clone()).unwrap();
        let known = Arc::new(roots.clone());
        let verifier = WebPkiClientVerifier::builder_with_provider(known, provider());
        let verifier = verifier.allow_unauthenticated().build().unwrap();
        let door = builder().with_client_cert_verifier(verifier);
        let door = door.with_single_cert(chain.clone(), private()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        let broker = builder().with_client_cert_verifier(verifier.build().unwrap());
        let broker = broker.with_single_cert(chain, private()).unwrap();

        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (for_http, for_mqtt) = (listen(), listen());
        let (https, mqtts) = (
            for_http.local_addr().unwrap(),
            for_mqtt.local_addr().unwrap(),
        );
        *shared.mqtt.lock().unwrap() = mqtts.to_string();
        let threads = vec![
            serve(for_http, door, Arc::clone(&shared), {
                let ca = Arc::clone(&ca);
                move |stream, shared| drop(http(stream, shared, &ca))
            }),
            serve(for_mqtt, broker, Arc::clone(&shared), |stream, shared| {
                drop(mqtt(stream, shared));
            }),
        ];
        Self {
            shared,
            https,
            mqtts,
            ca,
            threads,
        }
    }

    /// A token with the pin of its own authority.
    pub(crate) fn token(&self) -> String {
        self.token_with(&models::digest_of(&self.ca.der).to_string(), "hall")
    }

    /// Not the first one.
    pub(crate) fn another_token(&self) -> String {
        self.numbered("2", &models::digest_of(&self.ca.der).to_string(), "hall")
    }

    pub(crate) fn token_with(&self, ca: &str, site: &str) -> String {
        self.numbered("1", ca, site)
    }

    fn numbered(&self, jti: &str, ca: &str, site: &str) -> String {
        let claims = json!({
            "aud": "enrol", "jti": jti, "exp": self.shared.now_ms() / 1_000 + 3_600, "site": site, "ca": ca,
            "url": format!("https://{}", self.https),
        });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let head = json!({"alg": "HS256", "typ": "JWT"});
        format!("{}.{}.c2lnbmF0dXJl", part(&head), part(&claims))
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for address in [self.https, self.mqtts] {
            let _ = TcpStream::connect(address);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

type Stream = StreamOwned<ServerConnection, TcpStream>;

fn serve(
    listener: TcpListener,
    config: ServerConfig,
    shared: Arc<Shared>,
    each: impl Fn(Stream, &Shared) + Clone + Send + 'static,
) -> JoinHandle<()> {
    let config = Arc::new(config);
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            if shared.stop.load(Ordering::Relaxed) {
                return;
            }
            let Ok(socket) = socket else { continue };
            let _ = socket.set_read_timeout(Some(PATIENCE));
            let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
            let (each, shared) = (each.clone(), Arc::clone(&shared));
            std::thread::spawn(move || each(StreamOwned::new(connection, socket), &shared));
        }
    })
}

fn http(mut stream: Stream, shared: &Shared, ca: &Authority) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let route = head.split_whitespace().nth(1).unwrap_or_default();
    let route = route.trim_start_matches("/api/v1/").to_owned();
    let length = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(0, |(_, length)| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    if !["enrol", "renew"].contains(&route.as_str()) {
        return stream.write_all(
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        );
    }
    let body: Value = serde_json::from_slice(&body).unwrap();
    let csr = body["csr"].as_str().unwrap().to_owned();
    let mood = shared.mood.lock().unwrap().clone();
    let shown = stream.conn.peer_certificates().is_some();
    if shown && mood == Mood::HangsUp {
        return Ok(());
    }
    let proof = match (route.as_str(), shown) {
        ("enrol", _) => Proof::Token,
        (_, true) => Proof::Certificate,
        (_, false) if challenge_in(&csr).as_deref() == Some(CHALLENGE) => Proof::Challenge,
        (_, false) => {
            let problem = json!({"title": "Prove it", "challenge": CHALLENGE});
            return say(stream, "401 Unauthorized", &problem);
        }
    };
    shared
        .requests
        .lock()
        .unwrap()
        .push(Request { route, body, proof });
    let revoked = {
        let request = CertificateSigningRequestParams::from_pem(&csr).unwrap();
        let key = request.public_key.subject_public_key_info();
        shared.revoked.lock().unwrap().contains(&key)
    };
    let mood = match revoked {
        true => Mood::Refuses("this key was revoked"),
        false => mood,
    };
    let (status, answer) = match mood {
        Mood::Pending => (
            "202 Accepted",
            json!({"state": "pending", "retry_after_s": 30}),
        ),
        Mood::Refuses(why) => (
            "403 Forbidden",
            json!({"title": "Forbidden", "detail": why}),
        ),
        Mood::Floods => {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n")?;
            loop {
                stream.write_all(&[b' '; 4_096])?;
            }
        }
        Mood::Well | Mood::Mute | Mood::Misnames | Mood::HangsUp => {
            ("200 OK", grant(&csr, shared, ca, mood == Mood::Misnames))
        }
    };
    if mood == Mood::Mute {
        return Ok(());
    }
    say(stream, status, &answer)
}

/// As long as those of a coordinator.
const CHALLENGE: &str = "eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiJ9.eyJhdWQiOiJyZW5ldyIsImp0aSI6IjAwMTEyMjMzNDQ1NTY2Nzc4ODk5YWFiYmNjZGRlZWZm\
                         IiwiZXhwIjoxNzAwMDAwMDAwfQ.c2lnbmF0dXJlc2lnbmF0dXJlc2lnbmF0dXJlc2lnbmF0";

/// What a signing request was told to sign.
fn challenge_in(csr: &str) -> Option<String> {
    let der = rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(csr.as_bytes());
    let der = der.unwrap();
    let (_, request) = X509CertificationRequest::from_der(&der).unwrap();
    request.verify_signature().unwrap();
    let mut attributes = request.certification_request_info.iter_attributes();
    attributes.find_map(|attribute| match attribute.parsed_attribute() {
        ParsedCriAttribute::ChallengePassword(text) => Some(text.0.clone()),
        _ => None,
    })
}

fn say(mut stream: Stream, status: &str, answer: &Value) -> std::io::Result<()> {
    let answer = answer.to_string();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        answer.len()
    );
    stream.write_all((head + &answer).as_bytes())?;
    stream.conn.send_close_notify();
    stream.flush()
}

/// Of the next certificate.
static SERIAL: AtomicU64 = AtomicU64::new(1);

fn grant(csr: &str, shared: &Shared, ca: &Authority, misname: bool) -> Value {
    let mut request = CertificateSigningRequestParams::from_pem(csr).unwrap();
    let key = request.public_key.subject_public_key_info();
    shared.keys.lock().unwrap().push(key);
    let (now_ms, life_ms) = (shared.now_ms(), shared.life_ms.load(Ordering::Relaxed));
    at(now_ms)(&mut request.params, now_ms + life_ms);
    request.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    // By default it follows from the key, and the key stays.
    request.params.serial_number = Some(SERIAL.fetch_add(1, Ordering::Relaxed).into());
    if misname {
        let names = &mut request.params.distinguished_name;
        names.push(DnType::CommonName, "hall/other");
    }
    let certificate = request.signed_by(&ca.issuer).unwrap();
    json!({
        "site": "hall", "device": "d1",
        "certificate": format!("{}{}", certificate.pem(), ca.pem), "ca": ca.pem,
        "not_after_ms": now_ms + life_ms, "renew_after_ms": now_ms + life_ms / 2, "now_ms": now_ms,
        "mqtt": *shared.mqtt.lock().unwrap(),
    })
}

/// MQTT 3.1.1 as far as a device speaks it.
fn mqtt(mut stream: Stream, shared: &Shared) -> std::io::Result<()> {
    let mut mine = None;
    loop {
        let (kind, body) = packet(&mut stream)?;
        let mut sessions = shared.sessions.lock().unwrap();
        match kind >> 4 {
            1 => {
                let shown = stream.conn.peer_certificates().unwrap_or_default();
                let (_, certificate) = X509Certificate::from_der(&shown[0]).unwrap();
                let name = certificate.subject().iter_common_name().next().unwrap();
                mine = Some(sessions.len());
                let length = usize::from(u16::from_be_bytes([body[10], body[11]]));
                sessions.push(Session {
                    name: name.as_str().unwrap().to_owned(),
                    serial: certificate.raw_serial_as_string(),
                    client_id: String::from_utf8_lossy(&body[12..12 + length]).into_owned(),
                    messages: 0,
                    is_over: false,
                });
                stream.write_all(&[0x20, 2, 0, 0])?;
            }
            3 => {
                sessions[mine.unwrap()].messages += 1;
                if kind & 0b110 != 0 {
                    let length = usize::from(u16::from_be_bytes([body[0], body[1]]));
                    stream.write_all(&[0x40, 2, body[2 + length], body[3 + length]])?;
                }
            }
            8 => stream.write_all(&[0x90, 3, body[0], body[1], 1])?,
            12 => stream.write_all(&[0xd0, 0])?,
            14 => {
                sessions[mine.unwrap()].is_over = true;
                return Ok(());
            }
            _ => {}
        }
    }
}

fn packet(stream: &mut Stream) -> std::io::Result<(u8, Vec<u8>)> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    let kind = byte[0];
    let (mut length, mut shift) = (0_usize, 0);
    loop {
        stream.read_exact(&mut byte)?;
        length |= usize::from(byte[0] & 0x7f) << shift;
        shift += 7;
        if byte[0] & 0x80 == 0 {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((kind, body))
}

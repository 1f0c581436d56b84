//! A coordinator that speaks TLS, devices and subscribers that it knows, and how they speak to it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::body::Body;
use cloud_coordinator::{Config, Coordinator, Handle};
use hyper::{Request, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rumqttc::{MqttOptions, TlsConfiguration, Transport};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject},
};
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};

use super::{Client, PATIENCE};

/// The life of a certificate in these tests.
pub const LIFE_S: u64 = 10;

/// A coordinator behind TLS, as it is by itself.
pub struct Site {
    pub handle: Handle,
    pub dir: tempfile::TempDir,
    pub ca: CertificateDer<'static>,
}

/// A device's key, and what it was given.
pub struct Badge {
    pub name: &'static str,
    pub key: KeyPair,
    pub chain: Vec<CertificateDer<'static>>,
    /// Where the broker is, as it was told.
    pub mqtt: Value,
}

pub fn csr(key: &KeyPair, name: &str) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.serialize_request(key).unwrap().pem().unwrap()
}

/// The same, with what the coordinator wants to see signed.
pub fn csr_with(key: &KeyPair, name: &str, challenge: &str) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let length = u8::try_from(challenge.len()).unwrap();
    let text = [&[0x0c, 0x81, length], challenge.as_bytes()].concat();
    let set = [&[0x31, 0x81, length + 3], &text[..]].concat();
    let challenge = rcgen::Attribute {
        oid: &[1, 2, 840, 113_549, 1, 9, 7],
        values: set,
    };
    let request = params.serialize_request_with_attributes(key, vec![challenge]);
    request.unwrap().pem().unwrap()
}

pub fn chain(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .unwrap()
}

impl Site {
    pub async fn start() -> Self {
        Self::living(LIFE_S).await
    }

    /// One whose certificates live for so many seconds.
    pub async fn living(life_s: u64) -> Self {
        Self::start_with(tempfile::tempdir().unwrap(), |config| {
            config.tls.device_s = life_s;
            config.broker.publish_rate = 200;
        })
        .await
    }

    pub async fn start_with(dir: tempfile::TempDir, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = super::config(dir.path());
        config.tls.enabled = true;
        change(&mut config);
        let handle = Coordinator::start(config).await.unwrap();
        let said = std::fs::read_to_string(dir.path().join("addresses.json")).unwrap();
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["tls"], true);
        let ca = CertificateDer::from_pem_file(said["ca"].as_str().unwrap()).unwrap();
        Self { handle, dir, ca }
    }

    pub fn mqtt(&self) -> SocketAddr {
        self.handle.mqtt.unwrap()
    }

    /// What a client trusts, and whose certificate it shows.
    pub fn tls(&self, badge: Option<&Badge>) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).unwrap();
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let builder = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        Arc::new(match badge {
            None => builder.with_no_client_auth(),
            Some(badge) => {
                let key = PrivatePkcs8KeyDer::from(badge.key.serialize_der());
                builder
                    .with_client_auth_cert(badge.chain.clone(), key.into())
                    .unwrap()
            }
        })
    }

    pub async fn door(&self, badge: Option<&Badge>) -> Result<SendRequest<Body>, String> {
        let stream = TcpStream::connect(self.handle.http).await.unwrap();
        let name = ServerName::from(self.handle.http.ip());
        let connector = tokio_rustls::TlsConnector::from(self.tls(badge));
        let stream = connector.connect(name, stream).await;
        let stream = TokioIo::new(stream.map_err(|e| e.to_string())?);
        let (sender, connection) = hyper::client::conn::http1::handshake(stream)
            .await
            .map_err(|e| e.to_string())?;
        tokio::spawn(connection);
        Ok(sender)
    }

    pub async fn try_ask(
        &self,
        badge: Option<&Badge>,
        line: &str,
        body: Option<Value>,
    ) -> Result<(u16, Value), String> {
        let mut sender = self.door(badge).await?;
        // Who shows no certificate is an operator on the coordinator's machine.
        let token = match badge {
            None => Some(self.operator()),
            Some(_) => None,
        };
        timeout(PATIENCE, exchange(&mut sender, line, body, token))
            .await
            .unwrap()
    }

    pub fn operator(&self) -> String {
        let path = self.dir.path().join("trust/operator.token");
        std::fs::read_to_string(path).unwrap()
    }

    pub async fn ask(&self, line: &str, body: Option<Value>) -> (u16, Value) {
        self.try_ask(None, line, body).await.unwrap()
    }

    pub async fn token(&self, more: Value) -> String {
        let mut asked = json!({"site": "demo"});
        for (name, value) in more.as_object().unwrap() {
            asked[name] = value.clone();
        }
        let (status, said) = self.ask("POST /api/v1/enrolment-tokens", Some(asked)).await;
        assert_eq!(status, 201, "{said}");
        said["token"].as_str().unwrap().to_owned()
    }

    /// Shows a token; the status and what was said.
    pub async fn show(&self, token: &str, device: &str, csr: &str) -> (u16, Value) {
        let asked = json!({"token": token, "site": "demo", "device": device, "csr": csr});
        self.ask("POST /api/v1/enrol", Some(asked)).await
    }

    pub async fn enrol(&self, device: &'static str) -> Badge {
        let badge = self.enrol_at("demo", device).await;
        let expected = format!("127.0.0.1:{}", self.mqtt().port());
        assert_eq!(badge.mqtt, expected);
        badge
    }

    pub async fn enrol_at(&self, at: &str, device: &'static str) -> Badge {
        let token = self.token(json!({"site": at, "device": device})).await;
        let key = KeyPair::generate().unwrap();
        let csr = csr(&key, &format!("{at}/{device}"));
        let asked = json!({"token": token, "site": at, "device": device, "csr": csr});
        let (status, said) = self.ask("POST /api/v1/enrol", Some(asked)).await;
        assert_eq!(status, 200, "{said}");
        Badge {
            name: device,
            key,
            chain: chain(said["certificate"].as_str().unwrap()),
            mqtt: said["mqtt"].clone(),
        }
    }

    /// The next certificate for a key, without showing one: by a signature over a challenge.
    pub async fn renew(&self, key: &KeyPair, name: &str) -> (u16, Value) {
        let line = "POST /api/v1/renew";
        let (status, said) = self.ask(line, Some(json!({"csr": csr(key, name)}))).await;
        assert_eq!(status, 401, "{said}");
        let csr = csr_with(key, name, said["challenge"].as_str().unwrap());
        self.ask(line, Some(json!({"csr": csr}))).await
    }

    pub fn options(&self, client: &str, badge: Option<&Badge>) -> MqttOptions {
        let broker = self.mqtt();
        let mut options = MqttOptions::new(client, (broker.ip().to_string(), broker.port()));
        options.set_max_packet_size(2 << 20, 2 << 20);
        let tls = TlsConfiguration::Rustls(self.tls(badge));
        options.set_transport(Transport::tls_with_config(tls));
        options
    }

    pub async fn connect(&self, client: &str, badge: &Badge) -> Client {
        Client::with(self.options(client, Some(badge)))
            .await
            .unwrap()
    }

    pub async fn subscriber(&self, name: &str, sites: Value) -> String {
        let asked = json!({"name": name, "sites": sites});
        let (status, said) = self.ask("POST /api/v1/subscribers", Some(asked)).await;
        assert_eq!(status, 201, "{said}");
        said["password"].as_str().unwrap().to_owned()
    }

    pub async fn listen(&self, client: &str, name: &str, password: &str) -> Result<Client, String> {
        let mut options = self.options(client, None);
        options.set_credentials(name, password.to_owned());
        Client::with(options).await
    }

    pub async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.ask("GET /metrics", None).await;
        let text = text.as_str().unwrap().to_owned();
        let line = text.lines().find(|l| l.starts_with(&format!("{name} ")));
        line.map_or(0.0, |l| l.rsplit_once(' ').unwrap().1.parse().unwrap())
    }

    pub async fn metric_reaches(&self, name: &str, value: f64) {
        let reached = async {
            while self.metric(name).await < value {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, reached)
            .await
            .unwrap_or_else(|_| panic!("{name} does not reach {value}"));
    }

    pub async fn readings(&self) -> usize {
        let (_, said) = self.ask("GET /api/v1/readings?limit=1000", None).await;
        said["items"].as_array().unwrap().len()
    }
}

pub async fn exchange(
    sender: &mut SendRequest<Body>,
    line: &str,
    body: Option<Value>,
    token: Option<String>,
) -> Result<(u16, Value), String> {
    let (method, path) = line.split_once(' ').unwrap();
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "127.0.0.1:1")
        .header("content-type", "application/json");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {}", token.trim()));
    }
    let request = request
        .body(Body::from(body.map_or_else(String::new, |b| b.to_string())))
        .unwrap();
    let answer = sender.send_request(request).await;
    let answer = answer.map_err(|e| format!("{e:?}"))?;
    let status = answer.status().as_u16();
    let bytes = axum::body::to_bytes(Body::new(answer.into_body()), 1 << 20)
        .await
        .map_err(|e| e.to_string())?;
    let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
    Ok((
        status,
        serde_json::from_slice(&bytes).unwrap_or_else(|_| text()),
    ))
}

//! Who gets in: enrolment, certificates, renewal and revocation, over real connections with TLS.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;

use std::{sync::Arc, time::Duration};

use axum::body::Body;
use cloud_coordinator::Coordinator;
use common::{
    Client, PATIENCE, encoded,
    site::{LIFE_S, Site, chain, csr, exchange},
    topic,
};
use hyper::Request;
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, IsCa, KeyPair, PKCS_ECDSA_P384_SHA384,
    PKCS_ED25519, PKCS_RSA_SHA256, SanType,
};
use rumqttc::{LastWill, MqttOptions, QoS};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

fn will(device: &str) -> LastWill {
    let topic = topic(device, "_", "status");
    LastWill::new(topic, "offline", QoS::AtLeastOnce, true)
}

/// Enrol, publish, renew, revoke, cut – with certificates that live ten seconds, and every reading is there.
#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_an_identity() {
    let site = Site::start().await;
    let mut badge = site.enrol("d1").await;
    assert_eq!(badge.chain[1], site.ca, "the pinned authority is served");
    let other = site.enrol("d2").await;

    // The client id says nothing, the certificate decides.
    let mut d1 = site.connect("demo/d2", &badge).await;
    assert!(d1.subscribe(&topic("d1", "_", "ack")).await);
    for denied in [
        &topic("d2", "_", "ack"),
        "lacewing/#",
        "homeassistant/#",
        "#",
    ] {
        assert!(!d1.subscribe(denied).await, "{denied}");
    }
    // Abuse 5: another's topic, retained; and the coordinator's own words.
    for denied in [topic("d2", "_", "status"), topic("d1", "_", "ack")] {
        d1.publish_as(&denied, "online", true).await;
    }
    let denied = "lacewing_broker_denied_total{reason=\"publish\"}";
    site.metric_reaches(denied, 2.0).await;
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, 1))
        .await;
    d1.acknowledged(1, 1).await;

    // A second session of the same device takes the place of the first, whatever it is called; d2 stays.
    let d2 = site.connect("demo/d1", &other).await;
    let again = site.connect("something", &badge).await;
    timeout(PATIENCE, d1.ended).await.unwrap().unwrap();
    assert!(!d2.ended.is_finished());
    drop(again);

    // Abuse 6: a last will on another's topic.
    let mut options = site.options("x", Some(&badge));
    options.set_last_will(will("d2"));
    let refused = Client::with(options).await;
    assert!(refused.is_err_and(|e| e.contains("NotAuthorized")));
    // Abuse 4.
    for id in ["#", "+", "demo/#"] {
        let refused = Client::with(site.options(id, Some(&badge))).await;
        assert!(refused.is_err_and(|e| e.contains("BadClientId")), "{id}");
    }

    // The certificate runs out; its key gets the next one.
    tokio::time::sleep(Duration::from_secs(LIFE_S + 2)).await;
    assert!(
        Client::with(site.options("d1", Some(&badge)))
            .await
            .is_err()
    );
    assert!(
        site.try_ask(Some(&badge), "GET /healthz", None)
            .await
            .is_err()
    );
    let asked = json!({"csr": csr(&badge.key, "demo/d1")});
    let (status, said) = site.renew(&badge.key, "demo/d1").await;
    assert_eq!(status, 200, "{said}");
    badge.chain = chain(said["certificate"].as_str().unwrap());
    let life = said["not_after_ms"].as_i64().unwrap() - said["now_ms"].as_i64().unwrap();
    let renew = said["renew_after_ms"].as_i64().unwrap() - said["now_ms"].as_i64().unwrap();
    assert!((9_000..=10_000).contains(&life) && renew == 5_000);
    let mut options = site.options("d1", Some(&badge));
    options.set_last_will(will("d1"));
    let mut d1 = Client::with(options).await.unwrap();
    assert!(d1.subscribe(&topic("d1", "_", "ack")).await);
    for seq in 2..=5 {
        d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, seq))
            .await;
    }
    d1.acknowledged(1, 5).await;

    // Abuse 31: revoked with live sessions, over MQTT and over HTTP. Others notice nothing.
    let mut open = site.door(Some(&badge)).await.unwrap();
    let (status, _) = exchange(&mut open, "GET /healthz", None, None)
        .await
        .unwrap();
    assert_eq!(status, 200);
    let (status, said) = site
        .ask("POST /api/v1/identities/demo/d1/revoke", None)
        .await;
    assert_eq!((status, &said["state"]), (200, &json!("revoked")), "{said}");
    timeout(PATIENCE, d1.ended).await.unwrap().unwrap();
    let cut = async {
        while exchange(&mut open, "GET /healthz", None, None)
            .await
            .is_ok()
        {}
    };
    timeout(PATIENCE, cut).await.unwrap();
    assert!(!d2.ended.is_finished());
    assert!(
        Client::with(site.options("d1", Some(&badge)))
            .await
            .is_err()
    );
    let refused = site.try_ask(Some(&badge), "GET /healthz", None).await;
    assert!(refused.is_err(), "{refused:?}");
    let (status, said) = site.ask("POST /api/v1/renew", Some(asked)).await;
    assert_eq!(status, 403);
    assert!(said["detail"].as_str().unwrap().contains("revoked"));
    assert_eq!(site.readings().await, 5, "not one reading was lost");
    site.handle.stop().await;
}

/// Abuses 29 and 30, and all their kin: each refused with its reason, and counted.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_taken_in() {
    let site = Site::start().await;
    let key = KeyPair::generate().unwrap();
    let good = csr(&key, "demo/d1");
    let refused = async |token: &str, device: &str, csr: &str, why: &str| {
        let (status, said) = site.show(token, device, csr).await;
        assert_eq!(status, 403, "{said}");
        let detail = said["detail"].as_str().unwrap();
        assert!(detail.contains(why), "{detail}: {why}");
    };
    let token = site.token(json!({"device": "d1"})).await;
    refused("x.y.z", "d1", &good, "not an enrolment token").await;
    let stranger = Site::start().await;
    let foreign = stranger.token(json!({})).await;
    refused(&foreign, "d1", &good, "not an enrolment token").await;
    stranger.handle.stop().await;
    refused(&token, "d2", &csr(&key, "demo/d2"), "another device").await;
    refused(&token, "d1", &csr(&key, "demo/d2"), "names \"demo/d2\"").await;
    refused(&token, "d1", &csr(&key, "#"), "names \"#\"").await;
    refused(&token, "d1", &"x".repeat(9_000), "more than 8 KiB").await;
    refused(&token, "d1", "x", "cannot be read").await;
    for weak in [&PKCS_ECDSA_P384_SHA384, &PKCS_RSA_SHA256] {
        let key = KeyPair::generate_for(weak).unwrap();
        let csr = csr(&key, "demo/d1");
        refused(&token, "d1", &csr, "neither ECDSA P-256 nor Ed25519").await;
    }
    let with = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        change(&mut params);
        params.serialize_request(&key).unwrap().pem().unwrap()
    };
    let ca = with(&|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    refused(&token, "d1", &ca, "certificate authority").await;
    let other = with(&|p| {
        let uri = "lacewing:device:demo/d2".try_into().unwrap();
        p.subject_alt_names = vec![SanType::URI(uri)];
    });
    refused(&token, "d1", &other, "demo/d2").await;
    // Somebody else's key under a signature of one's own.
    let middle = good.len() / 2;
    let mut forged = good.clone().into_bytes();
    forged[middle] = if forged[middle] == b'A' { b'B' } else { b'A' };
    let (status, _) = site
        .show(&token, "d1", std::str::from_utf8(&forged).unwrap())
        .await;
    assert_eq!(status, 403);

    // After all that the token is whole; after one use it is not.
    let (status, said) = site.show(&token, "d1", &good).await;
    assert_eq!(status, 200, "{said}");
    let (status, _) = site.show(&token, "d1", &good).await;
    assert_eq!(status, 200, "the answer got lost");
    let ed = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    refused(&token, "d1", &csr(&ed, "demo/d1"), "used up").await;
    let (status, all) = site.ask("GET /api/v1/enrolment-tokens", None).await;
    assert_eq!((status, &all[0]["used"]), (200, &json!(1)));

    let taken_back = site.token(json!({"uses": 9})).await;
    let (_, all) = site.ask("GET /api/v1/enrolment-tokens", None).await;
    let fresh = all.as_array().unwrap().iter().find(|t| t["quota"] == 9);
    let jti = fresh.unwrap()["jti"].as_str().unwrap();
    let line = format!("DELETE /api/v1/enrolment-tokens/{jti}");
    assert_eq!(site.ask(&line, None).await.0, 204);
    refused(&taken_back, "d3", &csr(&ed, "demo/d3"), "taken back").await;
    let asked = json!({"token": site.token(json!({})).await, "site": "east", "device": "d1", "csr": csr(&ed, "")});
    let (status, said) = site.ask("POST /api/v1/enrol", Some(asked)).await;
    assert_eq!(status, 403, "{said}");
    let (status, _) = site
        .ask(
            "POST /api/v1/renew",
            Some(json!({"csr": csr(&ed, "demo/d1")})),
        )
        .await;
    assert_eq!(status, 403, "a key that nobody knows");
    let count = "lacewing_enrolment_refused_total{reason=\"signing request\"}";
    assert!(site.metric(count).await >= 8.0);
    for bad in [
        json!({"site": "_"}),
        json!({"site": "demo", "uses": 0}),
        json!({"site": "demo", "hours": 9_000}),
        json!({"site": "demo", "url": "http://x"}),
        json!({"site": "a/b"}),
    ] {
        let (status, _) = site
            .ask("POST /api/v1/enrolment-tokens", Some(bad.clone()))
            .await;
        assert_eq!(status, 422, "{bad}");
    }
    site.handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_has_to_say_yes() {
    let site = Site::start().await;
    let token = site.token(json!({"approve": true})).await;
    let key = KeyPair::generate().unwrap();
    let request = csr(&key, "demo/d1");
    for _ in 0..2 {
        let (status, said) = site.show(&token, "d1", &request).await;
        assert_eq!((status, &said["state"]), (202, &json!("pending")), "{said}");
    }
    let (_, all) = site.ask("GET /api/v1/identities?site=demo", None).await;
    assert_eq!(all[0]["state"], "pending");
    let line = "POST /api/v1/identities/demo/d1/approve";
    assert_eq!(site.ask(line, None).await.0, 200);
    let (status, said) = site.show(&token, "d1", &request).await;
    assert_eq!(status, 200, "{said}");
    let nobody = "POST /api/v1/identities/demo/d9/approve";
    assert_eq!(site.ask(nobody, None).await.0, 404);
    site.handle.stop().await;
}

/// Nobody listens without a name and a password, nobody beyond its sites, and nobody after it was removed.
#[tokio::test(flavor = "multi_thread")]
async fn subscribers() {
    let site = Site::start().await;
    let everything = site.subscriber("house", Value::Null).await;
    let one = site.subscriber("panel", json!(["demo"])).await;
    let refused = Client::with(site.options("mosq-1", None)).await;
    assert!(refused.is_err_and(|e| e.contains("NotAuthorized")));
    for (name, password) in [("panel", "wrong"), ("panel", &everything), ("nobody", &one)] {
        let refused = site.listen("mosq-1", name, password).await;
        assert!(refused.is_err_and(|e| e.contains("BadUserNamePassword")));
    }
    let mut house = site.listen("mosq-1", "house", &everything).await.unwrap();
    assert!(house.subscribe("lacewing/#").await && house.subscribe("homeassistant/#").await);
    assert!(house.subscribe("lacewing/v1/+/+/+/result").await && !house.subscribe("#").await);
    // The same client id under another name takes nobody's place.
    let mut panel = site.listen("mosq-1", "panel", &one).await.unwrap();
    assert!(panel.subscribe("lacewing/v1/demo/#").await);
    for denied in [
        "lacewing/#",
        "lacewing/v1/+/d1/#",
        "lacewing/v1/east/#",
        "homeassistant/#",
    ] {
        assert!(!panel.subscribe(denied).await, "{denied}");
    }
    panel
        .publish_as(&topic("d1", "_", "status"), "offline", true)
        .await;
    let denied = "lacewing_broker_denied_total{reason=\"publish\"}";
    site.metric_reaches(denied, 1.0).await;
    let badge = site.enrol("d1").await;
    let d1 = site.connect("", &badge).await;
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, 1))
        .await;
    assert_eq!(panel.next().await.0, topic("d1", "cam0", "result"));
    assert_eq!(house.next().await.0, topic("d1", "cam0", "result"));

    let line = "DELETE /api/v1/subscribers/panel";
    assert_eq!(site.ask(line, None).await.0, 204);
    timeout(PATIENCE, panel.ended).await.unwrap().unwrap();
    assert!(site.listen("mosq-1", "panel", &one).await.is_err());
    assert!(!house.ended.is_finished());
    site.handle.stop().await;
}

/// A client that publishes too fast is read more slowly: it loses nothing and stays, and another notices nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_slows_only_itself_down() {
    let site = Site::start().await;
    let (fast, calm) = (site.enrol("d1").await, site.enrol("d2").await);
    let (mut d1, mut d2) = (
        site.connect("d1", &fast).await,
        site.connect("d2", &calm).await,
    );
    assert!(d1.subscribe(&topic("d1", "_", "ack")).await);
    assert!(d2.subscribe(&topic("d2", "_", "ack")).await);
    for seq in 1..=500 {
        d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, seq))
            .await;
    }
    d2.publish(&topic("d2", "cam0", "result"), encoded("d2", 1, 1))
        .await;
    d2.acknowledged(1, 1).await;
    let so_far = site.metric("lacewing_ingested_total").await;
    assert!(so_far < 500.0, "the flood is still on its way: {so_far}");
    d1.acknowledged(1, 500).await;
    assert!(site.metric("lacewing_broker_slowed_total").await >= 1.0);
    site.handle.stop().await;
}

/// The door: TLS 1.3 or nothing, HTTP/2 if it is asked for, and nobody waits for one who does not finish.
#[tokio::test(flavor = "multi_thread")]
async fn the_door() {
    let site = Site::start().await;
    // Plain text is no handshake.
    let mut plain = TcpStream::connect(site.handle.http).await.unwrap();
    AsyncWriteExt::write_all(&mut plain, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let read = AsyncReadExt::read_to_end(&mut plain, &mut answer);
    let _ = timeout(PATIENCE, read).await.unwrap();
    let said = String::from_utf8_lossy(&answer).into_owned();
    assert!(
        said.starts_with("HTTP/1.1 400 ") && said.contains("use https://"),
        "{said}"
    );
    let reason = "lacewing_http_refused_total{reason=\"plain text where TLS is spoken\"}";
    site.metric_reaches(reason, 1.0).await;
    let broker = site.mqtt();
    let options = MqttOptions::new("x", (broker.ip().to_string(), broker.port()));
    let refused = Client::with(options).await;
    assert!(refused.is_err_and(|e| e.contains("RefusedProtocolVersion")));
    let reason = "lacewing_broker_refused_total{reason=\"plain text where TLS is spoken\"}";
    site.metric_reaches(reason, 1.0).await;
    // What is neither.
    let mut noise = TcpStream::connect(site.handle.http).await.unwrap();
    AsyncWriteExt::write_all(&mut noise, &[22, 3, 1, 0, 4, 1, 2, 3, 4])
        .await
        .unwrap();
    let mut rest = Vec::new();
    let read = AsyncReadExt::read_to_end(&mut noise, &mut rest);
    let _ = timeout(PATIENCE, read).await.unwrap();
    let reason = "lacewing_http_refused_total{reason=\"the handshake failed\"}";
    site.metric_reaches(reason, 1.0).await;

    // Somebody else's authority opens nothing.
    let other = Site::start().await;
    let foreign = other.enrol("d1").await;
    let refused = site.try_ask(Some(&foreign), "GET /healthz", None).await;
    assert!(refused.is_err(), "{refused:?}");
    assert!(
        Client::with(site.options("d1", Some(&foreign)))
            .await
            .is_err()
    );
    other.handle.stop().await;

    // Open handshakes do not keep others out.
    let mut held = Vec::new();
    for _ in 0..200 {
        held.push(TcpStream::connect(site.handle.http).await.unwrap());
        held.push(TcpStream::connect(site.mqtt()).await.unwrap());
    }
    assert_eq!(site.ask("GET /healthz", None).await.0, 200);
    let badge = site.enrol("d1").await;
    drop(site.connect("d1", &badge).await);

    let mut tls = (*site.tls(None)).clone();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(site.handle.http).await.unwrap();
    let name = ServerName::from(site.handle.http.ip());
    let stream = tokio_rustls::TlsConnector::from(Arc::new(tls))
        .connect(name, stream)
        .await
        .unwrap();
    let (_, session) = stream.get_ref();
    assert_eq!(session.alpn_protocol(), Some(b"h2".as_slice()));
    assert_eq!(
        session.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor, TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let request = Request::get("https://127.0.0.1/healthz")
        .body(Body::empty())
        .unwrap();
    let answer = timeout(PATIENCE, sender.send_request(request))
        .await
        .unwrap();
    assert_eq!(answer.unwrap().status(), 200);
    drop(held);
    site.handle.stop().await;
}

/// A handshake with the broker, from an address of this machine.
async fn shake(site: &Site, from: u8) -> tokio_rustls::client::TlsStream<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, from], 0).into()).unwrap();
    let stream = socket.connect(site.mqtt()).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(site.tls(None));
    let name = ServerName::from(site.mqtt().ip());
    connector.connect(name, stream).await.unwrap()
}

/// Shows a name and a password to the broker; what it says (MQTT 3.1.1, 3.2.2.3), and after how long.
async fn log_in(site: &Site, from: u8, name: &str, password: &str) -> (u8, Duration) {
    let text = |text: &str| [&(text.len() as u16).to_be_bytes()[..], text.as_bytes()].concat();
    let head = [&text("MQTT")[..], &[4, 0xc2, 0, 60]].concat();
    let body = [head, text(""), text(name), text(password)].concat();
    let packet = [&[0x10, body.len() as u8][..], &body].concat();
    let mut stream = shake(site, from).await;
    let since = tokio::time::Instant::now();
    stream.write_all(&packet).await.unwrap();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await.unwrap();
    (answer[3], since.elapsed())
}

/// Somebody tries passwords without an end: he is refused after some, and a listener from elsewhere comes in meanwhile, under
/// the same name.
#[tokio::test(flavor = "multi_thread")]
async fn who_guesses_passwords_keeps_nobody_out() {
    let site = Arc::new(Site::start().await);
    let right = site.subscriber("panel", Value::Null).await;
    let guesses: Vec<_> = (0..300)
        .map(|n| {
            let site = site.clone();
            // Half of them for names of their own, so that the limit of one name does not do it alone.
            let name = if n % 2 == 0 {
                "panel".to_owned()
            } else {
                format!("n{n}")
            };
            tokio::spawn(async move {
                log_in(&site, 66, &name, &format!("wrong horse {n}"))
                    .await
                    .0
            })
        })
        .collect();
    let refused = "lacewing_broker_refused_total{reason=\"a wrong name or password\"}";
    site.metric_reaches(refused, 1.0).await;
    let (said, took) = log_in(&site, 2, "panel", &right).await;
    assert_eq!(said, 0, "it is let in");
    assert!(took < Duration::from_secs(4), "{took:?}");
    let mut wrong = 0;
    for guess in guesses {
        let said = guess.await.unwrap();
        assert!([3, 4].contains(&said), "{said}");
        wrong += usize::from(said == 4);
    }
    assert!(wrong < 100, "{wrong} were hashed");
    let refused = "lacewing_broker_refused_total{reason=\"too many passwords from one address\"}";
    site.metric_reaches(refused, 1.0).await;
}

/// Handshakes that never go on come by the thousand from one address: one from another that takes its time is not pushed out.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_handshakes_pushes_out_only_itself() {
    let site = Site::start().await;
    let from = async |n: u8| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, n], 0).into()).unwrap();
        socket.connect(site.mqtt()).await.unwrap()
    };
    let slow = from(2).await;
    let mut held = Vec::new();
    for _ in 0..1_300 {
        held.push(from(66).await);
    }
    let refused = "lacewing_broker_refused_total{reason=\"too many handshakes at once\"}";
    site.metric_reaches(refused, 200.0).await;
    let connector = tokio_rustls::TlsConnector::from(site.tls(None));
    let name = ServerName::from(site.mqtt().ip());
    let through = timeout(PATIENCE, connector.connect(name, slow)).await;
    assert!(through.unwrap().is_ok());
    drop(held);
    site.handle.stop().await;
}

/// What an operator says on the command line goes over TLS too, to the coordinator of the data folder and to no other.
#[tokio::test(flavor = "multi_thread")]
async fn the_command_line() {
    let site = Site::start().await;
    let run = async |arguments: &[&str]| {
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_cloud-coordinator"))
            .args(arguments)
            .arg("--data")
            .arg(site.dir.path())
            .output();
        let output = timeout(common::WORK, output).await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let token = run(&["device", "token", "--site", "demo", "--approve"]).await;
    let key = KeyPair::generate().unwrap();
    let request = csr(&key, "demo/d1");
    assert_eq!(site.show(&token, "d1", &request).await.0, 202);
    assert!(run(&["device", "list"]).await.contains("pending"));
    run(&["device", "approve", "demo/d1"]).await;
    assert_eq!(site.show(&token, "d1", &request).await.0, 200);
    let said = run(&["device", "revoke", "demo/d1"]).await;
    assert_eq!(said, "demo/d1 is revoked");
    let password = run(&["subscriber", "add", "panel", "--site", "demo"]).await;
    drop(site.listen("mosq-1", "panel", &password).await.unwrap());
    assert!(run(&["subscriber", "list"]).await.contains("demo"));
    run(&["subscriber", "remove", "panel"]).await;
    assert!(site.listen("mosq-1", "panel", &password).await.is_err());
    site.handle.stop().await;
}

/// A key that others can read stops the start, and the message says how to mend it.
#[tokio::test]
async fn a_key_that_others_can_read() {
    use std::os::unix::fs::PermissionsExt;
    let site = Site::start().await;
    let (dir, handle) = (site.dir, site.handle);
    handle.stop().await;
    let key = dir.path().join("trust/ca.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = Coordinator::start(common::config(dir.path()))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("chmod 600"), "{error}");
}

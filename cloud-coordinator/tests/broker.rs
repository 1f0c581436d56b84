//! The embedded broker: who may do what, and what it survives.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;

use std::{net::SocketAddr, time::Duration};

use common::*;
use rumqttc::{LastWill, QoS};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

#[tokio::test(flavor = "multi_thread")]
async fn rights() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let broker = handle.mqtt.unwrap();
    let mut viewer = Client::connect(broker, "mosq-1").await;
    assert!(viewer.subscribe("lacewing/#").await && viewer.subscribe("homeassistant/#").await);
    assert!(!viewer.subscribe("#").await && !viewer.subscribe("$SYS/#").await);

    let mut d1 = Client::connect(broker, "demo/d1").await;
    assert!(!d1.subscribe("lacewing/#").await && !d1.subscribe(&topic("d2", "_", "ack")).await);
    assert!(d1.subscribe(&topic("d1", "_", "ack")).await);

    // Another's topic, the coordinator's words, anything of a viewer: gone nowhere, kept nowhere.
    d1.publish_as(&topic("d2", "_", "status"), "offline", true)
        .await;
    d1.publish_as(
        &topic("d1", "_", "ack"),
        r#"{"v":1,"epoch":1,"upto":9}"#,
        true,
    )
    .await;
    d1.publish("lacewing/other", "x").await;
    viewer
        .publish_as(&topic("d1", "cam0", "result"), encoded("d1", 1, 1), true)
        .await;
    metric_reaches(
        handle.http,
        "lacewing_broker_denied_total{reason=\"publish\"}",
        4.0,
    )
    .await;
    d1.publish_as(&topic("d1", "_", "status"), "online", true)
        .await;
    assert_eq!(
        viewer.next().await,
        (topic("d1", "_", "status"), b"online".to_vec())
    );
    assert_eq!(
        get(handle.http, "/api/v1/readings").await.1["items"]
            .as_array()
            .unwrap()
            .len(),
        0
    );
    let mut later = Client::connect(broker, "mosq-2").await;
    assert!(later.subscribe("lacewing/v1/#").await);
    assert_eq!(later.next().await.0, topic("d1", "_", "status"));

    // Wills and ids.
    let will = |device| {
        LastWill::new(
            topic(device, "_", "status"),
            "offline",
            QoS::AtLeastOnce,
            true,
        )
    };
    let refused = Client::try_connect(broker, "demo/d3", Some(will("d1"))).await;
    assert!(refused.is_err_and(|e| e.contains("NotAuthorized")));
    assert!(
        Client::try_connect(broker, "mosq-3", Some(will("d1")))
            .await
            .is_err()
    );
    for id in ["#", "+", "demo/#"] {
        let refused = Client::try_connect(broker, id, None).await;
        assert!(refused.is_err_and(|e| e.contains("BadClientId")), "{id}");
    }

    // The will of a device that is cut off; not of one that says goodbye.
    let d4 = Client::try_connect(broker, "demo/d4", Some(will("d4")))
        .await
        .unwrap();
    d4.ended.abort();
    assert_eq!(
        viewer.next().await,
        (topic("d4", "_", "status"), b"offline".to_vec())
    );
    let d5 = Client::try_connect(broker, "demo/d5", Some(will("d5")))
        .await
        .unwrap();
    d5.client.disconnect().await.unwrap();
    timeout(PATIENCE, d5.ended).await.unwrap().unwrap();
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, 1))
        .await;
    let (next, _) = viewer.next().await;
    assert!(next.contains("/d1/"), "not the will of d5: {next}");
    handle.stop().await;
}

/// Sends bytes and reads what comes back until the broker closes.
async fn raw(broker: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(broker).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    let _reset_is_fine = read.unwrap();
    answer
}

/// CONNECT of MQTT 3.1.1 with this id, clean session, no keep-alive.
fn connect(id: &str) -> Vec<u8> {
    let mut bytes = vec![0x10, 12 + id.len() as u8, 0, 4];
    bytes.extend(b"MQTT\x04\x02\x00\x00");
    bytes.extend([0, id.len() as u8]);
    bytes.extend(id.as_bytes());
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn abuse() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let broker = handle.mqtt.unwrap();
    let mut d1 = device(broker, "d1").await;

    let puback_first = [0x40, 2, 0, 1];
    assert!(raw(broker, &puback_first).await.is_empty());
    let claims_256_mb = [0x30, 0xff, 0xff, 0xff, 0x7f, 0, 1, b'a'];
    assert!(raw(broker, &claims_256_mb).await.is_empty());
    let connect_of_256_mb = [0x10, 0xff, 0xff, 0xff, 0x7f];
    assert!(raw(broker, &connect_of_256_mb).await.is_empty());
    assert!(raw(broker, b"GET / HTTP/1.1\r\n\r\n").await.is_empty());
    let mqtt5 = [0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 5, 2, 0, 0, 0, 0, 0];
    assert_eq!(
        raw(broker, &mqtt5).await,
        [0x20, 2, 0, 1],
        "this broker speaks 3.1.1"
    );
    let accepted = [0x20, 2, 0, 0];
    let with = |rest: &[u8]| [connect("demo/dx").as_slice(), rest].concat();
    let empty_topic = [0x30, 3, 0, 0, b'x'];
    assert_eq!(raw(broker, &with(&empty_topic)).await, accepted);
    let second_connect = connect("demo/dx");
    assert_eq!(raw(broker, &with(&second_connect)).await, accepted);
    let wildcard = [0x30, 5, 0, 2, b'a', b'#', b'x'];
    assert_eq!(raw(broker, &with(&wildcard)).await, accepted);
    let too_large = [0x30, 0x80, 0x80, 0x40, 0, 1, b'a'];
    assert_eq!(raw(broker, &with(&too_large)).await, accepted);

    // A device of the same name takes over; the old connection ends.
    let first = Client::connect(broker, "demo/twin").await;
    let _second = Client::connect(broker, "demo/twin").await;
    timeout(PATIENCE, first.ended).await.unwrap().unwrap();

    // The honest device noticed nothing.
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, 1))
        .await;
    d1.acknowledged(1, 1).await;
    assert!(
        metric(
            handle.http,
            "lacewing_broker_refused_total{reason=\"malformed before CONNECT\"}"
        )
        .await
            >= 1.0
    );
    handle.stop().await;
}

/// One address cannot take all connections, and one client not all subscriptions.
#[tokio::test(flavor = "multi_thread")]
async fn shares() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.broker.max_connections = 4;
    let handle = cloud_coordinator::Coordinator::start(config).await.unwrap();
    let broker = handle.mqtt.unwrap();
    let mut first = Client::connect(broker, "mosq-0").await;
    let held = [
        Client::connect(broker, "mosq-1").await,
        Client::connect(broker, "mosq-2").await,
    ];
    assert!(Client::try_connect(broker, "mosq-3", None).await.is_err());
    let reason = "too many connections from one address";
    let name = format!("lacewing_broker_refused_total{{reason=\"{reason}\"}}");
    metric_reaches(handle.http, &name, 1.0).await;

    for n in 0..128 {
        assert!(first.subscribe(&format!("lacewing/{n}")).await);
    }
    assert!(!first.subscribe("lacewing/128").await);
    assert!(first.subscribe("lacewing/1").await, "the same again");
    let what = "have another subscription beside 128 to";
    let name = format!("lacewing_broker_denied_total{{reason=\"{what}\"}}");
    metric_reaches(handle.http, &name, 1.0).await;
    assert!(held.iter().all(|c| !c.ended.is_finished()));
    handle.stop().await;
}

/// QoS 2 is taken from a publisher exactly once.
#[tokio::test(flavor = "multi_thread")]
async fn quality_of_service_two() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let mut d1 = device(handle.mqtt.unwrap(), "d1").await;
    let options = rumqttc::PublishOptions::exactly_once();
    for seq in 1..=5 {
        let body = encoded("d1", 1, seq);
        d1.client
            .publish(topic("d1", "cam0", "result"), body, options)
            .await
            .unwrap();
    }
    d1.acknowledged(1, 5).await;
    assert!(metric(handle.http, "lacewing_duplicates_total").await == 0.0);
    handle.stop().await;
}

/// A subscriber that stops reading is cut; another one gets every message, and nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_subscriber_harms_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let broker = handle.mqtt.unwrap();
    let mut slow = TcpStream::connect(broker).await.unwrap();
    let mut subscribe = vec![0x82, 15, 0, 1, 0, 10];
    subscribe.extend(b"lacewing/#\x01");
    slow.write_all(&[connect("slow"), subscribe].concat())
        .await
        .unwrap();
    let mut answer = [0; 9];
    slow.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, [0x20, 2, 0, 0, 0x90, 3, 0, 1, 1]);
    let mut good = Client::connect(broker, "good").await;
    assert!(good.subscribe("lacewing/v1/+/+/+/replay").await);

    let mut d1 = device(broker, "d1").await;
    // More than the subscriber's queue, its window and the buffers of the kernel hold.
    let body = batch("d1", 1, 1..=200);
    for _ in 0..16 {
        for _ in 0..50 {
            d1.publish(&topic("d1", "_", "replay"), body.clone()).await;
        }
        for _ in 0..50 {
            assert!(good.next().await.0.ends_with("/replay"));
        }
    }
    d1.acknowledged(1, 200).await;
    metric_reaches(handle.http, "lacewing_broker_cut_total", 1.0).await;
    // What the kernel still holds can be read; then the connection ends.
    let mut rest = Vec::new();
    let ended = timeout(Duration::from_secs(20), slow.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "the slow subscriber is cut");
    handle.stop().await;
}

/// A packet of this kind, of less than 2 MiB.
fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let digits = [length | 0x80, length >> 7 | 0x80, length >> 14].map(|digit| digit as u8);
    [&[kind][..], &digits, body].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u16).to_be_bytes()[..], text.as_bytes()].concat()
}

fn subscribe(qos: u8, filters: &[&str]) -> Vec<u8> {
    let filters = filters.iter().flat_map(|f| [text(f), vec![qos]].concat());
    packet(
        0x82,
        &[0, 1].into_iter().chain(filters).collect::<Vec<u8>>(),
    )
}

/// So many devices leave so many retained messages each.
async fn leave(broker: SocketAddr, devices: usize, each: usize) {
    for device in 0..devices {
        let name = format!("left{device}");
        let mut stream = TcpStream::connect(broker).await.unwrap();
        let mut bytes = connect(&format!("demo/{name}"));
        for n in 0..each {
            let topic = topic(&name, &format!("c{n}"), "drift");
            bytes.extend(packet(0x31, &[text(&topic), b"{}".to_vec()].concat()));
        }
        bytes.extend([0xe0, 0]);
        stream.write_all(&bytes).await.unwrap();
        let mut answer = Vec::new();
        let read = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        read.unwrap().unwrap();
    }
}

/// How many messages come until there are none for a while.
async fn messages(stream: &mut TcpStream) -> usize {
    let mut heard = Vec::new();
    let quiet = Duration::from_secs(1);
    while let Ok(read) = timeout(quiet, stream.read_buf(&mut heard)).await {
        assert!(read.unwrap() > 0, "the connection stays");
    }
    let (mut rest, mut count) = (heard.as_slice(), 0);
    while let [kind, after @ ..] = rest {
        let digits = after.iter().take_while(|d| **d >= 0x80).count() + 1;
        let length = after[..digits].iter().rev();
        let length = length.fold(0, |sum, d| sum << 7 | usize::from(d & 0x7f));
        count += usize::from(kind >> 4 == 3);
        rest = &after[digits + length..];
    }
    count
}

/// The same filter over and over costs as much as once, in one packet and in many, and harms nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn who_subscribes_again_and_again_gets_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let broker = handle.mqtt.unwrap();
    leave(broker, 10, 30).await;
    let mut d1 = device(broker, "d1").await;

    let overlapping = ["lacewing/#", "lacewing/v1/#", "lacewing/v1/demo/+/+/drift"];
    let many: Vec<&str> = overlapping.into_iter().cycle().take(120).collect();
    let mut viewer = TcpStream::connect(broker).await.unwrap();
    let bytes = [connect("viewer"), subscribe(0, &many)].concat();
    viewer.write_all(&bytes).await.unwrap();
    assert_eq!(messages(&mut viewer).await, 300);

    let mut greedy = TcpStream::connect(broker).await.unwrap();
    let again = subscribe(0, &many).repeat(500);
    greedy.write_all(&connect("greedy")).await.unwrap();
    greedy.write_all(&again).await.unwrap();
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, 1))
        .await;
    timeout(Duration::from_secs(5), d1.acknowledged(1, 1))
        .await
        .unwrap();
    let got = messages(&mut greedy).await;
    assert!(got < 500 * 300, "not once for each time: {got}");

    for (filters, reason) in [
        (40_000, "more than is read"),
        (129, "more than there may be"),
    ] {
        let mut bold = TcpStream::connect(broker).await.unwrap();
        let bytes = [connect("bold"), subscribe(1, &vec!["lacewing/#"; filters])].concat();
        // It may be thrown out before it has said all of it.
        let _ = bold.write_all(&bytes).await;
        let mut answer = Vec::new();
        let ended = timeout(PATIENCE, bold.read_to_end(&mut answer)).await;
        assert!(ended.is_ok(), "{reason}");
        assert!(answer.len() <= 4, "{reason}: nothing beyond the welcome");
    }
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, 2))
        .await;
    d1.acknowledged(1, 2).await;
    handle.stop().await;
}

/// More than a queue and the window of unanswered messages hold.
#[tokio::test(flavor = "multi_thread")]
async fn who_reads_gets_everything_that_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let broker = handle.mqtt.unwrap();
    leave(broker, 180, 50).await;
    let mut viewer = Client::connect(broker, "viewer").await;
    assert!(viewer.subscribe("lacewing/v1/+/+/+/drift").await);
    let mut topics = std::collections::HashSet::new();
    while topics.len() < 180 * 50 {
        assert!(topics.insert(viewer.next().await.0), "each comes once");
    }
    handle.stop().await;
}

/// The command line tools that people have.
#[tokio::test(flavor = "multi_thread")]
async fn mosquitto_sub_shows_readings() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let broker = handle.mqtt.unwrap();
    let Ok(child) = tokio::process::Command::new("mosquitto_sub")
        .args([
            "-h",
            "127.0.0.1",
            "-p",
            &broker.port().to_string(),
            "-t",
            "lacewing/#",
            "-C",
            "2",
            "-v",
        ])
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
    else {
        eprintln!("mosquitto_sub is not installed, this is not tested");
        return;
    };
    let d1 = device(broker, "d1").await;
    d1.publish_as(&topic("d1", "_", "status"), "online", true)
        .await;
    let mut seq = 0;
    let mut child = Box::pin(child.wait_with_output());
    let output = loop {
        tokio::select! {
            output = &mut child => break output.unwrap(),
            () = tokio::time::sleep(Duration::from_millis(200)) => {
                seq += 1;
                assert!(seq < 100, "mosquitto_sub sees nothing");
                d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, seq)).await;
            }
        }
    };
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("lacewing/v1/demo/d1/"), "{text}");
    handle.stop().await;
}

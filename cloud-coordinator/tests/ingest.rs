//! From a message to a stored reading and its acknowledgement, over the embedded broker and over mosquitto.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;

use std::{net::SocketAddr, path::Path};

use cloud_coordinator::Handle;
use common::*;

/// Live, replayed, again, gaps: everything once, and everything acknowledged.
async fn whole_story(broker: SocketAddr, http: SocketAddr) {
    let mut d1 = device(broker, "d1").await;
    for seq in 1..=50 {
        d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 7, seq))
            .await;
    }
    let ack = d1.acknowledged(7, 50).await;
    assert_eq!((ack.upto, ack.ranges.len()), (50, 0));

    // The backlog overlaps with what is stored.
    d1.publish(&topic("d1", "_", "replay"), batch("d1", 7, 41..=120))
        .await;
    d1.acknowledged(7, 120).await;
    assert_eq!(all_readings(http, "", 33).await.len(), 120);
    metric_reaches(http, "lacewing_duplicates_total", 10.0).await;

    // Nothing new, but the device would not send it if it knew.
    d1.publish(&topic("d1", "_", "replay"), batch("d1", 7, 1..=20))
        .await;
    d1.acknowledged(7, 120).await;

    // A gap that overlaps with what is stored counts only what is missing; a gap that grew is one gap.
    d1.publish(&topic("d1", "_", "gap"), gap("d1", 7, 111, 130))
        .await;
    d1.acknowledged(7, 130).await;
    d1.publish(&topic("d1", "_", "gap"), gap("d1", 7, 121, 140))
        .await;
    d1.acknowledged(7, 140).await;
    d1.publish(&topic("d1", "_", "gap"), gap("d1", 7, 200, 210))
        .await;
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 7, 141))
        .await;
    let ack = d1.acknowledged(7, 141).await;
    assert!(ack.stored().covers(200, 210));
    let (_, gaps) = get(http, "/api/v1/gaps?site=demo&device=d1").await;
    let gaps: Vec<_> = gaps["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| {
            (
                g["from"].as_u64().unwrap(),
                g["to"].as_u64().unwrap(),
                g["reason"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(gaps, [(121, 140, "full"), (200, 210, "full")]);

    // Another outbox of the same device starts again at 1.
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 8, 1))
        .await;
    d1.acknowledged(8, 1).await;
    assert_eq!(all_readings(http, "&device=d1", 1_000).await.len(), 122);

    let (_, d) = get(http, "/api/v1/devices/demo/d1").await;
    assert_eq!(
        (d["stored"].as_u64(), d["missing"].as_u64()),
        (Some(122), Some(31))
    );
    assert_eq!(d["last"]["frame"], 1);
    assert_eq!(
        d["right"].as_u64().unwrap() + d["wrong"].as_u64().unwrap(),
        122
    );
}

/// What cannot be used is refused and counted, and the rest of the same moment is stored.
async fn bad_messages(broker: SocketAddr, http: SocketAddr) {
    let mut d2 = device(broker, "d2").await;
    let result = topic("d2", "cam0", "result");
    d2.publish(&result, "not json").await;
    d2.publish(&result, r#"{"v":2,"shape":"unknown"}"#).await;
    d2.publish(&result, encoded("d1", 1, 1)).await;
    d2.publish(&result, vec![b' '; 20_000]).await;
    d2.publish(
        &result,
        encoded("d2", 1, 1)
            .into_iter()
            .chain(*b"x")
            .collect::<Vec<_>>(),
    )
    .await;
    d2.publish(&topic("d2", "_", "status"), "perhaps").await;
    d2.publish(&topic("d2", "_", "info"), "{}").await;
    d2.publish(&result, encoded("d2", 1, 1)).await;
    d2.acknowledged(1, 1).await;
    for (reason, least) in [
        ("not_json", 3.0),
        ("version", 1.0),
        ("wrong_device", 1.0),
        ("too_large", 1.0),
        ("value", 1.0),
    ] {
        metric_reaches(
            http,
            &format!("lacewing_ingest_refused_total{{reason=\"{reason}\"}}"),
            least,
        )
        .await;
    }
    assert_eq!(all_readings(http, "&device=d2", 1_000).await.len(), 1);
    a_bad_reading_holds_up_no_other(broker, http).await;
}

/// A batch with readings that are refused: the others are stored, and those that never can be are gaps, acknowledged like them.
async fn a_bad_reading_holds_up_no_other(broker: SocketAddr, http: SocketAddr) {
    let mut d4 = device(broker, "d4").await;
    let as_said = |seq: u64, from: &str, to: &str| {
        let text = String::from_utf8(encoded("d4", 1, seq)).unwrap();
        assert!(text.contains(from), "{text}");
        text.replace(from, to).into_bytes()
    };
    let long = format!("\"model\":\"{}\"", "x".repeat(257));
    let readings: Vec<Vec<u8>> = (1..=99)
        .map(|seq| match seq {
            7 => as_said(7, "\"model\":\"m@1\"", &long),
            8 => as_said(8, "\"score\":0.875", "\"score\":3.5"),
            50 => as_said(50, "\"score\":0.875", "\"score\":null"),
            _ => encoded("d4", 1, seq),
        })
        .collect();
    let views: Vec<&[u8]> = readings.iter().map(Vec::as_slice).collect();
    let (batch, taken) = mesh_core::replay_bytes(&views);
    assert_eq!(taken, 99);
    d4.publish(&topic("d4", "_", "replay"), batch).await;
    d4.acknowledged(1, 99).await;
    // The same live.
    let live = as_said(50, "\"seq\":50", "\"seq\":100");
    let live = String::from_utf8(live).unwrap().replace("0.875", "-1");
    d4.publish(&topic("d4", "cam0", "result"), live).await;
    d4.acknowledged(1, 100).await;
    assert_eq!(all_readings(http, "&device=d4", 1_000).await.len(), 96);
    let (_, gaps) = get(http, "/api/v1/gaps?site=demo&device=d4").await;
    let gaps: Vec<_> = gaps["items"].as_array().unwrap().iter().collect();
    let gaps: Vec<_> = gaps
        .iter()
        .map(|g| (&g["from"], &g["to"], g["reason"].as_str().unwrap()))
        .map(|(from, to, why)| (from.as_u64().unwrap(), to.as_u64().unwrap(), why))
        .collect();
    let why = "refused";
    assert_eq!(gaps, [(7, 8, why), (50, 50, why), (100, 100, why)]);
    // Readings of another version are not given up: the next coordinator can read them.
    let newer = as_said(101, "{\"v\":1", "{\"v\":2");
    let (batch, _) = mesh_core::replay_bytes(&[&newer, &encoded("d4", 1, 102)]);
    d4.publish(&topic("d4", "_", "replay"), batch).await;
    let ack = loop {
        let ack = d4.acknowledged(1, 100).await;
        if ack.stored().contains(102) {
            break ack;
        }
    };
    assert!(!ack.stored().contains(101), "{ack:?}");
}

/// What a device is and says of itself.
async fn reports(broker: SocketAddr, http: SocketAddr) {
    let d3 = device(broker, "d3").await;
    d3.publish_as(&topic("d3", "_", "status"), "online", true)
        .await;
    let info =
        r#"{"v":1,"agent":"0.1.0","board":"pi5","arch":"aarch64","sources":"cam0","epoch":5}"#;
    d3.publish_as(&topic("d3", "_", "info"), info, true).await;
    let model =
        r#"{"v":1,"name":"steel","version":"1","sha256":"ab","task":"classify","labels":"a,b"}"#;
    d3.publish_as(&topic("d3", "_", "model"), model, true).await;
    let metrics = r#"{"v":1,"ts":1,"uptime_s":1,"frames":1,"frames_bad":0,"frames_gated":0,"readings":1,"backlog":17,"outbox_bytes":1,"gaps_pending":0,"reconnects":0,"refused":0,"latency_ms":1.0,"rss_bytes":1}"#;
    d3.publish_as(&topic("d3", "_", "metrics"), metrics, false)
        .await;
    let state = r#"{"v":1,"ts":1,"health":"no_source","detail":"cam0 is gone"}"#;
    d3.publish_as(&topic("d3", "_", "state"), state, true).await;
    let complete = async {
        loop {
            let (status, d) = get(http, "/api/v1/devices/demo/d3").await;
            if status == 200 && d["backlog"] == 17 && d["detail"] == "cam0 is gone" {
                return d;
            }
        }
    };
    let d = tokio::time::timeout(PATIENCE, complete).await.unwrap();
    assert_eq!(
        (&d["status"], &d["board"], &d["model"]["name"]),
        (&"online".into(), &"pi5".into(), &"steel".into())
    );
    let (_, models) = get(http, "/api/v1/models").await;
    let steel = models["items"]
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["name"] == "steel")
        .unwrap();
    assert_eq!(steel["devices"], 1);
}

async fn again(handle: Handle, data: &Path) -> Handle {
    handle.stop().await;
    start(data).await
}

#[tokio::test(flavor = "multi_thread")]
async fn embedded_broker() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let mqtt = handle.mqtt.unwrap();
    whole_story(mqtt, handle.http).await;
    bad_messages(mqtt, handle.http).await;
    reports(mqtt, handle.http).await;

    // After a restart everything is still known: a waiting device is told without asking, what comes again
    // is not stored again, what is new is.
    let handle = again(handle, dir.path()).await;
    let mqtt = handle.mqtt.unwrap();
    let mut d1 = device(mqtt, "d1").await;
    d1.acknowledged(8, 1).await;
    d1.publish(&topic("d1", "_", "replay"), batch("d1", 7, 1..=200))
        .await;
    let ack = d1.acknowledged(7, 210).await;
    assert_eq!(ack.upto, 210);
    assert_eq!(
        all_readings(handle.http, "&device=d1", 1_000).await.len(),
        122 + 58
    );
    let (_, d) = get(handle.http, "/api/v1/devices/demo/d3").await;
    assert_eq!(
        (&d["status"], &d["model"]["name"]),
        (&"online".into(), &"steel".into())
    );
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mosquitto() {
    let dir = tempfile::tempdir().unwrap();
    let mut broker = Mosquitto::start().await;
    let handle = start_with(&broker, dir.path()).await;
    assert!(handle.mqtt.is_none());
    whole_story(broker.address, handle.http).await;
    bad_messages(broker.address, handle.http).await;
    reports(broker.address, handle.http).await;

    // A topic that is not of the contract does not reach ingest as something else.
    let d9 = device(broker.address, "d9").await;
    d9.publish("lacewing/v1/Demo/d9/cam0/result", encoded("d9", 1, 1))
        .await;
    metric_reaches(
        handle.http,
        "lacewing_ingest_refused_total{reason=\"topic\"}",
        1.0,
    )
    .await;

    // One that is far too large, retained on a broker that bounds nothing: it comes again with each connection, and stops nothing.
    let big = vec![b'x'; 1 << 20];
    d9.publish_as(&topic("d9", "_", "info"), big, true).await;
    let refused = "lacewing_ingest_refused_total{reason=\"too_large\"}";
    metric_reaches(handle.http, refused, 2.0).await;
    handle.stop().await;
    let handle = start_with(&broker, dir.path()).await;
    metric_reaches(handle.http, refused, 1.0).await;
    let mut d9 = device(broker.address, "d9").await;
    let result = topic("d9", "cam0", "result");
    d9.publish(&result, encoded("d9", 1, 2)).await;
    while !d9.acknowledged(1, 0).await.stored().contains(2) {}

    // The broker dies and forgets everything. The coordinator says so, and is back when it is back.
    let address = broker.address;
    drop(broker);
    let away = async {
        while get(handle.http, "/readyz").await.0 != 503 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, away).await.unwrap();
    broker = Mosquitto::start_on(address).await.unwrap();
    ready(handle.http).await;
    let mut d1 = device(broker.address, "d1").await;
    d1.acknowledged(8, 1).await;
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 8, 2))
        .await;
    d1.acknowledged(8, 2).await;
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tells_where_it_listens() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let text = std::fs::read_to_string(dir.path().join("addresses.json")).unwrap();
    let addresses: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(addresses["http"], handle.http.to_string());
    assert_eq!(addresses["mqtt"], handle.mqtt.unwrap().to_string());
    let error = cloud_coordinator::Coordinator::start(config(dir.path()))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("another coordinator"), "{error}");
    let other = tempfile::tempdir().unwrap();
    let mut taken = config(other.path());
    taken.http = handle.http;
    let error = cloud_coordinator::Coordinator::start(taken)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("cannot listen for HTTP"),
        "{error}"
    );
    handle.stop().await;
}

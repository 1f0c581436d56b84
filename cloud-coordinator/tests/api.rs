//! The API: pages, problems, live events, health.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use common::*;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

#[tokio::test(flavor = "multi_thread")]
async fn pages_hold_everything_exactly_once() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let (broker, http) = (handle.mqtt.unwrap(), handle.http);
    for name in ["d1", "d2", "d3"] {
        let mut device = device(broker, name).await;
        device
            .publish(&topic(name, "_", "replay"), batch(name, 1, 1..=111))
            .await;
        device.acknowledged(1, 111).await;
    }
    for limit in [1, 7, 111, 333, 1_000] {
        for order in ["asc", "desc"] {
            let rows = all_readings(http, &format!("&order={order}"), limit).await;
            let ids: Vec<_> = rows.iter().map(|r| r["id"].as_i64().unwrap()).collect();
            assert!(if order == "asc" {
                ids.is_sorted()
            } else {
                ids.iter().rev().is_sorted()
            });
            let distinct: BTreeSet<_> = rows
                .iter()
                .map(|r| (r["device"].as_str().unwrap(), r["seq"].as_i64().unwrap()))
                .collect();
            assert_eq!(
                (rows.len(), distinct.len()),
                (333, 333),
                "limit {limit} {order}"
            );
        }
    }
    for (query, expected) in [
        ("&device=d2", 111),
        ("&site=demo&device=d2&label=hole", 37),
        ("&site=other", 0),
        ("&source=cam1", 0),
        ("&since=1700000000101", 33),
        ("&until=1700000000011", 30),
        ("&label=x' OR '1'='1".replace(' ', "%20").as_str(), 0),
    ] {
        assert_eq!(
            all_readings(http, query, 10).await.len(),
            expected,
            "{query}"
        );
    }
    let (_, first) = get(http, "/api/v1/devices?limit=2").await;
    assert_eq!(first["next"], "demo/d2");
    let (_, second) = get(http, "/api/v1/devices?limit=2&after=demo/d2").await;
    assert_eq!(
        (second["items"][0]["device"].as_str(), &second["next"]),
        (Some("d3"), &serde_json::Value::Null)
    );
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_error_is_a_problem() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let chunk = "4000\r\n".to_owned() + &"x".repeat(0x4000) + "\r\n";
    for (status, text) in [
        (404, "GET /nothing HTTP/1.1\r\nhost: x\r\n".to_owned()),
        (
            404,
            "GET /api/v1/devices/demo/d1 HTTP/1.1\r\nhost: x\r\n".into(),
        ),
        (
            404,
            "GET /api/v1/devices/%23/..%2f HTTP/1.1\r\nhost: x\r\n".into(),
        ),
        (
            405,
            "POST /api/v1/devices HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n".into(),
        ),
        (405, "DELETE / HTTP/1.1\r\nhost: x\r\n".into()),
        (
            400,
            "GET /api/v1/readings?limit=0 HTTP/1.1\r\nhost: x\r\n".into(),
        ),
        (
            400,
            "GET /api/v1/readings?limit=many HTTP/1.1\r\nhost: x\r\n".into(),
        ),
        (
            400,
            "GET /api/v1/readings?colour=red HTTP/1.1\r\nhost: x\r\n".into(),
        ),
        (
            400,
            "GET /api/v1/readings?order=up HTTP/1.1\r\nhost: x\r\n".into(),
        ),
        (
            400,
            "GET /api/v1/devices?after=nonsense HTTP/1.1\r\nhost: x\r\n".into(),
        ),
        (
            413,
            "POST /api/v1/tokens HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n".into(),
        ),
    ] {
        let text = format!("{text}connection: close\r\n\r\n");
        let (got, head, body) = request(http, &text).await;
        assert_eq!(got, status, "{text}{body}");
        assert!(
            head.contains("content-type: application/problem+json"),
            "{head}"
        );
        assert!(head.contains("x-content-type-options: nosniff"));
        assert!(head.contains("content-security-policy: default-src 'self'"));
        let problem: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(problem["status"], status);
        assert!(
            !problem["title"].as_str().unwrap().is_empty()
                && !problem["detail"].as_str().unwrap().is_empty()
        );
        assert!(status != 405 || head.contains("allow: get"), "{head}");
    }
    // A body without end: answered or closed, and never read to its end.
    let mut stream = TcpStream::connect(http).await.unwrap();
    stream
        .write_all(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        .await
        .unwrap();
    let endless = async { while stream.write_all(chunk.as_bytes()).await.is_ok() {} };
    timeout(PATIENCE, endless)
        .await
        .expect("the connection is closed");
    assert_eq!(get(http, "/healthz").await.0, 200);
    handle.stop().await;
}

/// Reads one event: its name and its data.
async fn event(lines: &mut (impl AsyncBufReadExt + Unpin)) -> (String, serde_json::Value) {
    let (mut name, mut data) = (String::new(), serde_json::Value::Null);
    loop {
        let mut line = String::new();
        timeout(PATIENCE, lines.read_line(&mut line))
            .await
            .unwrap()
            .unwrap();
        if let Some(rest) = line.strip_prefix("event:") {
            name = rest.trim().to_owned();
        } else if let Some(rest) = line.strip_prefix("data:") {
            data = serde_json::from_str(rest.trim()).unwrap();
        } else if line.trim().is_empty() && !name.is_empty() {
            return (name, data);
        }
    }
}

async fn watch(http: SocketAddr, query: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(http).await.unwrap();
    let shown = shown(http);
    let text = format!("GET /api/v1/live{query} HTTP/1.1\r\nhost: x\r\n{shown}\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        timeout(PATIENCE, stream.read_line(&mut head))
            .await
            .unwrap()
            .unwrap();
    }
    assert!(
        head.starts_with("HTTP/1.1 200") && head.to_lowercase().contains("text/event-stream"),
        "{head}"
    );
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn live_events() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let (broker, http) = (handle.mqtt.unwrap(), handle.http);
    let mut of_d2 = watch(http, "?device=d2").await;
    let mut devices = watch(http, "?what=devices").await;
    assert_eq!(
        event(&mut devices).await,
        ("devices".into(), serde_json::json!([]))
    );
    for name in ["d1", "d2"] {
        let mut device = device(broker, name).await;
        device
            .publish(&topic(name, "_", "replay"), batch(name, 1, 1..=5))
            .await;
        device.acknowledged(1, 5).await;
        let hostile = mesh_core::Reading {
            label: "<img src=x onerror=alert(1)>".into(),
            ..reading(name, 1, 6)
        };
        device
            .publish(&topic(name, "cam0", "result"), hostile.encode().unwrap())
            .await;
        device.acknowledged(1, 6).await;
    }
    // Only what is live, and only of the device that was asked for.
    let (name, data) = event(&mut of_d2).await;
    assert_eq!(
        (name.as_str(), &data["device"], &data["seq"]),
        ("reading", &"d2".into(), &6.into())
    );
    assert_eq!(data["label"], "<img src=x onerror=alert(1)>");
    let mut seen = BTreeSet::new();
    while seen.len() < 2 {
        let (name, data) = event(&mut devices).await;
        assert_eq!(name, "devices");
        seen.extend(
            data.as_array()
                .unwrap()
                .iter()
                .filter(|d| d["stored"] == 6)
                .map(|d| d["device"].as_str().unwrap().to_owned()),
        );
    }
    handle.stop().await;
}

/// A client that does not read is told how much it missed, and ingest never waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_watcher_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let (broker, http) = (handle.mqtt.unwrap(), handle.http);
    let mut slow = watch(http, "").await;
    let mut d1 = device(broker, "d1").await;
    let (mut sent, mut missed) = (0, 0);
    let told = |(name, data): (String, serde_json::Value)| match name.as_str() {
        "lagged" => data["missed"].as_u64().unwrap(),
        _ => 0,
    };
    // More than the queue and the buffers of the kernel hold.
    while metric(http, "lacewing_live_missed_total").await == 0.0 && sent < 200_000 {
        for _ in 0..2_000 {
            sent += 1;
            d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, sent))
                .await;
        }
        d1.acknowledged(1, sent).await;
        // Once it reads a little, it finds that it is behind.
        for _ in 0..20 {
            missed += told(event(&mut slow).await);
        }
    }
    // What the buffers hold comes first.
    let rest = async {
        while missed == 0 {
            missed += told(event(&mut slow).await);
        }
    };
    timeout(PATIENCE * 10, rest).await.unwrap();
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_and_what_watches_over_it() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let (status, html) = get(http, "/").await;
    let html = html.as_str().unwrap();
    assert!(status == 200 && html.contains("<title>Lacewing</title>"));
    assert!(!html.contains("onclick") && !html.contains("style=") && !html.contains("https://"));
    for file in [
        "/page.css",
        "/page.js",
        "/learning.js",
        "/icon.svg",
        "/label",
        "/label.js",
        "/login",
        "/login.js",
        "/setup",
        "/setup.js",
        "/who.js",
    ] {
        assert_eq!(get(http, file).await.0, 200, "{file}");
    }
    let (_, description) = get(http, "/api/v1/openapi.json").await;
    let paths = description["paths"].as_object().unwrap();
    // What has to be said in a question is in its parameters.
    let is_plain = |get: &serde_json::Value| {
        let all = get["parameters"].as_array();
        !all.is_some_and(|all| all.iter().any(|one| one["required"] == true))
    };
    for (path, _) in paths.iter().filter(|(path, methods)| {
        *path != "/api/v1/live" && methods.get("get").is_some_and(is_plain)
    }) {
        // There is no directory of people.
        let wanted = match path.starts_with("/api/v1/oidc/") {
            true => 404,
            false => 200,
        };
        assert_eq!(get(http, path).await.0, wanted, "{path}");
    }
    let (_, text) = get(http, "/metrics").await;
    assert!(text.as_str().unwrap().ends_with("# EOF\n"));
    handle.stop().await;
}

/// Connections that send a byte now and then are ended, and honest ones are served meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn dawdlers_are_ended() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let mut dawdlers = Vec::new();
    for _ in 0..1_000 {
        let mut stream = TcpStream::connect(http).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nx: ").await.unwrap();
        dawdlers.push(tokio::spawn(async move {
            // One byte of a header a second, for as long as that is taken.
            let (mut reading, mut writing) = stream.into_split();
            let dawdle = async {
                while writing.write_all(b"x").await.is_ok() {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            };
            let mut rest = Vec::new();
            tokio::select! {
                () = dawdle => {}
                _ = reading.read_to_end(&mut rest) => {}
            }
        }));
    }
    for _ in 0..100 {
        assert_eq!(get(http, "/api/v1/devices").await.0, 200);
    }
    for dawdler in dawdlers {
        let ended = timeout(Duration::from_secs(30), dawdler).await;
        assert!(ended.is_ok(), "ended after the time for headers");
    }
    metric_falls(http, "lacewing_http_connections", 10.0).await;
    assert_eq!(get(http, "/api/v1/devices").await.0, 200);
    handle.stop().await;
}

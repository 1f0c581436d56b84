//! Settings: set, refused, signed, told to those who are meant, taken back. The devices are played over real MQTT.
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
use mesh_core::{
    Desired, Failure, Phase, Reason, Reported, Settings, SettingsReport, VERSION,
    settings::Document,
};
use serde_json::{Value, json};
use tokio::time::sleep;

/// A device that listens for its wishes, on some board.
async fn played(broker: SocketAddr, name: &str, board: &str) -> Client {
    let mut client = Client::connect(broker, &format!("demo/{name}")).await;
    assert!(client.subscribe(&topic(name, "_", "desired")).await);
    client
        .publish_as(&topic(name, "_", "status"), "online", true)
        .await;
    let info = json!({
        "v": 1, "agent": "0", "board": board, "arch": "x", "sources": "cam0", "epoch": 1,
    });
    client
        .publish_as(&topic(name, "_", "info"), info.to_string(), true)
        .await;
    client
}

async fn wished(device: &mut Client) -> Desired {
    let (_, message) = device.next().await;
    Desired::decode(&message).unwrap()
}

/// Waits until these settings are wished for; what was said before may be said once more.
async fn comes_to(device: &mut Client, version: Option<u64>) {
    while wished(device).await.settings.map(|s| s.version) != version {}
}

async fn set(http: SocketAddr, whom: Value, settings: Value) -> (u16, Value) {
    let mut body = json!({"settings": settings, "author": "ada", "trial_s": 30});
    for (key, value) in whom.as_object().unwrap() {
        body[key] = value.clone();
    }
    say(http, "PUT /api/v1/settings", body).await
}

async fn report(device: &Client, name: &str, revision: u64, settings: SettingsReport) {
    let reported = Reported {
        v: VERSION,
        ts: 1,
        revision,
        phase: Phase::Settled,
        target: None,
        loaded: None,
        last_good: None,
        failure: None,
        bad: Vec::new(),
        progress: 0.0,
        evidence: Default::default(),
        settings: Some(settings),
        erased: None,
    };
    let message = reported.encode().unwrap();
    device
        .publish_as(&topic(name, "_", "reported"), message, true)
        .await;
}

async fn until(http: SocketAddr, what: impl Fn(&Value) -> bool) -> Value {
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        let (_, all) = get(http, "/api/v1/settings").await;
        if what(&all) {
            return all;
        }
        assert!(tokio::time::Instant::now() < end, "{all}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nearest_settings_are_told_and_outlive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start_as(config(dir.path())).await;
    let (http, broker) = (handle.http, handle.mqtt.unwrap());
    let mut d1 = played(broker, "d1", "pi").await;
    let mut d2 = played(broker, "d2", "nano").await;

    // Everybody at the site.
    let slow = json!({"report": {"every_s": 5}, "source": [{"name": "cam0", "fps": 2.0}]});
    let (status, said) = set(http, json!({"site": "demo"}), slow.clone()).await;
    assert_eq!((status, &said["version"]), (200, &json!(1)), "{said}");
    let first = wished(&mut d1).await;
    let named = first.settings.unwrap();
    assert_eq!((named.version, named.trial_s, first.release), (1, 30, None));
    assert_eq!(wished(&mut d2).await.settings, Some(named));

    // What is signed names whom it is for.
    let target = format!("/api/v1/tuf/targets/{}.settings/v1/1.json", named.digest);
    let (status, _, bytes) = send(http, &format!("GET {target}"), "", b"").await;
    assert_eq!((status, models::digest_of(&bytes)), (200, named.digest));
    let document = Document::decode(&bytes).unwrap();
    assert_eq!(Value::Object(document.settings), slow);
    assert_eq!(document.whom.site.unwrap().as_str(), "demo");

    // The nearest counts, and only that.
    let (_, said) = set(http, json!({"site": "demo", "board": "pi"}), slow.clone()).await;
    assert_eq!(said["version"], 2);
    let second = wished(&mut d1).await;
    assert!(second.revision > first.revision);
    let (_, said) = set(http, json!({"site": "demo", "device": "d1"}), slow.clone()).await;
    assert_eq!(said["version"], 3);
    let third = wished(&mut d1).await.settings.unwrap();
    assert_eq!((second.settings.unwrap().version, third.version), (2, 3));

    // How the devices do.
    let loaded = |settings: Settings| SettingsReport {
        target: Some(settings),
        loaded: Some(settings),
        ..SettingsReport::default()
    };
    report(&d1, "d1", 1, loaded(third)).await;
    let failed = SettingsReport {
        target: Some(named),
        failure: Some(Failure::with_reasons(Reason::Blind, "no picture from cam0")),
        bad: vec![named.digest],
        ..SettingsReport::default()
    };
    report(&d2, "d2", 1, failed).await;
    let all = until(http, |all| all[0]["kept"] == 1 && all[2]["failed"] == 1).await;
    assert_eq!(
        (&all[1]["devices"], &all[2]["devices"]),
        (&json!(0), &json!(1)),
        "{all}"
    );
    let failure = &all[2]["failures"][0];
    assert_eq!(failure["device"], "demo/d2");
    assert_eq!(failure["reason"], "blind");
    let (_, shown) = get(http, "/api/v1/devices/demo/d1").await;
    assert_eq!(
        shown["update"]["settings"]["loaded"]["version"], 3,
        "{shown}"
    );

    // A restart changes nothing's mind.
    handle.stop().await;
    drop((d1, d2));
    let handle = start_as(config(dir.path())).await;
    let (http, broker) = (handle.http, handle.mqtt.unwrap());
    let mut d1 = played(broker, "d1", "pi").await;
    assert_eq!(wished(&mut d1).await.settings, Some(third));

    // Taken back, what is less near counts again; at last nothing.
    for (query, left) in [
        ("site=demo&device=d1", Some(2)),
        ("site=demo&board=pi", Some(1)),
        ("site=demo", None),
    ] {
        let line = format!("DELETE /api/v1/settings?{query}&author=ada");
        assert_eq!(ask(http, &line).await.0, 204, "{query}");
        comes_to(&mut d1, left).await;
        assert_eq!(ask(http, &line).await.0, 404, "{query}");
    }
    assert_eq!(get(http, "/api/v1/settings").await.1, json!([]));
    // Numbers are not given twice.
    let (_, said) = set(http, json!({}), slow).await;
    assert_eq!(said["version"], 4);
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_set_from_afar_is_refused_with_every_reason() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let bad = json!({"data": "/x", "broker": {"url": "mqtt://x"}, "update": {"root": "x"}, "device": "y",
        "source": [{"name": "cam0", "journal": "/etc/passwd"}]});
    let (status, said) = set(http, json!({"site": "demo"}), bad).await;
    assert_eq!(status, 422, "{said}");
    let detail = said["detail"].as_str().unwrap();
    for part in [
        "data",
        "broker.url",
        "update",
        "device",
        "source[0].journal",
    ] {
        assert!(
            detail.contains(&format!("{part}: cannot be set")),
            "{part}: {detail}"
        );
    }
    let fine = json!({"report": {"every_s": 5}});
    for whom in [
        json!({"device": "d1"}),
        json!({"site": "a b"}),
        json!({"site": "demo", "device": "d1", "board": "pi"}),
        json!({"board": ""}),
        json!({"trial_s": 5}),
        json!({"author": " "}),
        json!({"more": 1}),
    ] {
        let (status, said) = set(http, whom.clone(), fine.clone()).await;
        assert_eq!(status, 422, "{whom} {said}");
    }
    assert_eq!(get(http, "/api/v1/settings").await.1, json!([]));
    handle.stop().await;
}

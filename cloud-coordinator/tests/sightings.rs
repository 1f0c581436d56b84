//! What several cameras see is one thing, said once, with all who saw it.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;

use std::{path::Path, time::Duration};

use cloud_coordinator::{Handle, config::SightingsConfig};
use common::*;
use mesh_core::Sighting;
use serde_json::Value;

const WINDOW_MS: u64 = 1_500;
/// Of the coordinator's clock at the readings: any will do.
const NOON: i64 = 1_790_000_000_000;

async fn looking(data: &Path) -> Handle {
    let mut own = config(data);
    own.sightings = SightingsConfig {
        labels: vec!["defect".into()],
        min_score: 0.5,
        window_ms: WINDOW_MS,
    };
    start_as(own).await
}

/// A reading of a defect.
fn defect(device: &str, seq: u64, ts: i64, score: f32) -> Vec<u8> {
    let mut reading = reading(device, 7, seq);
    reading.label = "defect".into();
    reading.ts = ts;
    reading.score = score;
    serde_json::to_vec(&reading).unwrap()
}

fn witnesses(sighting: &Value) -> Vec<(String, u64)> {
    let all = sighting["witnesses"].as_array().unwrap();
    all.iter()
        .map(|w| {
            let device = w["device"].as_str().unwrap().to_owned();
            (device, w["readings"].as_u64().unwrap())
        })
        .collect()
}

async fn sightings(handle: &Handle, least: usize) -> Vec<Value> {
    for _ in 0..200 {
        let (_, page) = get(handle.http, "/api/v1/sightings?order=asc").await;
        let items = page["items"].as_array().unwrap().clone();
        if items.len() >= least {
            return items;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("there are not {least} sightings");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_cameras_see_one_thing_once() {
    let dir = tempfile::tempdir().unwrap();
    let handle = looking(dir.path()).await;
    let broker = handle.mqtt.unwrap();
    let mut listener = Client::connect(broker, "mosq-1").await;
    assert!(listener.subscribe("lacewing/v1/demo/_/_/sighting").await);
    let mut d1 = device(broker, "d1").await;
    let mut d2 = device(broker, "d2").await;
    let to = |device: &str| topic(device, "cam0", "result");
    // The first one is what the coordinator begins after.
    d1.publish(&to("d1"), encoded("d1", 7, 1)).await;
    d1.acknowledged(7, 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Both see it, the one twice; a third time it is unsure; a good part is nothing that happens.
    d1.publish(&to("d1"), defect("d1", 2, NOON, 0.9)).await;
    d2.publish(&to("d2"), defect("d2", 1, NOON + 400, 0.8))
        .await;
    d1.publish(&to("d1"), defect("d1", 3, NOON + 800, 0.95))
        .await;
    d1.publish(&to("d1"), defect("d1", 4, NOON + 900, 0.3))
        .await;
    d1.publish(&to("d1"), encoded("d1", 7, 5)).await;
    d1.acknowledged(7, 5).await;
    d2.acknowledged(7, 1).await;
    let (said_on, said) = listener.next().await;
    assert_eq!(said_on, "lacewing/v1/demo/_/_/sighting");
    let said = Sighting::decode(&said).unwrap();
    assert_eq!((said.from, said.to), (NOON, NOON + 800));
    let who: Vec<_> = said
        .witnesses
        .iter()
        .map(|w| (w.device.as_str(), w.readings, w.seq))
        .collect();
    assert_eq!(who, [("d1", 2, 2), ("d2", 1, 1)]);
    // Sent again it is the same; later than the window it is another one.
    d2.publish(&to("d2"), defect("d2", 1, NOON + 400, 0.8))
        .await;
    d2.publish(&to("d2"), defect("d2", 2, NOON + 10_000, 0.8))
        .await;
    d2.acknowledged(7, 2).await;
    let (_, other) = listener.next().await;
    let other = Sighting::decode(&other).unwrap();
    assert_ne!(other.id, said.id);
    assert_eq!(other.from, NOON + 10_000);
    // One that was away tells later: it is a witness, and nobody is told twice.
    let mut d3 = device(broker, "d3").await;
    d3.publish(&to("d3"), defect("d3", 1, NOON + 200, 0.7))
        .await;
    d3.acknowledged(7, 1).await;
    d3.publish(&to("d3"), defect("d3", 2, NOON + 60_000, 0.7))
        .await;
    let (_, third) = listener.next().await;
    assert_eq!(Sighting::decode(&third).unwrap().from, NOON + 60_000);
    let all = sightings(&handle, 3).await;
    assert_eq!(all.len(), 3);
    assert_eq!(all[0]["id"], said.id.as_str());
    let expected = [("d1", 2), ("d3", 1), ("d2", 1)];
    assert_eq!(
        witnesses(&all[0]),
        expected.map(|(device, n)| (device.to_owned(), n))
    );
    handle.stop().await;

    // A coordinator that comes back goes on where it was.
    let handle = looking(dir.path()).await;
    assert_eq!(sightings(&handle, 3).await, all);
    let page = "/api/v1/sightings?limit=2&order=asc";
    let (_, first) = get(handle.http, page).await;
    let next = first["next"].as_str().unwrap();
    let (_, rest) = get(handle.http, &format!("{page}&after={next}")).await;
    assert_eq!(rest["items"][0]["id"], all[2]["id"]);
    let (status, _) = get(handle.http, "/api/v1/sightings?after=x").await;
    assert_eq!(status, 400);
    let (_, none) = get(handle.http, "/api/v1/sightings?site=elsewhere").await;
    assert_eq!(none["items"].as_array().unwrap().len(), 0);
    handle.stop().await;
}

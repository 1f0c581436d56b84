//! Listens to everything that is said on a broker, and holds each message against its schema.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fleet::site::Site;
use jsonschema::Validator;
use mesh_core::{Kind, Topic};
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS};
use tokio::{sync::oneshot, task::JoinHandle};

/// The schema of each kind of message that is sent so far.
const SCHEMAS: [(Kind, &str); 16] = [
    (
        Kind::Status,
        include_str!("../mesh-core/schemas/status.json"),
    ),
    (Kind::Info, include_str!("../mesh-core/schemas/info.json")),
    (Kind::Model, include_str!("../mesh-core/schemas/model.json")),
    (Kind::State, include_str!("../mesh-core/schemas/state.json")),
    (
        Kind::Result,
        include_str!("../mesh-core/schemas/result.json"),
    ),
    (
        Kind::Replay,
        include_str!("../mesh-core/schemas/replay.json"),
    ),
    (Kind::Gap, include_str!("../mesh-core/schemas/gap.json")),
    (
        Kind::Metrics,
        include_str!("../mesh-core/schemas/metrics.json"),
    ),
    (Kind::Ack, include_str!("../mesh-core/schemas/ack.json")),
    (Kind::Mark, include_str!("../mesh-core/schemas/mark.json")),
    (Kind::Drift, include_str!("../mesh-core/schemas/drift.json")),
    (
        Kind::Roster,
        include_str!("../mesh-core/schemas/roster.json"),
    ),
    (
        Kind::Sighting,
        include_str!("../mesh-core/schemas/sighting.json"),
    ),
    (
        Kind::Meeting,
        include_str!("../mesh-core/schemas/meeting.json"),
    ),
    (
        Kind::Desired,
        include_str!("../mesh-core/schemas/desired.json"),
    ),
    (
        Kind::Reported,
        include_str!("../mesh-core/schemas/reported.json"),
    ),
];
/// The first mistakes say enough.
const MAX_BAD: usize = 20;

/// What was heard.
#[derive(Debug, Default)]
pub struct Tapped {
    /// How many messages of each kind, by the last level of their topic.
    pub counts: BTreeMap<&'static str, u64>,
    /// The last message on each topic.
    pub last: BTreeMap<String, String>,
    /// What was wrong with which message.
    pub bad: Vec<String>,
}

impl Tapped {
    /// How many messages of this kind.
    #[must_use]
    pub fn count(&self, kind: Kind) -> u64 {
        self.counts.get(kind.as_str()).copied().unwrap_or(0)
    }
}

/// A listener that runs until it is stopped. It survives the broker.
#[derive(Debug)]
pub struct Tap {
    stop: oneshot::Sender<()>,
    heard: JoinHandle<Tapped>,
    begun: Arc<AtomicU64>,
}

impl Tap {
    /// Starts to listen at a site's broker.
    ///
    /// # Errors
    /// If a schema is not one, or the way to the broker is not known.
    pub fn start(site: &Site) -> Result<Self, String> {
        let mut options = site.way().listener("tap").map_err(|e| format!("{e:#}"))?;
        options.set_max_packet_size(1 << 20, 1 << 10);
        let mut schemas = Vec::new();
        for (kind, text) in SCHEMAS {
            let schema = serde_json::from_str(text).map_err(|e| format!("{kind:?}: {e}"))?;
            let validator =
                jsonschema::validator_for(&schema).map_err(|e| format!("{kind:?}: {e}"))?;
            schemas.push((kind, validator));
        }
        let (stop, stopped) = oneshot::channel();
        let begun = Arc::<AtomicU64>::default();
        let count = begun.clone();
        let heard = tokio::spawn(async move {
            let mut tapped = Tapped::default();
            tokio::select! {
                () = listen(&options, &schemas, &count, &mut tapped) => {}
                _ = stopped => {}
            }
            tapped
        });
        Ok(Self { stop, heard, begun })
    }

    /// How often it has begun to listen.
    #[must_use]
    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Stops, and says what was heard.
    pub async fn stop(self) -> Tapped {
        let _ = self.stop.send(());
        self.heard.await.unwrap_or_default()
    }
}

async fn listen(
    options: &MqttOptions,
    schemas: &[(Kind, Validator)],
    begun: &AtomicU64,
    tapped: &mut Tapped,
) {
    loop {
        let (client, mut events) = AsyncClient::builder(options.clone()).capacity(4).build();
        loop {
            match events.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => {
                    let _ = client.try_subscribe("lacewing/#", QoS::AtMostOnce);
                }
                Ok(Event::Incoming(Packet::SubAck(_))) => {
                    begun.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Event::Incoming(Packet::Publish(message))) => {
                    let topic = String::from_utf8_lossy(&message.topic);
                    if let Err(bad) = check(&topic, &message.payload, schemas, tapped)
                        && tapped.bad.len() < MAX_BAD
                    {
                        let shown = String::from_utf8_lossy(&message.payload);
                        let shown: String = shown.chars().take(300).collect();
                        tapped.bad.push(format!("{topic}: {bad}: {shown}"));
                    }
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn check(
    topic: &str,
    payload: &[u8],
    schemas: &[(Kind, Validator)],
    tapped: &mut Tapped,
) -> Result<(), String> {
    let text = String::from_utf8_lossy(payload).into_owned();
    tapped.last.insert(topic.to_owned(), text);
    let topic: Topic = topic.parse().map_err(|e| format!("{e}"))?;
    *tapped.counts.entry(topic.kind.as_str()).or_default() += 1;
    let schema = schemas.iter().find(|(kind, _)| *kind == topic.kind);
    let (_, schema) = schema.ok_or("nobody sends this kind yet")?;
    let message = if matches!(topic.kind, Kind::Status | Kind::Roster) {
        String::from_utf8_lossy(payload).into()
    } else {
        serde_json::from_slice(payload).map_err(|e| e.to_string())?
    };
    schema
        .validate(&message)
        .map_err(|e| format!("{e} at {}", e.instance_path()))?;
    let names = |reading: &serde_json::Value| {
        let device = reading.get("device").and_then(|d| d.as_str());
        device.is_none_or(|d| d == topic.device.as_str())
    };
    let all = message.get("readings").and_then(|r| r.as_array());
    if names(&message) && all.is_none_or(|all| all.iter().all(names)) {
        Ok(())
    } else {
        Err("it is another device's".into())
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{Ack, Gap, GapReason, Metrics, RangeSet, Reading, replay_bytes};

    use super::*;

    fn schemas() -> Vec<(Kind, Validator)> {
        let one = |(kind, text): (Kind, &str)| {
            let schema = serde_json::from_str(text).unwrap();
            (kind, jsonschema::validator_for(&schema).unwrap())
        };
        SCHEMAS.into_iter().map(one).collect()
    }

    /// What the vocabulary writes is what the schemas allow, and nothing more.
    #[test]
    fn the_schemas_fit_the_vocabulary() {
        let (schemas, mut tapped) = (schemas(), Tapped::default());
        let mut say = |kind: &str, bytes: &[u8]| {
            check(
                &format!("lacewing/v1/s/d1/_/{kind}"),
                bytes,
                &schemas,
                &mut tapped,
            )
        };
        let reading = Reading {
            v: 1,
            device: "d1".parse().unwrap(),
            source: "cam0".parse().unwrap(),
            epoch: 1,
            seq: 1,
            ts: -5,
            frame: 0,
            label: "ok".into(),
            score: 1.0,
            margin: 0.25,
            model: "m@1".into(),
            latency_ms: 0.5,
            by: Some("box".parse().unwrap()),
            file: Some("a/b.png".into()),
            truth: None,
        };
        let bytes = reading.encode().unwrap();
        say("result", &bytes).unwrap();
        say("replay", &replay_bytes(&[&bytes, &bytes]).0).unwrap();
        let mut stored = RangeSet::new();
        stored.insert(1, 9);
        stored.insert(20, 21);
        say("ack", &Ack::of(3, &stored).encode().unwrap()).unwrap();
        let gap = Gap {
            v: 1,
            device: "d1".parse().unwrap(),
            epoch: 3,
            from: 1,
            to: 2,
            reason: GapReason::Full,
        };
        say("gap", &gap.encode().unwrap()).unwrap();
        let metrics = Metrics {
            v: 1,
            ..Metrics::default()
        };
        say("metrics", &metrics.encode().unwrap()).unwrap();
        say("status", b"online").unwrap();

        for (kind, bad) in [
            ("status", &b"on"[..]),
            ("result", b"{}"),
            ("result", b"not json"),
            ("replay", br#"{"v":1,"readings":[]}"#),
            ("ack", br#"{"v":2,"epoch":1,"upto":0}"#),
            (
                "gap",
                br#"{"v":1,"device":"d2","epoch":1,"from":1,"to":1,"reason":"full"}"#,
            ),
            ("image", b"\xff\xd8"),
        ] {
            assert!(say(kind, bad).is_err(), "{kind}");
        }
        let mut extra = serde_json::to_value(&reading).unwrap();
        extra["mood"] = "good".into();
        assert!(say("result", extra.to_string().as_bytes()).is_err());
    }
}

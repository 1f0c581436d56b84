//! The configuration file of one agent, as the fleet writes it.

use std::{io, net::SocketAddr, path::PathBuf};

use serde::Serialize;

/// Everything that the fleet sets; the rest stays at the agent's defaults.
#[derive(Clone, Debug, Serialize)]
pub struct AgentFile {
    /// The site that the device belongs to.
    pub site: String,
    /// The device.
    pub device: String,
    /// Outbox and state lie below it.
    pub data: PathBuf,
    /// How it gets its identity; without it, it speaks in the clear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coordinator: Option<CoordinatorPart>,
    /// Where it reports.
    pub broker: BrokerPart,
    /// What it looks through.
    pub source: Vec<SourcePart>,
    /// What it thinks with; without it, frames are only counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelPart>,
    /// Which results become readings.
    pub publish: PublishPart,
    /// What it remembers.
    pub outbox: OutboxPart,
    /// How often it speaks about itself.
    pub report: ReportPart,
    /// What it keeps to learn from; its own defaults if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<SamplesPart>,
    /// How it watches for drift; its own defaults if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drift: Option<DriftPart>,
    /// Where its models come from; without it, it keeps the one that it came with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update: Option<UpdatePart>,
    /// How it finds its neighbours.
    pub mesh: MeshPart,
    /// What it asks them about, and what it answers; its own defaults if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offload: Option<OffloadPart>,
}

/// `[offload]`
#[derive(Clone, Debug, Serialize)]
pub struct OffloadPart {
    /// Ask about frames in doubt?
    pub escalate: bool,
    /// Ask the coordinator about them, too?
    pub coordinator: bool,
    /// Hand on what it has no time for?
    pub spill: bool,
    /// The largest share of its frames that it asks about.
    pub share: f32,
    /// The margin below which it asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub below: Option<f32>,
    /// Its own answer counts after this.
    pub deadline_ms: u32,
    /// Answer with the model that it runs?
    pub answer: bool,
    /// Answer with this bundle.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serve: Option<PathBuf>,
    /// Run that one in parts?
    pub split: bool,
    /// Run parts of this bundle's model for others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lend: Option<PathBuf>,
    /// MiB of weights that a part may have here.
    pub room_mib: u32,
    /// The largest share of its time for others.
    pub time_share: f32,
}

impl Default for OffloadPart {
    /// As the agent's own defaults: nothing is on.
    fn default() -> Self {
        Self {
            escalate: false,
            coordinator: false,
            spill: false,
            share: 0.3,
            below: None,
            deadline_ms: 500,
            answer: false,
            serve: None,
            split: false,
            lend: None,
            room_mib: 64,
            time_share: 0.25,
        }
    }
}

/// `[mesh]`
#[derive(Clone, Debug, Serialize)]
pub struct MeshPart {
    /// Is there any?
    pub enabled: bool,
    /// `ADDRESS:PORT`
    pub listen: SocketAddr,
    /// Whom it asks first.
    pub peers: Vec<SocketAddr>,
    /// Never: multicast would leave the machine.
    pub mdns: bool,
    /// Models for neighbours, KiB/s; the agent's own default where it is nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serve_kib_per_s: Option<u32>,
}

/// `[coordinator]`
#[derive(Clone, Debug, Serialize)]
pub struct CoordinatorPart {
    /// An enrolment token.
    pub token: String,
}

/// `[update]`
#[derive(Clone, Debug, Serialize)]
pub struct UpdatePart {
    /// `http://host:port`
    pub coordinator: String,
    /// The root that all trust begins with.
    pub root: PathBuf,
}

/// `[broker]`
#[derive(Clone, Debug, Serialize)]
pub struct BrokerPart {
    /// `mqtt://host:port`
    pub url: String,
    /// Seconds between signs of life.
    pub keep_alive_s: u16,
    /// The longest wait between two tries to connect, in seconds.
    pub max_backoff_s: u16,
}

/// `[[source]]`
#[derive(Clone, Debug, Serialize)]
pub struct SourcePart {
    /// Its name on the device.
    pub name: String,
    /// `scene` or `folder`.
    pub kind: &'static str,
    /// Frames per second; 0 is as fast as possible.
    pub fps: f64,
    /// Stop after that many; 0 is never.
    pub frames: u64,
    /// Where each frame that leaves the source is noted before anything else sees it.
    pub journal: PathBuf,
    /// `folder`: where its images lie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// `folder`: start again at its end?
    #[serde(rename = "loop")]
    pub repeat: bool,
    /// `folder`: is the name of the directory what its images show?
    pub labelled: bool,
    /// `scene`: what is drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scene: Option<ScenePart>,
}

/// `[source.scene]`
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ScenePart {
    /// The same seed shows the same parts.
    pub seed: u64,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Share of the parts that have a fault; the camera's own default if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub defect_rate: Option<f32>,
    /// How it departs from what it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drift: Option<ScenePartDrift>,
}

/// `[source.scene.drift]`
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ScenePartDrift {
    /// How much darker and warmer the lamp gets, 0..=1.
    pub light: f32,
    /// The first frame that differs.
    pub onset: u64,
    /// Frames until it is reached.
    pub ramp: u64,
}

/// `[drift]`
#[derive(Clone, Copy, Debug, Serialize)]
pub struct DriftPart {
    /// Frames of a window.
    pub frames: u32,
}

/// `[model]`
#[derive(Clone, Debug, Serialize)]
pub struct ModelPart {
    /// The bundle's directory.
    pub bundle: PathBuf,
}

/// `[publish]`
#[derive(Clone, Debug, Serialize)]
pub struct PublishPart {
    /// The policy; the witness counts on `all`.
    pub when: &'static str,
}

/// `[outbox]`
#[derive(Clone, Debug, Serialize)]
pub struct OutboxPart {
    /// Its bound on disk.
    pub max_bytes: u64,
}

/// `[report]`
#[derive(Clone, Debug, Serialize)]
pub struct ReportPart {
    /// Seconds between two messages of metrics.
    pub every_s: u32,
}

/// `[samples]`
#[derive(Clone, Debug, Serialize)]
pub struct SamplesPart {
    /// `http://host:port`
    pub coordinator: String,
    /// The share of all frames that is drawn by lot.
    pub random: f64,
    /// Bytes a day.
    pub day_bytes: u64,
    /// Bytes that may wait.
    pub max_bytes: u64,
    /// 0 is as fast as it goes.
    pub max_kib_per_s: u32,
}

impl SamplesPart {
    /// Keeps every frame, as fast as it goes: who labels shall choose from all of them.
    #[must_use]
    pub const fn everything(coordinator: String) -> Self {
        Self {
            coordinator,
            random: 1.0,
            day_bytes: 1 << 40,
            max_bytes: 4 << 30,
            max_kib_per_s: 0,
        }
    }
}

impl AgentFile {
    /// The file's text.
    ///
    /// # Errors
    /// If a value cannot be written as TOML.
    pub fn text(&self) -> io::Result<String> {
        toml::to_string(self).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_like_the_manual() {
        let file = AgentFile {
            site: "demo".into(),
            device: "d1".into(),
            data: "data".into(),
            coordinator: None,
            broker: BrokerPart {
                url: "mqtt://127.0.0.1:1883".into(),
                keep_alive_s: 10,
                max_backoff_s: 3,
            },
            source: vec![SourcePart {
                name: "cam0".into(),
                kind: "scene",
                fps: 5.0,
                frames: 0,
                journal: "j".into(),
                path: None,
                repeat: false,
                labelled: false,
                scene: Some(ScenePart {
                    seed: 7,
                    width: 64,
                    height: 64,
                    defect_rate: None,
                    drift: None,
                }),
            }],
            model: None,
            publish: PublishPart { when: "all" },
            outbox: OutboxPart { max_bytes: 4 << 20 },
            report: ReportPart { every_s: 2 },
            samples: None,
            mesh: MeshPart {
                enabled: false,
                listen: "127.0.0.1:0".parse().unwrap(),
                peers: Vec::new(),
                mdns: false,
                serve_kib_per_s: None,
            },
            offload: None,
            drift: None,
            update: None,
        };
        let parsed: toml::Table = file.text().unwrap().parse().unwrap();
        let source = &parsed["source"][0];
        assert_eq!(source["kind"].as_str(), Some("scene"));
        assert_eq!(source["fps"].as_float(), Some(5.0));
        assert_eq!(source["scene"]["seed"].as_integer(), Some(7));
        assert_eq!(parsed["outbox"]["max_bytes"].as_integer(), Some(4 << 20));
        assert!(parsed.get("model").is_none());
    }
}

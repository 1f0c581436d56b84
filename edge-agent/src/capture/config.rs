//! What can be set of a source.

use std::path::PathBuf;

use mesh_core::Name;
use serde::Deserialize;

use super::scene::SceneConfig;
use crate::gate::GateConfig;

/// Below one frame a day, and small enough for a clock to count the time between two.
const MIN_FPS: f64 = 0.00001;
/// A camera that gives more does not fit the boards.
const MAX_FPS: f64 = 1_000.0;

/// One `[[source]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Its name, in topics and readings.
    pub name: Name,
    /// What it is.
    pub kind: SourceKind,
    /// Frames per second; 0 is as fast as the device can. A source with `trigger` ignores it.
    #[serde(default = "one")]
    pub fps: f64,
    /// Stop after so many frames; 0 is never.
    #[serde(default)]
    pub frames: u64,
    /// Take a frame at each pulse of the board's trigger input instead of at a rate.
    #[serde(default)]
    pub trigger: bool,
    /// Which frames are looked at.
    #[serde(default)]
    pub gate: GateConfig,
    /// Append the number of each frame to this file before anything else sees it: an independent record of
    /// what the camera gave.
    #[serde(default)]
    pub journal: Option<PathBuf>,
    /// `folder`: the folder of images, searched through its subfolders, in the order of their names.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// `folder`: start over after the last image.
    #[serde(default, rename = "loop")]
    pub repeat: bool,
    /// `folder`: the name of an image's folder says what it shows.
    #[serde(default)]
    pub labelled: bool,
    /// `scene`: what is drawn.
    #[serde(default)]
    pub scene: SceneConfig,
}

/// The kinds of source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// A synthetic camera over a conveyor.
    Scene,
    /// A folder of images.
    Folder,
}

const fn one() -> f64 {
    1.0
}

impl SourceConfig {
    /// Values that cannot be meant: the field, and what it must be.
    #[must_use]
    pub fn mistakes(&self) -> Vec<(String, String)> {
        let mut all = Vec::new();
        let mut must = |good: bool, field: &str, what: &str| {
            if !good {
                all.push((field.to_owned(), what.to_owned()));
            }
        };
        must(
            self.name != Name::itself(),
            "name",
            "must be a name, `_` is the device itself",
        );
        must(
            self.fps == 0.0 || (MIN_FPS..=MAX_FPS).contains(&self.fps),
            "fps",
            "must be 0 (as fast as possible), or lie between 0.00001 (one a day) and 1000",
        );
        must(
            self.kind != SourceKind::Folder || self.path.is_some(),
            "path",
            "a folder source needs the folder",
        );
        must(
            self.kind == SourceKind::Folder || self.path.is_none(),
            "path",
            "only a folder source has one",
        );
        for (field, what) in self.gate.mistakes() {
            must(false, &format!("gate.{field}"), what);
        }
        for (field, what) in self.scene.mistakes() {
            must(false, &format!("scene.{field}"), &what);
        }
        all
    }
}

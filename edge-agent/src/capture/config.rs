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
    /// Take a frame at each pulse of the board's trigger input instead of at a rate. One source can; it needs `board.trigger`.
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

/// Sources that wait for a trigger which they will never see: their places, and what is wrong. A pulse is one frame of one source.
pub(crate) fn without_trigger(
    sources: &[SourceConfig],
    has_trigger: bool,
) -> impl Iterator<Item = (usize, &'static str)> {
    let waiting = sources.iter().enumerate().filter(|(_, s)| s.trigger);
    waiting.enumerate().filter_map(move |(nth, (at, _))| {
        let what = match (has_trigger, nth) {
            (false, _) => "there is no trigger input to wait for: set board.trigger",
            (true, 0) => return None,
            (true, _) => "only one source can wait for the trigger input",
        };
        Some((at, what))
    })
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn a_source_waits_only_for_a_trigger_that_is_there() {
        let with = |more: &str, triggered: [bool; 2]| {
            let mut text = format!("device = 'd1'\n{more}\n");
            for (at, trigger) in triggered.into_iter().enumerate() {
                text +=
                    &format!("[[source]]\nname = 'c{at}'\nkind = 'scene'\ntrigger = {trigger}\n");
            }
            Config::parse(&text).map(|_| ()).map_err(|e| e.to_string())
        };
        let wired = "board.trigger = { line = 4 }";
        assert_eq!(with(wired, [false, true]), Ok(()));
        assert_eq!(with("", [false, false]), Ok(()));
        let refused = |said: Result<(), String>, word: &str| {
            let said = said.unwrap_err();
            assert!(said.contains(word), "{said}");
        };
        refused(with("", [false, true]), "source[1].trigger: there is no");
        refused(with(wired, [true, true]), "source[1].trigger: only one");
    }
}

//! Capture: every camera behind one [`Source`], each on its own thread.

mod config;
mod folder;
mod runner;
pub mod scene;
mod synthetic;

use std::path::PathBuf;

use models::Picture;

pub(crate) use config::without_trigger;
pub use config::{SourceConfig, SourceKind};
pub(crate) use folder::look;
pub use runner::{Pace, Start, run};

use crate::update::Wanted;

/// One thing that was seen.
#[derive(Debug)]
pub struct Frame {
    /// Which source it came from: its place in the configuration.
    pub source: usize,
    /// Its number at the source.
    pub number: u64,
    /// When, by the wall clock: milliseconds since the Unix epoch.
    pub ts: i64,
    /// The picture.
    pub picture: Picture,
    /// The same as the camera gave it, where that is not the pixels themselves.
    pub original: Option<Vec<u8>>,
    /// The file that it came from.
    pub file: Option<String>,
    /// What it really shows, where the source knows.
    pub truth: Option<String>,
}

/// What a source gives when it is asked for its next frame.
#[derive(Debug)]
pub enum Shot {
    /// A picture.
    Picture {
        /// The pixels.
        picture: Picture,
        /// The same as the camera gave it, where that is not the pixels themselves.
        original: Option<Vec<u8>>,
        /// The file that it came from.
        file: Option<String>,
        /// What it really shows.
        truth: Option<String>,
    },
    /// There was something, but it is not a usable picture.
    Bad {
        /// What was wrong with what.
        why: String,
    },
    /// There is nothing more.
    End,
}

/// Something that gives pictures. Frames are numbered from 0 by whoever asks, and go on after a restart
/// where readings became durable: a source that can show an old frame again loses none.
pub trait Source: Send {
    /// The frame with this number. It may take as long as a camera takes; it must not wait for ever.
    fn shoot(&mut self, number: u64) -> Shot;
}

/// Why a source cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The folder cannot be listed.
    #[error("source {name}: cannot list {path}: {error}")]
    Folder {
        /// The source.
        name: String,
        /// The folder.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// The folder holds nothing to look at.
    #[error("source {name}: no images (jpg, png, bmp, gif, webp) in {path}")]
    Empty {
        /// The source.
        name: String,
        /// The folder.
        path: PathBuf,
    },
    /// It waits for a trigger, and there is none.
    #[error("source {0}: the trigger input that it waits for does not work")]
    Trigger(String),
    /// Settings that only the check of the configuration would have found.
    #[error("source {0}: {1}")]
    Setting(String, String),
}

/// Opens what the configuration names. `wanted` is the size that the models ask for: a
/// picture may come back smaller than it was taken, as long as nothing is lost for that size.
///
/// # Errors
/// If it cannot start: see [`SourceError`].
pub fn open(config: &SourceConfig, wanted: Wanted) -> Result<Box<dyn Source>, SourceError> {
    Ok(match config.kind {
        SourceKind::Scene => Box::new(synthetic::Synthetic::new(config.scene.clone())),
        SourceKind::Folder => Box::new(folder::Folder::open(config, wanted)?),
    })
}

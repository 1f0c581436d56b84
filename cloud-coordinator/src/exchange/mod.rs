//! Labelled images in from elsewhere, and out to elsewhere: folders of classes, CSV, COCO, YOLO.
//!
//! In and out they travel as a tar, which is read and written as it passes by. Each image that comes in is
//! stored as a sample at once; the classes are given at the end, when all files that name them were seen. An
//! import that breaks off is simply done again.

mod client;
mod export;
pub(crate) mod fuzzed;
mod names;
mod plan;
mod read;
mod store;

use mesh_core::MAX_SAMPLE_IMAGE_BYTES;
use serde::{Deserialize, Serialize};

pub(crate) use client::{in_query, send};
pub(crate) use export::{Exported, export};
pub(crate) use read::{Wanted, import};

use crate::{labels::LabelError, samples::SampleError};

/// Bytes of one import.
pub(crate) const MAX_IMPORT_BYTES: u64 = 16 << 30;
/// Files of one import.
const MAX_FILES: usize = 100_000;
/// Entries of its tar: each file may have two more about its name.
const MAX_ENTRIES: usize = 3 * MAX_FILES;
/// Bytes of one file that names classes, and of all of them.
const MAX_TEXT: u64 = 32 << 20;
const MAX_TEXTS: u64 = 64 << 20;
/// Bytes of the path of a file.
const MAX_PATH: usize = 500;
/// Errors that are named; all are counted.
const NAMED: usize = 100;

/// How images and classes are written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, utoipa::ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    /// The folder of an image names its class.
    Folder,
    /// A text with a line `path,class` for each image.
    Csv,
    /// A JSON with images, categories and annotations; all of an image's of one category.
    Coco,
    /// Folders of classes, or a text for each image whose boxes are all of one class.
    Yolo,
}

/// Why an import or an export breaks off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    #[error(transparent)]
    Sample(#[from] SampleError),
    #[error(transparent)]
    Label(#[from] LabelError),
    #[error("{0}")]
    Broken(String),
}

/// What an import did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub(crate) struct ImportReport {
    /// Images that are new.
    pub(crate) imported: usize,
    /// Images that an import had brought before.
    pub(crate) known: usize,
    /// Images that have a class from this import now.
    pub(crate) labelled: usize,
    /// Images that had a label already, which stays.
    pub(crate) kept: usize,
    /// Files, or lines of files, that could not be used.
    pub(crate) failed: usize,
    /// The first of them.
    pub(crate) errors: Vec<FileError>,
}

/// What could not be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub(crate) struct FileError {
    /// The file, and the line if it is about one.
    pub(crate) path: String,
    /// Why.
    pub(crate) error: String,
}

impl Format {
    /// As it stands in a query.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Folder => "folder",
            Self::Csv => "csv",
            Self::Coco => "coco",
            Self::Yolo => "yolo",
        }
    }
}

impl ImportReport {
    fn error(&mut self, path: &str, error: impl Into<String>) {
        self.failed += 1;
        if self.errors.len() < NAMED {
            let short = |text: String| text.chars().take(300).collect();
            self.errors.push(FileError {
                path: short(path.to_owned()),
                error: short(error.into()),
            });
        }
    }
}

/// What a file of an import is, by the end of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Image,
    Text,
}

fn kind(path: &str) -> Option<(Kind, u64)> {
    let (_, end) = path.rsplit_once('.')?;
    match end.to_ascii_lowercase().as_str() {
        "jpg" | "jpeg" | "png" => Some((Kind::Image, MAX_SAMPLE_IMAGE_BYTES)),
        "csv" | "json" | "txt" | "names" | "yaml" | "yml" => Some((Kind::Text, MAX_TEXT)),
        _ => None,
    }
}

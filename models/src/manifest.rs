//! The manifest of a bundle: what the model is, what goes in, what comes out, how it proves itself.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use crate::{fields::FieldError, reference::Reference};

/// The version of the format that this crate reads.
pub const SCHEMA: u64 = 1;
/// As many values of an embedding as a golden case may pin down.
pub const GOLDEN_EMBEDDING_VALUES: usize = 16;

/// Everything that is wrong with a manifest, field by field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ManifestErrors(pub Vec<FieldError>);

impl fmt::Display for ManifestErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if at == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$item_doc:meta])* $item:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
        #[non_exhaustive]
        pub enum $name { $($(#[$item_doc])* #[serde(rename = $word)] $item),+ }

        impl $name {
            pub(crate) const WORDS: &[(&'static str, Self)] = &[$(($word, Self::$item)),+];

            /// The word in the manifest.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$item => $word),+ }
            }
        }
    };
}

words! {
    /// What a model does.
    Task {
        /// One label for the whole picture.
        Classify = "classify",
        /// A vector that stands for the picture.
        Embed = "embed",
        /// Boxes. Reserved: understood, not yet served.
        Detect = "detect",
        /// A score of strangeness. Reserved: understood, not yet served.
        Anomaly = "anomaly",
        /// Any tensor. Reserved: understood, not yet served.
        Tensor = "tensor",
    }
}
words! {
    /// The order of the input's axes.
    Layout {
        /// Batch, channel, row, column.
        Nchw = "nchw",
        /// Batch, row, column, channel.
        Nhwc = "nhwc",
    }
}
words! {
    /// The channels and their order.
    Color {
        /// Red, green, blue.
        Rgb = "rgb",
        /// Blue, green, red.
        Bgr = "bgr",
        /// One channel: Rec. 601 luma.
        Gray = "gray",
    }
}
words! {
    /// How a picture of any shape becomes one of the model's shape.
    Resize {
        /// Both sides are scaled to fit; proportions change.
        Stretch = "stretch",
        /// The shorter side fits, the centre of the longer one is kept.
        Cover = "cover",
        /// The longer side fits, the rest is padded evenly.
        Letterbox = "letterbox",
    }
}
words! {
    /// How pixels are weighed on the way down; all but nearest are antialiased.
    Filter {
        /// Triangle.
        Bilinear = "bilinear",
        /// Cubic, sharper.
        CatmullRom = "catmull-rom",
        /// Windowed sinc, sharpest.
        Lanczos3 = "lanczos3",
        /// One pixel stands for all.
        Nearest = "nearest",
    }
}
words! {
    /// How raw scores become probabilities.
    Activation {
        /// Classes exclude each other.
        Softmax = "softmax",
        /// Each class on its own.
        Sigmoid = "sigmoid",
        /// They are probabilities already.
        None = "none",
    }
}

/// A manifest that has passed every check. TOML: see `models/bundles/*/manifest.toml`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: u64,
    /// `a-z0-9-`, 1 to 40 characters.
    pub name: String,
    /// 1 to 32 characters of `0-9A-Za-z.+-`.
    pub version: String,
    /// What the model does.
    pub task: Task,
    /// For people.
    pub description: String,
    /// The file.
    pub model: ModelFile,
    /// What goes in.
    pub input: InputSpec,
    /// What comes out.
    pub output: OutputSpec,
    /// When to say nothing.
    pub thresholds: Thresholds,
    /// What a run may cost.
    pub budget: Budget,
    /// Cases that must come out right on each device before the model is used.
    pub golden: Vec<Golden>,
    /// What its training saw, to tell when a device sees something else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<Reference>,
    /// Where it comes from.
    pub lineage: Lineage,
}

/// The model's file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelFile {
    /// Relative to the bundle.
    pub file: String,
    /// SHA-256 in lower-case hex.
    pub sha256: String,
    /// Length in bytes.
    pub bytes: u64,
}

/// The model's input.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InputSpec {
    /// The graph's input.
    pub name: String,
    /// Four sizes in the order of `layout`; the batch is 1.
    pub shape: [usize; 4],
    /// Order of the axes.
    pub layout: Layout,
    /// Channels.
    pub color: Color,
    /// To the model's shape.
    pub resize: Resize,
    /// With this kernel.
    pub filter: Filter,
    /// Value of padding pixels (letterbox), 0..=255.
    pub pad: u8,
    /// Per channel, on pixels of 0..=1, in the model's channel order.
    pub mean: Vec<f32>,
    /// Per channel, above 0.
    pub std: Vec<f32>,
}

impl InputSpec {
    /// Channels, height and width, whatever the layout.
    #[must_use]
    pub fn channels_height_width(&self) -> (usize, usize, usize) {
        let [_, a, b, c] = self.shape;
        match self.layout {
            Layout::Nchw => (a, b, c),
            Layout::Nhwc => (c, a, b),
        }
    }
}

/// The model's outputs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OutputSpec {
    /// The graph's output with one score per label (classify).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<String>,
    /// How scores become probabilities.
    pub activation: Activation,
    /// The graph's output with the embedding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding: Option<String>,
    /// Values in the embedding; 0 without one.
    #[serde(skip_serializing_if = "is_zero")]
    pub embedding_dim: usize,
    /// The classes, in the order of the scores.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(value: &usize) -> bool {
    *value == 0
}

/// When to say nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Thresholds {
    /// Below it the label is `unknown`, 0..=1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_score: Option<f32>,
}

/// What the model may cost on the slowest board that it is meant for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Budget {
    /// Median of one run in milliseconds.
    pub latency_ms: f32,
    /// Memory that the loaded model adds, in MiB.
    pub memory_mib: u64,
}

/// A picture and what the model must say about it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Golden {
    /// Relative to the bundle.
    pub image: String,
    /// The label with the top score (classify).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// A probability per label (classify).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f32>,
    /// The first values of the embedding.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub embedding: Vec<f32>,
    /// How far a score may be off.
    pub tolerance: f32,
    /// How far a value of the embedding may be off.
    pub embedding_tolerance: f32,
}

/// Where a model comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Lineage {
    /// `name@version` of the model that it grew out of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The data, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// SHA-256 over the sorted lines `name sha256`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset_sha256: Option<String>,
    /// The script that made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// Seed of the recipe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// File in the bundle that lists what was never trained on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holdout: Option<String>,
    /// Measured on data that it never saw.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub scores: BTreeMap<String, f32>,
}

impl Manifest {
    /// `name@version`.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}@{}", self.name, self.version)
    }
}

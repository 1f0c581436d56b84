//! How each family of trainers prepares pictures, and how its models are written to a file.

use anyhow::{bail, ensure};
use clap::ValueEnum;
use models::{Activation, Color, Filter, InputSpec, Layout, Port, Resize};
use serde::{Deserialize, Serialize};

use super::ModelImport;

/// The side of a picture where neither the file nor a person says it: what all these families train with.
const SIDE: usize = 224;

/// Where a model was trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Family {
    /// PyTorch with torchvision's or timm's usual transforms: shorter side to fit, centre kept, ImageNet's mean.
    Torchvision,
    /// Ultralytics YOLO, classification (-cls): shorter side to fit, centre kept, 0..1.
    Ultralytics,
    /// Keras or TensorFlow: stretched, -1..1 as for MobileNet unless --scale says otherwise.
    Keras,
}

/// How pixels of 0 to 255 are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Scale {
    /// Divided by 255.
    #[value(name = "0..1")]
    Unit,
    /// As they are.
    #[value(name = "0..255")]
    Bytes,
    /// From -1 to 1.
    #[value(name = "-1..1")]
    Signed,
    /// 0..1, then ImageNet's mean and deviation of each channel.
    #[value(name = "imagenet")]
    Imagenet,
    /// BGR, 0..255 less ImageNet's mean: Keras' own ResNet and VGG.
    #[value(name = "caffe")]
    Caffe,
}

/// How a picture of any shape becomes one of the model's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Fit {
    /// The shorter side fits, the centre of the longer one is kept.
    Cover,
    /// Both sides are scaled to fit; proportions change.
    Stretch,
    /// The longer side fits, the rest is padded evenly.
    Letterbox,
}

/// How answers become probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// They are logits, and one label is right.
    Softmax,
    /// They are logits, and each label is right or wrong on its own.
    Sigmoid,
    /// They are probabilities already.
    None,
}

impl From<Answer> for Activation {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Softmax => Self::Softmax,
            Answer::Sigmoid => Self::Sigmoid,
            Answer::None => Self::None,
        }
    }
}

impl Family {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Torchvision => "torchvision",
            Self::Ultralytics => "ultralytics",
            Self::Keras => "keras",
        }
    }

    /// What to type so that a file comes out which is understood here.
    pub(super) fn export(self) -> &'static str {
        match self {
            Self::Torchvision => {
                "torch.onnx.export(model, torch.zeros(1, 3, 224, 224), \"model.onnx\", opset_version=17, dynamo=False)"
            }
            Self::Ultralytics => "yolo export model=best.pt format=onnx opset=17",
            Self::Keras => {
                "python -m tf2onnx.convert --saved-model DIR --opset 17 --output model.onnx"
            }
        }
    }

    fn layout(self) -> Layout {
        match self {
            Self::Torchvision | Self::Ultralytics => Layout::Nchw,
            Self::Keras => Layout::Nhwc,
        }
    }

    fn resize(self) -> Resize {
        match self {
            // torchvision scales to 256 of which it keeps 224; the nearest that a manifest can say.
            Self::Torchvision | Self::Ultralytics => Resize::Cover,
            Self::Keras => Resize::Stretch,
        }
    }

    fn scale(self) -> Scale {
        match self {
            Self::Torchvision => Scale::Imagenet,
            Self::Ultralytics => Scale::Unit,
            Self::Keras => Scale::Signed,
        }
    }
}

/// Mean and deviation on pixels of 0..1, as a manifest has them.
fn normalisation(scale: Scale, channels: usize) -> (Vec<f32>, Vec<f32>) {
    let all = |mean, std| (vec![mean; channels], vec![std; channels]);
    match scale {
        Scale::Unit => all(0.0, 1.0),
        Scale::Bytes => all(0.0, 1.0 / 255.0),
        Scale::Signed => all(0.5, 0.5),
        Scale::Imagenet => (vec![0.485, 0.456, 0.406], vec![0.229, 0.224, 0.225]),
        Scale::Caffe => (
            [103.939, 116.779, 123.68].map(|mean| mean / 255.0).to_vec(),
            vec![1.0 / 255.0; channels],
        ),
    }
}

/// The model's input: what the file says, and what the family does where it says nothing.
pub(super) fn input(import: &ModelImport, inputs: &[Port]) -> anyhow::Result<InputSpec> {
    let [port] = inputs else {
        let names: Vec<&str> = inputs.iter().map(|port| port.name.as_str()).collect();
        bail!(
            "the model takes {} inputs ({}), not one picture",
            inputs.len(),
            names.join(", ")
        );
    };
    let name = &port.name;
    let Some(sizes) = &port.sizes else {
        bail!("the file does not say the shape of its input {name:?}");
    };
    let &[batch, a, b, c] = sizes.as_slice() else {
        bail!(
            "the input {name:?} has {} dimensions, a batch of pictures has 4",
            sizes.len()
        );
    };
    ensure!(
        batch.is_none_or(|batch| batch == 1),
        "the input {name:?} takes {} pictures at once; write the file with a batch of 1 or an open one",
        batch.unwrap_or_default()
    );
    let colours = |size: Option<usize>| matches!(size, Some(1 | 3));
    let layout = match (colours(a), colours(c)) {
        (true, false) => Layout::Nchw,
        (false, true) => Layout::Nhwc,
        // The file leaves it open, or both could be meant.
        _ => import.like.layout(),
    };
    let (channels, height, width) = match layout {
        Layout::Nchw => (a, b, c),
        _ => (c, a, b),
    };
    let channels = channels.unwrap_or(3);
    ensure!(
        matches!(channels, 1 | 3),
        "the input {name:?} takes {channels} channels, pictures have 1 or 3"
    );
    let side = |fixed: Option<usize>| match (fixed, import.size.map(usize::from)) {
        (Some(fixed), Some(size)) if fixed != size => {
            bail!("the file fixes a side of {fixed} pixels, --size says {size}")
        }
        (Some(fixed), _) => Ok(fixed),
        (None, size) => Ok(size.unwrap_or(SIDE)),
    };
    let (height, width) = (side(height)?, side(width)?);
    let scale = import.scale.unwrap_or(import.like.scale());
    ensure!(
        channels == 3 || !matches!(scale, Scale::Imagenet | Scale::Caffe),
        "the model takes one channel; say how it was scaled in training with --scale 0..1, 0..255 or -1..1"
    );
    let (mean, std) = normalisation(scale, channels);
    Ok(InputSpec {
        name: name.clone(),
        shape: match layout {
            Layout::Nchw => [1, channels, height, width],
            _ => [1, height, width, channels],
        },
        layout,
        color: match (channels, scale) {
            (1, _) => Color::Gray,
            (_, Scale::Caffe) => Color::Bgr,
            _ => Color::Rgb,
        },
        resize: match import.resize {
            Some(Fit::Cover) => Resize::Cover,
            Some(Fit::Stretch) => Resize::Stretch,
            Some(Fit::Letterbox) => Resize::Letterbox,
            None => import.like.resize(),
        },
        filter: Filter::Bilinear,
        pad: 114,
        mean,
        std,
    })
}

/// Does the file leave the side of a picture open?
pub(super) fn is_open(inputs: &[Port]) -> bool {
    let sizes = inputs.first().and_then(|port| port.sizes.as_ref());
    // One of the four is the batch, which is always 1 here.
    sizes.is_some_and(|sizes| sizes.iter().skip(1).any(Option::is_none))
}

//! A picture becomes the model's input: size, colour order, range and layout, as the manifest says.

use fast_image_resize::{
    FilterType, IntoImageView, PixelType, ResizeAlg, ResizeOptions, Resizer,
    images::{Image, ImageRef},
};
use tract_onnx::prelude::{IntoTensor, TValue, Tensor, TractResult, tract_ndarray::ArrayD};

use crate::{
    image::Picture,
    jpeg::Wanted,
    manifest::{Color, Filter, InputSpec, Layout, Resize},
    net::Pool,
};

/// A prepared input: f32 in the manifest's shape. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Input(pub(crate) TValue);

impl Input {
    pub(crate) fn new(shape: &[usize], values: Vec<f32>) -> Result<Self, String> {
        let tensor = ArrayD::from_shape_vec(shape.to_vec(), values).map_err(|e| e.to_string())?;
        Ok(Self(tensor.into_tensor().into()))
    }

    /// The values, in the layout of the manifest.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        self.0
            .try_as_plain_ram()
            .ok()
            .and_then(|view| view.as_slice().ok())
            .unwrap_or_default()
    }
}

/// Buffers that are used again from picture to picture.
pub(crate) struct Scratch {
    resizer: Resizer,
    resized: Image<'static>,
    gray: Vec<u8>,
}

/// The steps from picture to tensor, worked out once per model.
pub(crate) struct Preprocess {
    spec: InputSpec,
    width: u32,
    height: u32,
    pixel: PixelType,
    algorithm: ResizeAlg,
    /// Per channel of the picture (red, green, blue or gray): byte → normalised value.
    tables: Vec<[f32; 256]>,
    /// Where each channel of the picture goes in the tensor.
    order: Vec<usize>,
}

/// The steps from a picture to a model's input, for whoever does not run the whole model. Share it by reference or `Arc`.
pub struct Preparer {
    preprocess: Preprocess,
    scratch: Pool<Scratch>,
}

impl Preparer {
    /// For an input that a manifest describes.
    #[must_use]
    pub fn new(spec: &InputSpec) -> Self {
        Self {
            preprocess: Preprocess::new(spec),
            scratch: Pool::default(),
        }
    }

    /// Pixels across and down.
    pub(crate) fn size(&self) -> (u32, u32) {
        self.preprocess.size()
    }

    /// What a decoder may shrink a picture for.
    pub(crate) fn wanted(&self) -> Option<Wanted> {
        self.preprocess.wanted()
    }

    /// The model's input from a picture.
    ///
    /// # Errors
    /// In words, when the picture cannot be resized.
    pub fn tensor(&self, picture: &Picture) -> Result<Input, String> {
        let mut scratch = self
            .scratch
            .take()
            .unwrap_or_else(|| self.preprocess.scratch());
        let input = self.preprocess.run(picture, &mut scratch);
        self.scratch.give_back(scratch);
        input
    }

    /// The model's input from an image file's bytes, see [`crate::Engine::tensor_from_bytes`].
    ///
    /// # Errors
    /// In words, when the bytes are no picture.
    pub fn tensor_from_bytes(&self, bytes: &[u8]) -> Result<Input, String> {
        let picture = Picture::decode_wanted(bytes, self.wanted()).map_err(|e| e.to_string())?;
        self.tensor(&picture)
    }
}

impl std::fmt::Debug for Preparer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Preparer").finish_non_exhaustive()
    }
}

/// Rec. 601 luma in 16-bit fixed point, rounded.
fn luma(pixel: &[u8]) -> u8 {
    let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
    // The weights add up to 65536, so this is at most 255.
    u8::try_from((19_595 * r + 38_470 * g + 7_471 * b + 0x8000) >> 16).unwrap_or(u8::MAX)
}

fn resize(
    resizer: &mut Resizer,
    from: &impl IntoImageView,
    to: &mut Image<'_>,
    options: &ResizeOptions,
) -> Result<(), String> {
    resizer.resize(from, to, options).map_err(|e| e.to_string())
}

impl Preprocess {
    pub(crate) fn new(spec: &InputSpec) -> Self {
        let (channels, height, width) = spec.channels_height_width();
        let side = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
        let convolution = ResizeAlg::Convolution;
        let algorithm = match spec.filter {
            Filter::Bilinear => convolution(FilterType::Bilinear),
            Filter::CatmullRom => convolution(FilterType::CatmullRom),
            Filter::Lanczos3 => convolution(FilterType::Lanczos3),
            Filter::Nearest => ResizeAlg::Nearest,
        };
        let order: Vec<usize> = match spec.color {
            Color::Rgb => vec![0, 1, 2],
            Color::Bgr => vec![2, 1, 0],
            Color::Gray => vec![0],
        };
        let tables = order
            .iter()
            .map(|&target| {
                let (mean, std) = (spec.mean[target], spec.std[target]);
                std::array::from_fn(|byte| {
                    #[expect(clippy::cast_precision_loss, reason = "0 to 255 is exact")]
                    let byte = byte as f32;
                    (byte / 255.0 - mean) / std
                })
            })
            .collect();
        Self {
            spec: spec.clone(),
            width: side(width),
            height: side(height),
            pixel: if channels == 1 {
                PixelType::U8
            } else {
                PixelType::U8x3
            },
            algorithm,
            tables,
            order,
        }
    }

    /// Pixels across and down.
    pub(crate) fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// What a decoder may shrink a picture for.
    pub(crate) fn wanted(&self) -> Option<Wanted> {
        // The nearest pixel is one of the full picture, not an average.
        (self.spec.filter != Filter::Nearest).then_some(Wanted {
            width: self.width,
            height: self.height,
            proportional: self.spec.resize != Resize::Stretch,
        })
    }

    pub(crate) fn scratch(&self) -> Scratch {
        Scratch {
            resizer: Resizer::new(),
            resized: Image::new(self.width, self.height, self.pixel),
            gray: Vec::new(),
        }
    }

    /// The tensor of a picture. Errors are those of the resizer, for sizes that it cannot take.
    pub(crate) fn run(&self, picture: &Picture, scratch: &mut Scratch) -> Result<Input, String> {
        let Scratch {
            resizer,
            resized,
            gray,
        } = scratch;
        let pixels = if self.pixel == PixelType::U8 {
            gray.clear();
            gray.extend(picture.rgb().chunks_exact(3).map(luma));
            gray.as_slice()
        } else {
            picture.rgb()
        };
        let (width, height) = (picture.width(), picture.height());
        let options = ResizeOptions::new()
            .resize_alg(self.algorithm)
            .use_alpha(false);
        let options = match self.spec.resize {
            Resize::Cover => options.fit_into_destination(Some((0.5, 0.5))),
            _ => options,
        };
        let source = ImageRef::new(width, height, pixels, self.pixel).map_err(|e| e.to_string())?;
        let channels = self.order.len();
        let values = if self.spec.resize == Resize::Letterbox {
            let (inner_width, inner_height) = self.fitted(width, height);
            let mut inner = Image::new(inner_width, inner_height, self.pixel);
            resize(resizer, &source, &mut inner, &options)?;
            let canvas = resized.buffer_mut();
            canvas.fill(self.spec.pad);
            let row = self.width as usize * channels;
            let left = ((self.width - inner_width) / 2) as usize * channels;
            let top = ((self.height - inner_height) / 2) as usize;
            let inner_row = inner_width as usize * channels;
            for (at, pixels) in inner.buffer().chunks_exact(inner_row).enumerate() {
                let start = (top + at) * row + left;
                canvas[start..start + inner_row].copy_from_slice(pixels);
            }
            self.normalise(resized.buffer())
        } else if (width, height) == (self.width, self.height) {
            self.normalise(pixels)
        } else {
            if self.spec.resize == Resize::Stretch && self.spec.filter != Filter::Nearest {
                // Rows first, columns second, each rounded to bytes: the order of the library that models
                // are trained with. The resizer's own order rounds differently.
                let mut rows = Image::new(self.width, height, self.pixel);
                resize(resizer, &source, &mut rows, &options)?;
                resize(resizer, &rows, resized, &options)?;
            } else {
                resize(resizer, &source, resized, &options)?;
            }
            self.normalise(resized.buffer())
        };
        let tensor: TractResult<Tensor> = ArrayD::from_shape_vec(self.spec.shape.to_vec(), values)
            .map(IntoTensor::into_tensor)
            .map_err(Into::into);
        tensor
            .map(|tensor| Input(tensor.into()))
            .map_err(|e| e.to_string())
    }

    /// The largest size with the picture's proportions that fits.
    fn fitted(&self, width: u32, height: u32) -> (u32, u32) {
        let (width, height) = (u64::from(width), u64::from(height));
        let (most_width, most_height) = (u64::from(self.width), u64::from(self.height));
        // part * whole / by, rounded, at least 1.
        let scale = |part: u64, whole: u64, by: u64| ((part * whole * 2 + by) / (by * 2)).max(1);
        let narrow = |side: u64| u32::try_from(side).unwrap_or(u32::MAX);
        if width * most_height >= height * most_width {
            let fitted = scale(height, most_width, width).min(most_height);
            (self.width, narrow(fitted))
        } else {
            let fitted = scale(width, most_height, height).min(most_width);
            (narrow(fitted), self.height)
        }
    }

    /// Bytes to normalised floats, in the model's layout and channel order, in one pass.
    fn normalise(&self, pixels: &[u8]) -> Vec<f32> {
        let channels = self.order.len();
        let mut values = vec![0.0; pixels.len()];
        match self.spec.layout {
            Layout::Nhwc => {
                for (to, from) in values
                    .chunks_exact_mut(channels)
                    .zip(pixels.chunks_exact(channels))
                {
                    for ((&byte, table), &target) in from.iter().zip(&self.tables).zip(&self.order)
                    {
                        to[target] = table[usize::from(byte)];
                    }
                }
            }
            Layout::Nchw => {
                let plane = pixels.len() / channels;
                for (channel, (table, &target)) in self.tables.iter().zip(&self.order).enumerate() {
                    let to = &mut values[target * plane..(target + 1) * plane];
                    for (to, from) in to.iter_mut().zip(pixels.chunks_exact(channels)) {
                        *to = table[usize::from(from[channel])];
                    }
                }
            }
        }
        values
    }
}

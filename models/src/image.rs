//! Bytes of an image file into upright RGB pixels, within bounds that hold before anything is allocated.

use std::{
    io::{self, Cursor},
    path::{Path, PathBuf},
};

use image::{
    DynamicImage, ExtendedColorType, ImageBuffer, ImageDecoder, ImageFormat, ImageReader, Limits,
    Rgb, RgbImage, codecs::jpeg::JpegEncoder, imageops::thumbnail, metadata::Orientation,
};
use zune_jpeg::{
    JpegDecoder,
    zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions},
};

use crate::{
    bundle::read_bounded,
    jpeg::{self, Wanted},
};

/// Largest image file in bytes: a 50 megapixel photograph at the best quality.
pub const MAX_ENCODED_BYTES: usize = 64 << 20;
/// Longest side in pixels: beyond line-scan cameras.
pub const MAX_SIDE: u32 = 16_384;
/// Most pixels of one image: the largest single-shot industrial cameras; 150 MB as RGB.
pub const MAX_PIXELS: u64 = 50_000_000;
/// Bytes that a decoder may ask for: the pixels of [`MAX_PIXELS`] in its own format with some room.
const MAX_DECODER_BYTES: u64 = 256 << 20;

/// Quality of what is written as JPEG, of 100: beyond it files grow and models see no difference.
const JPEG_QUALITY: u8 = 92;

/// Why bytes are not a picture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not JPEG, PNG, BMP, GIF or WebP by its content, whatever its name says.
    #[error("not an image ({0})")]
    NotAnImage(&'static str),
    /// More bytes than [`MAX_ENCODED_BYTES`].
    #[error("image file larger than the allowed 64 MiB")]
    TooManyBytes,
    /// More pixels than allowed.
    #[error(
        "image of {width}×{height} pixels: at most 16384 a side and 50 million in all are allowed"
    )]
    TooManyPixels {
        /// Pixels across.
        width: u32,
        /// Pixels down.
        height: u32,
    },
    /// The file ends before the image does.
    #[error("{format} image is cut off: {detail}")]
    Truncated {
        /// JPEG, PNG, …
        format: &'static str,
        /// What was found.
        detail: String,
    },
    /// Damaged, or of a kind that is not supported.
    #[error("cannot decode {format} image: {detail}")]
    Decode {
        /// JPEG, PNG, …
        format: &'static str,
        /// The decoder's words.
        detail: String,
    },
    /// [`Picture::to_jpeg`] failed.
    #[error("cannot write a JPEG image: {0}")]
    Encode(String),
    /// [`Picture::from_rgb`] with a buffer that is not width × height × 3.
    #[error("{bytes} bytes are not {width}×{height} RGB pixels")]
    WrongLength {
        /// Length of the buffer.
        bytes: usize,
        /// Pixels across.
        width: u32,
        /// Pixels down.
        height: u32,
    },
}

/// An upright picture: RGB, 8 bits a channel, rows from the top, never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

pub(crate) fn check_size(width: u32, height: u32) -> Result<(), ImageError> {
    let fine = (1..=MAX_SIDE).contains(&width)
        && (1..=MAX_SIDE).contains(&height)
        && u64::from(width) * u64::from(height) <= MAX_PIXELS;
    if fine {
        Ok(())
    } else {
        Err(ImageError::TooManyPixels { width, height })
    }
}

/// The bytes of an image file, at most [`MAX_ENCODED_BYTES`].
fn file(path: &Path) -> Result<Vec<u8>, ImageError> {
    let read = |source| ImageError::Read {
        path: path.to_owned(),
        source,
    };
    let bytes = read_bounded(path, MAX_ENCODED_BYTES as u64).map_err(read)?;
    bytes.ok_or(ImageError::TooManyBytes)
}

impl Picture {
    /// Pixels that are in memory already.
    ///
    /// # Errors
    /// When the size is out of bounds or the buffer is not `width × height × 3` bytes.
    pub fn from_rgb(width: u32, height: u32, rgb: Vec<u8>) -> Result<Self, ImageError> {
        check_size(width, height)?;
        if rgb.len() as u64 != u64::from(width) * u64::from(height) * 3 {
            return Err(ImageError::WrongLength {
                bytes: rgb.len(),
                width,
                height,
            });
        }
        Ok(Self { width, height, rgb })
    }

    /// Decodes JPEG, PNG, BMP, GIF (first frame) or WebP, recognised by content, turned upright as its
    /// EXIF block says. Gray, palette, 16-bit and transparent images become plain RGB; transparency is
    /// dropped, not blended.
    ///
    /// # Errors
    /// See [`ImageError`]. A broken EXIF block is ignored; a cut image is an error.
    pub fn decode(bytes: &[u8]) -> Result<Self, ImageError> {
        match recognise(bytes)? {
            ImageFormat::Jpeg => decode_jpeg(bytes),
            other => decode_other(bytes, other),
        }
    }

    /// Like [`Picture::decode`], for a picture that is about to be resized to `width × height`. A JPEG
    /// of at least four times that size in a direction comes back with each 2, 4 or 8 pixels of that
    /// direction averaged into one, and still at least twice as large as asked for. It costs a fraction,
    /// because most pixels are never computed, and looks the same after resizing.
    ///
    /// # Errors
    /// As [`Picture::decode`].
    pub fn decode_for(bytes: &[u8], width: u32, height: u32) -> Result<Self, ImageError> {
        let wanted = Wanted {
            width,
            height,
            proportional: false,
        };
        Self::decode_wanted(bytes, Some(wanted))
    }

    /// [`Picture::decode_for`] where something is wanted, [`Picture::decode`] where nothing is.
    pub(crate) fn decode_wanted(bytes: &[u8], wanted: Option<Wanted>) -> Result<Self, ImageError> {
        let format = recognise(bytes)?;
        if let Some(wanted) = wanted
            && format == ImageFormat::Jpeg
            && let Some(small) = jpeg::decode_small(bytes, wanted)
        {
            let small = small?;
            return rotated(small.width, small.height, small.rgb, small.orientation);
        }
        Self::decode(bytes)
    }

    /// Reads and decodes a file.
    ///
    /// # Errors
    /// As [`Picture::decode`], and when the file cannot be read.
    pub fn read(path: &Path) -> Result<Self, ImageError> {
        Self::decode(&file(path)?)
    }

    /// Reads a file and decodes it as [`Picture::decode_for`] does.
    ///
    /// # Errors
    /// As [`Picture::read`].
    pub fn read_for(path: &Path, width: u32, height: u32) -> Result<Self, ImageError> {
        Self::decode_for(&file(path)?, width, height)
    }

    /// The picture as a JPEG file, first made smaller if a side is longer than `longest`.
    ///
    /// # Errors
    /// If the encoder cannot write it.
    pub fn to_jpeg(&self, longest: u32) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        let mut encode = |rgb: &[u8], width, height| {
            JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY)
                .encode(rgb, width, height, ExtendedColorType::Rgb8)
                .map_err(|error| ImageError::Encode(error.to_string()))
        };
        let side = self.width.max(self.height);
        if side <= longest {
            encode(&self.rgb, self.width, self.height)?;
            return Ok(bytes);
        }
        // Sides are at most 16384, so that this fits.
        let scaled = |part: u32| (part * longest.min(MAX_SIDE) / side).max(1);
        let pixels = self.rgb.as_slice();
        let image = ImageBuffer::<Rgb<u8>, &[u8]>::from_raw(self.width, self.height, pixels)
            .ok_or_else(|| ImageError::Encode("fewer pixels than its size says".to_owned()))?;
        let small = thumbnail(&image, scaled(self.width), scaled(self.height));
        encode(&small, small.width(), small.height())?;
        Ok(bytes)
    }

    /// Pixels across, at least 1.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Pixels down, at least 1.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `width × height × 3` bytes.
    #[must_use]
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// The buffer itself, to be used again.
    #[must_use]
    pub fn into_rgb(self) -> Vec<u8> {
        self.rgb
    }
}

fn recognise(bytes: &[u8]) -> Result<ImageFormat, ImageError> {
    if bytes.len() > MAX_ENCODED_BYTES {
        return Err(ImageError::TooManyBytes);
    }
    match image::guess_format(bytes) {
        Ok(
            format @ (ImageFormat::Jpeg
            | ImageFormat::Png
            | ImageFormat::Bmp
            | ImageFormat::Gif
            | ImageFormat::WebP),
        ) => Ok(format),
        _ => Err(ImageError::NotAnImage(what_is(bytes))),
    }
}

/// A guess at bytes that are no image that is understood here, for the message.
fn what_is(bytes: &[u8]) -> &'static str {
    if bytes.is_empty() {
        return "empty";
    }
    // Enough to see past an XML declaration and a comment.
    let head = &bytes[..bytes.len().min(1024)];
    let Ok(text) = std::str::from_utf8(head).or_else(|error| {
        // A character that the cut at 1024 bytes has split is no sign of a binary file.
        let (valid, rest) = head.split_at(error.valid_up_to());
        if rest.len() < 4 {
            std::str::from_utf8(valid)
        } else {
            Err(error)
        }
    }) else {
        return "unknown binary data";
    };
    let text = text.to_ascii_lowercase();
    if text.contains("<svg") {
        "SVG"
    } else if text.contains("<html") || text.contains("<!doctype html") {
        "HTML"
    } else if text.contains('\0') {
        "unknown binary data"
    } else {
        "text"
    }
}

fn decode_error(format: &'static str, detail: impl ToString) -> ImageError {
    ImageError::Decode {
        format,
        detail: detail.to_string(),
    }
}

/// Applies the EXIF orientation.
fn upright(mut image: DynamicImage, orientation: Orientation) -> Picture {
    image.apply_orientation(orientation);
    let image = image.into_rgb8();
    Picture {
        width: image.width(),
        height: image.height(),
        rgb: image.into_raw(),
    }
}

fn decode_jpeg(bytes: &[u8]) -> Result<Picture, ImageError> {
    let options = DecoderOptions::default()
        // Otherwise damaged parts come back as gray, and a model would judge them.
        .set_strict_mode(true)
        .set_max_width(MAX_SIDE as usize)
        .set_max_height(MAX_SIDE as usize)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    if let Some(size) = jpeg::size(bytes) {
        check_size(u32::from(size.0), u32::from(size.1))?;
    }
    decoder
        .decode_headers()
        .map_err(|error| decode_error("JPEG", error))?;
    let (width, height) = decoder.dimensions().unwrap_or_default();
    let narrow = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
    let (width, height) = (narrow(width), narrow(height));
    check_size(width, height)?;
    if !jpeg::is_whole(bytes) {
        return Err(ImageError::Truncated {
            format: "JPEG",
            detail: format!(
                "{width}×{height} pixels announced, no end mark in {} bytes",
                bytes.len()
            ),
        });
    }
    let orientation = decoder
        .exif()
        .and_then(|exif| Orientation::from_exif_chunk(exif))
        .unwrap_or(Orientation::NoTransforms);
    let rgb = decoder
        .decode()
        .map_err(|error| decode_error("JPEG", error))?;
    rotated(width, height, rgb, orientation)
}

/// Decoded pixels, turned upright.
fn rotated(
    width: u32,
    height: u32,
    rgb: Vec<u8>,
    orientation: Orientation,
) -> Result<Picture, ImageError> {
    let picture = Picture::from_rgb(width, height, rgb)?;
    if orientation == Orientation::NoTransforms {
        return Ok(picture);
    }
    RgbImage::from_raw(width, height, picture.rgb)
        .map(|image| upright(DynamicImage::ImageRgb8(image), orientation))
        .ok_or_else(|| decode_error("JPEG", "fewer pixels than announced"))
}

fn decode_other(bytes: &[u8], format: ImageFormat) -> Result<Picture, ImageError> {
    let name = match format {
        ImageFormat::Png => "PNG",
        ImageFormat::Bmp => "BMP",
        ImageFormat::Gif => "GIF",
        _ => "WebP",
    };
    let fail = |error: image::ImageError| {
        let cut = std::iter::successors(
            Some(&error as &(dyn std::error::Error + 'static)),
            |error| error.source(),
        )
        .any(|error| {
            error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == io::ErrorKind::UnexpectedEof)
        });
        let detail = error.to_string();
        if cut {
            ImageError::Truncated {
                format: name,
                detail: format!("{detail} after {} bytes", bytes.len()),
            }
        } else {
            decode_error(name, detail)
        }
    };
    if format == ImageFormat::Png
        && let Some(header) = bytes.get(16..24)
    {
        // Before the decoder, whose own refusal would not name the size.
        let side = |at: usize| {
            header[at..at + 4]
                .iter()
                .fold(0, |side: u32, byte| side << 8 | u32::from(*byte))
        };
        check_size(side(0), side(4))?;
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder().map_err(fail)?;
    let (width, height) = decoder.dimensions();
    check_size(width, height)?;
    limits.reserve(decoder.total_bytes()).map_err(fail)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let image = DynamicImage::from_decoder(decoder).map_err(fail)?;
    Ok(upright(image, orientation))
}

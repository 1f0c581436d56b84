//! What a frame looks like as a sample: cropped, small, blurred if so wished, and without anything that the camera
//! wrote beside the pixels.

use std::io::Cursor;

use image::{
    ExtendedColorType, ImageDecoder, ImageReader, RgbImage, codecs::jpeg::JpegEncoder, imageops,
    metadata::Orientation,
};
use mesh_core::MAX_SAMPLE_IMAGE_BYTES;
use models::Picture;

use super::SamplesConfig;

/// High enough that a model does not notice.
const QUALITY: u8 = 90;

/// A frame as it is kept in memory until it is known whether it becomes a sample.
#[derive(Debug)]
pub enum Material {
    /// The file as the camera gave it.
    File(Vec<u8>),
    /// The pixels, where there is no file.
    Pixels(Picture),
}

impl Material {
    /// Bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::File(bytes) => bytes.len(),
            Self::Pixels(picture) => picture.rgb().len(),
        }
    }
}

/// Why a frame makes no image.
#[derive(Debug, thiserror::Error)]
pub(super) enum MakeError {
    /// The file cannot be decoded any more.
    #[error("decoding the frame: {0}")]
    Decode(String),
    /// The encoder's words.
    #[error("encoding the sample: {0}")]
    Encode(String),
}

/// The JPEG of a sample, at most [`MAX_SAMPLE_IMAGE_BYTES`] long.
pub(super) fn make(material: &Material, config: &SamplesConfig) -> Result<Vec<u8>, MakeError> {
    let (picture, width, height) = decode(material, config)?;
    let (cut_width, cut_height) = (picture.width(), picture.height());
    let image = RgbImage::from_raw(cut_width, cut_height, picture.into_rgb())
        .ok_or_else(|| MakeError::Decode("fewer pixels than announced".into()))?;
    let [left, top, wide, high] = config.crop;
    let (x, cut_width) = part(cut_width, left, wide);
    let (y, cut_height) = part(cut_height, top, high);
    let view = imageops::crop_imm(&image, x, y, cut_width, cut_height);
    // The decoder may have made it smaller; its proportions are those of the full picture.
    let (mut to_width, mut to_height) = fit(
        part(width, left, wide).1,
        part(height, top, high).1,
        config.max_side,
    );
    if to_width > cut_width || to_height > cut_height {
        (to_width, to_height) = (cut_width, cut_height);
    }
    loop {
        // Averages of pixels, straight from the picture: a better filter needs several times its memory.
        let small = if (to_width, to_height) == (cut_width, cut_height) {
            view.to_image()
        } else {
            imageops::thumbnail(&*view, to_width, to_height)
        };
        let small = if config.blur > 0.0 {
            imageops::fast_blur(&small, config.blur)
        } else {
            small
        };
        let mut bytes = Vec::new();
        JpegEncoder::new_with_quality(&mut bytes, QUALITY)
            .encode(&small, to_width, to_height, ExtendedColorType::Rgb8)
            .map_err(|error| MakeError::Encode(error.to_string()))?;
        if bytes.len() as u64 <= MAX_SAMPLE_IMAGE_BYTES || to_width.max(to_height) <= 1 {
            return Ok(bytes);
        }
        // Noise of the largest size. Half of it always fits, after a step or two.
        (to_width, to_height) = ((to_width / 2).max(1), (to_height / 2).max(1));
    }
}

/// The pixels, and the size of the full picture that they show. A large JPEG comes back at a half, a quarter or an
/// eighth, little below what is asked for at the least: the full photograph would not fit a small board's memory.
fn decode(material: &Material, config: &SamplesConfig) -> Result<(Picture, u32, u32), MakeError> {
    let bytes = match material {
        Material::Pixels(picture) => {
            return Ok((picture.clone(), picture.width(), picture.height()));
        }
        Material::File(bytes) => bytes,
    };
    let fail = |error: &dyn std::fmt::Display| MakeError::Decode(error.to_string());
    let mut decoder = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| fail(&error))?
        .into_decoder()
        .map_err(|error| fail(&error))?;
    let (mut width, mut height) = decoder.dimensions();
    if matches!(
        decoder.orientation(),
        Ok(Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH)
    ) {
        std::mem::swap(&mut width, &mut height);
    }
    drop(decoder);
    let [_, _, wide, high] = config.crop;
    let side = part(width, 0.0, wide).1.max(part(height, 0.0, high).1);
    // 1080p at a half is 960 across: hardly less than 1,024, for a quarter of the memory.
    let enough = config.max_side / 4 * 3;
    let factor = [8, 4, 2].into_iter().find(|f| side / f >= enough);
    let picture = match factor {
        // A decoder that is told twice the factor keeps twice the size: see `Picture::decode_for`.
        Some(f) => Picture::decode_for(bytes, (width / (2 * f)).max(1), (height / (2 * f)).max(1)),
        None => Picture::decode(bytes),
    }
    .map_err(|error| fail(&error))?;
    Ok((picture, width, height))
}

/// Where a share of a side begins and how long it is, in pixels, at least 1 and inside.
fn part(side: u32, start: f32, length: f32) -> (u32, u32) {
    let pixels = |share: f32| (f64::from(side) * f64::from(share)).round() as u32;
    let start = pixels(start).min(side.saturating_sub(1));
    (start, pixels(length).clamp(1, (side - start).max(1)))
}

/// The size with the same proportions whose longer side is at most `most`.
fn fit(width: u32, height: u32, most: u32) -> (u32, u32) {
    let longer = width.max(height);
    if longer <= most {
        return (width, height);
    }
    let scale = f64::from(most) / f64::from(longer);
    let scaled = |side: u32| ((f64::from(side) * scale).round() as u32).clamp(1, most);
    (scaled(width), scaled(height))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> SamplesConfig {
        toml::from_str(text).unwrap()
    }

    /// Left half red, right half blue.
    fn flag(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, _| {
            image::Rgb(if x < width / 2 {
                [250, 0, 0]
            } else {
                [0, 0, 250]
            })
        })
    }

    fn jpeg(image: &RgbImage) -> Vec<u8> {
        let mut bytes = Vec::new();
        JpegEncoder::new_with_quality(&mut bytes, 95)
            .encode(
                image,
                image.width(),
                image.height(),
                ExtendedColorType::Rgb8,
            )
            .unwrap();
        bytes
    }

    #[test]
    fn proportions_survive_however_the_decoder_shrinks() {
        for (width, height) in [(3_000, 700), (700, 3_000), (640, 480), (90, 60)] {
            let made = make(
                &Material::File(jpeg(&flag(width, height))),
                &config("max_side = 320"),
            )
            .unwrap();
            let seen = Picture::decode(&made).unwrap();
            assert_eq!((seen.width(), seen.height()), fit(width, height, 320));
        }
    }

    #[test]
    fn a_photograph_that_is_nearly_small_enough_is_halved() {
        let config = config("max_side = 1024");
        let material = Material::File(jpeg(&flag(1_920, 1_080)));
        let (picture, ..) = decode(&material, &config).unwrap();
        assert_eq!((picture.width(), picture.height()), (960, 540));
        let seen = Picture::decode(&make(&material, &config).unwrap()).unwrap();
        assert_eq!((seen.width(), seen.height()), (960, 540));
    }

    #[test]
    fn a_crop_shows_its_part_only() {
        let picture = Picture::from_rgb(400, 100, flag(400, 100).into_raw()).unwrap();
        for material in [
            Material::Pixels(picture),
            Material::File(jpeg(&flag(4_000, 1_000))),
        ] {
            let made = make(
                &material,
                &config("crop = [0.55, 0.1, 0.4, 0.5]\nmax_side = 64"),
            )
            .unwrap();
            let seen = Picture::decode(&made).unwrap();
            assert_eq!((seen.width(), seen.height()), (64, 20));
            assert!(seen.rgb().chunks_exact(3).all(|p| p[2] > 200 && p[0] < 50));
        }
    }

    #[test]
    fn blur_takes_the_edge_away() {
        let picture = Picture::from_rgb(64, 64, flag(64, 64).into_raw()).unwrap();
        let made = make(&Material::Pixels(picture), &config("blur = 8.0")).unwrap();
        let seen = Picture::decode(&made).unwrap();
        let at = |x: usize| i32::from(seen.rgb()[(32 * 64 + x) * 3]);
        assert!((at(31) - at(33)).abs() < 40 && at(4) > 180);
    }

    /// What the camera wrote beside the pixels (place, time, serial number) stays on the device.
    #[test]
    fn nothing_beside_the_pixels_is_kept() {
        let plain = jpeg(&flag(64, 32));
        // An EXIF block that turns the picture by 90 degrees and holds a secret.
        let mut exif =
            b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0SECRET-PLACE"
                .to_vec();
        let length = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
        let mut marked = plain[..2].to_vec();
        marked.extend([0xff, 0xe1]);
        marked.extend(length);
        marked.append(&mut exif);
        marked.extend(&plain[2..]);
        let made = make(&Material::File(marked), &config("")).unwrap();
        assert!(!made.windows(6).any(|w| w == b"SECRET") && !made.windows(4).any(|w| w == b"Exif"));
        let seen = Picture::decode(&made).unwrap();
        assert_eq!((seen.width(), seen.height()), (32, 64), "it is upright");
    }

    #[test]
    fn nonsense_is_an_error() {
        assert!(make(&Material::File(b"<svg>".to_vec()), &config("")).is_err());
        assert!(
            make(
                &Material::File(jpeg(&flag(64, 64))[..300].to_vec()),
                &config("")
            )
            .is_err()
        );
    }
}

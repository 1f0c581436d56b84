//! Image files without anything beside the pixels. Cameras write into a file where and when it was taken, with which
//! device, and sometimes a second picture; none of that is anybody's business who learns from it.
//!
//! A file in which there is nothing else stays as it is, byte by byte. Any other is decoded, turned upright and
//! encoded anew. What is nothing else is a short list: what is not understood here is not kept.

use std::borrow::Cow;

use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

use crate::{
    image::{ImageError, Picture},
    jpeg,
};

/// What a PNG file begins with.
const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";
/// Chunks that say how the pixels are to be read, and the pixels.
const PNG_CHUNKS: [&[u8; 4]; 9] = [
    b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"IDAT", b"IEND",
];

/// Is there nothing in this file but one picture?
fn is_bare(file: &[u8]) -> bool {
    if let Some(chunks) = file.strip_prefix(PNG) {
        is_bare_png(chunks).is_some()
    } else {
        jpeg::is_bare(file)
    }
}

/// Nothing if there is another chunk, or something after the last.
fn is_bare_png(mut rest: &[u8]) -> Option<()> {
    loop {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (kind, after) = after.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        // The content and its checksum.
        rest = after.get(length.checked_add(4)?..)?;
        if !PNG_CHUNKS.contains(&kind) {
            return None;
        }
        if kind == b"IEND" {
            return (length == 0 && rest.is_empty()).then_some(());
        }
    }
}

/// The file, of which every pixel can be decoded, without anything beside them; not much longer than `most` bytes.
///
/// # Errors
/// Those of [`Picture::decode`], and if what comes out cannot be written.
pub fn bare(file: &[u8], most: usize) -> Result<Cow<'_, [u8]>, ImageError> {
    let picture = Picture::decode(file)?;
    if is_bare(file) {
        return Ok(Cow::Borrowed(file));
    }
    if file.starts_with(PNG) {
        let mut bytes = Vec::new();
        PngEncoder::new(&mut bytes)
            .write_image(
                picture.rgb(),
                picture.width(),
                picture.height(),
                ExtendedColorType::Rgb8,
            )
            .map_err(|error| ImageError::Encode(error.to_string()))?;
        if bytes.len() <= most {
            return Ok(Cow::Owned(bytes));
        }
    }
    let mut side = picture.width().max(picture.height());
    loop {
        let bytes = picture.to_jpeg(side)?;
        if bytes.len() <= most || side <= 1 {
            return Ok(Cow::Owned(bytes));
        }
        // Noise, or a photograph that was compressed far more; half of it nearly always fits.
        side /= 2;
    }
}

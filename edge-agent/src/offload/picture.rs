//! What a frame looks like on its way to a neighbour.

use std::io::Cursor;

use image::ImageReader;
use models::{ImageError, Picture};

use super::wire::MAX_IMAGE;

/// Pixels of a picture that a device decodes for another one: 12 MB, where a file of two would fill 150.
const MAX_PIXELS: u64 = 2_048 * 2_048;
/// The longest side of one that is encoded here: more than models look at.
const MAX_SIDE: u32 = 1_024;

/// A frame that a neighbour is to look at.
#[derive(Debug)]
pub(crate) enum Shown {
    /// As the camera gave it.
    File(Vec<u8>),
    /// The pixels, where there is no file.
    Pixels(Picture),
}

/// Is the file small enough to be decoded for others? Only its head is read.
pub(super) fn fits(file: &[u8]) -> bool {
    let reader = ImageReader::new(Cursor::new(file)).with_guessed_format();
    let size = reader.ok().and_then(|reader| reader.into_dimensions().ok());
    file.len() <= MAX_IMAGE
        && size.is_some_and(|(width, height)| u64::from(width) * u64::from(height) <= MAX_PIXELS)
}

/// The bytes that are sent: the camera's own file, less whatever it wrote beside the pixels, where that fits; else a JPEG.
/// Takes some milliseconds.
pub(super) fn encode(shown: &Shown) -> Result<Vec<u8>, ImageError> {
    match shown {
        Shown::File(file) if fits(file) => {
            let bare = models::bare(file, MAX_IMAGE)?;
            if bare.len() <= MAX_IMAGE {
                return Ok(bare.into_owned());
            }
            Picture::decode(file)?.to_jpeg(MAX_SIDE)
        }
        Shown::File(file) => Picture::decode_for(file, MAX_SIDE, MAX_SIDE)?.to_jpeg(MAX_SIDE),
        Shown::Pixels(picture) => picture.to_jpeg(MAX_SIDE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jpeg(width: u32, height: u32) -> Vec<u8> {
        let rgb = vec![90; width as usize * height as usize * 3];
        let picture = Picture::from_rgb(width, height, rgb).unwrap();
        picture.to_jpeg(u32::MAX).unwrap()
    }

    #[test]
    fn a_small_file_travels_as_it_is_and_a_large_one_is_made_small() {
        let small = jpeg(320, 240);
        assert_eq!(encode(&Shown::File(small.clone())).unwrap(), small);
        let large = jpeg(3_000, 2_000);
        assert!(large.len() < MAX_IMAGE && !fits(&large), "by its pixels");
        let sent = encode(&Shown::File(large)).unwrap();
        let seen = Picture::decode(&sent).unwrap();
        assert!(fits(&sent) && seen.width().max(seen.height()) <= MAX_SIDE);
        let pixels = Picture::from_rgb(64, 48, vec![90; 64 * 48 * 3]).unwrap();
        let sent = encode(&Shown::Pixels(pixels)).unwrap();
        let seen = Picture::decode(&sent).unwrap();
        assert_eq!((seen.width(), seen.height()), (64, 48));
    }

    #[test]
    fn what_is_no_picture_does_not_fit() {
        assert!(!fits(b"") && !fits(b"<svg>") && !fits(&[0; 4_096]));
        assert!(encode(&Shown::File(b"<svg>".to_vec())).is_err());
    }
}

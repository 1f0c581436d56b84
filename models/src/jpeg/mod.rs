//! Decodes a large photograph straight to a smaller one: each 8×8 block is transformed into 4, 2 or 1
//! averages a side instead of eight pixels, so most pixels are never computed. Averaging and the inverse
//! cosine transform are both linear, so the averages are exact.
//!
//! Only what cameras write is handled: baseline, 8 bits, gray or YCbCr in one scan. For anything else the
//! caller falls back to the complete decoder.

mod bits;
mod block;
mod header;

use image::metadata::Orientation;

use crate::image::{ImageError, check_size};
use bits::Bits;
use block::Transform;
use header::Header;
pub(crate) use header::{is_bare, is_whole, size};

/// A picture whose sides are whole fractions of the encoded one's.
pub(crate) struct Small {
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) rgb: Vec<u8>,
    pub(crate) orientation: Orientation,
}

/// What the picture is wanted for: to be resized to this.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// Both directions must shrink alike.
    pub(crate) proportional: bool,
}

/// The largest of 8, 4, 2, 1 that divides `side` and leaves at least twice `wanted`: resizing needs so
/// much to come out as from the full picture.
fn factor(side: u32, wanted: u32) -> u32 {
    [8, 4, 2]
        .into_iter()
        .find(|by| side.is_multiple_of(*by) && side / by >= wanted.saturating_mul(2))
        .unwrap_or(1)
}

/// One colour component's pixels, shrunk.
struct Plane {
    /// Blocks across and down in one MCU.
    blocks: (usize, usize),
    /// Pixels of a shrunk block across and down.
    pixels: (usize, usize),
    /// How often a pixel stands for one of the picture's, across and down: as powers of two.
    repeat: (u32, u32),
    stride: usize,
    data: Vec<u8>,
    transform: Transform,
    quantum: [f32; 64],
    dc: usize,
    ac: usize,
    previous: i32,
}

/// Decodes `bytes` shrunk as far as is `wanted`; nothing if the file is of a kind that is not handled
/// here, or nothing would be gained.
pub(crate) fn decode_small(bytes: &[u8], wanted: Wanted) -> Option<Result<Small, ImageError>> {
    let header = Header::read(bytes)?;
    let (width, height) = (u32::from(header.width), u32::from(header.height));
    if check_size(width, height).is_err() || !is_whole(bytes) {
        // Refused by the complete decoder, with its reasons.
        return None;
    }
    let (mut across, mut down) = (wanted.width, wanted.height);
    if turned(header.orientation) {
        std::mem::swap(&mut across, &mut down);
    }
    let (mut x, mut y) = (factor(width, across), factor(height, down));
    if wanted.proportional {
        x = x.min(y);
        y = x;
    }
    if (x, y) == (1, 1) {
        return None;
    }
    let mut planes = header.planes(x as usize, y as usize)?;
    Some(match decode(bytes, &header, &mut planes) {
        Ok(()) => Ok(Small {
            width: width / x,
            height: height / y,
            rgb: colors(&planes, (width / x) as usize, (height / y) as usize),
            orientation: header.orientation,
        }),
        Err(detail) => Err(ImageError::Decode {
            format: "JPEG",
            detail: detail.to_owned(),
        }),
    })
}

/// Does this orientation exchange width and height?
fn turned(orientation: Orientation) -> bool {
    matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    )
}

/// Decodes the one scan into the planes.
fn decode(bytes: &[u8], header: &Header, planes: &mut [Plane]) -> Result<(), &'static str> {
    let mut bits = Bits::new(bytes, header.scan);
    let (across, down) = header.mcus();
    let mut until_restart = header.restart;
    for row in 0..down {
        for column in 0..across {
            if header.restart > 0 {
                if until_restart == 0 {
                    bits.restart()?;
                    planes.iter_mut().for_each(|plane| plane.previous = 0);
                    until_restart = header.restart;
                }
                until_restart -= 1;
            }
            for plane in planes.iter_mut() {
                let (dc, ac) = header.tables(plane.dc, plane.ac)?;
                for y in 0..plane.blocks.1 {
                    for x in 0..plane.blocks.0 {
                        let mut coefficients = [0.0; 64];
                        let rows = block::read(
                            &mut bits,
                            dc,
                            ac,
                            &plane.quantum,
                            &mut plane.previous,
                            &mut coefficients,
                        )?;
                        let left = (column * plane.blocks.0 + x) * plane.pixels.0;
                        let top = (row * plane.blocks.1 + y) * plane.pixels.1;
                        let start = top * plane.stride + left;
                        let target = plane.data.get_mut(start..).unwrap_or_default();
                        (plane.transform)(&coefficients, rows, target, plane.stride);
                    }
                }
            }
            if bits.overrun() {
                return Err("the image data ends before the image does");
            }
        }
    }
    Ok(())
}

/// The planes as RGB. BT.601 at full range, in 16-bit fixed point, rounded.
fn colors(planes: &[Plane], width: usize, height: usize) -> Vec<u8> {
    let mut rgb = vec![0; width * height * 3];
    for (y, row) in rgb.chunks_exact_mut(width * 3).enumerate() {
        let line = |plane: &Plane| {
            let start = (y >> plane.repeat.1) * plane.stride;
            start..start + plane.stride
        };
        match planes {
            [luma, blue, red] => {
                let (shift_b, shift_r) = (blue.repeat.0, red.repeat.0);
                let (luma, blue, red) = (
                    &luma.data[line(luma)],
                    &blue.data[line(blue)],
                    &red.data[line(red)],
                );
                for ((x, pixel), &luma) in row.chunks_exact_mut(3).enumerate().zip(luma) {
                    let luma = (i32::from(luma) << 16) + (1 << 15);
                    let blue = i32::from(blue[x >> shift_b]) - 128;
                    let red = i32::from(red[x >> shift_r]) - 128;
                    pixel[0] = byte((luma + 91_881 * red) >> 16);
                    pixel[1] = byte((luma - 22_554 * blue - 46_802 * red) >> 16);
                    pixel[2] = byte((luma + 116_130 * blue) >> 16);
                }
            }
            [gray, ..] => {
                for (pixel, &gray) in row.chunks_exact_mut(3).zip(&gray.data[line(gray)]) {
                    pixel.fill(gray);
                }
            }
            [] => {}
        }
    }
    rgb
}

fn byte(value: i32) -> u8 {
    #[expect(clippy::cast_sign_loss, reason = "clamped to 0..=255")]
    let byte = value.clamp(0, 255) as u8;
    byte
}

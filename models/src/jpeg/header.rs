//! The segments before the pixels of a JPEG file.

use image::metadata::Orientation;

use super::{
    Plane,
    bits::Huffman,
    block::{ZIGZAG, transform_into},
};

/// The marker segments of a file in order, up to and with the start of the first scan.
struct Segments<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// Markers that are used here.
const START_OF_SCAN: u8 = 0xda;

impl<'a> Iterator for Segments<'a> {
    /// The marker, its content, and where the next segment starts.
    type Item = (u8, &'a [u8], usize);

    fn next(&mut self) -> Option<Self::Item> {
        if *self.bytes.get(self.at)? != 0xff {
            return None;
        }
        // Any number of filling bytes may come before a marker.
        while self.bytes.get(self.at + 1) == Some(&0xff) {
            self.at += 1;
        }
        let head = self.bytes.get(self.at + 1..self.at + 4)?;
        let length = usize::from(u16::from_be_bytes([head[1], head[2]]));
        let content = self.bytes.get(self.at + 4..self.at + 2 + length)?;
        self.at = if head[0] == START_OF_SCAN {
            self.bytes.len()
        } else {
            self.at + 2 + length
        };
        Some((head[0], content, self.at))
    }
}

fn segments(bytes: &[u8]) -> Segments<'_> {
    let at = if bytes.starts_with(&[0xff, 0xd8]) {
        2
    } else {
        bytes.len()
    };
    Segments { bytes, at }
}

/// Where the first scan's data starts.
fn scan_start(bytes: &[u8], content: &[u8]) -> Option<usize> {
    // `content` is a part of `bytes`; its end is where the data begins.
    let all = bytes.as_ptr() as usize;
    (content.as_ptr() as usize)
        .checked_sub(all)
        .map(|start| start + content.len())
}

/// Width and height in pixels, for a file of any JPEG kind.
pub(crate) fn size(bytes: &[u8]) -> Option<(u16, u16)> {
    segments(bytes).find_map(|(marker, content, _)| {
        let frame = matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc);
        match content {
            [_, h1, h0, w1, w0, ..] if frame => Some((
                u16::from_be_bytes([*w1, *w0]),
                u16::from_be_bytes([*h1, *h0]),
            )),
            _ => None,
        }
    })
}

/// Is there an end mark after the first scan's start? Within a scan its two bytes cannot occur.
pub(crate) fn is_whole(bytes: &[u8]) -> bool {
    segments(bytes)
        .find(|(marker, ..)| *marker == START_OF_SCAN)
        .and_then(|(_, content, _)| scan_start(bytes, content))
        .and_then(|start| bytes.get(start..))
        // From the end: that is where it is.
        .is_some_and(|data| data.windows(2).rev().any(|pair| pair == [0xff, 0xd9]))
}

/// Where the data of a scan ends: at the next marker that is no mark within it.
fn scan_end(bytes: &[u8], start: usize) -> Option<usize> {
    let within = |marker: u8| matches!(marker, 0 | 0xd0..=0xd7 | 0xff);
    let data = bytes.get(start..)?;
    data.windows(2)
        .position(|pair| pair[0] == 0xff && !within(pair[1]))
        .map(|at| start + at)
}

/// Is there nothing in the file but what one picture is decoded from: no notes of a camera, no comment, no colour
/// profile, no second picture, nothing after the end?
pub(crate) fn is_bare(bytes: &[u8]) -> bool {
    if !bytes.starts_with(&[0xff, 0xd8]) {
        return false;
    }
    let mut at = 2;
    loop {
        if bytes.get(at..) == Some(&[0xff, 0xd9][..]) {
            return true;
        }
        let Some((marker, content, next)) = (Segments { bytes, at }).next() else {
            return false;
        };
        // Without a picture of its own in it.
        let is_jfif = marker == 0xe0 && content.starts_with(b"JFIF\0") && content.len() == 14;
        let is_adobe = marker == 0xee && content.starts_with(b"Adobe") && content.len() == 12;
        let is_coded = matches!(marker, 0xc0..=0xcf | 0xda | 0xdb | 0xdd);
        if !(is_jfif || is_adobe || is_coded) {
            return false;
        }
        at = if marker == START_OF_SCAN {
            let end = scan_start(bytes, content).and_then(|start| scan_end(bytes, start));
            match end {
                Some(end) => end,
                None => return false,
            }
        } else {
            next
        };
    }
}

struct Component {
    id: u8,
    across: usize,
    down: usize,
    quanta: usize,
    dc: usize,
    ac: usize,
}

/// What is needed to decode a baseline file of one scan.
pub(super) struct Header {
    pub(super) width: u16,
    pub(super) height: u16,
    pub(super) orientation: Orientation,
    /// MCUs between restart marks; 0 for none.
    pub(super) restart: usize,
    /// Where the scan's data starts.
    pub(super) scan: usize,
    components: Vec<Component>,
    quanta: [Option<[f32; 64]>; 4],
    dc: [Option<Huffman>; 4],
    ac: [Option<Huffman>; 4],
}

impl Header {
    /// Reads everything up to the pixels; nothing if the file is not of the handled kind.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut header = Self {
            width: 0,
            height: 0,
            orientation: Orientation::NoTransforms,
            restart: 0,
            scan: 0,
            components: Vec::new(),
            quanta: [None; 4],
            dc: [const { None }; 4],
            ac: [const { None }; 4],
        };
        for (marker, content, _) in segments(bytes) {
            match marker {
                // Baseline, and extended with the same codes.
                0xc0 | 0xc1 => header.frame(content)?,
                0xc4 => header.huffman(content)?,
                0xdb => header.quantisation(content)?,
                0xdd => header.restart = usize::from(u16::from_be_bytes(*content.first_chunk()?)),
                // Camera data; a broken block means upright.
                0xe1 => {
                    if let Some(exif) = content.strip_prefix(b"Exif\0\0") {
                        header.orientation =
                            Orientation::from_exif_chunk(exif).unwrap_or(Orientation::NoTransforms);
                    }
                }
                // Other colours than YCbCr.
                0xee if content.starts_with(b"Adobe") && content.get(11) != Some(&1) => {
                    return None;
                }
                0xe0..=0xef | 0xfe => {}
                START_OF_SCAN => {
                    header.scan(content)?;
                    header.scan = scan_start(bytes, content)?;
                    return Some(header);
                }
                _ => return None,
            }
        }
        None
    }

    fn frame(&mut self, content: &[u8]) -> Option<()> {
        let &[8, h1, h0, w1, w0, count, ref rest @ ..] = content else {
            return None;
        };
        self.height = u16::from_be_bytes([h1, h0]);
        self.width = u16::from_be_bytes([w1, w0]);
        if !self.components.is_empty() || rest.len() != usize::from(count) * 3 {
            return None;
        }
        for part in rest.chunks_exact(3) {
            self.components.push(Component {
                id: part[0],
                across: usize::from(part[1] >> 4),
                down: usize::from(part[1] & 15),
                quanta: usize::from(part[2]),
                dc: 0,
                ac: 0,
            });
        }
        match self.components.as_mut_slice() {
            // Alone, its sampling means nothing.
            [gray] => (gray.across, gray.down) = (1, 1),
            [luma, blue, red] => {
                let fits = matches!((luma.across, luma.down), (1, 1) | (2, 1) | (1, 2) | (2, 2))
                    && [&blue, &red].iter().all(|c| (c.across, c.down) == (1, 1));
                // Some files store RGB and say so by these names.
                if !fits || (luma.id, blue.id, red.id) == (b'R', b'G', b'B') {
                    return None;
                }
            }
            _ => return None,
        }
        Some(())
    }

    fn huffman(&mut self, mut content: &[u8]) -> Option<()> {
        while let Some((&kind, rest)) = content.split_first() {
            let (counts, rest) = rest.split_first_chunk::<16>()?;
            let total: usize = counts.iter().map(|&count| usize::from(count)).sum();
            let (symbols, rest) = rest.split_at_checked(total)?;
            let table = Huffman::new(counts, symbols)?;
            let slots = match kind >> 4 {
                0 => &mut self.dc,
                1 => &mut self.ac,
                _ => return None,
            };
            *slots.get_mut(usize::from(kind & 15))? = Some(table);
            content = rest;
        }
        Some(())
    }

    fn quantisation(&mut self, mut content: &[u8]) -> Option<()> {
        while let Some((&kind, rest)) = content.split_first() {
            let size = match kind >> 4 {
                0 => 1,
                1 => 2,
                _ => return None,
            };
            let (values, rest) = rest.split_at_checked(64 * size)?;
            let mut table = [0.0; 64];
            for (value, &at) in values.chunks_exact(size).zip(&ZIGZAG) {
                let value = value
                    .iter()
                    .fold(0u16, |sum, &byte| sum << 8 | u16::from(byte));
                table[usize::from(at)] = f32::from(value);
            }
            *self.quanta.get_mut(usize::from(kind & 15))? = Some(table);
            content = rest;
        }
        Some(())
    }

    fn scan(&mut self, content: &[u8]) -> Option<()> {
        let (&count, rest) = content.split_first()?;
        let (parts, rest) = rest.split_at_checked(usize::from(count) * 2)?;
        if rest != [0, 63, 0] || usize::from(count) != self.components.len() {
            return None;
        }
        for (component, part) in self.components.iter_mut().zip(parts.chunks_exact(2)) {
            if component.id != part[0] {
                return None;
            }
            component.dc = usize::from(part[1] >> 4);
            component.ac = usize::from(part[1] & 15);
        }
        Some(())
    }

    /// The Huffman tables of these numbers.
    pub(super) fn tables(
        &self,
        dc: usize,
        ac: usize,
    ) -> Result<(&Huffman, &Huffman), &'static str> {
        let dc = self.dc.get(dc).and_then(Option::as_ref);
        let ac = self.ac.get(ac).and_then(Option::as_ref);
        dc.zip(ac).ok_or("a Huffman table is missing")
    }

    fn sampling(&self) -> (usize, usize) {
        self.components
            .first()
            .map_or((1, 1), |luma| (luma.across, luma.down))
    }

    /// MCUs across and down.
    pub(super) fn mcus(&self) -> (usize, usize) {
        let (across, down) = self.sampling();
        (
            usize::from(self.width).div_ceil(8 * across),
            usize::from(self.height).div_ceil(8 * down),
        )
    }

    /// Empty planes for the picture shrunk by `x` and `y` (1, 2, 4 or 8).
    pub(super) fn planes(&self, x: usize, y: usize) -> Option<Vec<Plane>> {
        let (most_across, most_down) = self.sampling();
        let (mcus_across, mcus_down) = self.mcus();
        self.components
            .iter()
            .map(|component| {
                // A component of half the resolution need shrink by half as much only.
                let direction = |factor: usize, most: usize, own: usize| {
                    let coarser = most / own;
                    let pixels = 8 / (factor / coarser).max(1);
                    let repeat = (coarser / factor).max(1).ilog2();
                    (pixels, repeat)
                };
                let (pixels_x, repeat_x) = direction(x, most_across, component.across);
                let (pixels_y, repeat_y) = direction(y, most_down, component.down);
                let stride = mcus_across * component.across * pixels_x;
                Some(Plane {
                    blocks: (component.across, component.down),
                    pixels: (pixels_x, pixels_y),
                    repeat: (repeat_x, repeat_y),
                    stride,
                    data: vec![0; stride * mcus_down * component.down * pixels_y],
                    transform: transform_into(pixels_x, pixels_y)?,
                    quantum: (*self.quanta.get(component.quanta)?)?,
                    dc: component.dc,
                    ac: component.ac,
                    previous: 0,
                })
            })
            .collect()
    }
}

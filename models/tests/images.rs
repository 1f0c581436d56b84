//! Images as they come: whole, cut, hostile, turned. And what becomes of them as tensors.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may fail"
)]

mod common;

use std::io::Cursor;

use common::{MANIFEST, bundle_of, model};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage, codecs::jpeg::JpegEncoder};
use models::{Engine, ImageError, Picture, bare};
use proptest::prelude::*;
use prost::Message;

/// A picture with structure at every scale and no symmetry.
fn drawing(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let wave = |period: f32, at: u32| (at as f32 / period).sin() * 60.0 + 120.0;
        let slope = (x * 60 / width + y * 30 / height) as f32;
        Rgb([
            (wave(17.0, x) + slope) as u8,
            (wave(9.0, y) + slope) as u8,
            (wave(31.0, x + 2 * y) - slope / 2.0) as u8,
        ])
    })
}

fn encoded(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    DynamicImage::ImageRgb8(image.clone())
        .write_to(&mut bytes, format)
        .unwrap();
    bytes.into_inner()
}

fn jpeg(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, 92)
        .encode_image(image)
        .unwrap();
    bytes
}

/// The JPEG with an EXIF block that says this orientation.
fn with_orientation(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let mut exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
    with_app1(jpeg, &exif)
}

fn with_app1(jpeg: &[u8], content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len() + 2).unwrap().to_be_bytes();
    [&jpeg[..2], &[0xff, 0xe1], &length, content, &jpeg[2..]].concat()
}

fn mean_difference(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: u64 = a
        .iter()
        .zip(b)
        .map(|(a, b)| u64::from(a.abs_diff(*b)))
        .sum();
    sum as f64 / a.len() as f64
}

#[test]
fn every_format_is_recognised_by_content() {
    let image = drawing(40, 30);
    for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::WebP] {
        let picture = Picture::decode(&encoded(&image, format)).unwrap();
        assert_eq!((picture.width(), picture.height()), (40, 30));
        assert_eq!(picture.rgb(), image.as_raw(), "{format:?}");
    }
    assert_eq!(
        Picture::decode(&encoded(&image, ImageFormat::Gif))
            .unwrap()
            .width(),
        40
    );
    let picture = Picture::decode(&jpeg(&image)).unwrap();
    assert!(mean_difference(picture.rgb(), image.as_raw()) < 6.0);
}

#[test]
fn gray_transparent_and_deep_images_become_rgb() {
    let image = DynamicImage::ImageRgb8(drawing(8, 8));
    let variants = [
        DynamicImage::ImageLuma8(image.to_luma8()),
        DynamicImage::ImageLumaA16(image.to_luma_alpha16()),
        DynamicImage::ImageRgba8(image.to_rgba8()),
        DynamicImage::ImageRgb16(image.to_rgb16()),
    ];
    for variant in variants {
        let mut bytes = Cursor::new(Vec::new());
        variant.write_to(&mut bytes, ImageFormat::Png).unwrap();
        let picture = Picture::decode(bytes.get_ref()).unwrap();
        assert_eq!(picture.rgb(), variant.to_rgb8().as_raw());
    }
}

#[test]
fn what_is_no_image_is_named() {
    let cases: [(&[u8], &str); 6] = [
        (b"", "empty"),
        (
            b"<?xml version=\"1.0\"?><svg xmlns=\"http://www.w3.org/2000/svg\"/>",
            "SVG",
        ),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        ("größer".as_bytes(), "text"),
        (b"\x7fELF\x02\x01\x01\0\0\0\xff\xfe", "unknown binary data"),
        (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "unknown binary data"),
    ];
    for (bytes, what) in cases {
        match Picture::decode(bytes) {
            Err(ImageError::NotAnImage(found)) => assert_eq!(found, what),
            other => panic!("{what}: {other:?}"),
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("picture.jpg");
    std::fs::write(&path, cases[1].0).unwrap();
    assert_eq!(
        Picture::read(&path).unwrap_err().to_string(),
        "not an image (SVG)"
    );
}

#[test]
fn a_header_that_promises_too_much_is_refused_before_anything_is_allocated() {
    let mut png = encoded(&drawing(4, 4), ImageFormat::Png);
    png[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let error = Picture::decode(&png).unwrap_err();
    assert!(
        matches!(
            error,
            ImageError::TooManyPixels {
                width: 60_000,
                height: 60_000
            }
        ),
        "{error}"
    );

    let mut jpeg = jpeg(&drawing(8, 8));
    let frame = jpeg
        .windows(2)
        .position(|pair| pair == [0xff, 0xc0])
        .unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0x3f, 0xff, 0x3f, 0xff]);
    let error = Picture::decode(&jpeg).unwrap_err();
    assert!(
        matches!(error, ImageError::TooManyPixels { width: 16_383, .. }),
        "{error}"
    );
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xff, 0xff, 0xff]);
    assert!(matches!(
        Picture::decode(&jpeg),
        Err(ImageError::TooManyPixels { .. })
    ));

    let mut bmp = encoded(&drawing(4, 4), ImageFormat::Bmp);
    bmp[18..26].copy_from_slice(&[0x60, 0xea, 0, 0, 0x60, 0xea, 0, 0]);
    assert!(Picture::decode(&bmp).is_err());
    let mut gif = encoded(&drawing(4, 4), ImageFormat::Gif);
    gif[6..10].copy_from_slice(&[0xff, 0xff, 0xff, 0xff]);
    assert!(Picture::decode(&gif).is_err());
}

#[test]
fn cut_images_are_errors() {
    let image = drawing(160, 120);
    for format in [
        ImageFormat::Png,
        ImageFormat::Bmp,
        ImageFormat::Gif,
        ImageFormat::WebP,
    ] {
        let bytes = encoded(&image, format);
        for length in (0..bytes.len() - 1).step_by(211) {
            let error = Picture::decode(&bytes[..length]);
            // The last bytes of a file may be no pixels.
            assert!(
                error.is_err() || length + 64 > bytes.len(),
                "{format:?} cut at {length}"
            );
        }
    }
}

#[test]
fn a_cut_jpeg_is_an_error_wherever_it_is_cut() {
    let bytes = jpeg(&drawing(400, 240));
    assert!(Picture::decode(&bytes).is_ok());
    for length in (0..bytes.len() - 2).step_by(47).chain([bytes.len() - 1]) {
        let cut = &bytes[..length];
        assert!(Picture::decode(cut).is_err(), "cut at {length}");
        assert!(Picture::decode_for(cut, 16, 16).is_err(), "cut at {length}");
        // With an end mark the cut is in the data itself.
        let patched = [cut, &[0xff, 0xd9]].concat();
        let _ = Picture::decode(&patched);
        if length > 700 && length + 50 < bytes.len() {
            assert!(
                Picture::decode_for(&patched, 16, 16).is_err(),
                "cut at {length}"
            );
        }
    }
    let message = Picture::decode(&bytes[..bytes.len() / 2])
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("400×240") && message.contains("cut off"),
        "{message}"
    );
}

#[test]
fn a_small_jpeg_is_an_error_at_every_single_byte_that_it_is_cut_at() {
    let bytes = with_orientation(&jpeg(&drawing(24, 16)), 6);
    for length in 0..bytes.len() {
        let cut = &bytes[..length];
        assert!(Picture::decode(cut).is_err(), "cut at {length}");
        assert!(Picture::decode_for(cut, 2, 2).is_err(), "cut at {length}");
        assert!(bare(cut, usize::MAX).is_err(), "cut at {length}");
        let _ = Picture::decode(&[cut, &[0xff, 0xd9]].concat());
    }
}

/// A chunk of a PNG; decoders pass over those that they do not know, whatever their checksum is.
fn png_chunk(kind: &[u8; 4], content: &[u8]) -> Vec<u8> {
    let mut crc = u32::MAX;
    for byte in kind.iter().chain(content) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 };
        }
    }
    let length = u32::try_from(content.len()).unwrap().to_be_bytes();
    [&length[..], kind, content, &(!crc).to_be_bytes()].concat()
}

#[test]
fn nothing_stays_beside_the_pixels() {
    const SECRET: &[u8] = b"47.3769 N 8.5417 E";
    let holds = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).any(|part| part == what);
    let segment = |marker: u8, content: &[u8]| {
        let length = u16::try_from(content.len() + 2).unwrap().to_be_bytes();
        [&[0xff, marker], &length[..], content].concat()
    };
    let plain = jpeg(&drawing(64, 48));
    let kept = bare(&plain, usize::MAX).unwrap();
    assert_eq!(&*kept, plain, "a bare file stays as it is");
    let scan = plain.windows(2).position(|p| p == [0xff, 0xda]).unwrap();
    let (head, data) = plain.split_at(scan);
    let mut marked: Vec<Vec<u8>> = (0xe0..=0xef)
        .chain([0xfe])
        .map(|marker| [&plain[..2], &segment(marker, SECRET), &plain[2..]].concat())
        .collect();
    // With the right name and more than belongs there, late, and after the end.
    let named = [&b"JFIF\0\x01\x01\0\0\x01\0\x01\x01\x01"[..], SECRET].concat();
    marked.push([&plain[..2], &segment(0xe0, &named), &plain[2..]].concat());
    marked.push([head, &segment(0xe1, SECRET), data].concat());
    marked.push([&plain[..], SECRET].concat());
    marked.push([&plain[..], &with_app1(&plain, SECRET)].concat());
    marked.push(with_app1(&with_orientation(&plain, 6), SECRET));
    for file in &marked {
        let made = bare(file, usize::MAX).unwrap();
        assert!(!holds(&made, SECRET), "{:x?}", &file[..40]);
        for marker in 0xe1..=0xef {
            assert!(!made.windows(4).take(600).any(|p| p[..2] == [0xff, marker]));
        }
        let (seen, was) = (
            Picture::decode(&made).unwrap(),
            Picture::decode(file).unwrap(),
        );
        assert_eq!((seen.width(), seen.height()), (was.width(), was.height()));
        assert!(mean_difference(seen.rgb(), was.rgb()) < 4.0);
        assert_eq!(&*bare(&made, usize::MAX).unwrap(), &*made);
    }
    let turned = bare(&marked[marked.len() - 1], usize::MAX).unwrap();
    let turned = Picture::decode(&turned).unwrap();
    assert_eq!((turned.width(), turned.height()), (48, 64), "it is upright");

    let plain = encoded(&drawing(20, 10), ImageFormat::Png);
    assert_eq!(&*bare(&plain, usize::MAX).unwrap(), plain);
    for kind in [b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"prVt"] {
        let (head, rest) = plain.split_at(8 + 25);
        // A keyword, no compression, no language, the text.
        let content = [&b"Comment\0\0\0\0\0"[..], SECRET].concat();
        let file = [head, &png_chunk(kind, &content), rest].concat();
        let made = bare(&file, usize::MAX).unwrap();
        assert!(!holds(&made, SECRET) && !holds(&made, kind), "{kind:?}");
        assert_eq!(
            Picture::decode(&made).unwrap().rgb(),
            drawing(20, 10).as_raw()
        );
    }
    let file = [&plain[..], SECRET].concat();
    assert!(!holds(&bare(&file, usize::MAX).unwrap(), SECRET));
    // What comes out is bounded too.
    let noise = RgbImage::from_fn(200, 200, |x, y| {
        Rgb([0, 8, 16].map(|shift| ((x * 200 + y).wrapping_mul(2_654_435_761) >> shift) as u8))
    });
    let file = [&encoded(&noise, ImageFormat::Png)[..], SECRET].concat();
    assert!(bare(&file, 20_000).unwrap().len() <= 20_000);
}

#[test]
fn every_orientation_gives_the_same_upright_picture() {
    let upright = DynamicImage::ImageRgb8(drawing(320, 240));
    // What a camera stores that is held so: the opposite of what has to be done to see it upright.
    let stored = [
        (1, upright.clone()),
        (2, upright.fliph()),
        (3, upright.rotate180()),
        (4, upright.flipv()),
        (5, upright.rotate90().fliph()),
        (6, upright.rotate270()),
        (7, upright.rotate270().fliph()),
        (8, upright.rotate90()),
    ];
    for (orientation, image) in stored {
        let bytes = with_orientation(&jpeg(&image.to_rgb8()), orientation);
        let picture = Picture::decode(&bytes).unwrap();
        assert_eq!(
            (picture.width(), picture.height()),
            (320, 240),
            "{orientation}"
        );
        let off = mean_difference(picture.rgb(), upright.as_bytes());
        assert!(off < 6.0, "{orientation}: {off}");
        let small = Picture::decode_for(&bytes, 40, 30).unwrap();
        assert_eq!((small.width(), small.height()), (80, 60), "{orientation}");
        let expected = upright.resize_exact(80, 60, image::imageops::FilterType::Triangle);
        let off = mean_difference(small.rgb(), expected.as_bytes());
        assert!(off < 8.0, "{orientation}: {off}");
    }
}

#[test]
fn a_broken_exif_block_is_ignored() {
    let plain = jpeg(&drawing(32, 16));
    let expected = Picture::decode(&plain).unwrap();
    for content in [
        &b"Exif\0\0"[..],
        b"Exif\0\0MM\0\x2a\xff\xff\xff\xff",
        b"Exif\0\0II\x2a\0\x08\0\0\0\xff\xff\x12\x01",
    ] {
        assert_eq!(
            Picture::decode(&with_app1(&plain, content)).unwrap(),
            expected
        );
    }
    let expected = Picture::decode_for(&plain, 4, 4).unwrap();
    let broken = with_app1(&plain, b"Exif\0\0MM\0\x2a\xff\xff\xff\xff");
    assert_eq!(Picture::decode_for(&broken, 4, 4).unwrap(), expected);
}

#[test]
fn averaged_pixels_are_the_averages_of_all_pixels() {
    for (width, height, wanted, size) in [
        (640, 480, (32, 32), (80, 120)),
        (640, 480, (100, 8), (320, 60)),
        (648, 486, (100, 100), (324, 243)),
        (641, 480, (20, 20), (641, 60)),
    ] {
        let bytes = jpeg(&drawing(width, height));
        let full = Picture::decode(&bytes).unwrap();
        let small = Picture::decode_for(&bytes, wanted.0, wanted.1).unwrap();
        assert_eq!((small.width(), small.height()), size);
        let (x, y) = (width / size.0, height / size.1);
        let full = RgbImage::from_raw(width, height, full.into_rgb()).unwrap();
        let averages = RgbImage::from_fn(size.0, size.1, |column, row| {
            let mut sums = [0u32; 3];
            for dy in 0..y {
                for dx in 0..x {
                    let pixel = full.get_pixel(column * x + dx, row * y + dy);
                    (0..3).for_each(|c| sums[c] += u32::from(pixel.0[c]));
                }
            }
            Rgb(sums.map(|sum| ((sum + x * y / 2) / (x * y)) as u8))
        });
        let off = mean_difference(small.rgb(), averages.as_raw());
        assert!(off < 1.2, "{size:?}: {off}");
    }
}

/// An engine with this input section (and the tiny model, which does not mind).
fn engine(replacements: &[(&str, &str)]) -> Engine {
    let mut text = MANIFEST.to_owned();
    for (from, to) in replacements {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    let (_dir, bundle) = bundle_of(&text, &model().encode_to_vec());
    Engine::load(&bundle.unwrap()).unwrap()
}

fn solid(width: u32, height: u32, color: [u8; 3]) -> Picture {
    Picture::from_rgb(width, height, color.repeat((width * height) as usize)).unwrap()
}

#[test]
fn channels_are_ordered_and_normalised() {
    let scale = [
        ("mean = [0.0, 0.0, 0.0]", "mean = [0.5, 0.25, 0.0]"),
        ("std = [1.0, 1.0, 1.0]", "std = [0.5, 1.0, 2.0]"),
    ];
    let picture = solid(5, 7, [255, 51, 102]);
    let planes = |engine: &Engine| {
        let input = engine.tensor(&picture).unwrap();
        let plane = input.values().len() / 3;
        input
            .values()
            .chunks(plane)
            .map(|plane| plane[0])
            .collect::<Vec<_>>()
    };
    let close = |found: Vec<f32>, expected: [f32; 3]| {
        assert!(
            found
                .iter()
                .zip(expected)
                .all(|(a, b)| (a - b).abs() < 1e-6),
            "{found:?}"
        );
    };
    close(planes(&engine(&scale)), [1.0, -0.05, 0.2]);
    let bgr = [scale[0], scale[1], ("color = \"rgb\"", "color = \"bgr\"")];
    close(planes(&engine(&bgr)), [-0.2, -0.05, 0.5]);
}

#[test]
fn letterbox_pads_and_cover_crops() {
    // Left half red, right half blue, twice as wide as high.
    let mut image = RgbImage::from_pixel(64, 32, Rgb([255, 0, 0]));
    for (x, _, pixel) in image.enumerate_pixels_mut() {
        if x >= 32 {
            *pixel = Rgb([0, 0, 255]);
        }
    }
    let picture = Picture::from_rgb(64, 32, image.into_raw()).unwrap();
    let at =
        |values: &[f32], channel: usize, x: usize, y: usize| values[channel * 256 + y * 16 + x];

    let input = engine(&[("resize = \"stretch\"", "resize = \"letterbox\"")])
        .tensor(&picture)
        .unwrap();
    let values = input.values();
    let pad = 114.0 / 255.0;
    for (x, y) in [(0, 0), (15, 3), (0, 12), (15, 15)] {
        assert_eq!(at(values, 1, x, y), pad, "{x},{y}");
    }
    assert_eq!((at(values, 0, 0, 4), at(values, 2, 0, 4)), (1.0, 0.0));
    assert_eq!((at(values, 0, 15, 11), at(values, 2, 15, 11)), (0.0, 1.0));

    let input = engine(&[("resize = \"stretch\"", "resize = \"cover\"")])
        .tensor(&picture)
        .unwrap();
    let values = input.values();
    assert_eq!((at(values, 0, 0, 0), at(values, 0, 6, 15)), (1.0, 1.0));
    assert_eq!((at(values, 2, 9, 0), at(values, 2, 15, 15)), (1.0, 1.0));

    // Extreme proportions still give a pixel.
    let thin = solid(3000, 1, [9, 9, 9]);
    for resize in ["letterbox", "cover", "stretch"] {
        let engine = engine(&[("resize = \"stretch\"", &format!("resize = \"{resize}\""))]);
        assert_eq!(engine.tensor(&thin).unwrap().values().len(), 3 * 256);
    }
}

#[test]
fn a_large_jpeg_gives_the_same_tensor_by_either_way() {
    let bytes = jpeg(&drawing(1280, 720));
    for resize in ["stretch", "cover", "letterbox"] {
        let engine = engine(&[("resize = \"stretch\"", &format!("resize = \"{resize}\""))]);
        let full = engine.tensor(&Picture::decode(&bytes).unwrap()).unwrap();
        let quick = engine.tensor_from_bytes(&bytes).unwrap();
        let off = full
            .values()
            .iter()
            .zip(quick.values())
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(off < 0.0125, "{resize}: {off}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_constant_picture_stays_constant(
        color: [u8; 3], width in 1u32..200, height in 1u32..200,
        filter in prop::sample::select(vec!["bilinear", "catmull-rom", "lanczos3", "nearest"]),
        resize in prop::sample::select(vec!["stretch", "cover"]),
    ) {
        let engine = engine(&[
            ("filter = \"bilinear\"", &format!("filter = \"{filter}\"")),
            ("resize = \"stretch\"", &format!("resize = \"{resize}\"")),
        ]);
        let input = engine.tensor(&solid(width, height, color)).unwrap();
        for (plane, byte) in input.values().chunks(256).zip(color) {
            // Weights in fixed point may round to the neighbour.
            prop_assert!(plane.iter().all(|v| (v - f32::from(byte) / 255.0).abs() < 1.1 / 255.0));
        }
    }

    #[test]
    fn damaged_jpegs_never_panic(seed in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = jpeg(&drawing(96, 64));
        for (at, byte) in seed {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = Picture::decode(&bytes);
        let _ = Picture::decode_for(&bytes, 8, 8);
    }
}

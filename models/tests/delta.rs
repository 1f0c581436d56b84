//! A delta makes exactly the new file, or says why not.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod files;

use files::{Tensor, onnx, raw, tuned, weights};
use models::{
    delta::{self, DeltaError, Wanted, make},
    digest_of,
};
use proptest::{collection::vec, prelude::*};
use std::io::{BufRead, Cursor};

fn wanted(file: &[u8]) -> Wanted {
    Wanted {
        length: file.len() as u64,
        sha256: digest_of(file),
    }
}

fn apply(old: &[u8], delta: impl BufRead, wanted: &Wanted) -> Result<Vec<u8>, DeltaError> {
    let mut new = Vec::new();
    delta::apply(&mut Cursor::new(old), delta, wanted, &mut new).map(|()| new)
}

/// Makes a delta, applies it, and says how long it was.
fn travel(old: &[u8], new: &[u8]) -> usize {
    let delta = make(old, new).unwrap();
    assert!(apply(old, &delta[..], &wanted(new)).unwrap() == new);
    delta.len()
}

fn model(producer: &str, layers: &[Vec<f32>]) -> Vec<u8> {
    let tensor = |(at, layer): (usize, &Vec<f32>)| (format!("layer{at}"), 1, raw(layer));
    onnx(
        producer,
        &layers.iter().enumerate().map(tensor).collect::<Vec<_>>(),
    )
}

#[test]
fn a_new_head_takes_4_percent_and_a_fine_tune_half() {
    let layers: Vec<Vec<f32>> = (1..12).map(|n| weights(n, 2000 * n as usize)).collect();
    let old = model("trainer 1", &layers);

    let mut head = layers.clone();
    head[1] = weights(99, 4000);
    let new = model("trainer 1.0.1, which is longer", &head);
    let share = travel(&old, &new) as f64 / new.len() as f64;
    assert!(share < 0.04, "head {share}");

    head[1] = weights(99, 4100);
    let share = travel(&old, &model("trainer", &head)) as f64 / new.len() as f64;
    assert!(share < 0.04, "head of another shape {share}");

    let full: Vec<Vec<f32>> = layers.iter().map(|layer| tuned(layer, 7)).collect();
    let share = travel(&old, &model("trainer 1", &full)) as f64 / old.len() as f64;
    assert!(share < 0.5, "full {share}");

    assert!(travel(&old, &old) < 600);
    // Nothing in common, and not ONNX: no more than the file.
    let other = raw(&weights(5, 10_000));
    assert!(travel(&old, &other) < other.len() + 200);
    // What merely moved is found without names.
    let renamed = onnx("x", &[("other".into(), 1, raw(&layers[9]))]);
    assert!(travel(&old, &renamed) < 400);
    // Larger than a block, with a rest.
    let large = [weights(3, 300_001)];
    let moved = [tuned(&large[0], 8)];
    travel(&model("", &large), &model("", &moved));
    travel(b"", b"");
}

/// A small pair of files with everything in them: three kinds, literals before, between and after.
fn pair() -> (Vec<u8>, Vec<u8>) {
    let file = |add: u8| {
        let half: Vec<u8> = (0..80).map(|n| n * 3 + add * (n & 1)).collect();
        let byte: Vec<u8> = (0..40).map(|n| n ^ add).collect();
        let tensors: Vec<Tensor> = vec![
            ("a".into(), 1, raw(&tuned(&weights(1, 30), add.into()))),
            ("b".into(), 10, half),
            ("only here".into(), 7, vec![add; 8]),
            ("c".into(), 3, byte),
        ];
        onnx(&format!("made by {add}"), &tensors)
    };
    (file(1), file(2))
}

/// What [`make`] once made of [`pair`], three spans: a device in the field reads this for ever.
const GOLDEN: &str = concat!(
    "4c5744454c544102f4025d8dcd2d33403632aca7d2d39239e11a5f712a7bb3f9182faec21ca3b847913cf1c45953",
    "ea9fc41f3558d4a7739ead99975d0fd89fefc057078ff6f658fe3b0100000e000000540000002020780409a10150",
    "02229302280128b52ffd204b590200080812096d61646520627920323aab02120567726170682a7f10014201614a",
    "782a57100a4201624a502a17100742096f6e6c7920686572654a0802020202020202022a2f10034201634a2828b5",
    "2ffd0030bd020064040de53ca16bbcdf5df8a00e2f31cf417133dfc87575edb561c7364c85e151000b207d300fb5",
    "3b2d5953480e09017694280c495d9280e0ad330497234b000100ff0201020605010620c00f91e41dcd78e2126e8e",
    "4101",
);

#[test]
fn a_delta_of_this_version_is_read() {
    let (old, new) = pair();
    let digits = GOLDEN.as_bytes().as_chunks::<2>().0;
    let byte = |digits: &[u8; 2]| u8::from_str_radix(str::from_utf8(digits).unwrap(), 16).unwrap();
    let golden: Vec<u8> = digits.iter().map(byte).collect();
    assert_eq!(apply(&old, &golden[..], &wanted(&new)).unwrap(), new);
    // All before the literals' length does not depend on the version of zstd.
    assert_eq!(make(&old, &new).unwrap()[..80], golden[..80]);
}

#[test]
fn the_wrong_files_are_named() {
    let (old, new) = pair();
    let delta = make(&old, &new).unwrap();
    let error = apply(&new, &delta[..], &wanted(&new)).unwrap_err();
    assert!(matches!(error, DeltaError::OtherOld { found, .. } if found == digest_of(&new)));
    let error = apply(&old, &delta[..], &wanted(&old)).unwrap_err();
    assert!(matches!(error, DeltaError::OtherNew { makes, .. } if makes == digest_of(&new)));
    for junk in [&b""[..], b"LWDELTA\x01", &[0; 200]] {
        apply(&old, junk, &wanted(&new)).unwrap_err();
    }
    // A length beyond all bounds is refused before anything is allocated.
    let mut huge = delta.clone();
    huge[72..76].fill(0xff);
    let bad = Wanted {
        length: u32::MAX.into(),
        ..wanted(&new)
    };
    let error = apply(&old, &huge[..], &bad).unwrap_err();
    assert!(matches!(error, DeltaError::TooLarge { .. }), "{error}");
}

#[test]
fn every_flip_cut_and_surplus_is_noticed() {
    let (old, new) = pair();
    let delta = make(&old, &new).unwrap();
    let apply = |delta: &[u8]| apply(&old, delta, &wanted(&new));
    for at in 0..delta.len() {
        apply(&delta[..at]).unwrap_err();
        for mask in [1, 2, 4, 8, 16, 32, 64, 128, 255] {
            let mut flipped = delta.clone();
            flipped[at] ^= mask;
            // zstd has bits without a meaning: those may change.
            if let Ok(made) = apply(&flipped) {
                assert!(made == new, "byte {at} with {mask}");
            }
        }
        let more = [&delta[..at], &[0], &delta[at..]].concat();
        assert!(apply(&more).is_err(), "a byte more at {at}");
    }
    let error = apply(&[&delta[..], &[0]].concat()).unwrap_err();
    assert!(matches!(error, DeltaError::Damaged(_)), "{error}");
}

fn tensors() -> impl Strategy<Value = Vec<Tensor>> {
    let kind = prop_oneof![Just(1u8), Just(10), Just(16), Just(2), Just(3), Just(7)];
    vec(("[a-e]", kind, vec(any::<u8>(), 0..300)), 0..8)
}

proptest! {
    #[test]
    fn any_two_files_travel(old in vec(any::<u8>(), 0..2000), new in vec(any::<u8>(), 0..2000)) {
        travel(&old, &new);
    }

    #[test]
    fn any_two_models_travel(
        old in tensors(),
        new in tensors(),
        moved in vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
    ) {
        travel(&onnx("old", &old), &onnx("new", &new));
        // The same tensors, some of their bytes others: every bit pattern, not numbers only.
        let mut changed = old.clone();
        for (at, byte) in moved {
            for (_, _, raw) in &mut changed {
                if !raw.is_empty() {
                    *at.get_mut(raw) = byte;
                }
            }
        }
        travel(&onnx("old", &old), &onnx("new", &changed));
    }

    #[test]
    fn no_delta_makes_another_file(
        at in any::<prop::sample::Index>(),
        cut in 0..40usize,
        junk in vec(any::<u8>(), 0..40),
    ) {
        let (old, new) = pair();
        let mut delta = make(&old, &new).unwrap();
        let at = 72 + at.index(delta.len() - 72);
        let end = (at + cut).min(delta.len());
        delta.splice(at..end, junk);
        if let Ok(made) = apply(&old, &delta[..], &wanted(&new)) {
            prop_assert!(made == new);
        }
    }
}

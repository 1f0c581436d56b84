//! Somebody's own ONNX file becomes a bundle, or a clear sentence says why not.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use image::{Rgb, RgbImage};
use models::{Activation, Bundle, Layout, Resize};

const PROGRAM: &str = env!("CARGO_BIN_EXE_cloud-coordinator");

/// The bytes of an ONNX file, by the numbers of onnx.proto.
mod onnx {
    fn varint(mut value: u64, to: &mut Vec<u8>) {
        while value >= 0x80 {
            to.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        to.push(value as u8);
    }

    fn int(field: u64, value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        varint(field << 3, &mut bytes);
        varint(value, &mut bytes);
        bytes
    }

    fn part(field: u64, inner: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        varint(field << 3 | 2, &mut bytes);
        varint(inner.len() as u64, &mut bytes);
        bytes.extend(inner);
        bytes
    }

    /// A value of 32-bit floats; a size of 0 is left open.
    fn value(name: &str, sizes: &[u64]) -> Vec<u8> {
        let size = |&size: &u64| {
            let size = if size == 0 {
                part(2, b"open")
            } else {
                int(1, size)
            };
            part(1, &size)
        };
        let shape: Vec<u8> = sizes.iter().flat_map(size).collect();
        let tensor = [int(1, 1), part(2, &shape)].concat();
        [part(1, name.as_bytes()), part(2, &part(1, &tensor))].concat()
    }

    fn node(op: &str, from: &str, to: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = [
            part(1, from.as_bytes()),
            part(2, to.as_bytes()),
            part(4, op.as_bytes()),
        ]
        .concat();
        bytes.extend(attributes.iter().flat_map(|attribute| part(5, attribute)));
        bytes
    }

    /// The mean over some axes of a picture, and its softmax if that is wanted.
    pub(super) fn mean(input: &[u64], axes: &[u64], output: &[u64], softmax: bool) -> Vec<u8> {
        let ints: Vec<u8> = axes.iter().flat_map(|&axis| int(8, axis)).collect();
        let axes = [part(1, b"axes"), ints, int(20, 7)].concat();
        let flat = [part(1, b"keepdims"), int(3, 0), int(20, 2)].concat();
        let middle = if softmax { "middle" } else { "scores" };
        let mut graph = part(1, &node("ReduceMean", "picture", middle, &[axes, flat]));
        if softmax {
            graph.extend(part(1, &node("Softmax", middle, "scores", &[])));
        }
        graph.extend(part(2, b"mean"));
        graph.extend(part(11, &value("picture", input)));
        graph.extend(part(12, &value("scores", output)));
        [int(1, 8), part(7, &graph), part(8, &int(2, 13))].concat()
    }
}

/// A folder with a model, its labels, and a picture of each of them.
struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new(model: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("own.onnx"), model).unwrap();
        std::fs::write(dir.path().join("labels.txt"), "red\ngreen\nblue\n").unwrap();
        for (at, name) in ["red", "green", "blue"].iter().enumerate() {
            let mut color = [0; 3];
            color[at] = 255;
            let folder = dir.path().join("samples").join(name);
            std::fs::create_dir_all(&folder).unwrap();
            RgbImage::from_pixel(40, 30, Rgb(color))
                .save(folder.join("1.png"))
                .unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `model import` with the labels and samples of this case and with `more`.
    fn import(&self, like: &str, more: &[&str]) -> Output {
        let labels = self.path("labels.txt");
        self.bare(
            like,
            &[
                ["--labels", labels.to_str().unwrap()].as_slice(),
                &["--images", self.path("samples").to_str().unwrap()],
                more,
            ]
            .concat(),
        )
    }

    fn bare(&self, like: &str, more: &[&str]) -> Output {
        Command::new(PROGRAM)
            .args(["model", "import"])
            .arg(self.path("own.onnx"))
            .args(["--name", "own", "--version", "2.0.0", "--like", like])
            .arg("--out")
            .arg(self.path("out"))
            .args(more)
            .output()
            .unwrap()
    }

    /// What is said when it does not work, after which nothing must be left.
    fn refused(&self, output: &Output) -> String {
        assert!(!output.status.success(), "{}", said(&output.stdout));
        let left: Vec<String> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !["own.onnx", "labels.txt", "samples"].contains(&name.as_str()))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        said(&output.stderr)
    }

    /// The bundle that came out, which stands the trial of a device.
    fn bundle(&self, output: &Output) -> (Bundle, String) {
        assert!(output.status.success(), "{}", said(&output.stderr));
        let text = said(&output.stdout);
        let out = self.path("out");
        assert!(text.contains("own@2.0.0 is in "), "{text}");
        let next = format!("next: cloud-coordinator model push {}", out.display());
        assert!(text.contains(&next), "{text}");
        let trial = models::try_bundle(&[PROGRAM.into()], &out, Duration::from_secs(60)).unwrap();
        assert_eq!(trial.fault, None, "{}", trial.detail);
        let card = std::fs::read_to_string(out.join("CARD.md")).unwrap();
        let bundle = Bundle::open(&out).unwrap();
        for part in [
            "Recorded, not verified",
            "own.onnx",
            &bundle.manifest.model.sha256,
        ] {
            assert!(card.contains(part), "{part} in {card}");
        }
        // Only what belongs to a bundle, as the coordinator will want it.
        models::ReleaseDocument::of(&out, "own", "2.0.0", None).unwrap();
        (bundle, text)
    }
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../models/bundles/{name}"))
}

#[test]
fn torchvision_leaves_its_sizes_open_and_gives_logits() {
    let case = Case::new(&onnx::mean(&[0, 3, 0, 0], &[2, 3], &[0, 3], false));
    let (bundle, text) = case.bundle(&case.import("torchvision", &[]));
    let (input, output) = (&bundle.manifest.input, &bundle.manifest.output);
    assert_eq!(
        (input.name.as_str(), input.shape),
        ("picture", [1, 3, 224, 224])
    );
    assert_eq!((input.layout, input.resize), (Layout::Nchw, Resize::Cover));
    assert_eq!(input.mean, [0.485, 0.456, 0.406]);
    assert_eq!(output.activation, Activation::Softmax);
    assert_eq!(output.labels, ["red", "green", "blue"]);
    let mut labels: Vec<_> = bundle
        .manifest
        .golden
        .iter()
        .map(|g| g.label.clone().unwrap())
        .collect();
    labels.sort();
    assert_eq!(labels, ["blue", "green", "red"]);
    for part in ["red 0.97", "3 of 3 pictures lie in", "--size", "softmax"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_size_is_taken_where_the_file_leaves_it_open() {
    let case = Case::new(&onnx::mean(&[0, 3, 0, 0], &[2, 3], &[0, 3], false));
    let more = [
        "--size",
        "64",
        "--scale",
        "0..1",
        "--resize",
        "stretch",
        "--activation",
        "softmax",
    ];
    let (bundle, _) = case.bundle(&case.import("torchvision", &more));
    let input = &bundle.manifest.input;
    assert_eq!(
        (input.shape, input.resize),
        ([1, 3, 64, 64], Resize::Stretch)
    );
    assert_eq!((input.mean[0], input.std[0]), (0.0, 1.0));
}

#[test]
fn ultralytics_gives_probabilities() {
    let case = Case::new(&onnx::mean(&[1, 3, 32, 32], &[2, 3], &[1, 3], true));
    let (bundle, text) = case.bundle(&case.import("ultralytics", &[]));
    let (input, output) = (&bundle.manifest.input, &bundle.manifest.output);
    assert_eq!((input.shape, input.resize), ([1, 3, 32, 32], Resize::Cover));
    assert_eq!((input.mean[0], input.std[0]), (0.0, 1.0));
    assert_eq!(output.activation, Activation::None);
    assert!(
        text.contains("red 0.58") && text.contains("already"),
        "{text}"
    );
}

#[test]
fn keras_lays_out_rows_of_pixels() {
    let model = onnx::mean(&[0, 32, 32, 3], &[1, 2], &[0, 3], true);
    let case = Case::new(&model);
    let (bundle, text) = case.bundle(&case.import("keras", &[]));
    let input = &bundle.manifest.input;
    assert_eq!((input.layout, input.shape), (Layout::Nhwc, [1, 32, 32, 3]));
    assert_eq!((input.mean[0], input.std[0]), (0.5, 0.5));
    assert_eq!(bundle.manifest.output.activation, Activation::None);
    assert!(text.contains("red 0.79"), "{text}");
    let case = Case::new(&model);
    let (_, text) = case.bundle(&case.import("keras", &["--scale", "-1..1"]));
    assert!(text.contains("red 0.79"), "{text}");
    let case = Case::new(&model);
    let (_, text) = case.bundle(&case.import("keras", &["--scale", "0..255"]));
    assert!(text.contains("red 1.00"), "{text}");
}

#[test]
fn a_model_with_an_embedding_and_somebody_elses_pictures() {
    let case = Case::new(&std::fs::read(shipped("conveyor").join("model.onnx")).unwrap());
    let golden = shipped("conveyor").join("golden");
    let output = case.bare(
        "ultralytics",
        &[
            "--labels",
            "ok,scratch,hole,stain,chip,empty",
            "--images",
            golden.to_str().unwrap(),
            "--embedding",
            "embedding",
            "--min-score",
            "0.5",
            "--latency-ms",
            "5000",
            "--memory-mib",
            "300",
        ],
    );
    let (bundle, _) = case.bundle(&output);
    let manifest = &bundle.manifest;
    assert_eq!(manifest.output.scores.as_deref(), Some("logits"));
    assert_eq!(manifest.output.embedding_dim, 352);
    assert_eq!(manifest.output.activation, Activation::Softmax);
    assert_eq!(manifest.golden.len(), 6);
    assert_eq!(manifest.thresholds.min_score, Some(0.5));
    assert_eq!(
        (manifest.budget.latency_ms, manifest.budget.memory_mib),
        (5000.0, 300)
    );
}

#[test]
fn large_pictures_shrink_and_what_is_none_is_named() {
    let case = Case::new(&onnx::mean(&[1, 3, 32, 32], &[2, 3], &[1, 3], true));
    let noise = RgbImage::from_fn(1000, 1000, |x, y| {
        let mut hash = x.wrapping_mul(0x9e37_79b1) ^ y.wrapping_mul(0x85eb_ca77);
        hash = (hash ^ (hash >> 15)).wrapping_mul(0x2c1b_3c6d);
        let low = |shift: u32| (hash >> shift) as u8 & 15;
        Rgb([230 + low(8), low(16), low(24)])
    });
    let large = case.path("samples/red/0.png");
    noise.save(&large).unwrap();
    assert!(large.metadata().unwrap().len() > 512 * 1024);
    std::fs::write(case.path("samples/red/2.jpg"), "no picture").unwrap();
    let (bundle, text) = case.bundle(&case.import("ultralytics", &[]));
    assert!(text.contains("red/2.jpg: not an image"), "{text}");
    assert!(text.contains("4 of 4 pictures lie in"), "{text}");
    let golden: Vec<&str> = bundle
        .manifest
        .golden
        .iter()
        .map(|g| g.image.as_str())
        .collect();
    assert_eq!(golden.len(), 4);
    assert!(
        golden.iter().any(|image| image.ends_with(".jpg")),
        "{golden:?}"
    );
}

#[test]
fn both_numbers_of_labels_are_named() {
    let case = Case::new(&onnx::mean(&[1, 3, 32, 32], &[2, 3], &[1, 3], true));
    std::fs::write(case.path("labels.txt"), "red\ngreen\n").unwrap();
    let text = case.refused(&case.import("ultralytics", &[]));
    assert!(
        text.contains("2 labels are given, the model gives 3 scores (\"scores\")"),
        "{text}"
    );
}

#[test]
fn what_is_no_onnx_is_refused_with_the_way_to_one() {
    for bytes in [b"hello, this is no model".as_slice(), b""] {
        let case = Case::new(bytes);
        let text = case.refused(&case.import("torchvision", &[]));
        assert!(
            text.contains("not a usable ONNX file") && text.contains("torch.onnx.export"),
            "{text}"
        );
    }
    let case = Case::new(b"");
    std::fs::remove_file(case.path("own.onnx")).unwrap();
    let text = case.refused(&case.import("torchvision", &[]));
    assert!(
        text.contains("cannot read") && text.contains("own.onnx"),
        "{text}"
    );
}

#[test]
fn nothing_is_overwritten() {
    let case = Case::new(&onnx::mean(&[1, 3, 32, 32], &[2, 3], &[1, 3], true));
    std::fs::create_dir(case.path("out")).unwrap();
    let output = case.import("ultralytics", &[]);
    assert!(!output.status.success());
    let text = said(&output.stderr);
    assert!(text.contains("exists already"), "{text}");
    assert_eq!(std::fs::read_dir(case.path("out")).unwrap().count(), 0);
}

#[test]
fn pictures_are_needed() {
    let case = Case::new(&onnx::mean(&[1, 3, 32, 32], &[2, 3], &[1, 3], true));
    let text = case.refused(&case.bare("ultralytics", &["--labels", "red,green,blue"]));
    assert!(text.contains("--images DIR"), "{text}");
    std::fs::remove_dir_all(case.path("samples")).unwrap();
    std::fs::create_dir(case.path("samples")).unwrap();
    let text = case.refused(&case.import("ultralytics", &[]));
    assert!(text.contains("no picture"), "{text}");
}

#[test]
fn detection_is_refused_in_a_sentence() {
    // What the file declares, and what only the graph tells.
    for declared in [[1, 32, 32].as_slice(), &[0, 0, 0], &[]] {
        let case = Case::new(&onnx::mean(&[1, 3, 32, 32], &[1], declared, false));
        let text = case.refused(&case.import("ultralytics", &[]));
        assert!(
            text.contains("detection") && text.contains("yolo11n-cls"),
            "{text}"
        );
    }
}

#[test]
fn inputs_that_are_no_picture_are_refused() {
    let refused = |input: &[u64], more: &[&str]| {
        let case = Case::new(&onnx::mean(input, &[2, 3], &[0, 3], false));
        case.refused(&case.import("torchvision", more))
    };
    let text = refused(&[4, 3, 32, 32], &[]);
    assert!(text.contains("4 pictures at once"), "{text}");
    let text = refused(&[1, 3, 32, 32], &["--size", "64"]);
    assert!(text.contains("32 pixels, --size says 64"), "{text}");
    let text = refused(&[1, 12, 32, 32], &[]);
    assert!(text.contains("12 channels"), "{text}");
    let text = refused(&[1, 1, 32, 32], &[]);
    assert!(
        text.contains("one channel") && text.contains("--scale"),
        "{text}"
    );
}

#[test]
fn a_guess_that_would_spoil_scores_is_not_made() {
    // Means of 0..1 look like probabilities, but do not add up.
    let case = Case::new(&onnx::mean(&[1, 3, 32, 32], &[2, 3], &[1, 3], false));
    RgbImage::from_pixel(40, 30, Rgb([255, 255, 0]))
        .save(case.path("samples/red/2.png"))
        .unwrap();
    let text = case.refused(&case.import("ultralytics", &[]));
    assert!(text.contains("--activation"), "{text}");
}

#[test]
fn the_help_teaches_by_an_example() {
    let output = Command::new(PROGRAM)
        .args(["model", "import", "--help"])
        .output()
        .unwrap();
    let text = said(&output.stdout);
    for part in [
        "Example: cloud-coordinator model import",
        "torchvision",
        "-1..1",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

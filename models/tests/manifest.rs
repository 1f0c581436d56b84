//! Manifests and bundles: what is wrong is said all at once, and nothing leads out of the folder.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may fail"
)]

mod common;

use common::{MANIFEST, bundle_of, manifest_for, model, write};
use models::{Bundle, BundleError, Manifest};
use prost::Message;

fn good() -> String {
    manifest_for(MANIFEST, b"x")
}

/// Fields that are reported for the manifest after a replacement.
fn fields(from: &str, to: &str) -> Vec<String> {
    let text = good();
    assert!(text.contains(from), "{from}");
    let errors = Manifest::parse(&text.replace(from, to)).unwrap_err();
    errors.0.into_iter().map(|error| error.field).collect()
}

#[test]
fn a_good_manifest_is_understood() {
    let manifest = Manifest::parse(&good()).unwrap();
    assert_eq!(manifest.id(), "colour@1.0.0");
    assert_eq!(manifest.input.pad, 114);
    assert_eq!(manifest.golden[0].tolerance, 0.01);
    assert_eq!(manifest.lineage.scores["accuracy"], 1.0);
}

#[test]
fn a_written_manifest_reads_back() {
    let manifest = Manifest::parse(&good()).unwrap();
    let text = toml::to_string(&manifest).unwrap();
    assert_eq!(Manifest::parse(&text).unwrap(), manifest);
}

#[test]
fn each_field_is_checked() {
    let cases = [
        ("schema = 1", "schema = 2", "schema"),
        ("name = \"colour\"", "name = \"Colour\"", "name"),
        ("name = \"colour\"", "", "name"),
        ("version = \"1.0.0\"", "version = \"a b\"", "version"),
        ("task = \"classify\"", "task = \"guess\"", "task"),
        (
            "file = \"model.onnx\"",
            "file = \"../model.onnx\"",
            "model.file",
        ),
        (
            "file = \"model.onnx\"",
            "file = \"/etc/passwd\"",
            "model.file",
        ),
        ("bytes = 1", "bytes = 268435457", "model.bytes"),
        ("bytes = 1", "bytes = -1", "model.bytes"),
        ("sha256 = \"", "sha256 = \"z", "model.sha256"),
        (
            "shape = [1, 3, 16, 16]",
            "shape = [2, 3, 16, 16]",
            "input.shape",
        ),
        (
            "shape = [1, 3, 16, 16]",
            "shape = [1, 3, 16]",
            "input.shape",
        ),
        (
            "shape = [1, 3, 16, 16]",
            "shape = [1, 3, 16, 5000]",
            "input.shape",
        ),
        (
            "shape = [1, 3, 16, 16]",
            "shape = [1, 3, -16, 16]",
            "input.shape[2]",
        ),
        ("layout = \"nchw\"", "layout = \"nhwc\"", "input.shape"),
        ("color = \"rgb\"", "color = \"cmyk\"", "input.color"),
        (
            "std = [1.0, 1.0, 1.0]",
            "std = [1.0, 0.0, 1.0]",
            "input.std[1]",
        ),
        (
            "std = [1.0, 1.0, 1.0]",
            "std = [1.0, nan, 1.0]",
            "input.std[1]",
        ),
        (
            "mean = [0.0, 0.0, 0.0]",
            "mean = [inf, 0.0, 0.0]",
            "input.mean[0]",
        ),
        ("mean = [0.0, 0.0, 0.0]", "mean = [0.0]", "input.mean"),
        (
            "filter = \"bilinear\"",
            "filter = \"bilinear\"\npad = 256",
            "input.pad",
        ),
        ("scores = \"logits\"", "", "output.scores"),
        ("embedding_dim = 3", "", "output.embedding_dim"),
        ("\"red\", \"green\"", "\"red\", \"red\"", "output.labels[1]"),
        ("\"red\", \"green\"", "\"red\", \"\"", "output.labels[1]"),
        ("min_score = 0.5", "min_score = 1.5", "thresholds.min_score"),
        ("latency_ms = 10000", "latency_ms = 0", "budget.latency_ms"),
        ("latency_ms = 10000", "latency = 10000", "budget.latency_ms"),
        (
            "memory_mib = 1024",
            "memory_mib = \"much\"",
            "budget.memory_mib",
        ),
        (
            "image = \"golden/1.png\"",
            "image = \"golden/../1.png\"",
            "golden[0].image",
        ),
        ("label = \"red\"", "label = \"pink\"", "golden[0].label"),
        (
            "scores = [0.96",
            "tolerance = -1\nscores = [0.96",
            "golden[0].tolerance",
        ),
        (
            "embedding = [1.0, 0.0, 0.0]",
            "embedding = [1.0, 0.0, 0.0, 0.0]",
            "golden[0].embedding",
        ),
        (
            "holdout = \"holdout.txt\"",
            "holdout = \"..\"",
            "lineage.holdout",
        ),
        (
            "accuracy = 1.0",
            "accuracy = \"good\"",
            "lineage.scores.accuracy",
        ),
        ("seed = 1", "seeds = 1", "lineage.seeds"),
        ("[thresholds]", "[threshold]", "threshold"),
    ];
    for (from, to, field) in cases {
        let found = fields(from, to);
        assert!(
            found.iter().any(|f| f == field),
            "{to}: {found:?}, not {field}"
        );
    }
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let text = good()
        .replace("schema = 1", "schema = 7")
        .replace("std = [1.0, 1.0, 1.0]", "std = [1.0, -1.0, nan]")
        .replace("[budget]", "[budgets]")
        .replace("name = \"image\"", "name = 5\nnames = 6");
    let errors = Manifest::parse(&text).unwrap_err();
    let text = errors.to_string();
    for part in [
        "schema: must be 1",
        "input.std[2]: must be a finite number",
        "input.name: must be text, not an integer",
        "input.names: is not a known key",
        "budget: is missing",
        "budgets: is not a known key",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(errors.0.len(), 6, "{text}");
}

#[test]
fn no_golden_case_is_a_mistake() {
    let text = good();
    let start = text.find("[[golden]]").unwrap();
    let end = text.find("[lineage]").unwrap();
    let without = format!("{}{}", &text[..start], &text[end..]);
    let errors = Manifest::parse(&without).unwrap_err();
    assert_eq!(errors.0[0].field, "golden");
}

#[test]
fn what_is_not_toml_names_the_line() {
    let errors = Manifest::parse("schema = 1\nname = \n").unwrap_err();
    assert_eq!(errors.0[0].field, "manifest");
    assert!(errors.to_string().contains("line 2"), "{errors}");
}

#[test]
fn other_tasks_are_understood() {
    let text = good().replace("task = \"classify\"", "task = \"detect\"");
    assert!(Manifest::parse(&text).is_ok());
}

#[test]
fn a_bundle_opens_and_knows_its_holdout() {
    let (_dir, bundle) = bundle_of(MANIFEST, &model().encode_to_vec());
    let bundle = bundle.unwrap();
    assert_eq!(bundle.id(), "colour@1.0.0");
    for (path, held_out) in [
        ("red/1.png", true),
        ("./red/2.png", true),
        ("red/3.png", false),
        ("", false),
    ] {
        assert_eq!(bundle.is_held_out(path), held_out, "{path}");
    }
}

#[test]
fn another_model_file_is_refused() {
    let (dir, bundle) = bundle_of(MANIFEST, &model().encode_to_vec());
    bundle.unwrap();
    let path = dir.path().join("model.onnx");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let error = Bundle::open(dir.path()).unwrap_err();
    assert!(
        matches!(error, BundleError::Differs { what: "sha256", .. }),
        "{error}"
    );
    bytes.push(0);
    std::fs::write(&path, &bytes).unwrap();
    let error = Bundle::open(dir.path()).unwrap_err();
    assert!(
        matches!(error, BundleError::Differs { what: "length", .. }),
        "{error}"
    );
    std::fs::remove_file(&path).unwrap();
    let error = Bundle::open(dir.path()).unwrap_err();
    assert!(matches!(error, BundleError::Read { .. }), "{error}");
}

#[cfg(unix)]
#[test]
fn a_link_out_of_the_bundle_is_refused() {
    let outside = tempfile::NamedTempFile::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), MANIFEST, &model().encode_to_vec());
    for file in ["model.onnx", "golden/1.png", "holdout.txt", "manifest.toml"] {
        let path = dir.path().join(file);
        let kept = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(outside.path(), &path).unwrap();
        let error = Bundle::open(dir.path()).unwrap_err();
        assert!(matches!(error, BundleError::Outside(_)), "{file}: {error}");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, kept).unwrap();
    }
    Bundle::open(dir.path()).unwrap();
}

//! What a bare ONNX file says about itself, and what is done to bundles and pictures on the way in.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may fail"
)]

mod common;

use common::{MANIFEST, SIDE, bundle, graph, model, value};
use models::{Budget, Bundle, Manifest, Picture, Port, Sketch};
use prost::Message;
use tract_onnx::pb::ModelProto;

fn sketch(change: impl FnOnce(&mut ModelProto)) -> Sketch {
    let mut model = model();
    change(&mut model);
    Sketch::read(&model.encode_to_vec()).unwrap()
}

fn manifest() -> Manifest {
    Manifest::parse(&common::manifest_for(MANIFEST, b"model")).unwrap()
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[test]
fn it_says_what_goes_in_and_what_comes_out() {
    let sketch = sketch(|model| {
        // As old files do it.
        let stored = value("weight", &[3, 3]);
        graph(model).input.push(stored);
        graph(model).output[1].r#type = None;
    });
    let side = usize::try_from(SIDE).unwrap();
    let input = Port {
        name: "image".to_owned(),
        sizes: Some(vec![Some(1), Some(3), Some(side), Some(side)]),
    };
    assert_eq!(sketch.inputs, [input]);
    assert_eq!(sketch.outputs[0].sizes, Some(vec![Some(1), Some(3)]));
    assert_eq!(sketch.outputs[1].sizes, None);
    let sizes = sketch
        .output_sizes(&manifest().input, &names(&["embedding", "logits"]))
        .unwrap();
    assert_eq!(sizes, [[1, 3], [1, 3]]);
}

#[test]
fn what_is_left_open_is_found_out() {
    let open = sketch(|model| {
        graph(model).input[0].r#type = None;
        graph(model).output[0].r#type = None;
    });
    assert_eq!(open.inputs[0].sizes, None);
    let sizes = open
        .output_sizes(&manifest().input, &names(&["logits"]))
        .unwrap();
    assert_eq!(sizes, [[1, 3]]);
    let error = sketch(|_| ())
        .output_sizes(&manifest().input, &names(&["boxes"]))
        .unwrap_err();
    assert!(error.to_string().contains("logits, embedding"), "{error}");
}

#[test]
fn what_no_bundle_may_have_is_refused() {
    assert!(Sketch::read(b"no model").is_err());
    let mut circle = model();
    graph(&mut circle).node[0].input[0] = "embedding".into();
    let error = Sketch::read(&circle.encode_to_vec()).unwrap_err();
    assert!(error.to_string().contains("before it is made"), "{error}");
    let error = sketch(|model| graph(model).node[0].op_type = "Teleport".into())
        .output_sizes(&manifest().input, &names(&["logits"]))
        .unwrap_err();
    assert!(error.to_string().contains("Teleport"), "{error}");
}

#[test]
fn a_bundle_gets_another_budget() {
    let (_dir, mut bundle) = bundle(|_| ());
    let budget = Budget {
        latency_ms: 12.5,
        memory_mib: 7,
    };
    bundle.set_budget(budget).unwrap();
    assert_eq!(bundle.manifest.budget, budget);
    let again = Bundle::open(bundle.dir()).unwrap();
    assert_eq!(again.manifest, bundle.manifest);
    assert!(!bundle.dir().join("manifest.new").exists());
    let none = Budget {
        latency_ms: 0.0,
        ..budget
    };
    assert!(bundle.set_budget(none).is_err());
    assert_eq!(Bundle::open(bundle.dir()).unwrap().manifest.budget, budget);
}

#[test]
fn a_picture_becomes_a_smaller_jpeg() {
    let picture = Picture::from_rgb(300, 100, [200, 40, 10].repeat(30_000)).unwrap();
    for (longest, size) in [(1_000, (300, 100)), (150, (150, 50)), (1, (1, 1))] {
        let jpeg = picture.to_jpeg(longest).unwrap();
        let small = Picture::decode(&jpeg).unwrap();
        assert_eq!((small.width(), small.height()), size);
        let near = |(a, b): (&u8, &u8)| a.abs_diff(*b) <= 6;
        assert!(small.rgb().iter().zip(picture.rgb()).all(near));
    }
}

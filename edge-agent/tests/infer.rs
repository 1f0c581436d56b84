//! `infer` says of a file what the agent would say of it.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{path::Path, process::Command};

use edge_agent::{
    capture::{self, Shot, scene},
    update::Wanted,
};
use models::{Bundle, Engine};

/// A photograph as large as a camera gives it: of a JPEG so large only a part of the pixels is computed.
#[test]
fn infer_says_what_a_source_would() {
    let dir = tempfile::tempdir().unwrap();
    let camera = scene::SceneConfig {
        width: 1_920,
        height: 1_080,
        ..scene::SceneConfig::default()
    };
    let (picture, _) = scene::draw(&camera, 3);
    let image = dir.path().join("3.jpg");
    picture.save(&image).unwrap();
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles/conveyor");
    let bad = dir.path().join("bad.png");
    std::fs::write(&bad, "no image").unwrap();
    let infer = |images: &[&Path]| {
        let mut infer = Command::new(env!("CARGO_BIN_EXE_edge-agent"));
        infer
            .args(["infer", "--json", "--bundle"])
            .arg(&bundle)
            .args(images);
        let done = infer.output().unwrap();
        let lines = String::from_utf8(done.stdout).unwrap();
        let lines = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap());
        (
            done.status.success(),
            lines.collect::<Vec<serde_json::Value>>(),
        )
    };
    let (well, said) = infer(&[&image]);
    assert!(well && said.len() == 1, "{said:?}");

    let engine = Engine::load(&Bundle::open(&bundle).unwrap()).unwrap();
    let (_, height, width) = engine.manifest().input.channels_height_width();
    let wanted = Wanted::of(width.try_into().unwrap(), height.try_into().unwrap());
    let text = format!("name = 'c'\nkind = 'folder'\npath = {:?}", dir.path());
    let mut source = capture::open(&toml::from_str(&text).unwrap(), wanted).unwrap();
    let Shot::Picture { picture, .. } = source.shoot(0) else {
        panic!("the source does not see it");
    };
    let outcome = engine.infer(&picture).unwrap();
    assert_eq!(said[0]["label"], outcome.label);
    assert_eq!(said[0]["model"], engine.id());
    let score = |n: usize| said[0]["scores"][&engine.manifest().output.labels[n]].as_f64();
    for (n, expected) in outcome.scores.iter().enumerate() {
        assert_eq!(score(n), Some(f64::from(*expected)), "{n}: {said:?}");
    }
    assert_eq!(said[0]["score"].as_f64(), Some(f64::from(outcome.score)));

    // A file that is no image costs itself only.
    let (well, said) = infer(&[&bad, &image]);
    assert!(!well && said.len() == 2, "{said:?}");
    assert!(
        said[0]["error"].is_string() && said[1]["label"] == outcome.label,
        "{said:?}"
    );
}

//! Every bundle that ships passes its own self-test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may fail"
)]

use std::{fs, path::Path};

use models::{Bundle, Engine, self_test};

#[test]
fn shipped_bundles_pass_their_self_test() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles");
    let mut bundles = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.is_dir() {
            continue;
        }
        bundles += 1;
        let bundle = Bundle::open(&dir).unwrap();
        assert_eq!(
            Some(bundle.manifest.name.as_str()),
            dir.file_name().and_then(|n| n.to_str())
        );
        let test = self_test(&bundle, &Engine::load(&bundle).unwrap());
        println!("{test}");
        assert!(test.passed(), "{test}");
        assert!(
            dir.join("CARD.md").is_file(),
            "{} has no model card",
            bundle.id()
        );
    }
    assert!(bundles > 0, "no bundles in {}", folder.display());
}

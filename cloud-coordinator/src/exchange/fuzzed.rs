//! An import as far as it needs no store: for `fuzz/targets.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
};

use super::{
    Format, Kind, kind,
    names::Names,
    plan::{clean, plan},
};

/// Beyond it only time is lost.
const MOST: u64 = 1 << 20;

/// A tar, its names, and what its texts say of its images in each format. Each text is also read under the names that
/// formats look for.
pub fn import(bytes: &[u8]) {
    let (mut images, mut texts) = (BTreeSet::new(), BTreeMap::new());
    let mut names = Names::default();
    let mut archive = tar::Archive::new(bytes);
    let entries = archive.entries().into_iter().flat_map(|all| all.raw(true));
    for entry in entries {
        let Ok(mut entry) = entry else { break };
        let Ok(named) = names.of(&mut entry) else {
            break;
        };
        let Some(path) = named.and_then(|raw| clean(&raw)) else {
            continue;
        };
        assert!(!path.starts_with('/') && !path.split('/').any(|part| part == ".."));
        match kind(&path) {
            Some((Kind::Image, _)) => {
                images.insert(path);
            }
            Some((Kind::Text, _)) => {
                let mut text = String::new();
                if entry.by_ref().take(MOST).read_to_string(&mut text).is_ok() {
                    texts.insert(path, text);
                }
            }
            None => {}
        }
    }
    look(&images, &texts);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let images = ["a.jpg", "images/train/b.png", "images/val/c.jpg"].map(String::from);
        let names = [
            "labels.csv",
            "a.json",
            "labels/train/b.txt",
            "data.yaml",
            "classes.txt",
        ];
        let texts = names.map(|name| (name.to_owned(), text.to_owned()));
        look(&images.into(), &texts.into());
    }
}

fn look(images: &BTreeSet<String>, texts: &BTreeMap<String, String>) {
    for format in [Format::Folder, Format::Csv, Format::Coco, Format::Yolo] {
        let plan = plan(format, images, texts);
        for (path, class) in &plan.labels {
            assert!(images.contains(path) && plan.classes.contains(class));
        }
        assert!(plan.holdout.is_subset(images));
    }
}

//! Chunks in any order, and the document that lists them.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod files;

use std::fs;

use files::{raw, weights};
use models::{
    Digest, Parent, ReleaseDocument,
    chunks::{Assembly, CHUNK_BYTES, ChunkError, listed, split},
    digest_of,
};
use proptest::prelude::*;

fn file() -> Vec<u8> {
    let mut file = raw(&weights(1, CHUNK_BYTES / 4 * 3 + 100));
    // Two chunks alike.
    file.copy_within(..CHUNK_BYTES, CHUNK_BYTES);
    file
}

#[test]
fn chunks_come_in_any_order_and_survive_a_restart() {
    let (file, folder) = (file(), tempfile::tempdir().unwrap());
    let chunks = split(&file);
    let digests: Vec<Digest> = chunks.iter().map(|chunk| chunk.sha256).collect();
    assert_eq!(listed(file.len() as u64, &digests).unwrap(), chunks);
    assert!(listed(file.len() as u64 + CHUNK_BYTES as u64, &digests).is_none());
    assert_eq!(listed(0, &[]).unwrap(), []);

    let mut assembly = Assembly::new(chunks.clone());
    assert_eq!(assembly.missing().count(), 3, "two are alike");
    for (at, bytes) in file.chunks(CHUNK_BYTES).enumerate().rev().take(2) {
        let mut wrong = bytes.to_vec();
        wrong[7] ^= 1;
        let sha256 = chunks[at].sha256;
        let error = assembly.accept(sha256, &wrong).unwrap_err();
        assert!(matches!(error, ChunkError::Digest { .. }));
        let error = assembly.accept(sha256, &bytes[1..]).unwrap_err();
        assert!(matches!(error, ChunkError::Length { .. }));
        assembly.accept(sha256, bytes).unwrap();
        fs::write(folder.path().join(sha256.to_string()), bytes).unwrap();
    }
    let error = assembly.accept(digest_of(b"x"), b"x").unwrap_err();
    assert!(matches!(error, ChunkError::NotWanted(_)));
    assert_eq!(assembly.missing().collect::<Vec<_>>(), chunks[..1]);

    // Cut off by the loss of power.
    let first = folder.path().join(chunks[0].sha256.to_string());
    fs::write(&first, &file[..1000]).unwrap();
    let mut again = Assembly::new(chunks.clone());
    again.resume(folder.path()).unwrap();
    assert_eq!(again.missing().collect::<Vec<_>>(), chunks[..1]);
    again
        .accept(chunks[0].sha256, &file[..CHUNK_BYTES])
        .unwrap();
    again.write(folder.path(), &mut Vec::new()).unwrap_err();
    fs::write(&first, &file[..CHUNK_BYTES]).unwrap();
    let mut out = Vec::new();
    again.write(folder.path(), &mut out).unwrap();
    assert!(again.is_complete() && out == file);
}

fn bundle() -> (tempfile::TempDir, ReleaseDocument) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("golden")).unwrap();
    for (path, bytes) in [
        ("model.onnx", &file()[..]),
        ("manifest.toml", b"m"),
        ("golden/1.png", b""),
    ] {
        fs::write(dir.path().join(path), bytes).unwrap();
    }
    let parent = Parent {
        version: "1.0.0".into(),
        sha256: digest_of(b"parent"),
    };
    let release = ReleaseDocument::of(dir.path(), "steel", "1.1.0", Some(parent)).unwrap();
    (dir, release)
}

#[test]
fn a_release_is_one_document() {
    let (dir, release) = bundle();
    let paths: Vec<&str> = release
        .files
        .iter()
        .map(|file| file.path.as_str())
        .collect();
    assert_eq!(paths, ["golden/1.png", "manifest.toml", "model.onnx"]);
    let bytes = release.to_bytes().unwrap();
    assert_eq!(ReleaseDocument::parse(&bytes).unwrap(), release);
    assert_eq!(release.digest().unwrap(), digest_of(&bytes));
    let text = String::from_utf8(bytes).unwrap();
    let start = r#"{"v":1,"name":"steel","version":"1.1.0","files":[{"path":"golden/1.png","sha256":"e3b0c4"#;
    assert!(text.starts_with(start), "{text}");
    for other in [
        text.replace(',', ", "),
        text.replace("\"v\":1", "\"v\":2"),
        text.replace("\"name\"", "\"more\":1,\"name\""),
        text.replace("e3b0c4", "E3B0C4"),
        format!("{text} "),
        format!("{}{text}", " ".repeat(256 << 10)),
    ] {
        ReleaseDocument::parse(other.as_bytes()).unwrap_err();
    }

    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        ReleaseDocument::of(dir.path(), "steel", "1.1.0", None).unwrap_err();
    }
    fs::write(dir.path().join("a b"), "").unwrap();
    ReleaseDocument::of(dir.path(), "steel", "1.1.0", None).unwrap_err();
}

#[test]
fn what_is_not_allowed_is_refused() {
    let (_dir, good) = bundle();
    let refused = |what: &str, change: &dyn Fn(&mut ReleaseDocument)| {
        let mut bad = good.clone();
        change(&mut bad);
        let bytes = serde_json::to_vec(&bad).unwrap();
        assert!(
            ReleaseDocument::parse(&bytes).is_err() && bad.to_bytes().is_err(),
            "{what}"
        );
    };
    for path in [
        "", "/a", "a/", "a//b", "../a", "a/..", "./a", "a\\b", "a b", "a\0", "C:a", "ä",
    ] {
        refused(path, &|r| r.files[0].path = path.into());
    }
    refused("folder and file", &|r| {
        r.files[0].path = "a".into();
        r.files[1].path = "a/b".into();
    });
    refused("twice", &|r| r.files[1] = r.files[0].clone());
    refused("order", &|r| r.files.swap(0, 1));
    refused("no files", &|r| r.files.clear());
    refused("length", &|r| r.files[2].length += CHUNK_BYTES as u64);
    refused("huge", &|r| r.files[2].length = u64::MAX);
    refused("chunk too many", &|r| {
        r.files[0].chunks.push(digest_of(b""))
    });
    refused("name", &|r| r.name = "../steel".into());
    refused("version", &|r| r.version = "..".into());
    refused("many", &|r| {
        let file = r.files[0].clone();
        r.files = (100..300)
            .map(|n| {
                let mut file = file.clone();
                file.path = format!("f{n}");
                file
            })
            .collect();
    });
}

proptest! {
    #[test]
    fn hostile_documents_are_errors(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let (_dir, release) = bundle();
        let mut bytes = release.to_bytes().unwrap();
        *at.get_mut(&mut bytes[..]) = byte;
        if let Ok(read) = ReleaseDocument::parse(&bytes) {
            prop_assert_eq!(read.to_bytes().unwrap(), bytes);
        }
    }
}

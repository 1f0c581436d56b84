//! What is fuzzed: each parser of what others send, as a plain function. It must come back, whatever the bytes are, and
//! what it accepts must be the same when it is written and read again.
//!
//! Both libFuzzer (`fuzz_targets/`) and a test that needs nothing but a stable compiler (`tests/fuzz.rs`) call these.
#![allow(unreachable_pub, reason = "a crate for the one, a module of the other")]

pub use cloud_coordinator::fuzzed::{import, packets, request};
pub use edge_agent::fuzzed::{pieces, presence, questions};
use mesh_core::{
    Ack, Desired, Gap, Info, Mark, Metrics, ModelInfo, Name, Reading, Replay, Reported, Sample,
    State, Status, Topic, drift, meeting, roster::Roster, settings,
};
use models::{Digest, Engine, Manifest, Picture, ReleaseDocument, Sketch, bare, delta, digest_of};

/// A parser.
pub struct Target {
    /// As in `fuzz_targets/` and `corpus/`.
    pub name: &'static str,
    /// Feeds it.
    pub run: fn(&[u8]),
    /// How many inputs a test gives it, at least: some seconds' worth.
    pub runs: usize,
}

/// All of them.
pub const TARGETS: [Target; 17] = [
    target("onnx", onnx, 20_000),
    target("engine", engine, 400),
    target("manifest", manifest, 20_000),
    target("image", image, 20_000),
    target("delta", apply, 20_000),
    target("release", release, 20_000),
    target("messages", messages, 20_000),
    target("desired", desired, 20_000),
    target("settings", settings, 20_000),
    target("topic", topic, 20_000),
    target("roster", roster, 20_000),
    target("presence", presence, 20_000),
    target("questions", questions, 20_000),
    target("pieces", pieces, 20_000),
    target("packets", packets, 20_000),
    target("request", request, 5_000),
    target("import", import, 5_000),
];

const fn target(name: &'static str, run: fn(&[u8]), runs: usize) -> Target {
    Target { name, run, runs }
}

/// An ONNX file up to what the engine would see of it.
pub fn onnx(bytes: &[u8]) {
    let _ = Sketch::read(bytes);
}

/// A manifest for the models of the corpus.
const MANIFEST: &str = r#"
schema = 1
name = "fuzz"
version = "1"
task = "classify"
[model]
file = "model.onnx"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
bytes = 1
[input]
name = "image"
shape = [1, 3, 16, 16]
[output]
scores = "logits"
labels = ["red", "green", "blue"]
[budget]
latency_ms = 1
memory_mib = 1
[[golden]]
image = "1.png"
label = "red"
scores = [1, 0, 0]
"#;

/// An ONNX file as far as it goes: analysed, optimised, run once. Devices do so in a process of its own, with bounds.
pub fn engine(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(MANIFEST) {
        let _ = Engine::new(manifest, bytes.to_vec());
    }
}

/// A bundle's manifest.
pub fn manifest(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(manifest) = Manifest::parse(text)
    {
        assert!(!manifest.id().is_empty());
    }
}

/// An image file: decoded whole, decoded small, and without anything beside its pixels.
pub fn image(bytes: &[u8]) {
    // More than enough for what fuzzing finds.
    const MOST: usize = 1 << 20;
    let whole = Picture::decode(bytes);
    for side in [1, 7] {
        let small = Picture::decode_for(bytes, side, side);
        assert!(small.is_err() || whole.is_ok() || is_lenient(bytes));
    }
    let made = bare(bytes, MOST);
    let Ok(whole) = whole else {
        assert!(made.is_err());
        return;
    };
    if let Ok(made) = made
        && let Ok(again) = Picture::decode(&made)
    {
        assert!(again.width() <= whole.width() && again.height() <= whole.height());
        assert!(bare(&made, MOST).is_ok_and(|twice| twice == made));
    } else {
        panic!("what is written can be read");
    }
}

/// The small decoder reads one scan and leaves; what comes later is not its business.
fn is_lenient(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xff, 0xd8])
}

/// What the deltas of the corpus start from.
pub const OLD: &[u8] = include_bytes!("corpus/onnx/colour.onnx");

/// A delta, made to fit the old file, and to make what it says that it makes.
pub fn apply(bytes: &[u8]) {
    // Beyond it only time is lost.
    const LONGEST: u64 = 1 << 20;
    let mut bytes = bytes.to_vec();
    let Some(header) = bytes.get_mut(..84) else {
        return;
    };
    header[8..40].copy_from_slice(&digest_of(OLD).0);
    let mut sha256 = [0; 32];
    sha256.copy_from_slice(&header[40..72]);
    let mut length = [0; 4];
    length.copy_from_slice(&header[72..76]);
    let wanted = delta::Wanted {
        length: u64::from(u32::from_le_bytes(length)).min(LONGEST),
        sha256: Digest(sha256),
    };
    let mut new = Vec::new();
    if delta::apply(
        &mut std::io::Cursor::new(OLD),
        &bytes[..],
        &wanted,
        &mut new,
    )
    .is_ok()
    {
        assert_eq!(
            (new.len() as u64, digest_of(&new)),
            (wanted.length, wanted.sha256)
        );
    }
}

/// A release.
pub fn release(bytes: &[u8]) {
    if let Ok(release) = ReleaseDocument::parse(bytes) {
        assert!(release.to_bytes().is_ok_and(|again| again == bytes));
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap_or_else(|_| Name::itself())
}

/// Is a message the same after it was written and read again?
macro_rules! again {
    ($read:expr, $bytes:expr) => {
        if let Ok(message) = $read($bytes)
            && let Ok(bytes) = message.encode()
        {
            assert_eq!($read(&bytes).ok(), Some(message));
        }
    };
}

/// What devices and the coordinator say on MQTT, and about samples.
pub fn messages(bytes: &[u8]) {
    let device = name("d1");
    again!(|b: &[u8]| Reading::decode(b, &device), bytes);
    again!(|b: &[u8]| Gap::decode(b, &device), bytes);
    again!(Ack::decode, bytes);
    again!(Info::decode, bytes);
    again!(ModelInfo::decode, bytes);
    again!(State::decode, bytes);
    again!(Metrics::decode, bytes);
    again!(Reported::decode, bytes);
    again!(meeting::Meeting::decode, bytes);
    again!(
        |b: &[u8]| drift::Drift::decode(b, &device, &name("cam0")),
        bytes
    );
    let _ = Status::decode(bytes);
    let _ = Mark::decode(bytes);
    if let Ok(sample) = Sample::decode(bytes) {
        assert!(sample.check().is_ok());
    }
    if let Ok(replay) = Replay::decode(bytes, &device) {
        let taken = replay.iter().flatten();
        assert!(taken.into_iter().all(|r| r.check(&device).is_ok()));
    }
    if let Ok(ack) = Ack::decode(bytes) {
        assert!(ack.stored().contains(ack.upto) || ack.upto == 0);
    }
}

/// What a device is told to be.
pub fn desired(bytes: &[u8]) {
    again!(Desired::decode, bytes);
}

/// Settings from afar.
pub fn settings(bytes: &[u8]) {
    again!(settings::Document::decode, bytes);
}

/// A topic.
pub fn topic(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(topic) = text.parse::<Topic>()
    {
        assert_eq!(topic.to_string(), text);
    }
}

/// A roster: who is a neighbour, after its signature was verified.
pub fn roster(bytes: &[u8]) {
    if let Ok(roster) = serde_json::from_slice::<Roster>(bytes)
        && roster.check(&name("demo"), None, roster.iat).is_ok()
        && let Ok(written) = serde_json::to_vec(&roster)
    {
        assert!(
            roster
                .members
                .iter()
                .all(|m| roster.name_of(&m.peer).is_some())
        );
        assert_eq!(
            serde_json::from_slice::<Roster>(&written).ok(),
            Some(roster)
        );
    }
}

//! Mutated metadata: whatever is accepted says the same as the honest files.
//!
//! `TUF_MUTANTS` says how many (default some thousands), `TUF_SEED` where to begin.

use std::{
    collections::HashMap,
    fs,
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};
use tough::schema::{RoleType, Snapshot, Timestamp};

use super::*;
use edge_agent::update::registry::{Source, SourceError};

/// A small generator of pseudo-random numbers (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Files in memory.
#[derive(Clone, Debug, Default)]
struct Memory(Arc<Mutex<HashMap<String, Vec<u8>>>>);

impl Source for Memory {
    fn get(&self, path: &str) -> Result<Vec<u8>, SourceError> {
        self.0
            .lock()
            .unwrap()
            .get(path)
            .cloned()
            .ok_or(SourceError::Missing)
    }
}

/// Flips, removes, inserts, copies within.
fn bytes_mutant(bytes: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=dice.below(3) {
        let at = dice.below(bytes.len());
        let length = 1 + dice.below(16);
        let end = (at + length).min(bytes.len());
        match dice.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
            1 if at < bytes.len() => bytes[at] = dice.next() as u8,
            2 => drop(bytes.drain(at..end)),
            3 => bytes.insert(at, dice.next() as u8),
            4 => {
                let piece = bytes[at..end].to_vec();
                let to = dice.below(bytes.len() + 1);
                drop(bytes.splice(to..to, piece));
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// All places in a document.
fn places(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                places(
                    value,
                    &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")),
                    all,
                );
            }
        }
        Value::Array(items) => {
            for (n, value) in items.iter().enumerate() {
                places(value, &format!("{at}/{n}"), all);
            }
        }
        _ => {}
    }
}

/// Changes a value, a name, a list, or swaps in something from another file.
fn json_mutant(bytes: &[u8], donors: &[Vec<u8>], dice: &mut Dice) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<Value>(bytes) else {
        return bytes.to_vec();
    };
    for _ in 0..=dice.below(2) {
        let mut all = Vec::new();
        places(&value, "", &mut all);
        let place = all[dice.below(all.len())].clone();
        let donor: Value = serde_json::from_slice(&donors[dice.below(donors.len())]).unwrap();
        let mut gifts = Vec::new();
        places(&donor, "", &mut gifts);
        let gift = donor
            .pointer(&gifts[dice.below(gifts.len())])
            .cloned()
            .unwrap();
        // Half of the time the same place in the other file: another version's expiry, keys, signatures.
        let same = donor.pointer(&place).cloned();
        let Some(spot) = value.pointer_mut(&place) else {
            continue;
        };
        match (dice.below(8), &mut *spot) {
            (0 | 1, spot) if same.is_some() => *spot = same.unwrap(),
            (2, spot) => *spot = gift,
            (3, Value::Object(map)) if !map.is_empty() => {
                let key = map.keys().nth(dice.below(map.len())).unwrap().clone();
                let value = map.remove(&key).unwrap();
                if dice.below(2) == 0 {
                    map.insert(format!("{key}x"), value);
                }
            }
            (4, Value::Object(map)) => drop(map.insert("extra".into(), gift)),
            (3 | 4, Value::Array(items)) if !items.is_empty() => {
                let n = dice.below(items.len());
                match dice.below(2) {
                    0 => drop(items.remove(n)),
                    _ => items.push(items[n].clone()),
                }
            }
            (_, Value::Number(number)) => {
                let n = number.as_u64().unwrap_or(0);
                *spot = match dice.below(7) {
                    0 => json!(n.saturating_add(1)),
                    1 => json!(n.saturating_sub(1)),
                    2 => json!(u64::MAX),
                    3 => json!(n as f64),
                    4 => json!(-1),
                    5 => json!(n.to_string()),
                    _ => json!(dice.next()),
                };
            }
            (_, Value::String(text)) => {
                let at = dice.below(text.len() + 1);
                match dice.below(5) {
                    0 => *text = "2999-01-01T00:00:00Z".into(),
                    1 if text.is_ascii() => {
                        text.insert(at, char::from(b'0' + dice.below(10) as u8))
                    }
                    2 => *text = text.to_uppercase(),
                    3 if text.is_ascii() => text.truncate(at),
                    _ => text.push_str("00"),
                }
            }
            (_, spot) => {
                *spot = [Value::Null, json!([]), json!({}), json!(true)][dice.below(4)].clone()
            }
        }
    }
    match dice.below(2) {
        0 => serde_json::to_vec(&value).unwrap(),
        _ => serde_json::to_vec_pretty(&value).unwrap(),
    }
}

/// What a device believes.
fn contents(device: &Registry) -> [Value; 4] {
    let repository = device.verified().unwrap();
    [
        serde_json::to_value(&repository.root().signed).unwrap(),
        serde_json::to_value(&repository.timestamp().signed).unwrap(),
        serde_json::to_value(&repository.snapshot().signed).unwrap(),
        serde_json::to_value(&repository.targets().signed).unwrap(),
    ]
}

/// Changes that leave the document well-formed: another number, date, digit, or a value of its own kind from
/// elsewhere.
fn sharp_mutant(bytes: &[u8], donors: &[Vec<u8>], dice: &mut Dice) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<Value>(bytes) else {
        return bytes.to_vec();
    };
    for _ in 0..=dice.below(2) {
        let mut all = Vec::new();
        places(&value, "", &mut all);
        let leaf = |place: &String| {
            value
                .pointer(place)
                .is_some_and(|v| v.is_string() || v.is_u64())
        };
        all.retain(leaf);
        let place = all[dice.below(all.len())].clone();
        let other = value.pointer(&all[dice.below(all.len())]).cloned().unwrap();
        let donor: Value = serde_json::from_slice(&donors[dice.below(donors.len())]).unwrap();
        let same = donor.pointer(&place).cloned();
        let Some(spot) = value.pointer_mut(&place) else {
            continue;
        };
        let hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
        match (dice.below(4), &mut *spot) {
            (0, spot) if same.is_some() => *spot = same.unwrap(),
            (1, Value::String(text)) if other.as_str().is_some_and(|o| o.len() == text.len()) => {
                *spot = other;
            }
            (_, Value::Number(number)) => {
                let n = number.as_u64().unwrap_or(1);
                *spot = [
                    json!(n + 1),
                    json!(n.max(2) - 1),
                    json!(1 + dice.below(1000)),
                ][dice.below(3)]
                .clone();
            }
            (_, Value::String(text)) if text.ends_with('Z') && text.contains('T') => {
                let (year, month) = (2026 + dice.below(90), 1 + dice.below(12));
                *text = format!("{year}-{month:02}-01T00:00:00Z");
            }
            (_, Value::String(text)) if hex(text) && !text.is_empty() => {
                let at = dice.below(text.len());
                text.replace_range(at..=at, &format!("{:x}", dice.below(16)));
            }
            (_, Value::String(text)) => text.push(char::from(b'a' + dice.below(26) as u8)),
            _ => {}
        }
    }
    serde_json::to_vec_pretty(&value).unwrap()
}

/// A repository, in memory.
struct Base {
    honest: HashMap<String, Vec<u8>>,
    /// Those that a refresh asks for.
    asked: Vec<String>,
    /// All metadata, of now and before.
    donors: Vec<Vec<u8>>,
    truth: [Value; 4],
}

impl Base {
    async fn new(repository: &Path, memory: &Memory, device: &mut Registry) -> Self {
        let name = |path: &Path| {
            path.strip_prefix(repository)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        };
        let mut honest: HashMap<String, Vec<u8>> = files(repository)
            .iter()
            .map(|(path, bytes)| (name(path), bytes.clone()))
            .collect();
        honest.retain(|name, _| name.ends_with(".json"));
        memory.0.lock().unwrap().clone_from(&honest);
        accepts(device, &["1", "2"], NOW).await;
        let truth = contents(device);
        let mut asked = vec![
            "metadata/2.root.json".to_owned(),
            "metadata/3.root.json".to_owned(),
            // There is none; one may be made up.
            "metadata/4.root.json".to_owned(),
            "metadata/timestamp.json".to_owned(),
            format!("metadata/{}.snapshot.json", truth[2]["version"]),
            format!("metadata/{}.targets.json", truth[3]["version"]),
        ];
        let mut names: Vec<&String> = honest.keys().collect();
        names.sort();
        let (documents, metadata): (Vec<_>, Vec<_>) = names
            .into_iter()
            .partition(|name| name.starts_with("targets/"));
        asked.push(documents[0].clone());
        assert!(
            asked
                .iter()
                .filter(|name| honest.contains_key(*name))
                .count()
                == asked.len() - 1
        );
        let donors = metadata
            .into_iter()
            .map(|name| honest[name].clone())
            .collect();
        Self {
            honest,
            asked,
            donors,
            truth,
        }
    }
}

#[tokio::test]
async fn no_mutant_is_accepted() {
    let number = |name: &str, or: u64| std::env::var(name).map_or(or, |n| n.parse().unwrap());
    let (count, mut dice) = (number("TUF_MUTANTS", 4000), Dice(number("TUF_SEED", 1)));

    // Three roots, two versions, 2 of 3 keys for the targets.
    let mut world = World::new().await;
    world.publish("1").await;
    world
        .signing
        .rotate(RoleType::Timestamp, NOW)
        .await
        .unwrap();
    let mut edits = vec![signing::Edit::Threshold(RoleType::Targets, 2)];
    let stick = world.dir.path().join("stick");
    let mut stolen = Vec::new();
    for _ in 0..2 {
        let (path, key) = signing::generate(&stick, RoleType::Targets).unwrap();
        edits.push(signing::Edit::Add(RoleType::Targets, key));
        stolen.push(path);
    }
    world.signing = world.signing.with_keys(stolen);
    let root = world.signing.propose(&edits, NOW).unwrap();
    let root = signing::sign_root(&root, None, &world.key_files())
        .await
        .unwrap();
    world.signing.install_root(&root, NOW).await.unwrap();
    let before = world.keep("before");
    world.publish("2").await;

    let shm = Path::new("/dev/shm");
    let dir = if shm.is_dir() {
        tempfile::tempdir_in(shm)
    } else {
        tempfile::tempdir()
    }
    .unwrap();
    let device_folder = dir.path().join("device");
    let pinned = world.signing.first_root().unwrap();
    let mut updated = Registry::new(&pinned, device_folder.clone(), Folder(before)).unwrap();
    accepts(&mut updated, &["1"], NOW).await;
    let trusted = fs::read(device_folder.join("trusted.json")).unwrap();

    // As it is, and as a thief of the keys that are online would give it out: nothing but the signature of the
    // targets and of the roots protects these.
    let loose = world.keep("loose");
    let mut timestamp: Signed<Timestamp> = parse(&world.metadata("timestamp.json"));
    let pinned = timestamp.signed.meta.get_mut("snapshot.json").unwrap();
    let file = format!("{}.snapshot.json", pinned.version);
    let mut snapshot: Signed<Snapshot> = parse(&world.metadata(&file));
    for meta in snapshot.signed.meta.values_mut() {
        (meta.hashes, meta.length) = (None, None);
    }
    world.forge(snapshot.signed, &file, &loose).await;
    (pinned.hashes, pinned.length) = (None, None);
    world
        .forge(timestamp.signed, "timestamp.json", &loose)
        .await;

    let memory = Memory::default();
    let pinned = world.signing.first_root().unwrap();
    let mut device = Registry::new(&pinned, device_folder.clone(), memory.clone()).unwrap();
    // And one that a stranger has signed with keys of the same roles.
    let stranger = World::new().await;
    stranger.publish("1").await;
    stranger
        .signing
        .rotate(RoleType::Timestamp, NOW)
        .await
        .unwrap();
    stranger.publish("2").await;
    let strange: Vec<Vec<u8>> = files(&stranger.repository().join("metadata"))
        .into_values()
        .collect();
    let mut bases = Vec::new();
    for repository in [world.repository(), loose] {
        let mut base = Base::new(&repository, &memory, &mut device).await;
        base.donors.extend(strange.clone());
        bases.push(base);
    }

    let (mut refused, mut same, mut kinds) = (0_u64, 0_u64, HashMap::<String, u64>::new());
    for n in 0..count {
        let Base {
            honest,
            asked,
            donors,
            truth,
        } = &bases[dice.below(bases.len())];
        memory.0.lock().unwrap().clone_from(honest);
        let victim = &asked[dice.below(asked.len())];
        let bytes = honest
            .get(victim)
            .unwrap_or(&donors[dice.below(donors.len())])
            .clone();
        let mutant = match dice.below(8) {
            0 => donors[dice.below(donors.len())].clone(),
            1 | 2 => bytes_mutant(&bytes, &mut dice),
            3..=5 => sharp_mutant(&bytes, donors, &mut dice),
            _ => json_mutant(&bytes, donors, &mut dice),
        };
        memory
            .0
            .lock()
            .unwrap()
            .insert(victim.clone(), mutant.clone());
        // Half of them meet a device that knows the version before, half a new one.
        match dice.below(2) {
            0 => fs::write(device_folder.join("trusted.json"), &trusted).unwrap(),
            _ => drop(fs::remove_file(device_folder.join("trusted.json"))),
        }
        let outcome = match device.refresh(NOW).await {
            Err(error) => Err(error),
            Ok(_) => match device.release("det", "1", NOW).await {
                Err(error) => Err(error),
                Ok(first) => device
                    .release("det", "2", NOW)
                    .await
                    .map(|second| (first, second)),
            },
        };
        match outcome {
            Err(error) => {
                refused += 1;
                let kind = format!("{error:?}");
                *kinds
                    .entry(kind.split([' ', '(']).next().unwrap().to_owned())
                    .or_default() += 1;
            }
            Ok((first, second)) => {
                assert_eq!(
                    (first, second),
                    (document("1"), document("2")),
                    "mutant {n} of {victim}"
                );
                assert!(
                    contents(&device) == *truth,
                    "mutant {n} of {victim}: {}",
                    String::from_utf8_lossy(&mutant)
                );
                same += 1;
            }
        }
    }
    println!(
        "{count} mutants: {refused} refused {kinds:?}, {same} say the same as the honest file, 0 accepted"
    );
    assert!(refused > count / 2, "the mutants are too tame");
}

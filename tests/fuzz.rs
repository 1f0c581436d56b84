//! Every parser of what others send, fed with its corpus, cuts of it, and mutations from a seed: the part of fuzzing that
//! needs nothing but a stable compiler and some seconds. See `fuzz/README.md`.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::{fs, panic::catch_unwind, path::Path};

use targets::{TARGETS, Target};

/// Always the same mutations, unless `LACEWING_FUZZ_SEED` says otherwise.
const SEED: u64 = 20_261_123;
/// Longer inputs are only slower.
const MAX_BYTES: usize = 64 << 10;
/// Bytes and texts that parsers are sensitive to.
const DICTIONARY: [&[u8]; 24] = [
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\xff\xd8",
    b"\xff\xd9",
    b"\xff\xda",
    b"\xff\xc4",
    b"\xff\xdd",
    b"IDAT",
    b"eXIf",
    b"[[",
    b"{\"a\":",
    b"\"",
    b"-1",
    b"1e999",
    b"NaN",
    b"18446744073709551616",
    b"null",
    b"..",
    b"/",
    b"\n",
    b"\xe2\x80\xae",
];

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn throw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, most: usize) -> usize {
        (self.throw() % most.max(1) as u64) as usize
    }
}

/// One small change, or a few.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], dice: &mut Dice) {
    for _ in 0..=dice.below(4) {
        let at = dice.below(bytes.len() + 1);
        let end = (at + 1 + dice.below(16)).min(bytes.len());
        match dice.below(9) {
            0 | 1 if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
            2 if at < bytes.len() => bytes[at] = dice.throw() as u8,
            3 => drop(bytes.drain(at..end.max(at))),
            4 => {
                let copy = bytes[at..end.max(at)].repeat(1 + dice.below(40));
                drop(bytes.splice(at..at, copy));
            }
            5 => bytes.truncate(at),
            6 => {
                let from = dice.below(other.len() + 1);
                let to = (from + dice.below(64)).min(other.len());
                drop(bytes.splice(at..at, other[from..to].iter().copied()));
            }
            7 => {
                let word = DICTIONARY[dice.below(DICTIONARY.len())];
                let end = (at + word.len()).min(bytes.len());
                let over = if dice.below(2) == 0 {
                    at..at
                } else {
                    at..end.max(at)
                };
                drop(bytes.splice(over, word.iter().copied()));
            }
            _ => bytes.insert(at, dice.throw() as u8),
        }
    }
    bytes.truncate(MAX_BYTES);
}

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    // The engine starts where the checks before it do.
    let name = if target.name == "engine" {
        "onnx"
    } else {
        target.name
    };
    let mut files: Vec<_> = fs::read_dir(folder.join(name))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{name} has no corpus");
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn feed(target: &Target, bytes: &[u8]) {
    if catch_unwind(|| (target.run)(bytes)).is_err() {
        let file = std::env::temp_dir().join(format!("lacewing-fuzz-{}", target.name));
        fs::write(&file, bytes).unwrap();
        panic!("{}: the input is in {}", target.name, file.display());
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn fuzz(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let corpus = corpus(target);
    let runs = number("LACEWING_FUZZ_RUNS").map_or(target.runs, |runs| runs as usize);
    let mut dice = Dice(number("LACEWING_FUZZ_SEED").unwrap_or(SEED));
    for seed in &corpus {
        feed(target, seed);
        // Everywhere in a small file, here and there in a large one.
        let cuts = seed.len().min(runs / 10 / corpus.len()).max(1);
        (0..cuts).for_each(|n| feed(target, &seed[..seed.len() * n / cuts]));
    }
    // Some of what came out is mutated further.
    let mut pool = corpus.clone();
    for _ in 0..runs {
        let mut bytes = pool[dice.below(pool.len())].clone();
        let other = dice.below(corpus.len());
        mutate(&mut bytes, &corpus[other], &mut dice);
        feed(target, &bytes);
        if pool.len() < 256 {
            pool.push(bytes);
        } else if dice.below(8) == 0 {
            let at = corpus.len() + dice.below(256usize.saturating_sub(corpus.len()));
            pool[at.min(255)] = bytes;
        } else if dice.below(32) == 0 {
            let at = dice.below(pool.len());
            pool[at] = corpus[other].clone();
        }
    }
}

macro_rules! tests {
    ($($name:ident)*) => {
        $(#[test] fn $name() { fuzz(stringify!($name)); })*

        #[test]
        fn every_target_is_a_test() {
            let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
        }
    };
}

tests!(onnx engine manifest image delta release messages desired settings topic roster presence questions pieces packets request
    import);

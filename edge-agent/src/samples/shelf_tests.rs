use mesh_core::VERSION;
use proptest::prelude::*;

use super::*;

/// A sample of epoch 7, with an image of so many bytes (none for 0).
pub(in crate::samples) fn sample(seq: u64, reason: SampleReason, image: &[u8]) -> Sample {
    Sample {
        v: VERSION,
        device: "d1".parse().unwrap(),
        source: "cam0".parse().unwrap(),
        epoch: 7,
        seq,
        ts: 1,
        reason,
        label: "hole".into(),
        score: 0.5,
        margin: 0.1,
        entropy: 0.4,
        novelty: None,
        model: "m@1".into(),
        embedding: vec![0.25; 4],
        file: None,
        image: (!image.is_empty()).then(|| SampleImage {
            sha256: models::digest_of(image).to_string(),
            bytes: image.len() as u64,
        }),
    }
}

fn open(root: &Path, max_bytes: u64) -> (Shelf, u64) {
    Shelf::open(root.to_owned(), max_bytes, 7, Seal::none()).unwrap()
}

fn add(shelf: &mut Shelf, seq: u64, reason: SampleReason, bytes: usize) -> Result<u64, ShelfError> {
    let image = vec![seq as u8; bytes];
    shelf.add(
        &sample(seq, reason, &image),
        Some(&image).filter(|i| !i.is_empty()).map(Vec::as_slice),
    )
}

fn seqs(shelf: &Shelf) -> Vec<u64> {
    shelf.items.keys().map(|key| key.seq).collect()
}

#[test]
fn what_people_marked_goes_first_and_stays_longest() {
    use SampleReason::{Missed, Novel, Random, Uncertain, Wrong};
    let folder = tempfile::tempdir().unwrap();
    let (mut shelf, _) = open(folder.path(), 6 * 8_192);
    for (seq, reason) in [
        (1, Wrong),
        (2, Random),
        (3, Novel),
        (4, Missed),
        (5, Uncertain),
        (6, Random),
    ] {
        add(&mut shelf, seq, reason, 4_000).unwrap();
    }
    let mut tried = BTreeSet::new();
    let order: Vec<u64> = std::iter::from_fn(|| {
        let item = shelf.next(&tried)?;
        tried.insert(item.key);
        Some(item.key.seq)
    })
    .collect();
    assert_eq!(order, [4, 1, 2, 3, 5, 6]);

    add(&mut shelf, 7, Novel, 4_000).unwrap();
    add(&mut shelf, 8, Uncertain, 4_000).unwrap();
    assert_eq!(seqs(&shelf), [1, 3, 4, 6, 7, 8]);
    for seq in 9..12 {
        add(&mut shelf, seq, Wrong, 4_000).unwrap();
    }
    assert_eq!(seqs(&shelf), [1, 4, 7, 9, 10, 11]);
    assert!(matches!(
        add(&mut shelf, 12, Random, 4_000),
        Err(ShelfError::Full(_))
    ));
    add(&mut shelf, 13, Wrong, 4_000).unwrap();
    add(&mut shelf, 14, Wrong, 4_000).unwrap();
    assert_eq!(
        seqs(&shelf),
        [4, 9, 10, 11, 13, 14],
        "the oldest mark makes room for the newest"
    );
    assert_eq!(shelf.evicted(), 7);
    assert!(matches!(
        add(&mut shelf, 15, Wrong, 100_000),
        Err(ShelfError::Full(_))
    ));
    assert_eq!(shelf.len(), 6, "what never fits drops nothing");
}

#[test]
fn a_restart_finds_what_is_whole_and_removes_what_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    {
        let (mut shelf, _) = open(root, 1 << 20);
        for seq in 1..=5 {
            add(&mut shelf, seq, SampleReason::Random, 5_000).unwrap();
        }
        add(&mut shelf, 6, SampleReason::Wrong, 0).unwrap();
    }
    // As a power cut, a full disk or a curious person may leave it.
    fs::write(root.join("7-9.jpg"), b"image without words").unwrap();
    fs::write(root.join("7-8.tmp"), b"half").unwrap();
    fs::write(root.join("7-1.json"), b"{").unwrap();
    fs::remove_file(root.join("7-2.jpg")).unwrap();
    fs::write(root.join("7-3.jpg"), b"cut").unwrap();
    fs::copy(root.join("7-4.json"), root.join("7-44.json")).unwrap();
    fs::write(root.join("README"), b"not ours").unwrap();
    let (shelf, damaged) = open(root, 1 << 20);
    assert_eq!((seqs(&shelf), damaged), (vec![4, 5, 6], 4));
    let mut left: Vec<_> = fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(
        left,
        [
            "7-4.jpg", "7-4.json", "7-5.jpg", "7-5.json", "7-6.json", "README"
        ]
    );
    // A lower bound is kept at once.
    let (shelf, _) = open(root, 9_000);
    assert_eq!(seqs(&shelf), [6]);
}

#[test]
fn a_sample_that_was_marked_while_it_travelled_travels_again() {
    let folder = tempfile::tempdir().unwrap();
    let (mut shelf, _) = open(folder.path(), 1 << 20);
    add(&mut shelf, 1, SampleReason::Uncertain, 5_000).unwrap();
    let travelling = shelf.next(&BTreeSet::new()).unwrap();
    add(&mut shelf, 1, SampleReason::Wrong, 5_000).unwrap();
    let bytes = shelf.bytes();
    shelf.done(&travelling);
    let again = shelf.next(&BTreeSet::new()).unwrap();
    assert_eq!((again.reason, shelf.len()), (SampleReason::Wrong, 1));
    assert_eq!(bytes, travelling.bytes, "it is counted once");
    shelf.done(&again);
    assert_eq!((shelf.len(), shelf.bytes()), (0, 0));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_sample_that_nobody_would_take_is_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (mut shelf, _) = open(folder.path(), 1 << 20);
    let mut bad = sample(1, SampleReason::Random, b"x");
    bad.score = 2.0;
    assert!(shelf.add(&bad, Some(b"x")).is_err());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever happens: the bound holds, the books are right, and a restart changes nothing.
    #[test]
    fn the_books_are_right(steps in prop::collection::vec((0usize..5, 0usize..20_000, 0u8..6), 1..60)) {
        let folder = tempfile::tempdir().unwrap();
        let max = 100_000;
        let (mut shelf, _) = open(folder.path(), max);
        for (seq, (reason, bytes, what)) in steps.into_iter().enumerate() {
            match what {
                0 => if let Some(item) = shelf.next(&BTreeSet::new()) {
                    shelf.done(&item);
                },
                1 => {
                    let before = (seqs(&shelf), shelf.bytes());
                    let (again, damaged) = open(folder.path(), max);
                    prop_assert_eq!((seqs(&again), again.bytes(), damaged), (before.0, before.1, 0));
                    shelf = again;
                }
                _ => {
                    let _ = add(&mut shelf, seq as u64 / 2 + 1, SampleReason::ALL[reason], bytes);
                }
            }
            prop_assert!(shelf.bytes() <= max);
            let sum: u64 = shelf.items.values().map(|i| i.bytes).sum();
            prop_assert_eq!(sum, shelf.bytes());
        }
    }
}

/// Every byte of every file in a folder, half-written ones with them.
fn bytes_of(folder: &Path) -> Vec<u8> {
    let files = fs::read_dir(folder).unwrap();
    files
        .flat_map(|f| fs::read(f.unwrap().path()).unwrap())
        .collect()
}

#[test]
fn what_is_erased_is_in_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let (mut shelf, _) = open(folder.path(), 1 << 20);
    let planted = |seq: u64| format!("planted picture {seq} ").repeat(9).into_bytes();
    for seq in 1..=5 {
        let image = planted(seq);
        let mut sample = sample(seq, SampleReason::Wrong, &image);
        sample.ts = 100 * seq.cast_signed();
        sample.file = Some(format!("name-of-{seq}"));
        shelf.add(&sample, Some(&image)).unwrap();
    }
    let there = |seq: u64| {
        let all = bytes_of(folder.path());
        let has = |what: &[u8]| all.windows(what.len()).any(|w| w == what);
        (has(&planted(seq)), has(format!("name-of-{seq}").as_bytes()))
    };
    assert_eq!(there(3), (true, true));
    // Half-written, as a power cut leaves it.
    fs::write(folder.path().join("7-3.tmp"), planted(3)).unwrap();
    let one = Gone::One { epoch: 7, seq: 3 };
    let between = Gone::Between { from: 100, to: 200 };
    assert_eq!(shelf.erase(&[one, between]).unwrap(), 3);
    for seq in 1..=3 {
        assert_eq!(there(seq), (false, false), "{seq}");
    }
    assert_eq!((seqs(&shelf), there(4)), (vec![4, 5], (true, true)));
    // One that was on its way to the shelf does not come; another does.
    let late = |seq, ts| {
        let mut sample = sample(seq, SampleReason::Wrong, &planted(seq));
        sample.ts = ts;
        sample
    };
    let error = shelf.add(&late(3, 900), Some(&planted(3))).unwrap_err();
    assert!(matches!(error, ShelfError::Erased), "{error}");
    assert!(shelf.add(&late(9, 150), Some(&planted(9))).is_err());
    assert!(shelf.add(&late(9, 900), Some(&planted(9))).is_ok());
    assert_eq!(shelf.erase(&[Gone::All]).unwrap(), 3);
    assert_eq!((shelf.len(), shelf.bytes()), (0, 0));
    assert!(bytes_of(folder.path()).is_empty());
    // Again, with nothing left; and what comes now is new.
    assert_eq!(shelf.erase(&[Gone::All]).unwrap(), 0);
    assert!(shelf.add(&late(3, 900), Some(&planted(3))).is_ok());
}

#[test]
fn a_sealed_shelf_shows_nothing_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let seal = Seal::with(&[7; 32]).unwrap();
    let open = |seal: Seal| Shelf::open(folder.path().to_owned(), 1 << 20, 7, seal).unwrap();
    let image = b"a picture that nobody is to see".repeat(10);
    let (mut shelf, _) = open(Seal::none());
    shelf
        .add(&sample(1, SampleReason::Wrong, &image), Some(&image))
        .unwrap();
    drop(shelf);
    // From now on there is a key; what was there before stays readable.
    let (mut shelf, damaged) = open(seal.clone());
    assert_eq!((shelf.len(), damaged), (1, 0));
    shelf
        .add(&sample(2, SampleReason::Wrong, &image), Some(&image))
        .unwrap();
    drop(shelf);
    let (shelf, damaged) = open(seal);
    assert_eq!((shelf.len(), damaged), (2, 0));
    for seq in [1, 2] {
        let key = Key { epoch: 7, seq };
        assert_eq!(shelf.image(key).unwrap(), image);
        let json = shelf.json(key).unwrap();
        assert_eq!(Sample::decode(&json).unwrap().seq, seq);
    }
    for kind in ["json", "jpg"] {
        let bytes = fs::read(folder.path().join(format!("7-2.{kind}"))).unwrap();
        let plain = [&b"picture"[..], b"seq"];
        assert!(
            !plain
                .iter()
                .any(|p| bytes.windows(p.len()).any(|w| w == *p))
        );
    }
}

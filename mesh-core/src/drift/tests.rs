use alloc::vec;

use proptest::prelude::*;

use super::*;

const DIM: usize = 16;

fn window() -> Window {
    Window {
        frames: 500,
        length_ms: 600_000,
        every_ms: 600_000,
    }
}

fn limits() -> Limits {
    Limits {
        unknown: 0.2,
        scores: 0.25,
        embedding: 0.5,
        novelty: 1.0,
        dark: 0.06,
        bright: 0.94,
        blurred: 0.3,
        blocked: 0.02,
        frozen: 0.95,
    }
}

fn yardstick() -> Yardstick {
    let mut scores = vec![0.0; 10];
    (scores[7], scores[8], scores[9]) = (0.1, 0.3, 0.6);
    Yardstick {
        samples: 2_000,
        mean: vec![1.0; DIM],
        deviation: vec![2.0; DIM],
        scores,
        unknown: 0.05,
    }
}

/// A source whose frames are drawn as training's were, until something is changed about it.
struct Scene {
    seed: u64,
    now_ms: u64,
    away: f32,
    unknown: f32,
    novelty: f32,
    looks: Looks,
}

impl Scene {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            now_ms: 0,
            away: 0.0,
            unknown: 0.05,
            novelty: 0.5,
            looks: Looks {
                brightness: 0.5,
                contrast: 0.2,
                detail: 0.01,
                change: Some(0.01),
            },
        }
    }

    fn random(&mut self) -> f32 {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 40) as f32 / (1u64 << 24) as f32
    }

    /// So many frames, ten a second; everything that was found.
    fn show(&mut self, watch: &mut Watch, frames: u32) -> Vec<Finding> {
        let mut found = Vec::new();
        for _ in 0..frames {
            self.now_ms += 100;
            // The sum of twelve even numbers has a deviation of one.
            let embedding: Vec<f32> = (0..DIM)
                .map(|_| {
                    let even: f32 = (0..12).map(|_| self.random()).sum();
                    1.0 + 2.0 * (even - 6.0 + self.away)
                })
                .collect();
            let score = match self.random() {
                r if r < 0.1 => 0.75,
                r if r < 0.4 => 0.85,
                _ => 0.95,
            };
            let seen = Seen {
                unknown: self.random() < self.unknown,
                score,
                embedding: &embedding,
                novelty: Some(self.novelty * (0.5 + self.random())),
                looks: self.looks,
            };
            found.extend(watch.see(&seen, self.now_ms));
        }
        found
    }
}

#[test]
fn each_sign_goes_up_and_comes_down() {
    type Change = fn(&mut Scene);
    let cases: [(Sign, Change); 8] = [
        (Sign::Unknown, |s| s.unknown = 0.4),
        (Sign::Embedding, |s| s.away = 0.8),
        (Sign::Novelty, |s| s.novelty = 1.5),
        (Sign::Dark, |s| s.looks.brightness = 0.03),
        (Sign::Bright, |s| s.looks.brightness = 0.98),
        (Sign::Blurred, |s| s.looks.detail = 0.001),
        (Sign::Blocked, |s| s.looks.contrast = 0.005),
        (Sign::Frozen, |s| s.looks.change = Some(0.0)),
    ];
    for (sign, change) in cases {
        let mut watch = Watch::new(window(), limits(), Some(yardstick()));
        let mut scene = Scene::new(7);
        let before = scene.show(&mut watch, 1_000);
        assert!(
            !before.is_empty() && before.iter().all(|f| f.signs.is_empty()),
            "{sign:?}: {before:?}"
        );
        let good = scene.looks;
        change(&mut scene);
        let during = scene.show(&mut watch, 1_000);
        assert_eq!(watch.signs(), [sign], "{during:?}");
        assert_eq!(during.iter().filter(|f| f.changed).count(), 1);
        let well = Scene::new(0);
        (scene.looks, scene.away) = (good, 0.0);
        (scene.unknown, scene.novelty) = (well.unknown, well.novelty);
        scene.show(&mut watch, 1_000);
        assert_eq!(watch.signs(), [], "{sign:?} comes down");
    }
}

#[test]
fn other_scores_are_noticed() {
    let mut other = yardstick();
    (other.scores[2], other.scores[9]) = (0.6, 0.0);
    let mut watch = Watch::new(window(), limits(), Some(other));
    Scene::new(3).show(&mut watch, 500);
    assert_eq!(watch.signs(), [Sign::Scores]);
}

/// A picture's health needs no reference; what needs one is not told.
#[test]
fn without_a_reference_only_the_picture_is_judged() {
    let mut watch = Watch::new(window(), limits(), None);
    let mut scene = Scene::new(1);
    (scene.away, scene.unknown, scene.novelty) = (9.0, 1.0, 9.0);
    let found = scene.show(&mut watch, 500);
    let last = found.last().unwrap();
    assert_eq!(last.signs, []);
    assert_eq!(
        (
            last.numbers.shift,
            last.numbers.scores,
            last.numbers.novelty
        ),
        (None, None, None)
    );
    scene.looks.brightness = 0.01;
    scene.show(&mut watch, 500);
    assert_eq!(watch.signs(), [Sign::Dark]);
    watch.measure_by(Some(yardstick()));
    scene.show(&mut watch, 200);
    assert!(watch.signs().contains(&Sign::Embedding));
}

#[test]
fn while_nothing_changes_little_is_said() {
    let mut watch = Watch::new(window(), limits(), Some(yardstick()));
    // Two hours.
    let found = Scene::new(5).show(&mut watch, 72_000);
    assert!((11..=13).contains(&found.len()), "{}", found.len());
    assert!(found.iter().all(|f| !f.changed && f.numbers.frames <= 500));
}

#[test]
fn what_is_long_ago_does_not_count() {
    let mut watch = Watch::new(window(), limits(), Some(yardstick()));
    let mut scene = Scene::new(5);
    scene.looks.brightness = 0.0;
    scene.show(&mut watch, 400);
    scene.now_ms += 24 * 3_600_000;
    scene.looks.brightness = 0.5;
    scene.show(&mut watch, 100);
    assert_eq!(watch.signs(), []);
}

#[test]
fn as_it_travels() {
    let finding = Finding {
        signs: vec![Sign::Embedding, Sign::Dark],
        numbers: Numbers {
            frames: 500,
            shift: Some(0.75),
            novelty: Some(f32::NAN),
            brightness: 0.03,
            contrast: 0.1,
            still: 0.0,
            ..Numbers::default()
        },
        changed: true,
    };
    let (device, source): (Name, Name) = ("d1".parse().unwrap(), "cam0".parse().unwrap());
    let drift = Drift::of(device.clone(), source.clone(), 5, "m@1".into(), &finding);
    let bytes = drift.encode().unwrap();
    assert_eq!(
        core::str::from_utf8(&bytes).unwrap(),
        r#"{"v":1,"device":"d1","source":"cam0","ts":5,"model":"m@1","frames":500,"state":"drift","names":"embedding,dark","shift":0.75,"brightness":0.03,"contrast":0.1,"still":0.0}"#
    );
    let back = Drift::decode(&bytes, &device, &source).unwrap();
    assert_eq!(back, drift);
    assert_eq!(back.signs().collect::<Vec<_>>(), finding.signs);
    assert!(Drift::decode(&bytes, &source, &source).is_err());
    assert!(Drift::decode(b"{\"v\":1}", &device, &source).is_err());
}

use crate::Name;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Chance alone raises nothing, whatever the dice and the number of frames in the window.
    #[test]
    fn chance_is_no_drift(seed in any::<u64>(), frames in 100u32..600) {
        let mut watch = Watch::new(Window { frames, ..window() }, limits(), Some(yardstick()));
        let found = Scene::new(seed).show(&mut watch, 1_500);
        prop_assert!(found.iter().all(|f| f.signs.is_empty()), "{:?}", found);
    }

    /// A number that wavers about its limit by less than the gap moves its sign at most once.
    #[test]
    fn signs_do_not_flap(values in prop::collection::vec(0.81f32..1.0, 2..100), limit in 0.01f32..10.0) {
        for high_is_bad in [true, false] {
            let (mut up, mut moves) = (false, 0);
            for value in &values {
                let value = if high_is_bad { limit * value * 1.2 } else { limit / (value * 1.2) };
                let now = latch(up, value, limit, high_is_bad);
                moves += u32::from(now != up);
                up = now;
            }
            prop_assert!(moves <= 1);
        }
    }

    /// Whatever a model and a camera say, also what is no number: no panic, no growth, only numbers out.
    #[test]
    fn nonsense_is_survived(frames in prop::collection::vec((any::<f32>(), prop::collection::vec(any::<f32>(), 0..20), any::<Option<f32>>(), any::<f32>(), any::<f32>(), any::<u32>()), 0..300)) {
        let small = Window { frames: 50, length_ms: 10_000, every_ms: 0 };
        let mut watch = Watch::new(small, limits(), Some(yardstick()));
        for (score, embedding, novelty, a, b, now) in frames {
            let looks = Looks { brightness: a, contrast: b, detail: a * b, change: novelty };
            let seen = Seen { unknown: a > b, score, embedding: &embedding, novelty, looks };
            if let Some(finding) = watch.see(&seen, u64::from(now)) {
                prop_assert!(finding.numbers.frames <= 50);
                prop_assert!([finding.numbers.shift, finding.numbers.scores].iter().flatten().all(|n| !n.is_nan()));
            }
            prop_assert!(watch.full.len() <= BLOCKS && watch.full.iter().all(|b| b.details.len() <= 10));
        }
    }
}

use std::ops::ControlFlow;

use super::*;
use crate::random::Random;

/// Clusters of `per_class` rows around random centres, features of very different scale.
fn clusters(per_class: &[usize], dim: usize, spread: f64, seed: u64) -> Features {
    let mut random = Random::new(seed);
    let centres: Vec<f64> = (0..per_class.len() * dim)
        .map(|_| random.unit() - 0.5)
        .collect();
    let (mut rows, mut truth) = (Vec::new(), Vec::new());
    for (class, &count) in per_class.iter().enumerate() {
        for _ in 0..count {
            for d in 0..dim {
                // The sum of a few even ones is about a bell.
                let noise: f64 = (0..4).map(|_| random.unit() - 0.5).sum();
                let scale = 10f64.powi(i32::try_from(d % 4).unwrap());
                rows.push(((centres[class * dim + d] + spread * noise) * scale + 3.0) as f32);
            }
            truth.push(class as u32);
        }
    }
    Features::new(dim, per_class.len(), rows, truth, None).unwrap()
}

fn on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn accuracy(head: &Head, features: &Features) -> f64 {
    let right = features
        .rows()
        .chunks_exact(features.dim())
        .zip(features.truth())
        .filter(|(row, truth)| {
            let logits = head.logits(row);
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            best == Some(**truth as usize)
        })
        .count();
    right as f64 / features.len() as f64
}

#[test]
fn learns_clusters_and_says_how() {
    let features = clusters(&[30, 40, 50], 16, 0.3, 1);
    let (mut last, mut steps) = (0, 0);
    let head = train(&features, &Settings::default(), &mut |progress| {
        assert!(progress.step > last && progress.step <= progress.steps);
        (last, steps) = (progress.step, steps + 1);
        on(progress)
    })
    .unwrap();
    assert!(accuracy(&head, &features) > 0.97);
    assert!(steps > 0);
    assert!(head.fold_loss.unwrap() < 0.4, "{:?}", head.fold_loss);
    assert_eq!((head.classes(), head.weight.len()), (3, 48));
    let sum: f32 = head.probabilities(&features.rows()[..16]).iter().sum();
    assert!((sum - 1.0).abs() < 1e-5);
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let features = clusters(&[20, 20], 8, 0.6, 2);
    let settings = Settings::default();
    let bits = |head: &Head| -> Vec<u32> {
        head.weight
            .iter()
            .chain(&head.bias)
            .map(|value| value.to_bits())
            .collect()
    };
    let first = train(&features, &settings, &mut on).unwrap();
    let second = train(&features, &settings, &mut on).unwrap();
    assert_eq!(bits(&first), bits(&second));
    assert_eq!(first, second);
}

#[test]
fn stops_when_told_to() {
    let features = clusters(&[20, 20], 8, 0.6, 3);
    let mut calls = 0;
    let result = train(&features, &Settings::default(), &mut |_| {
        calls += 1;
        if calls == 3 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    assert_eq!((result, calls), (Err(Error::Cancelled), 3));
}

#[test]
fn a_constant_feature_gets_no_weight_to_speak_of() {
    let plain = clusters(&[20, 20], 4, 0.3, 4);
    let rows = plain.rows().iter().enumerate();
    let rows = rows.map(|(at, &x)| {
        if at % 4 == 0 {
            5.0 + (at % 3) as f32 * 1e-5
        } else {
            x
        }
    });
    let features = Features::new(4, 2, rows.collect(), plain.truth().to_vec(), None).unwrap();
    let head = train(&features, &Settings::default(), &mut on).unwrap();
    assert!(head.weight[0].abs() < 0.01, "{}", head.weight[0]);
}

#[test]
fn balance_helps_the_rare_class() {
    let features = clusters(&[300, 12], 2, 1.2, 8);
    let recall = |balanced| {
        let settings = Settings {
            balanced,
            strength: Strength::Given(0.1),
            calibrate: false,
            ..Settings::default()
        };
        let head = train(&features, &settings, &mut on).unwrap();
        let rare = features.rows().chunks_exact(2).skip(300);
        rare.filter(|row| head.logits(row)[1] > head.logits(row)[0])
            .count()
    };
    assert!(
        recall(true) > recall(false),
        "{} {}",
        recall(true),
        recall(false)
    );
}

#[test]
fn a_row_of_weight_nothing_teaches_nothing() {
    let features = clusters(&[20, 20], 4, 0.5, 6);
    let settings = Settings {
        strength: Strength::Given(0.1),
        ..Settings::default()
    };
    let first_ten = |turned: bool, weight: f32| {
        let truth = features.truth().iter().enumerate();
        let truth = truth.map(|(at, &class)| if at < 10 && turned { 1 - class } else { class });
        let rows = features.rows().iter().enumerate();
        // And their features are far off.
        let rows = rows.map(|(at, &x)| if at < 40 && turned { x + 1000.0 } else { x });
        let weights = (0..40)
            .map(|at| if at < 10 { weight } else { 1.0 })
            .collect();
        let table = Features::new(4, 2, rows.collect(), truth.collect(), Some(weights));
        train(&table.unwrap(), &settings, &mut on).unwrap()
    };
    assert_eq!(first_ten(true, 0.0).weight, first_ten(false, 0.0).weight);
    assert_ne!(first_ten(true, 1.0).weight, first_ten(false, 1.0).weight);
}

#[test]
fn a_class_of_one_row_is_learned_too() {
    let features = clusters(&[10, 1, 10], 6, 0.2, 7);
    let head = train(&features, &Settings::default(), &mut on).unwrap();
    assert_eq!(head.classes(), 3);
    // Nothing at all can be held back here.
    let features = clusters(&[1, 1], 6, 0.2, 7);
    let head = train(&features, &Settings::default(), &mut on).unwrap();
    assert_eq!(head.fold_loss, None);
    assert!((head.temperature - 1.0).abs() < 1e-12);
}

#[test]
fn folds_hold_as_much_of_each_class() {
    let features = clusters(&[23, 50, 7], 1, 0.5, 8);
    let fold = folds(&features, 5, 3);
    for (class, rows) in [(0, 23), (1, 50), (2, 7)] {
        let mut counts = [0; 5];
        for (row, fold) in fold.iter().enumerate() {
            if features.truth()[row] == class {
                counts[fold.unwrap()] += 1;
            }
        }
        assert!(
            counts.iter().all(|&n| n == rows / 5 || n == rows / 5 + 1),
            "{counts:?}"
        );
    }
    assert_ne!(fold, folds(&features, 5, 4));
}

#[test]
fn settings_out_of_range_are_named() {
    let features = clusters(&[4, 4], 2, 0.5, 9);
    let words = |settings: Settings| {
        train(&features, &settings, &mut on)
            .unwrap_err()
            .to_string()
    };
    let with = |strength| Settings {
        strength,
        ..Settings::default()
    };
    assert_eq!(
        words(with(Strength::Given(f64::NAN))),
        "setting strength is NaN, expected 1e-8 to 1e4"
    );
    assert_eq!(
        words(with(Strength::Best(vec![]))),
        "setting strength is 0 numbers, expected 1 to 32 numbers"
    );
    assert_eq!(
        words(Settings {
            folds: 1,
            ..Settings::default()
        }),
        "setting folds is 1, expected 2 to 20"
    );
}

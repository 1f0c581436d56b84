//! Models that are taken apart say what they say as a whole.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::path::PathBuf;

use models::{Bundle, Cut, Engine, Input, Manifest, Part, Span, Steps, outcome_of};

fn bundle(name: &str) -> Bundle {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("bundles");
    Bundle::open(&folder.join(name)).unwrap()
}

/// Values like those of a picture.
fn input(engine: &Engine, manifest: &Manifest) -> Input {
    let count: usize = manifest.input.shape.iter().product();
    let value = |n: usize| ((n * 37 % 101) as f32 / 50.0) - 1.0;
    engine.input((0..count).map(value).collect()).unwrap()
}

#[test]
fn parts_one_after_the_other_are_the_whole() {
    for name in ["steel", "backbone", "conveyor", "steel-small"] {
        let bundle = bundle(name);
        let (manifest, model) = (&bundle.manifest, bundle.model_bytes().unwrap());
        let engine = Engine::load(&bundle).unwrap();
        let steps = Steps::of(manifest, &model).unwrap();
        let count = steps.0.len();
        println!("{name}: {count} steps");
        assert!(count >= 3, "{name} has {count} steps");
        assert!(steps.0[count - 1].cut.is_none());
        let stored: u64 = steps.0.iter().map(|step| step.weights).sum();
        assert!(
            stored <= model.len() as u64,
            "{name}: {stored} bytes of weights"
        );
        assert!(
            stored * 10 > model.len() as u64 * 8,
            "{name}: {stored} bytes of weights"
        );
        let input = input(&engine, manifest);
        let whole = engine.run(&input).unwrap();
        // In two at each cut, in three, and in all there are.
        let mut ways: Vec<Vec<usize>> = (1..count).map(|at| vec![0, at, count]).collect();
        ways.push(vec![0, count / 3, 2 * count / 3, count]);
        ways.push((0..=count).collect());
        for way in ways {
            let mut values = vec![input.values().to_vec()];
            for ends in way.windows(2) {
                let span = steps.span(ends[0], ends[1]).unwrap();
                assert_eq!(steps.bounds(&span), Some((ends[0], ends[1])));
                let part = Part::load(manifest, &model, &span).unwrap();
                assert_eq!(values.len(), 1);
                assert_eq!(part.takes(), values[0].len());
                values = part.run(values.remove(0)).unwrap();
            }
            let outcome = outcome_of(manifest, values).unwrap();
            assert_eq!(outcome.label, whole.label, "{name}, {way:?}");
            let same = |a: &[f32], b: &[f32]| {
                a.len() == b.len()
                    && a.iter()
                        .zip(b)
                        .all(|(a, b)| (a - b).abs() <= 1e-4 * (1.0 + b.abs()))
            };
            assert!(same(&outcome.scores, &whole.scores), "{name}, {way:?}");
            assert!(
                same(&outcome.embedding, &whole.embedding),
                "{name}, {way:?}"
            );
        }
    }
}

#[test]
fn what_is_no_cut_of_this_model_is_refused() {
    let bundle = bundle("steel-small");
    let (manifest, model) = (&bundle.manifest, bundle.model_bytes().unwrap());
    let steps = Steps::of(manifest, &model).unwrap();
    let good = steps.0[0].cut.clone().unwrap();
    let changed = |change: &dyn Fn(&mut Cut)| {
        let mut cut = good.clone();
        change(&mut cut);
        cut
    };
    let wrong = [
        changed(&|cut| cut.value = "nothing of this name".into()),
        changed(&|cut| cut.value = manifest.input.name.clone()),
        changed(&|cut| cut.value = "x".repeat(10_000)),
        changed(&|cut| cut.shape.push(2)),
        changed(&|cut| cut.shape = vec![usize::MAX, 3]),
        changed(&|cut| cut.shape = vec![0]),
        changed(&|cut| cut.shape = vec![1; 100]),
    ];
    for cut in wrong {
        let to = Span {
            from: None,
            to: Some(cut.clone()),
        };
        assert_eq!(steps.bounds(&to), None);
        assert!(Part::load(manifest, &model, &to).is_err(), "to {cut:?}");
        let from = Span {
            from: Some(cut.clone()),
            to: None,
        };
        assert!(Part::load(manifest, &model, &from).is_err(), "from {cut:?}");
    }
    // Backwards, and nothing at all.
    let last = steps.0[steps.0.len() - 2].cut.clone();
    for span in [
        Span {
            from: last.clone(),
            to: Some(good.clone()),
        },
        Span {
            from: Some(good.clone()),
            to: Some(good.clone()),
        },
    ] {
        assert_eq!(steps.bounds(&span), None);
        assert!(Part::load(manifest, &model, &span).is_err(), "{span:?}");
    }
    assert_eq!(steps.span(2, 2), None);
    // A part takes what it takes.
    let part = Part::load(manifest, &model, &steps.span(1, 2).unwrap()).unwrap();
    assert!(part.run(vec![0.0; part.takes() + 1]).is_err());
}

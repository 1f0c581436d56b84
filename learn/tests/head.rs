//! From pictures to a model file with a new head, by the way that users take: embed, train, write, load, prove.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use learn::{
    evaluate::evaluate,
    features::Features,
    gate::{Answers, Cost, Holdout, Policy, judge},
    head::{Head, Settings, train},
    surgery::{SurgeryError, verify, with_head},
};
use models::{Bundle, Engine, Input, Picture};

fn backbone() -> Bundle {
    let bundles = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles");
    Bundle::open(&bundles.join("backbone")).unwrap()
}

fn learn_head(features: &Features) -> Head {
    train(features, &Settings::default(), &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap()
}

/// A bundle on disk with the model's bytes and a manifest that fits them.
fn write(dir: &Path, model: &[u8], labels: &[String]) -> Bundle {
    let from = backbone();
    let digest = sha256(model, dir);
    let input = &from.manifest.input;
    let manifest = format!(
        "schema = 1\nname = \"tried\"\nversion = \"1\"\ntask = \"classify\"\ndescription = \"a test\"\n\
         [model]\nfile = \"model.onnx\"\nsha256 = \"{digest}\"\nbytes = {}\n\
         [input]\nname = \"image\"\nshape = {:?}\nlayout = \"nchw\"\ncolor = \"rgb\"\nresize = \"stretch\"\n\
         filter = \"bilinear\"\nmean = {:?}\nstd = {:?}\n\
         [output]\nscores = \"logits\"\nactivation = \"softmax\"\nembedding = \"embedding\"\n\
         embedding_dim = {}\nlabels = {labels:?}\n\
         [budget]\nlatency_ms = 250\nmemory_mib = 64\n\
         [[golden]]\nimage = \"golden.png\"\nlabel = {:?}\nscores = {:?}\ntolerance = 1.0\n\
         embedding_tolerance = 1.0\n",
        model.len(),
        input.shape,
        input.mean,
        input.std,
        from.manifest.output.embedding_dim,
        labels[0],
        vec![0.5; labels.len()],
    );
    fs::write(dir.join("manifest.toml"), manifest).unwrap();
    fs::copy(from.dir().join("golden/1.png"), dir.join("golden.png")).unwrap();
    Bundle::open(dir).unwrap()
}

/// The digest that the bundle itself computes: it names it in the refusal of a wrong one.
fn sha256(model: &[u8], dir: &Path) -> String {
    fs::write(dir.join("model.onnx"), model).unwrap();
    let from = fs::read_to_string(backbone().dir().join("manifest.toml")).unwrap();
    let length = format!("bytes = {}", model.len());
    let old = format!("bytes = {}", backbone().manifest.model.bytes);
    fs::write(dir.join("manifest.toml"), from.replace(&old, &length)).unwrap();
    match Bundle::open(dir) {
        Err(models::BundleError::Differs { found, .. }) => found,
        Err(other) => panic!("{other}"),
        Ok(bundle) => bundle.manifest.model.sha256,
    }
}

/// Stripes, checks or blobs of a size and colour that vary with `number`.
fn drawn(kind: u32, number: u32) -> Picture {
    let mut noise = number.wrapping_mul(2_654_435_761) ^ kind;
    let mut pixels = Vec::new();
    let period = 4 + number % 9;
    for y in 0..64u32 {
        for x in 0..64u32 {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let on = match kind {
                0 => (x / period).is_multiple_of(2),
                1 => (x / period + y / period).is_multiple_of(2),
                _ => (x % (2 * period)).pow(2) + (y % (2 * period)).pow(2) < period * period,
            };
            let base = if on { 170 } else { 60 };
            let value = u8::try_from(base + (noise >> 27)).unwrap();
            pixels.extend([
                value,
                value.saturating_sub(u8::try_from(number % 40).unwrap()),
                value,
            ]);
        }
    }
    Picture::from_rgb(64, 64, pixels).unwrap()
}

#[test]
fn a_new_head_answers_in_the_engine_as_it_did_in_training() {
    let labels: Vec<String> = ["stripes", "checks", "blobs"].map(String::from).to_vec();
    let before = backbone();
    let engine = Engine::load(&before).unwrap();
    let (mut rows, mut truth, mut inputs) = (Vec::new(), Vec::new(), Vec::<Input>::new());
    let (mut held, mut held_truth) = (Vec::<Input>::new(), Vec::new());
    for number in 0..25 {
        for kind in 0..3 {
            let input = engine.tensor(&drawn(kind, number)).unwrap();
            if number % 5 == 0 {
                held.push(input);
                held_truth.push(kind);
            } else {
                rows.extend(engine.run(&input).unwrap().embedding);
                truth.push(kind);
                inputs.push(input);
            }
        }
    }
    let dim = before.manifest.output.embedding_dim;
    let head = learn_head(&Features::new(dim, 3, rows, truth, None).unwrap());
    let model = before.model_bytes().unwrap();
    let bytes = with_head(&model, "embedding", "logits", &head).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let after = Engine::load(&write(dir.path(), &bytes, &labels)).unwrap();
    let most = verify(&engine, &after, &head, &inputs).unwrap();
    println!("largest difference {most:e}");
    // Another head is not the one in the file.
    let mut other = head.clone();
    other.bias[1] += 1.0;
    assert!(matches!(
        verify(&engine, &after, &other, &inputs),
        Err(SurgeryError::Differs { what: "logit", .. })
    ));
    assert!(verify(&engine, &after, &head, &[]).is_err());
    let probabilities: Vec<f32> = held
        .iter()
        .flat_map(|input| after.run(input).unwrap().scores)
        .collect();
    let result = evaluate(&held_truth, &probabilities, &labels).unwrap();
    assert!(result.accuracy >= 0.9, "{result:?}");
    // Fifteen held-back frames convince nobody.
    let answers = Answers {
        labels: &labels,
        probabilities: &probabilities,
    };
    let holdout = Holdout {
        labels: &labels,
        truth: &held_truth,
        leaked: 0,
        judged: 0,
    };
    let cost = Cost {
        latency_ms: 1.0,
        allowed_latency_ms: 2.0,
        memory_mib: 1.0,
        allowed_memory_mib: 2.0,
    };
    let verdict = judge(&holdout, &answers, &answers, &cost, &Policy::default()).unwrap();
    assert!(!verdict.pass);
}

fn data() -> PathBuf {
    std::env::var_os("LACEWING_DATASETS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"),
        PathBuf::from,
    )
}

/// Real photographs of six defects: at most forty of each class to learn from, every fifth held back.
#[test]
fn forty_photographs_of_each_defect_are_enough() {
    const PER_CLASS: usize = 40;
    let steel = data().join("steel");
    let Ok(folders) = fs::read_dir(&steel) else {
        println!("skipped: no photographs in {}", steel.display());
        return;
    };
    let mut folders: Vec<PathBuf> = folders.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    let engine = Engine::load(&backbone()).unwrap();
    let embed = |path: &Path| {
        let input = engine.tensor_from_bytes(&fs::read(path).unwrap()).unwrap();
        engine.run(&input).unwrap().embedding
    };
    let (mut rows, mut truth, mut held, mut held_truth) = (vec![], vec![], vec![], vec![]);
    let mut labels = Vec::new();
    for (class, folder) in (0u32..).zip(&folders) {
        let name = folder.file_name().unwrap().to_str().unwrap();
        labels.push(name.to_owned());
        let mut taught = 0;
        for number in 1..=220 {
            let path = folder.join(format!("{name}_{number}.jpg"));
            if !path.exists() {
                continue;
            }
            if number % 5 == 0 {
                held.push(embed(&path));
                held_truth.push(class);
            } else if taught < PER_CLASS {
                rows.extend(embed(&path));
                truth.push(class);
                taught += 1;
            }
        }
    }
    let dim = engine.manifest().output.embedding_dim;
    let head = learn_head(&Features::new(dim, labels.len(), rows, truth, None).unwrap());
    let probabilities: Vec<f32> = held
        .iter()
        .flat_map(|row| head.probabilities(row))
        .collect();
    let result = evaluate(&held_truth, &probabilities, &labels).unwrap();
    println!(
        "{} held back: accuracy {:.4}, ECE {:.4}, strength {}, temperature {:.2}",
        result.rows, result.accuracy, result.ece, head.strength, head.temperature
    );
    assert!(result.accuracy >= 0.95, "{:?}", result.confusion);
    assert!(result.ece <= 0.05, "{}", result.ece);
}

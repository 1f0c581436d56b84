//! Training as a whole, on a toy: which half of the picture is brighter, and where the edge runs.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may fail")]

use std::ops::ControlFlow;

use learn::tune::{
    Augment, Batch, Data, Graph, Optimiser, Settings, Train, TuneError, estimate, train,
};
use prost::Message;
use tract_onnx::pb::ModelProto;

/// A model with a head of six classes, for pictures of 16 × 16.
fn steel() -> Vec<u8> {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../models/bundles/steel/model.onnx"
    );
    // Small pictures keep the test short; the graph takes any size.
    let mut model = ModelProto::decode(std::fs::read(folder).unwrap().as_slice()).unwrap();
    let shape = model.graph.as_mut().unwrap().input[0]
        .r#type
        .as_mut()
        .unwrap();
    let Some(tract_onnx::pb::type_proto::Value::TensorType(tensor)) = shape.value.as_mut() else {
        panic!("no shape");
    };
    for dim in &mut tensor.shape.as_mut().unwrap().dim[2..] {
        dim.value = Some(tract_onnx::pb::tensor_shape_proto::dimension::Value::DimValue(16));
    }
    model.encode_to_vec()
}

fn toy(graph: &Graph, count: usize) -> Batch {
    let mut batch = Batch::default();
    let mut state = 1u32;
    for number in 0..count {
        let label = number % 2;
        for at in 0..graph.input_len() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let noise = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
            let bright = (at % 4 < 2) == (label == 0);
            batch
                .pictures
                .push(0.5 * noise + if bright { 0.5 } else { -0.5 });
        }
        batch.labels.push(label as u32);
    }
    batch
}

fn settings() -> Settings {
    Settings {
        epochs: 3,
        batch: 20,
        rate: 0.01,
        warm_up: 2,
        seed: 7,
        ..Settings::default()
    }
}

fn go(graph: &Graph, settings: &Settings, batch: &Batch) -> learn::tune::Tuned {
    train(graph, Data::Memory(batch), settings, &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap()
}

#[test]
fn tune_loss_falls_and_a_seed_decides() {
    let onnx = steel();
    let graph = Graph::read(&onnx, "image", "logits").unwrap();
    let batch = toy(&graph, 50);
    let mut settings = settings();
    let first = go(&graph, &settings, &batch);
    assert_eq!(first.losses.len(), 9);
    assert!(
        first.losses[8] < 0.5 * first.losses[0],
        "{:?}",
        first.losses
    );
    // The number of threads does not matter, the seed does.
    settings.threads = 3;
    assert_eq!(go(&graph, &settings, &batch).onnx, first.onnx);
    settings.seed = 8;
    assert_ne!(go(&graph, &settings, &batch).onnx, first.onnx);
}

#[test]
fn tune_the_file_keeps_its_graph_and_what_is_frozen() {
    let onnx = steel();
    let graph = Graph::read(&onnx, "image", "logits").unwrap();
    let batch = toy(&graph, 24);
    let settings = Settings {
        train: Train::LastBlocks(2),
        ..settings()
    };
    let tuned = go(&graph, &settings, &batch);
    let (mut old, mut new) = (
        ModelProto::decode(onnx.as_slice()).unwrap().graph.unwrap(),
        ModelProto::decode(tuned.onnx.as_slice())
            .unwrap()
            .graph
            .unwrap(),
    );
    let pairs = old.initializer.iter().zip(&new.initializer);
    let changed: Vec<_> = pairs
        .filter(|(a, b)| a != b)
        .map(|(a, _)| a.name.clone())
        .collect();
    assert_eq!(
        changed,
        ["unit6.weight", "unit6.bias", "head.weight", "head.bias"]
    );
    old.initializer.clear();
    new.initializer.clear();
    assert_eq!(old, new);
}

#[test]
fn tune_cached_activations_train_as_whole_pictures_do() {
    let onnx = steel();
    let graph = Graph::read(&onnx, "image", "logits").unwrap();
    let batch = toy(&graph, 24);
    for count in [1, 3] {
        let settings = Settings {
            train: Train::LastBlocks(count),
            batch: 24,
            ..settings()
        };
        let kept = go(&graph, &settings, &batch);
        // An augmentation that does nothing keeps the cache away.
        let nothing = Augment {
            mirror: false,
            shift: 0,
            light: 0.0,
        };
        let whole = go(
            &graph,
            &Settings {
                augment: Some(nothing),
                ..settings
            },
            &batch,
        );
        assert_eq!(kept.onnx, whole.onnx, "{count}");
    }
}

#[test]
fn tune_adam_and_streams_and_augmentation_learn_too() {
    let onnx = steel();
    let graph = Graph::read(&onnx, "image", "logits").unwrap();
    let batch = toy(&graph, 24);
    let settings = Settings {
        optimiser: Optimiser::AdamW {
            betas: (0.9, 0.999),
        },
        rate: 0.002,
        smoothing: 0.05,
        epochs: 8,
        ..settings()
    };
    let mut next = |_| batch.clone();
    let data = Data::Stream {
        steps: 1,
        next: &mut next,
    };
    let tuned = train(&graph, data, &settings, &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(
        tuned.losses[7] < 0.7 * tuned.losses[0],
        "{:?}",
        tuned.losses
    );
    let augment = Augment {
        mirror: false,
        shift: 0,
        light: 0.1,
    };
    let tuned = go(
        &graph,
        &Settings {
            augment: Some(augment),
            ..settings
        },
        &batch,
    );
    assert!(
        tuned.losses.last() < tuned.losses.first(),
        "{:?}",
        tuned.losses
    );
}

#[test]
fn tune_it_stops_and_refuses() {
    let onnx = steel();
    let graph = Graph::read(&onnx, "image", "logits").unwrap();
    let mut batch = toy(&graph, 24);
    let mut seen = 0;
    let stopped = train(&graph, Data::Memory(&batch), &settings(), &mut |progress| {
        seen += 1;
        assert_eq!(
            (
                progress.epoch,
                progress.epochs,
                progress.step,
                progress.steps
            ),
            (0, 3, 1, 2)
        );
        ControlFlow::Break(())
    });
    assert!(matches!(stopped, Err(TuneError::Stopped)));
    assert_eq!(seen, 1);
    assert!(estimate(&graph, &settings(), 24).unwrap() > 1 << 20);
    for wrong in [
        Settings {
            epochs: 0,
            ..settings()
        },
        Settings {
            rate: f32::NAN,
            ..settings()
        },
        Settings {
            train: Train::LastBlocks(9),
            ..settings()
        },
        Settings {
            smoothing: 1.0,
            ..settings()
        },
    ] {
        assert!(
            matches!(estimate(&graph, &wrong, 24), Err(TuneError::Settings(_))),
            "{wrong:?}"
        );
    }
    let go = |batch: &Batch, settings: &Settings| {
        train(&graph, Data::Memory(batch), settings, &mut |_| {
            ControlFlow::Continue(())
        })
    };
    let high = Settings {
        rate: 1e20,
        ..settings()
    };
    assert!(matches!(go(&batch, &high), Err(TuneError::Diverged(_))));
    batch.labels[3] = 6;
    assert!(matches!(go(&batch, &settings()), Err(TuneError::Data(_))));
    batch.labels.pop();
    assert!(matches!(go(&batch, &settings()), Err(TuneError::Data(_))));
    assert!(matches!(
        Graph::read(&onnx, "image", "nothing"),
        Err(TuneError::Missing(_))
    ));
    assert!(matches!(
        Graph::read(b"nonsense", "image", "logits"),
        Err(TuneError::Unreadable(_))
    ));
    let mut model = ModelProto::decode(onnx.as_slice()).unwrap();
    model.graph.as_mut().unwrap().node[1].op_type = "Tan".into();
    let error = Graph::read(&model.encode_to_vec(), "image", "logits")
        .unwrap_err()
        .to_string();
    assert_eq!(error, "Tan unit0.out: this operator cannot be trained");
}

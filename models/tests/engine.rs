//! Loading and running: what a good model says, and what becomes of hostile ones.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may fail"
)]

mod common;

use common::{MANIFEST, SIDE, bundle, bundle_of, floats, graph, int, ints, model, node, value};
use models::{Bundle, Engine, EngineError, Picture, self_test};
use prost::Message;
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto,
    tensor_proto::{DataLocation, DataType},
};

fn solid(color: [u8; 3]) -> Picture {
    Picture::from_rgb(20, 30, color.repeat(600)).unwrap()
}

/// Why this model is refused.
fn refusal(change: impl FnOnce(&mut ModelProto)) -> String {
    let (_dir, bundle) = bundle(change);
    Engine::load(&bundle)
        .expect_err("must be refused")
        .to_string()
}

fn with_manifest(from: &str, to: &str) -> Result<Engine, EngineError> {
    assert!(MANIFEST.contains(from));
    let (_dir, bundle) = bundle_of(&MANIFEST.replace(from, to), &model().encode_to_vec());
    Engine::load(&bundle.unwrap())
}

#[test]
fn it_says_what_the_picture_shows() {
    let (_dir, bundle) = bundle(|_| ());
    let engine = Engine::load(&bundle).unwrap();
    assert_eq!(engine.id(), "colour@1.0.0");
    let outcome = engine.infer(&solid([0, 255, 0])).unwrap();
    assert_eq!((outcome.label.as_str(), outcome.class), ("green", Some(1)));
    assert!((outcome.score - 0.964_663).abs() < 1e-5, "{outcome:?}");
    assert!((outcome.margin - (outcome.score - outcome.scores[0])).abs() < 1e-6);
    assert_eq!(outcome.embedding.len(), 3);
    let gray = engine.infer(&solid([90, 90, 90])).unwrap();
    assert_eq!((gray.label.as_str(), gray.class), ("unknown", Some(0)));
    assert_eq!(gray.margin, 0.0);
}

#[test]
fn the_same_input_gives_the_same_bytes_from_any_thread() {
    let (_dir, bundle) = bundle(|_| ());
    let engine = Engine::load(&bundle).unwrap();
    let picture = Picture::from_rgb(
        33,
        21,
        (0..33 * 21 * 3).map(|i| (i * 7 % 251) as u8).collect(),
    )
    .unwrap();
    let expected = engine.infer(&picture).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                (0..20).for_each(|_| assert_eq!(engine.infer(&picture).unwrap(), expected))
            });
        }
    });
}

#[test]
fn self_test_passes_and_names_what_differs() {
    let (_dir, bundle) = bundle(|_| ());
    let engine = Engine::load(&bundle).unwrap();
    let test = self_test(&bundle, &engine);
    assert!(test.passed(), "{test}");

    let wrong = MANIFEST
        .replace("label = \"red\"", "label = \"blue\"")
        .replace("embedding = [1.0", "embedding = [0.5");
    let (_dir, bundle) = bundle_of(&wrong, &model().encode_to_vec());
    let bundle = bundle.unwrap();
    let test = self_test(&bundle, &Engine::load(&bundle).unwrap());
    assert!(!test.passed());
    assert_eq!(test.golden[0].problems.len(), 2);
    let text = test.to_string();
    assert!(
        text.contains("label \"red\", expected \"blue\"") && text.contains("off by 0.5"),
        "{text}"
    );

    let slow = MANIFEST.replace("latency_ms = 10000", "latency_ms = 0.000001");
    let (_dir, bundle) = bundle_of(&slow, &model().encode_to_vec());
    let bundle = bundle.unwrap();
    assert!(!self_test(&bundle, &Engine::load(&bundle).unwrap()).passed());
}

#[test]
fn embedding_only() {
    let text = MANIFEST
        .replace("task = \"classify\"", "task = \"embed\"")
        .replace("scores = \"logits\"\n", "")
        .replace("labels = [\"red\", \"green\", \"blue\"]", "")
        .replace("label = \"red\"", "")
        .replace("scores = [0.964663, 0.0176685, 0.0176685]", "");
    let (_dir, bundle) = bundle_of(&text, &model().encode_to_vec());
    let bundle = bundle.unwrap();
    let engine = Engine::load(&bundle).unwrap();
    let outcome = engine.infer(&solid([255, 0, 51])).unwrap();
    assert_eq!(
        (outcome.label.as_str(), outcome.class, outcome.scores.len()),
        ("embedding", None, 0)
    );
    assert!((outcome.embedding[2] - 0.2).abs() < 1e-5);
    assert!(self_test(&bundle, &engine).passed());
}

#[test]
fn layouts_and_gray() {
    // The same model behind a transposition, fed rows of pixels.
    let mut nhwc = model();
    let graph = graph(&mut nhwc);
    let mut transpose = node("Transpose", &["image"], "planes");
    transpose.attribute.push(AttributeProto {
        name: "perm".into(),
        ints: vec![0, 3, 1, 2],
        r#type: 7,
        ..AttributeProto::default()
    });
    graph.input = vec![value("image", &[1, SIDE, SIDE, 3])];
    graph.node[0].input[0] = "planes".into();
    graph.node.insert(0, transpose);
    let text = MANIFEST
        .replace("[1, 3, 16, 16]", "[1, 16, 16, 3]")
        .replace("\"nchw\"", "\"nhwc\"");
    let (_dir, nhwc) = bundle_of(&text, &nhwc.encode_to_vec());
    let (_dir2, nchw) = bundle(|_| ());
    let picture = Picture::from_rgb(
        33,
        21,
        (0..33 * 21 * 3).map(|i| (i * 7 % 251) as u8).collect(),
    )
    .unwrap();
    let (a, b) = (
        Engine::load(&nhwc.unwrap()).unwrap(),
        Engine::load(&nchw).unwrap(),
    );
    let (a, b) = (a.infer(&picture).unwrap(), b.infer(&picture).unwrap());
    assert!(
        a.embedding
            .iter()
            .zip(&b.embedding)
            .all(|(a, b)| (a - b).abs() < 1e-5),
        "{a:?} {b:?}"
    );

    let mut gray = model();
    let graph = common::graph(&mut gray);
    graph.input = vec![value("image", &[1, 1, SIDE, SIDE])];
    graph.initializer = vec![floats("weight", &[3, 1], &[1.0, 2.0, 3.0])];
    graph.output = vec![value("logits", &[1, 3]), value("embedding", &[1, 1])];
    let text = MANIFEST
        .replace("[1, 3, 16, 16]", "[1, 1, 16, 16]")
        .replace("\"rgb\"", "\"gray\"")
        .replace("mean = [0.0, 0.0, 0.0]", "mean = [0.0]")
        .replace("std = [1.0, 1.0, 1.0]", "std = [1.0]")
        .replace("embedding_dim = 3", "embedding_dim = 1")
        .replace("embedding = [1.0, 0.0, 0.0]", "embedding = [0.299]");
    let (_dir, gray) = bundle_of(&text, &gray.encode_to_vec());
    let outcome = Engine::load(&gray.unwrap())
        .unwrap()
        .infer(&solid([255, 0, 0]))
        .unwrap();
    assert!(
        (outcome.embedding[0] - 76.0 / 255.0).abs() < 1e-5,
        "{outcome:?}"
    );
}

#[test]
fn what_the_manifest_says_must_be_so() {
    let refused = |from, to| with_manifest(from, to).expect_err(to).to_string();
    let text = refused("\"image\"", "\"picture\"");
    assert!(
        text.contains("one input \"picture\"") && text.contains("image"),
        "{text}"
    );
    let text = refused("[1, 3, 16, 16]", "[1, 3, 24, 24]");
    assert!(
        text.contains("[1, 3, 16, 16]") && text.contains("24"),
        "{text}"
    );
    let text = refused("\"logits\"", "\"scores\"");
    assert!(
        text.contains("output \"scores\"") && text.contains("logits, embedding"),
        "{text}"
    );
    let labels = MANIFEST
        .replace("\"blue\"]", "\"blue\", \"violet\"]")
        .replace("0.0176685]", "0.0176685, 0.0]");
    let (_dir, bundle) = bundle_of(&labels, &model().encode_to_vec());
    let text = Engine::load(&bundle.unwrap())
        .expect_err("labels")
        .to_string();
    assert!(
        text.contains("4 labels") && text.contains("\"logits\" has 3"),
        "{text}"
    );
    let text = refused("embedding_dim = 3", "embedding_dim = 7");
    assert!(text.contains("7 embedding values"), "{text}");
    assert!(matches!(
        with_manifest("\"classify\"", "\"detect\""),
        Err(EngineError::NotServed { .. })
    ));
}

#[test]
fn not_a_number_is_not_a_reading() {
    let (_dir, bundle) =
        bundle(|model| graph(model).initializer[0] = floats("weight", &[3, 3], &[f32::NAN; 9]));
    let engine = Engine::load(&bundle).unwrap();
    let error = engine.infer(&solid([1, 2, 3])).unwrap_err();
    assert!(matches!(error, EngineError::Outcome { .. }), "{error}");
    assert!(!self_test(&bundle, &engine).passed());
}

#[test]
fn a_cut_file_is_refused_wherever_it_is_cut() {
    let bytes = model().encode_to_vec();
    for length in 1..bytes.len() {
        let (_dir, bundle) = bundle_of(MANIFEST, &bytes[..length]);
        assert!(Engine::load(&bundle.unwrap()).is_err(), "cut at {length}");
    }
}

#[test]
fn damaged_files_never_panic() {
    let bytes = model().encode_to_vec();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] = damaged[at].wrapping_add(0x55);
        let (_dir, bundle) = bundle_of(MANIFEST, &damaged);
        let _ = Engine::load(&bundle.unwrap());
    }
}

#[test]
fn data_outside_of_the_file_is_refused() {
    let text = refusal(|model| {
        let weight = &mut graph(model).initializer[0];
        weight.raw_data.clear();
        weight.data_location = Some(DataLocation::External as i32);
        weight.external_data = vec![StringStringEntryProto {
            key: "location".into(),
            value: "../../etc/passwd".into(),
        }];
    });
    assert!(text.contains("outside of the model file"), "{text}");
    let text = refusal(|model| {
        let tensor = TensorProto {
            data_location: Some(DataLocation::External as i32),
            ..floats("x", &[1], &[1.0])
        };
        let mut constant = NodeProto {
            input: vec![],
            ..node("Constant", &[], "c")
        };
        constant.attribute.push(AttributeProto {
            name: "value".into(),
            t: Some(tensor),
            r#type: 4,
            ..AttributeProto::default()
        });
        graph(model).node.push(constant);
    });
    assert!(text.contains("outside of the model file"), "{text}");
}

#[test]
fn dimensions_that_overflow_are_refused() {
    for dims in [
        vec![1 << 32, 1 << 32],
        vec![i64::MAX, 4],
        vec![-1, 9],
        vec![1 << 29],
    ] {
        let text = refusal(|model| graph(model).initializer[0].dims = dims.clone());
        assert!(text.contains("elements"), "{text}");
        let text = refusal(|model| graph(model).value_info.push(value("pooled", &dims)));
        assert!(text.contains("elements"), "{text}");
    }
    let text = refusal(|model| graph(model).initializer[0].dims = vec![3, 4]);
    assert!(text.contains("9 elements stored, 12 announced"), "{text}");
}

#[test]
fn graphs_in_nodes_are_refused_at_any_depth() {
    for depth in [1, 3, 40] {
        let text = refusal(|model| {
            let mut inner = GraphProto::default();
            for _ in 0..depth {
                let mut nested = node("If", &["pooled"], "x");
                nested.attribute.push(AttributeProto {
                    name: "then_branch".into(),
                    g: Some(inner),
                    ..AttributeProto::default()
                });
                inner = GraphProto {
                    node: vec![nested],
                    ..GraphProto::default()
                };
            }
            graph(model).node.extend(inner.node);
        });
        assert!(
            text.contains("not allowed") || text.contains("nested deeper"),
            "{text}"
        );
    }
    // Ten thousand levels: only lengths around lengths, as an attacker writes them.
    let mut bytes = vec![];
    for field in [0x32, 0x2a, 0x0a].iter().cycle().take(30_000) {
        let mut outer = vec![*field];
        let mut length = bytes.len();
        while length >= 0x80 {
            outer.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        outer.push(length as u8);
        outer.extend(&bytes);
        bytes = outer;
    }
    let mut file = vec![0x3a];
    prost::encoding::encode_varint(bytes.len() as u64, &mut file);
    file.extend(bytes);
    let (_dir, bundle) = bundle_of(MANIFEST, &file);
    let text = Engine::load(&bundle.unwrap())
        .expect_err("nested")
        .to_string();
    assert!(text.contains("nested deeper"), "{text}");
}

/// What exporters write by themselves today.
#[test]
fn the_newest_operator_set_is_read() {
    let (_dir, bundle) = bundle(|model| model.opset_import[0].version = 20);
    let engine = Engine::load(&bundle).unwrap();
    assert_eq!(engine.infer(&solid([0, 255, 0])).unwrap().label, "green");
}

#[test]
fn unknown_operator_sets_are_refused() {
    for version in [0, 21, -1, i64::MAX] {
        let text = refusal(|model| model.opset_import[0].version = version);
        assert!(text.contains("operator set"), "{text}");
    }
    assert!(refusal(|model| model.opset_import.clear()).contains("operator set"));
    assert!(refusal(|model| model.graph = None).contains("no graph"));
}

#[test]
fn too_much_of_anything_is_refused() {
    let text = refusal(|model| {
        graph(model)
            .node
            .extend((0..20_001).map(|at| node("Relu", &["pooled"], &format!("n{at}"))))
    });
    assert!(text.contains("20000"), "{text}");
    // Two bytes in the file, hundreds in memory.
    let mut file = vec![0x3a];
    let nodes = [0x0a, 0x00].repeat(1_100_000);
    prost::encoding::encode_varint(nodes.len() as u64, &mut file);
    file.extend(nodes);
    let (_dir, bundle) = bundle_of(MANIFEST, &file);
    let text = Engine::load(&bundle.unwrap())
        .expect_err("nodes")
        .to_string();
    assert!(text.contains("fields"), "{text}");
}

/// A field with a message in it, as it stands in a file.
fn field(number: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let kind = prost::encoding::WireType::LengthDelimited;
    prost::encoding::encode_key(number, kind, &mut bytes);
    prost::encoding::encode_varint(content.len() as u64, &mut bytes);
    bytes.extend(content);
    bytes
}

fn refused_file(file: &[u8]) -> String {
    let (_dir, bundle) = bundle_of(MANIFEST, file);
    Engine::load(&bundle.unwrap())
        .expect_err("must be refused")
        .to_string()
}

#[test]
fn messages_that_unfold_are_refused_wherever_they_stand() {
    // A shape of a million sizes, behind something that only a careless reader stops at: an empty group.
    let dims = [&[0x7b, 0x7c][..], &field(1, &[]).repeat(1_100_000)].concat();
    let input = field(2, &field(1, &field(2, &dims)));
    let text = refused_file(&field(7, &field(11, &input)));
    assert!(
        text.contains("not a whole ONNX file") || text.contains("fields"),
        "{text}"
    );
    let text = refused_file(&field(
        7,
        &field(11, &field(2, &field(1, &field(2, &dims[2..])))),
    ));
    assert!(text.contains("fields"), "{text}");
    // Two bytes each in the file, a thousand and more in memory.
    let attributes = field(5, &[]).repeat(400_000);
    let text = refused_file(&field(7, &field(1, &attributes)));
    assert!(text.contains("256 MiB"), "{text}");
    let functions = field(25, &field(7, &field(5, &[]).repeat(400_000)));
    assert!(refused_file(&functions).contains("256 MiB"));
}

#[test]
fn types_in_types_are_not_followed() {
    // Sequences of sequences, ten thousand deep, as the type of the input and of an attribute.
    let mut kind = Vec::new();
    for _ in 0..10_000 {
        kind = field(4, &field(1, &kind));
    }
    for graph in [
        field(11, &field(2, &kind)),
        field(1, &field(5, &field(14, &kind))),
        field(1, &field(5, &field(15, &kind))),
    ] {
        let mut bytes = model().encode_to_vec();
        bytes.extend(field(7, &graph));
        let (_dir, bundle) = bundle_of(MANIFEST, &bytes);
        // Whatever it says: the stack is not the measure.
        let _ = Engine::load(&bundle.unwrap());
    }
}

#[test]
fn circles_and_loose_ends_are_refused() {
    let text = refusal(|model| graph(model).node[0].input[0] = "embedding".into());
    assert!(text.contains("before it is made"), "{text}");
    let text = refusal(|model| graph(model).node[1].output[0] = "pooled".into());
    assert!(text.contains("twice"), "{text}");
    let text = refusal(|model| graph(model).output.push(value("nothing", &[1])));
    assert!(text.contains("never made"), "{text}");
    let text = refusal(|model| graph(model).node[0].op_type = "Teleport".into());
    assert!(text.contains("Teleport"), "{text}");
}

/// The model plus an operator whose huge value ends up in the result.
fn bomb(nodes: Vec<NodeProto>, stored: Vec<TensorProto>) -> String {
    refusal(|model| {
        let graph = graph(model);
        let at = graph.node.len() - 1;
        let mut sum = node("ReduceSum", &["huge"], "one");
        sum.attribute.push(int("keepdims", 0));
        let use_it = node("Add", &["raw", "one"], "logits");
        graph.node[at].output[0] = "raw".into();
        graph.node.extend(nodes);
        graph.node.extend([sum, use_it]);
        graph.initializer.extend(stored);
    })
}

#[test]
fn small_files_that_unfold_are_refused() {
    let shape = || ints("shape", &[1 << 20, 1 << 20]);
    let one = || floats("x", &[1, 1], &[1.0]);
    let cases = [
        (
            vec![node("ConstantOfShape", &["shape"], "huge")],
            vec![shape()],
        ),
        (
            vec![node("Expand", &["x", "shape"], "huge")],
            vec![shape(), one()],
        ),
        (
            vec![node("Tile", &["x", "shape"], "huge")],
            vec![shape(), one()],
        ),
        // From the picture: not before a run, but then.
        (
            vec![node("Tile", &["embedding", "shape"], "huge")],
            vec![shape()],
        ),
        (
            vec![node("Expand", &["embedding", "shape"], "huge")],
            vec![ints("shape", &[1 << 14, 1 << 14, 1, 3])],
        ),
        (
            vec![node("Range", &["from", "to", "step"], "huge")],
            ["from", "to", "step"]
                .iter()
                .zip([0.0, 1e9, 1.0])
                .map(|(name, v)| floats(name, &[], &[v]))
                .collect(),
        ),
        // Each step is harmless, thirty are not.
        (
            (0..30)
                .map(|at| {
                    let from = if at == 0 {
                        "x".to_owned()
                    } else {
                        format!("t{at}")
                    };
                    let to = if at == 29 {
                        "huge".to_owned()
                    } else {
                        format!("t{}", at + 1)
                    };
                    node("Tile", &[&from, "twice"], &to)
                })
                .collect(),
            vec![ints("twice", &[2, 2]), one()],
        ),
    ];
    for (nodes, stored) in cases {
        let what = nodes[0].op_type.clone();
        let text = bomb(nodes, stored);
        assert!(
            text.contains("elements") || text.contains("size"),
            "{what}: {text}"
        );
    }
}

#[test]
fn a_model_that_would_run_for_hours_is_refused() {
    let text = refusal(|model| {
        let graph = graph(model);
        let grown = (0..3).map(|at| {
            let from = if at == 0 {
                "wide".to_owned()
            } else {
                format!("m{at}")
            };
            node("MatMul", &[&from, &from], &format!("m{}", at + 1))
        });
        let at = graph.node.len() - 1;
        graph.node[at].output[0] = "raw".into();
        graph
            .node
            .push(node("Expand", &["raw_one", "shape"], "wide"));
        let take = node("ReduceSum", &["raw"], "raw_one");
        let position = graph.node.len() - 1;
        graph.node.insert(position, take);
        graph.node.extend(grown.collect::<Vec<_>>());
        let mut sum = node("ReduceSum", &["m3"], "one");
        sum.attribute.push(int("keepdims", 0));
        graph
            .node
            .extend([sum, node("Add", &["raw", "one"], "logits")]);
        graph.initializer.push(ints("shape", &[4096, 4096]));
    });
    assert!(text.contains("operations"), "{text}");
}

#[test]
fn odd_types_are_refused() {
    for kind in [
        DataType::String,
        DataType::Complex64,
        DataType::Bfloat16,
        DataType::Undefined,
    ] {
        let text = refusal(|model| graph(model).initializer[0].data_type = kind as i32);
        assert!(text.contains("element type"), "{text}");
    }
}

#[test]
fn a_missing_bundle_is_an_error() {
    assert!(Bundle::open("no/such/folder".as_ref()).is_err());
}

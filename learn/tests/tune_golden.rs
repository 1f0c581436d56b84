//! Outputs and gradients of every operator against PyTorch's, and outputs against tract's on a bundle.
//! `tests/peers/tune.py` writes the golden files.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use std::{collections::BTreeMap, path::Path};

use learn::tune::Graph;
use prost::Message;
use serde_json::Value;
use tract_onnx::pb::ModelProto;

/// Relative to the largest value of the tensor, or to 1.
const TOLERANCE: f32 = 1e-4;

fn close(place: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{place}");
    let largest = expected.iter().fold(1.0f32, |a, b| a.max(b.abs()));
    for (at, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!(
            (a - b).abs() <= TOLERANCE * largest,
            "{place}[{at}]: {a}, PyTorch {b}"
        );
    }
}

/// The golden files.
struct Golden {
    data: Vec<u8>,
    cases: Vec<Value>,
}

impl Golden {
    fn read() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let text = std::fs::read_to_string(folder.join("tune.json")).unwrap();
        let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
        assert!(cases.len() >= 46);
        Self {
            data: std::fs::read(folder.join("tune.bin")).unwrap(),
            cases,
        }
    }

    fn bytes(&self, range: &Value) -> &[u8] {
        let [start, len] = [0, 1].map(|i| usize::try_from(range[i].as_u64().unwrap()).unwrap());
        &self.data[start..start + len]
    }

    fn floats(&self, range: &Value) -> Vec<f32> {
        self.bytes(range)
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    }
}

#[test]
fn tune_gradients_are_those_of_pytorch() {
    let golden = Golden::read();
    let floats = |range: &Value| golden.floats(range);
    for case in &golden.cases {
        let name = case["name"].as_str().unwrap();
        let graph = Graph::read(golden.bytes(&case["onnx"]), "x", "y").unwrap();
        let x = floats(&case["x"]);
        close(
            &format!("{name} output"),
            &graph.forward(&x).unwrap(),
            &floats(&case["y"]),
        );
        let found = graph.gradients(&x, &floats(&case["seed"])).unwrap();
        close(&format!("{name} input"), &found.input, &floats(&case["dx"]));
        let found: BTreeMap<_, _> = found.constants.into_iter().collect();
        let expected = case["weights"].as_object().unwrap();
        assert!(
            found.keys().eq(expected.keys()),
            "{name}: {:?}",
            found.keys()
        );
        for (weight, range) in expected {
            close(&format!("{name} {weight}"), &found[weight], &floats(range));
        }
    }
}

/// The same graphs with other numbers: along a random direction of input and weights together, the output changes
/// as the gradients say.
#[test]
fn tune_gradients_are_those_of_small_steps() {
    const STEP: f32 = 1e-3;
    let golden = Golden::read();
    let (mut tried, mut corners) = (0, 0);
    for (case, seed) in golden
        .cases
        .iter()
        .flat_map(|case| (1..=3u32).map(move |seed| (case, seed)))
    {
        let name = case["name"].as_str().unwrap();
        let mut state = seed.wrapping_mul(0x9e37_79b9);
        let mut random = |len: usize| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..len).map(|_| next()).collect()
        };
        let onnx = golden.bytes(&case["onnx"]);
        let x = random(golden.floats(&case["x"]).len());
        let along_x = random(x.len());
        let weights = random(golden.bytes(&case["seed"]).len() / 4);
        let graph = Graph::read(onnx, "x", "y").unwrap();
        let found = graph.gradients(&x, &weights).unwrap();
        let along: BTreeMap<_, _> = found
            .constants
            .iter()
            .map(|(name, g)| (name.clone(), random(g.len())))
            .collect();
        let at = |step: f32| -> f64 {
            let mut model = ModelProto::decode(onnx).unwrap();
            for tensor in &mut model.graph.as_mut().unwrap().initializer {
                let Some(along) = along.get(&tensor.name) else {
                    continue;
                };
                for (bytes, along) in tensor.raw_data.as_chunks_mut().0.iter_mut().zip(along) {
                    *bytes = (f32::from_le_bytes(*bytes) + step * along).to_le_bytes();
                }
            }
            let graph = Graph::read(&model.encode_to_vec(), "x", "y").unwrap();
            let x: Vec<f32> = x.iter().zip(&along_x).map(|(x, a)| x + step * a).collect();
            let y = graph.forward(&x).unwrap();
            y.iter()
                .zip(&weights)
                .map(|(y, w)| f64::from(*y) * f64::from(*w))
                .sum()
        };
        tried += 1;
        let slope = |step: f32| (at(step) - at(-step)) / f64::from(2.0 * step);
        let numeric = slope(STEP);
        let parts = found
            .constants
            .iter()
            .flat_map(|(name, g)| g.iter().zip(&along[name]));
        let products = parts
            .chain(found.input.iter().zip(&along_x))
            .map(|(g, a)| f64::from(g * a));
        let (sum, scale) = products.fold((0.0, 1.0), |(sum, scale), p| (sum + p, scale + p * p));
        // Against the size of the terms: their sum may cancel. Corners under the step and f32 cost a little.
        let bound = 0.02 * scale.sqrt();
        if (numeric - slope(STEP / 4.0)).abs() > bound / 4.0 {
            // There is a corner within the step: the slope has no one value.
            corners += 1;
            continue;
        }
        assert!(
            (sum - numeric).abs() < bound,
            "{name} {seed}: {sum}, steps {numeric}"
        );
    }
    assert!(corners * 5 < tried, "{corners} corners in {tried}");
}

#[test]
fn tune_outputs_are_those_of_the_engine() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles");
    for (name, output) in [
        ("backbone", "embedding"),
        ("steel", "embedding"),
        ("conveyor", "logits"),
    ] {
        let bundle = models::Bundle::open(&folder.join(name)).unwrap();
        let engine = models::Engine::load(&bundle).unwrap();
        let onnx = std::fs::read(folder.join(name).join("model.onnx")).unwrap();
        let graph = Graph::read(&onnx, &engine.manifest().input.name, output).unwrap();
        let picture = models::Picture::read(&folder.join(name).join("golden/1.png")).unwrap();
        let input = engine.tensor(&picture).unwrap();
        let found = graph.forward(input.values()).unwrap();
        let outputs = engine.bare_run(&input).unwrap();
        // Scores come first, the embedding last.
        let at = if output == "embedding" {
            outputs.len() - 1
        } else {
            0
        };
        let view = outputs[at].try_as_plain_ram().unwrap();
        close(name, &found, view.as_slice::<f32>().unwrap());
    }
}

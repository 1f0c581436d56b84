use std::path::Path;

use super::*;

fn bundle(name: &str) -> Vec<u8> {
    let bundles = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles");
    std::fs::read(bundles.join(name).join("model.onnx")).unwrap()
}

fn head(classes: usize, dim: usize) -> Head {
    Head {
        dim,
        weight: (0..classes * dim)
            .map(|at| (at % 7) as f32 * 0.01)
            .collect(),
        bias: (0..classes).map(|at| at as f32).collect(),
        strength: 0.01,
        temperature: 1.0,
        fold_loss: None,
        iterations: 1,
    }
}

fn graph(bytes: &[u8]) -> GraphProto {
    ModelProto::decode(bytes).unwrap().graph.unwrap()
}

#[test]
fn an_embedding_gets_a_head_and_keeps_everything_else() {
    let before = bundle("backbone");
    let bytes = with_head(&before, "embedding", "logits", &head(4, 704)).unwrap();
    assert_eq!(
        bytes,
        with_head(&before, "embedding", "logits", &head(4, 704)).unwrap()
    );
    let (old, new) = (graph(&before), graph(&bytes));
    assert_eq!(new.node[..old.node.len()], old.node[..]);
    assert_eq!(
        new.initializer[..old.initializer.len()],
        old.initializer[..]
    );
    assert_eq!(new.node.len(), old.node.len() + 1);
    let outputs: Vec<&str> = new.output.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(outputs, ["logits", "embedding"]);
}

#[test]
fn a_head_is_replaced_with_more_classes() {
    let before = bundle("steel");
    let bytes = with_head(&before, "embedding", "logits", &head(9, 704)).unwrap();
    let (old, new) = (graph(&before), graph(&bytes));
    assert_eq!(new.node.len(), old.node.len());
    assert_eq!(new.initializer.len(), old.initializer.len());
    let weight = new
        .initializer
        .iter()
        .find(|t| t.name == "head.weight")
        .unwrap();
    assert_eq!(weight.dims, [9, 704]);
    // Once more gives the same as straight from the bare embedding.
    let bare = with_head(&bytes, "embedding", "logits", &head(4, 704)).unwrap();
    assert_eq!(graph(&bare).node.len(), old.node.len());
}

#[test]
fn what_does_not_fit_is_refused() {
    let model = bundle("backbone");
    let words = |embedding: &str, scores: &str, dim| {
        with_head(&model, embedding, scores, &head(2, dim))
            .unwrap_err()
            .to_string()
    };
    assert!(words("no", "logits", 704).contains("made by no node"));
    assert!(words("image", "logits", 704).contains("made by no node"));
    assert!(words("embedding", "logits", 703).contains("the head takes 703 values"));
    assert!(words("embedding", "pooled", 704).contains("cannot be replaced"));
    assert!(with_head(&model[..1000], "embedding", "logits", &head(2, 704)).is_err());
    assert!(with_head(b"", "embedding", "logits", &head(2, 704)).is_err());
    let mut broken = head(2, 704);
    broken.bias.push(0.0);
    assert!(with_head(&model, "embedding", "logits", &broken).is_err());
}

#[test]
fn stored_values_are_replaced_and_nothing_else() {
    let model = bundle("steel");
    let old = graph(&model);
    let values = BTreeMap::from([("head.bias".to_owned(), vec![0.5; 6])]);
    let bytes = replace_initializers(&model, &values).unwrap();
    for (old, new) in old.initializer.iter().zip(&graph(&bytes).initializer) {
        assert_eq!(old == new, old.name != "head.bias", "{}", old.name);
    }
    assert_eq!(graph(&bytes).node, old.node);
    let words = |name: &str, values: Vec<f32>| {
        let values = BTreeMap::from([(name.to_owned(), values)]);
        replace_initializers(&model, &values)
            .unwrap_err()
            .to_string()
    };
    assert!(words("head.bias", vec![0.5; 5]).contains("5 values given"));
    assert!(words("head.bias", vec![f32::NAN; 6]).contains("new value 0 is NaN"));
    assert!(words("absent", vec![]).contains("is not stored"));
}

#[test]
fn a_difference_is_seen() {
    assert!(compare(0, "logit", &[1.0, 2.0], &[1.0, 2.0001]).is_ok());
    assert!(compare(0, "logit", &[1.0, 2.0], &[1.0, 2.1]).is_err());
    assert!(compare(0, "logit", &[1.0, f32::NAN], &[1.0, 2.0]).is_err());
    assert!(compare(0, "logit", &[1.0], &[1.0, 2.0]).is_err());
}

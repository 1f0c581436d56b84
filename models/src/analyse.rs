//! Shape analysis in small steps, so that no model makes the engine allocate without bound: each value's
//! size is known and checked before the engine may compute it.

use tract_onnx::{
    pb::ModelProto,
    prelude::*,
    tract_core::ops::Cost,
    tract_hir::{
        infer::{Factoid, InferenceFact},
        internal::TVec,
    },
};

use crate::engine::guarded;

/// Elements of one value: 256 MiB of f32, a hundred times the largest layer of a model for small devices.
const MAX_ELEMENTS: u64 = 1 << 26;
/// Elements of all values together, a gigabyte of f32. Not all of them live at the same time.
const MAX_TOTAL_ELEMENTS: u64 = 1 << 28;
/// Elements of a value that is computed while loading: shapes, small tables, weights in another order.
const MAX_FOLDED_ELEMENTS: u64 = 1 << 24;
/// Multiply-adds of one run: about half a minute on a small board, several times the largest model that
/// makes sense there.
const MAX_OPERATIONS: u64 = 1 << 36;

/// How many elements a shape has; nothing if a size is open.
fn elements(dims: &[TDim]) -> Option<u64> {
    dims.iter().try_fold(1u64, |product, dim| {
        let dim = u64::try_from(dim.to_i64().ok()?).ok()?;
        Some(product.saturating_mul(dim))
    })
}

fn too_large(name: &str, elements: u64, most: u64) -> String {
    format!("{name:?} would have {elements} elements, {most} are allowed")
}

/// What is read as a graph whose every shape is known and within bounds.
pub(crate) fn model(proto: ModelProto) -> Result<TypedModel, String> {
    guarded(move || {
        let parsed = tract_onnx::onnx()
            .model_for_proto_model(&proto)
            .map_err(|e| format!("{e:#}"))?;
        drop(proto);
        typed(parsed)
    })
}

/// What a piece of a model takes and gives.
pub(crate) struct Looked {
    /// Multiply-adds of one run.
    pub(crate) operations: u64,
    /// The dimensions of its one output of 32-bit floats; nothing for any other.
    pub(crate) shape: Option<Vec<usize>>,
}

/// Looks at a piece without making it ready to run.
pub(crate) fn piece(proto: ModelProto) -> Result<Looked, String> {
    let model = model(proto)?;
    let operations = check(&model)?;
    let outputs = model.output_outlets().map_err(|e| format!("{e:#}"))?;
    let shape = match outputs {
        &[only] => {
            let fact = model.outlet_fact(only).map_err(|e| format!("{e:#}"))?;
            let size = |dim: &TDim| usize::try_from(dim.to_i64().ok()?).ok();
            let sizes = fact.shape.iter().map(size).collect::<Option<Vec<_>>>();
            sizes.filter(|_| fact.datum_type == f32::datum_type())
        }
        _ => None,
    };
    Ok(Looked { operations, shape })
}

/// The typed form of a model in which every shape is known and within bounds.
fn typed(mut model: InferenceModel) -> Result<TypedModel, String> {
    let order = model.eval_order().map_err(|e| format!("{e:#}"))?;
    let mut total = 0u64;
    for id in order {
        let node = model.node(id);
        let name = node.name.clone();
        let text = |e: TractError| format!("{name:?}: {e:#}");
        let (inputs, outputs) = {
            let (inputs, outputs) = model.node_facts(id).map_err(text)?;
            let own = |facts: &[&InferenceFact]| -> Vec<InferenceFact> {
                facts.iter().map(|&fact| fact.clone()).collect()
            };
            (own(&inputs), own(&outputs))
        };
        let folds = !inputs.is_empty() && inputs.iter().all(|fact| fact.value.is_concrete());
        let mut op = model.node(id).op.clone();
        let observed: TVec<InferenceFact> = op
            .observe_outlets(&model, model.node(id))
            .map_err(text)?
            .iter()
            .map(|&outlet| model.outlet_fact(outlet).cloned())
            .collect::<TractResult<_>>()
            .map_err(text)?;
        // What comes out, by the rules alone: nothing is computed yet.
        let (_, facts, _) = op
            .infer_facts(
                inputs.iter().collect(),
                outputs.iter().collect(),
                observed.iter().collect(),
            )
            .map_err(text)?;
        for fact in &facts {
            match fact.shape.concretize().as_deref().map(elements) {
                Some(Some(count)) => {
                    let most = if folds {
                        MAX_FOLDED_ELEMENTS
                    } else {
                        MAX_ELEMENTS
                    };
                    total = total.saturating_add(count);
                    if count > most {
                        return Err(too_large(&name, count, most));
                    }
                }
                _ if folds => {
                    return Err(format!(
                        "{name:?}: its size cannot be told before it is computed"
                    ));
                }
                _ => {}
            }
        }
        if total > MAX_TOTAL_ELEMENTS {
            return Err(too_large("all values together", total, MAX_TOTAL_ELEMENTS));
        }
        // Now it may compute what does not depend on the picture.
        let (_, facts, _) = model
            .node_mut(id)
            .op
            .infer(
                inputs.iter().collect(),
                outputs.iter().collect(),
                observed.iter().collect(),
            )
            .map_err(text)?;
        for (slot, fact) in facts.iter().enumerate() {
            let outlet = OutletId::new(id, slot);
            let known = model
                .outlet_fact(outlet)
                .and_then(|known| known.unify(fact))
                .map_err(text)?;
            model.set_outlet_fact(outlet, known).map_err(text)?;
        }
    }
    let model = model.into_typed().map_err(|e| format!("{e:#}"))?;
    check(&model)?;
    Ok(model)
}

/// Every value's size again, now that all are known; the operations of one run.
fn check(model: &TypedModel) -> Result<u64, String> {
    let (mut total, mut operations) = (0u64, 0u64);
    for node in model.nodes() {
        for output in &node.outputs {
            let count = elements(&output.fact.shape).ok_or_else(|| {
                format!(
                    "{:?}: its size depends on more than the input's size",
                    node.name
                )
            })?;
            if count > MAX_ELEMENTS {
                return Err(too_large(&node.name, count, MAX_ELEMENTS));
            }
            total = total.saturating_add(count);
        }
        let inputs = model
            .node_input_facts(node.id)
            .map_err(|e| format!("{e:#}"))?;
        for (cost, count) in node
            .op
            .cost(&inputs)
            .map_err(|e| format!("{:?}: {e:#}", node.name))?
        {
            if matches!(cost, Cost::FMA(_) | Cost::Div(_)) {
                let count = count
                    .to_i64()
                    .ok()
                    .and_then(|count| u64::try_from(count).ok());
                operations = operations.saturating_add(count.unwrap_or(u64::MAX));
            }
        }
    }
    if total > MAX_TOTAL_ELEMENTS {
        return Err(too_large("all values together", total, MAX_TOTAL_ELEMENTS));
    }
    if operations > MAX_OPERATIONS {
        return Err(format!(
            "one run takes {operations} operations, {MAX_OPERATIONS} are allowed"
        ));
    }
    Ok(operations)
}

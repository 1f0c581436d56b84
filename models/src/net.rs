//! A graph that is ready to run, from any thread.

use std::sync::{Arc, Mutex, PoisonError};

use tract_onnx::{pb::ModelProto, prelude::*};

use crate::{analyse, engine::guarded, tensor::Input};

type Plan = TypedRunnableModel;
type State = TypedSimpleState;

/// A pool of what is used again.
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Pool<T> {
    /// An idle one, or nothing.
    pub(crate) fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    pub(crate) fn give_back(&self, item: T) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(item);
    }
}

/// A loaded graph with one input. Every run takes buffers of its own.
pub(crate) struct Net {
    plan: Arc<Plan>,
    /// Idle run states. As many as ever ran at the same time.
    states: Pool<State>,
}

impl Net {
    /// Checks, types and optimises what was read.
    ///
    /// # Errors
    /// In the engine's words.
    pub(crate) fn load(proto: ModelProto) -> Result<Self, String> {
        Self::new(analyse::model(proto)?)
    }

    /// Optimises a typed graph.
    ///
    /// # Errors
    /// In the engine's words.
    pub(crate) fn new(typed: TypedModel) -> Result<Self, String> {
        let plan = guarded(|| {
            typed
                .into_optimized()
                .and_then(IntoRunnable::into_runnable)
                .map_err(|e| format!("{e:#}"))
        })?;
        Ok(Self {
            plan,
            states: Pool::default(),
        })
    }

    /// How many values each output has.
    ///
    /// # Errors
    /// If that is open.
    pub(crate) fn outputs(&self) -> Result<Vec<usize>, String> {
        let model = self.plan.model();
        let outputs = model.output_outlets().map_err(|e| format!("{e:#}"))?;
        let size = |&outlet: &OutletId| {
            let fact = model.outlet_fact(outlet).map_err(|e| format!("{e:#}"))?;
            let volume = fact.shape.volume().to_i64();
            let volume = volume.ok().and_then(|size| usize::try_from(size).ok());
            volume.ok_or_else(|| "the size of an output is open".to_owned())
        };
        outputs.iter().map(size).collect()
    }

    /// What comes out.
    ///
    /// # Errors
    /// When the graph fails.
    pub(crate) fn run(&self, input: &Input) -> Result<TVec<TValue>, String> {
        guarded(|| {
            let mut state = match self.states.take() {
                Some(state) => state,
                None => self.plan.spawn().map_err(|e| format!("{e:#}"))?,
            };
            // A state that failed is dropped: it may hold anything.
            let outputs = state
                .run(tvec![input.0.clone()])
                .map_err(|e| format!("{e:#}"))?;
            self.states.give_back(state);
            Ok(outputs)
        })
    }
}

//! Runs a model: loads it once, then turns pictures into outcomes from any thread.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tract_onnx::prelude::*;

use crate::{
    analyse,
    bundle::{Bundle, BundleError},
    image::{ImageError, Picture},
    manifest::{Manifest, Task},
    memory::of_this_process,
    net::Net,
    onnx::{self, OnnxError},
    outcome::{Outcome, OutcomeError, outcome_of},
    tensor::{Input, Preparer},
};

/// Why a model cannot be loaded or a picture not judged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A task that the format knows and this engine does not.
    #[error("{id}: the task {task} is not served yet")]
    NotServed {
        /// The model.
        id: String,
        /// Its task.
        task: &'static str,
    },
    /// The bundle's files changed under way.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The file is hostile, damaged or not what the manifest says.
    #[error("{id}: {source}")]
    Onnx {
        /// The model.
        id: String,
        /// Why.
        source: OnnxError,
    },
    /// The engine cannot load or run the model.
    #[error("{id}: cannot {action}: {detail}")]
    Tract {
        /// The model.
        id: String,
        /// What was tried.
        action: &'static str,
        /// The engine's words.
        detail: String,
    },
    /// An output has another size than the manifest says.
    #[error("{id}: the manifest says {expected}, the model's output {output:?} has {found}")]
    Output {
        /// The model.
        id: String,
        /// The output.
        output: String,
        /// What the manifest says.
        expected: String,
        /// What the model has.
        found: String,
    },
    /// The bytes are no picture.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The output is no result.
    #[error("{id}: {source}")]
    Outcome {
        /// The model.
        id: String,
        /// Why.
        source: OutcomeError,
    },
}

/// A loaded model. Share it by reference or `Arc`; every run takes buffers of its own.
pub struct Engine {
    id: String,
    manifest: Manifest,
    preparer: Preparer,
    net: Net,
    memory_kib: Option<u64>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Runs `work`; a panic inside becomes an error, so that a bad model cannot take its thread along.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|cause| {
        let words = cause
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| cause.downcast_ref::<&str>().copied());
        Err(format!(
            "the engine gave up on it ({})",
            words.unwrap_or("no reason given")
        ))
    })
}

impl Engine {
    /// Loads the model: checks the file, fixes the input's shape, compares the outputs with the manifest,
    /// optimises, and runs once on an empty picture so that the first real one is not slow.
    ///
    /// # Errors
    /// See [`EngineError`]. A hostile file is refused before it can take memory or time without bound.
    pub fn load(bundle: &Bundle) -> Result<Self, EngineError> {
        Self::new(bundle.manifest.clone(), bundle.model_bytes()?)
    }

    /// The same of a model file that is in memory, of which the manifest says what it is. The manifest's
    /// length, digest and golden cases play no part.
    ///
    /// # Errors
    /// Those of [`Engine::load`].
    pub fn new(manifest: Manifest, model: Vec<u8>) -> Result<Self, EngineError> {
        let resident_kib = || of_this_process("VmRSS").map(|bytes| bytes >> 10);
        let before = resident_kib();
        let id = manifest.id();
        if !matches!(manifest.task, Task::Classify | Task::Embed) {
            return Err(EngineError::NotServed {
                id,
                task: manifest.task.as_str(),
            });
        }
        let proto = onnx::read(&model, &manifest).map_err(|source| EngineError::Onnx {
            id: id.clone(),
            source,
        })?;
        drop(model);
        let fail = |detail| EngineError::Tract {
            id: id.clone(),
            action: "load the model",
            detail,
        };
        let typed = analyse::model(proto).map_err(fail)?;
        check_outputs(&typed, &manifest)?;
        let net = Net::new(typed).map_err(fail)?;
        let mut engine = Self {
            preparer: Preparer::new(&manifest.input),
            id,
            manifest,
            net,
            memory_kib: None,
        };
        let (width, height) = engine.preparer.size();
        let black = vec![0; width as usize * height as usize * 3];
        let input = engine.tensor(&Picture::from_rgb(width, height, black)?)?;
        engine.bare_run(&input)?;
        engine.memory_kib = before
            .zip(resident_kib())
            .map(|(before, after)| after.saturating_sub(before));
        Ok(engine)
    }

    /// `name@version`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the bundle says about the model.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// By how many KiB the process grew while the model was loaded; none where that cannot be told.
    /// Other threads of the process count too.
    #[must_use]
    pub fn memory_kib(&self) -> Option<u64> {
        self.memory_kib
    }

    /// The model's input from a picture.
    ///
    /// # Errors
    /// When the picture cannot be resized.
    pub fn tensor(&self, picture: &Picture) -> Result<Input, EngineError> {
        self.preparer
            .tensor(picture)
            .map_err(|detail| self.fail("prepare the picture", detail))
    }

    /// The model's input straight from an image file's bytes: like [`Picture::decode`] and
    /// [`Engine::tensor`], but large JPEG photographs cost a fraction, see [`Picture::decode_for`].
    ///
    /// # Errors
    /// When the bytes are no picture.
    pub fn tensor_from_bytes(&self, bytes: &[u8]) -> Result<Input, EngineError> {
        self.tensor(&Picture::decode_wanted(bytes, self.preparer.wanted())?)
    }

    /// The model's input from values that somebody else prepared: in the layout of the manifest, normalised.
    ///
    /// # Errors
    /// When there are too many or too few of them, or one is no finite number.
    pub fn input(&self, values: Vec<f32>) -> Result<Input, EngineError> {
        let shape = self.manifest.input.shape;
        let expected: usize = shape.iter().product();
        if values.len() != expected {
            let detail = format!("{} values, the model takes {expected}", values.len());
            return Err(self.fail("take the input", detail));
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let detail = format!("value {at} is {}", values[at]);
            return Err(self.fail("take the input", detail));
        }
        Input::new(&shape, values).map_err(|error| self.fail("take the input", error))
    }

    /// The outcome of a prepared input.
    ///
    /// # Errors
    /// When the model fails, or says something that is not a number.
    pub fn run(&self, input: &Input) -> Result<Outcome, EngineError> {
        let outputs = self.bare_run(input)?;
        let floats = floats(&outputs).map_err(|e| self.fail("read the output", e))?;
        outcome_of(&self.manifest, floats).map_err(|source| EngineError::Outcome {
            id: self.id.clone(),
            source,
        })
    }

    /// The outcome of a picture.
    ///
    /// # Errors
    /// Those of [`Engine::tensor`] and [`Engine::run`].
    pub fn infer(&self, picture: &Picture) -> Result<Outcome, EngineError> {
        self.run(&self.tensor(picture)?)
    }

    /// The model alone, without making sense of what it says: the measure for what everything around
    /// it costs.
    ///
    /// # Errors
    /// When the model fails.
    pub fn bare_run(&self, input: &Input) -> Result<TVec<TValue>, EngineError> {
        self.net
            .run(input)
            .map_err(|detail| self.fail("run the model", detail))
    }

    fn fail(&self, action: &'static str, detail: impl ToString) -> EngineError {
        EngineError::Tract {
            id: self.id.clone(),
            action,
            detail: detail.to_string(),
        }
    }
}

/// The values of each output.
pub(crate) fn floats(outputs: &[TValue]) -> Result<Vec<Vec<f32>>, String> {
    let values = |output: &TValue| {
        let view = output.try_as_plain_ram().map_err(|e| format!("{e:#}"))?;
        let values = view.as_slice::<f32>().map_err(|e| format!("{e:#}"))?;
        Ok(values.to_vec())
    };
    outputs.iter().map(values).collect()
}

/// Scores must be one per label, the embedding as long as the manifest says, both of f32.
fn check_outputs(model: &TypedModel, manifest: &Manifest) -> Result<(), EngineError> {
    let spec = &manifest.output;
    let scores = spec
        .scores
        .iter()
        .map(|name| (name, spec.labels.len(), "labels"));
    let embedding = spec
        .embedding
        .iter()
        .map(|name| (name, spec.embedding_dim, "embedding values"));
    for (at, (name, expected, what)) in scores.chain(embedding).enumerate() {
        let wrong = |found: String| EngineError::Output {
            id: manifest.id(),
            output: name.clone(),
            expected: format!("{expected} {what}"),
            found,
        };
        let fact = model.output_fact(at).map_err(|e| wrong(format!("{e:#}")))?;
        let found = fact.shape.volume();
        if found
            .to_i64()
            .ok()
            .and_then(|found| usize::try_from(found).ok())
            != Some(expected)
        {
            return Err(wrong(format!("{found}")));
        }
        if fact.datum_type != f32::datum_type() {
            return Err(wrong(format!("elements of type {:?}", fact.datum_type)));
        }
    }
    Ok(())
}

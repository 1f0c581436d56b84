//! What training is told, and tells.

use super::{Augment, Graph, Optimiser, TuneError};

/// Which numbers change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Train {
    /// Every weight, bias, and batch norm's scale and bias.
    All,
    /// Those of the last so many layers with weights (convolutions and dense layers, in the order of the
    /// file; 1: the head alone). What lies before runs once per picture when the data is in memory.
    LastBlocks(usize),
}

/// How to train.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How often every picture is seen; at least 1.
    pub epochs: usize,
    /// Pictures per step; at least 1. Data that is streamed brings its own batches.
    pub batch: usize,
    /// Highest learning rate; above 0.
    pub rate: f32,
    /// The last layer learns at `rate` times this; above 0.
    pub head_rate: f32,
    /// How a step is made.
    pub optimiser: Optimiser,
    /// Weight decay, of weights and not of biases; 0 or more.
    pub decay: f32,
    /// Steps until the learning rate is at its highest; then it falls along a cosine.
    pub warm_up: usize,
    /// Label smoothing, 0 (inclusive) to 1 (exclusive).
    pub smoothing: f32,
    /// Which numbers change.
    pub train: Train,
    /// Decides order and augmentation.
    pub seed: u64,
    /// Threads; at least 1. Does not change the result.
    pub threads: usize,
    /// Changes to pictures in memory, each time anew.
    pub augment: Option<Augment>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            epochs: 10,
            batch: 64,
            rate: 0.01,
            head_rate: 1.0,
            optimiser: Optimiser::Sgd { momentum: 0.9 },
            decay: 1e-4,
            warm_up: 0,
            smoothing: 0.0,
            train: Train::All,
            seed: 0,
            threads: 1,
            augment: None,
        }
    }
}

/// Pictures with their labels.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// `[n, C, H, W]`, prepared as the network's input.
    pub pictures: Vec<f32>,
    /// Classes, one per picture.
    pub labels: Vec<u32>,
}

/// Where pictures come from.
pub enum Data<'a> {
    /// All in memory; every epoch in an order of its own.
    Memory(&'a Batch),
    /// Batches as they are asked for.
    Stream {
        /// Batches per epoch; at least 1.
        steps: usize,
        /// The batch by its number from 0, over all epochs. To repeat a training it must repeat itself.
        next: &'a mut dyn FnMut(usize) -> Batch,
    },
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// From 0.
    pub epoch: usize,
    /// In all.
    pub epochs: usize,
    /// Steps done in this epoch.
    pub step: usize,
    /// Steps per epoch.
    pub steps: usize,
    /// Mean loss of the step's pictures, before the step.
    pub loss: f32,
}

/// A trained network.
#[derive(Clone, Debug)]
pub struct Tuned {
    /// The ONNX file: the same graph and names, other numbers in the trained initialisers.
    pub onnx: Vec<u8>,
    /// Loss of every step.
    pub losses: Vec<f32>,
}

/// Refuses settings that are out of range or do not fit the graph.
pub(super) fn check(graph: &Graph, settings: &Settings) -> Result<(), TuneError> {
    let wrong = |what: &str| Err(TuneError::Settings(what.to_owned()));
    let share = |value: f32| (0.0..1.0).contains(&value);
    let fits = match settings.optimiser {
        Optimiser::Sgd { momentum } => share(momentum),
        Optimiser::AdamW { betas } => share(betas.0) && share(betas.1),
    };
    if settings.epochs == 0 || settings.batch == 0 || settings.threads == 0 {
        return wrong("epochs, batch and threads are at least 1");
    }
    let rates = [settings.rate, settings.head_rate];
    if rates.iter().any(|rate| !rate.is_finite() || *rate <= 0.0) {
        return wrong("learning rates are above 0");
    }
    if !settings.decay.is_finite() || settings.decay < 0.0 {
        return wrong("weight decay is 0 or more");
    }
    if !share(settings.smoothing) || !fits {
        return wrong("smoothing, momentum and betas are from 0 to below 1");
    }
    if graph.layers == 0 {
        return wrong("the model has no layer that could be trained");
    }
    if let Train::LastBlocks(count) = settings.train
        && !(1..=graph.layers).contains(&count)
    {
        return Err(TuneError::Settings(format!(
            "the last {count} layers: the model has {}",
            graph.layers
        )));
    }
    if !graph.shapes[graph.output].flat {
        return wrong("the output is not [N, classes]");
    }
    Ok(())
}

/// Refuses pictures and labels that do not fit the graph.
pub(super) fn check_batch(graph: &Graph, batch: &Batch) -> Result<(), TuneError> {
    let count = batch.labels.len();
    if count == 0 || count.checked_mul(graph.input_len()) != Some(batch.pictures.len()) {
        return Err(TuneError::Data(format!(
            "{count} labels, {} values: the input takes {} per picture",
            batch.pictures.len(),
            graph.input_len()
        )));
    }
    let classes = graph.output_len();
    match batch
        .labels
        .iter()
        .find(|label| **label as usize >= classes)
    {
        Some(label) => Err(TuneError::Data(format!(
            "label {label}, the model has {classes} classes"
        ))),
        None => Ok(()),
    }
}

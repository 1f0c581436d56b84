//! The training itself.
//!
//! A batch is split into chunks of a fixed size; chunk `i` adds to lane `i % LANES`, in order; the lanes are
//! added up in order. Threads only choose who works on a lane, so that the sums, and the file in the end, do not
//! depend on how many there are. They depend on the kind of processor: longer vectors add in another order.

use std::{
    ops::ControlFlow,
    sync::{Mutex, PoisonError},
};

use super::{
    Augment, Graph, Optimiser, TuneError,
    ops::CHUNK,
    optimise::{self, Memory},
    random::Random,
    run::{Packed, Part, Plan, Worker},
};

/// Sums that a batch is split into; more threads than this do not help.
const LANES: usize = 8;
/// Below so many multiply-accumulates, starting a thread costs more than it saves.
const WORTH_A_THREAD: usize = 4_000_000;

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

/// One lane's sums.
#[derive(Default)]
struct Lane {
    gradients: Vec<f32>,
    loss: f64,
}

/// What a step looks at.
struct Step<'a> {
    /// Whole pictures, or values at the border.
    values: &'a [f32],
    cached: bool,
    labels: &'a [u32],
    /// Which of them.
    chosen: &'a [usize],
    augment: Option<(Augment, u64)>,
    smoothing: f32,
    threads: usize,
}

fn check(graph: &Graph, settings: &Settings) -> Result<(), TuneError> {
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

fn plan<'a>(graph: &'a Graph, settings: &Settings) -> Plan<'a> {
    let first = match settings.train {
        Train::All => 0,
        Train::LastBlocks(count) => graph.layers - count.min(graph.layers),
    };
    let trained = graph
        .constants
        .iter()
        .map(|c| c.role.is_some_and(|role| role.layer >= first));
    Plan::new(graph, trained.collect(), false)
}

/// Whether the frozen part's results are kept.
fn caches(settings: &Settings) -> bool {
    settings.train != Train::All && settings.augment.is_none()
}

/// Bytes that [`train`] takes on top of the graph and the data, about: for `pictures` in memory, or 0 if they
/// are streamed.
///
/// # Errors
/// [`TuneError::Settings`] as [`train`] itself.
pub fn estimate(graph: &Graph, settings: &Settings, pictures: usize) -> Result<usize, TuneError> {
    check(graph, settings)?;
    let plan = plan(graph, settings);
    let cached = pictures > 0 && caches(settings);
    let cache = if cached {
        pictures * plan.border_len()
    } else {
        0
    };
    let constants: usize = graph
        .constants
        .iter()
        .map(|constant| constant.values.len())
        .sum();
    let lanes = LANES.min(settings.batch.div_ceil(CHUNK));
    // Values, packed twice, gradient, memory; the file is written once more.
    let floats = cache + constants * (5 + settings.optimiser.memory()) + lanes * plan.packed;
    let workers = settings.threads.min(LANES) * plan.worker_bytes(true);
    Ok(floats * size_of::<f32>() + workers)
}

/// Trains. Deterministic: the same graph, data, settings and seed give the same bytes on the same kind of
/// processor, whatever the number of threads.
///
/// # Errors
/// When settings or data do not fit the graph, when the loss is no number any more, or when `progress`,
/// which is told after each step, breaks.
pub fn train(
    graph: &Graph,
    mut data: Data<'_>,
    settings: &Settings,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Tuned, TuneError> {
    check(graph, settings)?;
    let plan = plan(graph, settings);
    let mut constants = graph.values();
    let mut packed = Packed::default();
    plan.pack(Part::All, &constants, &mut packed);
    let mut workers: Vec<Worker> = (0..settings.threads.min(LANES))
        .map(|_| plan.worker())
        .collect();
    let mut cache = None;
    let steps = match &data {
        Data::Stream { steps: 0, .. } => return Err(TuneError::Data("no batch".into())),
        Data::Stream { steps, .. } => *steps,
        Data::Memory(batch) => {
            check_batch(graph, batch)?;
            if caches(settings) {
                let mut kept = vec![0.0; batch.labels.len() * plan.border_len()];
                fill(
                    &plan,
                    &mut workers,
                    &packed,
                    &constants,
                    &batch.pictures,
                    &mut kept,
                );
                cache = Some(kept);
            }
            batch.labels.len().div_ceil(settings.batch)
        }
    };
    let mut lanes: Vec<Lane> = (0..LANES).map(|_| Lane::default()).collect();
    let mut memories = vec![Memory::default(); constants.len()];
    let mut gradients = vec![Vec::new(); constants.len()];
    let mut losses = Vec::new();
    for epoch in 0..settings.epochs {
        let mut order: Vec<usize> = match &data {
            Data::Memory(batch) => (0..batch.labels.len()).collect(),
            Data::Stream { .. } => Vec::new(),
        };
        Random::new(&[settings.seed, 1, epoch as u64]).shuffle(&mut order);
        for step in 0..steps {
            let number = epoch * steps + step;
            let streamed;
            let (batch, chosen) = match &mut data {
                Data::Memory(batch) => {
                    let start = step * settings.batch;
                    (
                        *batch,
                        order[start..order.len().min(start + settings.batch)].to_vec(),
                    )
                }
                Data::Stream { next, .. } => {
                    streamed = next(number);
                    check_batch(graph, &streamed)?;
                    (&streamed, (0..streamed.labels.len()).collect())
                }
            };
            let seen = Step {
                values: cache.as_ref().unwrap_or(&batch.pictures),
                cached: cache.is_some(),
                labels: &batch.labels,
                chosen: &chosen,
                augment: match data {
                    Data::Memory(_) => settings
                        .augment
                        .map(|a| (a, settings.seed ^ ((epoch as u64) << 32))),
                    Data::Stream { .. } => None,
                },
                smoothing: settings.smoothing,
                threads: settings.threads,
            };
            let loss = batch_gradients(&plan, &mut workers, &mut lanes, &packed, &constants, &seen);
            if !loss.is_finite() {
                return Err(TuneError::Diverged(number));
            }
            losses.push(loss);
            plan.unpack(&lanes[0].gradients, &mut gradients);
            let share = optimise::schedule(number, settings.epochs * steps, settings.warm_up);
            for (at, constant) in graph.constants.iter().enumerate() {
                if let Some(role) = constant.role.filter(|_| plan.trained[at]) {
                    let head = if role.layer + 1 == graph.layers {
                        settings.head_rate
                    } else {
                        1.0
                    };
                    settings.optimiser.step(
                        number,
                        settings.rate * share * head,
                        optimise::decay(role, settings.decay),
                        &mut constants[at],
                        &gradients[at],
                        &mut memories[at],
                    );
                }
            }
            plan.pack(Part::Trained, &constants, &mut packed);
            let epochs = settings.epochs;
            if progress(Progress {
                epoch,
                epochs,
                step: step + 1,
                steps,
                loss,
            })
            .is_break()
            {
                return Err(TuneError::Stopped);
            }
        }
    }
    if plan
        .trained
        .iter()
        .zip(&constants)
        .any(|(t, values)| *t && values.iter().any(|v| !v.is_finite()))
    {
        return Err(TuneError::Diverged(losses.len()));
    }
    Ok(Tuned {
        onnx: graph.write(&constants, &plan.trained),
        losses,
    })
}

fn check_batch(graph: &Graph, batch: &Batch) -> Result<(), TuneError> {
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

/// Lets the workers take jobs until none is left.
fn share<J: Send>(
    workers: &mut [Worker],
    jobs: impl Iterator<Item = J> + Send,
    work: impl Fn(&mut Worker, J) + Sync,
) {
    let jobs = Mutex::new(jobs);
    let run = |worker: &mut Worker| {
        loop {
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(job) = job else { break };
            work(worker, job);
        }
    };
    let Some((own, others)) = workers.split_first_mut() else {
        return;
    };
    std::thread::scope(|scope| {
        for worker in others {
            scope.spawn(|| run(worker));
        }
        run(own);
    });
}

/// Runs the frozen part on every picture.
fn fill(
    plan: &Plan<'_>,
    workers: &mut [Worker],
    packed: &Packed,
    constants: &[Vec<f32>],
    pictures: &[f32],
    kept: &mut [f32],
) {
    let (from, to) = (plan.graph.input_len(), plan.border_len());
    let jobs = pictures
        .chunks(CHUNK * from)
        .zip(kept.chunks_mut(CHUNK * to));
    share(workers, jobs, |worker, (pictures, kept)| {
        let n = plan.load_all(worker, pictures);
        plan.forward(worker, Part::Frozen, n, packed, constants);
        for (at, kept) in kept.chunks_mut(to).enumerate() {
            plan.store_border(worker, at, kept);
        }
    });
}

/// Leaves the batch's gradients in the first lane and returns the mean loss.
fn batch_gradients(
    plan: &Plan<'_>,
    workers: &mut [Worker],
    lanes: &mut [Lane],
    packed: &Packed,
    constants: &[Vec<f32>],
    step: &Step<'_>,
) -> f32 {
    let chunks = step.chosen.len().div_ceil(CHUNK);
    let used = LANES.min(chunks).max(1);
    let macs = if step.cached {
        plan.packed
    } else {
        plan.graph.macs()
    };
    let threads = if macs.saturating_mul(step.chosen.len()) < WORTH_A_THREAD {
        1
    } else {
        step.threads
    };
    let threads = threads.min(workers.len()).min(used);
    share(
        &mut workers[..threads],
        lanes[..used].iter_mut().enumerate(),
        |worker, (number, lane)| {
            lane.loss = 0.0;
            lane.gradients.clear();
            lane.gradients.resize(plan.packed, 0.0);
            for chosen in step.chosen.chunks(CHUNK).skip(number).step_by(used) {
                lane.loss += chunk(
                    plan,
                    worker,
                    &mut lane.gradients,
                    packed,
                    constants,
                    step,
                    chosen,
                );
            }
        },
    );
    let (first, rest) = lanes.split_at_mut(1);
    for lane in &rest[..used - 1] {
        first[0].loss += lane.loss;
        for (sum, value) in first[0].gradients.iter_mut().zip(&lane.gradients) {
            *sum += value;
        }
    }
    (first[0].loss / step.chosen.len() as f64) as f32
}

/// Adds the gradients of one chunk and returns the sum of its losses.
fn chunk(
    plan: &Plan<'_>,
    worker: &mut Worker,
    gradients: &mut [f32],
    packed: &Packed,
    constants: &[Vec<f32>],
    step: &Step<'_>,
    chosen: &[usize],
) -> f64 {
    let (n, shape) = (chosen.len(), plan.graph.shapes[0]);
    let len = if step.cached {
        plan.border_len()
    } else {
        shape.len()
    };
    let mut changed = vec![
        0.0;
        if step.augment.is_some() {
            shape.len()
        } else {
            0
        }
    ];
    for (at, &picture) in chosen.iter().enumerate() {
        let values = &step.values[picture * len..][..len];
        if step.cached {
            plan.load_border(worker, at, values);
        } else if let Some((augment, seed)) = step.augment {
            let mut random = Random::new(&[seed, 2, picture as u64]);
            augment.apply(&mut random, shape, values, &mut changed);
            plan.load(worker, at, &changed);
        } else {
            plan.load(worker, at, values);
        }
    }
    let part = if step.cached {
        Part::Trained
    } else {
        Part::All
    };
    plan.forward(worker, part, n, packed, constants);
    let mut loss = 0.0;
    let share = 1.0 / step.chosen.len() as f32;
    let (logits, gradient) = plan.output(worker);
    let classes = plan.graph.output_len();
    let rows = logits
        .chunks_exact(classes)
        .zip(gradient.chunks_exact_mut(classes));
    for (&picture, (logits, gradient)) in chosen.iter().zip(rows) {
        let label = step.labels[picture] as usize;
        loss += optimise::loss(logits, label, step.smoothing, share, gradient);
    }
    plan.backward(worker, n, packed, constants, gradients);
    loss
}

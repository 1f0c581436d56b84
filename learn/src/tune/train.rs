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
    Augment, Data, Graph, Progress, Settings, Train, TuneError, Tuned,
    ops::CHUNK,
    optimise::{self, Memory},
    random::Random,
    run::{Packed, Part, Plan, Worker},
    settings::{check, check_batch},
};

/// Sums that a batch is split into; more threads than this do not help.
const LANES: usize = 8;
/// Below so many multiply-accumulates, starting a thread costs more than it saves.
const WORTH_A_THREAD: usize = 4_000_000;

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

//! Does a model, on this very machine, still say about its golden pictures what it said when it was made?

use std::fmt;

use crate::{
    bundle::Bundle,
    engine::{Engine, EngineError},
    image::Picture,
    manifest::Golden,
    outcome::Outcome,
};

/// Timed runs: an odd number, enough for a median that one hiccup cannot move.
const TIMED_RUNS: usize = 9;

/// How one golden case came out.
#[derive(Clone, Debug, PartialEq)]
pub struct GoldenResult {
    /// The picture.
    pub image: String,
    /// What the model said, if it came to that.
    pub label: Option<String>,
    /// Largest difference of a score from the expected one.
    pub score_off: f32,
    /// Largest difference of a value of the embedding from the expected one.
    pub embedding_off: f32,
    /// What is wrong; empty for a case that passed.
    pub problems: Vec<String>,
}

/// The result of a self-test.
#[derive(Clone, Debug, PartialEq)]
pub struct SelfTest {
    /// `name@version`.
    pub model: String,
    /// Each golden case.
    pub golden: Vec<GoldenResult>,
    /// Median of one run of the model, from tensor to outcome, in milliseconds; none if it never ran.
    pub latency_ms: Option<f32>,
    /// What is allowed.
    pub latency_budget_ms: f32,
    /// By how many MiB the process grew while the model was loaded; none where that cannot be told.
    pub memory_mib: Option<f32>,
    /// What is allowed.
    pub memory_budget_mib: u64,
}

impl SelfTest {
    /// Did every golden case pass within the budgets?
    #[must_use]
    pub fn passed(&self) -> bool {
        self.golden.iter().all(|golden| golden.problems.is_empty())
            && self.in_time()
            && self.in_memory()
    }

    pub(crate) fn in_time(&self) -> bool {
        self.latency_ms
            .is_some_and(|ms| ms <= self.latency_budget_ms)
    }

    pub(crate) fn in_memory(&self) -> bool {
        #[expect(clippy::cast_precision_loss, reason = "at most 65536")]
        let budget = self.memory_budget_mib as f32;
        self.memory_mib.is_none_or(|mib| mib <= budget)
    }
}

impl fmt::Display for SelfTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = |fine: bool| if fine { "ok" } else { "FAILED" };
        writeln!(f, "self-test of {}: {}", self.model, verdict(self.passed()))?;
        let width = self
            .golden
            .iter()
            .map(|golden| golden.image.len())
            .max()
            .unwrap_or(0);
        for golden in &self.golden {
            writeln!(
                f,
                "  {:width$}  {:6}  {}  scores off by {:.5}, embedding off by {:.5}",
                golden.image,
                verdict(golden.problems.is_empty()),
                golden.label.as_deref().unwrap_or("-"),
                golden.score_off,
                golden.embedding_off,
            )?;
            for problem in &golden.problems {
                writeln!(f, "  {:width$}          {problem}", "")?;
            }
        }
        let time = self
            .latency_ms
            .map_or("never ran".to_owned(), |ms| format!("{ms:.2} ms"));
        writeln!(
            f,
            "  {:width$}  {:6}  {time} a run, {} ms allowed",
            "time",
            verdict(self.in_time()),
            self.latency_budget_ms
        )?;
        let memory = self
            .memory_mib
            .map_or("not measured".to_owned(), |mib| format!("{mib:.1} MiB"));
        write!(
            f,
            "  {:width$}  {:6}  {memory}, {} MiB allowed",
            "memory",
            verdict(self.in_memory()),
            self.memory_budget_mib
        )
    }
}

fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// Compares an outcome with a golden case.
fn compare(case: &Golden, outcome: &Outcome, labels: &[String]) -> GoldenResult {
    let mut problems = Vec::new();
    // The top class, whether or not it is above the threshold.
    let label = outcome.class.and_then(|class| labels.get(class)).cloned();
    if case.label.is_some() && label != case.label {
        problems.push(format!(
            "label {:?}, expected {:?}",
            label.as_deref().unwrap_or("-"),
            case.label.as_deref().unwrap_or("-")
        ));
    }
    let score_off = largest_difference(&outcome.scores, &case.scores);
    if score_off > case.tolerance {
        problems.push(format!(
            "a score is off by {score_off}, {} is allowed",
            case.tolerance
        ));
    }
    let embedding_off = largest_difference(&outcome.embedding, &case.embedding);
    if embedding_off > case.embedding_tolerance {
        problems.push(format!(
            "a value of the embedding is off by {embedding_off}, {} is allowed",
            case.embedding_tolerance
        ));
    }
    GoldenResult {
        image: case.image.clone(),
        label,
        score_off,
        embedding_off,
        problems,
    }
}

/// Runs every golden case of `bundle` on `engine`, which must have been loaded from it, and measures.
#[must_use]
pub fn self_test(bundle: &Bundle, engine: &Engine) -> SelfTest {
    let manifest = &bundle.manifest;
    let mut input = None;
    let golden = manifest
        .golden
        .iter()
        .map(|case| {
            let outcome = bundle
                .image_bytes(&case.image)
                .map_err(EngineError::from)
                .and_then(|bytes| engine.tensor(&Picture::decode(&bytes)?))
                .and_then(|tensor| {
                    let outcome = engine.run(&tensor);
                    input.get_or_insert(tensor);
                    outcome
                });
            match outcome {
                Ok(outcome) => compare(case, &outcome, &manifest.output.labels),
                Err(error) => GoldenResult {
                    image: case.image.clone(),
                    label: None,
                    score_off: 0.0,
                    embedding_off: 0.0,
                    problems: vec![error.to_string()],
                },
            }
        })
        .collect();
    #[expect(clippy::cast_precision_loss, reason = "below 2^24 by far")]
    let memory_mib = engine.memory_kib().map(|kib| kib as f32 / 1024.0);
    SelfTest {
        model: bundle.id(),
        golden,
        latency_ms: input.and_then(|input| median_ms(|| engine.run(&input).is_ok())),
        latency_budget_ms: manifest.budget.latency_ms,
        memory_mib,
        memory_budget_mib: manifest.budget.memory_mib,
    }
}

/// Median duration of `run`; none if it fails.
#[expect(
    clippy::disallowed_methods,
    reason = "measuring real time is the purpose here"
)]
fn median_ms(run: impl Fn() -> bool) -> Option<f32> {
    let mut times = Vec::with_capacity(TIMED_RUNS);
    for _ in 0..TIMED_RUNS {
        let start = std::time::Instant::now();
        if !run() {
            return None;
        }
        times.push(start.elapsed().as_secs_f32() * 1000.0);
    }
    times.sort_by(f32::total_cmp);
    times.get(TIMED_RUNS / 2).copied()
}

//! Is a candidate better? Both are measured on the holdout by the device's own code, and the gate decides.

use std::{collections::HashSet, sync::Arc};

use learn::{
    evaluate::{self, Evaluation},
    gate::{self, Answers, Cost, Holdout, Verdict},
};
use models::{Bundle, Engine, Fault, Outcome, Task};
use serde::Serialize;
use tokio::task::spawn_blocking;

use super::{
    catalog::{CatalogError, TRIAL},
    jobs::Reporter,
    look::look,
    work::{Material, Work, WorkError},
};
use crate::datasets::{Dataset, Item};

/// Generations that are searched for pictures of the holdout.
const ANCESTORS: usize = 50;

/// What was measured, and what follows from it.
pub(super) struct Judged {
    pub(super) report: Option<Report>,
    pub(super) verdict: Verdict,
}

/// The figures of a candidate, and the accuracy of the model whose place it would take.
#[derive(Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    candidate: Evaluation,
    /// `name@version`; nothing where there was none, and the guess of the most frequent class is compared with.
    current: Option<String>,
    /// Its accuracy on the same holdout, 0..=1.
    current_accuracy: f64,
}

impl Work {
    /// Measures candidate and current model on the holdout, and asks the gate.
    pub(super) async fn judge(
        &self,
        dataset: &Dataset,
        material: &Material,
        bundle: &Bundle,
        engine: &Arc<Engine>,
        reporter: &Reporter,
    ) -> Result<Judged, WorkError> {
        let images: Vec<String> = material.holdout.iter().map(|i| i.sha256.clone()).collect();
        let truth: Vec<u32> = material.holdout.iter().map(|i| i.class).collect();
        let candidate = look(&self.objects, engine, &images, reporter, "holdout").await?;
        let candidate = probabilities(&candidate);
        let labels = &bundle.manifest.output.labels;
        let task = &bundle.manifest.name;
        let (current_id, current_labels, current) = match self.catalog.find(task).await {
            Ok(model) if model.kind == Task::Classify.as_str() => {
                let (catalog, id) = (self.catalog.clone(), model.id());
                let current = spawn_blocking(move || catalog.engine(&model)).await??;
                let seen = look(&self.objects, &current, &images, reporter, "holdout").await?;
                (
                    Some(id),
                    current.manifest().output.labels.clone(),
                    probabilities(&seen),
                )
            }
            Ok(_) | Err(CatalogError::Unknown(_)) => {
                let (labels, guessed) = guess(dataset, material, labels);
                (None, labels, guessed)
            }
            Err(error) => return Err(error.into()),
        };
        let judged = self.catalog.judged(task, &dataset.digest).await?;
        let trial = {
            let (path, program) = (bundle.dir().to_owned(), self.catalog.program.clone());
            spawn_blocking(move || models::try_bundle(&program, &path, TRIAL)).await?
        };
        let trial =
            trial.map_err(|error| WorkError::Judge(format!("trying the model: {error}")))?;
        // Time and memory are the gate's business.
        let budget = bundle.manifest.budget;
        let broken = trial
            .fault
            .filter(|f| !matches!(f, Fault::Latency | Fault::Memory));
        if broken.is_some() {
            return Err(WorkError::Judge(format!("self-test: {}", trial.detail)));
        }
        let measured = |value: Option<f32>| value.map_or(f64::INFINITY, f64::from);
        let cost = Cost {
            latency_ms: measured(trial.latency_ms),
            allowed_latency_ms: f64::from(budget.latency_ms),
            memory_mib: measured(trial.memory_mib),
            #[expect(clippy::cast_precision_loss, reason = "MiB")]
            allowed_memory_mib: budget.memory_mib as f64,
        };
        let holdout_view = Holdout {
            labels: &dataset.classes,
            truth: &truth,
            leaked: self.leaked(dataset, material).await?,
            judged,
        };
        let verdict = gate::judge(
            &holdout_view,
            &Answers {
                labels: &current_labels,
                probabilities: &current,
            },
            &Answers {
                labels,
                probabilities: &candidate,
            },
            &cost,
            &self.settings.policy,
        )
        .map_err(|error| WorkError::Judge(error.to_string()))?;
        let report = if truth.is_empty() {
            None
        } else {
            let before = evaluation(dataset, &truth, &current_labels, &current)?;
            Some(Report {
                candidate: evaluation(dataset, &truth, labels, &candidate)?,
                current: current_id,
                current_accuracy: before.accuracy,
            })
        };
        Ok(Judged { report, verdict })
    }

    /// Pictures of the holdout that the candidate, or a model that it grew out of, was trained on.
    async fn leaked(&self, dataset: &Dataset, material: &Material) -> Result<usize, WorkError> {
        let held: HashSet<&str> = material.holdout.iter().map(|i| i.sha256.as_str()).collect();
        let trained = |items: &[Item]| -> HashSet<String> {
            let trained = items
                .iter()
                .filter(|i| !i.holdout && held.contains(i.sha256.as_str()));
            trained.map(|i| i.sha256.clone()).collect()
        };
        let mut leaked = trained(&dataset.items);
        let mut parent = Some(material.base.clone());
        for _ in 0..ANCESTORS {
            let Some(model) = parent else { break };
            if let Some(digest) = &model.dataset {
                leaked.extend(trained(&self.datasets.get(digest).await?.items));
            }
            parent = match &model.parent {
                Some(id) => self.catalog.find(id).await.ok(),
                None => None,
            };
        }
        Ok(leaked.len())
    }
}

fn probabilities(outcomes: &[Outcome]) -> Vec<f32> {
    outcomes
        .iter()
        .flat_map(|outcome| outcome.scores.iter().copied())
        .collect()
}

/// Where there is no model yet: the answer of one that always names the most frequent class.
fn guess(dataset: &Dataset, material: &Material, labels: &[String]) -> (Vec<String>, Vec<f32>) {
    let mut counts = vec![0usize; labels.len()];
    for (_, class) in &material.train {
        if let Some(count) = counts.get_mut(*class as usize) {
            *count += 1;
        }
    }
    let most = (0..counts.len())
        .max_by_key(|class| counts[*class])
        .unwrap_or_default();
    let names = if labels.is_empty() {
        dataset.classes.clone()
    } else {
        labels.to_vec()
    };
    let row = (0..names.len()).map(|class| f32::from(u8::from(class == most)));
    let row: Vec<f32> = row.collect();
    (names, row.repeat(material.holdout.len()))
}

/// The figures of the candidate. Classes of the holdout that it does not know count as never answered.
fn evaluation(
    dataset: &Dataset,
    truth: &[u32],
    labels: &[String],
    probabilities: &[f32],
) -> Result<Evaluation, WorkError> {
    let mut names = labels.to_vec();
    let mut place = Vec::new();
    for class in &dataset.classes {
        let at = names
            .iter()
            .position(|name| name == class)
            .unwrap_or_else(|| {
                names.push(class.clone());
                names.len() - 1
            });
        place.push(at as u32);
    }
    let truth: Vec<u32> = truth
        .iter()
        .filter_map(|class| place.get(*class as usize).copied())
        .collect();
    let mut rows = Vec::with_capacity(truth.len() * names.len());
    for row in probabilities.chunks_exact(labels.len().max(1)) {
        rows.extend_from_slice(row);
        rows.resize(rows.len() + names.len() - labels.len(), 0.0);
    }
    evaluate::evaluate(&truth, &rows, &names).map_err(|error| WorkError::Judge(error.to_string()))
}

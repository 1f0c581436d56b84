//! Which outputs of a graph are the scores and the embedding, and whether scores are probabilities.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use models::{Activation, InputSpec, OutputSpec, Port, Sketch};

use super::{
    ModelImport,
    family::{Answer, Family},
};

/// A list of labels in a file: ten thousand of a hundred bytes each, and some room.
const MAX_LABELS_BYTES: u64 = 2 << 20;
/// How far probabilities may be from adding up to 1: a thousand of them, rounded to half precision.
const SUM: f32 = 1e-3;

/// The labels, from a file or from the command line itself.
pub(super) fn labels(given: &str) -> anyhow::Result<Vec<String>> {
    let path = Path::new(given);
    let text = if path.is_file() {
        let length = path.metadata()?.len();
        ensure!(length <= MAX_LABELS_BYTES, "{given} is larger than 2 MiB");
        match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => bail!("cannot read {given}: {error}"),
        }
    } else if given.contains(',') || !given.contains(['/', '.']) {
        given.replace(',', "\n")
    } else {
        bail!("--labels {given}: no such file; give a file with one label in each line, or A,B,C");
    };
    let labels = text
        .lines()
        .map(str::trim)
        .filter(|label| !label.is_empty());
    // As editors on Windows begin a text.
    Ok(labels
        .map(|label| label.trim_start_matches('\u{feff}').to_owned())
        .collect())
}

/// One score per label at most lies in one direction; boxes and masks have more.
fn is_flat(sizes: &[usize]) -> bool {
    sizes.iter().filter(|&&size| size != 1).count() <= 1
}

/// The same of what a file declares, where an open size is one above 1, except that of the batch.
fn may_be_flat(port: &Port) -> bool {
    let sizes = port.sizes.iter().flatten().skip(1);
    sizes.filter(|&&size| size != Some(1)).count() <= 1
}

fn shown(sizes: &[Option<usize>]) -> String {
    let size = |size: &Option<usize>| size.map_or("?".to_owned(), |size| size.to_string());
    sizes.iter().map(size).collect::<Vec<_>>().join("×")
}

fn boxes(family: Family, name: &str, sizes: &[Option<usize>]) -> anyhow::Error {
    let instead = match family {
        Family::Ultralytics => "a model for classification, as yolo11n-cls.pt",
        _ => "a classifier, with one score per label",
    };
    anyhow::anyhow!(
        "the output {name:?} has the shape {}: that is detection or segmentation, which devices cannot run yet; \
         bring {instead}",
        shown(sizes)
    )
}

/// The outputs that this is about: what was named, or all that could be scores.
fn candidates(import: &ModelImport, sketch: &Sketch) -> anyhow::Result<Vec<String>> {
    for name in import.scores.iter().chain(&import.embedding) {
        if !sketch.outputs.iter().any(|port| &port.name == name) {
            let names: Vec<&str> = sketch.outputs.iter().map(|o| o.name.as_str()).collect();
            bail!(
                "the model has no output {name:?}, it has: {}",
                names.join(", ")
            );
        }
    }
    let wanted = |port: &&Port| import.scores.as_ref().is_none_or(|name| &port.name == name);
    let is_embedding = |port: &&Port| Some(&port.name) == import.embedding.as_ref();
    let outputs: Vec<&Port> = sketch.outputs.iter().filter(wanted).collect();
    let flat = |port: &&&Port| may_be_flat(port) && !is_embedding(port);
    let names: Vec<String> = outputs
        .iter()
        .filter(flat)
        .map(|o| o.name.clone())
        .collect();
    match outputs.iter().find(|port| !may_be_flat(port)) {
        Some(port) if names.is_empty() => {
            let sizes = port.sizes.as_deref().unwrap_or_default();
            Err(boxes(import.like, &port.name, sizes))
        }
        _ if names.is_empty() => bail!("the model has no output for scores"),
        _ => Ok(names),
    }
}

/// The model's outputs for these labels; how scores become probabilities is found out later.
pub(super) fn output(
    import: &ModelImport,
    sketch: Sketch,
    input: &InputSpec,
    labels: Vec<String>,
) -> anyhow::Result<OutputSpec> {
    let mut names = candidates(import, &sketch)?;
    let scored = names.len();
    names.extend(import.embedding.clone());
    let sizes = sketch
        .output_sizes(input, &names)
        .with_context(|| import.file.display().to_string())?;
    let counts: Vec<(&String, usize)> = names
        .iter()
        .zip(&sizes)
        .take(scored)
        .filter(|(_, sizes)| is_flat(sizes))
        .map(|(name, sizes)| (name, sizes.iter().product()))
        .collect();
    if let (true, Some(name), Some(sizes)) = (counts.is_empty(), names.first(), sizes.first()) {
        let sizes: Vec<Option<usize>> = sizes.iter().copied().map(Some).collect();
        return Err(boxes(import.like, name, &sizes));
    }
    let fitting: Vec<&(&String, usize)> = counts
        .iter()
        .filter(|(_, count)| *count == labels.len())
        .collect();
    let scores = match fitting.as_slice() {
        [(name, _)] => (*name).clone(),
        [] => {
            let has: Vec<String> = counts
                .iter()
                .map(|(name, count)| format!("{count} scores ({name:?})"))
                .collect();
            bail!(
                "{} labels are given, the model gives {}",
                labels.len(),
                has.join(" or ")
            );
        }
        _ => {
            let names: Vec<&str> = fitting.iter().map(|(name, _)| name.as_str()).collect();
            bail!(
                "the outputs {} all have {} values; say which are the scores with --scores",
                names.join(", "),
                labels.len()
            );
        }
    };
    let embedding_dim = match &import.embedding {
        Some(name) => {
            let sizes = sizes.last().map(Vec::as_slice).unwrap_or_default();
            ensure!(is_flat(sizes), "the output {name:?} is no embedding");
            sizes.iter().product()
        }
        None => 0,
    };
    Ok(OutputSpec {
        scores: Some(scores),
        activation: Activation::None,
        embedding: import.embedding.clone(),
        embedding_dim,
        labels,
    })
}

/// How these raw answers become probabilities.
pub(super) fn activation<'a>(
    said: Option<Answer>,
    answers: impl Iterator<Item = &'a [f32]> + Clone,
) -> anyhow::Result<Activation> {
    if let Some(said) = said {
        return Ok(said.into());
    }
    let whole = |scores: &[f32]| (scores.iter().sum::<f32>() - 1.0).abs() <= SUM;
    let share = |score: &f32| (-SUM..=1.0 + SUM).contains(score);
    if !answers.clone().all(|scores| scores.iter().all(share)) {
        return Ok(Activation::Softmax);
    }
    if answers.clone().all(whole) {
        return Ok(Activation::None);
    }
    // Most likely each label stands on its own; small logits look the same, and a wrong guess spoils each score.
    bail!(
        "all answers are between 0 and 1 but do not add up to 1; say what they are: --activation none \
         (probabilities, each label on its own) or --activation softmax (logits)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_tell_what_they_are() {
        let of = |answers: &[&[f32]]| activation(None, answers.iter().copied());
        assert_eq!(of(&[&[0.2, 0.8], &[1.0, 0.0]]).unwrap(), Activation::None);
        assert_eq!(
            of(&[&[0.2, 0.8], &[3.0, -2.0]]).unwrap(),
            Activation::Softmax
        );
        assert!(of(&[&[0.2, 0.8], &[0.9, 0.9]]).is_err());
        let said = activation(Some(Answer::Sigmoid), [[0.9, 0.9].as_slice()].into_iter());
        assert_eq!(said.unwrap(), Activation::Sigmoid);
    }

    #[test]
    fn labels_come_from_a_file_or_from_the_line() {
        assert_eq!(labels("a, b,c d").unwrap(), ["a", "b", "c d"]);
        assert!(labels("no/such/labels.txt").is_err());
        assert!(labels("labels.txt").is_err());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("labels.txt");
        std::fs::write(&file, "\u{feff}ok\r\nnot, ok\r\n\r\n").unwrap();
        assert_eq!(labels(file.to_str().unwrap()).unwrap(), ["ok", "not, ok"]);
    }
}

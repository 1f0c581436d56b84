//! What is said about an imported model: on the screen, and in the card that goes with it.

use models::{Bundle, InputSpec, Manifest};

use super::{
    ModelImport,
    samples::{Sample, Samples},
};

/// Answers that are shown of each picture.
const SHOWN: usize = 3;
/// Skipped files that are named.
const NAMED: usize = 3;

fn values(values: &[f32]) -> String {
    let short: Vec<String> = values.iter().map(|value| format!("{value:.4}")).collect();
    short.join(", ")
}

/// The input in words.
fn input(spec: &InputSpec) -> String {
    let (channels, height, width) = spec.channels_height_width();
    format!(
        "{width}×{height} {} ({channels} channels, {}), {}, (pixel / 255 − [{}]) / [{}]",
        spec.color.as_str(),
        spec.layout.as_str(),
        spec.resize.as_str(),
        values(&spec.mean),
        values(&spec.std),
    )
}

fn answers(manifest: &Manifest) -> &'static str {
    match manifest.output.activation {
        models::Activation::None => "probabilities already",
        models::Activation::Sigmoid => "logits, made probabilities by a sigmoid each",
        _ => "logits, made probabilities by softmax",
    }
}

/// `found` of `of` pictures in folders that say their label were named so by the model.
type Agreement = (usize, usize);

fn agreement((found, of): Agreement) -> String {
    format!("{found} of {of} pictures lie in the folder of the label that the model gives")
}

/// The card of a model that is about to be written.
pub(super) fn card(
    import: &ModelImport,
    manifest: &Manifest,
    sha256: &str,
    agreed: Agreement,
) -> String {
    let file = import
        .file
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    let measured = match agreed {
        (_, 0) => "Nothing: the sample pictures do not say what they show.".to_owned(),
        agreed => format!("{}. They are samples, not a test set.", agreement(agreed)),
    };
    format!(
        "# {}\n\nMade elsewhere, and imported with `cloud-coordinator model import --like {}`.\n\n\
         - File: `{file}`, SHA-256 `{sha256}`\n- Input: {}\n- Answers: {}, {}\n\n\
         ## Data\n\nWhat it was trained on, and under which licence, is not known here.\n\n\
         ## Golden pictures\n\nRecorded, not verified: the answers are the model's own, computed by the device's \
         code when it was imported. They prove that a device computes the same, not that it is right.\n\n\
         ## Measured\n\n{measured}\n",
        manifest.id(),
        import.like.as_str(),
        input(&manifest.input),
        manifest.output.labels.len(),
        answers(manifest),
    )
}

/// What came out, for the person who waits for it. `open`: the file did not fix the size of a picture.
pub(super) fn report(
    bundle: &Bundle,
    chosen: &[&Sample],
    open: bool,
    samples: &Samples,
    agreed: Agreement,
) -> String {
    let manifest = &bundle.manifest;
    let scores = manifest.output.scores.as_deref().unwrap_or_default();
    let mut lines = vec![
        format!(
            "  input   {:?}: {}",
            manifest.input.name,
            input(&manifest.input)
        ),
        format!(
            "  output  {scores:?}: {} {}",
            manifest.output.labels.len(),
            answers(manifest)
        ),
        format!(
            "  golden  {} of {} sample pictures, recorded, not verified",
            manifest.golden.len(),
            samples.all.len()
        ),
    ];
    if open {
        lines.push(
            "  The file leaves the size of a picture open; --size sets another one.".to_owned(),
        );
    }
    let skipped = samples.skipped.len();
    if skipped > 0 {
        let named = &samples.skipped[..skipped.min(NAMED)];
        lines.push(format!(
            "  {skipped} files are no pictures: {}",
            named.join("; ")
        ));
    }
    lines.push(
        "What it says about them; if that is wrong, so are the labels or the input:".to_owned(),
    );
    let width = chosen
        .iter()
        .map(|sample| sample.path.chars().count())
        .max();
    let width = width.unwrap_or_default();
    for (golden, sample) in manifest.golden.iter().zip(chosen) {
        let mut best: Vec<(&String, f32)> = manifest
            .output
            .labels
            .iter()
            .zip(golden.scores.iter().copied())
            .collect();
        best.sort_by(|a, b| b.1.total_cmp(&a.1));
        let best: Vec<String> = best
            .iter()
            .take(SHOWN)
            .map(|(label, score)| format!("{label} {score:.2}"))
            .collect();
        lines.push(format!("  {:width$}  {}", sample.path, best.join("  ")));
    }
    if agreed.1 > 0 {
        lines.push(format!("{}.", agreement(agreed)));
    }
    lines.join("\n")
}

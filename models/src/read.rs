//! Reads a manifest and checks all of it, so that every mistake is reported at once.

use std::collections::BTreeSet;

use toml::Table;

use crate::{
    MAX_MODEL_BYTES,
    fields::{FieldError, Fields},
    manifest::{
        Activation, Budget, Color, Filter, GOLDEN_EMBEDDING_VALUES, Golden, InputSpec, Layout,
        Lineage, Manifest, ManifestErrors, ModelFile, OutputSpec, Resize, SCHEMA, Task, Thresholds,
    },
    reference::{Reference, SCORE_BINS},
};

/// Longest side of a model's input in pixels: four times what vision models for small devices use.
const MAX_INPUT_SIDE: usize = 4096;
/// More classes than any known image data set of single labels that would run on a device.
const MAX_LABELS: usize = 10_000;
/// Bytes of one label: it stands in topics' payloads and on a page, not in a text.
const MAX_LABEL_BYTES: usize = 100;
/// Golden cases are run at each activation of a model; this bounds how long that takes.
const MAX_GOLDEN: usize = 64;
/// Values of an embedding: larger than any backbone in use.
const MAX_EMBEDDING: usize = 65_536;
/// Longest free text (description, data set) in bytes.
const MAX_TEXT: usize = 2000;

/// Is this a plain relative path: no root, no `..`, no `\`, no empty part?
pub(crate) fn is_plain_path(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= 255
        && !path.contains(['\\', '\0', ':'])
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

const NOT_PLAIN: &str = "must be a plain relative path inside the bundle";

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// Everything that is wrong with it at once, each with its field; text that is not TOML is one
    /// error.
    pub fn parse(text: &str) -> Result<Self, ManifestErrors> {
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            let line = error
                .span()
                .and_then(|span| text.get(..span.start))
                .map_or(1, |before| before.matches('\n').count() + 1);
            let problem = format!("not TOML, line {line}: {}", error.message());
            ManifestErrors(vec![FieldError {
                field: "manifest".to_owned(),
                problem,
            }])
        })?;
        let mut errors = Vec::new();
        let mut top = Fields::new("", table);

        let schema = top.need("schema", |f| f.whole("schema"));
        top.check(
            schema == SCHEMA,
            "schema",
            "must be 1, the only version that is known",
        );
        let name = top.need("name", |f| f.text("name"));
        let fits = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-');
        let fine = (1..=40).contains(&name.len()) && name.bytes().all(fits);
        top.check(fine, "name", "must be 1 to 40 characters of a-z, 0-9 and -");
        let version = top.need("version", |f| f.text("version"));
        let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'+' | b'-');
        let begins = version.starts_with(|c: char| c.is_ascii_alphanumeric());
        let fine = (1..=32).contains(&version.len()) && begins && version.bytes().all(fits);
        let problem = "must be 1 to 32 characters of letters, digits, '.', '+' and '-', the first a letter or a \
                       digit";
        top.check(fine, "version", problem);
        let task = top.choice("task", Task::WORDS, None);
        let description = top.text("description").unwrap_or_default();
        top.check(
            description.len() <= MAX_TEXT,
            "description",
            "is longer than 2000 bytes",
        );

        let model = model(top.section("model", true), &mut errors);
        let input = input(top.section("input", true), &mut errors);
        let output = output(top.section("output", true), task, &mut errors);
        let thresholds = thresholds(top.section("thresholds", false), &mut errors);
        let budget = budget(top.section("budget", true), &mut errors);
        let cases = top.sections("golden");
        if !(1..=MAX_GOLDEN).contains(&cases.len()) {
            top.wrong(
                "golden",
                format!("must have 1 to {MAX_GOLDEN} cases, has {}", cases.len()),
            );
        }
        let golden = cases
            .into_iter()
            .map(|case| one_golden(case, task, &output, &mut errors))
            .collect();
        let reference = top
            .has("reference")
            .then(|| reference(top.section("reference", false), &output, &mut errors));
        let lineage = lineage(top.section("lineage", false), &mut errors);
        let mut all = Vec::new();
        top.finish(&mut all);
        all.append(&mut errors);
        if !all.is_empty() {
            return Err(ManifestErrors(all));
        }
        Ok(Self {
            schema,
            name,
            version,
            task,
            description,
            model,
            input,
            output,
            thresholds,
            budget,
            golden,
            reference,
            lineage,
        })
    }
}

fn model(mut f: Fields, errors: &mut Vec<FieldError>) -> ModelFile {
    let file = f.need("file", |f| f.text("file"));
    f.check(is_plain_path(&file), "file", NOT_PLAIN);
    let sha256 = f.need("sha256", |f| f.text("sha256")).to_ascii_lowercase();
    f.check(
        is_digest(&sha256),
        "sha256",
        "must be 64 hexadecimal digits",
    );
    let bytes = f.need("bytes", |f| f.whole("bytes"));
    let problem = "must be 1 to 268435456 (256 MiB)";
    f.check((1..=MAX_MODEL_BYTES).contains(&bytes), "bytes", problem);
    f.finish(errors);
    ModelFile {
        file,
        sha256,
        bytes,
    }
}

fn input(mut f: Fields, errors: &mut Vec<FieldError>) -> InputSpec {
    let name = f.need("name", |f| f.text("name"));
    f.check(
        (1..=255).contains(&name.len()),
        "name",
        "must be 1 to 255 bytes",
    );
    let layout = f.choice("layout", Layout::WORDS, Some(Layout::Nchw));
    let color = f.choice("color", Color::WORDS, Some(Color::Rgb));
    let resize = f.choice("resize", Resize::WORDS, Some(Resize::Stretch));
    let filter = f.choice("filter", Filter::WORDS, Some(Filter::Bilinear));
    let pad = f.whole("pad").unwrap_or(114);
    let pad = u8::try_from(pad).unwrap_or_else(|_| {
        f.wrong("pad", "must be 0 to 255");
        0
    });
    let expected = if color == Color::Gray { 1 } else { 3 };
    let sizes = f.need("shape", |f| f.wholes("shape"));
    let shape: [usize; 4] = sizes.as_slice().try_into().unwrap_or_default();
    let mut spec = InputSpec {
        name,
        shape,
        layout,
        color,
        resize,
        filter,
        pad,
        mean: Vec::new(),
        std: Vec::new(),
    };
    if sizes.len() == 4 {
        let (channels, height, width) = spec.channels_height_width();
        f.check(
            shape[0] == 1,
            "shape",
            "must have a batch (first size) of 1",
        );
        if channels != expected {
            let problem =
                format!("must have {expected} channels for this color and layout, has {channels}");
            f.wrong("shape", problem);
        }
        let sides = 1..=MAX_INPUT_SIDE;
        let fine = sides.contains(&height) && sides.contains(&width);
        f.check(fine, "shape", "must have a height and width of 1 to 4096");
    } else {
        f.wrong("shape", format!("must have 4 sizes, has {}", sizes.len()));
    }
    for key in ["mean", "std"] {
        let default = if key == "mean" { 0.0 } else { 1.0 };
        let values = if f.has(key) {
            f.numbers(key)
        } else {
            Some(vec![default; expected])
        };
        // Reported already, value by value.
        let Some(values) = values else { continue };
        if values.len() != expected {
            f.wrong(
                key,
                format!("must have {expected} values, has {}", values.len()),
            );
        }
        for (at, value) in values.iter().enumerate() {
            f.check(
                key == "mean" || *value > 0.0,
                &format!("{key}[{at}]"),
                "must be > 0",
            );
        }
        if key == "mean" {
            spec.mean = values;
        } else {
            spec.std = values;
        }
    }
    f.finish(errors);
    spec
}

fn output(mut f: Fields, task: Task, errors: &mut Vec<FieldError>) -> OutputSpec {
    let scores = f.text("scores");
    let activation = f.choice("activation", Activation::WORDS, Some(Activation::Softmax));
    let embedding = f.text("embedding");
    for (key, name) in [("scores", &scores), ("embedding", &embedding)] {
        let fine = name.as_ref().is_none_or(|n| (1..=255).contains(&n.len()));
        f.check(fine, key, "must be 1 to 255 bytes");
    }
    let dim = f.whole("embedding_dim");
    let embedding_dim = dim
        .and_then(|dim| usize::try_from(dim).ok())
        .unwrap_or_default();
    if embedding.is_some() {
        let fine = (1..=MAX_EMBEDDING).contains(&embedding_dim);
        f.check(
            fine,
            "embedding_dim",
            "must be 1 to 65536 beside an embedding",
        );
    } else {
        f.check(
            dim.is_none(),
            "embedding_dim",
            "has no embedding to belong to",
        );
        f.check(
            task != Task::Embed,
            "embedding",
            "is missing, and the task is embed",
        );
    }
    if task == Task::Classify {
        f.check(
            scores.is_some(),
            "scores",
            "is missing, and the task is classify",
        );
    }
    if task == Task::Embed {
        f.check(
            scores.is_none(),
            "scores",
            "has no meaning for the task embed",
        );
        f.check(
            !f.has("labels"),
            "labels",
            "has no meaning for the task embed",
        );
    }
    let mut labels = f.texts("labels").unwrap_or_default();
    if task == Task::Classify {
        let fine = (1..=MAX_LABELS).contains(&labels.len());
        f.check(fine, "labels", "must have 1 to 10000 labels");
    }
    labels.truncate(MAX_LABELS);
    let mut seen = BTreeSet::new();
    for (at, label) in labels.iter().enumerate() {
        let key = format!("labels[{at}]");
        let fine = (1..=MAX_LABEL_BYTES).contains(&label.len())
            && label.trim() == label
            && !label.chars().any(char::is_control);
        f.check(
            fine,
            &key,
            "must be 1 to 100 bytes without control characters or outer blanks",
        );
        if !seen.insert(label) {
            f.wrong(&key, format!("{label:?} occurs twice"));
        }
    }
    f.finish(errors);
    OutputSpec {
        scores,
        activation,
        embedding,
        embedding_dim,
        labels,
    }
}

fn thresholds(mut f: Fields, errors: &mut Vec<FieldError>) -> Thresholds {
    let min_score = f.number("min_score");
    let fine = min_score.is_none_or(|score| (0.0..=1.0).contains(&score));
    f.check(fine, "min_score", "must be 0 to 1");
    f.finish(errors);
    Thresholds { min_score }
}

fn budget(mut f: Fields, errors: &mut Vec<FieldError>) -> Budget {
    let latency_ms = f.need("latency_ms", |f| f.number("latency_ms"));
    // Ten minutes: whoever needs more than that has mistyped the unit.
    let fine = latency_ms > 0.0 && latency_ms <= 600_000.0;
    f.check(fine, "latency_ms", "must be above 0 and at most 600000");
    let memory_mib = f.need("memory_mib", |f| f.whole("memory_mib"));
    let fine = (1..=65_536).contains(&memory_mib);
    f.check(fine, "memory_mib", "must be 1 to 65536");
    f.finish(errors);
    Budget {
        latency_ms,
        memory_mib,
    }
}

fn one_golden(
    mut f: Fields,
    task: Task,
    output: &OutputSpec,
    errors: &mut Vec<FieldError>,
) -> Golden {
    let image = f.need("image", |f| f.text("image"));
    f.check(is_plain_path(&image), "image", NOT_PLAIN);
    let label = f.text("label");
    let scores = f.numbers("scores").unwrap_or_default();
    let embedding = f.numbers("embedding").unwrap_or_default();
    if task == Task::Classify {
        let known = label.as_ref().is_some_and(|l| output.labels.contains(l));
        f.check(known, "label", "must be one of output.labels");
        if scores.len() != output.labels.len() {
            let problem = format!(
                "must have {} values, one per label, has {}",
                output.labels.len(),
                scores.len()
            );
            f.wrong("scores", problem);
        }
    }
    let most = GOLDEN_EMBEDDING_VALUES.min(output.embedding_dim);
    if embedding.len() > most {
        f.wrong("embedding", format!("may have at most {most} values"));
    }
    if task == Task::Embed {
        f.check(
            !embedding.is_empty(),
            "embedding",
            "is missing, and the task is embed",
        );
    }
    let mut tolerance = |key: &str, default: f32| {
        let value = if f.has(key) {
            f.number(key).unwrap_or_default()
        } else {
            default
        };
        f.check(value > 0.0, key, "must be > 0");
        value
    };
    let (tolerance, embedding_tolerance) = (
        tolerance("tolerance", 0.01),
        tolerance("embedding_tolerance", 0.02),
    );
    f.finish(errors);
    Golden {
        image,
        label,
        scores,
        embedding,
        tolerance,
        embedding_tolerance,
    }
}

fn reference(mut f: Fields, output: &OutputSpec, errors: &mut Vec<FieldError>) -> Reference {
    let samples = f.whole("samples").unwrap_or_default();
    f.check(samples > 0, "samples", "must be at least 1");
    let dim = output.embedding_dim;
    let mut values = |key: &str, count: usize, fine: fn(f32) -> bool, problem: &str| {
        let values = f.numbers(key).unwrap_or_default();
        let right = values.len() == count && values.iter().all(|value| fine(*value));
        f.check(right, key, problem);
        values
    };
    let share = |value: f32| (0.0..=1.0).contains(&value);
    let classes = output.labels.len();
    let mean = values(
        "mean",
        dim,
        |_| true,
        "must have one number per value of the embedding",
    );
    let deviation = values(
        "deviation",
        dim,
        |value| value > 0.0,
        "must have one number above 0 per value of the embedding",
    );
    let distance = values(
        "distance",
        3,
        |value| value >= 0.0,
        "must have three numbers, not negative",
    );
    let (bins, shares) = if classes == 0 {
        (0, 0)
    } else {
        (SCORE_BINS, classes)
    };
    let scores = values("scores", bins, share, "must have ten shares of 0 to 1");
    let labels = values(
        "labels",
        shares,
        share,
        "must have one share of 0 to 1 per label",
    );
    let distance = <[f32; 3]>::try_from(distance).unwrap_or_default();
    f.check(distance.is_sorted(), "distance", "must rise");
    let unknown = f.number("unknown").unwrap_or_default();
    f.check(share(unknown), "unknown", "must be 0 to 1");
    f.finish(errors);
    Reference {
        samples,
        mean,
        deviation,
        distance,
        scores,
        labels,
        unknown,
    }
}

fn lineage(mut f: Fields, errors: &mut Vec<FieldError>) -> Lineage {
    let mut free = |key: &str| {
        let text = f.text(key);
        let fine = text.as_ref().is_none_or(|text| text.len() <= MAX_TEXT);
        f.check(fine, key, "is longer than 2000 bytes");
        text
    };
    let (parent, dataset, recipe) = (free("parent"), free("dataset"), free("recipe"));
    let dataset_sha256 = f.text("dataset_sha256");
    let fine = dataset_sha256.as_ref().is_none_or(|text| is_digest(text));
    f.check(fine, "dataset_sha256", "must be 64 hexadecimal digits");
    let seed = f.whole("seed");
    let holdout = f.text("holdout");
    let fine = holdout.as_ref().is_none_or(|path| is_plain_path(path));
    f.check(fine, "holdout", NOT_PLAIN);
    let mut section = f.section("scores", false);
    let scores = section.rest_as_numbers().into_iter().collect();
    section.finish(errors);
    f.finish(errors);
    Lineage {
        parent,
        dataset,
        dataset_sha256,
        recipe,
        seed,
        holdout,
        scores,
    }
}

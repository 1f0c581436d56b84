//! The process that makes the bundle, and reads somebody's file to do so.

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
};

use anyhow::{Context, anyhow, ensure};
use models::{
    Activation, Budget, Draft, Engine, Lineage, MAX_MODEL_BYTES, Manifest, ModelFile, OutputSpec,
    SCHEMA, Sketch, Task, Thresholds,
};
use serde::{Deserialize, Serialize};

use super::{BUNDLE, MOST_MIB, MOST_MS, ModelImport, REQUEST, card, family, graph, samples};

/// Memory of this process: four copies of the largest model file, and what the engine may take for its values.
const MEMORY: u64 = 2 << 30;

/// What this process says, as one line of JSON.
#[derive(Serialize, Deserialize)]
pub(super) enum Made {
    /// The bundle is there; this is what to tell about it.
    Report(String),
    /// It cannot be made.
    Error(String),
}

/// Makes the bundle that the request in `work` asks for, there, and prints what came out. The process is shut in before
/// it reads anything else: links in the folder of pictures that lead out of it are not followed.
pub(crate) fn make_here(work: &Path) {
    models::bound_memory(MEMORY);
    models::bound_time();
    let made = match make(work) {
        Ok(report) => Made::Report(report),
        Err(error) => Made::Error(format!("{error:#}")),
    };
    // Without a line the other side knows enough.
    if let Ok(line) = serde_json::to_string(&made) {
        println!("{line}");
    }
}

fn file(path: &Path) -> anyhow::Result<Vec<u8>> {
    let read = || {
        let file = File::open(path)?;
        let about = file.metadata()?;
        // A device or a pipe would never end or never begin.
        ensure!(about.is_file(), "it is no file");
        ensure!(about.len() <= MAX_MODEL_BYTES, "it is larger than 256 MiB");
        let mut bytes = Vec::new();
        file.take(MAX_MODEL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

fn make(work: &Path) -> anyhow::Result<String> {
    let import: ModelImport = serde_json::from_slice(&fs::read(work.join(REQUEST))?)?;
    let images = import.images.as_deref().context("there are no pictures")?;
    let read = [&import.file, images, Path::new(&import.labels)];
    // Best effort: an older kernel shuts less, and the person who started this waits for it.
    let _ = models::sandbox::enter(&read, Some(work));
    let labels = graph::labels(&import.labels)?;
    let model = file(&import.file)?;
    // Most of what is refused was written with other settings than these.
    let export = |error: &dyn std::fmt::Display| {
        anyhow!(
            "{}: {error}\na file that is understood comes out of: {}",
            import.file.display(),
            import.like.export()
        )
    };
    let sketch = Sketch::read(&model).map_err(|error| export(&error))?;
    let input = family::input(&import, &sketch.inputs)?;
    let open = family::is_open(&sketch.inputs);
    let output = graph::output(&import, sketch, &input, labels)?;
    let mut manifest = manifest(&import, input, output);
    let raw = Engine::new(manifest.clone(), model.clone()).map_err(|error| export(&error))?;
    let looked = samples::look(images, &raw)?;
    drop(raw);
    let answers = looked.all.iter().map(|sample| sample.scores.as_slice());
    manifest.output.activation = graph::activation(import.activation, answers)?;
    let agreed = samples::agreement(&looked.all, &manifest.output.labels);
    let card = card::card(
        &import,
        &manifest,
        &models::digest_of(&model).to_string(),
        agreed,
    );
    let chosen = samples::choose(&looked.all);
    let bundle = Draft {
        manifest,
        model,
        golden: chosen.iter().map(|sample| sample.bytes.clone()).collect(),
        card,
        holdout: Vec::new(),
    }
    .write(&work.join(BUNDLE))?;
    Ok(card::report(&bundle, &chosen, open, &looked, agreed))
}

/// The manifest, whose answers are raw still, and which is bounded by what was asked for or is allowed at all.
fn manifest(import: &ModelImport, input: models::InputSpec, output: OutputSpec) -> Manifest {
    let file = import
        .file
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    Manifest {
        schema: SCHEMA,
        name: import.name.clone(),
        version: import.version.clone(),
        task: Task::Classify,
        description: format!("Imported from {file}"),
        model: ModelFile {
            file: String::new(),
            sha256: String::new(),
            bytes: 0,
        },
        input,
        output: OutputSpec {
            activation: Activation::None,
            ..output
        },
        thresholds: Thresholds {
            min_score: import.min_score,
        },
        budget: Budget {
            latency_ms: import.latency_ms.unwrap_or(MOST_MS),
            memory_mib: import.memory_mib.unwrap_or(MOST_MIB),
        },
        golden: Vec::new(),
        reference: None,
        lineage: Lineage {
            dataset: Some(format!("unknown; the model was made elsewhere, as {file}")),
            recipe: Some(format!(
                "cloud-coordinator model import --like {}",
                import.like.as_str()
            )),
            ..Lineage::default()
        },
    }
}

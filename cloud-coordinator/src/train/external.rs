//! A trainer of somebody else's: any command, for example Python on a machine with a graphics card.
//!
//! # The contract
//!
//! The command is started with one more argument, a folder, and finds there
//!
//! ```text
//! request.json   {"task", "labels", "seed", "epochs", "rate", "scores", "embedding", "input": {…}}
//! train.csv      file,class        one line per image; class is a place in `labels`
//! images/        the files
//! base.onnx      the model to start from
//! ```
//!
//! It may write lines `progress STEP STEPS [LOSS]` to its standard output, and must leave `model.onnx`: the same
//! input, the output named `scores` with one value per label, and the output `embedding` as the base has it.
//! Exit code 0 means done. What it claims about accuracy is not asked: that is measured here. It is ended, with
//! everything that it started, when the job is cancelled or takes too long.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
};

use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
};

use super::{
    jobs::Reporter,
    request::Request,
    work::{Made, Material, WorkError},
};
use crate::objects::Objects;

/// The longest line of its output that is looked at.
const LINE: u64 = 4_096;
/// What is kept of its complaints.
const COMPLAINT: u64 = 2_000;

/// Why it made no model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExternalError {
    #[error("none is configured: set training.external")]
    None,
    #[error("cannot start {command}: {error}")]
    Start {
        command: String,
        error: std::io::Error,
    },
    #[error("cannot use {path}: {error}")]
    File {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("it ended with {status}: {complaint}")]
    Failed {
        status: std::process::ExitStatus,
        complaint: String,
    },
    #[error("its model.onnx has {0} bytes, the most is {most}", most = models::MAX_MODEL_BYTES)]
    TooLarge(u64),
}

/// Ends the command and all that it has started.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let id = self.0.id().and_then(|id| i32::try_from(id).ok());
        if let Some(id) = id.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process_group(id, rustix::process::Signal::KILL);
        }
    }
}

/// Runs the command on the material.
pub(super) async fn run(
    command: &[String],
    objects: &Objects,
    material: &Arc<Material>,
    request: &Request,
    reporter: &Reporter,
) -> Result<Made, WorkError> {
    let (program, arguments) = command.split_first().ok_or(ExternalError::None)?;
    let folder = tempfile::tempdir().map_err(|error| file(&std::env::temp_dir())(error))?;
    let scores = prepare(folder.path(), objects, material, request, reporter).await?;
    let child = Command::new(program)
        .args(arguments)
        .arg(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| ExternalError::Start {
            command: program.clone(),
            error,
        })?;
    let mut group = Group(child);
    let (out, err) = (group.0.stdout.take(), group.0.stderr.take());
    let listen = async {
        let Some(out) = out else { return };
        let mut lines = BufReader::new(out);
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut lines).take(LINE).read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => progress(&line, reporter),
            }
        }
    };
    let complain = async {
        let mut complaint = Vec::new();
        if let Some(mut err) = err {
            let _ = (&mut err).take(COMPLAINT).read_to_end(&mut complaint).await;
            // The rest is read and dropped, so that the command does not wait for us.
            let _ = tokio::io::copy(&mut err, &mut tokio::io::sink()).await;
        }
        String::from_utf8_lossy(&complaint).trim().to_owned()
    };
    let ended = tokio::select! {
        () = reporter.stop.cancelled() => return Err(WorkError::Cancelled),
        ended = async { tokio::join!(group.0.wait(), listen, complain) } => ended,
    };
    let (status, (), complaint) = ended;
    let status = status.map_err(file(folder.path()))?;
    if !status.success() {
        return Err(ExternalError::Failed { status, complaint }.into());
    }
    let path = folder.path().join("model.onnx");
    let size = std::fs::metadata(&path).map_err(file(&path))?.len();
    if size > models::MAX_MODEL_BYTES {
        return Err(ExternalError::TooLarge(size).into());
    }
    let model = std::fs::read(&path).map_err(file(&path))?;
    Ok(Made {
        model,
        labels: material.labels.clone(),
        scores,
        head: None,
        record: json!({"trainer": "external", "command": command, "images": material.train.len()}),
    })
}

fn file(path: &Path) -> impl FnOnce(std::io::Error) -> ExternalError {
    let path = path.to_owned();
    move |error| ExternalError::File { path, error }
}

fn progress(line: &[u8], reporter: &Reporter) {
    let text = String::from_utf8_lossy(line);
    let mut words = text.split_ascii_whitespace();
    if words.next() != Some("progress") {
        return;
    }
    let step = words.next().and_then(|word| word.parse().ok());
    let steps = words.next().and_then(|word| word.parse().ok());
    let loss = words.next().and_then(|word| word.parse().ok());
    if let (Some(step), Some(steps)) = (step, steps) {
        let _ = reporter.tell("train", step, steps, loss);
    }
}

/// Fills the folder. The name that the scores must have.
async fn prepare(
    folder: &Path,
    objects: &Objects,
    material: &Arc<Material>,
    request: &Request,
    reporter: &Reporter,
) -> Result<String, WorkError> {
    let manifest = material.engine.manifest();
    let scores = manifest
        .output
        .scores
        .clone()
        .unwrap_or_else(|| "logits".to_owned());
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).map_err(file(&path))
    };
    let images = folder.join("images");
    std::fs::create_dir(&images).map_err(file(&images))?;
    let mut table = String::from("file,class\n");
    for (at, (item, class)) in material.train.iter().enumerate() {
        if reporter
            .tell("features", at, material.train.len(), None)
            .is_break()
        {
            return Err(WorkError::Cancelled);
        }
        let bytes = objects.read(&item.sha256).await?;
        let extension = if bytes.starts_with(&[0xff, 0xd8]) {
            "jpg"
        } else {
            "png"
        };
        let name = format!("images/{}.{extension}", item.sha256);
        put(&name, &bytes)?;
        table.push_str(&format!("{name},{class}\n"));
    }
    put("train.csv", table.as_bytes())?;
    put(
        "base.onnx",
        &material
            .bundle
            .model_bytes()
            .map_err(super::CatalogError::from)?,
    )?;
    let told = json!({
        "task": manifest.name, "labels": material.labels, "seed": request.seed,
        "epochs": request.epochs, "rate": request.rate, "scores": scores,
        "embedding": manifest.output.embedding, "input": manifest.input,
    });
    put("request.json", told.to_string().as_bytes())?;
    Ok(scores)
}

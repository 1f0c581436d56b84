//! Somebody's own ONNX file becomes a bundle: `model import`.
//!
//! The file may be damaged, hostile or simply too large. Whatever reads it does so in a process of its own, with
//! bounds on its memory and its time ([`make_here`]); this process says what is wanted, has the result tried as a
//! device tries it, and moves it to its place.

mod card;
mod family;
mod graph;
mod make;
mod samples;

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use models::{Budget, Bundle, Fault, Trial};
use serde::{Deserialize, Serialize};

pub(crate) use self::make::make_here;
use self::{
    family::{Answer, Family, Fit, Scale},
    make::Made,
};

/// The first argument of a process that makes a bundle; the second is its working folder.
pub(crate) const MAKE_BUNDLE: &str = "make-bundle";
/// What is wanted, in the working folder.
const REQUEST: &str = "request.json";
/// What came out, in the working folder.
const BUNDLE: &str = "bundle";
/// Loading, and judging each sample picture with a model at the edge of what is allowed.
const MAKING: Duration = Duration::from_secs(600);
/// Loading, the golden pictures and some runs to measure.
const TRYING: Duration = Duration::from_secs(120);
/// A run may take this many times as long on a device as here: a small board is slower than a desk by less.
const SLOWER: f32 = 20.0;
/// A budget for the time of a run is at least this, so that a busy board does not fail on a tiny model.
const LEAST_MS: f32 = 200.0;
/// The longest that a manifest may allow; nothing is known about the time before it is measured.
const MOST_MS: f32 = 600_000.0;
/// A model may take this many times the memory that it took here, and some more.
const LARGER: f32 = 2.0;
/// See [`LARGER`].
const LEAST_MIB: f32 = 32.0;
/// Memory before it is measured: more than that leaves no room on a board of 1 GiB.
const MOST_MIB: u64 = 512;

// A model file, and what its maker knows about it. (As a doc comment it would stand in the help.)
#[derive(Args, Serialize, Deserialize)]
pub(crate) struct ModelImport {
    /// The ONNX file: a classifier of pictures.
    file: PathBuf,
    /// What the model is to be called: a-z, 0-9 and -.
    #[arg(long)]
    name: String,
    /// Its version; a version never changes once it is published.
    #[arg(long, default_value = "1.0.0")]
    version: String,
    /// The labels in the order of the model's answers: a text file with one in each line, or A,B,C.
    #[arg(long, value_name = "FILE|A,B,C")]
    labels: String,
    /// Where it was trained, which says how its pictures are prepared.
    #[arg(long, value_enum)]
    like: Family,
    /// A folder of sample pictures, best `DIR/<label>/*.jpg`: some of them become the cases that each device tries.
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Where the bundle goes, a new folder; without it NAME-VERSION.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Pixels of a side, where the file leaves that open; without it 224.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(8..=4096))]
    size: Option<u16>,
    /// How pixels were scaled in training, where it is not what the family does.
    #[arg(long, value_enum, allow_hyphen_values = true)]
    scale: Option<Scale>,
    /// How pictures were brought to the model's shape in training, where it is not what the family does.
    #[arg(long, value_enum)]
    resize: Option<Fit>,
    /// How answers become probabilities; without it the answers to the sample pictures tell.
    #[arg(long, value_enum)]
    activation: Option<Answer>,
    /// The output with the scores, where several could be it.
    #[arg(long, value_name = "OUTPUT")]
    scores: Option<String>,
    /// An output that is an embedding, if there is one: drift is measured and heads are trained on it.
    #[arg(long, value_name = "OUTPUT")]
    embedding: Option<String>,
    /// Below this score a device says `unknown`.
    #[arg(long, value_name = "0..1")]
    min_score: Option<f32>,
    /// What one run may take on the slowest board, in milliseconds; without it twenty times what it takes here.
    #[arg(long, value_name = "MS")]
    latency_ms: Option<f32>,
    /// What the model may take of a board's memory, in MiB; without it twice what it takes here and some more.
    #[arg(long, value_name = "MIB")]
    memory_mib: Option<u64>,
    /// Also brings it to the coordinator and publishes it.
    #[arg(long)]
    pub(crate) push: bool,
    /// Who pushes it; it is recorded.
    #[arg(long, env = "USER")]
    pub(crate) author: Option<String>,
}

impl ModelImport {
    fn id(&self) -> String {
        format!("{}@{}", self.name, self.version)
    }
}

/// Makes the bundle and says where it is.
pub(crate) fn import(import: &ModelImport) -> anyhow::Result<PathBuf> {
    if import.push && import.author.is_none() {
        bail!("say who pushes it with --author");
    }
    if import.images.is_none() {
        bail!(
            "give a folder with some sample pictures, --images DIR: a bundle without golden pictures cannot be tried \
             on a device"
        );
    }
    let out = import
        .out
        .clone()
        .unwrap_or_else(|| format!("{}-{}", import.name, import.version).into());
    if out.symlink_metadata().is_ok() {
        bail!(
            "{} exists already; name a new folder with --out",
            out.display()
        );
    }
    // Beside its place, so that it can be moved there at once.
    let place = out.parent().filter(|place| !place.as_os_str().is_empty());
    let place = place.unwrap_or(Path::new("."));
    let work = tempfile::Builder::new()
        .prefix(".import-")
        .tempdir_in(place)
        .with_context(|| format!("cannot write into {}", place.display()))?;
    fs::write(work.path().join(REQUEST), serde_json::to_vec(import)?)?;
    let program = models::this_program("cloud-coordinator")?;
    let arguments = [OsStr::new(MAKE_BUNDLE), work.path().as_os_str()];
    let made: Result<Made, _> = models::ask_process(&program, &arguments, MAKING)?;
    let report = match made {
        Ok(Made::Report(report)) => report,
        Ok(Made::Error(error)) => bail!(error),
        Err((Fault::Memory, detail)) => bail!(
            "{} takes more memory than any device has: {detail}",
            import.file.display()
        ),
        Err((_, detail)) => bail!("{} cannot be loaded: {detail}", import.file.display()),
    };
    let dir = work.path().join(BUNDLE);
    let trial = models::try_bundle(&program, &dir, TRYING)?;
    if let Some(fault) = trial.fault {
        let more = match fault {
            Fault::Latency => "\nallow more with --latency-ms",
            Fault::Memory => "\nallow more with --memory-mib, if the boards have it",
            _ => "",
        };
        bail!(
            "it does not pass the trial of each device: {}{more}",
            trial.detail
        );
    }
    let budget = budget(import, &trial);
    Bundle::open(&dir)?.set_budget(budget)?;
    // Not onto what came there meanwhile: a folder with something in it is not replaced.
    fs::rename(&dir, &out).map_err(|error| anyhow!("cannot make {}: {error}", out.display()))?;
    println!("{} is in {}", import.id(), out.display());
    println!("{report}");
    println!(
        "a run takes {:.1} ms and {:.0} MiB here; {} ms and {} MiB are allowed on a device",
        trial.latency_ms.unwrap_or_default(),
        trial.memory_mib.unwrap_or_default(),
        budget.latency_ms,
        budget.memory_mib,
    );
    Ok(out)
}

/// What a device may spend on it, by what was spent here.
fn budget(import: &ModelImport, trial: &Trial) -> Budget {
    let latency_ms = trial.latency_ms.map_or(MOST_MS, |ms| ms * SLOWER);
    // Where it cannot be told, devices cannot tell either.
    let memory_mib = trial.memory_mib.map_or(LEAST_MIB, |mib| mib * LARGER) + LEAST_MIB;
    Budget {
        latency_ms: import
            .latency_ms
            .unwrap_or(latency_ms.ceil().clamp(LEAST_MS, MOST_MS)),
        memory_mib: import.memory_mib.unwrap_or(memory_mib.ceil() as u64),
    }
}

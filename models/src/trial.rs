//! A model that nobody knows yet is tried in a process of its own, shut in and with bounds on its memory and its time:
//! whatever it does there, it does to nobody else.
//!
//! The program that asks starts itself again with [`TRY_MODEL`] and the bundle's folder, and that process prints
//! what it found as one line of JSON.

use std::{
    ffi::{OsStr, OsString},
    io::Read,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    bundle::Bundle, engine::Engine, memory::of_this_process, sandbox, selftest::self_test,
};

/// The first argument of a process that tries a model; the second is the bundle's folder.
pub const TRY_MODEL: &str = "try-model";

/// What a process may take beyond the budget of its model, in bytes: loading and optimising takes some copies more
/// than running does.
const BESIDES: u64 = 96 << 20;
/// Loading takes so many times what running does, at most.
const LOADING: u64 = 4;
/// The report and the last words of a process are shorter than this.
const MAX_OUTPUT: u64 = 64 * 1024;
/// Seconds of the processor's time after which a process ends, also if nobody is left who would end it: as long as the
/// most patient caller waits.
const MAX_CPU_S: u64 = 600;
/// A process that has said everything is given so long to end.
const ENDING: Duration = Duration::from_secs(5);
/// Between two looks whether it has.
const LOOK: Duration = Duration::from_millis(2);
/// What a process gets of this one's environment: what loading it may need. The rest may hold secrets, and is nothing
/// for who reads foreign files.
const ENVIRONMENT: [&str; 5] = [
    "PATH",
    "LD_LIBRARY_PATH",
    "QEMU_LD_PREFIX",
    "RUST_BACKTRACE",
    "TMPDIR",
];

/// What is wrong with a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Fault {
    /// The bundle or the graph cannot be read, or is not what the manifest says.
    Load,
    /// A golden picture has another answer.
    SelfTest,
    /// A run takes longer than the budget.
    Latency,
    /// It takes more memory than the budget.
    Memory,
    /// The process ended without a word, or had to be ended.
    Crash,
}

/// What a trial found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// What is wrong, if anything is.
    pub fault: Option<Fault>,
    /// The same for people, and what else was found.
    pub detail: String,
    /// Median of one run, from tensor to outcome, in milliseconds.
    pub latency_ms: Option<f32>,
    /// By how many MiB the process grew at most while it loaded and ran the model.
    pub memory_mib: Option<f32>,
    /// How the process was shut in, for people; empty if it did not come so far as to say.
    #[serde(default)]
    pub sandbox: String,
}

impl Trial {
    fn failed(fault: Fault, detail: impl Into<String>) -> Self {
        Self {
            fault: Some(fault),
            detail: detail.into(),
            latency_ms: None,
            memory_mib: None,
            sandbox: String::new(),
        }
    }
}

/// This program, as it can be started again: its file, and the part that it plays where one file plays several.
///
/// # Errors
/// If the system does not say which file that is.
pub fn this_program(part: &str) -> std::io::Result<Vec<OsString>> {
    let mut program = vec![std::env::current_exe()?.into()];
    program.extend(std::env::args_os().nth(1).filter(|first| first == part));
    Ok(program)
}

/// Tries the bundle in `dir` in a new process, for `limit` at most. `program` is a file and its first arguments, which
/// lead to [`try_here`] when [`TRY_MODEL`] and the folder follow.
///
/// # Errors
/// If the process cannot be started. A bad model is no error.
pub fn try_bundle(program: &[OsString], dir: &Path, limit: Duration) -> std::io::Result<Trial> {
    let arguments = [OsStr::new(TRY_MODEL), dir.as_os_str()];
    let trial = ask_process(program, &arguments, limit)?;
    Ok(trial.unwrap_or_else(|(fault, detail)| Trial::failed(fault, detail)))
}

/// Starts `program` (a file and its first arguments) with more `arguments` and reads the one line of JSON that it
/// prints, for `limit` at most. Inside is what ended the process, if it ended without that line.
///
/// # Errors
/// If the process cannot be started.
pub fn ask_process<T: DeserializeOwned>(
    program: &[OsString],
    arguments: &[&OsStr],
    limit: Duration,
) -> std::io::Result<Result<T, (Fault, String)>> {
    let (file, first) = program
        .split_first()
        .ok_or_else(|| std::io::Error::other("no program tries models"))?;
    let kept = ENVIRONMENT
        .iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)));
    let mut child = Command::new(file)
        .env_clear()
        .envs(kept)
        .args(first)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (said, heard) = mpsc::channel();
    let output = child.stdout.take();
    // Ends with the process, since only that holds the other end.
    std::thread::spawn(move || said.send(text_of(output)));
    let (complained, complaints) = mpsc::channel();
    let errors = child.stderr.take();
    std::thread::spawn(move || complained.send(text_of(errors)));
    let Ok(report) = heard.recv_timeout(limit) else {
        end(&mut child);
        let detail = format!("it took longer than {} s", limit.as_secs());
        return Ok(Err((Fault::Crash, detail)));
    };
    let status = ended(&mut child)?;
    if let (true, Ok(answer)) = (status.success(), serde_json::from_str(report.trim())) {
        return Ok(Ok(answer));
    }
    let words = complaints.recv_timeout(limit).unwrap_or_default();
    let last = words.lines().last().unwrap_or_default();
    // As Rust's allocator says it before it ends the process.
    if words.contains("memory allocation of") {
        return Ok(Err((Fault::Memory, last.to_owned())));
    }
    Ok(Err((Fault::Crash, format!("{status}: {last}"))))
}

fn text_of(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // Whoever writes more is not listened to.
        let _ = pipe.take(MAX_OUTPUT).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits for a process that has closed its output, and ends it if it does not do so itself.
fn ended(child: &mut Child) -> std::io::Result<ExitStatus> {
    // Nobody says anything there: only its patience is of use.
    let (_said, never) = mpsc::channel::<()>();
    for _ in 0..ENDING.as_millis() / LOOK.as_millis() {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let _ = never.recv_timeout(LOOK);
    }
    let _ = child.kill();
    child.wait()
}

fn end(child: &mut Child) {
    // It may have ended by itself in the meantime.
    let _ = child.kill();
    let _ = child.wait();
}

/// The other side: tries the bundle in `dir` in this process and prints what it found.
pub fn try_here(dir: &Path) {
    bound_time();
    let sandbox = sandbox::enter(&[dir], None).to_string();
    let trial = Trial {
        sandbox,
        ..look(dir)
    };
    // Without a line the other side knows enough.
    if let Ok(line) = serde_json::to_string(&trial) {
        println!("{line}");
    }
}

fn look(dir: &Path) -> Trial {
    let bundle = match Bundle::open(dir) {
        Ok(bundle) => bundle,
        Err(error) => return Trial::failed(Fault::Load, error.to_string()),
    };
    let budget = bundle.manifest.budget.memory_mib << 20;
    let most = budget.saturating_mul(LOADING).saturating_add(BESIDES);
    bound_memory(most);
    let before = peak_mib();
    let engine = match Engine::load(&bundle) {
        Ok(engine) => engine,
        Err(error) => {
            let detail = error.to_string();
            // As the engine says it where it notices itself.
            let fault = if detail.contains("failed to allocate") {
                Fault::Memory
            } else {
                Fault::Load
            };
            return Trial::failed(fault, detail);
        }
    };
    let test = self_test(&bundle, &engine);
    let wrong = test.golden.iter().find(|case| !case.problems.is_empty());
    let fault = if wrong.is_some() {
        Some(Fault::SelfTest)
    } else if !test.in_time() {
        Some(Fault::Latency)
    } else if !test.in_memory() {
        Some(Fault::Memory)
    } else {
        None
    };
    Trial {
        fault,
        detail: match wrong {
            Some(case) => format!("{}: {}", case.image, case.problems.join(", ")),
            None => test.to_string(),
        },
        latency_ms: test.latency_ms,
        memory_mib: peak_mib().zip(before).map(|(after, before)| after - before),
        sandbox: String::new(),
    }
}

/// From here on an allocation beyond `bytes` more than now fails, and ends the process. The bound is for good.
pub fn bound_memory(bytes: u64) {
    let used = of_this_process("VmData").unwrap_or_default();
    bound(Resource::Data, used.saturating_add(bytes));
}

/// From here on the process ends after some minutes of the processor's time, and leaves no image of its memory behind.
pub fn bound_time() {
    bound(Resource::Cpu, MAX_CPU_S);
    bound(Resource::Core, 0);
}

fn bound(resource: Resource, most: u64) {
    let most = most.min(getrlimit(resource).maximum.unwrap_or(u64::MAX));
    let narrow = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    // Where one cannot be set the others and whoever waits are there still.
    let _ = setrlimit(resource, narrow);
}

/// The most that this process has had in memory, in MiB.
fn peak_mib() -> Option<f32> {
    #[expect(clippy::cast_precision_loss, reason = "a size for people")]
    of_this_process("VmHWM").map(|bytes| bytes as f32 / (1 << 20) as f32)
}

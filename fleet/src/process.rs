//! Child processes: started in a group of their own, killed without warning or stopped politely, and
//! never left behind.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read},
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::Duration,
};

use rustix::{
    process::{Pid, Signal, kill_process_group, test_kill_process_group},
    thread::{CpuSet, sched_setaffinity},
};
use tokio::{
    process::{Child, ChildStdin, Command},
    signal::unix::{SignalKind, signal},
    time::{sleep, timeout},
};

/// When it is set, a process of the fleet ends as soon as its standard input does. The fleet holds the
/// other end, so that nothing outlives it, however it ends.
pub const EXIT_WITH_STDIN: &str = "LACEWING_EXIT_WITH_STDIN";
/// Names the one processor that a process of the fleet may use: benchmarks compare one core with one.
const CPU: &str = "LACEWING_CPU";
/// The hidden part that runs any other program under the same rule.
pub const GUARD: &str = "guard";
/// A killed process is gone when the kernel has torn it down: far below this on any machine.
const BURIAL: Duration = Duration::from_secs(30);
/// Between two looks whether it is.
const LINGER: Duration = Duration::from_millis(5);

/// What went wrong with a child process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be started.
    #[error("starting {name}: {source}")]
    Start {
        /// Which.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// It could not be signalled or waited for.
    #[error("ending {name}: {source}")]
    End {
        /// Which.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// It ended although nobody asked it to.
    #[error("{name} ended by itself ({status}); the end of its log:\n{log}")]
    EndedByItself {
        /// Which.
        name: String,
        /// How.
        status: String,
        /// Its last words.
        log: String,
    },
}

/// The executable that plays every part: `fleet` itself, or a small program that calls [`crate::cli::main`].
#[derive(Clone, Debug)]
pub struct Program(pub PathBuf);

impl Program {
    /// The program that is running.
    ///
    /// # Errors
    /// If its path cannot be found out.
    pub fn current() -> io::Result<Self> {
        std::env::current_exe().map(Self)
    }
}

/// One child that can be started, killed and started again.
#[derive(Debug)]
pub struct Process {
    name: String,
    program: Program,
    args: Vec<OsString>,
    log: PathBuf,
    cpu: Option<usize>,
    child: Option<Child>,
    /// Kept apart from the child, because waiting for a child closes its standard input, which ends it.
    lifeline: Option<ChildStdin>,
}

impl Process {
    /// Describes a child that plays one part (`edge-agent`, `cloud-coordinator`) with `args`. What it
    /// prints goes to the end of `log`.
    #[must_use]
    pub fn part(
        name: &str,
        program: &Program,
        part: &str,
        args: impl IntoIterator<Item = OsString>,
        log: PathBuf,
    ) -> Self {
        Self {
            name: name.to_owned(),
            program: program.clone(),
            args: std::iter::once(part.into()).chain(args).collect(),
            log,
            cpu: None,
            child: None,
            lifeline: None,
        }
    }

    /// Lets it run on one processor only.
    #[must_use]
    pub const fn on_cpu(mut self, cpu: Option<usize>) -> Self {
        self.cpu = cpu;
        self
    }

    /// From its next start on it runs on this processor only.
    pub const fn set_cpu(&mut self, cpu: Option<usize>) {
        self.cpu = cpu;
    }

    /// Describes a child that is any other program, run under a guard that ends with us.
    #[must_use]
    pub fn other(
        name: &str,
        guard: &Program,
        command: impl IntoIterator<Item = OsString>,
        log: PathBuf,
    ) -> Self {
        Self::part(name, guard, GUARD, command, log)
    }

    /// What it is called in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Starts it. Does nothing if it runs.
    ///
    /// # Errors
    /// If its log cannot be written or its program cannot be run.
    pub fn start(&mut self) -> Result<(), ProcessError> {
        if self.child.is_some() {
            return Ok(());
        }
        let start = || -> io::Result<Child> {
            let log = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&self.log)?;
            let mut command = Command::new(&self.program.0);
            // What is set for somebody's own agent or coordinator is not meant for the parts of a fleet.
            for (name, _) in std::env::vars_os() {
                if name.to_string_lossy().starts_with("LACEWING_") {
                    command.env_remove(name);
                }
            }
            if let Some(cpu) = self.cpu {
                command.env(CPU, cpu.to_string());
            }
            command
                .args(&self.args)
                .env(EXIT_WITH_STDIN, "1")
                .stdin(Stdio::piped())
                .stdout(log.try_clone()?)
                .stderr(log)
                .process_group(0)
                .spawn()
        };
        let mut child = start().map_err(|source| ProcessError::Start {
            name: self.name.clone(),
            source,
        })?;
        self.lifeline = child.stdin.take();
        self.child = Some(child);
        Ok(())
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref()?.id()
    }

    /// Fails if it should be running and is not.
    ///
    /// # Errors
    /// [`ProcessError::EndedByItself`] with the end of its log.
    pub fn check(&mut self) -> Result<(), ProcessError> {
        let Some(child) = &mut self.child else {
            return Ok(());
        };
        match child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => {
                self.child = None;
                Err(ProcessError::EndedByItself {
                    name: self.name.clone(),
                    status: status.to_string(),
                    log: self.last_words(),
                })
            }
            Err(source) => Err(self.cannot_end(source)),
        }
    }

    /// SIGKILL: it gets no chance to tidy up. Returns when it is gone.
    ///
    /// # Errors
    /// If it cannot be signalled or does not go.
    pub async fn kill(&mut self) -> Result<(), ProcessError> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        // The id is known as long as the child has not been waited for, so it cannot be another's.
        let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let sent = signal_group(&child, Signal::KILL);
        let ended = timeout(BURIAL, async {
            let status = child.wait().await?;
            // What a guard ran may be a moment longer in dying, and hold its port until then.
            while group.is_some_and(|group| test_kill_process_group(group).is_ok()) {
                sleep(LINGER).await;
            }
            Ok(status)
        })
        .await;
        sent.and(
            ended
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                .map(drop),
        )
        .map_err(|source| self.cannot_end(source))
    }

    /// SIGTERM, and SIGKILL if it has not ended after `grace`. Says whether it ended by itself, without
    /// an error.
    ///
    /// # Errors
    /// If it cannot be signalled or does not go.
    pub async fn stop(&mut self, grace: Duration) -> Result<bool, ProcessError> {
        let Some(child) = &mut self.child else {
            return Ok(true);
        };
        if let Err(source) = signal_group(child, Signal::TERM) {
            return Err(self.cannot_end(source));
        }
        match timeout(grace, child.wait()).await {
            Ok(Ok(status)) => {
                self.child = None;
                Ok(status.success())
            }
            Ok(Err(source)) => Err(self.cannot_end(source)),
            Err(_) => {
                tracing::warn!("{} did not end in {grace:?} and is killed", self.name);
                self.kill().await.map(|()| false)
            }
        }
    }

    /// Waits until it ends by itself. Says whether it did so in time and without an error.
    pub async fn ended(&mut self, bound: Duration) -> bool {
        let Some(child) = &mut self.child else {
            return true;
        };
        match timeout(bound, child.wait()).await {
            Ok(Ok(status)) => {
                self.child = None;
                status.success()
            }
            Ok(Err(_)) | Err(_) => false,
        }
    }

    /// The end of its log.
    #[must_use]
    pub fn last_words(&self) -> String {
        /// Enough for a stack of errors, little enough for a terminal.
        const LINES: usize = 20;
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(LINES).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    fn cannot_end(&self, source: io::Error) -> ProcessError {
        ProcessError::End {
            name: self.name.clone(),
            source,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &self.child {
            let _ = signal_group(child, Signal::KILL);
        }
    }
}

/// Signals a child that has not been waited for, and what it started.
fn signal_group(child: &Child, signal: Signal) -> io::Result<()> {
    let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else {
        return Ok(());
    };
    match kill_process_group(pid, signal) {
        // It has ended already and waits to be collected.
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// In a child, before anything else: does what the fleet asked for when it started it.
pub fn begin_part() {
    choose_cpu();
    if std::env::var_os(EXIT_WITH_STDIN).is_some() {
        std::thread::spawn(|| {
            wait_for_stdin();
            std::process::exit(0);
        });
    }
}

/// In a child: stays on the one processor that the fleet chose, if it did. Its own children will too.
pub fn choose_cpu() {
    let Some(cpu) = std::env::var(CPU).ok().and_then(|cpu| cpu.parse().ok()) else {
        return;
    };
    let mut only = CpuSet::new();
    if cpu < CpuSet::MAX_CPU {
        only.set(cpu);
    }
    if let Err(error) = sched_setaffinity(None, &only) {
        eprintln!("processor {cpu} cannot be chosen: {error}");
    }
}

fn wait_for_stdin() {
    let mut byte = [0];
    while !matches!(io::stdin().read(&mut byte), Ok(0) | Err(_)) {}
}

/// The guard's whole life: runs a program in its own process group, ends with it, and ends both when the
/// fleet ends.
pub fn guard(command: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut command = command.into_iter();
    let Some(program) = command.next() else {
        return ExitCode::FAILURE;
    };
    let guarded = async {
        // SIGTERM goes to the whole group: it is meant for the program, the guard waits for that.
        let _taken = signal(SignalKind::terminate())?;
        let mut child = Command::new(&program)
            .args(command)
            .env_remove(EXIT_WITH_STDIN)
            .stdin(Stdio::null())
            .spawn()?;
        std::thread::spawn(|| {
            wait_for_stdin();
            // The group is the guard's own: this ends the program and the guard with it.
            let _ = kill_process_group(rustix::process::getpid(), Signal::KILL);
        });
        child.wait().await
    };
    let ended = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .and_then(|runtime| runtime.block_on(guarded));
    match ended {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{}: {error}", program.to_string_lossy());
            ExitCode::FAILURE
        }
    }
}

/// The unit of processor time in `/proc`: Linux tells user space a hundredth of a second, whatever its own.
const TICKS_PER_S: f64 = 100.0;

/// What processes have used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processor time in seconds.
    pub cpu_s: f64,
    /// Resident memory now, in bytes.
    pub rss: u64,
    /// The most resident memory so far, in bytes.
    pub peak_rss: u64,
}

/// Reads what process `pid` and its living descendants have used so far.
///
/// # Errors
/// If there is no such process, or no `/proc`.
pub fn usage(pid: u32) -> io::Result<Usage> {
    let mut sum = own_usage(pid)?;
    for child in children(pid) {
        if let Ok(more) = usage(child) {
            sum.cpu_s += more.cpu_s;
            sum.rss += more.rss;
            sum.peak_rss += more.peak_rss;
        }
    }
    Ok(sum)
}

/// The process ids of the living children of `pid`.
#[must_use]
pub fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            let ids = list.split_whitespace().filter_map(|id| id.parse().ok());
            ids.collect::<Vec<u32>>()
        })
        .collect()
}

pub(crate) fn own_usage(pid: u32) -> io::Result<Usage> {
    let stat = read(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything; the fields after it are fixed (proc_pid_stat(5)).
    let fields: Vec<&str> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split(' ').collect())
        .unwrap_or_default();
    let ticks = |at: usize| {
        fields
            .get(at)
            .and_then(|t| t.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let status = read(format!("/proc/{pid}/status"))?;
    let bytes = |key: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(key));
        line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(0)
            * 1024
    };
    Ok(Usage {
        cpu_s: (ticks(11) + ticks(12)) as f64 / TICKS_PER_S,
        rss: bytes("VmRSS:"),
        peak_rss: bytes("VmHWM:"),
    })
}

fn read(path: String) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own_usage() {
        let usage = usage(std::process::id()).unwrap();
        assert!(usage.rss > 100_000 && usage.peak_rss >= usage.rss && usage.cpu_s >= 0.0);
    }
}

//! Shuts this process in before it reads what somebody else made: from then on it opens only the files that it was
//! given, makes no connection, starts no program and reaches no other process, whatever takes hold of it.
//!
//! Two locks of Linux, each on its own: Landlock decides which files may be opened, seccomp which calls of the system
//! may be made. What a kernel does not know is left out, and said.

use std::{fmt, path::Path};

/// Where the system describes its processor. The engine chooses its routines by it; without it a model would be tried
/// with others than those that it runs with later.
#[cfg(target_os = "linux")]
const PROCESSOR: [&str; 4] = [
    "/proc/cpuinfo",
    "/sys/devices/system/cpu",
    "/proc/device-tree",
    "/sys/firmware/devicetree/base",
];

/// How far a lock holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lock {
    /// All of it.
    Full,
    /// Less than this program knows of: the kernel is older.
    Partial,
    /// Not at all, and why.
    Open(String),
}

impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("on"),
            Self::Partial => f.write_str("in part"),
            Self::Open(why) => write!(f, "off ({why})"),
        }
    }
}

/// What holds this process from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// Landlock: files, connections, signals.
    pub files: Lock,
    /// seccomp: calls of the system.
    pub calls: Lock,
}

impl Sandbox {
    /// Do both hold completely?
    #[must_use]
    pub fn is_whole(&self) -> bool {
        (&self.files, &self.calls) == (&Lock::Full, &Lock::Full)
    }
}

impl fmt::Display for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "landlock {}, seccomp {}", self.files, self.calls)
    }
}

/// Shuts this process in, for good: it may read what is in `read` (files and folders; what does not exist is left out),
/// and do anything with files below `write`, if there is such a folder. Files that are open already stay usable.
/// Call it before there are other threads: those would stay free.
#[must_use]
pub fn enter(read: &[&Path], write: Option<&Path>) -> Sandbox {
    // Kept open, since it cannot be opened later.
    let _ = crate::memory::of_this_process("VmRSS");
    Sandbox {
        files: linux::lock_files(read, write).unwrap_or_else(Lock::Open),
        calls: linux::lock_calls(write.is_some()).unwrap_or_else(Lock::Open),
    }
}

#[cfg(not(target_os = "linux"))]
mod linux {
    use std::path::Path;

    use super::Lock;

    const NOT_LINUX: &str = "only Linux has it";

    pub(super) fn lock_files(_: &[&Path], _: Option<&Path>) -> Result<Lock, String> {
        Err(NOT_LINUX.to_owned())
    }

    pub(super) fn lock_calls(_: bool) -> Result<Lock, String> {
        Err(NOT_LINUX.to_owned())
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::path::Path;

    use landlock::{
        ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
        RulesetStatus, Scope, path_beneath_rules,
    };

    use super::{Lock, PROCESSOR};

    /// The newest Landlock whose rights are named here: files, TCP, devices, signals and abstract sockets.
    const NEWEST: ABI = ABI::V6;

    /// Only these files can be opened from now on.
    pub(super) fn lock_files(read: &[&Path], write: Option<&Path>) -> Result<Lock, String> {
        let status = restrict(read, write).map_err(|error| error.to_string())?;
        Ok(match status {
            RulesetStatus::FullyEnforced => Lock::Full,
            RulesetStatus::PartiallyEnforced => Lock::Partial,
            RulesetStatus::NotEnforced => Lock::Open("this kernel does not have it".to_owned()),
        })
    }

    fn restrict(read: &[&Path], write: Option<&Path>) -> Result<RulesetStatus, RulesetError> {
        let all = AccessFs::from_all(NEWEST);
        let reading = AccessFs::ReadFile | AccessFs::ReadDir;
        let processor = PROCESSOR.iter().map(Path::new);
        let restricted = Ruleset::default()
            .handle_access(all)?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?
            .add_rules(path_beneath_rules(read.iter().copied(), reading))?
            .add_rules(path_beneath_rules(processor, reading))?
            .add_rules(path_beneath_rules(write, all & !AccessFs::Execute))?
            .restrict_self()?;
        Ok(restricted.ruleset)
    }

    #[cfg(not(any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    )))]
    pub(super) fn lock_calls(_: bool) -> Result<Lock, String> {
        Err("not for this processor".to_owned())
    }

    #[cfg(any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    ))]
    pub(super) use super::calls::lock as lock_calls;
}

#[cfg(all(
    target_os = "linux",
    any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    )
))]
mod calls;

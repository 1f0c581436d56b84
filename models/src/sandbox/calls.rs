//! The calls of the system that a process which reads and computes needs. All others fail as forbidden: that stops
//! them as well as ending the process would, and what an unknown libc tries by the way does no harm.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use super::Lock;

/// Reading, memory, time, ending. No thread: a model is tried on one.
const ALWAYS: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_fcntl,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// The same under older names.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_readlink,
    libc::SYS_access,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[i64] = &[];

/// Where files may be written, which Landlock decides.
const WRITING: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
];
#[cfg(target_arch = "x86_64")]
const OLDER_WRITING: &[i64] = &[
    libc::SYS_open,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_renameat,
];
#[cfg(target_arch = "aarch64")]
const OLDER_WRITING: &[i64] = &[libc::SYS_renameat];
#[cfg(target_arch = "riscv64")]
const OLDER_WRITING: &[i64] = &[];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Allows a call if all of these arguments, each seen through its mask, have these values.
fn only(rules: &mut Rules, call: i64, wanted: &[(u8, u64, u64)]) -> Result<(), Error> {
    let conditions = wanted.iter().map(|&(argument, mask, value)| {
        let seen = SeccompCmpOp::MaskedEq(mask);
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, seen, value)
    });
    let rule = SeccompRule::new(conditions.collect::<Result<_, _>>()?)?;
    rules.insert(call, vec![rule]);
    Ok(())
}

fn number(flags: i32) -> u64 {
    u64::from(flags.cast_unsigned())
}

fn rules(writes: bool) -> Result<Rules, Error> {
    let always = ALWAYS.iter().chain(OLDER);
    let mut rules: Rules = always.map(|&call| (call, Vec::new())).collect();
    // Memory is never made executable: there is nothing to load any more.
    let executable = number(libc::PROT_EXEC);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        only(&mut rules, call, &[(2, executable, 0)])?;
    }
    // To end itself, as after a failed allocation, and nobody else.
    let this = u64::from(std::process::id());
    only(&mut rules, libc::SYS_tgkill, &[(0, number(-1), this)])?;
    // Its own bounds, which only become narrower.
    only(&mut rules, libc::SYS_prlimit64, &[(0, number(-1), 0)])?;
    if writes {
        let writing = WRITING.iter().chain(OLDER_WRITING);
        rules.extend(writing.map(|&call| (call, Vec::new())));
    } else {
        let changes = number(libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC);
        only(&mut rules, libc::SYS_openat, &[(2, changes, 0)])?;
        #[cfg(target_arch = "x86_64")]
        only(&mut rules, libc::SYS_open, &[(1, changes, 0)])?;
    }
    Ok(rules)
}

fn apply(writes: bool) -> Result<(), Error> {
    let here = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(
        rules(writes)?,
        SeccompAction::Errno(libc::EPERM.cast_unsigned()),
        SeccompAction::Allow,
        here,
    )?;
    apply_filter(&BpfProgram::try_from(filter)?)
}

/// Only these calls are made from now on, by this thread and all that it would start.
pub(super) fn lock(writes: bool) -> Result<Lock, String> {
    match apply(writes) {
        Ok(()) => Ok(Lock::Full),
        Err(error) => Err(error.to_string()),
    }
}

//! What this process takes of the memory, as proc(5) tells it on Linux.

use std::{fs::File, os::unix::fs::FileExt, sync::OnceLock};

/// The file has some sixty lines.
const MAX_STATUS_BYTES: usize = 16 << 10;

/// Opened once and kept: a process that has shut itself in opens nothing there any more.
fn status() -> Option<&'static File> {
    static STATUS: OnceLock<Option<File>> = OnceLock::new();
    STATUS
        .get_or_init(|| File::open("/proc/self/status").ok())
        .as_ref()
}

/// A line of the file, as `VmRSS`, in bytes; nothing where the system does not tell it.
pub(crate) fn of_this_process(line: &str) -> Option<u64> {
    let mut bytes = vec![0; MAX_STATUS_BYTES];
    let length = status()?.read_at(&mut bytes, 0).ok()?;
    let text = String::from_utf8_lossy(bytes.get(..length)?);
    let found = text
        .lines()
        .find_map(|found| found.strip_prefix(line)?.strip_prefix(':'))?;
    let kib: u64 = found.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

//! Secrets in files: readable by their owner only, written whole or not at all.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::clock;

/// A secret file is a key or a token.
const MAX_BYTES: u64 = 16 * 1024;
/// What others may do with a file.
const OTHERS: u32 = 0o077;

/// Why a secret cannot be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("cannot {operation} {path}: {error}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        error: io::Error,
    },
    #[error(
        "{path} can be read by others (mode {mode:o}), so it is no secret any more; mend it with: chmod 600 {path}"
    )]
    Open { path: PathBuf, mode: u32 },
    #[error("{path} {why}; remove it and a new one is made")]
    Content { path: PathBuf, why: &'static str },
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |error| FileError::Io {
        operation,
        path,
        error,
    }
}

/// `<data>/trust`, which is made if it is not there.
pub(crate) fn folder(data: &Path) -> Result<PathBuf, FileError> {
    let path = data.join("trust");
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .map_err(failed("make the folder", &path))?;
    Ok(path)
}

/// Reads a secret; nothing if there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let mode = file.metadata().map_err(failed("look at", path))?.mode();
    if mode & OTHERS != 0 {
        let (path, mode) = (path.to_owned(), mode & 0o777);
        return Err(FileError::Open { path, mode });
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(failed("read", path))?;
    Ok(Some(bytes))
}

/// Writes a secret, in the place of what was there.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let fresh = path.with_extension(format!("{:016x}.new", clock::random()));
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        match path.parent() {
            Some(folder) => fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    let written = write();
    if written.is_err() {
        // It holds a secret, or a part of one.
        let _ = fs::remove_file(&fresh);
    }
    written.map_err(failed("write", path))
}

/// Removes a file, if it is there.
pub(crate) fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_secret_is_its_owners() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path()).unwrap();
        let path = folder.join("key");
        assert!(read(&path).unwrap().is_none());
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(read(&path).unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        for mode in [0o640, 0o604, 0o620] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let said = read(&path).unwrap_err().to_string();
            assert!(said.contains("chmod 600"), "{said}");
        }
        remove(&path).unwrap();
        remove(&path).unwrap();
    }
}

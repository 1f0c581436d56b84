//! The other end of an import: a folder on this machine to a running coordinator.
//!
//! It goes through the API and not into the data folder, because a coordinator that runs holds that folder
//! for itself, and because the one who has the images is often not where the coordinator is.

use std::{
    fs::File,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use axum::{
    body::Body,
    http::{Request, header},
};
use hyper_util::rt::TokioIo;
use tokio_util::io::{ReaderStream, SyncIoBridge};

use super::{ImportReport, kind};
use crate::operate::connect;

/// Bytes between the reading of the folder and the connection.
const BETWEEN: usize = 256 * 1024;
/// Folders in folders.
const DEPTH: usize = 32;
/// The largest answer: a report names a hundred errors.
const ANSWER: usize = 1 << 20;

/// Sends what is in a folder to `target`, a path of the API with its query, of the coordinator on `data`.
///
/// # Errors
/// If the folder cannot be read, the coordinator cannot be reached, or it refuses.
pub(crate) async fn send(
    address: SocketAddr,
    data: &Path,
    token: Option<&str>,
    target: &str,
    folder: &Path,
) -> anyhow::Result<ImportReport> {
    let mut files = Vec::new();
    list(folder, folder, DEPTH, &mut files)
        .with_context(|| format!("cannot read the folder {}", folder.display()))?;
    if files.is_empty() {
        bail!(
            "there is neither an image nor a text in {}",
            folder.display()
        );
    }
    files.sort();
    let stream = connect(data, address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let (near, far) = tokio::io::duplex(BETWEEN);
    let writing = {
        let folder = folder.to_owned();
        tokio::task::spawn_blocking(move || write(&folder, &files, SyncIoBridge::new(near)))
    };
    let mut request = Request::post(target)
        .header(header::HOST, address.to_string())
        .header(header::CONTENT_TYPE, "application/x-tar");
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    let request = request.body(Body::from_stream(ReaderStream::new(far)))?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = axum::body::to_bytes(Body::new(answer.into_body()), ANSWER).await?;
    // What could not be read is why a tar broke off; that comes first.
    match writing.await? {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(error).with_context(|| format!("cannot send {}", folder.display()));
        }
        _ => {}
    }
    drop(sender);
    connection.abort();
    if status.is_success() {
        return Ok(serde_json::from_slice(&body)?);
    }
    let problem: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    bail!(
        "the coordinator answers {status}: {}",
        problem["detail"].as_str().unwrap_or("?")
    );
}

/// The files that an import can use, as paths inside `top`. Links are not followed.
fn list(top: &Path, folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if depth == 0 {
        return Ok(());
    }
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let (path, what) = (entry.path(), entry.file_type()?);
        if what.is_dir() {
            list(top, &path, depth - 1, files)?;
        } else if what.is_file()
            && path.to_str().and_then(kind).is_some()
            && let Ok(inside) = path.strip_prefix(top)
        {
            files.push(inside.to_owned());
        }
    }
    Ok(())
}

fn write(folder: &Path, files: &[PathBuf], to: impl Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(to);
    for inside in files {
        let mut file = File::open(folder.join(inside))?;
        let mut header = tar::Header::new_gnu();
        header.set_size(file.metadata()?.len());
        header.set_mode(0o644);
        tar.append_data(&mut header, inside, &mut file)?;
    }
    tar.into_inner()?.flush()
}

/// Text as it can stand in a query.
pub(crate) fn in_query(text: &str) -> String {
    use std::fmt::Write;
    text.bytes().fold(String::new(), |mut query, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.') {
            query.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(query, "%{byte:02X}");
        }
        query
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_in_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("ok")).unwrap();
        for name in ["ok/1.png", "labels.csv", "notes.doc"] {
            std::fs::write(dir.path().join(name), b"x").unwrap();
        }
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link.txt")).unwrap();
        let mut files = Vec::new();
        list(dir.path(), dir.path(), DEPTH, &mut files).unwrap();
        files.sort();
        assert_eq!(
            files,
            [PathBuf::from("labels.csv"), PathBuf::from("ok/1.png")]
        );
        let mut tar = Vec::new();
        write(dir.path(), &files, &mut tar).unwrap();
        assert_eq!(tar.len(), 512 * 6);
        assert_eq!(in_query("Ana & Ö"), "Ana%20%26%20%C3%96");
    }
}

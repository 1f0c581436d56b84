//! How a command line asks the running agent: a socket in the data folder that only the agent's user can open.
//!
//! One line of JSON each way, and the connection ends.

use std::{
    io::{BufReader, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream as Blocking},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader as AsyncBufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;

/// A question is a word and a name.
const MAX_QUESTION: u64 = 1_024;
/// An answer names every device of the largest site.
const MAX_ANSWER: u64 = 4 * 1024 * 1024;
/// Somebody who asks and says nothing.
const PATIENCE: Duration = Duration::from_secs(5);
/// A folder's path may be too long for a socket's name (108 bytes on Linux).
const FILE: &str = "mesh.sock";

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Question {
    /// Who is there?
    Status,
    /// Why is this one not there?
    Doctor(String),
}

/// A question and where its answer goes.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) what: Question,
    pub(super) back: oneshot::Sender<String>,
}

fn path(data: &Path) -> PathBuf {
    data.join(FILE)
}

/// Answers until `stop`.
pub(super) async fn serve(data: PathBuf, ask: mpsc::Sender<Request>, stop: CancellationToken) {
    let path = path(&data);
    // Of an agent that was killed: the outbox's lock says that no other runs here.
    let _ = std::fs::remove_file(&path);
    let listener = match UnixListener::bind(&path) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(
                "`edge-agent mesh` cannot ask this agent: {}: {error}",
                path.display()
            );
            return;
        }
    };
    let _ = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600));
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = stream else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // One after the other: people ask rarely.
        let answered = tokio::time::timeout(PATIENCE, one(stream, &ask)).await;
        if let Ok(Err(error)) = answered {
            tracing::debug!("a question was not answered: {error}");
        }
    }
    let _ = std::fs::remove_file(&path);
}

async fn one(stream: UnixStream, ask: &mpsc::Sender<Request>) -> std::io::Result<()> {
    let (from, mut to) = stream.into_split();
    let mut line = String::new();
    AsyncBufReader::new(from.take(MAX_QUESTION))
        .read_line(&mut line)
        .await?;
    let what = serde_json::from_str(&line).map_err(std::io::Error::other)?;
    let (back, answer) = oneshot::channel();
    ask.send(Request { what, back })
        .await
        .map_err(std::io::Error::other)?;
    let answer = answer.await.map_err(std::io::Error::other)?;
    to.write_all(answer.as_bytes()).await?;
    to.shutdown().await
}

/// Asks the agent that runs on `data`.
///
/// # Errors
/// In words, what to do.
pub(super) fn ask(data: &Path, what: &Question) -> Result<String, String> {
    let path = path(data);
    let shown = path.display();
    let mut stream = Blocking::connect(&path).map_err(|error| {
        format!(
            "no agent answers at {shown} ({error}): is one running on this data folder, as this user, with [mesh] on and an \
             identity?"
        )
    })?;
    let failed = |error: std::io::Error| format!("{shown}: {error}");
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    let question = serde_json::to_string(what).map_err(|error| error.to_string())?;
    stream
        .write_all(format!("{question}\n").as_bytes())
        .map_err(failed)?;
    let mut answer = String::new();
    BufReader::new(stream)
        .take(MAX_ANSWER)
        .read_to_string(&mut answer)
        .map_err(failed)?;
    if answer.is_empty() {
        return Err(format!("{shown}: the agent gave no answer"));
    }
    Ok(answer)
}

//! The peers: what somebody would write today, as small Python programs in `tests/peers`.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

/// A peer that runs. It reports in lines of JSON on its standard output, and ends with its standard input.
#[derive(Debug)]
pub(crate) struct Peer {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    script: String,
}

impl Peer {
    /// Starts `tests/peers/<script>` with `args`.
    ///
    /// # Errors
    /// If the peers' environment or the script is missing; says how to make it.
    pub(crate) fn start(
        script: &str,
        args: impl IntoIterator<Item = OsString>,
    ) -> anyhow::Result<Self> {
        let scripts = scripts()?;
        let python = environment()?.join("bin/python");
        if !python.exists() {
            bail!(
                "the peers' Python environment is missing; make it with {}",
                scripts.join("setup.sh").display()
            );
        }
        let mut child = Command::new(python)
            .arg(scripts.join(script))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting the peer {script}"))?;
        let out = child.stdout.take().context("the peer's output")?;
        Ok(Self {
            child,
            lines: BufReader::new(out).lines(),
            script: script.to_owned(),
        })
    }

    /// Its process id.
    #[must_use]
    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    /// Its next line.
    ///
    /// # Errors
    /// If it ended instead.
    pub(crate) async fn line(&mut self) -> anyhow::Result<String> {
        let line = self.lines.next_line().await?;
        line.with_context(|| format!("the peer {} ended early", self.script))
    }

    /// Its next line, as JSON.
    ///
    /// # Errors
    /// If it ended instead, or said something else.
    pub(crate) async fn says(&mut self) -> anyhow::Result<Value> {
        let line = self.line().await?;
        serde_json::from_str(&line)
            .with_context(|| format!("the peer {} said {line:?}", self.script))
    }

    /// Lets it end.
    ///
    /// # Errors
    /// If it fails.
    pub(crate) async fn end(mut self) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait().await?;
        if !status.success() {
            bail!("the peer {} failed: {status}", self.script);
        }
        Ok(())
    }
}

/// Where the peers' scripts are: below the working directory, as in a clone, or where the fleet was built.
fn scripts() -> anyhow::Result<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/peers");
    [PathBuf::from("tests/peers"), built]
        .into_iter()
        .find(|dir| dir.join("setup.sh").exists())
        .context("no tests/peers here: run this in the repository")
}

fn environment() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("LACEWING_PEERS") {
        return Ok(dir.into());
    }
    let home = std::env::var_os("HOME").context("neither LACEWING_PEERS nor HOME is set")?;
    Ok(Path::new(&home).join(".cache/lacewing-peers"))
}

/// A number that a peer said.
///
/// # Errors
/// If it did not.
pub(crate) fn number(said: &Value, key: &str) -> anyhow::Result<f64> {
    said[key]
        .as_f64()
        .with_context(|| format!("the peer said no {key}: {said}"))
}

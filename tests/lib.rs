//! Shared helpers of the end-to-end tests.

mod tap;
pub mod web;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use fleet::{
    process::Program,
    site::{Plan, Site},
    witness::Account,
};

pub use tap::{Tap, Tapped};

/// How long anything that should happen may take on a busy machine.
pub const BOUND: Duration = Duration::from_secs(120);

/// A bundle that ships with the project.
#[must_use]
pub fn bundle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/bundles")
        .join(name)
}

/// A site below `root` on small scenes, with `node` (the executable of this package) playing every part.
#[must_use]
pub fn plan(node: &str, root: &Path) -> Plan {
    let mut plan = Plan::new(Program(node.into()), root.to_owned(), bundle("conveyor"));
    plan.camera = fleet::site::Camera::Scene {
        width: 64,
        height: 64,
    };
    plan.fps = 25.0;
    plan
}

/// A small file system of its own, for as long as this lives.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// One of so many MiB at a folder, which is made; nothing if this user may not mount one.
    #[must_use]
    pub fn mount(at: &Path, mib: u32) -> Option<Self> {
        std::fs::create_dir_all(at).ok()?;
        let size = format!("size={mib}m");
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(at)
            .output()
            .ok()?;
        mount.status.success().then(|| Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that was killed a moment ago may still hold it.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Says what is wrong with a count, if anything is.
///
/// # Errors
/// In words, with the whole count.
pub fn exactly_once(total: &Account) -> Result<(), String> {
    if total.is_whole() && total.produced > 0 && total.stored == total.produced && total.gaps == 0 {
        Ok(())
    } else {
        Err(format!("not everything arrived exactly once: {total:?}"))
    }
}

/// Looks again and again until something is so.
///
/// # Errors
/// Names what did not become so within [`BOUND`].
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) -> Result<(), String> {
    let end = tokio::time::Instant::now() + BOUND;
    while tokio::time::Instant::now() < end {
        if is_so().await {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Err(format!("not within {BOUND:?}: {what}"))
}

/// A counter of the coordinator; 0 if it has never moved.
///
/// # Panics
/// If the coordinator does not answer.
pub async fn counted(site: &Site, counter: &'static str) -> f64 {
    let way = site.way().clone();
    let text = tokio::task::spawn_blocking(move || {
        let client = way.client(BOUND).unwrap();
        let url = format!("{}/metrics", way.console());
        let answer = way.ask(|token| client.get(&url).header("authorization", token).call());
        answer.unwrap().body_mut().read_to_string().unwrap()
    });
    let text = text.await.unwrap();
    let line = text
        .lines()
        .find(|l| l.rsplit_once(' ').is_some_and(|(name, _)| name == counter));
    line.map_or(0.0, |l| l.rsplit_once(' ').unwrap().1.parse().unwrap())
}

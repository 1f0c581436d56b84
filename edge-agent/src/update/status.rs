//! What is known about the device's models, for people.

use std::fmt::Write;

use mesh_core::{Release, update::Saved};

use super::{
    disk::Disk,
    registry::{Http, Registry, VerifyError},
};
use crate::{clock::WallClock, config::Config, identity::Tls, samples::coordinator_url, settings};

/// What `edge-agent model status` prints. Reads only what is on the disk, so that it can be asked while the agent runs.
#[must_use]
pub(crate) fn status(config: &Config) -> String {
    let mut text = String::new();
    let mut line = |what: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{what:<12}{value}");
    };
    if let Some(known) = settings::status(&config.data) {
        line("settings", &known);
    }
    let Some(saved) = Disk::look(&config.data) else {
        let factory = match &config.model.bundle {
            Some(bundle) => format!("the factory model in {}", bundle.display()),
            None => "none".into(),
        };
        line("model", &factory);
        line("updates", "none so far");
        return text;
    };
    let named = |release: Option<&Release>| match release {
        Some(release) => {
            let digest = release.digest.to_string();
            format!("{release} ({})", digest.get(..16).unwrap_or_default())
        }
        None => "none".into(),
    };
    line("model", &named(saved.current.as_ref()));
    line("last good", &named(saved.last_good.as_ref()));
    line("wished for", &named(saved.target()));
    line("state", &state(&saved));
    for bad in &saved.bad {
        let digest = bad.digest.to_string();
        let failure = &bad.failure;
        let (short, reason) = (
            digest.get(..16).unwrap_or_default(),
            failure.reason.as_str(),
        );
        line("bad", &format!("{short} {reason}: {}", failure.detail));
    }
    text
}

fn state(saved: &Saved) -> String {
    let starts = match saved.starts {
        0 => String::new(),
        n => format!(", start {n} since it last proved itself"),
    };
    match (&saved.begun, saved.target()) {
        (Some(begun), _) if saved.is_watching() => format!("{begun} is watched{starts}"),
        (Some(begun), _) => format!("{begun} is on trial beside it{starts}"),
        (None, Some(target)) if saved.is_bad(target.digest) => {
            format!("{target} is not tried again{starts}")
        }
        (None, Some(target)) if saved.current.as_ref().map(|r| r.digest) != Some(target.digest) => {
            format!("{target} is on its way{starts}")
        }
        (None, _) => format!("settled{starts}"),
    }
}

/// What `edge-agent doctor` says about updates.
///
/// # Errors
/// What keeps models from coming.
pub(crate) fn doctor(config: &Config, tls: &Tls) -> Result<String, String> {
    if !config.update.enabled {
        return Ok("the device stays with its model (update.enabled is false)".into());
    }
    let (Some(coordinator), Some(root)) = (config.coordinator(), &config.update.root) else {
        return Ok(match config.update.root {
            None => "no root of trust (update.root is not set): nothing is ever installed".into(),
            Some(_) => "no coordinator (update.coordinator is not set): nothing comes".into(),
        });
    };
    let shown = root.display();
    let pinned = std::fs::read(root)
        .map_err(|error| format!("{shown} cannot be read: {error}; nothing can be installed"))?;
    let base = coordinator_url(coordinator)?;
    // A folder of its own: what the running agent trusts is left alone.
    let folder = config.data.join(".doctor-registry");
    let source = Http::trusting(&format!("{base}/api/v1/tuf"), tls);
    let refreshed = Registry::new(&pinned, folder.clone(), source).and_then(|mut registry| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| VerifyError::Malformed(error.to_string()))?;
        runtime.block_on(registry.refresh(WallClock::system().now_ms()))
    });
    let _ = std::fs::remove_dir_all(folder);
    match refreshed {
        Ok(found) => Ok(format!(
            "{base} has signed models, version {} of its list",
            found.targets
        )),
        Err(error) => Err(format!(
            "{base}: {error}; the device stays with its model until that is mended"
        )),
    }
}

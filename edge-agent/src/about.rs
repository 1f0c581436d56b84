//! What the device says about itself, besides readings.

use mesh_core::{Info, ModelInfo, State, VERSION};
use models::Engine;
use tokio::sync::watch;

use crate::{clock::WallClock, update::Engines};

/// What the device is, now.
#[derive(Clone, Debug)]
pub(crate) struct About {
    /// What it is, but for where neighbours reach it …
    pub(crate) info: Info,
    /// … which the mesh finds out.
    pub(crate) mesh: watch::Receiver<String>,
    /// The models in memory.
    pub(crate) engines: watch::Receiver<Engines>,
    /// Sources that cannot be opened, and why.
    pub(crate) blind: watch::Receiver<Vec<String>>,
    /// Pins that do not work, and why.
    pub(crate) broken: Vec<String>,
    /// Stamps the state.
    pub(crate) wall: WallClock,
}

impl About {
    /// What it is.
    #[must_use]
    pub(crate) fn info(&self) -> Info {
        Info {
            mesh: self.mesh.borrow().clone(),
            ..self.info.clone()
        }
    }

    /// The model whose results count.
    #[must_use]
    pub(crate) fn model(&self) -> Option<ModelInfo> {
        self.engines.borrow().active.as_deref().map(model_info)
    }

    /// Waits until something else is true than before. For ever, once nothing can change any more.
    pub(crate) async fn changed(&mut self) {
        tokio::select! {
            Ok(()) = self.engines.changed() => {}
            Ok(()) = self.blind.changed() => {}
            Ok(()) = self.mesh.changed() => {}
            else => std::future::pending().await,
        }
    }

    /// How it is.
    #[must_use]
    pub(crate) fn state(&self) -> State {
        let engines = self.engines.borrow();
        let blind = self.blind.borrow();
        let (health, detail) = match (&engines.active, blind.as_slice()) {
            (None, _) => (
                "no_model",
                match &engines.why {
                    Some(why) => why.to_string(),
                    None => "no model is configured".into(),
                },
            ),
            (Some(_), []) => ("ok", self.broken.join("; ")),
            (Some(_), blind) => ("no_source", blind.join("; ")),
        };
        State {
            v: VERSION,
            ts: self.wall.now_ms(),
            health: health.into(),
            detail,
        }
    }
}

fn model_info(engine: &Engine) -> ModelInfo {
    let manifest = engine.manifest();
    ModelInfo {
        v: VERSION,
        name: manifest.name.clone(),
        version: manifest.version.clone(),
        sha256: manifest.model.sha256.clone(),
        task: manifest.task.as_str().into(),
        labels: manifest.output.labels.join(","),
    }
}

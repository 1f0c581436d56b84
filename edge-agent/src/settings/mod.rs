//! Settings that come from the coordinator: laid over the device's own files at a start of the agent.
//!
//! All decisions are those of [`mesh_core::settings`]. [`Home`] lives as long as the process and begins each life of the
//! agent with what is on the disk; the `driver` carries on from there while the agent runs, and asks for the next life.

mod disk;
mod driver;

use std::{
    collections::VecDeque,
    path::Path,
    sync::{Arc, Mutex},
};

use mesh_core::{
    Failure, Reason, Settings,
    settings::{Action, Adoption, Document, Input, Saved, refusal, refused},
};

use crate::{
    clock::{Monotonic, WallClock},
    config::{Config, ConfigErrors, Layers},
    dice,
};
use disk::Disk;
pub(crate) use driver::{Driver, Ends};

/// What every life of the agent begins from.
#[derive(Clone, Debug)]
pub struct Home {
    layers: Layers,
    wall: WallClock,
    /// Held while something is fetched: a life that has ended may still be at it.
    fetching: Arc<Mutex<()>>,
}

/// One life of the agent, from before it starts.
#[derive(Debug)]
pub struct Life {
    home: Home,
    disk: Disk,
    adoption: Adoption,
    clock: Monotonic,
    /// What the disk has for certain.
    saved: Saved,
    /// The state could not be written: nothing is decided until it can be.
    stuck: bool,
    /// The device's own files.
    own: Config,
}

impl Home {
    /// A device with these files and this environment.
    #[must_use]
    pub fn new(layers: Layers, wall: WallClock) -> Self {
        Self {
            layers,
            wall,
            fetching: Arc::default(),
        }
    }

    /// Counts the start if settings are on trial, and says what the agent is to start with.
    ///
    /// # Errors
    /// If the device's own files have mistakes: nothing is laid over those.
    pub fn begin(&self) -> Result<(Config, Life), ConfigErrors> {
        let own = self.layers.read(None)?;
        let disk = Disk::of(&own.data);
        let mut saved = disk.read();
        if !own.update.enabled {
            // What has proved itself stays, nothing new is looked for.
            (saved.revision, saved.wished) = (0, None);
        }
        let clock = Monotonic::start();
        let (adoption, actions) = Adoption::resume(saved.clone(), clock.now_ms(), dice::throw());
        let mut life = Life {
            home: self.clone(),
            disk,
            adoption,
            clock,
            saved,
            stuck: false,
            own,
        };
        let config = life.load(actions);
        Ok((config, life))
    }
}

impl Life {
    /// Are settings on trial in this life?
    #[must_use]
    pub fn is_trial(&self) -> bool {
        !self.stuck && self.adoption.saved().begun.is_some()
    }

    /// Carries out what comes before the agent starts.
    fn load(&mut self, actions: Vec<Action>) -> Config {
        let mut config = self.own.clone();
        let mut left = VecDeque::from(actions);
        while let Some(action) = left.pop_front() {
            match action {
                Action::Save(saved) => {
                    if !self.save(*saved) {
                        // Without counting the start: only what has proved itself.
                        let good = self.saved.good.map(|good| self.compose(&good));
                        return good.and_then(Result::ok).unwrap_or(config);
                    }
                }
                Action::Load { settings, ticket } => {
                    let composed = match &settings {
                        Some(settings) => self.compose(settings),
                        None => Ok(self.own.clone()),
                    };
                    let result = match composed {
                        Ok(composed) => {
                            config = composed;
                            Ok(())
                        }
                        Err(failure) => {
                            let why = &failure.detail;
                            tracing::error!("settings from the coordinator are not used: {why}");
                            Err(failure)
                        }
                    };
                    let done = Input::Done { ticket, result };
                    left.extend(self.adoption.step(done, self.clock.now_ms()));
                }
                // The rest is for when the agent runs.
                Action::Fetch { .. } | Action::Restart | Action::Retain(_) | Action::Report => {}
            }
        }
        if let Some(settings) = self.adoption.report().loaded {
            let (version, trial) = (settings.version, self.is_trial());
            tracing::info!(version, trial, "settings from the coordinator");
        }
        config
    }

    fn compose(&self, settings: &Settings) -> Result<Config, Failure> {
        let bytes = self.disk.document(settings.digest)?;
        compose(&self.home.layers, &self.own, settings, &bytes)
    }

    /// Saves durably. If that cannot be done nothing that follows is.
    fn save(&mut self, saved: Saved) -> bool {
        match self.disk.save(&saved) {
            Ok(()) => self.saved = saved,
            Err(error) => {
                tracing::error!("{error}; settings stay as they are until that works");
                self.stuck = true;
            }
        }
        !self.stuck
    }
}

/// What the device is with these settings laid over its own files.
fn compose(
    layers: &Layers,
    own: &Config,
    settings: &Settings,
    bytes: &[u8],
) -> Result<Config, Failure> {
    let document = Document::decode(bytes).map_err(|error| {
        // Perhaps a later agent understands it.
        Failure::new(
            Reason::Metadata,
            &format!("the document of the settings: {error}"),
        )
    })?;
    let board = Some(own.board.name.as_str());
    if document.version != settings.version
        || !document.whom.includes(&own.site, &own.device, board)
    {
        return Err(refusal(&["they are not for this device".to_owned()]));
    }
    let forbidden = refused(&document.settings);
    match layers.read(Some(&document.settings)) {
        Ok(config) if forbidden.is_empty() => Ok(config),
        Ok(_) => Err(refusal(&forbidden)),
        Err(ConfigErrors(mistakes)) => Err(refusal(&[forbidden, mistakes].concat())),
    }
}

/// What is known about settings, for people; nothing where none ever came. Reads only what is on the disk.
pub(crate) fn status(data: &Path) -> Option<String> {
    let saved = Disk::of(data).read();
    let named = |settings: &Settings| format!("version {}", settings.version);
    let loads = saved.loads().map(named);
    let state = match (&saved.begun, saved.wished) {
        (Some(_), _) => format!(" (on trial, start {})", saved.starts),
        (None, Some(wished)) => match saved.bad.iter().find(|bad| bad.digest == wished.digest) {
            Some(bad) => format!(
                "; {} is not tried again, {}: {}",
                named(&wished),
                bad.failure.reason.as_str(),
                bad.failure.detail
            ),
            None => String::new(),
        },
        (None, None) => String::new(),
    };
    let is_known = saved.revision > 0 || loads.is_some();
    is_known.then(|| {
        format!(
            "{}{state}",
            loads.as_deref().unwrap_or("the device's own files")
        )
    })
}

#[cfg(test)]
mod tests {
    use mesh_core::{VERSION, settings::Begun};

    use super::*;

    /// A device that is about to start with settings on trial.
    fn device(data: &Path) -> (Home, Saved) {
        let file = data.join("agent.toml");
        std::fs::write(
            &file,
            format!("site = 's'\ndevice = 'd'\ndata = {data:?}\n"),
        )
        .unwrap();
        let document = Document {
            v: VERSION,
            version: 1,
            whom: Default::default(),
            settings: serde_json::from_str(r#"{"report":{"every_s":7}}"#).unwrap(),
        };
        let bytes = document.encode().unwrap();
        let settings = Settings {
            version: 1,
            digest: models::digest_of(&bytes),
            trial_s: 60,
        };
        let saved = Saved {
            revision: 1,
            wished: Some(settings),
            begun: Some(Begun {
                settings,
                sources: Default::default(),
            }),
            ..Saved::new()
        };
        let disk = Disk::of(data);
        disk.keep(settings.digest, &bytes).unwrap();
        disk.save(&saved).unwrap();
        let home = Home::new(Layers::new(&[file], |_| None), WallClock::system());
        (home, saved)
    }

    #[test]
    fn a_start_is_counted_before_it_begins() {
        let dir = tempfile::tempdir().unwrap();
        let (home, saved) = device(dir.path());
        let (config, life) = home.begin().unwrap();
        assert!(life.is_trial());
        assert_eq!(config.report.every_s, 7);
        assert_eq!(Disk::of(dir.path()).read(), Saved { starts: 1, ..saved });
    }

    #[test]
    fn nothing_is_tried_that_cannot_be_counted() {
        let dir = tempfile::tempdir().unwrap();
        let (home, saved) = device(dir.path());
        // In the place of the file that takes the state's place.
        std::fs::create_dir(dir.path().join("settings/state.json.new")).unwrap();
        let (config, life) = home.begin().unwrap();
        assert!(!life.is_trial());
        assert_eq!(
            config.report.every_s,
            home.layers.read(None).unwrap().report.every_s
        );
        assert_eq!(Disk::of(dir.path()).read(), saved);
    }

    #[test]
    fn a_document_that_is_lost_is_fetched_again_and_not_blamed() {
        let dir = tempfile::tempdir().unwrap();
        let (home, saved) = device(dir.path());
        Disk::of(dir.path()).retain(&[]);
        let (_, life) = home.begin().unwrap();
        assert!(!life.is_trial());
        let now = Disk::of(dir.path()).read();
        assert_eq!(
            (now.wished, now.bad.len(), now.begun),
            (saved.wished, 0, None)
        );
    }
}

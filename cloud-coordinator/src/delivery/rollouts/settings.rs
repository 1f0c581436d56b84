//! Settings: signed, recorded, and made part of what each device is told to be.
//!
//! There are no stages: a device that they harm goes back by itself. Which settings a device is to have follows from
//! those that count and from nothing else, so that a new device of a site gets them, too.

use mesh_core::{
    Digest, Name, Settings, VERSION,
    settings::{Document, Whom, refused},
};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{Rollouts, State};
use crate::{
    clock,
    delivery::{ReleaseError, signing::SigningError, store::SettingsRow},
    records::RecordError,
    registry::Standing,
};

/// Settings that count: for sites, boards and some devices. Whoever needs more of them has another problem.
const MAX_ACTIVE: usize = 500;
/// Failures that are shown in full.
const MAX_FAILURES: usize = 20;
/// After a crash between signing and recording a number is taken; no more than this are ever in the way.
const MAX_TAKEN: u64 = 100;

/// Why settings cannot be changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    #[error("{}", .0.join("; "))]
    Refused(Vec<String>),
    #[error("there are no settings for that")]
    Unknown,
    #[error("{MAX_ACTIVE} settings count already")]
    Full,
    #[error(transparent)]
    Release(#[from] ReleaseError),
    #[error(transparent)]
    Records(#[from] RecordError),
}

/// Settings that count.
#[derive(Debug)]
pub(super) struct Active {
    settings: Settings,
    document: Document,
    author: String,
    created_ms: i64,
}

impl Active {
    /// Nothing if it cannot be read any more.
    pub(super) fn of_row(row: &SettingsRow) -> Option<Self> {
        Some(Self {
            settings: Settings {
                version: row.version.cast_unsigned(),
                digest: row.digest.parse().ok()?,
                trial_s: u32::try_from(row.trial_s).ok()?,
            },
            document: Document::decode(row.document.as_bytes()).ok()?,
            author: row.author.clone(),
            created_ms: row.created_ms,
        })
    }
}

/// What somebody wants to be set.
#[derive(Debug)]
pub(crate) struct Push {
    pub(crate) whom: Whom,
    pub(crate) settings: Map<String, Value>,
    pub(crate) trial_s: u32,
    pub(crate) author: String,
}

/// A device on which settings failed.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct SettingsFailure {
    /// `site/device`
    device: String,
    /// `refused`, `blind`, `unreachable`, `crash`; anything else is tried again.
    reason: &'static str,
    /// In words.
    detail: String,
}

/// Settings as they are shown.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Settings)]
pub(crate) struct SettingsView {
    /// Their number.
    version: u64,
    /// SHA-256 of the signed document.
    digest: String,
    /// Only for this site.
    #[schema(value_type = Option<String>)]
    site: Option<Name>,
    /// Only for this board.
    board: Option<String>,
    /// Only for this device of the site.
    #[schema(value_type = Option<String>)]
    device: Option<Name>,
    /// What is set.
    #[schema(value_type = Object)]
    settings: Map<String, Value>,
    /// Seconds of the trial on a device.
    trial_s: u32,
    /// Who set it.
    author: String,
    /// When, in milliseconds since the Unix epoch.
    created_ms: i64,
    /// Devices that are to have them: those for which nothing nearer is set.
    devices: usize,
    /// Devices that have kept them.
    kept: usize,
    /// Devices on which they failed.
    failed: usize,
    /// The first of these.
    failures: Vec<SettingsFailure>,
}

/// The settings that a device is to have.
fn nearest<'a>(all: &'a [Active], device: &Standing) -> Option<&'a Active> {
    let board = device.board.as_deref();
    let fits = |a: &&Active| a.document.whom.includes(&device.site, &device.name, board);
    all.iter()
        .filter(fits)
        .max_by_key(|active| active.document.whom.rank())
}

impl Rollouts {
    /// Signs settings and makes them count, in place of others for the same devices.
    pub(crate) async fn push_settings(&self, push: Push) -> Result<SettingsView, SettingsError> {
        let mistakes = refused(&push.settings);
        if !mistakes.is_empty() {
            return Err(SettingsError::Refused(mistakes));
        }
        let mut state = self.state.lock().await;
        let same = |active: &Active| active.document.whom == push.whom;
        if state.settings.len() >= MAX_ACTIVE && !state.settings.iter().any(same) {
            return Err(SettingsError::Full);
        }
        let mut document = Document {
            v: VERSION,
            version: self.records.newest_settings().await?.cast_unsigned() + 1,
            whom: push.whom.clone(),
            settings: push.settings.clone(),
        };
        let last = document.version + MAX_TAKEN;
        let bytes = loop {
            let bytes = document
                .encode()
                .map_err(|error| SettingsError::Refused(vec![error.to_string()]))?;
            match self.releases.sign_settings(document.version, &bytes).await {
                Ok(()) => break bytes,
                Err(SigningError::Exists(_)) if document.version < last => document.version += 1,
                Err(error) => return Err(ReleaseError::from(error).into()),
            }
        };
        let digest: Digest = models::digest_of(&bytes);
        let row = SettingsRow {
            version: document.version.cast_signed(),
            digest: digest.to_string(),
            document: String::from_utf8_lossy(&bytes).into_owned(),
            trial_s: push.trial_s.into(),
            author: push.author,
            created_ms: clock::now_ms(),
        };
        let mut replaced = state.settings.iter().filter(|active| same(active));
        let replaced = replaced
            .next()
            .map(|active| active.settings.version.cast_signed());
        self.records
            .change_settings(Some(&row), replaced, &row.author)
            .await?;
        tracing::info!(version = row.version, digest = row.digest, "settings");
        state.settings.retain(|active| !same(active));
        let active = Active {
            settings: Settings {
                version: document.version,
                digest,
                trial_s: push.trial_s,
            },
            document,
            author: row.author,
            created_ms: row.created_ms,
        };
        state.settings.push(active);
        let devices = self.registry.stands();
        let newest = state.settings.last().ok_or(SettingsError::Unknown)?;
        Ok(self.view_settings(&state, newest, &devices))
    }

    /// Takes settings back: the devices have what is set less near, or their own files.
    pub(crate) async fn unset_settings(
        &self,
        whom: &Whom,
        author: &str,
    ) -> Result<(), SettingsError> {
        let mut state = self.state.lock().await;
        let found = state
            .settings
            .iter()
            .find(|active| active.document.whom == *whom);
        let version = found.ok_or(SettingsError::Unknown)?.settings.version;
        self.records
            .change_settings(None, Some(version.cast_signed()), author)
            .await?;
        state
            .settings
            .retain(|active| active.document.whom != *whom);
        Ok(())
    }

    /// The settings that count, newest first, and how the devices do with them.
    pub(crate) async fn settings(&self) -> Vec<SettingsView> {
        let state = self.state.lock().await;
        let devices = self.registry.stands();
        let newest = state.settings.iter().rev();
        newest
            .map(|active| self.view_settings(&state, active, &devices))
            .collect()
    }

    /// What devices are to be told because of settings, as far as they were not told yet: not written down so far.
    pub(super) fn follow_settings(&self, state: &mut State) {
        let State {
            settings,
            wishes,
            unsaved,
            ..
        } = state;
        if settings.is_empty() && !wishes.have_settings() {
            return;
        }
        // The board is not known before the device has said what it is.
        for device in self.registry.stands().iter().filter(|d| d.board.is_some()) {
            let wanted = nearest(settings, device).map(|active| active.settings);
            let heard = device
                .reported
                .as_ref()
                .map_or(0, |reported| reported.revision);
            let row = wishes.set(device.id, wanted, heard);
            unsaved.wishes.extend(row.map(|row| (row.device, row)));
        }
    }

    fn view_settings(&self, state: &State, active: &Active, devices: &[Standing]) -> SettingsView {
        let Active {
            settings,
            document,
            author,
            created_ms,
        } = active;
        let mut view = SettingsView {
            version: settings.version,
            digest: settings.digest.to_string(),
            site: document.whom.site.clone(),
            board: document.whom.board.clone(),
            device: document.whom.device.clone(),
            settings: document.settings.clone(),
            trial_s: settings.trial_s,
            author: author.clone(),
            created_ms: *created_ms,
            devices: 0,
            kept: 0,
            failed: 0,
            failures: Vec::new(),
        };
        let mine = |device: &&Standing| {
            let nearest = nearest(&state.settings, device);
            nearest.is_some_and(|n| n.settings.version == settings.version)
        };
        for device in devices.iter().filter(mine) {
            view.devices += 1;
            let said = device.reported.as_ref().and_then(|r| r.settings.as_ref());
            let Some(said) = said.filter(|said| said.target.as_ref() == Some(settings)) else {
                continue;
            };
            if said.loaded.as_ref() == Some(settings) && said.phase == mesh_core::Phase::Settled {
                view.kept += 1;
            }
            if let Some(failure) = &said.failure {
                view.failed += 1;
                if view.failures.len() < MAX_FAILURES {
                    view.failures.push(SettingsFailure {
                        device: self.registry.called(device.id),
                        reason: failure.reason.as_str(),
                        detail: failure.detail.clone(),
                    });
                }
            }
        }
        view
    }
}

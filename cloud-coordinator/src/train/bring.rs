//! A bundle that somebody made elsewhere, on its way in.

use std::{
    fs,
    io::{self, Read},
    path::Path,
};

use bytes::Bytes;
use models::{Bundle, MAX_MODEL_BYTES, ReleaseDocument};

use super::catalog::{Catalog, CatalogError, TRIAL};

/// Files of a bundle.
const MAX_FILES: usize = 200;

impl Catalog {
    /// Takes in a bundle that comes as a tar of its folder, if it stands a trial. Says `name@version`.
    pub(crate) async fn bring(&self, tar: Bytes) -> Result<String, CatalogError> {
        let (dir, program) = (self.dir.clone(), self.program.clone());
        let unusable = |error: &dyn std::fmt::Display| CatalogError::Unusable(error.to_string());
        let tried = tokio::task::spawn_blocking(move || {
            let folder = fs::create_dir_all(&dir).and_then(|()| tempfile::tempdir_in(&dir));
            let folder = folder.map_err(|source| CatalogError::Copy { path: dir, source })?;
            unpack(&tar, folder.path())?;
            let bundle = Bundle::open(folder.path())?;
            let manifest = &bundle.manifest;
            // What has no release could never be published.
            ReleaseDocument::of(folder.path(), &manifest.name, &manifest.version, None)
                .map_err(|error| unusable(&error))?;
            let trial = models::try_bundle(&program, folder.path(), TRIAL)
                .map_err(|error| unusable(&error))?;
            tracing::info!(
                model = bundle.id(),
                sandbox = trial.sandbox,
                "tried a model"
            );
            match trial.fault {
                Some(_) => Err(CatalogError::Unusable(trial.detail)),
                None => Ok(folder),
            }
        });
        let folder = tried.await.map_err(|error| unusable(&error))??;
        self.give(folder.path()).await
    }
}

/// Plain files below `to`, and nothing else.
fn unpack(tar: &[u8], to: &Path) -> Result<(), CatalogError> {
    let broken = |error: io::Error| CatalogError::Unusable(format!("not a whole tar: {error}"));
    let mut archive = tar::Archive::new(tar);
    for (count, entry) in archive.entries().map_err(broken)?.enumerate() {
        let entry = entry.map_err(broken)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if entry.header().entry_type().is_dir() {
            continue;
        }
        let plain = |part: &str| {
            let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
            !part.is_empty() && !part.starts_with('.') && part.bytes().all(fits)
        };
        if count >= MAX_FILES
            || !entry.header().entry_type().is_file()
            || !name.split('/').all(plain)
        {
            return Err(CatalogError::Unusable(format!(
                "{name:?} does not belong into a bundle: it has at most {MAX_FILES} plain files"
            )));
        }
        let path = to.join(&name);
        let mut bytes = Vec::new();
        entry
            .take(MAX_MODEL_BYTES)
            .read_to_end(&mut bytes)
            .map_err(broken)?;
        let written = path
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(&path, bytes));
        written.map_err(|source| CatalogError::Copy { path, source })?;
    }
    Ok(())
}

//! Makes a bundle: the model's answers to its golden pictures are recorded, and the result is proved by opening it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    bundle::{Bundle, BundleError},
    digest_of,
    engine::{Engine, EngineError},
    image::{ImageError, Picture},
    manifest::{Budget, GOLDEN_EMBEDDING_VALUES, Golden, Manifest, ManifestErrors},
};

/// How far a score may be off on another processor: the order of additions differs, nothing else.
const TOLERANCE: f32 = 0.01;
/// The same for values of an embedding, whose deviation is about 1.
const EMBEDDING_TOLERANCE: f32 = 0.05;

/// What a bundle is made of.
#[derive(Clone, Debug)]
pub struct Draft {
    /// All but `model` and `golden`, which are found out. `lineage.holdout` names a file only if `holdout` has
    /// lines.
    pub manifest: Manifest,
    /// The model file.
    pub model: Vec<u8>,
    /// Golden pictures, encoded: at least one, PNG or JPEG.
    pub golden: Vec<Vec<u8>>,
    /// The model card, Markdown.
    pub card: String,
    /// Pictures that were never trained on.
    pub holdout: Vec<String>,
}

/// Why a bundle cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is something in its place already.
    #[error("{0} exists already")]
    Exists(PathBuf),
    /// A golden picture is none.
    #[error("golden picture {number}: {source}")]
    Golden {
        /// Which, from 1.
        number: usize,
        /// Why.
        source: ImageError,
    },
    /// The manifest that came out cannot be read back.
    #[error("the manifest: {0}")]
    Manifest(String),
    /// The model does not do what the manifest says.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// What was written is no bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

impl From<ManifestErrors> for WriteError {
    fn from(errors: ManifestErrors) -> Self {
        Self::Manifest(errors.to_string())
    }
}

impl Draft {
    /// Writes the bundle into `dir`, which must not exist: all of it or nothing.
    ///
    /// # Errors
    /// If a file cannot be written, or what came out would not be accepted as a bundle.
    pub fn write(mut self, dir: &Path) -> Result<Bundle, WriteError> {
        if dir.exists() {
            return Err(WriteError::Exists(dir.to_owned()));
        }
        let new = dir.with_extension("new");
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| WriteError::Write { path, source }
        };
        let _ = fs::remove_dir_all(&new);
        fs::create_dir_all(new.join("golden")).map_err(fail(&new))?;
        let put = |name: &str, bytes: &[u8]| {
            let path = new.join(name);
            fs::write(&path, bytes).map_err(fail(&path))?;
            fs::File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(fail(&path))
        };
        self.manifest.model.file = "model.onnx".to_owned();
        self.manifest.model.bytes = self.model.len() as u64;
        self.manifest.model.sha256 = digest_of(&self.model).to_string();
        put("model.onnx", &self.model)?;
        let engine = Engine::new(self.manifest.clone(), self.model)?;
        self.manifest.golden.clear();
        for (bytes, number) in self.golden.iter().zip(1..) {
            let picture =
                Picture::decode(bytes).map_err(|source| WriteError::Golden { number, source })?;
            let extension = if bytes.starts_with(&[0xff, 0xd8]) {
                "jpg"
            } else {
                "png"
            };
            let image = format!("golden/{number}.{extension}");
            put(&image, bytes)?;
            let outcome = engine.infer(&picture)?;
            let label = outcome
                .class
                .and_then(|class| self.manifest.output.labels.get(class).cloned());
            let mut embedding = outcome.embedding;
            embedding.truncate(GOLDEN_EMBEDDING_VALUES);
            self.manifest.golden.push(Golden {
                image,
                label,
                scores: outcome.scores,
                embedding,
                tolerance: TOLERANCE,
                embedding_tolerance: EMBEDDING_TOLERANCE,
            });
        }
        if !self.holdout.is_empty() {
            let mut lines = self.holdout.join("\n");
            lines.push('\n');
            put("holdout.txt", lines.as_bytes())?;
            self.manifest.lineage.holdout = Some("holdout.txt".to_owned());
        }
        let text = toml::to_string(&self.manifest)
            .map_err(|error| WriteError::Manifest(error.to_string()))?;
        Manifest::parse(&text)?;
        put("manifest.toml", text.as_bytes())?;
        put("CARD.md", self.card.as_bytes())?;
        Bundle::open(&new)?;
        fs::rename(&new, dir).map_err(fail(dir))?;
        if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::File::open(parent)
                .and_then(|parent| parent.sync_all())
                .map_err(fail(parent))?;
        }
        Ok(Bundle::open(dir)?)
    }
}

impl Bundle {
    /// Gives the bundle another budget, also on the disk.
    ///
    /// # Errors
    /// If it is no sound budget, or cannot be written.
    pub fn set_budget(&mut self, budget: Budget) -> Result<(), WriteError> {
        let mut manifest = self.manifest.clone();
        manifest.budget = budget;
        let text =
            toml::to_string(&manifest).map_err(|error| WriteError::Manifest(error.to_string()))?;
        let manifest = Manifest::parse(&text)?;
        let (new, path) = (
            self.dir().join("manifest.new"),
            self.dir().join("manifest.toml"),
        );
        fs::write(&new, text)
            .and_then(|()| fs::File::open(&new)?.sync_all())
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|source| WriteError::Write { path, source })?;
        self.manifest = manifest;
        Ok(())
    }
}

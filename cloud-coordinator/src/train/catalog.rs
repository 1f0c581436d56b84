//! The models that this coordinator knows: a folder of bundles, and a row about each.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use models::{Bundle, Engine};
use serde::Serialize;
use sqlx::{FromRow, Row, sqlite::SqliteRow};

use crate::{
    clock,
    records::{RecordError, Records, commit},
};

/// Engines that stay loaded: the current model of a few tasks. Each takes some tens of MiB.
const LOADED: usize = 4;
/// Models in use that are listed: one for each task, and more tasks than a coordinator has.
const MAX_IN_USE: i64 = 256;
/// A model that is not tried in this time is not tried at all: some hundred times what is usual.
pub(super) const TRIAL: Duration = Duration::from_secs(120);

/// Why a model cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CatalogError {
    #[error("there is no model {0}")]
    Unknown(String),
    #[error("the model {0} is known already, with another content")]
    Taken(String),
    #[error("the version {0:?} cannot be the name of a folder: it begins with a letter or a digit")]
    Version(String),
    #[error("cannot copy the bundle to {path}: {source}")]
    Copy {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the bundle cannot be used: {0}")]
    Unusable(String),
    #[error(transparent)]
    Bundle(#[from] models::BundleError),
    #[error(transparent)]
    Engine(#[from] models::EngineError),
    #[error(transparent)]
    Records(#[from] RecordError),
}

/// What became of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ModelState {
    /// It was there from the start.
    Given,
    /// It was trained here, and the gate let it pass.
    Accepted,
    /// It was trained here, and the gate stopped it.
    Refused,
}

impl ModelState {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Given => "given",
            Self::Accepted => "accepted",
            Self::Refused => "refused",
        }
    }
}

/// One model, with where it comes from.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct Model {
    /// Its name: that of its task.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// SHA-256 of the model file.
    pub(crate) sha256: String,
    /// What it does.
    pub(crate) kind: String,
    /// What became of it.
    pub(crate) state: ModelState,
    /// `name@version` of the model that it grew out of.
    pub(crate) parent: Option<String>,
    /// Digest of the snapshot that it was trained on.
    pub(crate) dataset: Option<String>,
    /// The job that made it.
    pub(crate) job: Option<i64>,
    /// What the trainer was told, and what it found.
    pub(crate) trainer: Option<serde_json::Value>,
    /// What was measured on the holdout.
    pub(crate) report: Option<serde_json::Value>,
    /// What the gate said.
    pub(crate) verdict: Option<serde_json::Value>,
    /// Who asked for it.
    pub(crate) author: String,
    /// When, in milliseconds since the Unix epoch.
    pub(crate) created_ms: i64,
}

impl Model {
    /// `name@version`.
    pub(crate) fn id(&self) -> String {
        format!("{}@{}", self.name, self.version)
    }
}

impl FromRow<'_, SqliteRow> for Model {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        let json = |column: &str| -> sqlx::Result<Option<serde_json::Value>> {
            let text: Option<String> = row.try_get(column)?;
            text.map(|text| serde_json::from_str(&text))
                .transpose()
                .map_err(|error| sqlx::Error::Decode(error.into()))
        };
        let state: String = row.try_get("state")?;
        Ok(Self {
            name: row.try_get("name")?,
            version: row.try_get("version")?,
            sha256: row.try_get("sha256")?,
            kind: row.try_get("kind")?,
            state: match state.as_str() {
                "given" => ModelState::Given,
                "accepted" => ModelState::Accepted,
                _ => ModelState::Refused,
            },
            parent: row.try_get("parent")?,
            dataset: row.try_get("dataset")?,
            job: row.try_get("job")?,
            trainer: json("trainer")?,
            report: json("report")?,
            verdict: json("verdict")?,
            author: row.try_get("author")?,
            created_ms: row.try_get("created_ms")?,
        })
    }
}

/// What is to be known about a new model, besides what its bundle says.
#[derive(Debug)]
pub(crate) struct NewModel {
    pub(crate) state: ModelState,
    pub(crate) dataset: Option<String>,
    pub(crate) job: Option<i64>,
    pub(crate) trainer: Option<serde_json::Value>,
    pub(crate) report: Option<serde_json::Value>,
    pub(crate) verdict: Option<serde_json::Value>,
    pub(crate) author: String,
}

/// See the module.
pub(crate) struct Catalog {
    pub(super) dir: PathBuf,
    records: Arc<Records>,
    /// The program that tries models, with its first arguments.
    pub(super) program: Vec<OsString>,
    /// The last used one last.
    loaded: Mutex<Vec<(String, Arc<Engine>)>>,
}

const COLUMNS: &str = "name, version, sha256, kind, state, parent, dataset, job, trainer, report, \
                       verdict, author, created_ms";

impl Catalog {
    /// The catalog in `dir`; `program` tries models that nobody knows yet.
    pub(crate) fn new(dir: PathBuf, records: Arc<Records>, program: Vec<OsString>) -> Self {
        Self {
            dir,
            records,
            program,
            loaded: Mutex::new(Vec::new()),
        }
    }

    /// Where the bundle of a model lies, or will.
    pub(crate) fn path(&self, name: &str, version: &str) -> PathBuf {
        self.dir.join(name).join(version)
    }

    /// Takes in a bundle that somebody made elsewhere; nothing happens if it is known already.
    pub(crate) async fn give(&self, from: &Path) -> Result<String, CatalogError> {
        let bundle = Bundle::open(from)?;
        let id = bundle.id();
        // `..` would name, and replace, the folder of all models.
        let version = &bundle.manifest.version;
        if !version.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err(CatalogError::Version(version.clone()));
        }
        let to = self.path(&bundle.manifest.name, &bundle.manifest.version);
        match self.find(&id).await {
            Ok(known) if known.sha256 == bundle.manifest.model.sha256 && to.is_dir() => {
                return Ok(id);
            }
            Ok(known) if known.sha256 != bundle.manifest.model.sha256 => {
                return Err(CatalogError::Taken(id));
            }
            Ok(_) | Err(CatalogError::Unknown(_)) => {}
            Err(error) => return Err(error),
        }
        let new = to.with_extension("new");
        let _ = fs::remove_dir_all(&new);
        let _ = fs::remove_dir_all(&to);
        copy(bundle.dir(), &new)
            .and_then(|()| fs::rename(&new, &to))
            .map_err(|source| CatalogError::Copy {
                path: to.clone(),
                source,
            })?;
        let bundle = Bundle::open(&to)?;
        let model = NewModel {
            state: ModelState::Given,
            dataset: None,
            job: None,
            trainer: None,
            report: None,
            verdict: None,
            author: "given".to_owned(),
        };
        self.record(&bundle, model).await?;
        Ok(id)
    }

    /// Records a bundle that lies where [`Catalog::path`] says.
    pub(crate) async fn record(
        &self,
        bundle: &Bundle,
        model: NewModel,
    ) -> Result<(), CatalogError> {
        const WHAT: &str = "record a model";
        let manifest = &bundle.manifest;
        let now = clock::now_ms();
        let text = |json: &Option<serde_json::Value>| json.as_ref().map(ToString::to_string);
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query(
            "INSERT INTO models (name, version, sha256, kind, state, parent, dataset, job, trainer,
                                 report, verdict, author, created_ms)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
             ON CONFLICT (name, version) DO NOTHING",
        )
        .bind(&manifest.name)
        .bind(&manifest.version)
        .bind(&manifest.model.sha256)
        .bind(manifest.task.as_str())
        .bind(model.state.as_str())
        .bind(&manifest.lineage.parent)
        .bind(&model.dataset)
        .bind(model.job)
        .bind(text(&model.trainer))
        .bind(text(&model.report))
        .bind(text(&model.verdict))
        .bind(&model.author)
        .bind(now)
        .execute(&mut *tx)
        .await
        .map_err(RecordError::sql(WHAT))?;
        Ok(commit(tx).await?)
    }

    /// How many candidates of a task were judged on a holdout that shares images with that of `dataset`: looking
    /// often at the same images makes chance look like progress.
    pub(crate) async fn judged(&self, task: &str, dataset: &str) -> Result<u64, CatalogError> {
        let count: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM models m WHERE m.name = ?1 AND m.verdict IS NOT NULL AND EXISTS (
                 SELECT 1 FROM dataset_items old JOIN dataset_items new
                     ON new.dataset = ?2 AND new.sha256 = old.sha256 AND new.holdout = 1
                 WHERE old.dataset = m.dataset AND old.holdout = 1)",
        )
        .bind(task)
        .bind(dataset)
        .fetch_one(self.records.readers())
        .await
        .map_err(RecordError::sql("count the candidates of a holdout"))?;
        Ok(u64::try_from(count).unwrap_or_default())
    }

    /// Models, newest first, from the `after`-th on.
    pub(crate) async fn list(
        &self,
        name: Option<&str>,
        limit: i64,
        after: i64,
    ) -> Result<Vec<Model>, CatalogError> {
        let query = format!(
            "SELECT {COLUMNS} FROM models WHERE ?1 IS NULL OR name = ?1
             ORDER BY created_ms DESC, name, version LIMIT ?2 OFFSET ?3"
        );
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(query))
            .bind(name)
            .bind(limit)
            .bind(after)
            .fetch_all(self.records.readers())
            .await
            .map_err(RecordError::sql("list the models"))?)
    }

    /// The model `name@version`, or the newest one in use of `name`.
    pub(crate) async fn find(&self, id: &str) -> Result<Model, CatalogError> {
        let unknown = || CatalogError::Unknown(id.to_owned());
        let (name, version) = match id.split_once('@') {
            Some((name, version)) => (name, Some(version)),
            None => (id, None),
        };
        let query = format!(
            "SELECT {COLUMNS} FROM models WHERE name = ?1
             AND (version = ?2 OR (?2 IS NULL AND state <> 'refused'))
             ORDER BY created_ms DESC, version DESC LIMIT 1"
        );
        sqlx::query_as(sqlx::AssertSqlSafe(query))
            .bind(name)
            .bind(version)
            .fetch_optional(self.records.readers())
            .await
            .map_err(RecordError::sql("find a model"))?
            .ok_or_else(unknown)
    }

    /// Of each model the newest version in use.
    pub(crate) async fn in_use(&self) -> Result<Vec<Model>, CatalogError> {
        let query = format!(
            "SELECT {COLUMNS} FROM (SELECT *, row_number() OVER (
                 PARTITION BY name ORDER BY created_ms DESC, version DESC) AS age
             FROM models WHERE state <> 'refused') WHERE age = 1 ORDER BY name LIMIT ?"
        );
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(query))
            .bind(MAX_IN_USE)
            .fetch_all(self.records.readers())
            .await
            .map_err(RecordError::sql("list the models in use"))?)
    }

    /// How many versions of `name` there are, refused ones included.
    pub(crate) async fn versions(&self, name: &str) -> Result<i64, CatalogError> {
        Ok(
            sqlx::query_scalar("SELECT count(*) FROM models WHERE name = ?")
                .bind(name)
                .fetch_one(self.records.readers())
                .await
                .map_err(RecordError::sql("count the versions of a model"))?,
        )
    }

    /// The bundle of a model.
    pub(crate) fn bundle(&self, model: &Model) -> Result<Bundle, CatalogError> {
        Ok(Bundle::open(&self.path(&model.name, &model.version))?)
    }

    /// The model, loaded. Blocks while it loads.
    pub(crate) fn engine(&self, model: &Model) -> Result<Arc<Engine>, CatalogError> {
        let id = model.id();
        let of = |loaded: &mut Vec<(String, Arc<Engine>)>| {
            let at = loaded.iter().position(|(known, _)| *known == id)?;
            let entry = loaded.remove(at);
            let engine = entry.1.clone();
            loaded.push(entry);
            Some(engine)
        };
        if let Some(engine) = of(&mut self.loaded.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(engine);
        }
        let engine = Arc::new(Engine::load(&self.bundle(model)?)?);
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(engine) = of(&mut loaded) {
            return Ok(engine);
        }
        if loaded.len() >= LOADED {
            loaded.remove(0);
        }
        loaded.push((id, engine.clone()));
        Ok(engine)
    }
}

/// Copies a folder of plain files and folders.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
            fs::File::open(&target)?.sync_all()?;
        }
    }
    Ok(())
}

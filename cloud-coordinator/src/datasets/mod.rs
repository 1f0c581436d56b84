//! Datasets: what a task knew at one moment, for ever. Training reads these and nothing else.

mod snapshot;
mod store;

use std::{collections::HashMap, sync::Arc};

pub use snapshot::{Conflict, Duplicate, Report};
pub(crate) use snapshot::{Labelled, snapshot};

use crate::{
    clock,
    records::{RecordError, Records},
};

/// The most labelled samples that go into a dataset: their embeddings are 140 MB.
pub const MAX_ITEMS: usize = 50_000;
/// The most values of a feature.
pub const MAX_FEATURE_VALUES: usize = 4_096;

/// Why there is no such dataset.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The database failed.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// There is none of this digest, or no task of this name.
    #[error("there is no {0}")]
    Missing(String),
    /// Nothing can be learnt from what is labelled.
    #[error("{0}")]
    Unusable(String),
}

/// A snapshot of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// SHA-256 in lower-case hex over UTF-8 lines that each end with a line feed: `task NAME`, then
    /// `class INDEX NAME` for each class in order, then `SHA256 INDEX SPLIT` for each item, sorted, where
    /// SPLIT is `train` or `holdout`.
    pub digest: String,
    /// The task.
    pub task: String,
    /// The classes; an item's class is a place in this list.
    pub classes: Vec<String>,
    /// Who made it.
    pub author: String,
    /// When, milliseconds since 1970 by the coordinator's clock.
    pub created_ms: i64,
    /// The largest share of the train items that one device was allowed to give, above 0 and at most 1. Where there are
    /// few devices it is [`Report::share_limit`] that held.
    pub device_share: f64,
    /// In order of the image's digest; each image once.
    pub items: Vec<Item>,
    /// What was left out, and why.
    pub report: Report,
}

/// One image of a dataset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The sample that the image is of.
    pub sample: i64,
    /// SHA-256 of the image, for [`crate::objects::Objects::read`]. An image that was deleted since is
    /// [missing](crate::objects::ObjectError::Missing) there.
    pub sha256: String,
    /// A place in [`Dataset::classes`].
    pub class: u32,
    /// Only ever measured with, never trained with.
    pub holdout: bool,
    /// The device that took it, `SITE/DEVICE`, with `_` where no site was proved; nothing for an import.
    pub device: Option<String>,
}

/// A dataset without its items.
#[derive(Clone, Debug, PartialEq, serde::Serialize, utoipa::ToSchema)]
#[schema(as = Dataset)]
pub struct Summary {
    /// What the dataset is, and its name: see the documentation for how it is computed.
    pub digest: String,
    /// The task.
    pub task: String,
    /// The classes.
    pub classes: Vec<String>,
    /// Who made it.
    pub author: String,
    /// When, milliseconds since 1970.
    pub created_ms: i64,
    /// The largest share of the train items that one device was allowed to give.
    pub device_share: f64,
    /// Images to train with.
    pub train: i64,
    /// Images to measure with; 0 means that nothing trained with it can be trusted to be better.
    pub holdout: i64,
    /// What was left out, and why.
    pub report: Report,
    /// Images that were erased since: their digests stay, so that what was trained on can be told.
    pub erased: i64,
}

/// The datasets, and what was computed from their images.
#[derive(Clone, Debug)]
pub struct Datasets {
    records: Arc<Records>,
    device_share: f64,
}

impl Datasets {
    /// On this database. `device_share` holds where nothing else is asked for.
    #[must_use]
    pub fn new(records: Arc<Records>, device_share: f64) -> Self {
        Self {
            records,
            device_share,
        }
    }

    /// Takes a snapshot of what is labelled now. Says whether it is new: the same content is the same
    /// dataset.
    ///
    /// # Errors
    /// If there is no such task, or it has labels of fewer than two classes to train with.
    pub async fn create(
        &self,
        task: &str,
        author: &str,
        device_share: Option<f64>,
    ) -> Result<(bool, Summary), DatasetError> {
        let device_share = device_share.unwrap_or(self.device_share);
        if !(device_share > 0.0 && device_share <= 1.0) {
            let why = "device_share: is above 0 and at most 1";
            return Err(DatasetError::Unusable(why.into()));
        }
        let (classes, labelled) = self.records.labelled(task).await?;
        let classes = classes.ok_or_else(|| DatasetError::Missing(format!("task {task:?}")))?;
        let work = {
            let (task, classes) = (task.to_owned(), classes.clone());
            // Comparing embeddings takes seconds where there are many.
            tokio::task::spawn_blocking(move || snapshot(&task, &classes, labelled, device_share))
        };
        let made = work
            .await
            .map_err(|error| DatasetError::Unusable(format!("the snapshot failed: {error}")))?;
        let (digest, items, report) = made.map_err(DatasetError::Unusable)?;
        let dataset = Dataset {
            digest,
            task: task.to_owned(),
            classes,
            author: author.to_owned(),
            created_ms: clock::now_ms(),
            device_share,
            items,
            report,
        };
        let new = self.records.add_dataset(&dataset).await?;
        let summary = self.summary(&dataset.digest).await?;
        Ok((new, summary))
    }

    /// A dataset with its items.
    ///
    /// # Errors
    /// If there is none of this digest, or the database cannot be read.
    pub async fn get(&self, digest: &str) -> Result<Dataset, DatasetError> {
        let summary = self.summary(digest).await?;
        let items = self.records.dataset_items(digest).await?;
        Ok(Dataset {
            digest: summary.digest,
            task: summary.task,
            classes: summary.classes,
            author: summary.author,
            created_ms: summary.created_ms,
            device_share: summary.device_share,
            items,
            report: summary.report,
        })
    }

    /// A dataset without its items.
    ///
    /// # Errors
    /// As [`Datasets::get`].
    pub async fn summary(&self, digest: &str) -> Result<Summary, DatasetError> {
        let found = self.records.dataset(digest).await?;
        let short = || digest.chars().take(64).collect::<String>();
        found.ok_or_else(|| DatasetError::Missing(format!("dataset {:?}", short())))
    }

    /// Was this image erased?
    pub(crate) async fn was_erased(&self, sha256: &str) -> Result<bool, DatasetError> {
        Ok(self.records.was_erased(sha256).await?)
    }

    /// How many datasets of a task there are.
    pub(crate) async fn count(&self, task: &str) -> Result<u64, DatasetError> {
        Ok(self.records.count_datasets(task).await?)
    }

    /// The newest datasets of a task, at most 1,000.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn of_task(&self, task: &str) -> Result<Vec<Summary>, DatasetError> {
        Ok(self.records.datasets(task).await?)
    }

    /// What an engine computed from these images, as far as it is here.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn features(
        &self,
        engine: &str,
        images: &[String],
    ) -> Result<HashMap<String, Vec<f32>>, DatasetError> {
        Ok(self.records.features(engine, images).await?)
    }

    /// Keeps what an engine, named by its digest, computed from images. What is here already stays. Each has
    /// at most [`MAX_FEATURE_VALUES`] values; longer ones are left out.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn put_features(
        &self,
        engine: &str,
        features: &[(String, Vec<f32>)],
    ) -> Result<(), DatasetError> {
        Ok(self.records.put_features(engine, features).await?)
    }
}

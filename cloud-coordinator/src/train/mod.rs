//! Training: a snapshot of labelled images and a model go in, a better model and the proof of it come out.
//!
//! ```text
//! request ─> jobs (queue, one worker) ─> work: features ─> trainer ─> bundle ─> holdout ─> gate ─> catalog
//! ```

mod bring;
mod catalog;
mod deviate;
mod external;
mod jobs;
mod judge;
mod look;
mod request;
mod start;
mod trainers;
mod work;

pub(crate) use catalog::{Catalog, CatalogError, Model, ModelState};
pub(crate) use jobs::{Job, JobError, Jobs};
pub(crate) use look::embeddings_by;
pub(crate) use request::{Request, Trainer};
pub use start::StartPolicy;
pub(crate) use start::by_itself;
pub(crate) use work::{Settings, Work};

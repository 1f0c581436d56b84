//! Which devices do not fit, before anything is learnt from them.

use std::collections::BTreeMap;

use learn::features::Features;
use tokio::task::spawn_blocking;

use super::{
    jobs::Reporter,
    work::{Material, Work, WorkError},
};
use crate::datasets::Dataset;

/// Pictures that are looked at: the heads are fitted to them in seconds. Each device gives the same part at most.
const LOOKED_AT: usize = 2_000;

impl Work {
    /// Sets devices apart whose labels or pictures do not fit those of the others. Says whether there are new ones.
    pub(super) async fn set_apart(
        &self,
        dataset: &Dataset,
        material: &Material,
        reporter: &Reporter,
    ) -> Result<bool, WorkError> {
        let vouched = self.quarantine.vouched().await?;
        let device = |item: &crate::datasets::Item| {
            let name = item.device.clone()?;
            let own = vouched.get(&name).is_none_or(|upto| item.sample > *upto);
            own.then_some(name)
        };
        let mut given: BTreeMap<Option<String>, Vec<usize>> = BTreeMap::new();
        for (at, (item, _)) in material.train.iter().enumerate() {
            given.entry(device(item)).or_default().push(at);
        }
        let most = LOOKED_AT / given.len().max(1);
        let names: Vec<String> = given.keys().flatten().cloned().collect();
        if names.is_empty() {
            return Ok(false);
        }
        let embeddings = self.embeddings(material, reporter).await?;
        let dim = material.engine.manifest().output.embedding_dim;
        let (mut rows, mut truth, mut from) = (Vec::new(), Vec::new(), Vec::new());
        // In the order of the images' digests, which is as good as by lot.
        for (device, places) in &given {
            for at in places.iter().take(most) {
                let row = embeddings.get(*at).filter(|row| row.len() == dim);
                let class = material.train.get(*at).map(|(_, class)| *class);
                if let (Some(row), Some(class)) = (row, class) {
                    rows.extend_from_slice(row);
                    truth.push(class);
                    from.push(device.as_ref().and_then(|d| names.binary_search(d).ok()));
                }
            }
        }
        let mut classes = truth.clone();
        classes.sort_unstable();
        classes.dedup();
        if classes.len() < 2 {
            return Ok(false);
        }
        let place = |class: &u32| classes.binary_search(class).unwrap_or_default() as u32;
        let truth = truth.iter().map(place).collect();
        let features = Features::new(dim, classes.len(), rows, truth, None)?;
        // Each snapshot is a look; the one at hand is counted already.
        let looked = self.datasets.count(&dataset.task).await?.saturating_sub(1);
        let (count, policy) = (names.len(), self.settings.suspect.clone());
        let reporter = reporter.clone();
        let found = spawn_blocking(move || {
            learn::suspect::look(
                &features,
                &from,
                count,
                looked,
                &policy,
                &mut |p: learn::Progress| reporter.tell("devices", p.step, p.steps, None),
            )
        })
        .await?
        .map_err(|error| match error {
            learn::Error::Cancelled => WorkError::Cancelled,
            other => WorkError::Head(other),
        })?;
        let mut new = false;
        for finding in &found {
            if let Some(name) = names.get(finding.device) {
                new |= self.quarantine.found(name, &dataset.task, finding).await?;
            }
        }
        Ok(new)
    }

    /// A snapshot that was made before a device was set apart, or before images were erased, is not trained with.
    pub(super) async fn unfit(&self, dataset: &Dataset) -> Result<(), WorkError> {
        let erased = self.datasets.summary(&dataset.digest).await?.erased;
        if erased > 0 {
            let digest = &dataset.digest;
            let why =
                format!("dataset {digest}: {erased} of its images were erased, make a new one");
            return Err(WorkError::Request(why));
        }
        let apart = self.quarantine.now().await?;
        let mut devices = dataset.items.iter().filter(|item| !item.holdout);
        let bad = devices.find_map(|item| item.device.as_ref().filter(|d| apart.contains(d)));
        match bad {
            None => Ok(()),
            Some(device) => Err(WorkError::Request(format!(
                "dataset {} has samples of {device}, which is in quarantine: make a new dataset, or lift the quarantine",
                dataset.digest
            ))),
        }
    }
}

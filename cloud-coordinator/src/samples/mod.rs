//! Samples: what devices kept to learn from, and what people brought in.
//!
//! A sample is announced first; its image follows in pieces, and each piece is on the disk before the device
//! hears of it. The image is looked at when it is whole. A device never decides what becomes of a sample.

mod room;
mod staging;
mod store;

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_core::{Name, Sample, SampleReason};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(crate) use staging::StagingError;
pub(crate) use store::{ImageRow, SampleFilter, SampleRow, WITH_LABEL, note_task};

use crate::{
    clock,
    config::SamplesConfig,
    objects::{Alone, Inspected, NotAnImage, ObjectError, Objects},
    records::{RecordError, Records},
};
use room::{Amount, Room};
use staging::Staging;

/// Between two looks for uploads that nobody goes on with.
const LOOK: Duration = Duration::from_secs(600);
/// Old samples that are read at a time.
const AT_ONCE: i64 = 500;
const MS_PER_DAY: i64 = 86_400_000;

/// Why something with a sample cannot be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SampleError {
    #[error(transparent)]
    Records(#[from] RecordError),
    #[error(transparent)]
    Objects(#[from] ObjectError),
    #[error(transparent)]
    Staging(StagingError),
    #[error("there is no such sample")]
    Missing,
    #[error("the sample was deleted")]
    Deleted,
    #[error("it was erased, and is not taken again")]
    Erased,
    #[error("the upload stands at {0}")]
    Offset(u64),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Kind(String),
    #[error("{0}")]
    Full(String),
}

impl From<StagingError> for SampleError {
    fn from(error: StagingError) -> Self {
        match error {
            StagingError::Offset(here) => Self::Offset(here),
            StagingError::Full | StagingError::Share => Self::Full(error.to_string()),
            error @ StagingError::Io { .. } => Self::Staging(error),
        }
    }
}

/// What is kept of samples.
#[derive(Clone, Debug)]
pub(crate) struct Samples {
    pub(crate) records: Arc<Records>,
    pub(crate) objects: Objects,
    staging: Arc<Staging>,
    room: Arc<Room>,
    /// How long samples are kept about which nobody says anything; for ever if not given.
    max_age_ms: Option<i64>,
}

/// The task of a model: the name in `name@version`.
pub(crate) fn task_of(model: &str) -> Option<Name> {
    model.split('@').next()?.parse().ok()
}

impl Samples {
    /// Opens what is in the folder.
    pub(crate) async fn open(
        data: &Path,
        config: &SamplesConfig,
        records: Arc<Records>,
        objects: Objects,
    ) -> Result<Self, SampleError> {
        let awaited = records.awaited().await?;
        let lengths = awaited.iter().map(|a| (a.id, a.bytes.unsigned_abs()));
        let staging = Staging::open(
            &data.join("uploads"),
            config.staging_bytes,
            &lengths.collect(),
        )?;
        let room = Room::new(Amount {
            samples: config.max_samples,
            bytes: config.max_bytes,
        });
        for total in records.sample_totals().await? {
            let amount = Amount {
                samples: total.samples.unsigned_abs(),
                bytes: total.bytes.unsigned_abs(),
            };
            room.found(owner_in(&total.site, &total.device).as_deref(), amount);
        }
        for waits in awaited {
            let owner = owner_in(&waits.site, &waits.device).unwrap_or_default();
            room.found_awaited(waits.id, owner, waits.bytes.unsigned_abs());
        }
        Ok(Self {
            records,
            objects,
            staging: Arc::new(staging),
            room: Arc::new(room),
            max_age_ms: i64::try_from(config.max_age_days)
                .ok()
                .filter(|days| *days > 0)
                .map(|days| days.saturating_mul(MS_PER_DAY)),
        })
    }

    /// Whether there is room for one more sample that people bring in, with an image of so many bytes.
    pub(crate) fn room(&self, bytes: u64) -> Result<(), SampleError> {
        self.room.look(bytes)
    }

    /// A sample was brought in.
    pub(crate) fn added(&self, bytes: u64) {
        self.room.found(None, Amount { samples: 1, bytes });
    }

    /// The image of a sample is no longer here, or no longer awaited.
    pub(crate) fn removed(
        &self,
        id: i64,
        (site, device): (&Option<String>, &Option<String>),
        bytes: u64,
    ) {
        self.room
            .removed(id, owner_in(site, device).as_deref(), bytes);
    }

    /// Takes in a sample without its image, of a device of this site. Says whether it is new, and how much of its image
    /// is here.
    pub(crate) async fn announce(
        &self,
        sample: &Sample,
        site: Option<&Name>,
    ) -> Result<(bool, u64), SampleError> {
        let task = task_of(&sample.model)
            .ok_or_else(|| SampleError::Invalid("model: is name@version".into()))?;
        let (device, epoch, seq) = (
            sample.device.as_str(),
            sample.epoch.cast_signed(),
            sample.seq.cast_signed(),
        );
        if let Some(known) = self.records.image_of(device, epoch, seq).await? {
            if !of_site(&known, site) {
                let why = "a device of this name at another site has sent this epoch and seq";
                return Err(SampleError::Invalid(why.into()));
            }
            if matches!(sample.reason, SampleReason::Wrong | SampleReason::Missed) {
                // Somebody has marked it since it was sent first.
                self.records
                    .mark_sample(known.id, sample.reason.as_str())
                    .await?;
            }
            return Ok((false, self.known(sample, site, known).await?));
        }
        let bytes = sample.image.as_ref().map_or(0, |i| i.bytes);
        self.not_erased(sample, site).await?;
        let booking = self.room.book(&owner_of(site, &sample.device), bytes)?;
        // The image that another sample brought must not go while this one is written.
        // It may have been erased while this one waited.
        let _shared = self.objects.shared().await?;
        self.not_erased(sample, site).await?;
        let image = match &sample.image {
            None => "none",
            Some(image) => match self.records.stored_bytes(&image.sha256).await? {
                None => "waiting",
                Some(is) if is.unsigned_abs() == image.bytes => "stored",
                Some(is) => {
                    return Err(SampleError::Invalid(format!(
                        "image: the image of this sha256 has {is} bytes"
                    )));
                }
            },
        };
        let now = clock::now_ms();
        let new = self
            .records
            .add_sample(task.as_str(), sample, site, image, now)
            .await?;
        match new {
            Some(id) if image == "waiting" => booking.awaits(id),
            Some(_) => booking.keep(),
            // Another request has written it, with a booking of its own.
            None => drop(booking),
        }
        Ok((new.is_some(), if image == "stored" { bytes } else { 0 }))
    }

    /// What was erased is not taken again, from whomever.
    async fn not_erased(&self, sample: &Sample, site: Option<&Name>) -> Result<(), SampleError> {
        let whose = (site.map_or("", Name::as_str), sample.device.as_str());
        let sha256 = sample.image.as_ref().map(|i| i.sha256.as_str());
        match self.records.is_erased(whose, sample.ts, sha256).await? {
            true => Err(SampleError::Erased),
            false => Ok(()),
        }
    }

    /// Removes an upload that is on its way; says whether there was one.
    pub(crate) async fn drop_upload(&self, id: i64) -> Result<bool, SampleError> {
        // Whoever is writing to it ends first, and then sees that it is not awaited any more.
        let _lock = self.staging.lock(id, 0, "").await?;
        let was = self.staging.offset(id).await? > 0;
        self.staging.remove(id).await?;
        Ok(was)
    }

    /// How much is here of the image of a sample that is sent again.
    async fn known(
        &self,
        sample: &Sample,
        site: Option<&Name>,
        known: ImageRow,
    ) -> Result<u64, SampleError> {
        let bytes = known.bytes.unsigned_abs();
        let wanted = sample.image.as_ref().map(|i| i.sha256.as_str());
        if known.deleted_ms.is_some() {
            // Nothing more is wanted, whatever it is now.
            return Ok(sample.image.as_ref().map_or(0, |i| i.bytes));
        }
        if known.sha256.as_deref() != wanted {
            let why = "another image was announced for this device, epoch and seq";
            return Err(SampleError::Invalid(why.into()));
        }
        if known.image != "waiting" {
            return Ok(bytes);
        }
        let here = self.staging.offset(known.id).await?;
        if here < bytes {
            return Ok(here);
        }
        // It ended while nobody could look at it. If it is refused now, it is as good as here: the device
        // has nothing better to send.
        let owner = owner_of(site, &sample.device);
        let _lock = self.staging.lock(known.id, bytes, &owner).await?;
        let (epoch, seq) = (sample.epoch.cast_signed(), sample.seq.cast_signed());
        let records = &self.records;
        let now = records.image_of(sample.device.as_str(), epoch, seq).await?;
        if now.is_none_or(|now| now.image != "waiting" || now.deleted_ms.is_some()) {
            // Another request has done it while this one waited.
            self.staging.remove(known.id).await?;
            return Ok(bytes);
        }
        match self.finish(&known, &owner).await {
            Ok(()) | Err(SampleError::Invalid(_) | SampleError::Kind(_)) => Ok(bytes),
            Err(error) => Err(error),
        }
    }

    /// Takes in a piece of an image from a device of a site. Says how much of it is here.
    pub(crate) async fn append(
        &self,
        (site, device): (Option<&Name>, &Name),
        epoch: i64,
        seq: i64,
        offset: u64,
        piece: Bytes,
    ) -> Result<u64, SampleError> {
        let find = || self.records.image_of(device.as_str(), epoch, seq);
        let found = find().await?.filter(|found| of_site(found, site));
        let found = found.ok_or(SampleError::Missing)?;
        let bytes = found.bytes.unsigned_abs();
        if let Some(settled) = settled(&found, offset)? {
            return Ok(settled);
        }
        if offset.saturating_add(piece.len() as u64) > bytes {
            let why = format!("the image was announced with {bytes} bytes");
            return Err(SampleError::Invalid(why));
        }
        let owner = owner_of(site, device);
        let _lock = self.staging.lock(found.id, bytes, &owner).await?;
        // Another request may have finished it while this one waited for the lock.
        let found = find().await?.ok_or(SampleError::Missing)?;
        if let Some(settled) = settled(&found, offset)? {
            self.staging.remove(found.id).await?;
            return Ok(settled);
        }
        let here = self.staging.append(found.id, offset, piece).await?;
        self.room.touch(found.id);
        if here == bytes {
            self.finish(&found, &owner).await?;
        }
        Ok(here)
    }

    /// Looks at a whole image and stores or refuses it. Hold its lock.
    async fn finish(&self, row: &ImageRow, owner: &str) -> Result<(), SampleError> {
        let announced = row.bytes.unsigned_abs();
        let bytes = self.staging.read(row.id).await?;
        let looked = self.objects.inspect(bytes, row.sha256.clone());
        match looked.await {
            Ok(Inspected { sha256, bytes }) => {
                let length = bytes.len() as u64;
                let shared = self.objects.shared().await?;
                // Another file may have had these pixels; and it may have been erased meanwhile.
                if !self.records.awaits(row.id, &sha256).await? {
                    self.staging.remove(row.id).await?;
                    return Err(SampleError::Erased);
                }
                self.objects.put(&shared, &sha256, bytes).await?;
                self.records.keep_image(row.id, &sha256, length).await?;
                self.room.arrived(row.id, owner, announced, length);
                self.staging.remove(row.id).await?;
                Ok(())
            }
            Err(refused) => {
                let why = refusal(&refused);
                tracing::warn!(sample = row.id, why, "an image was refused");
                self.records.refuse_image(row.id, &why).await?;
                self.room.removed(row.id, Some(owner), announced);
                self.staging.remove(row.id).await?;
                Err(match refused {
                    NotAnImage::Format => SampleError::Kind(why),
                    _ => SampleError::Invalid(why),
                })
            }
        }
    }

    /// The bytes of a sample's image.
    pub(crate) async fn image(&self, id: i64) -> Result<Bytes, SampleError> {
        let sample = self.records.sample(id).await?.ok_or(SampleError::Missing)?;
        match sample.sha256 {
            Some(sha256) if sample.image == "stored" => Ok(self.objects.read(&sha256).await?),
            _ => Err(SampleError::Missing),
        }
    }

    /// Deletes a sample, and its image unless another sample has the same. A dataset that names the image
    /// keeps its digest, but the image is gone: who asks for a picture to be deleted means it.
    pub(crate) async fn delete(&self, id: i64) -> Result<(), SampleError> {
        let sample = self.records.sample(id).await?.ok_or(SampleError::Missing)?;
        let alone = self.objects.alone().await?;
        if !self.records.delete_sample(id, clock::now_ms()).await? {
            return Err(SampleError::Missing);
        }
        if matches!(sample.image.as_str(), "waiting" | "stored") {
            let bytes = sample.bytes.unsigned_abs();
            self.removed(id, (&sample.site, &sample.device), bytes);
        }
        self.staging.remove(id).await?;
        if let Some(sha256) = sample.sha256 {
            self.remove_unnamed(&alone, &sha256).await?;
        }
        Ok(())
    }

    /// Removes an image that no sample names.
    pub(crate) async fn remove_unnamed(
        &self,
        alone: &Alone,
        sha256: &str,
    ) -> Result<(), SampleError> {
        if self.records.stored_bytes(sha256).await?.is_none() {
            self.records.forget_image(sha256).await?;
            self.objects.remove(alone, sha256).await?;
        }
        Ok(())
    }

    /// Samples whose image does not come are not kept either: what they had booked is for others. Says how many.
    async fn forget(&self, now: Instant) -> Result<usize, SampleError> {
        let mut gone = 0;
        for id in self.room.forgotten(now) {
            // A request that goes on with it now ends first.
            let _lock = self.staging.lock(id, 0, "").await?;
            if self.room.forgotten(now).contains(&id)
                && self.records.forget_sample(id, "waiting").await?
            {
                self.room.not_come(id);
                gone += 1;
            }
            self.staging.remove(id).await?;
        }
        Ok(gone)
    }

    /// Samples that came before this moment and about which nobody has said anything are not kept. Says how many went.
    async fn remove_old(&self, before_ms: i64) -> Result<usize, SampleError> {
        let mut gone = 0;
        loop {
            let old = self.records.old_samples(before_ms, AT_ONCE).await?;
            let before = gone;
            for row in old {
                let alone = self.objects.alone().await?;
                if !self.records.forget_sample(row.id, &row.image).await? {
                    continue;
                }
                gone += 1;
                let bytes = match row.image.as_str() {
                    "waiting" | "stored" => row.bytes.unsigned_abs(),
                    _ => 0,
                };
                let owner = owner_in(&row.site, &row.device);
                self.room.gone(row.id, owner.as_deref(), bytes);
                self.staging.remove(row.id).await?;
                if let Some(sha256) = row.sha256 {
                    self.remove_unnamed(&alone, &sha256).await?;
                }
            }
            if gone == before {
                return Ok(gone);
            }
        }
    }

    /// Removes uploads that nobody goes on with, and what is too old, until `stop`.
    pub(crate) async fn keep_clean(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            match self.staging.remove_orphans(Instant::now()).await {
                Ok(0) => {}
                Ok(uploads) => tracing::info!(uploads, "removed uploads that nobody went on with"),
                Err(error) => {
                    tracing::warn!(%error, "cannot remove uploads that nobody goes on with")
                }
            }
            match self.forget(Instant::now()).await {
                Ok(0) => {}
                Ok(samples) => {
                    tracing::info!(samples, "forgot samples whose images did not come")
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot forget samples whose images do not come")
                }
            }
            let Some(max_age_ms) = self.max_age_ms else {
                continue;
            };
            match self
                .remove_old(clock::now_ms().saturating_sub(max_age_ms))
                .await
            {
                Ok(0) => {}
                Ok(samples) => tracing::info!(samples, "removed samples that were too old"),
                Err(error) => tracing::warn!(%error, "cannot remove samples that are too old"),
            }
        }
    }
}

/// Whose uploads are counted together.
fn owner_of(site: Option<&Name>, device: &Name) -> String {
    format!("{}/{device}", site.map_or("", Name::as_str))
}

/// The same, as it stands in the database; nobody for what people brought in.
fn owner_in(site: &Option<String>, device: &Option<String>) -> Option<String> {
    let device = device.as_deref()?;
    Some(format!("{}/{device}", site.as_deref().unwrap_or_default()))
}

/// Whether a sample can be of this site: devices of different sites may have the same name.
fn of_site(row: &ImageRow, site: Option<&Name>) -> bool {
    let both = row.site.as_deref().zip(site);
    both.is_none_or(|(is, site)| is == site.as_str())
}

/// What to answer to a piece of an image that is not awaited; `None` if it is.
fn settled(found: &ImageRow, offset: u64) -> Result<Option<u64>, SampleError> {
    let bytes = found.bytes.unsigned_abs();
    if found.deleted_ms.is_some() {
        return Err(SampleError::Deleted);
    }
    match found.image.as_str() {
        "waiting" => Ok(None),
        "stored" if offset == bytes => Ok(Some(bytes)),
        "stored" => Err(SampleError::Offset(bytes)),
        "refused" => Err(SampleError::Invalid(
            found.refused.clone().unwrap_or_default(),
        )),
        _ => Err(SampleError::Invalid("the sample has no image".into())),
    }
}

/// Why an image was refused, short enough to keep.
fn refusal(why: &NotAnImage) -> String {
    why.to_string().chars().take(300).collect()
}

#[cfg(test)]
mod tests;

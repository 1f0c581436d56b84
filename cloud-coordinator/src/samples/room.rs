//! How much is kept of samples, and how much may be: of all together, and of each device.
//!
//! What a sample needs is booked when it is announced, so that what is told to be welcome can be sent. A booking whose
//! image does not come is given back.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::SampleError;

/// One device may have one of so many parts of the room: eight of them have to be stolen before others are shut out.
const SHARE: u64 = 8;
/// Where there is little room it is not shared out further than this: a bench with one camera.
const LEAST_SAMPLES: u64 = 1_000;
const LEAST_BYTES: u64 = 8 * mesh_core::MAX_SAMPLE_IMAGE_BYTES;
/// An announced image of which nothing has come for this long is not awaited any more: an honest device sends it within
/// seconds, and announces it again when it is back.
pub(super) const AWAITED: Duration = Duration::from_secs(24 * 3_600);

/// So much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) samples: u64,
    pub(super) bytes: u64,
}

/// An image that was announced and is not here.
#[derive(Clone, Debug)]
struct Awaited {
    owner: String,
    bytes: u64,
    touched: Instant,
}

#[derive(Debug, Default)]
struct Held {
    all: Amount,
    /// Of those who have something here.
    owners: HashMap<String, Amount>,
    awaited: HashMap<i64, Awaited>,
}

impl Held {
    fn of(&self, owner: &str) -> Amount {
        self.owners.get(owner).copied().unwrap_or_default()
    }

    fn add(&mut self, owner: Option<&str>, more: Amount) {
        let add = |to: &mut Amount| {
            to.samples = to.samples.saturating_add(more.samples);
            to.bytes = to.bytes.saturating_add(more.bytes);
        };
        add(&mut self.all);
        if let Some(owner) = owner {
            add(self.owners.entry(owner.to_owned()).or_default());
        }
    }

    fn take(&mut self, owner: Option<&str>, less: Amount) {
        let take = |from: &mut Amount| {
            from.samples = from.samples.saturating_sub(less.samples);
            from.bytes = from.bytes.saturating_sub(less.bytes);
        };
        take(&mut self.all);
        if let Some(owner) = owner
            && let Some(own) = self.owners.get_mut(owner)
        {
            take(own);
            if *own == Amount::default() {
                self.owners.remove(owner);
            }
        }
    }
}

/// Counted from the database at the start, and kept from then on.
#[derive(Debug)]
pub(super) struct Room {
    held: Mutex<Held>,
    most: Amount,
    share: Amount,
}

/// What a sample is going to need; given back unless it is kept.
#[derive(Debug)]
pub(super) struct Booking {
    room: Arc<Room>,
    owner: String,
    amount: Amount,
}

impl Booking {
    /// The sample is written, and its image, if there is one, is here.
    pub(super) fn keep(mut self) {
        self.amount = Amount::default();
    }

    /// The sample is written under this number, and its image is to follow.
    pub(super) fn awaits(self, id: i64) {
        let awaited = Awaited {
            owner: self.owner.clone(),
            bytes: self.amount.bytes,
            touched: Instant::now(),
        };
        self.room.held().awaited.insert(id, awaited);
        self.keep();
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        if self.amount != Amount::default() {
            self.room.held().take(Some(&self.owner), self.amount);
        }
    }
}

impl Room {
    pub(super) fn new(most: Amount) -> Self {
        Self {
            held: Mutex::default(),
            most,
            share: Amount {
                samples: (most.samples / SHARE).max(LEAST_SAMPLES),
                bytes: (most.bytes / SHARE).max(LEAST_BYTES),
            },
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From before this start: what somebody has here; nobody, what people brought in.
    pub(super) fn found(&self, owner: Option<&str>, amount: Amount) {
        self.held().add(owner, amount);
    }

    /// From before this start: an image that is awaited. It was [`found`](Self::found), too.
    pub(super) fn found_awaited(&self, id: i64, owner: String, bytes: u64) {
        let awaited = Awaited {
            owner,
            bytes,
            touched: Instant::now(),
        };
        self.held().awaited.insert(id, awaited);
    }

    fn fits(&self, held: &Held, bytes: u64) -> Result<(), SampleError> {
        let Amount {
            samples,
            bytes: used,
        } = held.all;
        if samples >= self.most.samples {
            let why = format!("{samples} samples are here, which is all that may be");
            return Err(SampleError::Full(why));
        }
        if used.saturating_add(bytes) > self.most.bytes {
            let why = format!("images have {used} bytes already, {bytes} more are too many");
            return Err(SampleError::Full(why));
        }
        Ok(())
    }

    /// Whether there is room for one more sample that people bring in, with an image of so many bytes.
    pub(super) fn look(&self, bytes: u64) -> Result<(), SampleError> {
        self.fits(&self.held(), bytes)
    }

    /// Room for one more sample of a device, with an image of so many bytes.
    pub(super) fn book(self: &Arc<Self>, owner: &str, bytes: u64) -> Result<Booking, SampleError> {
        let mut held = self.held();
        self.fits(&held, bytes)?;
        let own = held.of(owner);
        if own.samples >= self.share.samples || own.bytes.saturating_add(bytes) > self.share.bytes {
            let why = format!(
                "this device has {} samples with {} bytes of images here, and no device may have more than its share",
                own.samples, own.bytes
            );
            return Err(SampleError::Full(why));
        }
        let amount = Amount { samples: 1, bytes };
        held.add(Some(owner), amount);
        Ok(Booking {
            room: self.clone(),
            owner: owner.to_owned(),
            amount,
        })
    }

    /// Something came of an awaited image.
    pub(super) fn touch(&self, id: i64) {
        if let Some(awaited) = self.held().awaited.get_mut(&id) {
            awaited.touched = Instant::now();
        }
    }

    /// An image of so many bytes is no longer here, or no longer awaited.
    pub(super) fn removed(&self, id: i64, owner: Option<&str>, bytes: u64) {
        let mut held = self.held();
        held.awaited.remove(&id);
        held.take(owner, Amount { samples: 0, bytes });
    }

    /// An awaited image is here: it was announced with so many bytes, and has so many.
    pub(super) fn arrived(&self, id: i64, owner: &str, announced: u64, bytes: u64) {
        self.removed(id, Some(owner), announced);
        let amount = Amount { samples: 0, bytes };
        self.held().add(Some(owner), amount);
    }

    /// Images that nobody has gone on with.
    pub(super) fn forgotten(&self, now: Instant) -> Vec<i64> {
        let held = self.held();
        let old = |a: &Awaited| now.saturating_duration_since(a.touched) >= AWAITED;
        let all = held.awaited.iter().filter(|(_, a)| old(a));
        all.map(|(id, _)| *id).collect()
    }

    /// A sample is gone altogether, with so many bytes of its image.
    pub(super) fn gone(&self, id: i64, owner: Option<&str>, bytes: u64) {
        let mut held = self.held();
        held.awaited.remove(&id);
        held.take(owner, Amount { samples: 1, bytes });
    }

    /// The same of one whose image was awaited: what it had booked is given back.
    pub(super) fn not_come(&self, id: i64) {
        let mut held = self.held();
        if let Some(Awaited { owner, bytes, .. }) = held.awaited.remove(&id) {
            held.take(Some(&owner), Amount { samples: 1, bytes });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Room {
        /// What is here, of all and of each.
        pub(in super::super) fn amounts(&self) -> (Amount, Vec<(String, Amount)>) {
            let held = self.held();
            let mut each: Vec<_> = held.owners.clone().into_iter().collect();
            each.sort_by(|a, b| a.0.cmp(&b.0));
            (held.all, each)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_device_has_its_share_and_what_does_not_come_is_given_back() {
        let image = mesh_core::MAX_SAMPLE_IMAGE_BYTES;
        let most = Amount {
            samples: 1_000_000,
            bytes: 800 * image,
        };
        let room = Arc::new(Room::new(most));
        let mut id = 0;
        let mut announce = |owner: &str| {
            let booking = room.book(owner, image)?;
            id += 1;
            booking.awaits(id);
            Ok::<_, SampleError>(())
        };
        let thief = std::iter::repeat_with(|| announce("s/thief")).take(12_800);
        assert_eq!(thief.filter(Result::is_ok).count(), 100);
        announce("s/honest").unwrap();
        // What is not kept is given back at once.
        drop(room.book("s/other", image).unwrap());
        assert_eq!(room.held().of("s/other"), Amount::default());

        tokio::time::advance(AWAITED).await;
        room.touch(101);
        let gone = room.forgotten(Instant::now());
        assert_eq!(gone.len(), 100);
        gone.into_iter().for_each(|id| room.not_come(id));
        let (all, each) = room.amounts();
        assert_eq!(each, [("s/honest".to_owned(), all)]);
        room.arrived(101, "s/honest", image, 7);
        assert_eq!(
            room.held().all,
            Amount {
                samples: 1,
                bytes: 7
            }
        );
        room.removed(101, Some("s/honest"), 7);
        assert_eq!(room.held().all.bytes, 0);
        room.book("s/thief", image).unwrap().keep();
        assert_eq!(room.held().of("s/thief").bytes, image);
    }
}

//! Drops the samples that the coordinator wants nowhere any more, and says so.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mesh_core::{Desired, Erase, Gone};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::shelf::{Shelf, ShelfError};
use crate::{counters::Counters, seal::Seal};

/// A disk that does not let go of something is tried again after this.
const AGAIN: Duration = Duration::from_secs(10);

/// What the task works with.
pub(crate) struct Eraser {
    pub(super) shelf: Arc<Mutex<Shelf>>,
    pub(super) counters: Counters,
}

impl Eraser {
    /// For a device that keeps no samples now, and may have kept some before. Nothing if it never did.
    pub(crate) fn of_folder(folder: PathBuf, counters: &Counters, seal: Seal) -> Option<Self> {
        if !folder.is_dir() {
            return None;
        }
        let opened = Shelf::open(folder, u64::MAX, 0, seal);
        let (shelf, _) = opened
            .map_err(|error| tracing::error!("samples from before cannot be erased: {error}"))
            .ok()?;
        Some(Self {
            shelf: Arc::new(Mutex::new(shelf)),
            counters: counters.clone(),
        })
    }

    fn erase(&self, erase: &[Erase]) -> Result<usize, ShelfError> {
        let gone: Vec<Gone> = erase.iter().map(|e| e.what).collect();
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let done = shelf.erase(&gone);
        self.counters.samples.waiting.set(shelf.len() as u64);
        self.counters.samples.bytes.set(shelf.bytes());
        done
    }
}

/// Does what each wish asks for, until `stop`. A device without any samples has nothing to drop, and says so too.
pub(crate) async fn run(
    eraser: Option<Eraser>,
    mut desired: watch::Receiver<Option<Desired>>,
    erased: watch::Sender<Option<u64>>,
    stop: CancellationToken,
) {
    let eraser = eraser.map(Arc::new);
    let mut retry = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = desired.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN), if retry => {}
        }
        let wish = desired.borrow_and_update().clone();
        let erase = wish.map_or_else(Vec::new, |wish| wish.erase);
        let highest = erase.iter().map(|e| e.id).max();
        if highest.is_none() || (!retry && *erased.borrow() == highest) {
            erased.send_if_modified(|said| std::mem::replace(said, highest) != highest);
            retry = false;
            continue;
        }
        let done = match &eraser {
            None => Ok(0),
            Some(eraser) => {
                let eraser = eraser.clone();
                let work = tokio::task::spawn_blocking(move || eraser.erase(&erase));
                let done = work.await.map_err(|error| error.to_string());
                done.and_then(|done| done.map_err(|error| error.to_string()))
            }
        };
        retry = done.is_err();
        match done {
            Ok(samples) => {
                tracing::info!(samples, "samples were erased as the coordinator wishes");
                erased.send_replace(highest);
            }
            Err(error) => tracing::error!("{error}; it is tried again"),
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{Limits, SampleReason, Trial, VERSION};

    use super::{super::shelf::tests::sample, *};

    fn wish(erase: Vec<Erase>) -> Option<Desired> {
        Some(Desired {
            v: VERSION,
            revision: 1,
            release: None,
            limits: Limits::default(),
            trial: Trial::default(),
            force: false,
            settings: None,
            erase,
        })
    }

    #[tokio::test]
    async fn does_what_is_wished_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("samples");
        let counters = Counters::default();
        assert!(Eraser::of_folder(folder.clone(), &counters, Seal::none()).is_none());
        let (mut shelf, _) = Shelf::open(folder.clone(), 1 << 20, 7, Seal::none()).unwrap();
        for seq in 1..=3 {
            let image = [seq as u8; 100];
            shelf
                .add(&sample(seq, SampleReason::Wrong, &image), Some(&image))
                .unwrap();
        }
        drop(shelf);
        let eraser = Eraser::of_folder(folder.clone(), &counters, Seal::none()).unwrap();
        let (say, desired) = watch::channel(None);
        let (answer, mut erased) = watch::channel(None);
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(Some(eraser), desired, answer, stop.clone()));
        let one = |id, seq| Erase {
            id,
            what: Gone::One { epoch: 7, seq },
        };
        say.send_replace(wish(vec![one(4, 1), one(5, 2)]));
        erased.wait_for(|said| *said == Some(5)).await.unwrap();
        let left = || std::fs::read_dir(&folder).unwrap().count();
        assert_eq!(left(), 2);
        // The coordinator has heard it.
        say.send_replace(wish(Vec::new()));
        erased.wait_for(Option::is_none).await.unwrap();
        say.send_replace(wish(vec![Erase {
            id: 6,
            what: Gone::All,
        }]));
        erased.wait_for(|said| *said == Some(6)).await.unwrap();
        assert_eq!(left(), 0);
        stop.cancel();
        task.await.unwrap();
    }
}

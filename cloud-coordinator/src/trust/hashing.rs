//! Where passwords are hashed: on two threads of its own. A hash takes 19 MiB, and an allocator keeps what a thread once had for it:
//! on any of the runtime's threads a crowd of guesses would leave that behind on each.

use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    mpsc::{Receiver, SyncSender, sync_channel},
};

use tokio::sync::oneshot;

/// As many at a time: each takes a core for some hundredths of a second.
pub(super) const AT_ONCE: usize = 2;
/// Who asks waits for a turn before this, with a bound of its own.
const WAITING: usize = 64;

type Work = Box<dyn FnOnce() + Send>;

/// Why nothing was hashed.
#[derive(Debug, thiserror::Error)]
#[error("the threads that hash passwords have too much to do, or are gone")]
pub(super) struct NotHashed;

/// Does what takes as long as a hash.
///
/// # Errors
/// If the threads have too much to do, or could not be started.
pub(super) async fn hash<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NotHashed> {
    static THREADS: OnceLock<SyncSender<Work>> = OnceLock::new();
    let (back, done) = oneshot::channel();
    let work: Work = Box::new(move || drop(back.send(work())));
    let threads = THREADS.get_or_init(start);
    threads.try_send(work).map_err(|_| NotHashed)?;
    done.await.map_err(|_| NotHashed)
}

fn start() -> SyncSender<Work> {
    let (send, receive) = sync_channel(WAITING);
    let receive = Arc::new(Mutex::new(receive));
    for _ in 0..AT_ONCE {
        let receive = Arc::clone(&receive);
        let thread = std::thread::Builder::new().name("passwords".into());
        if let Err(error) = thread.spawn(move || run(&receive)) {
            tracing::error!(%error, "a thread that hashes passwords cannot be started");
        }
    }
    send
}

fn run(receive: &Mutex<Receiver<Work>>) {
    loop {
        let next = receive
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        match next {
            Ok(work) => work(),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_crowd_is_hashed_on_two_threads() {
        let who = || hash(|| std::thread::current().id());
        let all: Vec<_> = (0..50).map(|_| tokio::spawn(who())).collect();
        let mut threads = HashSet::new();
        for one in all {
            threads.insert(one.await.unwrap().unwrap());
        }
        assert!(threads.len() <= AT_ONCE, "{threads:?}");
        assert!(!threads.contains(&std::thread::current().id()));
    }
}

//! Keeps the identity while the agent runs.

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{Errand, Keeper};

/// One request at a time.
const ANSWERS: usize = 1;

/// Drives until `stop`. A request that is under way then is of no consequence: its answer is asked for again.
pub(crate) async fn run(mut keeper: Keeper, stop: CancellationToken) {
    let (tell, mut answers) = mpsc::channel(ANSWERS);
    let doubts = keeper.doubts();
    let mut errand = keeper.tick();
    loop {
        if let Some(errand) = errand.take() {
            send(errand, tell.clone());
        }
        errand = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            Some(answer) = answers.recv() => keeper.answered(answer),
            () = doubts.notified() => keeper.doubted(),
            () = at(keeper.due()) => keeper.tick(),
        };
    }
}

/// Requests block, so each has a thread, for as long as it takes.
fn send(errand: Errand, tell: mpsc::Sender<super::Answer>) {
    let work = move || {
        // Closed: the agent has stopped.
        let _ = tell.blocking_send(errand.run());
    };
    let started = std::thread::Builder::new()
        .name("identity".into())
        .spawn(work);
    if let Err(error) = started {
        // As if there were no answer: it is asked again after a while.
        tracing::error!("no thread to ask for a certificate: {error}");
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

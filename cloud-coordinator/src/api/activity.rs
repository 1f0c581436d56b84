//! Is anything asked on a connection, or is it only held open?

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Instant;

/// What one connection is doing.
#[derive(Debug)]
pub(super) struct Activity {
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    /// Requests whose answers are not sent.
    open: usize,
    /// Has anything been asked yet?
    asked: bool,
    /// When the last answer was sent, or the connection began.
    since: Instant,
}

impl Activity {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            state: Mutex::new(State {
                open: 0,
                asked: false,
                since: now,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends when nothing was asked within `first` of the beginning, or for `later` after that.
    pub(super) async fn silent(&self, first: Duration, later: Duration) {
        loop {
            let state = *self.state();
            let patience = if state.asked { later } else { first };
            // A request that is being answered has its own bound in time, or is somebody who watches.
            let begin = if state.open > 0 {
                Instant::now()
            } else {
                state.since
            };
            let Some(end) = begin.checked_add(patience) else {
                return std::future::pending().await;
            };
            if Instant::now() >= end {
                return;
            }
            tokio::time::sleep_until(end).await;
        }
    }
}

/// Held while a request is answered.
#[derive(Debug)]
pub(super) struct Busy(Arc<Activity>);

impl Busy {
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        let mut state = activity.state();
        state.open += 1;
        state.asked = true;
        drop(state);
        Self(activity)
    }

    /// The body; it is busy until all of it is sent.
    pub(super) fn until_end_of(self, body: Body) -> Answer {
        Answer { body, _busy: self }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.open -= 1;
        state.since = Instant::now();
    }
}

/// The body of an answer that is being sent.
#[derive(Debug)]
pub(super) struct Answer {
    body: Body,
    _busy: Busy,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_silent_when_nobody_asks_and_nobody_is_answered() {
        let (first, later) = (Duration::from_secs(10), Duration::from_secs(60));
        let begin = Instant::now();
        let activity = Arc::new(Activity::new(begin));
        activity.silent(first, later).await;
        assert_eq!(begin.elapsed(), first);

        let busy = Busy::new(activity.clone());
        let watching = Duration::from_secs(100);
        let long = tokio::time::timeout(watching, activity.silent(first, later)).await;
        assert!(long.is_err(), "an answer that goes on is no silence");
        drop(busy);
        let begin = Instant::now();
        activity.silent(first, later).await;
        assert_eq!(begin.elapsed(), later);
    }
}

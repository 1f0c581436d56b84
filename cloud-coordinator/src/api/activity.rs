//! What a connection is doing: is anything asked, is it read what is answered, or is it only held open?

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::Body;
use bytes::{Buf, Bytes};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

/// An answer goes out in pieces of at most so many bytes: small enough that each of all answers that one connection may be asked
/// for gets on within [`STALLED`], over a link of 256 kbit/s.
const PIECE: usize = 8 * 1024;
/// A piece that the other end does not take for this long ends the connection: what it holds is memory of ours.
pub(super) const STALLED: Duration = Duration::from_secs(30);

/// What one connection is doing.
#[derive(Debug)]
pub(super) struct Activity {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Requests whose answers are not through, by number: since when the other end has had something to take; nothing while
    /// it is waited for what is to be sent.
    open: HashMap<u64, Option<Instant>>,
    next: u64,
    /// Has anything been asked yet?
    asked: bool,
    /// When the last answer was through, or the connection began.
    since: Instant,
    /// Since when nothing more fits into the socket.
    blocked: Option<Instant>,
}

/// Why a connection is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Idle {
    /// Nothing was ever asked.
    Mute,
    /// Nothing was asked for long.
    Silent,
    /// What is answered is not read.
    Stalled,
}

impl Activity {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            state: Mutex::new(State {
                open: HashMap::new(),
                next: 0,
                asked: false,
                since: now,
                blocked: None,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has anything been asked yet?
    pub(super) fn asked(&self) -> bool {
        self.state().asked
    }

    /// Ends when nothing was asked within `first` of the beginning, or for `later` after that; and when an answer is not read.
    pub(super) async fn idle(&self, first: Duration, later: Duration) -> Idle {
        loop {
            let now = Instant::now();
            // Whatever begins while this sleeps can have stalled no sooner.
            let mut look = now + STALLED;
            {
                let state = self.state();
                let offered = state.open.values().flatten().chain(&state.blocked).min();
                if let Some(since) = offered {
                    let end = *since + STALLED;
                    if now >= end {
                        return Idle::Stalled;
                    }
                    look = look.min(end);
                }
                // A request that is worked on has its own bound in time.
                if state.open.is_empty() {
                    let (patience, what) = match state.asked {
                        false => (first, Idle::Mute),
                        true => (later, Idle::Silent),
                    };
                    let end = state.since.checked_add(patience);
                    if end.is_some_and(|end| now >= end) {
                        return what;
                    }
                    look = end.map_or(look, |end| look.min(end));
                }
            }
            tokio::time::sleep_until(look).await;
        }
    }
}

/// Held while a request is answered.
#[derive(Debug)]
pub(super) struct Busy {
    activity: Arc<Activity>,
    id: u64,
}

impl Busy {
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        let mut state = activity.state();
        let id = state.next;
        state.next += 1;
        state.asked = true;
        state.open.insert(id, None);
        drop(state);
        Self { activity, id }
    }

    fn set(&self, offered: Option<Instant>) {
        self.activity.state().open.insert(self.id, offered);
    }

    /// The body; it is busy until all of it is sent.
    pub(super) fn until_end_of(self, body: Body) -> Answer {
        self.set(Some(Instant::now()));
        Answer {
            body,
            rest: Bytes::new(),
            given: false,
            busy: self,
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.activity.state();
        state.open.remove(&self.id);
        state.since = Instant::now();
    }
}

/// The body of an answer that is being sent, piece by piece: the next one is asked for when the other end takes more. So
/// what the body holds, and what goes with it, stays until the other end has all of it.
#[derive(Debug)]
pub(super) struct Answer {
    body: Body,
    /// Of what the body gave last.
    rest: Bytes,
    given: bool,
    busy: Busy,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            self.busy.set(None);
            let next = ready!(Pin::new(&mut self.body).poll_frame(cx));
            self.busy.set(Some(Instant::now()));
            match next.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => self.rest = data,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        } else {
            self.busy.set(Some(Instant::now()));
        }
        self.given = true;
        // A copy: what waits in the connection for the other end must not keep all of it.
        let piece = match self.rest.len() {
            0..=PIECE => std::mem::take(&mut self.rest),
            _ => Bytes::copy_from_slice(&self.rest[..PIECE]),
        };
        if !self.rest.is_empty() {
            self.rest.advance(PIECE);
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        // After the last piece it is asked once more, when the other end has taken that; only then it is through.
        !self.given && self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.len() as u64;
        let (mut hint, inner) = (SizeHint::new(), self.body.size_hint());
        hint.set_lower(inner.lower() + rest);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

/// A connection that notes whether bytes still move.
#[derive(Debug)]
pub(super) struct Moving<S> {
    pub(super) stream: S,
    pub(super) activity: Arc<Activity>,
}

impl<S> Moving<S> {
    fn noted<T>(&self, done: Poll<T>) -> Poll<T> {
        let mut state = self.activity.state();
        state.blocked = match done {
            Poll::Ready(_) => None,
            Poll::Pending => state.blocked.or_else(|| Some(Instant::now())),
        };
        drop(state);
        done
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Moving<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Moving<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.noted(done)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.noted(done)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.stream).poll_flush(cx);
        self.noted(done)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const FIRST: Duration = Duration::from_secs(10);
    const LATER: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_silent_when_nobody_asks_and_nobody_is_answered() {
        let begin = Instant::now();
        let activity = Arc::new(Activity::new(begin));
        assert_eq!(activity.idle(FIRST, LATER).await, Idle::Mute);
        assert_eq!(begin.elapsed(), FIRST);

        let busy = Busy::new(activity.clone());
        let long = tokio::time::timeout(Duration::from_secs(100), activity.idle(FIRST, LATER));
        assert!(long.await.is_err(), "a request that is worked on");
        let begin = Instant::now();
        let unread = busy.until_end_of(Body::from("x"));
        assert_eq!(activity.idle(FIRST, LATER).await, Idle::Stalled);
        assert_eq!(begin.elapsed(), STALLED);
        drop(unread);
        let begin = Instant::now();
        assert_eq!(activity.idle(FIRST, LATER).await, Idle::Silent);
        assert_eq!(begin.elapsed(), LATER);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_goes_out_in_pieces_and_may_take_as_long_as_it_moves() {
        let activity = Arc::new(Activity::new(Instant::now()));
        let whole = Bytes::from(vec![7; 3 * PIECE + 1]);
        let mut answer = Busy::new(activity.clone()).until_end_of(Body::from(whole.clone()));
        assert_eq!(answer.size_hint().exact(), Some(whole.len() as u64));
        let mut got = 0;
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut answer).poll_frame(cx)).await {
            let piece = frame.unwrap().into_data().unwrap();
            assert!(piece.len() <= PIECE && !answer.is_end_stream());
            got += piece.len();
            assert_eq!(answer.size_hint().exact(), Some((whole.len() - got) as u64));
            let slow = STALLED - Duration::from_secs(1);
            let idle = tokio::time::timeout(slow, activity.idle(FIRST, LATER));
            assert!(idle.await.is_err(), "it moves");
        }
        assert_eq!(got, whole.len());
        assert!(
            Busy::new(activity)
                .until_end_of(Body::empty())
                .is_end_stream()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_into_which_nothing_fits_is_not_read() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let activity = Arc::new(Activity::new(Instant::now()));
        let (stream, mut far) = tokio::io::duplex(64);
        let mut near = Moving {
            stream,
            activity: activity.clone(),
        };
        // All of the answer is with the connection, and nothing is left to ask its body for.
        drop(Busy::new(activity.clone()));
        let sending = tokio::spawn(async move { near.write_all(&[7; 200]).await });
        tokio::task::yield_now().await;
        let later = Duration::from_secs(3_600);
        assert_eq!(activity.idle(FIRST, later).await, Idle::Stalled);
        far.read_exact(&mut [0; 200]).await.unwrap();
        sending.await.unwrap().unwrap();
        assert_eq!(activity.idle(FIRST, later).await, Idle::Silent);
    }
}

//! What goes with an answer until all of it is through: a place, and its weight.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// Answers that are smaller are bounded by their number alone.
const LIGHT: u64 = 64 * 1024;
/// Bytes of answers that wait to be read, of everybody. Each of them is in memory.
const ALL: u64 = 512 << 20;
/// The same, of one person, program or device: the labelling page shows a dozen pictures, and a device fetches a few pieces.
const ONE: u64 = ALL / 8;

/// Goes with an answer that has no end of its own: it holds no place, and whoever gives it bounds how many there are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Endless;

/// A body, and what is given back when it has ended.
struct Held<T> {
    body: Body,
    _held: T,
}

impl<T: Unpin> HttpBody for Held<T> {
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

/// Keeps something until the answer is through.
pub(super) fn with(response: Response, held: impl Send + Unpin + 'static) -> Response {
    response.map(|body| Body::new(Held { body, _held: held }))
}

#[derive(Debug, Default)]
struct Loads {
    all: u64,
    each: HashMap<String, u64>,
}

/// What answers weigh that are on their way.
#[derive(Debug, Default)]
pub(super) struct Scale(Mutex<Loads>);

/// What one answer weighs.
#[derive(Debug)]
struct Weight {
    scale: Arc<Scale>,
    who: String,
    bytes: u64,
}

impl Scale {
    fn loads(&self) -> MutexGuard<'_, Loads> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(self: &Arc<Self>, who: &str, bytes: u64) -> Option<Weight> {
        let mut loads = self.loads();
        let own = loads.each.get(who).copied().unwrap_or(0);
        let fits = |has: u64, most: u64| has == 0 || has.saturating_add(bytes) <= most;
        if !fits(own, ONE) || !fits(loads.all, ALL) {
            return None;
        }
        loads.all = loads.all.saturating_add(bytes);
        loads.each.insert(who.to_owned(), own.saturating_add(bytes));
        Some(Weight {
            scale: self.clone(),
            who: who.to_owned(),
            bytes,
        })
    }

    /// The answer with its weight, which is taken off when it is through; nothing if this one has too much on its way, or all
    /// together have.
    pub(super) fn weigh(self: &Arc<Self>, who: &str, response: Response) -> Option<Response> {
        let bytes = response.body().size_hint().lower();
        if bytes <= LIGHT {
            return Some(response);
        }
        Some(with(response, self.put(who, bytes)?))
    }
}

impl Drop for Weight {
    fn drop(&mut self) {
        let mut loads = self.scale.loads();
        loads.all = loads.all.saturating_sub(self.bytes);
        if let Some(own) = loads.each.get_mut(&self.who) {
            *own = own.saturating_sub(self.bytes);
            if *own == 0 {
                loads.each.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_read_has_a_share_of_the_memory_and_no_more() {
        let scale = Arc::new(Scale::default());
        let image = 8 << 20;
        let mut held: Vec<_> = std::iter::repeat_with(|| scale.put("thief", image))
            .take(3_000)
            .flatten()
            .collect();
        assert_eq!(held.len() as u64, ONE / image);
        let honest = scale.put("honest", image).unwrap();
        held.pop();
        held.push(scale.put("thief", image).unwrap());
        assert!(scale.put("thief", image).is_none());
        // One that is larger than a share goes alone.
        let large = scale.put("large", ONE + 1).unwrap();
        assert!(scale.put("large", 1).is_none());
        drop((held, honest, large));
        let loads = scale.loads();
        assert!(loads.all == 0 && loads.each.is_empty(), "{loads:?}");
    }
}

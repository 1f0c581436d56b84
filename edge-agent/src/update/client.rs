//! What is fetched from the coordinator over HTTP: the registry's files, chunks and deltas.

use std::{
    io::{self, Read},
    time::Duration,
};

use mesh_core::Digest;
use models::chunks::Chunk;

use super::{
    error::UpdateError,
    registry::{Http, Source, SourceError},
    worker::Watchful,
};
use crate::{
    counters::Counters,
    http::{self, Patience},
    identity::Tls,
    samples::coordinator_url,
};

/// A coordinator that cannot be reached in this time is not there.
const CONNECT: Duration = Duration::from_secs(10);
/// Time to a first answer. A delta that nobody has asked for before is made first.
const ANSWER: Duration = Duration::from_secs(60);
/// One chunk: 256 KiB over 50 kbit/s.
const CHUNK: Duration = Duration::from_secs(60);
/// A delta takes this at most, and for each byte of the new file …
const DELTA: Duration = Duration::from_secs(30);
/// … as long as a line of so many bytes a second takes: on a slower one chunks, which can be resumed, are better.
const DELTA_BYTES_PER_S: u64 = 100_000;

/// Speaks to one coordinator.
#[derive(Clone, Debug)]
pub(super) struct Client {
    agent: ureq::Agent,
    api: String,
    counters: Counters,
    tls: Tls,
}

impl Client {
    /// For the coordinator at `http://HOST:PORT`.
    #[cfg(test)]
    pub(super) fn new(coordinator: &str, counters: Counters) -> Result<Self, UpdateError> {
        Self::with(coordinator, counters, Tls::none())
    }

    /// For the coordinator at `https://HOST:PORT`.
    pub(super) fn with(
        coordinator: &str,
        counters: Counters,
        tls: Tls,
    ) -> Result<Self, UpdateError> {
        let base = coordinator_url(coordinator).map_err(|why| UpdateError::Answer {
            what: "update.coordinator".into(),
            why,
        })?;
        let patience = Patience {
            connect: CONNECT,
            answer: ANSWER,
            body: CHUNK,
            whole: None,
        };
        let agent = http::agent(patience, &tls);
        Ok(Self {
            agent,
            api: format!("{base}/api/v1"),
            counters,
            tls,
        })
    }

    /// The registry's files there.
    pub(super) fn registry(&self) -> Counted {
        Counted {
            http: Http::trusting(&format!("{}/tuf", self.api), &self.tls),
            counters: self.counters.clone(),
        }
    }

    /// The bytes of a chunk, at most as many as it has and one.
    pub(super) fn chunk(&self, chunk: &Chunk) -> Result<Vec<u8>, UpdateError> {
        let what = format!("chunk {}", chunk.sha256);
        let url = format!("{}/chunks/{}", self.api, chunk.sha256);
        let answer = |why: String| UpdateError::Answer {
            what: what.clone(),
            why,
        };
        let sent = self.agent.get(url).call();
        let mut response = sent.map_err(|error| answer(error.to_string()))?;
        match response.status().as_u16() {
            200 => {}
            404 => return Err(answer("the coordinator does not have it".into())),
            status => return Err(answer(format!("status {status}"))),
        }
        let mut bytes = Vec::with_capacity(chunk.length);
        // A body that never ends is noticed at the first byte too many.
        let limit = chunk.length as u64 + 1;
        let read = response
            .body_mut()
            .as_reader()
            .take(limit)
            .read_to_end(&mut bytes);
        self.counters.update_bytes.add(bytes.len() as u64);
        read.map_err(|error| answer(error.to_string()))?;
        Ok(bytes)
    }

    /// The delta between two files, of which the new one has `length` bytes; nothing where there is none. A delta that
    /// is as long as the file is of no use, so no more is read.
    pub(super) fn delta(
        &self,
        from: Digest,
        to: Digest,
        length: u64,
        watchful: &Watchful,
    ) -> Result<Option<impl Read + use<>>, UpdateError> {
        let url = format!("{}/deltas/{from}/{to}", self.api);
        let patience = DELTA + Duration::from_secs(length / DELTA_BYTES_PER_S);
        let answer = |why: String| UpdateError::Answer {
            what: format!("delta to {to}"),
            why,
        };
        let request = self.agent.get(url).config();
        let request = request.timeout_recv_body(Some(patience)).build();
        let response = request.call().map_err(|error| answer(error.to_string()))?;
        match response.status().as_u16() {
            200 => {}
            404 => return Ok(None),
            status => return Err(answer(format!("status {status}"))),
        }
        Ok(Some(Counting {
            from: response.into_body().into_reader().take(length),
            counters: self.counters.clone(),
            watchful: watchful.clone(),
        }))
    }
}

/// Counts what comes, and ends when something newer takes its place.
struct Counting<R> {
    from: R,
    counters: Counters,
    watchful: Watchful,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.watchful.is_overtaken() {
            return Err(io::Error::other(UpdateError::Overtaken.to_string()));
        }
        let n = self.from.read(bytes)?;
        self.counters.update_bytes.add(n as u64);
        Ok(n)
    }
}

/// The registry's files, counted.
#[derive(Debug)]
pub(super) struct Counted {
    http: Http,
    counters: Counters,
}

impl Source for Counted {
    fn get(&self, path: &str) -> Result<Vec<u8>, SourceError> {
        let bytes = self.http.get(path)?;
        self.counters.update_bytes.add(bytes.len() as u64);
        Ok(bytes)
    }
}

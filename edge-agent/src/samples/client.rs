//! What is said to the coordinator about one sample, over HTTP.

use std::time::Duration;

use mesh_core::Name;
use serde::Deserialize;

use super::{config::coordinator_url, shelf::Key};
use crate::{
    http::{self, Patience},
    identity::Tls,
};

/// The largest piece of an image: the coordinator takes no larger one.
pub(super) const MAX_PIECE: usize = 256 * 1024;
/// A coordinator that cannot be reached in this time is not there.
const CONNECT: Duration = Duration::from_secs(10);
/// Time to a first answer, once everything is sent.
const ANSWER: Duration = Duration::from_secs(20);
/// A whole exchange: the largest piece over 50 kbit/s.
const EXCHANGE: Duration = Duration::from_secs(60);
/// Answers are some words; what is longer is not for us.
const MAX_ANSWER: u64 = 16 * 1024;

/// What the coordinator says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It has so many bytes of the image.
    Has(u64),
    /// It has so many, other than was thought.
    HasInstead(u64),
    /// It will never take it, and why.
    Never(String),
    /// Not now, or not understood, and why. The coordinator was there.
    Later(String),
    /// Nobody answered, and why.
    Nobody(String),
}

/// Speaks to one coordinator.
#[derive(Debug)]
pub(super) struct Client {
    agent: ureq::Agent,
    samples: String,
}

#[derive(Deserialize)]
struct Offset {
    offset: u64,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Problem {
    title: String,
    detail: String,
}

impl Client {
    /// For the coordinator at `https://HOST:PORT`.
    ///
    /// # Errors
    /// Says what an address should look like.
    pub(super) fn new(coordinator: &str, tls: &Tls) -> Result<Self, String> {
        Self::with(coordinator, [CONNECT, ANSWER, EXCHANGE], tls)
    }

    /// With other times to connect, to a first answer, and for a whole exchange.
    #[cfg(test)]
    pub(super) fn patient(coordinator: &str, times: [Duration; 3]) -> Result<Self, String> {
        Self::with(coordinator, times, &Tls::none())
    }

    fn with(
        coordinator: &str,
        [connect, answer, exchange]: [Duration; 3],
        tls: &Tls,
    ) -> Result<Self, String> {
        let patience = Patience {
            connect,
            answer,
            body: answer,
            whole: Some(exchange),
        };
        let agent = http::agent(patience, tls);
        Ok(Self {
            agent,
            samples: format!("{}/api/v1/samples", coordinator_url(coordinator)?),
        })
    }

    /// Says everything about a sample but its image.
    pub(super) fn announce(&self, sample: &[u8]) -> Answer {
        let sent = self
            .agent
            .post(&self.samples)
            .content_type("application/json")
            .send(sample);
        understand(sent)
    }

    /// Sends a piece of its image, which begins at `offset`.
    pub(super) fn piece(&self, device: &Name, key: Key, offset: u64, bytes: &[u8]) -> Answer {
        let Key { epoch, seq } = key;
        let sent = self
            .agent
            .patch(format!("{}/{device}/{epoch}/{seq}/image", self.samples))
            .content_type("application/offset+octet-stream")
            .header("upload-offset", offset.to_string())
            .send(bytes);
        understand(sent)
    }
}

fn understand(sent: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Answer {
    let mut response = match sent {
        Ok(response) => response,
        Err(error) => return Answer::Nobody(error.to_string()),
    };
    let status = response.status().as_u16();
    let is_problem = response
        .body()
        .mime_type()
        .is_some_and(|kind| kind == "application/problem+json");
    let body = response
        .body_mut()
        .with_config()
        .limit(MAX_ANSWER)
        .read_to_vec();
    let body = match body {
        Ok(body) => body,
        Err(error) => return Answer::Later(format!("status {status}, and no end: {error}")),
    };
    let offset = || {
        serde_json::from_slice::<Offset>(&body)
            .ok()
            .map(|o| o.offset)
    };
    match (status, offset()) {
        (200 | 201, Some(offset)) => Answer::Has(offset),
        (409, Some(offset)) => Answer::HasInstead(offset),
        // Who may speak, where, and how often, says nothing about the sample.
        (401 | 403 | 404 | 405 | 408 | 429, _) => Answer::Later(format!("status {status}")),
        // Only the coordinator speaks so; anything in between may say 400, too.
        (400..=499, _) if is_problem => {
            let problem: Problem = serde_json::from_slice(&body).unwrap_or_default();
            let words: String = format!("status {status}: {} {}", problem.title, problem.detail)
                .chars()
                .filter(|c| !c.is_control())
                .take(200)
                .collect();
            Answer::Never(words.trim_end().to_owned())
        }
        _ => Answer::Later(format!("status {status}")),
    }
}

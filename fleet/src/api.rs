//! A client of the coordinator's API, as small as the fleet needs it.

use std::time::Duration;

use anyhow::Context;
use serde_json::Value;

use crate::{site::Site, way::Way};

/// A request may train nothing, but order thousands of samples on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);
/// More than any answer that is asked for.
const MAX_ANSWER: u64 = 64 << 20;

/// The API of one coordinator, asked as an admin on its machine. Blocks.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    agent: ureq::Agent,
    base: String,
    way: Way,
}

impl Api {
    /// # Errors
    /// If the coordinator's authority cannot be read.
    pub(crate) fn of(site: &Site) -> anyhow::Result<Self> {
        let way = site.way().clone();
        Ok(Self {
            agent: way.client(TIMEOUT)?,
            base: format!("{}/api/v1", way.console()),
            way,
        })
    }

    /// `GET`
    pub(crate) fn get(&self, path: &str) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.base);
        let answer = self
            .way
            .ask(|token| self.agent.get(&url).header("authorization", token).call());
        read(&url, answer)
    }

    /// `PUT` of JSON.
    pub(crate) fn put(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.base);
        let answer = self.way.ask(|token| {
            self.agent
                .put(&url)
                .header("authorization", token)
                .header("content-type", "application/json")
                .send(body.to_string())
        });
        read(&url, answer)
    }

    /// `POST` of JSON.
    pub(crate) fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.base);
        let answer = self.way.ask(|token| {
            self.agent
                .post(&url)
                .header("authorization", token)
                .header("content-type", "application/json")
                .send(body.to_string())
        });
        read(&url, answer)
    }
}

fn read(
    url: &str,
    answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
) -> anyhow::Result<Value> {
    let mut answer = answer.with_context(|| format!("asking {url}"))?;
    let status = answer.status();
    let text = answer
        .body_mut()
        .with_config()
        .limit(MAX_ANSWER)
        .read_to_string()
        .with_context(|| format!("reading the answer of {url}"))?;
    anyhow::ensure!(status.is_success(), "{url} answered {status}: {text}");
    if text.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&text).with_context(|| format!("{url} answered no JSON"))
}

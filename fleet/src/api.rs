//! A client of the coordinator's API, as small as the fleet needs it.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use serde_json::Value;

use crate::site::{Site, TOKEN};

/// A request may train nothing, but order thousands of samples on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);
/// More than any answer that is asked for.
const MAX_ANSWER: u64 = 64 << 20;

/// The API of one coordinator, asked as an admin on its machine. Blocks.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    agent: ureq::Agent,
    base: String,
    /// Made anew at each start of the coordinator.
    token: PathBuf,
}

impl Api {
    pub(crate) fn of(site: &Site) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .build();
        Self {
            agent: config.into(),
            base: format!("http://{}/api/v1", site.http()),
            token: site.data().join(TOKEN),
        }
    }

    fn shown(&self) -> anyhow::Result<String> {
        let token = std::fs::read_to_string(&self.token)
            .with_context(|| format!("reading {}", self.token.display()))?;
        Ok(format!("Bearer {}", token.trim()))
    }

    /// Host and port.
    pub(crate) fn address(&self) -> &str {
        let rest = self.base.strip_prefix("http://").unwrap_or(&self.base);
        rest.split('/').next().unwrap_or(rest)
    }

    /// `GET`
    pub(crate) fn get(&self, path: &str) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.base);
        let request = self.agent.get(&url);
        let answer = request.header("authorization", self.shown()?).call();
        read(&url, answer)
    }

    /// `PUT` of JSON.
    pub(crate) fn put(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.base);
        let answer = self
            .agent
            .put(&url)
            .header("authorization", self.shown()?)
            .header("content-type", "application/json")
            .send(body.to_string());
        read(&url, answer)
    }

    /// `POST` of JSON.
    pub(crate) fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.base);
        let answer = self
            .agent
            .post(&url)
            .header("authorization", self.shown()?)
            .header("content-type", "application/json")
            .send(body.to_string());
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
    serde_json::from_str(&text).with_context(|| format!("{url} answered no JSON"))
}

//! A small client for JSON over HTTP.

use std::time::Duration;

use fleet::{site::Site, way::Way};
use serde_json::Value;
use ureq::{Body, RequestBuilder, http::Response};

/// Larger answers are a fault.
const MAX_ANSWER: u64 = 64 << 20;

/// One server.
pub struct Web {
    agent: ureq::Agent,
    base: String,
    /// Who asks, if it is a coordinator that is asked.
    way: Option<Way>,
}

impl Web {
    /// Asks below `base`, and gives up after `timeout`.
    #[must_use]
    pub fn new(base: &str, timeout: Duration) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .build();
        Self {
            agent: config.into(),
            base: base.to_owned(),
            way: None,
        }
    }

    /// Asks the API of a site's coordinator, as an admin on its machine.
    ///
    /// # Panics
    /// If the coordinator's authority cannot be read.
    #[must_use]
    pub fn api(site: &Site, timeout: Duration) -> Self {
        let way = site.way().clone();
        Self {
            agent: way.client(timeout).unwrap(),
            base: format!("{}/api/v1", way.console()),
            way: Some(way),
        }
    }

    fn ask(
        &self,
        send: impl Fn(Option<&str>) -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, ureq::Error> {
        match &self.way {
            Some(way) => way.ask(|token| send(Some(token))),
            None => send(None),
        }
    }

    /// `GET`
    ///
    /// # Panics
    /// Unless the answer is good.
    #[must_use]
    pub fn get(&self, path: &str) -> Value {
        self.try_get(path).unwrap()
    }

    /// `GET`
    ///
    /// # Errors
    /// In words, unless the answer is good.
    pub fn try_get(&self, path: &str) -> Result<Value, String> {
        let url = format!("{}{path}", self.base);
        let answer = self.ask(|token| shown(self.agent.get(&url), token).call());
        read(path, answer)
    }

    /// `POST`
    ///
    /// # Panics
    /// Unless the answer is good.
    pub fn post(&self, path: &str, body: &Value) -> Value {
        let url = format!("{}{path}", self.base);
        let answer = self.ask(|token| {
            let request = self.agent.post(&url);
            let request = request.header("content-type", "application/json");
            shown(request, token).send(body.to_string())
        });
        read(path, answer).unwrap()
    }

    /// `DELETE`
    ///
    /// # Errors
    /// In words, unless the answer is good.
    pub fn try_delete(&self, path: &str) -> Result<Value, String> {
        let url = format!("{}{path}", self.base);
        let answer = self.ask(|token| shown(self.agent.delete(&url), token).call());
        read(path, answer)
    }
}

fn shown<B>(request: RequestBuilder<B>, token: Option<&str>) -> RequestBuilder<B> {
    match token {
        Some(token) => request.header("authorization", token),
        None => request,
    }
}

fn read(
    path: &str,
    answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
) -> Result<Value, String> {
    let mut answer = answer.map_err(|error| format!("{path}: {error}"))?;
    let status = answer.status();
    let body = answer.body_mut().with_config().limit(MAX_ANSWER);
    let text = body
        .read_to_string()
        .map_err(|error| format!("{path}: {error}"))?;
    if !status.is_success() {
        return Err(format!("{path}: {status}: {text}"));
    }
    serde_json::from_str(&text).map_err(|error| format!("{path}: {error}: {text}"))
}

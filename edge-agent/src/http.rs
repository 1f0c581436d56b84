//! How the agent asks the coordinator over HTTP, whatever it asks for.

use std::time::Duration;

/// The longest head of an answer in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// How long each part of an exchange may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// To connect.
    pub(crate) connect: Duration,
    /// Until the answer begins.
    pub(crate) answer: Duration,
    /// For the answer's body.
    pub(crate) body: Duration,
    /// For everything together, where that is bounded.
    pub(crate) whole: Option<Duration>,
}

/// Follows no redirect and no proxy, and takes any status as an answer.
pub(crate) fn agent(patience: Patience) -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        // What the environment says about proxies is for other programs.
        .proxy(None)
        .user_agent(concat!("lacewing-edge-agent/", env!("CARGO_PKG_VERSION")))
        .max_response_header_size(MAX_HEAD)
        .timeout_connect(Some(patience.connect))
        .timeout_recv_response(Some(patience.answer))
        .timeout_recv_body(Some(patience.body))
        .timeout_global(patience.whole)
        .build()
        .into()
}

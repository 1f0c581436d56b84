//! What is around every request: a bound on how many there are and how long they may take, and the same headers on every answer.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    extract::{ConnectInfo, MatchedPath, Request, State as Shared},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    State,
    held::{self, Endless},
    limits::network,
    problem::Problem,
};
use crate::{
    crowd::{Crowd, Place, share_of_one_address},
    metrics::Metrics,
    notice::Notices,
    parts::{self, Parts},
    trust::Door,
};

/// A request that is not answered by then is given up: its body, and what its part may take.
const REQUEST: Duration = Duration::from_secs(40);
/// An import is as long as what it brings; it is given up after this.
const IMPORT: Duration = Duration::from_secs(3_600);
/// Requests that are worked on at a time.
const AT_ONCE: usize = 600;
/// Of those, what is always left for what needs no part: pages, health, metrics, who asks.
const SPARE: usize = 128;
const _: () = assert!(parts::PLACES + SPARE <= AT_ONCE);

#[derive(Clone)]
pub(super) struct Around {
    metrics: Arc<Metrics>,
    parts: Arc<Parts>,
    places: Arc<Places>,
    door: Door,
    notices: Arc<Notices>,
}

impl Around {
    pub(super) fn new(state: &State) -> Self {
        Self {
            metrics: state.metrics.clone(),
            parts: state.parts.clone(),
            places: Arc::new(Places::new()),
            door: state.door,
            notices: Arc::default(),
        }
    }

    /// One line for each kind of refusal, however many there are.
    fn say(&self, peer: SocketAddr, what: &'static str) {
        if let Some(held_back) = self.notices.due(what) {
            tracing::warn!(%peer, held_back, "refused: {what}");
        }
    }
}

/// Requests that are worked on or whose answers are not through: so many, and not all of them from one address, since whoever
/// sends or reads slowly holds his place for as long as that takes.
#[derive(Debug)]
struct Places {
    all: Arc<Semaphore>,
    addresses: Arc<Crowd<IpAddr>>,
}

impl Places {
    fn new() -> Self {
        Self {
            all: Arc::new(Semaphore::new(AT_ONCE)),
            addresses: Crowd::new(share_of_one_address(AT_ONCE)),
        }
    }

    fn enter(&self, address: IpAddr) -> Option<(OwnedSemaphorePermit, Place<IpAddr>)> {
        let place = self.addresses.enter(network(address))?;
        Some((self.all.clone().try_acquire_owned().ok()?, place))
    }
}

/// What holds for every request: a bound on how many and how long, problems for errors, headers, a count.
pub(super) async fn around(
    Shared(around): Shared<Around>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    matched: Option<MatchedPath>,
    mut request: Request,
    next: Next,
) -> Response {
    let Around {
        metrics,
        parts,
        places,
        door,
        ..
    } = &around;
    request.extensions_mut().insert(parts.clone());
    let route = matched.map_or_else(|| "other".to_owned(), |m| m.as_str().to_owned());
    let time = if route.ends_with("/import") {
        IMPORT
    } else {
        REQUEST
    };
    let place = places.enter(peer.ip());
    let mut response = if place.is_none() {
        around.say(peer, "too many requests at once");
        Problem::new(503, "Busy", "too many requests at once, try again").into_response()
    } else if let Ok(response) = tokio::time::timeout(time, next.run(request)).await {
        response
    } else {
        around.say(peer, "a request that took too long");
        Problem::new(503, "Too slow", "it took too long, ask for less").into_response()
    };
    match response.status() {
        StatusCode::PAYLOAD_TOO_LARGE => around.say(peer, "a body larger than what is taken"),
        StatusCode::REQUEST_TIMEOUT => around.say(peer, "a body that did not come in time"),
        _ => {}
    }
    let endless = response.extensions().get::<Endless>().is_some();
    let status = response.status();
    let problem = HeaderValue::from_static("application/problem+json");
    let kind = response.headers().get(header::CONTENT_TYPE);
    if (status.is_client_error() || status.is_server_error()) && kind != Some(&problem) {
        let allow = response.headers_mut().remove(header::ALLOW);
        response = Problem::of_status(status).into_response();
        if let Some(allow) = allow {
            response.headers_mut().insert(header::ALLOW, allow);
        }
    }
    for (name, value) in HEADERS {
        // An image says for itself how long it stays the same, and is stricter still.
        response
            .headers_mut()
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    if door.tls {
        let year = HeaderValue::from_static("max-age=31536000");
        let name = header::STRICT_TRANSPORT_SECURITY;
        response.headers_mut().insert(name, year);
    }
    metrics.answered(&route, status.as_u16());
    match endless {
        true => response,
        // Until the other end has read all of it.
        false => held::with(response, place),
    }
}

/// The page loads nothing but its own files, and nobody frames it or guesses a type.
const HEADERS: [(HeaderName, &str); 4] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-cache"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Who has one address of version 6 has 2⁶⁴ of them: they share what one of version 4 has alone.
    #[test]
    fn a_household_has_the_places_of_one_address() {
        let places = Places::new();
        let mut held = Vec::new();
        for n in 0..AT_ONCE as u16 {
            let address = std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, n, 0, 0, 1);
            held.extend(places.enter(address.into()));
        }
        assert_eq!(held.len(), share_of_one_address(AT_ONCE));
        assert!(places.enter("2001:db8:0:1::1".parse().unwrap()).is_some());
    }
}

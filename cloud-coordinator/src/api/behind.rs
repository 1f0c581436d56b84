//! Requests on their way to what stands behind the API: a place at its part, an end to waiting, and what came of it.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{FromRequest, Request},
    http::Method,
    middleware::Next,
    response::{IntoResponse, Response},
};
use tokio::time::timeout;

use super::problem::{Failing, Problem};
use crate::parts::{Name, Parts};

/// Until a body has to be here: 64 MiB over a slow office's line, and an end to who sends a byte now and then.
const BODY: Duration = Duration::from_secs(15);
/// Until a part has to answer, which is more than each of them allows itself.
const LIMIT: Duration = Duration::from_secs(18);

/// The whole body, before a place is taken: who sends slowly must not keep others from what is quick.
async fn gathered(parts: &Arc<Parts>, request: Request) -> Result<Request, Box<Response>> {
    if matches!(
        *request.method(),
        Method::GET | Method::HEAD | Method::DELETE
    ) {
        return Ok(request);
    }
    let refused = |problem: Problem| Box::new(problem.into_response());
    let place = parts.enter(Name::Bodies).await;
    let place = place.map_err(|e| refused(e.into()))?;
    let (head, body) = request.into_parts();
    // Its length is bounded by the layer around this one.
    let whole = Bytes::from_request(Request::from_parts(head.clone(), body), &());
    let Ok(whole) = timeout(BODY, whole).await else {
        let late = format!("the body was not here within {} s", BODY.as_secs());
        return Err(refused(Problem::new(408, "Request Timeout", late)));
    };
    let whole = whole.map_err(|e| Box::new(e.into_response()))?;
    place.settle(true);
    Ok(Request::from_parts(head, Body::from(whole)))
}

/// Passes a request on to a part, if it is well and has a place; what came of it is told to its breaker.
pub(super) async fn behind(name: Name, request: Request, next: Next) -> Response {
    let Some(parts) = request.extensions().get::<Arc<Parts>>().cloned() else {
        return Problem::new(500, "Internal error", "nobody knows the parts").into_response();
    };
    // Who asks for what is not asked now need not send its body.
    if let Err(refused) = parts.look(name) {
        parts.refuse(refused);
        return Problem::from(refused).into_response();
    }
    let request = match gathered(&parts, request).await {
        Ok(request) => request,
        Err(response) => return *response,
    };
    let pass = match parts.enter(name).await {
        Ok(pass) => pass,
        Err(refused) => return Problem::from(refused).into_response(),
    };
    let answer = timeout(LIMIT, next.run(request)).await;
    let late = || {
        let detail = format!("{} did not answer in time, try again", name.words());
        Problem::of_part(name, detail).into_response()
    };
    let response = answer.unwrap_or_else(|_| late());
    let failing = response.extensions().get::<Failing>().copied();
    let failing = failing.map(|what| match what {
        Failing::Part(name) => name,
        Failing::Database if name == Name::Trust => Name::Trust,
        Failing::Database => Name::Learning,
    });
    match failing {
        Some(other) if other != name => parts.noticed(other),
        Some(_) => pass.settle(false),
        // Whatever was refused before it got there says nothing.
        None if response.status().is_client_error() => drop(pass),
        None => pass.settle(true),
    }
    response
}

/// What takes as long as what is brought: a place, and nothing else.
pub(super) async fn imports(request: Request, next: Next) -> Response {
    let Some(parts) = request.extensions().get::<Arc<Parts>>().cloned() else {
        return Problem::new(500, "Internal error", "nobody knows the parts").into_response();
    };
    match parts.enter(Name::Imports).await {
        Ok(_pass) => next.run(request).await,
        Err(refused) => Problem::from(refused).into_response(),
    }
}

macro_rules! layers {
    ($($function:ident $name:ident),*) => {$(
        pub(super) async fn $function(request: Request, next: Next) -> Response {
            behind(Name::$name, request, next).await
        }
    )*};
}

layers!(
    readings Readings, learning Learning, trust Trust, images Images, prediction Prediction, offload Offload, training Training,
    releases Releases, broker Broker, directory Directory
);

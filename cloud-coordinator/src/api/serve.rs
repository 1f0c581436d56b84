//! Connections: bounded in number, and in the time that a request may take to arrive.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::Request};
use hyper::{body::Incoming, server::conn::http1, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{PeerAddress, State, router};
use crate::{coordinator::ACCEPT_PAUSE, metrics::Metrics, notice::Notices};

/// Open connections, watchers included.
const CONNECTIONS: usize = 2_048;
/// From the first byte of a request, or the last answer, to the end of the request's headers.
const HEADERS: Duration = Duration::from_secs(10);
/// The headers of a request in bytes.
const HEADER_BYTES: usize = 16 * 1024;

/// Serves until `stop`.
pub(crate) fn serve(
    listener: TcpListener,
    state: State,
    tasks: &TaskTracker,
    stop: CancellationToken,
) {
    let metrics = state.metrics.clone();
    let router = router(state);
    let connections = tasks.clone();
    let notices = Notices::default();
    tasks.spawn(async move {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    if let Some(held_back) = notices.due("accept") {
                        tracing::warn!(%error, held_back, "cannot accept an HTTP connection");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = room.clone().try_acquire_owned() else {
                if let Some(held_back) = notices.due("connections") {
                    tracing::warn!(%peer, held_back, "too many HTTP connections, one was closed");
                }
                continue;
            };
            let (router, metrics, stop) = (router.clone(), metrics.clone(), stop.clone());
            connections.spawn(async move {
                one(stream, peer, router, &metrics, stop).await;
                drop(permit);
            });
        }
    });
}

async fn one(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    metrics: &Metrics,
    stop: CancellationToken,
) {
    let _ = stream.set_nodelay(true);
    metrics.http_connections.inc();
    let service = TowerToHyperService::new(router);
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(PeerAddress(peer));
        service.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_buf_size(HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let done = tokio::select! {
        done = connection.as_mut() => done,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = done {
        tracing::debug!(%peer, %error, "an HTTP connection ended");
    }
    metrics.http_connections.dec();
}

//! Connections: bounded in number, and in the time that a handshake, a request and a silence may take.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{Router, body::Body, extract::ConnectInfo, response::Response};
use hyper::{Request, body::Incoming, service::Service};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    State,
    activity::{Activity, Busy, Idle, Moving},
    limits::network,
    router,
};
use crate::{
    coordinator::ACCEPT_PAUSE,
    crowd::{Crowd, share_of_one_address},
    metrics::Metrics,
    notice::Notices,
    trust::{
        active::Peer,
        tls::{AcceptError, Door, tell_and_close},
    },
};

/// What somebody is told who speaks HTTP in the clear.
const PLAIN: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n\
    This port speaks TLS: use https://\n";
/// Open connections, watchers included.
const CONNECTIONS: usize = 2_048;
/// From the first byte of a request, or the last answer, to the end of the request's headers.
const HEADERS: Duration = Duration::from_secs(10);
/// The headers of a request in bytes.
const HEADER_BYTES: usize = 16 * 1024;
/// Requests of one HTTP/2 connection at a time: a page asks for a dozen things.
const STREAMS: u32 = 64;
/// Bytes of one answer that an HTTP/2 connection takes before the other end wants them.
const SEND_BUFFER: usize = 64 * 1024;
/// An HTTP/2 connection on which nothing is asked for this long is closed: it cannot be told from one that is dead.
const IDLE: Duration = Duration::from_secs(60);
/// What ALPN offers.
pub(crate) const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// What every connection uses.
struct Shared {
    router: Router,
    metrics: Arc<Metrics>,
    notices: Notices,
    door: Option<Arc<Door>>,
    stop: CancellationToken,
}

impl Shared {
    fn refused(&self, peer: SocketAddr, reason: &'static str, error: &dyn std::fmt::Display) {
        self.metrics.http_refused(reason);
        if let Some(held_back) = self.notices.due(reason) {
            tracing::warn!(%peer, held_back, "an HTTP connection was refused: {error}");
        }
    }
}

impl Shared {
    fn idle(&self, peer: SocketAddr, why: Idle) {
        match why {
            // As every browser does it.
            Idle::Silent => self.metrics.http_refused("silent"),
            Idle::Mute => {
                let error = "no request was here in time";
                self.refused(peer, "silent", &error);
            }
            Idle::Stalled => {
                let reason = "an answer that is not read";
                self.refused(peer, reason, &reason);
            }
        }
    }
}

/// Serves until `stop`; over TLS if there is a door for it.
pub(crate) fn serve(
    listener: TcpListener,
    state: State,
    door: Option<Arc<Door>>,
    tasks: &TaskTracker,
    stop: CancellationToken,
) {
    let shared = Arc::new(Shared {
        metrics: state.metrics.clone(),
        router: router(state),
        notices: Notices::default(),
        door,
        stop: stop.clone(),
    });
    let connections = tasks.clone();
    tasks.spawn(async move {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        let addresses: Arc<Crowd<IpAddr>> = Crowd::new(share_of_one_address(CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    if let Some(held_back) = shared.notices.due("accept") {
                        tracing::warn!(%error, held_back, "cannot accept an HTTP connection");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = room.clone().try_acquire_owned() else {
                let reason = "too many connections";
                shared.refused(peer, reason, &reason);
                continue;
            };
            let Some(place) = addresses.enter(network(peer.ip())) else {
                let reason = "too many connections from one address";
                shared.refused(peer, reason, &reason);
                continue;
            };
            let shared = shared.clone();
            connections.spawn(async move {
                shared.metrics.http_connections.inc();
                enter(stream, peer, &shared).await;
                shared.metrics.http_connections.dec();
                drop((permit, place));
            });
        }
    });
}

async fn enter(stream: TcpStream, peer: SocketAddr, shared: &Shared) {
    let _ = stream.set_nodelay(true);
    let Some(door) = &shared.door else {
        return one(stream, Who { peer, device: None }, false, shared).await;
    };
    let accepted = tokio::select! {
        () = shared.stop.cancelled() => return,
        accepted = door.accept(stream) => accepted,
    };
    match accepted {
        Ok((stream, device)) => {
            let http2 = stream.get_ref().1.alpn_protocol() == Some(PROTOCOLS[0]);
            one(stream, Who { peer, device }, http2, shared).await;
        }
        Err(AcceptError::Plain(stream)) => {
            let reason = "plain text where TLS is spoken";
            shared.refused(peer, reason, &"plain HTTP; this port speaks https://");
            tell_and_close(stream, PLAIN).await;
        }
        Err(AcceptError::Gone) => {
            shared.metrics.http_refused(AcceptError::Gone.name());
            tracing::debug!(%peer, "closed before the handshake");
        }
        Err(error) => shared.refused(peer, error.name(), &error),
    }
}

/// The other end of a connection.
struct Who {
    peer: SocketAddr,
    /// The device whose certificate was shown.
    device: Option<Peer>,
}

/// Tells each request who sent it.
struct Named {
    router: TowerToHyperService<Router>,
    who: Who,
    activity: Arc<Activity>,
}

impl Service<Request<Incoming>> for Named {
    type Response = Response;
    type Error = Infallible;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let busy = Busy::new(self.activity.clone());
        request.extensions_mut().insert(ConnectInfo(self.who.peer));
        if let Some(device) = &self.who.device
            && !device.cut.is_cancelled()
        {
            request.extensions_mut().insert(device.device.clone());
        }
        let answer = self.router.call(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(busy.until_end_of(body)))) })
    }
}

async fn one<S>(stream: S, who: Who, http2: bool, shared: &Shared)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let peer = who.peer;
    let cut = who.device.as_ref().map(|device| device.cut.clone());
    let activity = Arc::new(Activity::new(Instant::now()));
    let service = Named {
        router: TowerToHyperService::new(shared.router.clone()),
        who,
        activity: activity.clone(),
    };
    let builder = auto::Builder::new(TokioExecutor::new());
    // What was agreed on is known: no need to guess from the first bytes, which may never come.
    let mut builder = if http2 {
        builder.http2_only()
    } else {
        builder.http1_only()
    };
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_buf_size(HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(HEADER_BYTES as u32)
        .max_concurrent_streams(STREAMS)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(IDLE)
        .keep_alive_timeout(HEADERS);
    let stream = Moving {
        stream,
        activity: activity.clone(),
    };
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let revoked = async {
        match &cut {
            Some(cut) => cut.cancelled().await,
            None => std::future::pending().await,
        }
    };
    // HTTP/1 has its own clock for the time between requests.
    let later = if http2 { IDLE } else { Duration::MAX };
    let idle = activity.idle(HEADERS, later);
    tokio::pin!(revoked, idle);
    let mut stopping = false;
    let done = loop {
        tokio::select! {
            done = connection.as_mut() => break done,
            () = &mut revoked => {
                return shared.refused(peer, "the device was revoked", &"its device was revoked");
            }
            why = &mut idle => return shared.idle(peer, why),
            () = shared.stop.cancelled(), if !stopping => {
                connection.as_mut().graceful_shutdown();
                stopping = true;
            }
        }
    };
    if let Err(error) = done {
        let parse = error.downcast_ref::<hyper::Error>();
        if parse.is_some_and(hyper::Error::is_parse) {
            let reason = "the request cannot be read";
            return shared.refused(peer, reason, &format!("{reason}: {error}"));
        }
        // Its own clock for headers runs as long as ours for silence: one of them is first.
        if parse.is_some_and(hyper::Error::is_timeout) {
            let why = match activity.asked() {
                true => Idle::Silent,
                false => Idle::Mute,
            };
            return shared.idle(peer, why);
        }
        tracing::debug!(%peer, %error, "an HTTP connection ended");
    }
}

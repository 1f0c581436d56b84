//! Requests to the directory: over TLS to whom the system (or the configuration) trusts, bounded in time and size, and
//! never on to where an answer leads.

use std::{path::Path, sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{HeaderValue, Request, Response, Uri, header},
};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    version::TLS13,
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use super::config::safe;
use crate::{operate::Wire, trust::tls::provider};

/// A whole exchange: somebody waits before a browser.
const LIMIT: Duration = Duration::from_secs(8);
/// The largest answer: keys of a large directory are some kilobytes, a token with a thousand groups some tens.
const MAX_ANSWER: usize = 256 * 1024;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[error("asking {url}: {why}")]
pub(crate) struct FetchError {
    url: String,
    why: String,
}

/// The client.
pub(super) struct Fetch {
    tls: TlsConnector,
}

impl std::fmt::Debug for Fetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fetch")
    }
}

impl Fetch {
    /// Trusts who stands in this file; or whom the system trusts.
    pub(super) fn new(ca: Option<&Path>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        match ca {
            Some(path) => {
                let read = |error: &dyn std::fmt::Display| {
                    format!("oidc.ca: cannot use {}: {error}", path.display())
                };
                let pem = std::fs::read(path).map_err(|e| read(&e))?;
                for certificate in CertificateDer::pem_slice_iter(&pem) {
                    let certificate = certificate.map_err(|e| read(&e))?;
                    roots.add(certificate).map_err(|e| read(&e))?;
                }
                if roots.is_empty() {
                    return Err(read(&"there is no certificate in it"));
                }
            }
            // What cannot be read of the system's is left out; where all is, nothing is trusted.
            None => {
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
        }
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            tls: TlsConnector::from(Arc::new(config)),
        })
    }

    /// Asks, and waits for the whole answer.
    pub(super) async fn send(
        &self,
        request: Request<Vec<u8>>,
    ) -> Result<Response<Vec<u8>>, FetchError> {
        let url = request.uri().to_string();
        let failed = |why: String| FetchError {
            url: url.clone(),
            why,
        };
        match timeout(LIMIT, self.exchange(request)).await {
            Ok(answer) => answer.map_err(failed),
            Err(_) => Err(failed(format!("no answer within {} s", LIMIT.as_secs()))),
        }
    }

    /// The body of what can simply be got.
    pub(super) async fn get(&self, url: &str) -> Result<Vec<u8>, FetchError> {
        let failed = |why: String| FetchError {
            url: url.to_owned(),
            why,
        };
        let request = Request::get(url).header(header::ACCEPT, "application/json");
        let request = request
            .body(Vec::new())
            .map_err(|e| failed(e.to_string()))?;
        let answer = self.send(request).await?;
        if answer.status().is_success() {
            Ok(answer.into_body())
        } else {
            Err(failed(format!("it answered {}", answer.status())))
        }
    }

    async fn connect(&self, url: &url::Url) -> Result<Box<dyn Wire>, String> {
        let says = |error: &dyn std::fmt::Display| error.to_string();
        let port = url.port_or_known_default().unwrap_or_default();
        let host = url.host_str().unwrap_or_default();
        // Of version 6 an address stands in brackets in a URL, and nowhere else.
        let host = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let stream = TcpStream::connect((host.as_str(), port)).await;
        let stream = stream.map_err(|e| says(&e))?;
        if url.scheme() == "http" {
            return Ok(Box::new(stream));
        }
        let name = ServerName::try_from(host).map_err(|e| says(&e))?;
        let stream = self.tls.connect(name, stream).await;
        Ok(Box::new(stream.map_err(|e| says(&e))?))
    }

    async fn exchange(&self, request: Request<Vec<u8>>) -> Result<Response<Vec<u8>>, String> {
        let says = |error: &dyn std::fmt::Display| error.to_string();
        let url = safe(&request.uri().to_string())?;
        let stream = self.connect(&url).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| says(&e))?;
        // Ends with the sender.
        tokio::spawn(connection);
        let (mut head, body) = request.into_parts();
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        let authority = head.uri.authority().map(ToString::to_string);
        let host = authority.unwrap_or_default();
        let path = path.parse::<Uri>().map_err(|e| says(&e))?;
        let host = host.parse::<HeaderValue>().map_err(|e| says(&e))?;
        head.headers.insert(header::HOST, host);
        head.uri = path;
        let answer = sender.send_request(Request::from_parts(head, Body::from(body)));
        let (head, body) = answer.await.map_err(|e| says(&e))?.into_parts();
        let body = axum::body::to_bytes(Body::new(body), MAX_ANSWER).await;
        let body =
            body.map_err(|_| format!("its answer has no end, or more than {MAX_ANSWER} bytes"))?;
        Ok(Response::from_parts(head, body.to_vec()))
    }
}

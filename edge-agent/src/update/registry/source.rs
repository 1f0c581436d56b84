//! Where a device gets the registry's files: over HTTP, or from a folder.

use std::{
    fmt::Debug,
    io::{self, Read},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use futures_util::stream;
use tough::{Transport, TransportError, TransportErrorKind, TransportStream};
use url::Url;

use crate::{
    http::{self, Patience},
    identity::Tls,
};

/// The largest file that is fetched whatever the metadata says: a list of some fifteen thousand releases.
pub const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// A coordinator that cannot be reached in this time is not there.
const CONNECT: Duration = Duration::from_secs(10);
/// Time to a first answer.
const ANSWER: Duration = Duration::from_secs(20);
/// One whole file: the largest over 300 kbit/s.
const EXCHANGE: Duration = Duration::from_secs(120);

/// Why a file was not got.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// There is no such file.
    #[error("it is not there")]
    Missing,
    /// It does not end.
    #[error("it has more than {MAX_FILE_BYTES} bytes")]
    TooLarge,
    /// Anything else.
    #[error("{0}")]
    Unreachable(String),
}

/// Gives files by their path, such as `metadata/timestamp.json`. May block.
pub trait Source: Debug + Send + Sync {
    /// The whole file, of at most [`MAX_FILE_BYTES`].
    ///
    /// # Errors
    /// Why not.
    fn get(&self, path: &str) -> Result<Vec<u8>, SourceError>;
}

/// A coordinator.
#[derive(Debug)]
pub struct Http {
    agent: ureq::Agent,
    base: String,
}

impl Http {
    /// The registry at an address such as `https://host:8443/api/v1/tuf`.
    #[must_use]
    pub fn new(base: &str) -> Self {
        Self::patient(base, [CONNECT, ANSWER, EXCHANGE])
    }

    /// The same where it takes an identity to be let in.
    #[must_use]
    pub fn trusting(base: &str, tls: &Tls) -> Self {
        Self::with(base, [CONNECT, ANSWER, EXCHANGE], tls)
    }

    /// With other times to connect, to a first answer, and for a whole file.
    #[must_use]
    pub fn patient(base: &str, times: [Duration; 3]) -> Self {
        Self::with(base, times, &Tls::none())
    }

    fn with(base: &str, [connect, answer, exchange]: [Duration; 3], tls: &Tls) -> Self {
        let patience = Patience {
            connect,
            answer,
            body: exchange,
            whole: Some(exchange),
        };
        let agent = http::agent(patience, tls);
        let base = base.trim_end_matches('/').to_owned();
        Self { agent, base }
    }
}

impl Source for Http {
    fn get(&self, path: &str) -> Result<Vec<u8>, SourceError> {
        let unreachable = |error: ureq::Error| match error {
            ureq::Error::BodyExceedsLimit(_) => SourceError::TooLarge,
            error => SourceError::Unreachable(error.to_string()),
        };
        let url = format!("{}/{path}", self.base);
        let mut response = self.agent.get(url).call().map_err(unreachable)?;
        match response.status().as_u16() {
            200 => {}
            404 => return Err(SourceError::Missing),
            status @ 300..=399 => {
                let why = format!("status {status}: redirects are not followed");
                return Err(SourceError::Unreachable(why));
            }
            status => return Err(SourceError::Unreachable(format!("status {status}"))),
        }
        let body = response.body_mut().with_config().limit(MAX_FILE_BYTES);
        body.read_to_vec().map_err(unreachable)
    }
}

/// A folder with the same layout.
#[derive(Clone, Debug)]
pub struct Folder(pub PathBuf);

impl Source for Folder {
    fn get(&self, path: &str) -> Result<Vec<u8>, SourceError> {
        let unreachable = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => SourceError::Missing,
            _ => SourceError::Unreachable(error.to_string()),
        };
        let file = std::fs::File::open(self.0.join(path)).map_err(unreachable)?;
        let mut bytes = Vec::new();
        let length = file
            .take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(unreachable)?;
        if length as u64 > MAX_FILE_BYTES {
            return Err(SourceError::TooLarge);
        }
        Ok(bytes)
    }
}

/// A source, as the library wants it.
#[derive(Clone, Debug)]
pub(super) struct Carrier(pub(super) Arc<dyn Source>);

#[tough::async_trait]
impl Transport for Carrier {
    async fn fetch(&self, url: Url) -> Result<TransportStream, TransportError> {
        let (source, path) = (
            Arc::clone(&self.0),
            url.path().trim_start_matches('/').to_owned(),
        );
        let got = tokio::task::spawn_blocking(move || source.get(&path)).await;
        let got = got.unwrap_or_else(|error| Err(SourceError::Unreachable(error.to_string())));
        let piece = match got {
            Ok(bytes) => Ok(bytes::Bytes::from(bytes)),
            Err(SourceError::Missing) => {
                return Err(TransportError::new(TransportErrorKind::FileNotFound, url));
            }
            // The library takes any error here for "there is no newer root" and goes on with the old one;
            // an error in the stream ends the refresh.
            Err(error) => Err(TransportError::new_with_cause(
                TransportErrorKind::Other,
                url,
                error,
            )),
        };
        Ok(Box::pin(stream::iter([piece])))
    }
}

//! TLS at the doors of the coordinator: 1.3 only, a certificate of a client is welcome, and one that is shown has to be
//! of a device that may come in now.

use std::{io::ErrorKind, sync::Arc, time::Duration};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, UnixTime},
    server::{
        NoServerSessionStorage, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::TLS13,
};
use tokio::{net::TcpStream, sync::Semaphore};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    active::{Active, Peer},
    authority::Authority,
    csr::{Fingerprint, fingerprint},
};

/// From the connection to the end of the handshake: two round trips on the slowest link, and a slow device's signature.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes under way at one door. Each holds some kilobytes; clients that never finish theirs leave room for others
/// after ten seconds at the latest.
const AT_ONCE: usize = 1_024;

/// Why a door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// The library refuses the certificate, the key or the settings.
    #[error("cannot set up TLS: {0}")]
    Settings(String),
}

/// Why a connection does not get through the door.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AcceptError {
    #[error("too many handshakes at once")]
    Busy,
    #[error("no handshake within 10 s")]
    Slow,
    #[error("the handshake failed: {0}")]
    Failed(std::io::Error),
    /// Somebody only looked whether there is a door.
    #[error("closed before the handshake")]
    Gone,
    /// Between the handshake and now.
    #[error("the device was revoked")]
    Revoked,
}

impl AcceptError {
    /// For metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Busy => "too many handshakes at once",
            Self::Slow => "no handshake within 10 s",
            Self::Failed(_) => "the handshake failed",
            Self::Gone => "closed before the handshake",
            Self::Revoked => "the device was revoked",
        }
    }
}

/// The only provider of cryptography in this program, named and not a default of the process.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// One door: it speaks TLS and knows who came in.
pub(crate) struct Door {
    acceptor: TlsAcceptor,
    active: Arc<Active>,
    room: Semaphore,
}

/// What every door of this coordinator shows: made once, since the key is made with it.
pub(crate) struct Shown {
    config: ServerConfig,
    active: Arc<Active>,
}

impl Shown {
    /// A certificate for this server under `names`.
    pub(crate) fn new(
        authority: &Authority,
        names: &[String],
        active: Arc<Active>,
    ) -> Result<Self, TlsError> {
        let settings = |error: &dyn std::fmt::Display| TlsError::Settings(error.to_string());
        let (chain, key) = authority.server(names).map_err(|e| settings(&e))?;
        let mut roots = RootCertStore::empty();
        roots
            .add(authority.certificate().clone())
            .map_err(|e| settings(&e))?;
        let chain_only = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            .allow_unauthenticated()
            .build()
            .map_err(|e| settings(&e))?;
        let verifier = Arc::new(ActiveOnly {
            chain: chain_only,
            active: active.clone(),
        });
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| settings(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|e| settings(&e))?;
        // A resumed session would come in with the certificate of back then, expired or not.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self { config, active })
    }

    /// A door for these protocols.
    pub(crate) fn door(&self, protocols: &[&[u8]]) -> Arc<Door> {
        let mut config = self.config.clone();
        config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
        Arc::new(Door {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            active: self.active.clone(),
            room: Semaphore::new(AT_ONCE),
        })
    }
}

impl Door {
    /// Does the handshake; says which device came, if it showed a certificate.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, Option<Peer>), AcceptError> {
        let _place = self.room.try_acquire().map_err(|_| AcceptError::Busy)?;
        let stream = tokio::time::timeout(HANDSHAKE, self.acceptor.accept(stream))
            .await
            .map_err(|_| AcceptError::Slow)?
            .map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => AcceptError::Gone,
                _ => AcceptError::Failed(error),
            })?;
        let (_, session) = stream.get_ref();
        let peer = match session.peer_certificates().and_then(<[_]>::first) {
            None => None,
            Some(shown) => {
                let key = key_of(shown).ok_or(AcceptError::Revoked)?;
                Some(self.active.find(&key).ok_or(AcceptError::Revoked)?)
            }
        };
        Ok((stream, peer))
    }
}

fn key_of(certificate: &CertificateDer<'_>) -> Option<Fingerprint> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(fingerprint(parsed.public_key().raw))
}

/// The library's verifier, and then: is it a device that may come in now? So a revoked device is turned away in its
/// handshake, with an alert that says why.
#[derive(Debug)]
struct ActiveOnly {
    chain: Arc<dyn ClientCertVerifier>,
    active: Arc<Active>,
}

impl ClientCertVerifier for ActiveOnly {
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)?;
        let key = key_of(end_entity).ok_or(CertificateError::BadEncoding)?;
        match self.active.find(&key) {
            Some(_) => Ok(verified),
            None => Err(CertificateError::Revoked.into()),
        }
    }

    fn offer_client_auth(&self) -> bool {
        self.chain.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

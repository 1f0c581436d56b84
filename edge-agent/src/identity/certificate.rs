//! Certificates: what is in them, which ones are taken from a coordinator, and how a coordinator is known by its own.

use std::sync::Arc;

use mesh_core::{Digest, enrolment::Validity};
use rustls::{
    CertificateError, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::time::unix;

/// A certificate of the coordinator's making is below 1 KiB; a chain has two.
const MAX_CHAIN: usize = 4;

/// The cryptography of everything here.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) name: String,
    pub(super) not_before_ms: i64,
    pub(super) not_after_ms: i64,
    /// Its public key, with the algorithm.
    pub(super) public_key: Vec<u8>,
}

impl Facts {
    pub(super) fn of(der: &[u8]) -> Result<Self, String> {
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| "it is no X.509 certificate".to_owned())?;
        if !rest.is_empty() {
            return Err("something follows the certificate".into());
        }
        let ms = |seconds: i64| seconds.saturating_mul(1_000);
        let validity = certificate.validity();
        let mut names = certificate.subject().iter_common_name();
        Ok(Self {
            name: names
                .next()
                .and_then(|name| name.as_str().ok())
                .unwrap_or_default()
                .to_owned(),
            not_before_ms: ms(validity.not_before.timestamp()),
            not_after_ms: ms(validity.not_after.timestamp()),
            public_key: certificate.public_key().raw.to_vec(),
        })
    }

    /// From when to when it is good, renewed at half its life unless `renew_after_ms` says otherwise.
    pub(super) fn validity(&self, renew_after_ms: Option<i64>) -> Validity {
        let (not_before_ms, not_after_ms) = (self.not_before_ms, self.not_after_ms);
        let half = not_before_ms + not_after_ms.saturating_sub(not_before_ms) / 2;
        Validity {
            not_before_ms,
            not_after_ms,
            renew_after_ms: renew_after_ms.unwrap_or(half),
        }
    }
}

/// The device's certificate and the authority's, which follows it.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    pub(super) leaf: CertificateDer<'static>,
    pub(super) ca: CertificateDer<'static>,
}

impl Chain {
    /// The authority's public key as it is, without its algorithm; empty if it cannot be read, and then it verifies
    /// nothing.
    pub(super) fn authority_key(&self) -> Vec<u8> {
        let parsed = X509Certificate::from_der(&self.ca);
        let key = parsed.map(|(_, ca)| ca.public_key().subject_public_key.data.to_vec());
        key.unwrap_or_default()
    }

    /// Reads PEM: the device's certificate first, the authority's last.
    pub(super) fn parse(pem: &[u8]) -> Result<Self, String> {
        let mut all = Vec::new();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            all.push(certificate.map_err(|error| format!("the certificate is no PEM: {error}"))?);
            if all.len() > MAX_CHAIN {
                return Err("there are too many certificates".into());
            }
        }
        let ca = all.pop();
        let (Some(leaf), Some(ca)) = (all.into_iter().next(), ca) else {
            return Err(
                "the device's certificate and the authority's do not follow each other".into(),
            );
        };
        Ok(Self { leaf, ca })
    }

    /// Is it this device's, by this authority, at this time?
    pub(super) fn check(
        &self,
        name: &str,
        public_key: &[u8],
        now_ms: i64,
    ) -> Result<Facts, String> {
        let facts = Facts::of(&self.leaf)?;
        if facts.name != name {
            return Err(format!(
                "it is of {:?}, this device is {name:?}; if the coordinator is right, correct `site` and `device`",
                facts.name
            ));
        }
        if facts.public_key != public_key {
            return Err("it is for another key than this device's".into());
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(&self.ca)?, provider())
            .build()
            .map_err(|error| error.to_string())?;
        verifier
            .verify_client_cert(&self.leaf, &[], unix(now_ms))
            .map_err(|error| error.to_string())?;
        Ok(facts)
    }
}

/// One authority, and no other.
pub(super) fn roots(ca: &CertificateDer<'_>) -> Result<Arc<RootCertStore>, String> {
    let mut roots = RootCertStore::empty();
    roots
        .add(ca.clone().into_owned())
        .map_err(|error| format!("the authority's certificate: {error}"))?;
    Ok(Arc::new(roots))
}

/// By what a coordinator is known that is asked for a certificate.
#[derive(Clone, Debug)]
pub(super) enum Authority {
    /// The one with this SHA-256 among the certificates that it shows: what the token says.
    Pinned(Digest),
    /// This one: what is on the disk.
    Known(CertificateDer<'static>),
}

/// Verifies a coordinator that is asked for a certificate.
///
/// Everything is the library's, but for the clock. A device that asks may not know what time it is, and it asks because
/// of that: where the coordinator's certificate is not valid at the time that the device believes in, it is looked at as
/// of the moment when it was issued. Who has an expired certificate of a coordinator and its key can hear a device ask by
/// this, and answer nothing of use: the answer is a certificate that only the authority can sign. All other connections
/// go by the time that comes with it.
#[derive(Debug)]
pub(super) struct Contact {
    authority: Authority,
    provider: Arc<CryptoProvider>,
}

/// The coordinator shows another authority.
#[derive(thiserror::Error)]
#[error(
    "none of the certificates that the coordinator shows is the authority {0} that the token names: it is another \
     coordinator, or somebody in between"
)]
struct OtherAuthority(Digest);

/// The library shows what is inside of an error this way, to people.
impl std::fmt::Debug for OtherAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// The authority's certificate is no good.
#[derive(thiserror::Error)]
#[error("{0}")]
struct BadAuthority(String);

/// As above.
impl std::fmt::Debug for BadAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

impl Contact {
    pub(super) fn new(authority: Authority) -> Self {
        Self {
            authority,
            provider: provider(),
        }
    }
}

impl ServerCertVerifier for Contact {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ca = match &self.authority {
            Authority::Known(ca) => ca,
            Authority::Pinned(pin) => others
                .iter()
                .find(|shown| models::digest_of(shown) == *pin)
                .ok_or_else(|| other(OtherAuthority(*pin)))?,
        };
        let roots = roots(ca).map_err(|why| other(BadAuthority(why)))?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&self.provider))
                .build()
                .map_err(|error| other(BadAuthority(error.to_string())))?;
        match verifier.verify_server_cert(leaf, others, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(error)) if is_about_time(&error) => {
                let facts = Facts::of(leaf).map_err(|why| other(BadAuthority(why)))?;
                let issued = unix(facts.not_before_ms);
                let verified = verifier.verify_server_cert(leaf, others, name, ocsp, issued)?;
                tracing::warn!(
                    "the device's clock and the coordinator's certificate do not agree; the coordinator is asked for the time"
                );
                Ok(verified)
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

const fn is_about_time(error: &CertificateError) -> bool {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    matches!(
        error,
        Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }
    )
}

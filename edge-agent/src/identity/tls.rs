//! What the device's connections are made with.

use std::{error::Error, sync::Arc};

use rustls::{
    AlertDescription, ClientConfig, RootCertStore,
    client::{Resumption, danger::ServerCertVerifier},
    pki_types::{CertificateDer, PrivateKeyDer},
    time_provider::{DefaultTimeProvider, TimeProvider},
};
use tokio::sync::{Notify, watch};

use super::{
    certificate::{Contact, provider, roots},
    disk::{Key, Stored},
    error::IdentityError,
    time::TrustedTime,
};
use crate::{mesh::Detour, trouble::inside};

/// The broker's port where its address names none.
pub(crate) const MQTTS_PORT: u16 = 8883;

/// The device's certificate, ready for connections.
#[derive(Clone, Debug)]
pub struct Material {
    /// For TLS: the authority as the only root, and the device's certificate.
    pub(crate) config: Arc<ClientConfig>,
    /// The authority alone.
    roots: Arc<RootCertStore>,
    /// The coordinator's broker, as it says itself: `host:port`.
    pub mqtt: Option<String>,
    /// Until when the certificate is good: milliseconds since the Unix epoch.
    pub not_after_ms: i64,
    /// The authority's public key, an uncompressed point of P-256: it signs rosters, too.
    pub(crate) authority: Vec<u8>,
    time: Arc<TrustedTime>,
}

/// The device's side of every connection: nothing, where it has no identity.
#[derive(Clone, Debug)]
pub struct Tls {
    material: watch::Receiver<Option<Arc<Material>>>,
    doubt: Arc<Notify>,
    detour: Detour,
    wanted: bool,
}

impl Tls {
    /// A device without an identity.
    #[must_use]
    pub fn none() -> Self {
        Self {
            material: watch::channel(None).1,
            doubt: Arc::default(),
            detour: Detour::default(),
            wanted: false,
        }
    }

    pub(super) fn new(
        material: watch::Receiver<Option<Arc<Material>>>,
        doubt: Arc<Notify>,
        detour: Detour,
    ) -> Self {
        Self {
            material,
            doubt,
            detour,
            wanted: true,
        }
    }

    /// How to get to the coordinator without an uplink.
    pub(crate) fn detour(&self) -> Detour {
        self.detour.clone()
    }

    /// The newest material; nothing before the device is enrolled.
    #[must_use]
    pub fn material(&self) -> Option<Arc<Material>> {
        self.material.borrow().clone()
    }

    /// For the next connection.
    ///
    /// # Errors
    /// In words, if there is nothing to connect with.
    pub(crate) fn config(&self) -> Result<Arc<ClientConfig>, &'static str> {
        match self.material() {
            Some(material) => Ok(Arc::clone(&material.config)),
            None if self.wanted => Err("the device is not enrolled yet"),
            None => Err("the device has no identity: set coordinator.token"),
        }
    }

    /// For the next connection to the broker: `ca` signed its certificate, if it was not the coordinator's authority, and the
    /// device shows its own certificate unless it comes `with_password`.
    ///
    /// # Errors
    /// In words, if there is nothing to connect with.
    pub(crate) fn to_broker(
        &self,
        ca: Option<Arc<RootCertStore>>,
        with_password: bool,
    ) -> Result<Arc<ClientConfig>, String> {
        let material = self.material();
        if ca.is_none() && !with_password {
            return Ok(self.config()?);
        }
        let time: Arc<dyn TimeProvider> = match &material {
            Some(material) => Arc::clone(&material.time) as _,
            None => Arc::new(DefaultTimeProvider),
        };
        let own = material.as_ref().map(|material| &material.config);
        let Some(roots) = ca.or_else(|| material.as_ref().map(|m| Arc::clone(&m.roots))) else {
            return Err(self.config().err().unwrap_or("nobody is trusted").into());
        };
        let builder = ClientConfig::builder_with_details(provider(), time)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let mut config = match own {
            _ if with_password => builder.with_no_client_auth(),
            Some(own) => {
                builder.with_client_cert_resolver(Arc::clone(&own.client_auth_cert_resolver))
            }
            None => {
                return Err(self
                    .config()
                    .err()
                    .unwrap_or("there is no certificate")
                    .into());
            }
        };
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// What there is now is about to be used: it is no news any more.
    pub(crate) fn seen(&mut self) {
        self.material.mark_unchanged();
    }

    /// Waits until the material is another one than what this has [`seen`](Self::seen); for ever where it never will be.
    pub(crate) async fn changed(&mut self) {
        if self.material.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// Somebody does not take the certificate, or shows one that is not valid by this device's clock.
    pub(crate) fn doubt(&self) {
        self.doubt.notify_one();
    }

    /// Days until the certificate expires, below zero once it has.
    #[must_use]
    pub fn days_left(&self) -> Option<f32> {
        const DAY_MS: f32 = 86_400_000.0;
        let material = self.material()?;
        let left = material.not_after_ms.saturating_sub(material.time.now_ms());
        Some(left as f32 / DAY_MS)
    }
}

/// What connections are made with.
pub(super) fn material(
    stored: &Stored,
    key: &Key,
    time: &Arc<TrustedTime>,
) -> Result<Material, IdentityError> {
    let roots = roots(&stored.chain.ca).unwrap_or_else(|why| {
        tracing::error!("nobody is trusted: {why}");
        Arc::new(RootCertStore::empty())
    });
    let mut config = ClientConfig::builder_with_details(provider(), Arc::clone(time) as _)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(Arc::clone(&roots))
        .with_client_auth_cert(vec![stored.chain.leaf.clone()], key.private())?;
    // A resumed session would go on under the old certificate.
    config.resumption = Resumption::disabled();
    Ok(Material {
        config: Arc::new(config),
        roots,
        mqtt: stored.notes.mqtt.clone(),
        not_after_ms: stored.validity.not_after_ms,
        authority: stored.chain.authority_key(),
        time: Arc::clone(time),
    })
}

/// For one request for a certificate: with the one that is to be renewed, as long as it can be shown.
pub(super) fn contact(
    contact: Contact,
    shown: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
    time: &Arc<TrustedTime>,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let verifier: Arc<dyn ServerCertVerifier> = Arc::new(contact);
    let builder = ClientConfig::builder_with_details(provider(), Arc::clone(time) as _)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match shown {
        Some((leaf, key)) => builder.with_client_auth_cert(vec![leaf], key)?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// Did a connection fail because of a certificate, this side's or the other's?
pub(crate) fn is_about_certificates(error: &(dyn Error + 'static)) -> bool {
    inside(error).is_some_and(of_certificates)
}

const fn of_certificates(error: &rustls::Error) -> bool {
    use AlertDescription::{
        AccessDenied, BadCertificate, CertificateExpired, CertificateRequired, CertificateRevoked,
        CertificateUnknown, UnknownCA, UnsupportedCertificate,
    };
    matches!(
        error,
        rustls::Error::InvalidCertificate(_)
            | rustls::Error::AlertReceived(
                AccessDenied
                    | BadCertificate
                    | CertificateExpired
                    | CertificateRequired
                    | CertificateRevoked
                    | CertificateUnknown
                    | UnknownCA
                    | UnsupportedCertificate
            )
    )
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_certificate_is_blamed_however_deep_it_lies() {
        let alert = rustls::Error::AlertReceived(AlertDescription::CertificateExpired);
        let io = io::Error::new(io::ErrorKind::InvalidData, alert);
        let wrapped = rumqttc::ConnectionError::Io(io);
        assert!(is_about_certificates(&wrapped));
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        assert!(!is_about_certificates(&rumqttc::ConnectionError::Io(reset)));
        assert!(!is_about_certificates(&rustls::Error::DecryptError));
    }

    #[tokio::test]
    async fn without_an_identity_there_is_nothing_to_connect_with() {
        let mut tls = Tls::none();
        assert!(tls.config().unwrap_err().contains("coordinator.token"));
        assert_eq!(tls.days_left(), None);
        let never = tokio::time::timeout(std::time::Duration::from_millis(5), tls.changed());
        assert!(never.await.is_err());
    }
}

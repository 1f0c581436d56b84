//! The way to a site's coordinator and broker: over TLS, only to the one whose authority lies in its data folder, and as
//! somebody whom it knows.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use rumqttc::{MqttOptions, TlsConfiguration, Transport};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::TLS13,
};
use ureq::{
    Body,
    http::Response,
    tls::{Certificate, RootCerts, TlsConfig},
};

/// In the coordinator's data folder: what commands on its machine show.
const TOKEN: &str = "trust/operator.token";
/// There, too: who signs its certificates.
const AUTHORITY: &str = "trust/ca.pem";

/// How often it is looked for the token of a coordinator that starts, and how soon.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Clone, Debug)]
pub struct Way {
    /// The coordinator's data folder.
    data: PathBuf,
    http: SocketAddr,
    mqtt: SocketAddr,
    tls: bool,
    /// A subscriber's name and password.
    subscriber: Option<(String, String)>,
}

impl Way {
    pub(crate) const fn new(data: PathBuf, http: SocketAddr, mqtt: SocketAddr, tls: bool) -> Self {
        Self {
            data,
            http,
            mqtt,
            tls,
            subscriber: None,
        }
    }

    pub(crate) fn with_subscriber(&mut self, name: &str, password: &str) {
        self.subscriber = Some((name.to_owned(), password.to_owned()));
    }

    /// A subscriber of the broker, if it asks for one: name and password.
    #[must_use]
    pub fn subscriber(&self) -> Option<(&str, &str)> {
        let (name, password) = self.subscriber.as_ref()?;
        Some((name, password))
    }

    /// Where those who only listen come in.
    #[must_use]
    pub const fn mqtt(&self) -> SocketAddr {
        self.mqtt
    }

    /// Where the console is, without a slash at its end.
    #[must_use]
    pub fn console(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}", self.http)
    }

    /// The certificate of who signs the coordinator's.
    #[must_use]
    pub fn authority(&self) -> Option<PathBuf> {
        self.tls.then(|| self.data.join(AUTHORITY))
    }

    /// What is shown to the API: an admin's token.
    ///
    /// # Errors
    /// If it is not there (yet).
    pub fn bearer(&self) -> anyhow::Result<String> {
        let path = self.data.join(TOKEN);
        let token = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        Ok(format!("Bearer {}", token.trim()))
    }

    /// Asks as an admin. A coordinator that starts for the first time can be connected to a moment before its token is there,
    /// which is waited for.
    ///
    /// # Errors
    /// As `send`.
    pub fn ask<E>(
        &self,
        send: impl FnOnce(&str) -> Result<Response<Body>, E>,
    ) -> Result<Response<Body>, E> {
        let mut tries = 0;
        let bearer = loop {
            match self.bearer() {
                Ok(bearer) => break bearer,
                Err(_) if tries == TRIES => break String::new(),
                Err(_) => std::thread::park_timeout(PAUSE),
            }
            tries += 1;
        };
        send(&bearer)
    }

    /// An HTTP client for the coordinator, which takes any status as an answer.
    ///
    /// # Errors
    /// If the authority cannot be read.
    pub fn client(&self, timeout: Duration) -> anyhow::Result<ureq::Agent> {
        let mut config = ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false);
        if let Some(path) = self.authority() {
            let authority = Certificate::from_pem(&read(&path)?)?;
            let tls = TlsConfig::builder()
                .root_certs(RootCerts::new_with_certs(&[authority]))
                .unversioned_rustls_crypto_provider(Arc::new(default_provider()));
            config = config.tls_config(tls.build());
        }
        Ok(config.build().into())
    }

    /// How somebody who only listens connects to the broker.
    ///
    /// # Errors
    /// If the authority cannot be read.
    pub fn listener(&self, id: &str) -> anyhow::Result<MqttOptions> {
        let mut options = MqttOptions::new(id, (self.mqtt.ip().to_string(), self.mqtt.port()));
        if let Some((name, password)) = &self.subscriber {
            options.set_credentials(name.clone(), password.clone());
            if self.tls {
                options.set_transport(self.transport(None)?);
            }
        }
        Ok(options)
    }

    /// TLS with this coordinator, with the certificate in the `identity` folder of a device or without one.
    ///
    /// # Errors
    /// If something cannot be read.
    pub fn config(&self, identity: Option<&Path>) -> anyhow::Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        let authority = read(&self.data.join(AUTHORITY))?;
        roots.add(CertificateDer::from_pem_slice(&authority)?)?;
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots);
        let Some(identity) = identity else {
            return Ok(Arc::new(builder.with_no_client_auth()));
        };
        let chain = CertificateDer::pem_slice_iter(&read(&identity.join("cert.pem"))?)
            .collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(&read(&identity.join("key.pem"))?)?;
        Ok(Arc::new(builder.with_client_auth_cert(chain, key)?))
    }

    /// The same for a client of MQTT.
    ///
    /// # Errors
    /// As [`Way::config`].
    pub fn transport(&self, identity: Option<&Path>) -> anyhow::Result<Transport> {
        let config = TlsConfiguration::Rustls(self.config(identity)?);
        Ok(Transport::tls_with_config(config))
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

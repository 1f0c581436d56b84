//! The way to an external broker: over TLS, as somebody whom it knows.

use std::{error::Error, fs, io, path::PathBuf, sync::Arc, time::Duration};

use rumqttc::{
    AsyncClient, ConnectionError, Event, Incoming, MqttOptions, TlsConfiguration, Transport,
};
use rustls::{
    CertificateError, ClientConfig, RootCertStore,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::TLS13,
};
use tokio::time::timeout;

use super::{COORDINATOR, shown};
use crate::{
    clock,
    config::{BrokerConfig, BrokerUrl},
    trust::{Authority, secret_of, tls::provider},
};

/// Of the coordinator's own certificate: it makes a new one for each connection, so this bounds nothing but a stolen memory.
const LIFE: Duration = Duration::from_secs(7 * 86_400);
/// Of one that is shown once.
const MOMENT: Duration = Duration::from_secs(60);
/// To connect, and to be told whether that is welcome.
const PATIENCE: Duration = Duration::from_secs(10);

/// What it takes to connect.
pub(crate) struct Access {
    pub(crate) url: BrokerUrl,
    authority: Arc<Authority>,
    ca: Option<PathBuf>,
    login: Option<(String, PathBuf)>,
}

impl Access {
    /// To the broker that the configuration names, if it does; what cannot be used is found out now.
    pub(crate) fn open(
        config: &BrokerConfig,
        authority: &Arc<Authority>,
    ) -> Result<Option<Self>, String> {
        let Some(url) = config.url.clone() else {
            return Ok(None);
        };
        let external = &config.external;
        let access = Self {
            url,
            authority: authority.clone(),
            ca: external.ca.clone(),
            login: external.user.clone().zip(external.password_file.clone()),
        };
        access.options("x")?;
        Ok(Some(access))
    }

    /// The coordinator's next connection. Files are read again each time: they may have been renewed.
    pub(crate) fn options(&self, id: &str) -> Result<MqttOptions, String> {
        let (host, port) = (self.url.host.as_str(), self.url.port);
        let mut options = MqttOptions::new(id, (host, port));
        if let Some((user, file)) = &self.login {
            let password = secret_of(file).map_err(|e| format!("broker.password_file: {e}"))?;
            options.set_credentials(user.clone(), password);
        }
        if self.url.tls {
            let shown = match self.login {
                Some(_) => None,
                None => Some(self.certificate(COORDINATOR, LIFE)?),
            };
            options.set_transport(self.transport(shown)?);
        }
        Ok(options)
    }

    fn certificate(&self, name: &str, life: Duration) -> Result<Shown, String> {
        let made = self.authority.client(name, life, clock::now_ms());
        made.map_err(|e| e.to_string())
    }

    fn transport(&self, shown: Option<Shown>) -> Result<Transport, String> {
        let mut roots = RootCertStore::empty();
        match &self.ca {
            None => roots
                .add(self.authority.certificate().clone())
                .map_err(|e| e.to_string())?,
            Some(path) => {
                let wrong = |why: &dyn std::fmt::Display| {
                    format!(
                        "broker.ca: {}: {why}; it is a file with the certificates, in PEM, of who signed the broker's",
                        path.display()
                    )
                };
                let pem = fs::read(path).map_err(|e| wrong(&e))?;
                for one in CertificateDer::pem_slice_iter(&pem) {
                    let one = one.map_err(|e| wrong(&e))?;
                    roots.add(one).map_err(|e| wrong(&e))?;
                }
                if roots.is_empty() {
                    return Err(wrong(&"there is no certificate in it"));
                }
            }
        }
        let settings = |e: rustls::Error| format!("cannot set up TLS for the broker: {e}");
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(settings)?
            .with_root_certificates(roots);
        let mut config = match shown {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .map_err(settings)?,
        };
        // A resumed session would come in without being looked at again.
        config.resumption = Resumption::disabled();
        let config = TlsConfiguration::Rustls(Arc::new(config));
        Ok(Transport::tls_with_config(config))
    }

    /// Takes the place of a device for a moment: whoever was there under its name is out.
    pub(super) async fn take_place(&self, device: &str) -> Result<(), String> {
        let mut options = MqttOptions::new(device, (self.url.host.as_str(), self.url.port));
        let shown = self.certificate(device, MOMENT)?;
        options
            .set_transport(self.transport(Some(shown))?)
            .set_clean_session(true);
        let (client, mut events) = AsyncClient::builder(options).capacity(1).build();
        let place = async {
            loop {
                match events.poll().await {
                    Ok(Event::Incoming(Incoming::ConnAck(_))) => break,
                    Ok(_) => {}
                    Err(error) => return Err(explain(&self.url, &error)),
                }
            }
            client.try_disconnect().map_err(|e| e.to_string())?;
            // Until the goodbye is out.
            while events.poll().await.is_ok() {}
            Ok(())
        };
        timeout(PATIENCE, place)
            .await
            .map_err(|_| "no answer within 10 s".to_owned())?
    }
}

/// A certificate and its key.
type Shown = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// What is wrong with a connection, in words that say what to do.
pub(crate) fn explain(url: &BrokerUrl, error: &ConnectionError) -> String {
    let what = match tls_error(error) {
        Some(rustls::Error::InvalidMessage(_)) => Some(
            "what answers there does not speak TLS: is it the right port, and should broker.url begin with mqtt://?",
        ),
        Some(rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        )) => Some(
            "its certificate is of an authority that is not trusted here: set broker.ca to the file of the one that signed \
             it, or give it a certificate of this coordinator with `cloud-coordinator broker rules`",
        ),
        Some(rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        )) => Some(
            "its certificate has expired (or a clock is wrong): renew it; `cloud-coordinator broker rules` writes a new one",
        ),
        Some(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => Some("its certificate is for another name than that in broker.url"),
        Some(rustls::Error::AlertReceived(_)) => Some(
            "it does not take the coordinator's certificate: does it trust ca.pem of this coordinator, or does it want \
             broker.user?",
        ),
        Some(_) => None,
        None => match error {
            ConnectionError::ConnectionRefused(_) => Some(
                "it does not let the coordinator in: are its rules those of `cloud-coordinator broker rules`, or \
                 broker.user and its password right?",
            ),
            _ if url.tls && is_end(error) => {
                Some("it closes the connection: does it speak TLS on this port, and take TLS 1.3?")
            }
            _ if !url.tls && is_end(error) => Some(
                "it closes the connection: if it speaks TLS on this port, broker.url begins with mqtts://",
            ),
            _ => None,
        },
    };
    match what {
        Some(what) => format!("{}: {what} ({error})", shown(url)),
        None => format!("{}: {error}", shown(url)),
    }
}

fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        next = match error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
        {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}

fn is_end(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return matches!(
                io.kind(),
                io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe
            );
        }
        next = error.source();
    }
    false
}

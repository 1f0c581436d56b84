//! The way to a coordinator: over TLS if it says so in its data folder, and only to the one whose certificate lies there.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    version::TLS13,
};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use crate::trust::tls::provider;

/// Bytes to and from a coordinator.
pub(crate) trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}

/// The authority of the coordinator on this data folder, if it speaks TLS.
fn authority(data: &Path) -> anyhow::Result<Option<PathBuf>> {
    let Ok(text) = std::fs::read_to_string(data.join("addresses.json")) else {
        // Another machine's coordinator is reached with its data folder copied here, or not at all.
        return Ok(None);
    };
    let said: Value = serde_json::from_str(&text)?;
    if said["tls"] != Value::Bool(true) {
        return Ok(None);
    }
    let path = said["ca"].as_str().map(PathBuf::from);
    Ok(Some(path.unwrap_or_else(|| data.join("trust/ca.pem"))))
}

/// Connects to the coordinator at `address` whose data folder is `data`.
pub(crate) async fn connect(data: &Path, address: SocketAddr) -> anyhow::Result<Box<dyn Wire>> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("no coordinator answers at {address}"))?;
    let Some(path) = authority(data)? else {
        return Ok(Box::new(stream));
    };
    let pem = std::fs::read(&path)
        .with_context(|| format!("cannot read the authority {}", path.display()))?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&pem)?)?;
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let ip = match address.ip() {
        // It listens everywhere; here it is reached on loopback.
        ip if ip.is_unspecified() => IpAddr::from(Ipv4Addr::LOCALHOST),
        ip => ip,
    };
    let name = ServerName::from(ip);
    let connector = TlsConnector::from(Arc::new(config));
    let stream = connector.connect(name, stream).await.with_context(|| {
        format!(
            "the server at {address} is not the coordinator of {}",
            data.display()
        )
    })?;
    Ok(Box::new(stream))
}

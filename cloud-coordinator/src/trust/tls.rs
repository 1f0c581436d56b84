//! TLS at the doors of the coordinator: 1.3 only, a certificate of a client is welcome, and one that is shown has to be
//! of a device that may come in now.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    io::ErrorKind,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

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
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

use super::{
    active::{Active, Peer},
    authority::Authority,
    csr::{Fingerprint, fingerprint},
};
use crate::api::limits::network;

/// From the connection to the end of the handshake: two round trips on the slowest link, and a slow device's signature.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes under way at one door. Each holds some kilobytes.
const AT_ONCE: usize = 1_024;

/// With this byte every conversation in TLS begins (RFC 8446, 5.1).
const HANDSHAKE_RECORD: u8 = 22;

/// Says a last word in the clear and closes the connection, but reads what is there first: else the other end may see a failure
/// and not the word.
pub(crate) async fn tell_and_close(mut stream: TcpStream, word: &[u8]) {
    /// As much as is read of what was said in vain.
    const MOST: usize = 16 * 1024;
    /// All of it together.
    const PATIENCE: Duration = Duration::from_secs(2);
    let parting = async {
        let mut heard = [0; 1_024];
        let mut left = stream.read(&mut heard).await?;
        stream.write_all(word).await?;
        stream.shutdown().await?;
        while left < MOST {
            match stream.read(&mut heard).await? {
                0 => break,
                more => left += more,
            }
        }
        std::io::Result::Ok(())
    };
    // Whoever does not listen has not asked.
    let _ = tokio::time::timeout(PATIENCE, parting).await;
}

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
    #[error(
        "too many handshakes at once, and this one took longest of where most of them come from"
    )]
    Busy,
    #[error("no handshake within 10 s")]
    Slow,
    #[error("the handshake failed: {0}")]
    Failed(std::io::Error),
    /// Somebody only looked whether there is a door.
    #[error("closed before the handshake")]
    Gone,
    /// Somebody who does not know that this is a door. He is told, in his own language.
    #[error("plain text where TLS is spoken")]
    Plain(TcpStream),
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
            Self::Plain(_) => "plain text where TLS is spoken",
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
    room: Arc<Room>,
}

/// Handshakes under way. When it is full the network that most of them come from loses one, and of those the one that has
/// taken longest: an honest client is through in a moment, and one on a slow link does not pay for a crowd from elsewhere.
#[derive(Debug, Default)]
struct Room {
    inside: Mutex<Inside>,
}

#[derive(Debug, Default)]
struct Inside {
    next: u64,
    all: usize,
    /// By network, oldest first.
    networks: HashMap<IpAddr, BTreeMap<u64, CancellationToken>>,
}

impl Inside {
    fn remove(&mut self, network: IpAddr, number: u64) -> Option<CancellationToken> {
        let crowd = self.networks.get_mut(&network)?;
        let gone = crowd.remove(&number)?;
        if crowd.is_empty() {
            self.networks.remove(&network);
        }
        self.all -= 1;
        Some(gone)
    }

    /// Who has to go: of several crowds of one size, that of who has taken longest.
    fn longest_of_the_largest_crowd(&self) -> Option<(IpAddr, u64)> {
        let first = |crowd: &BTreeMap<u64, _>| crowd.keys().next().copied();
        let largest = self
            .networks
            .iter()
            .max_by_key(|(_, crowd)| (crowd.len(), Reverse(first(crowd))));
        largest.and_then(|(network, crowd)| Some((*network, first(crowd)?)))
    }
}

/// A place in it, given back when dropped.
struct Place {
    room: Arc<Room>,
    network: IpAddr,
    number: u64,
    /// Somebody else needs it.
    given_away: CancellationToken,
}

impl Room {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(self: &Arc<Self>, network: IpAddr) -> Place {
        let mut inside = self.inside();
        inside.next += 1;
        inside.all += 1;
        let place = Place {
            room: self.clone(),
            network,
            number: inside.next,
            given_away: CancellationToken::new(),
        };
        let crowd = inside.networks.entry(network).or_default();
        crowd.insert(place.number, place.given_away.clone());
        if inside.all > AT_ONCE
            && let Some((network, number)) = inside.longest_of_the_largest_crowd()
            && let Some(gone) = inside.remove(network, number)
        {
            gone.cancel();
        }
        place
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.inside().remove(self.network, self.number);
    }
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
            room: Arc::default(),
        })
    }
}

impl Door {
    /// Does the handshake; says which device came, if it showed a certificate.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, Option<Peer>), AcceptError> {
        let peer = stream.peer_addr().map_err(|_| AcceptError::Gone)?;
        let place = self.room.enter(network(peer.ip()));
        tokio::select! {
            biased;
            () = place.given_away.cancelled() => Err(AcceptError::Busy),
            done = self.handshake(stream) => done,
        }
    }

    async fn handshake(
        &self,
        stream: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, Option<Peer>), AcceptError> {
        let until = Instant::now() + HANDSHAKE;
        let mut first = [0];
        let peeked = timeout_at(until, stream.peek(&mut first)).await;
        match peeked.map_err(|_| AcceptError::Slow)? {
            Ok(0) | Err(_) => return Err(AcceptError::Gone),
            Ok(_) if first != [HANDSHAKE_RECORD] => return Err(AcceptError::Plain(stream)),
            Ok(_) => {}
        }
        let stream = timeout_at(until, self.acceptor.accept(stream))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn from(n: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, n])
    }

    #[test]
    fn a_crowd_pushes_out_only_itself() {
        let room = Arc::new(Room::default());
        let slow = room.enter(from(2));
        let crowd: Vec<Place> = (0..5 * AT_ONCE).map(|_| room.enter(from(66))).collect();
        assert!(!slow.given_away.is_cancelled(), "the first of all stays");
        let gone = crowd.iter().filter(|p| p.given_away.is_cancelled()).count();
        assert_eq!(gone, 4 * AT_ONCE + 1);
        let (old, new) = crowd.split_at(gone);
        assert!(
            old.iter().all(|p| p.given_away.is_cancelled()),
            "the oldest go"
        );
        let more: Vec<Place> = (0..AT_ONCE).map(|_| room.enter(from(2))).collect();
        let of_crowd = new.iter().filter(|p| !p.given_away.is_cancelled()).count();
        let of_more = more.iter().filter(|p| !p.given_away.is_cancelled()).count();
        assert!(of_crowd.abs_diff(of_more) <= 2, "{of_crowd} and {of_more}");
        drop((slow, crowd, more));
        assert!(room.inside().networks.is_empty());
        assert_eq!(room.inside().all, 0);
    }

    #[test]
    fn where_nobody_is_a_crowd_the_oldest_goes() {
        let room = Arc::new(Room::default());
        let every = |n: usize| IpAddr::from(u32::try_from(n).unwrap().to_be_bytes());
        let all: Vec<Place> = (0..=AT_ONCE).map(|n| room.enter(every(n))).collect();
        assert!(all[0].given_away.is_cancelled());
        assert!(all[1..].iter().all(|p| !p.given_away.is_cancelled()));
    }
}

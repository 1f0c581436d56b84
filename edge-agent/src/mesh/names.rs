//! Keys, peers and addresses, as libp2p writes them and as the rest of Lacewing does.

use std::net::{IpAddr, SocketAddr};

use libp2p::{Multiaddr, PeerId, identity::Keypair, multiaddr::Protocol, multihash::Multihash};
use mesh_core::{Digest, roster::Peer};
use p256::pkcs8::DecodePrivateKey;

/// SHA-256 in the table of multihashes.
const SHA_256: u64 = 0x12;

/// The SHA-256 in a `PeerId`. Keys that are short enough to stand in it themselves have none: devices make no such.
#[must_use]
pub fn peer(id: &PeerId) -> Option<Peer> {
    let hash = id.as_ref();
    let digest = hash.digest().try_into().ok()?;
    (hash.code() == SHA_256).then_some(Digest(digest))
}

/// The `PeerId` of a peer.
pub(super) fn id(peer: &Peer) -> Option<PeerId> {
    let hash = Multihash::wrap(SHA_256, &peer.0).ok()?;
    PeerId::from_multihash(hash).ok()
}

/// The device's key, for libp2p. `der` is PKCS#8.
///
/// # Errors
/// In words, if it is none on the curve P-256.
pub fn keypair(der: &[u8]) -> Result<Keypair, String> {
    let secret = p256::SecretKey::from_pkcs8_der(der).map_err(|error| error.to_string())?;
    let secret = libp2p::identity::ecdsa::SecretKey::try_from_bytes(secret.to_bytes());
    let secret = secret.map_err(|error| error.to_string())?;
    Ok(libp2p::identity::ecdsa::Keypair::from(secret).into())
}

/// `/ip4/…/tcp/…`
pub(super) fn multiaddress(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// Where an address leads, if it is a plain one over TCP.
pub(super) fn socket(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => IpAddr::V4(ip),
        Protocol::Ip6(ip) => IpAddr::V6(ip),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Tcp(port) => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};

    use super::*;

    #[test]
    fn the_devices_key_is_its_peer_id() {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let pair = keypair(&key.serialize_der()).unwrap();
        let spki = key.subject_public_key_info();
        let public = libp2p::identity::ecdsa::PublicKey::try_decode_der(&spki).unwrap();
        let own = PeerId::from(libp2p::identity::PublicKey::from(public));
        assert_eq!(pair.public().to_peer_id(), own);
        let peer = peer(&own).unwrap();
        assert_eq!(id(&peer), Some(own));
        assert!(keypair(b"no key").is_err());
    }

    #[test]
    fn addresses_there_and_back() {
        for text in ["10.1.2.3:7473", "[fe80::1]:80"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(socket(&multiaddress(address)), Some(address));
        }
        assert_eq!(socket(&"/dns4/x/tcp/1".parse().unwrap()), None);
        assert_eq!(socket(&"/ip4/1.2.3.4/udp/1".parse().unwrap()), None);
    }
}

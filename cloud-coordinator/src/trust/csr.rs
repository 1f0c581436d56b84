//! What a device asks a certificate for: of a signing request only the public key is taken, and nothing that a
//! device says about itself gets into its certificate.

use mesh_core::Name;
use rcgen::{CertificateSigningRequestParams, IsCa, PublicKey, PublicKeyData, SanType};
use rustls::pki_types::{CertificateSigningRequestDer, pem::PemObject};
use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ED25519},
    prelude::FromDer,
    x509::SubjectPublicKeyInfo,
};

/// One key and a name are some 600 bytes in PEM.
const MAX_CSR: usize = 8 * 1024;
/// What is repeated of a name that is not taken: enough to recognise it.
const SHOWN: usize = 80;

/// SHA-256 of a public key with its algorithm (`SubjectPublicKeyInfo`).
pub(crate) type Fingerprint = [u8; 32];

/// Why a signing request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CsrError {
    #[error("the signing request has {0} bytes, more than 8 KiB")]
    TooLarge(usize),
    #[error("the signing request cannot be read: PEM with one CERTIFICATE REQUEST is expected")]
    Unreadable,
    #[error("the key in the signing request is neither ECDSA P-256 nor Ed25519")]
    Key,
    #[error("the signing request is not signed with its own key")]
    Signature,
    #[error("the signing request asks for a certificate authority")]
    Authority,
    #[error("the signing request asks for an extension that devices do not get")]
    Extension,
    #[error("the signing request names {named:?}, and the certificate would be for {own:?}")]
    OtherName { named: String, own: String },
}

/// A signing request whose signature proves that the asker has the key.
#[derive(Debug)]
pub(crate) struct Csr {
    pub(super) key: PublicKey,
    pub(crate) fingerprint: Fingerprint,
    /// Its neighbours know it by this; nothing for a key of a kind that devices do not make.
    pub(crate) peer: Option<mesh_core::roster::Peer>,
    /// What it was told to sign.
    pub(crate) challenge: Option<String>,
    /// What it says about whom it is for.
    names: Vec<String>,
}

pub(crate) fn fingerprint(spki: &[u8]) -> Fingerprint {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, spki);
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.as_ref());
    bytes
}

/// The SHA-256 in the libp2p `PeerId` of an ECDSA key.
fn peer(spki: &[u8]) -> Option<mesh_core::roster::Peer> {
    let key = libp2p_identity::ecdsa::PublicKey::try_decode_der(spki).ok()?;
    let id = libp2p_identity::PublicKey::from(key).to_peer_id();
    let digest = id.as_ref().digest().try_into().ok()?;
    Some(mesh_core::Digest(digest))
}

/// `<site>/<device>`, the common name of a device.
pub(crate) fn common_name(site: &Name, device: &Name) -> String {
    format!("{site}/{device}")
}

/// The same as a URI.
pub(crate) fn uri(site: &Name, device: &Name) -> String {
    format!("lacewing:device:{site}/{device}")
}

fn is_strong(key: &SubjectPublicKeyInfo<'_>) -> bool {
    let kind = &key.algorithm.algorithm;
    let curve = key.algorithm.parameters.as_ref();
    let p256 = || curve.and_then(|c| c.as_oid().ok()) == Some(OID_EC_P256);
    *kind == OID_SIG_ED25519 || (*kind == OID_KEY_TYPE_EC_PUBLIC_KEY && p256())
}

impl Csr {
    /// Reads a request and verifies its signature.
    pub(crate) fn read(pem: &str) -> Result<Self, CsrError> {
        if pem.len() > MAX_CSR {
            return Err(CsrError::TooLarge(pem.len()));
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| CsrError::Unreadable)?;
        let (rest, parsed) =
            X509CertificationRequest::from_der(&der).map_err(|_| CsrError::Unreadable)?;
        if !rest.is_empty() {
            return Err(CsrError::Unreadable);
        }
        let info = &parsed.certification_request_info;
        if !is_strong(&info.subject_pki) {
            return Err(CsrError::Key);
        }
        let asked =
            CertificateSigningRequestParams::from_der(&der).map_err(|error| match error {
                rcgen::Error::InvalidCertificationRequestSignature => CsrError::Signature,
                rcgen::Error::UnsupportedSignatureAlgorithm => CsrError::Key,
                rcgen::Error::UnsupportedExtension => CsrError::Extension,
                _ => CsrError::Unreadable,
            })?;
        // The key that was verified is the one that the certificate would carry, byte by byte.
        let spki = info.subject_pki.raw;
        if asked.public_key.subject_public_key_info() != spki {
            return Err(CsrError::Key);
        }
        if matches!(asked.params.is_ca, IsCa::Ca(_)) {
            return Err(CsrError::Authority);
        }
        let mut names = Vec::new();
        for name in info.subject.iter_common_name() {
            names.push(name.as_str().unwrap_or("(not a text)").to_owned());
        }
        for name in &asked.params.subject_alt_names {
            names.push(match name {
                SanType::URI(uri) => uri.as_str().to_owned(),
                other => format!("{other:?}"),
            });
        }
        let challenge =
            info.iter_attributes()
                .find_map(|attribute| match attribute.parsed_attribute() {
                    ParsedCriAttribute::ChallengePassword(text) => Some(text.0.clone()),
                    _ => None,
                });
        Ok(Self {
            challenge,
            fingerprint: fingerprint(spki),
            peer: peer(spki),
            key: asked.public_key,
            names,
        })
    }

    /// A request need not say whom it is for; if it does, it has to be this device.
    pub(crate) fn names_only(&self, site: &Name, device: &Name) -> Result<(), CsrError> {
        let (name, uri) = (common_name(site, device), uri(site, device));
        match self.names.iter().find(|n| **n != name && **n != uri) {
            None => Ok(()),
            Some(other) => Err(CsrError::OtherName {
                named: other.chars().take(SHOWN).collect(),
                own: name,
            }),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType,
        ExtendedKeyUsagePurpose, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384,
        PKCS_ED25519, PKCS_RSA_SHA256,
    };

    use super::*;

    pub(crate) fn request(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        change(&mut params);
        params.serialize_request(key).unwrap().pem().unwrap()
    }

    fn key() -> KeyPair {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
    }

    fn check(pem: &str) -> Result<Csr, CsrError> {
        let csr = Csr::read(pem)?;
        csr.names_only(&"demo".parse().unwrap(), &"d1".parse().unwrap())?;
        Ok(csr)
    }

    #[test]
    fn takes_the_two_kinds_of_key_and_the_devices_own_name() {
        for alg in [&PKCS_ECDSA_P256_SHA256, &PKCS_ED25519] {
            let key = KeyPair::generate_for(alg).unwrap();
            let pem = request(&key, |p| {
                p.distinguished_name.push(DnType::CommonName, "demo/d1");
                let own = "lacewing:device:demo/d1".try_into().unwrap();
                p.subject_alt_names = vec![SanType::URI(own)];
                p.insert_extended_key_usage(ExtendedKeyUsagePurpose::ClientAuth);
            });
            let csr = check(&pem).unwrap();
            assert_eq!(csr.fingerprint, fingerprint(&key.subject_public_key_info()));
            assert!(check(&request(&key, |_| {})).is_ok(), "no name at all");
        }
    }

    #[test]
    fn refuses_every_other_kind() {
        let key = key();
        let named = |name: &str| {
            let name = name.to_owned();
            request(&key, |p| {
                p.distinguished_name.push(DnType::CommonName, name);
            })
        };
        for other in ["demo/d2", "other/d1", "#", "+", "d1", "demo/d1 "] {
            assert!(
                matches!(check(&named(other)), Err(CsrError::OtherName { .. })),
                "{other}"
            );
        }
        let san = request(&key, |p| {
            p.distinguished_name.push(DnType::CommonName, "demo/d1");
            p.subject_alt_names = vec![SanType::DnsName("localhost".try_into().unwrap())];
        });
        assert!(matches!(check(&san), Err(CsrError::OtherName { .. })));
        let ca = request(&key, |p| {
            p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        });
        assert_eq!(check(&ca).unwrap_err(), CsrError::Authority);
        let odd = request(&key, |p| {
            p.custom_extensions = vec![CustomExtension::from_oid_content(
                &[1, 3, 6, 1, 4, 1, 99999, 1],
                vec![5, 0],
            )];
        });
        assert!(check(&odd).is_err());
        for alg in [&PKCS_ECDSA_P384_SHA384, &PKCS_RSA_SHA256] {
            let key = KeyPair::generate_for(alg).unwrap();
            assert_eq!(check(&request(&key, |_| {})).unwrap_err(), CsrError::Key);
        }
        assert_eq!(
            check(&" ".repeat(MAX_CSR + 1)).unwrap_err(),
            CsrError::TooLarge(MAX_CSR + 1)
        );
        for text in ["", "x", "-----BEGIN CERTIFICATE REQUEST-----\n"] {
            assert_eq!(check(text).unwrap_err(), CsrError::Unreadable);
        }
    }

    /// Whatever bit is changed, the signature or the form no longer holds.
    #[test]
    fn refuses_a_request_with_any_byte_changed() {
        let pem = request(&key(), |p| {
            p.distinguished_name.push(DnType::CommonName, "demo/d1");
        });
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap();
        let good = check(&pem).unwrap().fingerprint;
        for at in 0..der.len() {
            let mut bytes = der.to_vec();
            bytes[at] ^= 0x01;
            let wrapped = Csr::read(&pem_of(&bytes));
            assert!(
                wrapped.is_err() || wrapped.is_ok_and(|c| c.fingerprint == good),
                "byte {at}"
            );
        }
    }

    /// PEM of some bytes.
    fn pem_of(der: &[u8]) -> String {
        const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut body = String::new();
        for three in der.chunks(3) {
            let word = three
                .iter()
                .chain([0, 0].iter())
                .take(3)
                .fold(0u32, |w, b| w << 8 | u32::from(*b));
            for place in 0..4 {
                body.push(if place > three.len() {
                    '='
                } else {
                    char::from(DIGITS[(word >> (18 - 6 * place) & 63) as usize])
                });
            }
        }
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n")
    }
}

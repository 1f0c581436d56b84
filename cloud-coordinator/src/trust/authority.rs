//! The coordinator's own certificate authority.
//!
//! Made at the first start, in `<data>/trust`: `ca.key`, readable by nobody else, and `ca.pem`. Devices pin it by the
//! hash of its certificate, which stands in their enrolment token; so it is never replaced by itself.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_core::Name;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};

use super::{
    csr::{self, Csr, fingerprint},
    files::{self, FileError},
};

/// A device's certificate begins this much earlier: an external broker's clock may be behind ours.
pub(crate) const SKEW: Duration = Duration::from_secs(300);
/// Of a serial number: 16 random bytes never meet twice.
const SERIAL: usize = 16;

/// Why there is no authority, or no certificate.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuthorityError {
    /// The key cannot be used.
    #[error(transparent)]
    Key(#[from] FileError),
    /// The certificate cannot be read or written.
    #[error("cannot use the authority's certificate {path}: {why}; restore both from a backup")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate for {what}: {error}")]
    Make {
        /// For whom.
        what: String,
        /// What the library says.
        error: rcgen::Error,
    },
    /// A roster cannot be signed.
    #[error("cannot sign: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

/// A device's certificate.
#[derive(Clone, Debug)]
pub(crate) struct Issued {
    /// The certificate, then the authority's.
    pub(crate) chain_pem: String,
    /// In hexadecimal.
    pub(crate) serial: String,
    pub(crate) not_after_ms: i64,
    /// Half of its life.
    pub(crate) renew_after_ms: i64,
}

/// Signs for devices and for the coordinator itself.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
    path: PathBuf,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

fn make(what: &str) -> impl Fn(rcgen::Error) -> AuthorityError + '_ {
    move |error| AuthorityError::Make {
        what: what.to_owned(),
        error,
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        use std::fmt::Write;
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A moment as certificates have it: whole seconds.
fn at_second(ms: i64) -> (i64, u64) {
    let second = ms.div_euclid(1_000).max(0);
    (second * 1_000, second.unsigned_abs())
}

fn named(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params.use_authority_key_identifier_extension = true;
    // Devices without a clock wake up in 1970, and have to reach us to learn the time.
    params.not_before = date_time_ymd(1970, 1, 1);
    // RFC 5280, 4.1.2.5: no date is known. The authority lives as long as its folder, the server's key as long as
    // its process.
    params.not_after = date_time_ymd(9999, 12, 31);
    params
}

/// Ends after a life that begins now; says when, in milliseconds.
fn end(params: &mut CertificateParams, life: Duration, now_ms: i64) -> i64 {
    let life_ms = i64::try_from(life.as_millis()).unwrap_or(i64::MAX);
    let (ms, second) = at_second(now_ms.saturating_add(life_ms));
    params.not_after = date_time_ymd(1970, 1, 1) + Duration::from_secs(second);
    ms
}

/// For those who connect, from now on; says when it ends.
fn as_client(params: &mut CertificateParams, life: Duration, now_ms: i64) -> i64 {
    let (_, now) = at_second(now_ms);
    params.not_before = date_time_ymd(1970, 1, 1) + Duration::from_secs(now).saturating_sub(SKEW);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    end(params, life, now_ms)
}

/// For those who are connected to, under these names.
fn serving(common_name: &str, names: &[String]) -> Result<CertificateParams, AuthorityError> {
    let mut params = named(common_name);
    for name in names {
        params.subject_alt_names.push(match name.parse::<IpAddr>() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => SanType::DnsName(name.as_str().try_into().map_err(make(name))?),
        });
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.serial_number = Some(serial().1);
    Ok(params)
}

/// What [`hex`] wrote; nothing if it is something else.
fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let pair = |two: &[u8]| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok();
    let even = digits.len().is_multiple_of(2) && !digits.is_empty();
    even.then(|| digits.chunks(2).map(pair).collect()).flatten()
}

impl Authority {
    /// Opens the authority in `dir`, or makes one.
    pub(crate) fn open(dir: &Path) -> Result<Self, AuthorityError> {
        let (key_path, path) = (dir.join("ca.key"), dir.join("ca.pem"));
        let file = |why: String| AuthorityError::File {
            path: path.clone(),
            why,
        };
        let written = match std::fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(file(error.to_string())),
        };
        let what = "the authority";
        let key = match files::read(&key_path)? {
            Some(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                KeyPair::from_pem(&text).map_err(make(what))?
            }
            None if written.is_some() => return Err(file("its key ca.key is missing".into())),
            None => {
                let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make(what))?;
                files::write(&key_path, key.serialize_pem().as_bytes())?;
                key
            }
        };
        let pem = match written {
            Some(pem) => pem,
            None => {
                // Also after a start that ended between the two files: nobody has seen that key yet.
                let id = hex(&fingerprint(&key.subject_public_key_info())[..4]);
                let mut params = named(&format!("Lacewing CA {id}"));
                params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
                params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
                let pem = params.self_signed(&key).map_err(make(what))?.pem();
                let fresh = path.with_extension("pem.new");
                std::fs::write(&fresh, &pem)
                    .and_then(|()| std::fs::rename(&fresh, &path))
                    .map_err(|error| file(error.to_string()))?;
                pem
            }
        };
        let certificate =
            CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| file(e.to_string()))?;
        let own = key.subject_public_key_info();
        let matches = x509_parser::parse_x509_certificate(&certificate)
            .is_ok_and(|(_, parsed)| parsed.public_key().raw == own);
        if !matches {
            return Err(file("it does not belong to the key ca.key".into()));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(make(what))?;
        let path = std::path::absolute(&path).unwrap_or(path);
        Ok(Self {
            issuer,
            certificate,
            pem,
            path,
        })
    }

    /// Signs claims as a JWT with the authority's own key.
    pub(crate) fn sign(
        &self,
        header: &jsonwebtoken::Header,
        claims: &impl serde::Serialize,
    ) -> Result<String, AuthorityError> {
        let key = jsonwebtoken::EncodingKey::from_ec_der(&self.issuer.key().serialize_der());
        Ok(jsonwebtoken::encode(header, claims, &key)?)
    }

    /// The authority's certificate.
    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The same in PEM.
    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of the certificate, in hexadecimal: by this it is pinned.
    pub(crate) fn digest(&self) -> String {
        hex(&fingerprint(&self.certificate))
    }

    /// A certificate for this server, with a fresh key that is nowhere but in memory; and the authority's own, so that
    /// a device finds the one that it has pinned.
    pub(crate) fn server(
        &self,
        names: &[String],
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), AuthorityError> {
        let what = "this server";
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make(what))?;
        let params = serving("Lacewing coordinator", names)?;
        let leaf = params.signed_by(&key, &self.issuer).map_err(make(what))?;
        let chain = vec![leaf.der().clone(), self.certificate.clone()];
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Ok((chain, key.into()))
    }

    /// A certificate for a broker that is another program, in PEM, and its key: the one that it has, or a new one.
    pub(crate) fn broker(
        &self,
        name: &str,
        key: Option<&str>,
        life: Duration,
        now_ms: i64,
    ) -> Result<(String, String), AuthorityError> {
        let what = "the broker";
        let key = match key {
            Some(pem) => KeyPair::from_pem(pem).map_err(make("the broker's key"))?,
            None => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make(what))?,
        };
        let mut params = serving("Lacewing broker", &[name.to_owned()])?;
        end(&mut params, life, now_ms);
        let leaf = params.signed_by(&key, &self.issuer).map_err(make(what))?;
        Ok((format!("{}{}", leaf.pem(), self.pem), key.serialize_pem()))
    }

    /// A certificate of a client under any name, with a key that is nowhere but in memory: for this coordinator itself where
    /// it is the client of another broker, and for a moment for a device that has to be turned out there.
    pub(crate) fn client(
        &self,
        name: &str,
        life: Duration,
        now_ms: i64,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make(name))?;
        let mut params = named(name);
        as_client(&mut params, life, now_ms);
        params.serial_number = Some(serial().1);
        let leaf = params.signed_by(&key, &self.issuer).map_err(make(name))?;
        let chain = vec![leaf.der().clone(), self.certificate.clone()];
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Ok((chain, key.into()))
    }

    /// The list of the certificates that do not count any more, in PEM, as of `at_ms`: later lists have later moments. It has no
    /// end: that nobody has come to write the next one must not keep the devices out.
    pub(crate) fn revocations(
        &self,
        serials: &[String],
        at_ms: i64,
    ) -> Result<String, AuthorityError> {
        let epoch = date_time_ymd(1970, 1, 1);
        let (_, second) = at_second(at_ms);
        let at = epoch + Duration::from_secs(second);
        let revoked = serials.iter().filter_map(|serial| from_hex(serial));
        let params = CertificateRevocationListParams {
            this_update: at,
            next_update: date_time_ymd(9999, 12, 31),
            crl_number: SerialNumber::from(second),
            issuing_distribution_point: None,
            revoked_certs: revoked
                .map(|serial| RevokedCertParams {
                    serial_number: SerialNumber::from_slice(&serial),
                    revocation_time: at,
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let what = "the list of revoked certificates";
        let list = params.signed_by(&self.issuer).map_err(make(what))?;
        list.pem().map_err(make(what))
    }

    /// A certificate for a device: its key, and a name of ours.
    pub(crate) fn issue(
        &self,
        csr: &Csr,
        (site, device): (&Name, &Name),
        life: Duration,
        now_ms: i64,
    ) -> Result<Issued, AuthorityError> {
        let name = csr::common_name(site, device);
        let life_ms = i64::try_from(life.as_millis()).unwrap_or(i64::MAX);
        let mut params = named(&name);
        let not_after_ms = as_client(&mut params, life, now_ms);
        let uri = csr::uri(site, device);
        params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(make(&name))?)];
        let (serial, number) = serial();
        params.serial_number = Some(number);
        let leaf = params
            .signed_by(&csr.key, &self.issuer)
            .map_err(make(&name))?;
        Ok(Issued {
            chain_pem: format!("{}{}", leaf.pem(), self.pem),
            serial,
            not_after_ms,
            renew_after_ms: now_ms + life_ms / 2,
        })
    }
}

/// A serial number that no other certificate has, and its text.
fn serial() -> (String, SerialNumber) {
    let mut bytes = [0; SERIAL];
    // A source of randomness that fails would have stopped the program at its keys.
    if aws_lc_rs::rand::fill(&mut bytes).is_err() {
        bytes[..8].copy_from_slice(&crate::clock::random().to_be_bytes());
        bytes[8..].copy_from_slice(&crate::clock::random().to_be_bytes());
    }
    // Positive, and without a leading zero.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    (hex(&bytes), SerialNumber::from_slice(&bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::{super::csr::tests::request, *};

    #[test]
    fn is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let first = Authority::open(dir.path()).unwrap();
        let again = Authority::open(dir.path()).unwrap();
        assert_eq!(first.certificate(), again.certificate());
        let key = dir.path().join("ca.key");
        let mode = std::fs::metadata(&key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
        let said = Authority::open(dir.path()).unwrap_err().to_string();
        assert!(said.contains("chmod 600"), "{said}");
        std::fs::remove_file(&key).unwrap();
        assert!(Authority::open(dir.path()).is_err(), "never a new key");
        let other = tempfile::tempdir().unwrap();
        Authority::open(other.path()).unwrap();
        std::fs::copy(other.path().join("ca.key"), &key).unwrap();
        let said = Authority::open(dir.path()).unwrap_err().to_string();
        assert!(said.contains("does not belong"), "{said}");
    }

    #[test]
    fn a_device_gets_its_key_and_our_name_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path()).unwrap();
        let key = KeyPair::generate().unwrap();
        let csr = Csr::read(&request(&key, |_| {})).unwrap();
        let (site, device): (Name, Name) = ("demo".parse().unwrap(), "d1".parse().unwrap());
        let now = 1_700_000_000_123;
        let life = Duration::from_secs(10);
        let issued = authority.issue(&csr, (&site, &device), life, now).unwrap();
        assert_eq!(issued.not_after_ms, 1_700_000_010_000);
        assert_eq!(issued.renew_after_ms, now + 5_000);
        let chain: Vec<_> = CertificateDer::pem_slice_iter(issued.chain_pem.as_bytes())
            .collect::<Result<_, _>>()
            .unwrap();
        assert_eq!(chain[1], *authority.certificate());
        let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
        assert_eq!(leaf.subject().to_string(), "CN=demo/d1");
        assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
        assert!(!leaf.is_ca());
        let usage = leaf.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth && !usage.any);
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        assert_eq!(
            names.value.general_names,
            [x509_parser::extensions::GeneralName::URI(
                "lacewing:device:demo/d1"
            )]
        );
        assert_eq!(leaf.validity().not_after.timestamp(), 1_700_000_010);
        let twice = authority.issue(&csr, (&site, &device), life, now).unwrap();
        assert_ne!(issued.serial, twice.serial);
    }
}

//! The folder of a broker: what is written there, and only if it would be different.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::{
    extensions::GeneralName, prelude::FromDer, revocation_list::CertificateRevocationList,
};

use super::super::rules::{self, CA, CERTIFICATE, CRL, Facts, KEY, PASSWORDS, Product};
use crate::{
    clock,
    config::{BrokerConfig, BrokerUrl},
    trust::{Authority, SKEW, files as secret, hex},
};

/// Of the broker's certificate: long, since it only counts for who has the key, and nobody may be there to renew it.
const LIFE: Duration = Duration::from_secs(365 * 86_400);
/// With less than this left it is made anew.
const RENEW_MS: i64 = 182 * 86_400_000;

/// Which broker, and where its files are.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    pub(super) path: PathBuf,
    pub(super) product: Product,
    pub(super) url: BrokerUrl,
    pub(super) user: Option<String>,
    /// Its certificate is of somebody else: not ours to write.
    foreign: bool,
}

impl Folder {
    /// If the configuration names one.
    pub(super) fn of(config: &BrokerConfig) -> Option<Self> {
        let external = &config.external;
        let path = external.rules.as_ref()?;
        Some(Self {
            path: std::path::absolute(path).unwrap_or_else(|_| path.clone()),
            product: external.rules_for?,
            url: config.url.clone()?,
            user: external.user.clone(),
            foreign: external.ca.is_some(),
        })
    }

    /// A broker on this machine's loopback is to stay there.
    pub(super) fn bind(&self) -> Option<String> {
        let ip: std::net::IpAddr = self.url.host.parse().ok()?;
        ip.is_loopback().then(|| ip.to_string())
    }

    /// Writes what would be different; says which files that were.
    pub(super) fn write(
        &self,
        facts: &Facts,
        authority: &Authority,
        serials: &[String],
        now_ms: i64,
    ) -> Result<Vec<&'static str>, String> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            format!("cannot write {}: {error}", self.path.join(what).display())
        };
        fs::create_dir_all(&self.path).map_err(|e| failed("", &e))?;
        let mut wanted: Vec<(&'static str, String)> = rules::files(self.product, facts);
        wanted.push((CA, authority.pem().to_owned()));
        if let Some(list) = self
            .revocations(authority, serials, now_ms)
            .map_err(|e| failed(CRL, &e))?
        {
            wanted.push((CRL, list));
        }
        let key = self.path.join(KEY);
        if !self.foreign && !self.holds(authority, &key, now_ms) {
            let known = fs::read_to_string(&key).ok();
            let made = authority.broker(&self.url.host, known.as_deref(), LIFE, now_ms);
            let (certificate, text) = made.map_err(|e| failed(CERTIFICATE, &e))?;
            if known.is_none() {
                secret::write(&key, text.as_bytes()).map_err(|e| e.to_string())?;
            }
            wanted.push((CERTIFICATE, certificate));
        }
        let mut written = Vec::new();
        for (name, text) in wanted {
            let path = self.path.join(name);
            if fs::read(&path).is_ok_and(|there| there == text.as_bytes()) {
                continue;
            }
            replace(&path, text.as_bytes()).map_err(|e| failed(name, &e))?;
            written.push(name);
        }
        let passwords = self.path.join(PASSWORDS);
        if self.product == Product::Mosquitto && !passwords.exists() {
            // A broker with a password file that is not there does not start. What is in it is not ours.
            secret::write(&passwords, b"").map_err(|e| e.to_string())?;
            written.push(PASSWORDS);
        }
        Ok(written)
    }

    /// The list of revoked certificates, if the one that is there says something else.
    fn revocations(
        &self,
        authority: &Authority,
        serials: &[String],
        now_ms: i64,
    ) -> Result<Option<String>, String> {
        let wanted: BTreeSet<&str> = serials.iter().map(String::as_str).collect();
        // A broker that loads a second list beside the first goes by the later one.
        let mut at_ms = now_ms - i64::try_from(SKEW.as_millis()).unwrap_or(0);
        if let Ok(text) = fs::read(self.path.join(CRL))
            && let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(&text)
            && let Ok((_, list)) = CertificateRevocationList::from_der(&pem.contents)
        {
            let (_, ca) = x509_parser::parse_x509_certificate(authority.certificate())
                .map_err(|e| e.to_string())?;
            let there: BTreeSet<String> = list
                .iter_revoked_certificates()
                .map(|revoked| hex(revoked.raw_serial()))
                .collect();
            let same = there.iter().map(String::as_str).eq(wanted.iter().copied());
            if list.verify_signature(ca.public_key()).is_ok() {
                if same {
                    return Ok(None);
                }
                at_ms = at_ms.max((list.last_update().timestamp() + 1) * 1_000);
            }
        }
        let list = authority.revocations(serials, at_ms);
        list.map(Some).map_err(|e| e.to_string())
    }

    /// Is there a certificate of ours for this name and key, and will it hold for a while?
    fn holds(&self, authority: &Authority, key: &Path, now_ms: i64) -> bool {
        let Ok(pem) = fs::read(self.path.join(CERTIFICATE)) else {
            return false;
        };
        let Ok(der) = CertificateDer::from_pem_slice(&pem) else {
            return false;
        };
        let parsed = x509_parser::parse_x509_certificate(&der);
        let ca = x509_parser::parse_x509_certificate(authority.certificate());
        let (Ok((_, leaf)), Ok((_, ca))) = (parsed, ca) else {
            return false;
        };
        let host = &self.url.host;
        let ip = host.parse().ok().map(|ip: std::net::IpAddr| match ip {
            std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
            std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
        });
        let named = |name: &GeneralName<'_>| match name {
            GeneralName::DNSName(dns) => *dns == host.as_str(),
            GeneralName::IPAddress(bytes) => ip.as_deref() == Some(*bytes),
            _ => false,
        };
        let names = leaf.subject_alternative_name().ok().flatten();
        key.exists()
            && names.is_some_and(|n| n.value.general_names.iter().any(named))
            && leaf.verify_signature(Some(ca.public_key())).is_ok()
            && leaf.validity().not_after.timestamp() * 1_000 - now_ms > RENEW_MS
    }
}

/// Whole or not at all; what the broker may do with the file stays as it was.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension(format!("{:016x}.new", clock::random()));
    let written = fs::write(&fresh, bytes)
        .and_then(|()| match fs::metadata(path) {
            Ok(there) => fs::set_permissions(&fresh, there.permissions()),
            Err(_) => Ok(()),
        })
        .and_then(|()| fs::File::open(&fresh)?.sync_all())
        .and_then(|()| fs::rename(&fresh, path));
    if written.is_err() {
        // Whoever looks into the folder would wonder.
        let _ = fs::remove_file(&fresh);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const NOW: i64 = 1_800_000_000_000;

    fn setup(dir: &Path) -> (Folder, Facts, Authority) {
        let text = format!(
            "[broker]\nurl = \"mqtts://127.0.0.1:18883\"\nrules_for = \"mosquitto\"\nrules = {:?}\n",
            dir.join("b")
        );
        let config = Config::parse(&text).unwrap();
        let folder = Folder::of(&config.broker).unwrap();
        let facts = Facts {
            folder: folder.path.clone(),
            bind: folder.bind(),
            port: 18_883,
            coordinator: rules::COORDINATOR.into(),
            by_password: false,
            devices: Vec::new(),
            subscribers: Vec::new(),
        };
        (folder, facts, Authority::open(dir).unwrap())
    }

    fn list(folder: &Folder) -> (i64, usize) {
        let text = fs::read(folder.path.join(CRL)).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(&text).unwrap();
        let (_, list) = CertificateRevocationList::from_der(&pem.contents).unwrap();
        let count = list.iter_revoked_certificates().count();
        (list.last_update().timestamp(), count)
    }

    #[test]
    fn only_what_is_different_is_written_and_lists_get_later() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let (folder, facts, authority) = setup(dir.path());
        let write = |serials: &[&str], now_ms| {
            let serials: Vec<String> = serials.iter().map(ToString::to_string).collect();
            folder.write(&facts, &authority, &serials, now_ms).unwrap()
        };
        let first = write(&[], NOW);
        for name in [
            CA,
            CRL,
            CERTIFICATE,
            PASSWORDS,
            "lacewing.conf",
            "devices.acl",
        ] {
            assert!(first.contains(&name), "{name} in {first:?}");
        }
        let mode = fs::metadata(folder.path.join(KEY)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(write(&[], NOW + 1).is_empty());
        let (before, none) = list(&folder);
        assert_eq!(none, 0);
        // At the same moment, and even if the clock has gone back.
        for (n, serials) in [&["4a01"][..], &["4a01", "4b02"][..]].iter().enumerate() {
            assert_eq!(write(serials, NOW - 5_000), [CRL]);
            assert_eq!(list(&folder), (before + 1 + n as i64, n + 1));
        }
        assert!(
            write(&["4b02", "4a01"], NOW).is_empty(),
            "the same in another order"
        );
        // The certificate is renewed at half of its life, for the same key.
        let key = fs::read(folder.path.join(KEY)).unwrap();
        let late = NOW + 184 * 86_400_000;
        assert_eq!(write(&["4a01", "4b02"], late), [CERTIFICATE]);
        assert_eq!(fs::read(folder.path.join(KEY)).unwrap(), key);
        assert!(write(&["4a01", "4b02"], late).is_empty());
    }
}

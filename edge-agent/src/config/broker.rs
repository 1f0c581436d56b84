//! What is wrong with the way to the broker, and the files that it names.

use std::{io, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use super::BrokerConfig;
use crate::update::disk::read_bounded;

/// Certificates of some authorities.
const MAX_CA_BYTES: u64 = 256 * 1024;
/// A password is a line.
const MAX_PASSWORD_BYTES: u64 = 1024;

/// Each with its field.
pub(super) fn mistakes(broker: &BrokerConfig) -> Vec<(&'static str, String)> {
    let mut mistakes = Vec::new();
    if let Some(path) = &broker.ca {
        if broker.url.starts_with("mqtt://") && !broker.by_coordinator {
            let what =
                "has no use with mqtt://, which is not encrypted: use mqtts:// in broker.url";
            mistakes.push(("ca", what.into()));
        }
        if let Err(why) = roots(path) {
            mistakes.push(("ca", why));
        }
    }
    match (&broker.user, &broker.password_file) {
        (None, None) => {}
        (Some(_), None) => mistakes.push(("user", "needs broker.password_file, too".into())),
        (None, Some(_)) => mistakes.push(("password_file", "needs broker.user, too".into())),
        (Some(user), Some(path)) => {
            if user.is_empty() {
                mistakes.push(("user", "is empty".into()));
            }
            if let Err(why) = password(path) {
                mistakes.push(("password_file", why));
            }
        }
    }
    mistakes
}

/// Who is trusted to have signed the broker's certificate.
///
/// # Errors
/// Says what is wrong with the file.
pub(crate) fn roots(path: &Path) -> Result<Arc<RootCertStore>, String> {
    let wrong = |why: &dyn std::fmt::Display| {
        format!(
            "{}: {why}; it is a file with the certificates, in PEM, of who signed the broker's",
            path.display()
        )
    };
    let pem = read_bounded(path, MAX_CA_BYTES).map_err(|e| wrong(&e))?;
    let mut roots = RootCertStore::empty();
    for one in CertificateDer::pem_slice_iter(&pem) {
        let one = one.map_err(|e| wrong(&e))?;
        roots.add(one).map_err(|e| wrong(&e))?;
    }
    if roots.is_empty() {
        return Err(wrong(&"there is no certificate in it"));
    }
    Ok(Arc::new(roots))
}

/// The password, from a file that others cannot read.
///
/// # Errors
/// Says what is wrong with the file.
pub(crate) fn password(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let failed = |error: io::Error| format!("{shown}: {error}");
    let mode = std::fs::metadata(path)
        .map_err(failed)?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        return Err(format!(
            "{shown} can be read by others (mode {:o}); mend it with: chmod 600 {shown}",
            mode & 0o777
        ));
    }
    let bytes = read_bounded(path, MAX_PASSWORD_BYTES).map_err(failed)?;
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    if text.is_empty() {
        return Err(format!("{shown} is empty"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    #[test]
    fn each_mistake_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let word = dir.path().join("word");
        std::fs::write(&word, "a secret\n").unwrap();
        std::fs::set_permissions(&word, Permissions::from_mode(0o644)).unwrap();
        let said = |text: &str| {
            let config = super::super::Config::parse(&format!("[broker]\n{text}"));
            config.map_or_else(|e| e.to_string(), |_| String::new())
        };
        let shown = word.display();
        let open = said(&format!(
            "url = 'mqtt://127.0.0.1'\nuser = 'd1'\npassword_file = '{shown}'"
        ));
        assert!(open.contains("chmod 600"), "{open}");
        std::fs::set_permissions(&word, Permissions::from_mode(0o600)).unwrap();
        assert_eq!(password(&word).unwrap(), "a secret");
        for (text, why) in [
            (
                "user = 'd1'".to_owned(),
                "broker.user: needs broker.password_file",
            ),
            (format!("password_file = '{shown}'"), "needs broker.user"),
            (format!("ca = '{shown}'"), "no certificate in it"),
            (format!("ca = '{shown}'"), "has no use with mqtt://"),
            ("ca = '/nowhere/ca.pem'".into(), "/nowhere/ca.pem"),
            (
                format!("url = 'mqtt://b'\nuser = 'd1'\npassword_file = '{shown}'"),
                "a password can be read on the way",
            ),
            (
                format!("url = 'mqtts://b'\nuser = 'd1'\npassword_file = '{shown}'"),
                "needs the device to have an identity",
            ),
        ] {
            let said = said(&text);
            assert!(said.contains(why), "{text}: {said}");
        }
        let local = format!("url = 'mqtt://127.0.0.1'\nuser = 'd1'\npassword_file = '{shown}'");
        assert_eq!(said(&local), "");
    }
}

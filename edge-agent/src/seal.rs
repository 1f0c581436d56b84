//! What lies on the disk, unreadable to whoever takes the disk and not the key.
//!
//! ```text
//! magic "LWS1" | nonce, 12 bytes | AES-256-GCM of the bytes, with what they are as associated data | tag, 16 bytes
//! ```
//!
//! The key is 32 random bytes in a file that something else protects: a TPM by way of systemd's credentials, a key ring, a stick. A
//! key beside the data is worth nothing. Nonces are random: a key is good for 2³² writes (NIST SP 800-38D, 8.3), at ten a second for 13
//! years.

use std::{
    fmt, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};

use crate::update::disk::{read_bounded, replace};

const MAGIC: &[u8; 4] = b"LWS1";
const KEY_BYTES: usize = 32;
/// The key in hexadecimal, and the end of a line.
const MAX_KEY_FILE: u64 = 2 * KEY_BYTES as u64 + 2;
/// What a sealed text is longer than the plain one by.
pub const OVERHEAD: usize = MAGIC.len() + NONCE_LEN + 16;
/// Says that a folder is sealed, and with which key.
const MARKER: &str = "sealed";
const KNOWN: &[u8] = b"lacewing at rest";
/// Far more than a marker has.
const MAX_MARKER: u64 = 1_024;

/// Why the device's data cannot be sealed or opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The file with the key.
    #[error("storage.key_file: {path}: {why}")]
    Key {
        /// Where it should be.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// There is sealed data, and no key is configured.
    #[error(
        "the data in {0} is encrypted: set storage.key_file to its key, or move the folder away to begin anew"
    )]
    NoKey(PathBuf),
    /// There is sealed data, and the key is another one.
    #[error(
        "the data in {0} is encrypted with another key than that in storage.key_file: give it that one, or move the folder away to begin anew"
    )]
    OtherKey(PathBuf),
    /// The marker cannot be read or written.
    #[error("{0}: {1}")]
    Marker(PathBuf, io::Error),
    /// The system gives no random numbers.
    #[error("nothing can be encrypted: there are no random numbers")]
    NoRandom,
}

/// Seals what is written, if there is a key, and opens what was sealed.
#[derive(Clone, Default)]
pub struct Seal(Option<Arc<RandomizedNonceKey>>);

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_on = self.is_on();
        f.debug_struct("Seal").field("is_on", &is_on).finish()
    }
}

impl Seal {
    /// Nothing is sealed.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// The seal of the data in `folder`: with the key in `key_file`, if one is given.
    ///
    /// # Errors
    /// If the key cannot be had, or is not that of the data.
    pub fn open(key_file: Option<&Path>, folder: &Path) -> Result<Self, SealError> {
        let (seal, is_new) = Self::look(key_file, folder)?;
        if is_new {
            let sealed = seal.wrap(MARKER, KNOWN.to_vec())?;
            let written = replace(folder, MARKER, &sealed);
            written
                .map_err(|error| SealError::Marker(folder.join(MARKER), io::Error::other(error)))?;
        }
        Ok(seal)
    }

    /// The same without writing anything; says whether the folder is to be marked.
    ///
    /// # Errors
    /// As [`Seal::open`].
    pub(crate) fn look(key_file: Option<&Path>, folder: &Path) -> Result<(Self, bool), SealError> {
        let marker = folder.join(MARKER);
        let trouble = |error| SealError::Marker(marker.clone(), error);
        let marked = match read_bounded(&marker, MAX_MARKER) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(trouble(error)),
        };
        let folder = folder.to_owned();
        let Some(path) = key_file else {
            return match marked {
                Some(_) => Err(SealError::NoKey(folder)),
                None => Ok((Self::none(), false)),
            };
        };
        let seal = Self::with(&key(path)?)?;
        match marked {
            Some(marked) => match seal.unwrap(MARKER, marked).as_deref() {
                Some(KNOWN) => Ok((seal, false)),
                _ => Err(SealError::OtherKey(folder)),
            },
            None => Ok((seal, true)),
        }
    }

    pub(crate) fn with(key: &[u8]) -> Result<Self, SealError> {
        let key = RandomizedNonceKey::new(&AES_256_GCM, key).map_err(|_| SealError::NoRandom)?;
        Ok(Self(Some(Arc::new(key))))
    }

    /// Is there a key?
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Are these bytes sealed, with whatever key?
    #[must_use]
    pub fn is_sealed(bytes: &[u8]) -> bool {
        bytes.starts_with(MAGIC)
    }

    /// Seals bytes that are `what`; as they are, where there is no key.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn wrap(&self, what: &str, mut bytes: Vec<u8>) -> Result<Vec<u8>, SealError> {
        let Some(key) = &self.0 else {
            return Ok(bytes);
        };
        let sealed = key.seal_in_place_append_tag(Aad::from(what.as_bytes()), &mut bytes);
        let nonce = sealed.map_err(|_| SealError::NoRandom)?;
        let mut out = Vec::with_capacity(bytes.len() + OVERHEAD);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(nonce.as_ref());
        out.extend_from_slice(&bytes);
        Ok(out)
    }

    /// Opens what [`wrap`](Self::wrap) gave for the same `what`; what was never sealed is given as it is. Nothing where it was
    /// changed, is something else, or there is no key.
    #[must_use]
    pub fn unwrap(&self, what: &str, bytes: Vec<u8>) -> Option<Vec<u8>> {
        let Some(sealed) = bytes.strip_prefix(MAGIC) else {
            return Some(bytes);
        };
        let key = self.0.as_ref()?;
        let (nonce, text) = sealed.split_first_chunk::<{ NONCE_LEN }>()?;
        let mut text = text.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let length = key
            .open_in_place(nonce, Aad::from(what.as_bytes()), &mut text)
            .ok()?
            .len();
        text.truncate(length);
        Some(text)
    }
}

/// The key in a file: 32 bytes, or their 64 hexadecimal digits.
fn key(path: &Path) -> Result<Vec<u8>, SealError> {
    let wrong = |why: String| SealError::Key {
        path: path.to_owned(),
        why,
    };
    let mode = std::fs::metadata(path)
        .map_err(|error| wrong(error.to_string()))?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        return Err(wrong(
            "others can read it: chmod 600, or nobody is kept out".into(),
        ));
    }
    let bytes = read_bounded(path, MAX_KEY_FILE).map_err(|error| wrong(error.to_string()))?;
    if bytes.len() == KEY_BYTES {
        return Ok(bytes);
    }
    let text = str::from_utf8(&bytes).map(str::trim).unwrap_or_default();
    let digits = || {
        let pairs = text.as_bytes().chunks_exact(2);
        pairs
            .map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok())
            .collect::<Option<Vec<u8>>>()
    };
    let is_hex = text.len() == 2 * KEY_BYTES && text.bytes().all(|b| b.is_ascii_hexdigit());
    is_hex.then(digits).flatten().ok_or_else(|| {
        wrong(format!(
            "it has {} bytes; a key is 32 random ones, or their 64 hexadecimal digits (openssl rand -hex 32)",
            bytes.len()
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn key_file(folder: &Path, name: &str, text: &[u8]) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    #[test]
    fn what_is_sealed_is_opened_by_its_key_only() {
        let seal = Seal::with(&[7; 32]).unwrap();
        let sealed = seal.wrap("a", b"hello".to_vec()).unwrap();
        assert_eq!(sealed.len(), 5 + OVERHEAD);
        assert!(!sealed.windows(5).any(|w| w == b"hello"));
        assert_eq!(
            seal.unwrap("a", sealed.clone()).as_deref(),
            Some(&b"hello"[..])
        );
        assert_eq!(seal.unwrap("b", sealed.clone()), None, "something else");
        let other = Seal::with(&[8; 32]).unwrap();
        assert_eq!(other.unwrap("a", sealed.clone()), None);
        assert_eq!(Seal::none().unwrap("a", sealed.clone()), None);
        for at in 4..sealed.len() {
            let mut bent = sealed.clone();
            bent[at] ^= 1;
            assert_eq!(seal.unwrap("a", bent), None, "byte {at}");
        }
        // Twice the same is never twice the same.
        assert_ne!(seal.wrap("a", b"hello".to_vec()).unwrap(), sealed);
        // What was there before the key.
        assert_eq!(
            seal.unwrap("a", b"{}".to_vec()).as_deref(),
            Some(&b"{}"[..])
        );
        assert_eq!(seal.unwrap("a", b"LWS1".to_vec()), None);
    }

    #[test]
    fn a_sealed_folder_wants_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        fs::create_dir(&data).unwrap();
        let own = key_file(dir.path(), "own", &[1; 32]);
        let hex = key_file(
            dir.path(),
            "hex",
            format!("{}\n", "01".repeat(32)).as_bytes(),
        );
        let other = key_file(dir.path(), "other", &[2; 32]);
        assert!(!Seal::open(None, &data).unwrap().is_on());
        assert!(Seal::open(Some(&own), &data).unwrap().is_on());
        assert!(Seal::open(Some(&hex), &data).unwrap().is_on());
        let without = Seal::open(None, &data).unwrap_err();
        assert!(without.to_string().contains("set storage.key_file"));
        let wrong = Seal::open(Some(&other), &data).unwrap_err();
        assert!(wrong.to_string().contains("another key"), "{wrong}");
    }

    #[test]
    fn a_key_that_is_none_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let said = |path: &Path| Seal::open(Some(path), dir.path()).unwrap_err().to_string();
        assert!(said(&dir.path().join("nowhere")).contains("No such file"));
        let short = key_file(dir.path(), "short", b"1234");
        assert!(said(&short).contains("openssl rand -hex 32"));
        let hex = "zz".repeat(32);
        assert!(said(&key_file(dir.path(), "zz", hex.as_bytes())).contains("64 hexadecimal"));
        let open = key_file(dir.path(), "open", &[1; 32]);
        fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(said(&open).contains("chmod 600"));
    }
}

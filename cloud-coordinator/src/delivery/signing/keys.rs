//! Files of private keys.
//!
//! A key is an Ed25519 key pair in PKCS#8 DER, as the cryptographic library writes it, in a file that only
//! its owner may read. `ROLE-ID.key` in the folder of keys says what it was made for; what it may sign is
//! said by the root metadata alone. A key's public half travels as JSON.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use aws_lc_rs::{rand::SystemRandom, signature::Ed25519KeyPair};
use tough::{
    key_source::{KeySource, LocalKeySource},
    schema::{RoleType, key::Key},
    sign::{Sign, parse_keypair},
};

use super::{
    SigningError,
    disk::{Disk, failed, names, read},
};

/// An RSA key of 8192 bits in PEM has 6.4 kB: nothing larger is a key.
const MAX_KEY_BYTES: usize = 16 * 1024;
/// Hex digits of a key's identity in the name of its file: no two keys of one owner share 64 bits.
const ID_DIGITS: usize = 16;

/// The hex form of a key's identity.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The identity of a key.
pub(super) fn key_id(key: &Key) -> Result<String, SigningError> {
    let id = key
        .key_id()
        .map_err(|error| SigningError::Key("this key".into(), error.to_string()))?;
    Ok(hex(&id))
}

/// Reads the public half of a key from its private file.
///
/// # Errors
/// Not a key.
pub fn public_of(path: &Path) -> Result<Key, SigningError> {
    let bytes = read(path)?;
    let name = path.display().to_string();
    if bytes.len() > MAX_KEY_BYTES {
        return Err(SigningError::Key(name, "it is too large for a key".into()));
    }
    match parse_keypair(&bytes) {
        Ok(pair) => Ok(pair.tuf_key()),
        Err(error) => Err(SigningError::Key(name, error.to_string())),
    }
}

/// Reads the public half of a key from the JSON in which it travels.
///
/// # Errors
/// Not a public key.
pub fn public_from_json(json: &[u8]) -> Result<Key, SigningError> {
    let bad = |detail: String| SigningError::Key("the public key".into(), detail);
    if json.len() > MAX_KEY_BYTES {
        return Err(bad("it is too large for a key".into()));
    }
    serde_json::from_slice(json).map_err(|error| bad(error.to_string()))
}

/// Makes a key in a folder, for example on a machine that is never online. Says the file and the public half.
///
/// # Errors
/// The disk.
pub fn generate(folder: &Path, role: RoleType) -> Result<(PathBuf, Key), SigningError> {
    let no_key = |error: String| SigningError::Key(format!("a new {role} key"), error);
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
        .map_err(|error| no_key(error.to_string()))?;
    let pair = parse_keypair(document.as_ref()).map_err(|error| no_key(error.to_string()))?;
    let key = pair.tuf_key();
    let mut id = key_id(&key)?;
    id.truncate(ID_DIGITS);
    let path = folder.join(format!("{role}-{id}.key"));
    Disk::new(folder.to_owned(), None).put(&path, document.as_ref(), 0o600)?;
    let private = fs::Permissions::from_mode(0o700);
    fs::set_permissions(folder, private).map_err(failed("protect", folder))?;
    Ok((path, key))
}

/// The keys that are at hand.
#[derive(Clone, Debug)]
pub(super) struct KeyRing {
    folder: PathBuf,
    /// Files named on the command line.
    extra: Vec<PathBuf>,
}

impl KeyRing {
    pub(super) const fn new(folder: PathBuf) -> Self {
        let extra = Vec::new();
        Self { folder, extra }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn add(&mut self, files: impl IntoIterator<Item = PathBuf>) {
        self.extra.extend(files);
    }

    /// Every file, those on the command line last.
    pub(super) fn files(&self) -> Result<Vec<PathBuf>, SigningError> {
        let mut files = Vec::new();
        for name in names(&self.folder)?.iter().filter(|n| n.ends_with(".key")) {
            let path = self.folder.join(name);
            let mode = fs::metadata(&path)
                .map_err(failed("read", &path))?
                .permissions()
                .mode();
            if mode & 0o077 != 0 {
                return Err(SigningError::KeyExposed(path));
            }
            files.push(path);
        }
        files.extend(self.extra.iter().cloned());
        Ok(files)
    }

    /// The key of a role that was made here, or a new one.
    pub(super) fn first(&self, role: RoleType) -> Result<Key, SigningError> {
        let made = format!("{role}-");
        let is_made = |name: &&String| name.starts_with(&made) && name.ends_with(".key");
        match names(&self.folder)?.iter().find(is_made) {
            Some(name) => public_of(&self.folder.join(name)),
            None => generate(&self.folder, role).map(|(_, key)| key),
        }
    }

    /// As the signing library wants them.
    pub(super) fn sources(&self) -> Result<Vec<Box<dyn KeySource>>, SigningError> {
        Ok(sources(&self.files()?))
    }
}

pub(super) fn sources(files: &[PathBuf]) -> Vec<Box<dyn KeySource>> {
    let source =
        |path: &PathBuf| Box::new(LocalKeySource { path: path.clone() }) as Box<dyn KeySource>;
    files.iter().map(source).collect()
}

//! The device's identity on its disk.
//!
//! ```text
//! <data>/identity/key.pem      the private key, made here, never sent; mode 0600; sealed where `storage.key_file` is set
//! <data>/identity/next.pem     the one that takes its place once the coordinator takes it: the old one was refused
//! <data>/identity/cert.pem     the device's certificate, then the authority's
//! <data>/identity/ca.pem       the authority's once more, for other programs
//! <data>/identity/state.json   where and how it was enrolled, and how late it is at least
//! ```
//!
//! Each file is replaced as a whole and durably. `cert.pem` is written last and decides: without it, or with one that
//! does not fit the key, the device is not enrolled. A power cut before that costs nothing, since a coordinator that is
//! asked again for the same token and key gives a certificate again.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use mesh_core::{Digest, Name, VERSION, enrolment::Validity};
use rcgen::{
    Attribute, CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256,
    PublicKeyData,
};
use rustls::pki_types::PrivateKeyDer;
use serde::{Deserialize, Serialize};

use super::{
    certificate::{Chain, Facts},
    error::IdentityError,
};
use crate::{
    config::Config,
    seal::Seal,
    update::disk::{DiskError, cannot, read_bounded, replace},
};

const KEY: &str = "key.pem";
const NEXT: &str = "next.pem";
const CERTIFICATE: &str = "cert.pem";
const AUTHORITY: &str = "ca.pem";
const STATE: &str = "state.json";
/// What a signing request says beside the name: `challengePassword` of PKCS #9.
const CHALLENGE: &[u64] = &[1, 2, 840, 113_549, 1, 9, 7];
/// What a sealed key is, to the seal: the next one becomes the key by its name alone.
const SEALED_AS: &str = "identity key";
/// Two certificates are below 3 KiB, the state below 1 KiB.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// What is noted beside the certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Notes {
    /// Version of the format, [`VERSION`].
    v: u8,
    /// Who the device is.
    pub(crate) site: Name,
    pub(crate) device: Name,
    /// The coordinator.
    pub(crate) url: String,
    /// Its broker, as it says itself.
    pub(crate) mqtt: Option<String>,
    /// It is later than this.
    pub(crate) floor_ms: i64,
    /// When this certificate is to be renewed.
    certificate: Digest,
    renew_after_ms: i64,
    /// The token that the device was enrolled with.
    pub(super) token: Option<Digest>,
    /// Why the coordinator gives it no certificate any more.
    #[serde(default)]
    pub(super) refused: Option<String>,
}

impl Notes {
    pub(super) fn new(
        who: (&Name, &Name),
        url: &str,
        mqtt: Option<String>,
        floor_ms: i64,
        token: Option<Digest>,
    ) -> Self {
        Self {
            v: VERSION,
            site: who.0.clone(),
            device: who.1.clone(),
            url: url.to_owned(),
            mqtt,
            floor_ms,
            certificate: Digest([0; 32]),
            renew_after_ms: 0,
            token,
            refused: None,
        }
    }
}

/// An enrolled device.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) notes: Notes,
    pub(super) chain: Chain,
    pub(super) validity: Validity,
}

/// The value of a `challengePassword` in DER: a set of one text.
fn set_of(text: &str) -> Vec<u8> {
    const SET: u8 = 0x31;
    const UTF8: u8 = 0x0c;
    let wrapped = |tag: u8, content: &[u8]| match u8::try_from(content.len()) {
        Ok(short @ 0..0x80) => [&[tag, short], content].concat(),
        Ok(long) => [&[tag, 0x81, long], content].concat(),
        // No challenge that is signed has as many.
        Err(_) => Vec::new(),
    };
    wrapped(SET, &wrapped(UTF8, text.as_bytes()))
}

/// The private key.
pub(super) struct Key(KeyPair);

impl Key {
    /// A request for a certificate of this name. The signature is over the challenge, too, if there is one.
    pub(super) fn request(
        &self,
        name: &str,
        challenge: Option<&str>,
    ) -> Result<String, IdentityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let challenge = challenge.map(|text| Attribute {
            oid: CHALLENGE,
            values: set_of(text),
        });
        params
            .serialize_request_with_attributes(&self.0, challenge.into_iter().collect())
            .and_then(|request| request.pem())
            .map_err(|error| IdentityError::Make("a request for a certificate", error))
    }

    /// The public key, with the algorithm.
    pub(super) fn public(&self) -> Vec<u8> {
        self.0.subject_public_key_info()
    }

    /// For TLS.
    pub(super) fn private(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.0.serialize_der().into())
    }
}

/// The folder.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    folder: PathBuf,
    seal: Seal,
}

impl Disk {
    /// For what is no secret.
    pub(super) fn of(data: &Path) -> Self {
        Self {
            folder: data.join("identity"),
            seal: Seal::none(),
        }
    }

    /// With what its keys are sealed with.
    pub(super) fn open(config: &Config) -> Result<Self, IdentityError> {
        let (seal, _) = Seal::look(config.storage.key_file.as_deref(), &config.data)?;
        Ok(Self {
            seal,
            ..Self::of(&config.data)
        })
    }

    /// Seals the keys that were made before there was something to seal them with.
    pub(super) fn seal_keys(&self) -> Result<(), IdentityError> {
        for name in [KEY, NEXT] {
            let path = self.folder.join(name);
            match read_bounded(&path, MAX_FILE_BYTES) {
                Ok(bytes) if self.seal.is_on() && !Seal::is_sealed(&bytes) => {
                    self.write_private(name, bytes)?;
                    tracing::info!(path = %path.display(), "the device's private key is encrypted on the disk now");
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(cannot("read", &path)(error).into()),
            }
        }
        Ok(())
    }

    pub(super) fn certificate_path(&self) -> PathBuf {
        self.folder.join(CERTIFICATE)
    }

    /// The key, if there is one. Refuses one that others can read.
    pub(super) fn key(&self) -> Result<Option<Key>, IdentityError> {
        self.key_in(KEY)
    }

    /// The key that is to take its place, made if there is none.
    pub(super) fn next_key(&self) -> Result<Key, IdentityError> {
        match self.key_in(NEXT)? {
            Some(key) => Ok(key),
            None => self.make(NEXT),
        }
    }

    /// The next key takes the place of the key.
    pub(super) fn adopt_next(&self) -> Result<(), DiskError> {
        let next = self.folder.join(NEXT);
        fs::rename(&next, self.folder.join(KEY)).map_err(cannot("rename", &next))?;
        let folder = fs::File::open(&self.folder).and_then(|folder| folder.sync_all());
        folder.map_err(cannot("write", &self.folder))
    }

    fn key_in(&self, name: &str) -> Result<Option<Key>, IdentityError> {
        let path = self.folder.join(name);
        let mode = match fs::metadata(&path) {
            Ok(data) => data.permissions().mode() & 0o777,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(cannot("read", &path)(error).into()),
        };
        if mode & 0o077 != 0 {
            return Err(IdentityError::Exposed { path, mode });
        }
        let bytes = read_bounded(&path, MAX_FILE_BYTES).map_err(cannot("read", &path))?;
        let sealed =
            || "it is encrypted, and storage.key_file is not set, or another key".to_owned();
        let key = self
            .seal
            .unwrap(SEALED_AS, bytes)
            .ok_or_else(sealed)
            .and_then(|bytes| String::from_utf8(bytes).map_err(|_| "it is no text".to_owned()))
            .and_then(|text| KeyPair::from_pem(&text).map_err(|error| error.to_string()));
        match key {
            Ok(key) => Ok(Some(Key(key))),
            Err(why) => Err(IdentityError::Key { path, why }),
        }
    }

    /// Makes a key and keeps it, durably, before anybody sees its public half.
    pub(super) fn make_key(&self) -> Result<Key, IdentityError> {
        self.make(KEY)
    }

    fn make(&self, name: &str) -> Result<Key, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
            .map_err(|error| IdentityError::Make("a private key", error))?;
        self.prepare()?;
        self.write_private(name, key.serialize_pem().into_bytes())?;
        Ok(Key(key))
    }

    /// Replaces a file that nobody else may read, durably.
    fn write_private(&self, name: &str, bytes: Vec<u8>) -> Result<(), IdentityError> {
        let bytes = self.seal.wrap(SEALED_AS, bytes)?;
        // Private from its first moment: what replaces it keeps the mode.
        let fresh = self.folder.join(format!("{name}.new"));
        let opened = match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&fresh),
        };
        opened.map_err(cannot("write", &fresh))?;
        Ok(replace(&self.folder, name, &bytes)?)
    }

    fn prepare(&self) -> Result<(), DiskError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(cannot("make", &self.folder))
    }

    /// What is noted, whether or not there is a certificate with it.
    pub(super) fn notes(&self) -> Option<Notes> {
        let bytes = read_bounded(&self.folder.join(STATE), MAX_FILE_BYTES).ok()?;
        let notes: Notes = serde_json::from_slice(&bytes).ok()?;
        (notes.v == VERSION).then_some(notes)
    }

    /// The certificate that fits this key, if there is one.
    pub(super) fn stored(&self, key: &Key) -> Option<Stored> {
        let bytes = match read_bounded(&self.certificate_path(), MAX_FILE_BYTES) {
            Ok(bytes) => bytes,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    let path = self.certificate_path();
                    tracing::error!(path = %path.display(), %error, "the device's certificate cannot be read");
                }
                return None;
            }
        };
        let read = Chain::parse(&bytes).and_then(|chain| {
            let facts = Facts::of(&chain.leaf)?;
            if facts.public_key != key.public() {
                return Err("it is for another key than the device's".into());
            }
            let names = facts.name.split_once('/');
            let (site, device) = names.ok_or("it names no device")?;
            let name = |text: &str| text.parse::<Name>().map_err(|error| error.to_string());
            Ok((chain, facts.clone(), name(site)?, name(device)?))
        });
        match read {
            Ok((chain, facts, site, device)) => {
                let digest = models::digest_of(&chain.leaf);
                // Without notes that fit, the certificate still says when and for whom it was made.
                let known = self
                    .notes()
                    .filter(|notes| (&notes.site, &notes.device) == (&site, &device));
                let renew_after_ms = known
                    .as_ref()
                    .filter(|notes| notes.certificate == digest)
                    .map(|notes| notes.renew_after_ms);
                let mut notes = known.unwrap_or_else(|| {
                    Notes::new((&site, &device), "", None, facts.not_before_ms, None)
                });
                notes.floor_ms = notes.floor_ms.max(facts.not_before_ms);
                Some(Stored {
                    notes,
                    chain,
                    validity: facts.validity(renew_after_ms),
                })
            }
            Err(why) => {
                let path = self.certificate_path();
                tracing::error!(path = %path.display(), "the device's certificate is not used: {why}");
                None
            }
        }
    }

    /// Keeps a certificate and what belongs to it, durably: `chain` and `ca` are the same as PEM.
    pub(super) fn store(&self, stored: &Stored, chain: &str, ca: &str) -> Result<(), DiskError> {
        self.prepare()?;
        self.note(stored)?;
        replace(&self.folder, AUTHORITY, ca.as_bytes())?;
        replace(&self.folder, CERTIFICATE, chain.as_bytes())
    }

    /// Keeps what belongs to the certificate.
    pub(super) fn note(&self, stored: &Stored) -> Result<(), DiskError> {
        let notes = Notes {
            certificate: models::digest_of(&stored.chain.leaf),
            renew_after_ms: stored.validity.renew_after_ms,
            ..stored.notes.clone()
        };
        let bytes = serde_json::to_vec(&notes)
            .map_err(io::Error::other)
            .map_err(cannot("write", &self.folder.join(STATE)))?;
        replace(&self.folder, STATE, &bytes)
    }
}

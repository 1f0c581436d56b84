//! Why the device's identity cannot be used.

use std::path::PathBuf;

use crate::{seal::SealError, update::disk::DiskError};

/// Why the device's identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Others can read the private key.
    #[error(
        "the private key {path} can be read by others (mode {mode:o}): anybody who copied it can pose as this device. Run \
         `chmod 600 {path}`; if somebody may have copied it, revoke the device at the coordinator, delete the file and \
         enrol anew", path = path.display()
    )]
    Exposed {
        /// The key's file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The private key is no key.
    #[error(
        "the private key {path} cannot be used: {why}. Move it away, and the device makes a new one; it must then be \
         enrolled anew, with a new token", path = path.display()
    )]
    Key {
        /// The key's file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A key or a request for a certificate cannot be made.
    #[error("cannot make {0}: {1}")]
    Make(&'static str, rcgen::Error),
    /// The certificate is of another device than the configuration.
    #[error(
        "the certificate in {path} is of {certificate}, the configuration is of {device}: correct `site` and `device`, or \
         enrol the device anew with a token for its new site", path = path.display()
    )]
    Other {
        /// The certificate's file.
        path: PathBuf,
        /// Who it is of.
        certificate: String,
        /// Who the configuration names.
        device: String,
    },
    /// TLS does not take the key or the certificate.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// What the key is encrypted with.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

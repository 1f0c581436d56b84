//! What others send to the coordinator, parser by parser, as plain functions that come back whatever the bytes are: for
//! `fuzz/targets.rs`, and for nobody else.

use crate::trust::csr::Csr;
pub use crate::{broker::fuzzed::packets, exchange::fuzzed::import};

/// A request for a certificate.
pub fn request(bytes: &[u8]) {
    if let Ok(pem) = std::str::from_utf8(bytes)
        && let Ok(csr) = Csr::read(pem)
    {
        assert_ne!(csr.fingerprint, [0; 32]);
    }
}

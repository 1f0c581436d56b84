//! Who may come in now: what the doors ask at every handshake, in memory.

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
};

use tokio_util::sync::CancellationToken;

use super::{csr::Fingerprint, principal::PeerDevice};

/// A device that may come in now.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) device: PeerDevice,
    /// Ends every connection of the device when it is revoked.
    pub(crate) cut: CancellationToken,
}

/// Who may come in now, by key.
#[derive(Debug, Default)]
pub(crate) struct Active {
    by_key: RwLock<HashMap<Fingerprint, Peer>>,
}

impl Active {
    pub(crate) fn find(&self, key: &Fingerprint) -> Option<Peer> {
        let all = self.by_key.read().unwrap_or_else(PoisonError::into_inner);
        all.get(key).cloned()
    }

    pub(super) fn count(&self) -> usize {
        let all = self.by_key.read().unwrap_or_else(PoisonError::into_inner);
        all.len()
    }

    pub(super) fn add(&self, key: Fingerprint, device: PeerDevice) {
        let mut all = self.by_key.write().unwrap_or_else(PoisonError::into_inner);
        all.entry(key).or_insert_with(|| Peer {
            device,
            cut: CancellationToken::new(),
        });
    }

    pub(super) fn cut(&self, key: &Fingerprint) {
        let mut all = self.by_key.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = all.remove(key) {
            peer.cut.cancel();
        }
    }
}

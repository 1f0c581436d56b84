//! The coordinator as a meeting place: it is told where this device is reached, and says where others are.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::meeting::{Meeting, written};
use tokio::sync::watch;

/// Between the uplink and the node. Copies are the same.
#[derive(Clone, Debug)]
pub(crate) struct MeetingPlace {
    own: Arc<watch::Sender<String>>,
    others: Arc<watch::Sender<Meeting>>,
}

impl Default for MeetingPlace {
    fn default() -> Self {
        Self {
            own: Arc::new(watch::Sender::default()),
            others: Arc::new(watch::channel(Meeting::none()).0),
        }
    }
}

impl MeetingPlace {
    /// Neighbours reach this device there.
    pub(super) fn listens(&self, addresses: impl Iterator<Item = SocketAddr>) {
        let text = written(addresses);
        self.own.send_if_modified(|own| {
            let is_new = *own != text;
            if is_new {
                *own = text;
            }
            is_new
        });
    }

    /// Where that is, for the coordinator; empty while it is not known. Tells of each change.
    pub(crate) fn own(&self) -> watch::Receiver<String> {
        self.own.subscribe()
    }

    /// The coordinator has said where others are.
    ///
    /// # Errors
    /// In words, if it is nothing of the kind.
    pub(crate) fn heard(&self, payload: &[u8]) -> Result<(), String> {
        let meeting = Meeting::decode(payload).map_err(|error| error.to_string())?;
        self.others.send_replace(meeting);
        Ok(())
    }

    /// What it said last. Tells of each new word.
    pub(super) fn others(&self) -> watch::Receiver<Meeting> {
        self.others.subscribe()
    }
}

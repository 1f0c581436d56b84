//! Nobody outside the roster gets past the handshake.
//!
//! The Noise handshake proves that the other one has the key of its `PeerId`. Whether that key is on the roster is looked
//! up as its last step, on both sides, before anything else is spoken: no multiplexer, no protocol, no byte of theirs.

use std::pin::Pin;

use libp2p::{
    PeerId,
    core::{
        UpgradeInfo,
        upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade},
    },
    noise,
};

use super::{names::peer, roster::Rosters};
use crate::counters::Counters;

/// [`noise`], and a look at the roster.
#[derive(Clone)]
pub(super) struct Admission {
    pub(super) noise: noise::Config,
    pub(super) rosters: Rosters,
    pub(super) counters: Counters,
}

/// Why somebody is not spoken with.
#[derive(Debug, thiserror::Error)]
pub(super) enum Turned {
    #[error(transparent)]
    Noise(#[from] noise::Error),
    /// It has a key, but that is on no roster that this device knows.
    #[error("{0} is not on the roster")]
    Stranger(PeerId),
}

impl UpgradeInfo for Admission {
    type Info = <noise::Config as UpgradeInfo>::Info;
    type InfoIter = <noise::Config as UpgradeInfo>::InfoIter;

    fn protocol_info(&self) -> Self::InfoIter {
        self.noise.protocol_info()
    }
}

type Done<T> = Pin<Box<dyn Future<Output = Result<T, Turned>> + Send>>;

impl Admission {
    fn look<T>(self, (id, io): (PeerId, T)) -> Result<(PeerId, T), Turned> {
        if peer(&id).is_some_and(|peer| self.rosters.admits(&peer)) {
            Ok((id, io))
        } else {
            self.counters.strangers.add(1);
            Err(Turned::Stranger(id))
        }
    }
}

impl<T> InboundConnectionUpgrade<T> for Admission
where
    noise::Config:
        InboundConnectionUpgrade<T, Output = (PeerId, noise::Output<T>), Error = noise::Error>,
    <noise::Config as InboundConnectionUpgrade<T>>::Future: Send + 'static,
    T: Send + 'static,
{
    type Output = (PeerId, noise::Output<T>);
    type Error = Turned;
    type Future = Done<Self::Output>;

    fn upgrade_inbound(self, socket: T, info: Self::Info) -> Self::Future {
        let shaken = self.noise.clone().upgrade_inbound(socket, info);
        Box::pin(async move { self.look(shaken.await?) })
    }
}

impl<T> OutboundConnectionUpgrade<T> for Admission
where
    noise::Config:
        OutboundConnectionUpgrade<T, Output = (PeerId, noise::Output<T>), Error = noise::Error>,
    <noise::Config as OutboundConnectionUpgrade<T>>::Future: Send + 'static,
    T: Send + 'static,
{
    type Output = (PeerId, noise::Output<T>);
    type Error = Turned;
    type Future = Done<Self::Output>;

    fn upgrade_outbound(self, socket: T, info: Self::Info) -> Self::Future {
        let shaken = self.noise.clone().upgrade_outbound(socket, info);
        Box::pin(async move { self.look(shaken.await?) })
    }
}

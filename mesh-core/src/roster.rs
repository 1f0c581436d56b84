//! Which devices of a site trust one another: the coordinator's word, carried by anybody.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::{Digest, Name};

/// Devices on one roster. More make a site that is better cut into several: each would have to keep all in memory.
pub const MAX_MEMBERS: usize = 2_000;
/// A signed roster: each member takes less than 200 bytes of it, in base64.
pub const MAX_ROSTER_BYTES: usize = 512 * 1024;

/// A device as its neighbours know it: the SHA-256 that its libp2p `PeerId` carries, of the public key's protobuf
/// encoding (libp2p specification "Peer Ids and Keys").
pub type Peer = Digest;

/// A device that neighbours may speak with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name.
    pub device: Name,
    /// Its key.
    pub peer: Peer,
}

/// What the coordinator signs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster {
    /// [`crate::VERSION`]
    pub v: u8,
    /// The site; devices of others are strangers.
    pub site: Name,
    /// Grows with each change. The newest wins, whoever carries it.
    pub version: u64,
    /// When it was signed: seconds since the Unix epoch.
    pub iat: i64,
    /// Until when it holds: seconds since the Unix epoch.
    pub exp: i64,
    /// Who is on it.
    pub members: Vec<Member>,
}

/// Why a roster is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RosterError {
    /// Of another version of the contract.
    #[error("it is of version {0}, this program knows {known}", known = crate::VERSION)]
    Version(u8),
    /// Of another site.
    #[error("it is of the site {0}")]
    Site(Name),
    /// It has run out.
    #[error("it has run out")]
    Expired,
    /// Larger than any.
    #[error("it has {0} members, more than {MAX_MEMBERS}")]
    Members(usize),
    /// One that is known is newer.
    #[error("version {0} is not newer than the one that is known")]
    Old(u64),
}

impl Roster {
    /// Is this one to be taken at `now_ms`, instead of one with the version `known`?
    ///
    /// # Errors
    /// [`RosterError`] says why not.
    pub fn check(&self, site: &Name, known: Option<u64>, now_ms: i64) -> Result<(), RosterError> {
        if self.v != crate::VERSION {
            return Err(RosterError::Version(self.v));
        }
        if self.site != *site {
            return Err(RosterError::Site(self.site.clone()));
        }
        if self.members.len() > MAX_MEMBERS {
            return Err(RosterError::Members(self.members.len()));
        }
        if !self.holds(now_ms) {
            return Err(RosterError::Expired);
        }
        if known.is_some_and(|known| known >= self.version) {
            return Err(RosterError::Old(self.version));
        }
        Ok(())
    }

    /// Does it still hold at `now_ms`?
    #[must_use]
    pub const fn holds(&self, now_ms: i64) -> bool {
        now_ms < self.exp.saturating_mul(1_000)
    }

    /// The name of a member.
    #[must_use]
    pub fn name_of(&self, peer: &Peer) -> Option<&Name> {
        let member = self.members.iter().find(|member| member.peer == *peer)?;
        Some(&member.device)
    }

    /// A name's key.
    #[must_use]
    pub fn peer_of(&self, device: &str) -> Option<Peer> {
        let member = self.members.iter().find(|m| m.device.as_str() == device)?;
        Some(member.peer)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    #[test]
    fn only_a_newer_one_of_this_site_that_holds() {
        let (hall, yard): (Name, Name) = ("hall".parse().unwrap(), "yard".parse().unwrap());
        let peer = Digest([1; 32]);
        let roster = Roster {
            v: 1,
            site: hall.clone(),
            version: 7,
            iat: 0,
            exp: 100,
            members: vec![Member {
                device: "d1".parse().unwrap(),
                peer,
            }],
        };
        assert_eq!(roster.check(&hall, Some(6), 99_999), Ok(()));
        assert_eq!(roster.check(&hall, None, 0), Ok(()));
        let wrong = [
            (roster.check(&yard, None, 0), RosterError::Site(hall.clone())),
            (roster.check(&hall, Some(7), 0), RosterError::Old(7)),
            (roster.check(&hall, None, 100_000), RosterError::Expired),
        ];
        for (said, why) in wrong {
            assert_eq!(said, Err(why));
        }
        let big = Roster {
            members: vec![roster.members[0].clone(); MAX_MEMBERS + 1],
            ..roster.clone()
        };
        assert_eq!(
            big.check(&hall, None, 0),
            Err(RosterError::Members(MAX_MEMBERS + 1))
        );
        let later = Roster { v: 2, ..roster.clone() };
        assert_eq!(later.check(&hall, None, 0), Err(RosterError::Version(2)));
        assert_eq!(roster.name_of(&peer).map(Name::as_str), Some("d1"));
        assert_eq!(roster.peer_of("d1"), Some(peer));
        assert_eq!(roster.peer_of("d2"), None);
    }
}

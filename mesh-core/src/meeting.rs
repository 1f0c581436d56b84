//! Where devices of a site may meet: addresses of some that are online, by the coordinator's word.
//!
//! It is not signed. Who answers at an address proves by the handshake that he is who is named here and is on the roster; one
//! that is wrong costs a dial.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    string::{String, ToString},
    vec::Vec,
};
use core::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{
    EventError, Name, VERSION,
    event::{parse, within},
};

/// Addresses in one message: the first that answers knows the others.
pub const MAX_PLACES: usize = 32;
/// Of one device: those of two networks.
pub const MAX_OWN: usize = 2;
/// The largest message: an address has at most 58 bytes, a name 64.
const MAX_BYTES: usize = 8 * 1024;

/// Said by the coordinator on the site's `meeting`; retained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meeting {
    /// Version of the message, [`VERSION`].
    pub v: u8,
    /// At most [`MAX_PLACES`].
    pub at: Vec<Place>,
}

/// Where a device is to be found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The device.
    pub device: Name,
    /// One of its addresses, `ADDRESS:PORT`.
    pub address: SocketAddr,
}

impl Meeting {
    /// Nobody.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            v: VERSION,
            at: Vec::new(),
        }
    }

    /// Some of the devices that are `online`, with what each says of itself in its `info`: from every network as many as from any
    /// other, and no others than `before` without need.
    #[must_use]
    pub fn of<'a>(online: impl Iterator<Item = (&'a Name, &'a str)>, before: &Self) -> Self {
        let mut rest: BTreeSet<Place> = online
            .flat_map(|(device, text)| {
                addresses(text).map(|address| Place {
                    device: device.clone(),
                    address,
                })
            })
            .collect();
        let before: BTreeSet<&Place> = before.at.iter().collect();
        let mut taken = BTreeMap::<[u8; 8], usize>::new();
        let mut at = Vec::new();
        while at.len() < MAX_PLACES {
            let next = rest.iter().min_by_key(|place| {
                let taken = taken.get(&network(place.address.ip())).copied();
                (taken.unwrap_or(0), !before.contains(place))
            });
            let Some(next) = next.cloned() else { break };
            rest.remove(&next);
            *taken.entry(network(next.address.ip())).or_default() += 1;
            at.push(next);
        }
        // The same devices are the same message.
        at.sort_unstable();
        Self { v: VERSION, at }
    }

    /// As JSON.
    ///
    /// # Errors
    /// If it is larger than any message of this kind may be.
    pub fn encode(&self) -> Result<Vec<u8>, EventError> {
        let bytes = serde_json::to_vec(self)?;
        within(bytes.len(), MAX_BYTES)?;
        Ok(bytes)
    }

    /// From JSON. Addresses that lead nowhere are left out, and those that are too many.
    ///
    /// # Errors
    /// If it is too large, or none.
    pub fn decode(bytes: &[u8]) -> Result<Self, EventError> {
        within(bytes.len(), MAX_BYTES)?;
        let mut meeting: Self = parse(bytes)?;
        if meeting.v != VERSION {
            return Err(EventError::Version(meeting.v));
        }
        meeting.at.retain(|place| leads_somewhere(&place.address));
        meeting.at.truncate(MAX_PLACES);
        Ok(meeting)
    }
}

/// The addresses in a device's `info`, separated by commas; at most [`MAX_OWN`]. What is none is left out.
pub fn addresses(text: &str) -> impl Iterator<Item = SocketAddr> {
    text.split(',')
        .filter_map(|one| one.parse().ok())
        .filter(leads_somewhere)
        .take(MAX_OWN)
}

/// The same, written.
#[must_use]
pub fn written(addresses: impl Iterator<Item = SocketAddr>) -> String {
    let texts = addresses.filter(leads_somewhere).take(MAX_OWN);
    let texts: Vec<_> = texts.map(|address| address.to_string()).collect();
    texts.join(",")
}

fn leads_somewhere(address: &SocketAddr) -> bool {
    let ip = address.ip();
    address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast()
}

/// What is usually one network: the first 24 bits of an IPv4 address, the first 64 of any other.
fn network(ip: IpAddr) -> [u8; 8] {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            [4, a, b, c, 0, 0, 0, 0]
        }
        IpAddr::V6(ip) => {
            let [a, b, c, d, e, f, g, h, ..] = ip.octets();
            [a, b, c, d, e, f, g, h]
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::format;

    use super::*;

    fn online(net: u8, from: u8, count: u8) -> Vec<(Name, String)> {
        let one = |n| {
            let name = format!("d{net}-{n}").parse().unwrap();
            (name, format!("10.0.{net}.{n}:7473"))
        };
        (from..from + count).map(one).collect()
    }

    fn meeting(all: &[(Name, String)], before: &Meeting) -> Meeting {
        Meeting::of(all.iter().map(|(n, a)| (n, a.as_str())), before)
    }

    fn of_net(meeting: &Meeting, net: u8) -> usize {
        let start = format!("10.0.{net}.");
        let is_in = |p: &&Place| p.address.to_string().starts_with(&start);
        meeting.at.iter().filter(is_in).count()
    }

    #[test]
    fn every_network_is_named_and_those_that_were_named_stay() {
        let mut all = online(1, 1, 100);
        let first = meeting(&all, &Meeting::none());
        assert_eq!(first.at.len(), MAX_PLACES);
        // Others come that stand before them in the alphabet: nobody has to be told.
        let more = [online(1, 1, 100), online(1, 101, 99)].concat();
        assert_eq!(meeting(&more, &first), first);
        // One that is not named goes, and one that is.
        let named = first.at[0].device.clone();
        all.retain(|(name, _)| *name != named);
        let after = meeting(&all, &first);
        let stay = first.at.iter().filter(|p| after.at.contains(p)).count();
        assert_eq!(stay, MAX_PLACES - 1);
        // A second network has as many as the first, a third with one device has that.
        let split = [all, online(2, 1, 50), online(3, 1, 1)].concat();
        let split = meeting(&split, &after);
        assert_eq!(split.at.len(), MAX_PLACES);
        assert_eq!(of_net(&split, 3), 1);
        assert!(of_net(&split, 1).abs_diff(of_net(&split, 2)) <= 1);
    }

    #[test]
    fn what_leads_nowhere_and_what_is_too_much_is_left_out() {
        let text = "x,0.0.0.0:7473,10.0.0.1:0,224.0.0.1:80,[fe80::1]:7,10.0.0.2:1,10.0.0.3:1";
        let all: Vec<_> = addresses(text).collect();
        assert_eq!(written(all.into_iter()), "[fe80::1]:7,10.0.0.2:1");
        let name: Name = "d1".parse().unwrap();
        let place = |address: &str| Place {
            device: name.clone(),
            address: address.parse().unwrap(),
        };
        let mut many = Meeting {
            v: VERSION,
            at: (0..MAX_PLACES + 9).map(|_| place("10.0.0.1:1")).collect(),
        };
        many.at.insert(0, place("0.0.0.0:1"));
        let read = Meeting::decode(&many.encode().unwrap()).unwrap();
        assert_eq!(read.at, many.at[1..=MAX_PLACES]);
        assert!(Meeting::decode(br#"{"v":2,"at":[]}"#).is_err());
        assert!(Meeting::decode(br#"{"v":1,"at":[{"device":"d1","address":"x"}]}"#).is_err());
        assert!(Meeting::decode(&[b' '; MAX_BYTES + 1]).is_err());
        // The longest that there may be has room.
        let longest = Place {
            device: "a".repeat(63).parse().unwrap(),
            address: "[1111:2222:3333:4444:5555:6666:7777:8888]:65535"
                .parse()
                .unwrap(),
        };
        let longest = Meeting {
            v: VERSION,
            at: (0..MAX_PLACES).map(|_| longest.clone()).collect(),
        };
        assert!(longest.encode().is_ok());
    }
}

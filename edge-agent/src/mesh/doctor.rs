//! What people are told about somebody who is not there: why.

use std::collections::{BTreeMap, BTreeSet};

use libp2p::Multiaddr;
use mesh_core::{
    neighbours::Neighbours,
    roster::{Peer, Roster},
};
use serde::{Deserialize, Serialize};

use super::{dialling, local::Question, own::Own, roster::Rosters, status::status};
use crate::{counters::Counters, identity::TrustedTime};

/// Clocks that differ by less are of one mind: certificates and rosters hold for weeks.
const CLOCK_MS: i64 = 5 * 60_000;
const DAY_MS: i64 = 24 * 3_600_000;

/// What the node knows.
pub(super) struct Facts<'a> {
    pub(super) me: Peer,
    pub(super) machine: &'a Neighbours,
    pub(super) rosters: &'a Rosters,
    pub(super) listening: Vec<String>,
    pub(super) failures: &'a BTreeMap<Peer, String>,
    pub(super) places: Vec<dialling::Shown<'a>>,
    pub(super) own: &'a Own,
    pub(super) time: &'a TrustedTime,
    pub(super) links: BTreeSet<Peer>,
    pub(super) now_ms: u64,
    pub(super) counters: &'a Counters,
    pub(super) addresses: &'a dyn Fn(&Peer) -> Vec<Multiaddr>,
}

/// Answers a question in JSON.
pub(super) fn answer(what: &Question, facts: &Facts<'_>) -> String {
    let said = match what {
        Question::Status => serde_json::to_string(&status(facts)),
        Question::Doctor(name) => serde_json::to_string(&examine(name, facts)),
    };
    said.unwrap_or_default()
}

/// One thing that was looked at: what, how it is, and whether that is well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// Is it well?
    pub well: bool,
    /// How it is, and what to do.
    pub said: String,
}

/// Why can this device not see `name`? In the order in which things have to be right.
fn examine(name: &str, facts: &Facts<'_>) -> Vec<Finding> {
    let mut all = Vec::new();
    let mut find = |what: &str, well: bool, said: String| {
        all.push(Finding {
            what: what.into(),
            well,
            said,
        });
        well
    };
    let Some(newest) = facts.rosters.newest() else {
        find(
            "roster",
            false,
            "this device has none yet: it comes from the coordinator's broker, or from a neighbour. Is the device enrolled, \
             and has it been connected since?"
                .into(),
        );
        return all;
    };
    let roster = &newest.roster;
    let (holds, said) = clock(
        facts.rosters.current().is_some(),
        roster,
        facts.time.now_ms(),
        facts.own.wall.now_ms(),
    );
    find("clock", holds, said);
    if facts.rosters.current().is_none() {
        return all;
    }
    let own = newest.has(&facts.me);
    if !find(
        "this device",
        own,
        if own {
            "is on the roster".into()
        } else {
            "is not on the roster: it was enrolled before the mesh was there and is on it after the next renewal, or it was \
             revoked, or the roster is older than its enrolment"
                .into()
        },
    ) {
        return all;
    }
    let Some(peer) = roster.peer_of(name) else {
        let near = roster.members.iter().map(|m| m.device.as_str());
        let near: Vec<_> = near
            .filter(|n| n.starts_with(name.get(..2).unwrap_or(name)))
            .collect();
        let hint = match near.as_slice() {
            [] => String::new(),
            near => format!("; similar names on it: {}", near.join(", ")),
        };
        find(
            "name",
            false,
            format!(
                "{name:?} is not on the roster of {}: another site, not enrolled, or revoked{hint}",
                roster.site
            ),
        );
        return all;
    };
    find("name", true, format!("{name} is on the roster"));
    if peer == facts.me {
        find("name", true, "that is this device".into());
        return all;
    }
    let known = facts.machine.all().find(|known| known.peer == peer);
    let here = known.is_some_and(|known| known.is_here);
    find(
        "presence",
        here,
        match known {
            Some(known) if known.is_here => "it is there".into(),
            Some(known) => format!(
                "it was there, and is gone; it last said something {} s ago",
                facts.now_ms.saturating_sub(known.said_ms) / 1_000
            ),
            None => "nobody has heard of it since this agent started: is it switched on, with the mesh on?".into(),
        },
    );
    let (known, said) = address(&peer, facts);
    find("address", known, said);
    for place in facts.places.iter().filter(|place| place.is_written) {
        let name = |peer: &Peer| newest.name(peer).map(ToString::to_string);
        let said = match (place.why, place.peer.as_ref().and_then(name)) {
            (Some(why), _) => why.to_owned(),
            (None, Some(name)) => format!("{name} answers there, or did"),
            (None, None) => {
                "somebody who is there is known by it, or it has yet to be tried".into()
            }
        };
        let what = format!("mesh.peers {}", place.address);
        find(&what, place.why.is_none(), said);
    }
    let linked = facts.links.contains(&peer);
    let failure = facts.failures.get(&peer);
    let (well, said) = match (linked, failure, here) {
        (true, ..) => (true, "there is a link".into()),
        (false, Some(why), true) => (
            false,
            format!("others see it, this device does not reach it: {why}"),
        ),
        (false, Some(why), false) => (false, why.clone()),
        (false, None, true) => (
            true,
            "none is needed: each device is linked with some, and hears of the others through them"
                .into(),
        ),
        (false, None, false) => (false, "none yet; it is tried again and again".into()),
    };
    find("link", well, said);
    let (well, said) = way(facts);
    find("uplink", well, said);
    all
}

/// Does the roster hold, by which clock, and are the clocks of one mind?
fn clock(is_current: bool, roster: &Roster, trusted_ms: i64, wall_ms: i64) -> (bool, String) {
    let (version, devices) = (roster.version, roster.members.len());
    let left_ms = roster.exp.saturating_mul(1_000).saturating_sub(trusted_ms);
    let behind_ms = roster.iat.saturating_mul(1_000).saturating_sub(trusted_ms);
    let off_ms = wall_ms.saturating_sub(trusted_ms);
    if !is_current {
        let days = -left_ms / DAY_MS;
        return (
            false,
            format!(
                "the roster (version {version}, {devices} devices) has run out {days} days ago: connect to the coordinator, or \
                 set this device's clock"
            ),
        );
    }
    if behind_ms > CLOCK_MS {
        return (
            false,
            format!(
                "it is {} min earlier here than when the roster was signed: set this device's clock, or connect to the \
                 coordinator, which says what time it is",
                behind_ms / 60_000
            ),
        );
    }
    let days = left_ms / DAY_MS;
    let holds =
        format!("the roster (version {version}, {devices} devices) holds, {days} days more");
    if off_ms.abs() > CLOCK_MS {
        let (min, how) = (
            off_ms.abs() / 60_000,
            if off_ms > 0 { "fast" } else { "slow" },
        );
        return (
            false,
            format!(
                "{holds}, by the coordinator's time; this device's own clock is {min} min {how}: readings are stamped with it, \
                 and neighbours are refused after a start without the coordinator. Set it"
            ),
        );
    }
    (true, holds)
}

/// Where a peer is, and what to do where that is not known.
fn address(peer: &Peer, facts: &Facts<'_>) -> (bool, String) {
    let mut all: Vec<String> = (facts.addresses)(peer)
        .iter()
        .map(ToString::to_string)
        .collect();
    let named = facts.places.iter().filter(|p| p.peer == Some(*peer));
    all.extend(named.map(|place| {
        let by = if place.is_written {
            "mesh.peers"
        } else {
            "the coordinator"
        };
        let why = place.why.map(|why| format!(": {why}")).unwrap_or_default();
        format!("{} (by {by}{why})", place.address)
    }));
    if !all.is_empty() {
        return (true, format!("known: {}", all.join(" ")));
    }
    let what = if facts.places.iter().any(|place| place.is_written) {
        "nobody who is reached by mesh.peers knows it: is one of its own network among them, and does it answer?"
    } else {
        "otherwise write ADDRESS:PORT of one neighbour into mesh.peers"
    };
    (
        false,
        format!(
            "none is known: on the same network mDNS finds it (UDP 5353 must not be blocked), in another one the coordinator \
             names it while both are connected; {what}"
        ),
    )
}

/// How this device reaches the coordinator.
fn way(facts: &Facts<'_>) -> (bool, String) {
    if *facts.own.uplink.borrow() {
        return (true, "this device reaches the coordinator by itself".into());
    }
    let there = facts.machine.all().filter(|known| known.is_here);
    let carriers = there.filter(|known| known.presence.uplink).count();
    let carried = facts.counters.by_neighbours.get();
    match carriers {
        0 => (
            false,
            "this device does not reach the coordinator, and no neighbour that is there does: readings are kept until one of \
             them does"
                .into(),
        ),
        _ => (
            true,
            format!(
                "this device does not reach the coordinator by itself; {carriers} neighbours that are there do and may carry it \
                 ({carried} connections so far)"
            ),
        ),
    }
}

/// What libp2p says about a failed dial, in words that help.
pub(super) fn in_words(error: &str) -> String {
    let lower = error.to_lowercase();
    let hint = if lower.contains("refused") {
        "nothing listens there: the agent is off, or its port is another one now"
    } else if lower.contains("not on the roster") {
        "whoever answers there is not on this device's roster"
    } else if lower.contains("unreachable") {
        "there is no way to that network from here"
    } else if lower.contains("timed out") || lower.contains("timeout") {
        "nobody answers: a firewall, or another network"
    } else if lower.contains("eof") || lower.contains("reset") || lower.contains("closed") {
        "it hangs up in the handshake: probably its roster does not have this device yet"
    } else if lower.contains("wrong") || lower.contains("unexpected") {
        "another device answers at its address"
    } else {
        return error.to_owned();
    };
    format!("{hint} ({error})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_say_what_to_do() {
        for (error, word) in [
            ("Connection refused (os error 111)", "agent is off"),
            ("Network is unreachable", "no way"),
            ("Timeout has been reached", "firewall"),
            ("unexpected EOF", "roster does not have this device"),
        ] {
            assert!(in_words(error).contains(word), "{error}");
        }
        assert_eq!(in_words("something else"), "something else");
    }

    #[test]
    fn a_clock_that_is_wrong_is_said_whatever_the_roster_is() {
        let roster = Roster {
            v: 1,
            site: "hall".parse().unwrap(),
            version: 7,
            iat: 1_000_000,
            exp: 1_000_000 + 28 * 86_400,
            members: Vec::new(),
        };
        let signed_ms = roster.iat * 1_000;
        let (well, said) = clock(true, &roster, signed_ms + DAY_MS, signed_ms + DAY_MS);
        assert!(well && said.contains("27 days more"), "{said}");
        let (well, said) = clock(true, &roster, signed_ms + DAY_MS, signed_ms);
        assert!(!well && said.contains("1440 min slow"), "{said}");
        let (well, said) = clock(true, &roster, signed_ms - DAY_MS, signed_ms - DAY_MS);
        assert!(!well && said.contains("earlier here"), "{said}");
        let late_ms = signed_ms + 30 * DAY_MS;
        let (well, said) = clock(false, &roster, late_ms, late_ms);
        assert!(!well && said.contains("2 days ago"), "{said}");
    }
}

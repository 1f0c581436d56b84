//! What people are told: who is there, and why somebody is not.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use libp2p::Multiaddr;
use mesh_core::{neighbours::Neighbours, roster::Peer};
use serde::{Deserialize, Serialize};

use super::{local::Question, roster::Rosters};
use crate::counters::Counters;

/// What the node knows.
pub(super) struct Facts<'a> {
    pub(super) me: Peer,
    pub(super) machine: &'a Neighbours,
    pub(super) rosters: &'a Rosters,
    pub(super) listening: Vec<String>,
    pub(super) failures: &'a BTreeMap<Peer, String>,
    pub(super) links: BTreeSet<Peer>,
    pub(super) now_ms: u64,
    pub(super) counters: &'a Counters,
    pub(super) addresses: &'a dyn Fn(&Peer) -> Vec<Multiaddr>,
}

/// `edge-agent mesh status --json`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// This device, on the roster.
    pub device: Option<String>,
    /// Where neighbours reach it.
    pub listening: Vec<String>,
    /// The newest roster: its version, how many are on it, and until when it holds (seconds since 1970).
    pub roster: Option<RosterStatus>,
    /// Handshakes with somebody who is not on the roster.
    pub strangers: u64,
    /// What came from neighbours and was not signed by whom it names.
    pub forgeries: u64,
    /// Connections that it carried for neighbours without an uplink, and their bytes.
    #[serde(default)]
    pub carried: u64,
    /// Both ways.
    #[serde(default)]
    pub carried_bytes: u64,
    /// Connections of its own to the broker that a neighbour carried.
    #[serde(default)]
    pub by_neighbours: u64,
    /// Frames that neighbours look at, and theirs.
    #[serde(default)]
    pub offload: OffloadStatus,
    /// Bytes of models that came from neighbours.
    pub swarm_bytes: u64,
    /// Bytes of models that neighbours had from this device.
    pub served_bytes: u64,
    /// Neighbours that have served wrong bytes too often, and are not asked any more.
    pub bans: u64,
    /// All that it has heard of.
    pub neighbours: Vec<NeighbourStatus>,
}

/// Frames handed to neighbours since the agent's start, and those of neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadStatus {
    /// Handed to a neighbour.
    pub asked: u64,
    /// Of these, answered in time.
    pub answered: u64,
    /// Of these, refused at once.
    pub refused: u64,
    /// Of these, answered too late, wrongly or not at all.
    pub late: u64,
    /// Frames of neighbours that this device has looked at.
    pub served: u64,
    /// Frames of neighbours that it has not.
    pub turned_away: u64,
    /// Parts of a model that it has run for a neighbour.
    #[serde(default)]
    pub parts: u64,
    /// Times that a neighbour with a part of a model failed a frame.
    #[serde(default)]
    pub replaced: u64,
}

impl OffloadStatus {
    fn of(counters: &Counters) -> Self {
        let numbers = &counters.offload;
        Self {
            asked: numbers.asked.get(),
            answered: numbers.answered.get(),
            refused: numbers.refused.get(),
            late: numbers.late.get(),
            served: numbers.served.get(),
            turned_away: numbers.turned_away.get(),
            parts: numbers.parts.get(),
            replaced: numbers.replaced.get(),
        }
    }
}

/// The roster, for people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RosterStatus {
    /// Grows with each change.
    pub version: u64,
    /// How many are on it.
    pub devices: usize,
    /// Seconds since the Unix epoch.
    pub until: i64,
    /// Does it still hold?
    pub holds: bool,
}

/// A neighbour, for people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NeighbourStatus {
    /// Its name on the roster.
    pub device: String,
    /// Is it there?
    pub here: bool,
    /// Is there a link with it? Most are known through others.
    pub linked: bool,
    /// Does it reach the coordinator?
    pub uplink: bool,
    /// In percent.
    pub load: u8,
    /// In °C.
    pub warmth: Option<i8>,
    /// In MiB.
    pub free_mib: u32,
    /// The models in its memory.
    pub loaded: Vec<String>,
    /// Where it is.
    pub addresses: Vec<String>,
    /// Seconds since it last had something to say: what is as it was is not said again.
    pub said_s: u64,
}

/// Answers a question in JSON.
pub(super) fn answer(what: &Question, facts: &Facts<'_>) -> String {
    let said = match what {
        Question::Status => serde_json::to_string(&status(facts)),
        Question::Doctor(name) => serde_json::to_string(&examine(name, facts)),
    };
    said.unwrap_or_default()
}

fn status(facts: &Facts<'_>) -> Status {
    let roster = facts.rosters.newest();
    let holds = facts.rosters.current().is_some();
    let name = |peer: &Peer| {
        let name = roster.as_ref().and_then(|roster| roster.name(peer));
        name.map(ToString::to_string)
    };
    let mut neighbours: Vec<_> = facts
        .machine
        .all()
        .map(|known| NeighbourStatus {
            device: name(&known.peer).unwrap_or_else(|| known.peer.to_string()),
            here: known.is_here,
            linked: known.is_linked,
            uplink: known.presence.uplink,
            load: known.presence.load,
            warmth: known.presence.warmth,
            free_mib: known.presence.free_mib,
            loaded: known.presence.loaded.clone(),
            addresses: known.presence.addresses.clone(),
            said_s: facts.now_ms.saturating_sub(known.said_ms) / 1_000,
        })
        .collect();
    neighbours.sort_by(|a, b| a.device.cmp(&b.device));
    Status {
        device: name(&facts.me),
        listening: facts.listening.clone(),
        roster: roster.as_ref().map(|accepted| RosterStatus {
            version: accepted.roster.version,
            devices: accepted.roster.members.len(),
            until: accepted.roster.exp,
            holds,
        }),
        strangers: facts.counters.strangers.get(),
        forgeries: facts.counters.forgeries.get(),
        carried: facts.counters.carried.get(),
        carried_bytes: facts.counters.carried_bytes.get(),
        by_neighbours: facts.counters.by_neighbours.get(),
        offload: OffloadStatus::of(facts.counters),
        swarm_bytes: facts.counters.swarm_bytes.get(),
        served_bytes: facts.counters.served_bytes.get(),
        bans: facts.counters.bans.get(),
        neighbours,
    }
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
    let holds = facts.rosters.current().is_some();
    let days = format!(
        "version {}, {} devices",
        roster.version,
        roster.members.len()
    );
    if !find(
        "clock",
        holds,
        if holds {
            format!("the roster ({days}) holds")
        } else {
            format!(
                "the roster ({days}) has run out: connect to the coordinator, or set this device's clock"
            )
        },
    ) {
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
    let addresses = (facts.addresses)(&peer);
    let mut list = String::new();
    for address in &addresses {
        let _ = write!(list, " {address}");
    }
    find(
        "address",
        !addresses.is_empty(),
        if addresses.is_empty() {
            "none is known: on the same network mDNS finds it (UDP 5353 must not be blocked); otherwise write ADDRESS:PORT of \
             one neighbour into mesh.peers"
                .into()
        } else {
            format!("known:{list}")
        },
    );
    let linked = facts.links.contains(&peer);
    let failure = facts.failures.get(&peer);
    let (well, said) = match (linked, failure, here) {
        (true, ..) => (true, "there is a link".into()),
        (false, Some(why), _) => (false, why.clone()),
        (false, None, true) => (
            true,
            "none is needed: each device is linked with some, and hears of the others through them"
                .into(),
        ),
        (false, None, false) => (false, "none yet; it is tried again and again".into()),
    };
    find("link", well, said);
    all
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

/// The same for a terminal.
pub(super) fn shown(status: &Status) -> String {
    let mut text = String::new();
    let me = status.device.as_deref().unwrap_or("not on the roster");
    let _ = writeln!(
        text,
        "this device: {me}, reachable at {}",
        status.listening.join(" ")
    );
    match &status.roster {
        Some(roster) => {
            let holds = if roster.holds {
                ""
            } else {
                ", which has run out"
            };
            let _ = writeln!(
                text,
                "roster: version {}, {} devices{holds}",
                roster.version, roster.devices
            );
        }
        None => text.push_str(
            "roster: none yet; it comes from the coordinator's broker or from a neighbour\n",
        ),
    }
    if status.carried + status.by_neighbours > 0 {
        let _ = writeln!(
            text,
            "carried for neighbours: {} connections, {} KiB; carried by them: {} connections",
            status.carried,
            status.carried_bytes / 1_024,
            status.by_neighbours
        );
    }
    let here = status.neighbours.iter().filter(|n| n.here).count();
    let _ = writeln!(text, "{here} neighbours are there");
    if status.swarm_bytes + status.served_bytes + status.bans > 0 {
        let (had, gave) = (status.swarm_bytes >> 10, status.served_bytes >> 10);
        let _ = writeln!(
            text,
            "models: {had} KiB from neighbours, {gave} KiB for them, {} of them banned",
            status.bans
        );
    }
    if status.strangers + status.forgeries > 0 {
        let (strangers, forgeries) = (status.strangers, status.forgeries);
        let _ = writeln!(
            text,
            "turned away: {strangers} strangers, {forgeries} forgeries"
        );
    }
    let offload = status.offload;
    if offload.asked > 0 {
        let _ = writeln!(
            text,
            "frames for neighbours: {} asked, {} answered, {} refused, {} too late",
            offload.asked, offload.answered, offload.refused, offload.late
        );
    }
    if offload.served + offload.turned_away > 0 {
        let _ = writeln!(
            text,
            "frames of neighbours: {} looked at, {} turned away",
            offload.served, offload.turned_away
        );
    }
    if offload.parts + offload.replaced > 0 {
        let _ = writeln!(
            text,
            "parts of models: {} run for neighbours, {} frames on which a neighbour with a part failed",
            offload.parts, offload.replaced
        );
    }
    for n in &status.neighbours {
        let state = match (n.here, n.linked) {
            (true, true) => "there, linked",
            (true, false) => "there",
            (false, _) => "gone",
        };
        let uplink = if n.uplink { "uplink" } else { "no uplink" };
        let warmth = n.warmth.map(|w| format!(", {w} °C")).unwrap_or_default();
        let _ = writeln!(
            text,
            "  {:<24} {state:<14} {uplink:<10} load {:>3} %, {} MiB free{warmth}",
            n.device, n.load, n.free_mib
        );
    }
    text
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
}

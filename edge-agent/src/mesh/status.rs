//! Who is there, for people and for programs.

use std::fmt::Write;

use mesh_core::roster::Peer;
use serde::{Deserialize, Serialize};

use super::doctor::Facts;
use crate::counters::Counters;

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
    /// Addresses that are written down or that the coordinator names, and how it is with them.
    #[serde(default)]
    pub places: Vec<PlaceStatus>,
    /// All that it has heard of.
    pub neighbours: Vec<NeighbourStatus>,
}

/// An address at which somebody may be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaceStatus {
    /// `ADDRESS:PORT`
    pub address: String,
    /// Is it written down in `mesh.peers`? The coordinator names it otherwise.
    pub written: bool,
    /// Who is to be there, or has answered.
    pub device: Option<String>,
    /// Why nobody was reached there, when it was last tried.
    pub failure: Option<String>,
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
    /// What it has to compute faster with.
    #[serde(default)]
    pub accelerators: Vec<String>,
    /// Where it is.
    pub addresses: Vec<String>,
    /// Seconds since it last had something to say: what is as it was is not said again.
    pub said_s: u64,
}

pub(super) fn status(facts: &Facts<'_>) -> Status {
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
            accelerators: known
                .presence
                .accelerators
                .iter()
                .map(ToString::to_string)
                .collect(),
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
        places: facts
            .places
            .iter()
            .map(|place| PlaceStatus {
                address: place.address.to_string(),
                written: place.is_written,
                device: place.peer.as_ref().and_then(name),
                failure: place.why.map(ToOwned::to_owned),
            })
            .collect(),
        neighbours,
    }
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
    for place in &status.places {
        if let Some(why) = &place.failure {
            let by = if place.written {
                "in mesh.peers"
            } else {
                "named by the coordinator"
            };
            let _ = writeln!(text, "{}, {by}: {why}", place.address);
        }
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
        let loaded = match n.loaded.as_slice() {
            [] => "no model".to_owned(),
            loaded => loaded.join(" "),
        };
        let faster = match n.accelerators.as_slice() {
            [] => String::new(),
            all => format!(", with {}", all.join(" ")),
        };
        let warmth = n.warmth.map(|w| format!(", {w} °C")).unwrap_or_default();
        let _ = writeln!(
            text,
            "  {:<24} {state:<14} {uplink:<10} load {:>3} %, {} MiB free{warmth}, {loaded}{faster}",
            n.device, n.load, n.free_mib
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_are_shown_who_has_which_model_and_what_was_not_reached() {
        let neighbour = serde_json::json!({
            "device": "d2", "here": true, "linked": true, "uplink": true, "load": 7, "warmth": null, "free_mib": 300,
            "loaded": ["steel@3"], "accelerators": ["hailo"], "addresses": [], "said_s": 1,
        });
        let place = |written, failure: Option<&str>| {
            serde_json::json!({
                "address": "10.0.0.9:7473", "written": written, "device": null, "failure": failure,
            })
        };
        let status: Status = serde_json::from_value(serde_json::json!({
            "device": "d1", "listening": [], "roster": null, "strangers": 0, "forgeries": 0, "swarm_bytes": 0,
            "served_bytes": 0, "bans": 0, "neighbours": [neighbour],
            "places": [place(true, Some("nothing listens there")), place(false, None)],
        }))
        .unwrap();
        let text = shown(&status);
        for part in [
            "steel@3, with hailo",
            "10.0.0.9:7473, in mesh.peers: nothing listens there",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("named by the coordinator"), "{text}");
    }
}

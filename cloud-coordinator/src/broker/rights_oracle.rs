//! Who may do what on a broker, said a second time: the oracle that the rights are tried against, and what is tried.
//!
//! It knows the table in the documentation of `rights.rs`: it writes out everything that a device may publish, and reads
//! filters byte by byte. It shares no line and no type with what it judges, and is used by tests only, also by those that try
//! real brokers.

use std::collections::HashSet;

pub(crate) const KINDS_OF_A_DEVICE: [&str; 11] = [
    "status", "info", "model", "state", "result", "replay", "gap", "metrics", "image", "reported",
    "drift",
];

/// Words that levels are made of: names that begin like each other, what is no name, what is no kind.
const WORDS: [&str; 41] = [
    "lacewing",
    "homeassistant",
    "v1",
    "v2",
    "demo",
    "east",
    "demo1",
    "dem",
    "d1",
    "d10",
    "d",
    "d2",
    "_",
    "cam0",
    "cam1",
    "Cam0",
    "",
    "+",
    "#",
    "a#",
    "+x",
    "$SYS",
    "status",
    "info",
    "model",
    "state",
    "result",
    "replay",
    "gap",
    "metrics",
    "image",
    "desired",
    "reported",
    "ack",
    "mark",
    "drift",
    "results",
    "roster",
    "sighting",
    "meeting",
    "ä",
];
/// Those of [`WORDS`] that can name a source.
pub(crate) const SOURCES: [&str; 35] = [
    "lacewing",
    "homeassistant",
    "v1",
    "v2",
    "demo",
    "east",
    "demo1",
    "dem",
    "d1",
    "d10",
    "d",
    "d2",
    "_",
    "cam0",
    "cam1",
    "status",
    "info",
    "model",
    "state",
    "result",
    "replay",
    "gap",
    "metrics",
    "image",
    "desired",
    "reported",
    "ack",
    "mark",
    "drift",
    "results",
    "roster",
    "sighting",
    "meeting",
    "",
    "",
];

/// Whom it is about.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Whose {
    Device(&'static str, &'static str),
    Sites(&'static [&'static str]),
    Everywhere,
}

pub(crate) const CAST: [Whose; 8] = [
    Whose::Device("demo", "d1"),
    Whose::Device("demo", "d10"),
    Whose::Device("east", "d1"),
    Whose::Device("dem", "d"),
    Whose::Sites(&["demo"]),
    Whose::Sites(&["dem", "east"]),
    Whose::Sites(&["v1"]),
    Whose::Everywhere,
];

impl Whose {
    /// Everything that it may publish, written out.
    pub(crate) fn publishes(self) -> HashSet<String> {
        let mut all = HashSet::new();
        if let Self::Device(site, device) = self {
            for source in SOURCES.iter().filter(|s| !s.is_empty()) {
                for kind in KINDS_OF_A_DEVICE {
                    all.insert(["lacewing", "v1", site, device, source, kind].join("/"));
                }
            }
        }
        all
    }

    /// The only last will that it may have.
    pub(crate) fn will(self) -> Option<String> {
        match self {
            Self::Device(site, device) => Some(format!("lacewing/v1/{site}/{device}/_/status")),
            _ => None,
        }
    }

    /// With what a filter has to begin.
    fn beginnings(self) -> Vec<String> {
        match self {
            Self::Device(site, device) => vec![format!("lacewing/v1/{site}/{device}/")],
            Self::Sites(sites) => sites.iter().map(|s| format!("lacewing/v1/{s}/")).collect(),
            Self::Everywhere => vec!["lacewing/".into(), "homeassistant/".into()],
        }
    }

    pub(crate) fn subscribes(self, filter: &str) -> bool {
        if let Self::Device(site, _) = self
            && (filter == format!("lacewing/v1/{site}/_/_/roster")
                || filter == format!("lacewing/v1/{site}/_/_/meeting"))
        {
            return true;
        }
        // A root alone is a first level too.
        let whole = format!("{filter}/");
        let text = match self {
            Self::Everywhere => &whole,
            _ => filter,
        };
        self.beginnings()
            .iter()
            .any(|b| text.starts_with(b.as_str()))
            && well_formed(filter)
    }
}

/// MQTT 3.1.1, section 4.7.1, byte by byte, and at most 16 levels.
fn well_formed(filter: &str) -> bool {
    let bytes = filter.as_bytes();
    let mut slashes = 0;
    for (at, byte) in bytes.iter().enumerate() {
        let begins = at == 0 || bytes[at - 1] == b'/';
        let ends = at + 1 == bytes.len() || bytes[at + 1] == b'/';
        let right = match byte {
            b'/' => {
                slashes += 1;
                true
            }
            b'+' => begins && ends,
            b'#' => begins && at + 1 == bytes.len(),
            _ => true,
        };
        if !right {
            return false;
        }
    }
    !bytes.is_empty() && slashes < 16
}

/// A generator that a printed seed repeats (xorshift64*).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }

    fn word(&mut self) -> &'static str {
        WORDS[self.below(WORDS.len())]
    }

    /// Mostly near what is allowed, where mistakes are made: somebody's own topic with levels changed, left out or
    /// put in.
    pub(crate) fn topic(&mut self, whose: Whose) -> String {
        let own: [&str; 2] = match whose {
            Whose::Device(site, device) => [site, device],
            Whose::Sites(sites) => [sites[self.below(sites.len())], "d1"],
            Whose::Everywhere => ["demo", "d1"],
        };
        let kind = match self.below(3) {
            0 => "status",
            _ => KINDS_OF_A_DEVICE[self.below(KINDS_OF_A_DEVICE.len())],
        };
        let mut levels = vec!["lacewing", "v1", own[0], own[1], "_", kind];
        for _ in 0..self.below(4) {
            let at = self.below(levels.len());
            match self.below(8) {
                0 => {
                    levels.remove(at);
                }
                1 => levels.insert(at, self.word()),
                2 => levels.truncate(at),
                3 => levels[at] = "+",
                4 => {
                    levels.truncate(at);
                    levels.push("#");
                }
                5 if self.below(20) == 0 => levels.extend([self.word()].repeat(12)),
                _ => levels[at] = self.word(),
            }
            if levels.is_empty() {
                levels.push(self.word());
            }
        }
        levels.join("/")
    }
}

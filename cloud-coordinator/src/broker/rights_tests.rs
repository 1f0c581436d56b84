//! The rights by example, and a million times against an oracle that was written from the table and from nothing else.

use std::collections::HashSet;

use super::*;

fn device() -> Role {
    Role::Device {
        site: "demo".parse().unwrap(),
        device: "d1".parse().unwrap(),
    }
}

const EVERYWHERE: Role = Role::Viewer { sites: Sites::All };

fn only(sites: &[&str]) -> Role {
    Role::Viewer {
        sites: Sites::Some(sites.iter().map(|s| s.parse().unwrap()).collect()),
    }
}

#[test]
fn publishing() {
    let may = |topic| device().may_publish(topic).is_some();
    assert!(may("lacewing/v1/demo/d1/cam0/result") && may("lacewing/v1/demo/d1/_/status"));
    for denied in [
        "lacewing/v1/demo/d2/cam0/result",
        "lacewing/v1/other/d1/cam0/result",
        "lacewing/v1/demo/d1/_/ack",
        "lacewing/v1/demo/d1/_/desired",
        "lacewing/v1/demo/d1/cam0/nonsense",
        "lacewing/v1/demo/d1/cam0",
        "homeassistant/device/d1/config",
        "$SYS/x",
    ] {
        assert!(!may(denied), "{denied}");
    }
    for viewer in [EVERYWHERE, only(&["demo"])] {
        assert!(
            viewer
                .may_publish("lacewing/v1/demo/d1/cam0/result")
                .is_none()
        );
        assert!(viewer.may_will("lacewing/v1/demo/d1/_/status").is_none());
    }
}

#[test]
fn wills() {
    assert!(device().may_will("lacewing/v1/demo/d1/_/status").is_some());
    for denied in [
        "lacewing/v1/demo/d2/_/status",
        "lacewing/v1/demo/d1/cam0/status",
        "lacewing/v1/demo/d1/_/result",
    ] {
        assert!(device().may_will(denied).is_none(), "{denied}");
    }
}

#[test]
fn subscribing() {
    assert!(device().may_subscribe("lacewing/v1/demo/d1/_/ack"));
    assert!(device().may_subscribe("lacewing/v1/demo/d1/#"));
    assert!(device().may_subscribe("lacewing/v1/demo/_/_/roster"));
    for denied in [
        "lacewing/#",
        "lacewing/v1/demo/+/_/ack",
        "lacewing/v1/demo/d1",
        "lacewing/v1/demo/d10/_/ack",
        "lacewing/v1/demo/d1/a#",
        "lacewing/v1/other/_/_/roster",
        "lacewing/v1/demo/_/_/+",
        "lacewing/v1/demo/_/#",
        "#",
    ] {
        assert!(!device().may_subscribe(denied), "{denied}");
    }
    let viewer = |f| EVERYWHERE.may_subscribe(f);
    assert!(
        viewer("lacewing/#") && viewer("homeassistant/+/x") && viewer("lacewing/v1/+/+/+/result")
    );
    for denied in [
        "#",
        "+/v1/#",
        "$SYS/#",
        "",
        "lacewing/#/x",
        "lacewingx/#",
        &"lacewing/".repeat(20),
    ] {
        assert!(!viewer(denied), "{denied}");
    }
    let some = only(&["demo", "east"]);
    assert!(
        some.may_subscribe("lacewing/v1/demo/#") && some.may_subscribe("lacewing/v1/east/+/+/ack")
    );
    for denied in [
        "lacewing/#",
        "lacewing/v1/#",
        "lacewing/v1/+/d1/#",
        "lacewing/v1/demo",
        "lacewing/v1/west/#",
        "lacewing/+/demo/#",
        "+/v1/demo/#",
        "homeassistant/#",
    ] {
        assert!(!some.may_subscribe(denied), "{denied}");
    }
}

// The oracle. It knows the table in the module's documentation: it writes out everything that a device may publish, and
// reads filters byte by byte. It shares no line and no type with what it judges.

const KINDS_OF_A_DEVICE: [&str; 11] = [
    "status", "info", "model", "state", "result", "replay", "gap", "metrics", "image", "reported",
    "drift",
];

/// Words that levels are made of: names that begin like each other, what is no name, what is no kind.
const WORDS: [&str; 38] = [
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
    "ä",
];
/// Those of [`WORDS`] that can name a source.
const SOURCES: [&str; 32] = [
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
    "",
    "",
];

#[derive(Clone, Copy, Debug)]
enum Whose {
    Device(&'static str, &'static str),
    Sites(&'static [&'static str]),
    Everywhere,
}

const CAST: [Whose; 8] = [
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
    fn role(self) -> Role {
        match self {
            Self::Device(site, device) => Role::Device {
                site: site.parse().unwrap(),
                device: device.parse().unwrap(),
            },
            Self::Sites(sites) => only(sites),
            Self::Everywhere => EVERYWHERE,
        }
    }

    /// Everything that it may publish, written out.
    fn publishes(self) -> HashSet<String> {
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
    fn will(self) -> Option<String> {
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

    fn subscribes(self, filter: &str) -> bool {
        if let Self::Device(site, _) = self
            && filter == format!("lacewing/v1/{site}/_/_/roster")
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
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
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
    fn topic(&mut self, whose: Whose) -> String {
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

/// 50,000 triples; as many as `LACEWING_RIGHTS_CASES` says, from the seed `LACEWING_RIGHTS_SEED`.
#[test]
fn agrees_with_the_table() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let cases: u64 = number("LACEWING_RIGHTS_CASES").unwrap_or(50_000);
    let seed: u64 = number("LACEWING_RIGHTS_SEED").unwrap_or_else(|| crate::clock::random() | 1);
    println!("seed {seed}, {cases} cases");
    let mut dice = Dice(seed);
    let cast = CAST.map(|whose| (whose, whose.role(), whose.publishes()));
    let (mut allowed, mut refused) = ([0u64; 3], [0u64; 3]);
    for _ in 0..cases {
        let (whose, role, publishes) = &cast[dice.below(cast.len())];
        let text = dice.topic(*whose);
        let action = dice.below(3);
        let (is, should) = match action {
            0 => (role.may_publish(&text).is_some(), publishes.contains(&text)),
            1 => (
                role.may_will(&text).is_some(),
                whose.will().as_ref() == Some(&text),
            ),
            _ => (role.may_subscribe(&text), whose.subscribes(&text)),
        };
        assert_eq!(
            is, should,
            "seed {seed}: {whose:?}, action {action}, {text:?}"
        );
        if is {
            allowed[action] += 1;
        } else {
            refused[action] += 1;
        }
    }
    println!("allowed {allowed:?}, refused {refused:?} (publish, will, subscribe)");
    let least = cases / 100;
    assert!(
        allowed.iter().chain(&refused).all(|n| *n >= least),
        "both are tried: {allowed:?} {refused:?}"
    );
}

//! Settings as they travel: what is signed, whom it is for, and what may be set from afar at all.

use alloc::{borrow::ToOwned, collections::BTreeSet, format, string::String, vec::Vec};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    Digest, EventError, Name, VERSION,
    event::{MAX_JSON_INTEGER, parse, within},
};

/// The largest document: a part of a file that people write.
pub const MAX_SETTINGS_BYTES: usize = 32 * 1024;
/// Longer than the ten seconds for which new settings must hold …
const MIN_TRIAL_S: u32 = 15;
/// … and nobody waits longer than this for a device that has lost its way.
const MAX_TRIAL_S: u32 = 3_600;
/// Loading a large model takes two minutes at worst and is not counted; connecting again does not take two.
const TRIAL_S: u32 = 120;

/// Which settings are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The number that the coordinator gave them, for people.
    pub version: u64,
    /// SHA-256 of the signed document. Two settings are the same if this is.
    pub digest: Digest,
    /// After so many seconds without the broker, or without a source that worked before, the device goes back; 15 to 3600.
    #[serde(default = "trial_s")]
    pub trial_s: u32,
}

const fn trial_s() -> u32 {
    TRIAL_S
}

impl Settings {
    pub(crate) fn is_valid(&self) -> bool {
        self.version <= MAX_JSON_INTEGER && (MIN_TRIAL_S..=MAX_TRIAL_S).contains(&self.trial_s)
    }
}

/// Do both name the same settings, or none?
pub(super) fn same(a: Option<&Settings>, b: Option<&Settings>) -> bool {
    a.map(|settings| settings.digest) == b.map(|settings| settings.digest)
}

/// Which devices settings are for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Whom {
    /// Only devices of this site.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site: Option<Name>,
    /// Only devices on this board.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub board: Option<String>,
    /// Only this device of the site.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Name>,
}

impl Whom {
    /// Is this device meant?
    #[must_use]
    pub fn includes(&self, site: &Name, device: &Name, board: Option<&str>) -> bool {
        self.site.as_ref().is_none_or(|s| s == site)
            && self.device.as_ref().is_none_or(|d| d == device)
            && self.board.as_deref().is_none_or(|b| Some(b) == board)
    }

    /// Of several that mean a device, the one with the highest rank counts: the device before the site, the site before
    /// the board.
    #[must_use]
    pub const fn rank(&self) -> u8 {
        (self.device.is_some() as u8) * 4
            + (self.site.is_some() as u8) * 2
            + self.board.is_some() as u8
    }
}

/// What is signed: a part of the agent's configuration, and whom it is for. A device takes only what is for it, so that
/// whoever can speak on the broker can at most choose among what was signed for this device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// Version of the form, [`VERSION`].
    pub v: u8,
    /// The number of these settings.
    pub version: u64,
    /// The devices.
    #[serde(default)]
    pub whom: Whom,
    /// What the configuration file would say.
    pub settings: Map<String, Value>,
}

impl Document {
    /// The JSON that is signed.
    ///
    /// # Errors
    /// If it is larger than [`MAX_SETTINGS_BYTES`].
    pub fn encode(&self) -> Result<Vec<u8>, EventError> {
        let bytes = serde_json::to_vec(self)?;
        within(bytes.len(), MAX_SETTINGS_BYTES)?;
        Ok(bytes)
    }

    /// Reads one. What it may say is for [`refused`] to judge.
    ///
    /// # Errors
    /// [`EventError`] says what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, EventError> {
        within(bytes.len(), MAX_SETTINGS_BYTES)?;
        let document: Self = parse(bytes)?;
        if document.v != VERSION {
            return Err(EventError::Version(document.v));
        }
        Ok(document)
    }
}

/// How much of a table may be set from afar.
enum May {
    All,
    Only(&'static [&'static str]),
    But(&'static [&'static str]),
}

/// What may be set from afar. Not among it: who the device is, where it keeps things, whom it speaks to and trusts, which
/// model it runs (that is for rollouts) and how its pins are wired.
const TABLES: [(&str, May); 7] = [
    ("broker", May::Only(&["keep_alive_s", "max_backoff_s"])),
    ("drift", May::All),
    ("outbox", May::Only(&["max_bytes"])),
    ("publish", May::All),
    ("reject", May::All),
    ("report", May::All),
    ("samples", May::But(&["coordinator"])),
];
/// Of a source, which is named; which kind it is and what it waits for belongs to the device.
const SOURCE: [&str; 7] = ["name", "fps", "gate", "path", "loop", "labelled", "scene"];

/// Everything in these settings that may not be set from afar, in words. Whether the rest makes sense is for the agent's
/// configuration to judge.
#[must_use]
pub fn refused(settings: &Map<String, Value>) -> Vec<String> {
    let mut all = Vec::new();
    for (key, value) in settings {
        if key == "source" {
            sources(value, &mut all);
            continue;
        }
        let Some((_, may)) = TABLES.iter().find(|(table, _)| table == key) else {
            all.push(format!("{key}: cannot be set from afar"));
            continue;
        };
        let Value::Object(table) = value else {
            all.push(format!("{key}: must be a table"));
            continue;
        };
        for (field, value) in table {
            let allowed = match may {
                May::All => true,
                May::Only(these) => these.contains(&field.as_str()),
                May::But(these) => !these.contains(&field.as_str()),
            };
            if !allowed {
                all.push(format!("{key}.{field}: cannot be set from afar"));
            } else if has_nothing(value) {
                all.push(format!("{key}.{field}: is no value"));
            }
        }
    }
    all
}

fn sources(value: &Value, all: &mut Vec<String>) {
    let Value::Array(list) = value else {
        all.push("source: must be a list of tables, each with the name of a source".to_owned());
        return;
    };
    let mut names = BTreeSet::new();
    for (at, source) in list.iter().enumerate() {
        let name = source.get("name").and_then(Value::as_str);
        let (Value::Object(table), Some(name)) = (source, name) else {
            all.push(format!("source[{at}]: must name the source that it is for"));
            continue;
        };
        if !names.insert(name) {
            all.push(format!("source[{at}]: {name:?} is there twice"));
        }
        for (field, value) in table {
            if !SOURCE.contains(&field.as_str()) {
                all.push(format!("source[{at}].{field}: cannot be set from afar"));
            } else if has_nothing(value) {
                all.push(format!("source[{at}].{field}: is no value"));
            }
        }
    }
}

/// A configuration has no null; it is also what JSON makes of a number that is none.
fn has_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.iter().any(has_nothing),
        Value::Object(table) => table.values().any(has_nothing),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn said(text: &str) -> Vec<String> {
        refused(&serde_json::from_str(text).unwrap())
    }

    #[test]
    fn only_what_is_safe_can_be_set_and_every_mistake_is_named() {
        let fine = r#"{"publish":{"when":"on_change"},"report":{"every_s":5},"outbox":{"max_bytes":9},
            "samples":{"random":0.1},"reject":{"labels":["a"]},"drift":{"frames":100},"broker":{"keep_alive_s":9},
            "source":[{"name":"cam0","fps":2.0,"gate":{"every":2}},{"name":"cam1","path":"x"}]}"#;
        assert_eq!(said(fine), Vec::<String>::new());
        let bad = r#"{"site":"x","device":"y","data":"z","broker":{"url":"mqtt://evil"},"update":{"root":"r"},
            "model":{"bundle":"b"},"board":{"name":"n"},"samples":{"coordinator":"http://evil","random":null},
            "report":5,"source":[{"fps":1},{"name":"a","kind":"folder","fps":null},{"name":"a","journal":"/etc/x"},7]}"#;
        assert_eq!(
            said(bad),
            [
                "board: cannot be set from afar",
                "broker.url: cannot be set from afar",
                "data: cannot be set from afar",
                "device: cannot be set from afar",
                "model: cannot be set from afar",
                "report: must be a table",
                "samples.coordinator: cannot be set from afar",
                "samples.random: is no value",
                "site: cannot be set from afar",
                "source[0]: must name the source that it is for",
                "source[1].fps: is no value",
                "source[1].kind: cannot be set from afar",
                "source[2]: \"a\" is there twice",
                "source[2].journal: cannot be set from afar",
                "source[3]: must name the source that it is for",
                "update: cannot be set from afar",
            ]
        );
        assert_eq!(said(r#"{"source":{}}"#).len(), 1);
    }

    #[test]
    fn the_nearest_wins_and_strangers_are_left_out() {
        let name = |text: &str| -> Name { text.parse().unwrap() };
        let whom = |site: Option<&str>, board: Option<&str>, device: Option<&str>| Whom {
            site: site.map(name),
            board: board.map(Into::into),
            device: device.map(name),
        };
        let ordered = [
            whom(None, None, None),
            whom(None, Some("pi"), None),
            whom(Some("s"), None, None),
            whom(Some("s"), Some("pi"), None),
            whom(Some("s"), None, Some("d")),
        ];
        assert!(ordered.iter().map(Whom::rank).is_sorted_by(|a, b| a < b));
        let here = (name("s"), name("d"));
        assert!(
            ordered
                .iter()
                .all(|w| w.includes(&here.0, &here.1, Some("pi")))
        );
        let fits: Vec<_> = ordered
            .iter()
            .map(|w| w.includes(&here.0, &name("e"), None))
            .collect();
        assert_eq!(fits, [true, false, true, false, false]);
        assert!(!ordered[2].includes(&name("t"), &here.1, None));
    }

    #[test]
    fn a_document_is_what_it_says_and_nothing_more() {
        let document = Document {
            v: VERSION,
            version: 3,
            whom: Whom::default(),
            settings: serde_json::from_str(r#"{"report":{"every_s":5}}"#).unwrap(),
        };
        let bytes = document.encode().unwrap();
        assert_eq!(Document::decode(&bytes).unwrap(), document);
        for bad in [
            &br#"{"v":2,"version":1,"settings":{}}"#[..],
            br#"{"v":1,"version":1,"settings":{},"more":1}"#,
            br#"{"v":1,"version":1,"settings":{},"whom":{"city":"x"}}"#,
            br#"{"v":1,"version":1,"settings":[]}"#,
        ] {
            assert!(Document::decode(bad).is_err());
        }
        let long = Document {
            settings: [("x".into(), "y".repeat(MAX_SETTINGS_BYTES).into())]
                .into_iter()
                .collect(),
            ..document
        };
        assert!(long.encode().is_err());
        assert!(Document::decode(&vec![b' '; MAX_SETTINGS_BYTES + 1]).is_err());
    }
}

//! What a device is to have no more.

use serde::{Deserialize, Serialize};

/// The most that one wish names; the rest follows when the device has answered.
pub const MAX_ERASE: usize = 64;

/// Samples that a device is to drop from wherever it keeps them. Doing it again changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Erase {
    /// Rises with each; the device answers with the highest that it has done.
    pub id: u64,
    /// Which.
    pub what: Gone,
}

/// Which samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gone {
    /// All that are there.
    All,
    /// Those captured in a time by the device's clock, both ends with it: milliseconds since the Unix epoch.
    Between {
        /// The first moment.
        from: i64,
        /// The last.
        to: i64,
    },
    /// The one of this reading.
    One {
        /// The life of the outbox.
        epoch: u64,
        /// The number of the reading.
        seq: u64,
    },
}

impl Gone {
    /// Is the sample of this reading, captured then, among them?
    #[must_use]
    pub const fn has(&self, epoch: u64, seq: u64, ts: i64) -> bool {
        match *self {
            Self::All => true,
            Self::Between { from, to } => from <= ts && ts <= to,
            Self::One { epoch: e, seq: s } => e == epoch && s == seq,
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn what_is_meant() {
        let text = r#"[{"id":1,"what":"all"},{"id":2,"what":{"between":{"from":10,"to":20}}},{"id":3,"what":{"one":{"epoch":7,"seq":9}}}]"#;
        let all: alloc::vec::Vec<Erase> = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&all).unwrap(), text.to_string());
        let has = |at: usize, seq, ts| all.get(at).is_some_and(|e| e.what.has(7, seq, ts));
        assert!(has(0, 1, 0) && has(1, 1, 10) && has(1, 1, 20) && has(2, 9, 0));
        assert!(!has(1, 9, 21) && !has(1, 9, 9) && !has(2, 8, 15));
        assert!(!Gone::One { epoch: 7, seq: 9 }.has(8, 9, 0));
    }
}

//! What is said of a run when it is over.

use std::{fmt, io, path::Path};

use serde::Serialize;

use crate::witness::{Account, Testimony};

/// The witness's count, as written to a file.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// All devices together: `produced`, `stored`, `replayed`, `duplicates`, `gaps`, `lost`, `invented`, …
    #[serde(flatten)]
    total: Account,
    /// How many devices there were.
    devices: usize,
    /// How long it ran.
    seconds: f64,
    /// The part of the judged readings that is right, 0..=1.
    accuracy: Option<f64>,
    /// The same on files that the model was never trained on.
    accuracy_held_out: Option<f64>,
    /// Each device by itself.
    by_device: std::collections::BTreeMap<String, Account>,
}

impl Report {
    /// Sums up.
    #[must_use]
    pub(crate) fn new(seen: &Testimony, seconds: f64) -> Self {
        let total = seen.total();
        Self {
            devices: seen.devices.len(),
            seconds: (seconds * 10.0).round() / 10.0,
            accuracy: total.accuracy(),
            accuracy_held_out: total.accuracy_held_out(),
            by_device: seen.devices.clone(),
            total,
        }
    }

    /// Was something produced, and all of it stored once? Nothing had to be dropped: no outbox was ever full.
    #[must_use]
    pub(crate) const fn is_good(&self) -> bool {
        self.total.is_whole() && self.total.produced > 0 && self.total.gaps == 0
    }

    /// One sentence.
    fn verdict(&self) -> String {
        let t = &self.total;
        if self.is_good() {
            return "Nothing was lost, doubled or invented.".into();
        }
        let mut said = String::from("NOT everything arrived exactly once.");
        let reasons = t.gap_reasons.iter();
        let named: Vec<_> = reasons
            .map(|(why, count)| format!("{count} {why}"))
            .collect();
        if !named.is_empty() {
            said += &format!(" Recorded as gaps: {}", named.join(", "));
            said += if t.is_whole() {
                "; nothing else is missing."
            } else {
                "; that does not explain everything."
            };
        }
        said
    }

    /// Writes it as JSON.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write(&self, file: &Path) -> io::Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
        std::fs::write(file, text + "\n")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = &self.total;
        writeln!(
            f,
            "\nThe witness counted, in {} s on {} devices:",
            self.seconds, self.devices
        )?;
        for (what, count) in [
            ("produced", t.produced),
            ("stored", t.stored),
            ("  from a backlog", t.replayed),
            ("dropped, and recorded as a gap", t.gaps),
            ("lost", t.lost),
            ("stored twice", t.duplicates),
            ("invented", t.invented),
        ] {
            writeln!(f, "  {what:<32}{count:>10}")?;
        }
        if let Some(accuracy) = self.accuracy {
            writeln!(f, "  {:<32}{:>9.1}%", "right", accuracy * 100.0)?;
        }
        if let Some(accuracy) = self.accuracy_held_out {
            let what = format!("  of {} never trained on", t.judged_held_out);
            writeln!(f, "  {what:<32}{:>9.1}%", accuracy * 100.0)?;
        }
        write!(f, "{}", self.verdict())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_what_others_read() {
        let account = Account {
            produced: 3,
            stored: 3,
            replayed: 1,
            ..Account::default()
        };
        let seen = Testimony {
            devices: [("d1".to_owned(), account)].into(),
        };
        let report = Report::new(&seen, 1.0);
        let json = serde_json::to_value(&report).unwrap();
        for key in [
            "produced",
            "stored",
            "replayed",
            "duplicates",
            "lost",
            "gaps",
            "devices",
        ] {
            assert!(json[key].is_u64(), "{key}: {json}");
        }
        assert!(report.is_good() && report.to_string().contains("Nothing was lost"));
    }

    #[test]
    fn what_was_dropped_is_named() {
        let said = |gaps: &[(&str, u64)], lost| {
            let account = Account {
                produced: 9,
                stored: 5,
                gaps: gaps.iter().map(|(_, count)| count).sum(),
                gap_reasons: gaps
                    .iter()
                    .map(|(why, n)| ((*why).to_owned(), *n))
                    .collect(),
                lost,
                ..Account::default()
            };
            let seen = Testimony {
                devices: [("d1".to_owned(), account)].into(),
            };
            let report = Report::new(&seen, 1.0);
            assert!(!report.is_good());
            report.to_string()
        };
        let whole = said(&[("full", 3), ("refused", 1)], 0);
        assert!(!whole.contains("Nothing was lost"), "{whole}");
        assert!(
            whole.contains("gaps: 3 full, 1 refused; nothing else"),
            "{whole}"
        );
        let damaged = said(&[("corrupt", 99)], 4);
        assert!(
            damaged.contains("99 corrupt; that does not explain"),
            "{damaged}"
        );
    }
}

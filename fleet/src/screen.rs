//! What the demo prints: one line per device, in place on a terminal, now and then elsewhere.

use std::io::{IsTerminal, Write};

use crate::witness::Account;

/// Where lines cannot be rewritten, they are printed this seldom, in shows.
const SELDOM: u32 = 5;
/// A terminal is rarely higher; more devices are summed up in one line.
const MOST_LINES: usize = 20;

/// One device at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    /// Its name.
    pub(crate) name: String,
    /// Does its network stand?
    pub(crate) connected: bool,
    /// Frames per second.
    pub(crate) rate: f64,
    /// What the witness knows of it.
    pub(crate) account: Account,
}

impl Line {
    fn text(&self) -> String {
        let a = &self.account;
        let status = if self.connected { "online" } else { "CUT OFF" };
        let last = a.last.as_ref().map_or_else(
            || "…".to_owned(),
            |last| {
                let mark = match &last.truth {
                    Some(truth) if *truth == last.label => "✓",
                    Some(_) => "✗",
                    None => " ",
                };
                // A label comes from a model, which may be anyone's: nothing that moves a cursor.
                let label: String = last
                    .label
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(16)
                    .collect();
                format!("{label:<16} {:.2} {mark}", last.score)
            },
        );
        let right = a
            .accuracy()
            .map_or_else(|| "     –".to_owned(), |r| format!("{:5.1}%", r * 100.0));
        format!(
            "{:<6} {status:<8} {:5.1}/s  {last:<24} right {right}  backlog {:>6}  stored {:>8}",
            self.name,
            self.rate,
            a.missing(),
            a.stored
        )
    }
}

/// The terminal, or whatever the output goes to.
#[derive(Debug)]
pub(crate) struct Screen {
    in_place: bool,
    shown: usize,
    shows: u32,
}

impl Screen {
    /// Nothing is shown yet.
    #[must_use]
    pub(crate) fn new() -> Self {
        Self {
            in_place: std::io::stdout().is_terminal(),
            shown: 0,
            shows: 0,
        }
    }

    /// Tells something that stays.
    pub(crate) fn say(&mut self, what: &str) {
        self.take_back();
        println!("» {what}");
    }

    /// Shows how the devices are.
    pub(crate) fn show(&mut self, lines: &[Line]) {
        let due = self.in_place || self.shows.is_multiple_of(SELDOM);
        self.shows = self.shows.wrapping_add(1);
        if !due {
            return;
        }
        self.take_back();
        for line in lines.iter().take(MOST_LINES) {
            println!("{}", line.text());
        }
        self.shown = lines.len().min(MOST_LINES);
        if lines.len() > MOST_LINES {
            let stored: u64 = lines.iter().map(|l| l.account.stored).sum();
            println!(
                "… and {} more; stored {stored} in all",
                lines.len() - MOST_LINES
            );
            self.shown += 1;
        }
        // A pipe that is closed ends nothing here; the report is what counts.
        let _ = std::io::stdout().flush();
    }

    /// Goes back to where the lines began, and clears from there.
    fn take_back(&mut self) {
        if self.in_place && self.shown > 0 {
            print!("\x1b[{}A\x1b[J", self.shown);
        }
        self.shown = 0;
    }
}

impl Default for Screen {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::witness::Last;

    #[test]
    fn a_line_says_it_all_and_a_label_cannot_move_the_cursor() {
        let account = Account {
            produced: 12,
            stored: 10,
            judged: 10,
            right: 9,
            last: Some(Last {
                label: "hole\x1b[2J".into(),
                score: 0.987,
                truth: Some("hole".into()),
            }),
            ..Account::default()
        };
        let line = Line {
            name: "d1".into(),
            connected: true,
            rate: 5.0,
            account,
        };
        let text = line.text();
        assert!(text.contains("backlog      2") && text.contains("90.0%") && text.contains('✗'));
        assert!(!text.contains('\x1b'));
    }
}

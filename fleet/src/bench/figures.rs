//! What a benchmark found, beside what it was to reach.

use std::{fmt, io, path::Path};

use serde::{Serialize, Serializer};

/// What a figure is to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    /// The value itself, at least.
    AtLeast(f64),
    /// The value itself, at most.
    AtMost(f64),
    /// The value divided by the peer's, at least.
    RatioAtLeast(f64),
    /// The value divided by the peer's, at most.
    RatioAtMost(f64),
    /// Only told.
    None,
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(v) => write!(f, "≥ {v}"),
            Self::AtMost(v) => write!(f, "≤ {v}"),
            Self::RatioAtLeast(v) => write!(f, "ratio ≥ {v:.2}"),
            Self::RatioAtMost(v) => write!(f, "ratio ≤ {v:.2}"),
            Self::None => Ok(()),
        }
    }
}

impl Serialize for Goal {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => to.serialize_none(),
            goal => to.collect_str(goal),
        }
    }
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
    peer: Option<f64>,
    ratio: Option<f64>,
    goal: Goal,
    holds: bool,
}

/// All figures of one benchmark.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Results {
    bench: String,
    machine: String,
    figures: Vec<Figure>,
}

impl Results {
    /// None yet.
    #[must_use]
    pub(crate) fn new(bench: &str) -> Self {
        Self {
            bench: bench.to_owned(),
            machine: machine(),
            figures: Vec::new(),
        }
    }

    /// Adds a figure, and its peer's where it has one.
    pub(crate) fn add(
        &mut self,
        name: &str,
        value: f64,
        unit: &'static str,
        peer: Option<f64>,
        goal: Goal,
    ) {
        let ratio = peer.filter(|p| *p != 0.0).map(|p| value / p);
        let holds = match goal {
            Goal::AtLeast(bound) => value >= bound,
            Goal::AtMost(bound) => value <= bound,
            Goal::RatioAtLeast(bound) => ratio.is_some_and(|r| r >= bound),
            Goal::RatioAtMost(bound) => ratio.is_some_and(|r| r <= bound),
            Goal::None => true,
        };
        let figure = Figure {
            name: name.to_owned(),
            value: rounded(value),
            unit,
            peer: peer.map(rounded),
            ratio: ratio.map(rounded),
            goal,
            holds,
        };
        self.figures.push(figure);
    }

    /// Was every goal reached?
    #[must_use]
    pub(crate) fn all_hold(&self) -> bool {
        self.figures.iter().all(|f| f.holds)
    }

    /// Writes them as JSON.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write(&self, file: &Path) -> io::Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
        std::fs::write(file, text + "\n")
    }
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} on {}", self.bench, self.machine)?;
        writeln!(
            f,
            "{:<58}{:>12} {:<12}{:>10}{:>8}  {:<14}",
            "", "value", "unit", "peer", "ratio", "goal"
        )?;
        for figure in &self.figures {
            let number = |n: Option<f64>| n.map_or_else(String::new, |n| n.to_string());
            writeln!(
                f,
                "{:<58}{:>12} {:<12}{:>10}{:>8}  {:<14}{}",
                figure.name,
                figure.value,
                figure.unit,
                number(figure.peer),
                number(figure.ratio),
                figure.goal.to_string(),
                match (figure.goal, figure.holds) {
                    (Goal::None, _) => "",
                    (_, true) => "holds",
                    (_, false) => "MISSED",
                }
            )?;
        }
        Ok(())
    }
}

/// Three digits say enough of a measurement.
fn rounded(value: f64) -> f64 {
    let steps = if value.abs() >= 100.0 { 1.0 } else { 1_000.0 };
    (value * steps).round() / steps
}

/// The middle one of the values; 0 of none.
#[must_use]
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let upper = values.get(values.len() / 2).copied().unwrap_or_default();
    if values.len() % 2 == 1 || values.is_empty() {
        return upper;
    }
    let lower = values.get(values.len() / 2 - 1).copied();
    (lower.unwrap_or_default() + upper) / 2.0
}

/// The processor, how many, and how this was built.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(": "))
        .map_or(std::env::consts::ARCH, |(_, name)| name);
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let build = if cfg!(debug_assertions) {
        "dev"
    } else {
        "release"
    };
    format!("{count} × {model}, {build} build")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_and_medians() {
        let mut results = Results::new("x");
        results.add("fast", 20.0, "1/s", Some(10.0), Goal::RatioAtLeast(2.0));
        results.add("small", 3.0, "MiB", None, Goal::AtMost(3.0));
        assert!(results.all_hold());
        results.add("slow", 20.0, "ms", Some(10.0), Goal::RatioAtMost(1.5));
        assert!(!results.all_hold() && results.to_string().contains("MISSED"));
        let json = serde_json::to_value(&results).unwrap();
        assert_eq!(json["figures"][0]["ratio"], 2.0);
        assert_eq!(json["figures"][2]["holds"], false);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        assert_eq!(median(vec![]), 0.0);
    }
}

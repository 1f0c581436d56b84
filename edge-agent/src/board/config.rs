//! Which pins there are.

use serde::Deserialize;

/// A longer pulse would hold up every belt.
const MAX_REJECT_MS: u32 = 10_000;
/// A contact that bounces for longer is broken.
const MAX_DEBOUNCE_MS: u32 = 1_000;
/// A name is for people.
const MAX_NAME: usize = 64;

/// The board and its wiring.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BoardConfig {
    /// What it is, for people: 1 to 64 bytes.
    pub name: String,
    /// The status LED.
    pub led: Option<Line>,
    /// An input that becomes active when there is something to look at.
    pub trigger: Option<Line>,
    /// An output that is pulsed when a part is to be thrown out.
    pub reject: Option<Line>,
    /// A button that somebody presses when a result was wrong or missing.
    pub button: Option<Button>,
    /// How long the reject output is active, in milliseconds: 1 to 10,000.
    pub reject_ms: u32,
    /// How long the trigger and the button must hold to count, in milliseconds: 0 to 1,000.
    pub debounce_ms: u32,
}

impl Default for BoardConfig {
    /// No pins. 80 ms open a common air valve; 20 ms outlast the bouncing of most contacts.
    fn default() -> Self {
        Self {
            name: "generic".into(),
            led: None,
            trigger: None,
            reject: None,
            button: None,
            reject_ms: 80,
            debounce_ms: 20,
        }
    }
}

/// One line of a GPIO chip.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// The chip's device file.
    #[serde(default = "first_chip")]
    pub chip: String,
    /// The line's number on it.
    pub line: u32,
    /// Active means low.
    #[serde(default)]
    pub active_low: bool,
}

/// A line with a button, and what pressing it says about the last frame of every source.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Button {
    /// The chip's device file.
    #[serde(default = "first_chip")]
    pub chip: String,
    /// The line's number on it.
    pub line: u32,
    /// Active means low.
    #[serde(default)]
    pub active_low: bool,
    /// `wrong` (the default) or `missed`.
    #[serde(default)]
    pub means: Meaning,
}

/// What a button says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Meaning {
    /// The result was wrong.
    #[default]
    Wrong,
    /// There was something to see.
    Missed,
}

impl Button {
    /// Its wiring.
    #[must_use]
    pub fn wiring(&self) -> Line {
        Line {
            chip: self.chip.clone(),
            line: self.line,
            active_low: self.active_low,
        }
    }
}

fn first_chip() -> String {
    "/dev/gpiochip0".into()
}

impl BoardConfig {
    /// The lines that are configured, with their names.
    pub(super) fn lines(&self) -> impl Iterator<Item = (&'static str, Line)> {
        [
            ("led", self.led.clone()),
            ("trigger", self.trigger.clone()),
            ("reject", self.reject.clone()),
            ("button", self.button.as_ref().map(Button::wiring)),
        ]
        .into_iter()
        .filter_map(|(name, line)| Some((name, line?)))
    }

    /// Values that cannot be meant: the field, and what it must be.
    #[must_use]
    pub fn mistakes(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let mut must = |right: bool, field: &str, what: String| {
            if !right {
                found.push((field.to_string(), what));
            }
        };
        let name = (1..=MAX_NAME).contains(&self.name.len());
        must(name, "name", format!("must have 1 to {MAX_NAME} bytes"));
        let reject = (1..=MAX_REJECT_MS).contains(&self.reject_ms);
        must(
            reject,
            "reject_ms",
            format!("must be 1 to {MAX_REJECT_MS}, not {}", self.reject_ms),
        );
        let debounce = self.debounce_ms <= MAX_DEBOUNCE_MS;
        must(
            debounce,
            "debounce_ms",
            format!("must be 0 to {MAX_DEBOUNCE_MS}, not {}", self.debounce_ms),
        );
        let lines: Vec<_> = self.lines().collect();
        for (at, (name, line)) in lines.iter().enumerate() {
            let chip = line.chip.starts_with("/dev/");
            must(
                chip,
                &format!("{name}.chip"),
                "must be a device file, like /dev/gpiochip0".into(),
            );
            let twin = lines[..at]
                .iter()
                .find(|(_, other)| (&other.chip, other.line) == (&line.chip, line.line));
            if let Some((other, _)) = twin {
                must(
                    false,
                    &format!("{name}.line"),
                    format!("must not be that of {other} too"),
                );
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write_and_names_every_mistake() {
        let good: BoardConfig = toml::from_str("led = { line = 17 }\nreject = { chip = \"/dev/gpiochip4\", line = 2, active_low = true }").unwrap();
        assert_eq!(good.mistakes(), []);
        assert_eq!(good.lines().count(), 2);
        assert_eq!(good.led.unwrap().chip, "/dev/gpiochip0");
        assert!(toml::from_str::<BoardConfig>("lde = { line = 17 }").is_err());
        assert!(toml::from_str::<BoardConfig>("led = { line = 17, low = true }").is_err());
        let button: BoardConfig =
            toml::from_str("button = { line = 5, means = \"missed\" }").unwrap();
        assert_eq!(button.button.unwrap().means, Meaning::Missed);
        assert!(
            toml::from_str::<BoardConfig>("button = { line = 5, means = \"random\" }").is_err()
        );
        let bad: BoardConfig = toml::from_str(
            "name = \"\"\nreject_ms = 0\ndebounce_ms = 9999\nled = { line = 1 }\ntrigger = { chip = \"0\", line = 1 }\nreject = { line = 1 }",
        )
        .unwrap();
        let fields: Vec<String> = bad.mistakes().into_iter().map(|(field, _)| field).collect();
        assert_eq!(
            fields,
            [
                "name",
                "reject_ms",
                "debounce_ms",
                "trigger.chip",
                "reject.line"
            ]
        );
    }
}

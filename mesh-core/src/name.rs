//! Names of sites, devices and sources, as they stand in topics, client ids and paths.

use alloc::string::String;
use core::{borrow::Borrow, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};

/// A name that is safe wherever a name can stand: in an MQTT topic, a client id, a file path, a URL.
///
/// 1 to 63 characters of `a-z`, `0-9`, `-` and `_`; or the lone `_`, which stands for the device itself
/// where a source is expected. It starts with a letter or a digit otherwise.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Name(String);

/// Why a text is not a [`Name`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty, or longer than 63 bytes.
    #[error("a name has 1 to 63 characters, this has {0}")]
    Length(usize),
    /// A character outside the alphabet.
    #[error(
        "a name is made of a-z, 0-9, - and _ and starts with a letter or digit; {0:?} is not allowed there"
    )]
    Character(char),
}

/// As long as a DNS label, so that a device's name can also be its host name.
const MAX: usize = 63;

impl Name {
    /// The device itself, where a topic or a reading names a source.
    #[must_use]
    pub fn itself() -> Self {
        Self(String::from("_"))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn check(text: &str) -> Result<(), NameError> {
        if text == "_" {
            return Ok(());
        }
        if text.is_empty() || text.len() > MAX {
            return Err(NameError::Length(text.len()));
        }
        for (at, c) in text.chars().enumerate() {
            let fits = matches!(c, 'a'..='z' | '0'..='9') || (at > 0 && matches!(c, '-' | '_'));
            if !fits {
                return Err(NameError::Character(c));
            }
        }
        Ok(())
    }
}

impl FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::check(text)?;
        Ok(Self(text.into()))
    }
}

impl TryFrom<&str> for Name {
    type Error = NameError;
    fn try_from(text: &str) -> Result<Self, NameError> {
        text.parse()
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::check(&text).map_err(serde::de::Error::custom)?;
        Ok(Self(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_names_and_refuses_what_could_escape_a_topic_or_a_path() {
        for good in ["_", "a", "cam0", "line-3_east", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "#",
            "+",
            "a/b",
            "..",
            "-a",
            "_a",
            "A",
            "ä",
            "a b",
            "a\0",
            &"x".repeat(64),
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }
}

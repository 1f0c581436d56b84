//! Which results become readings, and which of them act.

use alloc::string::String;

use serde::{Deserialize, Serialize};

/// When a result becomes a reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "when", deny_unknown_fields)]
pub enum Publish {
    /// Every result.
    #[default]
    All,
    /// The first, and each whose label differs from the last one published.
    OnChange,
    /// At most one in `every_s` seconds, and each change of label at once.
    AtMostEvery {
        /// Seconds, at least 1.
        every_s: u32,
    },
}

/// Decides for one source. Time is an argument: milliseconds of any clock that only goes forward.
#[derive(Clone, Debug)]
pub struct Decider {
    publish: Publish,
    last: Option<(String, u64)>,
}

impl Decider {
    /// Has published nothing yet.
    #[must_use]
    pub const fn new(publish: Publish) -> Self {
        Self {
            publish,
            last: None,
        }
    }

    /// Does the result with this label become a reading?
    pub fn decide(&mut self, label: &str, now_ms: u64) -> bool {
        let publish = match (&self.last, self.publish) {
            (None, _) | (_, Publish::All) => true,
            (Some((last, _)), Publish::OnChange) => last != label,
            (Some((last, at)), Publish::AtMostEvery { every_s }) => {
                last != label || now_ms.saturating_sub(*at) >= u64::from(every_s) * 1_000
            }
        };
        if publish {
            self.last = Some((label.into(), now_ms));
        }
        publish
    }
}

/// What makes the reject output pulse.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// One of these labels …
    pub labels: alloc::vec::Vec<String>,
    /// … at least this sure, 0..=1.
    #[serde(default)]
    pub min_score: f32,
}

impl Rule {
    /// Does the result match?
    #[must_use]
    pub fn matches(&self, label: &str, score: f32) -> bool {
        score >= self.min_score && self.labels.iter().any(|l| l == label)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn run(publish: Publish, results: &[(u8, u64)]) -> Vec<bool> {
        let mut decider = Decider::new(publish);
        results
            .iter()
            .map(|(label, now)| decider.decide(["ok", "hole"][usize::from(label % 2)], *now))
            .collect()
    }

    #[test]
    fn policies() {
        let results = [
            (0, 0),
            (0, 500),
            (1, 900),
            (1, 1_000),
            (1, 2_000),
            (0, 2_001),
        ];
        assert_eq!(run(Publish::All, &results), [true; 6]);
        assert_eq!(
            run(Publish::OnChange, &results),
            [true, false, true, false, false, true]
        );
        let every = Publish::AtMostEvery { every_s: 1 };
        assert_eq!(run(every, &results), [true, false, true, false, true, true]);
    }

    #[test]
    fn rules_need_label_and_score() {
        let rule = Rule {
            labels: ["hole".into()].into(),
            min_score: 0.8,
        };
        assert!(
            rule.matches("hole", 0.8) && !rule.matches("hole", 0.79) && !rule.matches("ok", 1.0)
        );
        assert!(!rule.matches("hole", f32::NAN));
    }

    proptest! {
        /// Whatever the history, a change of label is never held back.
        #[test]
        fn a_change_is_always_published(steps in prop::collection::vec((0u8..2, 0u64..3_000), 1..80), every_s in 1u32..5) {
            let mut now = 0;
            let results: Vec<_> = steps.iter().map(|(l, d)| { now += d; (*l, now) }).collect();
            for publish in [Publish::OnChange, Publish::AtMostEvery { every_s }] {
                let published = run(publish, &results);
                let mut last = None;
                for ((label, _), published) in results.iter().zip(published) {
                    prop_assert!(published || last == Some(*label));
                    if published { last = Some(*label); }
                }
            }
        }
    }
}

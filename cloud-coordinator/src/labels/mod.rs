//! What people say about samples: the classes of a task, labels with their history, and what to label next.

mod queue;
mod store;

pub(crate) use queue::{Candidate, Known, MAX_CANDIDATES, MAX_KNOWN, at_random, common, order};
pub(crate) use store::{KnownRow, Said, TaskRow};

use crate::records::RecordError;

/// The most classes of a task.
pub(crate) const MAX_CLASSES: usize = 256;
/// The most tasks that people make, and that are listed.
pub(crate) const MAX_TASKS: i64 = 1_000;
/// Characters of the name of a class or a person.
const MAX_TEXT: usize = 100;

/// Why something cannot be said.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LabelError {
    #[error(transparent)]
    Records(#[from] RecordError),
    #[error("there is no task {0:?}")]
    NoTask(String),
    #[error("there is no such sample")]
    NoSample,
    #[error("the sample was deleted")]
    Deleted,
    #[error("the sample has no label")]
    NoLabel,
    #[error("{0}")]
    Classes(String),
    #[error("{0}")]
    Invalid(String),
}

fn plain(text: &str) -> bool {
    let length = text.chars().count();
    (1..=MAX_TEXT).contains(&length) && text.trim() == text && !text.chars().any(char::is_control)
}

/// Who says it.
pub(crate) fn checked_author(author: &str) -> Result<&str, LabelError> {
    let author = author.trim();
    if plain(author) {
        Ok(author)
    } else {
        let why = format!("author: somebody has to say it, with 1 to {MAX_TEXT} characters");
        Err(LabelError::Invalid(why))
    }
}

/// A list of classes as a task can have it: some, distinct, with plain names.
pub(crate) fn check_classes(classes: &[String]) -> Result<(), LabelError> {
    if classes.len() > MAX_CLASSES {
        let why = format!("classes: at most {MAX_CLASSES} are allowed");
        return Err(LabelError::Invalid(why));
    }
    if let Some(bad) = classes.iter().find(|class| !plain(class)) {
        let why = format!(
            "classes: {bad:?} is not 1 to {MAX_TEXT} plain characters without space at its ends"
        );
        return Err(LabelError::Invalid(why));
    }
    let distinct: std::collections::BTreeSet<_> = classes.iter().collect();
    if distinct.len() < classes.len() {
        let why = "classes: one is named twice".to_owned();
        return Err(LabelError::Invalid(why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_and_what() {
        assert_eq!(checked_author(" Ana ").unwrap(), "Ana");
        for nobody in ["", "  ", "a\nb", &"x".repeat(101)] {
            assert!(checked_author(nobody).is_err(), "{nobody:?}");
        }
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        check_classes(&list(&["ok", "naïve scratch"])).unwrap();
        check_classes(&[]).unwrap();
        for bad in [
            list(&["a", "a"]),
            list(&[""]),
            list(&[" a"]),
            vec!["x".into(); 257],
        ] {
            assert!(check_classes(&bad).is_err(), "{bad:?}");
        }
    }
}

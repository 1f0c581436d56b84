//! How good answers are, from the truth and the probabilities: figures, and a picture of what is mistaken for
//! what.

use std::fmt::Write;

use serde::Serialize;

use crate::features::MAX_CLASSES;

/// Bins of the calibration error, as in Guo et al. 2017.
pub const ECE_BINS: usize = 15;
/// Classes that a confusion matrix is drawn for; beyond it nothing can be read.
pub const MAX_DRAWN_CLASSES: usize = 200;
/// The normal distribution's quantile for an interval of 95 %.
const Z95: f64 = 1.959_963_984_540_054;
/// Least probability in a log-loss: an answer that was sure and wrong costs 16, not infinity.
const LEAST_PROBABILITY: f64 = 1e-7;
/// Letters of a label that are drawn.
const DRAWN_LETTERS: usize = 24;

/// Why answers cannot be judged.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// Nothing to judge, or too many classes.
    #[error(
        "evaluate: {rows} answers, {classes} classes; at least 1 answer and 1 to 4096 classes are needed"
    )]
    Size {
        /// Answers.
        rows: usize,
        /// Classes.
        classes: usize,
    },
    /// Not one probability per class and answer.
    #[error("evaluate: {found} probabilities, {expected} expected")]
    Length {
        /// As many.
        found: usize,
        /// Answers × classes.
        expected: usize,
    },
    /// A class that does not exist.
    #[error("evaluate: answer {row} has the true class {class}, there are {classes} classes")]
    Class {
        /// From 0.
        row: usize,
        /// What it says.
        class: u32,
        /// Classes.
        classes: usize,
    },
    /// Not within 0..=1.
    #[error("evaluate: answer {row} has the probability {value}")]
    Probability {
        /// From 0.
        row: usize,
        /// The value.
        value: f32,
    },
}

/// One class's figures. Each is 0 where nothing can be said.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassScore {
    /// Its name.
    pub name: String,
    /// Rows of this class.
    pub rows: u64,
    /// Of the answers that name it, the part that is right, 0..=1.
    pub precision: f64,
    /// Of its rows, the part that is answered right, 0..=1.
    pub recall: f64,
    /// Harmonic mean of the two, 0..=1.
    pub f1: f64,
}

/// All figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Answers.
    pub rows: u64,
    /// Right ones.
    pub correct: u64,
    /// Right ones over all, 0..=1.
    pub accuracy: f64,
    /// 95 % interval of the accuracy (Wilson 1927), 0..=1.
    pub accuracy_interval: [f64; 2],
    /// Mean of −ln of the true class's probability, at least 1e-7 each.
    pub log_loss: f64,
    /// Expected calibration error, 0..=1: how far confidence is off accuracy, over 15 bins of equal width.
    pub ece: f64,
    /// Mean of the classes' F1; classes without rows do not count.
    pub macro_f1: f64,
    /// Per class, in the order of the names.
    pub classes: Vec<ClassScore>,
    /// `confusion[truth][answer]`.
    pub confusion: Vec<Vec<u64>>,
}

/// The class with the largest probability; the first of equals, as the engine decides.
#[must_use]
pub fn answer(probabilities: &[f32]) -> usize {
    let mut best = 0;
    for (at, value) in probabilities.iter().enumerate() {
        if *value > probabilities[best] {
            best = at;
        }
    }
    best
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// The 95 % interval of a proportion: `correct` of `rows` (Wilson 1927). All of 0..=1 for no rows.
#[must_use]
pub fn wilson(correct: u64, rows: u64) -> [f64; 2] {
    if rows == 0 {
        return [0.0, 1.0];
    }
    let n = rows as f64;
    let p = correct as f64 / n;
    let square = Z95 * Z95;
    let centre = (p + square / (2.0 * n)) / (1.0 + square / n);
    let half = Z95 / (1.0 + square / n) * (p * (1.0 - p) / n + square / (4.0 * n * n)).sqrt();
    // At the ends rounding must not leave the proportion outside.
    [(centre - half).clamp(0.0, p), (centre + half).clamp(p, 1.0)]
}

/// Expected calibration error of (confidence 0..=1, right or not).
pub(crate) fn ece(answers: impl Iterator<Item = (f32, bool)>) -> f64 {
    let mut bins = [(0u64, 0.0f64, 0u64); ECE_BINS];
    let mut rows = 0u64;
    for (confidence, right) in answers {
        let confidence = f64::from(confidence);
        // Bins are open below and closed above.
        let at = (confidence * ECE_BINS as f64).ceil() as usize;
        let bin = &mut bins[at.clamp(1, ECE_BINS) - 1];
        *bin = (bin.0 + 1, bin.1 + confidence, bin.2 + u64::from(right));
        rows += 1;
    }
    let off: f64 = bins
        .iter()
        .map(|(_, sure, right)| (sure - *right as f64).abs())
        .sum();
    off / (rows.max(1)) as f64
}

/// Are these N×C probabilities of N true classes?
pub(crate) fn check(
    truth: &[u32],
    probabilities: &[f32],
    classes: usize,
) -> Result<(), EvaluateError> {
    let rows = truth.len();
    if rows == 0 || !(1..=MAX_CLASSES).contains(&classes) {
        return Err(EvaluateError::Size { rows, classes });
    }
    if Some(probabilities.len()) != rows.checked_mul(classes) {
        return Err(EvaluateError::Length {
            found: probabilities.len(),
            expected: rows.saturating_mul(classes),
        });
    }
    if let Some(at) = probabilities.iter().position(|p| !(0.0..=1.0).contains(p)) {
        return Err(EvaluateError::Probability {
            row: at / classes,
            value: probabilities[at],
        });
    }
    let wrong = |class: &u32| *class as usize >= classes;
    match truth.iter().position(wrong) {
        Some(row) => Err(EvaluateError::Class {
            row,
            class: truth[row],
            classes,
        }),
        None => Ok(()),
    }
}

/// Judges N answers: `truth` has N classes, `probabilities` N×C of 0..=1 row by row, `names` C names.
///
/// # Errors
/// When the sizes do not match, or a class or probability is out of range.
pub fn evaluate(
    truth: &[u32],
    probabilities: &[f32],
    names: &[String],
) -> Result<Evaluation, EvaluateError> {
    let count = names.len();
    check(truth, probabilities, count)?;
    let mut confusion = vec![vec![0u64; count]; count];
    let mut log_loss = 0.0;
    let mut sure = Vec::with_capacity(truth.len());
    for (row, &truth) in probabilities.chunks_exact(count).zip(truth) {
        let truth = truth as usize;
        let best = answer(row);
        confusion[truth][best] += 1;
        log_loss -= f64::from(row[truth]).max(LEAST_PROBABILITY).ln();
        sure.push((row[best], best == truth));
    }
    let classes: Vec<ClassScore> = names
        .iter()
        .enumerate()
        .map(|(at, name)| {
            let right = confusion[at][at];
            let rows = confusion[at].iter().sum();
            let named = confusion.iter().map(|row| row[at]).sum();
            ClassScore {
                name: name.clone(),
                rows,
                precision: ratio(right, named),
                recall: ratio(right, rows),
                f1: ratio(2 * right, rows + named),
            }
        })
        .collect();
    let rows = truth.len() as u64;
    let correct = (0..count).map(|at| confusion[at][at]).sum();
    let with_rows: Vec<f64> = classes
        .iter()
        .filter(|c| c.rows > 0)
        .map(|c| c.f1)
        .collect();
    Ok(Evaluation {
        rows,
        correct,
        accuracy: ratio(correct, rows),
        accuracy_interval: wilson(correct, rows),
        log_loss: log_loss / rows as f64,
        ece: ece(sure.into_iter()),
        macro_f1: with_rows.iter().sum::<f64>() / with_rows.len().max(1) as f64,
        classes,
        confusion,
    })
}

/// Text for SVG: marks escaped, what XML forbids replaced, at most [`DRAWN_LETTERS`] letters.
fn text(label: &str, bounded: bool) -> String {
    let mut out = String::new();
    for (at, letter) in label.chars().enumerate() {
        if bounded && at == DRAWN_LETTERS {
            out.push('…');
            break;
        }
        match letter {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            letter if letter.is_control() => out.push(' '),
            letter => out.push(letter),
        }
    }
    out
}

/// The confusion matrix as an SVG picture that needs nothing else: rows are the truth, columns the answers,
/// darker is more of the row. It takes the colour of the text around it, so it suits light and dark pages.
/// None for more than [`MAX_DRAWN_CLASSES`] classes, or names and matrix of different size.
#[must_use]
pub fn confusion_svg(confusion: &[Vec<u64>], names: &[String]) -> Option<String> {
    let count = names.len();
    let square = confusion.len() == count && confusion.iter().all(|row| row.len() == count);
    if !(1..=MAX_DRAWN_CLASSES).contains(&count) || !square {
        return None;
    }
    let cell = match count {
        1..=12 => 40,
        13..=30 => 26,
        _ => 14,
    };
    let letter = if cell > 20 { 12 } else { 9 };
    let longest = names.iter().map(|n| n.chars().count()).max().unwrap_or(0);
    // Two thirds of the height is a letter's usual width.
    let margin = (longest.min(DRAWN_LETTERS) + 1) * letter * 2 / 3 + 3 * letter;
    let side = margin + cell * count + letter;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {side} {side}\" width=\"{side}\" \
         height=\"{side}\" role=\"img\" font-family=\"sans-serif\" font-size=\"{letter}\" \
         fill=\"currentColor\"><title>Confusion matrix: rows are the truth, columns the answers</title>"
    );
    let middle = margin + cell * count / 2;
    // Writing to a String cannot fail.
    let _ = write!(
        svg,
        "<text x=\"{middle}\" y=\"{letter}\" text-anchor=\"middle\" opacity=\".7\">answer</text>\
         <text transform=\"translate({letter} {middle}) rotate(-90)\" text-anchor=\"middle\" \
         opacity=\".7\">truth</text>"
    );
    for (at, (row, name)) in confusion.iter().zip(names).enumerate() {
        let start = margin + cell * at;
        let line = start + cell / 2 + letter / 3;
        let (edge, short) = (margin - letter / 2, text(name, true));
        let _ = write!(
            svg,
            "<text x=\"{edge}\" y=\"{line}\" text-anchor=\"end\">{short}</text>\
             <text transform=\"translate({line} {edge}) rotate(-90)\">{short}</text>"
        );
        let rows: u64 = row.iter().sum();
        for (answer, &number) in row.iter().enumerate().filter(|(_, number)| **number > 0) {
            let (x, share) = (margin + cell * answer, ratio(number, rows));
            let (full, named) = (text(name, false), text(&names[answer], false));
            let _ = write!(
                svg,
                "<g><title>{full} answered {named}: {number} of {rows}</title><rect x=\"{x}\" \
                 y=\"{start}\" width=\"{cell}\" height=\"{cell}\" fill-opacity=\"{:.3}\"/>",
                0.06 + 0.5 * share
            );
            if cell > 20 {
                let centre = x + cell / 2;
                let weight = if answer == at { "bold" } else { "normal" };
                let _ = write!(
                    svg,
                    "<text x=\"{centre}\" y=\"{line}\" text-anchor=\"middle\" \
                     font-weight=\"{weight}\">{number}</text>"
                );
            }
            svg.push_str("</g>");
        }
    }
    let whole = cell * count;
    let _ = write!(
        svg,
        "<rect x=\"{margin}\" y=\"{margin}\" width=\"{whole}\" height=\"{whole}\" fill=\"none\" \
         stroke=\"currentColor\" stroke-opacity=\".4\"/></svg>"
    );
    Some(svg)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn figures_by_hand() {
        let probabilities = [0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.6, 0.4];
        let result = evaluate(&[0, 0, 1, 1], &probabilities, &names(&["a", "b"])).unwrap();
        assert_eq!((result.rows, result.correct), (4, 3));
        assert_eq!(result.confusion, [[2, 0], [1, 1]]);
        let [a, b] = &result.classes[..] else {
            panic!()
        };
        assert!((a.precision - 2.0 / 3.0).abs() < 1e-12 && (a.recall - 1.0).abs() < 1e-12);
        assert!((b.precision - 1.0).abs() < 1e-12 && (b.recall - 0.5).abs() < 1e-12);
        assert!((a.f1 - 0.8).abs() < 1e-12 && (b.f1 - 2.0 / 3.0).abs() < 1e-12);
        let loss = -(0.9f64.ln() + 0.8f64.ln() + 0.7f64.ln() + 0.4f64.ln()) / 4.0;
        assert!((result.log_loss - loss).abs() < 1e-6);
        // Each answer has a bin of its own but 0.9 and 0.8 apart: |0.9-1| + |0.8-1| + |0.7-1| + |0.6-0|.
        assert!(
            (result.ece - (0.1 + 0.2 + 0.3 + 0.6) / 4.0).abs() < 1e-6,
            "{}",
            result.ece
        );
    }

    #[test]
    fn wilson_as_published() {
        // Newcombe 1998, table I: 81 of 263, 0 of 20, 29 of 29.
        for ((correct, rows), [low, high]) in [
            ((81, 263), [0.2553, 0.3662]),
            ((0, 20), [0.0, 0.1611]),
            ((29, 29), [0.8830, 1.0]),
        ] {
            let found = wilson(correct, rows);
            assert!(
                (found[0] - low).abs() < 1e-4 && (found[1] - high).abs() < 1e-4,
                "{found:?}"
            );
        }
        assert_eq!(wilson(0, 0), [0.0, 1.0]);
    }

    #[test]
    fn mistakes_are_named() {
        let words = |truth: &[u32], probabilities: &[f32]| {
            evaluate(truth, probabilities, &names(&["a", "b"]))
                .unwrap_err()
                .to_string()
        };
        assert!(words(&[], &[]).contains("0 answers"));
        assert_eq!(words(&[0], &[1.0]), "evaluate: 1 probabilities, 2 expected");
        assert_eq!(
            words(&[0], &[1.0, f32::NAN]),
            "evaluate: answer 0 has the probability NaN"
        );
        assert!(words(&[2], &[1.0, 0.0]).contains("true class 2"));
    }

    #[test]
    fn labels_cannot_break_the_picture() {
        let svg = confusion_svg(
            &[vec![1, 2], vec![0, 3]],
            &names(&["<script>&\"'", "b\u{1}"]),
        )
        .unwrap();
        assert!(!svg.contains("<script>") && !svg.contains('\u{1}'));
        assert!(svg.contains("&lt;script&gt;&amp;&quot;&#39;"));
        assert!(svg.contains("currentColor"));
        assert!(confusion_svg(&[vec![1]], &names(&["a", "b"])).is_none());
        let many = names(&["x"; 201]);
        assert!(confusion_svg(&vec![vec![0; 201]; 201], &many).is_none());
        assert!(confusion_svg(&vec![vec![0; 200]; 200], &many[..200]).is_some());
    }

    proptest! {
        #[test]
        fn figures_stay_in_range(
            rows in prop::collection::vec((0u32..3, prop::array::uniform3(0.0f32..=1.0)), 1..60),
        ) {
            let truth: Vec<u32> = rows.iter().map(|(truth, _)| *truth).collect();
            let probabilities: Vec<f32> = rows.iter().flat_map(|(_, p)| *p).collect();
            let result = evaluate(&truth, &probabilities, &names(&["a", "b", "c"])).unwrap();
            let [low, high] = result.accuracy_interval;
            prop_assert!(low <= result.accuracy && result.accuracy <= high);
            prop_assert!((0.0..=1.0).contains(&result.ece));
            prop_assert!((0.0..=1.0).contains(&result.macro_f1));
            prop_assert!(result.log_loss.is_finite());
            prop_assert_eq!(result.confusion.iter().flatten().sum::<u64>(), truth.len() as u64);
        }
    }
}

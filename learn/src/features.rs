//! Rows of numbers with a class each: what a head is trained on, whether they come from a model's embedding
//! or from a user's own table.

/// Rows at most: far beyond what people label, and the solver's tables stay below a gigabyte.
pub const MAX_ROWS: usize = 1 << 20;
/// Values per row at most.
pub const MAX_DIM: usize = 1 << 16;
/// Classes at most: ImageNet's thousand, and some.
pub const MAX_CLASSES: usize = 4096;
/// Rows × values, and rows × classes, at most: half a gigabyte of f32. Training holds them twice.
pub const MAX_VALUES: usize = 1 << 27;
/// Classes × values at most; the solver keeps some twenty times as many numbers.
pub const MAX_WEIGHTS: usize = 1 << 22;
/// Features beyond this lose their small differences in f32.
const MAX_MAGNITUDE: f32 = 1e6;

/// Why a table cannot be learned from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FeaturesError {
    /// A size out of bounds.
    #[error("features: {found} {what}, {least} to {most} are allowed")]
    Size {
        /// Rows, values per row, …
        what: &'static str,
        /// As many.
        found: usize,
        /// Smallest.
        least: usize,
        /// Largest.
        most: usize,
    },
    /// Lists that belong together differ in length.
    #[error("features: {found} {what} for {expected}")]
    Length {
        /// Which list.
        what: &'static str,
        /// Its length.
        found: usize,
        /// What it should be.
        expected: usize,
    },
    /// A value that is not a number, or too large.
    #[error("features: row {row}, value {column} is {value}, expected a number within ±1e6")]
    Value {
        /// From 0.
        row: usize,
        /// From 0.
        column: usize,
        /// The value.
        value: f32,
    },
    /// A class that does not exist.
    #[error("features: row {row} has class {class}, there are {classes} classes")]
    Class {
        /// From 0.
        row: usize,
        /// What it says.
        class: u32,
        /// Classes, counted from 0.
        classes: usize,
    },
    /// A class that nothing can be learned about.
    #[error("features: class {class} has no row of any weight")]
    EmptyClass {
        /// From 0.
        class: usize,
    },
    /// A weight below 0, or not a number, or beyond 1e6.
    #[error("features: row {row} has the weight {weight}, expected 0 to 1e6")]
    Weight {
        /// From 0.
        row: usize,
        /// The weight.
        weight: f32,
    },
}

/// A checked table: N rows of D finite values, a class for each, and every class has at least one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    dim: usize,
    classes: usize,
    rows: Vec<f32>,
    truth: Vec<u32>,
    weights: Option<Vec<f32>>,
}

fn within(
    what: &'static str,
    found: usize,
    least: usize,
    most: usize,
) -> Result<(), FeaturesError> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    Err(FeaturesError::Size {
        what,
        found,
        least,
        most,
    })
}

fn equal(what: &'static str, found: usize, expected: usize) -> Result<(), FeaturesError> {
    if found == expected {
        return Ok(());
    }
    Err(FeaturesError::Length {
        what,
        found,
        expected,
    })
}

impl Features {
    /// `rows`: N×`dim`, row by row, each within ±1e6. `truth`: N classes, each below `classes`. `weights`: N
    /// numbers of 0..=1e6 that say how much a row counts; without them all count the same.
    ///
    /// # Errors
    /// Names the first row, value or class that is wrong, see [`FeaturesError`].
    pub fn new(
        dim: usize,
        classes: usize,
        rows: Vec<f32>,
        truth: Vec<u32>,
        weights: Option<Vec<f32>>,
    ) -> Result<Self, FeaturesError> {
        within("values per row", dim, 1, MAX_DIM)?;
        within("classes", classes, 2, MAX_CLASSES)?;
        within("rows", truth.len(), 2, MAX_ROWS)?;
        within("values", truth.len() * dim, 1, MAX_VALUES)?;
        within("rows times classes", truth.len() * classes, 1, MAX_VALUES)?;
        within("values times classes", dim * classes, 1, MAX_WEIGHTS)?;
        equal("values", rows.len(), truth.len() * dim)?;
        if let Some(weights) = &weights {
            equal("weights", weights.len(), truth.len())?;
        }
        // No comparison holds for what is not a number.
        let wrong = |value: &f32| !(-MAX_MAGNITUDE..=MAX_MAGNITUDE).contains(value);
        if let Some(at) = rows.iter().position(wrong) {
            return Err(FeaturesError::Value {
                row: at / dim,
                column: at % dim,
                value: rows[at],
            });
        }
        let mut seen = vec![false; classes];
        for (row, &class) in truth.iter().enumerate() {
            let weight = weights.as_ref().map_or(1.0, |weights| weights[row]);
            if wrong(&weight) || weight < 0.0 {
                return Err(FeaturesError::Weight { row, weight });
            }
            match seen.get_mut(class as usize) {
                // A weight too small for f32 sums counts as none.
                Some(seen) => *seen |= weight >= f32::MIN_POSITIVE,
                None => {
                    return Err(FeaturesError::Class {
                        row,
                        class,
                        classes,
                    });
                }
            }
        }
        match seen.iter().position(|seen| !seen) {
            Some(class) => Err(FeaturesError::EmptyClass { class }),
            None => Ok(Self {
                dim,
                classes,
                rows,
                truth,
                weights,
            }),
        }
    }

    /// Values per row, D.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Classes, C.
    #[must_use]
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// N×D, row by row.
    #[must_use]
    pub fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// N classes.
    #[must_use]
    pub fn truth(&self) -> &[u32] {
        &self.truth
    }

    /// How much each row counts; none if all count the same.
    #[must_use]
    pub fn weights(&self) -> Option<&[f32]> {
        self.weights.as_deref()
    }

    /// Rows, N.
    #[must_use]
    pub fn len(&self) -> usize {
        self.truth.len()
    }

    /// Never: there are at least two rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.truth.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(
        rows: &[f32],
        truth: &[u32],
        weights: Option<&[f32]>,
    ) -> Result<Features, FeaturesError> {
        Features::new(
            2,
            2,
            rows.to_vec(),
            truth.to_vec(),
            weights.map(<[f32]>::to_vec),
        )
    }

    #[test]
    fn a_sound_table_is_taken() {
        let features = table(&[0.0, 1.0, 2.0, 3.0], &[0, 1], Some(&[1.0, 0.5])).unwrap();
        assert_eq!(
            (features.len(), features.dim(), features.classes()),
            (2, 2, 2)
        );
    }

    #[test]
    fn each_mistake_has_its_words() {
        let words = |result: Result<Features, FeaturesError>| result.unwrap_err().to_string();
        let good = [0.0, 1.0, 2.0, 3.0];
        assert_eq!(
            words(table(&good[..3], &[0, 1], None)),
            "features: 3 values for 4"
        );
        assert_eq!(
            words(table(&[0.0, 1.0, 2.0, f32::NAN], &[0, 1], None)),
            "features: row 1, value 1 is NaN, expected a number within ±1e6"
        );
        assert_eq!(
            words(table(&[f32::INFINITY, 1.0, 2.0, 0.0], &[0, 1], None)),
            "features: row 0, value 0 is inf, expected a number within ±1e6"
        );
        assert_eq!(
            words(table(&good, &[0, 2], None)),
            "features: row 1 has class 2, there are 2 classes"
        );
        assert_eq!(
            words(table(&good, &[0, 0], None)),
            "features: class 1 has no row of any weight"
        );
        assert_eq!(
            words(table(&good, &[0, 1], Some(&[1.0, 0.0]))),
            "features: class 1 has no row of any weight"
        );
        assert_eq!(
            words(table(&good, &[0, 1], Some(&[1.0, -1.0]))),
            "features: row 1 has the weight -1, expected 0 to 1e6"
        );
        assert_eq!(
            words(table(&good, &[0, 1], Some(&[1.0]))),
            "features: 1 weights for 2"
        );
        assert_eq!(
            words(Features::new(0, 2, vec![], vec![0, 1], None)),
            "features: 0 values per row, 1 to 65536 are allowed"
        );
        assert_eq!(
            words(Features::new(1, 1, vec![0.0], vec![0], None)),
            "features: 1 classes, 2 to 4096 are allowed"
        );
    }
}

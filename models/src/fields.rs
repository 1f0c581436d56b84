//! Reads a TOML table key by key and collects every problem, instead of stopping at the first.

use std::fmt;

use toml::{Table, Value};

/// One thing that is wrong with a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// Where: `input.std[1]`.
    pub field: String,
    /// What: `must be > 0`.
    pub problem: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

/// One table of the document. Whatever was not asked for by the time of [`Fields::finish`] is an
/// unknown key, which is an error too: a mistyped name must not silently mean the default.
pub(crate) struct Fields {
    path: String,
    table: Table,
    errors: Vec<FieldError>,
    /// The whole table is missing, which is one error; its keys are not reported one by one.
    absent: bool,
}

/// What a TOML value is, in the words of a message.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "text",
        Value::Integer(_) => "an integer",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

/// A TOML number as f32; integers are numbers too. NaN, infinities and what f32 cannot hold are none.
fn number(value: &Value) -> Option<f32> {
    let wide = match value {
        Value::Float(wide) => *wide,
        #[expect(
            clippy::cast_precision_loss,
            reason = "numbers of a manifest are small"
        )]
        Value::Integer(whole) => *whole as f64,
        _ => return None,
    };
    #[expect(clippy::cast_possible_truncation, reason = "checked for infinity")]
    let narrow = wide as f32;
    narrow.is_finite().then_some(narrow)
}

impl Fields {
    pub(crate) fn new(path: &str, table: Table) -> Self {
        Self {
            path: path.to_owned(),
            table,
            errors: Vec::new(),
            absent: false,
        }
    }

    fn name(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    /// Records a problem with `key` (which may carry an index: `std[1]`); the first one of a key counts,
    /// the others would follow from it.
    pub(crate) fn wrong(&mut self, key: &str, problem: impl Into<String>) {
        let field = self.name(key);
        if self.absent || self.errors.iter().any(|error| error.field == field) {
            return;
        }
        self.errors.push(FieldError {
            field,
            problem: problem.into(),
        });
    }

    /// Records a problem with `key` unless `fine`.
    pub(crate) fn check(&mut self, fine: bool, key: &str, problem: &str) {
        if !fine {
            self.wrong(key, problem);
        }
    }

    /// Is the key there (and not yet taken)?
    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    fn take<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.table.remove(key)?;
        let read = read(&value);
        if read.is_none() {
            self.wrong(key, format!("must be {expected}, not {}", kind(&value)));
        }
        read
    }

    /// The value or, when the key is absent, an error.
    pub(crate) fn need<T>(&mut self, key: &str, read: impl FnOnce(&mut Self) -> Option<T>) -> T
    where
        T: Default,
    {
        if !self.has(key) {
            self.wrong(key, "is missing");
            return T::default();
        }
        read(self).unwrap_or_default()
    }

    pub(crate) fn text(&mut self, key: &str) -> Option<String> {
        self.take(key, "text", |v| v.as_str().map(str::to_owned))
    }

    pub(crate) fn whole(&mut self, key: &str) -> Option<u64> {
        self.take(key, "an integer of at least 0", |v| {
            v.as_integer().and_then(|i| u64::try_from(i).ok())
        })
    }

    pub(crate) fn number(&mut self, key: &str) -> Option<f32> {
        self.take(key, "a finite number", number)
    }

    fn list<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Option<Vec<T>> {
        let values = self.take(key, "a list", |v| v.as_array().cloned())?;
        let mut list = Vec::with_capacity(values.len());
        for (at, value) in values.iter().enumerate() {
            match read(value) {
                Some(item) => list.push(item),
                None => self.wrong(&format!("{key}[{at}]"), format!("must be {expected}")),
            }
        }
        (list.len() == values.len()).then_some(list)
    }

    pub(crate) fn numbers(&mut self, key: &str) -> Option<Vec<f32>> {
        self.list(key, "a finite number", number)
    }

    pub(crate) fn wholes(&mut self, key: &str) -> Option<Vec<usize>> {
        self.list(key, "an integer of at least 0", |v| {
            v.as_integer().and_then(|i| usize::try_from(i).ok())
        })
    }

    pub(crate) fn texts(&mut self, key: &str) -> Option<Vec<String>> {
        self.list(key, "text", |v| v.as_str().map(str::to_owned))
    }

    /// One of a few words; the first of `choices` is what stands in after an error.
    pub(crate) fn choice<T: Copy>(
        &mut self,
        key: &str,
        choices: &[(&str, T)],
        default: Option<T>,
    ) -> T {
        if !self.has(key) {
            if default.is_none() {
                self.wrong(key, "is missing");
            }
            return default.unwrap_or(choices[0].1);
        }
        let Some(text) = self.text(key) else {
            return choices[0].1;
        };
        if let Some((_, value)) = choices.iter().find(|(word, _)| *word == text) {
            return *value;
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        self.wrong(key, format!("must be one of {}", words.join(", ")));
        choices[0].1
    }

    /// A table inside this one; an empty one (with an error) when it is missing and `required`.
    pub(crate) fn section(&mut self, key: &str, required: bool) -> Self {
        let path = self.name(key);
        if required && !self.has(key) {
            self.wrong(key, "is missing");
            let mut absent = Self::new(&path, Table::new());
            absent.absent = true;
            return absent;
        }
        let table = self.take(key, "a table", |v| v.as_table().cloned());
        Self::new(&path, table.unwrap_or_default())
    }

    /// A list of tables: `[[key]]`.
    pub(crate) fn sections(&mut self, key: &str) -> Vec<Self> {
        let tables = self.list(key, "a table", |v| v.as_table().cloned());
        let path = self.name(key);
        tables
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .map(|(at, table)| Self::new(&format!("{path}[{at}]"), table))
            .collect()
    }

    /// Every key that is left, as numbers.
    pub(crate) fn rest_as_numbers(&mut self) -> Vec<(String, f32)> {
        let keys: Vec<String> = self.table.keys().cloned().collect();
        keys.into_iter()
            .filter_map(|key| self.number(&key).map(|value| (key, value)))
            .collect()
    }

    /// Hands over what went wrong; keys that nobody asked for are unknown.
    pub(crate) fn finish(mut self, errors: &mut Vec<FieldError>) {
        for key in std::mem::take(&mut self.table).keys() {
            self.wrong(key, "is not a known key");
        }
        errors.append(&mut self.errors);
    }
}

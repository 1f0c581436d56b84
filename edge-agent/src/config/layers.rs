//! The layers of the configuration: files, settings from the coordinator, the environment.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Config, ConfigErrors};

/// A configuration file is written by people; larger is not one.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// The variable with the enrolment token.
pub(crate) const TOKEN: &str = "LACEWING_COORDINATOR_TOKEN";

/// Settings that the environment may override: the variable, and the path of the key.
const ENVIRONMENT: [(&str, &[&str]); 12] = [
    ("LACEWING_SITE", &["site"]),
    ("LACEWING_DEVICE", &["device"]),
    ("LACEWING_DATA", &["data"]),
    ("LACEWING_COORDINATOR_URL", &["coordinator", "url"]),
    (TOKEN, &["coordinator", "token"]),
    (
        "LACEWING_COORDINATOR_TOKEN_FILE",
        &["coordinator", "token_file"],
    ),
    ("LACEWING_STORAGE_KEY_FILE", &["storage", "key_file"]),
    ("LACEWING_BROKER_URL", &["broker", "url"]),
    ("LACEWING_MODEL_BUNDLE", &["model", "bundle"]),
    ("LACEWING_SAMPLES_COORDINATOR", &["samples", "coordinator"]),
    ("LACEWING_UPDATE_COORDINATOR", &["update", "coordinator"]),
    ("LACEWING_UPDATE_ROOT", &["update", "root"]),
];

/// The device's own files and environment. The files are read again for each start of the agent.
#[derive(Clone, Debug)]
pub struct Layers {
    files: Vec<PathBuf>,
    environment: Vec<(&'static [&'static str], String)>,
}

impl Layers {
    /// These files, a later one over an earlier one, and the environment over all.
    pub fn new(files: &[PathBuf], environment: impl Fn(&str) -> Option<String>) -> Self {
        let set = |(variable, path)| Some((path, environment(variable)?));
        Self {
            files: files.to_vec(),
            environment: ENVIRONMENT.into_iter().filter_map(set).collect(),
        }
    }

    /// Reads the files, lays `settings` over them, then the environment, and checks it all.
    ///
    /// # Errors
    /// Every mistake at once.
    pub fn read(&self, settings: Option<&Map<String, Value>>) -> Result<Config, ConfigErrors> {
        let mut whole = toml::Table::new();
        let mut mistakes = Vec::new();
        for file in &self.files {
            match read(file) {
                Ok(layer) => merge(&mut whole, layer),
                Err(mistake) => mistakes.push(mistake),
            }
        }
        if let Some(settings) = settings {
            lay_over(&mut whole, settings, &mut mistakes);
        }
        for (path, value) in &self.environment {
            set(&mut whole, path, toml::Value::String(value.clone()));
        }
        Config::from_table(whole, mistakes)
    }
}

/// Settings differ from a file in that they change the sources that are there, by their names.
fn lay_over(whole: &mut toml::Table, settings: &Map<String, Value>, mistakes: &mut Vec<String>) {
    let mut layer = match toml::Table::try_from(settings) {
        Ok(layer) => layer,
        Err(error) => return mistakes.push(format!("settings: {error}")),
    };
    let sources = match layer.remove("source") {
        Some(toml::Value::Array(sources)) => sources,
        _ => Vec::new(),
    };
    for source in sources {
        let toml::Value::Table(source) = source else {
            continue;
        };
        let name = source.get("name").cloned();
        let own = whole.get_mut("source").and_then(toml::Value::as_array_mut);
        let mut own = own
            .into_iter()
            .flatten()
            .filter_map(toml::Value::as_table_mut);
        match own.find(|own| own.get("name") == name.as_ref()) {
            Some(own) => merge(own, source),
            None => {
                let name = name.as_ref().and_then(toml::Value::as_str).unwrap_or("?");
                mistakes.push(format!(
                    "source: this device has none with the name {name:?}"
                ));
            }
        }
    }
    if layer.contains_key("publish") {
        // Another policy has other fields.
        whole.remove("publish");
    }
    merge(whole, layer);
}

fn read(file: &Path) -> Result<toml::Table, String> {
    let shown = file.display();
    let size = std::fs::metadata(file)
        .map_err(|e| format!("{shown}: cannot be read: {e}"))?
        .len();
    if size > MAX_FILE_BYTES {
        return Err(format!(
            "{shown}: {size} bytes is too large for a configuration"
        ));
    }
    let text =
        std::fs::read_to_string(file).map_err(|e| format!("{shown}: cannot be read: {e}"))?;
    text.parse().map_err(|e| format!("{shown}: {e}"))
}

/// Tables are merged key by key, anything else is replaced.
fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

fn set(table: &mut toml::Table, path: &[&str], value: toml::Value) {
    match path {
        [] => {}
        [key] => {
            table.insert((*key).to_owned(), value);
        }
        [key, rest @ ..] => {
            let inner = table
                .entry((*key).to_owned())
                .or_insert_with(|| toml::Value::Table(toml::Table::new()));
            if let toml::Value::Table(inner) = inner {
                set(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(dir: &Path) -> Layers {
        let file = dir.join("agent.toml");
        let text = "site = 's'\ndevice = 'd'\n[publish]\nwhen = 'at_most_every'\nevery_s = 9\n\
            [[source]]\nname = 'cam0'\nkind = 'scene'\nfps = 5.0\nframes = 7\n\
            [[source]]\nname = 'cam1'\nkind = 'scene'\n";
        std::fs::write(&file, text).unwrap();
        Layers::new(&[file], |name| {
            (name == "LACEWING_SITE").then(|| "env".to_owned())
        })
    }

    fn with(layers: &Layers, text: &str) -> Result<Config, String> {
        let settings: Map<String, Value> = serde_json::from_str(text).unwrap();
        layers.read(Some(&settings)).map_err(|e| e.to_string())
    }

    #[test]
    fn settings_change_sources_by_name_and_leave_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let layers = layers(dir.path());
        let text = r#"{"source":[{"name":"cam1","fps":2}],"report":{"every_s":5},"publish":{"when":"all"}}"#;
        let config = with(&layers, text).unwrap();
        let fps: Vec<f64> = config.source.iter().map(|s| s.fps).collect();
        assert_eq!((fps, config.source[0].frames), (vec![5.0, 2.0], 7));
        assert_eq!((config.report.every_s, config.site.as_str()), (5, "env"));
        assert_eq!(config.publish, mesh_core::decide::Publish::All);
    }

    #[test]
    fn every_mistake_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"source":[{"name":"cam9","fps":2},{"name":"cam0","fps":-1}],"report":{"every_s":0,"x":1}}"#;
        let said = with(&layers(dir.path()), text).unwrap_err();
        for part in ["\"cam9\"", "source[0].fps", "report.x"] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
}

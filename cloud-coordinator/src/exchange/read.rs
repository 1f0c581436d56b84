//! An import as it passes by.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
};

use bytes::Bytes;
use tokio::runtime::Handle;

use super::{
    ExchangeError, Format, ImportReport, Kind, MAX_ENTRIES, MAX_FILES, MAX_IMPORT_BYTES, MAX_PATH,
    MAX_TEXTS, kind,
    names::Names,
    plan::{clean, plan},
    store::Import,
};
use crate::{
    clock,
    labels::check_classes,
    objects::{Inspected, inspect},
    samples::{SampleError, Samples},
};

/// Labels of one transaction: some milliseconds.
const ROWS: usize = 500;

/// What an import is to be.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) task: String,
    pub(crate) format: Format,
    pub(crate) holdout: bool,
    pub(crate) author: String,
}

/// What has passed by.
#[derive(Default)]
struct Seen {
    /// Path → sample.
    images: BTreeMap<String, i64>,
    texts: BTreeMap<String, String>,
    text_bytes: u64,
    report: ImportReport,
}

/// Takes in a tar. It blocks: call it where nobody waits.
///
/// What is wrong with a file is reported and does not stop the others.
///
/// # Errors
/// If the tar breaks off, there is no more room, or nothing can be written.
pub(crate) fn import(
    samples: &Samples,
    wanted: &Wanted,
    tar: impl Read,
    runtime: &Handle,
) -> Result<ImportReport, ExchangeError> {
    let mut seen = Seen::default();
    let broken = |error: std::io::Error| ExchangeError::Broken(format!("not a whole tar: {error}"));
    let mut archive = tar::Archive::new(tar.take(MAX_IMPORT_BYTES));
    let (mut names, mut files) = (Names::default(), 0);
    for (count, entry) in archive.entries().map_err(broken)?.raw(true).enumerate() {
        let mut entry = entry.map_err(broken)?;
        let named = names.of(&mut entry).map_err(broken)?;
        files += usize::from(named.is_some());
        if files > MAX_FILES || count >= MAX_ENTRIES {
            let why = format!("more than {MAX_FILES} files: import the rest on its own");
            return Err(ExchangeError::Broken(why));
        }
        let Some(raw) = named else { continue };
        let size = entry.size();
        let is_file = entry.header().entry_type().is_file();
        if entry.header().entry_type().is_dir() {
            continue;
        }
        let Some(path) = clean(&raw).filter(|path| is_file && path.len() <= MAX_PATH) else {
            seen.report
                .error(&raw, "is no plain file inside the folder");
            continue;
        };
        let Some((kind, most)) = kind(&path) else {
            seen.report
                .error(&path, "is neither JPEG, PNG nor a text that names classes");
            continue;
        };
        if size > most {
            seen.report
                .error(&path, format!("has {size} bytes, at most {most} are taken"));
            continue;
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(broken)?;
        if bytes.len() as u64 != size {
            return Err(ExchangeError::Broken(format!("the tar ends in {path}")));
        }
        match kind {
            Kind::Text => seen.text(path, bytes),
            Kind::Image => runtime.block_on(seen.image(samples, wanted, path, bytes.into()))?,
        }
    }
    runtime.block_on(seen.label(samples, wanted))
}

impl Seen {
    fn text(&mut self, path: String, bytes: Vec<u8>) {
        self.text_bytes += bytes.len() as u64;
        if self.text_bytes > MAX_TEXTS {
            return self.report.error(&path, "too many texts");
        }
        match String::from_utf8(bytes) {
            Ok(text) => {
                self.texts.insert(path, text);
            }
            Err(_) => self.report.error(&path, "is not UTF-8"),
        }
    }

    async fn image(
        &mut self,
        samples: &Samples,
        wanted: &Wanted,
        path: String,
        bytes: Bytes,
    ) -> Result<(), ExchangeError> {
        let Inspected { sha256, bytes } = match inspect(&bytes, None) {
            Ok(inspected) => inspected,
            Err(why) => {
                self.report.error(&path, why.to_string());
                return Ok(());
            }
        };
        samples.room(bytes.len() as u64)?;
        let import = Import {
            task: &wanted.task,
            sha256: &sha256,
            bytes: bytes.len() as i64,
            file: &path,
            holdout: wanted.holdout,
            author: &wanted.author,
            now_ms: clock::now_ms(),
        };
        let shared = samples.objects.shared().await.map_err(SampleError::from)?;
        let erased = samples.records.was_erased(&sha256).await;
        if erased.map_err(SampleError::from)? {
            self.report.error(&path, SampleError::Erased.to_string());
            return Ok(());
        }
        if !samples
            .objects
            .has(&sha256)
            .await
            .map_err(SampleError::from)?
        {
            let put = samples.objects.put(&shared, &sha256, bytes.clone()).await;
            put.map_err(SampleError::from)?;
        }
        let added = samples.records.add_import(&import).await;
        let (id, new) = added.map_err(SampleError::from)?;
        if new {
            samples.added(bytes.len() as u64);
            self.report.imported += 1;
        } else {
            self.report.known += 1;
        }
        self.images.insert(path, id);
        Ok(())
    }

    /// Gives the images the classes that the files name.
    async fn label(
        mut self,
        samples: &Samples,
        wanted: &Wanted,
    ) -> Result<ImportReport, ExchangeError> {
        let records = &samples.records;
        let paths: BTreeSet<String> = self.images.keys().cloned().collect();
        let plan = plan(wanted.format, &paths, &self.texts);
        for (path, why) in &plan.errors {
            self.report.error(path, why.as_str());
        }
        self.report.failed += plan.more_errors;
        let now = clock::now_ms();
        let mut classes = records
            .classes(&wanted.task)
            .await
            .map_err(SampleError::from)?;
        for class in plan.classes {
            if classes.contains(&class) {
                continue;
            }
            classes.push(class.clone());
            if let Err(error) = check_classes(&classes) {
                classes.pop();
                self.report.error(&class, error.to_string());
            }
        }
        if !self.images.is_empty() {
            records.put_task(&wanted.task, &classes, now).await?;
        }
        for path in &plan.holdout {
            if let Some(id) = self.images.get(path) {
                let held = records.set_holdout(*id, true, &wanted.author, now).await;
                held.map_err(SampleError::from)?;
            }
        }
        // One image may lie in two places.
        let labels: BTreeMap<i64, i64> = plan
            .labels
            .iter()
            .filter_map(|(path, class)| {
                let position = classes.iter().position(|c| c == class)?;
                Some((*self.images.get(path)?, position as i64))
            })
            .collect();
        let labels: Vec<_> = labels.into_iter().collect();
        for labels in labels.chunks(ROWS) {
            let given = records.label_imports(labels, &wanted.author, now).await;
            let given = given.map_err(SampleError::from)?;
            self.report.labelled += given;
            self.report.kept += labels.len() - given;
        }
        Ok(self.report)
    }
}

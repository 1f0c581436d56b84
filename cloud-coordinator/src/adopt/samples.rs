//! Sample pictures: found in a folder, judged by the model, and a few of them chosen as golden ones.

use std::{
    borrow::Cow,
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use models::{Engine, MAX_ENCODED_BYTES, Picture};

/// Pictures that the model judges: enough to meet many labels, few enough to wait for.
const LOOKED_AT: usize = 64;
/// Golden pictures of a bundle: each device tries all of them.
const GOLDEN: usize = 8;
/// The largest golden picture: it travels to every device.
const GOLDEN_BYTES: usize = 512 * 1024;
/// A picture that is too large is shrunk to so many pixels, or twice the model's side if that is more.
const SHRUNK_SIDE: u32 = 640;
/// Folders within folders that are looked through.
const DEPTH: usize = 4;
/// Files that are looked through: more than a sample, less than a disk.
const MAX_FILES: usize = 100_000;

/// A picture and the model's answer.
pub(super) struct Sample {
    /// Relative to the folder.
    pub(super) path: String,
    /// As it goes into the bundle.
    pub(super) bytes: Vec<u8>,
    /// Raw, one per label.
    pub(super) scores: Vec<f32>,
    /// The label with the top score.
    pub(super) class: usize,
}

/// All that was looked at.
pub(super) struct Samples {
    pub(super) all: Vec<Sample>,
    /// Files that were no pictures, with the reason.
    pub(super) skipped: Vec<String>,
}

/// Adds the image files below `dir`, by the ends of their names.
fn collect(dir: &Path, depth: usize, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden {
            continue;
        }
        if path.is_dir() {
            if depth < DEPTH {
                collect(&path, depth + 1, files)?;
            }
            continue;
        }
        let end = path.extension().and_then(|end| end.to_str());
        let end = end.unwrap_or_default().to_ascii_lowercase();
        let known = ["jpg", "jpeg", "png", "bmp", "webp", "gif"].contains(&end.as_str());
        if known && path.is_file() {
            ensure!(
                files.len() < MAX_FILES,
                "more than {MAX_FILES} pictures in {}; give a folder with a few of each label",
                dir.display()
            );
            files.push(path);
        }
    }
    Ok(())
}

/// A picture as a device can keep it, and its pixels.
fn read(path: &Path, side: u32) -> anyhow::Result<(Vec<u8>, Picture)> {
    ensure!(
        path.metadata()?.len() <= MAX_ENCODED_BYTES as u64,
        "larger than 64 MiB"
    );
    let bytes = fs::read(path)?;
    let picture = Picture::decode(&bytes)?;
    let kept = bytes.starts_with(&[0xff, 0xd8]) || bytes.starts_with(b"\x89PNG");
    if kept && bytes.len() <= GOLDEN_BYTES {
        // It travels to every device: without what a camera wrote beside the pixels.
        if let Cow::Owned(bare) = models::bare(&bytes, GOLDEN_BYTES)? {
            let picture = Picture::decode(&bare)?;
            return Ok((bare, picture));
        }
        return Ok((bytes, picture));
    }
    let mut longest = SHRUNK_SIDE.max(side * 2);
    let mut bytes = picture.to_jpeg(longest)?;
    while bytes.len() > GOLDEN_BYTES && longest > side {
        longest /= 2;
        bytes = picture.to_jpeg(longest)?;
    }
    let picture = Picture::decode(&bytes)?;
    Ok((bytes, picture))
}

/// Shows the model pictures from all over the folder.
pub(super) fn look(dir: &Path, engine: &Engine) -> anyhow::Result<Samples> {
    let mut files = Vec::new();
    collect(dir, 0, &mut files)?;
    files.sort();
    let count = files.len().min(LOOKED_AT);
    let (_, height, width) = engine.manifest().input.channels_height_width();
    let side = u32::try_from(height.max(width))?;
    let mut samples = Samples {
        all: Vec::new(),
        skipped: Vec::new(),
    };
    for at in 0..count {
        // Evenly, so that each folder has its share.
        let file = &files[at * files.len() / count];
        let path = file.strip_prefix(dir).unwrap_or(file);
        let path = path.to_string_lossy().into_owned();
        let (bytes, picture) = match read(file, side) {
            Ok(read) => read,
            Err(error) => {
                samples.skipped.push(format!("{path}: {error}"));
                continue;
            }
        };
        // A model that fails on one picture is no model for a device.
        let outcome = engine.infer(&picture)?;
        samples.all.push(Sample {
            path,
            bytes,
            class: outcome.class.unwrap_or_default(),
            scores: outcome.scores,
        });
    }
    if samples.all.is_empty() {
        let why = samples.skipped.first().map_or("", String::as_str);
        bail!("no picture in {} can be used {why}", dir.display());
    }
    Ok(samples)
}

/// One for each label that the model gives, then others, in the order of the folder.
pub(super) fn choose(samples: &[Sample]) -> Vec<&Sample> {
    let mut shown = HashSet::new();
    let (mut chosen, others): (Vec<&Sample>, Vec<&Sample>) = samples
        .iter()
        .partition(|sample| shown.len() < GOLDEN && shown.insert(sample.class));
    chosen.extend(others);
    chosen.truncate(GOLDEN);
    chosen.sort_by(|a, b| a.path.cmp(&b.path));
    chosen
}

/// Of the pictures that lie in a folder with the name of a label: how many the model gives that label, of how many.
pub(super) fn agreement(samples: &[Sample], labels: &[String]) -> (usize, usize) {
    let mut count = (0, 0);
    for sample in samples {
        let folder = Path::new(&sample.path).parent().and_then(Path::file_name);
        let label = folder.and_then(|folder| labels.iter().position(|label| folder == &**label));
        if let Some(label) = label {
            count.0 += usize::from(label == sample.class);
            count.1 += 1;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(path: &str, class: usize) -> Sample {
        Sample {
            path: path.to_owned(),
            bytes: Vec::new(),
            scores: Vec::new(),
            class,
        }
    }

    #[test]
    fn golden_pictures_are_spread_over_the_labels() {
        let mut samples: Vec<Sample> = (0..20).map(|n| sample(&format!("a/{n:02}"), 0)).collect();
        samples.extend((0..3).map(|n| sample(&format!("b/{n}"), n + 1)));
        let chosen = choose(&samples);
        let paths: Vec<&str> = chosen.iter().map(|s| s.path.as_str()).collect();
        assert_eq!(
            paths,
            ["a/00", "a/01", "a/02", "a/03", "a/04", "b/0", "b/1", "b/2"]
        );
        let many: Vec<Sample> = (0..20).map(|n| sample(&format!("{n:02}"), n)).collect();
        assert_eq!(choose(&many).len(), GOLDEN);
    }

    #[test]
    fn folders_with_names_of_labels_are_compared() {
        let labels = ["ok".to_owned(), "hole".to_owned()];
        let samples = [
            sample("ok/1.png", 0),
            sample("x/hole/2.png", 0),
            sample("other/3.png", 1),
            sample("4.png", 1),
        ];
        assert_eq!(agreement(&samples, &labels), (1, 2));
    }
}

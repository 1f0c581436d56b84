//! A folder of images as a camera.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use models::{ImageError, MAX_ENCODED_BYTES, Picture};

use super::{Shot, Source, SourceConfig, SourceError};
use crate::update::Wanted;

/// What counts as an image by its name; its content decides whether it is one.
const ENDINGS: [&str; 6] = ["jpg", "jpeg", "png", "bmp", "gif", "webp"];
/// A folder is listed once and kept in memory.
const MAX_FILES: usize = 1_000_000;
/// Larger files are not handed on: the few frames that wait somewhere must fit the memory.
const MAX_ORIGINAL: usize = 8 * 1024 * 1024;
/// Folders inside folders; deeper is a loop or a mistake.
const MAX_DEPTH: usize = 8;

/// Shows the images of a folder in the order of their paths, once or for ever.
#[derive(Debug)]
pub(crate) struct Folder {
    root: PathBuf,
    files: Vec<PathBuf>,
    repeat: bool,
    labelled: bool,
    wanted: Wanted,
}

impl Folder {
    /// Lists the folder.
    ///
    /// # Errors
    /// If it cannot be listed or holds no image.
    pub(crate) fn open(config: &SourceConfig, wanted: Wanted) -> Result<Self, SourceError> {
        let name = config.name.to_string();
        let root = config
            .path
            .clone()
            .ok_or_else(|| SourceError::Setting(name.clone(), "needs a path".into()))?;
        let mut files = Vec::new();
        list(&root, 0, &mut files).map_err(|error| SourceError::Folder {
            name: name.clone(),
            path: root.clone(),
            error,
        })?;
        if files.is_empty() {
            return Err(SourceError::Empty { name, path: root });
        }
        files.sort();
        Ok(Self {
            root,
            files,
            repeat: config.repeat,
            labelled: config.labelled,
            wanted,
        })
    }
}

fn list(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let path = entry.path();
        if kind.is_dir() && depth < MAX_DEPTH {
            list(&path, depth + 1, files)?;
        } else if !kind.is_dir() && is_image(&path) && files.len() < MAX_FILES {
            files.push(path);
        }
    }
    Ok(())
}

/// The bytes of a file, within the bound for images.
fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    let fail = |source| ImageError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(fail)?;
    let length = file.metadata().map_err(fail)?.len();
    if length > MAX_ENCODED_BYTES as u64 {
        return Err(ImageError::TooManyBytes);
    }
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
    // It may grow while it is read.
    file.take(MAX_ENCODED_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(fail)?;
    Ok(bytes)
}

/// What a file shows, decoded for what the models need, and its bytes. Everything that looks at files goes this way, so that a
/// model says the same about one to whoever asks.
pub(crate) fn look(path: &Path, wanted: &Wanted) -> Result<(Picture, Vec<u8>), ImageError> {
    let bytes = read(path)?;
    let picture = match wanted.size() {
        Some((width, height)) => Picture::decode_for(&bytes, width, height),
        None => Picture::decode(&bytes),
    }?;
    Ok((picture, bytes))
}

fn is_image(path: &Path) -> bool {
    path.extension()
        .and_then(|e| e.to_str())
        .is_some_and(|e| ENDINGS.iter().any(|known| e.eq_ignore_ascii_case(known)))
}

impl Source for Folder {
    fn shoot(&mut self, number: u64) -> Shot {
        let count = self.files.len() as u64;
        if !self.repeat && number >= count {
            return Shot::End;
        }
        let Some(path) = usize::try_from(number % count)
            .ok()
            .and_then(|at| self.files.get(at))
        else {
            return Shot::End;
        };
        let shown = path
            .strip_prefix(&self.root)
            .unwrap_or(path)
            .to_string_lossy()
            .into_owned();
        match look(path, &self.wanted) {
            Ok((picture, bytes)) => {
                let parent = path
                    .parent()
                    .and_then(Path::file_name)
                    .map(|n| n.to_string_lossy().into_owned());
                Shot::Picture {
                    picture,
                    original: (bytes.len() <= MAX_ORIGINAL).then_some(bytes),
                    file: Some(shown),
                    truth: parent.filter(|_| self.labelled),
                }
            }
            Err(error) => Shot::Bad {
                why: format!("{shown}: {error}"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_images_in_order_and_names_what_is_none() {
        let folder = tempfile::tempdir().unwrap();
        for (name, good) in [
            ("b/2.png", true),
            ("a/1.PNG", true),
            ("c/3.jpg", false),
            ("c/notes.txt", false),
        ] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            if good {
                image::RgbImage::new(8, 8)
                    .save_with_format(&path, image::ImageFormat::Png)
                    .unwrap();
            } else {
                std::fs::write(&path, "<svg>").unwrap();
            }
        }
        let text = format!(
            "name = 'c'\nkind = 'folder'\nlabelled = true\npath = {:?}",
            folder.path()
        );
        let mut config: SourceConfig = toml::from_str(&text).unwrap();
        let mut source = Folder::open(&config, Wanted::default()).unwrap();
        let seen: Vec<_> = (0..4)
            .map(|n| match source.shoot(n) {
                Shot::Picture { file, truth, .. } => {
                    format!("{} {}", file.unwrap(), truth.unwrap())
                }
                Shot::Bad { why } => why.split(':').next().unwrap().to_owned(),
                Shot::End => "end".into(),
            })
            .collect();
        assert_eq!(seen, ["a/1.PNG a", "b/2.png b", "c/3.jpg", "end"]);
        config.repeat = true;
        assert!(matches!(
            Folder::open(&config, Wanted::default()).unwrap().shoot(3),
            Shot::Picture { .. }
        ));
        config.path = Some(folder.path().join("nowhere"));
        assert!(
            Folder::open(&config, Wanted::default())
                .unwrap_err()
                .to_string()
                .contains("nowhere")
        );
    }
}

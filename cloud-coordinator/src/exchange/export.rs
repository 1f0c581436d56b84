//! A task on its way out: the same labels give the same bytes.

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use serde_json::json;

use super::{
    ExchangeError, Format,
    plan::{HOLDOUT, VAL, folders_of, quoted},
    store::ExportRow,
};
use crate::{
    objects::{ObjectError, Objects, kind_of},
    samples::{SampleError, Samples},
};

/// What comes out.
pub(crate) enum Exported<S> {
    /// A text and its media type.
    Text(&'static str, String),
    /// A tar.
    Tar(S),
}

/// The labelled images of a task. CSV and COCO name the images as the tar of `folder` has them.
pub(crate) async fn export(
    samples: &Samples,
    task: &str,
    format: Format,
) -> Result<Exported<impl Stream<Item = Result<Bytes, ObjectError>> + use<>>, ExchangeError> {
    let records = &samples.records;
    let rows = records.exported(task).await.map_err(SampleError::from)?;
    let classes = records.classes(task).await.map_err(SampleError::from)?;
    let folders = folders_of(&classes);
    let at = |class: i64| usize::try_from(class).unwrap_or(usize::MAX);
    let objects = &samples.objects;
    match format {
        Format::Csv => {
            let mut text = "path,class,split\n".to_owned();
            for row in &rows {
                let Some((class, folder)) =
                    classes.get(at(row.class)).zip(folders.get(at(row.class)))
                else {
                    continue;
                };
                let end = end_of(objects, &row.sha256).await?;
                let path = quoted(&path_of(folder, row, end));
                let split = if row.holdout { HOLDOUT } else { "train" };
                text.push_str(&format!("{path},{},{split}\n", quoted(class)));
            }
            Ok(Exported::Text("text/csv; charset=utf-8", text))
        }
        Format::Coco => {
            let (mut images, mut annotations) = (Vec::new(), Vec::new());
            for (id, row) in (1..).zip(&rows) {
                let Some(folder) = folders.get(at(row.class)) else {
                    continue;
                };
                let end = end_of(objects, &row.sha256).await?;
                let name = path_of(folder, row, end);
                let split = if row.holdout { HOLDOUT } else { "train" };
                images.push(json!({ "id": id, "file_name": name, "split": split }));
                let category = row.class + 1;
                annotations.push(json!({ "id": id, "image_id": id, "category_id": category }));
            }
            let categories: Vec<_> = (1..)
                .zip(&classes)
                .map(|(id, name): (i64, _)| json!({ "id": id, "name": name }))
                .collect();
            let all =
                json!({ "images": images, "annotations": annotations, "categories": categories });
            Ok(Exported::Text("application/json", format!("{all}\n")))
        }
        Format::Folder | Format::Yolo => {
            Ok(Exported::Tar(tar(objects.clone(), rows, folders, format)))
        }
    }
}

/// The end of an image's name.
async fn end_of(objects: &Objects, sha256: &str) -> Result<&'static str, ExchangeError> {
    let head = objects.head(sha256).await.map_err(SampleError::from)?;
    Ok(kind_of(&head).map_or("jpg", |(_, end)| end))
}

/// Where the tar of `folder` has an image.
fn path_of(folder: &str, row: &ExportRow, end: &str) -> String {
    let above = if row.holdout { "holdout/" } else { "" };
    format!("{above}{folder}/{}.{end}", row.sha256)
}

/// A tar of folders of classes; what is held out lies in a folder above them.
fn tar(
    objects: Objects,
    rows: Vec<ExportRow>,
    folders: Vec<String>,
    format: Format,
) -> impl Stream<Item = Result<Bytes, ObjectError>> {
    stream::iter(rows)
        .filter_map(move |row| {
            let folder = usize::try_from(row.class)
                .ok()
                .and_then(|at| folders.get(at));
            let folder = folder.map(|folder| match (format, row.holdout) {
                (Format::Yolo, false) => format!("train/{folder}"),
                (Format::Yolo, true) => format!("{VAL}/{folder}"),
                (_, false) => folder.clone(),
                (_, true) => format!("{HOLDOUT}/{folder}"),
            });
            let objects = objects.clone();
            async move { Some(file(&objects, &folder?, &row.sha256).await) }
        })
        // A tar ends with two empty blocks.
        .chain(stream::iter([Ok(Bytes::from_static(&[0; 1024]))]))
}

async fn file(objects: &Objects, folder: &str, sha256: &str) -> Result<Bytes, ObjectError> {
    let bytes = objects.read(sha256).await?;
    let end = kind_of(&bytes).map_or("jpg", |(_, end)| end);
    // Into memory, where writing does not fail; the time stays 0, so that the same comes out each time.
    let mut tar = tar::Builder::new(Vec::with_capacity(bytes.len() + 1024));
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    let added = tar.append_data(&mut header, format!("{folder}/{sha256}.{end}"), &bytes[..]);
    let done = added.and_then(|()| tar.into_inner());
    let mut done = done.map_err(|_| ObjectError::Damaged(sha256.to_owned()))?;
    // Without the blocks that end a tar: more may follow.
    done.truncate(done.len().saturating_sub(1024));
    Ok(done.into())
}

//! Which class each image has, as the files of a format say. Pure: names and texts go in.
//!
//! A model that classifies has one answer for an image, so an image has one class here.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write,
};

use serde::Deserialize;

use super::{Format, NAMED};

/// How images are marked that are only ever measured with: by a folder above those of the classes, in the column
/// `split`, or in the field `split` of an image.
pub(super) const HOLDOUT: &str = "holdout";
/// The same in the folders of YOLO.
pub(super) const VAL: &str = "val";
/// The most classes that a file may name: far beyond what a task takes.
const MAX_NAMES: usize = 10_000;

/// What the files say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Every class that is named, in the order of the files where they have one, else of the alphabet.
    pub(super) classes: Vec<String>,
    /// Path of an image → its class.
    pub(super) labels: BTreeMap<String, String>,
    /// Paths of images that are only to be measured with.
    pub(super) holdout: BTreeSet<String>,
    /// What cannot be used: where, and why. The first of them.
    pub(super) errors: Vec<(String, String)>,
    /// How many there are beyond those.
    pub(super) more_errors: usize,
}

/// A path as it is used here: relative, with `/`, never upwards.
pub(super) fn clean(path: &str) -> Option<String> {
    if path.starts_with('/') || path.contains(['\\', '\0']) {
        return None;
    }
    let parts: Vec<_> = path
        .split('/')
        .filter(|p| !p.is_empty() && *p != ".")
        .collect();
    let fine = !parts.is_empty() && !parts.contains(&"..");
    fine.then(|| parts.join("/"))
}

fn folder(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

fn base(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, base)| base)
}

/// The images, found by what a file calls them. Files may have millions of lines: none of them is a walk over all images.
struct Finder<'a> {
    images: &'a BTreeSet<String>,
    /// The image of each name without its folders; nothing where several have it.
    by_base: HashMap<&'a str, Option<&'a String>>,
}

impl<'a> Finder<'a> {
    fn new(images: &'a BTreeSet<String>) -> Self {
        let mut by_base = HashMap::new();
        for image in images {
            by_base
                .entry(base(image))
                .and_modify(|same| *same = None)
                .or_insert(Some(image));
        }
        Self { images, by_base }
    }

    /// The image that a file in `at` means by `name`: beside it, from the top, or the only one of this name.
    fn find(&self, at: &str, name: &str) -> Option<&'a String> {
        let name = clean(name)?;
        let beside = if at.is_empty() {
            name.clone()
        } else {
            format!("{at}/{name}")
        };
        let exact = self.images.get(&beside).or_else(|| self.images.get(&name));
        exact.or_else(|| self.by_base.get(base(&name)).copied().flatten())
    }
}

impl Plan {
    fn error(&mut self, path: &str, why: impl Into<String>) {
        if self.errors.len() < NAMED {
            self.errors.push((path.to_owned(), why.into()));
        } else {
            self.more_errors += 1;
        }
    }

    /// Notes the class of an image; one that has another already has none, and an error.
    fn label(&mut self, path: &str, class: &str, unclear: &mut BTreeSet<String>) {
        if unclear.contains(path) {
            return;
        }
        let known = self
            .labels
            .entry(path.to_owned())
            .or_insert_with(|| class.to_owned());
        if known != class {
            let why = format!("has more than one class: {known:?} and {class:?}");
            self.labels.remove(path);
            self.error(path, why);
            unclear.insert(path.to_owned());
        }
    }

    /// The classes that are used and not in the list yet, in the order of the alphabet.
    fn collect(&mut self) {
        let used: BTreeSet<&String> = self.labels.values().collect();
        let new = used
            .into_iter()
            .filter(|c| !self.classes.contains(c))
            .cloned();
        let new: Vec<_> = new.collect();
        self.classes.extend(new);
    }
}

/// Reads what the files say of these images.
pub(super) fn plan(
    format: Format,
    images: &BTreeSet<String>,
    texts: &BTreeMap<String, String>,
) -> Plan {
    let mut plan = Plan::default();
    let above = |path: &&String, name: &str| {
        let folders = folder(path);
        folder(folders).split('/').any(|part| part == name)
    };
    match format {
        Format::Folder | Format::Yolo => {
            let name = if format == Format::Folder {
                HOLDOUT
            } else {
                VAL
            };
            let held = images.iter().filter(|path| above(path, name));
            plan.holdout = held.cloned().collect();
        }
        Format::Csv | Format::Coco => {}
    }
    match format {
        Format::Folder => folders(&mut plan, images),
        Format::Csv => csv(&mut plan, images, texts),
        Format::Coco => coco(&mut plan, images, texts),
        Format::Yolo => yolo(&mut plan, images, texts),
    }
    plan.collect();
    plan
}

fn folders(plan: &mut Plan, images: &BTreeSet<String>) {
    for path in images {
        match base(folder(path)) {
            "" => plan.error(path, "is in no folder that names its class"),
            class => {
                plan.labels.insert(path.clone(), class.to_owned());
            }
        }
    }
}

/// The fields of one line; quotes as in RFC 4180, but no line break in a field.
fn fields(line: &str) -> Vec<String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut rest = line.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '"' if quoted && rest.peek() == Some(&'"') => {
                rest.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field)),
            c => field.push(c),
        }
    }
    fields.push(field);
    fields
}

/// A field as it is written.
pub(super) fn quoted(field: &str) -> String {
    if field.contains(['"', ',']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

fn csv(plan: &mut Plan, images: &BTreeSet<String>, texts: &BTreeMap<String, String>) {
    let mut unclear = BTreeSet::new();
    let finder = Finder::new(images);
    for (file, text) in texts.iter().filter(|(file, _)| file.ends_with(".csv")) {
        let mut split = None;
        for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let fields = fields(line);
            let (path, class) = match fields.as_slice() {
                [path, ..] if number == 0 && path.trim() == "path" => {
                    split = fields.iter().position(|field| field.trim() == "split");
                    continue;
                }
                [only] if only.trim().is_empty() => continue,
                [path, class, ..] => (path.trim(), class.trim()),
                _ => {
                    plan.error(&format!("{file}:{}", number + 1), "is not path,class");
                    continue;
                }
            };
            match finder.find(folder(file), path) {
                None => plan.error(&format!("{file}:{}", number + 1), "there is no such image"),
                // Known, but nobody said what it is.
                Some(_) if class.is_empty() => {}
                Some(image) => {
                    plan.label(image, class, &mut unclear);
                    let split = split.and_then(|at| fields.get(at));
                    if split.is_some_and(|split| split.trim() == HOLDOUT) {
                        plan.holdout.insert(image.clone());
                    }
                }
            }
        }
    }
}

#[derive(Deserialize)]
struct Coco {
    images: Vec<CocoImage>,
    #[serde(default)]
    annotations: Vec<CocoAnnotation>,
    categories: Vec<CocoCategory>,
}

#[derive(Deserialize)]
struct CocoImage {
    id: i64,
    file_name: String,
    #[serde(default)]
    split: Option<String>,
}

#[derive(Deserialize)]
struct CocoAnnotation {
    image_id: i64,
    category_id: i64,
}

#[derive(Deserialize)]
struct CocoCategory {
    id: i64,
    name: String,
}

fn coco(plan: &mut Plan, images: &BTreeSet<String>, texts: &BTreeMap<String, String>) {
    let mut unclear = BTreeSet::new();
    let finder = Finder::new(images);
    for (file, text) in texts.iter().filter(|(file, _)| file.ends_with(".json")) {
        let mut coco: Coco = match serde_json::from_str(text) {
            Ok(coco) => coco,
            Err(error) => {
                plan.error(file, format!("is not COCO: {error}"));
                continue;
            }
        };
        coco.categories.sort_by_key(|c| c.id);
        for category in coco.categories.iter().take(MAX_NAMES) {
            if !plan.classes.contains(&category.name) {
                plan.classes.push(category.name.clone());
            }
        }
        let names: BTreeMap<_, _> = coco.categories.iter().map(|c| (c.id, &c.name)).collect();
        let mut found = BTreeMap::new();
        for image in &coco.images {
            match finder.find(folder(file), &image.file_name) {
                Some(path) => {
                    if image.split.as_deref() == Some(HOLDOUT) {
                        plan.holdout.insert(path.clone());
                    }
                    found.insert(image.id, path);
                }
                None => plan.error(&image.file_name, "there is no such image"),
            }
        }
        for annotation in &coco.annotations {
            let Some(path) = found.get(&annotation.image_id) else {
                continue;
            };
            match names.get(&annotation.category_id) {
                Some(class) => plan.label(path, class, &mut unclear),
                None => plan.error(
                    path,
                    format!("there is no category {}", annotation.category_id),
                ),
            }
        }
    }
}

/// The names of the classes in a `data.yaml`: a list in brackets, or one to a line.
fn yaml_names(text: &str) -> Vec<String> {
    let bare = |name: &str| name.trim().trim_matches(['"', '\'']).to_owned();
    let mut lines = text.lines();
    let Some(first) = lines.by_ref().find_map(|line| line.strip_prefix("names:")) else {
        return Vec::new();
    };
    if let Some(list) = first.trim().strip_prefix('[') {
        let list = list.trim_end().trim_end_matches(']');
        return list
            .split(',')
            .map(bare)
            .filter(|n| !n.is_empty())
            .take(MAX_NAMES)
            .collect();
    }
    lines
        .take_while(|line| line.starts_with([' ', '-', '\t']))
        .filter_map(|line| {
            let line = line.trim();
            let name = line
                .strip_prefix("- ")
                .or_else(|| line.split_once(':').map(|(_, name)| name))?;
            Some(bare(name))
        })
        .take(MAX_NAMES)
        .collect()
}

/// Folders of classes; or, where there are texts of boxes, the class that all boxes of an image have.
fn yolo(plan: &mut Plan, images: &BTreeSet<String>, texts: &BTreeMap<String, String>) {
    let is_list = |file: &str| base(file) == "classes.txt" || file.ends_with(".names");
    for (file, text) in texts {
        let names = if is_list(file) {
            text.lines()
                .map(|l| l.trim().to_owned())
                .filter(|l| !l.is_empty())
                .take(MAX_NAMES)
                .collect()
        } else if file.ends_with(".yaml") || file.ends_with(".yml") {
            yaml_names(text)
        } else {
            continue;
        };
        if plan.classes.is_empty() {
            plan.classes = names;
        }
    }
    let boxes: BTreeMap<_, _> = texts
        .iter()
        .filter(|(file, _)| file.ends_with(".txt") && !is_list(file))
        .filter_map(|(file, text)| Some((file.strip_suffix(".txt")?, text)))
        .collect();
    if boxes.is_empty() {
        plan.classes.clear();
        return folders(plan, images);
    }
    let mut unclear = BTreeSet::new();
    for path in images {
        let stem = path
            .rsplit_once('.')
            .map_or(path.as_str(), |(stem, _)| stem);
        // `images/…` and `labels/…` lie side by side.
        let beside = format!("/{stem}").replace("/images/", "/labels/");
        let Some(text) = boxes
            .get(beside.trim_start_matches('/'))
            .or_else(|| boxes.get(stem))
        else {
            continue;
        };
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let index = line
                .split_whitespace()
                .next()
                .and_then(|n| n.parse::<usize>().ok());
            match index.and_then(|n| plan.classes.get(n)).cloned() {
                Some(class) => plan.label(path, &class, &mut unclear),
                None => {
                    plan.error(path, "its text names a class that is in no list of classes");
                    break;
                }
            }
        }
    }
}

/// The folder of each class: what every system takes as a name, each once.
pub(super) fn folders_of(classes: &[String]) -> Vec<String> {
    let mut used = BTreeSet::new();
    classes
        .iter()
        .enumerate()
        .map(|(index, class)| {
            let safe = |c: char| {
                if c.is_alphanumeric() || matches!(c, '-' | '_' | ' ' | '.') {
                    c
                } else {
                    '_'
                }
            };
            let mut name: String = class.chars().map(safe).take(60).collect();
            name = name.trim_matches([' ', '.']).to_owned();
            if name.is_empty() || used.contains(&name.to_lowercase()) {
                // Writing to a string does not fail.
                let _ = write!(name, "_{index}");
            }
            used.insert(name.to_lowercase());
            name
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Millions of lines about a hundred thousand images: no work and no memory beyond what the lines themselves take.
    #[test]
    fn many_wrong_lines_are_counted_not_kept() {
        let images: BTreeSet<String> = (0..100_000).map(|n| format!("a/{n}.png")).collect();
        let text = "nowhere.png,ok\n".repeat(1_000_000);
        let plan = plan(
            Format::Csv,
            &images,
            &[("labels.csv".to_owned(), text)].into(),
        );
        assert_eq!(plan.errors.len() + plan.more_errors, 1_000_000);
        assert_eq!(plan.errors.len(), NAMED);
    }

    fn set(paths: &[&str]) -> BTreeSet<String> {
        paths.iter().map(|p| (*p).to_owned()).collect()
    }

    fn texts(files: &[(&str, &str)]) -> BTreeMap<String, String> {
        files
            .iter()
            .map(|(f, t)| ((*f).to_owned(), (*t).to_owned()))
            .collect()
    }

    fn labels(plan: &Plan) -> Vec<(&str, &str)> {
        plan.labels
            .iter()
            .map(|(p, c)| (p.as_str(), c.as_str()))
            .collect()
    }

    #[test]
    fn golden_folder() {
        let images = set(&[
            "set/hole/1.png",
            "set/ok/1.png",
            "ok/2.png",
            "3.png",
            "holdout/ok/4.png",
            "holdout/5.png",
        ]);
        let plan = plan(Format::Folder, &images, &texts(&[]));
        assert_eq!(plan.classes, ["holdout", "hole", "ok"]);
        // A folder above one of a class; a class may have that name too.
        assert_eq!(plan.holdout, set(&["holdout/ok/4.png"]));
        assert_eq!(
            labels(&plan),
            [
                ("holdout/5.png", "holdout"),
                ("holdout/ok/4.png", "ok"),
                ("ok/2.png", "ok"),
                ("set/hole/1.png", "hole"),
                ("set/ok/1.png", "ok")
            ]
        );
        assert_eq!(plan.errors[0].0, "3.png");
    }

    #[test]
    fn golden_csv() {
        let images = set(&["set/a.png", "set/b, c.png", "set/deep/d.png", "set/e.png"]);
        let text = "path,class,note\r\na.png,ok,x\n\"b, c.png\",\"a \"\"big\"\" hole\"\nd.png,ok\n../e.png,ok\n\ne.png,\nz\nq.png,ok\na.png,hole\n";
        let split = "path,class,split\na.png,ok,train\nd.png,ok,holdout\n";
        let said = plan(Format::Csv, &images, &texts(&[("set/labels.csv", split)]));
        assert_eq!(said.holdout, set(&["set/deep/d.png"]));
        let plan = plan(Format::Csv, &images, &texts(&[("set/labels.csv", text)]));
        assert!(plan.holdout.is_empty());
        assert_eq!(plan.classes, ["a \"big\" hole", "ok"]);
        assert_eq!(
            labels(&plan),
            [("set/b, c.png", "a \"big\" hole"), ("set/deep/d.png", "ok")]
        );
        let at: Vec<_> = plan.errors.iter().map(|(at, _)| at.as_str()).collect();
        assert_eq!(
            at,
            [
                "set/labels.csv:5",
                "set/labels.csv:8",
                "set/labels.csv:9",
                "set/a.png"
            ]
        );
        assert_eq!(fields(&quoted("a \"b\", c")), ["a \"b\", c"]);
    }

    #[test]
    fn golden_coco() {
        let images = set(&["images/1.png", "images/2.png", "images/3.png"]);
        let text = r#"{"images":[{"id":7,"file_name":"1.png"},{"id":8,"file_name":"images/2.png","split":"holdout"},{"id":9,"file_name":"3.png"},{"id":10,"file_name":"../4.png"}],
            "annotations":[{"image_id":7,"category_id":2},{"image_id":7,"category_id":2},{"image_id":8,"category_id":1},{"image_id":8,"category_id":2},{"image_id":9,"category_id":5}],
            "categories":[{"id":2,"name":"hole"},{"id":1,"name":"ok"}]}"#;
        let said = texts(&[("annotations.json", text), ("other.json", "[]")]);
        let plan = plan(Format::Coco, &images, &said);
        assert_eq!(plan.classes, ["ok", "hole"]);
        assert_eq!(labels(&plan), [("images/1.png", "hole")]);
        assert_eq!(plan.holdout, set(&["images/2.png"]));
        let at: Vec<_> = plan.errors.iter().map(|(at, _)| at.as_str()).collect();
        assert_eq!(
            at,
            ["../4.png", "images/2.png", "images/3.png", "other.json"]
        );
    }

    #[test]
    fn golden_yolo() {
        let images = set(&[
            "images/train/1.jpg",
            "images/train/2.jpg",
            "images/train/3.jpg",
        ]);
        let boxes = [
            ("labels/train/1.txt", "1 .5 .5 .1 .1\n1 .2 .2 .1 .1\n"),
            ("labels/train/2.txt", "0 .5 .5 .1 .1\n7 0 0 0 0\n"),
        ];
        for list in [
            ("classes.txt", "ok\nhole\n"),
            ("data.yaml", "path: x\nnames: ['ok', \"hole\"]\n"),
            ("data.yaml", "names:\n  0: ok\n  1: hole\nnc: 2\n"),
            ("data.yaml", "names:\n- ok\n- hole\n"),
        ] {
            let mut said = texts(&boxes);
            said.extend(texts(&[list]));
            let plan = plan(Format::Yolo, &images, &said);
            assert_eq!(plan.classes, ["ok", "hole"], "{list:?}");
            assert_eq!(plan.labels["images/train/1.jpg"], "hole");
            assert_eq!(plan.errors.len(), 1);
        }
        let images = set(&["train/ok/1.jpg", "val/hole/2.jpg"]);
        let plan = plan(Format::Yolo, &images, &texts(&[]));
        assert_eq!(plan.classes, ["hole", "ok"]);
        assert_eq!(plan.holdout, set(&["val/hole/2.jpg"]));
    }

    #[test]
    fn no_path_leads_out() {
        assert_eq!(clean("./a//b.png").unwrap(), "a/b.png");
        for bad in [
            "../x",
            "a/../../x",
            "/etc/passwd",
            "..",
            "",
            ".",
            "a\\b",
            "a\0",
        ] {
            assert_eq!(clean(bad), None, "{bad:?}");
        }
        let classes = ["../../etc", "a/b", "a_b", ".", "ok", "OK", "Ähre 1"].map(str::to_owned);
        let folders = folders_of(&classes);
        assert_eq!(
            folders,
            ["_.._etc", "a_b", "a_b_2", "_3", "ok", "OK_5", "Ähre 1"]
        );
    }
}

//! What goes into a dataset. Pure: the same labels give the same dataset.
//!
//! The holdout is what people put there. Nothing that looks the same as something in it is trained with: a
//! model would be measured with what it knows by heart.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{Item, MAX_ITEMS};
use crate::objects::digest;

/// Embeddings whose cosine is at least this are of the same picture.
const SAME: f32 = 0.999;
/// With few devices one may give so many times what it would give if all gave the same: nobody with two or three cameras
/// wants labels thrown away because one of them sees more.
const EVEN: f64 = 2.0;
/// Rows of a kind that a report names; it counts all of them.
const NAMED: usize = 100;
/// Values that are compared before looking whether two embeddings can still be the same.
const STEP: usize = 32;

/// A labelled sample.
#[derive(Clone, Debug)]
pub(crate) struct Labelled {
    pub(crate) sample: i64,
    pub(crate) sha256: String,
    pub(crate) class: u32,
    pub(crate) holdout: bool,
    pub(crate) device: Option<String>,
    /// The model, and its embedding.
    pub(crate) embedding: Option<(String, Vec<f32>)>,
}

/// What was left out of a dataset, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Report {
    /// Images that are in the holdout too, or look exactly the same as one that is.
    pub duplicates: usize,
    /// The first of them.
    pub duplicate: Vec<Duplicate>,
    /// Images that have different labels in different samples.
    pub conflicts: usize,
    /// The first of them.
    pub conflict: Vec<Conflict>,
    /// Samples whose image another sample has too, with the same label.
    pub repeated: usize,
    /// Images beyond the share of their device.
    pub over_share: usize,
    /// The largest share that one device could have. Above the one that was asked for where there are few devices: then
    /// one may give at most twice what it would give if all gave the same. 1 is no limit, as with one or two devices.
    #[serde(default = "no_limit")]
    pub share_limit: f64,
}

const fn no_limit() -> f64 {
    1.0
}

/// A sample that was left out because the holdout has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Duplicate {
    /// The sample that was left out.
    pub sample: i64,
    /// The sample of the holdout.
    pub holdout: i64,
    /// The cosine of their embeddings; nothing where the images are the same to the last bit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosine: Option<f32>,
}

/// Samples of one image that were labelled differently.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Conflict {
    /// The image.
    pub sha256: String,
    /// The samples.
    pub samples: Vec<i64>,
}

/// An embedding of length 1.
fn unit((model, vector): &(String, Vec<f32>)) -> Option<(&str, Vec<f32>)> {
    let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    let usable = length.is_finite() && length > 1e-12;
    usable.then(|| (model.as_str(), vector.iter().map(|v| v / length).collect()))
}

/// The cosine of two embeddings of length 1, if it is at least [`SAME`].
fn same(a: &[f32], b: &[f32]) -> Option<f32> {
    // |a − b|² = 2 − 2 cos; most pairs are too far apart after the first step. A little is for rounding.
    let most = 2.0 - 2.0 * SAME + 1e-5;
    let mut square = 0.0_f32;
    for (a, b) in a.chunks(STEP).zip(b.chunks(STEP)) {
        square += a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
        if square > most {
            return None;
        }
    }
    Some(1.0 - square / 2.0)
}

/// One sample for each image; what is labelled differently is left out.
fn distinct(samples: Vec<Labelled>, report: &mut Report) -> Vec<Labelled> {
    let mut images: BTreeMap<String, Vec<Labelled>> = BTreeMap::new();
    for sample in samples {
        images
            .entry(sample.sha256.clone())
            .or_default()
            .push(sample);
    }
    let mut kept = Vec::with_capacity(images.len());
    for (sha256, mut samples) in images {
        samples.sort_by_key(|s| s.sample);
        let classes: BTreeSet<u32> = samples.iter().map(|s| s.class).collect();
        if classes.len() > 1 {
            report.conflicts += 1;
            if report.conflict.len() < NAMED {
                let samples = samples.iter().map(|s| s.sample).collect();
                report.conflict.push(Conflict { sha256, samples });
            }
            continue;
        }
        report.repeated += samples.len() - 1;
        kept.extend(samples.into_iter().next());
    }
    kept
}

/// Leaves out of `train` what the holdout has.
fn apart(train: Vec<Labelled>, holdout: &[Labelled], report: &mut Report) -> Vec<Labelled> {
    let by_image: BTreeMap<&str, i64> = holdout
        .iter()
        .map(|h| (h.sha256.as_str(), h.sample))
        .collect();
    let looks: Vec<_> = holdout
        .iter()
        .filter_map(|h| Some((h.sample, unit(h.embedding.as_ref()?)?)))
        .collect();
    let twin = |sample: &Labelled| {
        if let Some(holdout) = by_image.get(sample.sha256.as_str()) {
            return Some((*holdout, None));
        }
        let (model, vector) = unit(sample.embedding.as_ref()?)?;
        looks.iter().find_map(|(holdout, (m, v))| {
            let comparable = *m == model && v.len() == vector.len();
            let cosine = comparable.then(|| same(v, &vector)).flatten()?;
            Some((*holdout, Some(cosine)))
        })
    };
    let mut kept = Vec::with_capacity(train.len());
    for sample in train {
        match twin(&sample) {
            None => kept.push(sample),
            Some((holdout, cosine)) => {
                report.duplicates += 1;
                if report.duplicate.len() < NAMED {
                    report.duplicate.push(Duplicate {
                        sample: sample.sample,
                        holdout,
                        cosine,
                    });
                }
            }
        }
    }
    kept
}

/// The largest number that each device may give, so that none gives more than this share of what is left.
fn most_of_one(given: &[usize], others: usize, share: f64) -> usize {
    let holds = |most: usize| {
        let left: usize = given.iter().map(|n| (*n).min(most)).sum();
        let largest = given.iter().copied().max().unwrap_or_default().min(most);
        largest as f64 <= share * (left + others) as f64 + 1e-9
    };
    // With more each, the share of the largest only grows.
    let (mut low, mut high) = (1, given.iter().copied().max().unwrap_or_default().max(1));
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if holds(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

/// Leaves out what one device gave beyond its share. Of each of its classes the same number stays, as far as there are
/// so many; which images go is decided by their digests, which neither time nor the device can steer.
fn shared(mut train: Vec<Labelled>, share: f64, report: &mut Report) -> Vec<Labelled> {
    train.sort_by(|a, b| a.sha256.cmp(&b.sha256));
    let mut given: BTreeMap<&str, usize> = BTreeMap::new();
    for device in train.iter().filter_map(|s| s.device.as_deref()) {
        *given.entry(device).or_default() += 1;
    }
    let counts: Vec<usize> = given.into_values().collect();
    let limit = share.max(EVEN / counts.len().max(1) as f64).min(1.0);
    report.share_limit = limit;
    let others = train.len() - counts.iter().sum::<usize>();
    let most = most_of_one(&counts, others, limit);
    let mut of_class: BTreeMap<(&str, u32), usize> = BTreeMap::new();
    let mut places: BTreeMap<&str, Vec<(usize, usize)>> = BTreeMap::new();
    for (at, sample) in train.iter().enumerate() {
        let Some(device) = sample.device.as_deref() else {
            continue;
        };
        let nth = of_class.entry((device, sample.class)).or_default();
        places.entry(device).or_default().push((*nth, at));
        *nth += 1;
    }
    let mut gone = BTreeSet::new();
    for mut places in places.into_values() {
        places.sort_unstable();
        gone.extend(places.into_iter().skip(most).map(|(_, at)| at));
    }
    report.over_share = gone.len();
    let kept = train.into_iter().enumerate();
    kept.filter(|(at, _)| !gone.contains(at))
        .map(|(_, sample)| sample)
        .collect()
}

/// Makes a dataset of labelled samples: its digest, its items in order of their images, and what was left
/// out.
///
/// # Errors
/// Says why nothing can be learnt from them.
pub(crate) fn snapshot(
    task: &str,
    classes: &[String],
    labelled: Vec<Labelled>,
    device_share: f64,
) -> Result<(String, Vec<Item>, Report), String> {
    if labelled.len() > MAX_ITEMS {
        return Err(format!("more than {MAX_ITEMS} samples are labelled"));
    }
    if labelled.is_empty() {
        return Err("no sample has a class: label some first".into());
    }
    let mut report = Report::default();
    let (holdout, train): (Vec<_>, Vec<_>) = labelled.into_iter().partition(|s| s.holdout);
    let holdout = distinct(holdout, &mut report);
    let train = apart(distinct(train, &mut report), &holdout, &mut report);
    let train = shared(train, device_share, &mut report);
    let seen: BTreeSet<u32> = train.iter().map(|s| s.class).collect();
    match seen.len() {
        0 => {
            return Err(
                "nothing is left to train with: label samples that are not in the holdout".into(),
            );
        }
        1 => {
            return Err(
                "all samples to train with have the same class: label some of another".into(),
            );
        }
        _ => {}
    }
    let mut items: Vec<Item> = train
        .into_iter()
        .chain(holdout)
        .map(|s| Item {
            sample: s.sample,
            sha256: s.sha256,
            class: s.class,
            holdout: s.holdout,
            device: s.device,
        })
        .collect();
    items.sort_by(|a, b| a.sha256.cmp(&b.sha256));
    Ok((digest_of(task, classes, &items), items, report))
}

/// As [`super::Dataset::digest`] says.
fn digest_of(task: &str, classes: &[String], items: &[Item]) -> String {
    let mut text = format!("task {task}\n");
    for (index, class) in classes.iter().enumerate() {
        text.push_str(&format!("class {index} {class}\n"));
    }
    let mut lines: Vec<_> = items
        .iter()
        .map(|item| {
            let split = if item.holdout { "holdout" } else { "train" };
            format!("{} {} {split}\n", item.sha256, item.class)
        })
        .collect();
    lines.sort();
    text.extend(lines);
    digest(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labelled(sample: i64, image: u8, class: u32, holdout: bool) -> Labelled {
        Labelled {
            sample,
            sha256: format!("{image:02x}").repeat(32),
            class,
            holdout,
            device: None,
            embedding: None,
        }
    }

    fn classes() -> Vec<String> {
        vec!["ok".into(), "hole".into()]
    }

    #[test]
    fn the_holdout_is_never_trained_with() {
        let near = |v: [f32; 2]| Some(("m@1".to_owned(), v.to_vec()));
        let mut all = vec![
            labelled(1, 1, 0, false),
            labelled(2, 2, 1, false),
            labelled(3, 3, 1, false),
            labelled(4, 3, 1, true),
            labelled(5, 5, 0, false),
            labelled(6, 6, 0, true),
            labelled(7, 7, 0, false),
        ];
        all[4].embedding = near([1.0, 0.0]);
        all[5].embedding = near([2.0, 0.01]);
        all[6].embedding = near([1.0, 0.2]);
        let (digest, items, report) = snapshot("t", &classes(), all.clone(), 1.0).unwrap();
        let split = |holdout| {
            items
                .iter()
                .filter(|i| i.holdout == holdout)
                .map(|i| i.sample)
                .collect::<Vec<_>>()
        };
        assert_eq!((split(false), split(true)), (vec![1, 2, 7], vec![4, 6]));
        assert_eq!(report.duplicates, 2);
        assert_eq!(
            (report.duplicate[0].sample, report.duplicate[0].cosine),
            (3, None)
        );
        assert!(report.duplicate[1].cosine.unwrap() > SAME);
        // The order in which samples come in makes no difference; a class does.
        all.reverse();
        assert_eq!(
            snapshot("t", &classes(), all.clone(), 1.0).unwrap().0,
            digest
        );
        all[0].class = 1;
        assert_ne!(snapshot("t", &classes(), all, 1.0).unwrap().0, digest);
    }

    #[test]
    fn golden_digest() {
        let all = vec![labelled(1, 0xab, 0, false), labelled(2, 0xcd, 1, false)];
        let text = format!(
            "task t\nclass 0 ok\nclass 1 hole\n{} 0 train\n{} 1 train\n",
            "ab".repeat(32),
            "cd".repeat(32)
        );
        let made = snapshot("t", &classes(), all, 1.0).unwrap();
        assert_eq!(made.0, digest(text.as_bytes()));
    }

    #[test]
    fn what_nobody_agrees_on_is_left_out() {
        let all = vec![
            labelled(1, 1, 0, false),
            labelled(2, 1, 1, false),
            labelled(3, 3, 0, false),
            labelled(4, 4, 1, false),
            labelled(5, 4, 1, false),
        ];
        let (_, items, report) = snapshot("t", &classes(), all, 1.0).unwrap();
        assert_eq!(items.iter().map(|i| i.sample).collect::<Vec<_>>(), [3, 4]);
        assert_eq!((report.conflicts, report.repeated), (1, 1));
        assert_eq!(report.conflict[0].samples, [1, 2]);
    }

    #[test]
    fn one_device_does_not_take_it_over() {
        let mut all: Vec<_> = (0..10).map(|n| labelled(n, n as u8, 0, false)).collect();
        for sample in &mut all {
            sample.device = Some(if sample.sample < 8 { "loud" } else { "quiet" }.into());
        }
        all[9].class = 1;
        // Two devices: nothing is thrown away.
        let (_, items, report) = snapshot("t", &classes(), all.clone(), 0.3).unwrap();
        assert_eq!((items.len(), report.share_limit), (10, 1.0));
        // Four, of which one gives much: it may give half.
        for (at, sample) in (10..14).zip(["third", "fourth"].into_iter().cycle()) {
            let mut more = labelled(at, at as u8, 1, false);
            more.device = Some(sample.into());
            all.push(more);
        }
        let (_, items, report) = snapshot("t", &classes(), all, 0.3).unwrap();
        let loud = items
            .iter()
            .filter(|i| i.device.as_deref() == Some("loud"))
            .count();
        assert_eq!(
            (loud, items.len(), report.over_share, report.share_limit),
            (6, 12, 2, 0.5)
        );
    }

    proptest::proptest! {
        #[test]
        fn no_device_gives_more_than_its_share(
            given in proptest::collection::vec((1_usize..200, 1_u32..4), 1..14),
            imported in 0_usize..50,
            share in 0.05_f64..1.0,
        ) {
            let mut all = Vec::new();
            let mut add = |device: Option<String>, class: u32| {
                let id = all.len() as i64;
                let sha256 = digest(&id.to_le_bytes());
                all.push(Labelled { sample: id, sha256, class, holdout: false, device, embedding: None });
            };
            for (device, (count, classes)) in given.iter().enumerate() {
                for n in 0..*count {
                    add(Some(format!("s/{device}")), n as u32 % classes);
                }
            }
            (0..imported).for_each(|n| add(None, n as u32 % 2));
            let mut report = Report::default();
            let (limit, before) = (share.max(2.0 / given.len() as f64).min(1.0), all.len());
            let kept = shared(all.clone(), share, &mut report);
            proptest::prop_assert_eq!(report.share_limit, limit);
            proptest::prop_assert_eq!(before - kept.len(), report.over_share);
            let mut again = Report::default();
            all.reverse();
            let ids = |kept: &[Labelled]| kept.iter().map(|s| s.sample).collect::<Vec<_>>();
            proptest::prop_assert_eq!(ids(&shared(all, share, &mut again)), ids(&kept));
            for (device, (count, classes)) in given.iter().enumerate() {
                let name = format!("s/{device}");
                let own: Vec<_> = kept.iter().filter(|s| s.device.as_ref() == Some(&name)).collect();
                proptest::prop_assert!(own.len() as f64 <= limit * kept.len() as f64 + 1e-6);
                // A class is not lost because others of the same device are many.
                let seen: BTreeSet<u32> = own.iter().map(|s| s.class).collect();
                proptest::prop_assert!(seen.len() >= own.len().min(*count.min(&(*classes as usize))));
            }
            proptest::prop_assert_eq!(kept.iter().filter(|s| s.device.is_none()).count(), imported);
        }
    }

    #[test]
    fn what_cannot_be_learnt_from() {
        let error = |all| snapshot("t", &classes(), all, 1.0).unwrap_err();
        assert!(error(vec![]).contains("label some"));
        assert!(error(vec![labelled(1, 1, 0, false)]).contains("same class"));
        let held = vec![labelled(1, 1, 0, true), labelled(2, 2, 1, true)];
        assert!(error(held).contains("holdout"));
    }
}

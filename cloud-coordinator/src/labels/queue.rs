//! What to label next: among what the newest labels leave unclear, one of each kind.
//!
//! A head is fitted to everything that is labelled, each time that the queue is asked: what a label has taught counts
//! for the next one, not only after the next training. The candidates that it tells apart worst are gathered into as
//! many clusters as are asked for (k-means on the sphere, weighted by how unclear each is), and of each cluster the
//! one nearest to its centre is taken. While little is known almost everything is unclear, so the whole pool is
//! covered; later only what lies between the classes. On the way in: uncertainty sampling (Lewis and Gale, 1994) and
//! weighted clustering (Zhdanov, 2019).
//!
//! Pure: the same candidates, labels and seed give the same order.

use std::collections::BTreeMap;

use learn::{
    features::Features,
    head::{self, Settings, Strength},
};

/// Candidates that are looked at: with 704 values each they are 14 MB.
pub(crate) const MAX_CANDIDATES: usize = 5_000;
/// Labelled samples that the head is fitted to, the newest: half a second of fitting.
pub(crate) const MAX_KNOWN: usize = 1_000;
/// λ of the head. The order hardly depends on it between 0.003 and 0.3.
const STRENGTH: f64 = 0.03;
/// A better fit does not change what is unclear.
const ITERATIONS: usize = 100;
/// The pool of the unclear: at least so many times what is asked for …
const LEAST_POOL: usize = 5;
/// … and at most so many candidates, for the time that it takes.
const MOST_POOL: usize = 2_000;
/// Of what is unclear altogether this share makes the pool.
const POOL_SHARE: f32 = 0.5;
/// Steps of k-means; later ones move little.
const STEPS: usize = 10;
/// What is clear counts a little still, so that no cluster has no weight.
const LEAST_WEIGHT: f32 = 0.001;
/// Nothing is clear about what no model has looked at.
const UNKNOWN: f32 = 1.0;

/// A sample that could be labelled.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) id: i64,
    /// Somebody said that the result was wrong, or that something was missed.
    pub(crate) marked: bool,
    /// 0 to 1; nothing where no model has seen it.
    pub(crate) uncertainty: Option<f32>,
    /// The model, and its embedding.
    pub(crate) embedding: Option<(String, Vec<f32>)>,
}

impl Candidate {
    /// What the model that first saw it made of it.
    fn unsure(&self) -> f32 {
        let known = self.uncertainty.filter(|u| u.is_finite());
        known.map_or(UNKNOWN, |u| u.clamp(0.0, 1.0))
    }
}

/// Mixes a seed and a number to one that looks random (the finaliser of `SplitMix64`).
fn mix(seed: u64, id: i64) -> u64 {
    let mut z = seed.wrapping_add(
        id.cast_unsigned()
            .wrapping_add(1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15),
    );
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `take` of them by lot: the control that the other order is measured against.
pub(crate) fn at_random(mut ids: Vec<i64>, take: usize, seed: u64) -> Vec<i64> {
    ids.sort_by_key(|id| (mix(seed, *id), *id));
    ids.truncate(take);
    ids
}

/// Inner product; the eight sums do not wait for each other.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 8];
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    for (a, b) in a8.iter().zip(b8) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// Brings every dimension to mean 0 and deviation 1, and then every vector to length 1.
fn standardise(vectors: &mut [Vec<f32>]) {
    let (Some(dims), count) = (vectors.first().map(Vec::len), vectors.len() as f32) else {
        return;
    };
    let (mut mean, mut square) = (vec![0.0_f32; dims], vec![0.0_f32; dims]);
    for vector in vectors.iter() {
        for (sum, value) in mean.iter_mut().zip(vector) {
            *sum += value / count;
        }
    }
    for vector in vectors.iter() {
        for ((sum, value), mean) in square.iter_mut().zip(vector).zip(&mean) {
            *sum += (value - mean) * (value - mean) / count;
        }
    }
    for vector in vectors.iter_mut() {
        for ((value, mean), square) in vector.iter_mut().zip(&mean).zip(&square) {
            let deviation = square.sqrt();
            *value = if deviation > 1e-6 && deviation.is_finite() {
                (*value - mean) / deviation
            } else {
                0.0
            };
        }
        normalise(vector);
    }
}

/// Brings a vector to length 1; one without a direction stays at 0.
fn normalise(vector: &mut [f32]) {
    let length = dot(vector, vector).sqrt();
    if length > 1e-12 && length.is_finite() {
        vector.iter_mut().for_each(|value| *value /= length);
    } else {
        vector.fill(0.0);
    }
}

/// A sample that is labelled, not held out.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Known {
    /// Any number for each class; what is none of the classes is one too.
    pub(crate) class: i64,
    /// The model, and its embedding.
    pub(crate) embedding: (String, Vec<f32>),
}

/// How unclear each of `rows` is to a head that is fitted to what is known, 0 to 1. Nothing if there is nothing to
/// tell apart, or a value cannot be learned from.
fn unclear(rows: &[&[f32]], known: &[(&[f32], i64)]) -> Option<Vec<f32>> {
    let mut classes: Vec<i64> = known.iter().map(|(_, class)| *class).collect();
    classes.sort_unstable();
    classes.dedup();
    let dim = known.first()?.0.len();
    let place = |class: &i64| classes.binary_search(class).unwrap_or_default() as u32;
    let truth = known.iter().map(|(_, class)| place(class)).collect();
    let values = known
        .iter()
        .flat_map(|(row, _)| row.iter().copied())
        .collect();
    let features = Features::new(dim, classes.len(), values, truth, None).ok()?;
    let settings = Settings {
        strength: Strength::Given(STRENGTH),
        calibrate: false,
        iterations: ITERATIONS,
        ..Settings::default()
    };
    let mut go_on = |_: learn::Progress| std::ops::ControlFlow::Continue(());
    let head = head::train(&features, &settings, &mut go_on).ok()?;
    let margin = |row: &&[f32]| {
        let mut best = [0.0_f32; 2];
        for p in head.probabilities(row) {
            if p > best[0] {
                best = [p, best[0]];
            } else if p > best[1] {
                best[1] = p;
            }
        }
        1.0 - (best[0] - best[1])
    };
    Some(rows.iter().map(margin).collect())
}

/// One of each kind: places in `vectors` (of length 1), at most `take`, by k-means with these weights above 0. The
/// first centres are each as heavy and as far from those before as can be.
fn one_of_each(vectors: &[&[f32]], weights: &[f32], take: usize) -> Vec<usize> {
    let heaviest = |score: &dyn Fn(usize) -> f32| {
        (0..vectors.len()).max_by(|a, b| score(*a).total_cmp(&score(*b)).then(b.cmp(a)))
    };
    let mut away = vec![f32::INFINITY; vectors.len()];
    let mut centres: Vec<Vec<f32>> = Vec::with_capacity(take);
    while centres.len() < take.min(vectors.len()) {
        let next = match centres.is_empty() {
            true => heaviest(&|at| weights[at]),
            false => heaviest(&|at| weights[at] * away[at]),
        };
        let Some(next) = next else { break };
        for (away, vector) in away.iter_mut().zip(vectors) {
            *away = away.min((1.0 - dot(vector, vectors[next])).max(0.0));
        }
        // Never again, whatever else is far.
        away[next] = -1.0;
        centres.push(vectors[next].to_vec());
    }
    let nearest = |centres: &[Vec<f32>]| -> Vec<(usize, f32)> {
        let near = |vector: &&[f32]| {
            let along = centres.iter().map(|centre| dot(vector, centre)).enumerate();
            along.fold((0, f32::NEG_INFINITY), |best, one| {
                if one.1 > best.1 { one } else { best }
            })
        };
        vectors.iter().map(near).collect()
    };
    for _ in 0..STEPS {
        let mut moved: Vec<Vec<f32>> = centres.iter().map(|c| vec![0.0; c.len()]).collect();
        for ((vector, weight), (at, _)) in vectors.iter().zip(weights).zip(nearest(&centres)) {
            for (sum, value) in moved[at].iter_mut().zip(*vector) {
                *sum += value * weight;
            }
        }
        for (centre, mut moved) in centres.iter_mut().zip(moved) {
            // A centre that nothing is nearest to stays where it is.
            if moved.iter().any(|value| *value != 0.0) {
                normalise(&mut moved);
                *centre = moved;
            }
        }
    }
    let mut chosen: Vec<Option<(usize, f32)>> = vec![None; centres.len()];
    for (place, (at, along)) in nearest(&centres).into_iter().enumerate() {
        if chosen[at].is_none_or(|(_, best)| along > best) {
            chosen[at] = Some((place, along));
        }
    }
    chosen
        .into_iter()
        .flatten()
        .map(|(place, _)| place)
        .collect()
}

/// The next `take` of these candidates, all with comparable embeddings.
fn choose(candidates: &[&Candidate], known: &[&Known], take: usize, seed: u64) -> Vec<i64> {
    let raw: Vec<&[f32]> = candidates
        .iter()
        .filter_map(|c| Some(c.embedding.as_ref()?.1.as_slice()))
        .collect();
    let taught: Vec<(&[f32], i64)> = known
        .iter()
        .map(|k| (k.embedding.1.as_slice(), k.class))
        .collect();
    let unsure =
        unclear(&raw, &taught).unwrap_or_else(|| candidates.iter().map(|c| c.unsure()).collect());
    let mut vectors: Vec<Vec<f32>> = raw
        .iter()
        .chain(taught.iter().map(|(row, _)| row))
        .map(|row| row.to_vec())
        .collect();
    standardise(&mut vectors);
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by_key(|at| mix(seed, candidates[*at].id));
    order.sort_by(|a, b| unsure[*b].total_cmp(&unsure[*a]));
    let pool = (unsure.iter().sum::<f32>() * POOL_SHARE) as usize;
    let pool = pool
        .clamp(LEAST_POOL * take, MOST_POOL.max(LEAST_POOL * take))
        .min(order.len());
    let seen: Vec<&[f32]> = order[..pool]
        .iter()
        .map(|at| vectors[*at].as_slice())
        .collect();
    let weights: Vec<f32> = order[..pool]
        .iter()
        .map(|at| unsure[*at] + LEAST_WEIGHT)
        .collect();
    let mut chosen: Vec<usize> = one_of_each(&seen, &weights, take)
        .into_iter()
        .map(|at| order[at])
        .collect();
    // Fewer kinds than asked for: the rest by how unclear it is.
    let mut taken = vec![false; candidates.len()];
    chosen.iter().for_each(|at| taken[*at] = true);
    let rest = order.iter().copied().filter(|at| !taken[*at]);
    chosen.extend(rest.take(take.saturating_sub(chosen.len())));
    chosen.iter().map(|at| candidates[*at].id).collect()
}

/// The model and length of embedding that most candidates have.
pub(crate) fn common<'a>(
    candidates: impl Iterator<Item = &'a Candidate>,
) -> Option<(&'a str, usize)> {
    let mut kinds: BTreeMap<(&str, usize), usize> = BTreeMap::new();
    for (model, vector) in candidates.filter_map(|c| c.embedding.as_ref()) {
        *kinds.entry((model, vector.len())).or_default() += 1;
    }
    let most = kinds.into_iter().max_by_key(|(_, count)| *count);
    most.map(|(kind, _)| kind)
}

/// The next `take` samples to label, the best first. What people marked comes before everything else; embeddings are
/// compared within one model, the one that most of them have first; what has none comes last. `seed` decides between
/// equals.
pub(crate) fn order(candidates: &[Candidate], known: &[Known], take: usize, seed: u64) -> Vec<i64> {
    let candidates = &candidates[..candidates.len().min(MAX_CANDIDATES)];
    let mut chosen = Vec::with_capacity(take.min(candidates.len()));
    for marked in [true, false] {
        let mut left: Vec<&Candidate> = candidates.iter().filter(|c| c.marked == marked).collect();
        while chosen.len() < take
            && let Some((model, length)) = common(left.iter().copied())
        {
            let of_kind = |(m, vector): &(String, Vec<f32>)| m == model && vector.len() == length;
            let (kind, rest): (Vec<_>, Vec<_>) = left
                .into_iter()
                .partition(|c| c.embedding.as_ref().is_some_and(of_kind));
            let known: Vec<&Known> = known.iter().filter(|k| of_kind(&k.embedding)).collect();
            chosen.extend(choose(&kind, &known, take - chosen.len(), seed));
            left = rest;
        }
        left.retain(|c| c.embedding.is_none());
        left.sort_by_key(|c| mix(seed, c.id));
        left.sort_by(|a, b| b.unsure().total_cmp(&a.unsure()));
        chosen.extend(left.iter().take(take - chosen.len()).map(|c| c.id));
    }
    chosen
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn candidate(id: i64, uncertainty: f32, embedding: &[f32]) -> Candidate {
        Candidate {
            id,
            marked: false,
            uncertainty: Some(uncertainty),
            embedding: Some(("m@1".into(), embedding.to_vec())),
        }
    }

    #[test]
    fn people_first_then_unclear_of_each_kind() {
        let mut marked = candidate(9, 0.0, &[1.0, 0.0]);
        marked.marked = true;
        let candidates = [
            candidate(1, 0.9, &[1.0, 0.0]),
            candidate(2, 0.8, &[1.0, 0.1]),
            candidate(3, 0.5, &[-1.0, 1.0]),
            marked,
        ];
        let chosen = order(&candidates, &[], 3, 0);
        assert_eq!((chosen[0], chosen.len()), (9, 3));
        // One of 1 and 2, which are the same, and the one that is not.
        assert!(chosen.contains(&3), "{chosen:?}");
        assert_eq!(order(&candidates, &[], 4, 0).len(), 4);
        // Without embeddings only uncertainty speaks.
        let plain = candidates.map(|c| Candidate {
            embedding: None,
            ..c
        });
        assert_eq!(order(&plain, &[], 3, 0), [9, 1, 2]);
    }

    #[test]
    fn what_lies_between_the_classes_is_asked_for() {
        let known = |class, v: &[f32]| Known {
            class,
            embedding: ("m@1".to_owned(), v.to_vec()),
        };
        let taught = [
            known(0, &[-1.0, 0.1]),
            known(0, &[-0.9, -0.1]),
            known(1, &[1.0, 0.1]),
            known(1, &[0.9, -0.1]),
        ];
        // The model that saw them first was sure of the one that is unclear now.
        let candidates = [
            candidate(1, 0.9, &[-0.95, 0.0]),
            candidate(2, 0.9, &[0.95, 0.0]),
            candidate(3, 0.0, &[0.0, 0.0]),
        ];
        assert_eq!(order(&candidates, &taught, 1, 0), [3]);
        // Another model's embeddings mean nothing here.
        let other = taught.map(|k| Known {
            embedding: ("m@2".into(), k.embedding.1),
            ..k
        });
        assert_eq!(
            order(&candidates, &other, 3, 0),
            order(&candidates, &[], 3, 0)
        );
    }

    #[test]
    fn works_at_its_largest() {
        let vector = |id: i64| {
            (0..704)
                .map(|d| (mix(7, id * 1_000 + d) % 1_000) as f32)
                .collect::<Vec<_>>()
        };
        let candidates: Vec<_> = (0..5_000)
            .map(|id| candidate(id, 0.5, &vector(id)))
            .collect();
        let known: Vec<_> = (0..200)
            .map(|id| Known {
                class: id % 6,
                embedding: ("m@1".to_owned(), vector(-1 - id)),
            })
            .collect();
        let chosen = order(&candidates, &known, 50, 0);
        let different: std::collections::BTreeSet<_> = chosen.iter().collect();
        assert_eq!((chosen.len(), different.len()), (50, 50));
    }

    proptest! {
        #[test]
        fn each_once_and_always_the_same(
            values in proptest::collection::vec((any::<bool>(), any::<f32>(), proptest::collection::vec(any::<f32>(), 0..4)), 0..40),
            take in 0_usize..50,
            seed: u64,
        ) {
            let candidates: Vec<_> = values.into_iter().enumerate().map(|(id, (marked, unsure, vector))| Candidate {
                id: id as i64,
                marked,
                uncertainty: Some(unsure),
                embedding: Some(("m".into(), vector)),
            }).collect();
            let chosen = order(&candidates, &[], take, seed);
            prop_assert_eq!(chosen.len(), take.min(candidates.len()));
            prop_assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), chosen.len());
            prop_assert_eq!(&chosen, &order(&candidates, &[], take, seed));
            // What people marked is all in front.
            let marks: Vec<_> = chosen.iter().map(|id| candidates[*id as usize].marked).collect();
            prop_assert!(marks.is_sorted_by(|a, b| a >= b));
            let ids: Vec<_> = (0..40).collect();
            let lot = at_random(ids.clone(), take, seed);
            prop_assert_eq!(lot.len(), take.min(40));
            prop_assert_eq!(lot, at_random(ids.into_iter().rev().collect(), take, seed));
        }
    }
}

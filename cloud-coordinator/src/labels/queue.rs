//! What to label next: what the model is unsure of, and what is unlike everything that is chosen already.
//!
//! Pure: the same candidates, references and seed give the same order.

use std::collections::BTreeMap;

/// Candidates that are looked at: with 704 values each they are 14 MB.
pub(crate) const MAX_CANDIDATES: usize = 5_000;
/// Labelled samples that candidates are held against.
pub(crate) const MAX_REFERENCES: usize = 128;
/// How much uncertainty counts; the rest is distance.
const UNCERTAINTY: f32 = 0.5;
/// What is not known counts as the middle.
const UNKNOWN: f32 = 0.5;

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
        let length = dot(vector, vector).sqrt();
        if length > 1e-12 && length.is_finite() {
            vector.iter_mut().for_each(|value| *value /= length);
        } else {
            vector.fill(0.0);
        }
    }
}

/// How far two vectors of length 1 are from each other, 0 to 1.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    ((1.0 - dot(a, b)) / 2.0).clamp(0.0, 1.0)
}

/// The vectors that can be compared: those of the model and length that most candidates have. Says which
/// place in the result a candidate has; the references follow after the candidates.
fn comparable(
    candidates: &[Candidate],
    references: &[(String, Vec<f32>)],
) -> (Vec<Option<usize>>, Vec<Vec<f32>>, usize) {
    let mut kinds: BTreeMap<(&str, usize), usize> = BTreeMap::new();
    for (model, vector) in candidates.iter().filter_map(|c| c.embedding.as_ref()) {
        *kinds.entry((model, vector.len())).or_default() += 1;
    }
    let most = kinds.iter().max_by_key(|(_, count)| **count);
    let Some((&kind, _)) = most else {
        return (vec![None; candidates.len()], Vec::new(), 0);
    };
    let fits = |(model, vector): &&(String, Vec<f32>)| (model.as_str(), vector.len()) == kind;
    let mut vectors = Vec::new();
    let places = candidates
        .iter()
        .map(|candidate| {
            let (_, vector) = candidate.embedding.as_ref().filter(fits)?;
            vectors.push(vector.clone());
            Some(vectors.len() - 1)
        })
        .collect();
    let own = vectors.len();
    let known = references.iter().filter(fits).take(MAX_REFERENCES);
    vectors.extend(known.map(|(_, vector)| vector.clone()));
    standardise(&mut vectors);
    (places, vectors, own)
}

/// The next `take` samples to label, the best first. What people marked comes before everything else; within
/// that, each step takes the candidate with the best mean of uncertainty and of distance to the nearest that
/// is labelled or chosen. `seed` decides between equals.
pub(crate) fn order(
    candidates: &[Candidate],
    references: &[(String, Vec<f32>)],
    take: usize,
    seed: u64,
) -> Vec<i64> {
    let candidates = &candidates[..candidates.len().min(MAX_CANDIDATES)];
    let (places, vectors, own) = comparable(candidates, references);
    let (own, known) = vectors.split_at(own);
    let mut nearest: Vec<f32> = own
        .iter()
        .map(|v| known.iter().map(|k| distance(v, k)).fold(1.0, f32::min))
        .collect();
    let mut left: Vec<usize> = (0..candidates.len()).collect();
    let mut chosen = Vec::with_capacity(take.min(left.len()));
    while chosen.len() < take {
        let rank = |at: usize| {
            let candidate = &candidates[at];
            let far = places[at].map_or(UNKNOWN, |place| nearest[place]);
            let unsure = candidate.uncertainty.filter(|u| u.is_finite());
            let unsure = unsure.map_or(UNKNOWN, |u| u.clamp(0.0, 1.0));
            let score = UNCERTAINTY * unsure + (1.0 - UNCERTAINTY) * far;
            (candidate.marked, score, mix(seed, candidate.id))
        };
        let better = |a: &(bool, f32, u64), b: &(bool, f32, u64)| {
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2))
        };
        let best = (0..left.len()).max_by(|a, b| better(&rank(left[*a]), &rank(left[*b])));
        let Some(best) = best else { break };
        let at = left.swap_remove(best);
        chosen.push(candidates[at].id);
        if let Some(place) = places[at] {
            for (nearest, vector) in nearest.iter_mut().zip(own) {
                *nearest = nearest.min(distance(vector, &own[place]));
            }
        }
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
    fn people_first_then_unsure_then_different() {
        let mut marked = candidate(9, 0.0, &[1.0, 0.0]);
        marked.marked = true;
        let same = [1.0, 0.0];
        let candidates = [
            candidate(1, 0.9, &same),
            candidate(2, 0.8, &same),
            candidate(3, 0.5, &[-1.0, 1.0]),
            marked,
        ];
        let chosen = order(&candidates, &[], 4, 0);
        // After 9 everything that is the same as it is known; only 3 is not.
        assert_eq!(chosen, [9, 3, 1, 2]);
        // Without embeddings only uncertainty speaks.
        let plain = candidates.map(|c| Candidate {
            embedding: None,
            ..c
        });
        assert_eq!(order(&plain, &[], 3, 0), [9, 1, 2]);
    }

    #[test]
    fn what_is_labelled_is_known() {
        let candidates = [
            candidate(1, 0.5, &[1.0, 0.0]),
            candidate(2, 0.5, &[0.0, 1.0]),
        ];
        let near = |v: &[f32]| vec![("m@1".to_owned(), v.to_vec())];
        assert_eq!(order(&candidates, &near(&[1.0, 0.1]), 1, 0), [2]);
        assert_eq!(order(&candidates, &near(&[0.1, 1.0]), 1, 0), [1]);
        // Another model's embeddings mean nothing here.
        let other = vec![("m@2".to_owned(), vec![1.0, 0.0])];
        assert_eq!(
            order(&candidates, &other, 2, 0),
            order(&candidates, &[], 2, 0)
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
        let known: Vec<_> = (0..128)
            .map(|id| ("m@1".to_owned(), vector(-1 - id)))
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

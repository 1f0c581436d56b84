//! McNemar's test in its exact form: of the frames that one of two models answers right and the other wrong,
//! how many would be the first one's if a fair coin decided?

/// Frames beyond which nobody labels.
const MOST_FRAMES: u64 = 100_000_000;
/// Above this many tosses the sum is taken over the terms near its start only; the rest is below rounding.
const NEGLIGIBLE: f64 = 1e-18;

/// ln n! by Stirling's series; exact sums below 32, where the series is not yet good to 1e-15.
fn ln_factorial(n: u64) -> f64 {
    if n < 32 {
        return (2..=n).map(|k| (k as f64).ln()).sum();
    }
    let n = n as f64;
    let tail = 1.0 / (12.0 * n) - 1.0 / (360.0 * n.powi(3)) + 1.0 / (1260.0 * n.powi(5));
    n * n.ln() - n + 0.5 * (2.0 * std::f64::consts::PI * n).ln() + tail
}

/// Probability of exactly `heads` of `tosses`.
fn exactly(heads: u64, tosses: u64) -> f64 {
    let ways = ln_factorial(tosses) - ln_factorial(heads) - ln_factorial(tosses - heads);
    (ways - tosses as f64 * std::f64::consts::LN_2).exp()
}

/// Probability of at least `heads` of `tosses` fair coins.
fn at_least(heads: u64, tosses: u64) -> f64 {
    if heads == 0 {
        return 1.0;
    }
    if heads > tosses {
        return 0.0;
    }
    if heads <= tosses / 2 {
        // From the thin end: heads or fewer tails are as likely as heads or more.
        return 1.0 - at_least(tosses - heads + 1, tosses);
    }
    let mut term = exactly(heads, tosses);
    let mut sum = term;
    for k in heads..tosses {
        term *= (tosses - k) as f64 / (k + 1) as f64;
        sum += term;
        if term < sum * NEGLIGIBLE {
            break;
        }
    }
    sum.min(1.0)
}

/// Probability of at least `hits` of `tries`, if each hits with this `chance`.
pub(crate) fn binomial_at_least(hits: u64, tries: u64, chance: f64) -> f64 {
    if hits == 0 || chance >= 1.0 {
        return 1.0;
    }
    if hits > tries || chance <= 0.0 {
        return 0.0;
    }
    let (yes, no) = (chance.ln(), (-chance).ln_1p());
    let term = |k: u64| {
        let ways = ln_factorial(tries) - ln_factorial(k) - ln_factorial(tries - k);
        (ways + k as f64 * yes + (tries - k) as f64 * no).exp()
    };
    (hits..=tries).map(term).sum::<f64>().min(1.0)
}

/// The chance that a fair coin gives the candidate at least `wins` of `wins + losses`; with `mid_p` exactly as
/// many count half (Lancaster 1961).
pub(crate) fn one_sided(wins: u64, losses: u64, mid_p: bool) -> f64 {
    let tosses = wins + losses;
    let p = at_least(wins, tosses);
    if mid_p {
        p - exactly(wins, tosses) / 2.0
    } else {
        p
    }
}

/// About how many more frames show the difference, if further ones go like the `frames` so far. None if that
/// is more than anybody labels, or if there is no difference to show.
pub(crate) fn frames_needed(
    frames: u64,
    wins: u64,
    losses: u64,
    alpha: f64,
    mid_p: bool,
) -> Option<u64> {
    if wins <= losses || frames == 0 {
        return None;
    }
    let shown = |total: u64| {
        let grown = |n: u64| (n as f64 * total as f64 / frames as f64).round() as u64;
        one_sided(grown(wins), grown(losses), mid_p) <= alpha
    };
    let (mut low, mut high) = (frames, frames);
    while !shown(high) {
        low = high;
        high = high.checked_mul(2).filter(|&high| high <= MOST_FRAMES)?;
    }
    while high - low > 1 {
        let middle = u64::midpoint(low, high);
        if shown(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    Some(high - frames)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tails_by_hand() {
        assert!((at_least(1, 1) - 0.5).abs() < 1e-15);
        assert!((at_least(3, 3) - 0.125).abs() < 1e-15);
        assert!((at_least(2, 3) - 0.5).abs() < 1e-12);
        assert!((at_least(8, 10) - 56.0 / 1024.0).abs() < 1e-12);
        assert!((at_least(2, 10) - (1.0 - 11.0 / 1024.0)).abs() < 1e-12);
        assert!((one_sided(0, 0, false) - 1.0).abs() < 1e-15);
        assert!((one_sided(8, 2, true) - (56.0 - 22.5) / 1024.0).abs() < 1e-12);
        // A hundred thousand frames, all won: too small for f64, and no trouble.
        assert_eq!(one_sided(100_000, 0, false), 0.0);
    }

    #[test]
    fn the_frames_that_are_said_to_be_needed_do() {
        let more = frames_needed(100, 6, 2, 0.01, false).unwrap();
        let grown = |n: f64| (n * (100 + more) as f64 / 100.0).round() as u64;
        assert!(one_sided(grown(6.0), grown(2.0), false) <= 0.01);
        assert!((50..2000).contains(&more), "{more}");
        assert_eq!(frames_needed(100, 2, 2, 0.01, false), None);
        assert_eq!(frames_needed(100, 30, 2, 0.01, false), Some(0));
    }

    proptest! {
        #[test]
        fn the_two_ends_add_up(tosses in 1u64..3000, part in 0.0f64..1.0) {
            let heads = (part * tosses as f64) as u64;
            let sum = at_least(heads, tosses) + at_least(tosses - heads + 1, tosses);
            prop_assert!((sum - 1.0).abs() < 1e-9, "{sum}");
        }

        #[test]
        fn more_wins_are_never_less_convincing(wins in 0u64..500, losses in 0u64..500) {
            prop_assert!(one_sided(wins + 1, losses, false) <= one_sided(wins, losses, false) + 1e-12);
            prop_assert!(one_sided(wins, losses + 1, false) >= one_sided(wins, losses, false) - 1e-12);
        }
    }
}

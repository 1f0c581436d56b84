//! Does the new model hold up? Judged from what it and the old one said about the same frames.
//!
//! Both models see the same frames, so what changes in front of the camera changes for both and cancels out. Every
//! share is compared with its limit by the end of its confidence interval that is kind to the new model: a few
//! frames never condemn it, and a model near the limit passes.

use alloc::{collections::BTreeMap, format, string::String};

use crate::{Evidence, Limits, Reason};

/// The label of a result that is not sure enough.
const UNKNOWN: &str = "unknown";
/// Standard deviations that chance is given: one in 700 for one look, and a trial is some hundred looks at
/// frames that largely repeat one another.
const CHANCE: f32 = 3.5;
/// Fewer compared frames than this say nothing about quality.
const MIN_COMPARED: u32 = 10;
/// Fewer say nothing about a median, a mean or a collapse …
const MIN_MEDIAN: u32 = 30;
/// … or about a 95th percentile or the balance of classes.
const MIN_TAIL: u32 = 100;
/// The 95th percentile may be so many times the median's limit.
const TAIL_TIMES: f32 = 2.0;
/// A latency below this many milliseconds is nobody's problem, whatever the old one's was.
const SLACK_MS: f32 = 2.0;
/// One label is a collapse if the old model is surely right to see others on this share of frames: below, the
/// new one may just have fewer false alarms.
const OTHERS: f32 = 0.03;
/// Without an old model nothing says how much one label should be, and a scene can rest for long.
const MIN_ALONE: u32 = 5_000;
/// So many readings of the device's health in a row are no accident.
const HEALTH_RUN: u32 = 3;
/// Where nothing is said of memory a trial may take so much more than there was before, in MiB: twice the largest model that
/// such a board runs well. What a bundle itself says is tried before, in its self-test.
const MEMORY_ADDED_MIB: u32 = 256;
/// A trial is to blame for heat if it added at least this, in °C.
const HEAT_ADDED: f32 = 5.0;
/// Labels that are counted each on their own; what is beyond counts as one. More classes than this come in a trial's
/// some hundred frames only by accident.
const MAX_LABELS: usize = 64;

/// What one model said about one frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    /// The class, or `unknown`.
    pub label: String,
    /// How sure it is, 0..=1.
    pub score: f32,
    /// Are all its outputs numbers?
    pub finite: bool,
    /// Is it sure enough that another model should agree?
    pub sure: bool,
    /// Does the other model have this label too? `unknown` every model has.
    pub shared: bool,
    /// Inference in milliseconds.
    pub ms: f32,
}

/// How the device is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Health {
    /// Resident memory of the agent in MiB, where it can be read.
    pub memory_mib: Option<u32>,
    /// Temperature in °C, where it can be read.
    pub temperature_c: Option<f32>,
}

/// What the evidence says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Too early.
    Wait,
    /// It holds up.
    Go,
    /// It does not.
    Stop(Reason),
}

/// How often a label was said on compared frames.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    new: u32,
    old: u32,
    both: u32,
    /// The old model was sure of something else.
    old_surely_other: u32,
}

/// Gathers the evidence of one stage of a trial. Bounded, whatever comes.
#[derive(Clone, Debug)]
pub struct Judge {
    limits: Limits,
    before_mib: Option<u32>,
    cool_c: Option<f32>,
    frames: u32,
    compared: u32,
    sure: u32,
    disagreed: u32,
    new_labels: u32,
    unfit: bool,
    new_ms: Latencies,
    old_ms: Latencies,
    /// Sum and sum of squares of (old score − new score).
    fall: (f32, f32),
    alone: BTreeMap<String, u32>,
    labels: BTreeMap<String, Count>,
    /// Compared frames whose labels count for the balance.
    balanced: u32,
    peak: Health,
    too_large: u32,
    too_hot: u32,
}

impl Judge {
    /// Has seen nothing yet; the device was like `before` until now.
    #[must_use]
    pub fn new(limits: Limits, before: Health) -> Self {
        Self {
            limits,
            before_mib: before.memory_mib,
            cool_c: before.temperature_c,
            frames: 0,
            compared: 0,
            sure: 0,
            disagreed: 0,
            new_labels: 0,
            unfit: false,
            new_ms: Latencies::new(),
            old_ms: Latencies::new(),
            fall: (0.0, 0.0),
            alone: BTreeMap::new(),
            labels: BTreeMap::new(),
            balanced: 0,
            peak: Health::default(),
            too_large: 0,
            too_hot: 0,
        }
    }

    /// Other limits, the same evidence.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Frames that the new model has looked at.
    #[must_use]
    pub const fn frames(&self) -> u32 {
        self.frames
    }

    /// Frames that both have looked at.
    #[must_use]
    pub const fn compared(&self) -> u32 {
        self.compared
    }

    /// Takes in what the new model said, and the old one where it looked too.
    pub fn see(&mut self, new: &Said, old: Option<&Said>) {
        self.frames = self.frames.saturating_add(1);
        self.unfit |= !(new.finite && new.score.is_finite());
        self.new_ms.add(new.ms);
        *entry(&mut self.alone, &new.label) += 1;
        let Some(old) = old.filter(|old| old.finite && old.score.is_finite() && !self.unfit) else {
            return;
        };
        self.compared = self.compared.saturating_add(1);
        self.old_ms.add(old.ms);
        let fall = old.score - new.score;
        self.fall = (self.fall.0 + fall, self.fall.1 + fall * fall);
        if !new.shared {
            self.new_labels += 1;
            return;
        }
        let same = new.label == old.label;
        if old.sure {
            self.sure += 1;
            self.disagreed += u32::from(!same);
        }
        // To recognise what the old one did not is no shift.
        if old.label == UNKNOWN {
            return;
        }
        self.balanced += 1;
        let said = entry(&mut self.labels, &new.label);
        said.new += 1;
        said.both += u32::from(same);
        said.old_surely_other += u32::from(old.sure && !same);
        entry(&mut self.labels, &old.label).old += 1;
    }

    /// Takes in how the device is.
    pub fn feel(&mut self, health: Health) {
        let Health {
            memory_mib,
            temperature_c,
        } = health;
        if let Some(mib) = memory_mib {
            self.peak.memory_mib = Some(self.peak.memory_mib.unwrap_or(0).max(mib));
            let before = *self.before_mib.get_or_insert(mib);
            let limit = (self.limits.memory_mib).unwrap_or(before.saturating_add(MEMORY_ADDED_MIB));
            let over = mib > limit;
            self.too_large = if over { self.too_large + 1 } else { 0 };
        }
        if let Some(heat) = temperature_c.filter(|c| c.is_finite()) {
            self.peak.temperature_c = Some(self.peak.temperature_c.unwrap_or(heat).max(heat));
            let before = *self.cool_c.get_or_insert(heat);
            let over = heat > self.limits.temperature_c && heat >= before + HEAT_ADDED;
            self.too_hot = if over { self.too_hot + 1 } else { 0 };
        }
    }

    /// What the evidence says if `enough` frames are enough: of those that both have looked at while in shadow, of all
    /// while watching.
    #[must_use]
    pub fn verdict(&self, enough: bool) -> Verdict {
        let rules = [
            (self.unfit, Reason::NotFinite),
            (self.too_large >= HEALTH_RUN, Reason::Memory),
            (self.too_hot >= HEALTH_RUN, Reason::Heat),
            (self.is_slow(), Reason::Latency),
            (self.has_collapsed(), Reason::Collapse),
            (self.disagrees(), Reason::Disagreement),
            (self.is_less_sure(), Reason::Confidence),
            (self.balance() > self.limits.balance, Reason::Balance),
        ];
        match rules.into_iter().find(|(broken, _)| *broken) {
            Some((_, reason)) => Verdict::Stop(reason),
            // It may be by chance; the next measurements tell.
            None if self.too_large + self.too_hot > 0 => Verdict::Wait,
            None if enough => Verdict::Go,
            None => Verdict::Wait,
        }
    }

    fn is_slow(&self) -> bool {
        let limit = |old: Option<f32>| match self.limits.latency_ms {
            Some(ms) => Some(ms),
            None => old.map(|old| old * self.limits.latency_times + SLACK_MS),
        };
        let over = |share, least, times| {
            let old = self.old_ms.quantile(share, least);
            let new = self.new_ms.quantile(share, least);
            new.zip(limit(old))
                .is_some_and(|(new, limit)| new > limit * times)
        };
        let tail_times = if self.limits.latency_ms.is_some() {
            TAIL_TIMES
        } else {
            1.0
        };
        over(0.5, MIN_MEDIAN, 1.0) || over(0.95, MIN_TAIL, tail_times)
    }

    fn disagrees(&self) -> bool {
        let beyond = |count, of, limit| of >= MIN_COMPARED && at_least(count, of) > limit;
        beyond(self.disagreed, self.sure, self.limits.disagreement)
            || beyond(self.new_labels, self.compared, self.limits.new_labels)
    }

    fn is_less_sure(&self) -> bool {
        let n = self.compared as f32;
        let (mean, variance) = (
            self.fall.0 / n,
            self.fall.1 / n - (self.fall.0 / n) * (self.fall.0 / n),
        );
        let chance = CHANCE * libm::sqrtf(variance.max(0.0) / n);
        self.compared >= MIN_MEDIAN && mean - chance > self.limits.confidence_fall
    }

    fn has_collapsed(&self) -> bool {
        let limit = self.limits.collapse;
        if limit >= 1.0 {
            return false;
        }
        if self.compared == 0 {
            let top = self.alone.values().max().copied().unwrap_or(0);
            return self.frames >= MIN_ALONE && top == self.frames;
        }
        let Some(top) = self.labels.values().max_by_key(|count| count.new) else {
            return false;
        };
        let n = self.balanced;
        n >= MIN_MEDIAN
            && top.new as f32 >= limit * n as f32
            && at_least(top.old_surely_other, n) > OTHERS
    }

    /// Total variation distance of the two histograms, less what the frames that differ would show by chance.
    fn balance(&self) -> f32 {
        if self.balanced < MIN_TAIL {
            return 0.0;
        }
        let shift = |count: &Count| {
            let differ = (count.new + count.old).saturating_sub(2 * count.both);
            let moved = libm::fabsf(count.new as f32 - count.old as f32);
            (moved - CHANCE * libm::sqrtf(differ as f32)).max(0.0)
        };
        self.labels.values().map(shift).sum::<f32>() / (2.0 * self.balanced as f32)
    }

    /// The verdict in words.
    #[must_use]
    pub fn explain(&self, reason: Reason) -> String {
        let e = self.evidence();
        let number = |value: Option<f32>| value.unwrap_or(f32::NAN);
        match reason {
            Reason::NotFinite => format!("a result is no number, at frame {}", e.frames),
            Reason::Memory => format!("{} MiB in use", e.memory_mib.unwrap_or(0)),
            Reason::Heat => format!("{} °C", number(e.temperature_c)),
            Reason::Latency => format!(
                "median {} ms, 95th percentile {} ms; the old one {} and {} ms",
                number(e.ms_median),
                number(e.ms_p95),
                number(e.old_ms_median),
                number(e.old_ms_p95)
            ),
            Reason::Collapse => format!(
                "one label on {} of {} frames",
                number(e.top_share),
                e.frames
            ),
            Reason::Disagreement => format!(
                "disagrees on {} of {} frames where the old one was sure, {} of {} labels are new",
                e.disagreed, e.sure, e.new_labels, e.compared
            ),
            Reason::Confidence => {
                format!("{} less sure than the old one", number(e.confidence_fall))
            }
            Reason::Balance => format!("{} of the labels moved beyond chance", number(e.balance)),
            _ => String::new(),
        }
    }

    /// The numbers behind the verdict.
    #[must_use]
    pub fn evidence(&self) -> Evidence {
        let round = |value: f32| libm::roundf(value * 1_000.0) / 1_000.0;
        let share = |part: u32, of: u32| (of > 0).then(|| round(part as f32 / of as f32));
        Evidence {
            frames: self.frames,
            compared: self.compared,
            sure: self.sure,
            disagreed: self.disagreed,
            new_labels: self.new_labels,
            ms_median: self.new_ms.quantile(0.5, 1).map(round),
            ms_p95: self.new_ms.quantile(0.95, 1).map(round),
            old_ms_median: self.old_ms.quantile(0.5, 1).map(round),
            old_ms_p95: self.old_ms.quantile(0.95, 1).map(round),
            confidence_fall: (self.compared > 0).then(|| round(self.fall.0 / self.compared as f32)),
            top_share: share(self.alone.values().max().copied().unwrap_or(0), self.frames),
            balance: (self.balanced >= MIN_TAIL).then(|| round(self.balance())),
            memory_mib: self.peak.memory_mib,
            temperature_c: self.peak.temperature_c.map(round),
        }
    }
}

/// The count of a label; of all the others once there are too many.
fn entry<'a, T: Default>(counts: &'a mut BTreeMap<String, T>, label: &str) -> &'a mut T {
    let fits = counts.contains_key(label) || counts.len() < MAX_LABELS;
    counts
        .entry(if fits { label.into() } else { String::new() })
        .or_default()
}

/// The share that `count` of `of` shows at the very least (Wilson's lower bound, one-sided).
fn at_least(count: u32, of: u32) -> f32 {
    if of == 0 {
        return 0.0;
    }
    let (n, p) = (of as f32, count as f32 / of as f32);
    let z2 = CHANCE * CHANCE;
    let spread = libm::sqrtf(p * (1.0 - p) / n + z2 / (4.0 * n * n));
    ((p + z2 / (2.0 * n) - CHANCE * spread) / (1.0 + z2 / n)).max(0.0)
}

/// Buckets of a latency histogram: each a tenth wider than the one before, from 0.05 ms to two and a half hours.
const BUCKETS: usize = 200;
const BUCKET_GROWTH: f32 = 1.1;
const FIRST_BUCKET_MS: f32 = 0.05;

/// A histogram of latencies, exact to a tenth.
#[derive(Clone, Debug)]
struct Latencies {
    count: u32,
    buckets: [u32; BUCKETS],
}

impl Latencies {
    const fn new() -> Self {
        Self {
            count: 0,
            buckets: [0; BUCKETS],
        }
    }

    fn add(&mut self, ms: f32) {
        let at = libm::logf(ms.max(FIRST_BUCKET_MS) / FIRST_BUCKET_MS) / libm::logf(BUCKET_GROWTH);
        // What is no number is no latency; what is negative or beyond is at the ends.
        if let Some(bucket) = self.buckets.get_mut((at as usize).min(BUCKETS - 1)) {
            *bucket += 1;
            self.count += 1;
        }
    }

    /// The value that `share` of at least `least` latencies do not exceed.
    fn quantile(&self, share: f32, least: u32) -> Option<f32> {
        if self.count < least.max(1) {
            return None;
        }
        let rank = share * self.count as f32;
        let mut sum = 0;
        let at = self.buckets.iter().position(|bucket| {
            sum += bucket;
            sum as f32 >= rank
        })?;
        // The middle of the bucket.
        Some(FIRST_BUCKET_MS * libm::powf(BUCKET_GROWTH, at as f32 + 0.5))
    }
}

#[cfg(test)]
mod tests;

//! How much of its time a device gives to frames of others.

use serde::{Deserialize, Serialize};

/// Frames of others that wait: what is further back comes too late anyway.
pub const MAX_WAITING: usize = 4;
/// What was not used of the share can be used later, as much as comes together in this time, in milliseconds.
const SAVED_MS: f64 = 10_000.0;

/// Why a device does not look at a frame of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It does not have that model.
    NoSuchModel,
    /// Its own frames wait.
    Busy,
    /// It is too hot.
    Hot,
    /// Too many frames of others wait.
    Full,
    /// Others have had their share of its time.
    ShareUsed,
    /// It would not be done by the deadline.
    TooLate,
    /// What came is no picture, or a larger one than is taken.
    BadPicture,
    /// The model has failed.
    Failed,
}

impl Refusal {
    /// In words.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoSuchModel => "it does not have that model",
            Self::Busy => "its own frames wait",
            Self::Hot => "it is too hot",
            Self::Full => "too many frames wait",
            Self::ShareUsed => "others have had their share of its time",
            Self::TooLate => "it would be too late",
            Self::BadPicture => "the picture cannot be used",
            Self::Failed => "its model has failed",
        }
    }
}

/// How the device is just now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// Frames of its own wait.
    pub behind: bool,
    /// It is too hot for more than its own.
    pub hot: bool,
}

/// The device that answers: a bucket of time, which fills with the share that others may have.
#[derive(Clone, Debug)]
pub struct Admission {
    share: f64,
    /// Milliseconds that others may use now. It begins empty, so that the share holds from the start.
    saved_ms: f64,
    last_ms: u64,
    waiting: usize,
    /// What those that wait are expected to take.
    reserved_ms: u64,
}

impl Admission {
    /// `share` of the time, 0..=1, from `now_ms` on.
    #[must_use]
    pub fn new(share: f32, now_ms: u64) -> Self {
        Self {
            share: f64::from(share).clamp(0.0, 1.0),
            saved_ms: 0.0,
            last_ms: now_ms,
            waiting: 0,
            reserved_ms: 0,
        }
    }

    /// Would a frame be taken now that is expected to take `cost_ms` and must be done within `deadline_ms`? Nothing is
    /// promised by it.
    ///
    /// # Errors
    /// Why not.
    pub fn may(
        &mut self,
        cost_ms: u32,
        deadline_ms: u32,
        condition: Condition,
        now_ms: u64,
    ) -> Result<(), Refusal> {
        let passed = now_ms.saturating_sub(self.last_ms);
        self.last_ms = self.last_ms.max(now_ms);
        // Exact: milliseconds of a few thousand years.
        let earned = self.share * passed as f64;
        self.saved_ms = (self.saved_ms + earned).min(self.share * SAVED_MS);
        if condition.hot {
            Err(Refusal::Hot)
        } else if condition.behind {
            Err(Refusal::Busy)
        } else if self.waiting >= MAX_WAITING {
            Err(Refusal::Full)
        } else if self.reserved_ms + u64::from(cost_ms) > u64::from(deadline_ms) {
            Err(Refusal::TooLate)
        } else if self.saved_ms < f64::from(cost_ms) {
            Err(Refusal::ShareUsed)
        } else {
            Ok(())
        }
    }

    /// Takes a frame; [`Admission::done`] is to follow with the same `cost_ms`.
    ///
    /// # Errors
    /// Why not.
    pub fn admit(
        &mut self,
        cost_ms: u32,
        deadline_ms: u32,
        condition: Condition,
        now_ms: u64,
    ) -> Result<(), Refusal> {
        self.may(cost_ms, deadline_ms, condition, now_ms)?;
        self.waiting += 1;
        self.reserved_ms += u64::from(cost_ms);
        self.saved_ms -= f64::from(cost_ms);
        Ok(())
    }

    /// A frame that was taken is done, or given up, and took `used_ms`. What it took beyond what was expected has to be
    /// earned before the next one is taken.
    pub fn done(&mut self, cost_ms: u32, used_ms: u32) {
        self.waiting = self.waiting.saturating_sub(1);
        self.reserved_ms = self.reserved_ms.saturating_sub(u64::from(cost_ms));
        self.saved_ms += f64::from(cost_ms) - f64::from(used_ms);
    }

    /// Frames of others that wait or are looked at.
    #[must_use]
    pub const fn waiting(&self) -> usize {
        self.waiting
    }
}

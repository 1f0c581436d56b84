//! How a device comes to a certificate, and keeps having one.
//!
//! ```text
//!  no certificate ──token──> enrol ──────────────> held ──half life, doubt──> renew ──> held
//!                             ▲  │ pending,          ▲                         │
//!                             │  │ refused, lost     └── backoff, also beyond ──┘
//!                             └──┘                       the expiry: the old key still proves who asks
//! ```
//!
//! The machine is pure. It is asked with two clocks: one that only goes forward, by which it waits, and the device's wall
//! clock, which may be wrong by any number of years. What the wall clock says can make it ask the coordinator once more;
//! it never keeps it from asking. As soon as the coordinator has answered in this life, the time is the coordinator's own,
//! carried on by the clock that only goes forward.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::Backoff;

#[cfg(test)]
mod tests;

/// The first wait after a failure is about this …
const WAIT_MS: u64 = 1_000;
/// … and the longest: a coordinator that is back is noticed within minutes.
const MAX_WAIT_MS: u64 = 10 * 60_000;
/// No wait is longer than this part of a certificate's life: at least eight tries fit between half life and
/// expiry.
const PARTS: u64 = 16;
/// A refusal is a person's decision: the first wait after it …
const REFUSED_MS: u64 = 60_000;
/// … and the longest.
const MAX_REFUSED_MS: u64 = 60 * 60_000;
/// A person who approves wants to see something happen within an hour, whatever the coordinator says.
const MAX_PENDING_MS: u64 = 60 * 60_000;
/// A request is given up after this: longer than any exchange may take.
const ASK_MS: u64 = 2 * 60_000;
/// Between two renewals because somebody does not take the certificate.
const DOUBT_MS: u64 = 10 * 60_000;
/// The wall clock may be set at any time: it is looked at so often.
const LOOK_MS: u64 = 60_000;
/// The time is written down so often while it is known: four times a day wears no flash, and bounds what a device
/// without a clock of its own forgets when its power goes.
const FLOOR_MS: i64 = 6 * 3_600_000;

/// The two clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds of a clock that only goes forward, since the start.
    pub mono_ms: u64,
    /// The device's wall clock: milliseconds since the Unix epoch, right or wrong.
    pub wall_ms: i64,
}

/// From when to when a certificate is good: milliseconds since the Unix epoch, by the coordinator's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Validity {
    /// Not before.
    pub not_before_ms: i64,
    /// Not after.
    pub not_after_ms: i64,
    /// When it is to be renewed.
    pub renew_after_ms: i64,
}

/// The token that the device was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// None.
    None,
    /// One that it has not used yet.
    Fresh,
    /// The one that it has its certificate by.
    Spent,
}

/// What a life begins with.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// The certificate's, if there is one.
    pub certificate: Option<Validity>,
    /// It is later than this.
    pub floor_ms: i64,
    /// The token.
    pub token: Token,
}

/// What is asked of the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The first certificate, for the token.
    Enrol,
    /// The next one, for the key.
    Renew,
}

/// Something that happened. An answer with an old ticket changes nothing.
#[derive(Clone, Debug)]
pub enum Input {
    /// A certificate came, was checked, and is on the disk.
    Issued {
        /// The request's ticket.
        ticket: u64,
        /// From when to when it is good.
        validity: Validity,
        /// What time it is, as the coordinator said with it.
        now_ms: i64,
    },
    /// A person has to approve first.
    Pending {
        /// The request's ticket.
        ticket: u64,
        /// When to ask again.
        retry_after_ms: u64,
    },
    /// The coordinator does not want to.
    Refused {
        /// The request's ticket.
        ticket: u64,
        /// Its reason.
        why: String,
    },
    /// Nobody answered, or nothing that could be used.
    Failed {
        /// The request's ticket.
        ticket: u64,
        /// What happened.
        why: String,
    },
    /// Somebody does not take the certificate, or shows one that is not valid by this device's clock.
    Doubt,
    /// Time has passed.
    Tick,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the coordinator, and answer with the ticket.
    Ask {
        /// What for.
        what: Asked,
        /// For the answer.
        ticket: u64,
    },
    /// Write down that it is later than this.
    Floor(i64),
    /// Something is new: [`Enrolment::trouble`], [`Enrolment::certificate`].
    Report,
}

/// Why there is no new certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A person has to approve.
    Pending,
    /// The coordinator has refused, for this reason.
    Refused(String),
    /// The coordinator is not there, or does not answer as it should.
    Failed(String),
}

/// One life of a device's identity.
#[derive(Clone, Debug)]
pub struct Enrolment {
    certificate: Option<Validity>,
    floor_ms: i64,
    token: Token,
    /// The coordinator's time, and when it said so.
    anchor: Option<(i64, u64)>,
    now: Now,
    asking: Option<(Asked, u64)>,
    ticket: u64,
    /// Nothing is asked before this.
    earliest_ms: u64,
    doubt: bool,
    /// The renewal was refused, and a token lies ready.
    anew: bool,
    trouble: Option<Trouble>,
    failures: Backoff,
    refusals: Backoff,
    random: u64,
    actions: Vec<Action>,
}

impl Enrolment {
    /// Goes on from what is on the disk; `random` is any number, best another one on each device.
    #[must_use]
    pub fn resume(known: Known, now: Now, random: u64) -> (Self, Vec<Action>) {
        let mut machine = Self {
            certificate: known.certificate,
            floor_ms: known.floor_ms,
            token: known.token,
            anchor: None,
            now,
            asking: None,
            ticket: 0,
            earliest_ms: now.mono_ms,
            doubt: false,
            anew: false,
            trouble: None,
            failures: Backoff::new(WAIT_MS, MAX_WAIT_MS),
            refusals: Backoff::new(REFUSED_MS, MAX_REFUSED_MS),
            random,
            actions: Vec::new(),
        };
        machine.failures = machine.patience();
        if machine.certificate.is_some() {
            // A whole site that gets its power back does not ask in one moment. Where there is none yet, somebody waits.
            machine.earliest_ms += machine.dice() % WAIT_MS;
        }
        let actions = machine.step(Input::Tick, now);
        (machine, actions)
    }

    /// Takes an input in and says what to do.
    pub fn step(&mut self, input: Input, now: Now) -> Vec<Action> {
        self.now = Now {
            mono_ms: self.now.mono_ms.max(now.mono_ms),
            wall_ms: now.wall_ms,
        };
        match input {
            Input::Issued {
                ticket,
                validity,
                now_ms,
            } if self.answers(ticket) => self.issued(validity, now_ms),
            Input::Pending {
                ticket,
                retry_after_ms,
            } if self.answers(ticket) => {
                self.asking = None;
                let wait = retry_after_ms.clamp(WAIT_MS, MAX_PENDING_MS);
                let spread = self.dice() % (wait / 4 + 1);
                self.rest(wait + spread);
                self.say(Trouble::Pending);
            }
            Input::Refused { ticket, why } if self.answers(ticket) => self.refused(why),
            Input::Failed { ticket, why } if self.answers(ticket) => self.failed(why),
            // Once the time is known a fresh certificate is as good as it gets for a while.
            Input::Doubt => self.doubt |= self.certificate.is_some() && !self.is_fresh(),
            _ => {}
        }
        if let Some((_, since)) = self.asking
            && self.now.mono_ms >= since.saturating_add(ASK_MS)
        {
            self.failed("no answer in time".into());
        }
        if let Some(what) = self.wants()
            && self.now.mono_ms >= self.earliest_ms
        {
            self.ticket += 1;
            self.asking = Some((what, self.now.mono_ms));
            let ticket = self.ticket;
            self.actions.push(Action::Ask { what, ticket });
        }
        if self.anchor.is_some() && self.time_ms(self.now) >= self.floor_ms.saturating_add(FLOOR_MS)
        {
            self.floor_ms = self.time_ms(self.now);
            self.actions.push(Action::Floor(self.floor_ms));
        }
        core::mem::take(&mut self.actions)
    }

    /// When [`Input::Tick`] is due, if nothing happens before; by the clock that only goes forward.
    #[must_use]
    pub fn due_ms(&self) -> Option<u64> {
        if let Some((_, since)) = self.asking {
            return Some(since.saturating_add(ASK_MS));
        }
        if self.wants().is_some() {
            return Some(self.earliest_ms);
        }
        let certificate = self.certificate?;
        let look = self.now.mono_ms.saturating_add(LOOK_MS);
        let left = certificate
            .renew_after_ms
            .saturating_sub(self.time_ms(self.now));
        let left = u64::try_from(left).unwrap_or(0);
        let renew = self.now.mono_ms.saturating_add(left).max(self.earliest_ms);
        Some(renew.min(look))
    }

    /// What time it is, as well as that is known: milliseconds since the Unix epoch.
    #[must_use]
    pub fn time_ms(&self, now: Now) -> i64 {
        match self.anchor {
            Some((said_ms, at)) => {
                let since = now.mono_ms.saturating_sub(at);
                said_ms.saturating_add(i64::try_from(since).unwrap_or(i64::MAX))
            }
            None => now.wall_ms.max(self.floor_ms),
        }
    }

    /// The coordinator's time and when it said so, by the clock that only goes forward; nothing before it has answered in
    /// this life.
    #[must_use]
    pub const fn anchor(&self) -> Option<(i64, u64)> {
        self.anchor
    }

    /// It is later than this.
    #[must_use]
    pub const fn floor_ms(&self) -> i64 {
        self.floor_ms
    }

    /// The certificate's validity.
    #[must_use]
    pub const fn certificate(&self) -> Option<Validity> {
        self.certificate
    }

    /// What is wrong, as far as the last answer goes.
    #[must_use]
    pub const fn trouble(&self) -> Option<&Trouble> {
        self.trouble.as_ref()
    }

    // What can happen.

    fn answers(&self, ticket: u64) -> bool {
        self.asking.is_some() && ticket == self.ticket
    }

    fn issued(&mut self, mut validity: Validity, now_ms: i64) {
        if validity.not_after_ms <= now_ms || validity.not_before_ms >= validity.not_after_ms {
            return self.failed("the certificate had expired when it came".into());
        }
        let asked = self.asking.take().map(|(what, _)| what);
        if !(now_ms..validity.not_after_ms).contains(&validity.renew_after_ms) {
            validity.renew_after_ms = now_ms + (validity.not_after_ms - now_ms) / 2;
        }
        self.certificate = Some(validity);
        // The newest word of the coordinator, even where an older one was of a later time: its clock was wrong then.
        self.anchor = Some((now_ms, self.now.mono_ms));
        self.floor_ms = now_ms.max(validity.not_before_ms);
        if asked == Some(Asked::Enrol) {
            self.token = Token::Spent;
        }
        (self.doubt, self.anew, self.trouble) = (false, false, None);
        self.failures = self.patience();
        self.refusals.reset();
        self.rest(WAIT_MS);
        self.actions.push(Action::Report);
    }

    fn refused(&mut self, why: String) {
        let Some((what, _)) = self.asking.take() else {
            return;
        };
        let wait = match (what, self.token) {
            // Who gives a device that is known a new token wants it back.
            (Asked::Renew, Token::Fresh) => {
                self.anew = true;
                self.pause_after_failure()
            }
            (Asked::Enrol, _) if self.anew => {
                (self.anew, self.token) = (false, Token::Spent);
                self.pause_after_refusal()
            }
            _ => self.pause_after_refusal(),
        };
        self.rest(wait);
        self.say(Trouble::Refused(why));
    }

    fn failed(&mut self, why: String) {
        self.asking = None;
        let wait = self.pause_after_failure();
        self.rest(wait);
        self.say(Trouble::Failed(why));
    }

    // What follows.

    /// What is to be asked now, or as soon as it may be.
    fn wants(&self) -> Option<Asked> {
        if self.asking.is_some() {
            return None;
        }
        let Some(certificate) = self.certificate else {
            return (self.token != Token::None).then_some(Asked::Enrol);
        };
        if self.anew {
            return Some(Asked::Enrol);
        }
        // Behind what is known for certain: nobody knows how much.
        let is_behind = self.anchor.is_none() && self.now.wall_ms < self.floor_ms;
        let is_due = self.time_ms(self.now) >= certificate.renew_after_ms;
        (self.doubt || is_behind || is_due).then_some(Asked::Renew)
    }

    fn is_fresh(&self) -> bool {
        self.anchor
            .is_some_and(|(_, at)| self.now.mono_ms < at.saturating_add(DOUBT_MS))
    }

    fn rest(&mut self, wait_ms: u64) {
        self.earliest_ms = self.now.mono_ms.saturating_add(wait_ms);
    }

    fn say(&mut self, trouble: Trouble) {
        if self.trouble.as_ref() != Some(&trouble) {
            self.trouble = Some(trouble);
            self.actions.push(Action::Report);
        }
    }

    /// Waits after failures, as long as the certificate's life allows.
    fn patience(&self) -> Backoff {
        let life = self.certificate.map_or(u64::MAX, |certificate| {
            let life = certificate
                .not_after_ms
                .saturating_sub(certificate.not_before_ms);
            u64::try_from(life).unwrap_or(0)
        });
        Backoff::new(WAIT_MS, (life / PARTS).clamp(WAIT_MS, MAX_WAIT_MS))
    }

    fn pause_after_failure(&mut self) -> u64 {
        let random = self.dice();
        pause(&mut self.failures, random)
    }

    fn pause_after_refusal(&mut self) -> u64 {
        let random = self.dice();
        pause(&mut self.refusals, random)
    }

    /// Knuth's linear congruential generator; its upper bits are good enough to spread requests.
    fn dice(&mut self) -> u64 {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.random >> 16
    }
}

/// At least half of what the backoff allows: requests never come in a burst, whatever chance says.
fn pause(backoff: &mut Backoff, random: u64) -> u64 {
    let half = backoff.ceiling() / 2;
    half + backoff.next(random) / 2
}

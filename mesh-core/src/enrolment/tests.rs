//! A device and its coordinator in small: lost answers, restarts, wrong clocks, refusals, outages.

use std::string::ToString;

use super::*;
use crate::testing::{Dice, histories};

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const DAY: u64 = 24 * 60 * MINUTE;
/// Some day in 2026.
const BEGIN_MS: i64 = 1_790_000_000_000;
/// A broker that does not take the certificate is tried again so often.
const RECONNECT_MS: u64 = 30 * SECOND;
/// An exchange takes so long at most.
const EXCHANGE_MS: u64 = 20 * SECOND;

/// How wrong a wall clock is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wall {
    Right,
    /// Stands at this since the start: a clock that remembers when the power went, or none at all.
    From(i64),
}

struct World {
    dice: Dice,
    /// The true time since the beginning.
    t_ms: u64,
    life_ms: u64,
    machine: Enrolment,
    /// When this life began.
    born_ms: u64,
    wall: Wall,
    jumped: bool,
    // The disk.
    certificate: Option<Validity>,
    floor_ms: i64,
    token: Token,
    // The coordinator.
    up: bool,
    refuses: bool,
    lossy: f32,
    pending: u32,
    /// Everything has gone well since then.
    good_ms: u64,
    /// An answer on its way.
    answer: Option<(u64, Input)>,
    // What is counted.
    asks: u64,
    failures: u64,
    lives: u64,
    doubts: u64,
    last_ask_ms: Option<u64>,
    /// Consecutive failures in this life; refusals since the last success.
    row: u32,
    last_was_refused: bool,
}

impl World {
    fn new(seed: u64, life_ms: u64) -> Self {
        let mut dice = Dice(seed);
        let wall = some_wall(&mut dice, 0);
        let mut world = Self {
            machine: Enrolment::resume(
                Known {
                    certificate: None,
                    floor_ms: 0,
                    token: Token::None,
                },
                Now {
                    mono_ms: 0,
                    wall_ms: 0,
                },
                0,
            )
            .0,
            dice,
            t_ms: 0,
            life_ms,
            born_ms: 0,
            wall,
            jumped: false,
            certificate: None,
            floor_ms: 0,
            token: Token::Fresh,
            up: true,
            refuses: false,
            lossy: 0.0,
            pending: 0,
            good_ms: 0,
            answer: None,
            asks: 0,
            failures: 0,
            lives: 0,
            doubts: 0,
            last_ask_ms: None,
            row: 0,
            last_was_refused: false,
        };
        world.begin();
        world
    }

    fn true_ms(&self) -> i64 {
        BEGIN_MS + i64::try_from(self.t_ms).unwrap()
    }

    fn now(&self) -> Now {
        let mono_ms = self.t_ms - self.born_ms;
        let wall_ms = match self.wall {
            Wall::Right => self.true_ms(),
            Wall::From(at) => at + i64::try_from(mono_ms).unwrap(),
        };
        Now { mono_ms, wall_ms }
    }

    /// A new life, from the disk.
    fn begin(&mut self) {
        self.born_ms = self.t_ms;
        self.lives += 1;
        (self.answer, self.last_ask_ms, self.row) = (None, None, 0);
        self.last_was_refused = false;
        self.jumped = false;
        self.good_ms = self.t_ms;
        let known = Known {
            certificate: self.certificate,
            floor_ms: self.floor_ms,
            token: self.token,
        };
        let seed = self.dice.next();
        let (machine, actions) = Enrolment::resume(known, self.now(), seed);
        self.machine = machine;
        self.execute(actions);
    }

    fn give(&mut self, input: Input) {
        let actions = self.machine.step(input, self.now());
        self.execute(actions);
    }

    fn execute(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Ask { what, ticket } => self.asked(what, ticket),
                Action::Floor(floor) => {
                    assert!(floor >= self.floor_ms && floor <= self.true_ms());
                    self.floor_ms = floor;
                }
                Action::Report => {}
            }
        }
    }

    fn asked(&mut self, what: Asked, ticket: u64) {
        assert!(self.answer.is_none(), "one at a time");
        assert_eq!(what == Asked::Enrol, self.certificate.is_none());
        self.asks += 1;
        if let Some(last) = self.last_ask_ms {
            let apart = self.t_ms - last;
            let most = (self.life_ms / PARTS).clamp(WAIT_MS, MAX_WAIT_MS);
            let least = match self.row {
                _ if self.last_was_refused => REFUSED_MS / 2,
                0 => WAIT_MS,
                n => (WAIT_MS << (n - 1).min(20)).min(most) / 2,
            };
            assert!(
                apart >= least,
                "{apart} ms apart after {} failures",
                self.row
            );
        }
        self.last_ask_ms = Some(self.t_ms);
        let answer = self.coordinator(what, ticket);
        let after = self.dice.below(EXCHANGE_MS.min(self.life_ms / 50));
        self.answer = Some((self.t_ms + after, answer));
    }

    /// What it does with a request, at once; the answer takes its time.
    fn coordinator(&mut self, what: Asked, ticket: u64) -> Input {
        let failed = |why: &str| Input::Failed {
            ticket,
            why: why.into(),
        };
        if !self.up {
            return failed("nobody is there");
        }
        if self.refuses {
            let why = "revoked".to_string();
            return Input::Refused { ticket, why };
        }
        if what == Asked::Enrol && self.pending > 0 {
            self.pending -= 1;
            let retry_after_ms = 30 * SECOND;
            return Input::Pending {
                ticket,
                retry_after_ms,
            };
        }
        if self.dice.chance(self.lossy) {
            return failed("the answer was lost");
        }
        let now_ms = self.true_ms();
        let life = i64::try_from(self.life_ms).unwrap();
        let validity = Validity {
            not_before_ms: now_ms - life / 100,
            not_after_ms: now_ms + life,
            renew_after_ms: now_ms + life / 2,
        };
        Input::Issued {
            ticket,
            validity,
            now_ms,
        }
    }

    fn answered(&mut self, answer: Input) {
        match &answer {
            Input::Issued {
                validity, now_ms, ..
            } => {
                self.certificate = Some(*validity);
                self.floor_ms = (*now_ms).max(validity.not_before_ms);
                self.token = Token::Spent;
                (self.row, self.last_was_refused) = (0, false);
            }
            Input::Refused { .. } => {
                self.failures += 1;
                self.last_was_refused = true;
            }
            Input::Pending { .. } => {
                self.failures += 1;
                self.good_ms = self.t_ms;
                (self.row, self.last_was_refused) = (0, false);
            }
            _ => {
                self.failures += 1;
                self.row += 1;
                self.last_was_refused = false;
            }
        }
        self.give(answer);
    }

    fn is_usable(&self) -> bool {
        self.certificate
            .is_some_and(|c| c.not_after_ms > self.true_ms())
    }

    /// How long it may take to come back once everything is well.
    fn bound(&self) -> u64 {
        let wait = (self.life_ms / PARTS).clamp(WAIT_MS, MAX_WAIT_MS);
        wait + EXCHANGE_MS + RECONNECT_MS + SECOND
    }

    fn check(&self) {
        if self.is_usable() || !self.up || self.refuses || self.lossy > 0.0 {
            return;
        }
        // With a clock that goes wrong unnoticed, it is the broker that tells.
        let knows = self.wall == Wall::Right && !self.jumped;
        let since = match self.certificate {
            Some(certificate) if !knows => {
                let expired = certificate.not_after_ms - BEGIN_MS;
                self.good_ms.max(u64::try_from(expired).unwrap_or(0))
            }
            _ => self.good_ms,
        };
        assert!(
            self.t_ms.saturating_sub(since) <= self.bound(),
            "no certificate for {} s: {:?} {:?}",
            self.t_ms.saturating_sub(since) / SECOND,
            self.wall,
            self.machine
        );
    }

    /// Lets the time pass until `end_ms`.
    fn pass(&mut self, end_ms: u64) {
        let mut knock = self.t_ms + RECONNECT_MS;
        loop {
            if self.is_usable() || !self.up {
                knock = knock.max(self.t_ms + RECONNECT_MS);
            }
            let due = self
                .machine
                .due_ms()
                .map(|at| (self.born_ms + at).max(self.t_ms));
            let answer = self.answer.as_ref().map(|(at, _)| *at);
            let doubt =
                (!self.is_usable() && self.up && self.certificate.is_some()).then_some(knock);
            let next = [due, answer, doubt].into_iter().flatten().min();
            let Some(next) = next.filter(|next| *next < end_ms) else {
                self.t_ms = end_ms;
                return self.check();
            };
            self.t_ms = next;
            if answer == Some(next) {
                let (_, answer) = self.answer.take().unwrap();
                self.answered(answer);
            } else if doubt == Some(next) && due != Some(next) {
                knock = next + RECONNECT_MS;
                self.doubts += 1;
                self.give(Input::Doubt);
            } else {
                let before = self.machine.due_ms();
                self.give(Input::Tick);
                assert_ne!(self.machine.due_ms(), before, "it does not go in circles");
            }
            self.check();
        }
    }

    /// Something goes wrong, or right again.
    fn happen(&mut self) {
        self.good_ms = self.t_ms;
        match self.dice.below(12) {
            0 | 1 => self.up = !self.up,
            2 => self.refuses = !self.refuses,
            3 => self.lossy = if self.lossy > 0.0 { 0.0 } else { 0.7 },
            4..=6 => {
                // The power goes, for a moment or for long, and the clock is what it is after that.
                let off = match self.dice.below(3) {
                    0 => 0,
                    1 => self.dice.below(self.life_ms),
                    _ => self.dice.below(400 * DAY),
                };
                let before = self.now().wall_ms;
                self.t_ms += off;
                self.wall = some_wall(&mut self.dice, before);
                self.begin();
            }
            7 | 8 => {
                self.jumped = true;
                let true_ms = self.true_ms();
                self.wall = some_wall(&mut self.dice, true_ms);
                if self.wall == Wall::Right {
                    self.jumped = false;
                }
            }
            _ => (self.up, self.refuses, self.lossy) = (true, false, 0.0),
        }
    }
}

fn some_wall(dice: &mut Dice, before_ms: i64) -> Wall {
    match dice.below(6) {
        0 => Wall::From(0),
        // 2099.
        1 => Wall::From(4_070_908_800_000),
        // The time when it was switched off.
        2 => Wall::From(before_ms),
        _ => Wall::Right,
    }
}

#[test]
fn a_device_has_a_certificate_whenever_it_can_and_never_asks_too_often() {
    let (mut asks, mut certificates) = (0, 0);
    for seed in 0..histories(150) {
        // Seven days, an hour, ten seconds.
        let life_ms = [7 * DAY, 60 * MINUTE, 10 * SECOND][usize::try_from(seed % 3).unwrap()];
        let mut world = World::new(seed, life_ms);
        world.pending = u32::try_from(world.dice.below(3)).unwrap();
        if world.pending > 0 {
            // A person takes their time.
            world.pass(5 * MINUTE);
            world.good_ms = world.t_ms;
        }
        for _ in 0..12 {
            let quiet = world.dice.below(life_ms * 3);
            let end = world.t_ms + quiet;
            world.pass(end);
            world.happen();
            if !world.up || world.refuses || world.lossy > 0.0 {
                continue;
            }
            // A refusal that was taken back is heard of within the longest wait after it.
            if world.last_was_refused {
                world.good_ms += MAX_REFUSED_MS;
            }
        }
        (world.up, world.refuses, world.lossy) = (true, false, 0.0);
        world.good_ms = world.t_ms + MAX_REFUSED_MS;
        let end = world.good_ms + world.bound() + life_ms;
        world.pass(end);
        assert!(world.certificate.is_some(), "{seed}");
        // What no fault explains is at half life.
        let halves = world.t_ms / (life_ms / 2) + 1;
        let most = halves + world.failures + world.doubts + world.lives;
        assert!(world.asks <= most, "{} of {most}", world.asks);
        asks += world.asks;
        certificates += halves;
    }
    assert!(asks > 0 && certificates > 0);
}

fn known(token: Token) -> Known {
    Known {
        certificate: Some(Validity {
            not_before_ms: BEGIN_MS,
            not_after_ms: BEGIN_MS + 10_000,
            renew_after_ms: BEGIN_MS + 5_000,
        }),
        floor_ms: BEGIN_MS,
        token,
    }
}

fn at(mono_ms: u64, wall_ms: i64) -> Now {
    Now { mono_ms, wall_ms }
}

fn asks(actions: &[Action]) -> Option<(Asked, u64)> {
    actions.iter().find_map(|action| match action {
        Action::Ask { what, ticket } => Some((*what, *ticket)),
        _ => None,
    })
}

#[test]
fn without_token_and_certificate_nothing_is_asked() {
    let nothing = Known {
        certificate: None,
        floor_ms: 0,
        token: Token::None,
    };
    let (mut machine, actions) = Enrolment::resume(nothing, at(0, 0), 1);
    assert_eq!((actions, machine.due_ms()), (Vec::new(), None));
    assert_eq!(machine.step(Input::Doubt, at(9, 9)), Vec::new());
    assert_eq!(machine.due_ms(), None);
}

#[test]
fn whatever_the_clock_says_the_coordinator_is_asked_and_believed() {
    for wall in [
        0,
        BEGIN_MS - 1,
        BEGIN_MS + 5_000,
        BEGIN_MS + 10_001,
        i64::MAX,
    ] {
        let (mut machine, _) = Enrolment::resume(known(Token::Spent), at(0, wall), 7);
        let (what, ticket) = asks(&machine.step(Input::Tick, at(WAIT_MS, wall))).unwrap();
        assert_eq!(what, Asked::Renew, "{wall}");
        let now_ms = BEGIN_MS + 400_000;
        let validity = Validity {
            not_before_ms: now_ms,
            not_after_ms: now_ms + 10_000,
            renew_after_ms: now_ms + 5_000,
        };
        let issued = Input::Issued {
            ticket,
            validity,
            now_ms,
        };
        assert_eq!(machine.step(issued, at(2_000, wall)), [Action::Report]);
        assert_eq!(machine.time_ms(at(3_000, wall)), now_ms + 1_000);
        assert_eq!(machine.due_ms(), Some(7_000), "{wall}");
    }
}

#[test]
fn a_clock_that_looks_right_is_believed_until_somebody_doubts_it() {
    let wall = BEGIN_MS + 100;
    let (mut machine, actions) = Enrolment::resume(known(Token::Spent), at(0, wall), 7);
    assert_eq!(asks(&actions), None);
    assert_eq!(asks(&machine.step(Input::Tick, at(WAIT_MS, wall))), None);
    let actions = machine.step(Input::Doubt, at(WAIT_MS, wall));
    assert_eq!(asks(&actions), Some((Asked::Renew, 1)));
}

#[test]
fn a_new_token_brings_a_revoked_device_back_and_is_tried_once() {
    let wall = BEGIN_MS + 6_000;
    let (mut machine, _) = Enrolment::resume(known(Token::Fresh), at(0, wall), 3);
    let mut heard = Vec::new();
    let mut mono = WAIT_MS;
    for _ in 0..4 {
        let (what, ticket) = asks(&machine.step(Input::Tick, at(mono, wall))).unwrap();
        heard.push(what);
        let why = "revoked".to_string();
        let refused = Input::Refused { ticket, why };
        assert!(asks(&machine.step(refused, at(mono, wall))).is_none());
        mono = machine.due_ms().unwrap();
    }
    use Asked::{Enrol, Renew};
    assert_eq!(heard, [Renew, Enrol, Renew, Renew]);
    let why = "revoked".to_string();
    assert_eq!(machine.trouble(), Some(&Trouble::Refused(why)));
}

#[test]
fn an_answer_that_makes_no_sense_does_not_make_it_ask_in_circles() {
    let wall = BEGIN_MS + 6_000;
    let (mut machine, _) = Enrolment::resume(known(Token::Spent), at(0, wall), 3);
    let mut mono = WAIT_MS;
    for n in 0..40_i64 {
        let due = machine.due_ms().unwrap();
        mono = mono.max(due);
        let Some((_, ticket)) = asks(&machine.step(Input::Tick, at(mono, wall))) else {
            continue;
        };
        let before = mono;
        // Expired on arrival, or to be renewed before it began.
        let validity = Validity {
            not_before_ms: BEGIN_MS,
            not_after_ms: BEGIN_MS + 10_000 * (n % 2),
            renew_after_ms: 0,
        };
        let now_ms = BEGIN_MS + 9_000;
        let issued = Input::Issued {
            ticket,
            validity,
            now_ms,
        };
        machine.step(issued, at(mono, wall));
        let next = machine.due_ms().unwrap();
        assert!(next >= before + WAIT_MS / 2, "{n}: {}", next - before);
    }
}

/// Asks when it is due. The ticket, and when that was.
fn ask_when_due(machine: &mut Enrolment, wall: i64) -> (u64, u64) {
    let mono = machine.due_ms().unwrap();
    let (_, ticket) = asks(&machine.step(Input::Tick, at(mono, wall))).unwrap();
    (ticket, mono)
}

/// A certificate that is to be renewed in the moment in which it comes.
fn issued_and_due(ticket: u64) -> Input {
    let now_ms = BEGIN_MS + 6_000;
    let validity = Validity {
        not_before_ms: now_ms,
        not_after_ms: now_ms + 100_000_000,
        renew_after_ms: now_ms,
    };
    Input::Issued {
        ticket,
        validity,
        now_ms,
    }
}

#[test]
fn after_a_success_the_next_refusal_is_the_first_again() {
    let wall = BEGIN_MS + 6_000;
    let (mut machine, _) = Enrolment::resume(known(Token::Spent), at(0, wall), 3);
    let refuse = |machine: &mut Enrolment| {
        let (ticket, mono) = ask_when_due(machine, wall);
        let why = "not now".to_string();
        machine.step(Input::Refused { ticket, why }, at(mono, wall));
        machine.due_ms().unwrap() - mono
    };
    let waits: Vec<_> = (0..6).map(|_| refuse(&mut machine)).collect();
    assert!(
        waits[0] <= REFUSED_MS && waits[5] > 8 * REFUSED_MS,
        "{waits:?}"
    );
    let (ticket, mono) = ask_when_due(&mut machine, wall);
    machine.step(issued_and_due(ticket), at(mono, wall));
    let wait = refuse(&mut machine);
    assert!(wait <= REFUSED_MS, "{wait}");
}

#[test]
fn after_a_success_it_rests_before_it_asks_again_whatever_the_certificate_says() {
    let wall = BEGIN_MS + 6_000;
    let (mut machine, _) = Enrolment::resume(known(Token::Spent), at(0, wall), 3);
    let (ticket, mono) = ask_when_due(&mut machine, wall);
    let actions = machine.step(issued_and_due(ticket), at(mono, wall));
    assert_eq!(asks(&actions), None);
    assert_eq!(machine.due_ms(), Some(mono + WAIT_MS));
    for early in [mono, mono + WAIT_MS - 1] {
        assert_eq!(asks(&machine.step(Input::Tick, at(early, wall))), None);
    }
    assert!(asks(&machine.step(Input::Tick, at(mono + WAIT_MS, wall))).is_some());
}

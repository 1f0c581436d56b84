//! Who of the site is there: every device's live view of the others.
//!
//! ```text
//!            beats every 2.4 s                    told once to all that are linked, who tell on
//!  device ────────────────────> its watcher ──────────"it is gone"──────────> everybody
//!     ▲                       (the next in the ring)                              │
//!     └───────────── "I am still here" (one seq more), if it is ──────────────────┘
//! ```
//!
//! In rest a device sends one small beat to one other, however large the site is. What changes is told once, signed by
//! whoever says it, and handed on by everybody who had not heard it. Two that are newly linked compare what they know
//! by a sum, and tell each other everything if it differs; so do watcher and watched, once a minute. The order is that of
//! (life, seq), so messages may come in any order, twice, or late.
//!
//! The machine is pure: time is a clock that only goes forward, in milliseconds. Signatures are checked before it is
//! asked; that only members of the roster are heard is its own business.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};

use crate::{Backoff, roster::Peer};

mod presence;
mod ring;
#[cfg(test)]
mod tests;
mod watching;

use watching::{PROBE_MS, Watch};

pub use presence::{Frame, MAX_STATEMENT_BYTES, News, Presence, Said, Signed, Statement};

/// Between two beats. They are all that is sent in rest, so they are rare.
const BEAT_MS: u64 = 2_400;
/// Between two comparisons of all that is known.
const COMPARE_MS: u64 = 60_000;
/// All that is known is told to the same neighbour no more often than this, whatever sums he comes to.
const TELL_ALL_MS: u64 = 5_000;
/// News about a device is taken no more often than this, on the whole: one that has more to say does not fill the site
/// with it. What is left out comes with the next comparison.
const NEWS_MS: u64 = 400;
/// So many at once are no flood: a device that starts, is said to be gone and answers.
const NEWS_AT_ONCE: u64 = 5;
/// What a device has to say of itself waits until this long after the last time …
const SAY_MS: u64 = 2_000;
/// … and this long if it is nothing but numbers: everybody hears all of it, and load comes and goes.
const SAY_NUMBERS_MS: u64 = 60_000;
/// Who could not be reached is tried again, at first after about …
const DIAL_MS: u64 = 500;
/// … and at last.
const MAX_DIAL_MS: u64 = 30_000;
/// An attempt without an answer has failed after this.
const DIALING_MS: u64 = 5_000;
/// Of two that want a link the one with the lower key dials; the other one after this, for it may not know the one yet.
const DIAL_LATER_MS: u64 = 3_000;
/// Strangers that were found on the network are tried so many at a time: the first who answers knows the others.
const DISCOVERY_DIALS: usize = 3;
/// One of those that are gone is tried so often, by each device: two halves of a network find each other again.
const HEAL_MS: u64 = 15_000;
/// A link that neither end wants any more is kept for this long: views differ for a while after a change.
const UNWANTED_MS: u64 = 60_000;
/// Links are looked over so often, besides when somebody comes or goes.
const REACH_MS: u64 = 1_000;
/// A link with somebody who is said to be gone is asked, and ended without an answer within this: what once was sent over
/// it may come much later, and whoever is back wants a new one.
const DOUBT_MS: u64 = 1_500;
/// Who was said to be gone and answers within this never was …
const REFUTED_MS: u64 = 2_000;
/// … and who has said so three times …
const FALSE_ALARMS: usize = 3;
/// … within ten minutes is not believed for as long.
const DISBELIEF_MS: u64 = 10 * 60_000;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A new roster.
    Members(BTreeSet<Peer>),
    /// There is a link.
    Up(Peer),
    /// There is none any more.
    Down(Peer),
    /// It could not be reached.
    Unreachable(Peer),
    /// It answers somewhere on the network: it can be dialled.
    Found(Peer),
    /// Something came over a link. Signatures have been checked.
    Frame(Peer, Frame),
    /// What this device has to say of itself.
    Own(Presence),
    /// Time has passed.
    Tick,
    /// The device stops, in good order.
    Leave,
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "each is used up at once, none is kept"
)]
pub enum Action {
    /// Send it over the link, if there still is one.
    Send(Peer, Frame),
    /// Try to make a link.
    Dial(Peer),
    /// End the link.
    Close(Peer),
    /// It is there.
    Came(Peer),
    /// It is there no more.
    Went(Peer),
}

/// What is known of a device.
#[derive(Clone, Debug)]
struct Known {
    here: Signed,
    /// Somebody has said that it is gone, since that.
    gone: Option<(Signed, u64)>,
    taken_ms: u64,
    /// A bucket that leaks (GCRA): the moment when it is empty.
    empty_ms: u64,
}

/// A link.
#[derive(Clone, Copy, Debug)]
struct Link {
    heard_ms: u64,
    told_all_ms: Option<u64>,
    unwanted_ms: Option<u64>,
    doubted_ms: Option<u64>,
}

/// Attempts to make a link.
#[derive(Clone, Debug)]
struct Dial {
    backoff: Backoff,
    /// Under way since.
    since_ms: Option<u64>,
    not_before_ms: u64,
    /// There was a link, and it broke.
    is_lost: bool,
}

/// A neighbour, for people.
#[derive(Clone, Copy, Debug)]
pub struct Neighbour<'a> {
    /// Its key.
    pub peer: Peer,
    /// What it last said of itself.
    pub presence: &'a Presence,
    /// Is it there?
    pub is_here: bool,
    /// Is there a link with it?
    pub is_linked: bool,
    /// When it last said something, by the machine's clock.
    pub said_ms: u64,
}

/// The view of one device.
#[derive(Clone, Debug)]
pub struct Neighbours {
    me: Peer,
    life: u64,
    seq: u64,
    own: Option<Presence>,
    /// What was last said of it, and when.
    said: Option<(Signed, u64)>,
    members: BTreeSet<Peer>,
    known: BTreeMap<Peer, Known>,
    /// Those of them that are there, and this device.
    live: BTreeSet<Peer>,
    links: BTreeMap<Peer, Link>,
    dials: BTreeMap<Peer, Dial>,
    /// Found on the network, not known yet.
    found: BTreeSet<Peer>,
    watch: Option<Watch>,
    /// Those before it, and since when they are asked, while it does not answer.
    ahead: BTreeMap<Peer, u64>,
    alarms: BTreeMap<Peer, Vec<u64>>,
    beat_ms: u64,
    compare_ms: u64,
    heal_ms: u64,
    reach_ms: u64,
    has_left: bool,
    dice: u64,
}

/// Signs a statement of this device: gives the envelope.
pub type Sign<'a> = &'a mut dyn FnMut(&Statement) -> Vec<u8>;

impl Neighbours {
    /// A device that knows nobody. `life` is greater than that of any earlier life as far as is known; `random` is any
    /// evenly drawn number.
    #[must_use]
    pub fn new(me: Peer, life: u64, random: u64) -> Self {
        Self {
            me,
            life,
            seq: 0,
            own: None,
            said: None,
            members: BTreeSet::new(),
            known: BTreeMap::new(),
            live: BTreeSet::from([me]),
            links: BTreeMap::new(),
            dials: BTreeMap::new(),
            found: BTreeSet::new(),
            watch: None,
            ahead: BTreeMap::new(),
            alarms: BTreeMap::new(),
            beat_ms: 0,
            compare_ms: COMPARE_MS,
            heal_ms: HEAL_MS,
            reach_ms: 0,
            has_left: false,
            dice: random,
        }
    }

    /// Something happened at `now_ms`.
    #[must_use]
    pub fn step(&mut self, input: Input, now_ms: u64, sign: Sign<'_>) -> Vec<Action> {
        let mut out = Vec::new();
        if self.has_left {
            return out;
        }
        match input {
            Input::Members(members) => self.admit(members, &mut out),
            Input::Up(peer) => self.up(peer, now_ms, &mut out),
            Input::Down(peer) => self.down(peer, now_ms, &mut out),
            Input::Unreachable(peer) => self.unreachable(peer, now_ms, sign, &mut out),
            Input::Found(peer) => {
                if self.members.contains(&peer) && !self.live.contains(&peer) {
                    self.found.insert(peer);
                    self.reach(now_ms, &mut out);
                }
            }
            Input::Frame(from, frame) => self.frame(from, frame, now_ms, sign, &mut out),
            Input::Own(presence) => {
                self.own = Some(presence.bounded());
                self.speak(now_ms, sign, &mut out);
            }
            Input::Tick => self.tick(now_ms, sign, &mut out),
            Input::Leave => self.leave(sign, &mut out),
        }
        out
    }

    /// Everybody whom this device has heard of, itself left out.
    pub fn all(&self) -> impl Iterator<Item = Neighbour<'_>> {
        self.known.iter().filter_map(|(peer, known)| {
            let Said::Here(presence) = &known.here.statement.said else {
                return None;
            };
            Some(Neighbour {
                peer: *peer,
                presence,
                is_here: known.gone.is_none(),
                is_linked: self.links.contains_key(peer),
                said_ms: known.taken_ms,
            })
        })
    }

    /// What a device last said of itself, if it is there.
    #[must_use]
    pub fn presence(&self, peer: &Peer) -> Option<&Presence> {
        let known = self.known.get(peer).filter(|known| known.gone.is_none())?;
        match &known.here.statement.said {
            Said::Here(presence) => Some(presence),
            Said::Gone => None,
        }
    }

    /// Would a statement change nothing any more, however often it is told? What was left out, because its device was no
    /// member, said too much or was heard by an own ear, may count the next time.
    #[must_use]
    pub fn is_settled(&self, statement: &Statement) -> bool {
        let theirs = order(statement);
        let is_gone = matches!(statement.said, Said::Gone);
        if statement.about == self.me {
            let own = (self.life, self.seq);
            return theirs < own || (theirs == own && !is_gone);
        }
        self.known.get(&statement.about).is_some_and(|known| {
            let own = order(&known.here.statement);
            theirs < own || (theirs == own && (!is_gone || known.gone.is_some()))
        })
    }

    /// How many are there, this device left out.
    #[must_use]
    pub fn count(&self) -> usize {
        self.live.len() - 1
    }

    /// All that this device knows, in one number: two that come to the same know the same.
    #[must_use]
    pub fn sum(&self) -> u64 {
        let own = self.said.iter().map(|(said, _)| (&said.statement, false));
        let known = self.known.values();
        known
            .map(|known| (&known.here.statement, known.gone.is_some()))
            .chain(own)
            .map(|(statement, is_gone)| {
                let [a, b, c, d, e, f, g, h, ..] = statement.about.0;
                let about = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
                let seen = mix(mix(about ^ statement.life) ^ statement.seq);
                mix(seen ^ u64::from(is_gone))
            })
            .fold(0, u64::wrapping_add)
    }

    fn random(&mut self) -> u64 {
        self.dice = self.dice.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.dice)
    }

    // ---- members and links

    fn admit(&mut self, members: BTreeSet<Peer>, out: &mut Vec<Action>) {
        let is_in = |peer: &Peer| members.contains(peer);
        out.extend(
            self.links
                .keys()
                .filter(|p| !is_in(p))
                .map(|p| Action::Close(*p)),
        );
        let strangers = self.known.iter().filter(|(peer, _)| !is_in(peer));
        out.extend(
            strangers
                .filter(|(_, known)| known.gone.is_none())
                .map(|(peer, _)| Action::Went(*peer)),
        );
        self.known.retain(|peer, _| is_in(peer));
        let me = self.me;
        self.live.retain(|peer| is_in(peer) || *peer == me);
        self.links.retain(|peer, _| is_in(peer));
        self.dials.retain(|peer, _| is_in(peer));
        self.found.retain(is_in);
        self.alarms.retain(|peer, _| is_in(peer));
        self.members = members;
        // What somebody new has said was not listened to before.
        let sum = self.sum();
        out.extend(
            self.links
                .keys()
                .map(|peer| Action::Send(*peer, Frame::Sum(sum))),
        );
    }

    fn up(&mut self, peer: Peer, now_ms: u64, out: &mut Vec<Action>) {
        if !self.members.contains(&peer) {
            out.push(Action::Close(peer));
            return;
        }
        self.dials.remove(&peer);
        let link = Link {
            heard_ms: now_ms,
            told_all_ms: None,
            unwanted_ms: None,
            doubted_ms: None,
        };
        self.links.insert(peer, link);
        out.push(Action::Send(peer, Frame::Sum(self.sum())));
    }

    /// A program that ends closes its links. If it cannot be dialled either, it is gone: nobody has to wait for beats.
    fn down(&mut self, peer: Peer, now_ms: u64, out: &mut Vec<Action>) {
        if self.links.remove(&peer).is_some() && self.is_wanted(&peer) {
            self.dial(peer, now_ms, out);
            if let Some(dial) = self.dials.get_mut(&peer) {
                dial.is_lost = true;
            }
        }
    }

    fn unreachable(&mut self, peer: Peer, now_ms: u64, sign: Sign<'_>, out: &mut Vec<Action>) {
        let random = self.random();
        if let Some(dial) = self.dials.get_mut(&peer) {
            let is_lost = core::mem::take(&mut dial.is_lost);
            dial.since_ms = None;
            dial.not_before_ms = now_ms + dial.backoff.next(random);
            if is_lost && !self.links.contains_key(&peer) {
                self.accuse(peer, now_ms, sign, out);
            }
        }
    }

    /// Does either end want a link?
    fn is_wanted(&self, peer: &Peer) -> bool {
        self.live.contains(peer)
            && (ring::wanted(&self.live, &self.me).contains(peer)
                || ring::wanted(&self.live, peer).contains(&self.me))
    }

    fn dial(&mut self, peer: Peer, now_ms: u64, out: &mut Vec<Action>) {
        if self.links.contains_key(&peer) {
            return;
        }
        let dial = self.dials.entry(peer).or_insert_with(|| Dial {
            backoff: Backoff::new(DIAL_MS, MAX_DIAL_MS),
            since_ms: None,
            not_before_ms: now_ms,
            is_lost: false,
        });
        if dial.since_ms.is_none() && dial.not_before_ms <= now_ms {
            dial.since_ms = Some(now_ms);
            out.push(Action::Dial(peer));
        }
    }

    /// Makes the links that are wanted, and ends those that nobody wants.
    fn reach(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        self.reach_ms = now_ms + REACH_MS;
        for dial in self.dials.values_mut() {
            if dial
                .since_ms
                .is_some_and(|since| now_ms >= since + DIALING_MS)
            {
                dial.since_ms = None;
            }
        }
        let wanted = ring::wanted(&self.live, &self.me);
        for peer in &wanted {
            if self.links.contains_key(peer) {
                continue;
            }
            let is_theirs = *peer < self.me && ring::wanted(&self.live, peer).contains(&self.me);
            let known_ms = self.known.get(peer).map_or(0, |known| known.taken_ms);
            if !is_theirs || now_ms >= known_ms + DIAL_LATER_MS {
                self.dial(*peer, now_ms, out);
            }
        }
        let live = &self.live;
        let dials = self.dials.iter();
        let strangers = dials.filter(|(peer, d)| d.since_ms.is_some() && !live.contains(peer));
        let free = DISCOVERY_DIALS.saturating_sub(strangers.count());
        let may_be_dialled = |peer: &&Peer| {
            let dial = self.dials.get(peer);
            !live.contains(peer)
                && !self.links.contains_key(peer)
                && dial.is_none_or(|d| d.since_ms.is_none() && d.not_before_ms <= now_ms)
        };
        let found = self.found.iter().filter(may_be_dialled);
        let next: Vec<Peer> = found.copied().take(free).collect();
        for peer in next {
            self.dial(peer, now_ms, out);
        }
        let mut ended = Vec::new();
        for (peer, link) in &mut self.links {
            let is_wanted = wanted.contains(peer)
                || !self.live.contains(peer)
                || ring::wanted(&self.live, peer).contains(&self.me);
            let doubted = link.doubted_ms.filter(|doubted| link.heard_ms <= *doubted);
            link.doubted_ms = doubted;
            if doubted.is_some_and(|doubted| now_ms >= doubted + DOUBT_MS) {
                ended.push(*peer);
            } else if is_wanted {
                link.unwanted_ms = None;
            } else if now_ms >= *link.unwanted_ms.get_or_insert(now_ms) + UNWANTED_MS {
                ended.push(*peer);
            }
        }
        for peer in ended {
            self.links.remove(&peer);
            out.push(Action::Close(peer));
        }
    }

    // ---- what is said

    fn frame(
        &mut self,
        from: Peer,
        frame: Frame,
        now_ms: u64,
        sign: Sign<'_>,
        out: &mut Vec<Action>,
    ) {
        let Some(link) = self.links.get_mut(&from) else {
            return;
        };
        link.heard_ms = now_ms;
        match frame {
            Frame::Beat => {}
            Frame::Probe => out.push(Action::Send(from, Frame::Beat)),
            Frame::Sum(theirs) => {
                let is_due = link
                    .told_all_ms
                    .is_none_or(|told| now_ms >= told + TELL_ALL_MS);
                if is_due && theirs != self.sum() {
                    if let Some(link) = self.links.get_mut(&from) {
                        link.told_all_ms = Some(now_ms);
                    }
                    self.tell_all(from, out);
                }
            }
            Frame::Tell(signed) => self.hear(from, signed, now_ms, sign, out),
        }
    }

    fn tell_all(&self, to: Peer, out: &mut Vec<Action>) {
        let own = self.said.iter().map(|(said, _)| said);
        let known = self.known.values();
        let all = known
            .flat_map(|known| [Some(&known.here), known.gone.as_ref().map(|(gone, _)| gone)])
            .flatten();
        out.extend(
            own.chain(all)
                .map(|signed| Action::Send(to, Frame::Tell(signed.clone()))),
        );
    }

    fn tell_on(&self, signed: &Signed, but: Option<Peer>, out: &mut Vec<Action>) {
        let to = self.links.keys().filter(|peer| Some(**peer) != but);
        out.extend(to.map(|peer| Action::Send(*peer, Frame::Tell(signed.clone()))));
    }

    fn hear(
        &mut self,
        from: Peer,
        signed: Signed,
        now_ms: u64,
        sign: Sign<'_>,
        out: &mut Vec<Action>,
    ) {
        let statement = &signed.statement;
        if statement.about == self.me {
            self.hear_of_me(&signed, now_ms, sign, out);
            return;
        }
        if !self.members.contains(&statement.about) || !self.members.contains(&signed.by) {
            return;
        }
        if let Some(known) = self.known.get(&statement.about)
            && order(statement) < order(&known.here.statement)
        {
            // He has missed something, and may tell the old to others.
            out.push(Action::Send(from, Frame::Tell(known.here.clone())));
            return;
        }
        match &statement.said {
            Said::Here(presence) => {
                if signed.by == statement.about && presence.is_bounded() {
                    self.hear_here(from, signed, now_ms, out);
                }
            }
            Said::Gone => self.hear_gone(from, signed, now_ms, out),
        }
    }

    fn hear_here(&mut self, from: Peer, signed: Signed, now_ms: u64, out: &mut Vec<Action>) {
        let (about, order) = (signed.statement.about, order(&signed.statement));
        let old = self.known.get(&about);
        let was_here = old.is_some_and(|old| old.gone.is_none());
        let mut empty_ms = now_ms;
        if let Some(old) = old {
            if order <= self::order(&old.here.statement) {
                return;
            }
            // Whoever said that it is gone was wrong if it can answer at once, in the same life.
            if let Some((gone, said_ms)) = &old.gone {
                let is_same_life = gone.statement.life == order.0;
                if is_same_life && gone.by != about && now_ms < said_ms + REFUTED_MS {
                    let by = gone.by;
                    self.alarms.entry(by).or_default().push(now_ms);
                }
            }
            empty_ms = old.empty_ms;
            if empty_ms > now_ms + (NEWS_AT_ONCE - 1) * NEWS_MS {
                return;
            }
        }
        self.tell_on(&signed, Some(from), out);
        let known = Known {
            here: signed,
            gone: None,
            taken_ms: now_ms,
            empty_ms: empty_ms.max(now_ms) + NEWS_MS,
        };
        self.known.insert(about, known);
        self.live.insert(about);
        self.found.remove(&about);
        if !was_here {
            out.push(Action::Came(about));
            self.reach(now_ms, out);
        }
    }

    fn hear_gone(&mut self, from: Peer, signed: Signed, now_ms: u64, out: &mut Vec<Action>) {
        let about = signed.statement.about;
        let by = signed.by;
        let is_its_own = by == about;
        // An own ear is better than another's word. (Its own word is better still.)
        let link = self.links.get(&about);
        let is_heard = link.is_some_and(|link| now_ms < link.heard_ms + PROBE_MS);
        if !is_its_own && !self.is_believed(by, now_ms) {
            return;
        }
        if !is_its_own && is_heard {
            // It shall answer: who says so may mean it.
            out.push(Action::Send(about, Frame::Tell(signed)));
            return;
        }
        let Some(known) = self.known.get_mut(&about) else {
            return;
        };
        // Exactly what it last said: nobody can say that it will be gone.
        if known.gone.is_some() || order(&known.here.statement) != order(&signed.statement) {
            return;
        }
        known.gone = Some((signed.clone(), now_ms));
        self.live.remove(&about);
        if let Some(link) = self.links.get_mut(&about) {
            link.doubted_ms = Some(now_ms);
            out.push(Action::Send(about, Frame::Probe));
        }
        self.tell_on(&signed, Some(from), out);
        out.push(Action::Went(about));
        self.reach(now_ms, out);
    }

    fn is_believed(&mut self, by: Peer, now_ms: u64) -> bool {
        let Some(alarms) = self.alarms.get_mut(&by) else {
            return true;
        };
        alarms.retain(|at| now_ms < at + DISBELIEF_MS);
        alarms.len() < FALSE_ALARMS
    }

    /// Somebody tells this device of itself: that it is gone, or what it said in an earlier life.
    fn hear_of_me(&mut self, signed: &Signed, now_ms: u64, sign: Sign<'_>, out: &mut Vec<Action>) {
        let theirs = order(&signed.statement);
        let own = (self.life, self.seq);
        let is_gone = matches!(signed.statement.said, Said::Gone);
        let is_mine = signed.by == self.me;
        let is_answered = match (is_gone, is_mine) {
            // Nobody but me can have said what I have not said yet.
            (true, false) => theirs == own,
            // The clock has gone back since: that life has to end before this one counts.
            (_, true) => theirs > own || (theirs == own && is_gone),
            (false, false) => false,
        };
        if !is_answered {
            return;
        }
        if theirs.0 > self.life {
            self.life = theirs.0;
        }
        self.seq = theirs.1;
        self.say(now_ms, sign, out);
    }

    /// Says what is to be said of this device, if it is news.
    fn speak(&mut self, now_ms: u64, sign: Sign<'_>, out: &mut Vec<Action>) {
        let Some(own) = &self.own else {
            return;
        };
        let is_due = match &self.said {
            None => true,
            Some((said, at_ms)) => match &said.statement.said {
                Said::Here(said) => own.news_after(said).is_some_and(|news| {
                    let wait_ms = match news {
                        News::Numbers => SAY_NUMBERS_MS,
                        News::Other => SAY_MS,
                    };
                    now_ms >= at_ms + wait_ms
                }),
                Said::Gone => false,
            },
        };
        if is_due {
            self.say(now_ms, sign, out);
        }
    }

    fn say(&mut self, now_ms: u64, sign: Sign<'_>, out: &mut Vec<Action>) {
        let Some(own) = self.own.clone() else {
            return;
        };
        self.seq += 1;
        let signed = self.sign(self.me, (self.life, self.seq), Said::Here(own), sign);
        self.tell_on(&signed, None, out);
        self.said = Some((signed, now_ms));
    }

    fn sign(&self, about: Peer, order: (u64, u64), said: Said, sign: Sign<'_>) -> Signed {
        let statement = Statement {
            about,
            life: order.0,
            seq: order.1,
            said,
        };
        let envelope = sign(&statement);
        Signed {
            statement,
            by: self.me,
            envelope,
        }
    }

    fn accuse(&mut self, peer: Peer, now_ms: u64, sign: Sign<'_>, out: &mut Vec<Action>) {
        let Some(known) = self.known.get(&peer).filter(|known| known.gone.is_none()) else {
            return;
        };
        let order = order(&known.here.statement);
        let signed = self.sign(peer, order, Said::Gone, sign);
        if let Some(known) = self.known.get_mut(&peer) {
            known.gone = Some((signed.clone(), now_ms));
        }
        self.live.remove(&peer);
        if self.links.remove(&peer).is_some() {
            out.push(Action::Close(peer));
        }
        self.tell_on(&signed, None, out);
        out.push(Action::Went(peer));
        self.reach(now_ms, out);
    }

    fn leave(&mut self, sign: Sign<'_>, out: &mut Vec<Action>) {
        if self.said.is_some() {
            let signed = self.sign(self.me, (self.life, self.seq), Said::Gone, sign);
            self.tell_on(&signed, None, out);
        }
        self.has_left = true;
    }

    // ---- time

    fn tick(&mut self, now_ms: u64, sign: Sign<'_>, out: &mut Vec<Action>) {
        self.speak(now_ms, sign, out);
        let watcher = ring::next(&self.live, &self.me).filter(|peer| self.links.contains_key(peer));
        if now_ms >= self.beat_ms {
            self.beat_ms = now_ms + BEAT_MS;
            out.extend(watcher.map(|watcher| Action::Send(watcher, Frame::Beat)));
        }
        if now_ms >= self.compare_ms {
            self.compare_ms = now_ms + COMPARE_MS;
            out.extend(watcher.map(|watcher| Action::Send(watcher, Frame::Sum(self.sum()))));
        }
        self.watch(now_ms, sign, out);
        if now_ms >= self.heal_ms {
            self.heal_ms = now_ms + HEAL_MS;
            self.heal(now_ms, out);
        }
        if now_ms >= self.reach_ms {
            self.reach(now_ms, out);
        }
    }

    /// One of those that are gone may be back, or may never have been away from where it is.
    fn heal(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        let gone = self.known.iter().filter(|(_, known)| known.gone.is_some());
        let gone: Vec<Peer> = gone.map(|(peer, _)| *peer).collect();
        if !gone.is_empty() {
            let at = (self.random() % gone.len() as u64) as usize;
            self.dial(gone[at], now_ms, out);
        }
    }
}

/// The order of what a device says.
const fn order(statement: &Statement) -> (u64, u64) {
    (statement.life, statement.seq)
}

/// SplitMix64's finalizer (Steele, Lea, Flood 2014).
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

//! Whole sites in made-up time: one uplink for all, late ones, liars, and some that vanish.

use alloc::{collections::BTreeMap, vec, vec::Vec};
use std::println;

use super::*;
use crate::testing::{Dice, histories};

const STEP_MS: u64 = 50;
/// Between two looks at a neighbour.
const LOOK_MS: u64 = 400;
/// A device says that it fetches, and all have heard it after this at the latest.
const HEARD_MS: u64 = 500;
/// A piece from a neighbour.
const LAN_MS: u64 = 60;
/// One that is never answered is given up after this.
const PATIENCE_OF_ASKS_MS: u64 = 15_000;
/// Two hours are for ever.
const END_MS: u64 = 2 * 60 * 60_000;

fn digest(n: u64) -> Digest {
    let mut dice = Dice(n);
    let mut bytes = [0; 32];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&dice.next().to_be_bytes());
    }
    Digest(bytes)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Honest,
    /// Says that it has everything, and never answers.
    Mute,
    /// Says that it has everything, and serves rubbish.
    Forger,
    /// Says that it has everything, and is always busy.
    Busy,
    /// Says that it fetches, and never does.
    Idler,
    /// Says that it has one more piece each time it is looked at.
    Boaster,
}

struct Device {
    kind: Kind,
    starts_ms: u64,
    vanishes_ms: u64,
    uplink: bool,
    here: Vec<bool>,
    plan: Option<Plan>,
    standing: Standing,
    /// Of neighbours: who serves what, and when it has come.
    coming: Vec<(u64, usize, usize)>,
    /// Of the coordinator: which piece, and how much of it is missing.
    carried: Option<(usize, f64)>,
    looked: BTreeMap<usize, u64>,
    boasts: usize,
    done_ms: Option<u64>,
    hopeless: bool,
}

struct Site {
    now: u64,
    pieces: Vec<Digest>,
    devices: Vec<Device>,
    /// Pieces that the uplink carries in a second, for all together.
    rate: f64,
    /// How often each piece has come over it.
    copies: Vec<u32>,
}

impl Site {
    fn new(pieces: usize, rate: f64) -> Self {
        Self {
            now: 0,
            pieces: (0..pieces as u64).map(|n| digest(1_000 + n)).collect(),
            devices: Vec::new(),
            rate,
            copies: vec![0; pieces],
        }
    }

    fn add(&mut self, kind: Kind, starts_ms: u64, uplink: bool) -> &mut Device {
        let has = matches!(kind, Kind::Mute | Kind::Forger | Kind::Busy);
        self.devices.push(Device {
            kind,
            starts_ms,
            vanishes_ms: u64::MAX,
            uplink,
            here: vec![has; self.pieces.len()],
            plan: None,
            standing: Standing::default(),
            coming: Vec::new(),
            carried: None,
            looked: BTreeMap::new(),
            boasts: 0,
            done_ms: None,
            hopeless: false,
        });
        self.devices.last_mut().unwrap()
    }

    fn peer(n: usize) -> Peer {
        digest(n as u64 + 1)
    }

    fn is_there(&self, n: usize) -> bool {
        self.devices[n].vanishes_ms > self.now
    }

    /// What a device says of itself.
    fn offer(&mut self, n: usize) -> Offer {
        let now = self.now;
        let device = &mut self.devices[n];
        let fetches = match device.kind {
            Kind::Honest => device.plan.is_some() && device.done_ms.is_none() && !device.hopeless,
            _ => now >= device.starts_ms,
        };
        let mut has = device.here.clone();
        if device.kind == Kind::Boaster {
            device.boasts += 1;
            let boasts = device.boasts / 8;
            has.iter_mut().take(boasts).for_each(|has| *has = true);
        }
        let line = device.plan.as_ref().is_none_or(|plan| plan.has_line(now));
        Offer {
            has,
            fetches,
            uplink: device.uplink && line,
        }
    }

    fn step(&mut self) {
        for n in 0..self.devices.len() {
            if self.devices[n].kind == Kind::Honest && self.is_there(n) {
                self.live(n);
            }
        }
        // The uplink is shared evenly.
        let carrying = self.devices.iter().filter(|d| d.carried.is_some()).count();
        let share = self.rate * STEP_MS as f64 / 1_000.0 / carrying.max(1) as f64;
        for n in 0..self.devices.len() {
            if !self.is_there(n) {
                self.devices[n].carried = None;
                continue;
            }
            let now = self.now;
            let device = &mut self.devices[n];
            let Some((piece, left)) = &mut device.carried else {
                continue;
            };
            *left -= share;
            let piece = *piece;
            if !device.uplink {
                device.carried = None;
                let plan = device.plan.as_mut().unwrap();
                plan.failed(piece, Source::Coordinator, Fault::Silent, now);
            } else if *left <= 0.0 {
                device.carried = None;
                device.here[piece] = true;
                device
                    .plan
                    .as_mut()
                    .unwrap()
                    .got(piece, Source::Coordinator, now);
                self.copies[piece] += 1;
            }
        }
        self.now += STEP_MS;
    }

    fn live(&mut self, n: usize) {
        let now = self.now;
        let device = &self.devices[n];
        if now < device.starts_ms || device.done_ms.is_some() || device.hopeless {
            return;
        }
        if device.plan.is_none() {
            let alone = self.devices.len() == 1;
            let settled = if alone { now } else { now + SETTLE_MS };
            let pieces = self.pieces.iter().copied();
            let plan = Plan::new(
                Self::peer(n),
                digest(0),
                pieces,
                (settled, PATIENCE_MS),
                now,
            );
            self.devices[n].plan = Some(plan);
        }
        let mut plan = self.devices[n].plan.take().unwrap();
        self.look(n, &mut plan);
        self.receive(n, &mut plan);
        let mut per_peer = BTreeMap::<usize, usize>::new();
        for ask in plan.asks(now) {
            let is_new = !self.devices[n].here[ask.piece];
            assert!(is_new, "it asks for what it has");
            match ask.of {
                Source::Coordinator => {
                    assert!(self.devices[n].carried.is_none(), "one at a time");
                    self.devices[n].carried = Some((ask.piece, 1.0));
                }
                Source::Neighbour(peer) => {
                    let of = (0..self.devices.len()).find(|m| Self::peer(*m) == peer);
                    let of = of.unwrap();
                    let at = match self.devices[of].kind {
                        Kind::Mute => now + PATIENCE_OF_ASKS_MS,
                        _ => now + LAN_MS,
                    };
                    self.devices[n].coming.push((at, of, ask.piece));
                }
            }
        }
        let coming = &self.devices[n].coming;
        for (_, of, _) in coming {
            *per_peer.entry(*of).or_default() += 1;
        }
        assert!(coming.len() <= AT_ONCE && per_peer.values().all(|n| *n <= PER_NEIGHBOUR));
        let device = &mut self.devices[n];
        if plan.is_done() {
            assert!(device.here.iter().all(|here| *here));
            device.done_ms = Some(now);
        } else if plan.is_hopeless(now) {
            device.hopeless = true;
        }
        device.plan = Some(plan);
    }

    fn look(&mut self, n: usize, plan: &mut Plan) {
        let now = self.now;
        for m in (0..self.devices.len()).filter(|m| *m != n) {
            let peer = Self::peer(m);
            if !self.is_there(m) || !self.devices[n].standing.is_good(&peer, now) {
                plan.gone(&peer);
                continue;
            }
            // Whoever neither has it nor fetches it is not looked at.
            let known =
                self.devices[m].kind != Kind::Honest || now >= self.devices[m].starts_ms + HEARD_MS;
            let last = self.devices[n].looked.get(&m).copied();
            if known && last.is_none_or(|last| now >= last + LOOK_MS) {
                self.devices[n].looked.insert(m, now);
                let offer = self.offer(m);
                plan.offer(peer, offer, now);
            }
        }
    }

    fn receive(&mut self, n: usize, plan: &mut Plan) {
        let now = self.now;
        let all = core::mem::take(&mut self.devices[n].coming);
        let (due, later): (Vec<_>, Vec<_>) = all.into_iter().partition(|(at, ..)| *at <= now);
        self.devices[n].coming = later;
        for (_, of, piece) in due {
            let peer = Self::peer(of);
            let source = Source::Neighbour(peer);
            let fault = match self.devices[of].kind {
                _ if !self.is_there(of) => Fault::Busy,
                Kind::Honest if self.devices[of].here[piece] => {
                    self.devices[n].here[piece] = true;
                    plan.got(piece, source, now);
                    continue;
                }
                Kind::Honest | Kind::Boaster | Kind::Idler => Fault::Missing,
                Kind::Mute => Fault::Silent,
                Kind::Busy => Fault::Busy,
                Kind::Forger => {
                    self.devices[n].standing.bad(peer, now);
                    Fault::Bad
                }
            };
            plan.failed(piece, source, fault, now);
        }
    }

    fn is_over(&self) -> bool {
        (0..self.devices.len()).all(|n| {
            let device = &self.devices[n];
            let ended = device.done_ms.is_some() || device.hopeless || !self.is_there(n);
            device.kind != Kind::Honest || ended
        })
    }

    /// Until every honest device is at its end.
    fn run(&mut self) {
        while !self.is_over() {
            assert!(self.now < END_MS, "it does not end");
            self.step();
        }
    }

    fn all_have_everything(&self) -> bool {
        let devices = self.devices.iter().filter(|d| d.kind == Kind::Honest);
        let mut there = devices.filter(|d| d.vanishes_ms == u64::MAX);
        there.all(|d| d.done_ms.is_some())
    }

    /// What went over the uplink, in copies.
    fn copies(&self) -> f64 {
        f64::from(self.copies.iter().sum::<u32>()) / self.pieces.len() as f64
    }

    fn last_ms(&self) -> u64 {
        self.devices.iter().filter_map(|d| d.done_ms).max().unwrap()
    }
}

#[test]
fn one_alone_asks_for_all_in_the_order_of_the_file() {
    let mut plan = Plan::new(digest(1), digest(0), (9..14).map(digest), (0, 1), 0);
    for n in 0..5 {
        let of = Source::Coordinator;
        assert_eq!(
            plan.asks(n),
            [Ask {
                piece: n as usize,
                of
            }]
        );
        assert_eq!(plan.asks(n), []);
        plan.got(n as usize, of, n);
    }
    assert!(plan.is_done() && plan.asks(9).is_empty());
}

#[test]
fn one_alone_gives_up_at_the_first_failure_and_one_that_can_hope_does_not() {
    let plan = || Plan::new(digest(1), digest(0), (9..14).map(digest), (0, 1), 0);
    let mut alone = plan();
    alone.asks(0);
    assert!(!alone.is_hopeless(1));
    alone.failed(0, Source::Coordinator, Fault::Silent, 2);
    assert!(alone.is_hopeless(2) && !alone.has_line(3) && alone.has_line(2 + LINE_MS));
    let mut with = plan();
    with.asks(0);
    with.failed(0, Source::Coordinator, Fault::Silent, 2);
    let offer = Offer {
        has: vec![false, false, true],
        ..Offer::default()
    };
    with.offer(digest(2), offer, 3);
    assert!(!with.is_hopeless(3) && with.is_hopeless(STALL_MS));
    let [ask] = with.asks(3)[..] else { panic!() };
    assert_eq!((ask.piece, ask.of), (2, Source::Neighbour(digest(2))));
}

#[test]
fn twenty_at_once_take_one_copy_and_hardly_longer_than_one() {
    for seed in 0..histories(20) {
        let mut dice = Dice(seed);
        let mut site = Site::new(52, 5.0);
        for _ in 0..20 {
            site.add(Kind::Honest, dice.below(1_000), true);
        }
        site.run();
        assert!(site.all_have_everything(), "seed {seed}");
        let (copies, alone_ms) = (site.copies(), 52_000.0 / 5.0);
        let times = site.last_ms() as f64 / alone_ms;
        if seed == 0 {
            println!("{copies:.2} copies over the uplink, {times:.2} times what one alone takes");
        }
        assert!(copies <= 1.1, "seed {seed}: {copies} copies");
        assert!(times <= 1.5, "seed {seed}: {times} times as long");
    }
}

/// They hear of the release one after the other: those that begin alone do not bring what is another's a moment later.
#[test]
fn twenty_that_are_told_late_take_one_copy_all_the_same() {
    let mut worst = 0.0_f64;
    for seed in 0..histories(20) {
        let mut dice = Dice(seed);
        let mut site = Site::new(52, 5.0);
        for _ in 0..20 {
            site.add(Kind::Honest, dice.below(8_000), true);
        }
        site.run();
        assert!(site.all_have_everything(), "seed {seed}");
        worst = worst.max(site.copies());
        assert!(
            site.copies() <= 1.1,
            "seed {seed}: {} copies",
            site.copies()
        );
    }
    println!("at worst {worst:.2} copies over the uplink");
}

#[test]
fn nobody_with_an_uplink_is_needed_where_somebody_has_it() {
    for seed in 0..histories(10) {
        let mut dice = Dice(seed);
        let mut site = Site::new(40, 5.0);
        let holder = site.add(Kind::Honest, 0, false);
        holder.here.fill(true);
        holder.done_ms = Some(0);
        for _ in 0..dice.below(10) + 1 {
            site.add(Kind::Honest, dice.below(5_000), false);
        }
        site.run();
        assert!(site.all_have_everything(), "seed {seed}");
        assert_eq!(site.copies(), 0.0);
    }
}

#[test]
fn devices_without_an_uplink_get_it_through_one_that_has_one() {
    for seed in 0..histories(10) {
        let mut dice = Dice(seed);
        let mut site = Site::new(40, 5.0);
        for n in 0..8 {
            site.add(Kind::Honest, dice.below(1_000), n == 0);
        }
        site.run();
        assert!(site.all_have_everything(), "seed {seed}");
        assert_eq!(site.copies(), 1.0, "seed {seed}");
    }
}

#[test]
fn nobody_can_get_it_and_all_end_soon() {
    let mut site = Site::new(40, 5.0);
    for n in 0..5 {
        site.add(Kind::Honest, n * 300, false);
    }
    site.run();
    assert!(site.devices.iter().all(|d| d.hopeless));
    assert!(site.now < 60_000, "{}", site.now);
}

#[test]
fn whatever_others_say_or_stop_saying_everybody_comes_to_an_end() {
    const KINDS: [Kind; 5] = [
        Kind::Mute,
        Kind::Forger,
        Kind::Busy,
        Kind::Idler,
        Kind::Boaster,
    ];
    let (mut worst, mut longest) = (0.0_f64, 0.0_f64);
    for seed in 0..histories(60) {
        let mut dice = Dice(seed);
        let pieces = dice.below(60) as usize + 1;
        let mut site = Site::new(pieces, 5.0);
        let honest = dice.below(10) + 1;
        for _ in 0..honest {
            let starts = dice.below(3_000);
            let vanishes = dice.chance(0.2).then(|| dice.below(12_000));
            let uplink = dice.chance(0.8);
            site.add(Kind::Honest, starts, uplink).vanishes_ms = vanishes.unwrap_or(u64::MAX);
        }
        let liars = dice.below(7);
        for _ in 0..liars {
            let kind = KINDS[dice.below(5) as usize];
            site.add(kind, dice.below(3_000), dice.chance(0.7));
        }
        site.run();
        let all = site.devices.iter().filter(|d| d.kind == Kind::Honest);
        let mut stay = all.filter(|d| d.vanishes_ms == u64::MAX);
        // Whoever has an uplink gets it, and all others through it.
        if stay.any(|d| d.uplink) {
            assert!(site.all_have_everything(), "seed {seed}");
        }
        worst = worst.max(site.copies());
        longest = longest.max(site.now as f64 / 1_000.0);
    }
    println!("at worst {worst:.2} copies, {longest:.0} s");
}

#[test]
fn three_times_is_enough() {
    let mut standing = Standing::default();
    let (bad, good) = (digest(1), digest(2));
    assert!(standing.is_good(&bad, 0));
    assert!(!standing.bad(bad, 0));
    assert!(!standing.is_good(&bad, 59_999) && standing.is_good(&bad, 60_000));
    assert!(!standing.bad(bad, 60_000));
    assert!(!standing.is_good(&bad, 659_999) && standing.is_good(&bad, 660_000));
    assert!(standing.bad(bad, 660_000));
    assert!(!standing.is_good(&bad, u64::MAX) && standing.is_good(&good, 0));
    assert_eq!(standing.banned(), 1);
    assert!(!standing.bad(bad, 660_000), "it is told once");
}

#[test]
fn everybody_comes_to_the_same_first_ones() {
    let all: Vec<Peer> = (1..50).map(digest).collect();
    let one = first(&digest(0), all.iter().copied(), 8);
    let other = first(&digest(0), all.iter().rev().copied(), 8);
    assert_eq!((one.len(), &one), (8, &other));
    assert_ne!(one, first(&digest(77), all.iter().copied(), 8));
}

//! A whole site in made-up time: links, latency, deaths, partitions, liars.

use alloc::{
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    vec,
    vec::Vec,
};
use core::cmp::Reverse;
use std::println;

use super::{watching::GONE_MS, *};
use crate::{
    Digest,
    testing::{Dice, histories},
};

const TICK_MS: u64 = 250;

fn peer(n: usize) -> Peer {
    let mut dice = Dice(n as u64 + 1);
    let mut bytes = [0; 32];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&dice.next().to_be_bytes());
    }
    Digest(bytes)
}

fn envelope(statement: &Statement) -> Vec<u8> {
    serde_json::to_vec(statement).unwrap()
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Tick(usize, u32),
    Arrives(usize, usize, u64),
    Dialled(usize, usize),
}

#[derive(Default)]
struct Count {
    beats: u64,
    frames: u64,
}

/// A site.
struct Site {
    now: u64,
    dice: Dice,
    peers: BTreeMap<Peer, usize>,
    nodes: Vec<Option<Neighbours>>,
    /// Which life a node is in: ticks of earlier ones are nobody's.
    lives: Vec<u32>,
    links: BTreeSet<(usize, usize)>,
    queue: BinaryHeap<Reverse<(u64, u64, Event)>>,
    frames: BTreeMap<u64, Frame>,
    number: u64,
    sent: Vec<Count>,
    /// Nodes on different sides cannot reach each other.
    side: Vec<u8>,
    dropped: f32,
}

impl Site {
    fn new(n: usize, seed: u64) -> Self {
        Self {
            now: 0,
            dice: Dice(seed),
            peers: (0..n).map(|i| (peer(i), i)).collect(),
            nodes: (0..n).map(|_| None).collect(),
            lives: vec![0; n],
            links: BTreeSet::new(),
            queue: BinaryHeap::new(),
            frames: BTreeMap::new(),
            number: 0,
            sent: (0..n).map(|_| Count::default()).collect(),
            side: vec![0; n],
            dropped: 0.0,
        }
    }

    fn members(&self) -> BTreeSet<Peer> {
        self.peers.keys().copied().collect()
    }

    fn start(&mut self, i: usize, finds: &[usize]) {
        self.lives[i] += 1;
        let life = u64::from(self.lives[i]);
        self.nodes[i] = Some(Neighbours::new(peer(i), life, self.dice.next()));
        let members = self.members();
        self.give(i, Input::Members(members));
        self.give(i, Input::Own(Presence::default()));
        for found in finds {
            self.give(i, Input::Found(peer(*found)));
        }
        let first = self.dice.below(TICK_MS);
        self.later(first, Event::Tick(i, self.lives[i]));
    }

    /// All of them, each finding some others.
    fn start_all(&mut self) {
        let n = self.nodes.len();
        for i in 0..n {
            let finds: Vec<usize> = (0..n).filter(|j| *j != i).collect();
            self.start(i, &finds);
        }
    }

    fn later(&mut self, ms: u64, event: Event) {
        self.number += 1;
        self.queue
            .push(Reverse((self.now + ms, self.number, event)));
    }

    fn pair(a: usize, b: usize) -> (usize, usize) {
        (a.min(b), a.max(b))
    }

    fn give(&mut self, i: usize, input: Input) {
        let Some(node) = &mut self.nodes[i] else {
            return;
        };
        let actions = node.step(input, self.now, &mut |s| envelope(s));
        for action in actions {
            self.act(i, action);
        }
    }

    fn act(&mut self, i: usize, action: Action) {
        match action {
            Action::Send(to, frame) => self.send(i, self.peers[&to], frame),
            Action::Dial(to) => {
                let wait = 2 + self.dice.below(10);
                self.later(wait, Event::Dialled(i, self.peers[&to]));
            }
            Action::Close(to) => self.unlink(i, self.peers[&to]),
            Action::Came(_) | Action::Went(_) => {}
        }
    }

    fn send(&mut self, i: usize, to: usize, frame: Frame) {
        if !self.links.contains(&Self::pair(i, to)) {
            return;
        }
        self.sent[i].frames += 1;
        self.sent[i].beats += u64::from(matches!(frame, Frame::Beat | Frame::Probe));
        if self.side[i] != self.side[to] || self.dice.chance(self.dropped) {
            return;
        }
        let wait = 1 + self.dice.below(4);
        self.number += 1;
        self.frames.insert(self.number, frame);
        let number = self.number;
        self.later(wait, Event::Arrives(i, to, number));
    }

    fn unlink(&mut self, a: usize, b: usize) {
        if self.links.remove(&Self::pair(a, b)) {
            self.give(a, Input::Down(peer(b)));
            self.give(b, Input::Down(peer(a)));
        }
    }

    /// Ends a node: `quietly` if its power goes, else the others see its links break.
    fn kill(&mut self, i: usize, quietly: bool) {
        self.nodes[i] = None;
        let links: Vec<_> = self
            .links
            .iter()
            .filter(|(a, b)| *a == i || *b == i)
            .copied()
            .collect();
        for (a, b) in links {
            self.links.remove(&(a, b));
            let other = if a == i { b } else { a };
            if !quietly {
                self.give(other, Input::Down(peer(i)));
            }
        }
    }

    fn run(&mut self, ms: u64) {
        let end = self.now + ms;
        while let Some(Reverse((at, _, _))) = self.queue.peek() {
            if *at > end {
                break;
            }
            let Some(Reverse((at, _, event))) = self.queue.pop() else {
                break;
            };
            self.now = at;
            match event {
                Event::Tick(i, life) => {
                    if self.lives[i] == life && self.nodes[i].is_some() {
                        self.give(i, Input::Tick);
                        self.later(TICK_MS, Event::Tick(i, life));
                    }
                }
                Event::Arrives(from, to, number) => {
                    let frame = self.frames.remove(&number);
                    if let Some(frame) =
                        frame.filter(|_| self.links.contains(&Self::pair(from, to)))
                    {
                        self.give(to, Input::Frame(peer(from), frame));
                    }
                }
                // Whoever dialled has died since.
                Event::Dialled(from, _) if self.nodes[from].is_none() => {}
                Event::Dialled(from, to) => {
                    let is_open = self.nodes[to].is_some() && self.side[from] == self.side[to];
                    if !is_open {
                        self.give(from, Input::Unreachable(peer(to)));
                    } else if self.links.insert(Self::pair(from, to)) {
                        self.give(from, Input::Up(peer(to)));
                        self.give(to, Input::Up(peer(from)));
                    }
                }
            }
        }
        self.now = end;
    }

    /// Does everybody see exactly those who live (on the same side)?
    fn is_true(&self) -> bool {
        (0..self.nodes.len()).all(|i| self.sees_truth(i))
    }

    fn sees_truth(&self, i: usize) -> bool {
        let Some(node) = &self.nodes[i] else {
            return true;
        };
        (0..self.nodes.len()).filter(|j| *j != i).all(|j| {
            let is_here = self.nodes[j].is_some() && self.side[i] == self.side[j];
            node.live.contains(&peer(j)) == is_here
        })
    }

    /// For somebody who wonders.
    fn told(&self) -> std::string::String {
        let mut text = std::format!("at {} links {:?}\n", self.now, self.links);
        for (i, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            let name = |peer: &Peer| self.peers[peer];
            let here: Vec<_> = node.live.iter().map(name).collect();
            let links: Vec<_> = node.links.keys().map(name).collect();
            let gone = node.known.values().filter(|k| k.gone.is_some());
            let gone: Vec<_> = gone
                .map(|k| (name(&k.here.statement.about), order(&k.here.statement)))
                .collect();
            let own = (node.life, node.seq);
            text += &std::format!(
                "{i} {own:?} sees {here:?} gone {gone:?} linked {links:?} dials {:?}\n",
                node.dials
                    .iter()
                    .map(|(p, d)| (name(p), d.since_ms, d.not_before_ms))
                    .collect::<Vec<_>>()
            );
        }
        text
    }

    fn until_true(&mut self, most_ms: u64) -> Option<u64> {
        let start = self.now;
        while self.now < start + most_ms {
            if self.is_true() {
                return Some(self.now - start);
            }
            self.run(20);
        }
        self.is_true().then_some(self.now - start)
    }
}

#[test]
fn twenty_join_within_two_seconds_however_they_find_each_other() {
    for seed in 0..20 {
        let mut site = Site::new(20, seed);
        site.start_all();
        let took = site.until_true(2_000);
        assert!(took.is_some(), "seed {seed}");
        // One that only knows one.
        let mut chain = Site::new(20, seed);
        chain.start(0, &[]);
        for i in 1..20 {
            chain.start(i, &[i - 1]);
        }
        let took = chain.until_true(5_000);
        assert!(took.is_some(), "seed {seed}");
    }
}

#[test]
fn who_loses_power_is_gone_within_five_seconds_and_back_at_once() {
    for seed in 0..30 {
        let mut site = Site::new(20, seed);
        site.start_all();
        site.run(30_000);
        assert!(site.is_true(), "seed {seed}");
        let one = site.dice.below(20) as usize;
        site.kill(one, true);
        let gone = site.until_true(5_000);
        assert!(gone.is_some(), "seed {seed}: not gone");
        assert!(
            gone >= Some(GONE_MS - BEAT_MS - 2 * TICK_MS),
            "seed {seed}: not without a beat missed"
        );
        site.run(60_000);
        let other = (one + 1) % 20;
        site.start(one, &[other]);
        let back = site.until_true(1_000);
        assert!(back.is_some(), "seed {seed}: not back");
    }
}

/// Each of them was watched by the next, which has gone with it. Those that live between them are never thought to be gone.
#[test]
fn those_that_stand_side_by_side_and_go_together_are_gone_together() {
    for seed in 0..30 {
        let mut site = Site::new(20, seed);
        site.start_all();
        site.run(30_000);
        assert!(site.is_true(), "seed {seed}");
        let ring: Vec<usize> = site.peers.values().copied().collect();
        let first = site.dice.below(20) as usize;
        // Five in a row, or all but every third of seven.
        let places: &[usize] = match seed % 2 {
            0 => &[0, 1, 2, 3, 4],
            _ => &[0, 1, 3, 4, 6],
        };
        for place in places {
            site.kill(ring[(first + place) % 20], true);
        }
        let died = site.now;
        while !site.is_true() {
            assert!(site.now < died + 6_000, "seed {seed}: {}", site.told());
            site.run(20);
            let living = (0..20).filter(|i| site.nodes[*i].is_some());
            let living: BTreeSet<Peer> = living.map(peer).collect();
            let mut nodes = site.nodes.iter().flatten();
            let sees_them = |node: &Neighbours| living.is_subset(&node.live);
            assert!(nodes.all(sees_them), "seed {seed}");
        }
        let until = site.now + 30_000;
        while site.now < until {
            site.run(100);
            assert!(site.is_true(), "seed {seed}: not for long");
        }
    }
}

#[test]
fn a_program_that_ends_is_gone_at_once() {
    for seed in 0..30 {
        let mut site = Site::new(20, seed);
        site.start_all();
        site.run(30_000);
        let one = site.dice.below(20) as usize;
        if seed % 2 == 0 {
            site.kill(one, false);
        } else {
            site.give(one, Input::Leave);
            site.run(20);
            site.kill(one, true);
        }
        let gone = site.until_true(500);
        assert!(gone.is_some(), "seed {seed}");
    }
}

#[test]
fn in_rest_everybody_sends_one_beat_however_large_the_site() {
    for n in [10, 50, 200] {
        let mut site = Site::new(n, 1);
        site.start_all();
        site.run(120_000);
        assert!(site.is_true(), "{n}");
        for count in &mut site.sent {
            *count = Count::default();
        }
        site.run(600_000);
        let most = site.sent.iter().map(|c| c.frames).max().unwrap();
        let links = site.links.len() * 2 / n;
        println!("{n} devices: at most {most} frames in ten minutes, {links} links each");
        // 250 beats, ten sums; a view that differs is told once.
        assert!(most <= 270, "{n}: {most}");
        assert!(site.is_true());
    }
}

#[test]
fn numbers_wait_longer_than_what_a_device_has_and_reaches() {
    let mut one = Neighbours::new(peer(0), 1, 7);
    let mut tells = |input: Input, now_ms| {
        let actions = one.step(input, now_ms, &mut |statement| envelope(statement));
        let is_tell = |action: &&Action| matches!(action, Action::Send(_, Frame::Tell(_)));
        actions.iter().filter(is_tell).count()
    };
    let own = |load, uplink| {
        Input::Own(Presence {
            load,
            uplink,
            ..Presence::default()
        })
    };
    tells(Input::Members(BTreeSet::from([peer(0), peer(1)])), 0);
    tells(own(0, false), 0);
    tells(Input::Up(peer(1)), 0);
    assert_eq!(tells(own(90, false), SAY_MS), 0);
    assert_eq!(tells(Input::Tick, SAY_NUMBERS_MS - 1), 0);
    assert_eq!(tells(Input::Tick, SAY_NUMBERS_MS), 1);
    assert_eq!(tells(own(90, true), SAY_NUMBERS_MS + SAY_MS - 1), 0);
    assert_eq!(tells(Input::Tick, SAY_NUMBERS_MS + SAY_MS), 1);
}

#[test]
fn two_halves_see_each_other_gone_and_come_together_again() {
    for seed in 0..10 {
        let mut site = Site::new(16, seed);
        site.start_all();
        site.run(30_000);
        for i in 0..16 {
            site.side[i] = u8::from(i % 2 == 0);
        }
        // Many go at once: each watcher finds the next of them.
        assert!(site.until_true(60_000).is_some(), "seed {seed}: not apart");
        site.run(60_000);
        site.side = vec![0; 16];
        assert!(
            site.until_true(30_000).is_some(),
            "seed {seed}: not together"
        );
    }
}

#[test]
fn who_is_off_the_roster_is_neither_seen_nor_heard() {
    let mut site = Site::new(8, 3);
    site.start_all();
    site.run(10_000);
    let mut members = site.members();
    members.remove(&peer(5));
    for i in 0..8 {
        if i != 5 {
            site.give(i, Input::Members(members.clone()));
        }
    }
    assert!(site.links.iter().all(|(a, b)| *a != 5 && *b != 5));
    site.run(60_000);
    for i in (0..8).filter(|i| *i != 5) {
        let node = site.nodes[i].as_ref().unwrap();
        assert!(!node.live.contains(&peer(5)));
        assert_eq!(node.count(), 6);
    }
    assert!(site.links.iter().all(|(a, b)| *a != 5 && *b != 5));
}

#[test]
fn a_life_whose_clock_went_back_counts_all_the_same() {
    let mut site = Site::new(6, 4);
    site.lives[2] = 1_000;
    site.start_all();
    site.run(10_000);
    site.kill(2, false);
    site.run(10_000);
    site.lives[2] = 5;
    site.start(2, &[0]);
    assert!(site.until_true(1_000).is_some());
    site.run(10_000);
    assert!(site.is_true());
}

fn statement(about: usize, order: (u64, u64), said: Said) -> Statement {
    Statement {
        about: peer(about),
        life: order.0,
        seq: order.1,
        said,
    }
}

fn signed(by: usize, statement: Statement) -> Frame {
    Frame::Tell(Signed {
        envelope: envelope(&statement),
        by: peer(by),
        statement,
    })
}

/// A third of the members tell whatever they can sign: that others are gone, their own news without end, old statements
/// of others, and statements of those who are not on the roster.
#[test]
fn a_hostile_third_does_not_hide_the_honest() {
    let mut seen = (0_u64, 0_u64);
    for seed in 0..10 {
        let mut site = Site::new(30, seed);
        site.start_all();
        site.run(20_000);
        let hostile: Vec<usize> = (0..9).collect();
        let honest: Vec<usize> = (9..30).collect();
        let old: Vec<Frame> = site
            .nodes
            .iter()
            .flatten()
            .flat_map(|node| node.said.iter().map(|(s, _)| Frame::Tell(s.clone())))
            .collect();
        let (mut told, mut most_frames) = (0_u64, 0);
        for round in 0..400_u64 {
            for h in &hostile {
                let links: Vec<usize> = site
                    .links
                    .iter()
                    .filter(|(a, b)| a == h || b == h)
                    .map(|(a, b)| if a == h { *b } else { *a })
                    .collect();
                for to in links {
                    let about = honest[site.dice.below(21) as usize];
                    let known = site.nodes[about].as_ref().map(|n| (n.life, n.seq)).unwrap();
                    let frame = match site.dice.below(6) {
                        0 => signed(*h, statement(about, known, Said::Gone)),
                        1 => signed(*h, statement(about, (u64::MAX, u64::MAX), Said::Gone)),
                        2 => signed(
                            *h,
                            statement(*h, (9, told), Said::Here(Presence::default())),
                        ),
                        3 => signed(99, statement(99, (1, 1), Said::Here(Presence::default()))),
                        4 => old[site.dice.below(old.len() as u64) as usize].clone(),
                        _ => Frame::Sum(round),
                    };
                    told += 1;
                    site.send(*h, to, frame);
                }
            }
            site.run(50);
            if round % 20 == 10 {
                let one = honest[site.dice.below(21) as usize];
                site.run(SAY_MS);
                site.give(
                    one,
                    Input::Own(Presence {
                        // Always news.
                        holds: vec![peer(round as usize)],
                        ..Presence::default()
                    }),
                );
                let wanted = site.nodes[one].as_ref().unwrap().own.clone().unwrap();
                site.run(10_000);
                for i in honest.iter().filter(|i| **i != one) {
                    let view = site.nodes[*i].as_ref().unwrap();
                    seen.1 += 1;
                    seen.0 += u64::from(view.presence(&peer(one)) == Some(&wanted));
                }
                most_frames = most_frames.max(site.frames.len());
            }
        }
        for i in &honest {
            let node = site.nodes[*i].as_ref().unwrap();
            assert!(node.known.len() <= 29, "nobody invents devices");
        }
        assert!(
            most_frames < 20_000,
            "seed {seed}: {most_frames} on their way"
        );
    }
    let share = seen.0 as f64 / seen.1 as f64;
    println!("{} of {} arrived: {share:.4}", seen.0, seen.1);
    assert!(share >= 0.99, "{share}");
}

/// Whatever happened: once it is quiet, everybody knows who is there.
#[test]
fn any_history_ends_in_the_truth() {
    let histories = histories(40);
    for seed in 0..histories {
        let n = 3 + (seed % 14) as usize;
        let mut site = Site::new(n, seed);
        site.start_all();
        site.dropped = 0.05;
        for _ in 0..30 {
            let i = site.dice.below(n as u64) as usize;
            match site.dice.below(6) {
                0 => {
                    let quietly = site.dice.chance(0.5);
                    site.kill(i, quietly);
                }
                1 if site.nodes[i].is_none() => {
                    let other = site.dice.below(n as u64) as usize;
                    site.start(i, &[other]);
                }
                2 => site.side[i] ^= 1,
                3 => {
                    let load = site.dice.below(100) as u8;
                    site.give(
                        i,
                        Input::Own(Presence {
                            load,
                            ..Presence::default()
                        }),
                    );
                }
                4 => {
                    let j = site.dice.below(n as u64) as usize;
                    site.unlink(i, j);
                }
                _ => {}
            }
            let wait = site.dice.below(4_000);
            site.run(wait);
        }
        site.dropped = 0.0;
        site.side = vec![0; n];
        for i in 0..n {
            let finds: Vec<usize> = (0..n).filter(|j| *j != i).collect();
            if site.nodes[i].is_none() {
                site.start(i, &finds);
            } else {
                // Multicast says it again from time to time: one may have found nobody but itself.
                for j in finds {
                    site.give(i, Input::Found(peer(j)));
                }
            }
        }
        // What was under way has its consequences first: three beats that were missed.
        site.run(10_000);
        let took = site.until_true(400_000);
        if took.is_none() {
            println!("{}", site.told());
        }
        assert!(took.is_some(), "seed {seed}: never the truth");
        let until = site.now + 70_000;
        while site.now < until {
            site.run(100);
            assert!(site.is_true(), "seed {seed}: not for long: {}", site.told());
        }
        // And they know the same of each other.
        let sums: BTreeSet<u64> = site.nodes.iter().flatten().map(Neighbours::sum).collect();
        assert_eq!(sums.len(), 1, "seed {seed}");
    }
}

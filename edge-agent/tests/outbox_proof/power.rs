//! The power goes at any moment, and with it what was not synced: no reading that was appended is lost.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use edge_agent::outbox::{GapRecord, Outbox};
use mesh_core::{GapReason, RangeSet};
use tempfile::TempDir;

use crate::{
    Dice, append,
    platter::{Fate, Platter},
    reading, scratch, small,
};

/// Large, so that segments fill and turn over all the time.
const LARGEST: u64 = 4_000;

/// What the outbox has promised so far.
#[derive(Clone, Default)]
struct Promised {
    /// Every `append` up to here has returned.
    appended: u64,
    /// Freed or about to be.
    freed: RangeSet,
}

struct Cut {
    image: TempDir,
    promised: Promised,
    story: String,
}

struct World {
    platter: Platter,
    promised: Promised,
    dice: Dice,
    syncs: u64,
    cuts: Vec<Cut>,
}

impl World {
    fn before_sync(&mut self, path: &Path) {
        self.syncs += 1;
        if self.dice.one_in(3) {
            let image = scratch();
            let fate =
                [Fate::Lost, Fate::Kept, Fate::Mixed, Fate::Mixed][self.dice.below(4) as usize];
            self.platter.cut(image.path(), fate, &mut self.dice);
            self.cuts.push(Cut {
                image,
                promised: self.promised.clone(),
                story: format!("{fate:?} before sync {} of {}", self.syncs, path.display()),
            });
        }
        self.platter.synced(path);
    }
}

/// Opens what is left and holds it against what was promised.
fn judge(cut: &Cut) -> u64 {
    let Cut {
        image,
        promised,
        story,
    } = cut;
    let opened =
        Outbox::open(small(image.path())).unwrap_or_else(|error| panic!("{story}: {error}"));
    assert!(opened.warnings.is_empty(), "{story}: {:?}", opened.warnings);
    let mut outbox = opened.outbox;
    let mut seen = promised.freed.clone();
    let full = |gap: &GapRecord| gap.reason == GapReason::Full;
    let mut from = 1;
    loop {
        let readings = outbox.read(from, u64::MAX, 1_000_000).unwrap();
        let Some((last, _)) = readings.last() else {
            break;
        };
        from = last + 1;
        for (seq, bytes) in readings {
            assert_eq!(bytes, reading(seq, LARGEST), "{story}");
            seen.insert(seq, seq);
        }
    }
    assert!(
        outbox.gaps().iter().all(full),
        "{story}: {:?}",
        outbox.gaps()
    );
    for gap in outbox.gaps() {
        seen.insert(gap.from, gap.to);
    }
    assert!(
        promised.appended == 0 || seen.covers(1, promised.appended),
        "{story}: {} were appended, found {seen:?}",
        promised.appended
    );
    // The cursor is that of the last group that is there, and no number is given out twice.
    let cursor = opened
        .cursor
        .map_or(0, |c| String::from_utf8(c).unwrap().parse().unwrap());
    assert!(
        cursor >= promised.appended,
        "{story}: {cursor} {}",
        promised.appended
    );
    assert_eq!(
        append(&mut outbox, 2, LARGEST).unwrap().from,
        cursor + 1,
        "{story}"
    );
    1
}

/// One life of an outbox in `dir`, until it has been cut `most` times.
fn live(dir: &Path, promised: Promised, dice: Dice, most: usize) -> World {
    let world = Arc::new(Mutex::new(World {
        platter: Platter::new(dir),
        promised,
        dice,
        syncs: 0,
        cuts: Vec::new(),
    }));
    let mut options = small(dir);
    let hook = world.clone();
    options.on_sync = Some(Arc::new(move |path| hook.lock().unwrap().before_sync(path)));
    let mut outbox = Outbox::open(options.clone()).unwrap().outbox;
    for _ in 0..300 {
        let roll = |n| world.lock().unwrap().dice.below(n);
        let count = 1 + roll(30) as usize;
        let done = append(&mut outbox, count, LARGEST).unwrap();
        world.lock().unwrap().promised.appended = done.to;
        if roll(12) == 0 {
            // All, or all but some; rarely anything for a while, so that the oldest is evicted.
            let upto = done.to - roll(2) * roll(done.to);
            world.lock().unwrap().promised.freed.insert(1, upto);
            let freed = world.lock().unwrap().promised.freed.clone();
            outbox.free(&freed).unwrap();
        }
        if roll(40) == 0 {
            drop(outbox);
            outbox = Outbox::open(options.clone()).unwrap().outbox;
        }
        if world.lock().unwrap().cuts.len() >= most {
            break;
        }
    }
    drop((outbox, options));
    Arc::into_inner(world).unwrap().into_inner().unwrap()
}

#[test]
fn a_power_cut_loses_no_reading() {
    let cuts: u64 = std::env::var("LACEWING_CUTS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(200);
    let mut dice = Dice::new("power");
    let (mut judged, mut lives) = (0, 0);
    let mut start: Option<Cut> = None;
    while judged < cuts {
        // A new outbox, or one that has already lost its power once.
        let (dir, promised) = match start.take() {
            Some(cut) => (cut.image, cut.promised),
            None => (scratch(), Promised::default()),
        };
        let life = Dice(dice.next() | 1);
        let mut world = live(dir.path(), promised, life, 25);
        lives += 1;
        for cut in &world.cuts {
            judged += judge(cut);
        }
        if lives % 3 != 0 && !world.cuts.is_empty() {
            let mut cut = world
                .cuts
                .swap_remove(dice.below(world.cuts.len() as u64) as usize);
            // Judging has appended two more; they are promised from here on.
            let opened = Outbox::open(small(cut.image.path())).unwrap();
            cut.promised.appended = opened.outbox.next_seq() - 1;
            start = Some(cut);
        }
    }
    println!("{judged} power cuts in {lives} lives, 0 readings lost");
}

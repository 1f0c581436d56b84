//! What applying a delta allocates, zstd included. Alone in its program, so that nothing else counts.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]
#![allow(unsafe_code, reason = "an allocator that counts")]

mod files;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use files::{onnx, raw, tuned, weights};
use models::{
    delta::{DeltaError, Wanted, apply, make},
    digest_of,
};
use std::io::Cursor;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does it all.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are the system's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What the module promises, with the literals of these models.
const BESIDES: usize = 1 << 20;

fn peak(old: &[u8], delta: &[u8], wanted: &Wanted) -> (Result<Vec<u8>, DeltaError>, usize) {
    let mut made = Vec::with_capacity(wanted.length as usize);
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let applied = apply(&mut Cursor::new(old), delta, wanted, &mut made);
    let peak = PEAK.load(Relaxed) - before;
    (applied.map(|()| made), peak)
}

#[test]
fn little_and_not_more_for_a_larger_model() {
    let layers: Vec<Vec<f32>> = (1..40).map(|n| weights(n, 400 * n as usize)).collect();
    let file = |layers: &[Vec<f32>]| {
        let tensor = |(at, layer): (usize, &Vec<f32>)| (format!("layer{at}"), 1, raw(layer));
        onnx(
            "",
            &layers.iter().enumerate().map(tensor).collect::<Vec<_>>(),
        )
    };
    let old = file(&layers);
    let mut head = layers.clone();
    head[20] = weights(99, 9000);
    let full: Vec<Vec<f32>> = layers.iter().map(|layer| tuned(layer, 7)).collect();
    for (name, new) in [("head", file(&head)), ("full", file(&full))] {
        let wanted = Wanted {
            length: new.len() as u64,
            sha256: digest_of(&new),
        };
        let delta = make(&old, &new).unwrap();
        let (made, peak) = self::peak(&old, &delta, &wanted);
        assert!(made.unwrap() == new);
        println!(
            "{name}: {} bytes, delta {}, peak {peak}",
            new.len(),
            delta.len()
        );
        assert!(peak <= BESIDES, "{name}: {peak}");

        // Lies cost a long list of spans and, where all is called literal, the file in two forms and the old one.
        let places = (72..100).chain((100..delta.len()).step_by(delta.len() / 60));
        for at in places {
            for byte in [0, 0x7f, 0xff] {
                let mut lie = delta.clone();
                lie[at] = byte;
                let (_, peak) = self::peak(&old, &lie, &wanted);
                assert!(
                    peak <= 3 * new.len() + BESIDES + (1 << 20),
                    "{name}, byte {at}: {peak}"
                );
            }
        }
    }
}

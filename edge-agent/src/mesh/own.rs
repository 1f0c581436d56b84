//! What the device has to say of itself.

use mesh_core::neighbours::Presence;
use tokio::sync::watch;

use crate::update::{Engines, Holding};

/// The kernel's own summary of how busy it was in the last minute.
const LOAD: &str = "/proc/loadavg";
const MEMORY: &str = "/proc/meminfo";
/// Of the processor, in thousandths of a degree.
const WARMTH: &str = "/sys/class/thermal/thermal_zone0/temp";

/// Where it is read from.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    pub(crate) engines: watch::Receiver<Engines>,
    /// Does the device reach its broker?
    pub(crate) uplink: watch::Receiver<bool>,
    /// Does it look at frames of neighbours?
    pub(crate) answers: bool,
    /// The models on its disk.
    pub(crate) holding: watch::Receiver<Holding>,
}

impl Own {
    /// As it is now; reachable at `addresses`.
    pub(super) fn look(&self, addresses: Vec<String>) -> Presence {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let engines = self.engines.borrow();
        let loaded = engines.active.iter().map(|engine| engine.id().to_owned());
        let holding = self.holding.borrow().clone();
        Presence {
            addresses,
            load: load(&read(LOAD), processors),
            warmth: warmth(&read(WARMTH)),
            free_mib: free_mib(&read(MEMORY)),
            loaded: loaded.collect(),
            holds: holding.holds,
            fetching: holding.fetching.into_iter().collect(),
            uplink: *self.uplink.borrow(),
            answers: self.answers,
            accelerators: Vec::new(),
        }
    }
}

/// Of the processor now, in °C; nothing where there is no thermometer.
pub(crate) fn warmth_now() -> Option<i8> {
    warmth(&std::fs::read_to_string(WARMTH).ok()?)
}

/// The load of the last minute in percent of all processors.
fn load(text: &str, processors: usize) -> u8 {
    let minute: f32 = text
        .split(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0.0);
    // Saturates: more than everything is everything.
    (minute * 100.0 / processors as f32).clamp(0.0, 100.0) as u8
}

fn warmth(text: &str) -> Option<i8> {
    let thousandths: i32 = text.trim().parse().ok()?;
    i8::try_from(thousandths / 1_000).ok()
}

/// What programs could still have, by the kernel's own estimate.
fn free_mib(text: &str) -> u32 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().split(' ').next()?.parse::<u32>().ok());
    kib.unwrap_or(0) / 1_024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says() {
        assert_eq!(load("1.50 0.8 0.2 1/99 1", 2), 75);
        assert_eq!(load("9.00 0 0", 2), 100);
        assert_eq!(load("", 2), 0);
        assert_eq!(warmth("54321\n"), Some(54));
        assert_eq!(warmth("hot"), None);
        let memory = "MemTotal:  16000000 kB\nMemAvailable:   204800 kB\n";
        assert_eq!(free_mib(memory), 200);
        assert_eq!(free_mib("x"), 0);
    }
}

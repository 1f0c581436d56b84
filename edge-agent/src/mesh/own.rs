//! What the device has to say of itself.

use std::path::{Path, PathBuf};

use mesh_core::{Name, neighbours::Presence};
use tokio::sync::watch;

use crate::{
    clock::WallClock,
    update::{Engines, Holding},
};

/// The kernel's own summary of how busy it was in the last minute.
const LOAD: &str = "/proc/loadavg";
const MEMORY: &str = "/proc/meminfo";
/// Of the processor, in thousandths of a degree.
const WARMTH: &str = "/sys/class/thermal/thermal_zone0/temp";

/// Where Linux shows devices.
pub(crate) const DEVICES: &str = "/dev";
/// What there may be to compute faster with: how a neighbour calls it, and with what its file's path there begins. Whether a
/// program makes use of it is another matter; it says what a device could be given to do.
const ACCELERATORS: [(&str, &str); 10] = [
    ("hailo", "hailo"),
    ("coral", "apex_"),
    ("cuda", "nvidia0"),
    ("jetson", "nvhost-gpu"),
    ("jetson", "nvhost-as-gpu"),
    ("rockchip-npu", "rknpu"),
    ("vivante-npu", "galcore"),
    ("ethos-npu", "ethosu"),
    ("npu", "accel/accel"),
    ("gpu", "dri/renderD"),
];

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
    /// What it has to compute faster with: looked at once, nobody plugs it in.
    pub(crate) accelerators: Vec<Name>,
    /// For people who wonder about the time.
    pub(crate) wall: WallClock,
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
            accelerators: self.accelerators.clone(),
        }
    }
}

/// What is shown below `devices`: each kind once.
pub(crate) fn accelerators(devices: &Path) -> Vec<Name> {
    let is_there = |beginning: &str| {
        let whole: PathBuf = devices.join(beginning);
        let (folder, start) = (whole.parent(), whole.file_name().and_then(|n| n.to_str()));
        let entries = folder.and_then(|folder| std::fs::read_dir(folder).ok());
        let (Some(entries), Some(start)) = (entries, start) else {
            return false;
        };
        let mut names = entries.flatten().map(|entry| entry.file_name());
        names.any(|name| name.to_str().is_some_and(|name| name.starts_with(start)))
    };
    let there = ACCELERATORS.iter().filter(|(_, file)| is_there(file));
    let mut all: Vec<Name> = there.filter_map(|(name, _)| name.parse().ok()).collect();
    all.dedup();
    all
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
    fn accelerators_are_what_linux_shows() {
        let dir = tempfile::tempdir().unwrap();
        let names = || -> Vec<String> {
            let all = accelerators(dir.path());
            all.iter().map(ToString::to_string).collect()
        };
        assert_eq!(names(), Vec::<String>::new());
        std::fs::create_dir(dir.path().join("dri")).unwrap();
        for file in [
            "hailo0",
            "null",
            "nvhost-gpu",
            "nvhost-as-gpu",
            "dri/renderD128",
            "dri/card0",
            "video0",
        ] {
            std::fs::write(dir.path().join(file), "").unwrap();
        }
        assert_eq!(names(), ["hailo", "jetson", "gpu"]);
        assert!(accelerators(Path::new("/nowhere")).is_empty());
    }

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

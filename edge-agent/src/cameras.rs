//! The sources: opened as soon as there is a model that looks, each on its own thread.

use std::{
    collections::BTreeSet,
    sync::mpsc::{Receiver, Sender, SyncSender, channel},
    thread::JoinHandle,
};

use mesh_core::Name;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    agent::{AgentError, thread},
    capture::{self, Frame, Pace, SourceConfig},
    clock::WallClock,
    counters::Counters,
    store::Cursor,
    update::{Engines, Wanted},
};

/// What the sources start from.
pub(crate) struct Start {
    /// Their settings.
    pub(crate) sources: Vec<SourceConfig>,
    /// Where each goes on: after its last frame whose reading is durable.
    pub(crate) cursor: Cursor,
    /// Pulses of the trigger input; nothing where there is none or it does not work.
    pub(crate) trigger: Option<Receiver<()>>,
    /// The size of pictures that the models need.
    pub(crate) wanted: Wanted,
    /// Where frames go.
    pub(crate) frames: SyncSender<Frame>,
    /// Which sources cannot be opened, and why.
    pub(crate) blind: watch::Sender<Vec<String>>,
    /// Which sources work.
    pub(crate) works: watch::Sender<BTreeSet<Name>>,
    /// Stamps the frames.
    pub(crate) clock: WallClock,
    /// What is counted.
    pub(crate) counters: Counters,
}

/// The threads of the sources, and what ends each.
#[derive(Default)]
struct Running {
    stops: Vec<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

/// The sources.
pub(crate) struct Cameras {
    stop: CancellationToken,
    running: tokio::task::JoinHandle<Running>,
}

impl Cameras {
    /// Opens the sources if there is a model, or else when the first one comes: without, nobody looks at their frames.
    pub(crate) fn start(
        start: Start,
        mut engines: watch::Receiver<Engines>,
    ) -> Result<Self, AgentError> {
        let stop = CancellationToken::new();
        let running = if engines.borrow().active.is_some() {
            let running = open(start)?;
            tokio::spawn(async { running })
        } else {
            let stopped = stop.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = stopped.cancelled() => return Running::default(),
                    found = engines.wait_for(|engines| engines.active.is_some()) => {
                        if found.is_err() {
                            return Running::default();
                        }
                    }
                }
                // Listing a folder may take a while.
                let opened = tokio::task::spawn_blocking(|| open(start)).await;
                match opened {
                    Ok(Ok(running)) => running,
                    Ok(Err(error)) => {
                        tracing::error!("the sources cannot start: {error}");
                        Running::default()
                    }
                    Err(error) => {
                        tracing::error!("the sources cannot start: {error}");
                        Running::default()
                    }
                }
            })
        };
        Ok(Self { stop, running })
    }

    /// Lets them end, and gives their threads.
    pub(crate) async fn stop(self) -> Vec<JoinHandle<()>> {
        self.stop.cancel();
        self.running.await.unwrap_or_default().threads
    }
}

fn open(start: Start) -> Result<Running, AgentError> {
    let Start {
        sources,
        cursor,
        mut trigger,
        wanted,
        frames,
        blind,
        works,
        clock,
        counters,
    } = start;
    let mut running = Running::default();
    for (index, config) in sources.into_iter().enumerate() {
        let opened = Pace::of(&config, &mut trigger)
            .and_then(|pace| Ok((pace, capture::open(&config, wanted.clone())?)));
        let (pace, source) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                tracing::error!("{error}");
                blind.send_modify(|blind| blind.push(error.to_string()));
                continue;
            }
        };
        let (stop, stopped) = channel();
        running.stops.push(stop);
        let name = format!("cap-{}", config.name);
        let start = capture::Start {
            index,
            source,
            first: cursor.get(&config.name).copied().unwrap_or(0),
            pace,
            config,
            frames: frames.clone(),
            stop: stopped,
            clock: clock.clone(),
            counters: counters.clone(),
            works: works.clone(),
        };
        let thread = thread(&name, move || capture::run(start))?;
        running.threads.push(thread);
    }
    Ok(running)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc::sync_channel, time::Duration};

    use super::*;

    /// A source that waits for a trigger which does not work is blind, and says so; the one beside it sees.
    #[test]
    fn without_its_trigger_a_source_is_blind() {
        let source = |more: &str| -> SourceConfig {
            let text = format!("kind = 'scene'\nscene = {{ width = 64, height = 64 }}\n{more}");
            toml::from_str(&text).unwrap()
        };
        let (frames, seen) = sync_channel(64);
        let (see, blind) = watch::channel(Vec::new());
        let (work, works) = watch::channel(BTreeSet::new());
        let counters = Counters::default();
        let running = open(Start {
            sources: vec![
                source("name = 'parts'\ntrigger = true\nframes = 50"),
                source("name = 'hall'\nfps = 1000.0\nframes = 5"),
            ],
            cursor: Cursor::new(),
            trigger: None,
            wanted: Wanted::default(),
            frames,
            blind: see,
            works: work,
            clock: WallClock::system(),
            counters: counters.clone(),
        })
        .unwrap();
        for _ in 0..5 {
            let frame = seen.recv_timeout(Duration::from_secs(20)).unwrap();
            assert_eq!(frame.source, 1);
        }
        running.threads.into_iter().for_each(|t| t.join().unwrap());
        assert!(seen.try_recv().is_err() && counters.frames.get() == 5);
        let said = blind.borrow().join(" ");
        assert!(said.contains("parts") && said.contains("trigger"), "{said}");
        let working: Vec<_> = works.borrow().iter().map(Name::to_string).collect();
        assert_eq!(working, ["hall"]);
    }
}

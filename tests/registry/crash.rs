//! The plug is pulled at every change of the disk.

use std::{
    fs, io,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use tough::schema::RoleType;

use super::*;
use cloud_coordinator::delivery::signing::{Step, StepHook};

/// What the file system need not have on the disk yet.
enum Pending {
    /// The bytes of a file.
    Bytes(PathBuf),
    /// A new name; and what had it before.
    Name {
        from: PathBuf,
        to: PathBuf,
        before: Option<Vec<u8>>,
    },
}

#[derive(Default)]
struct Plug {
    pending: Mutex<Vec<Pending>>,
    left: Mutex<usize>,
    pulled: AtomicBool,
}

impl Plug {
    fn new(left: usize) -> Arc<Self> {
        Arc::new(Self {
            left: Mutex::new(left),
            ..Self::default()
        })
    }

    fn hook(self: &Arc<Self>) -> StepHook {
        let plug = Arc::clone(self);
        Arc::new(move |step| plug.step(step))
    }

    fn step(&self, step: Step<'_>) -> io::Result<()> {
        let mut left = self.left.lock().unwrap();
        if *left == 0 {
            self.pulled.store(true, Ordering::Relaxed);
            return Err(io::Error::other("the plug is pulled"));
        }
        *left -= 1;
        let mut pending = self.pending.lock().unwrap();
        match step {
            Step::Write(path) => pending.push(Pending::Bytes(path.into())),
            Step::Sync(path) => pending.retain(|p| !matches!(p, Pending::Bytes(b) if b == path)),
            Step::Rename(from, to) => {
                // What is not flushed stays so under its new name.
                for lost in &mut *pending {
                    if let Pending::Bytes(path) = lost
                        && let Ok(rest) = path.strip_prefix(from)
                    {
                        *path = to.components().chain(rest.components()).collect();
                    }
                }
                pending.push(Pending::Name {
                    from: from.into(),
                    to: to.into(),
                    before: fs::read(to).ok(),
                });
            }
            Step::SyncFolder(folder) => {
                pending.retain(
                    |p| !matches!(p, Pending::Name { to, .. } if to.parent() == Some(folder)),
                );
            }
            Step::Remove(_) => {}
        }
        Ok(())
    }

    /// Undoes what was not flushed: all of it, or every other one.
    fn lose(&self, all: bool) {
        let pending = std::mem::take(&mut *self.pending.lock().unwrap());
        let lost = |n: &usize| all || n % 2 == 1;
        for (_, lost) in pending.iter().enumerate().filter(|(n, _)| lost(n)) {
            if let Pending::Bytes(path) = lost
                && let Ok(bytes) = fs::read(path)
            {
                fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
            }
        }
        for (_, lost) in pending.iter().enumerate().filter(|(n, _)| lost(n)).rev() {
            if let Pending::Name { from, to, before } = lost
                && fs::rename(to, from).is_ok()
                && let Some(before) = before
            {
                fs::write(to, before).unwrap();
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    Publish,
    Refresh,
    Rotate(RoleType),
}

#[derive(Clone, Copy, Debug)]
enum Loss {
    Killed,
    All,
    Some,
}

/// A world as it was, opened again with a plug.
async fn reopen(template: &Path, plug: &Arc<Plug>) -> (World, Result<(), signing::SigningError>) {
    let dir = folder();
    copy(template, dir.path());
    let data = dir.path().join("data");
    let signing = Signing::open_with(&data, Lifetimes::default(), NOW, Some(plug.hook())).await;
    match signing {
        Ok(signing) => (World { dir, signing }, Ok(())),
        Err(error) => {
            let signing = Signing::open(&data, Lifetimes::default(), NOW)
                .await
                .unwrap();
            (World { dir, signing }, Err(error))
        }
    }
}

#[tokio::test]
async fn a_change_is_whole_or_not_there_wherever_it_is_interrupted() {
    let changes = [
        Change::Publish,
        Change::Refresh,
        Change::Rotate(RoleType::Timestamp),
        Change::Rotate(RoleType::Targets),
        Change::Rotate(RoleType::Root),
    ];
    let template = World::new().await;
    template.publish("1").await;
    accepts(&mut template.device(), &["1"], NOW).await;
    for change in changes {
        for loss in [Loss::Killed, Loss::All, Loss::Some] {
            let (mut n, mut done_early) = (0, 0);
            loop {
                let plug = Plug::new(n);
                let (world, opened) = reopen(template.dir.path(), &plug).await;
                let now = NOW + DAY;
                let done = match (opened, change) {
                    (Err(error), _) => Err(error),
                    (_, Change::Publish) => world
                        .signing
                        .publish("det", "2", &document("2"), now)
                        .await
                        .map(drop),
                    (_, Change::Refresh) => world.signing.refresh(now).await.map(drop),
                    (_, Change::Rotate(role)) => world.signing.rotate(role, now).await.map(drop),
                };
                match loss {
                    Loss::Killed => {}
                    Loss::All => plug.lose(true),
                    Loss::Some => plug.lose(false),
                }
                let what = format!("{change:?} {loss:?} {n}");
                // What lies there is served; only a change of keys waits for the next start.
                if !matches!(change, Change::Rotate(_)) {
                    for name in ["device", "fresh"] {
                        let mut device = world.device_at(name, &world.repository());
                        let got = device.refresh(now).await;
                        assert!(got.is_ok(), "{what} {name}: {got:?}");
                        let got = device.release("det", "1", now).await;
                        assert!(got.is_ok(), "{what} {name}: {got:?}");
                    }
                }
                let data = world.dir.path().join("data");
                let signing = Signing::open(&data, Lifetimes::default(), now).await;
                let signing = signing.unwrap_or_else(|error| panic!("{what}: {error}"));
                for name in ["device", "fresh2"] {
                    accepts(&mut world.device_at(name, &world.repository()), &["1"], now).await;
                }
                let there = match change {
                    Change::Publish => {
                        world.device().release("det", "2", now).await.is_ok() || {
                            let mut device = world.device();
                            device.refresh(now).await.unwrap();
                            device.release("det", "2", now).await.is_ok()
                        }
                    }
                    Change::Refresh => {
                        signing.status().unwrap().roles[3].expires_ms > NOW + 2 * DAY
                    }
                    Change::Rotate(_) => signing.status().unwrap().roles[0].version == 2,
                };
                // What was said to be done is done.
                assert!(there || done.is_err(), "{what}");
                done_early += usize::from(there && done.is_err());
                // And it goes on.
                signing
                    .publish("det", "9", &document("9"), now)
                    .await
                    .unwrap();
                accepts(&mut world.device(), &["1", "9"], now).await;
                if !plug.pulled.load(Ordering::Relaxed) {
                    assert!(done.is_ok() && n > 10, "{what}");
                    break;
                }
                n += 1;
            }
            assert!(
                done_early > 0,
                "{change:?} {loss:?}: it was never finished by the next start"
            );
        }
    }
}

#[tokio::test]
async fn the_first_start_may_be_interrupted() {
    for n in 0.. {
        let plug = Plug::new(n);
        let dir = folder();
        let data = dir.path().join("data");
        let first = Signing::open_with(&data, Lifetimes::default(), NOW, Some(plug.hook())).await;
        plug.lose(true);
        let signing = Signing::open(&data, Lifetimes::default(), NOW)
            .await
            .unwrap();
        assert!(signing.status().unwrap().unused.is_empty());
        let world = World { dir, signing };
        world.publish("1").await;
        accepts(&mut world.device(), &["1"], NOW).await;
        if first.is_ok() {
            break;
        }
    }
}

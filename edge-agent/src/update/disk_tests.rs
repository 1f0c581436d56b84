//! The power goes before each change of the disk, one after the other.

use std::cell::{Cell, RefCell};

use mesh_core::{Failure, Reason};

use super::*;

/// What a file system need not have on the disk yet.
enum Pending {
    /// The bytes of a file.
    Bytes(PathBuf),
    /// The name of a file that is new.
    Name(PathBuf),
    /// Another name; and the file that had it before.
    Renamed {
        from: PathBuf,
        to: PathBuf,
        before: Option<Vec<u8>>,
    },
}

thread_local! {
    /// Changes until the power goes.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    static PENDING: RefCell<Vec<Pending>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn power() -> io::Result<()> {
    LEFT.with(|left| match left.get() {
        None => Ok(()),
        Some(0) => Err(io::Error::other("the power is gone")),
        Some(n) => {
            left.set(Some(n - 1));
            Ok(())
        }
    })
}

pub(super) fn created(path: &Path) {
    PENDING.with_borrow_mut(|all| {
        all.push(Pending::Name(path.to_owned()));
        all.push(Pending::Bytes(path.to_owned()));
    });
}

pub(super) fn clean(path: &Path) {
    PENDING.with_borrow_mut(|all| {
        all.retain(|p| !matches!(p, Pending::Bytes(dirty) if dirty == path))
    });
}

pub(super) fn renamed(from: &Path, to: &Path) {
    PENDING.with_borrow_mut(|all| {
        // What is not durable stays so under its new name.
        for pending in all.iter_mut() {
            let (Pending::Bytes(path) | Pending::Name(path)) = pending else {
                continue;
            };
            if let Ok(rest) = path.strip_prefix(from) {
                *path = to.components().chain(rest.components()).collect();
            }
        }
        // The new name is what is not durable now.
        all.retain(|p| !matches!(p, Pending::Name(path) if path == to));
        all.push(Pending::Renamed {
            from: from.to_owned(),
            to: to.to_owned(),
            before: fs::read(to).ok(),
        });
    });
}

pub(super) fn synced(folder: &Path) {
    PENDING.with_borrow_mut(|all| {
        all.retain(|p| match p {
            Pending::Bytes(_) => true,
            Pending::Name(path) | Pending::Renamed { to: path, .. } => {
                path.parent() != Some(folder)
            }
        });
    });
}

/// What was not durable is not there, or half of it.
fn restart() {
    LEFT.set(None);
    for pending in PENDING.take().into_iter().rev() {
        match pending {
            Pending::Bytes(path) => {
                let length = fs::metadata(&path).map_or(0, |data| data.len());
                let file = File::options().write(true).open(&path);
                let _ = file.and_then(|file| file.set_len(length / 2));
            }
            Pending::Name(path) => drop(fs::remove_file(path)),
            Pending::Renamed { from, to, before } => {
                let _ = fs::rename(&to, from);
                if let Some(bytes) = before {
                    fs::write(to, bytes).unwrap();
                }
            }
        }
    }
}

fn conveyor() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles/conveyor")
}

/// A release of two files, and its document.
fn release(version: &str) -> (Release, ReleaseDocument, Vec<(String, Vec<u8>)>) {
    let from = tempfile::tempdir().unwrap();
    fs::create_dir(from.path().join("golden")).unwrap();
    let files = ["model.onnx", "golden/1.png"].map(|name| {
        let bytes = format!("{name} of {version}").into_bytes();
        fs::write(from.path().join(name), &bytes).unwrap();
        (name.to_owned(), bytes)
    });
    let document = ReleaseDocument::of(from.path(), "a", version, None).unwrap();
    let release = Release {
        name: "a".into(),
        version: version.into(),
        digest: document.digest().unwrap(),
    };
    (release, document, files.into())
}

fn install(disk: &Disk, version: &str) -> Result<Release, DiskError> {
    let (release, document, files) = release(version);
    let stage = disk.stage(&release);
    stage.prepare()?;
    for (name, bytes) in files {
        write(&stage.file(&name)?, |file| file.write_all(&bytes))?;
    }
    disk.install(&release, &document.to_bytes().unwrap())?;
    Ok(release)
}

/// Two models come, and the second one goes.
fn life(disk: &Disk, mut saved: Saved) -> Result<(), DiskError> {
    for version in ["2", "3"] {
        let new = install(disk, version)?;
        saved.begun = Some(new.clone());
        disk.save(&saved)?;
        saved.last_good = saved.current.replace(new.clone());
        disk.save(&saved)?;
        saved.begun = None;
        disk.save(&saved)?;
        let needed: Vec<_> = [&saved.current, &saved.last_good]
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        disk.retain(&needed, None)?;
    }
    saved.current = saved.last_good.take();
    disk.save(&saved)?;
    disk.retain(saved.current.as_slice(), None)
}

/// Everything that the state names is there.
fn check(disk: &Disk, saved: &Saved) {
    for named in [&saved.current, &saved.last_good, &saved.begun]
        .into_iter()
        .flatten()
    {
        let installed = disk.installed();
        let found = installed.iter().find(|one| one.digest == named.digest);
        let found = found.unwrap_or_else(|| panic!("{named} is on disk"));
        assert_eq!(found.folder, disk.folder(named));
        for file in &found.document.files {
            let path = found.folder.join(&file.path);
            assert!(is_file(&path, file.length, file.sha256).unwrap(), "{named}");
        }
    }
}

#[test]
fn the_disk_names_whole_models_whenever_the_power_goes() {
    let mut cuts = 0;
    for n in 0.. {
        let data = tempfile::tempdir().unwrap();
        let opened = Disk::open(data.path(), Some(&conveyor())).unwrap();
        assert_eq!(opened.trouble, None);
        LEFT.set(Some(n));
        let done = life(&opened.disk, opened.saved);
        restart();
        let opened = Disk::open(data.path(), Some(&conveyor())).unwrap();
        assert!(opened.saved.current.is_some(), "cut {n}");
        check(&opened.disk, &opened.saved);
        if done.is_ok() {
            let current = opened.saved.current.unwrap();
            assert_eq!(current.version, "2");
            // What could not be removed stays until the next time.
            opened.disk.retain(&[current], None).unwrap();
            assert_eq!(opened.disk.installed().len(), 2, "the factory's and one");
            break;
        }
        cuts += 1;
        // And it goes on from there.
        life(&opened.disk, opened.saved).unwrap();
        let opened = Disk::open(data.path(), Some(&conveyor())).unwrap();
        check(&opened.disk, &opened.saved);
    }
    assert!(cuts > 50, "{cuts}");
}

#[test]
fn another_factory_model_begins_anew_and_a_broken_one_does_not() {
    let data = tempfile::tempdir().unwrap();
    let first = Disk::open(data.path(), Some(&conveyor())).unwrap();
    let mut saved = first.saved;
    let new = install(&first.disk, "2").unwrap();
    saved.last_good = saved.current.replace(new.clone());
    first.disk.save(&saved).unwrap();
    let broken = Disk::open(data.path(), Some(&data.path().join("nowhere"))).unwrap();
    assert_eq!(broken.saved, saved);
    assert!(broken.trouble.unwrap().contains("nowhere"));
    // It is not forgotten which one it was.
    broken.disk.save(&saved).unwrap();
    let again = Disk::open(data.path(), Some(&conveyor())).unwrap();
    assert_eq!(again.saved, saved);
    let steel = Disk::open(data.path(), Some(&conveyor().join("../steel"))).unwrap();
    assert_eq!(steel.saved.current.as_ref().unwrap().name, "steel");
    assert_eq!(steel.saved.last_good, None);
    assert!(steel.disk.is_factory(steel.saved.current.as_ref().unwrap()));
    let none = Disk::open(data.path(), None).unwrap();
    assert_eq!((none.saved.current, none.trouble), (None, None));
}

#[test]
fn a_damaged_state_begins_anew_and_what_is_not_needed_goes() {
    let data = tempfile::tempdir().unwrap();
    let Opened { disk, saved, .. } = Disk::open(data.path(), Some(&conveyor())).unwrap();
    let (kept, gone) = (install(&disk, "2").unwrap(), install(&disk, "3").unwrap());
    let (coming, ..) = release("4");
    disk.stage(&coming).prepare().unwrap();
    disk.stage(&gone).prepare().unwrap();
    fs::create_dir(disk.registry()).unwrap();
    let mut bad = saved.clone();
    bad.bad.push(mesh_core::Bad {
        digest: gone.digest,
        failure: Failure::new(Reason::Latency, "slow"),
    });
    disk.save(&bad).unwrap();
    disk.retain(std::slice::from_ref(&kept), Some(&coming))
        .unwrap();
    assert!(disk.folder(&kept).exists() && !disk.folder(&gone).exists());
    assert!(disk.stage(&coming).bundle().exists() && !disk.stage(&gone).bundle().exists());
    assert!(disk.registry().exists() && Disk::look(data.path()).unwrap() == bad);
    fs::write(data.path().join("models/state.json"), b"{").unwrap();
    assert_eq!(Disk::look(data.path()), None);
    let opened = Disk::open(data.path(), Some(&conveyor())).unwrap();
    assert_eq!(opened.saved, saved);
}

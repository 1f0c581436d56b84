//! A process that reads foreign files is shut in. The test starts itself again, as the programs do.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test may fail, and speaks"
)]

#[cfg(target_os = "linux")]
mod common;

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, models::TRY_MODEL, dir] => models::try_here(dir.as_ref()),
        [_, linux::PROBE, how, dir, address, parent] => linux::probe(how, dir, address, parent),
        // Asked which tests there are: none that could be chosen.
        _ if args.iter().any(|arg| arg == "--list") => {}
        _ => linux::tests(),
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::{
        collections::BTreeMap,
        ffi::OsString,
        fs,
        net::{TcpListener, TcpStream, UdpSocket},
        os::unix::net::{UnixListener, UnixStream},
        path::Path,
        process::Command,
        time::Duration,
    };

    use models::{
        Fault, Trial,
        sandbox::{Lock, enter},
        try_bundle,
    };
    use prost::Message;
    use rustix::process::{Pid, test_kill_process};
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

    use super::common::{
        MANIFEST, bundle_of, graph, int, ints, model, node, write as write_bundle,
    };

    pub(super) const PROBE: &str = "probe";
    /// Shut in for reading.
    const READS: &str = "reads";
    /// Shut in, with a folder to write in.
    const WRITES: &str = "writes";
    /// On a kernel without Landlock.
    const OLD: &str = "old";
    /// Not shut in: what can be done then shows that the rest is a finding.
    const FREE: &str = "free";

    /// As a kernel that does not know Landlock answers.
    fn forget_landlock() {
        let calls = [
            libc::SYS_landlock_create_ruleset,
            libc::SYS_landlock_add_rule,
            libc::SYS_landlock_restrict_self,
        ];
        let filter = SeccompFilter::new(
            calls.into_iter().map(|call| (call, Vec::new())).collect(),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::ENOSYS.cast_unsigned()),
            std::env::consts::ARCH.try_into().unwrap(),
        );
        apply_filter(&BpfProgram::try_from(filter.unwrap()).unwrap()).unwrap();
    }

    /// Tries everything, and says what was possible.
    pub(super) fn probe(how: &str, dir: &str, address: &str, parent: &str) {
        let dir = Path::new(dir);
        let (inside, work) = (dir.join("inside"), dir.join("work"));
        let sandbox = match how {
            READS => Some(enter(&[&inside], None)),
            WRITES => Some(enter(&[&inside], Some(&work))),
            OLD => {
                forget_landlock();
                Some(enter(&[&inside], None))
            }
            _ => None,
        };
        if let Some(sandbox) = sandbox {
            println!("files={}", sandbox.files == Lock::Full);
            println!("calls={}", sandbox.calls == Lock::Full);
            println!("words={sandbox}");
        }
        let said = |what: &str, done: bool| println!("{what}={done}");
        let parent = Pid::from_raw(parent.parse().unwrap()).unwrap();
        said("read inside", fs::read(inside.join("file")).is_ok());
        said("list inside", fs::read_dir(&inside).is_ok());
        said("read outside", fs::read(dir.join("secret")).is_ok());
        said("read passwd", fs::read("/etc/passwd").is_ok());
        said("read own memory", fs::File::open("/proc/self/mem").is_ok());
        said("write inside", fs::write(inside.join("new"), "x").is_ok());
        let append = fs::OpenOptions::new()
            .append(true)
            .open(inside.join("file"));
        said("append inside", append.is_ok());
        said("make folder", fs::create_dir(inside.join("folder")).is_ok());
        let link = std::os::unix::fs::symlink("/etc/passwd", inside.join("link"));
        said("link inside", link.is_ok());
        let moved = fs::rename(inside.join("file"), inside.join("other"));
        said("rename inside", moved.is_ok());
        if moved.is_ok() {
            fs::rename(inside.join("other"), inside.join("file")).unwrap();
        }
        let made = fs::create_dir(work.join("new"))
            .and_then(|()| fs::write(work.join("new/file"), "x"))
            .and_then(|()| fs::File::open(work.join("new/file"))?.sync_all())
            .and_then(|()| fs::rename(work.join("new"), work.join("done")))
            .and_then(|()| fs::remove_dir_all(work.join("done")));
        said("write work", made.is_ok());
        said("write outside", fs::write(dir.join("out"), "x").is_ok());
        said("tcp", TcpStream::connect(address).is_ok());
        said("listen", TcpListener::bind("127.0.0.1:0").is_ok());
        said("udp", UdpSocket::bind("127.0.0.1:0").is_ok());
        said("unix pair", UnixStream::pair().is_ok());
        said("unix", UnixListener::bind(work.join("socket")).is_ok());
        said("program", Command::new("/bin/true").status().is_ok());
        said("thread", std::thread::Builder::new().spawn(|| ()).is_ok());
        said("signal", test_kill_process(parent).is_ok());
        said("memory", vec![1u8; 64 << 20].iter().all(|byte| *byte == 1));
    }

    fn ask(how: &str) -> BTreeMap<String, String> {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["inside", "work"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        fs::write(dir.path().join("inside/file"), "x").unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args([PROBE, how])
            .arg(dir.path())
            .arg(listener.local_addr().unwrap().to_string())
            .arg(std::process::id().to_string())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{how}: {}: {errors}",
            output.status
        );
        let said = String::from_utf8(output.stdout).unwrap();
        said.lines()
            .filter_map(|line| line.split_once('='))
            .map(|(what, done)| (what.to_owned(), done.to_owned()))
            .collect()
    }

    fn possible(said: &BTreeMap<String, String>) -> Vec<&str> {
        let done = said.iter().filter(|(_, done)| *done == "true");
        done.map(|(what, _)| what.as_str())
            .filter(|what| !["files", "calls"].contains(what))
            .collect()
    }

    /// Whether a lock that was asked for holds here; on the kernels that these tests are for both do.
    fn holds(said: &BTreeMap<String, String>, lock: &str) -> bool {
        let holds = said[lock] == "true";
        if !holds {
            println!("NOT TESTED here: {lock}: {}", said["words"]);
        }
        holds
    }

    fn what_is_free_is_possible() {
        let said = ask(FREE);
        let impossible: Vec<_> = said.iter().filter(|(_, done)| *done != "true").collect();
        assert!(impossible.is_empty() && said.len() > 15, "{impossible:?}");
    }

    fn who_reads_does_nothing_else() {
        let said = ask(READS);
        if holds(&said, "files") && holds(&said, "calls") {
            let allowed = ["list inside", "memory", "read inside"];
            assert_eq!(possible(&said), allowed, "{}", said["words"]);
        }
    }

    fn who_writes_does_so_in_one_folder() {
        let said = ask(WRITES);
        if holds(&said, "files") && holds(&said, "calls") {
            let allowed = ["list inside", "memory", "read inside", "write work"];
            assert_eq!(possible(&said), allowed, "{}", said["words"]);
        }
    }

    fn without_landlock_nothing_leaves_either() {
        let said = ask(OLD);
        assert!(said["words"].contains("landlock off"), "{}", said["words"]);
        if holds(&said, "calls") {
            let allowed = [
                "list inside",
                "memory",
                "read inside",
                "read outside",
                "read own memory",
                "read passwd",
            ];
            assert_eq!(possible(&said), allowed, "{}", said["words"]);
        }
    }

    fn trial(dir: &Path) -> Trial {
        let program: [OsString; 1] = [std::env::current_exe().unwrap().into()];
        try_bundle(&program, dir, Duration::from_secs(120)).unwrap()
    }

    fn a_good_model_passes_inside() {
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/bundles/conveyor");
        let trial = trial(shipped.as_ref());
        assert_eq!(trial.fault, None, "{trial:?}");
        assert!(trial.memory_mib.is_some_and(|mib| mib > 0.5), "{trial:?}");
        assert!(trial.sandbox.starts_with("landlock "), "{trial:?}");
        println!("  {}", trial.sandbox);
    }

    /// 200 MB from a file of some hundred bytes: below what any model may have, above what this one may.
    fn what_unfolds_meets_the_bound() {
        let mut model = model();
        let graph = graph(&mut model);
        let at = graph.node.len() - 1;
        graph.node[at].output[0] = "raw".into();
        let mut sum = node("ReduceSum", &["bent"], "one");
        sum.attribute.push(int("keepdims", 0));
        graph.node.extend([
            node("Expand", &["embedding", "shape"], "huge"),
            node("Sin", &["huge"], "bent"),
            sum,
            node("Add", &["raw", "one"], "logits"),
        ]);
        graph
            .initializer
            .push(ints("shape", &[1 << 14, 1 << 10, 1, 3]));
        let manifest = MANIFEST.replace("memory_mib = 1024", "memory_mib = 1");
        let (dir, bundle) = bundle_of(&manifest, &model.encode_to_vec());
        drop(bundle.unwrap());
        let trial = trial(dir.path());
        assert_eq!(trial.fault, Some(Fault::Memory), "{trial:?}");
    }

    /// One that would take a terabyte is not even begun with.
    fn a_terabyte_is_refused() {
        let mut model = model();
        let graph = graph(&mut model);
        graph.node[2].output[0] = "raw".into();
        graph.node.extend([
            node("ConstantOfShape", &["shape"], "huge"),
            node("ReduceSum", &["huge"], "one"),
            node("Add", &["raw", "one"], "logits"),
        ]);
        graph.initializer.push(ints("shape", &[1 << 19, 1 << 19]));
        let dir = tempfile::tempdir().unwrap();
        write_bundle(dir.path(), MANIFEST, &model.encode_to_vec());
        let trial = trial(dir.path());
        assert_eq!(trial.fault, Some(Fault::Load), "{trial:?}");
        assert!(trial.detail.contains("elements"), "{trial:?}");
    }

    pub(super) fn tests() {
        let all: [(&str, fn()); 7] = [
            ("what_is_free_is_possible", what_is_free_is_possible),
            ("who_reads_does_nothing_else", who_reads_does_nothing_else),
            (
                "who_writes_does_so_in_one_folder",
                who_writes_does_so_in_one_folder,
            ),
            (
                "without_landlock_nothing_leaves_either",
                without_landlock_nothing_leaves_either,
            ),
            ("a_good_model_passes_inside", a_good_model_passes_inside),
            ("what_unfolds_meets_the_bound", what_unfolds_meets_the_bound),
            ("a_terabyte_is_refused", a_terabyte_is_refused),
        ];
        for (name, test) in all {
            test();
            println!("test {name} ... ok");
        }
    }
}

//! Each abuse against a real coordinator with TLS, while honest devices report and an honest client asks: the process lives, its
//! memory is bounded, a counter moves, the log gives the reason, and everything honest arrives.

use fleet::{
    abuse::{self, Enemy},
    process::{Program, usage},
    site::Site,
};
use tests::{BOUND, counted, exactly_once, plan, until};

/// Far above what the coordinator takes at rest, far below what any of the floods would.
const MOST_MEMORY: u64 = 320 << 20;
/// A log that tells each reason once every ten seconds stays below it.
const MOST_LOG: usize = 512 << 10;

#[tokio::test(flavor = "multi_thread")]
async fn no_abuse_reaches_beyond_itself() {
    abuse::make_room().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let mut plan = plan(node, dir.path());
    plan.agents = 2;
    plan.fps = 5.0;
    let mut site = Site::start(&plan).await.unwrap();
    let enemy = Enemy::of(&site, &Program(node.into())).await.unwrap();
    let mut witness = site.witness(Default::default());
    let log = site.coordinator.log().to_owned();
    let pid = site.coordinator.pid().unwrap();
    for abuse in abuse::all() {
        let before = match abuse.counter {
            Some(counter) => counted(&site, counter).await,
            None => 0.0,
        };
        let stored = witness.look().await.unwrap().total().stored;
        abuse.strike(&enemy).await.unwrap();
        site.check().unwrap();
        if let Some(counter) = abuse.counter {
            until(&format!("{abuse:?} moves {counter}"), async || {
                counted(&site, counter).await > before
            })
            .await
            .unwrap();
        }
        if let Some(reason) = abuse.log {
            // A reason is told once in ten seconds, however often it is given.
            until(
                &format!("the log says {reason:?} of {abuse:?}"),
                async || {
                    let told = std::fs::read_to_string(&log).unwrap().contains(reason);
                    if !told {
                        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
                        abuse.strike(&enemy).await.unwrap();
                    }
                    told
                },
            )
            .await
            .unwrap();
        }
        until(&format!("readings arrive beside {abuse:?}"), async || {
            witness.look().await.unwrap().total().stored > stored
        })
        .await
        .unwrap();
        let used = usage(pid).unwrap();
        println!("{abuse:?}: {} MiB", used.rss >> 20);
        assert!(used.peak_rss < MOST_MEMORY, "{abuse:?}: {used:?}");
    }
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(
        said.len() < MOST_LOG,
        "the log was flooded: {} bytes",
        said.len()
    );
    assert!(!said.contains("panicked"), "{said}");
    let seen = site.finish(Default::default(), BOUND).await.unwrap();
    site.stop().await.unwrap();
    exactly_once(&seen.total()).unwrap();
}

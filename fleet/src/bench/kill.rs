//! `kill`: the parts die at random, again and again, and nothing may be lost.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::Context;

use super::figures::{Goal, Results};
use crate::{
    chaos::{self, Chaos},
    cli::{BenchArgs, shipped_bundle},
    dice::Dice,
    process::Program,
    site::{Broker, Camera, Plan},
};

/// Frames per second of each of the three devices: busy, on a machine with two processors.
const FPS: f64 = 30.0;

/// Half of the kills with the embedded broker, half with a mosquitto that forgets everything, if there is one.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or_else(Dice::seed);
    println!("seed {seed} (repeat with --seed {seed})");
    let asked = args.broker.map(|broker| [Broker::from(broker)]);
    let brokers: &[Broker] = match (&asked, crate::broker::mosquitto()) {
        (Some(asked), _) => asked,
        (None, Some(_)) => &[Broker::Embedded, Broker::Mosquitto],
        (None, None) => {
            println!("mosquitto is not installed: the embedded broker only");
            &[Broker::Embedded]
        }
    };
    let stop = Arc::new(AtomicBool::new(false));
    let interrupt = tokio::spawn({
        let stop = stop.clone();
        async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                println!("no more kills; what is on its way arrives and is counted …");
                stop.store(true, Ordering::Relaxed);
            }
        }
    });
    let share = args.kills.div_ceil(brokers.len() as u64);
    for broker in brokers {
        let name = match broker {
            Broker::Embedded => "embedded",
            Broker::Mosquitto => "mosquitto",
        };
        let dir = tempfile::tempdir().context("making a temporary folder")?;
        let mut plan = Plan::new(
            Program::current()?,
            dir.path().to_owned(),
            shipped_bundle("conveyor")?,
        );
        plan.broker = *broker;
        plan.fps = FPS;
        plan.camera = Camera::Scene {
            width: 64,
            height: 64,
        };
        let chaos = Chaos {
            stop: stop.clone(),
            ..Chaos::new(share, seed)
        };
        let outcome = chaos::run(&plan, &chaos, |line| {
            println!("{name}: {line}");
        })
        .await;
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                let kept = dir.keep();
                return Err(error).with_context(|| format!("all is kept in {}", kept.display()));
            }
        };
        let total = outcome.seen.total();
        println!("{name}: {total:?}");
        if !total.is_whole() {
            println!("{name}: all is kept in {}", dir.keep().display());
        }
        for (what, count, goal) in [
            ("kills of agents", outcome.agents, Goal::None),
            ("kills of the coordinator", outcome.coordinators, Goal::None),
            ("kills of the broker alone", outcome.brokers, Goal::None),
            ("answers lost on the way", outcome.lost_answers, Goal::None),
            ("readings produced", total.produced, Goal::AtLeast(1.0)),
            (
                "readings stored",
                total.stored,
                Goal::AtLeast(total.produced as f64),
            ),
            ("… from a backlog", total.replayed, Goal::None),
            ("recorded as gaps", total.gaps, Goal::AtMost(0.0)),
            ("lost", total.lost, Goal::AtMost(0.0)),
            ("duplicates", total.duplicates, Goal::AtMost(0.0)),
            ("invented", total.invented, Goal::AtMost(0.0)),
        ] {
            results.add(&format!("{name}: {what}"), count as f64, "", None, goal);
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    interrupt.abort();
    Ok(())
}

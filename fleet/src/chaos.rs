//! Kills parts of a site at random and starts them again, under load.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
    dice::Dice,
    site::{Broker, Plan, Site, SiteError},
    witness::Testimony,
};

/// How long everything may take to arrive after the last kill.
const SETTLE: Duration = Duration::from_secs(120);
/// How often the parts are let alone until the coordinator answers again: without it, a site that is
/// killed faster than it starts would never do anything worth losing.
const BREATHE: u64 = 10;

/// What to kill, how often, how fast.
#[derive(Clone, Debug)]
pub struct Chaos {
    /// How many kills.
    pub kills: u64,
    /// Decides everything random.
    pub seed: u64,
    /// Milliseconds between a kill and the restart, and again between the restart and the next kill.
    pub pause_ms: Range<u64>,
    /// Set when it is to end early; what happened until then is counted all the same.
    pub stop: Arc<AtomicBool>,
}

impl Chaos {
    /// Pauses from nothing (a part dies while it starts) to some commits and batches.
    #[must_use]
    pub fn new(kills: u64, seed: u64) -> Self {
        Self {
            kills,
            seed,
            pause_ms: 0..500,
            stop: Arc::default(),
        }
    }
}

/// Who was killed how often, and what came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Kills of agents.
    pub agents: u64,
    /// Kills of the coordinator, and of the embedded broker with it.
    pub coordinators: u64,
    /// Kills of a broker of its own.
    pub brokers: u64,
    /// Connections that the network broke while the answers were on their way.
    pub lost_answers: u64,
    /// What the witness says when all is quiet again.
    pub seen: Testimony,
}

/// Runs the whole story: start, kill at random, settle, count. `tell` gets a line now and then.
///
/// # Errors
/// If a part fails in another way than by being killed.
pub async fn run(
    plan: &Plan,
    chaos: &Chaos,
    mut tell: impl FnMut(String),
) -> Result<Outcome, SiteError> {
    let mut site = Site::start(plan).await?;
    let mut dice = Dice::new(chaos.seed);
    let (mut agents, mut coordinators, mut brokers, mut lost_answers) = (0, 0, 0, 0);
    for kill in 1..=chaos.kills {
        if chaos.stop.load(Ordering::Relaxed) {
            tell(format!("ended after {} kills", kill - 1));
            break;
        }
        site.check()?;
        // Kept apart from the choice of the victim: while it is dead, others may lose their answers.
        let upset = dice.below(site.devices.len());
        if dice.below(4) == 0
            && let Some(device) = site.devices.get(upset)
        {
            device.link.lose_answers();
            lost_answers += 1;
        }
        let with_broker = plan.broker == Broker::Mosquitto;
        match dice.below(if with_broker { 4 } else { 3 }) {
            0 => {
                site.coordinator.kill().await?;
                coordinators += 1;
            }
            3 => {
                if let Some(broker) = &mut site.broker {
                    broker.kill().await?;
                }
                brokers += 1;
            }
            _ => {
                let victim = dice.below(site.devices.len());
                if let Some(device) = site.devices.get_mut(victim) {
                    device.agent.kill().await?;
                }
                agents += 1;
            }
        }
        tokio::time::sleep(dice.wait(&chaos.pause_ms)).await;
        site.start_all()?;
        tokio::time::sleep(dice.wait(&chaos.pause_ms)).await;
        if kill % BREATHE == 0 {
            site.ready().await?;
        }
        if kill % 50 == 0 {
            tell(format!("{kill} of {} kills", chaos.kills));
        }
    }
    let seen = site.finish(Default::default(), SETTLE).await?;
    site.stop().await?;
    Ok(Outcome {
        agents,
        coordinators,
        brokers,
        lost_answers,
        seen,
    })
}

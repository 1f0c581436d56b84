//! Benchmarks: each figure beside its peer's, measured in turns in one run.

mod bulk;
mod cascade;
mod chain;
mod deliver;
mod device;
mod figures;
mod hostile;
mod image;
mod ingest;
mod kill;
mod mesh;
mod mesh_hostile;
mod outbox;
mod peer;
mod relay;
mod rollout;
mod simulated;
mod split;
mod swarm;
mod tls;
mod update_kill;
mod weights;
mod wire;

use anyhow::{Context, bail};

use crate::cli::BenchArgs;
use figures::Results;

pub(crate) use deliver::{DELTA_APPLY, delta_apply};
pub(crate) use outbox::{OUTBOX_LOAD, outbox_load};

/// Each benchmark and what it is about.
const ALL: [(&str, &str); 17] = [
    (
        "outbox",
        "durable commits, space and start of the outbox, against SQLite in WAL mode",
    ),
    (
        "device",
        "a whole device, against OpenCV + ONNX Runtime + SQLite + paho-mqtt; its memory",
    ),
    ("image", "a 1080p JPEG to a model's input, against Pillow"),
    (
        "ingest",
        "durable readings per CPU second, against mosquitto + paho-mqtt + SQLite",
    ),
    (
        "tls",
        "what encryption and identities cost, from the device to the acknowledgement, against plain text",
    ),
    (
        "hostile",
        "what honest devices and clients wait while each abuse goes on, against how long without",
    ),
    (
        "kill",
        "SIGKILL of any part at random, under load: nothing lost, doubled or invented (--kills N)",
    ),
    (
        "deliver",
        "deltas of models: their size, and time and memory to apply one, against a copy of the file",
    ),
    (
        "relay",
        "half of a site loses its uplink and carriers die: what is lost, and how late the rest is, against no neighbours",
    ),
    (
        "rollout",
        "a bad model and a good one to 10,000 simulated devices on a real coordinator (--devices N)",
    ),
    (
        "swarm",
        "a release to all devices of a site over one slow uplink, against each for itself (--agents N)",
    ),
    (
        "bulk",
        "a large release from a neighbour's disk, against the same from the coordinator over HTTPS",
    ),
    (
        "update-kill",
        "SIGKILL of a device at random moments of updates: always one whole model (--kills N)",
    ),
    (
        "cascade",
        "a small board that asks a stronger neighbour about what it is unsure of: accuracy, deadlines (--images DIR)",
    ),
    (
        "mesh",
        "how soon the devices of a site know each other; connections, memory, traffic at rest of 10, 50 and 200",
    ),
    (
        "mesh-hostile",
        "what honest devices know of each other while a third of their site lies, floods and sends garbage, against none",
    ),
    (
        "split",
        "a model in parts on two boards, against one, and after one has died: the same answers, frames per second",
    ),
];

/// Runs the benchmark that was asked for. Says whether every goal was reached.
///
/// # Errors
/// If there is no such benchmark, or it cannot be run.
pub(crate) async fn run(args: &BenchArgs) -> anyhow::Result<bool> {
    if args.list {
        for (name, about) in ALL {
            println!("{name:<12} {about}");
        }
        return Ok(true);
    }
    let name = args.name.as_deref().unwrap_or_default();
    let mut results = Results::new(name);
    match name {
        "outbox" => outbox::run(args, &mut results).await?,
        "device" => device::run(args, &mut results).await?,
        "image" => image::run(args, &mut results).await?,
        "ingest" => ingest::run(args, &mut results).await?,
        "tls" => tls::run(args, &mut results).await?,
        "hostile" => hostile::run(args, &mut results).await?,
        "kill" => kill::run(args, &mut results).await?,
        "deliver" => deliver::run(args, &mut results).await?,
        "relay" => relay::run(args, &mut results).await?,
        "rollout" => rollout::run(args, &mut results).await?,
        "swarm" => swarm::run(args, &mut results).await?,
        "bulk" => bulk::run(args, &mut results).await?,
        "update-kill" => update_kill::run(args, &mut results).await?,
        "cascade" => cascade::run(args, &mut results).await?,
        "mesh" => mesh::run(args, &mut results).await?,
        "mesh-hostile" => mesh_hostile::run(args, &mut results).await?,
        "split" => split::run(args, &mut results).await?,
        other => bail!("no benchmark {other:?}; `fleet bench --list` names them"),
    }
    println!("\n{results}");
    if let Some(file) = &args.json {
        results
            .write(file)
            .with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(results.all_hold())
}

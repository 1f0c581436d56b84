//! `image`: from the bytes of a 1080p JPEG to a model's input.

use anyhow::Context;
use edge_agent::capture::scene::{SceneConfig, draw};
use models::{Bundle, Engine};

use super::{
    figures::{Goal, Results, median},
    peer::{Peer, number},
};
use crate::{
    cli::{BenchArgs, shipped_bundle},
    process::usage,
};

/// Images per round: a second or so.
const TIMES: u32 = 40;

/// In turns with Pillow.
pub(crate) async fn run(args: &BenchArgs, results: &mut Results) -> anyhow::Result<()> {
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let file = dir.path().join("1080p.jpg");
    let scene = SceneConfig {
        width: 1920,
        height: 1080,
        ..SceneConfig::default()
    };
    draw(&scene, 1).0.save(&file).context("writing the image")?;
    let bytes = std::fs::read(&file)?;
    let engine = Engine::load(&Bundle::open(&shipped_bundle("backbone")?)?)?;
    let (_, height, width) = engine.manifest().input.channels_height_width();
    let me = std::process::id();
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        let before = usage(me)?.cpu_s;
        for _ in 0..TIMES {
            engine.tensor_from_bytes(&bytes)?;
        }
        ours.push((usage(me)?.cpu_s - before) * 1_000.0 / f64::from(TIMES));
        let numbers = [width, height, TIMES as usize].map(|n| n.to_string().into());
        let peer_args = [file.clone().into()].into_iter().chain(numbers);
        let mut peer = Peer::start("image.py", peer_args)?;
        peers.push(number(&peer.says().await?, "ms")?);
        peer.end().await?;
        println!(
            "round {}: {:.1} ms, Pillow {:.1} ms",
            round + 1,
            ours.last().unwrap_or(&0.0),
            peers.last().unwrap_or(&0.0)
        );
    }
    let name = format!("1080p JPEG to a tensor of {width}×{height}, CPU time");
    results.add(
        &name,
        median(ours),
        "ms",
        Some(median(peers)),
        Goal::RatioAtMost(0.55),
    );
    Ok(())
}

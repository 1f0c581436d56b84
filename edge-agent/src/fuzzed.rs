//! What neighbours send to a device, parser by parser, as plain functions that come back whatever the bytes are: for
//! `fuzz/targets.rs`, and for nobody else.

use libp2p::futures::FutureExt;

pub use crate::update::swarm::fuzzed::pieces;
use crate::{mesh, offload};

/// What is said between neighbours all the time: frames, and what is signed in them.
pub fn presence(bytes: &[u8]) {
    let mut rest = bytes;
    // Memory never lets a reader wait.
    while let Some(Ok(Some(came))) = mesh::wire::read(&mut rest).now_or_never() {
        assert!(came.cost() > 0.0);
        if let mesh::wire::Came::Tell(envelope) = &came {
            let _ = mesh::enemy::opened(envelope);
        }
    }
}

/// A question about a frame, and one about a part of a model.
pub fn questions(bytes: &[u8]) {
    let mut rest = bytes;
    if let Some(Ok(offload::wire::Question::Run { bytes: count, .. })) =
        offload::wire::question(&mut rest).now_or_never()
        && let Some(Ok(picture)) = offload::wire::picture(&mut rest, count).now_or_never()
    {
        assert!(picture.len() <= offload::wire::MAX_IMAGE);
    }
    let mut rest = bytes;
    let _ = offload::split::wire::question(&mut rest).now_or_never();
}

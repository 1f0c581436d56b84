//! What goes between neighbours about pieces of models: for `fuzz/targets.rs`.

use libp2p::futures::FutureExt;
use mesh_core::Digest;

use super::{
    papers::Papers,
    wire::{Look, MAX_PIECES, Said, Want},
};

/// What is asked and answered, and the papers of a release.
pub fn pieces(bytes: &[u8]) {
    if let Some((look, _)) = bytes.split_first_chunk() {
        let look = Look::parse(look);
        assert_eq!(Look::parse(&look.to_bytes()), look);
    }
    if let Some((want, _)) = bytes.split_first_chunk()
        && let Some(want) = Want::parse(want)
    {
        assert_eq!(Want::parse(&want.to_bytes()), Some(want));
    }
    let mut rest = bytes;
    // Memory never lets a reader wait.
    if let Some(Ok(said)) = Said::read(&mut rest).now_or_never() {
        assert!(said.has.len() <= MAX_PIECES);
        let again = said.to_bytes();
        let again = Said::read(&mut &again[..]).now_or_never();
        assert!(again.is_some_and(|again| again.is_ok_and(|again| again == said)));
    }
    if let Some((release, _)) = bytes.split_first_chunk() {
        let _ = Papers::parse(Digest(*release), bytes);
    }
}

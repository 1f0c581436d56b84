//! What goes over a link: frames of presence, in one stream per pair.
//!
//! ```text
//!  length (4 bytes, big-endian, of what follows) | kind (1 byte) | content
//! ```
//!
//! | kind | content |
//! |---|---|
//! | 0 beat, 1 probe | nothing |
//! | 2 sum | 8 bytes, big-endian |
//! | 3 tell | a signed envelope (libp2p RFC 0002) around a [`Statement`] in JSON |
//! | 4 version | 8 bytes, big-endian: of the newest roster that the sender knows |
//! | 5 roster | the signed roster |

use libp2p::{
    core::SignedEnvelope,
    futures::{AsyncRead, AsyncReadExt},
    identity::Keypair,
};
use mesh_core::{
    neighbours::{Frame, MAX_STATEMENT_BYTES, Signed, Statement},
    roster::MAX_ROSTER_BYTES,
};

use super::names::peer;

/// The protocol of presence.
pub const PRESENCE: &str = "/lacewing/presence/1";
/// What is signed can be taken for nothing else.
const DOMAIN: &str = "lacewing-presence-1";
const PAYLOAD: &[u8] = b"/lacewing/statement";

/// What came over a link, before signatures are looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Came {
    Beat,
    Probe,
    Sum(u64),
    Tell(Vec<u8>),
    Version(u64),
    Roster(String),
}

impl Came {
    /// In bytes, with what it costs to look at it.
    pub(crate) fn cost(&self) -> f64 {
        /// Of a signature that is to be verified, in bytes that could be read meanwhile.
        const SIGNATURE: usize = 512;
        let bytes = match self {
            Self::Beat | Self::Probe => 5,
            Self::Sum(_) | Self::Version(_) => 13,
            Self::Tell(envelope) => SIGNATURE + envelope.len(),
            Self::Roster(signed) => SIGNATURE + signed.len(),
        };
        bytes as f64
    }
}

/// Why a link is ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("a frame of {0} bytes")]
    TooLarge(usize),
    #[error("a frame of no known kind, or of a wrong length")]
    Kind,
}

fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
    // What is sent is bounded far below 4 GiB.
    let length = u32::try_from(content.len() + 1).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(content.len() + 5);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.push(kind);
    bytes.extend_from_slice(content);
    bytes
}

/// The bytes of a frame.
pub(super) fn encode(what: &Frame) -> Vec<u8> {
    match what {
        Frame::Beat => frame(0, &[]),
        Frame::Probe => frame(1, &[]),
        Frame::Sum(sum) => frame(2, &sum.to_be_bytes()),
        Frame::Tell(signed) => frame(3, &signed.envelope),
    }
}

/// "This is the newest roster that I know."
pub(super) fn version(version: u64) -> Vec<u8> {
    frame(4, &version.to_be_bytes())
}

/// The roster itself.
pub(super) fn roster(signed: &str) -> Vec<u8> {
    frame(5, signed.as_bytes())
}

/// Reads one frame; nothing at the end of the stream. What is too large is refused before it is read.
pub(crate) async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Option<Came>, WireError> {
    let mut head = [0; 5];
    match from.read_exact(&mut head[..1]).await {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    from.read_exact(&mut head[1..]).await?;
    let [a, b, c, d, kind] = head;
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    let length = length.checked_sub(1).ok_or(WireError::Kind)?;
    let most = match kind {
        0 | 1 => 0,
        2 | 4 => 8,
        3 => MAX_STATEMENT_BYTES,
        5 => MAX_ROSTER_BYTES,
        _ => return Err(WireError::Kind),
    };
    if length > most {
        return Err(WireError::TooLarge(length));
    }
    let mut content = vec![0; length];
    from.read_exact(&mut content).await?;
    let number = || <[u8; 8]>::try_from(content.as_slice()).map(u64::from_be_bytes);
    Ok(Some(match kind {
        0 => Came::Beat,
        1 => Came::Probe,
        2 => Came::Sum(number().map_err(|_| WireError::Kind)?),
        3 => Came::Tell(content),
        4 => Came::Version(number().map_err(|_| WireError::Kind)?),
        _ => Came::Roster(String::from_utf8(content).map_err(|_| WireError::Kind)?),
    }))
}

/// Signs a statement. Empty if it cannot be: nobody takes that.
pub(super) fn sign(key: &Keypair, statement: &Statement) -> Vec<u8> {
    let Ok(payload) = serde_json::to_vec(statement) else {
        return Vec::new();
    };
    match SignedEnvelope::new(key, DOMAIN.into(), PAYLOAD.into(), payload) {
        Ok(envelope) => envelope.into_protobuf_encoding(),
        Err(error) => {
            tracing::error!("nothing can be signed: {error}");
            Vec::new()
        }
    }
}

/// A frame with a statement that this key has signed.
#[must_use]
pub fn tell(key: &Keypair, statement: &Statement) -> Vec<u8> {
    frame(3, &sign(key, statement))
}

/// What an envelope says, if its signature is good.
#[must_use]
pub fn opened(envelope: &[u8]) -> Option<Statement> {
    Some(open(envelope)?.statement)
}

/// Verifies the signature, and says who signed what.
pub(super) fn open(envelope: &[u8]) -> Option<Signed> {
    let opened = SignedEnvelope::from_protobuf_encoding(envelope).ok()?;
    let (payload, key) = opened
        .payload_and_signing_key(DOMAIN.into(), PAYLOAD)
        .ok()?;
    Some(Signed {
        statement: serde_json::from_slice(payload).ok()?,
        by: peer(&key.to_peer_id())?,
        envelope: envelope.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{executor::block_on, io::Cursor};
    use mesh_core::neighbours::{Presence, Said};

    use super::*;

    fn back(bytes: Vec<u8>) -> Result<Option<Came>, WireError> {
        block_on(read(&mut Cursor::new(bytes)))
    }

    fn statement(key: &Keypair) -> Statement {
        Statement {
            about: peer(&key.public().to_peer_id()).unwrap(),
            life: 1,
            seq: 2,
            said: Said::Here(Presence::default()),
        }
    }

    #[test]
    fn frames_come_back_as_they_were() {
        assert_eq!(encode(&Frame::Beat), [0, 0, 0, 1, 0]);
        assert_eq!(back(encode(&Frame::Beat)).unwrap(), Some(Came::Beat));
        assert_eq!(back(encode(&Frame::Probe)).unwrap(), Some(Came::Probe));
        assert_eq!(back(encode(&Frame::Sum(7))).unwrap(), Some(Came::Sum(7)));
        assert_eq!(back(version(9)).unwrap(), Some(Came::Version(9)));
        assert_eq!(
            back(roster("a.b.c")).unwrap(),
            Some(Came::Roster("a.b.c".into()))
        );
        assert_eq!(back(Vec::new()).unwrap(), None);
    }

    #[test]
    fn what_is_too_large_is_not_read() {
        let huge = [0xff, 0xff, 0xff, 0xff, 3];
        assert!(matches!(back(huge.into()), Err(WireError::TooLarge(_))));
        assert!(matches!(back(frame(0, &[1])), Err(WireError::TooLarge(1))));
        let long = frame(3, &vec![0; MAX_STATEMENT_BYTES + 1]);
        assert!(matches!(back(long), Err(WireError::TooLarge(_))));
        assert!(matches!(back(vec![0, 0, 0, 0, 0]), Err(WireError::Kind)));
        assert!(matches!(back(frame(9, &[])), Err(WireError::Kind)));
        assert!(matches!(back(frame(2, &[1])), Err(WireError::Kind)));
        assert!(matches!(
            back(vec![0, 0, 0, 9, 2, 1]),
            Err(WireError::Io(_))
        ));
    }

    #[test]
    fn a_statement_is_its_signers_and_nobody_elses() {
        let key: Keypair = libp2p::identity::ecdsa::Keypair::generate().into();
        let said = statement(&key);
        let envelope = sign(&key, &said);
        let opened = open(&envelope).unwrap();
        assert_eq!(opened.statement, said);
        assert_eq!(opened.by, said.about);
        // The same bytes each time: what was seen once is known again.
        assert_eq!(sign(&key, &said), envelope);
        for at in 0..envelope.len() {
            let mut bent = envelope.clone();
            bent[at] ^= 1;
            // A key may be written in more than one way; what is said, and by whom, stays.
            let same = |bent: Signed| bent.statement == opened.statement && bent.by == opened.by;
            assert!(open(&bent).is_none_or(same), "byte {at}");
        }
        let payload = serde_json::to_vec(&said).unwrap();
        let elsewhere = SignedEnvelope::new(&key, "another".into(), PAYLOAD.into(), payload);
        assert!(open(&elsewhere.unwrap().into_protobuf_encoding()).is_none());
        assert!(open(b"").is_none());
    }
}

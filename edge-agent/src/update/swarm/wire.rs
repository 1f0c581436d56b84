//! What two neighbours say to each other about models. Every question has one length, every answer says its own first.
//!
//! ```text
//! /lacewing/offers/1   release, from, to (32 bytes each; from and to are zero where no delta is meant)
//!                      -> flags (1 fetches it, 2 has an uplink), delta, pieces (u16), one bit for each piece
//! /lacewing/chunks/1   kind (1 chunk, 2 delta, 3 papers), two digests
//!                      -> length (u32, 0: "not here"), bytes
//! ```

use libp2p::futures::{AsyncRead, AsyncReadExt};
use mesh_core::Digest;

/// The protocol in which is said who has what.
pub(super) const OFFERS: &str = "/lacewing/offers/1";
/// The protocol in which it is handed over.
pub(super) const CHUNKS: &str = "/lacewing/chunks/1";
/// Of a release: 320 MiB in chunks, and a small file each.
pub(super) const MAX_PIECES: usize = 2_048;
/// The bytes of a question about offers.
pub(super) const LOOK_BYTES: usize = 3 * 32;
/// The bytes of a question for something.
pub(super) const WANT_BYTES: usize = 1 + 2 * 32;

const FETCHES: u8 = 1;
const UPLINK: u8 = 2;
/// What stands for no digest.
const NONE: Digest = Digest([0; 32]);

/// "What do you have of this?"
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) release: Digest,
    /// The files between which a delta leads.
    pub(super) delta: Option<(Digest, Digest)>,
}

/// How it is with a delta.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DeltaState {
    /// Nothing is known of it.
    #[default]
    No,
    /// It is being fetched, or will be.
    Coming,
    /// It is here, and has led to the right file.
    Here,
    /// The coordinator has none.
    Nowhere,
}

/// The answer to a [`Look`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::update) struct Said {
    pub(super) fetches: bool,
    pub(super) uplink: bool,
    pub(super) delta: DeltaState,
    /// In the order of the release's document. Nothing where that is not known.
    pub(super) has: Vec<bool>,
}

/// Something that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    Chunk(Digest),
    Delta(Digest, Digest),
    /// What proves that a release is the right one: see [`super::papers`].
    Papers(Digest),
}

impl Look {
    pub(super) fn to_bytes(self) -> [u8; LOOK_BYTES] {
        let (from, to) = self.delta.unwrap_or((NONE, NONE));
        joined([self.release, from, to])
    }

    pub(super) fn parse(bytes: &[u8; LOOK_BYTES]) -> Self {
        let [release, from, to] = cut::<3>(bytes);
        Self {
            release,
            delta: (from != NONE).then_some((from, to)),
        }
    }
}

impl Want {
    pub(super) fn to_bytes(self) -> [u8; WANT_BYTES] {
        let (kind, names) = match self {
            Self::Chunk(name) => (1, [name, NONE]),
            Self::Delta(from, to) => (2, [from, to]),
            Self::Papers(release) => (3, [release, NONE]),
        };
        let mut bytes = [kind; WANT_BYTES];
        let (_, rest) = bytes.split_at_mut(1);
        rest.copy_from_slice(&joined::<2, { 2 * 32 }>(names));
        bytes
    }

    pub(super) fn parse(bytes: &[u8; WANT_BYTES]) -> Option<Self> {
        let (kind, names) = bytes.split_first()?;
        let [first, second] = cut::<2>(names);
        match kind {
            1 => Some(Self::Chunk(first)),
            2 => Some(Self::Delta(first, second)),
            3 => Some(Self::Papers(first)),
            _ => None,
        }
    }
}

fn joined<const N: usize, const B: usize>(digests: [Digest; N]) -> [u8; B] {
    let mut bytes = [0; B];
    for (to, digest) in bytes.chunks_mut(32).zip(digests) {
        to.copy_from_slice(&digest.0);
    }
    bytes
}

fn cut<const N: usize>(bytes: &[u8]) -> [Digest; N] {
    let mut digests = [NONE; N];
    for (digest, bytes) in digests.iter_mut().zip(bytes.as_chunks::<32>().0) {
        *digest = Digest(*bytes);
    }
    digests
}

impl Said {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let has = self.has.get(..MAX_PIECES).unwrap_or(&self.has);
        let flag = |is: bool, flag| if is { flag } else { 0 };
        let flags = flag(self.fetches, FETCHES) | flag(self.uplink, UPLINK);
        let delta = match self.delta {
            DeltaState::No => 0,
            DeltaState::Coming => 1,
            DeltaState::Here => 2,
            DeltaState::Nowhere => 3,
        };
        let mut bytes = vec![flags, delta];
        bytes.extend_from_slice(&u16::try_from(has.len()).unwrap_or(u16::MAX).to_be_bytes());
        let bits = |eight: &[bool]| {
            let bits = eight.iter().enumerate();
            bits.fold(0, |byte, (n, is)| byte | u8::from(*is) << n)
        };
        bytes.extend(has.chunks(8).map(bits));
        bytes
    }

    /// Reads an answer. What is too large is refused before it is read.
    pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Self> {
        let mut head = [0; 4];
        from.read_exact(&mut head).await?;
        let [flags, delta, high, low] = head;
        let count = usize::from(u16::from_be_bytes([high, low]));
        let delta = match delta {
            0 => DeltaState::No,
            1 => DeltaState::Coming,
            2 => DeltaState::Here,
            3 => DeltaState::Nowhere,
            _ => return Err(std::io::Error::other("no state of a delta")),
        };
        if count > MAX_PIECES {
            return Err(std::io::Error::other("too many pieces"));
        }
        let mut bits = vec![0; count.div_ceil(8)];
        from.read_exact(&mut bits).await?;
        let is = |n: usize| {
            let byte = bits.get(n / 8).copied().unwrap_or(0);
            byte & 1 << (n % 8) != 0
        };
        Ok(Self {
            fetches: flags & FETCHES != 0,
            uplink: flags & UPLINK != 0,
            delta,
            has: (0..count).map(is).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{executor::block_on, io::Cursor};

    use super::*;

    fn digest(n: u8) -> Digest {
        Digest([n; 32])
    }

    #[test]
    fn questions_come_back_as_they_were() {
        for delta in [None, Some((digest(2), digest(3)))] {
            let look = Look {
                release: digest(1),
                delta,
            };
            assert_eq!(Look::parse(&look.to_bytes()), look);
        }
        let all = [
            Want::Chunk(digest(7)),
            Want::Delta(digest(8), digest(9)),
            Want::Papers(digest(4)),
        ];
        for want in all {
            assert_eq!(Want::parse(&want.to_bytes()), Some(want));
        }
        assert_eq!(Want::parse(&[9; WANT_BYTES]), None);
    }

    #[test]
    fn answers_come_back_as_they_were_and_large_ones_do_not() {
        for count in [0, 1, 7, 8, 9, 52, MAX_PIECES] {
            let said = Said {
                fetches: count % 2 == 0,
                uplink: count % 3 == 0,
                delta: DeltaState::Here,
                has: (0..count).map(|n| n % 5 == 1).collect(),
            };
            let bytes = said.to_bytes();
            let back = block_on(Said::read(&mut Cursor::new(&bytes)));
            assert_eq!(back.unwrap(), said);
            let short = bytes.get(..bytes.len() - 1).unwrap();
            assert!(block_on(Said::read(&mut Cursor::new(short))).is_err());
        }
        for bad in [&[0_u8, 0, 0xff, 0xff][..], &[0, 9, 0, 0], &[]] {
            assert!(block_on(Said::read(&mut Cursor::new(bad))).is_err());
        }
    }
}

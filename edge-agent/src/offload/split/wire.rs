//! What goes over a stream of `/lacewing/part/1`: one question, one reply, the end.
//!
//! ```text
//!  asks:    length (2 bytes, big-endian) | question in JSON | values (4 bytes each, little-endian), as many as it says
//!  answers: length (2 bytes, big-endian) | reply in JSON    | values, as many as it says
//! ```

use libp2p::futures::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt,
    future::{Either, select},
};
use mesh_core::{Digest, offload::serve::Refusal};
use models::{MAX_CUT_ELEMENTS, Span};
use serde::{Deserialize, Serialize};

use super::super::wire::{WireError, all, read, write};

/// The protocol.
pub(crate) const PART: &str = "/lacewing/part/1";
/// Two cuts with names of 256 bytes, escaped, and a few numbers.
const MAX_QUESTION: usize = 8 * 1024;
/// A few numbers.
const MAX_REPLY: usize = 512;
/// Scores and an embedding.
const MAX_OUTPUTS: usize = 2;
const BYTES: usize = size_of::<f32>();

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Question {
    /// Would you run parts of this model, and how fast?
    Lend { model: Digest },
    /// Make this part ready.
    Load { model: Digest, span: Span },
    /// Take the values that follow, and do nothing: how long is the way?
    Weigh { values: u32 },
    /// What comes out of it for the values that follow?
    Run {
        model: Digest,
        span: Span,
        /// It is of no use after that, from now.
        deadline_ms: u32,
        values: u32,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    Lent {
        /// Multiply-adds per microsecond.
        speed: f64,
        /// Bytes of weights.
        room: u64,
        /// Of its time; who does not say it is taken to give all.
        #[serde(default = "all_of_it")]
        share: f64,
    },
    Loaded,
    /// How many values of each output follow, and how many microseconds it took.
    Values {
        counts: Vec<u32>,
        us: u64,
    },
    Refused(Refusal),
}

const fn all_of_it() -> f64 {
    1.0
}

/// The question on a stream that somebody has opened.
pub(crate) async fn question(from: &mut (impl AsyncRead + Unpin)) -> Result<Question, WireError> {
    read(from, MAX_QUESTION).await
}

/// Values that were announced: at most [`MAX_CUT_ELEMENTS`], or nothing is read.
pub(crate) async fn values(
    from: &mut (impl AsyncRead + Unpin),
    count: u32,
) -> Result<Vec<f32>, WireError> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > MAX_CUT_ELEMENTS {
        return Err(WireError::TooLarge(count));
    }
    let bytes = all(from, count * BYTES).await?;
    let (whole, _) = bytes.as_chunks::<BYTES>();
    Ok(whole
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect())
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// Answers, and ends the stream.
pub(crate) async fn reply(
    to: &mut (impl AsyncWrite + Unpin),
    reply: &Reply,
    outputs: &[Vec<f32>],
) -> Result<(), WireError> {
    write(to, reply, &bytes(&outputs.concat())).await?;
    to.close().await?;
    Ok(())
}

/// Asks over a new stream. Who refuses says so before it has read the values.
pub(crate) async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    question: &Question,
    sent: &[f32],
) -> Result<(Reply, Vec<Vec<f32>>), WireError> {
    let (mut from, mut to) = stream.split();
    let sent = bytes(sent);
    let say = async {
        write(&mut to, question, &sent).await?;
        to.close().await?;
        Ok::<_, WireError>(())
    };
    let hear = async {
        let reply: Reply = read(&mut from, MAX_REPLY).await?;
        let mut outputs = Vec::new();
        if let Reply::Values { counts, .. } = &reply {
            if counts.len() > MAX_OUTPUTS {
                return Err(WireError::TooLarge(counts.len()));
            }
            for &count in counts {
                outputs.push(values(&mut from, count).await?);
            }
        }
        Ok((reply, outputs))
    };
    let (say, hear) = (std::pin::pin!(say), std::pin::pin!(hear));
    match select(say, hear).await {
        Either::Left((Ok(()), hear)) => hear.await,
        // It may have refused and hung up.
        Either::Left((Err(_), hear)) => hear.await,
        Either::Right((heard, _)) => heard,
    }
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{executor::block_on, io::Cursor};
    use models::Cut;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn questions_and_replies_are_the_contract() {
        let span = Span {
            from: None,
            to: Some(Cut {
                value: "x\"".repeat(128),
                shape: vec![1, 2, 3],
            }),
        };
        let run = Question::Run {
            model: Digest([1; 32]),
            span: span.clone(),
            deadline_ms: 400,
            values: 2,
        };
        let mut said = Vec::new();
        block_on(write(&mut said, &run, &bytes(&[1.5, -2.0]))).unwrap();
        let mut from = Cursor::new(said);
        assert_eq!(
            block_on(question(&mut from)).unwrap(),
            run,
            "the longest names fit"
        );
        assert_eq!(block_on(values(&mut from, 2)).unwrap(), [1.5, -2.0]);
        assert!(block_on(values(&mut from, 1)).is_err(), "cut off");
        let json = serde_json::to_string(&Reply::Values {
            counts: vec![6, 704],
            us: 12,
        })
        .unwrap();
        assert_eq!(json, r#"{"values":{"counts":[6,704],"us":12}}"#);
        let lent = Reply::Lent {
            speed: 1234.5,
            room: u64::MAX,
            share: 0.25,
        };
        assert!(serde_json::to_string(&lent).unwrap().len() < MAX_REPLY);
        // Of a neighbour with an older agent.
        let lent: Reply = serde_json::from_str(r#"{"lent":{"speed":2.0,"room":9}}"#).unwrap();
        let (speed, room, share) = (2.0, 9, 1.0);
        assert_eq!(lent, Reply::Lent { speed, room, share });
        let load = Question::Load {
            model: Digest([2; 32]),
            span: Span::default(),
        };
        let json = serde_json::to_string(&load).unwrap();
        assert!(
            json.ends_with(r#""span":{"from":null,"to":null}}}"#),
            "{json}"
        );
    }

    #[test]
    fn what_is_too_large_is_not_read() {
        let most = u32::try_from(MAX_CUT_ELEMENTS).unwrap();
        let mut nothing = Cursor::new(Vec::new());
        assert!(matches!(
            block_on(values(&mut nothing, most + 1)),
            Err(WireError::TooLarge(_))
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(any in prop::collection::vec(any::<u8>(), 0..2_000), count in 0u32..2_000) {
            let _ = block_on(question(&mut Cursor::new(any.clone())));
            let _ = block_on(read::<Reply>(&mut Cursor::new(any.clone()), MAX_REPLY));
            let _ = block_on(values(&mut Cursor::new(any), count));
        }
    }
}

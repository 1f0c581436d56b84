//! What goes over a stream of `/lacewing/infer/1`: one question, one reply, the end.
//!
//! ```text
//!  asks:    length (2 bytes, big-endian) | question in JSON | the picture's bytes, as many as the question says
//!  answers: length (2 bytes, big-endian) | reply in JSON
//! ```
//!
//! A stream for each frame costs a round trip before it, far less than the picture; it needs no numbers, nothing waits
//! behind anything, who gives up closes it, and the places that a service counts are the frames that it holds.

use libp2p::futures::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt,
    future::{Either, select},
};
use mesh_core::{
    Digest,
    offload::{Answer, MAX_OFFERS, Offer, serve::Refusal},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The protocol.
pub(crate) const INFER: &str = "/lacewing/infer/1";
/// Of a picture in its encoded form.
pub(crate) const MAX_IMAGE: usize = 2 * 1024 * 1024;
/// A digest and two numbers.
const MAX_QUESTION: usize = 512;
/// A few models, or a label.
const MAX_REPLY: usize = 4 * 1024;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Question {
    /// Which models do you answer with?
    Offers,
    /// What does this model say about the picture that follows?
    Run {
        model: Digest,
        /// It is of no use after that, from now.
        deadline_ms: u32,
        /// Of the picture.
        bytes: u32,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    Offers(Vec<Offer>),
    Answer(Answer),
    Refused(Refusal),
}

/// Why there is no conversation.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0} bytes, more than there can be")]
    TooLarge(usize),
    #[error("not what is spoken here: {0}")]
    Json(#[from] serde_json::Error),
}

pub(super) async fn read<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
    most: usize,
) -> Result<T, WireError> {
    let mut length = [0; 2];
    from.read_exact(&mut length).await?;
    let length = usize::from(u16::from_be_bytes(length));
    if length > most {
        return Err(WireError::TooLarge(length));
    }
    let mut json = vec![0; length];
    from.read_exact(&mut json).await?;
    Ok(serde_json::from_slice(&json)?)
}

pub(super) async fn write(
    to: &mut (impl AsyncWrite + Unpin),
    what: &impl Serialize,
    picture: &[u8],
) -> Result<(), WireError> {
    let json = serde_json::to_vec(what)?;
    let length = u16::try_from(json.len()).map_err(|_| WireError::TooLarge(json.len()))?;
    let mut head = length.to_be_bytes().to_vec();
    head.extend(json);
    to.write_all(&head).await?;
    to.write_all(picture).await?;
    to.flush().await?;
    Ok(())
}

/// The question on a stream that somebody has opened.
pub(crate) async fn question(from: &mut (impl AsyncRead + Unpin)) -> Result<Question, WireError> {
    read(from, MAX_QUESTION).await
}

/// The picture that a question announced: at most [`MAX_IMAGE`], or nothing is read.
pub(crate) async fn picture(
    from: &mut (impl AsyncRead + Unpin),
    bytes: u32,
) -> Result<Vec<u8>, WireError> {
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    if length > MAX_IMAGE {
        return Err(WireError::TooLarge(length));
    }
    all(from, length).await
}

/// So many bytes. Memory is taken as they come, not as they are announced.
pub(super) async fn all(
    from: &mut (impl AsyncRead + Unpin),
    length: usize,
) -> Result<Vec<u8>, WireError> {
    let mut bytes = Vec::new();
    from.take(length as u64).read_to_end(&mut bytes).await?;
    if bytes.len() < length {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    Ok(bytes)
}

/// Answers, and ends the stream.
pub(crate) async fn reply(
    to: &mut (impl AsyncWrite + Unpin),
    reply: &Reply,
) -> Result<(), WireError> {
    write(to, reply, &[]).await?;
    to.close().await?;
    Ok(())
}

/// Asks over a new stream. Who refuses says so before it has read the picture.
pub(crate) async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    question: &Question,
    image: &[u8],
) -> Result<Reply, WireError> {
    let (mut from, mut to) = stream.split();
    let reply = {
        let said = std::pin::pin!(write(&mut to, question, image));
        let heard = std::pin::pin!(read::<Reply>(&mut from, MAX_REPLY));
        match select(heard, said).await {
            Either::Left((reply, _)) => reply?,
            // It may have refused and hung up.
            Either::Right((_, heard)) => heard.await?,
        }
    };
    match &reply {
        Reply::Offers(offers)
            if offers.len() > MAX_OFFERS || !offers.iter().all(Offer::is_bounded) =>
        {
            Err(WireError::TooLarge(offers.len()))
        }
        _ => Ok(reply),
    }
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{executor::block_on, io::Cursor};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn questions_and_replies_are_the_contract() {
        let run = Question::Run {
            model: Digest([1; 32]),
            deadline_ms: 400,
            bytes: 3,
        };
        let mut bytes = Vec::new();
        block_on(write(&mut bytes, &run, b"abc")).unwrap();
        let json = format!(
            r#"{{"run":{{"model":"{}","deadline_ms":400,"bytes":3}}}}"#,
            "01".repeat(32)
        );
        assert_eq!(bytes[2..bytes.len() - 3], *json.as_bytes());
        let mut from = Cursor::new(bytes);
        assert_eq!(block_on(question(&mut from)).unwrap(), run);
        assert_eq!(block_on(picture(&mut from, 3)).unwrap(), b"abc");
        assert!(block_on(picture(&mut from, 1)).is_err(), "cut off");
        let refused = Reply::Refused(Refusal::ShareUsed);
        let json = serde_json::to_string(&refused).unwrap();
        assert_eq!(json, r#"{"refused":"share_used"}"#);
        assert!(json.len() < MAX_REPLY);
    }

    #[test]
    fn what_is_too_large_is_not_read() {
        let mut huge = Cursor::new(u16::MAX.to_be_bytes().to_vec());
        assert!(matches!(
            block_on(question(&mut huge)),
            Err(WireError::TooLarge(65_535))
        ));
        let most = u32::try_from(MAX_IMAGE).unwrap();
        let mut nothing = Cursor::new(Vec::new());
        assert!(matches!(
            block_on(picture(&mut nothing, most + 1)),
            Err(WireError::TooLarge(_))
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..2_000)) {
            let _ = block_on(question(&mut Cursor::new(bytes.clone())));
            let _ = block_on(read::<Reply>(&mut Cursor::new(bytes), MAX_REPLY));
        }
    }
}

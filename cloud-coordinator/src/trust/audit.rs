//! Who did what: lines are only ever added, and each holds the hash of the one before.
//!
//! ```text
//! hash(n) = SHA-256( DOMAIN ‖ hash(n − 1) ‖ seq ‖ at_ms ‖ for each text: its length ‖ its bytes )
//! ```
//!
//! Lengths have 4 bytes, numbers 8, the high byte first; `hash(0)` is 32 zeros, and the first line has the number 1. So
//! a line that is changed, removed, put elsewhere or put in between shows. That the end was cut off only shows to who
//! remembers a head, the number and the hash of the last line: it is logged at each start, and `audit verify` prints it.

use std::fmt;

use aws_lc_rs::digest::{Context, SHA256};
use mesh_core::Digest;
use serde::Serialize;
use sqlx::{Sqlite, Transaction};

use crate::records::{RecordError, Records, commit};

/// So that the hash of a line is never the hash of something else.
const DOMAIN: &[u8] = b"lacewing audit v1\0";
/// Bytes of who, of the action and of the outcome: names of this program, or bounded by it.
const MAX_SHORT: usize = 128;
/// Bytes of an object: a path of the API.
const MAX_OBJECT: usize = 512;
/// Bytes of a detail: a sentence or two.
const MAX_DETAIL: usize = 1_024;
/// Lines that are read at a time when the chain is verified: some hundred kilobytes.
const AT_ONCE: i64 = 1_000;

type Hash = [u8; 32];

/// What is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) who: &'a str,
    pub(crate) action: &'a str,
    pub(crate) object: &'a str,
    pub(crate) outcome: Outcome,
    pub(crate) detail: &'a str,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was done.
    Done,
    /// It was allowed, and did not succeed.
    Failed,
    /// It was not allowed.
    Refused,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }
}

/// A line as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
struct Line {
    seq: i64,
    at_ms: i64,
    who: String,
    action: String,
    object: String,
    outcome: String,
    detail: String,
    hash: Vec<u8>,
}

impl Line {
    fn hash_after(&self, before: &Hash) -> Hash {
        let mut context = Context::new(&SHA256);
        context.update(DOMAIN);
        context.update(before);
        context.update(&self.seq.to_be_bytes());
        context.update(&self.at_ms.to_be_bytes());
        for text in [
            &self.who,
            &self.action,
            &self.object,
            &self.outcome,
            &self.detail,
        ] {
            // Texts are far shorter; one that is not has another hash than it should, which is all that matters here.
            let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
            context.update(&length.to_be_bytes());
            context.update(text.as_bytes());
        }
        let mut hash = [0; 32];
        hash.copy_from_slice(context.finish().as_ref());
        hash
    }
}

/// A line as the API shows it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct AuditRow {
    /// Its number, from 1 without a gap.
    pub(crate) seq: i64,
    /// When, milliseconds since 1970.
    at_ms: i64,
    /// `user NAME`, `device SITE/NAME`, `address …` or `coordinator`.
    who: String,
    /// What.
    action: String,
    /// To what.
    object: String,
    /// `done`, `failed` or `refused`.
    outcome: String,
    /// More about it.
    detail: String,
    /// SHA-256 over it and the hash of the line before.
    hash: String,
}

/// The last line: how many there are, and its hash. As a text, `COUNT:HASH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    seq: i64,
    hash: Hash,
}

impl Head {
    const NONE: Self = Self {
        seq: 0,
        hash: [0; 32],
    };
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.seq, Digest(self.hash))
    }
}

impl std::str::FromStr for Head {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "is COUNT:HASH, as `audit verify` prints it".to_owned();
        let (seq, hash) = text.split_once(':').ok_or_else(wrong)?;
        let seq = seq.parse().ok().filter(|seq| *seq >= 0).ok_or_else(wrong)?;
        let Digest(hash) = hash.parse().map_err(|_| wrong())?;
        Ok(Self { seq, hash })
    }
}

/// Where the chain does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    #[error("line {found} stands where line {expected} should: one was removed or put in")]
    Order { expected: i64, found: i64 },
    #[error("line {0} is not what was written: it or a line before it was changed")]
    Hash(i64),
    #[error("there are {is} lines and there were {was}: the end was cut off")]
    Short { was: i64, is: i64 },
    #[error("line {0} has another hash than was remembered: the lines up to it were written anew")]
    Head(i64),
}

fn short(text: &str, most: usize) -> String {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

async fn last(tx: &mut Transaction<'_, Sqlite>) -> Result<Head, RecordError> {
    let row: Option<(i64, Vec<u8>)> =
        sqlx::query_as("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")
            .fetch_optional(&mut **tx)
            .await
            .map_err(RecordError::sql("read the end of the audit log"))?;
    head_of(row)
}

fn head_of(row: Option<(i64, Vec<u8>)>) -> Result<Head, RecordError> {
    let Some((seq, hash)) = row else {
        return Ok(Head::NONE);
    };
    let hash = hash.try_into().map_err(|_| RecordError::Content {
        operation: "read the end of the audit log",
        detail: format!("line {seq} has no hash of 32 bytes"),
    })?;
    Ok(Head { seq, hash })
}

/// Adds a line within a transaction: what it tells of is done with it or not at all.
pub(crate) async fn append(
    tx: &mut Transaction<'_, Sqlite>,
    entry: Entry<'_>,
    now_ms: i64,
) -> Result<(), RecordError> {
    let head = last(tx).await?;
    let mut line = Line {
        seq: head.seq + 1,
        at_ms: now_ms,
        who: short(entry.who, MAX_SHORT),
        action: short(entry.action, MAX_SHORT),
        object: short(entry.object, MAX_OBJECT),
        outcome: entry.outcome.as_str().to_owned(),
        detail: short(entry.detail, MAX_DETAIL),
        hash: Vec::new(),
    };
    line.hash = line.hash_after(&head.hash).to_vec();
    sqlx::query(
        "INSERT INTO audit (seq, at_ms, who, action, object, outcome, detail, hash) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(line.seq)
    .bind(line.at_ms)
    .bind(line.who)
    .bind(line.action)
    .bind(line.object)
    .bind(line.outcome)
    .bind(line.detail)
    .bind(line.hash)
    .execute(&mut **tx)
    .await
    .map_err(RecordError::sql("write the audit log"))?;
    Ok(())
}

/// Adds a line.
pub(crate) async fn note(
    records: &Records,
    entry: Entry<'_>,
    now_ms: i64,
) -> Result<(), RecordError> {
    let mut writer = records.writer().await;
    let mut tx = writer.begin().await?;
    append(&mut tx, entry, now_ms).await?;
    commit(tx).await
}

/// The last line.
pub(crate) async fn head(records: &Records) -> Result<Head, RecordError> {
    let row = sqlx::query_as("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")
        .fetch_optional(records.readers())
        .await
        .map_err(RecordError::sql("read the end of the audit log"))?;
    head_of(row)
}

/// The newest lines before the line `before`, the newest first.
pub(crate) async fn page(
    records: &Records,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<AuditRow>, RecordError> {
    let lines: Vec<Line> =
        sqlx::query_as("SELECT * FROM audit WHERE seq < ? ORDER BY seq DESC LIMIT ?")
            .bind(before.unwrap_or(i64::MAX))
            .bind(limit)
            .fetch_all(records.readers())
            .await
            .map_err(RecordError::sql("read the audit log"))?;
    let row = |line: Line| AuditRow {
        hash: Digest(line.hash.try_into().unwrap_or_default()).to_string(),
        seq: line.seq,
        at_ms: line.at_ms,
        who: line.who,
        action: line.action,
        object: line.object,
        outcome: line.outcome,
        detail: line.detail,
    };
    Ok(lines.into_iter().map(row).collect())
}

/// Goes through the whole chain, and holds it against a head that somebody remembers. Says where it ends.
pub(crate) async fn verify(
    records: &Records,
    remembered: Option<&Head>,
) -> Result<Result<Head, Broken>, RecordError> {
    // From the lowest number there is: also a line before the first is one too many.
    let (mut head, mut after) = (Head::NONE, i64::MIN);
    loop {
        let lines: Vec<Line> =
            sqlx::query_as("SELECT * FROM audit WHERE seq > ? ORDER BY seq LIMIT ?")
                .bind(after)
                .bind(AT_ONCE)
                .fetch_all(records.readers())
                .await
                .map_err(RecordError::sql("read the audit log"))?;
        if lines.is_empty() {
            break;
        }
        for line in lines {
            let (expected, found) = (head.seq + 1, line.seq);
            if found != expected {
                return Ok(Err(Broken::Order { expected, found }));
            }
            let hash = line.hash_after(&head.hash);
            if hash[..] != line.hash[..] {
                return Ok(Err(Broken::Hash(found)));
            }
            (head, after) = (Head { seq: found, hash }, found);
            if remembered.is_some_and(|known| known.seq == found && known.hash != hash) {
                return Ok(Err(Broken::Head(found)));
            }
        }
    }
    match remembered {
        Some(known) if known.seq > head.seq => Ok(Err(Broken::Short {
            was: known.seq,
            is: head.seq,
        })),
        _ => Ok(Ok(head)),
    }
}

#[cfg(test)]
#[path = "audit_tests.rs"]
mod tests;

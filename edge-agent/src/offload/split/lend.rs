//! Runs parts of a model for a neighbour that leads.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use libp2p::futures::{AsyncRead, AsyncReadExt, AsyncWrite};
use mesh_core::{Digest, offload::serve::Refusal, roster::Peer};
use models::{Part, Span};
use tokio::time::{Instant, timeout};

use super::{
    super::{
        serve::slow,
        wire::WireError,
        work::{Output, Work, Worker, left_ms},
    },
    Source, kind, open, part,
    wire::{self, Question, Reply},
};
use crate::agent;

/// Who opens a stream and does not ask, or does not take the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Values that are taken to see how long the way is, at most: 256 KiB.
pub(super) const WEIGHED: u32 = 64 * 1024;
/// Deadlines beyond it are cut.
const MAX_DEADLINE_MS: u32 = 10_000;
/// Parts that are held at a time: that of the plan in use, and that of the next.
const HELD: usize = 2;
/// A part that a neighbour has used within this time is not given away for another one's: longer than any leader waits for
/// its next plan.
const IN_USE: Duration = Duration::from_secs(60);

/// A part that is ready.
struct Held {
    span: Span,
    part: Arc<Part>,
    expected_ms: f64,
    /// Who had it loaded or run, and when last.
    users: BTreeMap<Peer, Instant>,
}

impl Held {
    fn used(&mut self, by: Peer) {
        let now = Instant::now();
        self.users.retain(|_, at| now.duration_since(*at) < IN_USE);
        self.users.insert(by, now);
    }

    /// Does anybody else need it?
    fn is_needed_beside(&self, by: &Peer) -> bool {
        let now = Instant::now();
        let needs = |(peer, at): (&Peer, &Instant)| peer != by && now.duration_since(*at) < IN_USE;
        self.users.iter().any(needs)
    }
}

/// Answers neighbours that lead.
pub(crate) struct Lender {
    worker: Arc<Worker>,
    folder: PathBuf,
    room: u64,
    source: OnceLock<Source>,
    /// The one that was used last is the last.
    held: Mutex<Vec<Held>>,
    /// One part is loaded at a time.
    loading: tokio::sync::Mutex<()>,
}

impl Lender {
    /// Begins to read the bundle.
    ///
    /// # Errors
    /// In words, if there is no thread to be had.
    pub(crate) fn start(
        worker: Arc<Worker>,
        folder: PathBuf,
        room: u64,
    ) -> Result<Arc<Self>, String> {
        let lender = Arc::new(Self {
            worker,
            folder,
            room,
            source: OnceLock::new(),
            held: Mutex::default(),
            loading: tokio::sync::Mutex::default(),
        });
        let reads = Arc::clone(&lender);
        let run = move || match open(&reads.folder) {
            Ok(source) => {
                tracing::info!(
                    model = source.manifest.id(),
                    speed = source.speed,
                    "parts of a model are run for neighbours"
                );
                let _ = reads.source.set(source);
            }
            Err(why) => tracing::error!(
                "no part of {} is run for neighbours: {why}",
                reads.folder.display()
            ),
        };
        agent::thread("offload-load", run).map_err(|error| error.to_string())?;
        Ok(lender)
    }

    /// Serves one stream to its end.
    pub(crate) async fn serve(
        self: Arc<Self>,
        peer: Peer,
        stream: impl AsyncRead + AsyncWrite + Unpin,
    ) {
        let (mut from, mut to) = stream.split();
        let answered = async {
            let question = timeout(PATIENCE, wire::question(&mut from)).await;
            let said = match question.map_err(|_| slow())?? {
                Question::Lend { model } => self.lend(&model),
                Question::Load { model, span } => self.load(peer, model, span).await,
                Question::Weigh { values } if values <= WEIGHED => {
                    let taken = timeout(PATIENCE, wire::values(&mut from, values)).await;
                    taken.map_err(|_| slow())??;
                    let counts = Vec::new();
                    Ok((Reply::Values { counts, us: 0 }, Vec::new()))
                }
                Question::Weigh { .. } => Err(Refusal::Full),
                Question::Run {
                    model,
                    span,
                    deadline_ms,
                    values,
                } => {
                    let asked = (peer, model, &span);
                    self.run(&mut from, asked, deadline_ms, values).await
                }
            };
            let (reply, outputs) = said.unwrap_or_else(|why| (Reply::Refused(why), Vec::new()));
            let numbers = &self.worker.counters.offload;
            match &reply {
                // Where the way was weighed nothing comes back.
                Reply::Values { counts, .. } if counts.is_empty() => {}
                Reply::Values { .. } => numbers.parts.add(1),
                Reply::Refused(_) => numbers.turned_away.add(1),
                Reply::Lent { .. } | Reply::Loaded => {}
            }
            let said = timeout(PATIENCE, wire::reply(&mut to, &reply, &outputs)).await;
            said.map_err(|_| slow())?
        };
        let answered: Result<(), WireError> = answered.await;
        if let Err(error) = answered {
            tracing::debug!("a neighbour's question about a part came to nothing: {error}");
        }
    }

    /// What is read of the bundle, if it is this model's.
    fn source(&self, model: &Digest) -> Result<&Source, Refusal> {
        let source = self.source.get();
        source
            .filter(|source| source.digest == *model)
            .ok_or(Refusal::NoSuchModel)
    }

    fn lend(&self, model: &Digest) -> Result<(Reply, Vec<Vec<f32>>), Refusal> {
        let source = self.source(model)?;
        let lent = Reply::Lent {
            speed: source.speed,
            room: self.room,
            share: self.worker.share.into(),
        };
        Ok((lent, Vec::new()))
    }

    /// The part, if it is ready.
    fn held(&self, span: &Span, by: Peer) -> Option<(Arc<Part>, f64)> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let at = held.iter().position(|held| held.span == *span)?;
        let mut found = held.remove(at);
        found.used(by);
        let is = (Arc::clone(&found.part), found.expected_ms);
        held.push(found);
        Some(is)
    }

    async fn load(
        self: &Arc<Self>,
        peer: Peer,
        model: Digest,
        span: Span,
    ) -> Result<(Reply, Vec<Vec<f32>>), Refusal> {
        let loaded = Ok((Reply::Loaded, Vec::new()));
        let source = self.source(&model)?;
        let (from, to) = source.steps.bounds(&span).ok_or(Refusal::NoSuchModel)?;
        let steps = source.steps.0.get(from..to).unwrap_or_default();
        if steps.iter().map(|step| step.weights).sum::<u64>() > self.room {
            return Err(Refusal::Full);
        }
        let operations: u64 = steps.iter().map(|step| step.operations).sum();
        let expected_ms = operations as f64 / source.speed / 1e3;
        let _one = self.loading.lock().await;
        if self.held(&span, peer).is_some() {
            return loaded;
        }
        // First there is memory, then the part.
        let (this, folder, wanted) = (Arc::clone(self), self.folder.clone(), span.clone());
        let read = move || {
            this.make_way(&peer)?;
            part(&folder, &model, &wanted).map_err(|why| {
                tracing::warn!("a part for a neighbour: {why}");
                Refusal::Failed
            })
        };
        let part = Arc::new(self.worker.prepare(read).await??);
        let mut new = Held {
            span,
            part,
            expected_ms,
            users: BTreeMap::new(),
        };
        new.used(peer);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.push(new);
        loaded
    }

    /// Lets go of parts that nobody else needs until there is a place for one more.
    fn make_way(&self, peer: &Peer) -> Result<(), Refusal> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while held.len() >= HELD {
            let free = held.iter().position(|held| !held.is_needed_beside(peer));
            held.remove(free.ok_or(Refusal::Full)?);
        }
        Ok(())
    }

    async fn run(
        &self,
        from: &mut (impl AsyncRead + Unpin),
        (peer, model, span): (Peer, Digest, &Span),
        deadline_ms: u32,
        count: u32,
    ) -> Result<(Reply, Vec<Vec<f32>>), Refusal> {
        let deadline_ms = deadline_ms.min(MAX_DEADLINE_MS);
        let until = Instant::now() + Duration::from_millis(deadline_ms.into());
        self.source(&model)?;
        let (part, expected_ms) = self.held(span, peer).ok_or(Refusal::NoSuchModel)?;
        if usize::try_from(count).ok() != Some(part.takes()) {
            return Err(Refusal::BadPicture);
        }
        let kind = kind(&model, span);
        let cost_ms = self.worker.cost(&kind, expected_ms);
        self.worker.may(cost_ms, deadline_ms)?;
        let values = tokio::time::timeout_at(until, wire::values(from, count)).await;
        let values = values
            .map_err(|_| Refusal::TooLate)?
            .map_err(|_| Refusal::BadPicture)?;
        if left_ms(until) == 0 {
            return Err(Refusal::TooLate);
        }
        let begin = Instant::now();
        let Output::Values(outputs) = self
            .worker
            .run(kind, cost_ms, until, Work::Part { part, values })
            .await?
        else {
            return Err(Refusal::Failed);
        };
        let us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        let counts = outputs
            .iter()
            .map(|output| u32::try_from(output.len()).unwrap_or(u32::MAX));
        Ok((
            Reply::Values {
                counts: counts.collect(),
                us,
            },
            outputs,
        ))
    }
}

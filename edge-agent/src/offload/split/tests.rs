//! A leader and its lenders, honest and others, at the ends of pipes.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use mesh_core::{
    Digest, Name,
    neighbours::Presence,
    offload::{Answer, serve::Refusal},
    roster::Peer,
};
use models::{Bundle, Engine};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::{
    compat::{Compat, TokioAsyncReadCompatExt},
    sync::CancellationToken,
};

use super::{super::OffloadConfig, *};
use crate::{
    counters::Counters,
    mesh::{Neighbour, Present},
    offload::{Pressure, courier::Roads, offer_of, work::Worker},
};

/// Whatever should happen, happens within this on a busy machine.
const BOUND: Duration = Duration::from_secs(60);

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../models/bundles")
        .join(name)
}

/// What is at the end of a way.
#[derive(Clone)]
enum Other {
    Lender(Arc<Lender>),
    /// Lends, loads, and then does this when it is to run its part.
    Hostile(Hostile),
    Gone,
}

#[derive(Clone, Copy, Debug)]
enum Hostile {
    NeverAnswers,
    HangsUp,
    Garbage,
    NoNumbers,
    TooFew,
    TooMany,
    Refuses,
}

impl Hostile {
    async fn serve(self, mut stream: DuplexStream) {
        let mut head = [0; 2];
        if stream.read_exact(&mut head).await.is_err() {
            return;
        }
        let mut json = vec![0; usize::from(u16::from_be_bytes(head))];
        if stream.read_exact(&mut json).await.is_err() {
            return;
        }
        let values = |n: u32, value: f32| {
            let counts = vec![n];
            let tail: Vec<u8> = (0..n).flat_map(|_| value.to_le_bytes()).collect();
            (wire::Reply::Values { counts, us: 5 }, tail)
        };
        let question: wire::Question = serde_json::from_slice(&json).unwrap();
        let (reply, tail) = match (question, self) {
            (wire::Question::Lend { .. }, _) => {
                // Faster than anybody.
                let (speed, room, share) = (1e9, u64::MAX, 1.0);
                (wire::Reply::Lent { speed, room, share }, Vec::new())
            }
            (wire::Question::Load { .. }, _) => (wire::Reply::Loaded, Vec::new()),
            (wire::Question::Weigh { values }, _) => {
                let mut taken = vec![0; values as usize * 4];
                let _ = stream.read_exact(&mut taken).await;
                let counts = Vec::new();
                (wire::Reply::Values { counts, us: 0 }, Vec::new())
            }
            (_, Self::NeverAnswers) => return sleep(BOUND).await,
            (_, Self::HangsUp) => return,
            (_, Self::Garbage) => {
                let _ = stream.write_all(&[0x7b; 1_000]).await;
                return;
            }
            (_, Self::NoNumbers) => values(6, f32::NAN),
            (_, Self::TooFew) => values(1, 0.5),
            (_, Self::TooMany) => {
                let counts = vec![u32::MAX; 2];
                (wire::Reply::Values { counts, us: 5 }, vec![0; 100_000])
            }
            (_, Self::Refuses) => {
                let why = mesh_core::offload::serve::Refusal::Busy;
                (wire::Reply::Refused(why), Vec::new())
            }
        };
        let json = serde_json::to_vec(&reply).unwrap();
        let mut bytes = u16::try_from(json.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(json);
        bytes.extend(tail);
        let _ = stream.write_all(&bytes).await;
    }
}

/// Ways to lenders.
#[derive(Clone, Default)]
struct Yard(Arc<Mutex<BTreeMap<Peer, Other>>>);

impl Roads for Yard {
    type Stream = Compat<DuplexStream>;

    async fn open(&self, peer: Peer, protocol: &'static str) -> Result<Self::Stream, String> {
        assert_eq!(protocol, PART);
        let other = self.0.lock().unwrap().get(&peer).cloned();
        let (ours, theirs) = duplex(16 * 1024);
        match other {
            Some(Other::Lender(lender)) => {
                tokio::spawn(lender.serve(peer, theirs.compat()));
            }
            Some(Other::Hostile(how)) => {
                tokio::spawn(how.serve(theirs));
            }
            Some(Other::Gone) | None => return Err("nobody".into()),
        }
        Ok(ours.compat())
    }

    fn name(&self, _: &Peer) -> Option<Name> {
        None
    }
}

fn worker() -> (Arc<Worker>, Counters) {
    worker_with(0.9, Pressure::default())
}

fn worker_with(time_share: f32, pressure: Pressure) -> (Arc<Worker>, Counters) {
    let config = OffloadConfig {
        time_share,
        ..OffloadConfig::default()
    };
    let counters = Counters::default();
    let worker = Worker::start(&config, pressure, counters.clone()).unwrap();
    (worker, counters)
}

fn peer(n: u8) -> Peer {
    Digest([n; 32])
}

/// A leader of the steel model, and what it should say about a picture.
struct Stage {
    yard: Yard,
    leader: Arc<Leader<Yard>>,
    worker: Arc<Worker>,
    counters: Counters,
    picture: Arc<[u8]>,
    wanted: Answer,
    present: watch::Sender<Present>,
    _stop: tokio_util::sync::DropGuard,
}

impl Stage {
    fn start(room: u64) -> Self {
        let engine = Engine::load(&Bundle::open(&folder("steel")).unwrap()).unwrap();
        let picture = std::fs::read(folder("steel").join("golden/2.png")).unwrap();
        let input = engine.tensor_from_bytes(&picture).unwrap();
        let outcome = engine.run(&input).unwrap();
        let yard = Yard::default();
        let terms = Terms { room, share: 0.9 };
        let (leader, planner) = Leader::new(folder("steel"), terms, yard.clone());
        let (tell, present) = watch::channel(Present::default());
        let stop = CancellationToken::new();
        tokio::spawn(planner.run(present, stop.clone()));
        let (worker, counters) = worker();
        Self {
            yard,
            leader,
            worker,
            counters,
            picture: picture.into(),
            wanted: crate::offload::work::answer(engine.id(), outcome),
            present: tell,
            _stop: stop.drop_guard(),
        }
    }

    fn set(&self, n: u8, other: Other) {
        let mut yard = self.yard.0.lock().unwrap();
        yard.insert(peer(n), other);
        let neighbour = |&peer: &Peer| Neighbour {
            peer,
            presence: Presence {
                answers: true,
                ..Presence::default()
            },
        };
        self.present
            .send_replace(yard.keys().map(neighbour).collect());
    }

    fn lender(&self, n: u8, room: u64) -> Counters {
        self.busy_lender(n, room, Pressure::default())
    }

    fn busy_lender(&self, n: u8, room: u64, pressure: Pressure) -> Counters {
        let (worker, counters) = worker_with(0.9, pressure);
        let lender = Lender::start(worker, folder("steel"), room).unwrap();
        self.set(n, Other::Lender(lender));
        counters
    }

    /// An answer, tried until there is one.
    async fn look(&self) -> Answer {
        let begin = Instant::now();
        loop {
            let until = Instant::now() + Duration::from_secs(9);
            let looked = self
                .leader
                .look(&self.worker, Arc::clone(&self.picture), until)
                .await;
            match looked {
                Ok(answer) => return answer,
                Err(why) => {
                    assert!(begin.elapsed() < BOUND, "never: {}", why.as_str());
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn is_right(&self) {
        let answer = self.look().await;
        assert_eq!(answer.label, self.wanted.label);
        assert_eq!(answer.model, self.wanted.model);
        assert!(
            (answer.score - self.wanted.score).abs() < 1e-3,
            "{answer:?}"
        );
        assert!(
            (answer.margin - self.wanted.margin).abs() < 1e-3,
            "{answer:?}"
        );
    }

    async fn until(&self, what: impl Fn() -> bool) {
        let begin = Instant::now();
        while !what() {
            assert!(begin.elapsed() < BOUND, "never");
            self.is_right().await;
        }
    }
}

/// More than the largest step, less than half of the model.
fn a_third() -> u64 {
    let source = open(&folder("steel")).unwrap();
    assert!(source.speed > 0.0);
    let weights: Vec<u64> = source.steps.0.iter().map(|step| step.weights).collect();
    let (total, largest) = (weights.iter().sum::<u64>(), weights.iter().max().unwrap());
    println!("weights of the steps: {weights:?}");
    let room = (total * 2 / 5).max(largest + 1);
    assert!(room * 2 < total * 2 - 1);
    room
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_device_has_room_for_runs_on_all_of_them() {
    let room = a_third();
    let stage = Stage::start(room);
    assert!(stage.leader.offer().is_none());
    let first = stage.lender(1, room);
    sleep(Duration::from_millis(100)).await;
    let second = stage.lender(2, room);
    let third = stage.lender(3, room);
    stage.is_right().await;
    let parts = || [&first, &second, &third].map(|counters| counters.offload.parts.get());
    assert!(
        parts().iter().filter(|&&count| count > 0).count() >= 1,
        "{:?}",
        parts()
    );
    let offer = stage.leader.offer().unwrap();
    let bundle = Bundle::open(&folder("steel")).unwrap();
    assert_eq!(Some(offer), offer_of(&bundle.manifest));
    // One that is in use goes away between two frames, without a word; the frame gets through all the same.
    let before = parts();
    for _ in 0..5 {
        stage.is_right().await;
    }
    let used = (0..3).find(|&n| parts()[n] > before[n]).unwrap();
    stage
        .yard
        .0
        .lock()
        .unwrap()
        .insert(peer(u8::try_from(used).unwrap() + 1), Other::Gone);
    stage.is_right().await;
    assert!(stage.counters.offload.replaced.get() >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn alone_it_runs_as_a_whole_where_there_is_room() {
    let stage = Stage::start(u64::MAX);
    stage.is_right().await;
    assert_eq!(stage.counters.offload.replaced.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_lender_does_the_answer_is_right() {
    use Hostile::*;
    for how in [
        NeverAnswers,
        HangsUp,
        Garbage,
        NoNumbers,
        TooFew,
        TooMany,
        Refuses,
    ] {
        // The leader has no room for all of it, and an honest lender is there, too.
        let stage = Stage::start(a_third());
        stage.set(1, Other::Hostile(how));
        stage.lender(2, u64::MAX);
        // It lends at the speed of light: it is asked.
        stage
            .until(|| stage.counters.offload.replaced.get() > 0)
            .await;
        stage.is_right().await;
        println!("{how:?}: {:?}", stage.counters.offload);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_something_else_to_do_for_a_moment_is_not_given_up() {
    let stage = Stage::start(a_third());
    let pressure = Pressure::default();
    let counters = stage.busy_lender(1, u64::MAX, pressure.clone());
    stage.is_right().await;
    let parts = counters.offload.parts.get();
    assert!(parts > 0);
    // It has frames of its own, for less than a leader waits.
    pressure.set_behind(true);
    let free = async {
        while counters.offload.turned_away.get() == 0 {
            sleep(Duration::from_millis(5)).await;
        }
        sleep(Duration::from_millis(200)).await;
        pressure.set_behind(false);
    };
    let until = Instant::now() + Duration::from_secs(30);
    let looked = stage
        .leader
        .look(&stage.worker, Arc::clone(&stage.picture), until);
    let (looked, ()) = tokio::join!(looked, free);
    assert_eq!(looked.unwrap().label, stage.wanted.label);
    assert!(counters.offload.parts.get() > parts, "by the same one");
    assert_eq!(stage.counters.offload.replaced.get(), 0);
    // A frame that has no time left says why, and that is all.
    pressure.set_behind(true);
    let until = Instant::now() + Duration::from_millis(400);
    let looked = stage
        .leader
        .look(&stage.worker, Arc::clone(&stage.picture), until)
        .await;
    assert!(looked.is_err());
    assert_eq!(stage.counters.offload.replaced.get(), 0);
    pressure.set_behind(false);
    stage.is_right().await;
    assert_eq!(stage.counters.offload.replaced.get(), 0);
}

/// Asks a lender as one of its neighbours.
async fn asked(
    lender: &Arc<Lender>,
    by: u8,
    question: wire::Question,
    values: &[f32],
) -> wire::Reply {
    let (ours, theirs) = duplex(16 * 1024);
    tokio::spawn(Arc::clone(lender).serve(peer(by), theirs.compat()));
    wire::ask(ours.compat(), &question, values).await.unwrap().0
}

/// A lender of the steel model that has read it, and what there is of it.
async fn ready(share: f32) -> (Arc<Lender>, Source) {
    let (worker, _) = worker_with(share, Pressure::default());
    let lender = Lender::start(worker, folder("steel"), u64::MAX).unwrap();
    let source = open(&folder("steel")).unwrap();
    let model = source.digest;
    let begin = Instant::now();
    while !matches!(
        asked(&lender, 1, wire::Question::Lend { model }, &[]).await,
        wire::Reply::Lent { .. }
    ) {
        assert!(begin.elapsed() < BOUND);
        sleep(Duration::from_millis(20)).await;
    }
    (lender, source)
}

/// Until it has loaded so many steps for somebody.
async fn loads(lender: &Arc<Lender>, by: u8, source: &Source, steps: usize) {
    let begin = Instant::now();
    loop {
        let load = wire::Question::Load {
            model: source.digest,
            span: source.steps.span(0, steps).unwrap(),
        };
        match asked(lender, by, load, &[]).await {
            wire::Reply::Loaded => return,
            wire::Reply::Refused(Refusal::ShareUsed) => sleep(Duration::from_millis(20)).await,
            other => panic!("{other:?}"),
        }
        assert!(begin.elapsed() < BOUND, "never");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn loading_parts_is_of_the_share_of_time() {
    let (lender, source) = ready(0.01).await;
    let begin = Instant::now();
    let mut loaded = 0;
    let refused = loop {
        let load = wire::Question::Load {
            model: source.digest,
            span: source.steps.span(0, 1 + loaded % 3).unwrap(),
        };
        match asked(&lender, 1, load, &[]).await {
            wire::Reply::Loaded => loaded += 1,
            // What was saved up since its start is not much.
            wire::Reply::Refused(why) if loaded == 0 => {
                assert_eq!(why, Refusal::ShareUsed);
                sleep(Duration::from_millis(20)).await;
            }
            wire::Reply::Refused(why) => break why,
            other => panic!("{other:?}"),
        }
        assert!(loaded < 50 && begin.elapsed() < BOUND, "without end");
    };
    assert_eq!(refused, Refusal::ShareUsed);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_has_another_ones_part_put_away() {
    let (lender, source) = ready(0.9).await;
    loads(&lender, 1, &source, 1).await;
    for steps in [2, 3, 2, 3] {
        loads(&lender, 2, &source, steps).await;
    }
    let run = |steps| wire::Question::Run {
        model: source.digest,
        span: source.steps.span(0, steps).unwrap(),
        deadline_ms: 5_000,
        values: 3,
    };
    // It is there, and takes more values than that.
    let refused = asked(&lender, 1, run(1), &[1.0; 3]).await;
    assert_eq!(refused, wire::Reply::Refused(Refusal::BadPicture));
    let gone = asked(&lender, 2, run(2), &[1.0; 3]).await;
    assert_eq!(gone, wire::Reply::Refused(Refusal::NoSuchModel));
    // A third one waits until one of them does without.
    let load = wire::Question::Load {
        model: source.digest,
        span: source.steps.span(1, 2).unwrap(),
    };
    loop {
        match asked(&lender, 3, load.clone(), &[]).await {
            wire::Reply::Refused(Refusal::ShareUsed) => sleep(Duration::from_millis(20)).await,
            other => break assert_eq!(other, wire::Reply::Refused(Refusal::Full)),
        }
    }
}

#[tokio::test]
async fn a_lender_gives_only_what_it_lends() {
    let (worker, counters) = worker();
    let lender = Lender::start(worker, folder("steel"), 1).unwrap();
    let source = open(&folder("steel")).unwrap();
    let ask = async |question: wire::Question, values: &[f32]| {
        let (ours, theirs) = duplex(16 * 1024);
        tokio::spawn(Arc::clone(&lender).serve(peer(1), theirs.compat()));
        wire::ask(ours.compat(), &question, values).await.unwrap().0
    };
    let model = source.digest;
    let begin = Instant::now();
    while !matches!(
        ask(wire::Question::Lend { model }, &[]).await,
        wire::Reply::Lent { room: 1, .. }
    ) {
        assert!(begin.elapsed() < BOUND);
        sleep(Duration::from_millis(20)).await;
    }
    let span = source.steps.span(0, 1).unwrap();
    let refused = |reply: wire::Reply| matches!(reply, wire::Reply::Refused(_));
    let other = Digest([7; 32]);
    assert!(refused(
        ask(wire::Question::Lend { model: other }, &[]).await
    ));
    let load = |model, span| wire::Question::Load { model, span };
    assert!(refused(ask(load(other, span.clone()), &[]).await));
    assert!(
        refused(ask(load(model, span.clone()), &[]).await),
        "no room"
    );
    let mut unknown = span.clone();
    unknown.to.as_mut().unwrap().value = "nothing".into();
    assert!(refused(ask(load(model, unknown), &[]).await));
    let run = wire::Question::Run {
        model,
        span,
        deadline_ms: 1_000,
        values: 3,
    };
    assert!(refused(ask(run, &[1.0; 3]).await), "it was never loaded");
    // Refused before any of it is taken.
    let values = lend::WEIGHED + 1;
    assert!(refused(ask(wire::Question::Weigh { values }, &[]).await));
    assert!(counters.offload.turned_away.get() >= 6);
}

//! A whole cascade in one process: a pipeline, its courier, and servers, honest and others, at the ends of pipes.

mod askers;
mod far;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use mesh_core::{
    Digest, Name, decide::Publish, neighbours::Presence, offload::Offer, roster::Peer,
};
use models::{Bundle, Engine, Picture};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_util::{
    compat::{Compat, TokioAsyncReadCompatExt},
    sync::CancellationToken,
};

use super::{
    courier::Roads,
    wire::{Question, Reply},
    *,
};
use crate::{
    board::BoardHandle,
    capture::Frame,
    counters::Counters,
    gate::GateConfig,
    mesh::{Neighbour, Present},
    pipeline::Pipeline,
    store::{Command, Draft},
    update::Engines,
};

/// Whatever should happen, happens within this on a busy machine.
const BOUND: Duration = Duration::from_secs(60);
const BOX: Peer = Digest([9; 32]);

fn bundle(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../models/bundles")
        .join(name)
}

fn engine(name: &str) -> Arc<Engine> {
    Arc::new(Engine::load(&Bundle::open(&bundle(name)).unwrap()).unwrap())
}

/// A picture that a program has drawn.
fn drawn(number: usize) -> Vec<u8> {
    std::fs::read(bundle("steel").join(format!("golden/{number}.png"))).unwrap()
}

/// What is at the other end of each stream.
#[derive(Clone)]
enum Other {
    Server(Arc<Server<Alone>>),
    /// Offers a good model, and then does not keep to anything.
    Hostile(Hostile, Offer),
}

#[derive(Clone, Copy, Debug)]
enum Hostile {
    NeverAnswers,
    HangsUp,
    Garbage,
    EndlessLength,
    UnknownLabel,
    NoNumber,
    Offers,
    Slowly,
}

impl Hostile {
    /// The bytes of its answer, if it comes to one.
    fn says(self, offer: &Offer) -> Vec<u8> {
        let answer = |label: &str, score: &str| {
            format!(
                r#"{{"answer":{{"model":"m@1","label":"{label}","score":{score},"margin":0.5}}}}"#
            )
        };
        let json = match self {
            Self::Garbage => "{{{{".to_owned(),
            Self::UnknownLabel => answer("a label that nobody knows", "0.9"),
            Self::NoNumber => answer("patches", "7.5"),
            Self::Offers => serde_json::to_string(&Reply::Offers(vec![offer.clone(); 9])).unwrap(),
            Self::EndlessLength => return vec![0xff; 100_000],
            _ => answer("patches", "0.9"),
        };
        let mut bytes = u16::try_from(json.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(json.into_bytes());
        bytes
    }

    async fn serve(self, mut stream: DuplexStream, offer: Offer) {
        let mut head = [0; 2];
        if stream.read_exact(&mut head).await.is_err() {
            return;
        }
        let mut json = vec![0; usize::from(u16::from_be_bytes(head))];
        if stream.read_exact(&mut json).await.is_err() {
            return;
        }
        if serde_json::from_slice::<Question>(&json).unwrap() == Question::Offers {
            let json = serde_json::to_vec(&Reply::Offers(vec![offer])).unwrap();
            let mut bytes = u16::try_from(json.len()).unwrap().to_be_bytes().to_vec();
            bytes.extend(json);
            let _ = stream.write_all(&bytes).await;
            return;
        }
        match self {
            Self::NeverAnswers => sleep(BOUND).await,
            Self::HangsUp => {}
            Self::Slowly => {
                for byte in self.says(&offer) {
                    let _ = stream.write_all(&[byte]).await;
                    sleep(Duration::from_millis(100)).await;
                }
            }
            _ => {
                let _ = stream.write_all(&self.says(&offer)).await;
            }
        }
    }
}

/// Whoever answers has nobody to ask.
#[derive(Clone)]
struct Alone;

impl Roads for Alone {
    type Stream = Compat<DuplexStream>;

    async fn open(&self, _: Peer, _: &'static str) -> Result<Self::Stream, String> {
        Err("nobody".into())
    }

    fn name(&self, _: &Peer) -> Option<Name> {
        None
    }
}

/// A room with one other device in it.
#[derive(Clone)]
struct Room(Other);

impl Roads for Room {
    type Stream = Compat<DuplexStream>;

    async fn open(&self, _: Peer, _: &'static str) -> Result<Self::Stream, String> {
        let (ours, theirs) = duplex(16 * 1024);
        match self.0.clone() {
            Other::Server(server) => {
                tokio::spawn(async move { server.serve(theirs.compat()).await });
            }
            Other::Hostile(how, offer) => {
                tokio::spawn(how.serve(theirs, offer));
            }
        }
        Ok(ours.compat())
    }

    fn name(&self, peer: &Peer) -> Option<Name> {
        (*peer == BOX).then(|| "box".parse().unwrap())
    }
}

fn server(config: &str, own: Option<&Arc<Engine>>) -> (Arc<Server<Alone>>, Pressure, Counters) {
    let config: OffloadConfig = toml::from_str(config).unwrap();
    let (pressure, counters) = (Pressure::default(), Counters::default());
    let engines = own.map(|engine| {
        let engines = Engines {
            active: Some(Arc::clone(engine)),
            ..Engines::default()
        };
        watch::channel(engines).1
    });
    let models = Models {
        own: engines,
        kept: config.serve.clone(),
        split: None,
    };
    let worker = Worker::start(&config, pressure.clone(), counters.clone()).unwrap();
    let server = Server::start(worker, models).unwrap();
    (Arc::new(server), pressure, counters)
}

fn big() -> String {
    format!("time_share = 0.9\nserve = {:?}", bundle("steel"))
}

/// A device with a pipeline, and what comes out of it.
struct Device {
    frames: Option<SyncSender<Frame>>,
    commands: mpsc::Receiver<Command>,
    counters: Counters,
    thread: JoinHandle<()>,
    number: u64,
    stop: CancellationToken,
    _present: watch::Sender<Present>,
    _engines: watch::Sender<Engines>,
}

impl Device {
    fn start(config: &str, model: &Arc<Engine>, room: Room) -> Self {
        let neighbour = Neighbour {
            peer: BOX,
            presence: Presence {
                answers: true,
                ..Presence::default()
            },
        };
        let nobody: Option<fn(watch::Receiver<Engines>) -> Arc<Coordinator>> = None;
        Self::start_with(config, model, room, vec![neighbour], nobody)
    }

    fn start_with(
        config: &str,
        model: &Arc<Engine>,
        roads: impl Roads,
        here: Vec<Neighbour>,
        coordinator: Option<impl FnOnce(watch::Receiver<Engines>) -> Arc<Coordinator>>,
    ) -> Self {
        let config: OffloadConfig = toml::from_str(config).unwrap();
        let counters = Counters::default();
        let (handoff, ends) = Handoff::new(&config, counters.clone());
        let engines = Engines {
            active: Some(Arc::clone(model)),
            ..Engines::default()
        };
        let (swap, engines) = watch::channel(engines);
        let (tell, present) = watch::channel(Present::from(here));
        let courier = Courier {
            roads,
            coordinator: coordinator.map(|make| make(engines.clone())),
            present,
            errands: ends.errands,
            returned: ends.returned,
            known: ends.known,
        };
        let stop = CancellationToken::new();
        tokio::spawn(courier.run(stop.clone()));
        let (to_store, commands) = mpsc::channel(256);
        let (to_pipeline, frames) = sync_channel(2);
        let lanes = ["cam0", "cam1"].map(|name| (name.parse().unwrap(), GateConfig::default()));
        let pipeline = Pipeline::new(
            lanes,
            Publish::All,
            None,
            engines,
            BoardHandle::default(),
            to_store,
            counters.clone(),
        )
        .with_offload(Some(handoff), Pressure::default());
        Self {
            frames: Some(to_pipeline),
            commands,
            counters,
            thread: std::thread::spawn(move || pipeline.run(&frames)),
            number: 0,
            stop,
            _present: tell,
            _engines: swap,
        }
    }

    /// Shows it a picture, by one of its two cameras.
    fn show(&mut self, source: usize, bytes: &[u8]) {
        let frame = Frame {
            source,
            number: self.number,
            ts: 0,
            picture: Picture::decode(bytes).unwrap(),
            original: Some(bytes.to_vec()),
            file: None,
            truth: None,
        };
        self.number += 1;
        self.frames.as_ref().unwrap().send(frame).unwrap();
    }

    async fn next(&mut self) -> Option<Draft> {
        match timeout(BOUND, self.commands.recv()).await.unwrap()? {
            Command::Append(draft) => Some(draft),
            other => panic!("{other:?}"),
        }
    }

    /// Shows pictures until one was answered by the neighbour.
    async fn until_answered(&mut self, bytes: &[u8]) -> Draft {
        let begin = tokio::time::Instant::now();
        loop {
            self.show(0, bytes);
            let draft = self.next().await.unwrap();
            if draft.answered.is_some() {
                return draft;
            }
            assert!(
                begin.elapsed() < BOUND,
                "never: {:?}",
                self.counters.offload
            );
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ends it; gives what came out last.
    async fn end(mut self) -> Vec<Draft> {
        self.frames = None;
        let mut rest = Vec::new();
        while let Some(draft) = self.next().await {
            rest.push(draft);
        }
        self.stop.cancel();
        self.thread.join().unwrap();
        rest
    }
}

const ALL: &str = "escalate = true\nshare = 1.0\nbelow = 1.0\n";

#[tokio::test(flavor = "multi_thread")]
async fn what_a_small_model_doubts_a_bigger_one_of_a_neighbour_looks_at() {
    let (small, large) = (engine("steel-small"), engine("steel"));
    let (server, pressure, served) = server(&big(), None);
    let room = Room(Other::Server(server));
    let mut device = Device::start(&format!("{ALL}deadline_ms = 9000"), &small, room);
    for number in 1..=6 {
        let bytes = drawn(number);
        let draft = device.until_answered(&bytes).await;
        let own = small.infer(&Picture::decode(&bytes).unwrap()).unwrap();
        let theirs = large.infer(&Picture::decode(&bytes).unwrap()).unwrap();
        assert_eq!(
            (&draft.label, draft.score),
            (&own.label, own.score),
            "its own, for samples"
        );
        let answered = draft.answered.unwrap();
        assert_eq!(answered.by.as_str(), "box");
        assert_eq!(answered.answer.label, theirs.label);
        assert!((answered.answer.score - theirs.score).abs() < 1e-4);
        assert_eq!(answered.answer.model, large.id());
    }
    assert!(served.offload.served.get() >= 6);
    // It has frames of its own now: others hear so at once, and help themselves.
    pressure.set_behind(true);
    let refused = device.counters.offload.refused.get();
    device.show(0, &drawn(1));
    assert!(device.next().await.unwrap().answered.is_none());
    assert_eq!(device.counters.offload.refused.get(), refused + 1);
    assert_eq!(device.counters.offload.late.get(), 0);
    assert!(device.end().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_neighbour_does_each_frame_has_an_answer_in_order() {
    use Hostile::*;
    let small = engine("steel-small");
    let offer = Offer {
        bytes: u64::MAX,
        digest: Digest([3; 32]),
        ..offer_of(small.manifest()).unwrap()
    };
    let hostile = [
        NeverAnswers,
        HangsUp,
        Garbage,
        EndlessLength,
        UnknownLabel,
        NoNumber,
        Offers,
        Slowly,
    ];
    for how in hostile {
        let room = Room(Other::Hostile(how, offer.clone()));
        let mut device = Device::start(&format!("{ALL}deadline_ms = 150"), &small, room);
        let picture = drawn(1);
        let own = small.infer(&Picture::decode(&picture).unwrap()).unwrap();
        let begin = tokio::time::Instant::now();
        // Until it is left alone for a while.
        while device.counters.offload.late.get() == 0 {
            device.show(0, &picture);
            let draft = device.next().await.unwrap();
            assert_eq!(
                (draft.label, draft.answered),
                (own.label.clone(), None),
                "{how:?}"
            );
            assert!(begin.elapsed() < BOUND, "{how:?} was never asked");
            sleep(Duration::from_millis(20)).await;
        }
        // Many at once, from two cameras, that wait for each other.
        for n in 0..30 {
            device.show(n % 2, &picture);
        }
        let (asked, first) = (device.counters.offload.asked.get(), device.number - 30);
        let mut seen = device.end().await;
        assert_eq!(seen.len(), 30, "{how:?}");
        assert!(
            seen.iter()
                .all(|draft| draft.label == own.label && draft.answered.is_none())
        );
        seen.sort_by_key(|draft| draft.source.clone());
        let numbers: Vec<u64> = seen.iter().map(|draft| draft.frame - first).collect();
        let wanted: Vec<u64> = (0..30).step_by(2).chain((1..30).step_by(2)).collect();
        assert_eq!(numbers, wanted, "{how:?}: each camera's in its order");
        assert!(asked <= 12, "{how:?}: asked {asked} times");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_cannot_keep_up_is_relieved_by_one_with_the_same_model() {
    let model = engine("steel-small");
    let (server, _, served) = server("answer = true\ntime_share = 0.9", Some(&model));
    let room = Room(Other::Server(server));
    let mut device = Device::start("spill = true\ndeadline_ms = 9000", &model, room);
    let pictures: Vec<Vec<u8>> = (1..=6).map(drawn).collect();
    let own: Vec<String> = pictures
        .iter()
        .map(|bytes| model.infer(&Picture::decode(bytes).unwrap()).unwrap().label)
        .collect();
    let begin = tokio::time::Instant::now();
    let mut seen = Vec::new();
    let mut count = 0;
    while served.offload.served.get() == 0 || count < 60 {
        // Faster than anybody can look.
        for _ in 0..20 {
            device.show(0, &pictures[count % 6]);
            count += 1;
        }
        while let Ok(Command::Append(draft)) = device.commands.try_recv() {
            seen.push(draft);
        }
        assert!(begin.elapsed() < BOUND, "{:?}", device.counters.offload);
    }
    seen.extend(device.end().await);
    assert_eq!(seen.len(), count);
    for (n, draft) in seen.iter().enumerate() {
        assert_eq!(
            (draft.frame, &draft.label),
            (n as u64, &own[n % 6]),
            "{draft:?}"
        );
    }
    let elsewhere = seen.iter().filter(|draft| draft.answered.is_some()).count();
    assert!(elsewhere > 0, "nothing was handed over");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_as_without() {
    let small = engine("steel-small");
    let (server, ..) = server("answer = true", Some(&small));
    // It has the same model, and no bigger one.
    let mut device = Device::start(ALL, &small, Room(Other::Server(server)));
    sleep(Duration::from_millis(1_500)).await;
    for n in 0..20 {
        device.show(0, &drawn(1));
        let draft = device.next().await.unwrap();
        assert!(draft.frame == n && draft.answered.is_none());
    }
    assert_eq!(device.counters.offload.asked.get(), 0);
    assert!(device.end().await.is_empty());
}

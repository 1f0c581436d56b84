//! A device alone with a coordinator of a few lines, honest and otherwise.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicU64, Ordering},
};

use super::*;
use crate::{identity::Tls, offload::Coordinator};

/// What it does when it is to look at a frame.
#[derive(Clone, Copy, Debug)]
enum Far {
    /// Says this label.
    Says(&'static str),
    NoNumber,
    Garbage,
    NeverAnswers,
    Status(u16),
}

/// A coordinator, and how often it was to look.
fn coordinator(how: Far, offer: Offer) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let looked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&looked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (offer, count) = (offer.clone(), Arc::clone(&count));
            std::thread::spawn(move || serve(stream.unwrap(), how, &offer, &count));
        }
    });
    (address, looked)
}

fn serve(mut stream: TcpStream, how: Far, offer: &Offer, looked: &AtomicU64) {
    let mut asked = Vec::new();
    let mut block = [0; 4_096];
    let head = loop {
        if let Some(end) = asked.windows(4).position(|w| w == b"\r\n\r\n") {
            break end + 4;
        }
        match stream.read(&mut block) {
            Ok(n @ 1..) => asked.extend_from_slice(&block[..n]),
            _ => return,
        }
    };
    let text = String::from_utf8_lossy(&asked[..head]).to_lowercase();
    let length = text
        .lines()
        .find_map(|l| l.strip_prefix("content-length: "));
    let length: usize = length.map_or(0, |length| length.trim().parse().unwrap());
    while asked.len() < head + length {
        match stream.read(&mut block) {
            Ok(n @ 1..) => asked.extend_from_slice(&block[..n]),
            _ => return,
        }
    }
    let answer = |label: &str, score: f32| {
        format!(r#"{{"model":"m@1","label":"{label}","score":{score},"margin":0.5}}"#)
    };
    let (status, body) = if text.starts_with("get ") {
        let kind = format!("get /api/v1/offload?kind={} ", offer.kind);
        assert!(text.starts_with(&kind), "{text}");
        (200, serde_json::to_string(&[offer]).unwrap())
    } else {
        let line = format!("post /api/v1/offload/{} ", offer.digest);
        assert!(text.starts_with(&line), "{text}");
        Picture::decode(&asked[head..]).unwrap();
        looked.fetch_add(1, Ordering::SeqCst);
        match how {
            Far::Says(label) => (200, answer(label, 0.875)),
            Far::NoNumber => (200, answer("patches", 7.5)),
            Far::Garbage => (200, "{{{{".to_owned()),
            Far::NeverAnswers => return std::thread::park_timeout(BOUND),
            Far::Status(status) => (status, String::new()),
        }
    };
    let _ = write!(
        stream,
        "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
}

/// A device with nobody in its room, and its way to the coordinator.
fn device(config: &str, model: &Arc<Engine>, address: SocketAddr) -> (Device, watch::Sender<bool>) {
    let (uplink, is_up) = watch::channel(true);
    let make = |engines| {
        let url = format!("http://{address}");
        Coordinator::new(&url, &Tls::none(), is_up, engines).unwrap()
    };
    let device = Device::start_with(config, model, Empty, Vec::new(), Some(make));
    (device, uplink)
}

/// A room with nobody in it.
#[derive(Clone)]
struct Empty;

impl Roads for Empty {
    type Stream = Compat<DuplexStream>;

    async fn open(&self, _: Peer, _: &'static str) -> Result<Self::Stream, String> {
        panic!("there is nobody")
    }

    fn name(&self, _: &Peer) -> Option<Name> {
        None
    }
}

fn larger(small: &Engine) -> Offer {
    Offer {
        bytes: u64::MAX,
        digest: Digest([3; 32]),
        ..offer_of(small.manifest()).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_is_in_the_room_the_coordinator_is_asked() {
    let small = engine("steel-small");
    let (address, looked) = coordinator(Far::Says("patches"), larger(&small));
    let (mut device, uplink) = device(&format!("{ALL}deadline_ms = 9000"), &small, address);
    let draft = device.until_answered(&drawn(1)).await;
    let answered = draft.answered.unwrap();
    assert_eq!(answered.by, Name::itself());
    assert_eq!(
        (&*answered.answer.label, answered.answer.score),
        ("patches", 0.875)
    );
    // Without an uplink of its own it does without.
    uplink.send_replace(false);
    sleep(Duration::from_secs(3)).await;
    let before = looked.load(Ordering::SeqCst);
    for _ in 0..5 {
        device.show(0, &drawn(1));
        assert!(device.next().await.unwrap().answered.is_none());
    }
    assert_eq!(looked.load(Ordering::SeqCst), before);
    uplink.send_replace(true);
    device.until_answered(&drawn(1)).await;
    assert!(device.end().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_coordinator_does_each_frame_has_an_answer() {
    let small = engine("steel-small");
    let all = [
        Far::Says("a label that nobody knows"),
        Far::NoNumber,
        Far::Garbage,
        Far::NeverAnswers,
        Far::Status(500),
        Far::Status(503),
    ];
    for how in all {
        let (address, looked) = coordinator(how, larger(&small));
        let (mut device, _uplink) = device(&format!("{ALL}deadline_ms = 150"), &small, address);
        let picture = drawn(1);
        let own = small.infer(&Picture::decode(&picture).unwrap()).unwrap();
        let begin = tokio::time::Instant::now();
        let counters = device.counters.clone();
        let came_to_nothing = || counters.offload.late.get() + counters.offload.refused.get() > 0;
        while !came_to_nothing() {
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
        // It is left alone soon.
        for n in 0..30 {
            device.show(n % 2, &picture);
        }
        let seen = device.end().await;
        assert_eq!(seen.len(), 30, "{how:?}");
        assert!(
            seen.iter()
                .all(|draft| draft.label == own.label && draft.answered.is_none())
        );
        let looked = looked.load(Ordering::SeqCst);
        assert!(looked <= 12, "{how:?}: {looked} times");
    }
}

//! A real server on a real port, with every fault that a network and a coordinator may have.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use mesh_core::{Sample, SampleReason};

use super::*;
use crate::{samples::shelf::tests::sample, seal::Seal};

/// What the server does with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Well,
    /// Takes part of the body, then hangs up.
    Cut,
    /// Does its work and hangs up before it says so.
    Mute,
    /// 500.
    Broken,
    /// Loses the image and says 409 with the truth.
    Forgets,
    /// Nonsense with status 200.
    Mad,
}

#[derive(Default)]
struct Held {
    samples: BTreeMap<(u64, u64), (Sample, Vec<u8>)>,
    order: Vec<u64>,
    requests: usize,
}

struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn request(stream: &mut TcpStream, cut: bool) -> Option<(String, Option<u64>, Vec<u8>)> {
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).ok()?;
    let header = |name: &str| {
        head.lines()
            .filter_map(|line| line.split_once(": "))
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.to_owned())
    };
    let length: usize = header("content-length")?.parse().ok()?;
    assert!(length <= MAX_PIECE, "the body is small");
    let mut body = vec![0; if cut { length / 2 } else { length }];
    stream.read_exact(&mut body).ok()?;
    let offset = header("upload-offset").and_then(|o| o.parse().ok());
    Some((head.lines().next()?.to_owned(), offset, body))
}

fn answer(stream: &mut TcpStream, status: u16, kind: &str, body: &str) {
    let text = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = stream.write_all(text.as_bytes());
}

impl Held {
    fn serve(&mut self, stream: &mut TcpStream, mood: Mood) {
        self.requests += 1;
        let Some((line, offset, body)) = request(stream, mood == Mood::Cut) else {
            return;
        };
        if mood == Mood::Broken {
            return answer(stream, 500, "text/plain", "out of order");
        }
        if mood == Mood::Mad {
            return answer(stream, 200, "application/json", r#"{"offset":99999999999}"#);
        }
        let mut words = line.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let (status, has) = if method == "POST" {
            assert_eq!(path, "/api/v1/samples");
            if mood == Mood::Cut {
                return;
            }
            let sample = Sample::decode(&body).unwrap();
            if sample.label == "refuse" {
                return answer(
                    stream,
                    422,
                    "application/problem+json",
                    r#"{"title":"Unprocessable","detail":"no such device"}"#,
                );
            }
            let key = (sample.epoch, sample.seq);
            if !self.samples.contains_key(&key) {
                self.order.push(key.1);
            }
            let held = self.samples.entry(key).or_insert((sample, Vec::new()));
            (201, held.1.len())
        } else {
            let parts: Vec<&str> = path.split('/').collect();
            assert_eq!(parts[..5], ["", "api", "v1", "samples", "d1"]);
            let key = (parts[5].parse().unwrap(), parts[6].parse().unwrap());
            let held = &mut self.samples.get_mut(&key).unwrap().1;
            if mood == Mood::Forgets && held.len() < 100_000 {
                held.clear();
            }
            if offset == Some(held.len() as u64) {
                held.extend(body);
                (200, held.len())
            } else {
                (409, held.len())
            }
        };
        if !matches!(mood, Mood::Mute | Mood::Cut) {
            answer(
                stream,
                status,
                "application/json",
                &format!("{{\"offset\":{has}}}"),
            );
        }
    }
}

impl Server {
    fn start(
        address: &str,
        held: Arc<Mutex<Held>>,
        mut mood: impl FnMut() -> Mood + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                held.lock().unwrap().serve(&mut stream.unwrap(), mood());
            }
        });
        Self {
            address,
            stop,
            thread: Some(thread),
        }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Brief, so that a hanging server does not hold up the tests.
const PATIENCE: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(1),
    Duration::from_secs(2),
];

fn send(
    shelf: &Arc<Mutex<Shelf>>,
    url: &str,
    rate: u64,
) -> (JoinHandle<()>, SyncSender<()>, Counters) {
    let (tell, news) = sync_channel(1);
    let counters = Counters::default();
    let sender = Sender {
        device: "d1".parse().unwrap(),
        client: Client::patient(url, PATIENCE).unwrap(),
        shelf: shelf.clone(),
        rate,
        backoff: Backoff::new(1, 8),
        counters: counters.clone(),
        news,
    };
    (std::thread::spawn(move || sender.run()), tell, counters)
}

fn until(mut good: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !good() {
        assert!(Instant::now() < end, "it takes too long");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

fn image(seq: u64, length: usize) -> Vec<u8> {
    (0..length)
        .map(|n| (n as u64 * 31 + seq * 7) as u8)
        .collect()
}

fn fill(root: &Path, count: u64) -> Arc<Mutex<Shelf>> {
    let (mut shelf, _) = Shelf::open(root.to_owned(), 64 << 20, 7, Seal::none()).unwrap();
    for seq in 1..=count {
        let bytes = image(seq, [0, 1_000, 300_000, 700_000][seq as usize % 4]);
        let reason = if seq % 5 == 0 {
            SampleReason::Wrong
        } else {
            SampleReason::Novel
        };
        shelf
            .add(
                &sample(seq, reason, &bytes),
                (!bytes.is_empty()).then_some(&bytes),
            )
            .unwrap();
    }
    Arc::new(Mutex::new(shelf))
}

fn whole(held: &Held) -> usize {
    held.samples
        .values()
        .filter(|(sample, bytes)| match &sample.image {
            Some(image) => models::digest_of(bytes).to_string() == image.sha256,
            None => bytes.is_empty(),
        })
        .count()
}

fn moods(mut seed: u64) -> impl FnMut() -> Mood + Send + 'static {
    move || {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        match (seed >> 33) % 12 {
            0 => Mood::Cut,
            1 => Mood::Mute,
            2 => Mood::Broken,
            3 => Mood::Forgets,
            4 => Mood::Mad,
            _ => Mood::Well,
        }
    }
}

#[test]
fn every_sample_arrives_once_and_whole_whatever_the_network_does() {
    let folder = tempfile::tempdir().unwrap();
    let shelf = fill(folder.path(), 40);
    let held = Arc::new(Mutex::new(Held::default()));
    let mut server = Some(Server::start("127.0.0.1:0", held.clone(), moods(1)));
    let (address, url) = server
        .as_ref()
        .map(|s| (s.address.to_string(), s.url()))
        .unwrap();

    // The device goes down in the middle, the coordinator too; both come back.
    let (thread, tell, _) = send(&shelf, &url, 0);
    until(|| held.lock().unwrap().order.len() > 8);
    drop(server.take());
    drop(tell);
    thread.join().unwrap();
    drop(shelf);
    let (shelf, damaged) =
        Shelf::open(folder.path().to_owned(), 64 << 20, 7, Seal::none()).unwrap();
    assert_eq!(damaged, 0);
    let already = 40 - shelf.len();
    assert!(
        already < 40 && whole(&held.lock().unwrap()) >= already,
        "nothing that was kept is lost"
    );
    let shelf = Arc::new(Mutex::new(shelf));
    let (thread, tell, counters) = send(&shelf, &url, 0);
    until(|| counters.samples.sent.get() == 0 && shelf.lock().unwrap().len() > 0);
    let server = Server::start(&address, held.clone(), moods(2));
    until(|| shelf.lock().unwrap().len() == 0);
    drop(tell);
    thread.join().unwrap();
    drop(server);

    let held = held.lock().unwrap();
    assert_eq!(
        (held.samples.len(), whole(&held), held.order.len()),
        (40, 40, 40)
    );
    for ((_, seq), (_, bytes)) in &held.samples {
        assert_eq!(*bytes, image(*seq, bytes.len()));
    }
    assert_eq!(counters.samples.sent.get() as usize, 40 - already);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn marks_go_first_and_what_is_refused_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let shelf = fill(folder.path(), 10);
    {
        let mut bad = sample(3, SampleReason::Novel, b"");
        bad.label = "refuse".into();
        shelf.lock().unwrap().add(&bad, None).unwrap();
    }
    let held = Arc::new(Mutex::new(Held::default()));
    let server = Server::start("127.0.0.1:0", held.clone(), || Mood::Well);
    let (thread, tell, counters) = send(&shelf, &server.url(), 0);
    until(|| shelf.lock().unwrap().len() == 0);
    drop(tell);
    thread.join().unwrap();
    assert_eq!(held.lock().unwrap().order, [10, 5, 1, 2, 4, 6, 7, 8, 9]);
    assert_eq!(
        (counters.samples.sent.get(), counters.samples.refused.get()),
        (9, 1)
    );
}

#[test]
fn the_rate_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let shelf = fill(folder.path(), 2);
    let held = Arc::new(Mutex::new(Held::default()));
    let server = Server::start("127.0.0.1:0", held, || Mood::Well);
    let begin = Instant::now();
    let (thread, tell, _) = send(&shelf, &server.url(), 400 * 1_024);
    until(|| shelf.lock().unwrap().len() == 0);
    assert!(
        begin.elapsed() >= Duration::from_millis(500),
        "300 KB at 400 KiB a second"
    );
    drop(tell);
    thread.join().unwrap();
}

/// A server that says `words` to whoever comes, `again` and again if so wished, and then waits.
fn hostile(words: Vec<u8>, again: bool) -> (String, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, words, stopped) = (stream.unwrap(), words.clone(), stopped.clone());
            std::thread::spawn(move || {
                while stream.write_all(&words).is_ok() && again && !stopped.load(Ordering::Relaxed)
                {
                }
                let _ = stream.set_read_timeout(Some(Duration::from_secs(8)));
                let _ = stream.read_to_end(&mut Vec::new());
            });
        }
    });
    (url, stop)
}

#[test]
fn a_hostile_coordinator_harms_nothing() {
    let ok = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";
    let cases: [(&str, String, bool); 9] = [
        ("silence", String::new(), false),
        ("noise", "\0\u{1}nonsense\r\n\r\n".into(), true),
        ("an endless head", "x-more: yes\r\n".into(), true),
        (
            "an endless body",
            format!("{ok}\r\n{}", " ".repeat(65_536)),
            true,
        ),
        (
            "a body that never ends",
            format!("{ok}content-length: 100\r\n\r\n{{"),
            false,
        ),
        (
            "a body of any size",
            format!("{ok}content-length: 18446744073709551615\r\n\r\n{{"),
            false,
        ),
        (
            "what it cannot have",
            format!("{ok}content-length: 31\r\n\r\n{{\"offset\": 18446744073709551615}}"),
            false,
        ),
        (
            "a way to somewhere else",
            "HTTP/1.1 307 Go\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".into(),
            false,
        ),
        (
            "no of somebody else",
            "HTTP/1.1 400 No\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nno".into(),
            false,
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    let shelf = fill(folder.path(), 3);
    for (what, words, again) in cases {
        let (url, stop) = hostile(words.into_bytes(), again);
        let begin = Instant::now();
        let said = Client::patient(&url, PATIENCE).unwrap().announce(b"{}");
        let harmless = match &said {
            Answer::Later(_) | Answer::Nobody(_) => true,
            // The sender checks it against the image's length.
            Answer::Has(n) => *n == u64::MAX,
            _ => false,
        };
        assert!(harmless, "{what}: {said:?}");
        assert!(
            begin.elapsed() < Duration::from_secs(8),
            "{what} takes {:?}",
            begin.elapsed()
        );
        let (thread, tell, counters) = send(&shelf, &url, 0);
        std::thread::park_timeout(Duration::from_millis(50));
        drop(tell);
        thread.join().unwrap();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(
            (counters.samples.sent.get(), counters.samples.refused.get()),
            (0, 0),
            "{what}"
        );
    }
    assert_eq!(shelf.lock().unwrap().len(), 3);
}

//! Fetching from a coordinator that answers as it likes. What is signed is tested with the registry.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use mesh_core::{Failure, Reason};
use models::{chunks, delta};

use super::*;
use crate::{counters::Counters, update::disk::Opened};

/// What is answered.
type Files = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// A coordinator with these files, and how often it was asked.
pub(in crate::update) struct Server {
    pub(in crate::update) address: String,
    pub(in crate::update) files: Files,
    asked: Arc<AtomicUsize>,
}

fn serve(mut stream: TcpStream, files: &Files, asked: &AtomicUsize) -> io::Result<()> {
    loop {
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte)?;
            request.push(byte[0]);
        }
        asked.fetch_add(1, Ordering::Relaxed);
        let request = String::from_utf8(request).unwrap();
        let path = request.split(' ').nth(1).unwrap();
        let file = files.lock().unwrap().get(path).cloned();
        let (status, body) = match file {
            Some(body) if body == b"redirect" => ("302 Found\r\nlocation: /", Vec::new()),
            Some(body) => ("200 OK", body),
            None => ("404 Not Found", Vec::new()),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(&body)?;
    }
}

impl Server {
    pub(in crate::update) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (files, asked) = (Files::default(), Arc::<AtomicUsize>::default());
        let (served, counted) = (Arc::clone(&files), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (files, asked) = (Arc::clone(&served), Arc::clone(&counted));
                std::thread::spawn(move || serve(stream.unwrap(), &files, &asked));
            }
        });
        Self {
            address,
            files,
            asked,
        }
    }

    pub(in crate::update) fn put(&self, path: String, bytes: &[u8]) {
        self.files.lock().unwrap().insert(path, bytes.to_vec());
    }

    fn put_chunks(&self, bytes: &[u8]) {
        for (chunk, bytes) in chunks::split(bytes)
            .iter()
            .zip(bytes.chunks(chunks::CHUNK_BYTES))
        {
            self.put(format!("/api/v1/chunks/{}", chunk.sha256), bytes);
        }
    }

    /// A release with this model, whose chunks are there.
    pub(in crate::update) fn release(&self, version: &str, model: &[u8]) -> (Release, Vec<u8>) {
        let from = tempfile::tempdir().unwrap();
        let manifest = format!("version = {version}").into_bytes();
        std::fs::create_dir(from.path().join("golden")).unwrap();
        for (name, bytes) in [
            (MODEL, model),
            ("manifest.toml", &manifest),
            ("golden/1.png", b"a picture"),
        ] {
            std::fs::write(from.path().join(name), bytes).unwrap();
            self.put_chunks(bytes);
        }
        let document = ReleaseDocument::of(from.path(), "a", version, None).unwrap();
        let release = Release {
            name: "a".into(),
            version: version.into(),
            digest: document.digest().unwrap(),
        };
        (release, document.to_bytes().unwrap())
    }

    pub(in crate::update) fn asked(&self) -> usize {
        self.asked.swap(0, Ordering::Relaxed)
    }
}

/// Bytes that nothing compresses.
pub(in crate::update) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

struct World {
    server: Server,
    _data: tempfile::TempDir,
    disk: Disk,
    client: Client,
    counters: Counters,
}

/// Some chunks and a bit.
const LENGTH: usize = 3 * chunks::CHUNK_BYTES + 1_000;

impl World {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let server = Server::start();
        let Opened { disk, .. } = Disk::open(data.path(), None).unwrap();
        let counters = Counters::default();
        Self {
            client: Client::new(&server.address, counters.clone()).unwrap(),
            server,
            _data: data,
            disk,
            counters,
        }
    }

    fn fetch(&self, (release, document): &(Release, Vec<u8>)) -> Result<(), Failure> {
        let (tell, _news) = tokio::sync::mpsc::channel(1);
        let fetch = Fetch {
            disk: &self.disk,
            client: &self.client,
            watchful: &Watchful::of_test(tell),
            swarm: None,
            uplink: true,
            current: None,
            without_delta: false,
        };
        fetch.run(release, document).map_err(Failure::from)
    }

    fn file(&self, release: &Release, path: &str) -> Option<Vec<u8>> {
        std::fs::read(self.disk.folder(release).join(path)).ok()
    }
}

#[test]
fn what_is_there_is_not_fetched_again() {
    let world = World::new();
    let model = noise(1, LENGTH);
    let first = world.server.release("1", &model);
    world.fetch(&first).unwrap();
    assert_eq!(world.file(&first.0, MODEL).unwrap(), model);
    assert_eq!(world.file(&first.0, DOCUMENT).unwrap(), first.1);
    // Six chunks and a delta that is not asked for, as there is nothing to begin with.
    assert_eq!(world.server.asked(), 6);
    let bytes = world.counters.update_bytes.get();
    assert!(bytes > LENGTH as u64 && bytes < LENGTH as u64 + 1_000);
    world.fetch(&first).unwrap();
    assert_eq!(world.server.asked(), 0);
    // The same model and picture in another release: only the manifest comes.
    let second = world.server.release("2", &model);
    world.fetch(&second).unwrap();
    assert_eq!(world.server.asked(), 1);
    assert_eq!(world.file(&second.0, MODEL).unwrap(), model);
    // One file damaged on the disk: only that one comes, and not from itself.
    std::fs::write(world.disk.folder(&second.0).join("manifest.toml"), b"x").unwrap();
    world.fetch(&second).unwrap();
    assert_eq!(world.server.asked(), 1);
    assert_eq!(
        world.file(&second.0, "manifest.toml").unwrap(),
        b"version = 2"
    );
}

#[test]
fn a_fetch_goes_on_where_it_ended() {
    let world = World::new();
    let model = noise(1, LENGTH);
    let release = world.server.release("1", &model);
    let chunks = chunks::split(&model);
    let third = format!("/api/v1/chunks/{}", chunks[2].sha256);
    let good = world.server.files.lock().unwrap().remove(&third).unwrap();
    let failure = world.fetch(&release).unwrap_err();
    assert_eq!(failure.reason, Reason::Fetch);
    assert!(
        failure.detail.contains("does not have it"),
        "{}",
        failure.detail
    );
    world.server.asked();
    // Each answer that is not the chunk is one clear failure, and is forgotten.
    let too_long = [&good[..], b"x"].concat();
    for (bad, reason) in [
        (&good[1..], Reason::Bytes),
        (&too_long[..], Reason::Bytes),
        (&noise(2, good.len())[..], Reason::Bytes),
        (&noise(2, 1 << 21)[..], Reason::Bytes),
        (&b"redirect"[..], Reason::Fetch),
    ] {
        world.server.put(third.clone(), bad);
        assert_eq!(world.fetch(&release).unwrap_err().reason, reason);
        assert_eq!(world.server.asked(), 1);
        assert!(world.file(&release.0, MODEL).is_none());
    }
    world.server.put(third, &good);
    world.fetch(&release).unwrap();
    // The third and the fourth; small files were there.
    assert_eq!(world.server.asked(), 2);
    assert_eq!(world.file(&release.0, MODEL).unwrap(), model);
    assert!(!world.disk.stage(&release.0).bundle().exists());
}

#[test]
fn a_delta_comes_instead_of_the_file_and_a_bad_one_does_not_matter() {
    let world = World::new();
    let old = noise(1, LENGTH);
    world.fetch(&world.server.release("1", &old)).unwrap();
    world.server.asked();
    let mut new = old.clone();
    new[LENGTH / 2] ^= 1;
    let delta = delta::make(&old, &new).unwrap();
    let path = format!("/api/v1/deltas/{}/{}", digest_of(&old), digest_of(&new));
    let second = world.server.release("2", &new);
    let before = world.counters.update_bytes.get();
    world.server.put(path, &delta);
    world.fetch(&second).unwrap();
    assert_eq!(world.file(&second.0, MODEL).unwrap(), new);
    assert!(world.counters.update_bytes.get() - before < 10_000);
    // The delta and the manifest.
    assert_eq!(world.server.asked(), 2);
    let newest = noise(3, LENGTH);
    let third = world.server.release("3", &newest);
    let bad = delta::make(&old, &new).unwrap();
    for from in [&old, &new] {
        let path = format!("/api/v1/deltas/{}/{}", digest_of(from), digest_of(&newest));
        world.server.put(path, &bad);
    }
    world.fetch(&third).unwrap();
    assert_eq!(world.file(&third.0, MODEL).unwrap(), newest);
}

#[test]
fn nobody_there_and_something_newer() {
    let mut world = World::new();
    let release = world.server.release("1", &noise(1, 1_000));
    let (tell, _news) = tokio::sync::mpsc::channel(1);
    let watchful = Watchful::of_test(tell);
    watchful.overtake();
    let fetch = Fetch {
        disk: &world.disk,
        client: &world.client,
        watchful: &watchful,
        swarm: None,
        uplink: true,
        current: None,
        without_delta: false,
    };
    let error = fetch.run(&release.0, &release.1).unwrap_err();
    assert!(matches!(error, UpdateError::Overtaken), "{error}");
    world.client = Client::new("http://127.0.0.1:9", world.counters.clone()).unwrap();
    assert_eq!(world.fetch(&release).unwrap_err().reason, Reason::Fetch);
}

#[test]
fn a_document_of_something_else_is_refused() {
    let world = World::new();
    let (release, document) = world.server.release("1", b"model");
    let other = Release {
        version: "2".into(),
        ..release.clone()
    };
    assert_eq!(
        world.fetch(&(other, document)).unwrap_err().reason,
        Reason::Metadata
    );
    assert_eq!(
        world.fetch(&(release, b"{}".to_vec())).unwrap_err().reason,
        Reason::Metadata
    );
    assert!(!Path::new("release.json").exists());
}

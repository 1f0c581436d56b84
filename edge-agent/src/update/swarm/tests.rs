//! Real nodes on loopback, a coordinator that counts, and neighbours that lie.

use libp2p::{
    Stream,
    futures::{AsyncReadExt, AsyncWriteExt},
};
use mesh_core::{Failure, Reason, Release};
use models::{chunks::CHUNK_BYTES, delta, digest_of};
use tokio::sync::watch;

use super::{
    wire::{CHUNKS, LOOK_BYTES, OFFERS, Said, WANT_BYTES},
    *,
};
use crate::{
    mesh::testing::{Running, members, start, until},
    update::{
        client::Client,
        disk::Opened,
        fetch::{
            Fetch, MODEL,
            tests::{Server, noise},
        },
        worker::Watchful,
    },
};

/// Twelve chunks and a bit.
const LENGTH: usize = 12 * CHUNK_BYTES + 1_000;
/// Its chunks, the manifest and the picture.
const PIECES: usize = 13 + 2;

struct Device {
    _data: tempfile::TempDir,
    disk: Disk,
    client: Client,
    swarm: Swarm,
    counters: Counters,
}

/// What a neighbour does that does not mean well.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// Other bytes.
    Wrong,
    /// More bytes than there are.
    Long,
    /// Never answers.
    Mute,
    /// Hangs up.
    Rude,
    /// Says that the coordinator has no delta, and has nothing itself.
    Denial,
}

struct World {
    server: Server,
    devices: Vec<Device>,
    /// What the liars say by presence.
    liars: Vec<watch::Sender<Holding>>,
    _nodes: Vec<Running>,
}

impl World {
    /// So many devices, and as many neighbours that lie.
    fn new(count: usize, lies: &[Lie]) -> Self {
        let server = Server::start();
        let all = members(count + lies.len());
        let (mut devices, mut nodes) = (Vec::new(), Vec::new());
        for (n, member) in all.iter().enumerate().take(count) {
            let data = tempfile::tempdir().unwrap();
            let Opened { disk, .. } = Disk::open(data.path(), None).unwrap();
            let counters = Counters::default();
            let (site, ends) = Site::new();
            let swarm = Swarm::new(member.peer, site, counters.clone());
            swarm.refresh(&disk);
            let (services, holding) = (swarm.services(4_096), swarm.holding());
            nodes.push(start(&all, n, ends, services, holding, counters.clone()));
            devices.push(Device {
                client: Client::new(&server.address, counters.clone()).unwrap(),
                _data: data,
                disk,
                swarm,
                counters,
            });
        }
        let mut liars = Vec::new();
        for (lie, n) in lies.iter().zip(count..) {
            let (_site, ends) = Site::new();
            let (tell, holding) = watch::channel(Holding::default());
            let counters = Counters::default();
            liars.push(tell);
            nodes.push(start(&all, n, ends, liar(*lie), holding, counters));
        }
        let there = all.len() - 1;
        until("all see each other", || {
            let sees = |device: &Device| device.swarm.asking().site.present().len();
            devices.iter().all(|device| sees(device) == there)
        });
        Self {
            server,
            devices,
            liars,
            _nodes: nodes,
        }
    }

    /// All of these at the same time.
    fn fetch(&self, who: &[usize], release: &(Release, Vec<u8>)) -> Vec<Result<(), Failure>> {
        std::thread::scope(|scope| {
            let fetches: Vec<_> = who
                .iter()
                .map(|n| scope.spawn(move || self.devices[*n].fetch(release, true)))
                .collect();
            let results = fetches.into_iter().map(|fetch| fetch.join().unwrap());
            results.collect()
        })
    }

    fn swarm_bytes(&self) -> u64 {
        let all = self.devices.iter();
        all.map(|d| d.counters.swarm_bytes.get()).sum()
    }
}

impl Device {
    /// As the worker does it.
    fn fetch(&self, release: &(Release, Vec<u8>), uplink: bool) -> Result<(), Failure> {
        let (tell, _news) = tokio::sync::mpsc::channel(1);
        let fetching = self.swarm.begin(release.0.digest, &self.disk);
        let fetch = Fetch {
            disk: &self.disk,
            client: &self.client,
            watchful: &Watchful::of_test(tell),
            swarm: Some(&self.swarm),
            uplink,
            current: None,
            without_delta: false,
        };
        let result = fetch.run(&release.0, &release.1);
        drop(fetching);
        Ok(result?)
    }

    fn model(&self, release: &Release) -> Option<Vec<u8>> {
        std::fs::read(self.disk.folder(release).join(MODEL)).ok()
    }

    /// Until it knows that somebody has this release.
    fn hears_of(&self, release: &Release) {
        until("it hears of the release", || {
            self.swarm.is_in_the_site(release.digest)
        });
    }
}

/// Says that it has everything and fetches it, and serves it badly.
fn liar(lie: Lie) -> Vec<Service> {
    let offers = Service::new(OFFERS, 9, 9, move |_, mut stream: Stream| async move {
        let mut look = [0; LOOK_BYTES];
        while stream.read_exact(&mut look).await.is_ok() {
            let said = Said {
                fetches: !matches!(lie, Lie::Denial),
                uplink: !matches!(lie, Lie::Denial),
                delta: match lie {
                    Lie::Denial => DeltaState::Nowhere,
                    _ => DeltaState::Here,
                },
                has: vec![!matches!(lie, Lie::Denial); PIECES],
            };
            stream.write_all(&said.to_bytes()).await.unwrap();
            stream.flush().await.unwrap();
        }
    });
    let chunks = Service::new(CHUNKS, 9, 9, move |_, mut stream: Stream| async move {
        let mut want = [0; WANT_BYTES];
        stream.read_exact(&mut want).await.unwrap();
        let length = match lie {
            Lie::Wrong => CHUNK_BYTES,
            Lie::Long => usize::MAX >> 33,
            Lie::Mute => return std::future::pending().await,
            Lie::Rude | Lie::Denial => return,
        };
        let length = u32::try_from(length).unwrap().to_be_bytes();
        stream.write_all(&length).await.unwrap();
        stream.flush().await.unwrap();
        let _ = stream.write_all(&vec![7; CHUNK_BYTES]).await;
        let _ = stream.close().await;
    });
    vec![offers, chunks]
}

#[test]
fn three_at_once_take_each_piece_from_the_coordinator_once() {
    let world = World::new(3, &[]);
    let model = noise(1, LENGTH);
    let release = world.server.release("1", &model);
    for result in world.fetch(&[0, 1, 2], &release) {
        result.unwrap();
    }
    for device in &world.devices {
        assert_eq!(device.model(&release.0).unwrap(), model);
    }
    let (asked, brought) = (world.server.asked(), world.swarm_bytes());
    println!("{asked} questions for {PIECES} pieces, {brought} bytes from neighbours");
    // Two that see each other later than they begin may take a piece twice.
    assert!(asked <= PIECES + 2, "{asked}");
    assert!(
        brought + 3 * CHUNK_BYTES as u64 > 2 * LENGTH as u64,
        "{brought}"
    );
    let served: u64 = world
        .devices
        .iter()
        .map(|d| d.counters.served_bytes.get())
        .sum();
    assert!(served >= brought);
}

/// In between, those that still fetch would leave the one that has all of it.
#[test]
fn that_it_has_all_of_it_is_said_with_that_it_fetches_no_more() {
    let world = World::new(1, &[]);
    let release = world.server.release("1", &noise(7, LENGTH));
    let device = &world.devices[0];
    let mut holding = device.swarm.holding();
    let mut said = Vec::new();
    let seen = |holding: &Holding| holding.fetching.is_some() || !holding.holds.is_empty();
    std::thread::scope(|scope| {
        let fetch = scope.spawn(|| device.fetch(&release, true));
        let listens = crate::update::fetch::alone().unwrap();
        listens.block_on(async {
            while !holding.borrow().holds.contains(&release.0.digest) {
                holding.changed().await.unwrap();
                said.push(holding.borrow_and_update().clone());
            }
        });
        fetch.join().unwrap().unwrap();
    });
    assert!(said.iter().all(seen), "{said:?}");
    assert_eq!(said.last().unwrap().fetching, None);
}

#[test]
fn one_without_an_uplink_gets_all_of_it_from_a_neighbour_and_its_proof() {
    let mut world = World::new(2, &[]);
    let model = noise(2, LENGTH);
    let release = world.server.release("1", &model);
    // What the registry had to say of it, as it was fetched.
    let digest = release.0.digest;
    let papers = Papers([("metadata/timestamp.json".to_owned(), b"{}".to_vec())].into());
    let first = &world.devices[0];
    std::fs::create_dir_all(first.disk.registry()).unwrap();
    first.swarm.keep_papers(&first.disk, digest, &papers);
    first.fetch(&release, true).unwrap();
    world.server.asked();
    // Nobody is there.
    let counters = world.devices[1].counters.clone();
    world.devices[1].client = Client::new("http://127.0.0.1:9", counters).unwrap();
    let second = &world.devices[1];
    second.hears_of(&release.0);
    let mut had = None;
    let asked = second
        .swarm
        .papers(digest, async |papers| had.replace(papers).is_none());
    crate::update::fetch::alone().unwrap().block_on(asked);
    assert_eq!(had, Some(papers));
    second.fetch(&release, false).unwrap();
    assert_eq!(second.model(&release.0).unwrap(), model);
    assert_eq!(world.server.asked(), 0);
    assert!(second.counters.swarm_bytes.get() >= LENGTH as u64);
    // The same with nobody who has it: the coordinator's failure is what is said.
    let other = world.server.release("2", &noise(3, LENGTH));
    let failure = second.fetch(&other, true).unwrap_err();
    assert_eq!(failure.reason, Reason::Fetch, "{}", failure.detail);
}

#[test]
fn whoever_lies_is_left_and_the_coordinator_helps_out() {
    let world = World::new(1, &[Lie::Wrong, Lie::Long, Lie::Mute, Lie::Rude]);
    let model = noise(4, LENGTH);
    let release = world.server.release("1", &model);
    let device = &world.devices[0];
    let holds = Holding {
        holds: vec![release.0.digest],
        fetching: Some(release.0.digest),
    };
    for liar in &world.liars {
        liar.send_replace(holds.clone());
    }
    let now_ms = device.swarm.clock().now_ms();
    until("it hears of all of them", || {
        device.swarm.circle(release.0.digest, now_ms).len() == 4
    });
    device.fetch(&release, true).unwrap();
    assert_eq!(device.model(&release.0).unwrap(), model);
    // Nothing of theirs was taken.
    assert_eq!(world.server.asked(), PIECES);
    let standing = device.swarm.standing();
    let now_ms = device.swarm.clock().now_ms();
    let good = device.swarm.asking().site.present();
    let good = good.iter().filter(|n| standing.is_good(&n.peer, now_ms));
    assert_eq!(good.count(), 2, "the two that served other bytes are left");
}

#[test]
fn a_delta_comes_once_and_one_that_is_wrong_does_not_matter() {
    let world = World::new(3, &[]);
    let old = noise(5, LENGTH);
    let before = world.server.release("1", &old);
    for result in world.fetch(&[0, 1, 2], &before) {
        result.unwrap();
    }
    let mut new = old.clone();
    new[LENGTH / 2] ^= 1;
    let delta = delta::make(&old, &new).unwrap();
    let path = format!("/api/v1/deltas/{}/{}", digest_of(&old), digest_of(&new));
    let after = world.server.release("2", &new);
    world.server.put(path.clone(), &delta);
    world.server.asked();
    for result in world.fetch(&[0, 1], &after) {
        result.unwrap();
    }
    let asked = world.server.asked();
    println!("{asked} questions for a delta and a manifest");
    assert!(asked <= 3, "{asked}");
    // Later, with the coordinator's gone: a neighbour still has it.
    world.server.files.lock().unwrap().remove(&path);
    let third = &world.devices[2];
    third.hears_of(&after.0);
    let had = third.counters.swarm_bytes.get();
    third.fetch(&after, true).unwrap();
    assert_eq!(world.server.asked(), 0);
    assert!(third.counters.swarm_bytes.get() - had < 100_000);
    for device in &world.devices {
        assert_eq!(device.model(&after.0).unwrap(), new);
    }
    // Rubbish instead of the next one: the file comes whole.
    let newest = noise(6, LENGTH);
    let last = world.server.release("3", &newest);
    for from in [&old, &new] {
        let path = format!("/api/v1/deltas/{}/{}", digest_of(from), digest_of(&newest));
        world.server.put(path, &delta);
    }
    for result in world.fetch(&[0, 1, 2], &last) {
        result.unwrap();
    }
    for device in &world.devices {
        assert_eq!(device.model(&last.0).unwrap(), newest);
    }
}

/// One that says so is asked for the truth of it by nobody but the coordinator, and costs no second copy.
#[test]
fn that_there_is_no_delta_is_believed_of_the_coordinator_only() {
    let world = World::new(3, &[Lie::Denial]);
    let old = noise(8, LENGTH);
    let before = world.server.release("1", &old);
    for result in world.fetch(&[0, 1, 2], &before) {
        result.unwrap();
    }
    let mut new = old.clone();
    new[..2 * CHUNK_BYTES].copy_from_slice(&noise(9, 2 * CHUNK_BYTES));
    let delta = delta::make(&old, &new).unwrap();
    let path = format!("/api/v1/deltas/{}/{}", digest_of(&old), digest_of(&new));
    let after = world.server.release("2", &new);
    world.server.put(path, &delta);
    let fetching = Some(after.0.digest);
    world.liars[0].send_replace(Holding {
        holds: Vec::new(),
        fetching,
    });
    until("all hear of the liar", || {
        let now_ms = |d: &Device| d.swarm.clock().now_ms();
        let circle = |d: &Device| d.swarm.circle(after.0.digest, now_ms(d));
        world.devices.iter().all(|d| circle(d).len() == 1)
    });
    let of_coordinator = || -> u64 {
        let all = world.devices.iter();
        all.map(|d| d.counters.update_bytes.get()).sum()
    };
    let had = of_coordinator();
    for result in world.fetch(&[0, 1, 2], &after) {
        result.unwrap();
    }
    let copies = (of_coordinator() - had) as f64 / delta.len() as f64;
    println!("{copies:.2} copies of a delta of {} bytes", delta.len());
    assert!(copies < 2.0, "{copies}");
    for device in &world.devices {
        assert_eq!(device.model(&after.0).unwrap(), new);
        let (standing, now_ms) = (device.swarm.standing(), device.swarm.clock().now_ms());
        let present = device.swarm.asking().site.present();
        let good = present.iter().filter(|n| standing.is_good(&n.peer, now_ms));
        assert_eq!(good.count(), 2, "the liar is left");
    }
}

#[test]
fn what_is_damaged_on_the_disk_is_not_served() {
    let world = World::new(2, &[]);
    let model = noise(7, LENGTH);
    let release = world.server.release("1", &model);
    let first = &world.devices[0];
    first.fetch(&release, true).unwrap();
    let path = first.disk.folder(&release.0).join(MODEL);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[3 * CHUNK_BYTES + 5] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    world.server.asked();
    let second = &world.devices[1];
    second.hears_of(&release.0);
    second.fetch(&release, true).unwrap();
    assert_eq!(second.model(&release.0).unwrap(), model);
    // Only that one, from the coordinator.
    assert!(world.server.asked() >= 1);
    let now_ms = second.swarm.clock().now_ms();
    assert!(second.swarm.standing().is_good(&first.swarm.me(), now_ms));
}

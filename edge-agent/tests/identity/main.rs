//! A device comes to its certificate and keeps it, against a coordinator on a real port.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking"
)]

mod stand_in;

use std::{
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use edge_agent::{
    Agent, AgentError,
    clock::WallClock,
    config::{Config, ConfigErrors},
    identity::{IdentityError, Keeper},
};
use mesh_core::enrolment::Trouble;
use stand_in::{Mood, Proof, StandIn};

/// Some day in 2026.
const TODAY_MS: i64 = 1_795_000_000_000;
const DAY_MS: i64 = 86_400_000;
/// Much longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn text(data: &Path, token: &str) -> String {
    let token = match token {
        "" => String::new(),
        token => format!("[coordinator]\ntoken = {token:?}\n"),
    };
    format!("device = 'd1'\ndata = {data:?}\nmesh.enabled = false\n{token}")
}

fn config(data: &Path, token: &str) -> Config {
    Config::parse(&text(data, token)).unwrap()
}

/// A device and a coordinator, both by clocks that only the test moves.
struct World {
    data: tempfile::TempDir,
    stand_in: StandIn,
    offset: Arc<AtomicI64>,
}

impl World {
    fn new() -> Self {
        let world = Self {
            data: tempfile::tempdir().unwrap(),
            stand_in: StandIn::start(TODAY_MS, false),
            offset: Arc::default(),
        };
        world.wall(TODAY_MS);
        world
    }

    /// Sets the device's clock.
    fn wall(&self, at_ms: i64) {
        let offset = at_ms - WallClock::system().now_ms();
        self.offset.store(offset, Ordering::Relaxed);
    }

    fn open(&self, token: &str) -> Keeper {
        let wall = WallClock::shifted(self.offset.clone());
        Keeper::open(&config(self.data.path(), token), wall)
            .unwrap()
            .unwrap()
    }

    fn enrolled(&self) -> Keeper {
        let mut keeper = self.open(&self.stand_in.token());
        act(&mut keeper);
        assert_eq!(keeper.trouble(), None);
        keeper
    }

    /// Lets the time pass for both.
    async fn pass(&self, ms: i64) {
        let shared = &self.stand_in.shared;
        shared.set(shared.now_ms() + ms);
        self.offset.fetch_add(ms, Ordering::Relaxed);
        tokio::time::advance(Duration::from_millis(u64::try_from(ms).unwrap())).await;
    }

    /// Lets the time pass until the keeper has something to do, and says how much that was.
    async fn until_due(&self, keeper: &Keeper) -> i64 {
        let left = keeper.due().unwrap() - tokio::time::Instant::now();
        let ms = i64::try_from(left.as_millis()).unwrap() + 1;
        self.pass(ms).await;
        ms
    }
}

/// Does what is due now.
fn act(keeper: &mut Keeper) {
    let mut errand = keeper.tick();
    while let Some(next) = errand {
        errand = keeper.answered(next.run());
    }
}

/// Lets the time pass until something was asked.
async fn until_asked(world: &World, keeper: &mut Keeper) -> i64 {
    let before = world.stand_in.shared.asked().len();
    let mut passed = 0;
    while world.stand_in.shared.asked().len() == before {
        passed += world.until_due(keeper).await;
        act(keeper);
    }
    passed
}

#[tokio::test(start_paused = true)]
async fn a_token_brings_a_certificate_and_the_key_stays_here() {
    let world = World::new();
    let keeper = world.enrolled();
    let (tls, shared) = (keeper.tls(), &world.stand_in.shared);
    let material = tls.material().unwrap();
    assert_eq!(material.mqtt, Some(world.stand_in.mqtts.to_string()));
    assert_eq!(material.not_after_ms, TODAY_MS + 7 * DAY_MS);
    assert!((tls.days_left().unwrap() - 7.0).abs() < 0.01);
    let folder = world.data.path().join("identity");
    let mode = |name: &str| {
        let data = std::fs::metadata(folder.join(name)).unwrap();
        data.permissions().mode() & 0o777
    };
    assert_eq!((mode("key.pem"), mode(".")), (0o600, 0o700));
    {
        let requests = shared.requests.lock().unwrap();
        assert_eq!(requests[0].body["site"], "hall");
        assert_eq!(requests[0].body["device"], "d1");
        assert!(!requests[0].body.to_string().contains("PRIVATE"));
    }
    // The token has served its purpose, and may be gone: the device knows who it is and where it belongs.
    drop(keeper);
    for token in ["", &world.stand_in.token()] {
        let mut keeper = world.open(token);
        let again = config(world.data.path(), token);
        assert_eq!(again.site.as_str(), "hall");
        let url = format!("https://{}", world.stand_in.https);
        assert_eq!(again.coordinator(), Some(url.as_str()));
        world.pass(2_000).await;
        act(&mut keeper);
        assert!(keeper.certificate().is_some());
    }
    assert_eq!(shared.asked(), ["enrol"]);
}

#[tokio::test(start_paused = true)]
async fn another_authority_never_hears_the_token() {
    let world = World::new();
    let pin = "ab".repeat(32);
    let mut keeper = world.open(&world.stand_in.token_with(&pin, "hall"));
    act(&mut keeper);
    let Some(Trouble::Failed(why)) = keeper.trouble() else {
        panic!("{:?}", keeper.trouble());
    };
    assert!(
        why.contains(&pin) && why.contains("another coordinator"),
        "{why}"
    );
    assert_eq!(world.stand_in.shared.asked(), [""; 0]);
    assert!(keeper.tls().material().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_asked_for_again_with_the_same_key() {
    let world = World::new();
    let shared = &world.stand_in.shared;
    shared.feel(Mood::Mute);
    let mut keeper = world.open(&world.stand_in.token());
    act(&mut keeper);
    assert!(matches!(keeper.trouble(), Some(Trouble::Failed(_))));
    // The power goes, too.
    drop(keeper);
    let mut keeper = world.open(&world.stand_in.token());
    shared.feel(Mood::Well);
    act(&mut keeper);
    assert!(keeper.certificate().is_some());
    let keys = shared.keys.lock().unwrap();
    assert_eq!((keys.len(), &keys[0]), (2, &keys[1]));
}

#[tokio::test(start_paused = true)]
async fn approval_is_waited_for() {
    let world = World::new();
    let shared = &world.stand_in.shared;
    shared.feel(Mood::Pending);
    let mut keeper = world.open(&world.stand_in.token());
    act(&mut keeper);
    assert_eq!(keeper.trouble(), Some(&Trouble::Pending));
    let passed = until_asked(&world, &mut keeper).await;
    assert!((30_000..40_000).contains(&passed), "{passed}");
    shared.feel(Mood::Well);
    until_asked(&world, &mut keeper).await;
    assert_eq!((keeper.trouble(), shared.asked().len()), (None, 3));
}

#[tokio::test(start_paused = true)]
async fn it_renews_at_half_life_and_connections_are_told() {
    let world = World::new();
    let shared = &world.stand_in.shared;
    shared.life_ms.store(10_000, Ordering::Relaxed);
    let mut keeper = world.enrolled();
    let tls = keeper.tls();
    let mut until = tls.material().unwrap().not_after_ms;
    for _ in 0..3 {
        let passed = until_asked(&world, &mut keeper).await;
        assert!((5_000..5_100).contains(&passed), "{passed}");
        let renewed = tls.material().unwrap().not_after_ms;
        assert!(renewed >= until + 4_000, "{renewed}");
        until = renewed;
    }
    // Once one goes wrong there is time enough for others.
    shared.feel(Mood::Mute);
    until_asked(&world, &mut keeper).await;
    shared.feel(Mood::Well);
    let passed = until_asked(&world, &mut keeper).await;
    assert!(passed < 2_000 && tls.material().unwrap().not_after_ms > until);
    assert_eq!(shared.asked()[1..], ["renew"; 5]);
    // With the certificate that is renewed; right after the failure without it.
    let proofs = [
        Proof::Token,
        Proof::Certificate,
        Proof::Certificate,
        Proof::Certificate,
        Proof::Certificate,
        Proof::Challenge,
    ];
    assert_eq!(shared.proofs(), proofs);
    let requests = shared.requests.lock().unwrap();
    assert!(requests[1..].iter().all(|r| r.body.get("token").is_none()));
}

#[tokio::test(start_paused = true)]
async fn a_device_that_is_found_after_a_year_renews_with_its_old_key() {
    let world = World::new();
    drop(world.enrolled());
    let shared = &world.stand_in.shared;
    // The coordinator's own certificate is another one by then, and so is its clock.
    let year = TODAY_MS + 60 * DAY_MS;
    shared.set(year);
    world.wall(year);
    let mut keeper = world.open("");
    assert!(keeper.tls().days_left().unwrap() < -50.0);
    until_asked(&world, &mut keeper).await;
    assert_eq!(
        keeper.certificate().unwrap().not_after_ms,
        year + 7 * DAY_MS
    );
    assert_eq!(shared.asked(), ["enrol", "renew"]);
    assert_eq!(shared.proofs(), [Proof::Token, Proof::Challenge]);
    let keys = shared.keys.lock().unwrap();
    assert_eq!(keys[0], keys[1]);
}

/// A device whose clock is behind shows a certificate that has run out, and is turned away in the handshake; another one comes
/// through somebody who takes no certificates at all.
#[tokio::test(start_paused = true)]
async fn a_certificate_that_is_not_taken_locks_nobody_out() {
    let world = World::new();
    drop(world.enrolled());
    let shared = &world.stand_in.shared;
    shared.set(TODAY_MS + 60 * DAY_MS);
    let mut keeper = world.open("");
    world.pass(4 * DAY_MS).await;
    until_asked(&world, &mut keeper).await;
    assert_eq!(keeper.trouble(), None);
    assert_eq!(shared.proofs(), [Proof::Token, Proof::Challenge]);

    shared.feel(Mood::HangsUp);
    world.pass(4 * DAY_MS).await;
    until_asked(&world, &mut keeper).await;
    assert_eq!(keeper.trouble(), None);
    assert_eq!(shared.proofs()[2..], [Proof::Challenge]);
    shared.feel(Mood::Well);
    world.pass(4 * DAY_MS).await;
    until_asked(&world, &mut keeper).await;
    assert_eq!(shared.proofs()[3..], [Proof::Certificate]);
}

#[tokio::test(start_paused = true)]
async fn a_revoked_device_says_so_and_asks_rarely() {
    let world = World::new();
    let mut keeper = world.enrolled();
    let shared = &world.stand_in.shared;
    let why = "this device was revoked on Monday";
    shared.feel(Mood::Refuses(why));
    until_asked(&world, &mut keeper).await;
    assert_eq!(keeper.trouble(), Some(&Trouble::Refused(why.into())));
    for _ in 0..6 {
        let passed = until_asked(&world, &mut keeper).await;
        assert!((30_000..=3_700_000).contains(&passed), "{passed}");
    }
    // Somebody relents.
    shared.feel(Mood::Well);
    until_asked(&world, &mut keeper).await;
    assert_eq!(keeper.trouble(), None);
}

/// Without a new token a revoked device stays out with the key that it has. With one it makes a new key and enrols, also
/// if its power goes in the middle of it.
#[tokio::test(start_paused = true)]
async fn a_revoked_device_comes_back_with_a_new_token_and_a_new_key() {
    let world = World::new();
    drop(world.enrolled());
    let shared = &world.stand_in.shared;
    let folder = world.data.path().join("identity");
    let key = || std::fs::read(folder.join("key.pem")).unwrap();
    let old = key();
    shared.revoke_all();
    let mut keeper = world.open("");
    for _ in 0..4 {
        until_asked(&world, &mut keeper).await;
        let refused = Some(&Trouble::Refused("this key was revoked".into()));
        assert_eq!(keeper.trouble(), refused);
    }
    assert!(shared.asked()[1..].iter().all(|route| route == "renew"));
    assert!(key() == old && !folder.join("next.pem").exists());
    drop(keeper);

    let token = world.stand_in.another_token();
    let before = shared.asked().len();
    shared.feel(Mood::Mute);
    let mut keeper = world.open(&token);
    until_asked(&world, &mut keeper).await;
    until_asked(&world, &mut keeper).await;
    assert_eq!(shared.asked()[before..], ["renew", "enrol"]);
    assert_eq!(
        shared.keys.lock().unwrap().len(),
        2,
        "it was given, and nobody heard"
    );
    assert!(key() == old, "the old key stays until the new one is taken");
    let mode = std::fs::metadata(folder.join("next.pem"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(keeper);

    shared.feel(Mood::Well);
    let mut keeper = world.open(&token);
    while keeper.trouble().is_some() || shared.keys.lock().unwrap().len() < 3 {
        until_asked(&world, &mut keeper).await;
    }
    {
        let keys = shared.keys.lock().unwrap();
        assert!(keys[1] == keys[2] && keys[0] != keys[1], "the same new key");
    }
    assert!(key() != old && !folder.join("next.pem").exists());
    drop(keeper);
    let keeper = world.open(&token);
    assert!(keeper.certificate().is_some() && keeper.trouble().is_none());
}

/// A new key that waits for a person is asked for again, and not the old one.
#[tokio::test(start_paused = true)]
async fn a_device_that_comes_back_can_wait_for_approval() {
    let world = World::new();
    drop(world.enrolled());
    let shared = &world.stand_in.shared;
    shared.revoke_all();
    shared.feel(Mood::Pending);
    let mut keeper = world.open(&world.stand_in.another_token());
    for _ in 0..4 {
        until_asked(&world, &mut keeper).await;
    }
    assert_eq!(keeper.trouble(), Some(&Trouble::Pending));
    let asked = shared.asked();
    assert_eq!(asked[1..], ["renew", "enrol", "enrol", "enrol"]);
    shared.feel(Mood::Well);
    until_asked(&world, &mut keeper).await;
    assert_eq!(keeper.trouble(), None);
}

#[tokio::test(start_paused = true)]
async fn no_clock_locks_a_device_out() {
    // 1970, and 2099.
    for wrong in [0, 4_070_908_800_000] {
        let world = World::new();
        world.wall(wrong);
        let mut keeper = world.enrolled();
        assert_eq!(
            keeper.time().now_ms(),
            TODAY_MS,
            "the coordinator's word counts"
        );
        let passed = until_asked(&world, &mut keeper).await;
        assert!((passed - 7 * DAY_MS / 2).abs() < 10_000, "{passed}");
        drop(keeper);
        // It starts again, after half a year in a drawer.
        let later = world.stand_in.shared.now_ms() + 50 * DAY_MS;
        world.stand_in.shared.set(later);
        world.wall(wrong);
        let mut keeper = world.open("");
        assert!(
            keeper.time().now_ms() >= TODAY_MS,
            "never before what is known"
        );
        // Its certificate has run out, which it does not know: shown in vain, it is not shown a moment later.
        let passed = until_asked(&world, &mut keeper).await;
        assert!(passed <= 3_001, "{passed}");
        assert_eq!(keeper.time().now_ms(), later + passed);
        assert_eq!(world.stand_in.shared.asked().last().unwrap(), "renew");
    }
}

#[tokio::test(start_paused = true)]
async fn a_doubt_makes_it_ask_once() {
    let world = World::new();
    drop(world.enrolled());
    let mut keeper = world.open("");
    world.pass(2_000).await;
    act(&mut keeper);
    assert_eq!(world.stand_in.shared.asked().len(), 1);
    let errand = keeper.doubted().unwrap();
    assert!(keeper.answered(errand.run()).is_none());
    world.pass(2_000).await;
    assert!(keeper.doubted().is_none(), "it has just been renewed");
    assert_eq!(world.stand_in.shared.asked(), ["enrol", "renew"]);
}

#[tokio::test(start_paused = true)]
async fn whatever_the_disk_loses_the_token_brings_it_back() {
    for (lost, asks) in [
        ("state.json", 1),
        ("ca.pem", 1),
        ("cert.pem", 2),
        ("key.pem", 2),
    ] {
        let world = World::new();
        drop(world.enrolled());
        std::fs::remove_file(world.data.path().join("identity").join(lost)).unwrap();
        let mut keeper = world.open(&world.stand_in.token());
        act(&mut keeper);
        assert_eq!(keeper.trouble(), None, "{lost}");
        let until = keeper.certificate().unwrap().not_after_ms;
        assert_eq!(until, TODAY_MS + 7 * DAY_MS, "{lost}");
        assert_eq!(world.stand_in.shared.asked().len(), asks, "{lost}");
    }
    // Half a certificate is none.
    let world = World::new();
    drop(world.enrolled());
    let path = world.data.path().join("identity/cert.pem");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 3]).unwrap();
    let mut keeper = world.open(&world.stand_in.token());
    assert!(keeper.certificate().is_none());
    act(&mut keeper);
    let whole = std::fs::read_to_string(&path).unwrap();
    assert_eq!(whole.matches("END CERTIFICATE").count(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_for_this_device_is_not_kept() {
    let world = World::new();
    let mut keeper = world.open(&world.stand_in.token());
    for (mood, words) in [(Mood::Misnames, "hall/other"), (Mood::Floods, "no end")] {
        world.stand_in.shared.feel(mood);
        until_asked(&world, &mut keeper).await;
        let Some(Trouble::Failed(why)) = keeper.trouble() else {
            panic!("{:?}", keeper.trouble());
        };
        assert!(why.contains(words), "{why}");
        assert!(!world.data.path().join("identity/cert.pem").exists());
    }
}

/// Whoever pulls the card out has nothing that he could pose as the device with.
#[tokio::test(start_paused = true)]
async fn with_a_storage_key_the_private_key_is_sealed_also_one_from_before() {
    let world = World::new();
    let secrets = tempfile::tempdir().unwrap();
    let secret = |name: &str, byte: u8| {
        let path = secrets.path().join(name);
        std::fs::write(&path, [byte; 32]).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        Some(path)
    };
    let open = |key_file: Option<std::path::PathBuf>, token: &str| {
        let mut config = config(world.data.path(), token);
        config.storage.key_file = key_file;
        Keeper::open(&config, WallClock::shifted(world.offset.clone()))
    };
    let key = world.data.path().join("identity/key.pem");
    let is_plain = || {
        let bytes = std::fs::read(&key).unwrap();
        bytes.windows(7).any(|window| window == b"PRIVATE")
    };
    let token = world.stand_in.token();
    drop(world.enrolled());
    assert!(is_plain());
    // From now on with a key: the device is the same.
    let keeper = open(secret("own", 1), "").unwrap().unwrap();
    assert!(keeper.tls().material().is_some());
    drop(keeper);
    assert!(!is_plain());
    let mode = std::fs::metadata(&key).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    assert!(
        open(secret("own", 1), "")
            .unwrap()
            .unwrap()
            .tls()
            .material()
            .is_some()
    );
    for wrong in [None, secret("other", 2)] {
        let Err(error) = open(wrong, "") else {
            panic!("it opens");
        };
        assert!(error.to_string().contains("storage.key_file"), "{error}");
    }
    // One that is made with a key is never there in the clear.
    std::fs::remove_dir_all(world.data.path().join("identity")).unwrap();
    drop(open(secret("own", 1), &token).unwrap());
    assert!(!is_plain());
}

#[tokio::test(start_paused = true)]
async fn a_key_that_others_can_read_is_refused_with_what_to_do() {
    let world = World::new();
    drop(world.enrolled());
    let key = world.data.path().join("identity/key.pem");
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).unwrap();
    // Whatever the configuration says of an identity.
    for token in ["", &world.stand_in.token()] {
        let config = config(world.data.path(), token);
        let Err(AgentError::Identity(error)) = Agent::start(config, WallClock::system()).await
        else {
            panic!("it starts");
        };
        let words = format!("chmod 600 {}", key.display());
        assert!(matches!(error, IdentityError::Exposed { mode: 0o644, .. }));
        assert!(error.to_string().contains(&words), "{error}");
    }
    let file = world.data.path().join("agent.toml");
    std::fs::write(&file, text(world.data.path(), "")).unwrap();
    for command in ["run", "doctor"] {
        let agent = Command::new(env!("CARGO_BIN_EXE_edge-agent"))
            .args([command, "--config"])
            .arg(&file)
            .output()
            .unwrap();
        let said = [agent.stdout, agent.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(
            !agent.status.success() && said.contains("chmod 600"),
            "{said}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn contradictions_and_clear_text_are_named() {
    let world = World::new();
    let token = world.stand_in.token();
    let mistakes =
        |more: &str| match Config::parse(&format!("{more}\n{}", text(world.data.path(), &token))) {
            Ok(config) => vec![format!("{:?}", config.identity.is_some())],
            Err(ConfigErrors(mistakes)) => mistakes,
        };
    let said = mistakes("site = 'home'");
    assert!(
        said[0].contains("\"home\"") && said[0].contains("\"hall\""),
        "{said:?}"
    );
    assert_eq!(mistakes("site = 'hall'"), ["true"]);
    let clear = "broker.url = 'mqtt://broker:1883'\nsamples.coordinator = 'http://c:1'\nupdate.coordinator = 'http://c:1'";
    let said = mistakes(clear);
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(said.iter().all(|mistake| mistake.contains("not encrypted")));
    assert_eq!(mistakes("broker.url = 'mqtt://127.0.0.1:1883'"), ["true"]);
    let other = tempfile::tempdir().unwrap();
    let clear = |more: &str| Config::parse(&format!("data = {:?}\n{more}", other.path()));
    let said = clear("broker.url = 'mqtts://b'").unwrap_err().to_string();
    assert!(
        said.contains("broker.url") && said.contains("coordinator.token"),
        "{said}"
    );
    let said = clear("coordinator.token = 'hello'")
        .unwrap_err()
        .to_string();
    assert!(
        said.contains("coordinator.token") && !said.contains("hello"),
        "{said}"
    );
    assert!(clear("").unwrap().identity.is_none());
}

#[test]
fn a_person_enrols_a_device_and_the_doctor_knows() {
    let stand_in = StandIn::start(WallClock::system().now_ms(), true);
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("agent.toml");
    std::fs::write(&file, text(data.path(), "")).unwrap();
    let run = |command: &[&str]| {
        let agent = Command::new(env!("CARGO_BIN_EXE_edge-agent"))
            .args(command)
            .arg("--config")
            .arg(&file)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&agent.stdout).into_owned();
        (agent.status.success(), said)
    };
    let token = stand_in.token();
    stand_in.shared.feel(Mood::Refuses("the token has expired"));
    let (fine, said) = run(&["enrol", "--token", &token]);
    assert!(
        !fine && said.contains("refuses: the token has expired"),
        "{said}"
    );
    stand_in.shared.feel(Mood::Well);
    let (fine, said) = run(&["enrol", "--token", &token]);
    assert!(fine && said.contains("enrolled as hall/d1"), "{said}");
    let (fine, said) = run(&["enrol"]);
    assert!(fine && said.contains("enrolled already"), "{said}");
    let (_, said) = run(&["doctor"]);
    assert!(
        said.contains("ok    identity: key there and private; enrolled as hall/d1"),
        "{said}"
    );
    assert!(
        said.contains(&format!("ok    broker: mqtts://{} answers", stand_in.mqtts)),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_connects_as_itself_and_comes_back_with_each_new_certificate() {
    let stand_in = StandIn::start(WallClock::system().now_ms(), true);
    let shared = Arc::clone(&stand_in.shared);
    // Renewed every three seconds.
    shared.life_ms.store(6_000, Ordering::Relaxed);
    let data = tempfile::tempdir().unwrap();
    let agent = Agent::start(config(data.path(), &stand_in.token()), WallClock::system());
    let agent = agent.await.unwrap();
    let begin = tokio::time::Instant::now();
    loop {
        let sessions = shared.sessions.lock().unwrap().clone();
        if sessions.len() >= 3 && sessions[2].messages > 0 {
            for (at, session) in sessions.iter().enumerate() {
                assert_eq!(
                    (session.name.as_str(), session.client_id.as_str()),
                    ("hall/d1", "hall/d1")
                );
                assert!(at > 1 || session.is_over, "it says goodbye: {session:?}");
            }
            assert!(sessions[0].serial != sessions[1].serial);
            assert!(sessions[1].serial != sessions[2].serial);
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "{sessions:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(agent.counters.reconnects.get(), 0, "none of it is a loss");
    agent.stop().await;
}

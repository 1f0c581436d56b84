//! What stands behind the API fails or hangs, one part after the other, and everything else answers.

use std::{path::PathBuf, time::Duration};

use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};

use super::*;
use crate::common::images::{bring_sample, png};

/// Questions of each part that has one and needs nothing but itself.
const QUESTIONS: [(&str, &str); 9] = [
    ("readings", "/api/v1/devices"),
    ("readings", "/api/v1/readings"),
    ("learning", "/api/v1/samples"),
    ("learning", "/api/v1/jobs"),
    ("trust", "/api/v1/users"),
    ("releases", "/api/v1/tuf/metadata/timestamp.json"),
    ("", "/"),
    ("", "/healthz"),
    ("", "/readyz"),
];

/// All but one part answer, while that one does not.
async fn others_answer(http: SocketAddr, but: &str) {
    for (part, path) in QUESTIONS {
        if part != but {
            let (status, said) = get(http, path).await;
            // There are no releases yet, which is an answer.
            let fine = status == 200 || (part == "releases" && status == 404);
            assert!(fine, "{path}: {status} {said}");
        }
    }
    if but != "training" {
        let table =
            json!({"features": [[0.0], [1.0], [0.1], [0.9]], "labels": ["a", "b", "a", "b"]});
        let (status, said) = say(http, "POST /api/v1/train", table).await;
        assert_eq!(status, 200, "{said}");
    }
}

fn get_many(
    http: SocketAddr,
    path: &str,
    count: usize,
) -> Vec<tokio::task::JoinHandle<(u16, Value)>> {
    let ask = || {
        let path = path.to_owned();
        tokio::spawn(async move { get(http, &path).await })
    };
    (0..count).map(|_| ask()).collect()
}

/// All were refused, and told which part is unwell.
async fn refused(part: &str, asked: Vec<tokio::task::JoinHandle<(u16, Value)>>) {
    for asked in asked {
        let (status, said) = timeout(WORK, asked).await.unwrap().unwrap();
        assert_eq!((status, &said["part"]), (503, &json!(part)), "{said}");
    }
}

fn open(part: &str) -> String {
    format!("lacewing_part_open{{part=\"{part}\"}}")
}

/// It is asked again by itself once it is well.
async fn well_again(http: SocketAddr, path: &str) {
    let well = async {
        while get(http, path).await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(WORK, well).await.unwrap();
}

/// The file of the only image.
fn image_file(data: &Path) -> PathBuf {
    let folder = std::fs::read_dir(data.join("objects")).unwrap().next();
    let file = std::fs::read_dir(folder.unwrap().unwrap().path())
        .unwrap()
        .next();
    file.unwrap().unwrap().path()
}

/// A file that nobody ever reads anything from: whoever opens it waits.
struct Hang {
    path: PathBuf,
    aside: PathBuf,
    fifo: PathBuf,
}

impl Hang {
    fn new(path: PathBuf) -> Self {
        let (aside, fifo) = (path.with_extension("aside"), path.with_extension("fifo"));
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        std::fs::hard_link(&path, &aside).unwrap();
        // Another name of the FIFO stays, to end the waiting with.
        let hang = path.with_extension("hang");
        std::fs::hard_link(&fifo, &hang).unwrap();
        std::fs::rename(&hang, &path).unwrap();
        Self { path, aside, fifo }
    }

    /// Puts the file back, and ends the waiting of those who wait.
    async fn end(self) {
        std::fs::rename(&self.aside, &self.path).unwrap();
        let both = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.fifo);
        tokio::time::sleep(Duration::from_millis(200)).await;
        drop(both.unwrap());
        std::fs::remove_file(&self.fifo).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_images_that_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let id = bring_sample(http, 1, &png(64, 1)).await;
    let path = format!("/api/v1/samples/{id}/image");
    assert_eq!(get_status(http, &path).await, 200);
    let hang = Hang::new(image_file(dir.path()));
    let asked = get_many(http, &path, 60);
    others_answer(http, "").await;
    refused("images", asked).await;
    metric_reaches(http, &open("images"), 1.0).await;
    let (status, said) = get(http, "/readyz").await;
    assert_eq!(status, 200);
    assert!(said.as_str().unwrap().contains("unwell: images"), "{said}");
    others_answer(http, "").await;
    hang.end().await;
    let well = async {
        while get_status(http, &path).await != 200 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(WORK, well).await.unwrap();
    assert_eq!(get(http, "/readyz").await.1, "ready\n");
    handle.stop().await;
}

/// The status of what is no text.
async fn get_status(http: SocketAddr, path: &str) -> u16 {
    send(http, &format!("GET {path}"), "", b"").await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_images_that_fails() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let id = bring_sample(http, 1, &png(64, 1)).await;
    let path = format!("/api/v1/samples/{id}/image");
    let (file, aside) = (image_file(dir.path()), dir.path().join("aside"));
    std::fs::rename(&file, &aside).unwrap();
    std::os::unix::fs::symlink(&file, &file).unwrap();
    let mut titles = Vec::new();
    for _ in 0..6 {
        let (status, said) = get(http, &path).await;
        assert_eq!((status, &said["part"]), (503, &json!("images")), "{said}");
        titles.push(said["title"].as_str().unwrap().to_owned());
    }
    // The sixth was not even passed on.
    assert_eq!(&titles[..5], ["Images unavailable"; 5]);
    assert_eq!(titles[5], "Unwell");
    assert_eq!(
        metric(http, "lacewing_part_failed_total{part=\"images\"}").await,
        5.0
    );
    let line = format!("GET {path}");
    let (status, head, _) = send(http, &line, "", b"").await;
    assert!(status == 503 && head.contains("retry-after: "), "{head}");
    others_answer(http, "").await;
    std::fs::remove_file(&file).unwrap();
    std::fs::rename(&aside, &file).unwrap();
    let well = async {
        while get_status(http, &path).await != 200 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(WORK, well).await.unwrap();
    handle.stop().await;
}

/// More want a model than there are places, while it is loaded: the others are told so, and nobody else notices.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_everybody_wants() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    let backbone = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/bundles/backbone");
    config.training.models = vec![backbone];
    config.training.program = vec![env!("CARGO_BIN_EXE_cloud-coordinator").into()];
    let handle = start_as(config).await;
    let http = handle.http;
    let image = png(64, 1);
    let predict = || {
        let image = image.clone();
        tokio::spawn(async move { bring(http, "POST /api/v1/features", "image/png", &image).await })
    };
    let asked: Vec<_> = (0..45).map(|_| predict()).collect();
    others_answer(http, "").await;
    let (mut done, mut busy) = (0, 0);
    for asked in asked {
        match timeout(WORK, asked).await.unwrap().unwrap() {
            (200, _) => done += 1,
            (503, said) => {
                assert_eq!(said["part"], "prediction", "{said}");
                busy += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(done >= 12 && busy >= 1, "{done} done, {busy} told to wait");
    // Too much to do is not unwell.
    assert_eq!(metric(http, &open("prediction")).await, 0.0);
    assert_eq!(predict().await.unwrap().0, 200);
    handle.stop().await;
}

/// Somebody else's program has the databases of labels and of people for itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let options = SqliteConnectOptions::new().filename(dir.path().join("learning.db"));
    let mut foreign = SqliteConnection::connect_with(&options).await.unwrap();
    let held = foreign.begin_with("BEGIN EXCLUSIVE").await.unwrap();
    let label = || {
        tokio::spawn(say(
            http,
            "PUT /api/v1/tasks/steel",
            json!({"classes": ["ok"]}),
        ))
    };
    let asked: Vec<_> = (0..60).map(|_| label()).collect();
    others_answer(http, "learning").await;
    for asked in asked {
        let (status, said) = timeout(WORK, asked).await.unwrap().unwrap();
        assert_eq!(status, 503, "{said}");
    }
    metric_reaches(http, &open("learning"), 1.0).await;
    others_answer(http, "learning").await;
    held.rollback().await.unwrap();
    well_again(http, "/api/v1/samples").await;
    assert_eq!(label().await.unwrap().0, 200);
    handle.stop().await;
}

/// A broker that is connected and stands still.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_hangs() {
    let mosquitto = Mosquitto::start().await;
    let dir = tempfile::tempdir().unwrap();
    let handle = start_with(&mosquitto, dir.path()).await;
    let http = handle.http;
    let mut d1 = device(mosquitto.address, "d1").await;
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, 1))
        .await;
    d1.acknowledged(1, 1).await;
    mosquitto.stands_still(true);
    let line = "POST /api/v1/devices/d1/sources/cam0/mark";
    let mark = || tokio::spawn(say(http, line, json!({"mark": "wrong"})));
    let asked: Vec<_> = (0..100).map(|_| mark()).collect();
    others_answer(http, "broker").await;
    for asked in asked {
        let (status, said) = timeout(WORK, asked).await.unwrap().unwrap();
        assert!(matches!(status, 202 | 503), "{status} {said}");
    }
    mosquitto.stands_still(false);
    well_again(http, "/readyz").await;
    let well = async {
        while mark().await.unwrap().0 != 202 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(WORK, well).await.unwrap();
    handle.stop().await;
}

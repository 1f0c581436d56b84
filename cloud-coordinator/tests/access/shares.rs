//! What one device, or one person, can take away from the others.

use super::*;
use crate::common::site::Site;

/// The largest image.
const IMAGE: u64 = 8 << 20;

fn announced(device: &str, seq: u64) -> Value {
    json!({
        "v": 1, "device": device, "source": "cam0", "epoch": 1, "seq": seq, "ts": 1, "reason": "random",
        "label": "ok", "score": 0.5, "margin": 0.5, "entropy": 0.5, "model": "steel@1",
        "image": {"sha256": format!("{seq:064x}"), "bytes": IMAGE},
    })
}

/// A device that announces image after image and sends none: it takes its share of the store, and others have the rest.
#[tokio::test(flavor = "multi_thread")]
async fn one_device_fills_its_own_share_and_nobody_elses() {
    let site = Site::start_with(tempfile::tempdir().unwrap(), |config| {
        config.samples.max_bytes = 128 * IMAGE;
    })
    .await;
    let (thief, honest) = (site.enrol("d1").await, site.enrol("d2").await);
    let mut door = site.door(Some(&thief)).await.unwrap();
    let line = "POST /api/v1/samples";
    let mut answers = BTreeMap::<u16, usize>::new();
    for seq in 1..=140 {
        door.ready().await.unwrap();
        let asked = common::site::exchange(&mut door, line, Some(announced("d1", seq)), None);
        let (status, said) = asked.await.unwrap();
        *answers.entry(status).or_default() += 1;
        if status == 507 {
            assert!(
                said["detail"].as_str().unwrap().contains("its share"),
                "{said}"
            );
        }
    }
    assert_eq!(answers, BTreeMap::from([(201, 16), (507, 124)]));
    let (status, said) = site
        .try_ask(Some(&honest), line, Some(announced("d2", 1)))
        .await
        .unwrap();
    assert_eq!(status, 201, "{said}");
    // What somebody deletes is free again, and a restart does not forget whose it is.
    let (_, page) = site.ask("GET /api/v1/samples?device=d1", None).await;
    let id = &page["items"][0]["id"];
    assert_eq!(
        site.ask(&format!("DELETE /api/v1/samples/{id}"), None)
            .await
            .0,
        204
    );
    site.handle.stop().await;
    let site = Site::start_with(site.dir, |config| {
        config.samples.max_bytes = 128 * IMAGE;
    })
    .await;
    for (seq, expected) in [(150, 201), (151, 507)] {
        let asked = site.try_ask(Some(&thief), line, Some(announced("d1", seq)));
        assert_eq!(asked.await.unwrap().0, expected, "{seq}");
    }
    site.handle.stop().await;
}

/// Who watches has so many places, and leaves the others theirs.
#[tokio::test(flavor = "multi_thread")]
async fn one_person_does_not_take_all_places_of_those_who_watch() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let setup =
        json!({"token": setup_token(dir.path()), "name": "root", "password": "long enough 1"});
    assert_eq!(tell(http, "", "POST /api/v1/setup", setup).await.0, 201);
    let root = log_in(http, "root", "long enough 1").await.unwrap();
    let watch = async |who: &str| {
        let mut stream = TcpStream::connect(http).await.unwrap();
        let text = format!("GET /api/v1/live HTTP/1.1\r\nhost: x\r\n{who}\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut head = [0; 12];
        timeout(PATIENCE, stream.read_exact(&mut head))
            .await
            .unwrap()
            .unwrap();
        let status: u16 = std::str::from_utf8(&head[9..]).unwrap().parse().unwrap();
        (status, stream)
    };
    let machine = shown(http);
    let mut held = Vec::new();
    for n in 0..40 {
        // By whatever it shows: the tokens of one person are not more people.
        let who = match n % 10 {
            0 => token(http, "viewer", None).await,
            _ => machine.clone(),
        };
        held.push(watch(&who).await);
    }
    assert_eq!(held.iter().filter(|(status, _)| *status == 200).count(), 32);
    let (status, _own) = watch(&root).await;
    assert_eq!(status, 200);
    // They hold no places of requests.
    held.clear();
    let again = async {
        while watch(&machine).await.0 != 200 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, again).await.unwrap();
    handle.stop().await;
}

//! What a device may, by its own certificate over TLS; and what nobody may with another's.

use super::*;
use crate::common::site::{Badge, LIFE_S, Site, exchange};

/// The status of a request; each has a connection of its own, since who is refused may be hung up on.
async fn code(site: &Site, badge: Option<&Badge>, line: &str, token: Option<String>) -> u16 {
    let mut sender = site.door(badge).await.unwrap();
    let asked = exchange(&mut sender, line, Some(json!({})), token);
    timeout(PATIENCE, asked).await.unwrap().unwrap().0
}

/// Longer than any test.
const LONG_S: u64 = 86_400;

fn own(path: &str) -> String {
    // The only path that names a device and is for devices.
    path.replace("/samples/nothing/", "/samples/d1/")
}

/// Each operation, asked by a device with a certificate and by nobody, over TLS.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_may_exactly_what_is_declared() {
    let site = Site::living(LONG_S).await;
    let badge = site.enrol("d1").await;
    let (_, description) = site.ask("GET /api/v1/openapi.json", None).await;
    let operations = operations(&description);
    assert!(operations.len() > 60, "{}", operations.len());
    let (mut may, mut may_not, mut wrong) = (0, 0, Vec::new());
    for (method, path, declared, _) in &operations {
        let declared = declared.as_str().unwrap_or("nobody");
        let line = format!("{method} {}", own(path));
        let words: Vec<_> = declared.split(" or ").collect();
        let everybody = words.contains(&"open") || words.contains(&"loopback");
        let devices = everybody || words.contains(&"device");
        let got = code(&site, Some(&badge), &line, None).await;
        let fits = match devices {
            true => got != 401 && got != 403 && got != 429,
            false => got == 403,
        };
        if !fits {
            wrong.push(format!("{line} ({declared}) as a device: {got}"));
        }
        // With certificates there is nobody who counts as a device without one.
        let got = code(&site, None, &line, None).await;
        let fits = match everybody {
            true => got != 401 && got != 403 && got != 429,
            false => got == 401,
        };
        if !fits {
            wrong.push(format!("{line} ({declared}) as nobody: {got}"));
        }
        *(if devices { &mut may } else { &mut may_not }) += 1;
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    println!("a device may {may} and may not {may_not}");
    assert!(may >= 10 && may_not >= 40, "{may} {may_not}");
    site.handle.stop().await;
}

/// How often a device may have the coordinator look at frames, over one connection, before it is told to wait.
async fn looked(site: &Site, badge: &Badge) -> usize {
    let line = format!("POST /api/v1/offload/{}", "0".repeat(64));
    let mut sender = site.door(Some(badge)).await.unwrap();
    for n in 0..500 {
        sender.ready().await.unwrap();
        let asked = exchange(&mut sender, &line, Some(json!({})), None);
        match timeout(PATIENCE, asked).await.unwrap().unwrap().0 {
            404 => {}
            429 => return n,
            status => panic!("{status}"),
        }
    }
    panic!("without end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_has_only_so_many_frames_looked_at() {
    let site = Site::living(LONG_S).await;
    let (d1, d2) = (site.enrol("d1").await, site.enrol("d2").await);
    assert!(looked(&site, &d1).await >= 30);
    // That is all that it has to wait with, and nobody else has.
    let line = "GET /api/v1/tuf/metadata/timestamp.json";
    assert_ne!(code(&site, Some(&d1), line, None).await, 429);
    assert!(looked(&site, &d2).await >= 30);
    site.handle.stop().await;
}

fn sample(device: &str) -> Value {
    json!({
        "v": 1, "device": device, "source": "cam0", "epoch": 1, "seq": 1, "ts": 1, "reason": "random",
        "label": "ok", "score": 0.5, "margin": 0.5, "entropy": 0.5, "model": "steel@1",
        "image": {"sha256": "0".repeat(64), "bytes": 4},
    })
}

/// What devices may, and what is asked for it.
const FOR_DEVICES: [&str; 5] = [
    "POST /api/v1/samples",
    "PATCH /api/v1/samples/d1/1/1/image",
    "GET /api/v1/tuf/metadata/timestamp.json",
    "GET /api/v1/tuf/targets/models/steel/1.json",
    "GET /api/v1/chunks/0000000000000000000000000000000000000000000000000000000000000000",
];

#[tokio::test(flavor = "multi_thread")]
async fn nobody_sends_or_fetches_as_somebody_else() {
    let brief = Site::start().await;
    let old = brief.enrol("d1").await;
    let site = Site::living(LONG_S).await;
    let (d1, d2) = (site.enrol("d1").await, site.enrol("d2").await);
    let send = async |badge: &Badge, line: &str, body: Value| {
        site.try_ask(Some(badge), line, Some(body)).await
    };
    // Its own is taken, under the site of its certificate.
    let line = "POST /api/v1/samples";
    assert_eq!(send(&d1, line, sample("d1")).await.unwrap().0, 201);
    let (_, page) = site.ask("GET /api/v1/samples", None).await;
    assert_eq!(page["items"][0]["site"], "demo", "{page}");
    // Another's is not, whether it is there or not.
    for (badge, line, body) in [
        (&d2, "POST /api/v1/samples", sample("d1")),
        (&d2, "PATCH /api/v1/samples/d1/1/1/image", json!({})),
        (&d2, "PATCH /api/v1/samples/d3/1/1/image", json!({})),
        (&d1, "POST /api/v1/samples", sample("d2")),
    ] {
        let mut sender = site.door(Some(badge)).await.unwrap();
        let (method, path) = line.split_once(' ').unwrap();
        let request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "x")
            .header("upload-offset", "0")
            .body(axum::body::Body::from(body.to_string()))
            .unwrap();
        let answer = timeout(PATIENCE, sender.send_request(request)).await;
        assert_eq!(answer.unwrap().unwrap().status(), 403, "{line}");
    }
    let (_, page) = site.ask("GET /api/v1/samples", None).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 1, "{page}");

    // Who shows no certificate, a token that is none, or the certificate of another authority.
    let stranger = Site::start().await;
    let foreign = stranger.enrol("d1").await;
    stranger.handle.stop().await;
    for line in FOR_DEVICES {
        assert_eq!(code(&site, None, line, None).await, 401, "{line}");
        let token = Some("not.a.token".to_owned());
        assert_eq!(code(&site, None, line, token).await, 401, "{line}");
        assert!(send(&foreign, line, json!({})).await.is_err(), "{line}");
    }

    // One that was revoked, and one whose certificate has run out, do not even get to ask.
    for line in FOR_DEVICES {
        let (status, said) = send(&d2, line, json!({})).await.unwrap();
        assert!(status != 401, "{line}: {status} {said}");
    }
    let revoke = "POST /api/v1/identities/demo/d2/revoke";
    assert_eq!(site.ask(revoke, None).await.0, 200);
    tokio::time::sleep(std::time::Duration::from_secs(LIFE_S + 2)).await;
    for line in FOR_DEVICES {
        assert!(send(&d2, line, json!({})).await.is_err(), "{line}");
        let refused = brief.try_ask(Some(&old), line, Some(json!({}))).await;
        assert!(refused.is_err(), "{line}: {refused:?}");
    }
    assert!(send(&d1, FOR_DEVICES[4], json!({})).await.is_ok());
    brief.handle.stop().await;
    site.handle.stop().await;
}

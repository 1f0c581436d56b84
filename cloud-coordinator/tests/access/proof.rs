//! Who gets a certificate has proven who asks, and what is refused of it is written down.

use rcgen::KeyPair;

use super::*;
use crate::common::site::{Badge, Site, csr, csr_with};

const RENEW: &str = "POST /api/v1/renew";
/// Certificates of a key that may hold at a time.
const AT_A_TIME: usize = 128;

async fn renew(site: &Site, shown: Option<&Badge>, csr: &str) -> (u16, Value) {
    let asked = site.try_ask(shown, RENEW, Some(json!({"csr": csr}))).await;
    asked.unwrap()
}

fn challenge(said: &Value) -> &str {
    said["challenge"].as_str().unwrap()
}

/// A request that somebody heard and kept is worth nothing, however often it is sent, and keeps nobody from renewing.
#[tokio::test(flavor = "multi_thread")]
async fn who_renews_shows_the_certificate_or_signs_what_it_is_told() {
    let site = Site::living(86_400).await;
    let (d1, d2) = (site.enrol("d1").await, site.enrol("d2").await);
    let heard = csr(&d1.key, "demo/d1");
    for _ in 0..AT_A_TIME + 2 {
        let (status, said) = renew(&site, None, &heard).await;
        assert_eq!(status, 401, "{said}");
        assert!(said.get("certificate").is_none(), "{said}");
    }
    assert_eq!(
        renew(&site, Some(&d2), &heard).await.0,
        401,
        "another's certificate"
    );
    let (status, said) = renew(&site, Some(&d1), &heard).await;
    assert_eq!(status, 200, "{said}");
    assert_eq!(said["device"], "d1");

    // Without a certificate that counts: once for each challenge, and only with the key.
    let (_, said) = renew(&site, None, &heard).await;
    let signed = csr_with(&d1.key, "demo/d1", challenge(&said));
    assert_eq!(renew(&site, None, &signed).await.0, 200);
    for _ in 0..AT_A_TIME + 2 {
        assert_eq!(renew(&site, None, &signed).await.0, 401);
    }
    let (_, said) = renew(&site, None, &heard).await;
    let stranger = KeyPair::generate().unwrap();
    let forged = csr_with(&stranger, "demo/d1", challenge(&said));
    assert_eq!(renew(&site, None, &forged).await.0, 403);
    let own = csr_with(&d1.key, "demo/d1", "a challenge of somebody else");
    assert_eq!(renew(&site, None, &own).await.0, 401);
    assert_eq!(renew(&site, Some(&d1), &heard).await.0, 200);
    site.handle.stop().await;
}

/// Abuses 29 and 30: refused, counted each time, and written down – the first of each kind, since who is refused must not fill
/// the log.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_taken_in_is_written_down() {
    const TIMES: usize = 30;
    let site = Site::living(86_400).await;
    let token = site.token(json!({"device": "d1"})).await;
    let key = KeyPair::generate().unwrap();
    let (status, said) = site.show(&token, "d1", &csr(&key, "demo/d1")).await;
    assert_eq!(status, 200, "{said}");
    let other = KeyPair::generate().unwrap();
    for _ in 0..TIMES {
        // A token that was used, a request for another's name, and a key that nobody knows.
        let (status, _) = site.show(&token, "d1", &csr(&other, "demo/d1")).await;
        assert_eq!(status, 403);
        let (status, _) = site.show(&token, "d1", &csr(&other, "demo/d2")).await;
        assert_eq!(status, 403);
        assert_eq!(renew(&site, None, &csr(&other, "demo/d1")).await.0, 403);
    }
    for reason in ["token used up", "signing request", "unknown key"] {
        let counted = format!("lacewing_enrolment_refused_total{{reason=\"{reason}\"}}");
        assert_eq!(site.metric(&counted).await, TIMES as f64, "{reason}");
    }
    let (_, lines) = site.ask("GET /api/v1/audit?limit=1000", None).await;
    let refused: Vec<_> = lines
        .as_array()
        .unwrap()
        .iter()
        .filter(|line| line["outcome"] == "refused")
        .collect();
    assert_eq!(refused.len(), 3, "{refused:#?}");
    for (action, object, why) in [
        ("enrol", "device demo/d1", "the token is used up"),
        ("enrol", "device demo/d1", "names \"demo/d2\""),
        ("renew", "device", "not enrolled"),
    ] {
        let fits = |line: &&&Value| {
            let detail = line["detail"].as_str().unwrap();
            line["action"] == action && line["object"] == object && detail.contains(why)
        };
        let line = refused.iter().find(fits);
        assert_eq!(line.unwrap()["who"], "127.0.0.1", "{why}");
    }
    site.handle.stop().await;
}

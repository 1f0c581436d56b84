//! Somebody asks for much and reads nothing of it.

use std::{sync::Arc, time::Duration};

use axum::body::Body;
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;

use super::*;
use crate::common::{
    images::{bring_sample, png},
    site::Site,
};

/// Over HTTP/2, with a window of nothing: what is answered lies in the coordinator's memory, and is not more than a share. Then
/// the connection ends, and what it held is free.
#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_holds_a_share_of_the_memory_and_not_for_long() {
    const ASKED: usize = 30;
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let picture = png(2_640, 1);
    assert!((6 << 20..8 << 20).contains(&picture.len()));
    let id = bring_sample(handle.http, 1, &picture).await;
    handle.stop().await;
    let site = Site::start_with(dir, |_| {}).await;
    let path = format!("/api/v1/samples/{id}/image");
    let viewer = json!({"label": "thief", "role": "viewer"});
    let (status, made) = site.ask("POST /api/v1/tokens", Some(viewer)).await;
    assert_eq!(status, 201, "{made}");
    let bearer = format!("Bearer {}", made["token"].as_str().unwrap());

    let mut tls = (*site.tls(None)).clone();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(site.handle.http).await.unwrap();
    let name = ServerName::from(site.handle.http.ip());
    let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream);
    let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(0)
        .handshake::<_, Body>(TokioIo::new(stream.await.unwrap()))
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    let begin = tokio::time::Instant::now();
    let (mut held, mut refused) = (Vec::new(), 0);
    for _ in 0..ASKED {
        let request = Request::get(format!("https://127.0.0.1{path}"))
            .header("authorization", &bearer)
            .body(Body::empty())
            .unwrap();
        let answer = timeout(PATIENCE, sender.clone().send_request(request)).await;
        let answer = answer.unwrap().unwrap();
        match answer.status().as_u16() {
            200 => held.push(answer),
            503 => refused += 1,
            other => panic!("{other}"),
        }
    }
    let share = (64 << 20) / picture.len();
    assert_eq!((held.len(), refused), (share, ASKED - share));
    let counted = "lacewing_access_refused_total{reason=\"unread\"}";
    assert_eq!(site.metric(counted).await, refused as f64);

    // Nobody takes a byte of it: the connection ends within a minute.
    let ended = timeout(Duration::from_secs(75), connection).await;
    assert!(ended.is_ok(), "it is held for ever");
    assert!(
        begin.elapsed() > Duration::from_secs(25),
        "{:?}",
        begin.elapsed()
    );
    let stalled = "lacewing_http_refused_total{reason=\"an answer that is not read\"}";
    assert_eq!(site.metric(stalled).await, 1.0);
    // What was held is free: as much may be asked for again.
    let mut door = site.door(None).await.unwrap();
    for _ in 0..share + 2 {
        let request = Request::get(&path)
            .header("host", "x")
            .header("authorization", &bearer);
        door.ready().await.unwrap();
        let answer = door.send_request(request.body(Body::empty()).unwrap());
        let answer = timeout(PATIENCE, answer).await.unwrap().unwrap();
        assert_eq!(answer.status(), 200);
        let got = axum::body::to_bytes(Body::new(answer.into_body()), 8 << 20);
        assert!(got.await.unwrap() == picture);
    }
    site.handle.stop().await;
}

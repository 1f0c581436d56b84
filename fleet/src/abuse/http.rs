//! Against the API.

use std::time::Duration;

use tokio::task::JoinSet;

use super::{
    Abuse, Enemy, SOON, hear,
    mqtt::{Done, abuse},
    shove,
};

macro_rules! refused {
    ($reason:literal) => {
        Some(concat!(
            "lacewing_http_refused_total{reason=\"",
            $reason,
            "\"}"
        ))
    };
}

pub(super) const ALL: [Abuse; 7] = [
    abuse!(
        "a thousand headers that come a byte at a time",
        refused!("silent"),
        Some("no request was here in time"),
        slow_headers
    ),
    abuse!(
        "a body without an end",
        Some("lacewing_http_requests_total{route=\"/api/v1/enrol\",status=\"413\"}"),
        None,
        endless_body
    ),
    abuse!(
        "bodies that stop half-way",
        Some("lacewing_http_requests_total{route=\"/api/v1/enrol\",status=\"503\"}"),
        None,
        slow_bodies
    ),
    abuse!(
        "handshakes with the API that never go on",
        refused!("too many handshakes at once"),
        Some("too many handshakes"),
        half_open
    ),
    abuse!(
        "plain HTTP",
        refused!("plain text where TLS is spoken"),
        Some("this port speaks https"),
        plain
    ),
    abuse!(
        "headers of a megabyte",
        Some("lacewing_http_refused_total{reason=\"the request cannot be read\"}"),
        Some("the request cannot be read"),
        huge_headers
    ),
    abuse!(
        "a device that asks for what operators do",
        Some("lacewing_access_refused_total{reason=\"role\"}"),
        None,
        above_itself
    ),
];

/// Connections with headers that drip, and the time from one byte to the next.
const DRIPPING: usize = 1_000;
const DRIP: Duration = Duration::from_secs(3);
/// Requests that are begun at the same time.
const AT_ONCE: usize = 200;

/// Connections whose headers come a byte at a time, until each is cut.
async fn slow_headers(enemy: &Enemy) -> anyhow::Result<()> {
    let mut dripping = JoinSet::new();
    for _ in 0..DRIPPING {
        // Whoever is not let in has been refused, and the others go on.
        let Ok(mut stream) = enemy.tls(enemy.http, &enemy.nobody).await else {
            continue;
        };
        dripping.spawn(async move {
            let until = tokio::time::Instant::now() + SOON + SOON;
            shove(&mut stream, b"GET / HTTP/1.1\r\nhost: x\r\nx-").await;
            while shove(&mut stream, b"a").await && tokio::time::Instant::now() < until {
                if !hear(&mut stream, DRIP).await.is_empty() {
                    break;
                }
            }
        });
    }
    dripping.join_all().await;
    Ok(())
}

async fn endless_body(enemy: &Enemy) -> anyhow::Result<()> {
    let mut stream = enemy.tls(enemy.http, &enemy.nobody).await?;
    let head = b"POST /api/v1/enrol HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    shove(&mut stream, head).await;
    let chunk = [&b"1000\r\n"[..], &[b' '; 0x1000], b"\r\n"].concat();
    for _ in 0..256 {
        if !shove(&mut stream, &chunk).await {
            break;
        }
    }
    hear(&mut stream, Duration::from_secs(2)).await;
    Ok(())
}

async fn slow_bodies(enemy: &Enemy) -> anyhow::Result<()> {
    let mut held = Vec::new();
    for _ in 0..AT_ONCE {
        let mut stream = enemy.tls(enemy.http, &enemy.nobody).await?;
        let head = b"POST /api/v1/enrol HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9000\r\n\r\n{";
        shove(&mut stream, head).await;
        held.push(stream);
    }
    if let Some(first) = held.first_mut() {
        hear(first, SOON + SOON).await;
    }
    Ok(())
}

async fn half_open(enemy: &Enemy) -> anyhow::Result<()> {
    let mut held = Vec::new();
    for _ in 0..1_200 {
        let Ok(stream) = enemy.tcp(enemy.http).await else {
            break;
        };
        held.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    Ok(())
}

async fn plain(enemy: &Enemy) -> anyhow::Result<()> {
    let mut stream = enemy.tcp(enemy.http).await?;
    shove(&mut stream, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let said = hear(&mut stream, SOON).await;
    anyhow::ensure!(
        said.starts_with(b"HTTP/1.1 400 "),
        "it is not told what to do"
    );
    Ok(())
}

async fn huge_headers(enemy: &Enemy) -> anyhow::Result<()> {
    let mut stream = enemy.tls(enemy.http, &enemy.nobody).await?;
    shove(&mut stream, b"GET / HTTP/1.1\r\nhost: x\r\nx-long: ").await;
    for _ in 0..16 {
        if !shove(&mut stream, &[b'a'; 65_536]).await {
            break;
        }
    }
    hear(&mut stream, SOON).await;
    Ok(())
}

async fn above_itself(enemy: &Enemy) -> anyhow::Result<()> {
    for what in ["GET /api/v1/users", "DELETE /api/v1/subscribers/x"] {
        let mut stream = enemy.tls(enemy.http, &enemy.device).await?;
        let ask = format!("{what} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        shove(&mut stream, ask.as_bytes()).await;
        let said = hear(&mut stream, SOON).await;
        anyhow::ensure!(said.starts_with(b"HTTP/1.1 40"), "it is let in");
    }
    Ok(())
}

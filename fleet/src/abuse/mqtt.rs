//! Against the broker.

use std::{future::Future, io, pin::Pin, time::Duration};

use rustls::{ClientConnection, pki_types::ServerName};
use tokio::{io::AsyncReadExt, net::TcpStream};
use tokio_rustls::client::TlsStream;

use super::{Abuse, Enemy, SOON, hear, shove};

pub(super) type Done<'a> = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send + 'a>>;

macro_rules! refused {
    ($reason:literal) => {
        Some(concat!(
            "lacewing_broker_refused_total{reason=\"",
            $reason,
            "\"}"
        ))
    };
}
macro_rules! denied {
    ($reason:literal) => {
        Some(concat!(
            "lacewing_broker_denied_total{reason=\"",
            $reason,
            "\"}"
        ))
    };
}
macro_rules! abuse {
    ($name:literal, $counter:expr, $log:expr, $stroke:path) => {{
        fn stroke(enemy: &Enemy) -> Done<'_> {
            Box::pin($stroke(enemy))
        }
        Abuse {
            name: $name,
            counter: $counter,
            log: $log,
            stroke,
        }
    }};
}
pub(super) use abuse;

pub(super) const ALL: [Abuse; 19] = [
    abuse!(
        "an answer before CONNECT",
        refused!("the first packet is not CONNECT"),
        Some("the first packet is not CONNECT"),
        answer_first
    ),
    abuse!(
        "a first packet that claims 256 MB",
        refused!("malformed before CONNECT"),
        Some("malformed before CONNECT"),
        claims
    ),
    abuse!(
        "a topic without a letter",
        refused!("sent away"),
        Some("broke the protocol"),
        empty_topic
    ),
    abuse!(
        "a client id that is a wildcard",
        refused!("client id with a wildcard or a control character"),
        Some("client id with a wildcard"),
        wildcard_id
    ),
    abuse!(
        "retained on another device's topic",
        denied!("publish"),
        Some("may not publish"),
        others_topic
    ),
    abuse!(
        "a last will for another device",
        refused!("the last will is not on the client's own status"),
        Some("last will is not on"),
        others_will
    ),
    abuse!(
        "a subscriber that does not read",
        Some("lacewing_broker_cut_total"),
        None,
        does_not_read
    ),
    abuse!(
        "a flood of subscriptions",
        denied!("have another subscription beside 128 to"),
        Some("beside 128"),
        subscriptions
    ),
    abuse!(
        "a filter of 30,000 levels",
        denied!("subscribe to"),
        Some("may not subscribe"),
        deep_filter
    ),
    abuse!(
        "more retained messages than a device may have",
        denied!("retain another message on"),
        Some("retain another"),
        retained
    ),
    abuse!(
        "handshakes that never go on",
        refused!("too many handshakes at once"),
        Some("too many handshakes"),
        half_open
    ),
    abuse!(
        "handshakes that end after their first word",
        refused!("closed before the handshake"),
        None,
        hello_and_gone
    ),
    abuse!(
        "noise instead of a handshake",
        refused!("the handshake failed"),
        Some("the handshake failed"),
        noise
    ),
    abuse!(
        "plain text",
        refused!("plain text where TLS is spoken"),
        Some("plain text"),
        plain
    ),
    abuse!(
        "sessions of one device that push each other out",
        Some("lacewing_broker_replaced_total"),
        None,
        take_over
    ),
    abuse!(
        "messages at QoS 2 without an end",
        refused!("sent away"),
        Some("without a release"),
        never_released
    ),
    abuse!(
        "a topic that is no text",
        refused!("sent away"),
        Some("Topic is not UTF-8"),
        no_text
    ),
    abuse!(
        "passwords that are guessed",
        refused!("a wrong name or password"),
        Some("a wrong name or password"),
        guess
    ),
    abuse!(
        "filters that match everything, many times",
        None,
        None,
        match_everything
    ),
];

/// A packet of this kind.
fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    let mut left = body.len();
    loop {
        let digit = (left % 128) as u8;
        left /= 128;
        out.push(if left > 0 { digit | 0x80 } else { digit });
        if left == 0 {
            break;
        }
    }
    out.extend(body);
    out
}

fn text(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], text].concat()
}

fn connect(id: &str, will: Option<&str>, login: Option<(&str, &str)>) -> Vec<u8> {
    let mut flags = 0x02;
    let mut rest = text(id);
    if let Some(topic) = will {
        // At QoS 1, retained.
        flags |= 0x04 | 0x08 | 0x20;
        rest.extend([text(topic), text("offline")].concat());
    }
    if let Some((name, password)) = login {
        flags |= 0xc0;
        rest.extend([text(name), text(password)].concat());
    }
    let head = [&text("MQTT")[..], &[4, flags, 0, 60]].concat();
    packet(0x10, &[head, rest].concat())
}

fn publish(topic: impl AsRef<[u8]>, flags: u8, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut body = text(topic);
    if flags & 0x06 != 0 {
        body.extend(id.to_be_bytes());
    }
    body.extend(payload);
    packet(0x30 | flags, &body)
}

fn subscribe(id: u16, filters: impl IntoIterator<Item = String>) -> Vec<u8> {
    let mut body = id.to_be_bytes().to_vec();
    for filter in filters {
        body.extend(text(filter));
        body.push(1);
    }
    packet(0x82, &body)
}

const DISCONNECT: [u8; 2] = [0xe0, 0];

impl Enemy {
    /// Says this as nobody in particular, and hears the end.
    async fn say(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let mut stream = self.tls(self.mqtt, &self.nobody).await?;
        shove(&mut stream, bytes).await;
        hear(&mut stream, SOON).await;
        Ok(())
    }

    /// In as a device.
    async fn inside(&self) -> io::Result<TlsStream<TcpStream>> {
        let mut stream = self.tls(self.mqtt, &self.device).await?;
        shove(&mut stream, &connect("", None, None)).await;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await?;
        Ok(stream)
    }

    /// In as a subscriber.
    async fn listening(&self) -> io::Result<TlsStream<TcpStream>> {
        let mut stream = self.tls(self.mqtt, &self.nobody).await?;
        let login = (self.login.0.as_str(), self.login.1.as_str());
        shove(&mut stream, &connect("", None, Some(login))).await;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await?;
        Ok(stream)
    }

    /// Says this as a device, says goodbye, and hears the end.
    async fn misbehave(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let mut stream = self.inside().await?;
        if shove(&mut stream, bytes).await {
            shove(&mut stream, &DISCONNECT).await;
        }
        hear(&mut stream, SOON).await;
        Ok(())
    }

    fn own(&self, rest: &str) -> String {
        format!("lacewing/v1/{}/{}/{rest}", self.name.0, self.name.1)
    }
}

async fn answer_first(enemy: &Enemy) -> anyhow::Result<()> {
    enemy.say(&[0x40, 2, 0, 1]).await
}

async fn claims(enemy: &Enemy) -> anyhow::Result<()> {
    enemy.say(&[0x30, 0xff, 0xff, 0xff, 0x7f, 0, 1, b'a']).await
}

async fn empty_topic(enemy: &Enemy) -> anyhow::Result<()> {
    enemy.misbehave(&publish("", 0, 0, b"x")).await
}

async fn wildcard_id(enemy: &Enemy) -> anyhow::Result<()> {
    for id in ["#", "+"] {
        let mut stream = enemy.tls(enemy.mqtt, &enemy.device).await?;
        shove(&mut stream, &connect(id, None, None)).await;
        hear(&mut stream, SOON).await;
    }
    Ok(())
}

async fn others_topic(enemy: &Enemy) -> anyhow::Result<()> {
    let one = |n: u16| publish("lacewing/v1/demo/d1/_/status", 0x03, n, b"offline");
    let many: Vec<u8> = (1..=200).flat_map(one).collect();
    enemy.misbehave(&many).await
}

async fn others_will(enemy: &Enemy) -> anyhow::Result<()> {
    let mut stream = enemy.tls(enemy.mqtt, &enemy.device).await?;
    let will = Some("lacewing/v1/demo/d1/_/status");
    shove(&mut stream, &connect("", will, None)).await;
    hear(&mut stream, SOON).await;
    Ok(())
}

/// Its queue fills with what the same enemy sends.
async fn does_not_read(enemy: &Enemy) -> anyhow::Result<()> {
    let mut slow = enemy.listening().await?;
    shove(&mut slow, &subscribe(1, [enemy.own("#")])).await;
    let mut stream = enemy.inside().await?;
    let body = vec![b'x'; 60_000];
    for n in 1..=400 {
        if !shove(
            &mut stream,
            &publish(enemy.own("cam0/image"), 0x02, n, &body),
        )
        .await
        {
            break;
        }
    }
    shove(&mut stream, &DISCONNECT).await;
    hear(&mut stream, SOON).await;
    Ok(())
}

async fn subscriptions(enemy: &Enemy) -> anyhow::Result<()> {
    let filters = |n: u16| (0..200).map(move |m| (n, m));
    let packets = (1..=10).flat_map(|n| {
        let all = filters(n).map(|(n, m)| enemy.own(&format!("{n}-{m}/+")));
        subscribe(n, all)
    });
    let packets: Vec<u8> = packets.collect();
    enemy.misbehave(&packets).await
}

async fn deep_filter(enemy: &Enemy) -> anyhow::Result<()> {
    let filter = enemy.own(&"/".repeat(30_000));
    enemy.misbehave(&subscribe(1, [filter])).await
}

async fn retained(enemy: &Enemy) -> anyhow::Result<()> {
    let one = |n: u16| publish(enemy.own(&format!("s{n}/state")), 0x03, n, b"{}");
    let many: Vec<u8> = (1..=300).flat_map(one).collect();
    enemy.misbehave(&many).await
}

/// More of them than the door has places.
async fn half_open(enemy: &Enemy) -> anyhow::Result<()> {
    let mut held = Vec::new();
    for n in 0..1_200 {
        let Ok(mut stream) = enemy.tcp(enemy.mqtt).await else {
            break;
        };
        // Some have begun a record, which never ends.
        if n % 2 == 0 {
            shove(&mut stream, &[22, 3, 1, 2, 0, 1]).await;
        }
        held.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    Ok(())
}

async fn hello_and_gone(enemy: &Enemy) -> anyhow::Result<()> {
    for _ in 0..100 {
        let name = ServerName::from(enemy.mqtt.ip());
        let mut session = ClientConnection::new(enemy.nobody.clone(), name)?;
        let mut hello = Vec::new();
        session.write_tls(&mut hello)?;
        let mut stream = enemy.tcp(enemy.mqtt).await?;
        shove(&mut stream, &hello).await;
    }
    Ok(())
}

async fn noise(enemy: &Enemy) -> anyhow::Result<()> {
    for length in 1..=20_u8 {
        let mut stream = enemy.tcp(enemy.mqtt).await?;
        let noise: Vec<u8> = (0..length).map(|n| n.wrapping_mul(37)).collect();
        shove(&mut stream, &[&[22, 3, 1, 0, length], &noise[..]].concat()).await;
        hear(&mut stream, SOON).await;
    }
    Ok(())
}

async fn plain(enemy: &Enemy) -> anyhow::Result<()> {
    let mut stream = enemy.tcp(enemy.mqtt).await?;
    shove(&mut stream, &connect("demo/d1", None, None)).await;
    hear(&mut stream, SOON).await;
    Ok(())
}

async fn take_over(enemy: &Enemy) -> anyhow::Result<()> {
    let mut last = Vec::new();
    for _ in 0..30 {
        last.push(enemy.inside().await?);
    }
    Ok(())
}

async fn never_released(enemy: &Enemy) -> anyhow::Result<()> {
    let one = |n: u16| publish(enemy.own("cam0/image"), 0x04, n, b"x");
    let many: Vec<u8> = (1..=400).flat_map(one).collect();
    enemy.misbehave(&many).await
}

async fn no_text(enemy: &Enemy) -> anyhow::Result<()> {
    enemy
        .misbehave(&publish([0xff, 0xfe, b'/'], 0, 0, b"x"))
        .await
}

async fn guess(enemy: &Enemy) -> anyhow::Result<()> {
    for n in 0..5 {
        let mut stream = enemy.tls(enemy.mqtt, &enemy.nobody).await?;
        let wrong = format!("not the password {n}");
        let login = Some((enemy.login.0.as_str(), wrong.as_str()));
        shove(&mut stream, &connect("", None, login)).await;
        hear(&mut stream, SOON).await;
    }
    Ok(())
}

/// Allowed, and as costly for the broker as filters can be.
async fn match_everything(enemy: &Enemy) -> anyhow::Result<()> {
    let mut stream = enemy.listening().await?;
    // Each level is one of two: what it is, or any.
    let levels = ["v1", "demo", "d1", "cam0", "result"];
    let filters = (0..32_u8).map(|bits| {
        let level = |(n, level): (usize, &str)| match bits >> n & 1 {
            0 => "+".to_owned(),
            _ => level.to_owned(),
        };
        let rest: Vec<String> = levels.into_iter().enumerate().map(level).collect();
        format!("lacewing/{}", rest.join("/"))
    });
    shove(&mut stream, &subscribe(1, filters)).await;
    hear(&mut stream, Duration::from_secs(2)).await;
    Ok(())
}

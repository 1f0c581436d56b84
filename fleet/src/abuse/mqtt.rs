//! Against the broker.

use std::{future::Future, pin::Pin, time::Duration};

use rustls::{ClientConnection, pki_types::ServerName};
use tokio::io::AsyncReadExt;

use super::{
    Abuse, Enemy, SOON, hear,
    packets::{connect, publish, subscribe},
    shove,
};

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
pub(super) use denied;
pub(super) use refused;

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
        "a subscriber that reads a byte now and then",
        Some("lacewing_broker_cut_total"),
        Some("its queue was full"),
        reads_slowly
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
        Some("was replaced by a new connection"),
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

/// From one byte that is read to the next.
const A_WHILE: Duration = Duration::from_millis(100);

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
async fn reads_slowly(enemy: &Enemy) -> anyhow::Result<()> {
    let mut slow = enemy.listening().await?;
    shove(&mut slow, &subscribe(1, [enemy.own("#")])).await;
    let reads = async {
        let mut byte = [0];
        while matches!(slow.get_mut().0.read(&mut byte).await, Ok(1)) {
            tokio::time::sleep(A_WHILE).await;
        }
    };
    tokio::select! {
        () = reads => Ok(()),
        done = enemy.tell_itself() => done,
    }
}

async fn subscriptions(enemy: &Enemy) -> anyhow::Result<()> {
    let filters = |n: u16| (0..100).map(move |m| (n, m));
    let packets = (1..=20).flat_map(|n| {
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

//! Against the broker: what is allowed once and not for ever, and packets that no client sends.

use std::time::Duration;

use tokio::io::AsyncReadExt;

use super::{
    Abuse, Enemy, SOON, hear,
    mqtt::{Done, abuse, denied, refused},
    packets::{DISCONNECT, connect, connect_with, packet, publish, subscribe, text},
    shove,
};

pub(super) const ALL: [Abuse; 19] = [
    abuse!(
        "the same filter 40,000 times",
        refused!("sent away"),
        Some("a packet larger than any"),
        one_filter
    ),
    abuse!(
        "more filters at once than a client may have",
        refused!("sent away"),
        Some("more than 128 filters at once"),
        too_many_filters
    ),
    abuse!(
        "subscribing to everything again and again",
        None,
        None,
        subscribe_again
    ),
    abuse!(
        "a filter of 60,000 bytes",
        denied!("subscribe to"),
        Some("may not subscribe"),
        long_filter
    ),
    abuse!(
        "large retained messages, read slowly, over and over",
        denied!("retain another message on"),
        Some("retain another"),
        leaves_much
    ),
    abuse!(
        "a subscriber that never acknowledges",
        Some("lacewing_broker_cut_total"),
        Some("its queue was full"),
        never_acknowledges
    ),
    abuse!(
        "passwords that are guessed without an end",
        refused!("too many passwords from one address"),
        Some("too many passwords from one address"),
        guess_on
    ),
    abuse!(
        "connections that say nothing, without a keep-alive",
        refused!("too many connections of one subscriber"),
        Some("too many connections of one subscriber"),
        idle
    ),
    abuse!(
        "a second CONNECT",
        refused!("sent away"),
        Some("a second CONNECT"),
        connect_twice
    ),
    abuse!(
        "lengths that lie",
        refused!("sent away"),
        Some("broke the protocol"),
        lies
    ),
    abuse!(
        "a message at QoS 3",
        refused!("sent away"),
        Some("broke the protocol"),
        quality_three
    ),
    abuse!(
        "topics with half a character, or a zero",
        refused!("sent away"),
        Some("broke the protocol"),
        bad_text
    ),
    abuse!(
        "a client id of 65,535 bytes",
        refused!("malformed before CONNECT"),
        Some("malformed before CONNECT"),
        long_id
    ),
    abuse!(
        "a client id of 10,000 bytes",
        refused!("client id longer than 128 bytes"),
        Some("client id longer than 128 bytes"),
        medium_id
    ),
    abuse!(
        "a last will of 60,000 bytes",
        refused!("malformed before CONNECT"),
        Some("malformed before CONNECT"),
        huge_will
    ),
    abuse!(
        "releases without an end",
        Some("lacewing_broker_slowed_total"),
        None,
        releases
    ),
    abuse!("one packet id for everything", None, None, one_id),
    abuse!(
        "what only a broker sends",
        refused!("sent away"),
        Some("a packet that only a broker sends"),
        poses_as_broker
    ),
    abuse!("unsubscribing without an end", None, None, unsubscribe),
];

const EVERYTHING: &str = "lacewing/#";

fn times(filter: &str, count: usize) -> impl Iterator<Item = String> {
    std::iter::repeat_n(filter.to_owned(), count)
}

async fn one_filter(enemy: &Enemy) -> anyhow::Result<()> {
    let mut stream = enemy.listening().await?;
    shove(&mut stream, &subscribe(1, times(EVERYTHING, 40_000))).await;
    hear(&mut stream, SOON).await;
    Ok(())
}

async fn too_many_filters(enemy: &Enemy) -> anyhow::Result<()> {
    let mut stream = enemy.listening().await?;
    shove(&mut stream, &subscribe(1, times(EVERYTHING, 1_000))).await;
    hear(&mut stream, SOON).await;
    Ok(())
}

/// Allowed, and it reads what it is sent.
async fn subscribe_again(enemy: &Enemy) -> anyhow::Result<()> {
    let stream = enemy.listening().await?;
    let (mut read, mut write) = tokio::io::split(stream);
    let hears = hear(&mut read, Duration::from_secs(3));
    let says = async {
        for n in 1..=1_000 {
            if !shove(&mut write, &subscribe(n, times(EVERYTHING, 100))).await {
                break;
            }
        }
    };
    tokio::join!(hears, says);
    Ok(())
}

async fn long_filter(enemy: &Enemy) -> anyhow::Result<()> {
    let filter = enemy.own(&"x".repeat(60_000));
    enemy.misbehave(&subscribe(1, [filter])).await
}

/// A device that listens to itself: what it left before is on its way to it while it leaves more.
async fn leaves_much(enemy: &Enemy) -> anyhow::Result<()> {
    forget(enemy, "s").await?;
    let stream = enemy.inside().await?;
    let (mut read, mut write) = tokio::io::split(stream);
    let says = async {
        let body = vec![b'x'; 512 * 1024 - 200];
        for round in 0..3 {
            for n in 1..=64 {
                let topic = enemy.own(&format!("large{n}/state"));
                if !shove(&mut write, &publish(topic, 0x03, n, &body)).await {
                    return;
                }
            }
            shove(&mut write, &subscribe(100 + round, [enemy.own("#")])).await;
        }
    };
    let hears = async {
        let mut some = [0; 1_024];
        while matches!(read.read(&mut some).await, Ok(read) if read > 0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = says => {}
        () = hears => {}
    }
    forget(enemy, "large").await
}

/// Takes away what it left: a device has a bound, which what it left before is not to have reached.
async fn forget(enemy: &Enemy, source: &str) -> anyhow::Result<()> {
    let none = |n: u16| publish(enemy.own(&format!("{source}{n}/state")), 0x03, n, b"");
    let nothing: Vec<u8> = (1..=64).flat_map(none).collect();
    enemy.misbehave(&nothing).await
}

async fn never_acknowledges(enemy: &Enemy) -> anyhow::Result<()> {
    let mut silent = enemy.listening().await?;
    shove(&mut silent, &subscribe(1, [enemy.own("#")])).await;
    let hears = hear(&mut silent, SOON);
    let (_, told) = tokio::join!(hears, enemy.tell_itself());
    told
}

/// As fast as they are answered, for names of its own, too.
async fn guess_on(enemy: &Enemy) -> anyhow::Result<()> {
    let guess = |n: usize| async move {
        let mut stream = enemy.tls(enemy.mqtt, &enemy.nobody).await?;
        let (name, wrong) = (format!("n{}", n % 7), format!("not the password {n}"));
        shove(&mut stream, &connect("", None, Some((&name, &wrong)))).await;
        hear(&mut stream, SOON).await;
        anyhow::Ok(())
    };
    for n in (0..80).step_by(4) {
        let (a, b, c, d) = tokio::join!(guess(n), guess(n + 1), guess(n + 2), guess(n + 3));
        a.and(b).and(c).and(d)?;
    }
    Ok(())
}

async fn idle(enemy: &Enemy) -> anyhow::Result<()> {
    let mut held = Vec::new();
    for _ in 0..300 {
        match enemy.listening_for(0).await {
            Ok(stream) => held.push(stream),
            Err(_) => break,
        }
    }
    Ok(())
}

async fn connect_twice(enemy: &Enemy) -> anyhow::Result<()> {
    enemy.misbehave(&connect("", None, None)).await
}

/// A topic that is longer than its packet, a packet without what has to be in it, and a length of five digits.
async fn lies(enemy: &Enemy) -> anyhow::Result<()> {
    for packet in [
        &packet(0x30, &[0xff, 0xff, b'a'])[..],
        &packet(0x82, &[0, 1, 0, 9, b'a'])[..],
        &packet(0x32, &text(enemy.own("cam0/result")))[..],
        &[0x30, 0xff, 0xff, 0xff, 0xff, 0x01, 0],
    ] {
        enemy.misbehave(packet).await?;
    }
    Ok(())
}

async fn quality_three(enemy: &Enemy) -> anyhow::Result<()> {
    let topic = enemy.own("cam0/result");
    enemy.misbehave(&publish(topic, 0x06, 1, b"x")).await
}

async fn bad_text(enemy: &Enemy) -> anyhow::Result<()> {
    let own = enemy.own("");
    for end in [&[0xed, 0xa0, 0x80][..], &[0]] {
        let topic = [own.as_bytes(), end].concat();
        enemy.misbehave(&publish(&topic, 0, 0, b"x")).await?;
        let filter = [&[0, 1], &text(&topic)[..], &[1]].concat();
        enemy.misbehave(&packet(0x82, &filter)).await?;
    }
    Ok(())
}

async fn long_id(enemy: &Enemy) -> anyhow::Result<()> {
    enemy.say(&connect(&"x".repeat(65_535), None, None)).await
}

async fn medium_id(enemy: &Enemy) -> anyhow::Result<()> {
    enemy.say(&connect(&"x".repeat(10_000), None, None)).await
}

async fn huge_will(enemy: &Enemy) -> anyhow::Result<()> {
    let (topic, word) = (enemy.own("_/status"), [b'x'; 60_000]);
    let connect = connect_with("", Some((&topic, &word)), None, 60);
    enemy.say(&connect).await
}

/// Of messages that nobody sent, and none of the answers is read.
async fn releases(enemy: &Enemy) -> anyhow::Result<()> {
    let one = |n: u16| packet(0x62, &n.to_be_bytes());
    let many: Vec<u8> = (1..=40_000).flat_map(one).collect();
    enemy.misbehave(&many).await
}

async fn one_id(enemy: &Enemy) -> anyhow::Result<()> {
    let topic = enemy.own("cam0/image");
    let one = |n: usize| {
        publish(
            &topic,
            if n.is_multiple_of(2) { 0x04 } else { 0x02 },
            7,
            b"x",
        )
    };
    let many: Vec<u8> = (0..2_000).flat_map(one).collect();
    enemy.misbehave(&many).await
}

async fn poses_as_broker(enemy: &Enemy) -> anyhow::Result<()> {
    for packet in [[0x50, 2, 0, 1], [0x20, 2, 0, 0], [0xb0, 2, 0, 1]] {
        enemy.misbehave(&packet).await?;
    }
    Ok(())
}

async fn unsubscribe(enemy: &Enemy) -> anyhow::Result<()> {
    let filters: Vec<u8> = times(EVERYTHING, 100).flat_map(text).collect();
    let one = packet(0xa2, &[&[0, 1], &filters[..]].concat());
    let mut stream = enemy.inside().await?;
    for _ in 0..120 {
        if !shove(&mut stream, &one.repeat(100)).await {
            break;
        }
    }
    shove(&mut stream, &DISCONNECT).await;
    hear(&mut stream, SOON).await;
    Ok(())
}

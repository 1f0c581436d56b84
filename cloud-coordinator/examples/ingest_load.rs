//! Load for the ingest: devices that publish readings over MQTT as fast as they are taken, or at a rate.
//!
//! `ingest_load HOST:PORT [--devices N] [--readings N] [--rate PER_SECOND] [--replay N] [--no-acks]`
//!
//! Each device has its own connection and publishes at QoS 1, `result` messages or, with `--replay N`,
//! batches of N. It keeps a window of readings without the coordinator's acknowledgement, or with `--no-acks`
//! of messages without the broker's PUBACK (for consumers that acknowledge nothing). Prints one line of JSON:
//! readings sent, seconds, and how long acknowledgements took.
#![allow(
    clippy::unwrap_used,
    reason = "a tool for measurements: it ends at the first surprise"
)]

use std::{collections::VecDeque, net::SocketAddr, time::Duration};

use bytes::BytesMut;
use mesh_core::{Ack, Reading, VERSION, replay_bytes};
use rumqttc::{Connect, Packet, Publish, QoS, Subscribe};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};

#[derive(Clone)]
struct Load {
    broker: SocketAddr,
    devices: u64,
    readings: u64,
    rate: f64,
    replay: u64,
    acks: bool,
}

/// Readings (or messages) of one device that may wait for an answer.
const WINDOW: u64 = 2_000;
const EPOCH: u64 = 1;
const MAX_PACKET: usize = 1 << 20;

fn arguments() -> Load {
    let mut rest = std::env::args().skip(1);
    let mut load = Load {
        broker: rest.next().unwrap().parse().unwrap(),
        devices: 50,
        readings: 200_000,
        rate: 0.0,
        replay: 0,
        acks: true,
    };
    while let Some(name) = rest.next() {
        if name == "--no-acks" {
            load.acks = false;
            continue;
        }
        let value = rest.next().unwrap();
        match name.as_str() {
            "--devices" => load.devices = value.parse().unwrap(),
            "--readings" => load.readings = value.parse().unwrap(),
            "--rate" => load.rate = value.parse().unwrap(),
            "--replay" => load.replay = value.parse().unwrap(),
            other => {
                eprintln!("no such option: {other}");
                std::process::exit(2);
            }
        }
    }
    load
}

fn reading(device: &str, seq: u64) -> Vec<u8> {
    Reading {
        v: VERSION,
        device: device.parse().unwrap(),
        source: "cam0".parse().unwrap(),
        epoch: EPOCH,
        seq,
        ts: 1_760_000_000_000 + seq.cast_signed(),
        frame: seq,
        label: "scratch".into(),
        score: 0.918_273,
        margin: 0.871_234,
        model: "conveyor@1.0.0".into(),
        latency_ms: 4.25,
        file: None,
        truth: Some("scratch".into()),
    }
    .encode()
    .unwrap()
}

/// One device to its end; how long acknowledgements took, in milliseconds.
async fn device(load: Load, number: u64, started: Instant) -> Vec<f64> {
    let name = format!("load{number}");
    let readings = load.readings / load.devices;
    let mut stream = TcpStream::connect(load.broker).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    let mut connect = Connect::new(format!("bench/{name}"));
    connect.keep_alive = 0;
    connect.write(&mut out).unwrap();
    let topic = |source: &str, kind: &str| format!("lacewing/v1/bench/{name}/{source}/{kind}");
    let mut subscribe = Subscribe::new(topic("_", "ack"), QoS::AtLeastOnce);
    subscribe.pkid = 1;
    subscribe.write(&mut out).unwrap();
    let (mut sent, mut answered, mut messages) = (0u64, 0u64, 0u64);
    let mut waiting: VecDeque<(u64, Instant)> = VecDeque::new();
    let mut took = Vec::new();
    let share = load.rate / load.devices as f64;
    while answered < readings {
        let due = if load.rate > 0.0 {
            (started.elapsed().as_secs_f64() * share) as u64
        } else {
            u64::MAX
        };
        while sent < readings.min(due) && sent - answered < WINDOW && out.len() < 64 * 1024 {
            messages += 1;
            let (kind, body, upto) = if load.replay > 0 {
                let upto = (sent + load.replay).min(readings);
                let all: Vec<_> = (sent + 1..=upto).map(|s| reading(&name, s)).collect();
                let views: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
                (topic("_", "replay"), replay_bytes(&views).0, upto)
            } else {
                (topic("cam0", "result"), reading(&name, sent + 1), sent + 1)
            };
            let mut publish = Publish::new(kind, QoS::AtLeastOnce, body);
            publish.pkid = u16::try_from(messages % 65_000).unwrap() + 2;
            publish.write(&mut out).unwrap();
            sent = upto;
            waiting.push_back((upto, Instant::now()));
        }
        if !out.is_empty() {
            stream.write_all(&out).await.unwrap();
            out.clear();
        }
        input.reserve(64 * 1024);
        let wait = if load.rate > 0.0 { 2 } else { 1_000 };
        let read = stream.read_buf(&mut input);
        if let Ok(read) = tokio::time::timeout(Duration::from_millis(wait), read).await {
            assert!(read.unwrap() > 0, "the broker closed the connection");
        }
        while let Ok(packet) = Packet::read(&mut input, MAX_PACKET) {
            let upto = match packet {
                Packet::Publish(publish) => {
                    if publish.pkid != 0 {
                        rumqttc::PubAck { pkid: publish.pkid }
                            .write(&mut out)
                            .unwrap();
                    }
                    Ack::decode(&publish.payload).unwrap().upto
                }
                // The broker answers in order.
                Packet::PubAck(_) if !load.acks => waiting.front().map_or(0, |(upto, _)| *upto),
                _ => continue,
            };
            answered = answered.max(upto);
            while let Some((upto, at)) = waiting.front().copied()
                && upto <= answered
            {
                took.push(at.elapsed().as_secs_f64() * 1e3);
                waiting.pop_front();
            }
        }
    }
    took
}

#[tokio::main]
async fn main() {
    let load = arguments();
    let started = Instant::now();
    let devices: Vec<_> = (0..load.devices)
        .map(|n| tokio::spawn(device(load.clone(), n, started)))
        .collect();
    let mut took = Vec::new();
    for device in devices {
        took.extend(device.await.unwrap());
    }
    let seconds = started.elapsed().as_secs_f64();
    took.sort_by(f64::total_cmp);
    let at = |part: f64| took[((took.len() - 1) as f64 * part) as usize];
    println!(
        "{}",
        serde_json::json!({
            "sent": load.readings / load.devices * load.devices,
            "seconds": seconds,
            "ack_p50_ms": at(0.5),
            "ack_p99_ms": at(0.99),
            "ack_max_ms": at(1.0),
        })
    );
}

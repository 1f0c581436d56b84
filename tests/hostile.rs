//! Bad input through the real programs: each is one clear message, and everything else goes on.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use fleet::site::{Camera, Site};
use sha2::{Digest, Sha256};
use tests::{BOUND, Tap, bundle, exactly_once, plan, until};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::Mutex,
};

/// One site at a time: each is a load of its own.
static ONE: Mutex<()> = Mutex::const_new(());

fn node(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_node"))
        .args(args)
        .output()
        .unwrap()
}

fn words(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

#[test]
fn every_mistake_of_an_agents_configuration_is_named_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    let text = r#"
        site = "Not A Name"
        device = "d1"
        colour = "blue"
        [broker]
        url = "http://example"
        keep_alive_s = 0
        [[source]]
        name = "cam0"
        kind = "scene"
        fps = nan
        [outbox]
        max_bytes = 12
        [report]
        every_s = 0
    "#;
    std::fs::write(&file, text).unwrap();
    let output = node(&[
        "edge-agent",
        "config",
        "check",
        "--config",
        file.to_str().unwrap(),
    ]);
    let said = words(&output);
    assert!(!output.status.success(), "{said}");
    for field in [
        "site",
        "colour",
        "broker.url",
        "broker.keep_alive_s",
        "source[0].fps",
        "outbox.max_bytes",
        "report.every_s",
    ] {
        assert!(said.contains(field), "{field} is not named in:\n{said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn every_mistake_of_a_coordinators_configuration_is_named_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("coordinator.toml");
    let text = "http = \"nowhere\"\ncolour = \"blue\"\n[retention]\nmax_age_days = -1\n[ingest]\nmax_devices = 0\n";
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let output = node(&["cloud-coordinator", "config", "check", "--config", file]);
    let said = words(&output);
    assert!(!output.status.success(), "{said}");
    for field in ["http", "colour", "max_age_days", "max_devices"] {
        assert!(said.contains(field), "{field} is not named in:\n{said}");
    }
}

/// Copies a bundle with another model file in it, its hash and size made right.
fn forged(to: &Path, model: &[u8]) -> PathBuf {
    let from = bundle("conveyor");
    copy(&from, to);
    std::fs::write(to.join("model.onnx"), model).unwrap();
    let manifest = std::fs::read_to_string(from.join("manifest.toml")).unwrap();
    let hash: String = Sha256::digest(model)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let lines = manifest.lines().map(|line| {
        if line.starts_with("sha256 =") {
            format!("sha256 = \"{hash}\"")
        } else if line.starts_with("bytes =") {
            format!("bytes = {}", model.len())
        } else {
            line.to_owned()
        }
    });
    std::fs::write(
        to.join("manifest.toml"),
        lines.collect::<Vec<_>>().join("\n"),
    )
    .unwrap();
    to.to_owned()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A bundle whose bytes are not what its manifest says, one that is cut, one that is noise, and one that
/// is the wrong model altogether: refused in words, and the device says that it has no model.
#[tokio::test(flavor = "multi_thread")]
async fn bad_models_are_refused_and_the_device_goes_on() {
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let good = std::fs::read(bundle("conveyor").join("model.onnx")).unwrap();
    let golden = std::fs::read_dir(bundle("conveyor").join("golden")).unwrap();
    let image = golden.flatten().next().unwrap().path();
    let swapped = dir.path().join("swapped");
    copy(&bundle("conveyor"), &swapped);
    std::fs::write(swapped.join("model.onnx"), &good[..good.len() - 1]).unwrap();
    let mut bundles = vec![swapped];
    let other = std::fs::read(bundle("backbone").join("model.onnx")).unwrap();
    let noise: Vec<u8> = (0..5_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for (name, bytes) in [
        ("cut", &good[..good.len() / 2]),
        ("noise", &noise[..]),
        ("empty", &[][..]),
        ("other", &other[..]),
    ] {
        bundles.push(forged(&dir.path().join(name), bytes));
    }
    for bad in &bundles {
        let (bad, image) = (bad.to_str().unwrap(), image.to_str().unwrap());
        let output = node(&["edge-agent", "infer", "--bundle", bad, image]);
        let said = words(&output);
        assert!(
            !output.status.success() && !said.contains("panicked"),
            "{bad}: {said}"
        );
        assert!((10..2_000).contains(&said.len()), "{bad}: {said}");
    }

    let mut plan = plan(env!("CARGO_BIN_EXE_node"), &dir.path().join("site"));
    plan.bundle = Some(bundles[1].clone());
    plan.agents = 1;
    let mut site = Site::start(&plan).await.unwrap();
    let tap = Tap::start(&site).unwrap();
    let log = site.devices[0].agent.log().to_owned();
    until("the agent says why", async || {
        std::fs::read_to_string(&log)
            .unwrap_or_default()
            .contains("model not loaded")
    })
    .await
    .unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    site.check().unwrap();
    let tapped = tap.stop().await;
    site.stop().await.unwrap();
    let state = tapped.last.get("lacewing/v1/demo/d1/_/state").unwrap();
    assert!(state.contains("no_model"), "{state}");
    assert!(tapped.bad.is_empty(), "{:#?}", tapped.bad);
}

/// The header of a PNG that claims `side`×`side` pixels, with a right checksum and nothing behind it.
fn png_header(side: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend([side.to_be_bytes(), side.to_be_bytes()].concat());
    chunk.extend([8, 2, 0, 0, 0]);
    let mut crc = u32::MAX;
    for byte in &chunk {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ 0xEDB8_8320
            } else {
                crc >> 1
            };
        }
    }
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    png.extend(chunk);
    png.extend((!crc).to_be_bytes());
    png
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_images_are_counted_and_the_good_ones_arrive() {
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images/ok");
    std::fs::create_dir_all(&images).unwrap();
    let picture = image::RgbImage::from_fn(120, 90, |x, y| image::Rgb([x as u8, y as u8, 99]));
    for n in 0..20 {
        picture.save(images.join(format!("{n:02}.jpg"))).unwrap();
    }
    let jpeg = std::fs::read(images.join("00.jpg")).unwrap();
    for (name, bytes) in [
        ("03-cut.jpg", &jpeg[..jpeg.len() / 3]),
        ("05-huge.png", &png_header(60_000)[..]),
        (
            "07-drawing.jpg",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        ),
        ("09-empty.png", b""),
        ("11-text.gif", b"this is no image"),
    ] {
        std::fs::write(images.join(name), bytes).unwrap();
    }
    let mut plan = plan(env!("CARGO_BIN_EXE_node"), &dir.path().join("site"));
    plan.agents = 1;
    plan.fps = 50.0;
    plan.camera = Camera::Folder {
        path: dir.path().join("images"),
        repeat: false,
    };
    let mut site = Site::start(&plan).await.unwrap();
    let tap = Tap::start(&site).unwrap();
    let mut witness = site.witness(Default::default());
    until("the good images arrive", async || {
        witness.look().await.unwrap().total().stored >= 20
    })
    .await
    .unwrap();
    // Until the next message of metrics, and some.
    tokio::time::sleep(Duration::from_secs(5)).await;
    site.check().unwrap();
    let tapped = tap.stop().await;
    let total = witness.look().await.unwrap().total();
    site.stop().await.unwrap();
    exactly_once(&total).unwrap();
    assert_eq!(total.stored, 20);
    let metrics = tapped.last.get("lacewing/v1/demo/d1/_/metrics").unwrap();
    let metrics: serde_json::Value = serde_json::from_str(metrics).unwrap();
    assert_eq!(metrics["frames_bad"], 5, "{metrics}");
    assert_eq!(metrics["frames"], 20, "{metrics}");
}

/// A broker that accepts everybody and then pours messages over them without end.
async fn flooder() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let topic = b"lacewing/v1/demo/d1/_/ack";
                let mut packet = vec![0x30, (2 + topic.len() + 60) as u8, 0, topic.len() as u8];
                packet.extend(topic);
                packet.extend([b'x'; 60]);
                let flood = packet.repeat(200);
                // CONNACK: accepted.
                let mut good = client.write_all(&[0x20, 2, 0, 0]).await.is_ok();
                while good {
                    good = client.write_all(&flood).await.is_ok();
                }
            });
        }
    });
    address
}

/// A broker that claims a packet of 256 MB and sends some of it.
async fn boaster() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = client
                    .write_all(&[0x20, 2, 0, 0, 0x30, 0xff, 0xff, 0xff, 0x7f])
                    .await;
                while client.write_all(&[0; 65_536]).await.is_ok() {}
            });
        }
    });
    address
}

/// A broker that knows nobody by this name and password: CONNACK with code 4, and the end.
async fn refuser() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut connect = [0; 1024];
                let _ = client.read(&mut connect).await;
                let _ = client.write_all(&[0x20, 2, 0, 4]).await;
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_brokers_cost_nothing_but_time() {
    /// Far above what an agent with a model takes, far below what a flood would.
    const MOST_MEMORY: u64 = 200 << 20;
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let mut plan = plan(env!("CARGO_BIN_EXE_node"), dir.path());
    // With TLS they would not even be heard.
    plan.tls = false;
    plan.agents = 1;
    let mut site = Site::start(&plan).await.unwrap();
    let tap = Tap::start(&site).unwrap();
    let honest = site.mqtt();
    let mut witness = site.witness(Default::default());
    let mut produced = 0;
    // Each with what the agent's log says of it.
    for (bad, said) in [
        (Some(flooder().await), "message refused"),
        (Some(boaster().await), "268435455"),
        (Some(refuser().await), "BadUserNamePassword"),
        // Nobody listens there.
        (Some("127.0.0.1:1".parse().unwrap()), "connection lost"),
        // It accepts, and never says anything.
        (None, "connection lost"),
    ] {
        let link = &site.devices[0].link;
        link.cut();
        match bad {
            Some(address) => {
                link.retarget(address);
                link.heal();
            }
            None => link.hang(),
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        site.check().unwrap();
        let log = std::fs::read_to_string(site.devices[0].agent.log()).unwrap();
        assert!(log.contains(said), "{bad:?}: no word of {said} in\n{log}");
        let seen = witness.look().await.unwrap().total();
        assert!(seen.produced > produced, "{bad:?} stopped the camera");
        produced = seen.produced;
        let usage = fleet::process::usage(site.devices[0].agent.pid().unwrap()).unwrap();
        assert!(usage.peak_rss < MOST_MEMORY, "{bad:?}: {usage:?}");
    }
    let link = &site.devices[0].link;
    link.cut();
    link.retarget(honest);
    link.heal();
    // What it had to bear is counted, each kind by itself.
    let before = witness.look().await.unwrap().total().stored;
    until("readings arrive again", async || {
        witness.look().await.unwrap().total().stored > before
    })
    .await
    .unwrap();
    // Until the next message of metrics, and some.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let tapped = tap.stop().await;
    assert!(tapped.bad.is_empty(), "{:#?}", tapped.bad);
    let metrics = tapped.last.get("lacewing/v1/demo/d1/_/metrics").unwrap();
    let metrics: serde_json::Value = serde_json::from_str(metrics).unwrap();
    for (counter, least) in [("refused", 100), ("reconnects", 2), ("connect_failures", 2)] {
        assert!(
            metrics[counter].as_u64() >= Some(least),
            "{counter}: {metrics}"
        );
    }
    assert_eq!(metrics["store_errors"], 0, "{metrics}");
    let seen = site.finish(Default::default(), BOUND).await.unwrap();
    site.stop().await.unwrap();
    exactly_once(&seen.total()).unwrap();
}

/// The broker knows the device by its certificate: whoever comes with it takes the agent's place. The doctor does not.
#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_leaves_a_running_agent_alone() {
    let _one = ONE.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let mut plan = plan(env!("CARGO_BIN_EXE_node"), dir.path());
    plan.agents = 1;
    let mut site = Site::start(&plan).await.unwrap();
    let mut witness = site.witness(Default::default());
    until("readings arrive", async || {
        witness.look().await.unwrap().total().stored > 0
    })
    .await
    .unwrap();
    let config = site.devices[0].config.to_str().unwrap().to_owned();
    let doctor = move || node(&["edge-agent", "doctor", "--config", &config]);
    let said = words(&tokio::task::spawn_blocking(doctor).await.unwrap());
    let broker = said.lines().find(|line| line.contains("broker:"));
    let broker = broker.unwrap_or_else(|| panic!("no word of the broker in:\n{said}"));
    assert!(
        broker.starts_with("ok") && broker.contains("running agent"),
        "{broker}"
    );
    // The agent would notice at once.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let log = std::fs::read_to_string(site.devices[0].agent.log()).unwrap();
    assert!(!log.contains("connection lost"), "{log}");
    site.stop().await.unwrap();
}

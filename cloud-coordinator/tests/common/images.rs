//! Images, and samples with them, as a device sends them.

use std::net::SocketAddr;

use cloud_coordinator::objects::digest;
use serde_json::{Value, json};

use super::{ask, say, send};

fn checksum(kind_and_data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in kind_and_data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ 0xedb8_8320
            } else {
                crc >> 1
            };
        }
    }
    !crc
}

pub fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let both = [kind.as_slice(), data].concat();
    let mut chunk = (data.len() as u32).to_be_bytes().to_vec();
    chunk.extend(&both);
    chunk.extend(checksum(&both).to_be_bytes());
    chunk
}

/// A gray PNG of `side` × `side` pixels, each seed another; not compressed.
pub fn png(side: u32, seed: u8) -> Vec<u8> {
    let mut rows = Vec::new();
    for y in 0..side {
        rows.push(0);
        rows.extend((0..side).map(|x| (x * 7 + y * 13) as u8 ^ seed));
    }
    let (mut a, mut b) = (1_u32, 0_u32);
    for byte in &rows {
        a = (a + u32::from(*byte)) % 65_521;
        b = (b + a) % 65_521;
    }
    let mut zlib = vec![0x78, 0x01];
    let blocks: Vec<_> = rows.chunks(65_535).collect();
    for (n, block) in blocks.iter().enumerate() {
        zlib.push(u8::from(n + 1 == blocks.len()));
        zlib.extend((block.len() as u16).to_le_bytes());
        zlib.extend((!(block.len() as u16)).to_le_bytes());
        zlib.extend(*block);
    }
    zlib.extend((b << 16 | a).to_be_bytes());
    let header = [
        &side.to_be_bytes()[..],
        &side.to_be_bytes(),
        &[8, 0, 0, 0, 0],
    ]
    .concat();
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    png.extend(chunk(b"IHDR", &header));
    png.extend(chunk(b"IDAT", &zlib));
    png.extend(chunk(b"IEND", b""));
    png
}

pub fn sample(seq: u64, image: Option<&[u8]>) -> Value {
    let mut sample = json!({
        "v": 1, "device": "d1", "source": "cam0", "epoch": 7, "seq": seq, "ts": 1_700_000_000_000_i64,
        "reason": "uncertain", "label": "ok", "score": 0.5, "margin": 0.25, "entropy": 0.75,
        "model": "steel@1.0.0", "embedding": [seq as f32, 1.0, -2.0],
    });
    if let Some(image) = image {
        sample["image"] = json!({ "sha256": digest(image), "bytes": image.len() });
    }
    sample
}

pub async fn piece(http: SocketAddr, seq: u64, offset: usize, bytes: &[u8]) -> (u16, Value) {
    let line = format!("PATCH /api/v1/samples/d1/7/{seq}/image");
    let headers = format!("upload-offset: {offset}\r\n");
    let (status, _, body) = send(http, &line, &headers, bytes).await;
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// A sample with its image, all of it.
pub async fn bring_sample(http: SocketAddr, seq: u64, image: &[u8]) -> i64 {
    assert_eq!(
        say(http, "POST /api/v1/samples", sample(seq, Some(image)))
            .await
            .0,
        201
    );
    for (n, part) in image.chunks(256 * 1024).enumerate() {
        let (status, here) = piece(http, seq, n * 256 * 1024, part).await;
        assert_eq!(status, 200, "{here}");
    }
    let (_, page) = ask(http, "GET /api/v1/samples?limit=1").await;
    assert_eq!(page["items"][0]["image"], "stored");
    page["items"][0]["id"].as_i64().unwrap()
}

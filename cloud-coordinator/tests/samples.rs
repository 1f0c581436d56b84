//! Samples, labels and datasets over HTTP, as a device and a person use them.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

mod common;

use std::net::SocketAddr;

use cloud_coordinator::objects::{ObjectError, digest};
use common::{images::*, *};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let image = png(600, 1);
    assert!(image.len() > 300_000);
    let announced = sample(1, Some(&image));
    let announce = |http| say(http, "POST /api/v1/samples", announced.clone());
    assert_eq!(announce(http).await, (201, json!({ "offset": 0 })));
    assert_eq!(announce(http).await, (200, json!({ "offset": 0 })));
    assert_eq!(
        piece(http, 1, 0, &image[..100_000]).await,
        (200, json!({ "offset": 100_000 }))
    );
    let (status, problem) = piece(http, 1, 0, &image[..100_000]).await;
    assert_eq!((status, &problem["offset"]), (409, &json!(100_000)));
    assert_eq!(piece(http, 9, 0, b"x").await.0, 404);
    handle.stop().await;

    let handle = start(dir.path()).await;
    let http = handle.http;
    assert_eq!(announce(http).await, (200, json!({ "offset": 100_000 })));
    assert_eq!(
        piece(http, 1, 100_000, &image[100_000..300_000]).await.0,
        200
    );
    let (status, problem) = piece(http, 1, 300_000, &vec![0; image.len()][..200_000]).await;
    assert_eq!(status, 422, "{problem}");
    let done = piece(http, 1, 300_000, &image[300_000..]).await;
    assert_eq!(done, (200, json!({ "offset": image.len() })));
    assert_eq!(
        announce(http).await,
        (200, json!({ "offset": image.len() }))
    );
    // The same image from another sample is here at once.
    let again = say(http, "POST /api/v1/samples", sample(2, Some(&image))).await;
    assert_eq!(again, (201, json!({ "offset": image.len() })));
    let (status, head, body) = send(http, "GET /api/v1/samples/1/image", "", b"").await;
    assert!(status == 200 && body == image);
    for part in ["content-type: image/png", "immutable", "nosniff", "sandbox"] {
        assert!(head.contains(part), "{part} in {head}");
    }
    assert_eq!(
        std::fs::read_dir(dir.path().join("uploads"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(handle.objects().read(&digest(&image)).await.unwrap(), image);

    // Deleted is deleted, but not as long as another sample has the image.
    assert_eq!(ask(http, "DELETE /api/v1/samples/1").await.0, 204);
    assert_eq!(ask(http, "DELETE /api/v1/samples/1").await.0, 404);
    assert_eq!(
        announce(http).await,
        (200, json!({ "offset": image.len() }))
    );
    assert_eq!(piece(http, 1, 0, b"x").await.0, 410);
    assert!(handle.objects().has(&digest(&image)).await.unwrap());
    assert_eq!(ask(http, "DELETE /api/v1/samples/2").await.0, 204);
    let gone = handle.objects().read(&digest(&image)).await.unwrap_err();
    assert!(matches!(gone, ObjectError::Missing(_)));
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_images_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let good = png(8, 1);
    let svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>".to_vec();
    let mut huge = good.clone();
    huge[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let bmp = [b"BM".as_slice(), &[0; 100]].concat();
    let html = b"<!DOCTYPE html><html><script>alert(1)</script></html>".to_vec();
    let hostile = [
        (b"no image".to_vec(), 415),
        (svg, 415),
        (html, 415),
        (bmp, 415),
        (huge, 422),
        (good[..good.len() - 30].to_vec(), 422),
    ];
    for (seq, (bytes, expected)) in (1..).zip(&hostile) {
        let announced = sample(seq, Some(bytes));
        assert_eq!(
            say(http, "POST /api/v1/samples", announced.clone()).await.0,
            201
        );
        let (status, problem) = piece(http, seq, 0, bytes).await;
        assert_eq!(status, *expected, "{problem}");
        // The device has nothing better to send.
        let again = say(http, "POST /api/v1/samples", announced).await;
        assert_eq!(again, (200, json!({ "offset": bytes.len() })));
        let (_, row) = ask(http, &format!("GET /api/v1/samples/{seq}")).await;
        assert_eq!(row["image"], "refused");
        let line = format!("GET /api/v1/samples/{seq}/image");
        let (status, head, _) = send(http, &line, "", b"").await;
        assert!(status == 404 && head.contains("nosniff"), "{head}");
    }
    // Other bytes than were announced.
    say(http, "POST /api/v1/samples", sample(50, Some(&good))).await;
    let mut other = good.clone();
    other[40] ^= 1;
    let (status, problem) = piece(http, 50, 0, &other).await;
    assert!(status == 422 && problem["detail"].as_str().unwrap().contains("SHA-256"));
    assert_eq!(
        std::fs::read_dir(dir.path().join("uploads"))
            .unwrap()
            .count(),
        0
    );
    for (bad, status) in [
        (json!({ "v": 1 }), 422),
        (json!({ "x": "y".repeat(70_000) }), 413),
        (
            {
                let mut s = sample(60, None);
                s["model"] = "../x@1".into();
                s
            },
            422,
        ),
        (
            {
                let mut s = sample(60, None);
                s["device"] = "../x".into();
                s
            },
            422,
        ),
    ] {
        assert_eq!(say(http, "POST /api/v1/samples", bad).await.0, status);
    }
    assert_eq!(
        say(http, "POST /api/v1/samples", sample(61, None)).await,
        (201, json!({ "offset": 0 }))
    );
    assert_eq!(piece(http, 61, 0, b"x").await.0, 422);
    say(http, "POST /api/v1/samples", sample(62, Some(&png(9, 1)))).await;
    assert_eq!(piece(http, 62, 0, &vec![0; 300_000]).await.0, 413);
    handle.stop().await;
}

/// What a camera wrote beside the pixels: a place, as EXIF has it.
const PLACE: &[u8] =
    b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x88\x25\0\x04\0\0\0\x01\0\0\0\x1aGPS 47.3769 N 8.5417 E";

/// A picture as a camera may write it, JPEG and PNG.
fn photographs() -> [Vec<u8>; 2] {
    let picture =
        image::RgbImage::from_fn(40, 20, |x, y| image::Rgb([x as u8 * 6, y as u8 * 12, 99]));
    let mut jpeg = Vec::new();
    image::codecs::jpeg::JpegEncoder::new(&mut jpeg)
        .encode_image(&picture)
        .unwrap();
    let length = u16::try_from(PLACE.len() + 2).unwrap().to_be_bytes();
    let jpeg = [&jpeg[..2], &[0xff, 0xe1], &length, PLACE, &jpeg[2..]].concat();
    let plain = png(24, 3);
    // After the signature and the header.
    let (head, rest) = plain.split_at(8 + 25);
    let png = [head, &chunk(b"eXIf", &PLACE[6..]), rest].concat();
    [jpeg, png]
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_picture_was_taken_is_never_stored() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let photographs = photographs();
    for (seq, photograph) in (1..).zip(&photographs) {
        let id = bring_sample(http, seq, photograph).await;
        // The device may ask again, and hears that all it had is here.
        let again = say(http, "POST /api/v1/samples", sample(seq, Some(photograph))).await;
        assert_eq!(again, (200, json!({ "offset": photograph.len() })));
        let here = piece(http, seq, photograph.len(), b"").await;
        assert_eq!(here, (200, json!({ "offset": photograph.len() })));
        let (_, _, stored) = send(http, &format!("GET /api/v1/samples/{id}/image"), "", b"").await;
        let (_, row) = ask(http, &format!("GET /api/v1/samples/{id}")).await;
        assert_eq!(row["sha256"], digest(&stored).as_str());
        assert_eq!(row["bytes"], stored.len());
        assert!(image::load_from_memory(&stored).is_ok());
    }
    let named = |end: &str| format!("set/ok/photograph.{end}");
    let set: Vec<(String, Vec<u8>)> = ["jpg", "png"]
        .map(named)
        .into_iter()
        .zip(photographs)
        .collect();
    let set: Vec<(&str, Vec<u8>)> = set
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.clone()))
        .collect();
    let (status, report) = bring_in(http, "steel", "folder", "", &tar_of(&set)).await;
    assert_eq!((status, &report["imported"]), (200, &json!(2)), "{report}");
    let out = take_out(http, "steel", "folder").await;
    handle.stop().await;
    let holds = |bytes: &[u8]| {
        let has = |what: &[u8]| bytes.windows(what.len()).any(|part| part == what);
        has(b"GPS 47") || has(b"Exif\0\0") || has(b"eXIf")
    };
    assert!(holds(PLACE) && !holds(&out));
    let mut folders = vec![dir.path().to_owned()];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(bytes) = std::fs::read(&path) {
                // What the database removes as it closes may be gone meanwhile.
                files += 1;
                assert!(!holds(&bytes), "{}", path.display());
            }
        }
    }
    assert!(files > 2, "{files}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_names_in_a_tar_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    // Too long for a header: in an entry of its own, as GNU's tar does it.
    let long = format!("set/{}/{}.png", "ok", "x".repeat(150));
    let image = png(8, 1);
    let mut header = tar::Header::new_gnu();
    header.set_size(image.len() as u64);
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_data(&mut header, &long, &image[..]).unwrap();
    let tar = tar.into_inner().unwrap();
    let (status, report) = bring_in(http, "steel", "folder", "", &tar).await;
    assert_eq!((status, &report["labelled"]), (200, &json!(1)), "{report}");
    // As Python's does it.
    let path = format!("set/hole/{}.png", "y".repeat(150));
    let record = format!("{} path={path}\n", path.len() + 10);
    let extended = tar::EntryType::XHeader;
    let entry = |kind, path: &str, bytes: &[u8], claimed: u64| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_path(path).unwrap();
        header.set_size(claimed);
        header.set_cksum();
        let mut entry = [&header.as_bytes()[..], bytes].concat();
        entry.resize(entry.len().next_multiple_of(512), 0);
        entry
    };
    let image = png(8, 2);
    let about = entry(extended, "about", record.as_bytes(), record.len() as u64);
    let file = entry(
        tar::EntryType::Regular,
        "short.png",
        &image,
        image.len() as u64,
    );
    let (status, report) = bring_in(
        http,
        "steel",
        "folder",
        "",
        &[&about[..], &file, &[0; 1024]].concat(),
    )
    .await;
    assert_eq!((status, &report["labelled"]), (200, &json!(1)), "{report}");
    // Eight gigabytes of name, of which the first bytes come.
    for kind in [extended, tar::EntryType::GNULongName] {
        let (status, problem) = bring_in(
            http,
            "steel",
            "folder",
            "",
            &entry(kind, "about", b"x", 8_000_000_000),
        )
        .await;
        assert_eq!(status, 422, "{problem}");
        assert!(
            problem["detail"].as_str().unwrap().contains("64 KiB"),
            "{problem}"
        );
    }
    let twice = [about.clone(), about, file].concat();
    assert_eq!(bring_in(http, "steel", "folder", "", &twice).await.0, 422);
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_much_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.samples.staging_bytes = 500_000;
    config.samples.max_samples = 3;
    let handle = start_as(config).await;
    let http = handle.http;
    let (one, two) = (png(600, 1), png(600, 2));
    for (seq, image) in [(1, &one), (2, &two)] {
        assert_eq!(
            say(http, "POST /api/v1/samples", sample(seq, Some(image)))
                .await
                .0,
            201
        );
    }
    assert_eq!(piece(http, 1, 0, &one[..9]).await.0, 200);
    assert_eq!(piece(http, 2, 0, &two[..9]).await.0, 507);
    // What has begun can end, and makes room.
    assert_eq!(piece(http, 1, 9, &one[9..200_000]).await.0, 200);
    assert_eq!(piece(http, 1, 200_000, &one[200_000..]).await.0, 200);
    assert_eq!(piece(http, 2, 0, &two[..9]).await.0, 200);
    assert_eq!(
        say(http, "POST /api/v1/samples", sample(3, None)).await.0,
        201
    );
    assert_eq!(
        say(http, "POST /api/v1/samples", sample(4, None)).await.0,
        507
    );
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn from_labels_to_a_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let mut ids = Vec::new();
    for seq in 1..=6 {
        ids.push(bring_sample(http, seq, &png(8 + seq as u32, 0)).await);
    }
    let (status, task) = say(
        http,
        "PUT /api/v1/tasks/steel",
        json!({ "classes": ["ok", "scratches"] }),
    )
    .await;
    assert_eq!((status, &task["open"]), (200, &json!(6)));
    for (classes, expected) in [
        (json!(["scratches"]), 409),
        (json!(["ok", "scratches", "ok"]), 422),
        (json!(["ok", "scratches", "hole"]), 200),
    ] {
        let (status, _) = say(
            http,
            "PUT /api/v1/tasks/steel",
            json!({ "classes": classes }),
        )
        .await;
        assert_eq!(status, expected);
    }
    assert_eq!(
        say(http, "PUT /api/v1/tasks/UPPER", json!({ "classes": [] }))
            .await
            .0,
        422
    );

    let say_of = |id: i64, body: Value| async move {
        say(http, &format!("POST /api/v1/samples/{id}/labels"), body).await
    };
    for (body, expected) in [
        (json!({ "class": "dent" }), 422),
        // Who says it is who asks, not what the request says.
        (json!({ "class": "ok", "author": "ana" }), 422),
        (json!({}), 422),
        (json!({ "class": "ok", "skip": true }), 422),
    ] {
        assert_eq!(say_of(ids[0], body.clone()).await.0, expected, "{body}");
    }
    assert_eq!(say_of(999, json!({ "class": "ok" })).await.0, 404);
    // A form of somebody else's page cannot label.
    let line = format!("POST /api/v1/samples/{}/labels", ids[0]);
    let (status, _, _) = send(
        http,
        &line,
        "content-type: text/plain\r\n",
        br#"{"class":"ok"}"#,
    )
    .await;
    assert_eq!(status, 415);

    let dataset = json!({ "author": "ana" });
    let (status, problem) = say(http, "POST /api/v1/tasks/steel/datasets", dataset.clone()).await;
    assert!(status == 422 && problem["detail"].as_str().unwrap().contains("label some"));
    assert_eq!(
        say(http, "POST /api/v1/tasks/none/datasets", dataset.clone())
            .await
            .0,
        404
    );
    for (at, class) in [
        (0, json!("ok")),
        (1, json!("scratches")),
        (2, json!("ok")),
        (3, Value::Null),
    ] {
        let (status, row) = say_of(ids[at], json!({ "class": class })).await;
        assert_eq!((status, &row["author"]), (201, &json!("machine")));
    }
    assert_eq!(say_of(ids[4], json!({ "skip": true })).await.0, 201);
    let (_, queue) = ask(http, "GET /api/v1/tasks/steel/queue").await;
    assert_eq!(queue["items"].as_array().unwrap().len(), 1);
    assert_eq!(queue["items"][0]["id"], ids[5]);
    for (name, count) in [("labelled", 3), ("none", 1), ("skipped", 1), ("open", 1)] {
        assert_eq!(queue["task"][name], count, "{name}");
    }
    let (_, by_lot) = ask(
        http,
        "GET /api/v1/tasks/steel/queue?strategy=random&seed=4&limit=50",
    )
    .await;
    assert_eq!(by_lot["items"].as_array().unwrap().len(), 1);
    let (_, page) = ask(http, "GET /api/v1/samples?task=steel&labelled=true").await;
    assert_eq!(page["items"].as_array().unwrap().len(), 4);

    // Last said, last taken back.
    say_of(ids[0], json!({ "class": "hole" })).await;
    let undo = format!("DELETE /api/v1/samples/{}/labels/last", ids[0]);
    let (status, row) = ask(http, &undo).await;
    assert_eq!((status, &row["class"]), (200, &json!("ok")));
    assert_eq!(ask(http, &undo).await.1["labelled"], Value::Null);
    assert_eq!(ask(http, &undo).await.0, 404);
    say_of(ids[0], json!({ "class": "ok" })).await;

    let (status, first) = say(http, "POST /api/v1/tasks/steel/datasets", dataset.clone()).await;
    assert_eq!(
        (status, &first["train"], &first["holdout"]),
        (201, &json!(3), &json!(0))
    );
    let (status, same) = say(http, "POST /api/v1/tasks/steel/datasets", dataset.clone()).await;
    assert_eq!((status, &same["digest"]), (200, &first["digest"]));
    // Into the holdout by a person only.
    let hold = format!("PUT /api/v1/samples/{}/holdout", ids[2]);
    assert_eq!(
        say(http, &hold, json!({ "holdout": true, "author": "ana" }))
            .await
            .0,
        422
    );
    let (status, row) = say(http, &hold, json!({ "holdout": true })).await;
    assert_eq!((status, &row["holdout"]), (200, &json!(true)));
    let (status, second) = say(http, "POST /api/v1/tasks/steel/datasets", dataset).await;
    assert_eq!(
        (status, &second["train"], &second["holdout"]),
        (201, &json!(2), &json!(1))
    );

    let found = handle
        .datasets()
        .get(second["digest"].as_str().unwrap())
        .await
        .unwrap();
    assert_eq!(found.classes, ["ok", "scratches", "hole"]);
    assert_eq!(found.items.iter().filter(|i| i.holdout).count(), 1);
    let images: Vec<_> = found.items.iter().map(|i| i.sha256.clone()).collect();
    for item in &found.items {
        assert_eq!(
            digest(&handle.objects().read(&item.sha256).await.unwrap()),
            item.sha256
        );
        assert_eq!(item.device.as_deref(), Some("_/d1"));
    }
    let features = [(images[0].clone(), vec![1.0, -0.5])];
    handle
        .datasets()
        .put_features("engine", &features)
        .await
        .unwrap();
    let found = handle.datasets().features("engine", &images).await.unwrap();
    assert_eq!((found.len(), &found[&images[0]]), (1, &vec![1.0, -0.5]));
    assert!(
        handle
            .datasets()
            .features("other", &images)
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        ask(http, &format!("DELETE /api/v1/samples/{}", ids[0]))
            .await
            .0,
        204
    );
    assert_eq!(say_of(ids[0], json!({ "class": "ok" })).await.0, 410);
    // A snapshot stays what it was.
    let again = handle
        .datasets()
        .get(second["digest"].as_str().unwrap())
        .await
        .unwrap();
    assert_eq!(again.items.len(), 3);
    assert_eq!(ask(http, "GET /api/v1/datasets/0").await.0, 404);
    handle.stop().await;
}

fn tar_of(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut tar = Vec::new();
    for (path, bytes) in files {
        // Written by hand: a hostile name does not go through a library.
        let mut header = [0_u8; 512];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{:011o}", bytes.len()).as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[148..156].fill(b' ');
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        tar.extend(header);
        tar.extend(bytes);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.extend([0; 1024]);
    tar
}

async fn bring_in(
    http: SocketAddr,
    task: &str,
    format: &str,
    more: &str,
    tar: &[u8],
) -> (u16, Value) {
    let line = format!("POST /api/v1/tasks/{task}/import?format={format}&author=ana{more}");
    let kind = "content-type: application/x-tar\r\n";
    let (status, _, body) = send(http, &line, kind, tar).await;
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

async fn take_out(http: SocketAddr, task: &str, format: &str) -> Vec<u8> {
    let line = format!("GET /api/v1/tasks/{task}/export?format={format}");
    let (status, _, body) = send(http, &line, "", b"").await;
    assert_eq!(status, 200);
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_in_goes_out_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let images: Vec<_> = (0..4).map(|n| png(8 + n, 9)).collect();
    let set = [
        ("set/ok/a.png", images[0].clone()),
        ("set/ok/b.png", images[1].clone()),
        ("set/hole/c.png", images[2].clone()),
        ("set/hole/again.png", images[2].clone()),
        ("set/hole/bad.png", b"<svg onload='alert(1)'/>".to_vec()),
        ("set/readme.md", b"x".to_vec()),
        ("../../etc/evil.png", images[3].clone()),
        ("/etc/evil.png", images[3].clone()),
    ];
    let tar = tar_of(&set);
    let (status, report) = bring_in(http, "steel", "folder", "", &tar).await;
    assert_eq!(status, 200, "{report}");
    for (name, count) in [
        ("imported", 3),
        ("known", 1),
        ("labelled", 3),
        ("failed", 4),
    ] {
        assert_eq!(report[name], count, "{name} in {report}");
    }
    let (_, again) = bring_in(http, "steel", "folder", "", &tar).await;
    assert_eq!((&again["imported"], &again["kept"]), (&json!(0), &json!(3)));

    // What is held out stays so.
    let (_, page) = ask(http, "GET /api/v1/samples?task=steel").await;
    let items = page["items"].as_array().unwrap();
    let first = items
        .iter()
        .find(|s| s["sha256"] == digest(&images[0]).as_str());
    let hold = format!("PUT /api/v1/samples/{}/holdout", first.unwrap()["id"]);
    let (status, _) = say(http, &hold, json!({ "holdout": true })).await;
    assert_eq!(status, 200);

    let folder = take_out(http, "steel", "folder").await;
    let csv = String::from_utf8(take_out(http, "steel", "csv").await).unwrap();
    let coco = take_out(http, "steel", "coco").await;
    assert!(csv.starts_with("path,class,split\n") && csv.lines().count() == 4);
    assert!(csv.contains(&format!("hole/{}.png,hole,train", digest(&images[2]))));
    assert!(
        csv.contains(&format!("holdout/ok/{}.png,ok,holdout", digest(&images[0]))),
        "{csv}"
    );
    // Folders, CSV and COCO say the same of the same images; the end of a tar is cut off to add a text.
    let with = |name: &str, text: &[u8]| {
        let mut tar = folder[..folder.len() - 1024].to_vec();
        tar.extend(tar_of(&[(name, text.to_vec())]));
        tar
    };
    for (task, format, tar) in [
        ("t-folder", "folder", folder.clone()),
        ("t-csv", "csv", with("labels.csv", csv.as_bytes())),
        ("t-coco", "coco", with("annotations.json", &coco)),
        ("t-yolo", "yolo", take_out(http, "steel", "yolo").await),
    ] {
        let (status, report) = bring_in(http, task, format, "", &tar).await;
        assert_eq!(
            (status, &report["labelled"], &report["failed"]),
            (200, &json!(3), &json!(0)),
            "{report}"
        );
        assert_eq!(take_out(http, task, "folder").await, folder, "{format}");
        assert_eq!(
            String::from_utf8(take_out(http, task, "csv").await).unwrap(),
            csv,
            "{format}"
        );
    }

    // The same image to train and to measure with is only measured with.
    let held = tar_of(&[("hole/x.png", png(20, 1)), ("ok/a.png", images[0].clone())]);
    let (_, report) = bring_in(http, "held", "folder", "&holdout=true", &held).await;
    assert_eq!(report["imported"], 2);
    let (_, page) = ask(http, "GET /api/v1/samples?task=held").await;
    assert!(
        page["items"]
            .as_array()
            .unwrap()
            .iter()
            .all(|s| s["holdout"] == true && s["origin"] == "import")
    );
    let cut = &tar[..tar.len() / 2 + 100];
    assert_eq!(bring_in(http, "steel", "folder", "", cut).await.0, 422);
    assert_eq!(bring_in(http, "steel", "zip", "", &tar).await.0, 400);
    assert_eq!(bring_in(http, "Steel", "folder", "", &tar).await.0, 422);
    let line = "POST /api/v1/tasks/steel/import?format=folder&author=ana";
    assert_eq!(send(http, line, "", &tar).await.0, 415);
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_reaches_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let (broker, http) = (handle.mqtt.unwrap(), handle.http);
    let line = "POST /api/v1/devices/d1/sources/cam0/mark";
    assert_eq!(say(http, line, json!({ "mark": "wrong" })).await.0, 404);
    let mut d1 = device(broker, "d1").await;
    assert!(d1.subscribe(&topic("d1", "cam0", "mark")).await);
    d1.publish(&topic("d1", "cam0", "result"), encoded("d1", 1, 1))
        .await;
    d1.acknowledged(1, 1).await;
    assert_eq!(say(http, line, json!({ "mark": "novel" })).await.0, 422);
    assert_eq!(say(http, line, json!({ "mark": "missed" })).await.0, 202);
    let heard = loop {
        let (topic, bytes) = d1.next().await;
        if topic.ends_with("/mark") {
            break bytes;
        }
    };
    assert_eq!(heard, br#"{"v":1,"mark":"missed"}"#);
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_from_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(&dir.path().join("data")).await;
    let set = dir.path().join("set");
    for (class, seed) in [("ok", 1), ("hole", 2)] {
        std::fs::create_dir_all(set.join(class)).unwrap();
        std::fs::write(set.join(class).join("1.png"), png(300, seed)).unwrap();
    }
    std::fs::write(set.join("ok/broken.jpg"), b"x").unwrap();
    let run = |task: &'static str, folder: std::path::PathBuf| {
        let data = dir.path().join("data");
        let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_cloud-coordinator"));
        program.args(["import", task, "--format", "folder", "--author", "Ana & co"]);
        program.arg("--data").arg(data).arg(folder);
        tokio::task::spawn_blocking(move || program.output().unwrap())
    };
    let done = run("steel", set.clone()).await.unwrap();
    let (out, error) = (
        String::from_utf8(done.stdout).unwrap(),
        String::from_utf8(done.stderr).unwrap(),
    );
    assert!(done.status.success(), "{error}");
    assert!(
        out.contains("2 new images") && out.contains("1 errors"),
        "{out}"
    );
    assert!(error.contains("ok/broken.jpg"), "{error}");
    let (_, page) = ask(handle.http, "GET /api/v1/samples?task=steel").await;
    assert_eq!(page["items"][0]["author"], "Ana & co");
    assert!(
        !run("steel", dir.path().join("nothing"))
            .await
            .unwrap()
            .status
            .success()
    );
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_mark_takes_the_place_of_a_weaker_reason() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let image = png(16, 3);
    let id = bring_sample(http, 5, &image).await;
    let reason = async || {
        let (_, sample) = ask(http, &format!("GET /api/v1/samples/{id}")).await;
        sample["reason"].as_str().unwrap().to_owned()
    };
    assert_eq!(reason().await, "uncertain");
    for (said, then) in [("wrong", "wrong"), ("novel", "wrong")] {
        let mut again = sample(5, Some(&image));
        again["reason"] = said.into();
        let (status, offset) = say(http, "POST /api/v1/samples", again).await;
        assert_eq!((status, &offset["offset"]), (200, &image.len().into()));
        assert_eq!(reason().await, then);
    }
    handle.stop().await;
}

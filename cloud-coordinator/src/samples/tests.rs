use super::*;

async fn open() -> (tempfile::TempDir, Samples) {
    let dir = tempfile::tempdir().unwrap();
    let samples = again(dir.path()).await;
    (dir, samples)
}

async fn again(data: &Path) -> Samples {
    let records = Arc::new(Records::open(data).await.unwrap());
    let objects = Objects::open(None, data).unwrap();
    let config = crate::Config::default().samples;
    Samples::open(data, &config, records, objects)
        .await
        .unwrap()
}

/// What a device says about a frame, with an image that is announced.
fn sample(seq: u64, sha256: Option<&str>) -> Sample {
    let mut text = serde_json::json!({
        "v": 1, "device": "d1", "source": "cam0", "epoch": 1, "seq": seq, "ts": 1, "reason": "random",
        "label": "ok", "score": 0.5, "margin": 0.5, "entropy": 0.5, "model": "steel@1", "embedding": [0.5, 1.0],
    });
    if let Some(sha256) = sha256 {
        text["image"] = serde_json::json!({"sha256": sha256, "bytes": 1_000});
    }
    Sample::decode(text.to_string().as_bytes()).unwrap()
}

async fn numbers(samples: &Samples) -> Vec<i64> {
    let seqs = sqlx::query_scalar("SELECT seq FROM samples ORDER BY seq");
    seqs.fetch_all(samples.records.readers()).await.unwrap()
}

#[tokio::test]
async fn what_is_announced_and_does_not_come_is_forgotten() {
    let (dir, samples) = open().await;
    let site = "hall".parse().unwrap();
    for seq in 1..=4 {
        let announced = sample(seq, Some(&format!("{seq:064x}")));
        samples.announce(&announced, Some(&site)).await.unwrap();
    }
    samples
        .announce(&sample(5, None), Some(&site))
        .await
        .unwrap();
    // Something comes of the second one, later.
    let late = Instant::now() + room::AWAITED;
    assert_eq!(samples.forget(Instant::now()).await.unwrap(), 0);
    tokio::time::sleep(Duration::from_millis(5)).await;
    let piece = Bytes::from_static(b"\x89PNG");
    let device = "d1".parse().unwrap();
    let appended = samples.append((Some(&site), &device), 1, 2, 0, piece);
    assert_eq!(appended.await.unwrap(), 4);
    assert_eq!(samples.forget(late).await.unwrap(), 3);
    assert_eq!(numbers(&samples).await, [2, 5]);
    assert_eq!(samples.forget(late).await.unwrap(), 0);
    // It may come after all, and after a restart what is here is what is counted.
    let announced = sample(1, Some(&format!("{:064x}", 1)));
    assert!(samples.announce(&announced, Some(&site)).await.unwrap().0);
    let here = format!("{:?}", samples.room.amounts());
    drop(samples);
    let samples = again(dir.path()).await;
    assert_eq!(format!("{:?}", samples.room.amounts()), here);
}

#[tokio::test]
async fn what_is_old_goes_unless_somebody_has_said_something_about_it() {
    let (_dir, samples) = open().await;
    let shared = samples.objects.shared().await.unwrap();
    let image = Bytes::from(vec![7; 1_000]);
    let sha256 = crate::objects::digest(&image);
    samples.objects.put(&shared, &sha256, image).await.unwrap();
    drop(shared);
    for seq in 1..=5 {
        samples
            .announce(&sample(seq, Some(&sha256)), None)
            .await
            .unwrap();
    }
    let mut writer = samples.records.writer().await;
    let mut tx = writer.begin().await.unwrap();
    for sql in [
        // As if the image had come with each of them.
        "UPDATE samples SET image = 'stored'",
        "UPDATE samples SET received_ms = 0 WHERE seq < 4",
        "UPDATE samples SET holdout = 1 WHERE seq = 2",
        "INSERT INTO labels (sample, kind, author, created_ms) SELECT id, 'none', 'ana', 0 FROM samples WHERE seq = 3",
    ] {
        sqlx::query(sql).execute(&mut *tx).await.unwrap();
    }
    crate::records::commit(tx).await.unwrap();
    drop(writer);
    assert_eq!(samples.remove_old(1_000).await.unwrap(), 1);
    assert_eq!(numbers(&samples).await, [2, 3, 4, 5]);
    assert!(
        samples.objects.has(&sha256).await.unwrap(),
        "others have it"
    );
    // The newest one stays: its number must never be another's.
    assert_eq!(samples.remove_old(i64::MAX).await.unwrap(), 1);
    assert_eq!(numbers(&samples).await, [2, 3, 5]);
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM embeddings")
        .fetch_one(samples.records.readers())
        .await
        .unwrap();
    assert_eq!(left, 3);
}

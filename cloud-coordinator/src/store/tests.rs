//! The database against what it promises.

use mesh_core::{GapReason, RangeSet, Reading, VERSION};
use sqlx::Connection;

use super::{
    Batch, DeviceRow, GapFilter, Limits, NewGap, NewReading, Order, ReadingFilter, Store, pragma,
    retention::remove,
};
use crate::metrics::Metrics;

fn device() -> DeviceRow {
    DeviceRow {
        id: 1,
        site: "s".into(),
        device: "d".into(),
        first_seen_ms: 1,
        last_seen_ms: 1,
        status: None,
        info: None,
        model: None,
        state: None,
        stored: 0,
        missing: 0,
        right_count: 0,
        wrong_count: 0,
    }
}

fn reading(id: i64, seq: u64, received_ms: i64) -> NewReading {
    NewReading {
        id,
        device: 1,
        received_ms,
        replayed: seq.is_multiple_of(2),
        reading: Reading {
            v: VERSION,
            device: "d".parse().unwrap(),
            source: "cam0".parse().unwrap(),
            epoch: (1 << 53) - 1,
            seq,
            ts: -5,
            frame: seq,
            label: "ok".into(),
            score: 0.25,
            margin: 0.125,
            model: "m@1".into(),
            latency_ms: 2.0,
            by: Some("box".parse().unwrap()),
            file: Some("a.png".into()),
            truth: None,
        },
    }
}

async fn write(store: &Store, readings: &[NewReading], gaps: &[NewGap]) {
    let key = (1, (1 << 53) - 1);
    let mut stored = RangeSet::new();
    stored.insert(1, 9);
    let batch = Batch {
        devices: &[device()],
        readings,
        gaps,
        progress: &[(&key, &stored)],
        now_ms: 5,
    };
    store.commit(&batch).await.unwrap();
}

async fn count(store: &Store) -> i64 {
    pragma(store, "SELECT count(*) FROM readings").await
}

#[tokio::test]
async fn what_is_committed_is_on_the_disk_and_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    assert_eq!(pragma(&store, "PRAGMA synchronous").await, 2, "FULL");
    assert_eq!(pragma(&store, "PRAGMA auto_vacuum").await, 2, "INCREMENTAL");
    store.writable().await.unwrap();
    let readers = sqlx::query("DELETE FROM devices").execute(&store.readers);
    assert!(readers.await.is_err(), "readers only read");

    // One statement of each size, and the second guard against duplicates.
    let mut rows: Vec<_> = (1..=300)
        .map(|n| reading(n, n.cast_unsigned(), 10))
        .collect();
    rows.push(reading(301, 7, 10));
    write(&store, &rows, &[]).await;
    assert_eq!(count(&store).await, 300);
    let filter = ReadingFilter {
        order: Order::Asc,
        limit: 1,
        ..ReadingFilter::default()
    };
    let row = store.readings(filter).await.unwrap().remove(0);
    assert_eq!(
        (row.epoch, row.seq, row.ts, row.replayed),
        ((1 << 53) - 1, 1, -5, false)
    );
    assert_eq!((row.score, row.margin, row.latency_ms), (0.25, 0.125, 2.0));
    assert_eq!((row.file.as_deref(), row.truth), (Some("a.png"), None));
    assert_eq!(row.by.as_deref(), Some("box"));
    // The one that was there already has had an id, too.
    assert_eq!(store.last_reading().await.unwrap(), 301);
    let progress = store.progress(1, (1 << 53) - 1).await.unwrap().unwrap();
    assert!(progress.covers(1, 9) && progress.len() == 9);
    assert!(store.progress(1, 5).await.unwrap().is_none());
    assert_eq!(store.outboxes(1).await.unwrap(), 1);
    assert_eq!(store.recent_progress(5).await.unwrap().len(), 1);
    assert_eq!(store.recent_progress(6).await.unwrap().len(), 0);
}

#[tokio::test]
async fn gaps_that_meet_become_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let gap = |from, to, reason| NewGap {
        device: 1,
        epoch: 1,
        from,
        to,
        reason,
        received_ms: 1,
    };
    let (full, corrupt) = (GapReason::Full, GapReason::Corrupt);
    write(
        &store,
        &[],
        &[gap(1, 10, full), gap(20, 30, full), gap(11, 12, corrupt)],
    )
    .await;
    write(&store, &[], &[gap(13, 19, full), gap(11, 12, full)]).await;
    let filter = GapFilter {
        limit: 10,
        ..GapFilter::default()
    };
    let rows = store.gaps(filter).await.unwrap();
    let rows: Vec<_> = rows
        .iter()
        .map(|g| (g.from, g.to, g.reason.as_str()))
        .collect();
    assert_eq!(rows, [(11, 12, "corrupt"), (1, 30, "full")]);
}

#[tokio::test]
async fn old_readings_go_also_behind_some_of_a_wrong_clock() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let year = 365 * 86_400_000;
    let received = |n: i64| {
        if n <= 3_000 {
            year
        } else if n <= 6_000 {
            1_000
        } else {
            500_000
        }
    };
    let rows: Vec<_> = (1..=9_000)
        .map(|n| reading(n, n.cast_unsigned(), received(n)))
        .collect();
    write(&store, &rows, &[]).await;
    let limits = Limits {
        max_age_ms: 100_000,
        max_bytes: u64::MAX,
    };
    let removed = remove(&store, limits, 510_000, &Metrics::default())
        .await
        .unwrap();
    assert_eq!((removed, count(&store).await), (3_000, 6_000));
}

#[tokio::test]
async fn space_is_bounded_and_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    for chunk in 0..20 {
        let rows: Vec<_> = (1..=2_000)
            .map(|n| reading(chunk * 2_000 + n, (chunk * 2_000 + n).cast_unsigned(), 10))
            .collect();
        write(&store, &rows, &[]).await;
    }
    let before = pragma(&store, "PRAGMA page_count").await;
    let max_bytes = 2 << 20;
    let limits = Limits {
        max_age_ms: i64::MAX,
        max_bytes,
    };
    let removed = remove(&store, limits, 20, &Metrics::default())
        .await
        .unwrap();
    assert!(removed > 0 && count(&store).await == 40_000 - removed.cast_signed());
    let after = pragma(&store, "PRAGMA page_count").await;
    assert!(
        after < before && after * 4_096 < 2 * max_bytes.cast_signed(),
        "{before} -> {after} pages"
    );
    let oldest: i64 = pragma(&store, "SELECT min(seq) FROM readings").await;
    assert_eq!(oldest, removed.cast_signed() + 1, "the oldest went first");
}

/// SQLite takes a transaction back by itself where the disk is full. The next one finds a connection that works.
#[tokio::test]
async fn a_transaction_that_ended_by_itself_blocks_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    {
        let mut writer = store.writer.lock().await;
        let mut tx = writer.begin_with("BEGIN IMMEDIATE").await.unwrap();
        sqlx::query("ROLLBACK").execute(&mut *tx).await.unwrap();
        assert!(tx.commit().await.is_err());
    }
    write(&store, &[reading(1, 1, 10)], &[]).await;
    assert_eq!(count(&store).await, 1);
    assert_eq!(pragma(&store, "PRAGMA synchronous").await, 2, "FULL");
}

/// Ids are cursors: whoever follows them must see what comes after retention has emptied the tables and the coordinator has
/// started again.
#[tokio::test]
async fn no_id_comes_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let gap = |epoch, from, to| NewGap {
        device: 1,
        epoch,
        from,
        to,
        reason: GapReason::Full,
        received_ms: 10,
    };
    let ids = async |store: &Store| -> Vec<i64> {
        let filter = GapFilter {
            limit: 10,
            ..GapFilter::default()
        };
        let rows = store.gaps(filter).await.unwrap();
        rows.iter().map(|gap| gap.id).collect()
    };
    write(
        &store,
        &[reading(6, 1, 10), reading(7, 2, 10)],
        &[gap(1, 1, 5)],
    )
    .await;
    assert_eq!(ids(&store).await, [1]);
    // A gap that has grown comes after those that somebody has read.
    write(&store, &[], &[gap(1, 6, 9), gap(2, 1, 1)]).await;
    assert_eq!(ids(&store).await, [2, 3]);
    let limits = Limits {
        max_age_ms: 1,
        max_bytes: u64::MAX,
    };
    let metrics = Metrics::default();
    remove(&store, limits, 1_000, &metrics).await.unwrap();
    assert!(count(&store).await == 0 && ids(&store).await.is_empty());
    store.close().await;
    drop(store);
    let store = Store::open(dir.path()).await.unwrap();
    assert_eq!(store.last_reading().await.unwrap(), 7);
    write(&store, &[], &[gap(3, 1, 1)]).await;
    assert_eq!(ids(&store).await, [4]);
}

/// A database of before, emptied by retention already: what is known of its last reading counts.
#[tokio::test]
async fn numbering_goes_on_in_an_old_database() {
    let dir = tempfile::tempdir().unwrap();
    let options = sqlx::sqlite::SqliteConnectOptions::new()
        .filename(dir.path().join("coordinator.db"))
        .create_if_missing(true)
        .foreign_keys(false);
    let mut old = sqlx::SqliteConnection::connect_with(&options)
        .await
        .unwrap();
    let mut before = sqlx::migrate!();
    before.migrations = before
        .migrations
        .iter()
        .filter(|m| m.version < 4)
        .cloned()
        .collect::<Vec<_>>()
        .into();
    before.run(&mut old).await.unwrap();
    for row in [
        "INSERT INTO sighted VALUES (1, 812)",
        "INSERT INTO gaps VALUES (5, 1, 1, 1, 1, 'full', 1)",
    ] {
        sqlx::query(row).execute(&mut old).await.unwrap();
    }
    old.close().await.unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    assert_eq!(store.last_reading().await.unwrap(), 812);
    assert_eq!(
        pragma(&store, "SELECT last FROM numbered WHERE what = 'gap'").await,
        5
    );
}

#[test]
fn each_migration_has_a_number_of_its_own() {
    let versions: Vec<i64> = sqlx::migrate!().iter().map(|m| m.version).collect();
    assert!(versions.is_sorted_by(|a, b| a < b), "{versions:?}");
}

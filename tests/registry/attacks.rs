//! Rollback, freeze, mix-and-match, and a clock set back.

use std::{fs, num::NonZeroU64};

use tough::schema::{RoleType, Snapshot, Targets, Timestamp};

use super::*;

fn version(n: u64) -> NonZeroU64 {
    NonZeroU64::new(n).unwrap()
}

#[tokio::test]
async fn what_is_published_is_what_a_device_gets() {
    let world = World::new().await;
    let mut device = world.device();
    let empty = accepts(&mut device, &[], NOW).await;
    let none = device.release("det", "1", NOW).await.unwrap_err();
    assert!(matches!(none, VerifyError::UnknownTarget(_)), "{none:?}");

    world.publish("1").await;
    let first = accepts(&mut device, &["1"], NOW).await;
    assert_eq!(first.targets, empty.targets + 1);
    world.publish("2").await;
    let second = accepts(&mut device, &["1", "2"], NOW).await;
    assert_eq!((second.root, second.targets), (1, first.targets + 1));

    let again = world
        .signing
        .publish("det", "2", &document("2"), NOW)
        .await
        .unwrap();
    assert!(again.already && again.targets_version == second.targets);
    let other = world
        .signing
        .publish("det", "2", b"{}", NOW)
        .await
        .unwrap_err();
    assert!(other.to_string().contains("published already"), "{other}");
    for (name, version) in [
        ("", "1"),
        ("../x", "1"),
        (".x", "1"),
        ("_A", "1"),
        ("x", "1/2"),
    ] {
        assert!(
            world
                .signing
                .publish(name, version, b"{}", NOW)
                .await
                .is_err()
        );
        let named = device.release(name, version, NOW).await.unwrap_err();
        assert!(matches!(named, VerifyError::Name(_)), "{named:?}");
    }
    let long = vec![b' '; signing::MAX_DOCUMENT_BYTES + 1];
    assert!(world.signing.publish("det", "3", &long, NOW).await.is_err());
}

#[tokio::test]
async fn an_older_timestamp_is_refused() {
    let world = World::new().await;
    world.publish("1").await;
    let old = world.keep("old");
    world.publish("2").await;
    accepts(&mut world.device(), &["2"], NOW).await;
    // Also after a restart.
    for _ in 0..2 {
        let error = refuses(&mut world.device_at("device", &old), NOW).await;
        assert!(matches!(error, VerifyError::Rollback(_)), "{error:?}");
    }
    accepts(&mut world.device(), &["2"], NOW).await;
    // Somebody who never saw the newer one takes the older one.
    accepts(&mut world.device_at("another", &old), &["1"], NOW).await;
}

#[tokio::test]
async fn an_older_snapshot_in_a_newer_timestamp_is_refused() {
    let world = World::new().await;
    world.publish("1").await;
    let old: Signed<Timestamp> = parse(&world.metadata("timestamp.json"));
    world.publish("2").await;
    accepts(&mut world.device(), &["2"], NOW).await;
    let mut forged = old.signed.clone();
    forged.version = version(100);
    world
        .forge(forged, "timestamp.json", &world.repository())
        .await;
    let error = refuses(&mut world.device(), NOW).await;
    assert!(matches!(error, VerifyError::Rollback(_)), "{error:?}");
}

#[tokio::test]
async fn older_targets_in_a_newer_snapshot_are_refused() {
    let world = World::new().await;
    world.publish("1").await;
    let before: Signed<Timestamp> = parse(&world.metadata("timestamp.json"));
    let file = format!(
        "{}.snapshot.json",
        before.signed.meta["snapshot.json"].version
    );
    let old: Signed<Snapshot> = parse(&world.metadata(&file));
    world.publish("2").await;
    accepts(&mut world.device(), &["2"], NOW).await;

    let mut snapshot = old.signed;
    snapshot.version = version(100);
    let repository = world.repository();
    let pinned = world
        .forge(snapshot.clone(), "100.snapshot.json", &repository)
        .await;
    let mut timestamp = before.signed;
    timestamp.version = version(100);
    timestamp.meta.insert("snapshot.json".into(), pinned);
    world
        .forge(timestamp.clone(), "timestamp.json", &repository)
        .await;
    let error = refuses(&mut world.device(), NOW).await;
    assert!(matches!(error, VerifyError::Rollback(_)), "{error:?}");

    // Nor may the targets be left out.
    snapshot.version = version(101);
    snapshot.meta.clear();
    let pinned = world
        .forge(snapshot, "101.snapshot.json", &repository)
        .await;
    timestamp.version = version(101);
    timestamp.meta.insert("snapshot.json".into(), pinned);
    world.forge(timestamp, "timestamp.json", &repository).await;
    let error = refuses(&mut world.device(), NOW).await;
    assert!(matches!(error, VerifyError::Malformed(_)), "{error:?}");
}

#[tokio::test]
async fn expired_metadata_is_refused_role_by_role_and_only_stops_updates() {
    for (role, days) in [
        (RoleType::Timestamp, 2),
        (RoleType::Snapshot, 14),
        (RoleType::Targets, 90),
        (RoleType::Root, 365),
    ] {
        let world = World::new().await;
        let dir = world.dir.path().join("data");
        // This role lives as it does, the others for long.
        let mut lifetimes = Lifetimes {
            root: 5000,
            targets: 5000,
            snapshot: 5000,
            timestamp: 5000,
        };
        match role {
            RoleType::Root => lifetimes.root = days,
            RoleType::Targets => lifetimes.targets = days,
            RoleType::Snapshot => lifetimes.snapshot = days,
            _ => lifetimes.timestamp = days,
        }
        let signing = Signing::open(&dir, lifetimes, NOW).await.unwrap();
        let root = signing.propose(&[], NOW).unwrap();
        let root = signing::sign_root(&root, None, &world.key_files())
            .await
            .unwrap();
        signing.install_root(&root, NOW).await.unwrap();
        signing
            .publish("det", "1", &document("1"), NOW)
            .await
            .unwrap();

        let mut device = world.device();
        let late = NOW + i64::from(days) * DAY;
        accepts(&mut device, &["1"], late - 1000).await;
        // What is loaded may not be used either.
        let error = device.release("det", "1", late).await.unwrap_err();
        assert!(
            matches!(error, VerifyError::Expired { role: r, .. } if r == role),
            "{error:?}"
        );
        for name in ["device", "fresh"] {
            let mut device = world.device_at(name, &world.repository());
            let error = refuses(&mut device, late).await;
            assert!(
                matches!(error, VerifyError::Expired { role: r, .. } if r == role),
                "{error:?}"
            );
        }
        let renewed = signing.refresh(late).await.unwrap();
        assert!(renewed.renewed.contains(&role) && renewed.keys_elsewhere.is_empty());
        accepts(&mut world.device(), &["1"], late).await;
    }
}

#[tokio::test]
async fn expired_metadata_is_not_kept_and_still_protects_against_older() {
    let world = World::new().await;
    let old = world.keep("old");
    world.publish("1").await;
    accepts(&mut world.device(), &["1"], NOW).await;
    world.publish("2").await;
    let kept = fs::read(world.dir.path().join("device/trusted.json")).unwrap();
    refuses(&mut world.device(), NOW + 3 * DAY).await;
    assert_eq!(
        kept,
        fs::read(world.dir.path().join("device/trusted.json")).unwrap()
    );
    let error = refuses(&mut world.device_at("device", &old), NOW).await;
    assert!(matches!(error, VerifyError::Rollback(_)), "{error:?}");
}

#[tokio::test]
async fn a_clock_set_back_revives_nothing() {
    let world = World::new().await;
    world.publish("1").await;
    let frozen = world.keep("frozen");
    let later = NOW + 30 * DAY;
    world.signing.refresh(later).await.unwrap();
    world
        .signing
        .publish("det", "2", &document("2"), later)
        .await
        .unwrap();
    accepts(&mut world.device(), &["2"], later).await;

    // The clock falls back to 1970 or to when the old signatures were good; the true ones are still taken.
    for clock in [0, NOW] {
        let refreshed = accepts(&mut world.device(), &["2"], clock).await;
        assert_eq!(refreshed.clock_behind_ms, later - clock);
    }
    // A day later nothing has been signed again, and the clock would say that all is well.
    let dead = later + 3 * DAY;
    world.signing.refresh(dead - DAY / 2).await.unwrap();
    accepts(&mut world.device(), &["2"], dead).await;
    // Roll back the repository to where the clock is: refused as older; and to a device that lost its
    // metadata but not its time floor, as expired.
    let error = refuses(&mut world.device_at("device", &frozen), NOW).await;
    assert!(matches!(error, VerifyError::Rollback(_)), "{error:?}");
    let path = world.dir.path().join("device/trusted.json");
    let mut trusted: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    trusted["files"] = serde_json::json!({});
    fs::write(&path, trusted.to_string()).unwrap();
    let error = refuses(&mut world.device_at("device", &frozen), NOW).await;
    assert!(
        matches!(error, VerifyError::ClockBackwards { .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_clock_that_ran_ahead_does_not_lock_a_device_out() {
    let world = World::new().await;
    world.publish("1").await;
    let mut device = world.device();
    // Years ahead: everything has expired, nothing is remembered.
    let error = refuses(&mut device, NOW + 3000 * DAY).await;
    assert!(matches!(error, VerifyError::Expired { .. }), "{error:?}");
    accepts(&mut device, &["1"], NOW).await;
    // A day ahead: accepted, and tomorrow's signatures are good beyond that.
    accepts(&mut device, &["1"], NOW + DAY).await;
    world.signing.refresh(NOW + DAY).await.unwrap();
    accepts(&mut device, &["1"], NOW + DAY / 2).await;
}

#[tokio::test]
async fn files_of_two_versions_do_not_mix() {
    let world = World::new().await;
    world.publish("1").await;
    let old = world.keep("old");
    world.publish("2").await;
    let newest = |role: &str| {
        let end = format!(".{role}.json");
        let names = fs::read_dir(world.repository().join("metadata")).unwrap();
        let names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
        names
            .filter_map(|name| name.strip_suffix(&end)?.parse::<u64>().ok())
            .max()
            .unwrap()
    };
    for role in ["snapshot", "targets"] {
        let mixed = world.keep(&format!("mixed-{role}"));
        let n = newest(role);
        let before = fs::read(old.join(format!("metadata/{}.{role}.json", n - 1))).unwrap();
        fs::write(mixed.join(format!("metadata/{n}.{role}.json")), before).unwrap();
        let error = refuses(&mut world.device_at(role, &mixed), NOW).await;
        assert!(
            matches!(error, VerifyError::Mismatch(_) | VerifyError::TooLarge(_)),
            "{error:?}"
        );
    }
    // The same with a signed file of the right version and another content.
    let mixed = world.keep("mixed");
    let n = newest("targets");
    let mut targets: Signed<Targets> = parse(&world.metadata(&format!("{n}.targets.json")));
    targets.signed.targets.clear();
    world
        .forge(targets.signed, &format!("{n}.targets.json"), &mixed)
        .await;
    let error = refuses(&mut world.device_at("forged", &mixed), NOW).await;
    assert!(matches!(error, VerifyError::Mismatch(_)), "{error:?}");
    // A file that is missing.
    let missing = world.keep("missing");
    fs::remove_file(missing.join(format!("metadata/{n}.targets.json"))).unwrap();
    let error = refuses(&mut world.device_at("missing-device", &missing), NOW).await;
    assert!(matches!(error, VerifyError::Missing(_)), "{error:?}");
}

#[tokio::test]
async fn other_bytes_of_a_document_are_refused() {
    let world = World::new().await;
    world.publish("1").await;
    let mut device = world.device();
    accepts(&mut device, &["1"], NOW).await;
    let (path, honest) = files(&world.repository().join("targets"))
        .pop_first()
        .unwrap();
    let mut other = honest.clone();
    other[3] ^= 1;
    for (bytes, large) in [
        (other, false),
        (honest[..honest.len() - 1].to_vec(), false),
        (Vec::new(), false),
        ([&honest[..], b" "].concat(), true),
        (vec![b' '; 8 * 1024 * 1024], true),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = device.release("det", "1", NOW).await.unwrap_err();
        match large {
            true => assert!(matches!(error, VerifyError::TooLarge(_)), "{error:?}"),
            false => assert!(matches!(error, VerifyError::Mismatch(_)), "{error:?}"),
        }
    }
    fs::remove_file(&path).unwrap();
    let error = device.release("det", "1", NOW).await.unwrap_err();
    assert!(matches!(error, VerifyError::Missing(_)), "{error:?}");
    fs::write(&path, honest).unwrap();
    accepts(&mut device, &["1"], NOW).await;
}

#[tokio::test]
async fn a_device_survives_damage_to_what_it_remembers() {
    let world = World::new().await;
    world.publish("1").await;
    accepts(&mut world.device(), &["1"], NOW).await;
    let path = world.dir.path().join("device/trusted.json");
    let honest = fs::read(&path).unwrap();
    // A refresh that finds nothing new does not write.
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    accepts(&mut world.device(), &["1"], NOW).await;
    assert_eq!(before, fs::metadata(&path).unwrap().modified().unwrap());
    for bytes in [&honest[..honest.len() / 2], b"", b"{}", b"\xff\xfe"] {
        fs::write(&path, bytes).unwrap();
        accepts(&mut world.device(), &["1"], NOW).await;
    }
    // Another pinned root: the old trust is worth nothing.
    let other = World::new().await;
    let pinned = other.signing.first_root().unwrap();
    let folder = world.dir.path().join("device");
    let mut moved = Registry::new(&pinned, folder, Folder(world.repository())).unwrap();
    let error = refuses(&mut moved, NOW).await;
    assert!(matches!(error, VerifyError::Signature { .. }), "{error:?}");
    let bad = Registry::new(
        b"{}",
        world.dir.path().join("bad"),
        Folder(world.repository()),
    );
    fs::create_dir_all(world.dir.path().join("bad")).unwrap();
    let error = refuses(&mut bad.unwrap(), NOW).await;
    assert!(matches!(error, VerifyError::Pinned(_)), "{error:?}");
}

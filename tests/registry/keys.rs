//! Rotation, thresholds and keys that are elsewhere.

use std::{fs, os::unix::fs::PermissionsExt};

use tough::schema::{RoleType, Timestamp};

use super::*;
use cloud_coordinator::delivery::signing::{
    Edit, SigningError, generate, public_from_json, public_of, sign_root,
};

#[tokio::test]
async fn the_root_is_followed_step_by_step() {
    let world = World::new().await;
    world.publish("1").await;
    accepts(&mut world.device(), &["1"], NOW).await;
    for role in [RoleType::Root, RoleType::Timestamp] {
        world.signing.rotate(role, NOW).await.unwrap();
    }
    world.publish("2").await;
    for name in ["device", "fresh"] {
        let refreshed = accepts(
            &mut world.device_at(name, &world.repository()),
            &["1", "2"],
            NOW,
        )
        .await;
        assert_eq!(refreshed.root, 3);
    }
    // It stays there: a repository that hides the new roots is refused.
    let hidden = world.keep("hidden");
    fs::remove_file(hidden.join("metadata/2.root.json")).unwrap();
    fs::remove_file(hidden.join("metadata/3.root.json")).unwrap();
    assert_eq!(
        accepts(&mut world.device_at("device", &hidden), &["2"], NOW)
            .await
            .root,
        3
    );
    // Without the middle one nobody gets across.
    let gap = world.keep("gap");
    fs::remove_file(gap.join("metadata/2.root.json")).unwrap();
    let error = refuses(&mut world.device_at("late", &gap), NOW).await;
    let timestamp = RoleType::Timestamp;
    assert!(
        matches!(error, VerifyError::Signature { role, .. } if role == timestamp),
        "{error:?}"
    );
    // Nor by giving out the third as the second, or an old one again.
    fs::copy(
        gap.join("metadata/3.root.json"),
        gap.join("metadata/2.root.json"),
    )
    .unwrap();
    let error = refuses(&mut world.device_at("late", &gap), NOW).await;
    assert!(matches!(error, VerifyError::Signature { .. }), "{error:?}");
    fs::copy(
        gap.join("metadata/1.root.json"),
        gap.join("metadata/2.root.json"),
    )
    .unwrap();
    let error = refuses(&mut world.device_at("late", &gap), NOW).await;
    assert!(matches!(error, VerifyError::Rollback(_)), "{error:?}");
}

#[tokio::test]
async fn every_role_can_be_rotated_and_the_old_key_is_worth_nothing() {
    for role in [
        RoleType::Targets,
        RoleType::Snapshot,
        RoleType::Timestamp,
        RoleType::Root,
    ] {
        let world = World::new().await;
        world.publish("1").await;
        accepts(&mut world.device(), &["1"], NOW).await;
        let old = world.keep("old");
        world.signing.rotate(role, NOW).await.unwrap();
        world.publish("2").await;
        let status = world.signing.status().unwrap();
        assert_eq!(status.unused.len(), 1, "the old key");
        accepts(&mut world.device(), &["1", "2"], NOW).await;
        if role != RoleType::Root {
            // The old metadata under the new root: signed by a key that was taken away.
            let replay = world.keep("replay");
            for (path, bytes) in files(&old.join("metadata")) {
                fs::write(
                    replay.join("metadata").join(path.file_name().unwrap()),
                    bytes,
                )
                .unwrap();
            }
            for name in ["device", "fresh"] {
                let error = refuses(&mut world.device_at(name, &replay), NOW).await;
                assert!(
                    matches!(
                        error,
                        VerifyError::Signature { .. } | VerifyError::Rollback(_)
                    ),
                    "{role} {name}: {error:?}"
                );
            }
        }
    }
}

#[tokio::test]
async fn more_roots_than_one_refresh_follows_take_two() {
    let world = World::new().await;
    world.publish("1").await;
    for _ in 0..70 {
        world.signing.rotate(RoleType::Root, NOW).await.unwrap();
        for old in world.signing.status().unwrap().unused {
            fs::remove_file(old).unwrap();
        }
    }
    let mut device = world.device();
    let error = refuses(&mut device, NOW).await;
    assert!(matches!(error, VerifyError::TooManyRoots(64)), "{error:?}");
    assert_eq!(accepts(&mut device, &["1"], NOW).await.root, 71);
}

#[tokio::test]
async fn two_of_three_are_needed_and_one_twice_is_one() {
    let world = World::new().await;
    world.publish("1").await;
    accepts(&mut world.device(), &["1"], NOW).await;
    // Two more keys, made elsewhere; their public halves come as JSON.
    let stick = world.dir.path().join("stick");
    let mut edits = Vec::new();
    let mut private = Vec::new();
    for _ in 0..2 {
        let (path, key) = generate(&stick, RoleType::Targets).unwrap();
        let key = public_from_json(&serde_json::to_vec(&key).unwrap()).unwrap();
        edits.push(Edit::Add(RoleType::Targets, key));
        private.push(path);
    }
    edits.push(Edit::Threshold(RoleType::Targets, 2));
    let root = world.signing.propose(&edits, NOW).unwrap();
    let root = sign_root(&root, None, &world.key_files()).await.unwrap();
    // One targets key is here: the root would leave a registry that nobody can sign.
    let error = world.signing.install_root(&root, NOW).await.unwrap_err();
    assert!(matches!(error, SigningError::KeysMissing(_)), "{error}");
    accepts(&mut world.device(), &["1"], NOW).await;

    let data = world.dir.path().join("data");
    let open = || async {
        Signing::open(&data, Lifetimes::default(), NOW)
            .await
            .unwrap()
    };
    let two = open().await.with_keys([private[0].clone()]);
    two.install_root(&root, NOW).await.unwrap();
    two.publish("det", "2", &document("2"), NOW).await.unwrap();
    accepts(&mut world.device(), &["1", "2"], NOW).await;
    let one = open().await;
    let error = one
        .publish("det", "3", &document("3"), NOW)
        .await
        .unwrap_err();
    assert!(matches!(error, SigningError::KeysMissing(_)), "{error}");
    // Timestamp and snapshot are renewed without them.
    let renewed = one.refresh(NOW + 40 * DAY).await.unwrap();
    assert_eq!(renewed.keys_elsewhere, [RoleType::Targets]);
    assert_eq!(renewed.renewed, [RoleType::Snapshot, RoleType::Timestamp]);

    // A device counts, too: it takes two signatures, not one, not one twice, not one and a foreign one.
    let current: Signed<Timestamp> = parse(&world.metadata("timestamp.json"));
    let snapshot = current.signed.meta["snapshot.json"].version;
    let snapshot: Signed<tough::schema::Snapshot> =
        parse(&world.metadata(&format!("{snapshot}.snapshot.json")));
    let file = format!(
        "{}.targets.json",
        snapshot.signed.meta["targets.json"].version
    );
    let honest: Signed<tough::schema::Targets> = parse(&world.metadata(&file));
    let [first, second] = &honest.signatures[..] else {
        panic!("two signatures")
    };
    let mut foreign = second.clone();
    foreign.keyid = vec![7; 32].into();
    let mut broken = second.clone();
    broken.sig = vec![7; 64].into();
    for (signatures, taken) in [
        (vec![first, second], true),
        (vec![second, first], true),
        (vec![&foreign, second, first], true),
        (vec![first], false),
        (vec![], false),
        (vec![first, first], false),
        (vec![first, first, second], false),
        (vec![first, &foreign], false),
        (vec![first, &broken], false),
    ] {
        let repository = world.keep("signatures");
        let mut targets = honest.clone();
        targets.signatures = signatures.into_iter().cloned().collect();
        let bytes = serde_json::to_vec(&targets).unwrap();
        fs::write(repository.join("metadata").join(&file), &bytes).unwrap();
        // Everything above it is signed by stolen keys.
        let mut pinned = snapshot.signed.meta["targets.json"].clone();
        (pinned.hashes, pinned.length) = (None, None);
        let mut above = snapshot.signed.clone();
        above.meta.insert("targets.json".into(), pinned);
        let name = format!("{}.snapshot.json", above.version);
        let pinned = world.forge(above, &name, &repository).await;
        let mut top = current.signed.clone();
        top.meta.insert("snapshot.json".into(), pinned);
        world.forge(top, "timestamp.json", &repository).await;
        let mut device = world.device_at("counts", &repository);
        let now = NOW + 40 * DAY;
        let got = device.refresh(now).await;
        match taken {
            true => drop(got.unwrap()),
            false => {
                let error = got.unwrap_err();
                let targets = RoleType::Targets;
                assert!(
                    matches!(error, VerifyError::Signature { role, .. } if role == targets),
                    "{error:?}"
                );
            }
        }
    }
}

#[tokio::test]
async fn offline_root_keys_sign_by_files() {
    let world = World::new().await;
    world.publish("1").await;
    accepts(&mut world.device(), &["1"], NOW).await;
    // Three keys on three machines; the one that was made at first start is taken away, 2 of 3 must sign.
    let mut machines = Vec::new();
    let mut edits = Vec::new();
    for n in 0..3 {
        let (path, key) = generate(
            &world.dir.path().join(format!("machine{n}")),
            RoleType::Root,
        )
        .unwrap();
        edits.push(Edit::Add(RoleType::Root, key));
        machines.push([path]);
    }
    let first = world.signing.status().unwrap().roles[0].keys[0].id.clone();
    edits.extend([
        Edit::Remove(RoleType::Root, first[..8].into()),
        Edit::Threshold(RoleType::Root, 2),
    ]);
    let previous = world.signing.root().unwrap();
    let unsigned = world.signing.propose(&edits, NOW).unwrap();
    let refused = |bytes: Vec<u8>| {
        let signing = &world.signing;
        async move {
            let error = signing.install_root(&bytes, NOW).await.unwrap_err();
            assert!(matches!(error, SigningError::Root(_)), "{error}");
        }
    };
    refused(unsigned.clone()).await;
    let one = sign_root(&unsigned, Some(&previous), &machines[0])
        .await
        .unwrap();
    refused(one.clone()).await;
    let twice = sign_root(&one, Some(&previous), &machines[0])
        .await
        .unwrap();
    refused(twice.clone()).await;
    let two = sign_root(&twice, Some(&previous), &machines[1])
        .await
        .unwrap();
    // Two of the new, none of the old.
    refused(two.clone()).await;
    let local = world.key_files();
    assert!(
        sign_root(&two, None, &local).await.is_err(),
        "the old key is no key of the new root"
    );
    let whole = sign_root(&two, Some(&previous), &local).await.unwrap();
    // A change after signing is noticed.
    let later = String::from_utf8(whole.clone())
        .unwrap()
        .replace("\"threshold\": 2", "\"threshold\": 1");
    refused(later.into_bytes()).await;
    world.signing.install_root(&whole, NOW).await.unwrap();
    refused(whole).await;
    world.publish("2").await;
    assert_eq!(accepts(&mut world.device(), &["1", "2"], NOW).await.root, 2);

    // Its key is here no more: all is well but the root, which somebody must renew in time.
    let renewed = world.signing.refresh(NOW + 200 * DAY).await.unwrap();
    assert_eq!(renewed.keys_elsewhere, [RoleType::Root]);
    accepts(&mut world.device(), &["1", "2"], NOW + 200 * DAY).await;
    let now = NOW + 300 * DAY;
    let next = world.signing.propose(&[], now).unwrap();
    let next = sign_root(&next, None, &machines[2]).await.unwrap();
    let next = sign_root(&next, None, &machines[1]).await.unwrap();
    world.signing.install_root(&next, now).await.unwrap();
    world.signing.refresh(now).await.unwrap();
    assert_eq!(accepts(&mut world.device(), &["1", "2"], now).await.root, 3);
}

#[tokio::test]
async fn changes_that_make_no_sense_are_refused() {
    let world = World::new().await;
    let (_, key) = generate(&world.dir.path().join("x"), RoleType::Targets).unwrap();
    let known = world.signing.status().unwrap().roles[1].keys[0].id.clone();
    let twice = Edit::Add(RoleType::Targets, key);
    for edits in [
        vec![Edit::Threshold(RoleType::Root, 2)],
        vec![Edit::Threshold(RoleType::Root, 0)],
        vec![Edit::Remove(RoleType::Targets, known.clone())],
        vec![Edit::Remove(RoleType::Root, known)],
        vec![twice.clone(), twice.clone()],
        vec![twice, Edit::Remove(RoleType::Targets, String::new())],
        vec![Edit::Threshold(RoleType::DelegatedTargets, 1)],
    ] {
        let error = world.signing.propose(&edits, NOW).unwrap_err();
        assert!(matches!(error, SigningError::Root(_)), "{error}");
    }
    for bytes in [&b""[..], b"{}", b"[]", b"\xff"] {
        assert!(world.signing.install_root(bytes, NOW).await.is_err());
        assert!(public_from_json(bytes).is_err());
    }
    let other = World::new().await;
    let root = other.signing.propose(&[], NOW).unwrap();
    let root = sign_root(&root, None, &other.key_files()).await.unwrap();
    assert!(
        world.signing.install_root(&root, NOW).await.is_err(),
        "a stranger's root"
    );
}

#[tokio::test]
async fn a_stolen_timestamp_key_cannot_stop_updates_for_ever() {
    let world = World::new().await;
    world.publish("1").await;
    // Fast forward: the thief gives out the largest version, so that all that is honest looks older.
    let repository = world.keep("evil");
    let mut evil: Signed<Timestamp> = parse(&world.metadata("timestamp.json"));
    evil.signed.version = std::num::NonZeroU64::MAX;
    world
        .forge(evil.signed, "timestamp.json", &repository)
        .await;
    accepts(&mut world.device_at("device", &repository), &["1"], NOW).await;
    world.publish("2").await;
    let error = refuses(&mut world.device(), NOW).await;
    assert!(matches!(error, VerifyError::Rollback(_)), "{error:?}");
    // Rotating the key forgets it, once: afterwards older ones are refused as ever.
    world
        .signing
        .rotate(RoleType::Timestamp, NOW)
        .await
        .unwrap();
    accepts(&mut world.device(), &["1", "2"], NOW).await;
    let before = world.keep("before");
    world.publish("3").await;
    accepts(&mut world.device(), &["3"], NOW).await;
    let error = refuses(&mut world.device_at("device", &before), NOW).await;
    assert!(matches!(error, VerifyError::Rollback(_)), "{error:?}");
}

#[tokio::test]
async fn a_call_each_day_keeps_the_registry_alive() {
    let world = World::new().await;
    world.publish("1").await;
    let mut roots = 0;
    for day in 0..1000 {
        let now = NOW + day * DAY;
        let renewed = world.signing.refresh(now).await.unwrap();
        assert!(renewed.keys_elsewhere.is_empty());
        roots += renewed
            .renewed
            .iter()
            .filter(|role| **role == RoleType::Root)
            .count();
        if day % 7 == 0 {
            accepts(&mut world.device(), &["1"], now).await;
        }
    }
    assert_eq!(roots, 8);
    // Old versions are cleared away; the roots stay.
    let names = fs::read_dir(world.repository().join("metadata"))
        .unwrap()
        .count();
    assert!(names < 50, "{names}");
    accepts(
        &mut world.device_at("late", &world.repository()),
        &["1"],
        NOW + 999 * DAY,
    )
    .await;
}

#[tokio::test]
async fn keys_are_private_and_said_to_be_here() {
    let world = World::new().await;
    let status = world.signing.status().unwrap();
    let roles: Vec<_> = status
        .roles
        .iter()
        .map(|r| (r.role, r.threshold, r.keys[0].here))
        .collect();
    let wanted = [
        RoleType::Root,
        RoleType::Targets,
        RoleType::Snapshot,
        RoleType::Timestamp,
    ];
    assert_eq!(roles, wanted.map(|role| (role, 1, true)));
    let days = |n: i64| (status.roles[n as usize].expires_ms - NOW) / DAY;
    assert_eq!([days(0), days(1), days(2), days(3)], [365, 90, 14, 2]);
    for file in world.key_files() {
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(public_of(&file).is_ok());
    }
    let file = &world.key_files()[0];
    fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
    let error = world
        .signing
        .publish("det", "1", b"{}", NOW)
        .await
        .unwrap_err();
    assert!(matches!(error, SigningError::KeyExposed(_)), "{error}");
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    // Two at once.
    let lock = fs::File::open(world.repository().join(".lock")).unwrap();
    lock.lock().unwrap();
    let error = world
        .signing
        .publish("det", "1", b"{}", NOW)
        .await
        .unwrap_err();
    assert!(matches!(error, SigningError::Busy(_)), "{error}");
}

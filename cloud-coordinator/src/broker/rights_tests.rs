//! The rights by example, and a million times against an oracle that was written from the table and from nothing else.

use super::*;

fn device() -> Role {
    Role::Device {
        site: "demo".parse().unwrap(),
        device: "d1".parse().unwrap(),
    }
}

const EVERYWHERE: Role = Role::Viewer { sites: Sites::All };

fn only(sites: &[&str]) -> Role {
    Role::Viewer {
        sites: Sites::Some(sites.iter().map(|s| s.parse().unwrap()).collect()),
    }
}

#[test]
fn publishing() {
    let may = |topic| device().may_publish(topic).is_some();
    assert!(may("lacewing/v1/demo/d1/cam0/result") && may("lacewing/v1/demo/d1/_/status"));
    for denied in [
        "lacewing/v1/demo/d2/cam0/result",
        "lacewing/v1/other/d1/cam0/result",
        "lacewing/v1/demo/d1/_/ack",
        "lacewing/v1/demo/d1/_/desired",
        "lacewing/v1/demo/d1/cam0/nonsense",
        "lacewing/v1/demo/d1/cam0",
        "homeassistant/device/d1/config",
        "$SYS/x",
    ] {
        assert!(!may(denied), "{denied}");
    }
    for viewer in [EVERYWHERE, only(&["demo"])] {
        assert!(
            viewer
                .may_publish("lacewing/v1/demo/d1/cam0/result")
                .is_none()
        );
        assert!(viewer.may_will("lacewing/v1/demo/d1/_/status").is_none());
    }
}

#[test]
fn wills() {
    assert!(device().may_will("lacewing/v1/demo/d1/_/status").is_some());
    for denied in [
        "lacewing/v1/demo/d2/_/status",
        "lacewing/v1/demo/d1/cam0/status",
        "lacewing/v1/demo/d1/_/result",
    ] {
        assert!(device().may_will(denied).is_none(), "{denied}");
    }
}

#[test]
fn subscribing() {
    assert!(device().may_subscribe("lacewing/v1/demo/d1/_/ack"));
    assert!(device().may_subscribe("lacewing/v1/demo/d1/#"));
    assert!(device().may_subscribe("lacewing/v1/demo/_/_/roster"));
    assert!(device().may_subscribe("lacewing/v1/demo/_/_/meeting"));
    for denied in [
        "lacewing/#",
        "lacewing/v1/demo/+/_/ack",
        "lacewing/v1/demo/d1",
        "lacewing/v1/demo/d10/_/ack",
        "lacewing/v1/demo/d1/a#",
        "lacewing/v1/other/_/_/roster",
        "lacewing/v1/other/_/_/meeting",
        "lacewing/v1/demo/_/_/+",
        "lacewing/v1/demo/_/#",
        "#",
    ] {
        assert!(!device().may_subscribe(denied), "{denied}");
    }
    let viewer = |f| EVERYWHERE.may_subscribe(f);
    assert!(
        viewer("lacewing/#") && viewer("homeassistant/+/x") && viewer("lacewing/v1/+/+/+/result")
    );
    for denied in [
        "#",
        "+/v1/#",
        "$SYS/#",
        "",
        "lacewing/#/x",
        "lacewingx/#",
        &"lacewing/".repeat(20),
    ] {
        assert!(!viewer(denied), "{denied}");
    }
    let some = only(&["demo", "east"]);
    assert!(
        some.may_subscribe("lacewing/v1/demo/#") && some.may_subscribe("lacewing/v1/east/+/+/ack")
    );
    for denied in [
        "lacewing/#",
        "lacewing/v1/#",
        "lacewing/v1/+/d1/#",
        "lacewing/v1/demo",
        "lacewing/v1/west/#",
        "lacewing/+/demo/#",
        "+/v1/demo/#",
        "homeassistant/#",
    ] {
        assert!(!some.may_subscribe(denied), "{denied}");
    }
}

#[path = "rights_oracle.rs"]
mod oracle;

use oracle::{CAST, Dice, Whose};

fn role(whose: Whose) -> Role {
    match whose {
        Whose::Device(site, device) => Role::Device {
            site: site.parse().unwrap(),
            device: device.parse().unwrap(),
        },
        Whose::Sites(sites) => only(sites),
        Whose::Everywhere => EVERYWHERE,
    }
}

/// A million triples, which take about a second; as many as `LACEWING_RIGHTS_CASES` says, from the seed `LACEWING_RIGHTS_SEED`.
#[test]
fn agrees_with_the_table() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let cases: u64 = number("LACEWING_RIGHTS_CASES").unwrap_or(1_000_000);
    let seed: u64 = number("LACEWING_RIGHTS_SEED").unwrap_or_else(|| crate::clock::random() | 1);
    println!("seed {seed}, {cases} cases");
    let mut dice = Dice(seed);
    let cast = CAST.map(|whose| (whose, role(whose), whose.publishes()));
    let (mut allowed, mut refused) = ([0u64; 3], [0u64; 3]);
    for _ in 0..cases {
        let (whose, role, publishes) = &cast[dice.below(cast.len())];
        let text = dice.topic(*whose);
        let action = dice.below(3);
        let (is, should) = match action {
            0 => (role.may_publish(&text).is_some(), publishes.contains(&text)),
            1 => (
                role.may_will(&text).is_some(),
                whose.will().as_ref() == Some(&text),
            ),
            _ => (role.may_subscribe(&text), whose.subscribes(&text)),
        };
        assert_eq!(
            is, should,
            "seed {seed}: {whose:?}, action {action}, {text:?}"
        );
        if is {
            allowed[action] += 1;
        } else {
            refused[action] += 1;
        }
    }
    println!("allowed {allowed:?}, refused {refused:?} (publish, will, subscribe)");
    let least = cases / 100;
    assert!(
        allowed.iter().chain(&refused).all(|n| *n >= least),
        "both are tried: {allowed:?} {refused:?}"
    );
}

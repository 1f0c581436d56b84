//! Every profile in `firmware-configs/` is one that the agent takes.

use std::path::PathBuf;

use edge_agent::config::Config;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../firmware-configs")
}

#[test]
fn every_profile_is_sound_over_the_base() {
    let mut boards = Vec::new();
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") && !path.ends_with("base.toml") {
            let config =
                Config::load(&[folder().join("base.toml"), path.clone()], |_| None).unwrap();
            assert_eq!(
                path.file_stem().unwrap().to_str(),
                Some(config.board.name.as_str()),
                "the profile names its board"
            );
            boards.push(config.board.name);
        }
    }
    boards.sort();
    assert_eq!(
        boards,
        [
            "generic-aarch64",
            "raspberry-pi-4",
            "raspberry-pi-5",
            "raspberry-pi-zero-2-w"
        ]
    );
}

#[test]
fn layers_and_the_environment_override() {
    let files = [
        folder().join("base.toml"),
        folder().join("raspberry-pi-5.toml"),
    ];
    let config = Config::load(&files, |name| {
        (name == "LACEWING_BROKER_URL").then(|| "mqtt://b:99".into())
    })
    .unwrap();
    assert_eq!(config.broker.address().unwrap(), ("b".into(), 99));
    assert_eq!(config.outbox.max_bytes, 1 << 30);
}

#[test]
fn every_mistake_is_named_at_once() {
    let text = r#"
        site = "Hall 2"
        colour = "red"
        [broker]
        url = "http://x"
        keep_alive_s = 1
        password = "secret"
        [outbox]
        max_bytes = "lots"
        [publish]
        when = "at_most_every"
        every_s = 0
        [reject]
        labels = []
        min_score = nan
        [[source]]
        name = "cam0"
        kind = "folder"
        fps = nan
        speed = 3
        [[source]]
        name = "cam0"
        kind = "scene"
        gate = { every = 0, motion = 7.0 }
    "#;
    let said = Config::parse(text).unwrap_err().to_string();
    for field in [
        "site",
        "colour",
        "broker.url",
        "broker.keep_alive_s",
        "broker.password",
        "outbox.max_bytes",
        "publish.every_s",
        "reject.labels",
        "reject.min_score",
        "source[0].speed",
        "source[0].fps",
        "source[0].path",
        "source[1].name",
        "source[1].gate.every",
        "source[1].gate.motion",
    ] {
        assert!(
            said.contains(&format!("{field}: ")),
            "{field} is missing in:\n{said}"
        );
    }
}

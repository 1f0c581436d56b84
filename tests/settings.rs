//! Settings reach every device, and those that do harm none for long: real agents, a real coordinator.

use std::{path::Path, process::Stdio, time::Duration};

use fleet::{
    process::EXIT_WITH_STDIN,
    site::{Camera, Site},
};
use serde_json::Value;
use tests::{bundle, exactly_once, plan, until, web::Web};

const TIMEOUT: Duration = Duration::from_secs(60);
/// Pictures that the cameras show again and again.
const PICTURES: u64 = 24;

/// As an operator would: on the command line. Says whether it worked, and what was said.
async fn operate(node: &str, data: &Path, arguments: &[&str]) -> (bool, String) {
    let mut command = tokio::process::Command::new(node);
    command
        .args(["cloud-coordinator", "settings", "--data"])
        .arg(data);
    command.args(arguments).stdin(Stdio::null());
    if arguments[0] != "status" {
        command.args(["--author", "ada"]);
    }
    let done = command.env_remove(EXIT_WITH_STDIN).output().await.unwrap();
    let said = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8(said).unwrap())
}

fn devices(api: &Web) -> Vec<Value> {
    api.get("/devices")["items"].as_array().unwrap().clone()
}

/// Three devices are at rest, each with what this says of it.
fn all(api: &Web, is_so: impl Fn(&Value) -> bool) -> bool {
    let devices = devices(api);
    devices.len() == 3
        && devices.iter().all(|device| {
            let settings = &device["update"]["settings"];
            settings["phase"] == "settled" && is_so(settings)
        })
}

fn on(version: u64) -> impl Fn(&Value) -> bool {
    move |settings| settings["loaded"]["version"] == version && settings["failure"].is_null()
}

fn draw(folder: &Path) {
    use edge_agent::capture::scene::{SceneConfig, draw};
    let config = SceneConfig {
        width: 64,
        height: 64,
        ..SceneConfig::default()
    };
    for frame in 0..PICTURES {
        let (picture, truth) = draw(&config, frame);
        let class = folder.join(truth.label);
        std::fs::create_dir_all(&class).unwrap();
        picture.save(class.join(format!("{frame}.png"))).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn good_settings_reach_everybody_and_harmful_ones_go_back() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let pictures = dir.path().join("pictures");
    draw(&pictures);
    let mut plan = plan(node, &dir.path().join("site"));
    plan.updates = true;
    plan.camera = Camera::Folder {
        path: pictures,
        repeat: true,
    };
    let config = dir.path().join("coordinator.toml");
    let models = format!("[training]\nmodels = [{:?}]\n", bundle("conveyor"));
    std::fs::write(&config, models).unwrap();
    plan.coordinator_config = Some(config);
    let mut site = Site::start(&plan).await.unwrap();
    let tap = tests::Tap::start(&site).unwrap();
    let data = site.data();
    let api = Web::api(&site, TIMEOUT);
    until("three devices on their own files", async || {
        all(&api, |settings| settings["loaded"].is_null())
    })
    .await
    .unwrap();

    let file = dir.path().join("settings.toml");
    let path = file.to_str().unwrap().to_owned();
    let write = |text: &str| std::fs::write(&file, text).unwrap();

    // Fewer pictures, and fewer words about itself.
    write("[report]\nevery_s = 5\n\n[[source]]\nname = \"cam0\"\nfps = 4.0\n");
    let push = ["push", &path, "--site", "demo", "--trial", "60"];
    let (worked, said) = operate(node, &data, &push).await;
    assert!(worked, "{said}");
    until("everybody has kept them", async || all(&api, on(1)))
        .await
        .unwrap();
    until("and takes fewer pictures", async || {
        let rate = |device: &Value| device["rate"].as_f64().unwrap_or(0.0);
        devices(&api)
            .iter()
            .all(|device| (0.5..8.0).contains(&rate(device)))
    })
    .await
    .unwrap();

    // What cannot be set from afar gets nowhere.
    write("data = \"/elsewhere\"\n[broker]\nurl = \"mqtt://elsewhere\"\n");
    let (worked, said) = operate(node, &data, &push).await;
    assert!(
        !worked && said.contains("data: cannot be set from afar"),
        "{said}"
    );
    assert!(said.contains("broker.url"), "{said}");

    // What only the device can know is refused there, with every reason.
    write("[report]\nevery_s = 0\n\n[[source]]\nname = \"cam9\"\nfps = 4.0\n");
    let (worked, said) = operate(node, &data, &push).await;
    assert!(worked, "{said}");
    until("everybody refuses them and says why", async || {
        all(&api, |settings| {
            let failure = &settings["failure"];
            let detail = failure["detail"].as_str().unwrap_or_default();
            settings["loaded"]["version"] == 1
                && failure["reason"] == "refused"
                && detail.contains("report.every_s")
                && detail.contains("cam9")
        })
    })
    .await
    .unwrap();

    // One device loses its camera with these, and comes back by itself.
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    write(&format!("[[source]]\nname = \"cam0\"\npath = {empty:?}\n"));
    let one = ["push", &path, "--device", "demo/d2", "--trial", "20"];
    let (worked, said) = operate(node, &data, &one).await;
    assert!(worked, "{said}");
    let d2 = || api.get("/devices/demo/d2")["update"]["settings"].clone();
    until("d2 is back with what it had", async || {
        let settings = d2();
        settings["phase"] == "settled"
            && settings["failure"]["reason"] == "blind"
            && settings["loaded"]["version"] == 1
    })
    .await
    .unwrap();
    let (_, said) = operate(node, &data, &["status"]).await;
    assert!(
        said.contains("demo/d2 blind: no picture from cam0"),
        "{said}"
    );

    // Taken back, the site's count again; those are still bad, and the last good ones stay.
    let (worked, said) = operate(node, &data, &["unset", "--device", "demo/d2"]).await;
    assert!(worked, "{said}");
    until("d2 refuses the site's again", async || {
        let settings = d2();
        settings["failure"]["reason"] == "refused" && settings["loaded"]["version"] == 1
    })
    .await
    .unwrap();

    // A device that is killed in the middle of its trial is none the worse.
    write("[report]\nevery_s = 3\n");
    let (worked, said) = operate(node, &data, &push).await;
    assert!(worked, "{said}");
    until("d1 tries them", async || {
        api.get("/devices/demo/d1")["update"]["settings"]["phase"] == "watching"
    })
    .await
    .unwrap();
    site.devices[0].agent.kill().await.unwrap();
    site.start_all().unwrap();
    let newest = api.get("/settings")[0]["version"].as_u64().unwrap();
    until("everybody has the newest", async || all(&api, on(newest)))
        .await
        .unwrap();
    let (worked, said) = operate(node, &data, &["unset", "--site", "demo"]).await;
    assert!(worked, "{said}");
    until("everybody is on their own files", async || {
        all(&api, |settings| settings["loaded"].is_null())
    })
    .await
    .unwrap();

    // Every message was what its schema says.
    let tapped = tap.stop().await;
    assert!(tapped.bad.is_empty(), "{:#?}", tapped.bad);

    // All of it cost nobody a reading.
    let seen = site
        .finish(Default::default(), Duration::from_secs(120))
        .await
        .unwrap();
    exactly_once(&seen.total()).unwrap();
    site.stop().await.unwrap();
}

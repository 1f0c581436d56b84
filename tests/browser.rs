//! The pages, as a person uses them: in a real browser.

use std::{path::Path, time::Duration};

use fleet::{
    process::{Process, Program},
    site::{Ageing, Site},
};
use serde_json::{Value, json};
use tests::{until, web::Web};

/// Until an answer of the browser counts as missing.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Where Debian puts it.
const DRIVER: &str = "/usr/bin/chromedriver";

/// A headless Chromium, driven by WebDriver (W3C Recommendation of 2018).
struct Browser {
    _driver: Process,
    web: Web,
    session: String,
}

impl Browser {
    /// `None` where there is no browser.
    async fn start(node: &str, dir: &Path) -> Option<Self> {
        if !Path::new(DRIVER).exists() {
            eprintln!("SKIPPED: no {DRIVER}; tests/run installs it");
            return None;
        }
        // A port that was free a moment ago; the driver cannot say which one it took.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = port.local_addr().unwrap();
        drop(port);
        let command = [DRIVER.into(), format!("--port={}", address.port()).into()];
        let node = Program(node.into());
        let mut driver = Process::other("chromedriver", &node, command, dir.join("driver.log"));
        driver.start().unwrap();
        let web = Web::new(&format!("http://{address}"), TIMEOUT);
        until("the driver answers", async || {
            web.try_get("/status").is_ok()
        })
        .await
        .unwrap();
        let profile = format!("--user-data-dir={}", dir.join("profile").display());
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1280,1000",
            &profile,
        ];
        let wanted = json!({"capabilities": {"alwaysMatch": {
            // Its authority is its own.
            "acceptInsecureCerts": true,
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let said = web.post("/session", &wanted);
        let session = said["value"]["sessionId"].as_str().unwrap().to_owned();
        Some(Self {
            _driver: driver,
            web,
            session,
        })
    }

    fn command(&self, what: &str, body: &Value) -> Value {
        let path = format!("/session/{}/{what}", self.session);
        self.web.post(&path, body)["value"].take()
    }

    fn open(&self, url: &str) {
        self.command("url", &json!({ "url": url }));
    }

    /// Runs a script in the page, as a test reads it: `return …`.
    fn eval(&self, script: &str) -> Value {
        self.command("execute/sync", &json!({"script": script, "args": []}))
    }

    fn text(&self, id: &str) -> String {
        let found = self.eval(&format!(
            "return document.getElementById('{id}').textContent"
        ));
        found.as_str().unwrap_or_default().to_owned()
    }

    /// Presses keys, wherever the cursor is.
    fn keys(&self, keys: &str) {
        let pressed: Vec<Value> = keys
            .chars()
            .flat_map(|key| {
                ["keyDown", "keyUp"].map(|what| json!({"type": what, "value": key.to_string()}))
            })
            .collect();
        let actions = json!({"actions": [{"type": "key", "id": "keys", "actions": pressed}]});
        self.command("actions", &actions);
    }

    /// The path of the page that is shown.
    fn path(&self) -> String {
        let path = self.eval("return location.pathname");
        path.as_str().unwrap_or_default().to_owned()
    }

    /// Fills in the page to log in on, and sends it.
    fn log_in(&self, name: &str, password: &str) {
        for (field, words) in [("name", name), ("password", password)] {
            self.eval(&format!("document.getElementById('{field}').focus()"));
            self.keys(words);
        }
        self.keys("\u{e007}");
    }

    /// What the page complained about.
    fn complaints(&self) -> Vec<String> {
        let log = self.command("se/log", &json!({"type": "browser"}));
        let entries = log.as_array().into_iter().flatten();
        let severe = entries.filter(|entry| entry["level"] == "SEVERE");
        severe.map(|entry| entry["message"].to_string()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends the browser; the driver ends with its guard.
        let _ = self.web.try_delete(&format!("/session/{}", self.session));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_sees_the_devices_and_labels_what_they_send() {
    let dir = tempfile::tempdir().unwrap();
    let node = env!("CARGO_BIN_EXE_node");
    let Some(browser) = Browser::start(node, dir.path()).await else {
        return;
    };
    let mut plan = tests::plan(node, &dir.path().join("site"));
    plan.agents = 1;
    plan.fps = 5.0;
    plan.ageing = Some(Ageing {
        light: 0.0,
        onset: 0,
        ramp: 0,
        defect_rate: 0.5,
        kept: 1.0,
        window: 100,
    });
    let mut site = Site::start(&plan).await.unwrap();
    let base = site.way().console();
    let api = Web::api(&site, TIMEOUT);

    // The first admin, by the link that only who runs the coordinator can see.
    let link = std::fs::read_to_string(site.data().join("trust/setup-link")).unwrap();
    browser.open(link.trim());
    for (field, words) in [
        ("name", "ada"),
        ("password", "a long password"),
        ("again", "a long password"),
    ] {
        browser.eval(&format!("document.getElementById('{field}').focus()"));
        browser.keys(words);
    }
    browser.keys("\u{e007}");
    until("the page to log in on follows", async || {
        browser.path() == "/login"
    })
    .await
    .unwrap();
    assert!(!site.data().join("trust/setup-link").exists());
    // Whoever is not logged in is sent there, and back after it.
    browser.open(&format!("{base}/label"));
    until("a page without a session leads to the login", async || {
        browser.path() == "/login"
    })
    .await
    .unwrap();
    browser.log_in("ada", "a wrong password");
    until("it says that it is wrong", async || {
        browser.text("said").contains("wrong")
    })
    .await
    .unwrap();
    browser.eval("document.getElementById('name').value = ''");
    browser.log_in("ada", "a long password");
    until("the page that was wanted is shown", async || {
        browser.path() == "/label"
    })
    .await
    .unwrap();
    // What was refused until here is not what the page does wrong from here on.
    browser.complaints();

    // The devices, live.
    browser.open(&base);
    until("it is shown who is logged in", async || {
        browser.text("me").contains("ada · admin")
    })
    .await
    .unwrap();
    until(
        "the device is on the page with its last result",
        async || {
            let card = "return document.querySelector('#devices .card.online .label')?.textContent";
            !matches!(browser.eval(card).as_str(), None | Some("" | "–"))
        },
    )
    .await
    .unwrap();
    until("what is to be labelled is on the page", async || {
        browser.text("learning").contains("open")
    })
    .await
    .unwrap();

    // Labels: two classes first, by the form of the page.
    until("five samples have arrived", async || {
        let page = api.get("/samples?task=conveyor&limit=10");
        let stored = page["items"].as_array().unwrap().iter();
        stored.filter(|sample| sample["image"] == "stored").count() >= 5
    })
    .await
    .unwrap();
    browser.open(&format!("{base}/label"));
    until("an image is shown", async || {
        browser.eval("return document.getElementById('image').naturalWidth > 0") == true
    })
    .await
    .unwrap();
    let classes = api.get("/tasks")["items"][0]["classes"].clone();
    for class in ["<img src=x onerror=alert(1)>", "bad"] {
        if !classes
            .as_array()
            .unwrap()
            .iter()
            .any(|known| known == class)
        {
            browser.eval("document.getElementById('class').focus()");
            browser.keys(class);
            browser.keys("\u{e007}");
            until("the class is a button", async || {
                browser.text("classes").contains(class)
            })
            .await
            .unwrap();
        }
    }
    let classes = api.get("/tasks")["items"][0]["classes"].clone();
    let place = classes.as_array().unwrap().iter().position(|c| c == "bad");
    let key = char::from_digit(place.unwrap() as u32 + 1, 10).unwrap();
    let first = browser.eval("return document.getElementById('image').getAttribute('src')");
    let first = first.as_str().unwrap().to_owned();
    let id = first.split('/').rev().nth(1).unwrap().to_owned();
    let sample = || api.get(&format!("/samples/{id}"));
    browser.keys(&key.to_string());
    until(
        "the label is stored, and the next image shown",
        async || {
            let next = browser.eval("return document.getElementById('image').getAttribute('src')");
            sample()["class"] == "bad" && next.as_str() != Some(&first)
        },
    )
    .await
    .unwrap();
    assert_eq!(sample()["author"], "ada", "{}", sample());
    browser.keys("u");
    until(
        "the label is taken back, and its image is back",
        async || {
            let back = browser.eval("return document.getElementById('image').getAttribute('src')");
            sample()["class"].is_null() && back.as_str() == Some(&first)
        },
    )
    .await
    .unwrap();
    browser.keys("0");
    until("none of these is an answer", async || {
        sample()["labelled"] == "none"
    })
    .await
    .unwrap();
    // What a person typed is text, never part of the page.
    assert_eq!(
        browser.eval("return document.querySelectorAll('#classes img').length"),
        0
    );
    assert_eq!(browser.complaints(), Vec::<String>::new());

    // Out again, also from what is open.
    browser.eval("document.getElementById('logout').click()");
    until("the page to log in on follows", async || {
        browser.path() == "/login"
    })
    .await
    .unwrap();
    browser.open(&base);
    until("nothing is shown without a session", async || {
        browser.path() == "/login"
    })
    .await
    .unwrap();
    site.stop().await.unwrap();
}

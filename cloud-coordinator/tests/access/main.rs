//! Who may do what, asked of a real coordinator over HTTP.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and not every test file uses all that they share"
)]

#[path = "../common/mod.rs"]
mod common;

mod behind;
mod devices;
mod directory;
mod proof;
mod shares;
mod unread;

use std::{collections::BTreeMap, net::SocketAddr, path::Path};

use common::*;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

const ROLES: [&str; 4] = ["viewer", "labeller", "operator", "admin"];
const JSON: &str = "content-type: application/json\r\n";

/// A new token, as a header.
async fn token(http: SocketAddr, role: &str, site: Option<&str>) -> String {
    let new = json!({"label": format!("test {role}"), "role": role, "site": site});
    let (status, made) = say(http, "POST /api/v1/tokens", new).await;
    assert_eq!(status, 201, "{made}");
    format!(
        "authorization: Bearer {}\r\n",
        made["token"].as_str().unwrap()
    )
}

/// The status of a request, whose body is not waited for: some have no end.
async fn status(http: SocketAddr, line: &str, headers: &str, body: &str) -> u16 {
    let mut stream = TcpStream::connect(http).await.unwrap();
    let text = format!(
        "{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n{headers}{JSON}\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut head = [0; 12];
    let read = timeout(WORK, stream.read_exact(&mut head)).await.unwrap();
    read.unwrap();
    std::str::from_utf8(&head[9..]).unwrap().parse().unwrap()
}

/// JSON of somebody.
async fn tell(http: SocketAddr, who: &str, line: &str, body: Value) -> (u16, Value) {
    let headers = format!("{who}{JSON}");
    let (status, _, body) = send_as(http, line, &headers, body.to_string().as_bytes()).await;
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

async fn look(http: SocketAddr, who: &str, path: &str) -> (u16, Value) {
    let (status, _, body) = send_as(http, &format!("GET {path}"), who, b"").await;
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// The operations of the API: `METHOD`, a path that can be asked for, and who may.
fn operations(description: &Value) -> Vec<(String, String, Value, Value)> {
    let mut all = Vec::new();
    for (path, methods) in description["paths"].as_object().unwrap() {
        let filled: Vec<_> = path
            .split('/')
            .map(|part| match part {
                "{sha256}" | "{from}" | "{to}" | "{digest}" => "0".repeat(64),
                "{id}" | "{epoch}" | "{seq}" => "999999".to_owned(),
                part if part.starts_with('{') => "nothing".to_owned(),
                part => part.to_owned(),
            })
            .collect();
        for (method, operation) in methods.as_object().unwrap() {
            all.push((
                method.to_uppercase(),
                filled.join("/"),
                operation["x-role"].clone(),
                operation["x-sites"].clone(),
            ));
        }
    }
    all
}

/// What the declaration says about somebody without a certificate, on this machine, where nothing is encrypted: there who
/// shows nothing counts as a device.
fn allowed(declared: &str, role: Option<&str>) -> bool {
    let rank = |role: &str| ROLES.iter().position(|is| *is == role).unwrap();
    let at_least = |needed: &str| role.is_some_and(|role| rank(role) >= rank(needed));
    match declared.split(" or ").collect::<Vec<_>>()[..] {
        ["open"] | [_, "loopback"] => true,
        ["device"] => role.is_none(),
        ["device", needed] => role.is_none() || at_least(needed),
        [needed] => at_least(needed),
        _ => panic!("{declared}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_may_exactly_what_is_declared() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let (_, description) = get(http, "/api/v1/openapi.json").await;
    let operations = operations(&description);
    assert!(operations.len() > 60, "{}", operations.len());
    let mut people = vec![(None, String::new())];
    for role in ROLES {
        people.push((Some(role), token(http, role, None).await));
    }
    let (mut cells, mut wrong) = (BTreeMap::<_, usize>::new(), Vec::new());
    for (method, path, declared, _) in &operations {
        let Some(declared) = declared.as_str() else {
            panic!("{method} {path}: nobody has declared who may use it, see src/api/access.rs");
        };
        for (role, who) in &people {
            let line = format!("{method} {path}");
            let got = status(http, &line, who, "{}").await;
            let expected = match (allowed(declared, *role), role) {
                (true, _) => got != 401 && got != 403 && got != 429,
                (false, None) => got == 401,
                (false, Some(_)) => got == 403,
            };
            *cells.entry((*role, allowed(declared, *role))).or_default() += 1;
            if !expected {
                wrong.push(format!("{line} ({declared}) as {role:?}: {got}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    println!("{cells:#?}");
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_see_one_site_sees_nothing_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let (http, broker) = (handle.http, handle.mqtt.unwrap());
    for (site, device) in [("demo", "d1"), ("other", "d2")] {
        let mut client = Client::connect(broker, &format!("{site}/{device}")).await;
        let topic = |kind: &str| format!("lacewing/v1/{site}/{device}/_/{kind}");
        assert!(client.subscribe(&topic("ack")).await);
        client
            .publish(&topic("replay"), batch(device, 1, 1..=3))
            .await;
        client.acknowledged(1, 3).await;
        client.publish(&topic("gap"), gap(device, 1, 4, 5)).await;
        client.acknowledged(1, 5).await;
        let sample = json!({
            "v": 1, "device": device, "source": "cam0", "epoch": 1, "seq": 1, "ts": 1, "reason": "random",
            "label": "ok", "score": 0.5, "margin": 0.5, "entropy": 0.5, "model": "steel@1",
            "embedding": [0.5, 1.0],
        });
        let (status, said) = say(http, "POST /api/v1/samples", sample).await;
        assert_eq!(status, 201, "{said}");
    }
    // An admin sees all, a viewer of a site that site, and what is asked for of another is not there.
    let viewer = token(http, "viewer", Some("demo")).await;
    let operator = token(http, "operator", Some("demo")).await;
    for list in ["devices", "readings", "gaps", "samples"] {
        let path = format!("/api/v1/{list}");
        let (_, all) = get(http, &path).await;
        let of = |page: &Value, site: &str| {
            let items = page["items"].as_array().unwrap();
            items.iter().filter(|item| item["site"] == site).count()
        };
        assert!(of(&all, "demo") > 0 && of(&all, "other") > 0, "{all}");
        for query in ["", "?site=demo"] {
            let (status, own) = look(http, &viewer, &format!("{path}{query}")).await;
            assert_eq!(status, 200, "{own}");
            assert_eq!(of(&own, "demo"), of(&all, "demo"), "{list}");
            assert_eq!(
                own["items"].as_array().unwrap().len(),
                of(&own, "demo"),
                "{list}"
            );
        }
        let (status, _) = look(http, &viewer, &format!("{path}?site=other")).await;
        assert_eq!(status, 404, "{list}");
    }
    let (_, samples) = get(http, "/api/v1/samples").await;
    let id = |site: &str| {
        let items = samples["items"].as_array().unwrap();
        items.iter().find(|item| item["site"] == site).unwrap()["id"].clone()
    };
    let (own, others) = (id("demo"), id("other"));
    assert_eq!(
        look(http, &viewer, &format!("/api/v1/samples/{own}"))
            .await
            .0,
        200
    );
    say(http, "PUT /api/v1/tasks/steel", json!({"classes": ["ok"]})).await;
    for (line, body) in [
        (format!("GET /api/v1/samples/{others}"), Value::Null),
        (format!("GET /api/v1/samples/{others}/image"), Value::Null),
        (format!("DELETE /api/v1/samples/{others}"), Value::Null),
        (
            format!("DELETE /api/v1/samples/{others}/labels/last"),
            Value::Null,
        ),
        (
            format!("POST /api/v1/samples/{others}/labels"),
            json!({"class": "ok"}),
        ),
        (
            format!("PUT /api/v1/samples/{others}/holdout"),
            json!({"holdout": true}),
        ),
        ("GET /api/v1/devices/other/d2".into(), Value::Null),
        (
            "PUT /api/v1/devices/other/d2/pin".into(),
            json!({"model": null, "author": "a"}),
        ),
        (
            "POST /api/v1/devices/d2/sources/cam0/mark".into(),
            json!({"mark": "wrong"}),
        ),
        (
            "POST /api/v1/devices/d2/sources/cam0/mark?site=other".into(),
            json!({"mark": "wrong"}),
        ),
        ("GET /api/v1/live?site=other".into(), Value::Null),
    ] {
        let (status, said) = tell(http, &operator, &line, body).await;
        assert_eq!(status, 404, "{line}: {said}");
    }
    let (status, _) = tell(
        http,
        &operator,
        &format!("POST /api/v1/samples/{own}/labels"),
        json!({"class": "ok"}),
    )
    .await;
    assert_eq!(status, 201);
    // What is about all sites is not for it, whatever its role.
    let (_, description) = get(http, "/api/v1/openapi.json").await;
    for (method, path, declared, sites) in operations(&description) {
        if sites == "all" && declared != "viewer or loopback" {
            let got = status_of(http, &method, &path, &operator).await;
            assert_eq!(got, 403, "{method} {path}");
        }
    }
    // Live: the first picture and what follows.
    let mut stream = TcpStream::connect(http).await.unwrap();
    let text = format!("GET /api/v1/live?what=devices HTTP/1.1\r\nhost: x\r\n{viewer}\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    for device in ["other/d2", "demo/d1"] {
        let (site, name) = device.split_once('/').unwrap();
        let client = Client::connect(broker, device).await;
        let topic = format!("lacewing/v1/{site}/{name}/_/replay");
        client.publish(&topic, batch(name, 1, 6..=9)).await;
    }
    let mut heard = String::new();
    let events = async {
        let mut buffer = [0; 4_096];
        while !heard.contains("\"stored\":7") {
            let n = stream.read(&mut buffer).await.unwrap();
            heard += std::str::from_utf8(&buffer[..n]).unwrap();
        }
    };
    timeout(PATIENCE, events).await.unwrap();
    assert!(
        !heard.contains("\"other\"") && !heard.contains("d2"),
        "{heard}"
    );
    handle.stop().await;
}

async fn status_of(http: SocketAddr, method: &str, path: &str, who: &str) -> u16 {
    status(http, &format!("{method} {path}"), who, "{}").await
}

fn setup_token(data: &Path) -> String {
    let link = std::fs::read_to_string(data.join("trust/setup-link")).unwrap();
    assert!(link.starts_with("http://127.0.0.1:"), "{link}");
    link.trim().split_once("/setup#").unwrap().1.to_owned()
}

/// Logs in; the cookie as a header.
async fn log_in(http: SocketAddr, name: &str, password: &str) -> Result<String, u16> {
    let body = json!({"name": name, "password": password}).to_string();
    let mut stream = TcpStream::connect(http).await.unwrap();
    let text = format!(
        "POST /api/v1/login HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{JSON}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let status = answer[9..12].parse().unwrap();
    if status != 204 {
        return Err(status);
    }
    let cookie = answer
        .lines()
        .find_map(|line| line.strip_prefix("set-cookie: "));
    let cookie = cookie.unwrap();
    for part in [
        "lacewing=",
        "Path=/",
        "HttpOnly",
        "SameSite=Strict",
        "Max-Age=604800",
    ] {
        assert!(cookie.contains(part), "{cookie}");
    }
    Ok(format!("cookie: {}\r\n", cookie.split(';').next().unwrap()))
}

async fn audited(http: SocketAddr, action: &str, outcome: &str) -> Vec<Value> {
    let (_, lines) = get(http, "/api/v1/audit?limit=1000").await;
    let lines = lines.as_array().unwrap().iter();
    let fits = |line: &&Value| line["action"] == action && line["outcome"] == outcome;
    lines.filter(fits).cloned().collect()
}

const OWN: &str = "origin: http://x\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn from_the_setup_link_to_the_last_admin() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let setup = setup_token(dir.path());
    let first =
        |token: &str, password: &str| json!({"token": token, "name": "root", "password": password});
    let line = "POST /api/v1/setup";
    assert_eq!(
        tell(http, "", line, first("no.such.token", "long enough 1"))
            .await
            .0,
        403
    );
    // A token for something else is no setup link.
    let other = shown(http).replace("authorization: Bearer ", "");
    assert_eq!(
        tell(http, "", line, first(other.trim(), "long enough 1"))
            .await
            .0,
        403
    );
    assert_eq!(
        tell(http, "", line, first(&setup, "too short")).await.0,
        422
    );
    assert_eq!(
        tell(http, "", line, first(&setup, &"x".repeat(257)))
            .await
            .0,
        422
    );
    assert_eq!(
        tell(http, "", line, first(&setup, "long enough 1")).await.0,
        201
    );
    assert!(!dir.path().join("trust/setup-link").exists());
    let again = json!({"token": setup, "name": "second", "password": "long enough 1"});
    assert_eq!(tell(http, "", line, again).await.0, 403);
    assert_eq!(audited(http, "set up", "refused").await.len(), 3);

    // Wrong passwords and unknown names get the same answer, and are written down.
    assert_eq!(log_in(http, "root", "wrong password").await, Err(401));
    assert_eq!(log_in(http, "nobody", "wrong password").await, Err(401));
    assert_eq!(audited(http, "log in", "refused").await.len(), 2);
    let root = log_in(http, "root", "long enough 1").await.unwrap();
    let (status, me) = look(http, &root, "/api/v1/me").await;
    assert_eq!(
        (status, &me["name"], &me["role"]),
        (200, &"root".into(), &"admin".into())
    );

    // Users, by an admin with a session.
    let by_root = format!("{root}{OWN}");
    let ana =
        json!({"name": "ana", "password": "ana's password", "role": "operator", "site": "demo"});
    assert_eq!(
        tell(http, &by_root, "POST /api/v1/users", ana.clone())
            .await
            .0,
        201
    );
    assert_eq!(tell(http, &by_root, "POST /api/v1/users", ana).await.0, 409);
    for bad in [
        json!({"name": "Not A Name", "password": "long enough 1", "role": "viewer"}),
        json!({"name": "machine", "password": "long enough 1", "role": "viewer"}),
        json!({"name": "ben", "password": "short", "role": "viewer"}),
        json!({"name": "ben", "password": "long enough 1", "role": "admin", "site": "demo"}),
        json!({"name": "ben", "password": "long enough 1", "role": "king"}),
    ] {
        assert_eq!(
            tell(http, &by_root, "POST /api/v1/users", bad.clone())
                .await
                .0,
            422,
            "{bad}"
        );
    }
    let (_, users) = look(http, &root, "/api/v1/users").await;
    assert!(
        !users.to_string().contains("argon2") && users.as_array().unwrap().len() == 2,
        "{users}"
    );

    // Never without an admin.
    for (line, body) in [
        ("PATCH /api/v1/users/root", json!({"role": "operator"})),
        ("PATCH /api/v1/users/root", json!({"disabled": true})),
        ("DELETE /api/v1/users/root", Value::Null),
    ] {
        assert_eq!(tell(http, &by_root, line, body).await.0, 409, "{line}");
    }
    assert_eq!(look(http, &root, "/api/v1/users").await.0, 200);

    // What ends a session ends it at once.
    let session = log_in(http, "ana", "ana's password").await.unwrap();
    assert_eq!(look(http, &session, "/api/v1/devices").await.0, 200);
    let out = format!("{session}{OWN}");
    assert_eq!(
        tell(http, &out, "POST /api/v1/logout", Value::Null).await.0,
        204
    );
    assert_eq!(look(http, &session, "/api/v1/devices").await.0, 401);
    let session = log_in(http, "ana", "ana's password").await.unwrap();
    let mine = format!("{session}{OWN}");
    let change = json!({"old": "wrong password", "new": "another password"});
    assert_eq!(
        tell(http, &mine, "POST /api/v1/me/password", change)
            .await
            .0,
        401
    );
    let change = json!({"old": "ana's password", "new": "another password"});
    assert_eq!(
        tell(http, &mine, "POST /api/v1/me/password", change)
            .await
            .0,
        204
    );
    assert_eq!(look(http, &session, "/api/v1/devices").await.0, 401);
    assert_eq!(log_in(http, "ana", "ana's password").await, Err(401));
    let session = log_in(http, "ana", "another password").await.unwrap();
    let mine = format!("{session}{OWN}");

    // A token is never more than its owner, makes no tokens, and goes with its owner.
    let new = |role: &str, site: Value| json!({"label": "t", "role": role, "site": site});
    for (body, expected) in [
        (new("admin", Value::Null), 403),
        (new("operator", "other".into()), 403),
        (new("viewer", "No Site".into()), 422),
        (json!({"label": "", "role": "viewer"}), 422),
        (
            json!({"label": "t", "role": "viewer", "days": 100_000}),
            422,
        ),
    ] {
        assert_eq!(
            tell(http, &mine, "POST /api/v1/tokens", body).await.0,
            expected
        );
    }
    let (status, made) = tell(
        http,
        &mine,
        "POST /api/v1/tokens",
        new("operator", Value::Null),
    )
    .await;
    assert_eq!((status, &made["site"]), (201, &"demo".into()), "{made}");
    let bearer = format!(
        "authorization: Bearer {}\r\n",
        made["token"].as_str().unwrap()
    );
    assert_eq!(
        look(http, &bearer, "/api/v1/devices?site=other").await.0,
        404
    );
    assert_eq!(
        tell(
            http,
            &bearer,
            "POST /api/v1/tokens",
            new("viewer", Value::Null)
        )
        .await
        .0,
        403
    );
    let (_, list) = look(http, &mine, "/api/v1/tokens").await;
    assert!(
        !list.to_string().contains(made["token"].as_str().unwrap()),
        "{list}"
    );
    let patch = |body: Value| tell(http, &by_root, "PATCH /api/v1/users/ana", body);
    let mark = "POST /api/v1/devices/none/sources/cam0/mark";
    let wrong = || json!({"mark": "wrong"});
    assert_eq!(tell(http, &bearer, mark, wrong()).await.0, 404);
    assert_eq!(patch(json!({"role": "viewer"})).await.0, 200);
    assert_eq!(tell(http, &bearer, mark, wrong()).await.0, 403);
    assert_eq!(patch(json!({"disabled": true})).await.0, 200);
    assert_eq!(look(http, &bearer, "/api/v1/devices").await.0, 401);
    assert_eq!(look(http, &session, "/api/v1/devices").await.0, 401);
    assert_eq!(log_in(http, "ana", "another password").await, Err(401));
    assert_eq!(patch(json!({"disabled": false})).await.0, 200);
    assert_eq!(look(http, &bearer, "/api/v1/devices").await.0, 200);
    let line = format!("DELETE /api/v1/tokens/{}", made["id"].as_str().unwrap());
    assert_eq!(tell(http, &by_root, &line, Value::Null).await.0, 204);
    assert_eq!(look(http, &bearer, "/api/v1/devices").await.0, 401);
    handle.stop().await;
}

/// Abuses 8 and 9, and what else is shown wrongly.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_written_down_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let operator = token(http, "operator", None).await;
    for n in 1..=3 {
        assert_eq!(look(http, &operator, "/api/v1/users").await.0, 403);
        let refused = audited(http, "GET /api/v1/users", "refused").await;
        assert_eq!(refused.len(), n, "{refused:?}");
        assert_eq!(refused[0]["who"], "user machine by token \"test operator\"");
    }
    // However often: the log is not filled by who is refused.
    for _ in 0..40 {
        assert_eq!(look(http, &operator, "/api/v1/users").await.0, 403);
    }
    assert!(audited(http, "GET /api/v1/users", "refused").await.len() <= 25);
    let counted = "lacewing_access_refused_total{reason=\"role\"}";
    assert_eq!(metric(http, counted).await, 43.0);

    let setup =
        json!({"token": setup_token(dir.path()), "name": "root", "password": "long enough 1"});
    assert_eq!(tell(http, "", "POST /api/v1/setup", setup).await.0, 201);
    let root = log_in(http, "root", "long enough 1").await.unwrap();
    let new = || json!({"label": "t", "role": "viewer"});
    for (headers, expected) in [
        ("", 403),
        ("origin: https://evil.example\r\n", 403),
        ("origin: null\r\n", 403),
        ("origin: http://x.evil.example\r\n", 403),
        ("sec-fetch-site: cross-site\r\n", 403),
        ("sec-fetch-site: same-site\r\norigin: http://x\r\n", 403),
        ("origin: http://x\r\n", 201),
        ("sec-fetch-site: same-origin\r\n", 201),
    ] {
        let who = format!("{root}{headers}");
        let (status, said) = tell(http, &who, "POST /api/v1/tokens", new()).await;
        assert_eq!(status, expected, "{headers}: {said}");
    }
    let foreign = audited(http, "POST /api/v1/tokens", "refused").await;
    assert!(
        foreign.len() == 6 && foreign[0]["detail"] == "origin",
        "{foreign:?}"
    );
    // Nor can a foreign page log somebody in as somebody else.
    let login = json!({"name": "root", "password": "long enough 1"});
    let evil = "origin: https://evil.example\r\n";
    assert_eq!(tell(http, evil, "POST /api/v1/login", login).await.0, 403);

    // What is not ours is not believed: a token as a cookie, a session as a token, and half of one.
    let session = root
        .trim()
        .trim_start_matches("cookie: lacewing=")
        .to_owned();
    let admin = shown(http).replace("authorization: Bearer ", "");
    let admin = admin.trim();
    for who in [
        format!("authorization: Bearer {session}\r\n"),
        format!("cookie: lacewing={admin}\r\n"),
        format!("authorization: Bearer {}\r\n", &admin[..admin.len() - 1]),
        format!("authorization: Basic {admin}\r\n"),
        "authorization: Bearer \r\n".to_owned(),
        "cookie: __Host-lacewing=x; lacewing=\r\n".to_owned(),
    ] {
        assert_eq!(look(http, &who, "/api/v1/devices").await.0, 401, "{who}");
    }
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_guesses_is_slowed_down() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let body = json!({"name": "ana", "password": "a wrong password"}).to_string();
    let mut refused = 0;
    for _ in 0..14 {
        let (status, head, _) = send_as(http, "POST /api/v1/login", JSON, body.as_bytes()).await;
        if status == 429 {
            refused += 1;
            assert!(head.contains("retry-after: "), "{head}");
        } else {
            assert_eq!(status, 401);
        }
    }
    assert!((3..=4).contains(&refused), "{refused}");
    // Others are not.
    let other = json!({"name": "ben", "password": "a wrong password"});
    assert_eq!(tell(http, "", "POST /api/v1/login", other).await.0, 401);
    // An address that shows nothing has its bound, and who shows a token does not notice.
    let mut answers = BTreeMap::<u16, usize>::new();
    for _ in 0..20_000 {
        let status = status(http, "GET /api/v1/devices", "", "").await;
        *answers.entry(status).or_default() += 1;
        if status == 429 {
            break;
        }
    }
    assert!(
        answers.contains_key(&401) && answers.contains_key(&429),
        "{answers:?}"
    );
    assert_eq!(get(http, "/api/v1/devices").await.0, 200);
    handle.stop().await;
}

/// The token for commands on the machine outlives restarts, until somebody takes its file away; then the old one is none.
#[tokio::test(flavor = "multi_thread")]
async fn the_machines_token_is_kept_and_can_be_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trust/operator.token");
    let handle = start(dir.path()).await;
    let first = shown(handle.http);
    handle.stop().await;
    let handle = start(dir.path()).await;
    assert_eq!(shown(handle.http), first);
    assert_eq!(look(handle.http, &first, "/api/v1/users").await.0, 200);
    handle.stop().await;

    std::fs::remove_file(&file).unwrap();
    let handle = start(dir.path()).await;
    let second = shown(handle.http);
    assert_ne!(second, first);
    assert_eq!(look(handle.http, &second, "/api/v1/users").await.0, 200);
    assert_eq!(look(handle.http, &first, "/api/v1/users").await.0, 401);
    handle.stop().await;

    // What is no token, and another program's, are replaced; a token of this coordinator for less stays what it is.
    for wrong in ["", "nonsense", "a.b.c"] {
        std::fs::write(&file, wrong).unwrap();
        let handle = start(dir.path()).await;
        let status = look(handle.http, &shown(handle.http), "/api/v1/users")
            .await
            .0;
        assert_eq!(status, 200, "{wrong:?}");
        handle.stop().await;
    }
    let handle = start(dir.path()).await;
    let viewer = token(handle.http, "viewer", None).await;
    handle.stop().await;
    let viewer = viewer.trim().rsplit(' ').next().unwrap().to_owned();
    std::fs::write(&file, &viewer).unwrap();
    let handle = start(dir.path()).await;
    assert!(!shown(handle.http).contains(&viewer));
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_others_can_read_is_no_key() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    start(dir.path()).await.stop().await;
    let key = dir.path().join("trust/token.key");
    for name in ["token.key", "operator.token", "setup-link"] {
        let path = dir.path().join("trust").join(name);
        let mode = std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = cloud_coordinator::Coordinator::start(config(dir.path())).await;
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("token.key") && error.contains("chmod 600"),
        "{error}"
    );
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    // The machine's token counts after the next start, and so does a person's.
    let handle = start(dir.path()).await;
    let (machine, person) = (shown(handle.http), token(handle.http, "viewer", None).await);
    handle.stop().await;
    let handle = start(dir.path()).await;
    assert_eq!(look(handle.http, &machine, "/api/v1/devices").await.0, 200);
    assert_eq!(look(handle.http, &person, "/api/v1/devices").await.0, 200);
    handle.stop().await;
}

fn run(data: &Path, arguments: &[&str], input: &str) -> (bool, String) {
    use std::io::Write;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cloud-coordinator"));
    command.args(arguments).arg("--data").arg(data);
    command.stdin(std::process::Stdio::piped());
    command.stdout(std::process::Stdio::piped());
    command.stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let done = child.wait_with_output().unwrap();
    let said = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8(said).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_on_the_machine_and_the_log_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let data = dir.path().to_owned();
    let run = async |arguments: &[&str], input: &str| {
        let (data, input) = (data.clone(), input.to_owned());
        let arguments: Vec<_> = arguments.iter().map(|a| (*a).to_owned()).collect();
        let work = move || {
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            run(&data, &arguments, &input)
        };
        tokio::task::spawn_blocking(work).await.unwrap()
    };
    let (done, said) = run(
        &["user", "add", "root", "--role", "admin"],
        "long enough 1\n",
    )
    .await;
    assert!(done, "{said}");
    let (done, said) = run(&["user", "add", "ana"], "short\n").await;
    assert!(!done && said.contains("at least 10 characters"), "{said}");
    assert!(
        run(&["user", "add", "ana", "--site", "demo"], "long enough 2\n")
            .await
            .0
    );
    let (_, said) = run(&["user", "list"], "").await;
    assert!(said.contains("root") && said.contains("demo"), "{said}");
    assert!(run(&["user", "passwd", "ana"], "long enough 3\n").await.0);
    assert!(log_in(http, "ana", "long enough 3").await.is_ok());
    assert!(run(&["user", "disable", "ana"], "").await.0);
    assert_eq!(log_in(http, "ana", "long enough 3").await, Err(401));
    let (done, said) = run(&["user", "disable", "root"], "").await;
    assert!(!done && said.contains("last admin"), "{said}");
    let (done, said) = run(&["token", "create", "nightly", "--role", "viewer"], "").await;
    let token = said.lines().find(|line| line.starts_with("eyJ")).unwrap();
    let who = format!("authorization: Bearer {token}\r\n");
    assert!(done && look(http, &who, "/api/v1/devices").await.0 == 200);
    let (_, said) = run(&["token", "list"], "").await;
    let id = said.split_whitespace().next().unwrap();
    assert!(run(&["token", "revoke", id], "").await.0);
    assert_eq!(look(http, &who, "/api/v1/devices").await.0, 401);
    // Without a token it says what to do.
    let (done, said) = run(&["model", "list", "--token", "nonsense"], "").await;
    assert!(!done && said.contains("LACEWING_TOKEN"), "{said}");

    // The log, while the coordinator runs and after somebody has been at it.
    let (done, said) = run(&["audit", "verify"], "").await;
    assert!(done && said.contains("the head is "), "{said}");
    let head = said.trim().rsplit(' ').next().unwrap().to_owned();
    assert!(run(&["audit", "verify", "--head", &head], "").await.0);
    handle.stop().await;
    let last = "DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)";
    tamper(dir.path(), last).await;
    assert!(run(&["audit", "verify"], "").await.0);
    let (done, said) = run(&["audit", "verify", "--head", &head], "").await;
    assert!(!done && said.contains("cut off"), "{said}");
    tamper(
        dir.path(),
        "UPDATE audit SET who = 'user eve' WHERE seq = 2",
    )
    .await;
    let (done, said) = run(&["audit", "verify"], "").await;
    assert!(!done && said.contains("line 2"), "{said}");
}

/// Somebody who has the file.
async fn tamper(data: &Path, statement: &'static str) {
    use sqlx::Connection;
    let file = format!("sqlite://{}", data.join("trust.db").display());
    let mut database = sqlx::SqliteConnection::connect(&file).await.unwrap();
    sqlx::query(statement).execute(&mut database).await.unwrap();
    database.close().await.unwrap();
}

/// Abuse 12: at the cap it is over, wherever something is sent to.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_without_end_ends_at_the_cap() {
    let dir = tempfile::tempdir().unwrap();
    let handle = start(dir.path()).await;
    let http = handle.http;
    let admin = shown(http);
    for (line, who) in [
        ("POST /api/v1/samples", &admin),
        ("PATCH /api/v1/samples/d1/1/1/image", &admin),
        ("PUT /api/v1/tasks/steel", &admin),
        ("POST /api/v1/tokens", &admin),
        ("POST /api/v1/login", &String::new()),
    ] {
        let mut stream = TcpStream::connect(http).await.unwrap();
        let head = format!(
            "{line} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n{JSON}upload-offset: 0\r\n{who}\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let (mut reading, mut writing) = stream.into_split();
        let chunk = "4000\r\n".to_owned() + &"x".repeat(0x4000) + "\r\n";
        let endless = tokio::spawn(async move {
            let mut sent = 0_usize;
            while writing.write_all(chunk.as_bytes()).await.is_ok() {
                sent += 0x4000;
            }
            sent
        });
        let mut answer = [0; 12];
        timeout(PATIENCE, reading.read_exact(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(&answer[9..], b"413", "{line}");
        drop(reading);
        let sent = timeout(PATIENCE, endless).await.unwrap().unwrap();
        // What the cap lets in, and what the buffers of the kernel hold.
        assert!(sent < 32 << 20, "{line}: {sent}");
    }
    assert_eq!(get(http, "/api/v1/devices").await.0, 200);
    handle.stop().await;
}

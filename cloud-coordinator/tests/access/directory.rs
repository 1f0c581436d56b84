//! People come in by a directory: a small one of the test's own, which speaks HTTP and signs with real keys.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    extract::State,
    routing::{get as on_get, post as on_post},
};
use cloud_coordinator::{
    Handle,
    config::{Config, DirectoryConfig},
};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};

use super::*;

const CLIENT: &str = "lacewing";
const SECRET: &str = "known to both";

fn base64(bytes: &[u8]) -> String {
    use ::base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A signing key, as its owner has it and as everybody sees it.
struct Signer {
    kid: String,
    key: KeyPair,
}

impl Signer {
    fn new(kid: &str) -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let kid = kid.to_owned();
        Self { kid, key }
    }

    fn shown(&self) -> Value {
        // 0x04, x, y.
        let point = self.key.public_key_raw();
        json!({
            "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": self.kid,
            "x": base64(&point[1..33]), "y": base64(&point[33..65]),
        })
    }

    fn sign(&self, claims: &Value) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.kid.clone());
        let key = EncodingKey::from_ec_der(&self.key.serialize_der());
        encode(&header, claims, &key).unwrap()
    }
}

/// How the directory makes a token of the claims that are right.
type Make = Box<dyn Fn(Value, &[Signer]) -> String + Send>;

struct Inside {
    address: SocketAddr,
    signers: Vec<Signer>,
    /// Which of them are shown.
    shown: usize,
    make: Make,
    groups: Value,
    /// What the code was given for: nonce and the challenge of the verifier.
    codes: HashMap<String, (String, String)>,
    /// Requests for tokens that were not as they must be.
    wrong: Vec<String>,
    fetched_keys: usize,
}

type Shared = Arc<Mutex<Inside>>;

#[derive(Clone)]
struct Provider(Shared);

fn honest() -> Make {
    Box::new(|claims, signers| signers[0].sign(&claims))
}

impl Provider {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let inside = Inside {
            address: listener.local_addr().unwrap(),
            signers: vec![Signer::new("first"), Signer::new("second")],
            shown: 1,
            make: honest(),
            groups: json!(["everybody", "line 3"]),
            codes: HashMap::new(),
            wrong: Vec::new(),
            fetched_keys: 0,
        };
        let shared = Arc::new(Mutex::new(inside));
        let router = Router::new()
            .route("/.well-known/openid-configuration", on_get(discovery))
            .route("/keys", on_get(keys))
            .route("/token", on_post(token_for))
            .with_state(shared.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self(shared)
    }

    fn with<T>(&self, act: impl FnOnce(&mut Inside) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }

    fn issuer(&self) -> String {
        self.with(|inside| format!("http://{}", inside.address))
    }

    /// What a person does at the directory: logs in, and is sent back with a code.
    fn authorize(&self, url: &str) -> (String, String) {
        let url = url::Url::parse(url).unwrap();
        let query: HashMap<_, _> = url.query_pairs().into_owned().collect();
        assert_eq!(query["client_id"], CLIENT);
        assert_eq!(query["response_type"], "code");
        assert_eq!(query["code_challenge_method"], "S256");
        assert!(query["scope"].split(' ').any(|scope| scope == "openid"));
        assert!(query["redirect_uri"].ends_with("/api/v1/oidc/callback"));
        let code = format!("code{}", self.with(|inside| inside.codes.len()));
        let given = (query["nonce"].clone(), query["code_challenge"].clone());
        self.with(|inside| inside.codes.insert(code.clone(), given));
        (code, query["state"].clone())
    }
}

async fn discovery(State(shared): State<Shared>) -> Json<Value> {
    let address = shared.lock().unwrap().address;
    Json(json!({
        "issuer": format!("http://{address}"),
        "authorization_endpoint": format!("http://{address}/authorize"),
        "token_endpoint": format!("http://{address}/token"),
        "jwks_uri": format!("http://{address}/keys"),
    }))
}

async fn keys(State(shared): State<Shared>) -> Json<Value> {
    let mut inside = shared.lock().unwrap();
    inside.fetched_keys += 1;
    let shown = inside.signers.iter().take(inside.shown).map(Signer::shown);
    Json(json!({"keys": shown.collect::<Vec<_>>()}))
}

async fn token_for(
    State(shared): State<Shared>,
    headers: axum::http::HeaderMap,
    body: String,
) -> (axum::http::StatusCode, Json<Value>) {
    let form: HashMap<_, _> = url::form_urlencoded::parse(body.as_bytes())
        .into_owned()
        .collect();
    let inside = &mut *shared.lock().unwrap();
    let refuse = |inside: &mut Inside, why: &str| {
        inside.wrong.push(why.to_owned());
        let said = json!({"error": "invalid_grant"});
        (axum::http::StatusCode::BAD_REQUEST, Json(said))
    };
    let shown = headers
        .get("authorization")
        .map(|v| v.to_str().unwrap().to_owned());
    use ::base64::{Engine, engine::general_purpose::STANDARD};
    let right = STANDARD.encode(format!("{CLIENT}:{}", SECRET.replace(' ', "+")));
    if shown != Some(format!("Basic {right}")) {
        return refuse(inside, "the client's secret");
    }
    let Some((nonce, challenge)) = inside.codes.remove(form.get("code").map_or("", |c| c)) else {
        return refuse(inside, "the code");
    };
    let verifier = form.get("code_verifier").cloned().unwrap_or_default();
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, verifier.as_bytes());
    if base64(hash.as_ref()) != challenge {
        return refuse(inside, "the verifier");
    }
    let now = now_s();
    let claims = json!({
        "iss": format!("http://{}", inside.address), "aud": CLIENT, "sub": "4711", "nonce": nonce,
        "iat": now, "exp": now + 300, "preferred_username": "Ana@example.org", "groups": inside.groups,
    });
    let token = (inside.make)(claims, &inside.signers);
    let said = json!({"access_token": "x", "token_type": "Bearer", "id_token": token});
    (axum::http::StatusCode::OK, Json(said))
}

#[expect(
    clippy::disallowed_methods,
    reason = "a token says until when it counts"
)]
fn now_s() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap().as_secs()
}

fn with_directory(data: &Path, provider: &Provider) -> Config {
    use std::os::unix::fs::PermissionsExt;
    let secret = data.join("client-secret");
    std::fs::write(&secret, SECRET).unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    let text = format!(
        r#"
        [oidc]
        issuer = "{}"
        client_id = "{CLIENT}"
        client_secret_file = "{}"
        url = "https://x"
        group = [
            {{name = "admins", role = "admin"}},
            {{name = "line 3", role = "operator", site = "plant-3"}},
        ]
        "#,
        provider.issuer(),
        secret.display(),
    );
    let read: Option<DirectoryConfig> = Config::parse(&text).unwrap().oidc;
    let mut config = config(data);
    config.oidc = read;
    config
}

struct Browser {
    http: SocketAddr,
    cookie: String,
}

impl Browser {
    /// Begins a login; where the directory is to send it.
    async fn begin(http: SocketAddr) -> (Self, String) {
        let (status, head, body) = send_raw(http, "/api/v1/oidc/login", "").await;
        assert_eq!(status, 303, "{body}");
        let place = header(&head, "location");
        let cookie = header(&head, "set-cookie");
        for part in ["lacewing-oidc=", "HttpOnly", "SameSite=Lax", "Max-Age=600"] {
            assert!(cookie.contains(part), "{cookie}");
        }
        let cookie = format!("cookie: {}\r\n", cookie.split(';').next().unwrap());
        (Self { http, cookie }, place)
    }

    /// Comes back from the directory; the session as a header.
    async fn back(&self, code: &str, state: &str) -> Result<String, u16> {
        let path = format!("/api/v1/oidc/callback?code={code}&state={state}");
        let (status, head, _) = send_raw(self.http, &path, &self.cookie).await;
        if status != 303 {
            return Err(status);
        }
        assert_eq!(header(&head, "location"), "/");
        let cookie = header(&head, "set-cookie");
        assert!(
            cookie.contains("SameSite=Strict") && cookie.starts_with("lacewing="),
            "{cookie}"
        );
        Ok(format!("cookie: {}\r\n", cookie.split(';').next().unwrap()))
    }

    /// The whole way.
    async fn log_in(http: SocketAddr, provider: &Provider) -> Result<String, u16> {
        let (browser, place) = Self::begin(http).await;
        let (code, state) = provider.authorize(&place);
        browser.back(&code, &state).await
    }
}

/// The first line of this name, as it is written.
fn header(head: &str, name: &str) -> String {
    let line = head.lines().find_map(|line| {
        let (is, value) = line.split_once(": ")?;
        is.eq_ignore_ascii_case(name).then_some(value)
    });
    line.unwrap_or_else(|| panic!("no {name} in {head}"))
        .to_owned()
}

/// `GET` without a token; the head as it was sent.
async fn send_raw(http: SocketAddr, path: &str, headers: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(http).await.unwrap();
    let text = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(WORK, stream.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (
        head[9..12].parse().unwrap(),
        head.to_owned(),
        body.to_owned(),
    )
}

async fn begun() -> (tempfile::TempDir, Provider, Handle) {
    let dir = tempfile::tempdir().unwrap();
    let provider = Provider::start().await;
    let handle = start_as(with_directory(dir.path(), &provider)).await;
    (dir, provider, handle)
}

#[tokio::test(flavor = "multi_thread")]
async fn people_come_in_by_a_directory_with_what_their_groups_may() {
    let (_dir, provider, handle) = begun().await;
    let http = handle.http;
    assert_eq!(get(http, "/api/v1/oidc").await.1, json!({"enabled": true}));
    let ana = Browser::log_in(http, &provider).await.unwrap();
    let (status, me) = look(http, &ana, "/api/v1/me").await;
    assert_eq!(status, 200, "{me}");
    let name = me["name"].as_str().unwrap().to_owned();
    assert!(name.starts_with("ana-"), "{me}");
    assert_eq!(
        (&me["role"], &me["site"]),
        (&json!("operator"), &json!("plant-3"))
    );
    // The session is like any other: what changes something needs an origin of its own, and it can be ended.
    let users = "/api/v1/users";
    assert_eq!(look(http, &ana, users).await.0, 403);
    let logout = "POST /api/v1/logout";
    assert_eq!(tell(http, &ana, logout, json!({})).await.0, 403);
    assert_eq!(
        tell(http, &format!("{ana}{OWN}"), logout, json!({}))
            .await
            .0,
        204
    );
    assert_eq!(look(http, &ana, "/api/v1/me").await.0, 401);
    // There is no password to come in by.
    for password in ["-", "", "long enough 1"] {
        assert_eq!(log_in(http, &name, password).await, Err(401));
    }

    // The groups of the next login count, for the same user.
    provider.with(|inside| inside.groups = json!("admins"));
    let ana = Browser::log_in(http, &provider).await.unwrap();
    let (_, me) = look(http, &ana, "/api/v1/me").await;
    assert_eq!((&me["name"], &me["role"]), (&json!(name), &json!("admin")));
    assert_eq!(me["site"], Value::Null);
    let (_, all) = look(http, &ana, users).await;
    assert_eq!(all.as_array().unwrap().len(), 1, "{all}");
    assert_eq!(audited(http, "log in", "done").await.len(), 2);
    assert_eq!(audited(http, "add user", "done").await.len(), 1);

    // New keys are found by themselves, when a token needs them.
    assert_eq!(provider.with(|inside| inside.fetched_keys), 1);
    provider.with(|inside| {
        inside.shown = 2;
        inside.make = Box::new(|claims, signers| signers[1].sign(&claims));
    });
    let found = async {
        while Browser::log_in(http, &provider).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        }
    };
    timeout(WORK, found).await.unwrap();
    assert_eq!(provider.with(|inside| inside.fetched_keys), 2);

    // Who was disabled here stays out, whatever the directory says.
    let line = format!("PATCH /api/v1/users/{name}");
    let (status, said) = say(
        http,
        "POST /api/v1/users",
        json!({
            "name": "root", "password": "long enough 1", "role": "admin",
        }),
    )
    .await;
    assert_eq!(status, 201, "{said}");
    assert_eq!(say(http, &line, json!({"disabled": true})).await.0, 200);
    assert_eq!(look(http, &ana, "/api/v1/me").await.0, 401);
    assert_eq!(Browser::log_in(http, &provider).await, Err(401));
    assert!(provider.with(|inside| inside.wrong.is_empty()));
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_wrong_with_a_directorys_word_is_refused_and_written_down() {
    let (_dir, provider, handle) = begun().await;
    let http = handle.http;
    let change = |name: &'static str, value: Value| -> Make {
        Box::new(move |mut claims, signers| {
            claims[name] = value.clone();
            signers[0].sign(&claims)
        })
    };
    let unsigned = |header: Value| -> Make {
        Box::new(move |claims, _| {
            let part = |value: &Value| base64(value.to_string().as_bytes());
            format!("{}.{}.", part(&header), part(&claims))
        })
    };
    let shared: Make = Box::new(|claims, signers| {
        // The public key, which everybody knows, as if it were a shared secret.
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some("first".to_owned());
        let key = EncodingKey::from_secret(signers[0].key.public_key_raw());
        encode(&header, &claims, &key).unwrap()
    });
    let forged: Make = Box::new(|claims, signers| {
        let good = signers[0].sign(&claims);
        let (rest, signature) = good.rsplit_once('.').unwrap();
        let first = if signature.starts_with('A') { "B" } else { "A" };
        format!("{rest}.{first}{}", &signature[1..])
    });
    let another_key: Make = Box::new(|claims, signers| {
        let stranger = Signer {
            kid: "first".to_owned(),
            key: KeyPair::generate().unwrap(),
        };
        let _ = signers;
        stranger.sign(&claims)
    });
    let cases: Vec<(&str, Make)> = vec![
        ("nonce", change("nonce", json!("another"))),
        ("nonce", change("nonce", Value::Null)),
        ("InvalidAudience", change("aud", json!("another"))),
        ("another client", change("aud", json!([CLIENT, "another"]))),
        ("another client", change("azp", json!("another"))),
        ("run out", change("exp", json!(now_s() - 3_600))),
        ("time to come", change("iat", json!(now_s() + 3_600))),
        ("InvalidIssuer", change("iss", json!("https://id.example"))),
        ("names nobody", change("sub", json!(""))),
        ("the token", change("exp", Value::Null)),
        ("the token", unsigned(json!({"alg": "none"}))),
        (
            "the token",
            unsigned(json!({"alg": "None", "kid": "first"})),
        ),
        ("HS256", shared),
        ("InvalidSignature", forged),
        ("InvalidSignature", another_key),
        ("key", Box::new(|claims, signers| signers[1].sign(&claims))),
        ("the token", Box::new(|_, _| "x".to_owned())),
        ("too long", change("padding", json!("x".repeat(100_000)))),
        ("no group", change("groups", json!(["everybody"]))),
        ("no group", change("groups", json!([]))),
        ("no group", change("groups", Value::Null)),
        ("no group", change("groups", json!({"line 3": true}))),
        ("no group", change("groups", json!([["line 3"]]))),
    ];
    let mut refused = 0;
    for (why, make) in cases {
        provider.with(|inside| inside.make = make);
        assert_eq!(Browser::log_in(http, &provider).await, Err(403), "{why}");
        let lines = audited(http, "log in", "refused").await;
        refused += 1;
        assert_eq!(lines.len(), refused, "{why}");
        let newest = lines
            .iter()
            .max_by_key(|line| line["seq"].as_i64())
            .unwrap();
        assert!(
            newest["detail"].as_str().unwrap().contains(why),
            "{why}: {newest}"
        );
    }
    provider.with(|inside| inside.make = honest());

    // The state: of another browser, of nobody, without a cookie, a second time; and a code of somebody else's login.
    let (browser, place) = Browser::begin(http).await;
    let (other, others_place) = Browser::begin(http).await;
    let (code, state) = provider.authorize(&place);
    let (others_code, others_state) = provider.authorize(&others_place);
    assert_eq!(browser.back(&code, &others_state).await, Err(403));
    assert_eq!(browser.back(&code, "nothing").await, Err(403));
    assert_eq!(browser.back(&code, "").await, Err(403));
    let bare = Browser {
        http,
        cookie: String::new(),
    };
    assert_eq!(bare.back(&code, &state).await, Err(403));
    let made_up = Browser {
        http,
        cookie: "cookie: lacewing-oidc=made-up\r\n".into(),
    };
    assert_eq!(made_up.back(&code, "made-up").await, Err(403));
    // Its verifier is not the one that the code was asked for with.
    assert_eq!(browser.back(&others_code, &state).await, Err(403));
    assert_eq!(
        provider.with(|inside| inside.wrong.pop()).unwrap(),
        "the verifier"
    );
    // The state is used up by that.
    assert_eq!(browser.back(&code, &state).await, Err(403));
    drop(other);
    // The directory says no.
    let (browser, place) = Browser::begin(http).await;
    let (_, state) = provider.authorize(&place);
    assert_eq!(browser.back("", &state).await, Err(403));
    let (_, users) = get(http, "/api/v1/users").await;
    assert_eq!(users, json!([]), "nobody came in");
    // And what is right still is.
    assert!(Browser::log_in(http, &provider).await.is_ok());
    handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_away_or_somebody_else_lets_nobody_in() {
    let dir = tempfile::tempdir().unwrap();
    let provider = Provider::start().await;
    let mut config = with_directory(dir.path(), &provider);
    // It calls itself otherwise than it is called here.
    let issuer = provider.issuer();
    let directory = config.oidc.as_mut().unwrap();
    directory.issuer = format!("{issuer}/");
    let handle = start_as(config.clone()).await;
    let (status, _, body) = send_raw(handle.http, "/api/v1/oidc/login", "").await;
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("\"part\":\"directory\""), "{body}");
    // Everything else goes on, and passwords do too.
    assert_eq!(get(handle.http, "/api/v1/devices").await.0, 200);
    assert_eq!(
        log_in(handle.http, "nobody", "long enough 1").await,
        Err(401)
    );
    handle.stop().await;

    // One that takes connections and says nothing; one that never ends.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endless = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [silent.local_addr().unwrap(), endless.local_addr().unwrap()];
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = endless.accept().await {
            tokio::spawn(async move {
                let head = b"HTTP/1.1 200 OK\r\ncontent-length: 9000000000\r\n\r\n[";
                let mut sent = stream.write_all(head).await;
                while sent.is_ok() {
                    sent = stream.write_all(&[b' '; 4_096]).await;
                }
            });
        }
    });
    for address in addresses {
        config.oidc.as_mut().unwrap().issuer = format!("http://{address}");
        let handle = start_as(config.clone()).await;
        let (status, _, body) = send_raw(handle.http, "/api/v1/oidc/login", "").await;
        assert_eq!(status, 503, "{body}");
        assert_eq!(get(handle.http, "/api/v1/devices").await.0, 200);
        handle.stop().await;
    }
    drop(silent);
    // A secret that others can read is none.
    use std::os::unix::fs::PermissionsExt;
    let secret = dir.path().join("client-secret");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = cloud_coordinator::Coordinator::start(config)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("chmod 600"), "{error}");

    // Without one there is none.
    let handle = start(dir.path()).await;
    assert_eq!(
        get(handle.http, "/api/v1/oidc").await.1,
        json!({"enabled": false})
    );
    assert_eq!(send_raw(handle.http, "/api/v1/oidc/login", "").await.0, 404);
    assert_eq!(
        send_raw(handle.http, "/api/v1/oidc/callback?code=a&state=b", "")
            .await
            .0,
        404
    );
    handle.stop().await;
}

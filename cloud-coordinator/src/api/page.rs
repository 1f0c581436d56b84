//! The live page, the page to label in, and those to come in by: files that are part of the program.

use axum::{Router, http::header, response::IntoResponse, routing::get};

use super::State;

fn file(kind: &'static str, text: &'static str) -> impl IntoResponse + Clone {
    ([(header::CONTENT_TYPE, kind)], text)
}

/// `/`, `/label`, `/login`, `/setup`, and what they load.
pub(super) fn router() -> Router<State> {
    let html = file(
        "text/html; charset=utf-8",
        include_str!("../page/page.html"),
    );
    let css = file("text/css; charset=utf-8", include_str!("../page/page.css"));
    let js = file(
        "text/javascript; charset=utf-8",
        include_str!("../page/page.js"),
    );
    let learning = file(
        "text/javascript; charset=utf-8",
        include_str!("../page/learning.js"),
    );
    let rollouts = file(
        "text/javascript; charset=utf-8",
        include_str!("../page/rollouts.js"),
    );
    let label = file(
        "text/html; charset=utf-8",
        include_str!("../page/label.html"),
    );
    let label_js = file(
        "text/javascript; charset=utf-8",
        include_str!("../page/label.js"),
    );
    let text = |name| file("text/javascript; charset=utf-8", name);
    let page = |name| file("text/html; charset=utf-8", name);
    let login = page(include_str!("../page/login.html"));
    let login_js = text(include_str!("../page/login.js"));
    let setup = page(include_str!("../page/setup.html"));
    let setup_js = text(include_str!("../page/setup.js"));
    let who = text(include_str!("../page/who.js"));
    let icon = file("image/svg+xml", include_str!("../page/icon.svg"));
    Router::new()
        .route("/icon.svg", get(icon))
        .route("/", get(html))
        .route("/label", get(label))
        .route("/login", get(login))
        .route("/login.js", get(login_js))
        .route("/setup", get(setup))
        .route("/setup.js", get(setup_js))
        .route("/who.js", get(who))
        .route("/label.js", get(label_js))
        .route("/page.css", get(css))
        .route("/page.js", get(js))
        .route("/learning.js", get(learning))
        .route("/rollouts.js", get(rollouts))
}

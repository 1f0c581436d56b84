//! What a request shows of who asks: cookies, tokens, and whose page it comes from.

use std::net::IpAddr;

use axum::{
    extract::Request,
    http::{HeaderMap, HeaderValue, header},
};

use crate::trust::Door;

/// The cookie's name. A browser lets nothing but this host over TLS set the first one.
pub(super) fn cookie_name(door: Door) -> &'static str {
    if door.tls {
        "__Host-lacewing"
    } else {
        "lacewing"
    }
}

pub(super) fn cookie(headers: &HeaderMap, door: Door) -> Option<&str> {
    cookie_named(headers, cookie_name(door))
}

pub(super) fn cookie_named<'a>(headers: &'a HeaderMap, wanted: &str) -> Option<&'a str> {
    let lines = headers.get_all(header::COOKIE).into_iter();
    lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find_map(|(name, value)| (name == wanted).then_some(value))
}

pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Whether a browser says that a page of this coordinator asks; nothing if it does not say.
pub(super) fn own_page(request: &Request, door: Door) -> Option<bool> {
    let headers = request.headers();
    let text = |value: &HeaderValue| value.to_str().map(str::to_owned).unwrap_or_default();
    let site = headers.get("sec-fetch-site").map(text);
    let origin = headers.get(header::ORIGIN).map(text);
    if site.is_none() && origin.is_none() {
        return None;
    }
    let authority = request.uri().authority().map(ToString::to_string);
    let host = authority.or_else(|| headers.get(header::HOST).map(text));
    let same_origin = origin.is_none_or(|origin| match origin.split_once("://") {
        // Without TLS of our own there may be somebody's in front.
        Some((scheme, at)) => {
            (scheme == "https" || (!door.tls && scheme == "http"))
                && host.is_some_and(|host| host.eq_ignore_ascii_case(at))
        }
        None => false,
    });
    Some(same_origin && site.is_none_or(|site| site == "same-origin"))
}

/// Nobody else's request was passed on by something on this machine.
pub(super) fn loopback(address: IpAddr, headers: &HeaderMap) -> bool {
    let passed_on = ["forwarded", "x-forwarded-for", "via"];
    address.is_loopback() && !passed_on.iter().any(|name| headers.contains_key(*name))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use axum::body::Body;

    use super::*;

    fn request(headers: &[(&str, &str)]) -> Request {
        let mut request = Request::post("/x").header("host", "lacewing.example:8080");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Body::empty()).unwrap()
    }

    #[test]
    fn only_a_page_of_our_own_is_our_own() {
        let plain = Door { tls: false };
        let tls = Door { tls: true };
        for (headers, in_plain, in_tls) in [
            (&[][..], None, None),
            (
                &[("origin", "https://lacewing.example:8080")],
                Some(true),
                Some(true),
            ),
            (
                &[("origin", "http://lacewing.example:8080")],
                Some(true),
                Some(false),
            ),
            (
                &[("origin", "https://lacewing.example")],
                Some(false),
                Some(false),
            ),
            (
                &[("origin", "https://evil.example")],
                Some(false),
                Some(false),
            ),
            (
                &[("origin", "https://lacewing.example:8080.evil")],
                Some(false),
                Some(false),
            ),
            (&[("origin", "null")], Some(false), Some(false)),
            (&[("origin", "")], Some(false), Some(false)),
            (&[("sec-fetch-site", "same-origin")], Some(true), Some(true)),
            (&[("sec-fetch-site", "same-site")], Some(false), Some(false)),
            (
                &[("sec-fetch-site", "cross-site")],
                Some(false),
                Some(false),
            ),
            (&[("sec-fetch-site", "none")], Some(false), Some(false)),
            (
                &[
                    ("sec-fetch-site", "same-origin"),
                    ("origin", "https://evil.example"),
                ],
                Some(false),
                Some(false),
            ),
        ] {
            assert_eq!(own_page(&request(headers), plain), in_plain, "{headers:?}");
            assert_eq!(own_page(&request(headers), tls), in_tls, "{headers:?}");
        }
    }

    #[test]
    fn cookies_and_tokens() {
        let (plain, tls) = (Door { tls: false }, Door { tls: true });
        let with = request(&[("cookie", "a=1; lacewing=abc; __Host-lacewing=def")]);
        assert_eq!(cookie(with.headers(), plain), Some("abc"));
        assert_eq!(cookie(with.headers(), tls), Some("def"));
        assert_eq!(
            cookie(request(&[("cookie", "xlacewing=1")]).headers(), plain),
            None
        );
        let token = request(&[("authorization", "bearer abc")]);
        assert_eq!(bearer(token.headers()), Some("abc"));
        assert_eq!(
            bearer(request(&[("authorization", "Basic abc")]).headers()),
            None
        );
    }

    #[test]
    fn what_was_passed_on_is_not_from_this_machine() {
        let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
        assert!(loopback(here, request(&[]).headers()));
        assert!(!loopback(
            here,
            request(&[("x-forwarded-for", "127.0.0.1")]).headers()
        ));
        assert!(!loopback(
            "10.0.0.1".parse().unwrap(),
            request(&[]).headers()
        ));
    }
}

//! What an ID token has to be before anything in it is believed.

use jsonwebtoken::{
    Algorithm, DecodingKey, Validation, decode, decode_header,
    jwk::{Jwk, JwkSet, PublicKeyUse},
};
use serde::Deserialize;
use serde_json::{Map, Value};

/// The longest token that is looked at: one with a thousand groups.
const MAX_TOKEN: usize = 64 * 1024;
/// Groups that are looked at.
const MAX_GROUPS: usize = 1_000;
/// How far the directory's clock may be behind or before this one, in seconds.
const LEEWAY_S: i64 = 60;
/// Signatures that are looked at. Those with a shared secret are not: who can check one could make one.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// What must stand in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected<'a> {
    pub(super) issuer: &'a str,
    pub(super) client: &'a str,
    pub(super) nonce: &'a str,
    pub(super) now_s: i64,
}

/// Why it is not believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// Signed with a key that is not known; there may be new ones.
    Key,
    /// Anything else.
    Token(String),
}

/// Who somebody is, by the directory's word.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Claims {
    pub(super) sub: String,
    exp: i64,
    #[serde(default)]
    iat: Option<i64>,
    #[serde(default)]
    nonce: Option<String>,
    aud: Value,
    #[serde(default)]
    azp: Option<String>,
    #[serde(default)]
    pub(super) preferred_username: Option<String>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl Claims {
    /// The groups in a claim: a list of texts, or one.
    pub(super) fn groups(&self, claim: &str) -> Vec<String> {
        match self.others.get(claim) {
            Some(Value::String(one)) => vec![one.clone()],
            Some(Value::Array(all)) => {
                let texts = all.iter().filter_map(Value::as_str);
                texts.take(MAX_GROUPS).map(str::to_owned).collect()
            }
            _ => Vec::new(),
        }
    }
}

fn wrong(why: impl Into<String>) -> Wrong {
    Wrong::Token(why.into())
}

/// The key that a token names, or the only one there is.
fn key<'a>(keys: &'a JwkSet, kid: Option<&str>) -> Option<&'a Jwk> {
    match kid {
        Some(kid) => keys.find(kid),
        None if keys.keys.len() == 1 => keys.keys.first(),
        None => None,
    }
}

/// Who a token speaks of, if it is of this issuer, for this client, for this login, and of now.
pub(super) fn checked(token: &str, keys: &JwkSet, expected: Expected<'_>) -> Result<Claims, Wrong> {
    if token.len() > MAX_TOKEN {
        return Err(wrong("the token is too long"));
    }
    let library = |error: jsonwebtoken::errors::Error| wrong(format!("the token: {error}"));
    let header = decode_header(token).map_err(library)?;
    if !ALGORITHMS.contains(&header.alg) {
        let why = format!(
            "the token is signed by {:?}, which is not taken",
            header.alg
        );
        return Err(wrong(why));
    }
    let jwk = key(keys, header.kid.as_deref()).ok_or(Wrong::Key)?;
    let signs = jwk.common.public_key_use.as_ref();
    if signs.is_some_and(|is| *is != PublicKeyUse::Signature) {
        return Err(wrong("the token is signed with a key that is not for that"));
    }
    let algorithm = jwk.common.key_algorithm.as_ref();
    if algorithm.is_some_and(|is| is.to_string() != format!("{:?}", header.alg)) {
        return Err(wrong("the token is signed otherwise than its key is for"));
    }
    let key = DecodingKey::from_jwk(jwk).map_err(library)?;
    let mut rules = Validation::new(header.alg);
    rules.set_issuer(&[expected.issuer]);
    rules.set_audience(&[expected.client]);
    rules.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    // The library would read the clock by itself.
    rules.validate_exp = false;
    let claims = decode::<Claims>(token, &key, &rules)
        .map_err(library)?
        .claims;
    if claims.exp <= expected.now_s - LEEWAY_S {
        return Err(wrong("the token has run out"));
    }
    if claims.iat.is_some_and(|at| at > expected.now_s + LEEWAY_S) {
        return Err(wrong("the token is of a time to come"));
    }
    if claims.nonce.as_deref() != Some(expected.nonce) {
        return Err(wrong(
            "the token is not for this login: its nonce is another",
        ));
    }
    let several = claims.aud.as_array().is_some_and(|all| all.len() > 1);
    match claims.azp.as_deref() {
        Some(client) if client == expected.client => {}
        None if !several => {}
        _ => return Err(wrong("the token was given to another client")),
    }
    if claims.sub.is_empty() || claims.sub.len() > 255 {
        return Err(wrong("the token names nobody"));
    }
    Ok(claims)
}

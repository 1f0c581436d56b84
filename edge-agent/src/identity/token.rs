//! What the device reads from its enrolment token.
//!
//! Nothing in it is verified: the coordinator does that. The device was given the token by somebody whom it trusts, and
//! learns from it where the coordinator is and which certificate authority is the right one.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use mesh_core::{Digest, Name};
use serde::{Deserialize, Deserializer};

/// A token with all its claims is below 1 KiB.
pub const MAX_TOKEN_BYTES: usize = 4 * 1024;

/// An enrolment token. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    text: String,
    claims: Claims,
}

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Claims {
    aud: String,
    /// The coordinator: `https://HOST:PORT`.
    pub url: String,
    /// The SHA-256 of the certificate authority's certificate.
    #[serde(deserialize_with = "digest")]
    pub ca: Digest,
    /// The site that it is for.
    pub site: Name,
    /// When it expires: seconds since the Unix epoch.
    pub exp: i64,
}

fn digest<'de, D: Deserializer<'de>>(from: D) -> Result<Digest, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(serde::de::Error::custom)
}

impl Token {
    /// Reads a token.
    ///
    /// # Errors
    /// What is wrong with it, in words that do not repeat it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.len() > MAX_TOKEN_BYTES {
            return Err("is too long for an enrolment token".into());
        }
        let mut parts = text.split('.');
        let (Some(_), Some(claims), Some(_), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("is no enrolment token: three parts with dots between them".into());
        };
        let bytes = URL_SAFE_NO_PAD
            .decode(claims)
            .map_err(|_| "is no enrolment token: its middle part is no base64".to_owned())?;
        let claims: Claims = serde_json::from_slice(&bytes)
            .map_err(|error| format!("is no enrolment token of this version: {error}"))?;
        if claims.aud != "enrol" {
            return Err(format!(
                "is a token for {:?}, not for enrolment",
                claims.aud
            ));
        }
        Ok(Self {
            text: text.to_owned(),
            claims,
        })
    }

    /// What it says.
    #[must_use]
    pub const fn claims(&self) -> &Claims {
        &self.claims
    }

    /// The token itself, for the coordinator only.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// What stands for it on the disk.
    pub(super) fn digest(&self) -> Digest {
        models::digest_of(self.text.as_bytes())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Token").field(&self.claims).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(claims: &str) -> String {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims))
    }

    fn good() -> String {
        let ca = Digest([7; 32]);
        format!(
            r#"{{"aud":"enrol","jti":"x","exp":1800000000,"site":"hall","ca":"{ca}","url":"https://c:8443"}}"#
        )
    }

    #[test]
    fn claims_are_read_and_the_token_is_never_shown() {
        let text = token(&good());
        let token = Token::parse(&format!(" {text}\n")).unwrap();
        assert_eq!(token.claims().url, "https://c:8443");
        assert_eq!(token.claims().ca, Digest([7; 32]));
        assert_eq!(token.claims().site.as_str(), "hall");
        assert_eq!(token.text(), text);
        assert!(!format!("{token:?}").contains(&text));
    }

    #[test]
    fn anything_else_is_refused_without_repeating_it() {
        let session = good().replace("enrol", "session");
        let no_pin = good().replace("ca", "cb");
        let bad_site = good().replace("hall", "Hall 2");
        for bad in [
            "",
            "secret",
            "a.b",
            "a.!.c",
            "a.b.c.d",
            &token("{}"),
            &token("[1"),
            &token(&session),
            &token(&no_pin),
            &token(&bad_site),
            &"a.b.c".repeat(MAX_TOKEN_BYTES),
        ] {
            let said = Token::parse(bad).unwrap_err();
            assert!(bad.is_empty() || !said.contains(bad), "{said}");
        }
    }
}

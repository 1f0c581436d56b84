//! Enrolment tokens as they are carried around: signed by the coordinator, and naming it, so that a device knows whom it
//! may trust before it has ever spoken to it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{enrol::Refusal, token::TokenKey};

/// The longest token that is looked at: ours have some five hundred bytes.
pub(crate) const MAX_TOKEN: usize = 4 * 1024;
/// What it is for.
const AUDIENCE: &str = "enrol";

/// What an enrolment token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claims {
    /// Always `enrol`.
    pub(crate) aud: String,
    /// Its row in `enrolment_tokens`.
    pub(crate) jti: String,
    /// Until when, in seconds since 1970. The row decides.
    pub(crate) exp: i64,
    /// The site of whoever enrols with it.
    pub(crate) site: String,
    /// SHA-256 of the authority's certificate, in hexadecimal.
    pub(crate) ca: String,
    /// Where to enrol, `https://host:port`.
    pub(crate) url: String,
}

/// Signs and reads them.
#[derive(Clone, Debug)]
pub(crate) struct Signer(pub(crate) Arc<TokenKey>);

impl Signer {
    /// A token for these claims.
    pub(crate) fn token(
        &self,
        jti: &str,
        site: &str,
        expires_ms: i64,
        ca: String,
        url: String,
    ) -> Result<String, jsonwebtoken::errors::Error> {
        let claims = Claims {
            aud: AUDIENCE.into(),
            jti: jti.into(),
            exp: expires_ms.div_euclid(1_000),
            site: site.into(),
            ca,
            url,
        };
        self.0.sign(&claims)
    }

    /// What a token says, if it was signed here for this. Whether it still holds, its row says.
    pub(crate) fn read(&self, token: &str) -> Result<Claims, Refusal> {
        if token.len() > MAX_TOKEN {
            return Err(Refusal::Forged);
        }
        // Until when it holds is held against `now` with the row.
        self.0.claims(token, AUDIENCE).ok_or(Refusal::Forged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &std::path::Path) -> Signer {
        Signer(Arc::new(TokenKey::open(folder).unwrap()))
    }

    #[test]
    fn only_what_was_signed_here_for_enrolment() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let signer = open(one.path());
        let make = |s: &Signer| {
            s.token("j", "demo", 5_000, "ca".into(), "https://x:1".into())
                .unwrap()
        };
        let token = make(&signer);
        let claims = signer.read(&token).unwrap();
        assert_eq!((claims.jti.as_str(), claims.exp), ("j", 5));
        assert_eq!(open(one.path()).read(&token).unwrap(), claims);
        let stranger = make(&open(other.path()));
        let body = token.split('.').nth(1).unwrap();
        let none = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{body}.");
        let session = Claims {
            aud: "session".into(),
            ..claims
        };
        let session = signer.0.sign(&session).unwrap();
        let cut = &token[..token.len() - 4];
        let long = "a".repeat(MAX_TOKEN + 1);
        for bad in [&stranger, &none, &session, cut, &long, "", "a.b.c"] {
            assert_eq!(signer.read(bad), Err(Refusal::Forged), "{bad}");
        }
    }
}

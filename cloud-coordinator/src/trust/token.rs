//! Signed tokens (JWT, HS256) and the key that signs them, `<data>/trust/token.key`.

use std::path::Path;

use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode, errors::Error,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::files::{self, FileError};

/// Bytes of the key: as many as the hash has.
const KEY_BYTES: usize = 32;
/// The longest token that is looked at: ours have some hundred bytes.
const MAX_TOKEN: usize = 4 * 1024;

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claims {
    /// What it is for: `session`, `api`, `setup`.
    pub(crate) aud: String,
    /// Its number: the row of [`super::sessions`].
    pub(crate) jti: String,
    /// Until when, in seconds since 1970.
    pub(crate) exp: i64,
}

/// The key.
pub(crate) struct TokenKey {
    sign: EncodingKey,
    verify: DecodingKey,
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenKey")
    }
}

impl TokenKey {
    /// Reads the key, or makes it at the first start.
    ///
    /// # Errors
    /// If others can read it, and if it cannot be read or written.
    pub(crate) fn open(folder: &Path) -> Result<Self, FileError> {
        let path = folder.join("token.key");
        let bytes = match files::read(&path)? {
            Some(bytes) => bytes,
            None => {
                let mut fresh = [0; KEY_BYTES];
                if aws_lc_rs::rand::fill(&mut fresh).is_err() {
                    let why = "cannot be made: the system gives no random numbers";
                    return Err(FileError::Content { path, why });
                }
                files::write(&path, &fresh)?;
                fresh.to_vec()
            }
        };
        if bytes.len() != KEY_BYTES {
            let why = "is no key of 32 bytes";
            return Err(FileError::Content { path, why });
        }
        Ok(Self {
            sign: EncodingKey::from_secret(&bytes),
            verify: DecodingKey::from_secret(&bytes),
        })
    }

    /// Signs claims.
    pub(crate) fn sign(&self, claims: &impl Serialize) -> Result<String, Error> {
        encode(&Header::new(Algorithm::HS256), claims, &self.sign)
    }

    /// The claims of a token for `audience` that was signed here. Whether it has run out is the caller's to see: the
    /// library would read the clock by itself.
    pub(crate) fn claims<C: DeserializeOwned>(&self, token: &str, audience: &str) -> Option<C> {
        if token.len() > MAX_TOKEN {
            return None;
        }
        let mut rules = Validation::new(Algorithm::HS256);
        rules.set_audience(&[audience]);
        rules.set_required_spec_claims(&["exp", "aud"]);
        rules.validate_exp = false;
        let data = decode::<C>(token, &self.verify, &rules).ok()?;
        Some(data.claims)
    }

    /// The claims of a token for `audience` that has not run out.
    pub(crate) fn read(&self, token: &str, audience: &str, now_ms: i64) -> Option<Claims> {
        let claims: Claims = self.claims(token, audience)?;
        (claims.exp > now_ms / 1_000).then_some(claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_signed_here_for_this_and_now() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let key = TokenKey::open(one.path()).unwrap();
        let claims = Claims {
            aud: "api".into(),
            jti: "1".into(),
            exp: 100,
        };
        let token = key.sign(&claims).unwrap();
        assert_eq!(key.read(&token, "api", 99_999), Some(claims.clone()));
        assert_eq!(key.read(&token, "api", 100_000), None);
        assert_eq!(key.read(&token, "session", 0), None);
        let again = TokenKey::open(one.path()).unwrap();
        assert_eq!(again.read(&token, "api", 0), Some(claims.clone()));
        let stranger = TokenKey::open(other.path()).unwrap();
        assert_eq!(stranger.read(&token, "api", 0), None);
        // Another algorithm, or none at all, is no signature.
        let body = token.split('.').nth(1).unwrap();
        let none = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{body}.");
        assert_eq!(key.read(&none, "api", 0), None);
        let longer = jsonwebtoken::encode(&Header::new(Algorithm::HS512), &claims, &key.sign);
        assert_eq!(key.read(&longer.unwrap(), "api", 0), None);
        assert_eq!(key.read(&"a".repeat(MAX_TOKEN + 1), "api", 0), None);
        // A key that is cut is not silently replaced: everybody would be thrown out.
        std::fs::remove_file(one.path().join("token.key")).unwrap();
        files::write(&one.path().join("token.key"), b"short").unwrap();
        assert!(TokenKey::open(one.path()).is_err());
    }
}

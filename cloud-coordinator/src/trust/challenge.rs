//! What a device signs that renews without a certificate: something that was said just now, and counts once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    authority::hex,
    token::{Claims, TokenKey},
};

/// What it is for.
const AUDIENCE: &str = "renew";
/// Seconds in which it has to be signed: some times a slow link's.
const LIFE_S: i64 = 120;
/// Random bytes of its number.
const NUMBER_BYTES: usize = 16;
/// Used ones that are remembered until they have run out. Only who has a known key uses one: a fleet of some ten thousand that comes
/// back within two minutes.
const MOST: usize = 1 << 17;

/// Makes them, and takes each back once. Nothing is kept of those that nobody uses.
#[derive(Debug)]
pub(super) struct Challenges {
    key: Arc<TokenKey>,
    /// With the second in which they run out.
    used: Mutex<HashMap<String, i64>>,
}

impl Challenges {
    pub(super) fn new(key: Arc<TokenKey>) -> Self {
        Self {
            key,
            used: Mutex::default(),
        }
    }

    /// One more; nothing where the system gives no random numbers.
    pub(super) fn make(&self, now_ms: i64) -> Option<String> {
        let mut number = [0; NUMBER_BYTES];
        aws_lc_rs::rand::fill(&mut number).ok()?;
        let claims = Claims {
            aud: AUDIENCE.into(),
            jti: hex(&number),
            exp: now_ms.div_euclid(1_000) + LIFE_S,
        };
        self.key.sign(&claims).ok()
    }

    /// Whether this was made here, within the time, and comes for the first time.
    pub(super) fn take(&self, challenge: &str, now_ms: i64) -> bool {
        let Some(claims) = self.key.read(challenge, AUDIENCE, now_ms) else {
            return false;
        };
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if used.len() >= MOST {
            used.retain(|_, exp| *exp > now_ms / 1_000);
        }
        used.len() < MOST && used.insert(claims.jti, claims.exp).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counts_once_and_not_for_long() {
        let dir = tempfile::tempdir().unwrap();
        let key = Arc::new(TokenKey::open(dir.path()).unwrap());
        let challenges = Challenges::new(key.clone());
        let one = challenges.make(5_000).unwrap();
        assert!(one.len() < 240, "a device signs it: {}", one.len());
        assert!(challenges.take(&one, 6_000));
        assert!(!challenges.take(&one, 6_000), "the second time");
        let late = challenges.make(5_000).unwrap();
        assert!(!challenges.take(&late, 5_000 + LIFE_S * 1_000));
        let session = Claims {
            aud: "session".into(),
            jti: "1".into(),
            exp: i64::MAX,
        };
        assert!(!challenges.take(&key.sign(&session).unwrap(), 0));
        assert!(!challenges.take("", 0));
    }
}

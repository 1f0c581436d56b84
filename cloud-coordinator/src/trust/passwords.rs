//! Passwords: only their argon2id hashes are kept, and what takes time takes it elsewhere.

use std::sync::OnceLock;

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use tokio::sync::Semaphore;

use super::TrustError;

/// Characters of a password, at least: what a machine guesses offline in years, not in minutes.
const LEAST_CHARACTERS: usize = 10;
/// Bytes of a password, at most: a long sentence.
const MOST_BYTES: usize = 256;
/// Passwords that are hashed at a time: each takes 19 MiB and a core for some hundredths of a second.
const AT_ONCE: usize = 2;

/// Hashes passwords, a few at a time.
#[derive(Debug)]
pub(super) struct Passwords {
    places: Semaphore,
    /// Of a password that nobody has: what is compared when there is no such user, so that it takes as long.
    decoy: OnceLock<String>,
}

impl Default for Passwords {
    fn default() -> Self {
        Self {
            places: Semaphore::new(AT_ONCE),
            decoy: OnceLock::new(),
        }
    }
}

fn hash_of(password: &str) -> Result<String, TrustError> {
    let hash: Result<PasswordHash, _> = Argon2::default().hash_password(password.as_bytes());
    hash.map(|hash| hash.to_string())
        .map_err(|error| TrustError::Hash(error.to_string()))
}

fn fits(password: &str, hash: &str) -> bool {
    let verified = PasswordHash::new(hash)
        .map(|hash| Argon2::default().verify_password(password.as_bytes(), &hash));
    matches!(verified, Ok(Ok(())))
}

impl Passwords {
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, TrustError> {
        let failed = |error: &dyn std::fmt::Display| TrustError::Hash(error.to_string());
        let _place = self.places.acquire().await.map_err(|e| failed(&e))?;
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|e| failed(&e))
    }

    pub(super) async fn hash(&self, password: &str) -> Result<String, TrustError> {
        let characters = password.chars().count();
        if characters < LEAST_CHARACTERS || password.len() > MOST_BYTES {
            let why = format!(
                "password: has at least {LEAST_CHARACTERS} characters and at most {MOST_BYTES} bytes"
            );
            return Err(TrustError::Invalid(why));
        }
        let password = password.to_owned();
        self.work(move || hash_of(&password)).await?
    }

    /// Whether it is the password of this hash; takes as long where there is none.
    pub(super) async fn check(
        &self,
        password: &str,
        hash: Option<String>,
    ) -> Result<bool, TrustError> {
        if password.len() > MOST_BYTES {
            return Ok(false);
        }
        let real = hash.is_some();
        let hash = match (hash, self.decoy.get()) {
            (Some(hash), _) => hash,
            (None, Some(decoy)) => decoy.clone(),
            (None, None) => {
                let decoy = self.work(|| hash_of("nobody has this")).await??;
                self.decoy.get_or_init(|| decoy).clone()
            }
        };
        let password = password.to_owned();
        let fits = self.work(move || fits(&password, &hash)).await?;
        Ok(fits && real)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_password_fits() {
        let passwords = Passwords::default();
        for bad in ["", "ninechars", &"x".repeat(257)] {
            assert!(
                matches!(passwords.hash(bad).await, Err(TrustError::Invalid(_))),
                "{bad:?}"
            );
        }
        let hash = passwords.hash("zehn Zeichen: ä").await.unwrap();
        assert!(
            hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
            "{hash}"
        );
        assert_ne!(hash, passwords.hash("zehn Zeichen: ä").await.unwrap());
        for (password, hash, fits) in [
            ("zehn Zeichen: ä", Some(hash.clone()), true),
            ("zehn Zeichen: a", Some(hash.clone()), false),
            ("", Some(hash), false),
            ("anything at all", Some("no hash".to_owned()), false),
            // What the decoy is made of lets nobody in either.
            ("nobody has this", None, false),
        ] {
            assert_eq!(
                passwords.check(password, hash).await.unwrap(),
                fits,
                "{password}"
            );
        }
    }
}

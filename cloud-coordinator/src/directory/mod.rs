//! People who come in by a directory of somebody's own (OpenID Connect): the authorization code flow with PKCE.
//!
//! ```text
//!  browser ── login ──> begin: state, nonce, verifier ── 303 ──> directory
//!     ▲                                                             │
//!     └─ session <── rights of the groups <── token, checked <── code, state
//! ```
//!
//! The flow is `oauth2`'s, the signatures are `jsonwebtoken`'s. Nothing is believed of a token before it was
//! [checked](claims), and whoever is in no group that is mapped does not come in.

mod claims;
mod config;
mod fetch;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jsonwebtoken::jwk::JwkSet;
use oauth2::{
    AuthUrl, AuthorizationCode, Client, ClientId, ClientSecret, CsrfToken, EndpointNotSet,
    EndpointSet, ExtraTokenFields, PkceCodeChallenge, PkceCodeVerifier, RedirectUrl,
    RequestTokenError, Scope, StandardRevocableToken, StandardTokenResponse, TokenUrl,
    basic::{
        BasicErrorResponse, BasicRevocationErrorResponse, BasicTokenIntrospectionResponse,
        BasicTokenType,
    },
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

pub use self::config::{DirectoryConfig, GroupConfig};
use self::{
    claims::{Claims, Expected, Wrong, checked},
    config::safe,
    fetch::{Fetch, FetchError},
};
use crate::{
    clock,
    trust::{Person, secret},
};

/// Where the directory sends browsers back to.
pub(crate) const CALLBACK: &str = "/api/v1/oidc/callback";
/// Logins that are under way: each is a few hundred bytes. The oldest gives way.
const MAX_PENDING: usize = 1_000;
/// A login has to be finished within this: time for a password and a second factor.
pub(crate) const PENDING_S: u64 = 600;
/// Keys of a directory: the present ones, the next ones, and those of before.
const MAX_KEYS: usize = 100;
/// What the directory says about itself, its keys too, is asked for again after this.
const KNOWN: Duration = Duration::from_secs(3_600);
/// Keys that are not known are asked for at most this often.
const REFRESH: Duration = Duration::from_secs(10);

/// Why nobody comes in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectoryError {
    /// The directory is not there, or is not what it should be.
    #[error("{0}")]
    Away(String),
    /// This login is not taken.
    #[error("{0}")]
    Refused(String),
}

impl From<FetchError> for DirectoryError {
    fn from(error: FetchError) -> Self {
        Self::Away(error.to_string())
    }
}

/// What the directory says about itself.
#[derive(Deserialize)]
struct Said {
    issuer: String,
    authorization_endpoint: String,
    token_endpoint: String,
    jwks_uri: String,
}

#[derive(Deserialize)]
struct Keys {
    keys: Vec<serde_json::Value>,
}

#[derive(Clone)]
struct Known {
    authorize: AuthUrl,
    token: TokenUrl,
    keys_at: String,
    keys: Arc<JwkSet>,
    since: Instant,
    keys_since: Instant,
}

struct Pending {
    state: String,
    nonce: String,
    verifier: PkceCodeVerifier,
    since: Instant,
}

/// What an answer with tokens has besides the access token, which nobody uses.
#[derive(Debug, Serialize, Deserialize)]
struct IdToken {
    id_token: Option<String>,
}

impl ExtraTokenFields for IdToken {}

type Flow = Client<
    BasicErrorResponse,
    StandardTokenResponse<IdToken, BasicTokenType>,
    BasicTokenIntrospectionResponse,
    StandardRevocableToken,
    BasicRevocationErrorResponse,
    EndpointSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointSet,
>;

/// See the module.
pub(crate) struct Directory {
    config: DirectoryConfig,
    secret: Option<ClientSecret>,
    redirect: RedirectUrl,
    fetch: Arc<Fetch>,
    known: tokio::sync::Mutex<Option<Known>>,
    pending: Mutex<VecDeque<Pending>>,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory")
            .field("issuer", &self.config.issuer)
            .finish_non_exhaustive()
    }
}

impl Directory {
    /// Reads what the configuration names; the directory itself is asked when somebody comes.
    pub(crate) fn open(config: DirectoryConfig) -> Result<Self, String> {
        let secret = match &config.client_secret_file {
            None => None,
            Some(path) => {
                let read = secret(path).map_err(|e| format!("oidc.client_secret_file: {e}"))?;
                let path = path.display();
                Some(read.ok_or_else(|| format!("oidc.client_secret_file: there is no {path}"))?)
            }
        };
        let redirect = format!("{}{CALLBACK}", config.url);
        let redirect = RedirectUrl::new(redirect).map_err(|e| format!("oidc.url: {e}"))?;
        let fetch = Fetch::new(config.ca.as_deref())?;
        Ok(Self {
            config,
            secret: secret.map(ClientSecret::new),
            redirect,
            fetch: Arc::new(fetch),
            known: tokio::sync::Mutex::default(),
            pending: Mutex::default(),
        })
    }

    async fn keys(&self, at: &str) -> Result<Arc<JwkSet>, DirectoryError> {
        let bytes = self.fetch.get(at).await?;
        let shown: Keys = serde_json::from_slice(&bytes)
            .map_err(|error| DirectoryError::Away(format!("the keys at {at}: {error}")))?;
        // Keys of kinds that nobody here knows are for others.
        let known = shown
            .keys
            .into_iter()
            .filter_map(|key| serde_json::from_value(key).ok());
        let keys = known.take(MAX_KEYS).collect();
        Ok(Arc::new(JwkSet { keys }))
    }

    async fn discover(&self) -> Result<Known, DirectoryError> {
        let away = |why: String| DirectoryError::Away(format!("the directory: {why}"));
        let issuer = &self.config.issuer;
        let at = format!(
            "{}/.well-known/openid-configuration",
            issuer.trim_end_matches('/')
        );
        let said: Said = serde_json::from_slice(&self.fetch.get(&at).await?)
            .map_err(|error| away(format!("{at}: {error}")))?;
        if said.issuer != *issuer {
            return Err(away(format!("{at} speaks for {:?}", said.issuer)));
        }
        for address in [
            &said.authorization_endpoint,
            &said.token_endpoint,
            &said.jwks_uri,
        ] {
            safe(address).map_err(|why| away(format!("{address:?}: {why}")))?;
        }
        let keys = self.keys(&said.jwks_uri).await?;
        let now = Instant::now();
        Ok(Known {
            authorize: AuthUrl::new(said.authorization_endpoint)
                .map_err(|e| away(e.to_string()))?,
            token: TokenUrl::new(said.token_endpoint).map_err(|e| away(e.to_string()))?,
            keys_at: said.jwks_uri,
            keys,
            since: now,
            keys_since: now,
        })
    }

    async fn known(&self) -> Result<Known, DirectoryError> {
        let mut known = self.known.lock().await;
        match &*known {
            Some(fresh) if fresh.since.elapsed() < KNOWN => Ok(fresh.clone()),
            _ => Ok(known.insert(self.discover().await?).clone()),
        }
    }

    /// The keys as they are now, if they were not asked for a moment ago.
    async fn new_keys(&self) -> Result<Option<Arc<JwkSet>>, DirectoryError> {
        let mut known = self.known.lock().await;
        match &mut *known {
            Some(known) if known.keys_since.elapsed() >= REFRESH => {
                known.keys = self.keys(&known.keys_at).await?;
                known.keys_since = Instant::now();
                Ok(Some(known.keys.clone()))
            }
            _ => Ok(None),
        }
    }

    fn flow(&self, known: &Known) -> Flow {
        let client = Client::new(ClientId::new(self.config.client_id.clone()))
            .set_auth_uri(known.authorize.clone())
            .set_token_uri(known.token.clone())
            .set_redirect_uri(self.redirect.clone());
        match &self.secret {
            Some(secret) => client.set_client_secret(secret.clone()),
            None => client,
        }
    }

    /// Begins a login: where the browser has to go, and what it has to bring back.
    pub(crate) async fn begin(&self) -> Result<(String, String), DirectoryError> {
        let flow = self.flow(&self.known().await?);
        let (challenge, verifier) = PkceCodeChallenge::new_random_sha256();
        let nonce = CsrfToken::new_random().secret().clone();
        let mut request = flow
            .authorize_url(CsrfToken::new_random)
            .add_scope(Scope::new("openid".into()))
            .add_extra_param("nonce", nonce.clone())
            .set_pkce_challenge(challenge);
        for scope in &self.config.scopes {
            request = request.add_scope(Scope::new(scope.clone()));
        }
        let (url, state) = request.url();
        let state = state.secret().clone();
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        while pending.len() >= MAX_PENDING {
            pending.pop_front();
        }
        pending.push_back(Pending {
            state: state.clone(),
            nonce,
            verifier,
            since: Instant::now(),
        });
        Ok((url.to_string(), state))
    }

    /// A login that was begun here, once.
    fn taken(&self, state: &str) -> Option<Pending> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = Duration::from_secs(PENDING_S);
        pending.retain(|login| login.since.elapsed() < limit);
        let at = pending.iter().position(|login| login.state == state)?;
        pending.remove(at)
    }

    /// Finishes a login: who it is, and what that one may do.
    pub(crate) async fn finish(&self, state: &str, code: &str) -> Result<Person, DirectoryError> {
        let refused = |why: &str| DirectoryError::Refused(why.to_owned());
        let login = self
            .taken(state)
            .ok_or_else(|| refused("this login was not begun here, or took too long"))?;
        let known = self.known().await?;
        let fetch = Arc::clone(&self.fetch);
        let send = move |request| {
            let fetch = Arc::clone(&fetch);
            async move { fetch.send(request).await }
        };
        let tokens = self
            .flow(&known)
            .exchange_code(AuthorizationCode::new(code.to_owned()))
            .set_pkce_verifier(login.verifier)
            .request_async(&send)
            .await;
        let tokens = tokens.map_err(|error| match error {
            RequestTokenError::ServerResponse(said) => {
                DirectoryError::Refused(format!("the directory does not take the code: {said}"))
            }
            RequestTokenError::Request(error) => error.into(),
            other => DirectoryError::Away(format!("the directory's answer: {other}")),
        })?;
        let token = tokens.extra_fields().id_token.as_deref();
        let token = token.ok_or_else(|| refused("the directory has sent no ID token"))?;
        let expected = Expected {
            issuer: &self.config.issuer,
            client: &self.config.client_id,
            nonce: &login.nonce,
            now_s: clock::now_ms() / 1_000,
        };
        let claims = match checked(token, &known.keys, expected) {
            Err(Wrong::Key) => match self.new_keys().await? {
                Some(keys) => checked(token, &keys, expected),
                None => Err(Wrong::Key),
            },
            done => done,
        };
        let claims = claims.map_err(|wrong| match wrong {
            Wrong::Key => {
                refused("the token is signed with a key that the directory does not show")
            }
            Wrong::Token(why) => DirectoryError::Refused(why),
        })?;
        self.person(&claims)
    }

    fn person(&self, claims: &Claims) -> Result<Person, DirectoryError> {
        let groups = claims.groups(&self.config.claim);
        let (role, site) = self.config.rights(&groups).ok_or_else(|| {
            let claim = &self.config.claim;
            let why = format!(
                "{:?} is in no group that may come in, by the claim {claim:?}",
                claims.sub
            );
            DirectoryError::Refused(why)
        })?;
        Ok(Person {
            issuer: self.config.issuer.clone(),
            subject: claims.sub.clone(),
            called: claims.preferred_username.clone().unwrap_or_default(),
            role,
            site: site.map(str::to_owned),
        })
    }
}

//! Every request passes here: who asks, how often, and whether the table of [`super::access`] allows it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    extract::{ConnectInfo, FromRequestParts, MatchedPath, Request, State as Shared},
    http::{HeaderMap, HeaderValue, Method, header, request::Parts as Head},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{
    State,
    access::{Found, Log, Need, No, Rule, Table},
    held::Scale,
    limits::{Limits, What, network, too_many},
    problem::Problem,
    shown::{bearer, cookie, loopback, own_page},
};
use crate::{
    labels::checked_author,
    metrics::Metrics,
    parts::{Name, Parts},
    trust::{
        Door, PeerDevice, Principal, Shown, Trust, TrustError, Who,
        audit::{Entry, Outcome},
    },
};

/// What decides.
#[derive(Debug)]
pub(crate) struct Gate {
    table: Table,
    limits: Limits,
    trust: Trust,
    door: Door,
    metrics: Arc<Metrics>,
    parts: Arc<Parts>,
    scale: Arc<Scale>,
}

/// How long the database may take to say who shows something.
const KNOW: Duration = Duration::from_secs(5);

/// Seconds after which somebody may ask again who has not read what was answered.
const UNREAD_S: u64 = 5;

/// Who asks, for the handlers.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) who: Option<Who>,
    pub(super) address: IpAddr,
}

impl Caller {
    pub(super) fn principal(&self) -> Option<&Principal> {
        self.who.as_ref().map(|who| &who.principal)
    }

    /// As it stands in the audit log.
    pub(super) fn called(&self) -> String {
        match &self.who {
            None => format!("address {}", self.address),
            Some(Who {
                principal,
                label: Some(label),
                ..
            }) => format!("{principal} by token {label:?}"),
            Some(who) => who.principal.to_string(),
        }
    }

    /// As whom it says something about a sample: the name of its owner, and the token if it is one.
    pub(super) fn author(&self) -> Result<String, Problem> {
        match &self.who {
            Some(Who {
                principal: Principal::User { name, .. },
                label,
                ..
            }) => Ok(match label {
                Some(token) => format!("{name} (token {token})"),
                None => name.clone(),
            }),
            _ => Err(Problem::new(403, "Forbidden", "this is for people")),
        }
    }

    /// As whom it does something for somebody: a name that is only said never stands without the one that was proved.
    pub(super) fn author_for(&self, said: Option<&str>) -> Result<String, Problem> {
        let asks = self.author()?;
        match said {
            None => Ok(asks),
            Some(said) => {
                let said = checked_author(said)?;
                Ok(match said == asks {
                    true => asks,
                    false => format!("{said}, as {asks}"),
                })
            }
        }
    }

    /// Whether it may see what is of this site; what is of none is for those who see all.
    pub(super) fn sees(&self, site: Option<&str>) -> bool {
        match self.principal().and_then(Principal::site) {
            None => true,
            Some(own) => site == Some(own.as_str()),
        }
    }

    /// The site to look at: the one that was asked for, or the only one that may be seen.
    pub(super) fn narrowed(&self, asked: Option<String>) -> Result<Option<String>, Problem> {
        let Some(own) = self.principal().and_then(Principal::site) else {
            return Ok(asked);
        };
        match asked {
            Some(asked) if asked != own.as_str() => {
                Err(Problem::not_found("there is no such site"))
            }
            _ => Ok(Some(own.as_str().to_owned())),
        }
    }
}

impl FromRequestParts<State> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Head, _: &State) -> Result<Self, Problem> {
        // What does not come through the gate is not answered.
        let caller = parts.extensions.get::<Self>().cloned();
        caller.ok_or_else(|| Problem::new(403, "Forbidden", "nobody knows who asks"))
    }
}

/// How somebody says who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Cookie,
    Other,
}

impl Gate {
    pub(super) fn new(trust: Trust, door: Door, metrics: Arc<Metrics>, parts: Arc<Parts>) -> Self {
        let (table, limits) = (Table::new(), Limits::new());
        Self {
            table,
            limits,
            trust,
            door,
            metrics,
            parts,
            scale: Arc::default(),
        }
    }

    /// Who shows this; nobody if it does not count.
    async fn known(&self, shown: Shown, token: &str) -> Result<Option<Who>, Problem> {
        let pass = self.parts.enter(Name::Trust).await?;
        let known = tokio::time::timeout(KNOW, self.trust.who(shown, token)).await;
        pass.settle(matches!(known, Ok(Ok(_))));
        let late = || {
            let why = format!("{} does not answer, try again", Name::Trust.words());
            Problem::of_part(Name::Trust, why)
        };
        Ok(known.map_err(|_| late())??)
    }

    /// Who asks, and how it says so. What is shown and does not count is as good as nothing, but for a token: who
    /// shows one wants to be told.
    async fn who(
        &self,
        headers: &HeaderMap,
        device: Option<PeerDevice>,
    ) -> Result<(Option<Who>, By), Problem> {
        if headers.contains_key(header::AUTHORIZATION) {
            let token = bearer(headers).unwrap_or_default();
            return match self.known(Shown::Token, token).await? {
                Some(who) => Ok((Some(who), By::Other)),
                None => Err(unknown("this token is none, has run out or was revoked")),
            };
        }
        if let Some(PeerDevice { site, device }) = device {
            let who = Who {
                principal: Principal::Device { site, device },
                grant: String::new(),
                label: None,
                makes_tokens: false,
            };
            return Ok((Some(who), By::Other));
        }
        match cookie(headers, self.door) {
            Some(session) => Ok((self.known(Shown::Session, session).await?, By::Cookie)),
            None => Ok((None, By::Other)),
        }
    }

    /// Whether there are too many of them.
    fn often(
        &self,
        who: Option<&Who>,
        address: IpAddr,
        rule: Option<&Rule>,
    ) -> Result<(), Problem> {
        let strict = rule.and_then(|rule| rule.strict());
        let address = network(address);
        if let Some(what) = strict {
            self.limits.check(what, address).map_err(too_many)?;
        }
        let checked = match who.map(|who| &who.principal) {
            Some(Principal::User { name, .. }) => self.limits.check(What::User, name),
            Some(Principal::Device { site, device }) => {
                let own = self.limits.check(What::Device, (site, device));
                match rule.and_then(Rule::seldom) {
                    Some(what) => own.and(self.limits.check(what, (site, device))),
                    None => own,
                }
            }
            // They have no name to be limited by, and whole fleets come from one address.
            None if !self.door.tls && rule.is_some_and(Rule::is_for_devices) => Ok(()),
            None => self.limits.check(What::Address, address),
        };
        checked.map_err(too_many)
    }

    /// An attempt to log in under a name.
    pub(super) fn login(&self, name: &str) -> Result<(), Problem> {
        self.limits.check(What::LoginName, name).map_err(too_many)
    }

    /// Counts a refusal, and writes it down if somebody known was refused.
    async fn refused(&self, caller: &Caller, reason: &'static str, operation: &str, path: &str) {
        self.metrics.access_refused(reason);
        if caller.who.is_none() {
            return;
        }
        let who = caller.called();
        if self.limits.check(What::Refusals, &who).is_ok() {
            let entry = Entry {
                who: &who,
                action: operation,
                object: path,
                outcome: Outcome::Refused,
                detail: reason,
            };
            self.trust.note(entry).await;
        }
    }
}

fn unknown(detail: &str) -> Problem {
    Problem::new(401, "Who are you", detail)
}

impl From<TrustError> for Problem {
    fn from(error: TrustError) -> Self {
        let detail = error.to_string();
        match error {
            TrustError::Records(error) => error.into(),
            TrustError::Wrong => Self::new(401, "Not let in", detail),
            TrustError::Forbidden(_) => Self::new(403, "Forbidden", detail),
            TrustError::Invalid(_) => Self::invalid(detail),
            TrustError::Missing(_) => Self::not_found(detail),
            TrustError::Conflict(_) => Self::new(409, "Not possible", detail),
            TrustError::Files(_) | TrustError::Sign(_) | TrustError::Hash(_) => {
                tracing::error!(%error, "who may do what cannot be read or written");
                Self::new(503, "Not possible now", "see the coordinator's log")
            }
        }
    }
}

impl Rule {
    /// The limit of what can be tried by everybody and must not be tried often.
    fn strict(&self) -> Option<What> {
        match self.operation() {
            "POST /api/v1/login" | "GET /api/v1/oidc/login" | "GET /api/v1/oidc/callback" => {
                Some(What::LoginAddress)
            }
            "POST /api/v1/setup" => Some(What::Setup),
            "POST /api/v1/enrol" | "POST /api/v1/renew" => Some(What::Enrol),
            _ => None,
        }
    }

    /// The limit of what costs the coordinator more than other questions of a device.
    fn seldom(&self) -> Option<What> {
        (self.operation() == "POST /api/v1/offload/{sha256}").then_some(What::Offload)
    }

    fn is_for_devices(&self) -> bool {
        matches!(self.need, Need::DeviceOrRole(_))
    }
}

/// Lets a request through, or says why not.
pub(super) async fn gate(
    Shared(gate): Shared<Arc<Gate>>,
    matched: Option<MatchedPath>,
    mut request: Request,
    next: Next,
) -> Response {
    let nowhere = ConnectInfo(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
    let ConnectInfo(peer) = *request.extensions().get().unwrap_or(&nowhere);
    let address = peer.ip().to_canonical();
    let nobody = Caller { who: None, address };
    let Some(matched) = matched else {
        // There is nothing at this address, and it says so.
        return match gate.often(None, address, None) {
            Ok(()) => next.run(request).await,
            Err(problem) => problem.into_response(),
        };
    };
    let rule = match gate.table.find(request.method(), matched.as_str()) {
        Found::Rule(rule) => rule,
        Found::Methods(allow) => {
            let detail = "this address does not do that";
            let mut response = Problem::new(405, "Method Not Allowed", detail).into_response();
            if let Ok(allow) = HeaderValue::from_str(&allow) {
                response.headers_mut().insert(header::ALLOW, allow);
            }
            return response;
        }
        Found::Undeclared => {
            gate.metrics.access_refused("undeclared");
            tracing::error!(
                path = matched.as_str(),
                "nobody has declared who may use this"
            );
            return Problem::new(403, "Forbidden", "nobody may use this").into_response();
        }
    };
    let path = request.uri().path().to_owned();
    let device = request.extensions().get().cloned();
    let (who, by) = match gate.who(request.headers(), device).await {
        Ok(found) => found,
        Err(problem) if problem.is_ours() => return problem.into_response(),
        Err(problem) => {
            gate.refused(&nobody, "token", rule.operation(), &path)
                .await;
            let often = gate.often(None, address, Some(rule));
            return often.err().unwrap_or(problem).into_response();
        }
    };
    let caller = Caller { who, address };
    if let Err(problem) = gate.often(caller.who.as_ref(), address, Some(rule)) {
        gate.metrics.access_refused("rate");
        return problem.into_response();
    }
    let at_home = loopback(address, request.headers());
    if let Err(no) = rule.allows(caller.principal(), at_home, gate.door) {
        let (reason, problem) = match no {
            No::Who => ("nobody", unknown("log in, or show a token")),
            No::Forbidden(why) => ("role", Problem::new(403, "Forbidden", why)),
        };
        gate.refused(&caller, reason, rule.operation(), &path).await;
        return problem.into_response();
    }
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
    let own = own_page(&request, gate.door);
    // A cookie comes along whoever's page asks. What is open to everybody is not for foreign pages either.
    let foreign = match (by, caller.who.is_some()) {
        (By::Cookie, true) => own != Some(true),
        (_, false) => own == Some(false),
        (By::Other, true) => false,
    };
    if changes && foreign {
        gate.refused(&caller, "origin", rule.operation(), &path)
            .await;
        let why = "a page of another origin asks for this";
        return Problem::new(403, "Forbidden", why).into_response();
    }
    if let Some(principal) = caller.principal() {
        let principal = principal.clone();
        request.extensions_mut().insert(principal);
    }
    request.extensions_mut().insert(caller.clone());
    let response = next.run(request).await;
    if rule.log == Log::Deeds {
        let (who, status) = (caller.called(), response.status());
        let entry = Entry {
            who: &who,
            action: rule.operation(),
            object: &path,
            outcome: if status.is_success() {
                Outcome::Done
            } else {
                Outcome::Failed
            },
            detail: status.as_str(),
        };
        gate.trust.note(entry).await;
    }
    // What is not read is held in memory: of each so much, and not one by one by token or by connection.
    let whose = match caller.principal() {
        Some(principal) => principal.to_string(),
        // They have no name, and whole fleets come from one address: on loopback only, by choice.
        None if !gate.door.tls && rule.is_for_devices() => return response,
        None => network(address).to_string(),
    };
    match gate.scale.weigh(&whose, response) {
        Some(response) => response,
        None => {
            gate.metrics.access_refused("unread");
            let why = "too much of what was asked for has not been read yet; read it first";
            Problem::new(503, "Too much unread", why)
                .after(UNREAD_S)
                .into_response()
        }
    }
}

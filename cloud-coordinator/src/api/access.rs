//! Who may use which operation: one table, and what is not in it is refused.
//!
//! [`mod@super::gate`] enforces it on every request, the description of the API is completed from it, and
//! `tests/access.rs` holds each role against each operation.

use std::collections::HashMap;

use axum::http::Method;
use serde_json::{Value, json};
use utoipa::openapi::{
    OpenApi,
    extensions::Extensions,
    path::Operation,
    security::{
        ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityRequirement as Requirement,
        SecurityScheme,
    },
};

use crate::trust::{Door, Principal, Role};

/// Who may use an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Everybody.
    Open,
    /// Devices, and who has this role.
    DeviceOrRole(Role),
    /// Who has this role.
    Role(Role),
    /// Who has this role, and everybody on the coordinator's own machine.
    RoleOrLoopback(Role),
}

/// Which of those may use it who may only see one site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// All: it is not about sites.
    Any,
    /// All: it shows and changes only what is of the site.
    Own,
    /// None: it is about all sites.
    All,
}

/// What is written to the audit log by the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Log {
    /// Only that it was refused.
    Refusals,
    /// That somebody did it, too.
    Deeds,
}

/// One line of the table.
#[derive(Debug)]
pub(super) struct Rule {
    /// `METHOD path`.
    operation: &'static str,
    pub(super) need: Need,
    pub(super) reach: Reach,
    pub(super) log: Log,
}

const fn rule(operation: &'static str, need: Need, reach: Reach, log: Log) -> Rule {
    Rule {
        operation,
        need,
        reach,
        log,
    }
}

const fn open(operation: &'static str) -> Rule {
    rule(operation, Need::Open, Reach::Any, Log::Refusals)
}

/// It reads, or computes on what is sent, or writes its own line into the log.
const fn quiet(operation: &'static str, role: Role, reach: Reach) -> Rule {
    rule(operation, Need::Role(role), reach, Log::Refusals)
}

/// It changes something.
const fn deed(operation: &'static str, role: Role, reach: Reach) -> Rule {
    rule(operation, Need::Role(role), reach, Log::Deeds)
}

const fn device(operation: &'static str, role: Role) -> Rule {
    rule(
        operation,
        Need::DeviceOrRole(role),
        Reach::Any,
        Log::Refusals,
    )
}

use Reach::{All, Any, Own};
use Role::{Admin, Labeller, Operator, Viewer};

/// Everything that is served.
#[rustfmt::skip]
const TABLE: &[Rule] = &[
    // Pages: they hold no data.
    open("GET /"), open("GET /label"), open("GET /login"), open("GET /setup"),
    open("GET /icon.svg"), open("GET /page.css"), open("GET /page.js"), open("GET /learning.js"), open("GET /rollouts.js"), open("GET /label.js"),
    open("GET /login.js"), open("GET /setup.js"), open("GET /who.js"),
    // The coordinator itself.
    open("GET /api/v1/openapi.json"),
    open("GET /healthz"),
    open("GET /readyz"),
    rule("GET /metrics", Need::RoleOrLoopback(Viewer), All, Log::Refusals),
    // Coming in.
    open("POST /api/v1/setup"),
    open("POST /api/v1/login"),
    open("GET /api/v1/oidc"),
    open("GET /api/v1/oidc/login"),
    open("GET /api/v1/oidc/callback"),
    open("POST /api/v1/enrol"),
    open("POST /api/v1/renew"),
    quiet("POST /api/v1/logout", Viewer, Any),
    quiet("GET /api/v1/me", Viewer, Any),
    quiet("POST /api/v1/me/password", Viewer, Any),
    quiet("GET /api/v1/tokens", Viewer, Any),
    quiet("POST /api/v1/tokens", Viewer, Any),
    quiet("DELETE /api/v1/tokens/{id}", Viewer, Any),
    // Who may come in: each line of the log is written with what came of it.
    quiet("GET /api/v1/enrolment-tokens", Operator, All),
    quiet("POST /api/v1/enrolment-tokens", Operator, All),
    quiet("DELETE /api/v1/enrolment-tokens/{jti}", Operator, All),
    quiet("GET /api/v1/identities", Operator, All),
    quiet("POST /api/v1/identities/{site}/{device}/approve", Operator, All),
    quiet("POST /api/v1/identities/{site}/{device}/revoke", Operator, All),
    quiet("GET /api/v1/subscribers", Admin, All),
    quiet("POST /api/v1/subscribers", Admin, All),
    quiet("DELETE /api/v1/subscribers/{name}", Admin, All),
    // Who may do what.
    quiet("GET /api/v1/users", Admin, All),
    quiet("POST /api/v1/users", Admin, All),
    quiet("PATCH /api/v1/users/{name}", Admin, All),
    quiet("DELETE /api/v1/users/{name}", Admin, All),
    quiet("GET /api/v1/audit", Admin, All),
    // What devices report.
    quiet("GET /api/v1/devices", Viewer, Own),
    quiet("GET /api/v1/devices/{site}/{device}", Viewer, Own),
    quiet("GET /api/v1/readings", Viewer, Own),
    quiet("GET /api/v1/gaps", Viewer, Own),
    quiet("GET /api/v1/sightings", Viewer, Own),
    quiet("GET /api/v1/live", Viewer, Own),
    quiet("GET /api/v1/models", Viewer, All),
    deed("POST /api/v1/devices/{device}/sources/{source}/mark", Labeller, Own),
    // What devices send to learn from. An admin may bring it for a device that cannot.
    device("POST /api/v1/samples", Admin),
    device("PATCH /api/v1/samples/{device}/{epoch}/{seq}/image", Admin),
    quiet("GET /api/v1/samples", Viewer, Own),
    quiet("GET /api/v1/samples/{id}", Viewer, Own),
    quiet("GET /api/v1/samples/{id}/image", Viewer, Own),
    deed("DELETE /api/v1/samples/{id}", Operator, Own),
    deed("PUT /api/v1/samples/{id}/holdout", Operator, Own),
    // What people say about it. Labels have a history of their own.
    quiet("GET /api/v1/tasks", Viewer, Any),
    deed("PUT /api/v1/tasks/{task}", Labeller, All),
    quiet("GET /api/v1/tasks/{task}/queue", Labeller, Own),
    quiet("POST /api/v1/samples/{id}/labels", Labeller, Own),
    quiet("DELETE /api/v1/samples/{id}/labels/last", Labeller, Own),
    quiet("GET /api/v1/tasks/{task}/export", Labeller, All),
    deed("POST /api/v1/tasks/{task}/import", Operator, All),
    // What is learnt.
    quiet("GET /api/v1/tasks/{task}/datasets", Viewer, All),
    deed("POST /api/v1/tasks/{task}/datasets", Operator, All),
    quiet("GET /api/v1/datasets/{digest}", Viewer, All),
    deed("POST /api/v1/tasks/{task}/train", Operator, All),
    quiet("GET /api/v1/jobs", Viewer, Any),
    quiet("GET /api/v1/jobs/{id}", Viewer, Any),
    deed("DELETE /api/v1/jobs/{id}", Operator, All),
    quiet("GET /api/v1/catalog", Viewer, Any),
    deed("POST /api/v1/catalog", Operator, All),
    quiet("GET /api/v1/catalog/{model}", Viewer, Any),
    quiet("GET /api/v1/catalog/{model}/confusion.svg", Viewer, Any),
    // Computing on what is sent: nothing is kept.
    quiet("POST /api/v1/models/{call}", Labeller, Any),
    quiet("POST /api/v1/features", Labeller, Any),
    quiet("POST /api/v1/train", Operator, Any),
    // The same for devices, about frames that they are unsure of.
    device("GET /api/v1/offload", Labeller),
    device("POST /api/v1/offload/{sha256}", Labeller),
    // How models and settings come to the devices.
    quiet("GET /api/v1/releases", Viewer, Any),
    deed("POST /api/v1/releases", Operator, All),
    quiet("GET /api/v1/rollouts", Viewer, All),
    deed("POST /api/v1/rollouts", Operator, All),
    quiet("GET /api/v1/rollouts/{id}", Viewer, All),
    deed("POST /api/v1/rollouts/{id}", Operator, All),
    deed("PUT /api/v1/devices/{site}/{device}/pin", Operator, Own),
    quiet("GET /api/v1/quarantine", Viewer, Own),
    deed("PUT /api/v1/devices/{site}/{device}/quarantine", Operator, Own),
    deed("DELETE /api/v1/devices/{site}/{device}/quarantine", Operator, Own),
    quiet("GET /api/v1/erasures", Operator, All),
    deed("POST /api/v1/erasures", Operator, All),
    quiet("GET /api/v1/erasures/{id}", Operator, All),
    quiet("GET /api/v1/settings", Viewer, All),
    deed("PUT /api/v1/settings", Operator, All),
    deed("DELETE /api/v1/settings", Operator, All),
    device("GET /api/v1/chunks/{sha256}", Viewer),
    device("GET /api/v1/deltas/{from}/{to}", Viewer),
    device("GET /api/v1/tuf/metadata/{file}", Viewer),
    device("GET /api/v1/tuf/targets/{top}/{name}/{file}", Viewer),
];

/// The table, to look things up in.
#[derive(Debug)]
pub(super) struct Table(HashMap<&'static str, Vec<(&'static str, &'static Rule)>>);

/// What the table says about a request.
#[derive(Debug)]
pub(super) enum Found {
    /// This.
    Rule(&'static Rule),
    /// The path does other things, these.
    Methods(String),
    /// Nothing: it was forgotten, and is refused.
    Undeclared,
}

impl Table {
    pub(super) fn new() -> Self {
        let mut paths: HashMap<_, Vec<_>> = HashMap::new();
        for rule in TABLE {
            if let Some((method, path)) = rule.operation.split_once(' ') {
                paths.entry(path).or_default().push((method, rule));
            }
        }
        Self(paths)
    }

    /// The rule for a method and the pattern of a path.
    pub(super) fn find(&self, method: &Method, path: &str) -> Found {
        let Some(rules) = self.0.get(path) else {
            return Found::Undeclared;
        };
        // What answers GET answers HEAD.
        let method = if method == Method::HEAD {
            "GET"
        } else {
            method.as_str()
        };
        match rules.iter().find(|(is, _)| *is == method) {
            Some((_, rule)) => Found::Rule(rule),
            None => {
                let all: Vec<_> = rules.iter().map(|(is, _)| *is).collect();
                Found::Methods(all.join(","))
            }
        }
    }
}

/// Why somebody may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum No {
    /// Nobody has said who asks.
    Who,
    /// Who asks may not.
    Forbidden(String),
}

impl Rule {
    pub(super) fn operation(&self) -> &'static str {
        self.operation
    }

    /// Whether this one may.
    pub(super) fn allows(
        &self,
        who: Option<&Principal>,
        loopback: bool,
        door: Door,
    ) -> Result<(), No> {
        let role = match (self.need, who) {
            (Need::Open, _) => return Ok(()),
            (Need::RoleOrLoopback(_), _) if loopback => return Ok(()),
            (Need::DeviceOrRole(_), Some(Principal::Device { .. })) => return Ok(()),
            // Where nothing is encrypted no certificate can be shown: that is on loopback only, by choice.
            (Need::DeviceOrRole(_), None) if !door.tls => return Ok(()),
            (_, None) => return Err(No::Who),
            (Need::DeviceOrRole(role) | Need::Role(role) | Need::RoleOrLoopback(role), _) => role,
        };
        let is = who.and_then(Principal::role);
        if is.is_none_or(|is| is < role) {
            return Err(No::Forbidden(format!("only {role}s may do this")));
        }
        if self.reach == Reach::All && who.is_some_and(|who| who.site().is_some()) {
            let why = "this is about all sites, and you may see one";
            return Err(No::Forbidden(why.to_owned()));
        }
        Ok(())
    }

    /// For the description: who may.
    fn role(&self) -> String {
        match self.need {
            Need::Open => "open".to_owned(),
            Need::DeviceOrRole(role) => format!("device or {role}"),
            Need::Role(role) => role.to_string(),
            Need::RoleOrLoopback(role) => format!("{role} or loopback"),
        }
    }

    fn security(&self) -> Vec<Requirement> {
        let scheme = |name: &str| Requirement::new::<_, [&str; 0], &str>(name, []);
        let people = [scheme("session"), scheme("token")];
        match self.need {
            Need::Open => Vec::new(),
            Need::DeviceOrRole(_) => [vec![scheme("certificate")], people.to_vec()].concat(),
            Need::Role(_) => people.to_vec(),
            // Nothing at all will do on the same machine.
            Need::RoleOrLoopback(_) => [people.to_vec(), vec![Requirement::default()]].concat(),
        }
    }
}

fn complete(table: &Table, method: Method, path: &str, operation: Option<&mut Operation>) {
    let Some(operation) = operation else { return };
    let (role, sites, security): (Value, Value, _) = match table.find(&method, path) {
        Found::Rule(rule) => {
            let sites = match rule.reach {
                Reach::Any => "any",
                Reach::Own => "own",
                Reach::All => "all",
            };
            (json!(rule.role()), json!(sites), rule.security())
        }
        _ => (Value::Null, Value::Null, Vec::new()),
    };
    operation.security = Some(security);
    let said = operation.extensions.get_or_insert_with(Extensions::default);
    said.insert("x-role".to_owned(), role);
    said.insert("x-sites".to_owned(), sites);
}

/// Completes the description of the API: who may use what (`x-role`; null is nobody), what those may who may only see
/// one site (`x-sites`: `any`, `own`, or `all` for nothing), and what has to be shown.
pub(super) fn describe(description: &mut OpenApi) {
    let table = Table::new();
    for (path, item) in &mut description.paths.paths {
        for (method, operation) in [
            (Method::GET, &mut item.get),
            (Method::PUT, &mut item.put),
            (Method::POST, &mut item.post),
            (Method::DELETE, &mut item.delete),
            (Method::PATCH, &mut item.patch),
        ] {
            complete(&table, method, path, operation.as_mut());
        }
    }
    let components = description.components.get_or_insert_default();
    let cookie = ApiKeyValue::with_description(
        "__Host-lacewing",
        "What `login` sets; `lacewing` where the coordinator is served without TLS on loopback. What changes \
         something needs an Origin of the coordinator's own, too.",
    );
    let mut token = Http::new(HttpAuthScheme::Bearer);
    token.bearer_format = Some("JWT".to_owned());
    let certificate = SecurityScheme::MutualTls {
        description: Some("The certificate of a device.".to_owned()),
        deprecated: None,
        extensions: None,
    };
    for (name, scheme) in [
        ("session", SecurityScheme::ApiKey(ApiKey::Cookie(cookie))),
        ("token", SecurityScheme::Http(token)),
        ("certificate", certificate),
    ] {
        components
            .security_schemes
            .insert(name.to_owned(), scheme.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_operation_stands_twice_and_each_can_be_read() {
        let mut seen = std::collections::BTreeSet::new();
        for rule in TABLE {
            assert!(seen.insert(rule.operation), "{}", rule.operation);
            let (method, path) = rule.operation.split_once(' ').unwrap();
            assert!(["GET", "PUT", "POST", "DELETE", "PATCH"].contains(&method));
            assert!(path.starts_with('/'), "{path}");
        }
    }

    #[test]
    fn each_role_may_what_those_before_it_may_and_devices_have_none() {
        let user = |role, site: Option<&str>| Principal::User {
            name: "u".into(),
            role,
            site: site.map(|site| site.parse().unwrap()),
        };
        let device = Principal::Device {
            site: "s".parse().unwrap(),
            device: "d".parse().unwrap(),
        };
        let roles = [Viewer, Labeller, Operator, Admin];
        for rule in TABLE {
            let may = |who: Option<&Principal>| rule.allows(who, false, Door { tls: true });
            for (lower, higher) in roles.iter().zip(&roles[1..]) {
                if may(Some(&user(*lower, None))).is_ok() {
                    assert!(
                        may(Some(&user(*higher, None))).is_ok(),
                        "{}",
                        rule.operation
                    );
                }
            }
            if let Need::Role(_) | Need::RoleOrLoopback(_) = rule.need {
                assert_eq!(may(None), Err(No::Who), "{}", rule.operation);
                assert!(matches!(may(Some(&device)), Err(No::Forbidden(_))));
            }
            if rule.reach == All {
                assert!(
                    may(Some(&user(Admin, Some("s")))).is_err(),
                    "{}",
                    rule.operation
                );
            }
        }
    }

    #[test]
    fn what_is_not_declared_is_not_found() {
        let table = Table::new();
        assert!(matches!(
            table.find(&Method::GET, "/api/v1/secrets"),
            Found::Undeclared
        ));
        assert!(matches!(
            table.find(&Method::HEAD, "/healthz"),
            Found::Rule(_)
        ));
        let Found::Methods(methods) = table.find(&Method::POST, "/api/v1/devices") else {
            panic!();
        };
        assert_eq!(methods, "GET");
    }
}

//! RabbitMQ: definitions with a user for everybody, whose topics are matched by expressions. A topic's levels are parted by dots
//! there, and so are a binding's, in which wildcards stand as they are: an expression that asks for what is written out is not
//! matched by them.

use serde_json::{Value, json};

use super::{CA, CERTIFICATE, Facts, HEAD, KEY, beginnings, below, kinds_of_a_device, of_site_of};
use crate::trust::subscribers::Sites;

/// What a name looks like.
const NAME: &str = "(_|[a-z0-9][a-z0-9_-]*)";
/// Nothing.
const NOTHING: &str = "^$";

pub(super) fn files(facts: &Facts) -> Vec<(&'static str, String)> {
    let text = serde_json::to_string_pretty(&definitions(facts)).unwrap_or_default();
    vec![
        ("lacewing.conf", configuration(facts)),
        ("definitions.json", text + "\n"),
    ]
}

fn configuration(facts: &Facts) -> String {
    let bind = facts.bind.as_deref().unwrap_or("::");
    format!(
        "# {HEAD}\n\
         # Needs the plugins rabbitmq_mqtt and rabbitmq_auth_mechanism_ssl.\n\
         mqtt.listeners.tcp = none\n\
         mqtt.listeners.ssl.1 = {bind}:{port}\n\
         mqtt.allow_anonymous = false\n\
         mqtt.ssl_cert_login = true\n\
         ssl_cert_login_from = common_name\n\
         ssl_options.cacertfile = {ca}\n\
         ssl_options.certfile = {certificate}\n\
         ssl_options.keyfile = {key}\n\
         ssl_options.versions.1 = tlsv1.3\n\
         # Who shows a certificate has to show a good one; who shows none needs a password.\n\
         ssl_options.verify = verify_peer\n\
         ssl_options.fail_if_no_peer_cert = false\n\
         load_definitions = {definitions}\n",
        port = facts.port,
        ca = facts.at(CA),
        certificate = facts.at(CERTIFICATE),
        key = facts.at(KEY),
        definitions = facts.at("definitions.json"),
    )
}

/// The text as an expression that matches nothing but it, with dots where a topic has slashes.
fn exactly(topic: &str) -> String {
    // Names and kinds have no letter that an expression reads otherwise, but for the dots that come from the slashes.
    topic.replace('/', r"\.")
}

fn any_of(kinds: impl Iterator<Item = mesh_core::Kind>) -> String {
    kinds.map(|k| k.as_str()).collect::<Vec<_>>().join("|")
}

/// What matches the kinds below a beginning of two names: of any device, or of one.
fn kinds(beginning: &str, kinds: impl Iterator<Item = mesh_core::Kind>) -> String {
    format!("^{beginning}{NAME}\\.({})$", any_of(kinds))
}

fn of_subscriber(sites: &Sites) -> String {
    let all = beginnings(sites);
    let all: Vec<String> = all
        .iter()
        .map(|beginning| match sites {
            // A root alone is a first level, too.
            Sites::All => format!("{}(\\..*)?", beginning.trim_end_matches('/')),
            Sites::Some(_) => format!("{}.+", exactly(beginning)),
        })
        .collect();
    match all.as_slice() {
        [one] => format!("^{one}$"),
        some => format!("^({})$", some.join("|")),
    }
}

fn definitions(facts: &Facts) -> Value {
    let anybody = exactly(&below("")).trim_end_matches(r"\.").to_owned();
    // The coordinator's subscriptions have wildcards in them, which its expression has to take.
    let (reads, _) = Facts::of_coordinator();
    let reads: Vec<String> = reads
        .iter()
        .map(|filter| exactly(filter).replace('+', r"[^.]+"))
        .collect();
    let coordinator = (
        facts.coordinator.clone(),
        kinds(
            &format!(r"{anybody}\.{NAME}\.{NAME}\."),
            super::kinds_of_the_coordinator(),
        ),
        format!("^({})$", reads.join("|")),
    );
    let devices = facts.devices.iter().map(|device| {
        let own = exactly(&below(device));
        (device.clone(), kinds(&own, kinds_of_a_device()), {
            let of_site = of_site_of(device);
            let of_site = of_site.iter().map(|topic| format!("|{}", exactly(topic)));
            format!("^({own}.+{})$", of_site.collect::<String>())
        })
    });
    let subscribers = facts
        .subscribers
        .iter()
        .map(|(name, sites)| (name.to_string(), NOTHING.to_owned(), of_subscriber(sites)));
    let (mut users, mut permissions, mut topics) = (Vec::new(), Vec::new(), Vec::new());
    for (user, write, read) in std::iter::once(coordinator)
        .chain(devices)
        .chain(subscribers)
    {
        users.push(json!({"name": user, "password_hash": "", "tags": []}));
        // Its own queue, and the exchange that everything goes through.
        let own = "^(mqtt-subscription-.*|mqtt-will-.*)$";
        let used = "^(mqtt-subscription-.*|mqtt-will-.*|amq\\.topic)$";
        permissions.push(json!({
            "user": user, "vhost": "/", "configure": own, "write": used, "read": used,
        }));
        topics.push(json!({
            "user": user, "vhost": "/", "exchange": "amq.topic", "write": write, "read": read,
        }));
    }
    json!({
        "vhosts": [{"name": "/"}],
        "users": users,
        "permissions": permissions,
        "topic_permissions": topics,
    })
}

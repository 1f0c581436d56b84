//! NATS: everybody is a user of the configuration, which is read again without a restart; who is not in it any more is cut.

use super::{CA, CERTIFICATE, Facts, HEAD, KEY, beginnings, below, kinds_of_a_device, of_site_of};

/// What NATS itself needs for a subscription at QoS 1.
const OWN: &str = "$MQTT.sub.>";

pub(super) fn files(facts: &Facts) -> Vec<(&'static str, String)> {
    vec![("lacewing.conf", configuration(facts))]
}

/// A filter as NATS writes it.
fn subject(filter: &str) -> String {
    filter.replace('/', ".").replace('+', "*").replace('#', ">")
}

fn list(filters: impl IntoIterator<Item = String>) -> String {
    let quoted: Vec<String> = filters
        .into_iter()
        .map(|filter| format!("{:?}", subject(&filter)))
        .collect();
    quoted.join(", ")
}

fn user(who: &str, publish: &str, subscribe: &str) -> String {
    let publish = match publish {
        "" => "deny: [\">\"]".to_owned(),
        some => format!("allow: [{some}]"),
    };
    format!(
        "    {{ {who}, permissions: {{ publish: {{ {publish} }}, subscribe: {{ allow: [{subscribe}] }} }} }}\n"
    )
}

/// The environment variable with a password: in the file there is none.
fn variable(name: &str) -> String {
    format!(
        "$LACEWING_SUBSCRIBER_{}",
        name.to_uppercase().replace('-', "_")
    )
}

fn configuration(facts: &Facts) -> String {
    let (reads, writes) = Facts::of_coordinator();
    let mut users = user(
        &format!("user: {:?}", format!("CN={}", facts.coordinator)),
        &list(writes),
        &list(reads.into_iter().chain([OWN.into()])),
    );
    for device in &facts.devices {
        let own = below(device);
        let writes = kinds_of_a_device().map(|kind| format!("{own}+/{}", kind.as_str()));
        users += &user(
            &format!("user: {:?}", format!("CN={device}")),
            &list(writes),
            &list(
                [format!("{own}#")]
                    .into_iter()
                    .chain(of_site_of(device))
                    .chain([OWN.into()]),
            ),
        );
    }
    for (name, sites) in &facts.subscribers {
        let reads = beginnings(sites).into_iter().map(|b| format!("{b}#"));
        users += &user(
            &format!(
                "user: {:?}, password: {}",
                name.as_str(),
                variable(name.as_str())
            ),
            "",
            &list(reads),
        );
    }
    let (ca, certificate, key) = (facts.at(CA), facts.at(CERTIFICATE), facts.at(KEY));
    let bind = facts.bind.as_deref().unwrap_or("0.0.0.0");
    format!(
        "# {HEAD}\n\
         server_name: lacewing\n\
         jetstream {{}}\n\
         # Who only listens speaks NATS, with a name and a password: its MQTT door wants a certificate from everybody.\n\
         listen: {:?}\n\
         tls {{ cert_file: {certificate:?}, key_file: {key:?} }}\n\
         mqtt {{\n  \
           listen: {:?}\n  \
           tls {{ cert_file: {certificate:?}, key_file: {key:?}, ca_file: {ca:?}, verify_and_map: true }}\n\
         }}\n\
         authorization {{\n  \
           users: [\n{users}  ]\n\
         }}\n",
        format!("{bind}:4222"),
        format!("{bind}:{}", facts.port),
    )
}

//! Mosquitto: one listener for certificates, one for passwords. The name in a device's certificate, `<site>/<device>`, is two
//! levels of its topics, so that one pattern is right for all devices. Only what its site is told has to be written for each,
//! and a device that comes in works before that.

use super::{
    CA, CERTIFICATE, CRL, Facts, HEAD, KEY, PASSWORDS, beginnings, below, kinds_of_a_device,
    of_site_of,
};

/// The contract's largest payload in bytes.
const MAX_PAYLOAD: usize = 512 * 1024;

pub(super) fn files(facts: &Facts) -> Vec<(&'static str, String)> {
    vec![
        ("lacewing.conf", configuration(facts)),
        ("devices.acl", devices(facts)),
        ("subscribers.acl", subscribers(facts)),
    ]
}

fn configuration(facts: &Facts) -> String {
    let bind = facts.bind.as_deref().unwrap_or_default();
    let shown = format!(
        "certfile {}\nkeyfile {}\ntls_version tlsv1.3\nallow_anonymous false\n\
         # The client id says nothing, the name decides: nobody can take another's place.\n\
         use_username_as_clientid true\n",
        facts.at(CERTIFICATE),
        facts.at(KEY)
    );
    format!(
        "# {HEAD}\n\
         per_listener_settings true\n\
         message_size_limit {MAX_PAYLOAD}\n\
         set_tcp_nodelay true\n\
         \n\
         # Devices and the coordinator: who somebody is, the certificate says.\n\
         listener {port} {bind}\n\
         cafile {ca}\n\
         crlfile {crl}\n\
         require_certificate true\n\
         use_identity_as_username true\n\
         acl_file {devices}\n\
         {shown}\
         \n\
         # Who only listens: a name and a password.\n\
         listener {second} {bind}\n\
         password_file {passwords}\n\
         acl_file {subscribers}\n\
         {shown}",
        port = facts.port,
        ca = facts.at(CA),
        crl = facts.at(CRL),
        devices = facts.at("devices.acl"),
        second = facts.port_above(1),
        passwords = facts.at(PASSWORDS),
        subscribers = facts.at("subscribers.acl"),
    )
}

/// The coordinator's part: on the listener that it comes in by.
fn coordinator(facts: &Facts) -> String {
    let (reads, writes) = Facts::of_coordinator();
    let mut text = format!("user {}\n", facts.coordinator);
    for filter in reads {
        text += &format!("topic read {filter}\n");
    }
    for filter in writes {
        text += &format!("topic write {filter}\n");
    }
    text
}

fn devices(facts: &Facts) -> String {
    let mut text = format!("# {HEAD}\n");
    if !facts.by_password {
        text += &coordinator(facts);
    }
    let own = below("%u");
    text += &format!("pattern read {own}#\n");
    for kind in kinds_of_a_device() {
        text += &format!("pattern write {own}+/{}\n", kind.as_str());
    }
    for device in &facts.devices {
        text += &format!("user {device}\n");
        for topic in of_site_of(device) {
            text += &format!("topic read {topic}\n");
        }
    }
    text
}

fn subscribers(facts: &Facts) -> String {
    let mut text = format!("# {HEAD}\n");
    if facts.by_password {
        text += &coordinator(facts);
    }
    for (name, sites) in &facts.subscribers {
        text += &format!("user {name}\n");
        for beginning in beginnings(sites) {
            text += &format!("topic read {beginning}#\n");
        }
    }
    text
}

//! Packets of MQTT, and what is decided from them alone: for `fuzz/targets.rs`.

use bytes::BytesMut;
use mesh_core::Name;
use rumqttc::Packet;

use super::{rights::Role, session::MAX_PAYLOAD, trie::Filters};
use crate::trust::subscribers::Sites;

/// What a client says, packet by packet.
pub fn packets(bytes: &[u8]) {
    let (Ok(site), Ok(device)) = ("demo".parse::<Name>(), "d1".parse()) else {
        return;
    };
    let device = Role::Device { site, device };
    let viewer = Role::Viewer { sites: Sites::All };
    let mut buffer = BytesMut::from(bytes);
    let mut filters = Filters::default();
    while let Ok(packet) = Packet::read(&mut buffer, MAX_PAYLOAD) {
        match &packet {
            Packet::Publish(publish) => {
                if let Ok(topic) = std::str::from_utf8(&publish.topic) {
                    assert!(viewer.may_publish(topic).is_none());
                    if let Some(parsed) = device.may_publish(topic) {
                        assert_eq!(parsed.to_string(), topic);
                    }
                    filters.matching(topic, &mut |_, ()| {});
                }
            }
            Packet::Subscribe(subscribe) => {
                for filter in &subscribe.filters {
                    let may = viewer.may_subscribe(&filter.path);
                    assert!(may || !device.may_subscribe(&filter.path));
                    if may {
                        filters.insert(&filter.path, 1, ());
                    }
                }
            }
            Packet::Unsubscribe(unsubscribe) => {
                for filter in &unsubscribe.topics {
                    filters.remove(filter, 1);
                }
            }
            _ => {}
        }
        let mut written = BytesMut::new();
        if packet.write(&mut written, MAX_PAYLOAD).is_ok() {
            assert_eq!(Packet::read(&mut written, MAX_PAYLOAD).ok(), Some(packet));
        }
    }
}

//! Who a connection is: a device by its certificate, a subscriber by its password, or nobody.

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use rumqttc::{Connect, ConnectAuth, ConnectReturnCode};
use tokio_util::sync::CancellationToken;

use super::{rights::Role, router::Will};
use crate::trust::{
    Identity,
    active::Peer,
    subscribers::{Sites, Wrong},
    tls::Door,
};

/// Why somebody does not get in.
pub(super) type Refusal = (ConnectReturnCode, &'static str);

/// What lets clients in.
pub(crate) enum Gate {
    /// TLS: certificates and passwords.
    Shut {
        door: Arc<Door>,
        identity: Arc<Identity>,
    },
    /// Plain text on loopback: everybody is who its client id says.
    Open,
}

/// A client that may come in.
pub(super) struct Admitted {
    /// Under which it is known to the router: a new one of the same takes the place of the old one.
    pub(super) id: String,
    pub(super) role: Role,
    pub(super) will: Option<Will>,
    /// Ends the session when the device is revoked or the subscriber removed.
    pub(super) cut: Option<CancellationToken>,
    /// The subscriber, whose sessions are counted.
    pub(super) subscriber: Option<String>,
}

impl Gate {
    pub(crate) fn new(identity: Arc<Identity>) -> Self {
        // No ALPN: MQTT clients know none, and the port says what is spoken.
        match identity.shown.as_ref().map(|shown| shown.door(&[])) {
            Some(door) => Self::Shut { door, identity },
            None => Self::Open,
        }
    }

    /// The door, if there is one.
    pub(super) fn door(&self) -> Option<&Door> {
        match self {
            Self::Shut { door, .. } => Some(door),
            Self::Open => None,
        }
    }

    /// Says yes or no to a CONNECT from this network, of one who showed the certificate of `peer`, or none.
    pub(super) async fn admit(
        &self,
        network: IpAddr,
        peer: Option<Peer>,
        connect: &Connect,
    ) -> Result<Admitted, Refusal> {
        let client = client_id(connect)?;
        let (id, role, cut, subscriber) = match (self, peer) {
            (Self::Open, _) => {
                let role = Role::of_client_id(&client);
                (client, role, None, None)
            }
            // The certificate decides; what the client calls itself says nothing.
            (Self::Shut { .. }, Some(peer)) => {
                let (site, device) = (peer.device.site, peer.device.device);
                let id = format!("{site}/{device}");
                (id, Role::Device { site, device }, Some(peer.cut), None)
            }
            (Self::Shut { identity, .. }, None) => {
                let ConnectAuth::UsernamePassword { username, password } = &connect.auth else {
                    let reason = "neither a certificate nor a name and a password";
                    return Err((ConnectReturnCode::NotAuthorized, reason));
                };
                let found = identity
                    .subscribers
                    .check(network, username, password)
                    .await;
                let found = found.map_err(|wrong| match wrong {
                    Wrong::Password => {
                        let code = ConnectReturnCode::BadUserNamePassword;
                        (code, "a wrong name or password")
                    }
                    Wrong::Busy => {
                        let code = ConnectReturnCode::ServiceUnavailable;
                        (code, "too many passwords to check")
                    }
                    Wrong::TooOften => {
                        let code = ConnectReturnCode::ServiceUnavailable;
                        (code, "too many passwords from one address")
                    }
                })?;
                // No device has a colon in its name, and no subscriber the client ids of another.
                let id = format!("{}:{client}", found.name);
                let role = Role::Viewer { sites: found.sites };
                (id, role, Some(found.cut), Some(found.name.to_string()))
            }
        };
        let will = will(&role, connect)?;
        Ok(Admitted {
            id,
            role,
            will,
            cut,
            subscriber,
        })
    }
}

/// Ids are for people and logs; longer ones are a mistake. Two names and a slash fit.
const MAX_CLIENT_ID: usize = 128;

fn client_id(connect: &Connect) -> Result<String, Refusal> {
    let id = &connect.client_id;
    let refused = |reason| Err((ConnectReturnCode::BadClientId, reason));
    if id.is_empty() {
        if !connect.clean_session {
            return refused("a session without a client id");
        }
        return Ok(format!("viewer-{:016x}", crate::clock::random()));
    }
    if id.len() > MAX_CLIENT_ID {
        return refused("client id longer than 128 bytes");
    }
    if id.contains(['#', '+']) || id.chars().any(char::is_control) {
        return refused("client id with a wildcard or a control character");
    }
    Ok(id.clone())
}

/// The last will, if the client may have it.
fn will(role: &Role, connect: &Connect) -> Result<Option<Will>, Refusal> {
    let Some(will) = &connect.last_will else {
        return Ok(None);
    };
    let topic = role.may_will(&will.topic).ok_or((
        ConnectReturnCode::NotAuthorized,
        "the last will is not on the client's own status",
    ))?;
    Ok(Some(Will {
        topic,
        payload: Bytes::copy_from_slice(&will.message),
        qos: will.qos,
        retain: will.retain,
    }))
}

impl Role {
    /// What a client is by what it says, where everybody is believed.
    fn of_client_id(id: &str) -> Self {
        let device = id.split_once('/').and_then(|(site, device)| {
            let (site, device): (mesh_core::Name, mesh_core::Name) =
                (site.parse().ok()?, device.parse().ok()?);
            let own = mesh_core::Name::itself();
            (site != own && device != own).then_some(Self::Device { site, device })
        });
        device.unwrap_or(Self::Viewer { sites: Sites::All })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn admit(id: &str) -> Result<Role, Refusal> {
        let admitted = Gate::Open
            .admit([127, 0, 0, 1].into(), None, &Connect::new(id))
            .await;
        admitted.map(|a| a.role)
    }

    #[tokio::test]
    async fn ids() {
        assert!(matches!(admit("demo/d1").await, Ok(Role::Device { .. })));
        for viewer in [
            "mosq-123", "a/b/c", "demo/", "/d1", "demo/_", "Demo/d1", "_/_", "",
        ] {
            let role = admit(viewer).await;
            assert_eq!(role, Ok(Role::Viewer { sites: Sites::All }), "{viewer}");
        }
        for refused in ["#", "+", "demo/+", "a#", "a\u{7}b", &"x".repeat(129)] {
            assert!(admit(refused).await.is_err(), "{refused:?}");
        }
    }
}

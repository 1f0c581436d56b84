//! Whom this device speaks with: the newest roster that its coordinator has signed, from whoever brought it.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use mesh_core::{
    Name,
    roster::{MAX_ROSTER_BYTES, Peer, Roster, RosterError},
};
use tokio::sync::watch;

use super::meeting::MeetingPlace;
use crate::{
    identity::{Tls, TrustedTime},
    update::disk::{read_bounded, replace},
};

const FILE: &str = "roster.jwt";
/// What the coordinator writes into a roster's header: nothing else that it signs is one.
const TYP: &str = "lacewing-roster";

/// A roster whose signature is good.
#[derive(Clone, Debug)]
pub(crate) struct Accepted {
    pub(crate) roster: Roster,
    /// As it was signed, to be handed on.
    pub(crate) signed: Arc<str>,
    names: HashMap<Peer, Name>,
}

impl Accepted {
    pub(crate) fn has(&self, peer: &Peer) -> bool {
        self.names.contains_key(peer)
    }

    pub(crate) fn name(&self, peer: &Peer) -> Option<&Name> {
        self.names.get(peer)
    }

    pub(crate) fn members(&self) -> BTreeSet<Peer> {
        self.names.keys().copied().collect()
    }
}

/// Why a text is not taken as the roster.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("it has {0} bytes, more than any roster")]
    TooLarge(usize),
    #[error("the device has no certificate yet, and knows no coordinator")]
    NoAuthority,
    #[error("it is not signed by this device's coordinator: {0}")]
    Signature(String),
    #[error(transparent)]
    Content(#[from] RosterError),
}

/// The newest roster, kept on the disk.
#[derive(Clone, Debug)]
pub(crate) struct Rosters {
    folder: PathBuf,
    site: Name,
    tls: Tls,
    time: Arc<TrustedTime>,
    tell: Arc<watch::Sender<Option<Arc<Accepted>>>>,
    /// One at a time: it may come from the broker and from neighbours.
    turn: Arc<Mutex<()>>,
    meeting: MeetingPlace,
}

impl Rosters {
    /// Reads what is on the disk in `data`; one that does not hold any more is no roster.
    pub(crate) fn open(data: &Path, site: Name, tls: Tls, time: Arc<TrustedTime>) -> Self {
        let rosters = Self {
            folder: data.join("mesh"),
            site,
            tls,
            time,
            tell: Arc::new(watch::channel(None).0),
            turn: Arc::default(),
            meeting: MeetingPlace::default(),
        };
        let path = rosters.folder.join(FILE);
        match read_bounded(&path, MAX_ROSTER_BYTES as u64) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                if let Err(why) = rosters.accept(&text) {
                    tracing::warn!("the roster {} is not used: {why}", path.display());
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("the roster {}: {error}", path.display()),
        }
        rosters
    }

    /// One that nobody has signed.
    #[cfg(test)]
    pub(super) fn of_test(peers: &[Peer]) -> Self {
        use mesh_core::{VERSION, roster::Member};

        let name = |n: usize| format!("d{}", n + 1).parse::<Name>().unwrap();
        let members = peers.iter().enumerate().map(|(n, peer)| Member {
            device: name(n),
            peer: *peer,
        });
        let roster = Roster {
            v: VERSION,
            site: name(0),
            version: 1,
            iat: 0,
            exp: i64::MAX,
            members: members.collect(),
        };
        let names = roster.members.iter();
        let names = names.map(|m| (m.peer, m.device.clone())).collect();
        let accepted = Accepted {
            roster,
            signed: "".into(),
            names,
        };
        let wall = crate::clock::WallClock::system();
        Self {
            folder: PathBuf::new(),
            site: name(0),
            tls: Tls::none(),
            time: Arc::new(TrustedTime::new(wall, 0)),
            tell: Arc::new(watch::channel(Some(Arc::new(accepted))).0),
            turn: Arc::default(),
            meeting: MeetingPlace::default(),
        }
    }

    /// Takes its place, signed or not.
    #[cfg(test)]
    pub(super) fn replace(&self, with: Option<Arc<Accepted>>) {
        self.tell.send_replace(with);
    }

    /// By what rosters run out.
    pub(super) fn time(&self) -> &TrustedTime {
        &self.time
    }

    /// This is what its signed text is.
    #[cfg(test)]
    pub(super) fn sign_for_test(&self, signed: &str) {
        let accepted = self.newest().map(|accepted| Accepted {
            signed: signed.into(),
            ..Accepted::clone(&accepted)
        });
        self.replace(accepted.map(Arc::new));
    }

    /// Where those on it are to be found, by the same coordinator's word.
    pub(crate) const fn meeting(&self) -> &MeetingPlace {
        &self.meeting
    }

    /// The newest one, while it holds.
    pub(crate) fn current(&self) -> Option<Arc<Accepted>> {
        let now_ms = self.time.now_ms();
        let accepted = self.tell.borrow().clone();
        accepted.filter(|accepted| accepted.roster.holds(now_ms))
    }

    /// The newest one, even if it has run out: for people.
    pub(crate) fn newest(&self) -> Option<Arc<Accepted>> {
        self.tell.borrow().clone()
    }

    /// Tells of each new one.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Arc<Accepted>>> {
        self.tell.subscribe()
    }

    /// May this peer speak with the device now?
    pub(crate) fn admits(&self, peer: &Peer) -> bool {
        self.current().is_some_and(|roster| roster.has(peer))
    }

    /// Somebody brought a roster. It is on the disk before it counts: a device that was told whom not to trust any more
    /// does not forget it. True if it is new.
    pub(crate) fn offer(&self, text: &str) -> Result<bool, Refused> {
        match self.accept(text) {
            Ok(()) => {}
            Err(Refused::Content(RosterError::Old(_))) => return Ok(false),
            Err(why) => return Err(why),
        }
        let kept = std::fs::create_dir_all(&self.folder)
            .map_err(|error| error.to_string())
            .and_then(|()| {
                replace(&self.folder, FILE, text.as_bytes()).map_err(|error| error.to_string())
            });
        if let Err(why) = kept {
            tracing::warn!("the new roster counts, but is not kept: {why}");
        }
        Ok(true)
    }

    fn accept(&self, text: &str) -> Result<(), Refused> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if text.len() > MAX_ROSTER_BYTES {
            return Err(Refused::TooLarge(text.len()));
        }
        let material = self.tls.material().ok_or(Refused::NoAuthority)?;
        let roster = verify(text, &material.authority)?;
        let known = self
            .tell
            .borrow()
            .as_ref()
            .map(|known| known.roster.version);
        roster.check(&self.site, known, self.time.now_ms())?;
        let members = roster.members.iter();
        let names = members.map(|m| (m.peer, m.device.clone())).collect();
        tracing::info!(
            version = roster.version,
            devices = roster.members.len(),
            "the site's roster"
        );
        self.tell.send_replace(Some(Arc::new(Accepted {
            roster,
            signed: text.into(),
            names,
        })));
        Ok(())
    }
}

/// Verifies the signature of a roster against the authority's public key, an uncompressed point.
fn verify(text: &str, authority: &[u8]) -> Result<Roster, Refused> {
    let wrong = |error: jsonwebtoken::errors::Error| Refused::Signature(error.to_string());
    let header = jsonwebtoken::decode_header(text).map_err(wrong)?;
    if header.typ.as_deref() != Some(TYP) {
        return Err(Refused::Signature("it is something else".into()));
    }
    let mut rules = Validation::new(Algorithm::ES256);
    // The library would read the wall clock: whether it holds is seen by the time that certificates go by.
    rules.validate_exp = false;
    rules.validate_aud = false;
    rules.set_required_spec_claims(&["exp"]);
    let key = DecodingKey::from_ec_der(authority);
    let data = jsonwebtoken::decode::<Roster>(text, &key, &rules).map_err(wrong)?;
    Ok(data.claims)
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{EncodingKey, Header};
    use mesh_core::{Digest, VERSION, roster::Member};
    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};

    use super::*;

    fn signed(key: &KeyPair, typ: &str, roster: &Roster) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.typ = Some(typ.into());
        let key = EncodingKey::from_ec_der(&key.serialize_der());
        jsonwebtoken::encode(&header, roster, &key).unwrap()
    }

    #[test]
    fn only_the_authority_signs_and_only_rosters() {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let other = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let roster = Roster {
            v: VERSION,
            site: "hall".parse().unwrap(),
            version: 3,
            iat: 0,
            exp: 100,
            members: vec![Member {
                device: "d1".parse().unwrap(),
                peer: Digest([7; 32]),
            }],
        };
        let point = key.der_bytes();
        let good = signed(&key, TYP, &roster);
        assert_eq!(verify(&good, point).unwrap(), roster);
        assert!(verify(&signed(&other, TYP, &roster), point).is_err());
        assert!(verify(&signed(&key, "JWT", &roster), point).is_err());
        // Another algorithm, no signature, another body.
        let (head, rest) = good.split_once('.').unwrap();
        let (body, signature) = rest.split_once('.').unwrap();
        let more = Roster {
            version: 4,
            ..roster.clone()
        };
        let forged = signed(&other, TYP, &more);
        let other_body = forged.split('.').nth(1).unwrap();
        for bad in [
            format!("{head}.{other_body}.{signature}"),
            format!("{head}.{body}."),
            format!("eyJ0eXAiOiJsYWNld2luZy1yb3N0ZXIiLCJhbGciOiJub25lIn0.{body}."),
            format!("{head}.{body}"),
            String::new(),
            "x".repeat(5_000),
        ] {
            assert!(verify(&bad, point).is_err(), "{bad}");
        }
    }
}

//! May this device have a certificate? Decided here and nowhere else: rows and `now` in, an outcome out.

use mesh_core::Name;

use super::csr::CsrError;

/// What the coordinator knows about an enrolment token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) jti: String,
    pub(crate) site: String,
    /// Only this device; any name if not given.
    pub(crate) device: Option<String>,
    pub(crate) quota: i64,
    pub(crate) used: i64,
    pub(crate) needs_approval: bool,
    pub(crate) revoked: bool,
    pub(crate) expires_ms: i64,
}

/// Where a device stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// A person has to say yes.
    Pending,
    /// It may come in.
    Active,
    /// It may never come in again with this key.
    Revoked,
}

impl State {
    /// As it is stored.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Revoked => "revoked",
        }
    }

    /// The reverse; what is not known is revoked.
    pub(crate) fn of(text: &str) -> Self {
        match text {
            "pending" => Self::Pending,
            "active" => Self::Active,
            _ => Self::Revoked,
        }
    }
}

/// Whose a key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) site: String,
    pub(crate) device: String,
    pub(crate) state: State,
}

/// What is asked, and what is known about it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case<'a> {
    pub(crate) site: &'a Name,
    pub(crate) device: &'a Name,
    pub(crate) token: Option<&'a Token>,
    /// Whose the key is, if it has been here before.
    pub(crate) key: Option<&'a Known>,
    /// Does another key have the name?
    pub(crate) name_taken: bool,
    /// Is there room for one more device?
    pub(crate) room: bool,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// A new device: one use of the token, and a certificate.
    Admit,
    /// A new device: one use of the token, and a person has to say yes.
    Ask,
    /// A device that is known, whose answer got lost: a certificate.
    Again,
    /// It was asked for already, and nobody has said yes yet.
    Wait,
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("this is not an enrolment token of this coordinator")]
    Forged,
    #[error("the token is not known here")]
    UnknownToken,
    #[error("the token was taken back")]
    TokenRevoked,
    #[error("the token has expired")]
    Expired,
    #[error("the token is used up")]
    UsedUp,
    #[error("the token is for another site")]
    OtherSite,
    #[error("the token is for another device")]
    OtherDevice,
    #[error("another key has this name; revoke it first if the device got a new one")]
    NameTaken,
    #[error("\"_\" is not the name of a site or a device")]
    NoName,
    #[error("this key was revoked; the device has to make a new one")]
    KeyRevoked,
    #[error("this key belongs to a device of another name")]
    KeyElsewhere,
    #[error("this key is not enrolled")]
    UnknownKey,
    #[error("nobody has approved this device yet")]
    NotApproved,
    #[error("there are as many devices as ingest.max_devices allows")]
    Full,
    #[error("this key has 128 certificates that have not run out; ask again when one has")]
    TooManyCertificates,
    #[error(transparent)]
    Csr(#[from] CsrError),
}

impl Refusal {
    /// For metrics and the audit log: one of a few words.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Forged => "forged",
            Self::UnknownToken => "unknown token",
            Self::TokenRevoked => "token revoked",
            Self::Expired => "token expired",
            Self::UsedUp => "token used up",
            Self::OtherSite => "other site",
            Self::OtherDevice => "other device",
            Self::NameTaken => "name taken",
            Self::NoName => "no name",
            Self::KeyRevoked => "key revoked",
            Self::KeyElsewhere => "key of another device",
            Self::UnknownKey => "unknown key",
            Self::NotApproved => "not approved",
            Self::Full => "full",
            Self::TooManyCertificates => "too many certificates",
            Self::Csr(_) => "signing request",
        }
    }
}

impl Refusal {
    /// Whether a token was shown that does not count, or not any more: somebody may have found it.
    pub(crate) const fn is_of_a_token(&self) -> bool {
        matches!(
            self,
            Self::Forged
                | Self::UnknownToken
                | Self::TokenRevoked
                | Self::Expired
                | Self::UsedUp
                | Self::OtherSite
                | Self::OtherDevice
        )
    }
}

/// Decides about one who shows a token.
pub(crate) fn decide(case: Case<'_>, now_ms: i64) -> Result<Outcome, Refusal> {
    let (site, device) = (case.site.as_str(), case.device.as_str());
    if site == "_" || device == "_" {
        return Err(Refusal::NoName);
    }
    let token = case.token.ok_or(Refusal::UnknownToken)?;
    if token.site != site {
        return Err(Refusal::OtherSite);
    }
    if token.device.as_deref().is_some_and(|only| only != device) {
        return Err(Refusal::OtherDevice);
    }
    // A key that is here already has had its use of a token. What it may do is what renewal lets it do: the token only
    // has to be one that could have brought it, and may have expired while a person thought about it.
    if let Some(known) = case.key {
        return match known.state {
            State::Revoked => Err(Refusal::KeyRevoked),
            _ if known.site != site || known.device != device => Err(Refusal::KeyElsewhere),
            State::Active => Ok(Outcome::Again),
            State::Pending => Ok(Outcome::Wait),
        };
    }
    if token.revoked {
        return Err(Refusal::TokenRevoked);
    }
    if token.expires_ms <= now_ms {
        return Err(Refusal::Expired);
    }
    if token.used >= token.quota {
        return Err(Refusal::UsedUp);
    }
    if case.name_taken {
        return Err(Refusal::NameTaken);
    }
    if !case.room {
        return Err(Refusal::Full);
    }
    Ok(if token.needs_approval {
        Outcome::Ask
    } else {
        Outcome::Admit
    })
}

/// Decides about one who shows a key that it says is known: whose is it?
pub(crate) fn renew(key: Option<&Known>) -> Result<(), Refusal> {
    match key.map(|known| known.state) {
        None => Err(Refusal::UnknownKey),
        Some(State::Revoked) => Err(Refusal::KeyRevoked),
        Some(State::Pending) => Err(Refusal::NotApproved),
        Some(State::Active) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_000;

    fn token() -> Token {
        Token {
            jti: "t".into(),
            site: "s".into(),
            device: None,
            quota: 1,
            used: 0,
            needs_approval: false,
            revoked: false,
            expires_ms: NOW + 1,
        }
    }

    fn known(device: &str, state: State) -> Known {
        Known {
            site: "s".into(),
            device: device.into(),
            state,
        }
    }

    fn ask(token: &Token, key: Option<Known>, name_taken: bool) -> Result<Outcome, Refusal> {
        let (site, device): (Name, Name) = ("s".parse().unwrap(), "d".parse().unwrap());
        let case = Case {
            site: &site,
            device: &device,
            token: Some(token),
            key: key.as_ref(),
            name_taken,
            room: true,
        };
        decide(case, NOW)
    }

    #[test]
    fn a_new_key_needs_a_token_that_fits() {
        let t = token;
        assert_eq!(ask(&t(), None, false), Ok(Outcome::Admit));
        let approval = Token {
            needs_approval: true,
            ..t()
        };
        assert_eq!(ask(&approval, None, false), Ok(Outcome::Ask));
        let cases = [
            (
                Token {
                    site: "x".into(),
                    ..t()
                },
                Refusal::OtherSite,
            ),
            (
                Token {
                    device: Some("x".into()),
                    ..t()
                },
                Refusal::OtherDevice,
            ),
            (
                Token {
                    revoked: true,
                    ..t()
                },
                Refusal::TokenRevoked,
            ),
            (
                Token {
                    expires_ms: NOW,
                    ..t()
                },
                Refusal::Expired,
            ),
            (Token { used: 1, ..t() }, Refusal::UsedUp),
        ];
        for (token, why) in cases {
            assert_eq!(ask(&token, None, false), Err(why));
        }
        assert_eq!(ask(&t(), None, true), Err(Refusal::NameTaken));
    }

    #[test]
    fn a_known_key_uses_nothing_up() {
        let spent = Token {
            used: 1,
            expires_ms: 0,
            ..token()
        };
        let with = |device, state| ask(&spent, Some(known(device, state)), false);
        assert_eq!(with("d", State::Active), Ok(Outcome::Again));
        assert_eq!(with("d", State::Pending), Ok(Outcome::Wait));
        assert_eq!(with("d", State::Revoked), Err(Refusal::KeyRevoked));
        assert_eq!(with("e", State::Active), Err(Refusal::KeyElsewhere));
        assert_eq!(with("e", State::Revoked), Err(Refusal::KeyRevoked));
    }

    #[test]
    fn only_an_active_key_renews() {
        assert_eq!(renew(Some(&known("d", State::Active))), Ok(()));
        assert_eq!(renew(None), Err(Refusal::UnknownKey));
        assert_eq!(
            renew(Some(&known("d", State::Revoked))),
            Err(Refusal::KeyRevoked)
        );
        assert_eq!(
            renew(Some(&known("d", State::Pending))),
            Err(Refusal::NotApproved)
        );
    }

    #[test]
    fn nobody_is_called_underscore_and_nothing_goes_without_a_token() {
        let (site, own): (Name, Name) = ("s".parse().unwrap(), Name::itself());
        let t = token();
        let case = Case {
            site: &site,
            device: &own,
            token: Some(&t),
            key: None,
            name_taken: false,
            room: true,
        };
        assert_eq!(decide(case, NOW), Err(Refusal::NoName));
        let device: Name = "d".parse().unwrap();
        let case = Case {
            device: &device,
            ..case
        };
        assert_eq!(
            decide(
                Case {
                    token: None,
                    ..case
                },
                NOW
            ),
            Err(Refusal::UnknownToken)
        );
        assert_eq!(
            decide(
                Case {
                    room: false,
                    ..case
                },
                NOW
            ),
            Err(Refusal::Full)
        );
    }
}

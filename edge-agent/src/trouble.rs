//! Why a connection cannot be made, in words that say what to do.

use std::{error::Error, fmt, io};

use rustls::{AlertDescription, CertificateError};

/// Who is on the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// The coordinator, over HTTPS.
    Coordinator,
    /// A broker, over TLS or in the clear.
    Broker {
        /// Over TLS.
        tls: bool,
    },
}

/// What to do about it, if it is one of the things that go wrong when somebody sets up a device.
fn hint(error: &(dyn Error + 'static), peer: Peer) -> Option<&'static str> {
    let is_broker = matches!(peer, Peer::Broker { .. });
    let Some(found) = inside::<rustls::Error>(error) else {
        return match peer {
            _ if !is_end(error) => None,
            Peer::Broker { tls: false } => Some(
                "it closes the connection: if it speaks TLS on this port, broker.url begins with mqtts://",
            ),
            _ => Some(
                "it closes the connection before TLS is set up: is this the right port, and does it take TLS 1.3?",
            ),
        };
    };
    use AlertDescription::{
        BadCertificate, CertificateExpired, CertificateRequired, CertificateRevoked, UnknownCA,
    };
    use CertificateError::{
        BadSignature, Expired, ExpiredContext, NotValidForName, NotValidForNameContext,
        NotValidYet, NotValidYetContext, UnknownIssuer,
    };
    let words = match found {
        rustls::Error::InvalidMessage(_) if is_broker => {
            "what answers there does not speak TLS: is it the port for TLS (usually 8883)? mqtt:// is for a broker in the \
             clear, on this device only"
        }
        rustls::Error::InvalidMessage(_) => {
            "what answers there does not speak TLS: is it the coordinator's port for HTTPS (usually 8443), and was the \
             coordinator started without --no-tls?"
        }
        rustls::Error::InvalidCertificate(UnknownIssuer | BadSignature) if is_broker => {
            "its certificate is of an authority that this device does not trust: give the broker a certificate of the \
             coordinator (`cloud-coordinator broker rules`), or set broker.ca to the file of the authority that signed it. \
             If it should be the coordinator's own, somebody may be in between"
        }
        rustls::Error::InvalidCertificate(UnknownIssuer | BadSignature) => {
            "its certificate is of another authority than the one that this device trusts: it is another coordinator, one \
             that was set up anew (then remove the device's identity folder and enrol it with a new token), or somebody in \
             between"
        }
        rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. }) => {
            "its certificate has expired: renew it there (a broker's with `cloud-coordinator broker rules`); or the device's \
             clock is ahead"
        }
        rustls::Error::InvalidCertificate(NotValidYet | NotValidYetContext { .. }) => {
            "its certificate is not valid yet: the device's clock is behind, or the other's was ahead"
        }
        rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }) => {
            "its certificate is for other names than the one in the address: use one of those, or add this one there \
             (tls.names of the coordinator, broker.url for a broker's certificate)"
        }
        rustls::Error::AlertReceived(CertificateRevoked) => {
            "it says that this device's certificate was revoked: the device has to enrol again, with a new key and a new token"
        }
        rustls::Error::AlertReceived(CertificateExpired) => {
            "it says that this device's certificate has expired: the running agent renews it at the coordinator"
        }
        rustls::Error::AlertReceived(UnknownCA | BadCertificate) => {
            "it does not know the authority of this device's certificate: a broker needs the coordinator's ca.pem"
        }
        rustls::Error::AlertReceived(CertificateRequired) => {
            "it wants a certificate, and the device shows none: leave broker.user out"
        }
        _ => return None,
    };
    Some(words)
}

/// The error in words: what to do first, and what the library says after it.
pub(crate) fn explain(error: &(dyn Error + 'static), peer: Peer) -> String {
    match hint(error, peer) {
        Some(hint) => format!("{hint} ({error})"),
        None => error.to_string(),
    }
}

/// An error that begins with what to do; what it came from is still in it.
#[derive(Debug)]
struct Explained {
    hint: &'static str,
    error: io::Error,
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.hint, self.error)
    }
}

impl Error for Explained {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.error)
    }
}

/// The same, of the coordinator, for those who hand the error on.
pub(crate) fn explained(error: io::Error) -> io::Error {
    match hint(&error, Peer::Coordinator) {
        Some(hint) => io::Error::new(error.kind(), Explained { hint, error }),
        None => error,
    }
}

/// An error of this type, however deep it lies.
pub(crate) fn inside<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        next = match error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
        {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}

fn is_end(error: &(dyn Error + 'static)) -> bool {
    inside::<io::Error>(error).is_some_and(|io| {
        matches!(
            io.kind(),
            io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_handed_on_can_still_be_found_out() {
        let inner = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let error = explained(io::Error::new(io::ErrorKind::InvalidData, inner));
        assert!(
            error
                .to_string()
                .starts_with("its certificate is of another authority")
        );
        assert!(crate::identity::is_about_certificates(&error));
        let refused = explained(io::ErrorKind::ConnectionRefused.into());
        assert_eq!(refused.to_string(), "connection refused");
    }
}

//! How a device comes in, and stays in.

use std::net::SocketAddr;

use axum::{
    Extension, Json,
    extract::{ConnectInfo, State as Shared},
    http::{HeaderMap, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use mesh_core::Name;
use serde::{Deserialize, Serialize};

use super::{Said, State, problem::Problem};
use crate::{
    clock,
    trust::{
        Issued, PeerDevice,
        devices::{DeviceError, Enrolled},
        identity::Asked,
    },
};

/// A token and a signing request.
pub(super) const MAX_ENROL: usize = 16 * 1024;
/// After this long a device asks again whether somebody has said yes.
const RETRY_S: u32 = 30;

impl From<DeviceError> for Problem {
    fn from(error: DeviceError) -> Self {
        let detail = error.to_string();
        match error {
            DeviceError::Refused(_) => Self::new(403, "Refused", detail),
            DeviceError::Invalid(_) => Self::invalid(detail),
            DeviceError::Missing(_) => Self::not_found(detail),
            DeviceError::TooMany(_) => Self::new(429, "Too many tokens", detail),
            DeviceError::Unproven => Self::new(401, "Prove it", detail),
            DeviceError::State(_) => Self::new(409, "Not now", detail),
            DeviceError::Records(error) => error.into(),
            DeviceError::Authority(_) => {
                tracing::error!(detail, "no certificate can be made");
                Self::new(
                    500,
                    "No certificate",
                    "no certificate can be made, see the log",
                )
            }
        }
    }
}

/// What a device sends to be taken in.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Enrol {
    /// The enrolment token.
    token: String,
    /// Its site.
    site: String,
    /// Its name.
    device: String,
    /// A signing request (PKCS#10) in PEM, with an ECDSA P-256 or Ed25519 key.
    csr: String,
}

/// A signing request.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Renew {
    /// In PEM, with the key that the device enrolled with.
    csr: String,
}

/// A certificate for a device.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Certified {
    /// The device's site.
    site: String,
    /// The device's name.
    device: String,
    /// The certificate, then the authority's, in PEM.
    certificate: String,
    /// The authority's certificate in PEM.
    ca: String,
    /// Until when the certificate holds, in milliseconds since 1970.
    not_after_ms: i64,
    /// From when on the next one should be asked for.
    renew_after_ms: i64,
    /// The time here.
    now_ms: i64,
    /// Where the broker is.
    mqtt: Option<String>,
}

/// A person has to say yes first.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Pending {
    /// Always `pending`.
    state: &'static str,
    /// Ask again after so many seconds.
    retry_after_s: u32,
}

impl State {
    /// Where the broker is for one who has reached this server under `host`.
    fn broker_for(&self, uri: &Uri, headers: &HeaderMap) -> Option<String> {
        if let Some(url) = &self.broker_url {
            // Devices with an identity speak in the clear with nobody.
            return url
                .tls
                .then(|| format!("{}:{}", bracketed(&url.host), url.port));
        }
        let port = self.mqtt?.port();
        // HTTP/2 says it in the address, HTTP/1 in a header. Only the device itself reads it again.
        let said = uri.authority().map(ToString::to_string).or_else(|| {
            let host = headers.get(header::HOST)?;
            host.to_str().ok().map(str::to_owned)
        })?;
        let authority: axum::http::uri::Authority = said.parse().ok()?;
        Some(format!("{}:{port}", authority.host()))
    }

    fn certified(
        &self,
        peer: &PeerDevice,
        issued: Issued,
        mqtt: Option<String>,
        now_ms: i64,
    ) -> Json<Certified> {
        Json(Certified {
            site: peer.site.to_string(),
            device: peer.device.to_string(),
            certificate: issued.chain_pem,
            ca: self.identity.authority.pem().to_owned(),
            not_after_ms: issued.not_after_ms,
            renew_after_ms: issued.renew_after_ms,
            now_ms,
            mqtt,
        })
    }
}

/// Takes a device in that shows an enrolment token, and gives it a certificate. The same key and name again is given one
/// again, without using up the token.
#[utoipa::path(
    post,
    path = "/api/v1/enrol",
    request_body = Enrol,
    responses(
        (status = 200, description = "A certificate", body = Certified),
        (status = 202, description = "A person has to approve it first; ask again", body = Pending),
        (status = 403, description = "Why not", content_type = "application/problem+json", body = Problem),
        (status = 422, description = "Not names", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn enrol(
    Shared(state): Shared<State>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    uri: Uri,
    headers: HeaderMap,
    Said(asked): Said<Enrol>,
) -> Result<Response, Problem> {
    let now_ms = clock::now_ms();
    let done = state
        .identity
        .enrol(
            Asked {
                token: &asked.token,
                site: &asked.site,
                device: &asked.device,
                csr: &asked.csr,
            },
            from.ip(),
            now_ms,
        )
        .await?;
    match done {
        Enrolled::Pending => {
            let pending = Pending {
                state: "pending",
                retry_after_s: RETRY_S,
            };
            Ok((StatusCode::ACCEPTED, Json(pending)).into_response())
        }
        Enrolled::Issued(issued) => {
            let named = |name: &str| {
                name.parse::<Name>()
                    .map_err(|e| Problem::bad(e.to_string()))
            };
            let peer = PeerDevice {
                site: named(&asked.site)?,
                device: named(&asked.device)?,
            };
            let mqtt = state.broker_for(&uri, &headers);
            Ok(state.certified(&peer, issued, mqtt, now_ms).into_response())
        }
    }
}

/// The next certificate for a device that is known by its key. It shows the one that it has. A device whose certificate ran out
/// long ago gets one, too: it is told a challenge (401), signs it within the request (`challengePassword` of PKCS #9) and asks again.
#[utoipa::path(
    post,
    path = "/api/v1/renew",
    request_body = Renew,
    responses(
        (status = 200, description = "A certificate", body = Certified),
        (status = 401, description = "No certificate was shown; `challenge` is to be signed", content_type = "application/problem+json", body = Problem),
        (status = 403, description = "Why not", content_type = "application/problem+json", body = Problem),
    )
)]
pub(super) async fn renew(
    Shared(state): Shared<State>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    shown: Option<Extension<PeerDevice>>,
    uri: Uri,
    headers: HeaderMap,
    Said(asked): Said<Renew>,
) -> Result<Json<Certified>, Problem> {
    let now_ms = clock::now_ms();
    let shown = shown.as_ref().map(|Extension(device)| device);
    let (identity, from) = (&state.identity, from.ip());
    let renewed = identity.renew(&asked.csr, shown, from, now_ms).await;
    let (peer, issued) = renewed.map_err(|error| match error {
        DeviceError::Unproven => Problem::from(error).with_challenge(identity.challenge(now_ms)),
        error => error.into(),
    })?;
    let mqtt = state.broker_for(&uri, &headers);
    Ok(state.certified(&peer, issued, mqtt, now_ms))
}

/// An IPv6 address before a port.
pub(super) fn bracketed(host: &str) -> String {
    if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    }
}

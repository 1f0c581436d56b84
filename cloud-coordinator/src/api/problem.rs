//! Every error as problem details (RFC 9457).

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use crate::{
    datasets::DatasetError,
    exchange::ExchangeError,
    labels::LabelError,
    objects::ObjectError,
    parts::{Name, Refused},
    records::RecordError,
    samples::SampleError,
    store::StoreError,
};

/// What every 5xx of a database says; the log says what it was.
const UNAVAILABLE: &str = "the database could not answer, try again";

/// What went wrong, for a program (`status`) and for a person (`title`, `detail`).
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct Problem {
    /// Always `about:blank`: the status says what kind of problem it is.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The kind of problem in few words.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// What exactly.
    detail: String,
    /// Bytes of an image that are here, where a piece does not begin there.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    /// Seconds until it may be tried again, as in `Retry-After`.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_s: Option<u32>,
    /// The part behind the API that is busy or unwell.
    #[serde(skip_serializing_if = "Option::is_none")]
    part: Option<&'static str>,
    /// What a device is to sign that renews without a certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    challenge: Option<Box<str>>,
    #[serde(skip)]
    failing: Option<Failing>,
}

/// Goes with an answer: something behind the API failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failing {
    /// This part.
    Part(Name),
    /// The database that the request was for.
    Database,
}

impl Problem {
    pub(crate) fn new(status: u16, title: &'static str, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank",
            title,
            status,
            detail: detail.into(),
            offset: None,
            retry_after_s: None,
            part: None,
            challenge: None,
            failing: None,
        }
    }

    /// Says where an upload stands.
    pub(crate) fn at(self, offset: u64) -> Self {
        let offset = Some(offset);
        Self { offset, ..self }
    }

    /// Says what to sign.
    pub(super) fn with_challenge(self, challenge: Option<String>) -> Self {
        let challenge = challenge.map(Into::into);
        Self { challenge, ..self }
    }

    /// Says when to come back.
    pub(crate) fn after(self, seconds: u64) -> Self {
        let retry_after_s = Some(u32::try_from(seconds).unwrap_or(u32::MAX));
        Self {
            retry_after_s,
            ..self
        }
    }

    fn failing(self, what: Failing) -> Self {
        let part = match what {
            Failing::Part(name) => Some(name.as_str()),
            Failing::Database => None,
        };
        let failing = Some(what);
        Self {
            part,
            failing,
            ..self
        }
    }

    /// A part behind the API failed.
    pub(crate) fn of_part(name: Name, detail: impl Into<String>) -> Self {
        Self::new(503, "Unwell", detail).failing(Failing::Part(name))
    }

    /// Whether who asks has done nothing wrong.
    pub(super) fn is_ours(&self) -> bool {
        self.status >= 500
    }

    pub(crate) fn invalid(detail: impl Into<String>) -> Self {
        Self::new(422, "Cannot be used", detail)
    }

    pub(crate) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(404, "Not found", detail)
    }

    pub(crate) fn bad(detail: impl Into<String>) -> Self {
        Self::new(400, "Bad request", detail)
    }

    /// For an error answer that a library made.
    pub(crate) fn of_status(status: StatusCode) -> Self {
        let detail = match status {
            StatusCode::METHOD_NOT_ALLOWED => "this address does not do that",
            StatusCode::PAYLOAD_TOO_LARGE => "the body is larger than this takes",
            StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => "it took too long",
            _ => "the request could not be answered",
        };
        let title = status.canonical_reason().unwrap_or("Error");
        Self::new(status.as_u16(), title, detail)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let (after, failing) = (self.retry_after_s, self.failing);
        let mut response = (status, Json(self)).into_response();
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some(failing) = failing {
            response.extensions_mut().insert(failing);
        }
        if status == StatusCode::UNAUTHORIZED {
            let how = HeaderValue::from_static("Bearer realm=\"lacewing\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, how);
        }
        if let Some(seconds) = after {
            let seconds = HeaderValue::from(seconds);
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        } else if status == StatusCode::SERVICE_UNAVAILABLE {
            let soon = HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, soon);
        }
        response
    }
}

/// A part was not asked.
impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        let (title, name, seconds, detail) = match refused {
            Refused::Busy(name) => {
                let busy = format!("{} has as much to do as it can, try again", name.words());
                ("Busy", name, 1, busy)
            }
            Refused::Unwell(name, seconds) => {
                let words = name.words();
                let unwell = format!("{words} fails and is left alone, try again in {seconds} s");
                ("Unwell", name, seconds, unwell)
            }
        };
        let part = Some(name.as_str());
        Self {
            part,
            ..Self::new(503, title, detail).after(seconds)
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        tracing::warn!(%error, "a query failed");
        let failing = Failing::Part(Name::Readings);
        Self::new(503, "Database unavailable", UNAVAILABLE).failing(failing)
    }
}

impl From<RecordError> for Problem {
    fn from(error: RecordError) -> Self {
        tracing::warn!(%error, "a query failed");
        Self::new(503, "Database unavailable", UNAVAILABLE).failing(Failing::Database)
    }
}

impl From<SampleError> for Problem {
    fn from(error: SampleError) -> Self {
        let detail = error.to_string();
        match error {
            SampleError::Records(error) => error.into(),
            SampleError::Missing | SampleError::Objects(ObjectError::Missing(_)) => {
                Self::not_found(detail)
            }
            SampleError::Objects(_) | SampleError::Staging(_) => {
                tracing::warn!(detail, "an image cannot be read or written");
                let again = "the images cannot be read or written, try again";
                Self::new(503, "Images unavailable", again).failing(Failing::Part(Name::Images))
            }
            SampleError::Deleted | SampleError::Erased => Self::new(410, "Gone", detail),
            SampleError::Offset(here) => Self::new(409, "Another offset", detail).at(here),
            SampleError::Invalid(_) => Self::invalid(detail),
            SampleError::Kind(_) => Self::new(415, "Unsupported Media Type", detail),
            SampleError::Full(_) => Self::new(507, "Full", detail),
        }
    }
}

impl From<LabelError> for Problem {
    fn from(error: LabelError) -> Self {
        let detail = error.to_string();
        match error {
            LabelError::Records(error) => error.into(),
            LabelError::NoTask(_) | LabelError::NoSample | LabelError::NoLabel => {
                Self::not_found(detail)
            }
            LabelError::Deleted => Self::new(410, "Gone", detail),
            LabelError::Classes(_) => Self::new(409, "Other classes", detail),
            LabelError::Invalid(_) => Self::invalid(detail),
        }
    }
}

impl From<ExchangeError> for Problem {
    fn from(error: ExchangeError) -> Self {
        match error {
            ExchangeError::Sample(error) => error.into(),
            ExchangeError::Label(error) => error.into(),
            ExchangeError::Broken(detail) => Self::invalid(detail),
        }
    }
}

impl From<DatasetError> for Problem {
    fn from(error: DatasetError) -> Self {
        let detail = error.to_string();
        match error {
            DatasetError::Records(error) => error.into(),
            DatasetError::Missing(_) => Self::not_found(detail),
            DatasetError::Unusable(_) => Self::invalid(detail),
        }
    }
}

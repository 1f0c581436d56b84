//! What the API asks. Pages are cut by id, so that each row comes exactly once whatever arrives meanwhile.

use serde::{Deserialize, Serialize};
use sqlx::{QueryBuilder, Sqlite};

use super::{Store, StoreError};

/// In which direction pages go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Order {
    /// The newest first.
    #[default]
    Desc,
    /// The oldest first.
    Asc,
}

/// Which readings.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReadingFilter {
    pub(crate) site: Option<String>,
    pub(crate) device: Option<String>,
    pub(crate) source: Option<String>,
    pub(crate) label: Option<String>,
    /// Captured at or after this, milliseconds by the device's clock.
    pub(crate) since: Option<i64>,
    /// Captured before this.
    pub(crate) until: Option<i64>,
    /// The cursor: the id of the last row of the page before.
    pub(crate) after: Option<i64>,
    pub(crate) order: Order,
    pub(crate) limit: i64,
}

/// A stored reading.
#[derive(Clone, Debug, PartialEq, Serialize, sqlx::FromRow, utoipa::ToSchema)]
#[schema(as = Reading)]
pub(crate) struct ReadingRow {
    /// The place in order of arrival.
    pub(crate) id: i64,
    /// The site.
    pub(crate) site: String,
    /// The device.
    pub(crate) device: String,
    /// The camera or sensor.
    pub(crate) source: String,
    /// The life of the device's outbox.
    pub(crate) epoch: i64,
    /// The number in that life.
    pub(crate) seq: i64,
    /// Captured, milliseconds since 1970 by the device's clock.
    pub(crate) ts: i64,
    /// Stored, milliseconds since 1970 by the coordinator's clock.
    pub(crate) received_ms: i64,
    /// The number of the frame at its source.
    pub(crate) frame: i64,
    /// The class.
    pub(crate) label: String,
    /// How sure the model is, 0 to 1.
    pub(crate) score: f64,
    /// How far the best class lies before the second, 0 to 1.
    pub(crate) margin: f64,
    /// The model, `name@version`.
    pub(crate) model: String,
    /// From frame to result, milliseconds.
    pub(crate) latency_ms: f64,
    /// The neighbour whose model said it; absent where the device has computed it itself.
    #[sqlx(rename = "answered_by")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) by: Option<String>,
    /// The file that the frame came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    /// What the frame really shows, where the source knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) truth: Option<String>,
    /// Whether it came from the backlog.
    pub(crate) replayed: bool,
}

/// Which gaps.
#[derive(Clone, Debug, Default)]
pub(crate) struct GapFilter {
    pub(crate) site: Option<String>,
    pub(crate) device: Option<String>,
    pub(crate) after: Option<i64>,
    pub(crate) limit: i64,
}

/// Readings that are missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow, utoipa::ToSchema)]
#[schema(as = Gap)]
pub(crate) struct GapRow {
    /// The place in order of arrival.
    pub(crate) id: i64,
    /// The site.
    pub(crate) site: String,
    /// The device.
    pub(crate) device: String,
    /// The life of the device's outbox.
    pub(crate) epoch: i64,
    /// The first that is missing.
    #[sqlx(rename = "from_seq")]
    pub(crate) from: i64,
    /// The last that is missing.
    #[sqlx(rename = "to_seq")]
    pub(crate) to: i64,
    /// Why: `full` or `corrupt`, as the device said, or `refused`: it came and could not be used.
    pub(crate) reason: String,
    /// When the coordinator heard of it, milliseconds since 1970.
    pub(crate) received_ms: i64,
}

/// `AND column op value`, if there is a value.
fn and<T>(query: &mut QueryBuilder<Sqlite>, condition: &'static str, value: Option<T>)
where
    T: for<'q> sqlx::Encode<'q, Sqlite> + sqlx::Type<Sqlite> + Send + 'static,
{
    if let Some(value) = value {
        query.push(" AND ").push(condition).push_bind(value);
    }
}

impl Store {
    /// One page of readings.
    pub(crate) async fn readings(
        &self,
        filter: ReadingFilter,
    ) -> Result<Vec<ReadingRow>, StoreError> {
        let mut query = QueryBuilder::new(
            "SELECT r.id, d.site, d.device, r.source, r.epoch, r.seq, r.ts, r.received_ms, r.frame, \
             r.label, r.score, r.margin, r.model, r.latency_ms, r.answered_by, r.file, r.truth, \
             r.replayed \
             FROM readings r JOIN devices d ON d.id = r.device WHERE 1 = 1",
        );
        and(&mut query, "d.site = ", filter.site);
        and(&mut query, "d.device = ", filter.device);
        and(&mut query, "r.source = ", filter.source);
        and(&mut query, "r.label = ", filter.label);
        and(&mut query, "r.ts >= ", filter.since);
        and(&mut query, "r.ts < ", filter.until);
        match filter.order {
            Order::Asc => {
                and(&mut query, "r.id > ", filter.after);
                query.push(" ORDER BY r.id ASC LIMIT ");
            }
            Order::Desc => {
                and(&mut query, "r.id < ", filter.after);
                query.push(" ORDER BY r.id DESC LIMIT ");
            }
        }
        query.push_bind(filter.limit);
        query
            .build_query_as()
            .fetch_all(&self.readers)
            .await
            .map_err(StoreError::sql("read readings"))
    }

    /// One page of gaps, the oldest first.
    pub(crate) async fn gaps(&self, filter: GapFilter) -> Result<Vec<GapRow>, StoreError> {
        let mut query = QueryBuilder::new(
            "SELECT g.id, d.site, d.device, g.epoch, g.from_seq, g.to_seq, g.reason, g.received_ms \
             FROM gaps g JOIN devices d ON d.id = g.device WHERE 1 = 1",
        );
        and(&mut query, "d.site = ", filter.site);
        and(&mut query, "d.device = ", filter.device);
        and(&mut query, "g.id > ", filter.after);
        query.push(" ORDER BY g.id ASC LIMIT ");
        query.push_bind(filter.limit);
        query
            .build_query_as()
            .fetch_all(&self.readers)
            .await
            .map_err(StoreError::sql("read gaps"))
    }
}

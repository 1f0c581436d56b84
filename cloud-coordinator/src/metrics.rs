//! What is counted, for Prometheus.

use std::sync::{Arc, Mutex};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// One label, whose value is one of a few texts of this program.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Reason {
    pub(crate) reason: &'static str,
}

/// A part behind the API.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Part {
    pub(crate) part: &'static str,
}

/// A part behind the API, and why it was not asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct NotAsked {
    pub(crate) part: &'static str,
    pub(crate) reason: &'static str,
}

/// A sign of drift.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Drifting {
    pub(crate) name: &'static str,
}

/// A route of the API and the status of its answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Answer {
    pub(crate) route: String,
    pub(crate) status: u16,
}

/// Everything that the coordinator counts. Each coordinator has its own.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    pub(crate) ingested: Counter,
    pub(crate) replayed: Counter,
    pub(crate) duplicates: Counter,
    pub(crate) missing: Counter,
    refused: Family<Reason, Counter>,
    pub(crate) batch_readings: Histogram,
    pub(crate) commit_seconds: Histogram,
    pub(crate) ack_seconds: Histogram,
    pub(crate) acks: Counter,
    pub(crate) store_errors: Counter,
    pub(crate) link_losses: Counter,
    pub(crate) queue_messages: Gauge,
    pub(crate) devices: Gauge,
    pub(crate) devices_online: Gauge,
    drifting: Family<Drifting, Gauge>,
    pub(crate) live_missed: Counter,
    pub(crate) retention_removed: Counter,
    pub(crate) broker_connections: Gauge,
    pub(crate) broker_dropped: Counter,
    pub(crate) broker_cut: Counter,
    pub(crate) broker_replaced: Counter,
    broker_refused: Family<Reason, Counter>,
    broker_denied: Family<Reason, Counter>,
    pub(crate) broker_slowed: Counter,
    pub(crate) outside_errors: Counter,
    pub(crate) outside_turned_out: Counter,
    enrolment_refused: Family<Reason, Counter>,
    http_refused: Family<Reason, Counter>,
    access_refused: Family<Reason, Counter>,
    part_open: Family<Part, Gauge>,
    part_failed: Family<Part, Counter>,
    part_refused: Family<NotAsked, Counter>,
    http: Family<Answer, Counter>,
    pub(crate) http_connections: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("lacewing");
        macro_rules! new {
            ($name:literal, $help:literal, $metric:expr) => {{
                let metric = $metric;
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        // From a tenth of a millisecond to a minute.
        let seconds = || Histogram::new(exponential_buckets(0.0001, 2.0, 20));
        let metrics = Self {
            ingested: new!("ingested", "Readings stored", Counter::default()),
            replayed: new!(
                "replayed",
                "Readings stored that came from a backlog",
                Counter::default()
            ),
            duplicates: new!(
                "duplicates",
                "Readings that were stored already",
                Counter::default()
            ),
            missing: new!(
                "missing",
                "Readings that devices reported as dropped",
                Counter::default()
            ),
            refused: new!(
                "ingest_refused",
                "Messages that could not be used",
                Family::default()
            ),
            batch_readings: new!(
                "batch_readings",
                "Readings per commit",
                Histogram::new(exponential_buckets(1.0, 2.0, 16))
            ),
            commit_seconds: new!("commit_seconds", "Time of one commit", seconds()),
            ack_seconds: new!(
                "ack_seconds",
                "From the oldest message of a commit to its acknowledgement",
                seconds()
            ),
            acks: new!("acks", "Acknowledgements published", Counter::default()),
            store_errors: new!(
                "store_errors",
                "Commits that failed and were tried again",
                Counter::default()
            ),
            link_losses: new!(
                "link_losses",
                "Connections to the external broker that were lost",
                Counter::default()
            ),
            queue_messages: new!(
                "queue_messages",
                "Messages that wait for ingest",
                Gauge::default()
            ),
            devices: new!("devices", "Devices known", Gauge::default()),
            devices_online: new!(
                "devices_online",
                "Devices that are connected",
                Gauge::default()
            ),
            drifting: new!(
                "drifting_sources",
                "Sources that show a sign of drift",
                Family::default()
            ),
            live_missed: new!(
                "live_missed",
                "Live events that slow clients missed",
                Counter::default()
            ),
            retention_removed: new!(
                "retention_removed",
                "Readings that retention removed",
                Counter::default()
            ),
            broker_connections: new!(
                "broker_connections",
                "Clients of the embedded broker",
                Gauge::default()
            ),
            broker_dropped: new!(
                "broker_dropped",
                "Messages that slow subscribers missed",
                Counter::default()
            ),
            broker_cut: new!(
                "broker_cut",
                "Subscribers that were cut because they were too slow",
                Counter::default()
            ),
            broker_replaced: new!(
                "broker_replaced",
                "Sessions that another one of the same client took the place of",
                Counter::default()
            ),
            broker_refused: new!(
                "broker_refused",
                "Connections that the broker refused or ended",
                Family::default()
            ),
            broker_denied: new!(
                "broker_denied",
                "Attempts to do what a client has no right to",
                Family::default()
            ),
            broker_slowed: new!(
                "broker_slowed",
                "Times that a client published too fast and was made to wait",
                Counter::default()
            ),
            outside_errors: new!(
                "external_broker_errors",
                "Times that the external broker could not be told who may do what",
                Counter::default()
            ),
            outside_turned_out: new!(
                "external_broker_turned_out",
                "Times that the place of a revoked device was taken on the external broker",
                Counter::default()
            ),
            enrolment_refused: new!(
                "enrolment_refused",
                "Devices that did not get a certificate",
                Family::default()
            ),
            http_refused: new!(
                "http_refused",
                "Connections to the API that were refused or ended",
                Family::default()
            ),
            access_refused: new!(
                "access_refused",
                "Requests of which nobody was allowed to ask, or too often",
                Family::default()
            ),
            part_open: new!(
                "part_open",
                "1 while nobody asks a part behind the API, because it fails",
                Family::default()
            ),
            part_failed: new!(
                "part_failed",
                "Requests for which a part behind the API failed",
                Family::default()
            ),
            part_refused: new!(
                "part_refused",
                "Requests that were not passed on to a part behind the API",
                Family::default()
            ),
            http: new!("http_requests", "Requests answered", Family::default()),
            http_connections: new!(
                "http_connections",
                "Open HTTP connections",
                Gauge::default()
            ),
            registry: Mutex::default(),
        };
        Self {
            registry: Mutex::new(registry),
            ..metrics
        }
    }
}

impl Metrics {
    pub(crate) fn shared() -> Arc<Self> {
        Arc::default()
    }

    /// A message that could not be used.
    pub(crate) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }

    /// A connection that the broker did not take or ended.
    pub(crate) fn broker_refused(&self, reason: &'static str) {
        self.broker_refused.get_or_create(&Reason { reason }).inc();
    }

    /// A client of the broker tried what it has no right to.
    pub(crate) fn broker_denied(&self, reason: &'static str) {
        self.broker_denied.get_or_create(&Reason { reason }).inc();
    }

    /// A device did not get a certificate.
    pub(crate) fn enrolment_refused(&self, reason: &'static str) {
        self.enrolment_refused
            .get_or_create(&Reason { reason })
            .inc();
    }

    /// A connection to the API that was not taken or was ended.
    pub(crate) fn http_refused(&self, reason: &'static str) {
        self.http_refused.get_or_create(&Reason { reason }).inc();
    }

    /// A request that was not let through.
    pub(crate) fn access_refused(&self, reason: &'static str) {
        self.access_refused.get_or_create(&Reason { reason }).inc();
    }

    /// Nobody asks this part, or everybody may again.
    pub(crate) fn part_open(&self, part: &'static str, open: bool) {
        self.part_open
            .get_or_create(&Part { part })
            .set(open.into());
    }

    /// A part failed.
    pub(crate) fn part_failed(&self, part: &'static str) {
        self.part_failed.get_or_create(&Part { part }).inc();
    }

    /// A part was not asked.
    pub(crate) fn part_refused(&self, part: &'static str, reason: &'static str) {
        let why = NotAsked { part, reason };
        self.part_refused.get_or_create(&why).inc();
    }

    /// So many sources show a sign of drift now.
    pub(crate) fn drifting(&self, name: &'static str, sources: usize) {
        let sources = i64::try_from(sources).unwrap_or(i64::MAX);
        self.drifting.get_or_create(&Drifting { name }).set(sources);
    }

    /// A request was answered.
    pub(crate) fn answered(&self, route: &str, status: u16) {
        let route = route.to_owned();
        self.http.get_or_create(&Answer { route, status }).inc();
    }

    /// All of it as Prometheus reads it.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(|e| e.into_inner());
        if encode(&mut text, &registry).is_err() {
            text.clear();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels() {
        let metrics = Metrics::default();
        metrics.ingested.inc_by(3);
        metrics.refused("json");
        metrics.answered("/api/v1/devices", 200);
        let text = metrics.text();
        for line in [
            "lacewing_ingested_total 3",
            "lacewing_ingest_refused_total{reason=\"json\"} 1",
            "lacewing_http_requests_total{route=\"/api/v1/devices\",status=\"200\"} 1",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}

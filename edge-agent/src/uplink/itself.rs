//! What the device says about itself: what it is, how it is, which model it has, and what it has counted.

use mesh_core::{Kind, Metrics, ModelInfo, Status};
use rumqttc::PublishOptions;

use super::{Said, Uplink};
use crate::connection::Connection;

impl Uplink {
    /// What is said at the start of each connection, the last first.
    pub(super) fn greet(&self) -> Vec<Said> {
        let mut said = vec![self.state(), self.info()];
        said.extend(self.said.0.as_ref().map(|_| self.model()));
        said.push(self.retained(Kind::Status, Status::Online.as_str().into()));
        said
    }

    fn retained(&self, kind: Kind, payload: Vec<u8>) -> Said {
        let options = PublishOptions::at_least_once().retained();
        (self.topic(kind), payload.into(), options)
    }

    fn info(&self) -> Said {
        self.retained(Kind::Info, self.said.2.encode().unwrap_or_default())
    }

    fn state(&self) -> Said {
        self.retained(Kind::State, self.said.1.encode().unwrap_or_default())
    }

    /// Without a model nothing is left of the one before.
    fn model(&self) -> Said {
        let model = self.said.0.as_ref().map(ModelInfo::encode);
        let payload = model.and_then(Result::ok).unwrap_or_default();
        self.retained(Kind::Model, payload)
    }

    /// Another model may be in memory, the device be in another state or be reached elsewhere: it is said anew.
    pub(super) fn renew(&mut self) {
        let (model, state, info) = (self.about.model(), self.about.state(), self.about.info());
        let (old_model, old_state, old_info) = &self.said;
        let is_new_model = model != *old_model;
        let is_new_info = info != *old_info;
        let is_new_state = (&state.health, &state.detail) != (&old_state.health, &old_state.detail);
        if !is_new_model && !is_new_state && !is_new_info {
            return;
        }
        self.said = (model, state, info);
        self.board.set_state(self.board_state());
        if self.up {
            self.greetings.push(self.state());
            if is_new_model {
                self.greetings.push(self.model());
            }
            if is_new_info {
                self.greetings.push(self.info());
            }
        }
    }

    /// Says what the device is in answer to a wish, if that is new; false where there is no room just now.
    pub(super) fn say_reported(&mut self, connection: &Connection) -> bool {
        let mut reported = self.reported.borrow_and_update().clone();
        if let (Some(report), Some((ts, settings))) =
            (&mut reported, &*self.settings.borrow_and_update())
        {
            report.ts = report.ts.max(*ts);
            report.settings = Some(settings.clone());
        }
        let erased = *self.erased.borrow_and_update();
        if let Some(report) = &mut reported {
            report.erased = erased;
        }
        if let Some(report) = reported
            && self.reported_said.as_ref() != Some(&report)
        {
            let payload = report.encode().unwrap_or_default();
            let (topic, payload, options) = self.retained(Kind::Reported, payload);
            if !connection.publish(&topic, payload, options) {
                return false;
            }
            self.reported_said = Some(report);
        }
        true
    }

    pub(super) fn report(&mut self) {
        let Some(connection) = self.connection.as_ref().filter(|_| self.up) else {
            return;
        };
        let metrics = Metrics {
            ts: self.wall.now_ms(),
            uptime_s: self.clock.now_ms() / 1_000,
            backlog: self.delivery.waiting(),
            certificate_days: self.tls.days_left(),
            ..self.counters.metrics()
        };
        let payload = metrics.encode().unwrap_or_default();
        // Lost if there is no room: the next one says the same and more.
        let _ = connection.publish(
            &self.topic(Kind::Metrics),
            payload.into(),
            PublishOptions::at_most_once(),
        );
    }
}

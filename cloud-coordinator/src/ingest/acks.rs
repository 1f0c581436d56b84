//! Acknowledgements on their way out: the newest of each outbox, never a queue that could block ingest.

use std::{
    collections::{HashMap, VecDeque},
    sync::Mutex,
};

use mesh_core::{Ack, Kind, Name, RangeSet, Topic};
use tokio::sync::Notify;

/// Acknowledgements that wait to be published. An acknowledgement is cumulative, so a newer one replaces
/// the one that still waits; the number is bounded by the number of devices.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    waiting: Mutex<Waiting>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    acks: HashMap<(Name, Name), Vec<Ack>>,
    order: VecDeque<(Name, Name)>,
}

/// Outboxes of one device that are acknowledged at a time: more than one only while a device changes its
/// outbox.
const EPOCHS: usize = 4;

impl Acks {
    /// Notes what is stored of an outbox. Call it after the commit.
    pub(crate) fn put(&self, site: &Name, device: &Name, epoch: u64, stored: &RangeSet) {
        let ack = Ack::of(epoch, stored);
        let key = (site.clone(), device.clone());
        let mut waiting = self.waiting.lock().unwrap_or_else(|e| e.into_inner());
        let Waiting { acks, order } = &mut *waiting;
        let of_device = acks.entry(key.clone()).or_default();
        if of_device.is_empty() {
            order.push_back(key);
        }
        of_device.retain(|a| a.epoch != epoch);
        if of_device.len() >= EPOCHS {
            of_device.remove(0);
        }
        of_device.push(ack);
        drop(waiting);
        self.wake.notify_one();
    }

    /// Does none wait?
    pub(crate) fn is_empty(&self) -> bool {
        let waiting = self.waiting.lock().unwrap_or_else(|e| e.into_inner());
        waiting.order.is_empty()
    }

    /// The next ones, all of one device, the newest last; waits for some.
    pub(crate) async fn next(&self) -> (Topic, Vec<Ack>) {
        loop {
            {
                let mut waiting = self.waiting.lock().unwrap_or_else(|e| e.into_inner());
                if let Some(key) = waiting.order.pop_front() {
                    let acks = waiting.acks.remove(&key).unwrap_or_default();
                    return (Topic::of_device(&key.0, &key.1, Kind::Ack), acks);
                }
            }
            self.wake.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_of_each_outbox() {
        let acks = Acks::default();
        let (site, d1, d2): (Name, Name, Name) = (
            "s".parse().unwrap(),
            "d1".parse().unwrap(),
            "d2".parse().unwrap(),
        );
        for upto in 1..100 {
            let mut stored = RangeSet::new();
            stored.insert(1, upto);
            acks.put(&site, &d1, 7, &stored);
            acks.put(&site, &d2, 8, &stored);
            acks.put(&site, &d2, 9, &stored);
        }
        let (topic, first) = acks.next().await;
        assert_eq!(topic.to_string(), "lacewing/v1/s/d1/_/ack");
        assert_eq!((first.len(), first[0].upto), (1, 99));
        let (_, second) = acks.next().await;
        assert_eq!(second.iter().map(|a| a.epoch).collect::<Vec<_>>(), [8, 9]);
        assert!(acks.is_empty() && acks.waiting.lock().unwrap().acks.is_empty());
    }
}

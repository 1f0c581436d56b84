//! Retained messages: what is kept, within bounds, for who subscribes later, and how such a one is brought up to date.
//!
//! A subscriber is not handed a list. A [`Pass`] goes through what is kept, some topics at a time, and puts into the
//! subscriber's queue what there is room for: it costs nobody else any memory, and the lock for a moment at a time.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
};

use bytes::Bytes;
use rumqttc::QoS;

use super::{
    router::{Delivery, lower},
    trie::Filters,
};

/// Retained messages of one device: a handful of kinds per source. Bounds what a faulty device can leave.
const PER_DEVICE: usize = 64;
/// The same in bytes: some hundred for most kinds, half of it for the largest message that there is.
const BYTES_PER_DEVICE: usize = 1 << 20;
/// Retained messages altogether: six of each of 100,000 devices.
const MESSAGES: usize = 600_000;
/// The same in bytes: more than 400 for each of them.
const BYTES: usize = 256 << 20;
/// Topics that are looked at before others get the lock: some ten microseconds.
pub(super) const LOOK: usize = 256;

/// How much of something is kept.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    messages: usize,
    bytes: usize,
}

/// What is kept.
#[derive(Debug, Default)]
pub(super) struct Retained {
    by_topic: BTreeMap<String, (Bytes, QoS)>,
    /// How much each `<site>/<device>` has.
    owners: HashMap<String, Held>,
    bytes: usize,
}

fn cost(topic: &str, payload: &Bytes) -> usize {
    topic.len() + payload.len()
}

impl Retained {
    /// Keeps a message; an empty one takes the kept one away. False if a bound forbids it: what was kept stays.
    pub(super) fn keep(&mut self, topic: &str, payload: Bytes, qos: QoS) -> bool {
        let owner: String = topic
            .split('/')
            .skip(2)
            .take(2)
            .collect::<Vec<_>>()
            .join("/");
        let mut held = self.owners.get(&owner).copied().unwrap_or_default();
        let mut all = Held {
            messages: self.by_topic.len(),
            bytes: self.bytes,
        };
        let old = self.by_topic.get(topic).map(|(kept, _)| cost(topic, kept));
        let new = (!payload.is_empty()).then(|| cost(topic, &payload));
        for count in [&mut held, &mut all] {
            count.messages =
                count.messages + usize::from(new.is_some()) - usize::from(old.is_some());
            count.bytes = count.bytes + new.unwrap_or_default() - old.unwrap_or_default();
        }
        let fits = held.messages <= PER_DEVICE
            && held.bytes <= BYTES_PER_DEVICE
            && all.messages <= MESSAGES
            && all.bytes <= BYTES;
        // What becomes less is always taken.
        if !fits && new > old {
            return false;
        }
        self.bytes = all.bytes;
        if held.messages == 0 {
            self.owners.remove(&owner);
        } else {
            self.owners.insert(owner, held);
        }
        if new.is_none() {
            self.by_topic.remove(topic);
        } else if let Some(kept) = self.by_topic.get_mut(topic) {
            *kept = (payload, qos);
        } else {
            self.by_topic.insert(topic.to_owned(), (payload, qos));
        }
        true
    }

    /// Goes on with a pass: `take` gets what it finds, until it has no room.
    pub(super) fn look(&self, pass: &mut Pass, mut take: impl FnMut(Delivery) -> bool) -> Look {
        let Pass {
            filters,
            beginnings,
            after,
        } = pass;
        let mut left = LOOK;
        while let Some(beginning) = beginnings.front() {
            let from = match &*after {
                Some(topic) => Bound::Excluded(topic.as_str()),
                None => Bound::Included(beginning.as_str()),
            };
            let mut seen: Option<&String> = None;
            let mut end = Look::Done;
            let these = self.by_topic.range::<str, _>((from, Bound::Unbounded));
            for (topic, (payload, qos)) in these.take_while(|(t, _)| t.starts_with(beginning)) {
                if left == 0 {
                    end = Look::More;
                    break;
                }
                left -= 1;
                let mut granted: Option<QoS> = None;
                filters.matching(topic, &mut |_, qos: &QoS| {
                    if granted.is_none_or(|g| (g as u8) < *qos as u8) {
                        granted = Some(*qos);
                    }
                });
                if let Some(granted) = granted {
                    let delivery = Delivery {
                        topic: Bytes::copy_from_slice(topic.as_bytes()),
                        payload: payload.clone(),
                        qos: lower(*qos, granted),
                        retain: true,
                    };
                    if !take(delivery) {
                        end = Look::Full;
                        break;
                    }
                }
                seen = Some(topic);
            }
            if end != Look::Done {
                if let Some(topic) = seen {
                    *after = Some(topic.clone());
                }
                return end;
            }
            beginnings.pop_front();
            *after = None;
            left = left.saturating_sub(1);
        }
        Look::Done
    }
}

/// How far a pass has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// There is more to look at.
    More,
    /// There is no room for what was found.
    Full,
    /// All was looked at.
    Done,
}

/// One way through what is kept, for some filters of one client: each topic is met once, whatever the filters are.
#[derive(Debug)]
pub(super) struct Pass {
    filters: Filters<QoS>,
    /// With what topics begin that are still to be looked at; none is the beginning of another.
    beginnings: VecDeque<String>,
    /// The last one that was dealt with, of the first of them.
    after: Option<String>,
}

impl Pass {
    pub(super) fn new(fresh: BTreeMap<String, QoS>) -> Self {
        let mut filters = Filters::default();
        let mut beginnings: Vec<String> = Vec::new();
        for (n, (filter, qos)) in (0..).zip(fresh) {
            // Everything that matches begins with the levels before the first wildcard.
            let fixed = filter.split(['+', '#']).next().unwrap_or_default();
            beginnings.push(fixed.strip_suffix('/').unwrap_or(fixed).to_owned());
            filters.insert(&filter, n, qos);
        }
        beginnings.sort();
        beginnings.dedup_by(|later, kept| later.starts_with(kept.as_str()));
        Self {
            filters,
            beginnings: beginnings.into(),
            after: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONCE: QoS = QoS::AtMostOnce;

    fn pass(filters: &[&str]) -> Pass {
        Pass::new(filters.iter().map(|f| ((*f).to_owned(), ONCE)).collect())
    }

    fn found(retained: &Retained, filters: &[&str]) -> Vec<String> {
        let (mut pass, mut found) = (pass(filters), Vec::new());
        while retained.look(&mut pass, |d| {
            found.push(String::from_utf8(d.topic.to_vec()).unwrap());
            true
        }) != Look::Done
        {}
        found
    }

    #[test]
    fn what_is_kept_is_bounded_replaced_and_removed() {
        let mut retained = Retained::default();
        let topic = |device: &str, n: usize| format!("lacewing/v1/s/{device}/c{n}/state");
        let mut keep =
            |topic: &str, bytes: usize| retained.keep(topic, Bytes::from(vec![b'x'; bytes]), ONCE);
        for n in 0..PER_DEVICE {
            assert!(keep(&topic("d", n), 1));
        }
        assert!(!keep(&topic("d", PER_DEVICE), 1), "the bound");
        assert!(keep(&topic("other", 0), 1), "of one device only");
        assert!(keep(&topic("d", 0), 2), "replacing needs no room");
        assert!(keep(&topic("d", 0), 0) && keep(&topic("d", PER_DEVICE), 1));

        assert!(keep(&topic("d", 1), BYTES_PER_DEVICE / 2));
        assert!(
            !keep(&topic("d", 2), BYTES_PER_DEVICE / 2),
            "the bytes, too"
        );
        assert!(keep(&topic("d", 1), BYTES_PER_DEVICE / 4), "less is taken");
        assert!(keep(&topic("d", 2), BYTES_PER_DEVICE / 2));
        for n in 0..=PER_DEVICE {
            assert!(keep(&topic("d", n), 0));
        }
        assert!(keep(&topic("other", 0), 0));
        assert!(retained.by_topic.is_empty() && retained.owners.is_empty());
        assert_eq!(retained.bytes, 0);
    }

    #[test]
    fn many_devices_together_have_a_bound_too() {
        let mut retained = Retained::default();
        // One buffer for all of them: only what is counted matters here.
        let body = Bytes::from(vec![b'x'; BYTES_PER_DEVICE / 2]);
        let mut device = 0;
        while retained.keep(
            &format!("lacewing/v1/s/d{device}/c/state"),
            body.clone(),
            ONCE,
        ) {
            device += 1;
            assert!(retained.bytes <= BYTES, "after {device}");
        }
        assert_eq!(device, BYTES / BYTES_PER_DEVICE * 2 - 1);
    }

    #[test]
    fn a_pass_meets_each_topic_once_and_only_what_it_may() {
        let mut retained = Retained::default();
        let mut all = Vec::new();
        for device in 0..30 {
            for source in 0..30 {
                let topic = format!("lacewing/v1/s/d{device:02}/c{source:02}/state");
                assert!(retained.keep(&topic, Bytes::from_static(b"x"), ONCE));
                all.push(topic);
            }
        }
        assert_eq!(found(&retained, &["lacewing/#"]), all);
        let overlapping = ["lacewing/#", "lacewing/v1/#", "lacewing/v1/s/+/c01/state"];
        assert_eq!(found(&retained, &overlapping), all);
        let two = ["lacewing/v1/s/d03/c01/state", "lacewing/v1/s/+/c01/+"];
        let some: Vec<_> = all
            .iter()
            .filter(|t| t.contains("/c01/"))
            .cloned()
            .collect();
        assert_eq!(found(&retained, &two), some);
        let own: Vec<_> = all
            .iter()
            .filter(|t| t.contains("/d07/"))
            .cloned()
            .collect();
        assert_eq!(found(&retained, &["lacewing/v1/s/d07/#"]), own);
        assert!(found(&retained, &["lacewing/v1/s/d0", "nothing/#"]).is_empty());
    }

    #[test]
    fn a_pass_stops_for_others_and_where_there_is_no_room() {
        let mut retained = Retained::default();
        for n in 0..2 * LOOK {
            let topic = format!("lacewing/v1/s/d{n}/c/state");
            assert!(retained.keep(&topic, Bytes::from_static(b"x"), ONCE));
        }
        let mut nothing = pass(&["lacewing/+/+/+/+/nothing"]);
        let never = |_| -> bool { unreachable!("nothing matches") };
        assert_eq!(retained.look(&mut nothing, never), Look::More);
        let mut pass = pass(&["lacewing/#"]);
        let (mut room, mut taken) = (0, 0);
        for end in [Look::Full, Look::Full, Look::More, Look::Done] {
            let seen = retained.look(&mut pass, |_| {
                let fits = room > 0;
                room -= usize::from(fits);
                taken += usize::from(fits);
                fits
            });
            assert_eq!(seen, end, "{taken} are taken");
            room = if taken == 0 { 3 } else { usize::MAX };
        }
        assert_eq!(taken, 2 * LOOK);
    }
}

//! Refusals of those whom nobody knows, in the audit log: who is refused must not fill it. The first of each kind from each
//! address is a line, and what follows within a while is a second one that says how many they were.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{audit, audit::Outcome};
use crate::{api::limits::network, notice::Notices, records::Records};

/// How long more of the same kind are only counted.
const WHILE: Duration = Duration::from_secs(600);
/// Addresses that are told apart at a time; those beyond are counted together. With two lines of some hundred bytes for each kind in
/// ten minutes even a flood from everywhere writes some megabytes an hour.
const ADDRESSES: usize = 256;

/// What was refused.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refused<'a> {
    pub(super) from: IpAddr,
    pub(super) action: &'static str,
    pub(super) object: &'a str,
    /// One of a few words, and the same in a sentence.
    pub(super) kind: &'static str,
    pub(super) why: &'a str,
}

/// From where, doing what, why; the address is nothing for those beyond [`ADDRESSES`].
type Key = (Option<IpAddr>, &'static str, &'static str);

/// See the module.
#[derive(Debug)]
pub(super) struct Refusals {
    records: Arc<Records>,
    /// How many came after the one that was written down.
    more: Mutex<HashMap<Key, u64>>,
    notices: Notices,
}

impl Refusals {
    pub(super) fn new(records: Arc<Records>) -> Arc<Self> {
        Arc::new(Self {
            records,
            more: Mutex::default(),
            notices: Notices::default(),
        })
    }

    fn more(&self) -> MutexGuard<'_, HashMap<Key, u64>> {
        self.more.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key if this is the first of its kind; otherwise it is only counted.
    fn first(&self, refused: Refused<'_>) -> Option<Key> {
        let mut more = self.more();
        let mut key = (Some(network(refused.from)), refused.action, refused.kind);
        if !more.contains_key(&key) && more.len() >= ADDRESSES {
            key.0 = None;
        }
        if let Some(count) = more.get_mut(&key) {
            *count += 1;
            return None;
        }
        more.insert(key, 0);
        Some(key)
    }

    /// Writes it down, if it is the first of its kind for a while.
    pub(super) async fn note(self: &Arc<Self>, refused: Refused<'_>) {
        let Some(key) = self.first(refused) else {
            return;
        };
        let (who, object) = (refused.from.to_string(), refused.object);
        let outcome = Outcome::Refused;
        audit(
            &self.records,
            &who,
            refused.action,
            object,
            outcome,
            refused.why,
        )
        .await;
        let all = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(WHILE).await;
            all.sum_up(key).await;
        });
    }

    /// Writes down how many followed.
    async fn sum_up(&self, key: Key) {
        let more = self.more().remove(&key).unwrap_or(0);
        if more == 0 {
            return;
        }
        let (from, action, kind) = key;
        let who = from.map_or_else(|| "other addresses".to_owned(), |from| from.to_string());
        let minutes = WHILE.as_secs() / 60;
        let why = format!("{more} more in {minutes} minutes: {kind}");
        audit(&self.records, &who, action, "", Outcome::Refused, &why).await;
    }

    /// Tells whoever reads the log that somebody tries a token that is none (any more): it was found, or was shown twice.
    pub(super) fn alarm(&self, refused: Refused<'_>) {
        if let Some(held_back) = self.notices.due(refused.kind) {
            tracing::warn!(
                from = %refused.from, object = refused.object, held_back,
                "somebody shows an enrolment token and is not let in: {}", refused.why
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(records: &Records) -> Vec<(String, String, String)> {
        sqlx::query_as("SELECT who, outcome, detail FROM audit ORDER BY seq")
            .fetch_all(records.readers())
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn a_flood_of_refusals_is_two_lines_and_an_exact_count() {
        let dir = tempfile::tempdir().unwrap();
        let records = Arc::new(Records::trust(dir.path()).await.unwrap());
        let refusals = Refusals::new(records.clone());
        let refused = |from: &str, kind| Refused {
            from: from.parse().unwrap(),
            action: "enrol",
            object: "device demo/d1",
            kind,
            why: "the token is used up",
        };
        for n in 0..50 {
            // One household.
            let from = format!("2001:db8::{n:x}");
            refusals.note(refused(&from, "token used up")).await;
        }
        refusals.note(refused("2001:db8::1", "forged")).await;
        refusals.note(refused("10.0.0.1", "token used up")).await;
        assert_eq!(lines(&records).await.len(), 3);
        let key = ("2001:db8::".parse().ok(), "enrol", "token used up");
        refusals.sum_up(key).await;
        let all = lines(&records).await;
        assert_eq!(all.len(), 4);
        assert_eq!(
            (all[3].0.as_str(), all[3].1.as_str()),
            ("2001:db8::", "refused")
        );
        assert!(all[3].2.starts_with("49 more"), "{all:?}");
        // Then it is said anew, and from however many addresses they come there are no more lines than places.
        refusals.note(refused("2001:db8::1", "token used up")).await;
        for n in 0..1_000_u32 {
            let from = std::net::Ipv4Addr::from(n + (1 << 30)).to_string();
            refusals.note(refused(&from, "token used up")).await;
        }
        assert!(lines(&records).await.len() <= 5 + ADDRESSES);
        let together = (None, "enrol", "token used up");
        assert!(refusals.more()[&together] > 700);
    }
}

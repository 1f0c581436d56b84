//! Where the devices of a site find each other, when neither multicast nor an address that is written down leads from one of its
//! networks to another: each says in its `info` where it is reached, and the coordinator tells the site where some that are online
//! are. It carries nothing between them; who answers at an address is a matter of the handshake and the roster.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use mesh_core::{Kind, Name, Topic, meeting::Meeting};
use tokio_util::sync::CancellationToken;

use crate::{ingest::Link, registry::Registry};

/// It is looked so often who is online, and no site is told more often than this: each word goes to every device of it, and those
/// that come together are named together.
const LOOK: Duration = Duration::from_secs(5);

/// Keeps every site's meeting on the broker.
#[derive(Debug)]
pub(crate) struct Meetings {
    registry: Arc<Registry>,
    is_forgotten: AtomicBool,
}

impl Meetings {
    pub(crate) fn new(registry: Arc<Registry>) -> Self {
        Self {
            registry,
            is_forgotten: AtomicBool::new(false),
        }
    }

    /// A broker is there that may have forgotten everything.
    pub(crate) fn tell_again(&self) {
        self.is_forgotten.store(true, Ordering::Relaxed);
    }

    /// Until `stop`.
    pub(crate) async fn run(self: Arc<Self>, link: Link, stop: CancellationToken) {
        let mut told = HashMap::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let again = self.is_forgotten.swap(false, Ordering::Relaxed);
            for (site, meeting) in news(self.registry.meet(), &told, again) {
                let Ok(bytes) = meeting.encode() else {
                    continue;
                };
                let topic = Topic::of_site(&site, Kind::Meeting);
                if !link.retain(&topic, bytes).await {
                    // Said again when it is back.
                    self.tell_again();
                    break;
                }
                tracing::debug!(%site, places = meeting.at.len(), "told the site where it meets");
                told.insert(site, meeting);
            }
        }
    }
}

/// What each site is to be told, `again` or because it is something else than what it was `told`.
fn news(
    online: Vec<(Name, Name, String)>,
    told: &HashMap<Name, Meeting>,
    again: bool,
) -> Vec<(Name, Meeting)> {
    let mut sites = BTreeMap::<&Name, Vec<(&Name, &str)>>::new();
    for (site, device, mesh) in &online {
        sites.entry(site).or_default().push((device, mesh));
    }
    // Nobody is online there any more.
    for site in told.keys() {
        sites.entry(site).or_default();
    }
    let none = Meeting::none();
    let of_site = |(site, online): (&Name, Vec<(&Name, &str)>)| {
        let before = told.get(site);
        let now = Meeting::of(online.into_iter(), before.unwrap_or(&none));
        let is_new = again || before != Some(&now);
        is_new.then(|| (site.clone(), now))
    };
    sites.into_iter().filter_map(of_site).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn online(all: &[(&str, &str, &str)]) -> Vec<(Name, Name, String)> {
        let one = |(site, device, mesh): &(&str, &str, &str)| {
            let name = |text: &str| text.parse::<Name>().unwrap();
            (name(site), name(device), (*mesh).to_owned())
        };
        all.iter().map(one).collect()
    }

    #[test]
    fn a_site_is_told_of_its_own_devices_and_only_when_that_is_news() {
        let both = online(&[
            ("hall", "d1", "10.0.0.1:7473"),
            ("hall", "d2", "10.0.1.1:7473"),
            ("yard", "d1", "10.9.9.9:7473"),
        ]);
        let mut told = HashMap::new();
        let first = news(both.clone(), &told, false);
        let places = |n: usize| -> Vec<String> {
            let all = first[n].1.at.iter();
            all.map(|place| format!("{} {}", place.device, place.address))
                .collect()
        };
        assert_eq!(places(0), ["d1 10.0.0.1:7473", "d2 10.0.1.1:7473"]);
        assert_eq!(places(1), ["d1 10.9.9.9:7473"]);
        told.extend(first.clone());
        assert_eq!(news(both.clone(), &told, false), []);
        assert_eq!(news(both.clone(), &told, true), first);
        // The yard's only device goes: what stays on its topic has to be taken back.
        let after = news(both[..2].to_vec(), &told, false);
        assert_eq!(after, [("yard".parse().unwrap(), Meeting::none())]);
    }
}

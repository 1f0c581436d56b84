//! Which subscriptions match a topic.

use std::collections::HashMap;

/// Subscriptions by filter, one node per level, so that a topic meets only the filters that can match it.
#[derive(Debug)]
pub(super) struct Filters<T> {
    root: Node<T>,
}

#[derive(Debug)]
struct Node<T> {
    /// The next level by its text; `+` stands for any.
    next: HashMap<Box<str>, Node<T>>,
    /// Filters that end here, by client.
    here: HashMap<u64, T>,
    /// Filters that end here with `#`, by client.
    rest: HashMap<u64, T>,
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Self {
            next: HashMap::new(),
            here: HashMap::new(),
            rest: HashMap::new(),
        }
    }
}

impl<T> Node<T> {
    fn is_empty(&self) -> bool {
        self.next.is_empty() && self.here.is_empty() && self.rest.is_empty()
    }
}

impl<T> Default for Filters<T> {
    fn default() -> Self {
        Self {
            root: Node::default(),
        }
    }
}

/// `a/b/#` → (`a/b`, ends with `#`).
fn split(filter: &str) -> (Vec<&str>, bool) {
    let mut levels: Vec<&str> = filter.split('/').collect();
    let rest = levels.last() == Some(&"#");
    if rest {
        levels.pop();
    }
    (levels, rest)
}

impl<T> Filters<T> {
    /// Adds or replaces a client's subscription. The filter is valid.
    pub(super) fn insert(&mut self, filter: &str, client: u64, what: T) {
        let (levels, rest) = split(filter);
        let mut node = &mut self.root;
        for level in levels {
            node = node.next.entry(level.into()).or_default();
        }
        let end = if rest { &mut node.rest } else { &mut node.here };
        end.insert(client, what);
    }

    /// Takes a client's subscription out, and the nodes that only it needed.
    pub(super) fn remove(&mut self, filter: &str, client: u64) {
        fn at<T>(node: &mut Node<T>, levels: &[&str], rest: bool, client: u64) {
            if let [level, deeper @ ..] = levels {
                if let Some(next) = node.next.get_mut(*level) {
                    at(next, deeper, rest, client);
                    if next.is_empty() {
                        node.next.remove(*level);
                    }
                }
            } else if rest {
                node.rest.remove(&client);
            } else {
                node.here.remove(&client);
            }
        }
        let (levels, rest) = split(filter);
        at(&mut self.root, &levels, rest, client);
    }

    /// Calls `found` for every subscription that matches; a client with overlapping filters comes several
    /// times.
    pub(super) fn matching<'a>(&'a self, topic: &str, found: &mut impl FnMut(u64, &'a T)) {
        fn at<'a, T>(
            node: &'a Node<T>,
            mut levels: std::str::Split<'_, char>,
            found: &mut impl FnMut(u64, &'a T),
        ) {
            node.rest.iter().for_each(|(c, t)| found(*c, t));
            let Some(level) = levels.next() else {
                node.here.iter().for_each(|(c, t)| found(*c, t));
                return;
            };
            for key in [level, "+"] {
                if let Some(next) = node.next.get(key) {
                    at(next, levels.clone(), found);
                }
            }
        }
        at(&self.root, topic.split('/'), found);
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.root.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// The rules of MQTT 3.1.1, section 4.7, level by level.
    fn matches(filter: &[&str], topic: &[&str]) -> bool {
        match (filter, topic) {
            (["#"], _) | ([], []) => true,
            ([f, filter @ ..], [t, topic @ ..]) => (f == t || *f == "+") && matches(filter, topic),
            _ => false,
        }
    }

    fn levels(n: &[u8], of: &[&'static str]) -> Vec<&'static str> {
        n.iter().map(|i| of[usize::from(*i) % of.len()]).collect()
    }

    proptest! {
        #[test]
        fn finds_what_the_rules_say(
            filters in prop::collection::vec((prop::collection::vec(0u8..3, 1..4), any::<bool>()), 1..12),
            topics in prop::collection::vec(prop::collection::vec(0u8..3, 1..5), 1..12),
        ) {
            let filters: Vec<Vec<&str>> = filters.iter().map(|(n, rest)| {
                let mut f = levels(n, &["a", "b", "+"]);
                if *rest { f.push("#"); }
                f
            }).collect();
            let mut trie = Filters::default();
            for (client, filter) in filters.iter().enumerate() {
                trie.insert(&filter.join("/"), client as u64, ());
            }
            for topic in &topics {
                let topic = levels(topic, &["a", "b", "c"]);
                let mut found = BTreeSet::new();
                trie.matching(&topic.join("/"), &mut |client, ()| { found.insert(client); });
                let expected: BTreeSet<u64> = (0u64..).zip(&filters)
                    .filter(|(_, f)| matches(f, &topic)).map(|(client, _)| client).collect();
                prop_assert_eq!(found, expected);
            }
            for (client, filter) in filters.iter().enumerate() {
                trie.remove(&filter.join("/"), client as u64);
            }
            prop_assert!(trie.is_empty(), "removing leaves nothing behind");
        }
    }
}

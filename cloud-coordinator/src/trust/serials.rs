//! The certificates of a device that have not run out: what has to stand on a list of revoked ones when it is revoked.
//!
//! Written as one text, `serial@until serial@until …`, the newest first.

/// Certificates of one key that hold at a time. Two or three are usual; a device that asks without end would be one of whom not
/// all can be listed.
const MOST: usize = 128;

/// Each with the moment it ends, in milliseconds since 1970. One without counts as long as anybody asks.
pub(super) fn read(text: &str) -> impl Iterator<Item = (&str, i64)> {
    text.split_ascii_whitespace()
        .map(|one| match one.split_once('@') {
            Some((serial, until)) => (serial, until.parse().unwrap_or(i64::MAX)),
            None => (one, i64::MAX),
        })
}

/// The text with one more, and without those that have run out; nothing if there is no room.
pub(super) fn add(before: &str, serial: &str, until_ms: i64, now_ms: i64) -> Option<String> {
    let mut text = format!("{serial}@{until_ms}");
    let mut count = 1;
    for (old, until) in read(before).filter(|(_, until)| *until > now_ms) {
        count += 1;
        text += &format!(" {old}@{until}");
    }
    (count <= MOST).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_run_out_is_forgotten_and_there_is_a_bound() {
        let one = add("", "aa", 10, 0).unwrap();
        let two = add(&one, "bb", 20, 5).unwrap();
        assert_eq!(two, "bb@20 aa@10");
        assert_eq!(add(&two, "cc", 30, 10).unwrap(), "cc@30 bb@20");
        assert_eq!(read(&two).collect::<Vec<_>>(), [("bb", 20), ("aa", 10)]);
        // From before there was a list.
        assert_eq!(read("dd").collect::<Vec<_>>(), [("dd", i64::MAX)]);
        let mut text = String::new();
        for n in 0..MOST {
            text = add(&text, &n.to_string(), 10, 0).unwrap();
        }
        assert_eq!(add(&text, "x", 10, 0), None);
        assert_eq!(add(&text, "x", 20, 10).unwrap(), "x@20");
    }
}

//! What the entries of an outbox's directory are called. The names are the outbox's table of contents.

use mesh_core::GapReason;

use super::GapRecord;

/// One entry of the directory, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// The file that names the outbox's epoch and carries its lock.
    Epoch(u64),
    /// The segment that is appended to. Its end is in it.
    Active { first: u64 },
    /// A full segment: readings `first..=last`.
    Sealed { first: u64, last: u64 },
    /// A segment that is being made. Worth nothing until it is renamed.
    New { first: u64 },
    /// A segment that is being deleted: all of it is acknowledged.
    Old { first: u64 },
    /// Readings that had to be dropped. The directory is empty, or being emptied.
    Gap(GapRecord),
    /// A damaged segment whose gap has yet to be recorded.
    Bad { from: u64, to: u64 },
    /// A damaged segment whose gap is recorded: kept for inspection only.
    Kept { from: u64, to: u64 },
}

impl Entry {
    /// The name in the directory.
    pub(super) fn name(self) -> String {
        // 20 digits hold every u64, so that names sort as their numbers do.
        match self {
            Self::Epoch(epoch) => format!("epoch-{epoch}"),
            Self::Active { first } => format!("seg-{first:020}"),
            Self::Sealed { first, last } => format!("seg-{first:020}-{last:020}"),
            Self::New { first } => format!("new-{first:020}"),
            Self::Old { first } => format!("old-{first:020}"),
            Self::Gap(GapRecord { from, to, reason }) => {
                format!("gap-{from:020}-{to:020}-{}", reason.as_str())
            }
            Self::Bad { from, to } => format!("bad-{from:020}-{to:020}"),
            Self::Kept { from, to } => format!("kept-{from:020}-{to:020}"),
        }
    }

    /// What a name means; `None` for what is not the outbox's and is left alone.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let mut words = name.split('-');
        let kind = words.next()?;
        let first: u64 = words.next()?.parse().ok()?;
        let last = words.next();
        let number = |word: Option<&str>| word?.parse::<u64>().ok().filter(|last| *last >= first);
        let entry = match kind {
            "epoch" => Self::Epoch(first),
            "seg" if last.is_none() => Self::Active { first },
            "seg" => Self::Sealed {
                first,
                last: number(last)?,
            },
            "new" => Self::New { first },
            "old" => Self::Old { first },
            "gap" => Self::Gap(GapRecord {
                from: first,
                to: number(last)?,
                reason: [GapReason::Full, GapReason::Corrupt]
                    .into_iter()
                    .find(|reason| Some(reason.as_str()) == name.rsplit('-').next())?,
            }),
            "bad" => Self::Bad {
                from: first,
                to: number(last)?,
            },
            "kept" => Self::Kept {
                from: first,
                to: number(last)?,
            },
            _ => return None,
        };
        // Only exactly what this writes is ours.
        (entry.name() == name).then_some(entry)
    }

    /// The highest reading that the name speaks of.
    pub(super) fn end(self) -> u64 {
        match self {
            Self::Epoch(_) => 0,
            Self::Active { first } | Self::New { first } | Self::Old { first } => {
                first.saturating_sub(1)
            }
            Self::Sealed { last, .. } => last,
            Self::Gap(gap) => gap.to,
            Self::Bad { to, .. } | Self::Kept { to, .. } => to,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_mean_and_nothing_else_is_ours() {
        let gap = |reason| {
            Entry::Gap(GapRecord {
                from: 3,
                to: u64::MAX,
                reason,
            })
        };
        for entry in [
            Entry::Epoch(77),
            Entry::Active { first: 1 },
            Entry::Sealed { first: 1, last: 1 },
            Entry::New { first: 9 },
            Entry::Old { first: 9 },
            gap(GapReason::Full),
            gap(GapReason::Corrupt),
            Entry::Bad { from: 5, to: 6 },
            Entry::Kept { from: 5, to: 6 },
        ] {
            assert_eq!(Entry::parse(&entry.name()), Some(entry));
        }
        for other in [
            "",
            "mark",
            "lost+found",
            "seg-1",
            "seg-00000000000000000001-",
            "seg-00000000000000000005-00000000000000000001",
            "gap-00000000000000000001-00000000000000000002",
            "gap-00000000000000000001-00000000000000000002-why",
            "epoch-01",
            "bad-00000000000000000001",
        ] {
            assert_eq!(Entry::parse(other), None, "{other}");
        }
    }
}

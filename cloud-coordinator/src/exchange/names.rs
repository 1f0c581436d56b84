//! The names of a tar's files, within bounds: a long one lies in an entry of its own, before the file, and the library
//! would read that whole however long it claims to be.

use std::io::{self, Read};

use tar::{Entry, EntryType, PaxExtensions};

/// A long path, and what else tar programs write about a file: times, owners, attributes.
const MAX_BYTES: u64 = 64 * 1024;

/// What was said about the file that comes next.
#[derive(Default)]
pub(super) struct Names {
    next: Option<Vec<u8>>,
    /// There was an entry about the next file, with or without a name in it.
    about: bool,
}

impl Names {
    /// The path of this entry, or nothing if it is only about the next one.
    pub(super) fn of(&mut self, entry: &mut Entry<'_, impl Read>) -> io::Result<Option<String>> {
        let kind = entry.header().entry_type();
        let found = match kind {
            EntryType::GNULongName => {
                let mut name = whole(entry)?;
                name.truncate(name.iter().position(|b| *b == 0).unwrap_or(name.len()));
                Some(name)
            }
            EntryType::XHeader => path(&whole(entry)?)?,
            // Where links lead, and what is said about all files: neither is used.
            EntryType::GNULongLink | EntryType::XGlobalHeader => None,
            _ => {
                self.about = false;
                let name = self.next.take();
                let name = name.unwrap_or_else(|| entry.path_bytes().into_owned());
                return Ok(Some(String::from_utf8_lossy(&name).into_owned()));
            }
        };
        // A file has a few such entries, and an endless row of them is no tar.
        if found.is_some() && self.next.is_some() || kind == EntryType::XHeader && self.about {
            return Err(io::Error::other("two names for one file"));
        }
        self.about |= kind == EntryType::XHeader;
        self.next = self.next.take().or(found);
        Ok(None)
    }
}

fn whole(entry: &mut Entry<'_, impl Read>) -> io::Result<Vec<u8>> {
    if entry.size() > MAX_BYTES {
        return Err(io::Error::other("a name longer than 64 KiB"));
    }
    let mut bytes = Vec::new();
    entry.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The path among these records.
fn path(records: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut path = None;
    for record in PaxExtensions::new(records) {
        let record = record?;
        if record.key_bytes() == b"path" {
            path = Some(record.value_bytes().to_vec());
        }
    }
    Ok(path)
}

//! Entries that use a set: `@name[:ports][/protocol]` stands for every destination of the `EgressSet` of that name,
//! each with these ports and this protocol.

use std::{cell::Cell, collections::BTreeMap};

use super::{
    entry::Entry,
    error::visible,
    except,
    parse::{EntryError, read_entry},
};

/// The sign with which an entry begins that uses a set.
pub(super) const SIGN: char = '@';

/// The name of the set that an entry uses, if it uses one.
pub fn set_of_entry(text: &str) -> Option<&str> {
    let used = text.strip_prefix(SIGN)?;
    let end = used.find([':', '/']).unwrap_or(used.len());
    Some(&used[..end])
}

/// Most entries of all that concerns a pod, counted with everything that a set and a CIDR with exceptions stand for, and
/// with repetitions. It bounds the memory and the time that a policy takes before its other limits are checked.
pub(super) const ENTRIES: usize = 30_000;

/// The sets that entries may use, and how many entries may still be read.
pub(super) struct Sets<'a> {
    all: &'a BTreeMap<String, Vec<String>>,
    /// `None` when there were more.
    left: Cell<Option<usize>>,
}

impl<'a> Sets<'a> {
    /// For all that concerns one pod.
    pub(super) fn new(all: &'a BTreeMap<String, Vec<String>>) -> Self {
        Self {
            all,
            left: Cell::new(Some(ENTRIES)),
        }
    }

    /// Whether there were more entries than may be read. Then nothing more should be read.
    pub(super) fn are_exceeded(&self) -> bool {
        self.left.get().is_none()
    }

    /// Counts entries that were read.
    fn count(&self, entries: usize) {
        let left = self.left.get();
        self.left
            .set(left.and_then(|left| left.checked_sub(entries)));
    }

    /// For how many entries the text of one stands.
    pub(super) fn entries_of(&self, text: &str) -> usize {
        let set = set_of_entry(text).and_then(|name| self.all.get(name));
        set.map_or(1, Vec::len)
    }

    /// Parses the text of an entry: one entry, or one for each destination of a set.
    pub(super) fn read(&self, text: &str) -> Result<Vec<Entry>, EntryError> {
        let Some(name) = set_of_entry(text) else {
            let entries = read_one(text)?;
            self.count(entries.len());
            return Ok(entries);
        };
        let wrong = |at: usize, found: &str, message: String| EntryError {
            at,
            found: found.to_owned(),
            message,
        };
        let limits_at = SIGN.len_utf8() + name.len();
        let limits = &text[limits_at..];
        let Some(members) = self.all.get(name) else {
            return Err(wrong(
                0,
                text,
                format!("uses a set that does not exist: there is no EgressSet named `{name}`"),
            ));
        };
        // A name that only carries the ports and the protocol.
        let limited = read_entry(&format!("x{limits}")).map_err(|error| EntryError {
            at: (limits_at + error.at).saturating_sub(1).min(text.len()),
            ..error
        })?;
        let mut entries = Vec::new();
        for member in members {
            if self.are_exceeded() {
                break;
            }
            let read = read_member(member).map_err(|EntryError { found, message, .. }| {
                let of_set = format!("uses the EgressSet `{name}`, in which `{found}` {message}");
                wrong(0, text, of_set)
            })?;
            self.count(read.len());
            entries.extend(read.into_iter().map(|one| Entry {
                destination: one.destination,
                ..limited.clone()
            }));
        }
        Ok(entries)
    }
}

/// Parses a destination of a set.
fn read_member(member: &str) -> Result<Vec<Entry>, EntryError> {
    let read = read_one(member)?;
    let has_more = |one: &Entry| one.ports.is_some() || one.protocol.is_some();
    if read.iter().any(has_more) {
        return Err(EntryError {
            at: 0,
            found: member.to_owned(),
            message: "has a port or protocol: expected a destination alone".to_owned(),
        });
    }
    Ok(read)
}

/// The mistakes in the destinations of a set: the number of each that cannot be read, from 1, the column, and the
/// message.
pub fn check_destinations(destinations: &[String]) -> Vec<(usize, usize, String)> {
    let numbered = (1..).zip(destinations);
    let wrong = numbered.filter_map(|(number, member)| {
        let EntryError { at, found, message } = read_member(member).err()?;
        let found = if found.is_empty() { member } else { &found };
        let column = member[..at].chars().count() + 1;
        let message = visible(format!("`{found}` {message}").chars());
        Some((number, column, message))
    });
    wrong.collect()
}

/// Parses an entry without a set.
fn read_one(text: &str) -> Result<Vec<Entry>, EntryError> {
    if text.contains(except::SIGN) {
        except::read(text)
    } else {
        read_entry(text).map(|entry| vec![entry])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Entry>, EntryError> {
        let members = ["github.com", "*.github.com", "192.0.2.0/24", "2001:db8::7"];
        let sets = BTreeMap::from([
            ("github".to_owned(), members.map(str::to_owned).into()),
            ("empty".to_owned(), Vec::new()),
            ("bad".to_owned(), vec!["a.test:443".to_owned()]),
        ]);
        Sets::new(&sets).read(text)
    }

    #[test]
    fn an_entry_with_a_set_stands_for_its_destinations() {
        let single = |texts: &[&str]| -> Vec<Entry> {
            let read = texts.iter().map(|text| read_entry(text).unwrap());
            read.collect()
        };
        assert_eq!(
            read("@github:443/tcp").unwrap(),
            single(&[
                "github.com:443/tcp",
                "*.github.com:443/tcp",
                "192.0.2.0/24:443/tcp",
                "[2001:db8::7]:443/tcp"
            ])
        );
        assert_eq!(
            read("@github").unwrap()[0],
            read_entry("github.com").unwrap()
        );
        assert_eq!(read("@empty:22").unwrap(), []);
        assert_eq!(read("a.test").unwrap(), single(&["a.test"]));
    }

    #[test]
    fn no_more_is_read_than_a_policy_may_have() {
        let many = vec!["[::/0!::1]".to_owned(); ENTRIES / 128 + 1];
        let all = BTreeMap::from([("many".to_owned(), many)]);
        let sets = Sets::new(&all);
        let first = sets.read("@many:1").unwrap().len();
        assert!(sets.are_exceeded());
        assert!((ENTRIES..ENTRIES + 129).contains(&first), "{first}");
        assert_eq!(sets.read("@many:2").unwrap(), []);
    }

    #[test]
    fn an_entry_with_a_set_that_cannot_be_used_is_an_error() {
        let message = |text: &str| read(text).unwrap_err().message;
        assert!(message("@gitlab").contains("no EgressSet named `gitlab`"));
        assert!(message("@bad:443").contains("`a.test:443` has a port"));
        let destinations = ["a.test", "b.test:443", "192.0.2.0/33"].map(str::to_owned);
        let found = check_destinations(&destinations);
        let places: Vec<_> = found
            .iter()
            .map(|(number, column, _)| (*number, *column))
            .collect();
        assert_eq!(places, [(2, 1), (3, 1)], "{found:?}");
        let error = read("@github:x").unwrap_err();
        assert_eq!((error.at, error.found.as_str()), (8, "x"));
    }
}

//! Prefixes without parts of them: `10.0.0.0/8!10.1.0.0/16:443` is every address of the first that is not in the second.
//!
//! Such an entry stands for the prefixes that remain, each with its ports and its protocol.

use super::{
    entry::{Destination, Entry},
    parse::{EntryError, read_entry},
    prefix::Prefix,
};

/// The sign before each exception.
pub(super) const SIGN: char = '!';

/// Most prefixes that remain of one entry.
const MOST: usize = 256;

/// More prefixes would remain than there may be.
#[derive(Debug, PartialEq, Eq)]
pub struct TooMany;

/// The addresses of `whole` that are in none of the exceptions, as at most `most` prefixes.
///
/// # Errors
///
/// When more prefixes are needed.
pub fn without(whole: Prefix, exceptions: &[Prefix], most: usize) -> Result<Vec<Prefix>, TooMany> {
    let mut pieces = Vec::new();
    collect(whole, exceptions, most, &mut pieces)?;
    Ok(pieces)
}

fn collect(
    whole: Prefix,
    exceptions: &[Prefix],
    most: usize,
    pieces: &mut Vec<Prefix>,
) -> Result<(), TooMany> {
    if exceptions.iter().any(|except| except.covers(&whole)) {
        return Ok(());
    }
    let inside: Vec<Prefix> = exceptions
        .iter()
        .copied()
        .filter(|except| whole.covers(except))
        .collect();
    if inside.is_empty() {
        if pieces.len() == most {
            return Err(TooMany);
        }
        pieces.push(whole);
        return Ok(());
    }
    for half in whole.halves() {
        collect(half, &inside, most, pieces)?;
    }
    Ok(())
}

/// Parses an entry with exceptions: the entries for what remains.
pub(super) fn read(text: &str) -> Result<Vec<Entry>, EntryError> {
    let wrong = |at: usize, found: &str, message: &str| EntryError {
        at,
        found: found.to_owned(),
        message: message.to_owned(),
    };
    // In brackets, everything up to the bracket is addresses; otherwise up to the port or the protocol.
    let addresses_end = if text.starts_with('[') {
        text.find(']').unwrap_or(text.len())
    } else {
        let last = text.rfind(SIGN).unwrap_or_default();
        end_of_address(text, last + SIGN.len_utf8())
    };
    let (addresses, tail) = text.split_at(addresses_end);
    let mut parts = addresses.split(SIGN);
    let first = parts.next().unwrap_or_default();
    let entry = read_entry(&format!("{first}{tail}")).map_err(|error| EntryError {
        // The exceptions stand between both parts.
        at: if error.at > first.len() {
            error.at + (addresses.len() - first.len())
        } else {
            error.at
        },
        ..error
    })?;
    let Destination::Addresses(whole) = entry.destination else {
        let message =
            "has an exception: expected a CIDR before `!`, such as `10.0.0.0/8!10.1.0.0/16`";
        return Err(wrong(0, text, message));
    };
    let mut at = first.len();
    let mut exceptions = Vec::new();
    for part in parts {
        at += SIGN.len_utf8();
        let except =
            Prefix::parse(part).map_err(|error| wrong(at, part, &format!("after `!` {error}")))?;
        if !whole.covers(&except) {
            return Err(wrong(at, part, "is no part of the CIDR before `!`"));
        }
        exceptions.push(except);
        at += part.len();
    }
    let pieces = without(whole, &exceptions, MOST).map_err(|TooMany| {
        let message = format!("needs more than {MOST} prefixes: use fewer or larger exceptions");
        wrong(0, text, &message)
    })?;
    if pieces.is_empty() {
        return Err(wrong(0, text, "leaves no address"));
    }
    let entry = |piece| Entry {
        destination: Destination::Addresses(piece),
        ..entry.clone()
    };
    Ok(pieces.into_iter().map(entry).collect())
}

/// Where the IPv4 address or CIDR ends that begins here.
fn end_of_address(text: &str, from: usize) -> usize {
    let rest = &text[from..];
    let ends = rest.char_indices().find(|&(at, c)| {
        let begins_length = rest[at + c.len_utf8()..].starts_with(|c: char| c.is_ascii_digit());
        c == ':' || (c == '/' && !begins_length)
    });
    from + ends.map_or(rest.len(), |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::prefix::to_mapped;

    fn texts(text: &str) -> Vec<String> {
        let entries = read(text).unwrap().into_iter();
        entries.map(|entry| entry.destination.to_string()).collect()
    }

    #[test]
    fn an_entry_with_exceptions_stands_for_what_remains() {
        assert_eq!(
            texts("10.0.0.0/8!10.0.0.0/10"),
            ["10.64.0.0/10", "10.128.0.0/9"]
        );
        assert_eq!(
            texts("192.0.2.0/30!192.0.2.1!192.0.2.2/31:443/tcp"),
            ["192.0.2.0"]
        );
        assert_eq!(
            texts("[2001:db8::/32!2001:db8:8000::/33]:443"),
            ["2001:db8::/33"]
        );
        let one = &read("10.0.0.0/8!10.0.0.0/9:443/tcp").unwrap()[0];
        assert_eq!(*one, read_entry("10.128.0.0/9:443/tcp").unwrap());
        let one = &read("10.0.0.0/8!10.0.0.0/9/udp").unwrap()[0];
        assert_eq!(*one, read_entry("10.128.0.0/9/udp").unwrap());
    }

    #[test]
    fn an_exception_that_cannot_be_meant_is_an_error_at_its_place() {
        for (text, at, found) in [
            ("10.0.0.0/8!11.0.0.0/16", 11, "11.0.0.0/16"),
            ("10.0.0.0/8!x", 11, "x"),
            ("10.0.0.0/8!:443", 11, ""),
            ("a.test!10.0.0.0/8", 0, "a.test!10.0.0.0/8"),
            ("*!10.0.0.0/8", 0, "*!10.0.0.0/8"),
            ("10.0.0.0/8!10.0.0.0/8", 0, "10.0.0.0/8!10.0.0.0/8"),
            ("10.0.0.0/8!10.0.0.0/9:x", 22, "x"),
            ("10.0.0.0/8!€€:1/bad", 20, "bad"),
        ] {
            let error = read(text).unwrap_err();
            assert_eq!((error.at, error.found.as_str()), (at, found), "{text}");
        }
    }

    #[test]
    fn mapped_ipv4_addresses_remain_of_no_ipv6_prefix() {
        for text in ["[::/0!::fffe:0:0/96]", "[::fffe:0:0/95!::fffe:0:0/97]"] {
            let entries = read(text).unwrap();
            assert!(entries.iter().all(|entry| {
                matches!(entry.destination, Destination::Addresses(piece) if !piece.is_v4())
            }));
        }
        assert_eq!(texts("[::fffe:0:0/95!::fffe:0:0/97]"), ["::fffe:8000:0/97"]);
        let error = read("[::fffe:0:0/95!::fffe:0:0/96]").unwrap_err();
        assert_eq!(error.message, "leaves no address");
    }

    proptest! {
        #[test]
        fn what_remains_is_the_whole_without_its_exceptions(
            length in 8..=20_u32,
            exceptions in prop::collection::vec((0..=255_u8, 0..=255_u8, 16..=24_u32), 0..4),
            probe in any::<(u8, u8, u8)>(),
        ) {
            let whole = Prefix::containing([10, 0, 0, 0].into(), length);
            let exceptions: Vec<Prefix> = exceptions
                .into_iter()
                .map(|(a, b, length)| Prefix::containing([10, a, b, 0].into(), length))
                .filter(|except| whole.covers(except))
                .collect();
            let pieces = without(whole, &exceptions, 256).unwrap();
            let address = to_mapped([10, probe.0, probe.1, probe.2].into());
            let is_in = |prefixes: &[Prefix]| prefixes.iter().filter(|p| p.contains(&address)).count();
            let expected = whole.contains(&address) && is_in(&exceptions) == 0;
            prop_assert_eq!(is_in(&pieces), usize::from(expected));
        }
    }
}

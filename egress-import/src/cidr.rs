//! Prefixes of other products, and prefixes without parts of them.

use std::net::IpAddr;

pub(crate) use egress_policy::except::TooMany;
use egress_policy::{Prefix, except, prefix::parse_decimal};

/// How many prefixes replace one that has exceptions.
pub(crate) const MOST_PIECES: usize = 64;

/// Reads an address or a CIDR. Bits outside the prefix are dropped, as network plugins do.
pub(crate) fn read(text: &str) -> Result<Prefix, String> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let wrong = || format!("`{text}` is not a CIDR");
    let address: IpAddr = address.trim().parse().map_err(|_| wrong())?;
    if matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
        return Err(format!(
            "`{text}` is an IPv4-mapped address, which never passes here"
        ));
    }
    let most = if address.is_ipv4() { 32 } else { 128 };
    let length = match length {
        None => most,
        Some(length) => parse_decimal(length.trim())
            .filter(|length| *length <= most)
            .ok_or_else(wrong)?,
    };
    Ok(Prefix::containing(address, length))
}

/// The addresses of `whole` that are in none of the exceptions, as at most [`MOST_PIECES`] prefixes.
///
/// # Errors
///
/// When more prefixes are needed.
pub(crate) fn without(whole: Prefix, exceptions: &[Prefix]) -> Result<Vec<Prefix>, TooMany> {
    except::without(whole, exceptions, MOST_PIECES)
}

/// The addresses that are in both lists of prefixes.
pub(crate) fn intersection(a: &[Prefix], b: &[Prefix]) -> Vec<Prefix> {
    a.iter()
        .flat_map(|a| b.iter().filter_map(|b| a.intersection(b)))
        .collect()
}

/// Whether clusters often have pods, services or nodes in this prefix.
pub(crate) fn may_be_internal(prefix: &Prefix) -> bool {
    [
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "fc00::/7",
    ]
    .into_iter()
    .filter_map(|text| Prefix::parse(text).ok())
    .any(|private| private.intersection(prefix).is_some())
}

/// Every address of IPv4 or IPv6.
pub(crate) fn family(v4: bool) -> Prefix {
    let any: IpAddr = if v4 {
        IpAddr::from([0; 4])
    } else {
        IpAddr::from([0; 16])
    };
    Prefix::containing(any, 0)
}

#[cfg(test)]
mod tests {
    use egress_policy::prefix::to_mapped;
    use proptest::prelude::*;

    use super::*;

    fn prefixes(texts: &[&str]) -> Vec<Prefix> {
        texts.iter().map(|text| read(text).unwrap()).collect()
    }

    fn pieces(whole: &str, exceptions: &[&str]) -> Vec<String> {
        without(read(whole).unwrap(), &prefixes(exceptions))
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn an_exception_leaves_the_rest_of_its_prefix() {
        assert_eq!(
            pieces("10.0.0.0/8", &["10.128.0.0/10"]),
            ["10.0.0.0/9", "10.192.0.0/10"]
        );
        assert_eq!(
            pieces("192.0.2.0/30", &["192.0.2.1/32"]),
            ["192.0.2.0", "192.0.2.2/31"]
        );
        assert_eq!(
            pieces("2001:db8::/32", &["2001:db8:8000::/33"]),
            ["2001:db8::/33"]
        );
    }

    #[test]
    fn an_exception_may_be_outside_or_everything() {
        assert_eq!(pieces("10.0.0.0/8", &["192.0.2.0/24"]), ["10.0.0.0/8"]);
        assert!(pieces("10.1.0.0/16", &["10.0.0.0/8"]).is_empty());
        assert_eq!(pieces("0.0.0.0/0", &["::/0"]), ["0.0.0.0/0"]);
    }

    #[test]
    fn more_than_64_pieces_are_refused() {
        let exceptions: Vec<Prefix> = (0..=255)
            .map(|n| read(&format!("10.0.{n}.1")).unwrap())
            .collect();
        assert_eq!(
            without(read("10.0.0.0/8").unwrap(), &exceptions),
            Err(TooMany)
        );
        assert_eq!(pieces("0.0.0.0/0", &["192.0.2.1"]).len(), 32);
    }

    #[test]
    fn a_cidr_may_have_bits_outside_its_prefix() {
        assert_eq!(read("10.1.2.3/8").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(read("192.0.2.1").unwrap().to_string(), "192.0.2.1");
        for wrong in ["10.0.0/8", "10.0.0.0/33", "::ffff:10.0.0.1", "x", ""] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn the_pieces_have_the_addresses_of_the_prefix_that_are_no_exception(
            whole in 0_u8..=12,
            exceptions in prop::collection::vec((0_u32..65_536, 8_u32..=32), 0..5),
            addresses in prop::collection::vec(0_u32..65_536, 32),
        ) {
            let at = |low: u32| IpAddr::from((0x0a00_0000_u32 | low).to_be_bytes());
            let whole = Prefix::containing(at(0), 8 + u32::from(whole));
            let exceptions: Vec<Prefix> = exceptions
                .into_iter()
                .map(|(low, length)| Prefix::containing(at(low), length))
                .collect();
            if let Ok(pieces) = without(whole, &exceptions) {
                for address in addresses {
                    let address = to_mapped(at(address));
                    let theirs = whole.contains(&address)
                        && !exceptions.iter().any(|except| except.contains(&address));
                    let ours = pieces.iter().any(|piece| piece.contains(&address));
                    prop_assert_eq!(theirs, ours);
                }
            }
        }
    }
}

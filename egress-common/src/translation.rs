//! IPv4 addresses that are embedded in IPv6 addresses: a NAT64 translator (RFC 6052) or a 6to4 relay (RFC
//! 3056) sends the packets to the IPv4 address.

use crate::{
    address::{self, Address},
    classes::ClassSet,
    records::{
        Policy, RANGE_INTERNAL, RANGE_NODE, RANGE_PROTECTED, RANGE_RESOLVER, RANGE_TRANSLATED,
        RANGE_TRANSLATED_SHIFT,
    },
    verdict::Destination,
};

/// The length of the 6to4 prefix, `2002::/16`.
pub const SIX_TO_FOUR: u32 = 16;

/// The possible lengths of a NAT64 prefix (RFC 6052, section 2.2).
pub const NAT64: [u32; 6] = [32, 40, 48, 56, 64, 96];

/// The 56 bits after the octet at bit 64, which is reserved and has no part of the IPv4 address (RFC 6052,
/// section 2.2).
const AFTER_RESERVED: u64 = (1 << 56) - 1;

/// The bits of a range's kinds for a translator's prefix of this length.
pub const fn range_kind(prefix_len: u32) -> u64 {
    (prefix_len as u64) << RANGE_TRANSLATED_SHIFT
}

/// The length of the translator's prefix that contains an address of these kinds; 0 when none does.
#[inline(always)]
pub const fn prefix_len(kinds: u64) -> u32 {
    ((kinds & RANGE_TRANSLATED) >> RANGE_TRANSLATED_SHIFT) as u32
}

/// The IPv4 address, in its mapped form, to which a translator sends the packets for `address`. `kinds` are
/// the kinds of `address`.
///
/// The reserved octet and the suffix may have any value, because translators ignore them (RFC 6052, section
/// 2.3).
#[inline(always)]
pub const fn embedded_v4(address: &Address, kinds: u64) -> Option<Address> {
    let [
        h0,
        h1,
        h2,
        h3,
        h4,
        h5,
        h6,
        h7,
        l0,
        l1,
        l2,
        l3,
        l4,
        l5,
        l6,
        l7,
    ] = *address;
    let high = u64::from_be_bytes([h0, h1, h2, h3, h4, h5, h6, h7]);
    let low = u64::from_be_bytes([l0, l1, l2, l3, l4, l5, l6, l7]);
    let v4 = match prefix_len(kinds) {
        0 => return None,
        SIX_TO_FOUR => high >> 16,
        96 => low,
        length => {
            // The number of the address's 32 bits that are after the reserved octet.
            let behind = length.wrapping_sub(32) & 63;
            high.wrapping_shl(behind)
                | (low & AFTER_RESERVED).wrapping_shr(56_u32.wrapping_sub(behind))
        }
    };
    Some(address::from_v4((v4 as u32).to_be_bytes()))
}

/// The entries of the maps for the IPv4 address to which a translator sends the packets for a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translated {
    /// Classes of the IPv4 address in the policy's CIDR trie.
    pub cidr: ClassSet,
    /// Kinds of the IPv4 address in `ranges`, and [`RANGE_NODE`].
    pub ranges: u64,
}

impl Destination {
    /// Adds the rules for the IPv4 address to which a translator sends the packets for this destination.
    ///
    /// Denials and protection always apply. Allowing entries and ranges apply only with NAT64, which leads to
    /// the same host: a 6to4 address belongs to another host behind the IPv4 address. A resolver's IPv4
    /// address allows nothing, because DNS to its translation would not be held.
    #[inline(always)]
    pub fn add_translated(&mut self, policy: &Policy, translated: Translated) {
        let Translated { cidr, ranges } = translated;
        let is_same_host = prefix_len(self.ranges) != SIX_TO_FOUR && ranges & RANGE_RESOLVER == 0;
        if is_same_host {
            self.cidr |= cidr;
            self.ranges |= ranges & (RANGE_PROTECTED | RANGE_INTERNAL | RANGE_NODE);
        } else {
            self.cidr |= cidr.and(policy.deny);
            self.ranges |= ranges & RANGE_PROTECTED;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Address {
        text.parse::<std::net::Ipv6Addr>().unwrap().octets()
    }

    #[test]
    fn the_examples_of_rfc_6052_are_read() {
        let expected = Some(address::from_v4([192, 0, 2, 33]));
        for (length, text) in [
            (32, "2001:db8:c000:221::"),
            (40, "2001:db8:1c0:2:21::"),
            (48, "2001:db8:122:c000:2:2100::"),
            (56, "2001:db8:122:3c0:0:221::"),
            (64, "2001:db8:122:344:c0:2:2100::"),
            (96, "2001:db8:122:344::192.0.2.33"),
            (96, "64:ff9b::192.0.2.33"),
            (SIX_TO_FOUR, "2002:c000:221:1::7"),
        ] {
            let address = read(text);
            assert_eq!(
                embedded_v4(&address, range_kind(length)),
                expected,
                "{text}"
            );
        }
        assert_eq!(embedded_v4(&read("64:ff9b::192.0.2.33"), 0), None);
    }

    #[test]
    fn the_reserved_octet_and_the_suffix_count_for_nothing() {
        let expected = Some(address::from_v4([192, 0, 2, 33]));
        for (length, text) in [
            (32, "2001:db8:c000:221:ff00:1:2:3"),
            (40, "2001:db8:1c0:2:ff21:1:2:3"),
            (64, "2001:db8:122:344:ffc0:2:21ff:ffff"),
        ] {
            let address = read(text);
            assert_eq!(
                embedded_v4(&address, range_kind(length)),
                expected,
                "{text}"
            );
        }
    }
}

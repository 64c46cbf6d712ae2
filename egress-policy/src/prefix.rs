//! Address prefixes, and the merge after which a longest-prefix match finds the bits of all of them.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::BitOrAssign,
};

use egress_common::address::{self, Address, V4_MAPPED_PREFIX_LEN};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Bits in an address.
const ADDRESS_BITS: u32 = 128;

/// The part of the address space for mapped IPv4 addresses, `::ffff:0:0/96`.
const MAPPED: Prefix = Prefix {
    network: address::from_v4([0; 4]),
    prefix_len: V4_MAPPED_PREFIX_LEN,
};

/// An IPv4 or IPv6 prefix in the form of the maps: a network address without host bits, and a length
/// in bits of the 128-bit form, so that an IPv4 prefix of length `n` has `96 + n`.
///
/// An IPv6 prefix never contains IPv4 addresses, although `::/0` numerically contains their mapped
/// form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Prefix {
    network: Address,
    prefix_len: u32,
}

/// Why a text is not a prefix. The message continues the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// Not an address.
    #[error("is not an IP address or CIDR")]
    NotAnAddress,
    /// The part after the slash is not a length that the family allows.
    #[error("has a wrong prefix length: expected a number from 0 to {max}")]
    Length {
        /// The family's longest prefix.
        max: u32,
    },
    /// Bits are set after the prefix.
    #[error("has bits set outside its prefix: the network is {network}")]
    HostBits {
        /// The same prefix without them.
        network: Prefix,
    },
    /// An IPv4-mapped IPv6 address.
    #[error("is an IPv4-mapped IPv6 address: write the IPv4 address")]
    Mapped,
    /// An IPv6 address with a zone.
    #[error("has an IPv6 zone: zones mean nothing outside the pod, omit it")]
    Zone,
}

impl Prefix {
    /// The prefix of one address.
    pub fn host(address: IpAddr) -> Self {
        Self {
            network: to_mapped(address),
            prefix_len: ADDRESS_BITS,
        }
    }

    /// The prefix of `length` bits (of the family's own 32 or 128) that contains `address`.
    ///
    /// # Panics
    ///
    /// When `length` exceeds the family's maximum.
    pub fn containing(address: IpAddr, length: u32) -> Self {
        let offset = family_offset(address);
        assert!(
            length <= ADDRESS_BITS - offset,
            "prefix length {length} of {address}"
        );
        let prefix_len = offset + length;
        Self {
            network: mask(to_mapped(address), prefix_len),
            prefix_len,
        }
    }

    /// A prefix in the form of the maps.
    pub(super) fn of_map(network: Address, prefix_len: u32) -> Self {
        Self {
            network,
            prefix_len,
        }
    }

    /// Whether the first bits of the address are these, whatever its family is.
    pub(super) fn spans(&self, address: &Address) -> bool {
        mask(*address, self.prefix_len) == self.network
    }

    /// Parses an address or a CIDR.
    ///
    /// # Errors
    ///
    /// See [`PrefixError`].
    pub fn parse(text: &str) -> Result<Self, PrefixError> {
        match text.split_once('/') {
            None => Self::from_parts(text, None),
            Some((address, length)) => Self::from_parts(address, Some(length)),
        }
    }

    /// Parses an address and, if there is one, the text after its slash.
    ///
    /// # Errors
    ///
    /// See [`PrefixError`].
    pub fn from_parts(address: &str, length: Option<&str>) -> Result<Self, PrefixError> {
        if address.contains('%') && address.contains(':') {
            return Err(PrefixError::Zone);
        }
        let address: IpAddr = address.parse().map_err(|_| PrefixError::NotAnAddress)?;
        if matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
            return Err(PrefixError::Mapped);
        }
        let Some(length) = length else {
            return Ok(Self::host(address));
        };
        let max = ADDRESS_BITS - family_offset(address);
        let length = parse_decimal(length)
            .filter(|length| *length <= max)
            .ok_or(PrefixError::Length { max })?;
        let network = Self::containing(address, length);
        if network.network != to_mapped(address) {
            return Err(PrefixError::HostBits { network });
        }
        Ok(network)
    }

    /// The network address.
    pub fn network(&self) -> Address {
        self.network
    }

    /// Length in bits of the 128-bit form.
    pub fn prefix_len(&self) -> u32 {
        self.prefix_len
    }

    /// Whether this is one address.
    pub(super) fn is_host(&self) -> bool {
        self.prefix_len == ADDRESS_BITS
    }

    /// Whether the prefix contains IPv4 addresses.
    pub fn is_v4(&self) -> bool {
        self.prefix_len >= V4_MAPPED_PREFIX_LEN && address::is_v4(&self.network)
    }

    /// Whether this is every address of its family, `0.0.0.0/0` or `::/0`.
    pub fn is_whole_family(&self) -> bool {
        self.prefix_len
            == if self.is_v4() {
                V4_MAPPED_PREFIX_LEN
            } else {
                0
            }
    }

    /// Whether the prefix contains the address.
    pub fn contains(&self, address: &Address) -> bool {
        self.is_v4() == address::is_v4(address) && mask(*address, self.prefix_len) == self.network
    }

    /// Whether the prefix contains every address of `other`.
    pub fn covers(&self, other: &Self) -> bool {
        self.is_v4() == other.is_v4()
            && self.prefix_len <= other.prefix_len
            && mask(other.network, self.prefix_len) == self.network
    }

    /// Both halves of a prefix that is longer than an address. An IPv6 prefix has no IPv4 addresses, so the half that
    /// would consist of their mapped forms is missing.
    pub(super) fn halves(&self) -> impl Iterator<Item = Self> {
        let is_v4 = self.is_v4();
        let prefix_len = self.prefix_len + 1;
        let lower = u128::from_be_bytes(self.network);
        let upper = lower | 1_u128.checked_shl(ADDRESS_BITS - prefix_len).unwrap_or(0);
        let half = move |bits: u128| Self {
            network: bits.to_be_bytes(),
            prefix_len,
        };
        [half(lower), half(upper)]
            .into_iter()
            .filter(move |half| half.is_v4() == is_v4)
    }

    /// The addresses in both prefixes, which are either nested or disjoint.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        if self.covers(other) {
            Some(*other)
        } else if other.covers(self) {
            Some(*self)
        } else {
            None
        }
    }

    fn to_network(self) -> IpNet {
        let address = from_mapped(&self.network);
        let length = self.prefix_len - family_offset(address);
        IpNet::new_assert(address, length as u8)
    }

    /// Whether an IPv6 prefix numerically contains the mapped IPv4 addresses.
    fn is_above_mapped(&self) -> bool {
        !self.is_v4()
            && self.prefix_len < V4_MAPPED_PREFIX_LEN
            && mask(MAPPED.network, self.prefix_len) == self.network
    }
}

/// An address alone, or a CIDR; IPv6 without brackets.
impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = from_mapped(&self.network);
        if self.prefix_len == ADDRESS_BITS {
            return write!(f, "{address}");
        }
        write!(f, "{address}/{}", self.prefix_len - family_offset(address))
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.to_string()
    }
}

impl TryFrom<String> for Prefix {
    type Error = PrefixError;

    fn try_from(text: String) -> Result<Self, PrefixError> {
        Self::parse(&text)
    }
}

/// The smallest set of prefixes with the same addresses, IPv4 first.
pub fn merge(prefixes: &[Prefix]) -> Vec<Prefix> {
    let networks: Vec<IpNet> = prefixes.iter().map(|prefix| prefix.to_network()).collect();
    let merged = IpNet::aggregate(&networks).into_iter();
    merged
        .map(|network| Prefix::containing(network.network(), network.prefix_len().into()))
        .collect()
}

/// Prepares prefixes with bits for a longest-prefix match: every prefix gets its own bits
/// and those of all prefixes that contain it. Sorted by network and length.
///
/// IPv4 gets no bits from an IPv6 prefix: if one numerically contains the mapped addresses, `::ffff:0:0/96`
/// is added to exclude them.
pub fn inherit<B>(own: impl IntoIterator<Item = (Prefix, B)>) -> Vec<(Prefix, B)>
where
    B: Copy + Default + BitOrAssign,
{
    let mut merged: BTreeMap<Prefix, B> = BTreeMap::new();
    for (prefix, bits) in own {
        *merged.entry(prefix).or_default() |= bits;
    }
    if merged.keys().any(Prefix::is_above_mapped) {
        merged.entry(MAPPED).or_default();
    }
    // In this order each prefix comes after all that contain it, so those form a stack.
    let mut above: Vec<(Prefix, B)> = Vec::new();
    merged
        .into_iter()
        .map(|(prefix, mut bits)| {
            while above
                .last()
                .is_some_and(|(last, _)| !numerically_covers(last, &prefix))
            {
                above.pop();
            }
            if prefix != MAPPED {
                bits |= above
                    .last()
                    .map_or_else(B::default, |(_, inherited)| *inherited);
            }
            above.push((prefix, bits));
            (prefix, bits)
        })
        .collect()
}

fn numerically_covers(outer: &Prefix, inner: &Prefix) -> bool {
    outer.prefix_len <= inner.prefix_len && mask(inner.network, outer.prefix_len) == outer.network
}

/// The 16 bytes for an address in the maps.
pub fn to_mapped(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => address::from_v4(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The address for 16 bytes in the maps.
pub fn from_mapped(address: &Address) -> IpAddr {
    if address::is_v4(address) {
        let [.., a, b, c, d] = *address;
        Ipv4Addr::new(a, b, c, d).into()
    } else {
        Ipv6Addr::from(*address).into()
    }
}

fn family_offset(address: IpAddr) -> u32 {
    if address.is_ipv4() {
        V4_MAPPED_PREFIX_LEN
    } else {
        0
    }
}

/// The first bits of an address.
pub(super) fn mask(address: Address, prefix_len: u32) -> Address {
    let keep = u128::MAX
        .checked_shl(ADDRESS_BITS - prefix_len)
        .unwrap_or(0);
    (u128::from_be_bytes(address) & keep).to_be_bytes()
}

/// Parses decimal digits only: no sign, no space.
pub fn parse_decimal(text: &str) -> Option<u32> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        Prefix::parse(text).unwrap()
    }

    fn bits_at(merged: &[(Prefix, u64)], address: &str) -> u64 {
        let address = to_mapped(address.parse().unwrap());
        merged
            .iter()
            .filter(|(prefix, _)| mask(address, prefix.prefix_len) == prefix.network)
            .max_by_key(|(prefix, _)| prefix.prefix_len)
            .map_or(0, |(_, bits)| *bits)
    }

    #[test]
    fn an_ipv4_prefix_is_96_bits_longer_in_the_maps() {
        let ten = prefix("10.0.0.0/8");
        assert_eq!(ten.prefix_len(), 104);
        assert_eq!(ten.network(), address::from_v4([10, 0, 0, 0]));
        assert_eq!(ten.to_string(), "10.0.0.0/8");
        assert_eq!(prefix("203.0.113.7").to_string(), "203.0.113.7");
        assert_eq!(prefix("2001:db8::/32").to_string(), "2001:db8::/32");
        assert_eq!(prefix("0.0.0.0/0").prefix_len(), 96);
    }

    #[test]
    fn the_error_for_a_prefix_says_what_is_wrong() {
        let message = |text| Prefix::parse(text).unwrap_err().to_string();
        assert_eq!(
            message("10.1.2.3/8"),
            "has bits set outside its prefix: the network is 10.0.0.0/8"
        );
        assert_eq!(
            message("10.0.0.0/33"),
            "has a wrong prefix length: expected a number from 0 to 32"
        );
        assert_eq!(
            message("2001:db8::/+4"),
            "has a wrong prefix length: expected a number from 0 to 128"
        );
        assert_eq!(
            message("::ffff:10.0.0.1"),
            "is an IPv4-mapped IPv6 address: write the IPv4 address"
        );
        assert_eq!(
            message("fe80::1%eth0"),
            "has an IPv6 zone: zones mean nothing outside the pod, omit it"
        );
        assert_eq!(message("10.0.0/8"), "is not an IP address or CIDR");
    }

    #[test]
    fn a_longest_match_finds_the_bits_of_every_containing_prefix() {
        let merged = inherit([
            (prefix("10.1.2.0/24"), 1),
            (prefix("10.0.0.0/8"), 2),
            (prefix("10.1.0.0/16"), 4),
            (prefix("10.2.0.0/16"), 8),
            (prefix("10.1.0.0/16"), 16),
        ]);
        assert_eq!(bits_at(&merged, "10.1.2.3"), 1 | 2 | 4 | 16);
        assert_eq!(bits_at(&merged, "10.1.3.3"), 2 | 4 | 16);
        assert_eq!(bits_at(&merged, "10.2.3.3"), 2 | 8);
        assert_eq!(bits_at(&merged, "11.0.0.0"), 0);
    }

    #[test]
    fn all_of_ipv6_does_not_open_ipv4() {
        let merged = inherit([(prefix("::/0"), 1), (prefix("10.0.0.0/8"), 2)]);
        assert_eq!(bits_at(&merged, "203.0.113.7"), 0);
        assert_eq!(bits_at(&merged, "10.0.0.1"), 2);
        assert_eq!(bits_at(&merged, "2001:db8::1"), 1);
        let both = inherit([(prefix("::/0"), 1), (prefix("0.0.0.0/0"), 2)]);
        assert_eq!(bits_at(&both, "203.0.113.7"), 2);
        assert!(!prefix("::/0").covers(&prefix("10.0.0.0/8")));
        assert!(!prefix("::/0").contains(&address::from_v4([10, 0, 0, 1])));
    }
}

//! Prefixes of translators, and the IPv4 addresses behind them.

use egress_common::{
    address::Address,
    translation::{embedded_v4, range_kind},
};

use super::prefix::Prefix;

/// The prefixes that are known without configuration: NAT64's well-known one (RFC 6052, section 2.1)
/// and that of 6to4 (RFC 3056).
const WELL_KNOWN: [&str; 2] = ["64:ff9b::/96", "2002::/16"];

/// Prefixes of translators. No two overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translators(Vec<Prefix>);

impl Translators {
    /// The prefixes that are known without configuration.
    pub fn well_known() -> Self {
        // A test ensures that each can be parsed.
        let prefixes = WELL_KNOWN
            .iter()
            .filter_map(|text| Prefix::parse(text).ok());
        Self(prefixes.collect())
    }

    /// Adds a NAT64 prefix, of one of the lengths of RFC 6052.
    ///
    /// # Errors
    ///
    /// The other prefix, if it overlaps an existing one.
    pub fn add(&mut self, prefix: Prefix) -> Result<(), Prefix> {
        if self.0.contains(&prefix) {
            return Ok(());
        }
        let other = self
            .0
            .iter()
            .find(|other| other.intersection(&prefix).is_some());
        if let Some(other) = other {
            return Err(*other);
        }
        self.0.push(prefix);
        self.0.sort_unstable();
        Ok(())
    }

    /// The prefixes, in order.
    pub fn prefixes(&self) -> &[Prefix] {
        &self.0
    }

    /// The IPv4 address to which a translator sends packets for the address, if there is a translator.
    pub fn v4_behind(&self, address: &Address) -> Option<Address> {
        let prefix = self.0.iter().find(|prefix| prefix.contains(address))?;
        embedded_v4(address, range_kind(prefix.prefix_len()))
    }

    /// A prefix that contains all IPv4 addresses behind the addresses of `prefix`.
    pub fn v4_prefix_behind(&self, prefix: &Prefix) -> Option<Prefix> {
        let translator = self
            .0
            .iter()
            .find(|other| other.intersection(prefix).is_some())?;
        let outer = translator.prefix_len();
        let fixed = match prefix.prefix_len().checked_sub(outer) {
            None => 0,
            // The octet at bit 64 is not part of the IPv4 address.
            Some(bits) if prefix.prefix_len() > 64 && (32..=64).contains(&outer) => {
                bits - (prefix.prefix_len() - 64).min(8)
            }
            Some(bits) => bits,
        };
        let first = embedded_v4(&prefix.network(), range_kind(outer))?;
        Some(Prefix::containing(
            super::prefix::from_mapped(&first),
            fixed.min(32),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        Prefix::parse(text).unwrap()
    }

    #[test]
    fn every_well_known_prefix_can_be_parsed() {
        let read = Translators::well_known();
        assert_eq!(read.prefixes().len(), WELL_KNOWN.len());
    }

    #[test]
    fn prefixes_that_overlap_are_refused() {
        let mut translators = Translators::well_known();
        assert_eq!(translators.add(prefix("2001:db8::/32")), Ok(()));
        assert_eq!(translators.add(prefix("64:ff9b::/96")), Ok(()));
        for (text, other) in [
            ("2001:db8:1::/48", "2001:db8::/32"),
            ("2002:1::/32", "2002::/16"),
            ("64:ff9b::/48", "64:ff9b::/96"),
        ] {
            assert_eq!(translators.add(prefix(text)), Err(prefix(other)));
        }
        assert_eq!(translators.prefixes().len(), 3);
    }

    #[test]
    fn a_prefix_leads_to_the_ipv4_prefix_of_its_fixed_bits() {
        let mut translators = Translators::well_known();
        for text in ["2001:db8::/32", "2001:db9:4000::/40", "2001:db9:64:64::/64"] {
            assert_eq!(translators.add(prefix(text)), Ok(()));
        }
        let behind = |text| {
            let found = translators.v4_prefix_behind(&prefix(text));
            found.map(|found| found.to_string())
        };
        for (from, to) in [
            ("64:ff9b::a9fe:a9fe", "169.254.169.254"),
            ("64:ff9b::a9fe:0/112", "169.254.0.0/16"),
            ("64:ff9b::/64", "0.0.0.0/0"),
            ("::/0", "0.0.0.0/0"),
            ("2001:db8:a9fe:a9fe::/64", "169.254.169.254"),
            ("2001:db8:a9fe::/48", "169.254.0.0/16"),
            ("2001:db9:40a9:fea9:fe::", "169.254.169.254"),
            ("2001:db9:40a9:fea9::/72", "169.254.169.0/24"),
            ("2001:db9:40a9:fea9:f0::/76", "169.254.169.240/28"),
            ("2001:db9:64:64:a9:fe00::/88", "169.254.0.0/16"),
            ("2002:a9fe:a9fe:1::/64", "169.254.169.254"),
        ] {
            assert_eq!(behind(from).as_deref(), Some(to), "{from}");
        }
        assert_eq!(behind("2001:dba::/32"), None);
        assert_eq!(behind("203.0.113.0/24"), None);
    }
}

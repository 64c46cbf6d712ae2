//! Addresses that are protected on every node.

use egress_policy::Prefix;

/// Prefixes that only an address entry opens, each with the reason. A DNS response never opens them.
///
/// They are the addresses of the node itself and of its link, and the addresses at which clouds hand out
/// credentials to every client.
pub const PROTECTED: &[(&str, &str)] = &[
    (
        "0.0.0.0/8",
        "this network (RFC 1122, section 3.2.1.3): Linux takes 0.0.0.0 for itself",
    ),
    ("127.0.0.0/8", "loopback (RFC 1122, section 3.2.1.3)"),
    (
        "169.254.0.0/16",
        "link-local (RFC 3927): the metadata service of AWS, Azure, Google Cloud, Oracle, \
         OpenStack and others at 169.254.169.254, credentials for AWS containers at \
         169.254.170.2 and 169.254.170.23",
    ),
    ("224.0.0.0/4", "multicast (RFC 5771)"),
    (
        "240.0.0.0/4",
        "reserved (RFC 1112, section 4), and broadcast, 255.255.255.255 (RFC 919)",
    ),
    (
        "100.100.100.200/32",
        "the metadata service of Alibaba Cloud",
    ),
    (
        "168.63.129.16/32",
        "the platform of Azure (WireServer), which hands out a VM's secrets",
    ),
    (
        "192.0.0.192/32",
        "the metadata service of Oracle Cloud Infrastructure Classic",
    ),
    (
        "::/128",
        "the unspecified address (RFC 4291, section 2.5.2): Linux takes it for itself",
    ),
    ("::1/128", "loopback (RFC 4291, section 2.5.3)"),
    ("fe80::/10", "link-local (RFC 4291, section 2.5.6)"),
    ("ff00::/8", "multicast (RFC 4291, section 2.7)"),
    ("fd00:ec2::254/128", "the metadata service of AWS"),
    (
        "fd00:ec2::23/128",
        "credentials for pods on AWS (EKS Pod Identity)",
    ),
    ("fd20:ce::254/128", "the metadata service of Google Cloud"),
    ("fd00:42::42/128", "the metadata service of Scaleway"),
];

/// The built-in protected prefixes.
pub(super) fn built_in() -> impl Iterator<Item = Prefix> {
    // A test reads each of them.
    PROTECTED
        .iter()
        .filter_map(|(text, _)| Prefix::parse(text).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_prefix_can_be_read() {
        assert_eq!(built_in().count(), PROTECTED.len());
    }
}

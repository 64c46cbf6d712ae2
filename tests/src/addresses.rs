//! The laboratory's addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The resolver that pods are configured with.
pub const RESOLVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 53));
/// The same server by its IPv6 address, also configured as a resolver.
pub const RESOLVER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 0x53));
/// A second address of the same server that is *not* configured as a resolver.
pub const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 53));

/// Prefixes whose every address is local in `outside`, so that its servers answer on it.
pub const LOCAL_RANGES: [&str; 10] = [
    "10.99.0.0/24",
    "203.0.113.0/24",
    "198.18.0.0/15",
    "169.254.169.254/32",
    "fd99::/64",
    "2001:db8::/32",
    "2001:db9::/32",
    "64:ff9b::/96",
    "2002::/16",
    "fd00:ec2::254/128",
];

/// The pods' range, as the node and `outside` route it.
pub const PODS: &str = "10.1.0.0/16";
/// The pods' IPv6 range.
pub const PODS6: &str = "fd01::/16";

/// An address of a server in `outside`: `203.0.113.host`.
pub const fn server(host: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, host))
}

/// An IPv6 address of a server in `outside`: `2001:db8::host`.
pub const fn server6(host: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host))
}

/// The `n`th of 131,072 further server addresses, from 198.18.0.0/15.
pub const fn numbered(n: u32) -> IpAddr {
    assert!(n < 1 << 17, "198.18.0.0/15 has 131,072 addresses");
    IpAddr::V4(Ipv4Addr::from_bits(
        Ipv4Addr::new(198, 18, 0, 0).to_bits() + n,
    ))
}

//! IP protocol numbers (IANA "Assigned Internet Protocol Numbers"), the bits that represent them in a port
//! class, and the ports of DNS.

/// IPv6 hop-by-hop options.
pub const HOP_BY_HOP: u8 = 0;
/// ICMP for IPv4.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// IPv6 routing header.
pub const ROUTING: u8 = 43;
/// IPv6 fragment header.
pub const FRAGMENT: u8 = 44;
/// IPsec authentication header.
pub const AUTHENTICATION: u8 = 51;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// IPv6 "no next header".
pub const NO_NEXT_HEADER: u8 = 59;
/// IPv6 destination options.
pub const DESTINATION_OPTIONS: u8 = 60;
/// SCTP.
pub const SCTP: u8 = 132;

/// Port of DNS (RFC 1035, section 4.2).
pub const DNS_PORT: u16 = 53;
/// Port of DNS over TLS (RFC 7858) and over QUIC (RFC 9250).
pub const ENCRYPTED_DNS_PORT: u16 = 853;

/// A set of protocols, one bit each: a port class matches such a set.
pub mod bits {
    /// TCP.
    pub const TCP: u8 = 1;
    /// UDP.
    pub const UDP: u8 = 1 << 1;
    /// SCTP.
    pub const SCTP: u8 = 1 << 2;
    /// ICMP and ICMPv6 echo request and reply.
    pub const ICMP_ECHO: u8 = 1 << 3;
    /// Every other ICMP and ICMPv6 message.
    pub const ICMP_OTHER: u8 = 1 << 4;
    /// Every protocol that has no bit of its own.
    pub const OTHER: u8 = 1 << 5;
    /// Protocols with ports.
    pub const WITH_PORTS: u8 = TCP | UDP | SCTP;
    /// Every protocol.
    pub const ALL: u8 = TCP | UDP | SCTP | ICMP_ECHO | ICMP_OTHER | OTHER;
}

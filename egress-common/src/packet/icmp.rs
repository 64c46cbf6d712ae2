//! ICMP types (RFC 792) and ICMPv6 types (RFC 4443, RFC 4861, RFC 3810).

pub(super) const ICMP_ECHO_REPLY: u8 = 0;
pub(super) const ICMP_ECHO: u8 = 8;
pub(super) const ICMP_UNREACHABLE: u8 = 3;
pub(super) const ICMP_TIME_EXCEEDED: u8 = 11;
pub(super) const ICMP_PARAMETER_PROBLEM: u8 = 12;
pub(super) const ICMPV6_UNREACHABLE: u8 = 1;
pub(super) const ICMPV6_PARAMETER_PROBLEM: u8 = 4;
pub(super) const ICMPV6_ECHO: u8 = 128;
pub(super) const ICMPV6_ECHO_REPLY: u8 = 129;
pub(super) const ICMPV6_ROUTER_SOLICITATION: u8 = 133;
pub(super) const ICMPV6_NEIGHBOUR_SOLICITATION: u8 = 135;
pub(super) const ICMPV6_NEIGHBOUR_ADVERTISEMENT: u8 = 136;
pub(super) const ICMPV6_MLD_REPORT: u8 = 131;
pub(super) const ICMPV6_MLD_DONE: u8 = 132;
pub(super) const ICMPV6_MLD2_REPORT: u8 = 143;

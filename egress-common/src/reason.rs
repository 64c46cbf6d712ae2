//! Why a packet or a DNS message did not pass.

macro_rules! reasons {
    ($($(#[$doc:meta])+ $name:ident = $value:literal, $text:literal;)+) => {
        /// Why a packet or message did not pass. The kernel's records have the number; denial lines have the
        /// text.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Reason {
            $($(#[$doc])+ $name = $value,)+
        }

        impl Reason {
            /// Every reason, in the order of its number.
            pub const ALL: &'static [Reason] = &[$(Reason::$name),+];

            /// The reason with this number.
            pub const fn from_u8(value: u8) -> Option<Self> {
                match value {
                    $($value => Some(Self::$name),)+
                    _ => None,
                }
            }

            /// The word in denial lines and metrics.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

reasons! {
    /// No entry of the policy matches this destination, port and protocol.
    NoRule = 1, "no_rule";
    /// Entries allow this address, but not with this port or protocol.
    PortNotAllowed = 2, "port_not_allowed";
    /// The address was allowed by a name whose lifetime has ended.
    Expired = 3, "expired";
    /// An entry with a name allows this port, but the pod did not resolve this address.
    AddressNotLearned = 4, "address_not_learned";
    /// A `deny` entry matches.
    DenyRule = 5, "deny_rule";
    /// The destination is protected (metadata service, loopback, link-local, multicast, …), and no address
    /// entry allows it.
    Protected = 6, "protected";
    /// The source address is not one of the pod's own.
    SpoofedSource = 7, "spoofed_source";
    /// The frame is truncated, tagged, not IP, or its headers cannot be walked.
    Malformed = 8, "malformed";
    /// A fragment whose first fragment did not pass, or was not seen.
    FragmentWithoutFirst = 9, "fragment_without_first";
    /// A DNS query for a name that no entry allows, or that a `deny` entry matches.
    DnsName = 10, "dns_name";
    /// A message to a resolver that is no readable DNS query, or a message from one that is no readable
    /// response.
    DnsMalformed = 11, "dns_malformed";
    /// A connection with a resolver that could not be followed and was reset.
    DnsOverTcp = 12, "dns_over_tcp";
    /// A DNS response that matches no open query of the pod.
    DnsUnsolicited = 13, "dns_unsolicited";
    /// A DNS response whose addresses did not fit into the allow map.
    AllowMapFull = 14, "allow_map_full";
    /// A DNS message that could not be held in time, or that is too long to be held.
    DnsNotHeld = 15, "dns_not_held";
    /// The agent has no policy for this interface: it is being attached or removed.
    NoPolicy = 16, "no_policy";
    /// The pod's annotations cannot be read, and no earlier policy is known.
    PolicyUnreadable = 17, "policy_unreadable";
    /// A DNS query in fragments, or fragments from a resolver's address that cannot be reassembled.
    DnsFragmented = 18, "dns_fragmented";
    /// The pod of this interface is not known yet.
    PodUnknown = 19, "pod_unknown";
    /// The pod has an interface that cannot be enforced, and is closed because of it.
    UnenforcedInterface = 20, "unenforced_interface";
    /// DNS to a server that is not one of the pod's resolvers, under a policy with entries for names.
    DnsElsewhere = 21, "dns_elsewhere";
    /// A name that an entry allows resolved to an internal address, and the name may not lead to one.
    InternalAnswer = 22, "internal_answer";
    /// A packet that a node may unpack and forward (a tunnel), to an internal address that no address entry
    /// allows for it.
    Tunnel = 23, "tunnel";
    /// The frame's source hardware address is not the pod's, and the interface is a port of a bridge.
    SpoofedHardware = 24, "spoofed_hardware";
    /// A frame that did not pass through the agent's program, which stamps each frame.
    NotJudged = 25, "not_judged";
    /// A connection to one address and port more than the pod's map of destinations has room for.
    DestinationsFull = 26, "destinations_full";
    /// A TCP segment to the pod of a connection that the other side has accepted and the pod has not opened.
    TcpUnsolicited = 27, "tcp_unsolicited";
}

#[cfg(test)]
mod tests {
    use super::Reason;

    #[test]
    fn a_reason_survives_its_number() {
        for &reason in Reason::ALL {
            assert_eq!(Reason::from_u8(reason as u8), Some(reason));
        }
        assert_eq!(Reason::from_u8(0), None);
    }
}

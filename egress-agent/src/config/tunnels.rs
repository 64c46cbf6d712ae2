//! Tunnels that end on nodes. A pod may send such packets to an internal address only if an entry names that
//! address.

use std::fmt;

use egress_common::{protocol::bits, records::TunnelKey};

use super::written::Written;
use egress_policy::prefix::parse_decimal;

/// Packets that a program or the kernel of a node may unpack and forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tunnel {
    /// UDP to this port.
    Udp(u16),
    /// TCP to this port.
    Tcp(u16),
    /// SCTP to this port.
    Sctp(u16),
    /// Every IP protocol but TCP, UDP, SCTP and ICMP: IP in IP, GRE, ESP and all others.
    Other,
}

/// Tunnels that the kernel or a program of a usual cluster unpacks for every sender, each with its name. `WireGuard`,
/// IPsec over UDP and other tunnels that ask for a key are not among them.
pub const TUNNELS: &[(Tunnel, &str)] = &[
    (
        Tunnel::Other,
        "IP in IP (4), 6in4 (41), GRE (47), ESP (50), AH (51), EtherIP (97), L2TPv3 (115), MPLS in IP \
         (137), and every other protocol but TCP, UDP, SCTP and ICMP",
    ),
    (Tunnel::Udp(1701), "L2TP (RFC 3931)"),
    (Tunnel::Udp(2152), "GTP-U (3GPP TS 29.281)"),
    (Tunnel::Udp(2268), "AMT (RFC 7450)"),
    (Tunnel::Udp(3544), "Teredo (RFC 4380)"),
    (Tunnel::Udp(4341), "LISP (RFC 9300)"),
    (Tunnel::Udp(4754), "GRE in UDP (RFC 8086)"),
    (Tunnel::Udp(4789), "VXLAN (RFC 7348)"),
    (Tunnel::Udp(4790), "VXLAN-GPE"),
    (Tunnel::Udp(4800), "VXLAN of Submariner"),
    (Tunnel::Udp(5555), "foo-over-UDP of kube-router"),
    (Tunnel::Udp(6080), "GUE"),
    (Tunnel::Udp(6081), "Geneve (RFC 8926)"),
    (Tunnel::Udp(6635), "MPLS in UDP (RFC 7510)"),
    (Tunnel::Udp(6784), "VXLAN of Weave Net"),
    (Tunnel::Tcp(7471), "STT"),
    (Tunnel::Udp(8285), "UDP of flannel"),
    (Tunnel::Udp(8472), "VXLAN of Linux, flannel and Cilium"),
];

impl Tunnel {
    /// `4789/udp`, or `other`.
    pub(super) fn read(written: &Written) -> Result<Self, String> {
        Self::parse(written.text()?).ok_or_else(|| {
            "is not a tunnel: expected a port and its protocol, such as 4789/udp, with udp, tcp or \
             sctp; or `other` for every other protocol"
                .to_owned()
        })
    }

    fn parse(text: &str) -> Option<Self> {
        if text == "other" {
            return Some(Self::Other);
        }
        let (port, protocol) = text.split_once('/')?;
        let port = u16::try_from(parse_decimal(port)?).ok()?;
        if port == 0 {
            return None;
        }
        match protocol {
            "udp" => Some(Self::Udp(port)),
            "tcp" => Some(Self::Tcp(port)),
            "sctp" => Some(Self::Sctp(port)),
            _ => None,
        }
    }

    /// Its key in the kernel's map `tunnels`.
    pub const fn key(self) -> TunnelKey {
        match self {
            Self::Udp(port) => TunnelKey::new(bits::UDP, port),
            Self::Tcp(port) => TunnelKey::new(bits::TCP, port),
            Self::Sctp(port) => TunnelKey::new(bits::SCTP, port),
            Self::Other => TunnelKey::new(bits::OTHER, 0),
        }
    }
}

impl fmt::Display for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Udp(port) => write!(f, "{port}/udp"),
            Self::Tcp(port) => write!(f, "{port}/tcp"),
            Self::Sctp(port) => write!(f, "{port}/sctp"),
            Self::Other => f.write_str("other"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_is_read_as_it_is_written() {
        for (tunnel, _) in TUNNELS {
            assert_eq!(Tunnel::parse(&tunnel.to_string()), Some(*tunnel));
        }
        assert_eq!(Tunnel::parse("9/sctp"), Some(Tunnel::Sctp(9)));
        for text in [
            "",
            "4789",
            "/udp",
            "0/udp",
            "65536/udp",
            "1/icmp",
            "Other",
            "+1/udp",
        ] {
            assert_eq!(Tunnel::parse(text), None, "{text}");
        }
    }
}

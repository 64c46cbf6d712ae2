//! Frames built byte by byte, such as no honest stack sends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Protocol numbers (IANA "Assigned Internet Protocol Numbers").
pub mod protocol {
    #![expect(missing_docs, reason = "each is named as IANA names it")]
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const IPIP: u8 = 4;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const IPV6: u8 = 41;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const GRE: u8 = 47;
    pub const ESP: u8 = 50;
    pub const AH: u8 = 51;
    pub const ICMPV6: u8 = 58;
    pub const DESTINATION: u8 = 60;
    pub const SCTP: u8 = 132;
    pub const MOBILITY: u8 = 135;
    pub const UDP_LITE: u8 = 136;
}

/// EtherTypes.
pub mod ether {
    #![expect(missing_docs, reason = "each is named as IEEE names it")]
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    pub const VLAN: u16 = 0x8100;
    pub const SERVICE_VLAN: u16 = 0x88a8;
    pub const IPV6: u16 = 0x86dd;
}

/// The length of an Ethernet header.
pub const ETHERNET: usize = 14;
/// The offset of the transport header in a plain IPv4 packet.
pub const IPV4: usize = ETHERNET + 20;
/// The offset of the transport header in a plain IPv6 packet.
pub const IPV6: usize = ETHERNET + 40;

/// The offset of the transport header in a plain packet to or from this address.
pub const fn transport_at(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(_) => IPV4,
        IpAddr::V6(_) => IPV6,
    }
}

/// An Ethernet frame.
pub fn ethernet(ether_type: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2];
    frame.extend(ether_type.to_be_bytes());
    frame.extend(payload);
    frame
}

/// An ARP request of `sender` for `target` (RFC 826).
pub fn arp(sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend([2, 0, 0, 0, 0, 2]);
    packet.extend(sender.octets());
    packet.extend([0; 6]);
    packet.extend(target.octets());
    ethernet(ether::ARP, &packet)
}

/// The headers below the transport layer. Lengths are correct unless set otherwise.
#[derive(Clone, Debug)]
pub struct Ip {
    src: IpAddr,
    dst: IpAddr,
    hops: u8,
    id: u16,
    /// Flags and offset of an IPv4 header.
    fragment: u16,
    options: Vec<u8>,
    /// Kinds and bytes of extension headers, each without its "next header" byte.
    extensions: Vec<(u8, Vec<u8>)>,
    length: Option<u16>,
}

impl Ip {
    /// A packet between two addresses of one family.
    pub fn new(src: impl Into<IpAddr>, dst: impl Into<IpAddr>) -> Self {
        Self {
            src: src.into(),
            dst: dst.into(),
            hops: 64,
            id: 0,
            fragment: 0,
            options: Vec::new(),
            extensions: Vec::new(),
            length: None,
        }
    }

    /// Sets TTL or hop limit.
    #[must_use]
    pub fn hops(mut self, hops: u8) -> Self {
        self.hops = hops;
        self
    }

    /// Adds IPv4 options; a multiple of four bytes.
    #[must_use]
    pub fn options(mut self, options: &[u8]) -> Self {
        assert_eq!(options.len() % 4, 0, "options fill whole words");
        self.options = options.to_vec();
        self
    }

    /// Adds an IPv6 extension header of this kind; `rest` is the header without its first byte.
    #[must_use]
    pub fn extension(mut self, kind: u8, rest: &[u8]) -> Self {
        self.extensions.push((kind, rest.to_vec()));
        self
    }

    /// Adds an IPv6 extension header of 8 bytes with padding only.
    #[must_use]
    pub fn padding(self, kind: u8) -> Self {
        self.extension(kind, &[0, 1, 4, 0, 0, 0, 0])
    }

    /// Makes it a fragment: `offset` is in bytes; `more` is true if others follow. For IPv6 the fragment
    /// header comes after the extensions so far.
    #[must_use]
    pub fn fragment(mut self, id: u16, offset: u16, more: bool) -> Self {
        let units = offset / 8;
        if self.src.is_ipv4() {
            self.id = id;
            self.fragment = units | u16::from(more) << 13;
            return self;
        }
        let mut rest = vec![0];
        rest.extend((units << 3 | u16::from(more)).to_be_bytes());
        rest.extend([0, 0]);
        rest.extend(id.to_be_bytes());
        self.extension(protocol::FRAGMENT, &rest)
    }

    /// Replaces the length field: total length of IPv4, payload length of IPv6.
    #[must_use]
    pub fn length(mut self, length: u16) -> Self {
        self.length = Some(length);
        self
    }

    /// The frame with this transport protocol and payload.
    pub fn frame(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let packet = self.packet(protocol, payload);
        ethernet(
            match self.src {
                IpAddr::V4(_) => ether::IPV4,
                IpAddr::V6(_) => ether::IPV6,
            },
            &packet,
        )
    }

    /// The packet without an Ethernet header.
    pub fn packet(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.v4(src, dst, protocol, payload),
            (IpAddr::V6(src), IpAddr::V6(dst)) => self.v6(src, dst, protocol, payload),
            (src, dst) => panic!("{src} and {dst} are not of one family"),
        }
    }

    fn v4(&self, src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let header = 20 + self.options.len();
        let words = u8::try_from(header / 4).expect("at most 15 words");
        let length = self
            .length
            .unwrap_or_else(|| length(header + payload.len()));
        let mut packet = vec![0x40 | words, 0];
        packet.extend(length.to_be_bytes());
        packet.extend(self.id.to_be_bytes());
        packet.extend(self.fragment.to_be_bytes());
        packet.extend([self.hops, protocol, 0, 0]);
        packet.extend(src.octets());
        packet.extend(dst.octets());
        packet.extend(&self.options);
        packet.extend(payload);
        packet
    }

    fn v6(&self, src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut content = Vec::new();
        for (i, (_, rest)) in self.extensions.iter().enumerate() {
            content.push(
                self.extensions
                    .get(i + 1)
                    .map_or(protocol, |(kind, _)| *kind),
            );
            content.extend(rest);
        }
        content.extend(payload);
        let first = self.extensions.first().map_or(protocol, |(kind, _)| *kind);
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend(
            self.length
                .unwrap_or_else(|| length(content.len()))
                .to_be_bytes(),
        );
        packet.extend([first, self.hops]);
        packet.extend(src.octets());
        packet.extend(dst.octets());
        packet.extend(content);
        packet
    }

    /// A UDP datagram.
    pub fn udp(&self, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
        self.frame(protocol::UDP, &udp(from, to, payload))
    }

    /// A TCP segment with these flags.
    pub fn tcp(&self, from: u16, to: u16, flags: u8) -> Vec<u8> {
        self.frame(protocol::TCP, &tcp(from, to, flags))
    }

    /// A TCP segment with these flags, this sequence number and acknowledgment, and this data.
    pub fn tcp_segment(
        &self,
        (from, to): (u16, u16),
        flags: u8,
        (sequence, acknowledged): (u32, u32),
        data: &[u8],
    ) -> Vec<u8> {
        let mut segment = tcp(from, to, flags);
        segment[4..8].copy_from_slice(&sequence.to_be_bytes());
        segment[8..12].copy_from_slice(&acknowledged.to_be_bytes());
        segment.extend(data);
        self.frame(protocol::TCP, &segment)
    }

    /// An SCTP packet with an INIT chunk.
    pub fn sctp(&self, from: u16, to: u16) -> Vec<u8> {
        let mut packet = ports(from, to);
        packet.extend([0; 8]);
        packet.extend([1, 0, 0, 20]);
        packet.extend([0; 16]);
        self.frame(protocol::SCTP, &packet)
    }

    /// An ICMP or ICMPv6 message, depending on the family: type, code, and the bytes after the checksum.
    pub fn icmp(&self, kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
        let mut message = vec![kind, code, 0, 0];
        message.extend(rest);
        let protocol = match self.src {
            IpAddr::V4(_) => protocol::ICMP,
            IpAddr::V6(_) => protocol::ICMPV6,
        };
        self.frame(protocol, &message)
    }

    /// A "port unreachable" error about `quoted`, an Ethernet frame.
    pub fn icmp_unreachable(&self, quoted: &[u8]) -> Vec<u8> {
        let rest = [&[0; 4], &quoted[ETHERNET..]].concat();
        if quoted[ETHERNET] >> 4 == 4 {
            self.icmp(3, 3, &rest)
        } else {
            self.icmp(1, 4, &rest)
        }
    }

    /// An echo request with this identifier.
    pub fn echo(&self, id: u16) -> Vec<u8> {
        let kind = if self.src.is_ipv4() { 8 } else { 128 };
        self.icmp(kind, 0, &echo(id))
    }

    /// An echo reply with this identifier.
    pub fn echo_reply(&self, id: u16) -> Vec<u8> {
        let kind = if self.src.is_ipv4() { 0 } else { 129 };
        self.icmp(kind, 0, &echo(id))
    }
}

fn length(bytes: usize) -> u16 {
    bytes.try_into().expect("a packet has at most 65,535 bytes")
}

fn echo(id: u16) -> Vec<u8> {
    let mut rest = id.to_be_bytes().to_vec();
    rest.extend([0, 1]);
    rest.extend(b"echo");
    rest
}

fn ports(from: u16, to: u16) -> Vec<u8> {
    [from.to_be_bytes(), to.to_be_bytes()].concat()
}

/// A UDP header (without checksum) and its payload.
pub fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram = ports(from, to);
    datagram.extend(length(8 + payload.len()).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    datagram
}

/// A TCP header with these flags, without options.
pub fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut segment = ports(from, to);
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment
}

/// TCP flags.
pub mod flag {
    #![expect(missing_docs, reason = "each is named as RFC 9293 names it")]
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
    pub const URG: u8 = 0x20;
}

/// A DNS query for `shop.test`, type A.
pub fn question() -> Vec<u8> {
    let mut message = vec![0xbe, 0xef, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    message.extend(b"\x04shop\x04test\x00");
    message.extend([0, 1, 0, 1]);
    message
}

//! Frames that test whether the packets on an interface reach the programs.
//!
//! A probe takes the path of a bounced query: out on the interface to `to_pod`, which turns it round, and in
//! again to `from_pod`, which counts and drops it. A program that takes packets away before one of the two
//! takes probes away, too. A pod cannot set the mark of a probe, because the kernel scrubs the mark of a
//! packet that crosses network namespaces.

use std::net::{Ipv4Addr, Ipv6Addr};

use egress_common::ids::IfIndex;
use etherparse::PacketBuilder;

use super::frame_sender::FrameSender;

/// A group address that no bridge forwards (IEEE 802.1Q, table 8-1): a probe that passes the programs floods
/// nothing.
const TO: [u8; 6] = [0x01, 0x80, 0xc2, 0x00, 0x00, 0x01];
/// A locally administered address that no other device has.
const FROM: [u8; 6] = [0x02, 0x65, 0x67, 0x72, 0x65, 0x73];
/// No network stack accepts or forwards a packet to these addresses that comes from outside
/// (`ip_route_input_slow`, `net/ipv4/route.c`; `ip6_rcv_core`, `net/ipv6/ip6_input.c`).
const NOWHERE: Ipv4Addr = Ipv4Addr::UNSPECIFIED;
const NOWHERE6: Ipv6Addr = Ipv6Addr::LOCALHOST;
/// No router forwards a packet with this hop limit.
const HOP_LIMIT: u8 = 1;
/// The port of the discard service (RFC 863).
const DISCARD: u16 = 9;
/// Explains the packet to a person who finds it in a capture.
const PAYLOAD: &[u8] = b"egress-agent: does this pass its programs?";

/// The probes for an interface: a frame as its pod would send it, for each of the pod's address families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The interface's index.
    pub ifindex: IfIndex,
    /// The pod's IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// The pod's IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

impl Probe {
    /// Sends the frames. Returns whether all of them went out.
    pub(super) fn send(&self, frame_sender: &FrameSender) -> bool {
        let mut frames = self.frames();
        frames.all(|frame| frame_sender.probe(self.ifindex, &frame).is_ok())
    }

    fn frames(&self) -> impl Iterator<Item = Vec<u8>> {
        let ethernet = || PacketBuilder::ethernet2(FROM, TO);
        let v4 = self
            .v4
            .map(|from| ethernet().ipv4(from.octets(), NOWHERE.octets(), HOP_LIMIT));
        let v6 = self
            .v6
            .map(|from| ethernet().ipv6(from.octets(), NOWHERE6.octets(), HOP_LIMIT));
        v4.into_iter().chain(v6).filter_map(|step| {
            let mut frame = Vec::new();
            let udp = step.udp(DISCARD, DISCARD);
            udp.write(&mut frame, PAYLOAD).ok()?;
            Some(frame)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_has_a_frame_of_each_family_that_the_pod_has() {
        let probe = Probe {
            ifindex: IfIndex::new(7),
            v4: Some(Ipv4Addr::new(10, 1, 1, 2)),
            v6: Some(Ipv6Addr::new(0xfd01, 1, 0, 0, 0, 0, 0, 2)),
        };
        let frames: Vec<_> = probe.frames().collect();
        let types: Vec<_> = frames.iter().map(|frame| [frame[12], frame[13]]).collect();
        assert_eq!(types, [[0x08, 0x00], [0x86, 0xdd]]);
        let only_v6 = Probe { v4: None, ..probe };
        assert_eq!(only_v6.frames().count(), 1);
    }
}

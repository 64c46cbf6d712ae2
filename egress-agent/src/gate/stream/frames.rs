//! Segments that the gate creates: parts of longer segments, and its own.

use egress_common::{
    address::Address,
    ids::IfIndex,
    packet::{ETHERNET_LEN, Packet, TCP_ACK, TCP_FIN, TCP_RST},
    protocol::{self, bits},
};
use etherparse::{PacketBuilder, PacketBuilderStep, TcpHeader};

use super::{
    super::checksum,
    segment::{OPTION_PADDING, PSH, Segment},
};

/// The hop limit of these frames.
const HOP_LIMIT: u8 = 64;
/// The offset of the flags in a TCP header.
const FLAGS: usize = 13;
const IPV6_HEADER: usize = 40;
/// The length of a TCP header without options.
const TCP_HEADER: usize = 20;
/// A timestamps option after two bytes of padding (RFC 7323, appendix A), without its values.
const TIMESTAMPS: [u8; 4] = [1, 1, 8, 10];

/// The end of the connection that receives a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum To {
    Pod,
    Resolver,
}

/// Sends frames.
pub(in super::super) trait Out {
    /// Sends a frame to one end.
    fn put(&mut self, to: To, frame: &[u8]);
    /// The interface on which frames are sent.
    fn interface(&self) -> IfIndex;
    /// Selects another interface.
    fn select_interface(&mut self, interface: IfIndex);
}

/// Sends the segment on unchanged, except that it completes a checksum that was left to the hardware.
pub(super) fn put_back(segment: &Segment<'_>, to: To, out: &mut impl Out) {
    if segment.checksum == checksum::Checksum::Whole {
        out.put(to, segment.frame);
        return;
    }
    let mut frame = segment.frame.to_vec();
    let end = segment.headers.len() + segment.payload.len();
    checksum::write_tcp(&mut frame, end, segment.packet);
    out.put(to, &frame);
}

/// Sends the segment on without its payload and without its FIN.
pub(super) fn put_bare(segment: &Segment<'_>, to: To, out: &mut impl Out) {
    if segment.payload.is_empty() && !segment.has(TCP_FIN) {
        put_back(segment, to, out);
        return;
    }
    let cut = Cut {
        seq: segment.seq,
        payload: &[],
        fin: false,
        size: 1,
    };
    put_cut(segment, &cut, to, out);
}

/// The segment's frame with only those options that do not change the meaning of the stream: maximum segment
/// size, window scale, selective acknowledgments, timestamps. `None` when the segment has no other options.
///
/// Multipath TCP (RFC 8684) assembles a stream from several connections, by other numbers than the segments'
/// sequence numbers. If the SYN lacks its options, both ends fall back to TCP. A listener that sends SYN
/// cookies also accepts the options of later segments, so all segments are checked.
pub(super) fn with_known_options(segment: &Segment<'_>) -> Option<Vec<u8>> {
    let at = segment.packet.l4_offset as usize + TCP_HEADER;
    let options = segment.headers.get(at..)?;
    let mut known = options.to_vec();
    keep_known_options(&mut known);
    if known == options {
        return None;
    }
    let mut frame = segment.frame.to_vec();
    write(&mut frame, at, &known);
    let end = segment.headers.len() + segment.payload.len();
    checksum::write_tcp(&mut frame, end, segment.packet);
    Some(frame)
}

/// Replaces all other options with padding, and everything after an option that cannot be read.
fn keep_known_options(mut options: &mut [u8]) {
    while let Some(&kind) = options.first() {
        let len = match kind {
            // An end of list is treated as padding: receivers either do so, or stop reading.
            0 | OPTION_PADDING => 1,
            _ => usize::from(options.get(1).copied().unwrap_or(0)),
        };
        if len == 0 || len > options.len() || (len == 1 && kind > OPTION_PADDING) {
            options.fill(OPTION_PADDING);
            return;
        }
        let (option, rest) = std::mem::take(&mut options).split_at_mut(len);
        if !matches!(kind, 2..=5 | 8) {
            option.fill(OPTION_PADDING);
        }
        options = rest;
    }
}

/// A part of a stream to send with the headers of a segment.
pub(super) struct Cut<'a> {
    pub(super) seq: u32,
    pub(super) payload: &'a [u8],
    /// Whether the stream ends after the payload.
    pub(super) fin: bool,
    /// The largest payload of one frame.
    pub(super) size: usize,
}

/// Sends segments with the headers of this one and other content. An aggregate of segments is longer than an
/// interface accepts, so it is cut as its sender's interface would have done.
pub(super) fn put_cut(segment: &Segment<'_>, cut: &Cut<'_>, to: To, out: &mut impl Out) {
    let mut seq = cut.seq;
    let mut rest = cut.payload;
    let mut number: u16 = 0;
    loop {
        let (chunk, behind) = rest.split_at_checked(cut.size).unwrap_or((rest, &[]));
        rest = behind;
        let mut frame = Vec::with_capacity(segment.headers.len() + chunk.len());
        frame.extend_from_slice(segment.headers);
        frame.extend_from_slice(chunk);
        let at = segment.packet.l4_offset as usize;
        write(&mut frame, at + 4, &seq.to_be_bytes());
        let mut flags = segment.flags & !(TCP_FIN | PSH);
        if rest.is_empty() {
            flags |= segment.flags & PSH;
            if cut.fin {
                flags |= TCP_FIN;
            }
        }
        write(&mut frame, at + FLAGS, &[flags]);
        write_ip(&mut frame, segment.packet, number);
        let end = frame.len();
        checksum::write_tcp(&mut frame, end, segment.packet);
        out.put(to, &frame);
        seq = seq.wrapping_add(chunk.len() as u32);
        number = number.wrapping_add(1);
        if rest.is_empty() {
            return;
        }
    }
}

/// Sets length, identification and header checksum for this packet.
fn write_ip(frame: &mut [u8], packet: &Packet, number: u16) {
    let ip = ETHERNET_LEN as usize;
    let length = |header: usize| {
        let length = frame.len() - ip - header;
        u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
    };
    if packet.version == 6 {
        let length = length(IPV6_HEADER);
        write(frame, ip + 4, &length);
        return;
    }
    let length = length(0);
    write(frame, ip + 2, &length);
    let id = match frame.get(ip + 4..ip + 6) {
        Some(&[a, b]) => u16::from_be_bytes([a, b]).wrapping_add(number),
        _ => number,
    };
    write(frame, ip + 4, &id.to_be_bytes());
    write(frame, ip + 10, &[0, 0]);
    let header_len = frame
        .get(ip)
        .map_or(0, |first| usize::from(first & 0xf) * 4);
    if let Some(header) = frame.get(ip..ip + header_len) {
        let sum = checksum::of_ipv4_header(header);
        write(frame, ip + 10, &sum);
    }
}

fn write(frame: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(field) = frame.get_mut(at..at + bytes.len()) {
        field.copy_from_slice(bytes);
    }
}

/// The two ends of a connection, with their addresses in frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pod_mac: [u8; 6],
    node_mac: [u8; 6],
    pub(super) pod_addr: Address,
    pub(super) resolver: Address,
    pub(super) pod_port: u16,
    pub(super) resolver_port: u16,
    version: u8,
}

/// A segment that the gate creates in the name of one end.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Own<'a> {
    pub(super) seq: u32,
    pub(super) ack: Option<u32>,
    pub(super) window: u16,
    pub(super) flags: u8,
    /// The value and the echo.
    pub(super) timestamps: Option<(u32, u32)>,
    pub(super) payload: &'a [u8],
}

impl Ends {
    /// The ends in a frame on its way to the end `to`.
    pub(super) fn of(frame: &[u8], packet: &Packet, to: To) -> Option<Self> {
        let (destination, rest) = frame.split_first_chunk::<6>()?;
        let (source, _) = rest.split_first_chunk::<6>()?;
        Some(match to {
            To::Resolver => Self {
                pod_mac: *source,
                node_mac: *destination,
                pod_addr: packet.src,
                resolver: packet.dst,
                pod_port: packet.src_port,
                resolver_port: packet.dst_port,
                version: packet.version,
            },
            To::Pod => Self {
                pod_mac: *destination,
                node_mac: *source,
                pod_addr: packet.dst,
                resolver: packet.src,
                pod_port: packet.dst_port,
                resolver_port: packet.src_port,
                version: packet.version,
            },
        })
    }

    /// A packet to the end `to`, as reports describe it.
    pub(super) fn packet(&self, to: To) -> Packet {
        let pod = (self.pod_addr, self.pod_port);
        let resolver = (self.resolver, self.resolver_port);
        let ((src, src_port), (dst, dst_port)) = match to {
            To::Resolver => (pod, resolver),
            To::Pod => (resolver, pod),
        };
        Packet {
            src,
            dst,
            src_port,
            dst_port,
            protocol: protocol::TCP,
            bit: bits::TCP,
            version: self.version,
            ..Packet::EMPTY
        }
    }

    /// Sends a segment in the name of the other end.
    pub(super) fn put_own(&self, to: To, own: &Own<'_>, out: &mut impl Out) {
        // Building fails only if the payload is too long for a packet.
        if let Some(frame) = self.frame(to, own) {
            out.put(to, &frame);
        }
    }

    /// Sends a reset in the name of the other end.
    pub(super) fn put_reset(&self, to: To, seq: u32, ack: Option<u32>, out: &mut impl Out) {
        let reset = Own {
            seq,
            ack,
            flags: TCP_RST,
            ..Own::default()
        };
        self.put_own(to, &reset, out);
    }

    fn frame(&self, to: To, own: &Own<'_>) -> Option<Vec<u8>> {
        let packet = self.packet(to);
        let (from_mac, to_mac) = match to {
            To::Resolver => (self.pod_mac, self.node_mac),
            To::Pod => (self.node_mac, self.pod_mac),
        };
        let ethernet = PacketBuilder::ethernet2(from_mac, to_mac);
        let step = if self.version == 4 {
            ethernet.ipv4(v4(packet.src), v4(packet.dst), HOP_LIMIT)
        } else {
            ethernet.ipv6(packet.src, packet.dst, HOP_LIMIT)
        };
        let mut step: PacketBuilderStep<TcpHeader> =
            step.tcp(packet.src_port, packet.dst_port, own.seq, own.window);
        if let Some(ack) = own.ack {
            step = step.ack(ack);
        }
        if own.flags & TCP_RST != 0 {
            step = step.rst();
        }
        if own.flags & TCP_FIN != 0 {
            step = step.fin();
        }
        if own.flags & PSH != 0 {
            step = step.psh();
        }
        if let Some((value, echo)) = own.timestamps {
            let mut options = TIMESTAMPS.to_vec();
            options.extend(value.to_be_bytes());
            options.extend(echo.to_be_bytes());
            step = step.options_raw(&options).ok()?;
        }
        let mut frame = Vec::with_capacity(own.payload.len() + 96);
        step.write(&mut frame, own.payload).ok()?;
        Some(frame)
    }
}

/// Resets both ends of an unknown connection, so that each gives it up at once (RFC 9293, section 3.5.2). A
/// reset is not answered.
pub(super) fn reset_unknown(segment: &Segment<'_>, to: To, out: &mut impl Out) {
    if segment.has(TCP_RST) {
        return;
    }
    let Some(ends) = Ends::of(segment.frame, segment.packet, to) else {
        return;
    };
    let back = match to {
        To::Pod => To::Resolver,
        To::Resolver => To::Pod,
    };
    if segment.has(TCP_ACK) {
        ends.put_reset(back, segment.ack, None, out);
        ends.put_reset(to, segment.seq, Some(segment.ack), out);
    }
}

fn v4(address: Address) -> [u8; 4] {
    let [.., a, b, c, d] = address;
    [a, b, c, d]
}

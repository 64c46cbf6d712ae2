//! Reads a TCP segment (RFC 9293, section 3.1) from a frame.

use egress_common::packet::{ETHERNET_LEN, Packet};

use super::super::checksum::{self, Checksum};

/// TCP PSH.
pub(super) const PSH: u8 = 0x08;
/// TCP URG.
pub(super) const URG: u8 = 0x20;

const OPTION_END: u8 = 0;
pub(super) const OPTION_PADDING: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_SCALE: u8 = 3;
const OPTION_TIMESTAMPS: u8 = 8;

const TCP_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// A segment and its frame.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Segment<'a> {
    pub(super) frame: &'a [u8],
    pub(super) packet: &'a Packet,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) flags: u8,
    /// The window field of the header, not scaled.
    pub(super) window: u16,
    /// The maximum segment size that a SYN announces.
    pub(super) mss: Option<u16>,
    /// The window scale that a SYN announces for later segments (RFC 7323, section 2).
    pub(super) scale: Option<u8>,
    /// Timestamp value (RFC 7323, section 3).
    pub(super) timestamp: Option<u32>,
    /// The Ethernet, IP and TCP headers.
    pub(super) headers: &'a [u8],
    pub(super) payload: &'a [u8],
    pub(super) checksum: Checksum,
}

impl<'a> Segment<'a> {
    /// Reads the segment that `packet` describes. `None` when the frame is shorter than its headers say.
    pub(in super::super) fn read(frame: &'a [u8], packet: &'a Packet) -> Option<Self> {
        let at = packet.l4_offset as usize;
        let end = end_of_packet(frame, packet)?;
        let segment = frame.get(at..end)?;
        let (header, _) = segment.split_first_chunk::<TCP_HEADER>()?;
        let [
            _,
            _,
            _,
            _,
            s0,
            s1,
            s2,
            s3,
            a0,
            a1,
            a2,
            a3,
            offset,
            flags,
            w0,
            w1,
            c0,
            c1,
            _,
            _,
        ] = *header;
        let (headers, payload) = segment.split_at_checked(usize::from(offset >> 4) * 4)?;
        let mut read = Self {
            frame,
            packet,
            seq: u32::from_be_bytes([s0, s1, s2, s3]),
            ack: u32::from_be_bytes([a0, a1, a2, a3]),
            flags,
            window: u16::from_be_bytes([w0, w1]),
            mss: None,
            scale: None,
            timestamp: None,
            headers: frame.get(..at + headers.len())?,
            payload,
            checksum: checksum::of_tcp(segment, [c0, c1], packet),
        };
        read.read_options(headers.get(TCP_HEADER..)?);
        Some(read)
    }

    /// Ignores options that cannot be read, as the receiver does.
    fn read_options(&mut self, mut options: &[u8]) {
        while let Some((&kind, rest)) = options.split_first() {
            match kind {
                OPTION_END => return,
                OPTION_PADDING => {
                    options = rest;
                    continue;
                }
                _ => {}
            }
            let Some((&len, _)) = rest.split_first() else {
                return;
            };
            let Some((option, after)) = options.split_at_checked(usize::from(len).max(2)) else {
                return;
            };
            match (kind, option) {
                (OPTION_MSS, &[_, _, a, b]) => self.mss = Some(u16::from_be_bytes([a, b])),
                (OPTION_SCALE, &[_, _, bits]) => self.scale = Some(bits),
                (OPTION_TIMESTAMPS, &[_, _, a, b, c, d, _, _, _, _]) => {
                    self.timestamp = Some(u32::from_be_bytes([a, b, c, d]));
                }
                _ => {}
            }
            options = after;
        }
    }

    /// The position at which its payload ends if it begins at this position.
    pub(super) fn end(&self, position: i64) -> i64 {
        position.saturating_add_unsigned(self.payload.len() as u64)
    }

    /// Whether all of these flags are set.
    pub(super) fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }
}

/// The end of the IP packet in its frame, which may have padding.
fn end_of_packet(frame: &[u8], packet: &Packet) -> Option<usize> {
    let ip = ETHERNET_LEN as usize;
    let length = |at: usize| -> Option<usize> {
        let bytes = frame.get(at..at + 2)?;
        Some(usize::from(u16::from_be_bytes([bytes[0], bytes[1]])))
    };
    if packet.version == 4 {
        Some(ip + length(ip + 2)?)
    } else {
        Some(ip + IPV6_HEADER + length(ip + 4)?)
    }
}

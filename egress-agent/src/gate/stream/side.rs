//! The announcements of one end of a connection: its window, its timestamps, its maximum segment size.

use egress_common::packet::TCP_SYN;

use super::segment::Segment;

/// The limits for the payload of the segments that the gate cuts, whatever a SYN announces (RFC 9293, section
/// 3.7.1).
pub(super) const SIZE: std::ops::RangeInclusive<usize> = 256..=16_384;
/// The maximum segment size of a SYN without the option, over IPv4.
const DEFAULT_MSS: u16 = 536;

/// The largest window scale (RFC 7323, section 2.3).
const MOST_SCALE: u32 = 14;

/// The last announcements of one end.
#[derive(Clone, Copy, Default)]
pub(super) struct Side {
    /// The window field of its headers.
    pub(super) window: u16,
    /// Its window in bytes.
    pub(super) takes: usize,
    /// The latest timestamp value (RFC 7323, section 4.2).
    pub(super) timestamp: Option<u32>,
    mss: Option<u16>,
    /// The window scale that its SYN offers.
    scale: Option<u8>,
}

impl Side {
    /// Records the announcements of a segment, whose window has this scale.
    pub(super) fn note(&mut self, segment: &Segment<'_>, scale: u32) {
        self.window = segment.window;
        self.takes = usize::from(segment.window) << scale;
        self.mss = segment.mss.or(self.mss);
        if segment.has(TCP_SYN) {
            self.scale = segment.scale;
        }
        let is_later = |value: u32, known: u32| value.wrapping_sub(known).cast_signed() > 0;
        self.timestamp = match (segment.timestamp, self.timestamp) {
            (Some(value), Some(known)) if !is_later(value, known) => Some(known),
            (value, known) => value.or(known),
        };
    }

    /// The maximum segment size that it accepts.
    pub(super) fn mss(&self) -> usize {
        usize::from(self.mss.unwrap_or(DEFAULT_MSS))
    }

    /// The window scale that it offers.
    pub(super) fn scale(&self) -> Option<u32> {
        self.scale.map(|bits| u32::from(bits).min(MOST_SCALE))
    }
}

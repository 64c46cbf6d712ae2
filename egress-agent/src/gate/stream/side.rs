//! What one side of a connection says of itself: its window, its timestamps, the segments that it takes.

use egress_common::packet::TCP_SYN;

use super::segment::Segment;

/// Least and most payload of the segments that the gate cuts, whatever a SYN says (RFC 9293,
/// section 3.7.1).
pub(super) const SIZE: std::ops::RangeInclusive<usize> = 256..=16_384;
/// What a SYN without the option context, over IPv4.
const DEFAULT_MSS: u16 = 536;

/// Most bits by which a window is scaled (RFC 7323, section 2.3).
const MOST_SCALE: u32 = 14;

/// What was last seen of one side.
#[derive(Clone, Copy, Default)]
pub(super) struct Side {
    /// As its headers have it.
    pub(super) window: u16,
    /// How many bytes its window is.
    pub(super) takes: usize,
    /// The latest (RFC 7323, section 4.2).
    pub(super) timestamp: Option<u32>,
    mss: Option<u16>,
    /// The window scale that its SYN offers.
    scale: Option<u8>,
}

impl Side {
    /// Notes what a segment says. The window is scaled by so many bits.
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

    /// The longest segment that it takes.
    pub(super) fn mss(&self) -> usize {
        usize::from(self.mss.unwrap_or(DEFAULT_MSS))
    }

    /// By how many bits it offers to scale its windows.
    pub(super) fn scale(&self) -> Option<u32> {
        self.scale.map(|bits| u32::from(bits).min(MOST_SCALE))
    }
}

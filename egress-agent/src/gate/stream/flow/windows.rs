//! The sizes of segments and windows that the ends of a connection accept.

use super::{
    super::{
        segment::Segment,
        side::{SIZE, Side},
    },
    Flow,
};

impl Flow {
    /// The largest payload that both ends accept, in a segment with the options of this one.
    fn size(&self, options: usize) -> usize {
        self.pod
            .mss()
            .min(self.resolver.mss())
            .saturating_sub(options)
            .clamp(*SIZE.start(), *SIZE.end())
    }

    pub(super) fn size_of(&self, segment: &Segment<'_>) -> usize {
        let at = segment.packet.l4_offset as usize + 20;
        self.size(segment.headers.len().saturating_sub(at))
    }

    /// The largest payload of a segment that the gate creates.
    pub(in super::super) fn own_size(&self) -> usize {
        self.size(12)
    }

    /// The window scale of an end; zero unless both ends offer one (RFC 7323, section 2.2).
    pub(super) fn scale(&self, side: &Side) -> u32 {
        match (self.pod.scale(), self.resolver.scale()) {
            (Some(_), Some(_)) => side.scale().unwrap_or(0),
            _ => 0,
        }
    }

    /// Records window, timestamp and options of a segment of the connection.
    pub(in super::super) fn note_resolver(&mut self, segment: &Segment<'_>, now_ns: u64) {
        self.used_ns = now_ns;
        self.resolver.note(segment, self.scale(&self.resolver));
    }

    /// The window of a segment from this end in bytes.
    pub(in super::super) fn window_in(&self, side: &Side, segment: &Segment<'_>) -> usize {
        usize::from(segment.window) << self.scale(side)
    }

    /// The window field for a window of this many bytes in the name of this end. A part of a unit is rounded
    /// up; otherwise an end with a large unit would see a closed window. The gate drops bytes beyond the
    /// window, and the sender repeats them.
    pub(in super::super) fn window_of(&self, side: &Side, bytes: usize) -> u16 {
        let units = bytes.div_ceil(1 << self.scale(side));
        u16::try_from(units).unwrap_or(u16::MAX)
    }
}

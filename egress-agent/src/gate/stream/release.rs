//! Which segments put back what may be put back of a stream.

use egress_common::packet::TCP_FIN;

use super::{
    buffer::StreamBuffer,
    frames::{Cut, Out, To, put_back, put_cut},
    segment::Segment,
};

/// What became of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Put {
    /// What could be sent on has been.
    Sent,
    /// Its receiver has acknowledged all of it before.
    Old,
    /// Nothing of it may be sent on yet.
    Held,
}

/// Sends on what may be sent of a stream, with the headers of the segment that has come. Where it can
/// be, that is the segment as it came.
pub(super) fn put_released(
    half: &mut StreamBuffer,
    segment: &Segment<'_>,
    position: i64,
    size: usize,
    to: To,
    out: &mut impl Out,
) -> Put {
    let end = segment.end(position);
    let fin = half.is_ended() && half.released == half.next();
    let has_fin = segment.has(TCP_FIN);
    let (from, until) = if half.released > half.sent || (fin && !half.fin_sent) {
        (half.sent, half.released)
    } else if segment.payload.is_empty() && !has_fin {
        put_back(segment, to, out);
        return Put::Sent;
    } else if end > half.sent.cast_signed() || (has_fin && !half.fin_sent) {
        return Put::Held;
    } else if end > half.acked.cast_signed() || (has_fin && !half.fin_acked) {
        // A repetition. What has been acknowledged of it is left out: it was not compared.
        let from = position.max(half.acked.cast_signed()).unsigned_abs();
        (from, end.max(0).unsigned_abs().max(from))
    } else {
        return Put::Old;
    };
    // A sender that says twice where it ends, and not the same, is believed once.
    let fin = fin && until == half.released;
    let as_it_came = position == from.cast_signed()
        && end == until.cast_signed()
        && has_fin == fin
        && segment.payload.len() <= size;
    if as_it_came {
        put_back(segment, to, out);
    } else {
        let cut = Cut {
            seq: half.seq(from),
            payload: half.slice(from, until),
            fin,
            size,
        };
        put_cut(segment, &cut, to, out);
    }
    if until > half.sent || fin {
        half.sent = half.sent.max(until);
        half.fin_sent |= fin;
    }
    Put::Sent
}

//! Puts back the allowed bytes of a stream.

use egress_common::packet::TCP_FIN;

use super::{
    buffer::StreamBuffer,
    frames::{Cut, Out, To, put_back, put_cut},
    segment::Segment,
};

/// The outcome for a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Put {
    /// Its allowed bytes have been put back.
    Sent,
    /// The receiver has acknowledged all of it before.
    Old,
    /// None of its bytes is allowed yet.
    Held,
}

/// Puts back the allowed bytes of a stream with the headers of the current segment. If possible, puts back
/// the segment unchanged.
pub(super) fn put_allowed(
    stream: &mut StreamBuffer,
    segment: &Segment<'_>,
    position: i64,
    size: usize,
    to: To,
    out: &mut impl Out,
) -> Put {
    let end = segment.end(position);
    let fin = stream.is_ended() && stream.allowed == stream.next();
    let has_fin = segment.has(TCP_FIN);
    let (from, until) = if stream.allowed > stream.sent || (fin && !stream.fin_sent) {
        (stream.sent, stream.allowed)
    } else if segment.payload.is_empty() && !has_fin {
        put_back(segment, to, out);
        return Put::Sent;
    } else if end > stream.sent.cast_signed() || (has_fin && !stream.fin_sent) {
        return Put::Held;
    } else if end > stream.acked.cast_signed() || (has_fin && !stream.fin_acked) {
        // A repetition. Acknowledged bytes are left out, because they were not compared.
        let from = position.max(stream.acked.cast_signed()).unsigned_abs();
        (from, end.max(0).unsigned_abs().max(from))
    } else {
        return Put::Old;
    };
    // Only the first of two contradictory ends of the stream counts.
    let fin = fin && until == stream.allowed;
    let as_it_came = position == from.cast_signed()
        && end == until.cast_signed()
        && has_fin == fin
        && segment.payload.len() <= size;
    if as_it_came {
        put_back(segment, to, out);
    } else {
        let cut = Cut {
            seq: stream.seq(from),
            payload: stream.slice(from, until),
            fin,
            size,
        };
        put_cut(segment, &cut, to, out);
    }
    if until > stream.sent || fin {
        stream.sent = stream.sent.max(until);
        stream.fin_sent |= fin;
    }
    Put::Sent
}

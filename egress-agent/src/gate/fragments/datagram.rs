//! The fragments of one datagram.

use egress_common::packet::{Fragment, Packet};

use super::piece::Piece;

/// Most fragments of one datagram: the longest one has 54 at the smallest MTU of IPv6.
const PIECES: usize = 64;

/// An incomplete datagram.
#[derive(Debug)]
pub(super) struct Datagram {
    pub(super) since_ns: u64,
    /// In the order of their offsets; none overlaps another.
    pieces: Vec<Piece>,
    /// The length of the datagram, once its last fragment is known.
    end: Option<usize>,
    pub(super) kept: usize,
}

/// A complete datagram.
#[derive(Debug)]
pub(in super::super) struct Whole {
    /// The headers of the datagram, as if it were not fragmented.
    pub(in super::super) packet: Packet,
    /// The headers of the first fragment, then the whole content of the datagram.
    pub(in super::super) frame: Vec<u8>,
    /// In the order of their offsets.
    pub(in super::super) pieces: Vec<Piece>,
}

impl Datagram {
    pub(super) fn new(since_ns: u64) -> Self {
        Self {
            since_ns,
            pieces: Vec::new(),
            end: None,
            kept: 0,
        }
    }

    /// A packet that describes the datagram: the first fragment, which has the ports, if it is there.
    pub(super) fn packet(&self) -> Option<&Packet> {
        self.pieces.first().map(|piece| &piece.packet)
    }

    /// Adds a fragment. An exact repetition is ignored.
    ///
    /// # Errors
    ///
    /// The reason why the datagram cannot be reassembled: a receiver could read other content than the gate
    /// (RFC 5722, section 4; RFC 8200, section 4.5).
    pub(super) fn add(&mut self, piece: Piece) -> Result<(), &'static str> {
        let at = self
            .pieces
            .partition_point(|other| other.start < piece.start);
        let (before, behind) = self.pieces.split_at(at);
        if behind.first().is_some_and(|other| piece.repeats(other)) {
            return Ok(());
        }
        if before.last().is_some_and(|other| other.end() > piece.start)
            || behind
                .first()
                .is_some_and(|other| other.start < piece.end())
        {
            return Err("fragments overlap");
        }
        if self
            .pieces
            .first()
            .is_some_and(|other| !piece.is_like(other))
        {
            return Err("fragments differ in interface, link header or protocol");
        }
        let end = if piece.is_last {
            Some(piece.end())
        } else {
            self.end
        };
        if (piece.is_last && (self.end.is_some() || !behind.is_empty()))
            || end.is_some_and(|end| piece.end() > end)
        {
            return Err("fragments disagree about where the datagram ends");
        }
        if self.pieces.len() == PIECES {
            return Err("the datagram has too many fragments");
        }
        self.end = end;
        self.kept += piece.kept();
        self.pieces.insert(at, piece);
        Ok(())
    }

    /// Whether all fragments are here.
    pub(super) fn is_whole(&self) -> bool {
        let come: usize = self
            .pieces
            .iter()
            .map(|piece| piece.end() - piece.start)
            .sum();
        // No fragments overlap, and none is beyond the end.
        self.end == Some(come)
    }

    /// The datagram, if all fragments are here.
    pub(super) fn whole(self) -> Option<Whole> {
        let first = self.pieces.first().filter(|first| first.is_first())?;
        let mut frame = first.headers().to_vec();
        for piece in &self.pieces {
            frame.extend_from_slice(piece.content());
        }
        Some(Whole {
            packet: Packet {
                fragment: Fragment::None,
                ..first.packet
            },
            frame,
            pieces: self.pieces,
        })
    }
}

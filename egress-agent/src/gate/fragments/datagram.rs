//! The fragments of one datagram.

use egress_common::packet::{Fragment, Packet};

use super::piece::Piece;

/// Most fragments of one datagram: the longest one has 54 at the smallest MTU of IPv6.
const PIECES: usize = 64;

/// A datagram of which not all fragments have come.
#[derive(Debug)]
pub(super) struct Datagram {
    pub(super) since_ns: u64,
    /// In the order in which they stand in the datagram; none overlaps another.
    pieces: Vec<Piece>,
    /// Where the datagram ends, once its last fragment has come.
    end: Option<usize>,
    pub(super) kept: usize,
}

/// A datagram of which all fragments have come.
#[derive(Debug)]
pub(in super::super) struct Whole {
    /// What the headers say of the datagram.
    pub(in super::super) packet: Packet,
    /// The headers of the first fragment, and all that follows them in the datagram.
    pub(in super::super) frame: Vec<u8>,
    /// In the order in which they stand in the datagram.
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

    /// A packet that describes it: the one with the ports, if that has come.
    pub(super) fn packet(&self) -> Option<&Packet> {
        self.pieces.first().map(|piece| &piece.packet)
    }

    /// Adds a fragment. One that repeats another to the byte counts for nothing.
    ///
    /// # Errors
    ///
    /// Why the datagram cannot be put together any more: a receiver could read something else in it
    /// than is read here (RFC 5722, section 4; RFC 8200, section 4.5).
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
            return Err("fragments do not come the same way");
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

    /// Whether all fragments have come.
    pub(super) fn is_whole(&self) -> bool {
        let come: usize = self
            .pieces
            .iter()
            .map(|piece| piece.end() - piece.start)
            .sum();
        // Nothing overlaps, and nothing is behind the end.
        self.end == Some(come)
    }

    /// The datagram, when all fragments have come.
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

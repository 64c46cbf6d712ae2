//! Limits the content of messages on a link to what neighbours need to find each other, so that a neighbour
//! cannot read other data in them.

use super::icmp::{
    ICMPV6_MLD_DONE, ICMPV6_MLD_REPORT, ICMPV6_MLD2_REPORT, ICMPV6_NEIGHBOUR_ADVERTISEMENT,
    ICMPV6_NEIGHBOUR_SOLICITATION, ICMPV6_ROUTER_SOLICITATION,
};
use super::{ETHERNET_LEN, Frame, Packet};
use crate::protocol;

/// The offset of an ICMPv6 message without extension headers.
const MESSAGE: u32 = ETHERNET_LEN + 40;
/// The length of the extension header with the router alert.
const ALERT_LEN: u32 = 8;
/// The router alert of MLD and its padding, after the next-header byte (RFC 2711).
const ALERT: [u8; 7] = [0, 5, 2, 0, 0, 1, 0];

/// Options of neighbour discovery (RFC 4861, section 4.6; RFC 3971, section 5.3.2).
const SOURCE_ADDRESS: u8 = 1;
const TARGET_ADDRESS: u8 = 2;
const NONCE: u8 = 14;
/// The length of each of them.
const OPTION_LEN: u32 = 8;
/// A solicitation has at most its sender's address and a nonce (RFC 7527, section 4.1).
const OPTIONS: u32 = 2;

/// Most records in one report of `MLDv2`; a kernel sends one for each address and each group that a program
/// has joined.
const RECORDS: u32 = 16;
/// Most bytes of such a report: this many records without sources.
const REPORT_MAX: u32 = 8 + 20 * RECORDS;

impl Packet {
    /// Whether a neighbour or router solicitation, a neighbour advertisement or a multicast listener report
    /// has the form that a host needs (RFC 4861, sections 4.1 to 4.4; RFC 7527; RFC 2710, section 3; RFC
    /// 3810, section 5.2), with nothing after it. Link-layer addresses in it must be those of the frame.
    /// Returns false for any other packet.
    #[inline(always)]
    pub fn is_plain_link_message(&self, frame: &impl Frame) -> bool {
        let payload_len = match frame.read::<2>(ETHERNET_LEN + 4) {
            Some(len) => u32::from(u16::from_be_bytes(len)),
            None => return false,
        };
        // No bytes may follow the packet: the shortest message is longer than the shortest frame, so there is
        // no padding.
        if self.icmp_code != 0 || MESSAGE + payload_len != frame.len() {
            return false;
        }
        match self.icmp_type {
            ICMPV6_NEIGHBOUR_SOLICITATION | ICMPV6_NEIGHBOUR_ADVERTISEMENT => {
                self.l4_offset == MESSAGE && self.has_plain_options(frame, MESSAGE + 24)
            }
            ICMPV6_ROUTER_SOLICITATION => {
                self.l4_offset == MESSAGE && self.has_plain_options(frame, MESSAGE + 8)
            }
            ICMPV6_MLD_REPORT | ICMPV6_MLD_DONE => {
                has_plain_alert(frame, self.l4_offset) && frame.len() == self.l4_offset + 24
            }
            ICMPV6_MLD2_REPORT => {
                has_plain_alert(frame, self.l4_offset) && has_plain_records(frame, self.l4_offset)
            }
            _ => false,
        }
    }

    /// Whether only options that the message may have are between `at` and the end.
    #[inline(always)]
    fn has_plain_options(&self, frame: &impl Frame, at: u32) -> bool {
        // The reserved bytes; in an advertisement the first three bits are flags.
        let Some(reserved) = frame.read::<4>(MESSAGE + 4) else {
            return false;
        };
        let flags = if self.icmp_type == ICMPV6_NEIGHBOUR_ADVERTISEMENT {
            0xe0
        } else {
            0
        };
        if reserved[0] & !flags != 0 || reserved[1] != 0 || reserved[2] != 0 || reserved[3] != 0 {
            return false;
        }
        let Some(hardware) = frame.read::<6>(6) else {
            return false;
        };
        let mut at = at;
        let mut i = 0;
        while i < OPTIONS {
            if at == frame.len() {
                return true;
            }
            let Some([kind, len, address @ ..]) = frame.read::<8>(at) else {
                return false;
            };
            let is_own = same_hardware(&address, &hardware);
            let is_plain = match kind {
                SOURCE_ADDRESS => is_own && self.icmp_type != ICMPV6_NEIGHBOUR_ADVERTISEMENT,
                TARGET_ADDRESS => is_own && self.icmp_type == ICMPV6_NEIGHBOUR_ADVERTISEMENT,
                NONCE => self.icmp_type == ICMPV6_NEIGHBOUR_SOLICITATION,
                _ => false,
            };
            if len != 1 || !is_plain {
                return false;
            }
            at += OPTION_LEN;
            i += 1;
        }
        at == frame.len()
    }
}

/// Whether two hardware addresses are the same.
#[inline(always)]
pub const fn same_hardware(a: &[u8; 6], b: &[u8; 6]) -> bool {
    let mut differing = 0;
    let mut i = 0;
    while i < 6 {
        differing |= a[i] ^ b[i];
        i += 1;
    }
    differing == 0
}

/// Whether a message that begins at `at` has no extension header, or only a router alert.
#[inline(always)]
fn has_plain_alert(frame: &impl Frame, at: u32) -> bool {
    if at == MESSAGE {
        return true;
    }
    if at != MESSAGE + ALERT_LEN {
        return false;
    }
    let kind = frame.read::<1>(ETHERNET_LEN + 6);
    let Some([_, rest @ ..]) = frame.read::<8>(MESSAGE) else {
        return false;
    };
    let mut differing = 0;
    let mut i = 0;
    while i < ALERT.len() {
        differing |= rest[i] ^ ALERT[i];
        i += 1;
    }
    kind == Some([protocol::HOP_BY_HOP]) && differing == 0
}

/// Whether an `MLDv2` report at `at` has a bounded number of records, each without auxiliary data.
#[inline(always)]
fn has_plain_records(frame: &impl Frame, at: u32) -> bool {
    if frame.len() > at + REPORT_MAX {
        return false;
    }
    let mut at = at + 8;
    let mut i = 0;
    while i < RECORDS {
        if at == frame.len() {
            return true;
        }
        let Some([_, auxiliary, a, b]) = frame.read::<4>(at) else {
            return false;
        };
        if auxiliary != 0 {
            return false;
        }
        at += 20 + 16 * u32::from(u16::from_be_bytes([a, b]));
        i += 1;
    }
    at == frame.len()
}

//! Reads a plain query.

use super::{
    Message, Steps,
    message::{QUESTION, START, bytes_before},
};
use crate::records::{NAME_WORDS, QUESTION_WORDS};

/// QR, OPCODE: all zero in an ordinary query (RFC 1035, section 4.1.1), in the first byte of the flags.
const NO_PLAIN_QUERY: u32 = 0xf8;
const CLASS_IN: u32 = 1;
/// Type OPT (RFC 6891).
const TYPE_OPT: u32 = 41;
/// The length of an OPT record without options: the root's name, type, class, TTL and length.
const OPT: u32 = 11;
/// Most options of an OPT record.
const OPTIONS: u32 = 8;
/// A byte of a word, in each of its bytes.
const BYTES: u64 = 0x0101_0101_0101_0101;

/// Reads a query of class IN: exactly one uncompressed name, and at most one OPT record; nothing may follow. Returns 1 if it is
/// one. Then `name` has its name, and `query` its question section.
#[inline(always)]
pub fn read<S: Steps>(message: &mut Message) -> u32 {
    let flags = message.byte(START + 2);
    let sections = u64::from_be_bytes(message.read::<8>(START + 4));
    // One question, no answer and authority records, and no or one additional record.
    if flags & NO_PLAIN_QUERY != 0 || sections & !1 != 1 << 48 {
        return 0;
    }
    let name_end = S::walk_name(message, QUESTION);
    if name_end == 0 {
        return 0;
    }
    // Addresses count only in responses of class IN.
    if message.number(name_end + 2) != CLASS_IN {
        return 0;
    }
    let end = name_end + 4;
    if S::fold_name(message, name_end - QUESTION) == 0 {
        return 0;
    }
    if sections & 1 == 0 {
        return u32::from(end == message.end);
    }
    let [root, type_high, type_low] = message.read::<3>(end);
    let record_type = u32::from(type_high) << 8 | u32::from(type_low);
    let options = end + OPT;
    let len = message.number(end + OPT - 2);
    if root != 0 || record_type != TYPE_OPT || options + len != message.end {
        return 0;
    }
    if len == 0 {
        return 1;
    }
    S::read_options(message, options, options + len)
}

/// Copies the name, in lower case, to [`Message::name`], and the question section to [`Message::query`], each followed by
/// zeros. `name_len` counts the root's zero byte. Returns 1.
#[inline(always)]
pub fn fold_name(message: &mut Message, name_len: u32) -> u32 {
    let question_len = name_len + 4;
    message.query.len = question_len;
    let mut index = 0;
    while index < QUESTION_WORDS {
        let at = index as u32 * 8;
        let word = message.question_word(index);
        message.query.question[index] = word & bytes_before(question_len, at);
        if index < NAME_WORDS {
            message.name.name[index] = lower_case(word & bytes_before(name_len, at));
        }
        index += 1;
    }
    1
}

/// Eight bytes with their ASCII letters in lower case. The length bytes of labels are below those of letters.
#[inline(always)]
pub const fn lower_case(word: u64) -> u64 {
    // Each byte below 128 reaches 128 where it is a letter or more, without a carry to the next.
    let low = word & (0x7f * BYTES);
    let from_a = low + (0x80 - b'A' as u64) * BYTES;
    let behind_z = low + (0x80 - b'Z' as u64 - 1) * BYTES;
    let letters = from_a & !behind_z & !word & (0x80 * BYTES);
    word | letters >> 2
}

/// Whether the options of an OPT record end where the record does; there are at most [`OPTIONS`].
#[inline(always)]
pub fn read_options(message: &mut Message, start: u32, end: u32) -> u32 {
    let mut at = start;
    let mut left = OPTIONS;
    while left > 0 {
        left -= 1;
        if at + 4 > end {
            return 0;
        }
        at += 4 + message.number(at + 2);
        if at == end {
            return 1;
        }
    }
    0
}

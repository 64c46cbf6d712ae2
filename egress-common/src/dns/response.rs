//! Reads a plain response.

use super::{
    Message, Steps,
    message::{
        ADDRESSES, AddressRecord, LABELS, NAME_MAX, NameWalk, QUESTION, START, bytes_before,
    },
};
use crate::records::{PendingQuery, QUESTION_WORDS};

/// Most records in all sections.
const RECORDS: u32 = 32;
/// Most aliases that are followed. The agent follows as many.
const ALIASES: u32 = 16;
/// Most compression pointers that are followed from one name.
const POINTERS: u32 = 8;

const CLASS_IN: u32 = 1;
const TYPE_A: u32 = 1;
const TYPE_CNAME: u32 = 5;
const TYPE_AAAA: u32 = 28;
const TYPE_SVCB: u32 = 64;
const TYPE_HTTPS: u32 = 65;
/// The length of a record's fixed fields: type, class, TTL and the length of its data.
const FIXED: u32 = 10;

/// QR, and OPCODE, and TC: of these, a plain response has only the first (RFC 1035, section 4.1.1).
const KIND: u32 = 0xfa;
const RESPONSE: u32 = 0x80;
/// RCODE, in the second byte of the flags.
const RESPONSE_CODE: u32 = 0x0f;
/// The bits of a byte that a compression pointer begins with.
const POINTER: u32 = 0xc0;

/// Whether the message answers this query: it is a response, is not truncated, and repeats the question section byte for
/// byte. It then is ready for [`read`].
#[inline(always)]
pub fn answers(message: &mut Message, query: &PendingQuery) -> u32 {
    let flags = message.byte(START + 2);
    let questions = message.number(START + 4);
    let len = query.len;
    if flags & KIND != RESPONSE || questions != 1 || QUESTION + len > message.end {
        return 0;
    }
    let mut index = 0;
    while index < QUESTION_WORDS {
        let at = index as u32 * 8;
        if at >= len {
            message.next = QUESTION + len;
            return 1;
        }
        let differing = message.question_word(index) ^ query.question[index];
        if differing & bytes_before(len, at) != 0 {
            return 0;
        }
        index += 1;
    }
    message.next = QUESTION + len;
    1
}

/// Reads the records. Returns 1 if each of them is understood; the addresses of the queried name and its aliases are then
/// in [`Message::addresses`]. Bytes behind the last record are ignored, as by stub resolvers.
#[inline(always)]
pub fn read<S: Steps>(message: &mut Message) -> u32 {
    let answers = message.number(START + 6);
    let records = answers + message.number(START + 8) + message.number(START + 10);
    // An error adds no addresses. Its answer section has aliases at most.
    let adds = message.byte(START + 3) & RESPONSE_CODE == 0;
    message.current = QUESTION;
    message.aliases = 0;
    message.ttl = u32::MAX;
    message.found = 0;
    if records > RECORDS {
        return 0;
    }
    let mut index = 0;
    while index < RECORDS {
        if index >= records {
            return 1;
        }
        if S::read_record(message, u32::from(adds && index < answers)) == 0 {
            return 0;
        }
        index += 1;
    }
    1
}

/// Reads the next record. Returns 1 if it is understood.
#[inline(always)]
pub fn read_record<S: Steps>(message: &mut Message, in_answer: u32) -> u32 {
    let start = message.next;
    let fixed = skip_owner::<S>(message, start);
    if fixed == 0 {
        return 0;
    }
    let [t1, t2, c1, c2, l1, l2, l3, l4, d1, d2] = message.read::<10>(fixed);
    let data = fixed + FIXED;
    let len = u32::from(u16::from_be_bytes([d1, d2]));
    let next = data + len;
    if next > message.end {
        return 0;
    }
    message.next = next;
    let record_type = u32::from(u16::from_be_bytes([t1, t2]));
    let class = u32::from(u16::from_be_bytes([c1, c2]));
    if in_answer == 0 || class != CLASS_IN {
        return 1;
    }
    let ttl = u32::from_be_bytes([l1, l2, l3, l4]);
    let ttl = if ttl > i32::MAX as u32 { 0 } else { ttl };
    let ttl = if ttl < message.ttl { ttl } else { message.ttl };
    match record_type {
        TYPE_A if len == 4 => {}
        TYPE_AAAA if len == 16 => {}
        TYPE_CNAME => {}
        TYPE_A | TYPE_AAAA | TYPE_SVCB | TYPE_HTTPS => return 0,
        _ => return 1,
    }
    if is_current::<S>(message, start, fixed) == 0 {
        return 0;
    }
    if record_type == TYPE_CNAME {
        return follow_alias::<S>(message, data, ttl);
    }
    let found = message.found as usize;
    if found >= ADDRESSES {
        return 0;
    }
    message.addresses[found & (ADDRESSES - 1)] = AddressRecord {
        at: data,
        len,
        ttl,
        pad: 0,
    };
    message.found += 1;
    1
}

/// The offset behind the owner's name of a record; 0 if there is none.
#[inline(always)]
fn skip_owner<S: Steps>(message: &mut Message, start: u32) -> u32 {
    // Most names are only a pointer.
    if message.byte(start) >= POINTER {
        return start + 2;
    }
    follow_name::<S>(message, start)
}

/// Whether the name at `start`, which ends at `end`, is the one whose addresses count now.
#[inline(always)]
fn is_current<S: Steps>(message: &mut Message, start: u32, end: u32) -> u32 {
    let name = target(message, start);
    let current = message.current;
    if name == current {
        return 1;
    }
    let end = if name == start {
        end
    } else {
        follow_name::<S>(message, name)
    };
    // A pointer leads back, to a name that can be read.
    if name > start || end == 0 {
        return 0;
    }
    S::same_bytes(message, name, current, end - name)
}

/// Where a name begins that may be only a pointer to another.
#[inline(always)]
fn target(message: &Message, at: u32) -> u32 {
    if message.byte(at) < POINTER {
        return at;
    }
    START + (message.number(at) & 0x3fff)
}

/// Makes the target of an alias the name whose addresses count. Its data is exactly one name.
#[inline(always)]
fn follow_alias<S: Steps>(message: &mut Message, data: u32, ttl: u32) -> u32 {
    let next = message.next;
    if message.aliases >= ALIASES || follow_name::<S>(message, data) != next {
        return 0;
    }
    message.aliases += 1;
    message.ttl = ttl;
    // A pointer to a pointer is left to the agent.
    let current = target(message, data);
    message.current = current;
    u32::from(message.byte(current) < POINTER)
}

/// Follows a name that may be compressed to its root. Returns the offset behind the name; 0 if the name is malformed, too
/// long, or has a pointer that does not lead back.
#[inline(always)]
fn follow_name<S: Steps>(message: &mut Message, start: u32) -> u32 {
    S::follow_name(message, start)
}

/// See [`follow_name`].
#[inline(always)]
pub fn follow_labels<S: Steps>(message: &mut Message, start: u32) -> u32 {
    message.walk = NameWalk {
        at: start,
        end: 0,
        start,
        limit: message.end,
        total: 0,
        pad: 0,
    };
    let mut left = LABELS + POINTERS;
    while left > 0 {
        left -= 1;
        match S::follow_label(message) {
            CONTINUES => {}
            ENDS => return message.walk.end,
            _ => return 0,
        }
    }
    0
}

/// The name goes on behind what was read.
const CONTINUES: u32 = 1;
/// The name's root was read.
const ENDS: u32 = 2;

/// Reads a label, a pointer or the root of a name. Returns [`CONTINUES`], [`ENDS`], or 0 if the name is malformed.
#[inline(always)]
pub fn follow_label(message: &mut Message) -> u32 {
    let NameWalk {
        at,
        end,
        start,
        limit,
        total,
        ..
    } = message.walk;
    if at >= limit {
        return 0;
    }
    let len = message.byte(at);
    if len == 0 {
        if end == 0 {
            message.walk.end = at + 1;
        }
        return ENDS;
    }
    if len < POINTER {
        let total = total + 1 + len;
        if len > 63 || total >= NAME_MAX {
            return 0;
        }
        message.walk.at = at + 1 + len;
        message.walk.total = total;
        return CONTINUES;
    }
    let to = START + (message.number(at) & 0x3fff);
    if at + 2 > limit || to < QUESTION || to >= start {
        return 0;
    }
    if end == 0 {
        message.walk.end = at + 2;
    }
    message.walk.at = to;
    message.walk.start = to;
    message.walk.limit = start;
    CONTINUES
}

/// Whether the `len` bytes of a name at `a` are those at `b`, letters of either case being the same: both names then have
/// the same labels, and both end with the root or with the same pointer.
#[inline(always)]
pub fn same_bytes(message: &mut Message, a: u32, b: u32, len: u32) -> u32 {
    let mut index = 0;
    while index <= NAME_MAX {
        if index >= len {
            // The second byte of a pointer is no letter. The root is a zero byte.
            let last = message.byte(a + len - 1);
            return u32::from(last == message.byte(b + len - 1) || last == 0);
        }
        // Lengths and the first byte of a pointer are no letters.
        if lower(message.byte(a + index)) != lower(message.byte(b + index)) {
            return 0;
        }
        index += 1;
    }
    0
}

/// The byte, a letter in lower case. Without a branch: the verifier would follow each way from each byte on.
#[inline(always)]
fn lower(byte: u32) -> u32 {
    let from_a = core::hint::black_box(byte.wrapping_sub(u32::from(b'A')));
    let is_letter = (!from_a & from_a.wrapping_sub(26)) >> 31;
    byte | is_letter << 5
}

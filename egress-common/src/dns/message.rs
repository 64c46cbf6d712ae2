//! A message in memory, and what has been found in it.

use core::hint::black_box;

use crate::{
    address::{Address, UNSPECIFIED, from_v4},
    classes::ClassSet,
    records::{
        AllowKey, Decision, DecisionKey, LearnedEntry, NAME_WORDS, PendingKey, PendingQuery,
        QUESTION_WORDS,
    },
};

/// The longest message that is read, in bytes: all that fit into a frame of an ordinary MTU.
pub const MESSAGE_MAX: u32 = ROOM - START;
/// The bytes of [`Message::words`] that an offset may name; a power of two.
const ROOM: u32 = 2048;
/// The offset of the message in [`Message::words`]: the name in its question section then begins with a word.
pub const START: u32 = 4;
/// The length of the header (RFC 1035, section 4.1.1).
pub const HEADER: u32 = 12;
/// The offset of the question section.
pub const QUESTION: u32 = START + HEADER;
/// The index of the first word of the question section.
const QUESTION_WORD: usize = QUESTION as usize / 8;
/// Bytes behind [`ROOM`], so that a record's fixed fields and an address can be read at every offset.
const SLACK: u32 = 64;
const WORDS: usize = (ROOM + SLACK) as usize / 8;

/// Most labels of a name, the root included: a name has at most 255 bytes.
pub const LABELS: u32 = 128;
/// The longest name with the root's zero byte (RFC 1035, section 2.3.4).
pub const NAME_MAX: u32 = 255;
/// Most addresses of a response.
pub const ADDRESSES: usize = 32;

/// An address record of a response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct AddressRecord {
    /// The offset of the address in the message's memory.
    pub at: u32,
    /// 4 or 16.
    pub len: u32,
    /// The lowest TTL of the chain from the queried name to the address, in seconds.
    pub ttl: u32,
    /// Always zero.
    pub pad: u32,
}

/// How far a name has been followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct NameWalk {
    /// The offset of the next label.
    pub at: u32,
    /// The offset behind the bytes of the name itself; 0 until it is known.
    pub end: u32,
    /// Where the labels begin that are being read; the next pointer must lead before them.
    pub start: u32,
    /// The labels must end before this offset: after a pointer, before those that it belongs to.
    pub limit: u32,
    /// The length of the labels so far.
    pub total: u32,
    /// Always zero.
    pub pad: u32,
}

/// A message, and what has been found in it. Offsets count from the beginning of `words`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Message {
    /// The message, from [`START`] on, as it lies in memory; what follows it is left over from another.
    words: [u64; WORDS],
    /// The queried name, for the lookup of its decision.
    pub name: DecisionKey,
    /// The query, as it is to be kept.
    pub query: PendingQuery,
    /// The key of the query among those that are awaited.
    pub key: PendingKey,
    /// The key of an address that is being learned.
    pub address: AllowKey,
    /// The entry of that address.
    pub entry: LearnedEntry,
    /// The addresses that were found; [`Self::found`] of them count.
    pub addresses: [AddressRecord; ADDRESSES],
    /// The name that is being followed.
    pub walk: NameWalk,
    /// The end of the message.
    pub end: u32,
    /// The offset of the next record.
    pub next: u32,
    /// The offset of the name whose addresses count now: the queried name, or the alias that it led to.
    pub current: u32,
    /// How many aliases were followed.
    pub aliases: u32,
    /// The lowest TTL of these aliases, in seconds.
    pub ttl: u32,
    /// How many addresses were found.
    pub found: u32,
    /// 1 while a program uses this memory.
    pub busy: u32,
    /// Always zero, which the compiler does not know.
    zero: u32,
}

impl Message {
    /// An empty message.
    pub const EMPTY: Self = Self {
        words: [0; WORDS],
        name: DecisionKey {
            name: [0; NAME_WORDS],
        },
        query: PendingQuery {
            question: [0; QUESTION_WORDS],
            decision: Decision::NONE,
            time_ns: 0,
            policy: 0,
            len: 0,
        },
        key: PendingKey {
            pod_addr: UNSPECIFIED,
            resolver: UNSPECIFIED,
            pod_port: 0,
            resolver_port: 0,
            id: 0,
            pad: 0,
        },
        address: AllowKey { addr: UNSPECIFIED },
        entry: LearnedEntry {
            classes: ClassSet::EMPTY,
            internal_classes: ClassSet::EMPTY,
            expires_ns: 0,
            id: 0,
            addr: UNSPECIFIED,
        },
        addresses: [AddressRecord {
            at: 0,
            len: 0,
            ttl: 0,
            pad: 0,
        }; ADDRESSES],
        walk: NameWalk {
            at: 0,
            end: 0,
            start: 0,
            limit: 0,
            total: 0,
            pad: 0,
        },
        end: 0,
        next: 0,
        current: 0,
        aliases: 0,
        ttl: 0,
        found: 0,
        busy: 0,
        zero: 0,
    };

    /// Where the message is to be copied to, for [`MESSAGE_MAX`] bytes.
    #[inline(always)]
    pub const fn place(&mut self) -> *mut u8 {
        // SAFETY: `START` is within `words`.
        unsafe { self.words.as_mut_ptr().cast::<u8>().add(START as usize) }
    }

    /// Says how many bytes have been copied to [`Self::place`]; false if that cannot be.
    #[inline(always)]
    pub const fn set_len(&mut self, len: u32) -> bool {
        self.end = START + len;
        len >= HEADER && len <= MESSAGE_MAX
    }

    /// Copies a message here; false if it is too long or too short.
    pub fn load(&mut self, bytes: &[u8]) -> bool {
        if bytes.len() > MESSAGE_MAX as usize {
            return false;
        }
        // SAFETY: the place has room for the longest message.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.place(), bytes.len()) };
        self.set_len(bytes.len() as u32)
    }

    /// The addresses that were found, with their TTLs in seconds.
    pub fn found(&self) -> impl Iterator<Item = (Address, u32)> + '_ {
        let records = self.addresses.iter().take(self.found as usize);
        records.map(|record| (self.address_at(record.at, record.len), record.ttl))
    }

    /// The address of a record's data.
    #[inline(always)]
    pub fn address_at(&self, at: u32, len: u32) -> Address {
        if len == 4 {
            from_v4(self.read(at))
        } else {
            self.read(at)
        }
    }

    /// The bytes at an offset. An offset beyond the memory is taken modulo its size: the caller compares the result's end
    /// with [`Self::end`].
    #[inline(always)]
    pub fn read<const N: usize>(&self, at: u32) -> [u8; N] {
        const { assert!(N <= SLACK as usize) };
        // Otherwise the compiler could drop the mask where it knows that the offset is small, and the verifier, which
        // does not know it, would refuse the program. (`black_box` would take room on the stack each time.)
        // SAFETY: a field of this record.
        let zero = unsafe { (&raw const self.zero).read_volatile() };
        let at = ((at | zero) & (ROOM - 1)) as usize;
        // SAFETY: the offset is below `ROOM`, and `SLACK` bytes follow.
        unsafe {
            self.words
                .as_ptr()
                .cast::<u8>()
                .add(at)
                .cast::<[u8; N]>()
                .read_unaligned()
        }
    }

    /// The byte at an offset.
    #[inline(always)]
    pub fn byte(&self, at: u32) -> u32 {
        let [byte] = self.read::<1>(at);
        u32::from(byte)
    }

    /// The number of two bytes at an offset.
    #[inline(always)]
    pub fn number(&self, at: u32) -> u32 {
        u32::from(u16::from_be_bytes(self.read::<2>(at)))
    }

    /// Eight bytes of the question section, as they lie in memory.
    #[inline(always)]
    pub const fn question_word(&self, index: usize) -> u64 {
        self.words[QUESTION_WORD + index]
    }
}

/// All bits of those bytes of a word that lie before `end`, if the word is at the offset `at`. Without a branch: the verifier
/// would follow each way from each word on.
#[inline(always)]
pub fn bytes_before(end: u32, at: u32) -> u64 {
    let len = black_box(end.wrapping_sub(at)).cast_signed();
    let len = len & !(len >> 31);
    let is_whole = i64::from(7 - len) >> 63;
    // The programs are little-endian, and so is every machine that the agent runs on.
    let part = (1_u64 << ((len & 7) * 8)) - 1;
    part | is_whole.cast_unsigned()
}

/// The offset behind an uncompressed name; 0 if there is none, or it is too long.
#[inline(always)]
pub fn walk_name(message: &mut Message, start: u32) -> u32 {
    let mut at = start;
    let mut left = LABELS;
    while left > 0 {
        left -= 1;
        let len = message.byte(at);
        at += 1 + len;
        if len == 0 {
            let fits = at <= message.end && at - start <= NAME_MAX;
            return if fits { at } else { 0 };
        }
        if len > 63 || at >= message.end {
            return 0;
        }
    }
    0
}

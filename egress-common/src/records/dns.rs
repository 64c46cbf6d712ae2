//! The records by which the programs pass DNS on without the agent.

use crate::{address::Address, classes::ClassSet, ids::PodId};

/// Words of a [`DecisionKey`]: room for the longest name (RFC 1035, section 2.3.4).
pub const NAME_WORDS: usize = 32;
/// Words of the question section with the longest name, and its type and class.
pub const QUESTION_WORDS: usize = 33;

/// Key of a policy's map `decisions`: a name in wire form with its ASCII letters in lower case, followed by zeros.
/// Each word is eight of its bytes, as they lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct DecisionKey {
    /// The words.
    pub name: [u64; NAME_WORDS],
}

impl DecisionKey {
    /// The key of a name in wire form, in lower case and without the root's zero byte; `None` if it is too long.
    #[must_use]
    pub fn of_wire(wire: &[u8]) -> Option<Self> {
        let mut key = Self {
            name: [0; NAME_WORDS],
        };
        if wire.len() >= size_of::<Self>() {
            return None;
        }
        for (index, byte) in wire.iter().enumerate() {
            key.name[index / 8] |= u64::from(*byte) << (index % 8 * 8);
        }
        Some(key)
    }

    /// The name's bytes, followed by zeros.
    #[must_use]
    pub fn bytes(&self) -> [u8; 8 * NAME_WORDS] {
        let mut bytes = [0; 8 * NAME_WORDS];
        for (word, place) in self.name.iter().zip(bytes.chunks_exact_mut(8)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Value of a policy's map `decisions`: the pod may query the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Decision {
    /// The classes that the name gives to its addresses.
    pub classes: ClassSet,
    /// The subset of these classes that applies if the address is internal.
    pub internal_classes: ClassSet,
    /// By which the agent finds the name again in a [`LearnedEntry`].
    pub id: u64,
    /// The [`DnsTimes::generation`] of the settings under which the agent has decided.
    pub generation: u32,
    /// Bits of the `DECISION_*` constants.
    pub flags: u32,
}

impl Decision {
    /// A decision that gives nothing.
    pub const NONE: Self = Self {
        classes: ClassSet::EMPTY,
        internal_classes: ClassSet::EMPTY,
        id: 0,
        generation: 0,
        flags: 0,
    };
}

/// The programs may follow aliases from the name to its addresses.
pub const DECISION_ALIASES: u32 = 1;

/// Key of a pod's map `pending`: the ends of a query over UDP, and its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct PendingKey {
    /// The pod's address.
    pub pod_addr: Address,
    /// The resolver's address.
    pub resolver: Address,
    /// The pod's port, host byte order.
    pub pod_port: u16,
    /// The resolver's port, host byte order.
    pub resolver_port: u16,
    /// The id of the message, host byte order.
    pub id: u16,
    /// Always zero.
    pub pad: u16,
}

/// Value of a pod's map `pending`: a query that the programs have let pass, and its decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PendingQuery {
    /// The question section as it was sent, followed by zeros.
    pub question: [u64; QUESTION_WORDS],
    /// Its decision.
    pub decision: Decision,
    /// When it was sent, in nanoseconds of `CLOCK_BOOTTIME`.
    pub time_ns: u64,
    /// The policy version under which it passed.
    pub policy: u32,
    /// The length of the question section in bytes.
    pub len: u32,
}

/// Value of a policy's map `learned`: like an entry of the allow map, but written by the programs alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct LearnedEntry {
    /// The address's classes.
    pub classes: ClassSet,
    /// The subset of these classes that applies if the address is internal.
    pub internal_classes: ClassSet,
    /// When the entry stops admitting new connections, in nanoseconds of `CLOCK_BOOTTIME`.
    pub expires_ns: u64,
    /// The [`Decision::id`] of the name that resolved to the address last.
    pub id: u64,
    /// The key, as in [`super::AllowValue`].
    pub addr: Address,
}

/// Record of the ring `learned_notes`: a name has resolved to an address, and the agent does not know it yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct LearnedNote {
    /// The name.
    pub name: DecisionKey,
    /// The address.
    pub addr: Address,
    /// The end of the address's lifetime, in nanoseconds of `CLOCK_BOOTTIME`.
    pub expires_ns: u64,
    /// The pod.
    pub pod: PodId,
    /// 1 when aliases led from the name to the address.
    pub by_alias: u32,
}

/// Value of the single entry of `dns_times`: the settings for the addresses that the programs learn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DnsTimes {
    /// `dns.minTTL` in nanoseconds.
    pub min_ttl_ns: u64,
    /// `dns.maxTTL` in nanoseconds.
    pub max_ttl_ns: u64,
    /// `dns.grace` in nanoseconds.
    pub grace_ns: u64,
    /// When the agent last showed that it runs, in nanoseconds of `CLOCK_BOOTTIME`.
    pub beat_ns: u64,
    /// `whenAgentDown.resolveFor` in nanoseconds.
    pub resolve_for_ns: u64,
    /// Changes with the settings on which decisions depend.
    pub generation: u32,
    /// `whenAgentDown.undecided`: 1 for `deliver`, 0 for `hold`.
    pub delivers_undecided: u32,
}

/// An agent that has not shown for this long that it runs counts as down. It shows it four times a second.
const AGENT_DOWN_NS: u64 = 3_000_000_000;

impl DnsTimes {
    /// Whether no agent runs.
    #[inline(always)]
    #[must_use]
    pub const fn is_agent_down(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.beat_ns) > AGENT_DOWN_NS
    }

    /// Whether queries for decided names pass: while the agent runs, and for `resolve_for_ns` after it.
    #[inline(always)]
    #[must_use]
    pub const fn passes_decided(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.beat_ns) <= self.resolve_for_ns || !self.is_agent_down(now_ns)
    }

    /// Whether DNS messages that the agent has to read pass unread.
    #[inline(always)]
    #[must_use]
    pub const fn passes_undecided(&self, now_ns: u64) -> bool {
        self.delivers_undecided != 0 && self.is_agent_down(now_ns)
    }

    /// How long an address stays allowed that a response contains with this TTL. A TTL with its highest bit set counts
    /// as zero (RFC 2181, section 8).
    #[inline(always)]
    #[must_use]
    pub const fn lifetime_ns(&self, ttl: u32) -> u64 {
        let ttl = if ttl > i32::MAX as u32 { 0 } else { ttl };
        let ttl_ns = ttl as u64 * 1_000_000_000;
        let most = if ttl_ns < self.max_ttl_ns {
            ttl_ns
        } else {
            self.max_ttl_ns
        };
        let clamped = if most > self.min_ttl_ns {
            most
        } else {
            self.min_ttl_ns
        };
        clamped + self.grace_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    #[test]
    fn decided_names_pass_for_as_long_after_the_agent_as_configured() {
        let mut times = DnsTimes {
            beat_ns: 100 * SECOND_NS,
            resolve_for_ns: 60 * SECOND_NS,
            ..DnsTimes::default()
        };
        assert!(times.passes_decided(100 * SECOND_NS));
        assert!(times.passes_decided(160 * SECOND_NS));
        assert!(!times.passes_decided(160 * SECOND_NS + 1));
        // Whatever is configured, they pass while the agent runs. Another CPU may have read the clock earlier.
        times.resolve_for_ns = 0;
        assert!(times.passes_decided(99 * SECOND_NS));
        assert!(times.passes_decided(times.beat_ns + AGENT_DOWN_NS));
        assert!(!times.passes_decided(times.beat_ns + AGENT_DOWN_NS + 1));
    }

    #[test]
    fn undecided_names_pass_only_without_an_agent_and_if_configured() {
        let mut times = DnsTimes {
            beat_ns: 100 * SECOND_NS,
            ..DnsTimes::default()
        };
        assert!(!times.passes_undecided(u64::MAX));
        times.delivers_undecided = 1;
        assert!(!times.passes_undecided(100 * SECOND_NS));
        assert!(!times.passes_undecided(times.beat_ns + AGENT_DOWN_NS));
        assert!(times.passes_undecided(times.beat_ns + AGENT_DOWN_NS + 1));
    }
}

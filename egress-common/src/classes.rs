//! Sets of classes, and the search for the classes that match a port.

use crate::{
    limits::{CLASSES, PORT_INTERVALS},
    protocol::bits,
    records::PortClass,
};

/// 64-bit words of a [`ClassSet`].
const WORDS: usize = CLASSES / u64::BITS as usize;

/// A set of the classes of one policy: bit `n % 64` of word `n / 64` stands for class `n`.
///
/// Classes have the order of their precedence, so the first class of a set is the one that decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct ClassSet {
    /// The words, each in host byte order.
    pub words: [u64; WORDS],
}

/// All bits if a number is not zero, and none if it is.
///
/// The programs use masks where others would compare: their machine has no conditional move, so a comparison becomes
/// a branch, and the verifier explores all that follows once for each way. If the compiler knew where the number
/// comes from, it would recognise the comparison.
#[inline(always)]
pub fn mask_of(number: u64) -> u64 {
    let number = core::hint::black_box(number);
    ((number | number.wrapping_neg()).cast_signed() >> 63).cast_unsigned()
}

impl ClassSet {
    /// No class.
    pub const EMPTY: Self = Self { words: [0; WORDS] };
    /// Every class.
    pub const ALL: Self = Self {
        words: [u64::MAX; WORDS],
    };

    /// The set of one class.
    #[inline(always)]
    pub const fn one(class: u8) -> Self {
        let mut set = Self::EMPTY;
        set.words[class as usize / 64 % WORDS] = 1 << (class % 64);
        set
    }

    /// Whether it has no class.
    #[inline(always)]
    pub const fn is_empty(self) -> bool {
        self.words[0] | self.words[1] == 0
    }

    /// Whether both have a class.
    #[inline(always)]
    pub const fn meets(self, other: Self) -> bool {
        !self.and(other).is_empty()
    }

    /// The classes that are in both.
    #[inline(always)]
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.words, other.words);
        Self {
            words: [a & c, b & d],
        }
    }

    /// The classes that are in either.
    #[inline(always)]
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.words, other.words);
        Self {
            words: [a | c, b | d],
        }
    }

    /// Its classes that are not in the other.
    #[inline(always)]
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        let ([a, b], [c, d]) = (self.words, other.words);
        Self {
            words: [a & !c, b & !d],
        }
    }

    /// Its first class; [`crate::records::NO_CLASS`] if it has none.
    #[inline(always)]
    pub const fn first(self) -> u8 {
        let [low, high] = self.words;
        if low != 0 {
            low.trailing_zeros() as u8
        } else if high != 0 {
            64 + high.trailing_zeros() as u8
        } else {
            crate::records::NO_CLASS
        }
    }

    /// The set of its first class; empty if it has none. Without a branch.
    #[inline(always)]
    #[must_use]
    pub fn only_first(self) -> Self {
        let [low, high] = self.words;
        Self {
            words: [
                low & low.wrapping_neg(),
                high & high.wrapping_neg() & !mask_of(low),
            ],
        }
    }

    /// Itself under a mask of all bits, and nothing under a mask of none. Without a branch.
    #[inline(always)]
    #[must_use]
    pub const fn masked(self, mask: u64) -> Self {
        let [low, high] = self.words;
        Self {
            words: [low & mask, high & mask],
        }
    }

    /// [`mask_of`] whether it has a class.
    #[inline(always)]
    pub fn mask(self) -> u64 {
        let [low, high] = self.words;
        mask_of(low | high)
    }

    /// Its classes in order.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..CLASSES as u8).filter(move |class| self.meets(Self::one(*class)))
    }
}

impl core::ops::BitOrAssign for ClassSet {
    fn bitor_assign(&mut self, other: Self) {
        *self = self.or(other);
    }
}

/// Which classes match a protocol and port: the protocols of each class, and a division of all ports into intervals
/// within which the same classes match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PortTable {
    /// For each bit of [`bits`], by its number: the classes with this protocol.
    protocols: [ClassSet; 8],
    /// For each interval: the classes whose ports contain it.
    ports: [ClassSet; PORT_INTERVALS],
    /// The first port of each interval, ascending and in host byte order; the first is 0. Unused elements repeat
    /// the last interval's.
    starts: [u16; PORT_INTERVALS],
}

/// The classes of a policy need more than [`PORT_INTERVALS`] intervals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyIntervals {
    /// How many they need.
    pub needed: usize,
}

impl PortTable {
    /// The table of a policy without classes.
    pub const EMPTY: Self = Self {
        protocols: [ClassSet::EMPTY; 8],
        ports: [ClassSet::EMPTY; PORT_INTERVALS],
        starts: [0; PORT_INTERVALS],
    };

    /// The table of these classes; there are at most [`CLASSES`].
    ///
    /// # Errors
    ///
    /// When they need more than [`PORT_INTERVALS`] intervals.
    pub fn of(classes: &[PortClass]) -> Result<Self, TooManyIntervals> {
        let used = || classes.iter().zip(0..).filter(|(c, _)| c.protocols != 0);
        // More than can be used, and without an allocator: two borders for each class, and port 0.
        let mut borders = [0_u16; 2 * CLASSES + 1];
        let mut len = 1;
        for (class, _) in used() {
            let after = class.port_max.checked_add(1);
            for border in [Some(class.port_min), after].into_iter().flatten() {
                borders[len] = border;
                len += 1;
            }
        }
        borders[..len].sort_unstable();
        let mut table = Self::EMPTY;
        let mut intervals = 0;
        for i in 0..len {
            if i > 0 && borders[i] == borders[i - 1] {
                continue;
            }
            if let Some(start) = table.starts.get_mut(intervals) {
                *start = borders[i];
            }
            intervals += 1;
        }
        if intervals > PORT_INTERVALS {
            return Err(TooManyIntervals { needed: intervals });
        }
        let last = table.starts[intervals - 1];
        table.starts[intervals..].fill(last);
        for (class, index) in used() {
            let bit = ClassSet::one(index);
            for (protocol, set) in table.protocols.iter_mut().enumerate() {
                if class.protocols & (1 << protocol) != 0 {
                    *set |= bit;
                }
            }
            for (start, set) in table.starts.iter().zip(&mut table.ports) {
                if (class.port_min..=class.port_max).contains(start) {
                    *set |= bit;
                }
            }
        }
        Ok(table)
    }

    /// The classes that match a protocol and a port.
    ///
    /// `protocol` is one bit of [`bits`], or 0, which nothing matches; `port` is used only for protocols with ports
    /// and for [`bits::OTHER`].
    ///
    /// The search deliberately has no branches: the verifier follows each branch, and would explore all that comes
    /// afterwards once for every interval.
    #[inline(always)]
    pub fn matching(&self, protocol: u8, port: u16) -> ClassSet {
        // Without any protocol this is 8, and the mask leaves nothing.
        let by_protocol = self.protocols[(protocol.trailing_zeros() & 7) as usize];
        let by_ports = self.ports[self.interval(port)];
        let has_ports = mask_of(u64::from(protocol & (bits::WITH_PORTS | bits::OTHER)));
        by_protocol
            .and(by_ports.or(ClassSet::ALL.masked(!has_ports)))
            .masked(mask_of(u64::from(protocol)))
    }

    /// The number of the last interval that starts at the port or below it.
    #[inline(always)]
    fn interval(&self, port: u16) -> usize {
        const MASK: usize = PORT_INTERVALS - 1;
        let port = u64::from(port);
        let mut found = 0;
        let mut step = PORT_INTERVALS / 2;
        while step > 0 {
            let start = u64::from(self.starts[(found | step) & MASK]);
            // If the compiler knew how small the difference is, it would recognise a comparison.
            let is_above = core::hint::black_box(port.wrapping_sub(start)) >> 63;
            // All bits of the step, or none. Every kernel's verifier knows the bounds of this.
            found |= step & (is_above as usize).wrapping_sub(1);
            step /= 2;
        }
        // The compiler knows the bounds, and the verifier of 6.1 does not.
        core::hint::black_box(found) & MASK
    }
}

const _: () = assert!(WORDS == 2 && PORT_INTERVALS.is_power_of_two());

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn class(protocols: u8, port_min: u16, port_max: u16) -> PortClass {
        PortClass {
            port_min,
            port_max,
            protocols,
            ..PortClass::NONE
        }
    }

    #[test]
    fn the_first_class_of_a_set_is_the_lowest() {
        let set = |classes: &[u8]| {
            let mut set = ClassSet::EMPTY;
            for class in classes {
                set |= ClassSet::one(*class);
            }
            set
        };
        for (classes, first) in [
            (&[0, 5, 127][..], 0),
            (&[63, 64], 63),
            (&[64, 100], 64),
            (&[127], 127),
            (&[], crate::records::NO_CLASS),
        ] {
            let all = set(classes);
            assert_eq!(all.first(), first);
            assert_eq!(all.only_first(), set(&classes[..classes.len().min(1)]));
            assert!(all.iter().eq(classes.iter().copied()));
        }
    }

    #[test]
    fn classes_that_need_too_many_intervals_are_refused() {
        let spread: Vec<PortClass> = (0..128)
            .map(|n| class(bits::TCP, 10 + 10 * n, 10 + 10 * n))
            .collect();
        let error = PortTable::of(&spread).unwrap_err();
        assert_eq!(error, TooManyIntervals { needed: 257 });
        let table = PortTable::of(&spread[..127]).unwrap();
        assert_eq!(table.matching(bits::TCP, 1270), ClassSet::one(126));
        assert_eq!(table.matching(bits::TCP, 1271), ClassSet::EMPTY);
    }

    fn any_class() -> impl Strategy<Value = PortClass> {
        let port = prop_oneof![
            Just(0_u16),
            Just(1),
            Just(443),
            Just(65534),
            Just(65535),
            any::<u16>()
        ];
        let protocols = prop_oneof![
            Just(bits::ALL),
            Just(bits::TCP | bits::UDP),
            Just(bits::TCP),
            Just(bits::OTHER),
            Just(bits::ICMP_ECHO | bits::ICMP_OTHER),
            Just(0),
        ];
        (protocols, port.clone(), port)
            .prop_map(|(protocols, a, b)| class(protocols, a.min(b), a.max(b)))
    }

    proptest! {
        #[test]
        fn a_class_matches_by_its_protocols_and_ports(
            classes in prop::collection::vec(any_class(), 0..=100),
            protocol in (0..7_u32).prop_map(|bit| if bit == 6 { 0 } else { 1_u8 << bit }),
            port in prop_oneof![Just(0_u16), Just(443), Just(442), Just(65535), any::<u16>()],
        ) {
            let table = PortTable::of(&classes).unwrap();
            let ported = protocol & (bits::WITH_PORTS | bits::OTHER) != 0;
            let mut expected = ClassSet::EMPTY;
            for (class, index) in classes.iter().zip(0..) {
                let in_range = (class.port_min..=class.port_max).contains(&port);
                if class.protocols & protocol != 0 && (in_range || !ported) {
                    expected |= ClassSet::one(index);
                }
            }
            prop_assert_eq!(table.matching(protocol, port), expected);
        }
    }
}

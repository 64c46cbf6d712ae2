//! The numbers of pods, policy versions and interfaces, each as a type of its own: none of them is taken for another.
//!
//! A record in a map has such a number as a plain field behind methods, and a map of the programs has it as a plain
//! key. bpftool prints a type around a number as a structure, and a plain number as itself.

use core::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(transparent)]
        pub struct $name(u32);

        impl $name {
            /// The id with this number.
            #[must_use]
            #[inline(always)]
            pub const fn new(number: u32) -> Self {
                Self(number)
            }

            /// The number, for a map, a message to the kernel or a log.
            #[must_use]
            #[inline(always)]
            pub const fn get(self) -> u32 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        /// As a plain number, so that a list of ids in a log line is a list of numbers.
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

id! {
    /// A pod on this node, for its whole life: the key of `identities`, `meters`, `forged` and of its flow maps.
    PodId
}

id! {
    /// One version of a pod's policy: the key of `policies`, `allow` and `cidrs`.
    PolicyId
}

id! {
    /// The index of an interface in the node's network namespace: the key of `interfaces`.
    IfIndex
}

impl IfIndex {
    /// No interface has this index.
    pub const NONE: Self = Self(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_printed_as_their_numbers() {
        assert_eq!(PodId::new(7).to_string(), "7");
        let interfaces = [IfIndex::new(3), IfIndex::new(4)];
        assert_eq!(format!("{interfaces:?}"), "[3, 4]");
    }
}

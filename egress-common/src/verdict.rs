//! The verdict on a packet that leaves a pod, once the maps were asked.
//!
//! The kernel programs gather what the maps say about a destination into a [`Destination`] and
//! call [`judge`]; the agent calls the same function where it has to say what the kernel would do.

use crate::{
    limits::CLASSES,
    protocol::bits,
    reason::Reason,
    records::{
        NO_CLASS, POLICY_ALLOW_INTERNAL, POLICY_OPEN, POLICY_UNREADABLE, Policy, RANGE_INTERNAL,
        RANGE_PROTECTED,
    },
};

/// What the maps say about one destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// Classes of the address in the pod's allow map; 0 when it is not there.
    pub learned: u64,
    /// 1 when the allow map's entry has expired.
    pub expired: u64,
    /// Classes of the address in the policy's CIDR trie.
    pub cidr: u64,
    /// Kinds of the address in `ranges`.
    pub ranges: u64,
}

/// What was decided, and on what ground.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves.
    Pass,
    /// It does not leave. The class is the bit that denied, or [`NO_CLASS`].
    Deny {
        /// The most specific reason known.
        reason: Reason,
        /// Bit number of the denying class, or [`NO_CLASS`].
        class: u8,
    },
}

impl Verdict {
    #[inline(always)]
    const fn deny(reason: Reason) -> Self {
        Self::Deny {
            reason,
            class: NO_CLASS,
        }
    }
}

/// The lowest class among `candidates` that matches protocol and port, or [`NO_CLASS`].
///
/// `protocol` is one bit of [`bits`]; `port` is the destination port in host byte order and is
/// looked at only for protocols that have ports.
#[inline(always)]
pub fn matching_class(policy: &Policy, candidates: u64, protocol: u8, port: u16) -> u8 {
    let mut left = candidates;
    let mut n = 0;
    while n < CLASSES {
        if left == 0 {
            return NO_CLASS;
        }
        let bit = (left.trailing_zeros() as usize) & (CLASSES - 1);
        left &= left - 1;
        let class = &policy.classes[bit];
        if class.protocols & protocol != 0
            && (protocol & bits::WITH_PORTS == 0
                || (class.port_min <= port && port <= class.port_max))
        {
            return bit as u8;
        }
        n += 1;
    }
    NO_CLASS
}

/// Judges a packet to `destination` that no known flow carries: steps 6 to 9 of the order of the
/// verdict (`docs/architecture.md`).
///
/// `protocol` is one bit of [`bits`]; `port` is the destination port in host byte order.
#[inline(always)]
pub fn judge(policy: &Policy, destination: &Destination, protocol: u8, port: u16) -> Verdict {
    let protected = destination.ranges & RANGE_PROTECTED != 0;
    let learned = if protected || destination.expired != 0 {
        0
    } else {
        destination.learned
    };
    let any = if protected {
        policy.any & policy.deny
    } else {
        policy.any
    };
    let known = learned | destination.cidr | any;

    let denied = matching_class(policy, known & policy.deny, protocol, port);
    if denied != NO_CLASS {
        return Verdict::Deny {
            reason: Reason::DenyRule,
            class: denied,
        };
    }
    if matching_class(policy, known & !policy.deny, protocol, port) != NO_CLASS {
        return Verdict::Pass;
    }
    if protected {
        return Verdict::deny(Reason::Protected);
    }
    if destination.ranges & RANGE_INTERNAL != 0 && policy.flags & POLICY_ALLOW_INTERNAL != 0 {
        return Verdict::Pass;
    }
    if policy.flags & POLICY_OPEN != 0 {
        return Verdict::Pass;
    }
    if policy.flags & POLICY_UNREADABLE != 0 {
        return Verdict::deny(Reason::PolicyUnreadable);
    }
    if destination.expired != 0
        && matching_class(policy, destination.learned, protocol, port) != NO_CLASS
    {
        return Verdict::deny(Reason::Expired);
    }
    if known & !policy.deny != 0 {
        return Verdict::deny(Reason::PortNotAllowed);
    }
    if matching_class(policy, policy.named, protocol, port) != NO_CLASS {
        return Verdict::deny(Reason::AddressNotLearned);
    }
    Verdict::deny(Reason::NoRule)
}

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

/// Bitmap of the classes that match protocol and port.
///
/// `protocol` is one bit of [`bits`]; `port` is the destination port in host byte order and is
/// looked at only for protocols that have ports.
///
/// The loop has no branches, on purpose: a verifier follows each of them, and 64 times two paths
/// through it are more than it explores.
#[inline(always)]
pub fn matching_classes(policy: &Policy, protocol: u8, port: u16) -> u64 {
    let port = u64::from(port);
    let any_port = is_zero(u64::from(protocol & bits::WITH_PORTS));
    let mut matching = 0;
    let mut i = 0;
    while i < CLASSES {
        let class = &policy.classes[i];
        let below = is_negative(port.wrapping_sub(u64::from(class.port_min)));
        let above = is_negative(u64::from(class.port_max).wrapping_sub(port));
        let other_protocol = is_zero(u64::from(class.protocols & protocol));
        let matches = (any_port | ((below | above) ^ 1)) & (other_protocol ^ 1);
        matching = (matching >> 1) | (matches << (CLASSES - 1));
        i += 1;
    }
    matching
}

/// 1 when the sign bit is set.
#[inline(always)]
const fn is_negative(value: u64) -> u64 {
    value >> 63
}

/// 1 for zero, 0 for every other value below 2^63.
#[inline(always)]
const fn is_zero(value: u64) -> u64 {
    is_negative(value.wrapping_sub(1))
}

/// Judges a packet to `destination` that no known flow carries: steps 6 to 9 of the order of the
/// verdict (`docs/architecture.md`).
///
/// `protocol` is one bit of [`bits`]; `port` is the destination port in host byte order.
#[inline(always)]
pub fn judge(policy: &Policy, destination: &Destination, protocol: u8, port: u16) -> Verdict {
    let matching = matching_classes(policy, protocol, port);
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

    let denying = known & policy.deny & matching;
    if denying != 0 {
        return Verdict::Deny {
            reason: Reason::DenyRule,
            class: denying.trailing_zeros() as u8,
        };
    }
    if known & !policy.deny & matching != 0 {
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
    if destination.expired != 0 && destination.learned & matching != 0 {
        return Verdict::deny(Reason::Expired);
    }
    if known & !policy.deny != 0 {
        return Verdict::deny(Reason::PortNotAllowed);
    }
    if policy.named & matching != 0 {
        return Verdict::deny(Reason::AddressNotLearned);
    }
    Verdict::deny(Reason::NoRule)
}

//! The record of one version of a pod's policy.

use crate::{
    address::Address,
    classes::{ClassSet, PortTable},
    limits::{CLASSES, OWN_ADDRESSES},
};

/// A port class: the meaning of one bit of a class bitmap.
///
/// For [`crate::protocol::bits::OTHER`] the IP protocol number takes the place of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct PortClass {
    /// Lowest port, host byte order.
    pub port_min: u16,
    /// Highest port, inclusive, host byte order.
    pub port_max: u16,
    /// Set of [`crate::protocol::bits`].
    pub protocols: u8,
    /// Always zero.
    pub pad: [u8; 3],
}

impl PortClass {
    /// A class that matches nothing.
    pub const NONE: Self = Self {
        port_min: 0,
        port_max: 0,
        protocols: 0,
        pad: [0; 3],
    };
}

/// Value of `policies`, keyed by policy id: one immutable version of a pod's policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Policy {
    /// The meaning of each class, in the order of their precedence: those of [`Self::admin`], those that annotations
    /// and namespaced policies deny, those that they allow, and those of [`Self::baseline`]. The kernel reads
    /// [`Self::ports`] instead.
    pub classes: [PortClass; CLASSES],
    /// The same for the kernel: which classes match a protocol and port.
    pub ports: PortTable,
    /// Classes that deny.
    pub deny: ClassSet,
    /// The subset of these that denies only what the pod opens: answers on connections that others open pass.
    pub spares_answers: ClassSet,
    /// Classes that leave the decision to the next tier. All others that do not deny allow.
    pub pass: ClassSet,
    /// Classes of the first tier.
    pub admin: ClassSet,
    /// Classes of the last tier.
    pub baseline: ClassSet,
    /// Classes that apply to every destination.
    pub any: ClassSet,
    /// Classes of address entries that count like an entry for any destination: they allow neither protected
    /// destinations nor tunnels, nor DNS to servers that are no resolvers.
    pub under_any: ClassSet,
    /// Classes of entries with a name; only used for the reason of a denial.
    pub named: ClassSet,
    /// Fingerprint of the entries with a name. The kernel does not read it. A restarted agent compares it to
    /// decide whether the addresses in the allow map are valid under the current rules.
    pub names: u64,
    /// Fingerprint of the ranges and tunnels under which the policy's flows were judged, without resolvers.
    /// The kernel does not read it. A restarted agent adopts the policy, and with it the flows, only if its
    /// own ranges have the same fingerprint. Zero, which no ranges have, if some may have been judged under others.
    pub ranges: u64,
    /// SHA-256 of the annotations from which the policy was compiled; zero if there were none. The kernel
    /// does not read it. A restarted agent trusts saved annotations only if they have this digest.
    pub annotations: [u8; 32],
    /// The pod's own addresses.
    pub own: [Address; OWN_ADDRESSES],
    /// The number of used elements of `own`.
    pub own_len: u32,
    /// Bits of the `POLICY_*` constants.
    pub flags: u32,
}

/// Packets that match no entry pass (a pod with only `deny`).
pub const POLICY_OPEN: u32 = 1;
/// Internal destinations pass unless denied (`ranges.internal`).
pub const POLICY_ALLOW_INTERNAL: u32 = 1 << 1;
/// The annotations could not be read; the reason of denials is `policy_unreadable`.
pub const POLICY_UNREADABLE: u32 = 1 << 2;
/// The pod of the interface is not known yet: queries with any source wait at the gate, and the reason of
/// denials is `pod_unknown`.
pub const POLICY_UNIDENTIFIED: u32 = 1 << 3;
/// The policy allows or denies names. So DNS to a server that is not a resolver needs an address entry: the
/// gate does not see the names in it.
pub const POLICY_SPEAKS_OF_NAMES: u32 = 1 << 4;

/// A list of the pod, of its namespace or of a namespaced policy allows something: every external destination that
/// none of them allows is denied, whatever comes after them.
pub const POLICY_SELECTED: u32 = 1 << 7;

/// The pod has an interface that cannot be enforced, and is closed because of it; the reason of denials is
/// `unenforced_interface`.
pub const POLICY_REFUSED: u32 = 1 << 5;

/// Some of the own addresses were read from the pod's interfaces, and a program of the pod may have chosen
/// them. The kernel does not read the flag. It tells a restarted agent how far to trust them.
pub const POLICY_OWN_UNSURE: u32 = 1 << 6;

impl Policy {
    /// A policy without classes and addresses: every external destination is denied.
    pub const CLOSED: Self = Self {
        classes: [PortClass::NONE; CLASSES],
        ports: PortTable::EMPTY,
        deny: ClassSet::EMPTY,
        spares_answers: ClassSet::EMPTY,
        pass: ClassSet::EMPTY,
        admin: ClassSet::EMPTY,
        baseline: ClassSet::EMPTY,
        any: ClassSet::EMPTY,
        under_any: ClassSet::EMPTY,
        named: ClassSet::EMPTY,
        names: 0,
        ranges: 0,
        annotations: [0; 32],
        own: [[0; 16]; OWN_ADDRESSES],
        own_len: 0,
        flags: 0,
    };

    /// Classes that do not allow.
    #[inline(always)]
    pub const fn not_allowing(&self) -> ClassSet {
        self.deny.or(self.pass)
    }

    /// Whether names give addresses the same classes under both policies, and the classes mean the same. An
    /// entry of an allow map is then valid under both.
    pub fn names_alike(&self, other: &Self) -> bool {
        self.classes == other.classes
            && self.deny == other.deny
            && self.spares_answers == other.spares_answers
            && self.pass == other.pass
            && self.admin == other.admin
            && self.baseline == other.baseline
            && self.under_any == other.under_any
            && self.named == other.named
            && self.names == other.names
    }
}

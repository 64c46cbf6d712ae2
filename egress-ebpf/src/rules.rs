//! Judges a packet by the rules: looks up what the maps have about its destination, and decides.

use egress_common::{
    address::Address,
    classes::ClassSet,
    ids::PolicyId,
    packet::Packet,
    reason::Reason,
    records::{AllowKey, NO_CLASS, Policy, RANGE_NODE, Range, TunnelKey},
    translation::embedded_v4,
    verdict::{self, Destination, Translated, Verdict},
};

use crate::entries;
use crate::maps::{ALLOW, CIDR, DNS_PORT, LEARNED, LEARNS, NODE_ADDRESS, RANGE, TUNNEL};

/// The rules that apply to a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Rules {
    /// The packet belongs to no known flow.
    All,
    /// The packet belongs to a flow that an earlier policy admitted.
    OpenFlow,
    /// The packet answers a flow that the other side opened.
    Answer,
}

/// The rules do not deny the packet.
pub const PASSES: u32 = 0;

/// Added to a denial: the packet may be a tunnel that ends on the node.
pub const IS_TUNNEL: u32 = 1 << 24;

/// Judges a packet by the rules. Returns [`PASSES`]; or the reason and the denying class in its bytes, with
/// [`IS_TUNNEL`] for a tunnel.
///
/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn judge_by_rules(
    policy: *const Policy,
    policy_id: u32,
    packet: *const Packet,
    rules: u32,
    now_ns: u64,
) -> u32 {
    // SAFETY: each pointer is null or points to the caller's memory; the verifier has checked this.
    let (Some(policy), Some(packet)) = (unsafe { (policy.as_ref(), packet.as_ref()) }) else {
        return denied(Reason::NoPolicy, NO_CLASS);
    };
    let mut destination = Destination::default();
    // A flow that an earlier policy admitted continues if the current policy allows its destination, even
    // if the address has expired.
    let at_ns = if rules == Rules::OpenFlow as u32 {
        0
    } else {
        now_ns
    };
    look_up(policy, policy_id, packet, at_ns, &raw mut destination);
    let (protocol, port) = (packet.bit.into(), packet.class_port().into());
    decide(policy, &raw const destination, protocol, port, rules)
}

/// The verdict on a packet to a destination, as [`judge_by_rules`] returns it. `protocol` is one bit of `bits`.
///
/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn decide(
    policy: *const Policy,
    destination: *const Destination,
    protocol: u32,
    port: u32,
    rules: u32,
) -> u32 {
    // SAFETY: each pointer is null or points to the caller's memory; the verifier has checked this.
    let (Some(policy), Some(destination)) = (unsafe { (policy.as_ref(), destination.as_ref()) })
    else {
        return denied(Reason::NoPolicy, NO_CLASS);
    };
    let (protocol, port) = (protocol as u8, port as u16);
    let verdict = if rules == Rules::Answer as u32 {
        verdict::judge_answer(policy, destination, protocol, port)
    } else {
        verdict::judge(policy, destination, protocol, port)
    };
    match verdict {
        Verdict::Pass => PASSES,
        Verdict::Deny { reason, class } if destination.is_tunnel() => {
            denied(reason, class) | IS_TUNNEL
        }
        Verdict::Deny { reason, class } => denied(reason, class),
    }
}

/// The return value of [`judge_by_rules`] for a denial.
#[inline(always)]
pub const fn denied(reason: Reason, class: u8) -> u32 {
    1 << 16 | (reason as u32) << 8 | class as u32
}

/// Looks up what the maps have about a destination.
///
/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn look_up(
    policy: *const Policy,
    policy_id: u32,
    packet: *const Packet,
    now_ns: u64,
    destination: *mut Destination,
) -> u32 {
    // SAFETY: each pointer is null or points to the caller's memory; the verifier has checked this.
    let pointers = unsafe { (policy.as_ref(), packet.as_ref(), destination.as_mut()) };
    let (Some(policy), Some(packet), Some(destination)) = pointers else {
        return 0;
    };
    let policy_id = PolicyId::new(policy_id);
    let address = &packet.dst;
    destination.ranges = range_of(address).kinds;
    // SAFETY: none of the maps is preallocated, so an entry that is replaced lives until the
    // program ends.
    unsafe {
        let key = AllowKey { addr: *address };
        if let Some(entry) = ALLOW
            .get(&policy_id.get())
            .and_then(|allow| allow.get(key))
            .and_then(|value| entries::allowed(value, address))
        {
            destination.add_learned(
                entry.classes,
                entry.internal_classes,
                u64::from(entry.expires_ns <= now_ns),
            );
        }
        if LEARNS.load() != 0
            && let Some(entry) = LEARNED
                .get(&policy_id.get())
                .and_then(|learned| learned.get(key))
                .and_then(|value| entries::learned(value, address))
        {
            destination.add_learned(
                entry.classes,
                entry.internal_classes,
                u64::from(entry.expires_ns <= now_ns),
            );
        }
    }
    destination.cidr = prefix_classes(policy_id, address);
    let key = TunnelKey::new(packet.bit, packet.dst_port);
    // SAFETY: as above.
    let is_tunnel = unsafe { TUNNEL.get(key) }.is_some();
    destination.tunnel = u64::from(is_tunnel);
    if is_tunnel {
        destination.ranges |= node_kind(address);
    }
    if let Some(v4) = embedded_v4(address, destination.ranges) {
        let mut ranges = range_of(&v4).kinds;
        if is_tunnel {
            ranges |= node_kind(&v4);
        }
        let translated = Translated {
            cidr: prefix_classes(policy_id, &v4),
            ranges,
        };
        destination.add_translated(policy, translated);
    }
    1
}

/// [`RANGE_NODE`] if the node itself receives packets to the address. This matters only for tunnels.
#[inline(always)]
fn node_kind(address: &Address) -> u64 {
    if NODE_ADDRESS.get(&lpm_key(address)).is_some() {
        RANGE_NODE
    } else {
        0
    }
}

/// The classes of the address in the policy's CIDR trie.
#[inline(always)]
fn prefix_classes(policy: PolicyId, address: &Address) -> ClassSet {
    // SAFETY: the maps are not preallocated, so an entry that is replaced lives until the program
    // ends.
    let entry = unsafe { CIDR.get(&policy.get()) }.and_then(|cidrs| cidrs.get(&lpm_key(address)));
    entry.map_or(ClassSet::EMPTY, |entry| entry.classes)
}

/// The kind of the address on this node.
#[inline(always)]
pub fn range_of(address: &Address) -> Range {
    RANGE.get(&lpm_key(address)).copied().unwrap_or_default()
}

/// Whether a resolver may have this port.
#[inline(always)]
pub fn may_be_dns_port(port: u16) -> bool {
    // SAFETY: the entry lives as long as the map, and any bytes in it are ports.
    DNS_PORT
        .get(0)
        .is_some_and(|ports| unsafe { core::ptr::from_ref(ports).read_volatile() }.may_have(port))
}

#[inline(always)]
fn lpm_key(address: &Address) -> aya_ebpf::btf_maps::lpm_trie::Key<Address> {
    aya_ebpf::btf_maps::lpm_trie::Key::new(128, *address)
}

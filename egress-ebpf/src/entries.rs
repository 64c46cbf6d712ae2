//! Copies of entries that may be replaced while a program reads them ([`egress_common::records::InterfaceValue`]).

use core::sync::atomic::{Ordering, compiler_fence};

use egress_common::{
    address::{self, Address},
    classes::ClassSet,
    ids::IfIndex,
    records::{
        AllowEntry, AllowValue, Flow, FlowKey, FlowValue, Interface, InterfaceValue, LearnedEntry,
    },
};

use aya_ebpf::btf_maps::HashMap;

use crate::maps::INTERFACE;

/// What the map `interfaces` has about an interface.
pub enum Found {
    /// No entry.
    Nothing,
    /// The entry.
    Entry(Interface),
    /// An entry that was replaced while the program read it.
    Replaced,
}

/// The entry of an interface.
#[inline(always)]
pub fn of_interface(ifindex: IfIndex) -> Found {
    // SAFETY: the memory is that of some entry of the map until the program ends, and any bytes are a valid entry.
    let Some(value) = (unsafe { INTERFACE.get(ifindex.get()) }) else {
        return Found::Nothing;
    };
    let entry = InterfaceValue {
        pod: copy(&value.pod),
        policy: copy(&value.policy),
        mode: copy(&value.mode),
        flags: copy(&value.flags),
        ifindex: copy(&value.ifindex),
    };
    if entry.ifindex == ifindex.get() {
        Found::Entry(entry.interface())
    } else {
        Found::Replaced
    }
}

/// The entry of an address in the allow map, unless it was replaced while the program read it.
#[inline(always)]
pub fn allowed(value: &AllowValue, address: &Address) -> Option<AllowEntry> {
    let classes = (&value.classes, &value.internal_classes);
    of_address(classes, &value.expires_ns, &value.addr, address)
}

/// The same for an entry of the map `learned`.
#[inline(always)]
pub fn learned(value: &LearnedEntry, address: &Address) -> Option<AllowEntry> {
    let classes = (&value.classes, &value.internal_classes);
    of_address(classes, &value.expires_ns, &value.addr, address)
}

#[inline(always)]
fn of_address(
    (classes, internal_classes): (&ClassSet, &ClassSet),
    expires_ns: &u64,
    key: &Address,
    address: &Address,
) -> Option<AllowEntry> {
    let entry = AllowEntry {
        classes: copy_classes(classes),
        internal_classes: copy_classes(internal_classes),
        expires_ns: copy(expires_ns),
    };
    is_of(key, address).then_some(entry)
}

/// The flow with this key, unless it was replaced while the program read it.
#[inline(always)]
pub fn flow(value: &FlowValue, key: &FlowKey) -> Option<Flow> {
    let flow = copy(&value.flow);
    compiler_fence(Ordering::SeqCst);
    value.key.same(key).then_some(flow)
}

/// Whether the map still has this entry, so that what the program has read of it is of this key. For values that do not
/// repeat their key.
///
/// A program would have to be interrupted twice, each time within ten nanoseconds, to read another key's fields and then find
/// the entry in its place again.
#[inline(always)]
pub fn is_there<K, V, const N: usize, const F: usize>(
    map: &HashMap<K, V, N, F>,
    key: &K,
    entry: &V,
) -> bool {
    map.get_ptr(key)
        .is_some_and(|now| core::ptr::eq(now, entry))
}

/// Whether the key that an entry repeats is this address. The compiler does not move this read before earlier ones.
#[inline(always)]
pub fn is_of(key: &Address, address: &Address) -> bool {
    compiler_fence(Ordering::SeqCst);
    address::same(key, address)
}

#[inline(always)]
fn copy_classes(classes: &ClassSet) -> ClassSet {
    let [low, high] = &classes.words;
    ClassSet {
        words: [copy(low), copy(high)],
    }
}

/// A copy of a field, which the compiler moves neither before nor after the copies of others.
#[inline(always)]
pub fn copy<T: Copy>(field: &T) -> T {
    // SAFETY: the memory is that of some entry of the map until the program ends, and any bytes are a valid field.
    unsafe { core::ptr::from_ref(field).read_volatile() }
}

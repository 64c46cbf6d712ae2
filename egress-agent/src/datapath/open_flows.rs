//! Reads the open flows of a pod, a part at a time: a pod may have very many.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    task::Poll,
};

use aya::{
    maps::{HashMap, IterableMap as _, MapData, MapError},
    sys::SyscallError,
};
use egress_common::{
    address::Address,
    flow::is_open,
    records::{FlowKey, FlowValue},
};

use super::{AllowError, FlowMap};

/// Most flows that are read in one part: that takes some 20 µs.
const PART: usize = 256;

/// The open flows of a pod, as far as they have been read.
#[derive(Debug, Default)]
pub struct OpenFlows {
    /// Their destinations.
    pub to: HashSet<Address>,
    /// Where the next part begins.
    pub at: FlowPlace,
}

/// A place in a pod's maps of flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowPlace {
    map: usize,
    /// The bucket of the kernel's hash table; `None` for the first.
    pub bucket: Option<u32>,
}

impl FlowMap {
    /// Reads the next part of the pod's open flows. Ready when all have been read. A flow that begins meanwhile may be
    /// missing; one that was there before is not.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn read_open(&self, open: &mut OpenFlows, now_ns: u64) -> Poll<Result<(), AllowError>> {
        // A flow moves from the second map to the first when it is established. Read in this order, it is in one of them.
        let maps = [&self.opening, &self.flows];
        let Some(map) = maps.get(open.at.map) else {
            return Poll::Ready(Ok(()));
        };
        let part = read_part(map, &mut open.at.bucket).map_err(AllowError::Kernel)?;
        open.to.extend(
            part.iter()
                .filter(|value| is_open(&value.key, &value.flow, now_ns, self.udp_ns))
                .map(|value| value.key.peer_addr),
        );
        if open.at.bucket.is_none() {
            open.at.map += 1;
        }
        if open.at.map < maps.len() {
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    /// All open flows of the pod; see [`Self::read_open`].
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn open(&self, now_ns: u64) -> Result<OpenFlows, AllowError> {
        let mut open = OpenFlows::default();
        loop {
            if let Poll::Ready(result) = self.read_open(&mut open, now_ns) {
                return result.map(|()| open);
            }
        }
    }
}

/// Reads the values of some buckets of a hash map, from the bucket `from` on. Sets `from` to the next one, or to `None` after
/// the last one.
///
/// The kernel copies a bucket under its lock, so no value is of a key that was removed meanwhile, and an entry that stays in
/// the map is read exactly once, whatever else changes (`__htab_map_lookup_and_delete_batch`,
/// <https://github.com/torvalds/linux/blob/v6.6/kernel/bpf/hashtab.c>).
fn read_part(
    map: &HashMap<MapData, FlowKey, FlowValue>,
    from: &mut Option<u32>,
) -> Result<Vec<FlowValue>, MapError> {
    let mut most = PART;
    loop {
        match read_at_most(map, from, most) {
            // One bucket has more. This cannot go on: a bucket has at most all entries.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => most *= 2,
            read => {
                return read.map_err(|io_error| {
                    let call = "bpf_map_lookup_batch";
                    SyscallError { call, io_error }.into()
                });
            }
        }
    }
}

#[expect(unsafe_code, reason = "aya does not expose BPF_MAP_LOOKUP_BATCH")]
fn read_at_most(
    map: &HashMap<MapData, FlowKey, FlowValue>,
    from: &mut Option<u32>,
    most: usize,
) -> io::Result<Vec<FlowValue>> {
    /// `BPF_MAP_LOOKUP_BATCH`, `include/uapi/linux/bpf.h`.
    const MAP_LOOKUP_BATCH: libc::c_int = 24;

    let mut keys: Vec<FlowKey> = Vec::with_capacity(most);
    let mut values: Vec<FlowValue> = Vec::with_capacity(most);
    let mut next = 0_u32;
    let address = |bucket: &u32| (&raw const *bucket).expose_provenance() as u64;
    let mut attr = Batch {
        from: from.as_ref().map_or(0, address),
        next: (&raw mut next).expose_provenance() as u64,
        keys: keys.as_mut_ptr().expose_provenance() as u64,
        values: values.as_mut_ptr().expose_provenance() as u64,
        count: most as u32,
        map_fd: map.map().fd().as_fd().as_raw_fd().cast_unsigned(),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the size that the kernel gets is that of `attr`. `from` is null or points to the four bytes of a bucket's
    // number, `next` to as many writable ones. `keys` and `values` have room for `count` of the map's keys and values:
    // aya has compared the sizes of their types with those of the map.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            MAP_LOOKUP_BATCH,
            &raw mut attr,
            size_of::<Batch>(),
        )
    };
    let is_last = failed != 0;
    if is_last {
        let error = io::Error::last_os_error();
        // The kernel's way to tell that these are the last ones.
        if error.raw_os_error() != Some(libc::ENOENT) {
            return Err(error);
        }
    }
    let read = (attr.count as usize).min(most);
    // SAFETY: the kernel has written this many values, which is not more than there is room for. Every pattern of bits is a
    // valid value.
    unsafe { values.set_len(read) };
    *from = (!is_last).then_some(next);
    Ok(values)
}

/// The `batch` arm of `union bpf_attr`; its first two fields are called `in_batch` and `out_batch` there.
#[repr(C)]
struct Batch {
    from: u64,
    next: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

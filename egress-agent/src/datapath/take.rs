//! Takes entries out of hash maps that programs write at the same time.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::maps::{HashMap, IterableMap as _, MapData, MapError};

use super::policies::ignore_missing;

/// `BPF_MAP_LOOKUP_AND_DELETE_ELEM`, `include/uapi/linux/bpf.h`.
const LOOKUP_AND_DELETE: libc::c_int = 21;
/// The kernel's `ENOTSUPP`, which the C library does not know.
const ENOTSUPP: i32 = 524;

/// The part of `union bpf_attr` for commands on elements.
#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Removes an entry and returns the value that it had when it was removed; `None` if the map did not have it.
///
/// From kernel 5.14 on, no value that a program inserts meanwhile is lost: the kernel copies and removes the entry under one
/// lock (`__htab_map_lookup_and_delete_elem`, kernel/bpf/hashtab.c). Before, the entry is read and then removed.
pub(super) fn take<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    key: &K,
) -> Result<Option<V>, MapError> {
    match take_at_once(map, key) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(ENOTSUPP | libc::EINVAL | libc::EOPNOTSUPP)
            ) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        Err(error) => return Err(MapError::IoError(error)),
        Ok(value) => return Ok(Some(value)),
    }
    let value = match map.get(key, 0) {
        Err(MapError::KeyNotFound) => return Ok(None),
        value => value?,
    };
    ignore_missing(map.remove(key))?;
    Ok(Some(value))
}

#[expect(
    unsafe_code,
    reason = "aya exposes BPF_MAP_LOOKUP_AND_DELETE_ELEM for queues only"
)]
fn take_at_once<K: aya::Pod, V: aya::Pod>(map: &HashMap<MapData, K, V>, key: &K) -> io::Result<V> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attr = Element {
        map: map.map().fd().as_fd().as_raw_fd().cast_unsigned(),
        pad: 0,
        key: std::ptr::from_ref(key).expose_provenance() as u64,
        value: value.as_mut_ptr().expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: the size that the kernel gets is that of `attr`. aya has checked that the map's keys and values have the sizes
    // of `K` and `V`.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            LOOKUP_AND_DELETE,
            &raw mut attr,
            size_of::<Element>(),
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has written the value.
    Ok(unsafe { value.assume_init() })
}

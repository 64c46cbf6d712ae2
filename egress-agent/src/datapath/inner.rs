//! Inner maps: one allow map and one CIDR trie for each policy, and the flows of each pod.
//!
//! aya creates inner maps without type information, so bpftool would print them as bytes. Here they are
//! created from the definitions in the object file, with the BTF that the kernel already has for the
//! object's other maps.

use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, anyhow};
use aya::maps::{MapData, MapInfo};
use aya_obj::Object;
use egress_common::limits::{DECISIONS, LEARNED_ENTRIES, PENDING_QUERIES};

/// The definitions of the inner maps, and their type information.
pub(super) struct Templates {
    allow: aya_obj::Map,
    cidrs: aya_obj::Map,
    flows: aya_obj::Map,
    called: aya_obj::Map,
    order: aya_obj::Map,
    names: aya_obj::Map,
    decisions: aya_obj::Map,
    learned: aya_obj::Map,
    pending: aya_obj::Map,
    btf: OwnedFd,
}

impl Templates {
    /// Reads the definitions from the object file. `sample` is a plain map that was created when the object
    /// was loaded, so its type information belongs to this object.
    pub(super) fn new(object: &[u8], sample: &MapInfo) -> Result<Self> {
        let object = Object::parse(object).context("the eBPF object cannot be parsed")?;
        let inner = |name: &str| {
            object
                .maps
                .get(name)
                .and_then(aya_obj::Map::inner)
                .ok_or_else(|| anyhow!("the eBPF object has no map of maps `{name}`"))
        };
        Ok(Self {
            allow: inner("allow")?,
            cidrs: inner("cidrs")?,
            flows: inner("flows")?,
            called: inner("called")?,
            order: inner("order_to_pod")?,
            decisions: inner("decisions")?,
            learned: inner("learned")?,
            pending: inner("pending")?,
            names: object
                .maps
                .get("names")
                .cloned()
                .ok_or_else(|| anyhow!("the eBPF object has no map `names`"))?,
            btf: btf_of(sample)?,
        })
    }

    pub(super) fn allow(&self, entries: u32) -> Result<MapData> {
        self.create(&self.allow, "allow", entries)
    }

    pub(super) fn cidrs(&self, entries: u32) -> Result<MapData> {
        self.create(&self.cidrs, "cidrs", entries)
    }

    /// One of the maps of a pod's flows: `flows`, `inbound` or `opening`.
    pub(super) fn flows(&self, name: &str, entries: u32) -> Result<MapData> {
        self.create(&self.flows, name, entries)
    }

    /// The addresses and ports to which a pod has connected.
    pub(super) fn called(&self, entries: u32) -> Result<MapData> {
        self.create(&self.called, "called", entries)
    }

    /// A queue of flow keys. The kernel accepts no type information for queues.
    pub(super) fn order(&self, entries: u32) -> Result<MapData> {
        create(&self.order, "order", entries, None)
    }

    /// The decided names of a policy.
    pub(super) fn decisions(&self) -> Result<MapData> {
        self.create(&self.decisions, "decisions", DECISIONS)
    }

    /// The addresses that the programs have learned under a policy whose allow map has room for `allowed`.
    pub(super) fn learned(&self, allowed: u32) -> Result<MapData> {
        self.create(&self.learned, "learned", LEARNED_ENTRIES.min(allowed))
    }

    /// The queries of a pod that the programs have let pass.
    pub(super) fn pending(&self) -> Result<MapData> {
        self.create(&self.pending, "pending", PENDING_QUERIES)
    }

    /// The names of a pod's addresses.
    pub(super) fn names(&self, entries: u32) -> Result<MapData> {
        self.create(&self.names, "names", entries)
    }

    fn create(&self, template: &aya_obj::Map, name: &str, entries: u32) -> Result<MapData> {
        create(template, name, entries, Some(self.btf.as_fd()))
    }
}

fn create(
    template: &aya_obj::Map,
    name: &str,
    entries: u32,
    btf: Option<BorrowedFd<'_>>,
) -> Result<MapData> {
    let mut definition = template.clone();
    definition.set_max_entries(entries);
    MapData::create(definition, name, btf)
        .with_context(|| format!("cannot create a map `{name}` for {entries} entries"))
}

/// The BTF object that a loaded map refers to.
#[expect(unsafe_code, reason = "aya does not expose BPF_BTF_GET_FD_BY_ID")]
fn btf_of(info: &MapInfo) -> Result<OwnedFd> {
    /// `BPF_BTF_GET_FD_BY_ID`, `include/uapi/linux/bpf.h`.
    const BTF_GET_FD_BY_ID: libc::c_int = 19;
    /// `BPF_OBJ_GET_INFO_BY_FD`.
    const OBJ_GET_INFO_BY_FD: libc::c_int = 15;

    let map = info
        .fd()
        .context("cannot open a map of the loaded object")?;
    let map: BorrowedFd<'_> = map.as_fd();
    let mut raw = MapInfoHead::default();
    let mut attr = GetInfo {
        fd: std::os::fd::AsRawFd::as_raw_fd(&map).cast_unsigned(),
        len: size_of::<MapInfoHead>() as u32,
        info: (&raw mut raw).expose_provenance() as u64,
    };
    // SAFETY: the size that the kernel gets is that of `attr`, and `info` points to `len` writable bytes.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            OBJ_GET_INFO_BY_FD,
            &raw mut attr,
            size_of::<GetInfo>(),
        )
    };
    if failed != 0 {
        return Err(std::io::Error::last_os_error()).context("bpf(BPF_OBJ_GET_INFO_BY_FD)");
    }
    let mut attr = [raw.btf_id, 0, 0, 0];
    // SAFETY: the size that the kernel gets is that of `attr`; it reads only the first field.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BTF_GET_FD_BY_ID,
            attr.as_mut_ptr(),
            size_of_val(&attr),
        )
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("bpf(BPF_BTF_GET_FD_BY_ID)");
    }
    // SAFETY: the kernel has just created this descriptor for us, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The `info` arm of `union bpf_attr`.
#[repr(C)]
struct GetInfo {
    fd: u32,
    len: u32,
    info: u64,
}

/// The beginning of `struct bpf_map_info`, up to its BTF id.
#[derive(Default)]
#[repr(C)]
struct MapInfoHead {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    name: [u8; 16],
    ifindex: u32,
    btf_vmlinux_value_type_id: u32,
    netns_dev: u64,
    netns_ino: u64,
    btf_id: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
    pad: u32,
}

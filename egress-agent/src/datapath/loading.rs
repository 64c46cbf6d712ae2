//! Loads the compiled programs with their constants.

use std::borrow::Cow;

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData},
    programs::SchedClassifier,
    util::KernelVersion,
};
use aya_obj::Object;
use nix::sys::signal::{SigSet, SigmaskHow};

use super::{frame_record::FrameRecord, pins::Layout, stamp::Stamp};

/// The compiled programs.
pub(super) static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/egress-ebpf"));

/// Maps that all pods share; each is pinned under its own name.
const SHARED_MAPS: &[&str] = &[
    "interfaces",
    "identities",
    "policies",
    "allow",
    "cidrs",
    "flows",
    "inbound",
    "opening",
    "called",
    "decisions",
    "pending",
    "learned",
    "learned_notes",
    "dns_times",
    "order_from_pod",
    "order_to_pod",
    "ranges",
    "dns_ports",
    "tunnels",
    "link_owners",
    "link_locals",
    "link_hardware",
    "node_addresses",
    "forged",
    "meters",
    "counters",
    "held",
    "denials",
    "gate_awake",
    "probes",
    "stamp",
];

/// Oldest kernel that has every helper and map type that the programs use (ring buffers and
/// `bpf_ktime_get_boot_ns` came with 5.8; inner maps that are created while the outer one is in use, 5.10).
const OLDEST_KERNEL: KernelVersion = KernelVersion::new(5, 10, 0);

/// Oldest kernel that verifies a function with pointers among its parameters only once, for all callers
/// (`btf_prepare_func_args`, kernel/bpf/btf.c).
pub(super) const GLOBAL_FUNCTIONS: KernelVersion = KernelVersion::new(5, 12, 0);

/// Marks of the frames that the gate sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// The frame goes to the pod.
    pub deliver: u32,
    /// The frame comes from the pod.
    pub bounce: u32,
    /// The frame comes from the pod, and is judged once more.
    pub again: u32,
    /// The frame is counted and dropped.
    pub probe: u32,
}

/// The constants of the programs.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a constant of the programs"
)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Constants {
    pub(super) marks: Marks,
    pub(super) stamp: Stamp,
    pub(super) trace: bool,
    pub(super) udp_idle_ns: u64,
    pub(super) coarse_clock: bool,
    pub(super) frame_record: FrameRecord,
    pub(super) global_functions: bool,
    pub(super) learns: bool,
}

pub(super) fn check_kernel(kernel: KernelVersion) -> Result<()> {
    if kernel < OLDEST_KERNEL {
        bail!(
            "the kernel, {kernel}, is too old: the programs need ring buffers, \
             bpf_ktime_get_boot_ns and dynamic inner maps, which {OLDEST_KERNEL} has"
        );
    }
    Ok(())
}

/// Loads the object and its programs.
pub(super) fn load_object(layout: &Layout, constants: &Constants) -> Result<Ebpf> {
    let Constants {
        marks,
        stamp,
        trace,
        udp_idle_ns,
        coarse_clock,
        frame_record,
        global_functions,
        learns,
    } = constants;
    let (trace, coarse_clock) = (u8::from(*trace), u8::from(*coarse_clock));
    let learns = u8::from(*learns);
    let mut loader = EbpfLoader::new();
    loader
        .override_global("DELIVER_MARK", &marks.deliver, true)
        .override_global("BOUNCE_MARK", &marks.bounce, true)
        .override_global("AGAIN_MARK", &marks.again, true)
        .override_global("PROBE_MARK", &marks.probe, true)
        .override_global("STAMP", &stamp.0, true)
        .override_global("TRACE", &trace, true)
        .override_global("UDP_IDLE_NS", udp_idle_ns, true)
        .override_global("COARSE_CLOCK", &coarse_clock, true)
        .override_global("LEARNS", &learns, true)
        .override_global("RECORD_START", &frame_record.start, true)
        .override_global("RECORD_LEN", &frame_record.len, true)
        .override_global("SUMMED_AT", &frame_record.summed, true)
        .override_global("SUMMED_SHIFT", &frame_record.summed_shift, true)
        .override_global("CRC_AT", &frame_record.crc, true)
        .override_global("CRC_BIT", &frame_record.crc_bit, true)
        .override_global("SUM_AT", &frame_record.sum, true)
        .override_global("HEAD_AT", &frame_record.head, true)
        .override_global("END_AT", &frame_record.end, true)
        .override_global("GSO_TYPE_AT", &frame_record.gso_type, true);
    for &name in SHARED_MAPS {
        loader.map_pin_path(name, layout.map(name));
    }
    let object = if *global_functions {
        Cow::Borrowed(OBJECT)
    } else {
        Cow::Owned(without_function_info(OBJECT))
    };
    let mut ebpf = loader
        .load(&object)
        .context("the kernel rejects the eBPF object")?;
    for name in ["from_pod", "to_pod"] {
        let program: &mut SchedClassifier = ebpf
            .program_mut(name)
            .ok_or_else(|| anyhow!("the eBPF object has no program `{name}`"))?
            .try_into()?;
        load(program).with_context(|| format!("the kernel rejects the program `{name}`"))?;
        let info = program.info()?;
        tracing::debug!(
            program = name,
            verified_instructions = info.verified_instruction_count(),
            "loaded"
        );
    }
    Ok(ebpf)
}

/// The object without the information about which functions are global, so that the kernel verifies each
/// function as a part of its callers. The section with the information gets a name that no loader looks for.
fn without_function_info(object: &[u8]) -> Vec<u8> {
    const NAME: &[u8] = b".BTF.ext\0";
    const OTHER: &[u8] = b".off.ext\0";
    let mut object = object.to_vec();
    let places: Vec<usize> = object
        .windows(NAME.len())
        .enumerate()
        .filter(|(_, bytes)| *bytes == NAME)
        .map(|(at, _)| at)
        .collect();
    for at in places {
        object[at..at + OTHER.len()].copy_from_slice(OTHER);
    }
    object
}

/// Loads a program while the thread takes no signals: the verifier gives up with EAGAIN if the thread has one to handle
/// (`do_check`, kernel/bpf/verifier.c), be it only the end of a child process. Other threads take them meanwhile.
fn load(program: &mut SchedClassifier) -> Result<()> {
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let loaded = program.load();
    mask.thread_set_mask()?;
    Ok(loaded?)
}

pub(super) fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name)
        .ok_or_else(|| anyhow!("the eBPF object has no map `{name}`"))
}

/// Maps whose size only says how much may change at once.
const MAY_BE_SMALLER: [&str; 2] = ["ranges", "tunnels"];

/// aya uses a pinned map without comparing its shape, so this checks that the shape is the expected one.
pub(super) fn check_shapes(layout: &Layout) -> Result<()> {
    let object = Object::parse(OBJECT).context("the eBPF object cannot be parsed")?;
    for &name in SHARED_MAPS {
        let path = layout.map(name);
        if !path.exists() {
            continue;
        }
        let expected = object
            .maps
            .get(name)
            .ok_or_else(|| anyhow!("the eBPF object has no map `{name}`"))?;
        let found = MapData::from_pin(&path)
            .and_then(|map| map.info())
            .with_context(|| {
                format!("cannot read the shape of the pinned map {}", path.display())
            })?;
        // Earlier agents made these maps smaller.
        let may_be_smaller = MAY_BE_SMALLER.contains(&name);
        let entries = expected.max_entries();
        let expected = (
            expected.key_size(),
            expected.value_size(),
            if may_be_smaller {
                entries.min(found.max_entries())
            } else {
                entries
            },
            expected.map_flags(),
        );
        let found = (
            found.key_size(),
            found.value_size(),
            found.max_entries(),
            found.map_flags(),
        );
        if expected != found {
            bail!(
                "the pinned map {} has another shape (key, value, entries, flags {found:?}, not \
                 {expected:?}): another version of egress-agent created it; stop that one and run \
                 `egress-agent cleanup`",
                path.display()
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_function_info_is_removed_from_the_object() {
        let object = without_function_info(OBJECT);
        let differing = OBJECT.iter().zip(&object).filter(|(a, b)| a != b).count();
        assert_eq!((object.len(), differing), (OBJECT.len(), 3));
        let (before, after) = (Object::parse(OBJECT), Object::parse(&object));
        let before = before.expect("the object can be read");
        let after = after.expect("the object can be read");
        assert!(before.btf_ext.is_some() && after.btf_ext.is_none());
        assert!(after.btf.is_some(), "its types are gone");
        assert_eq!(before.programs.len(), after.programs.len());
    }

    #[test]
    fn the_error_about_an_old_kernel_names_what_it_lacks() {
        assert!(check_kernel(OLDEST_KERNEL).is_ok());
        assert!(check_kernel(KernelVersion::new(6, 18, 44)).is_ok());
        let message = check_kernel(KernelVersion::new(5, 4, 278))
            .expect_err("5.4 has no ring buffers")
            .to_string();
        for expected in ["5.4.278", "too old", "ring buffers", "5.10"] {
            assert!(
                message.contains(expected),
                "{expected} is missing: {message}"
            );
        }
    }
}
